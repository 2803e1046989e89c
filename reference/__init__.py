"""NumPy oracles in float64 and natural layouts; they share no code with the kernels or the simulator."""
