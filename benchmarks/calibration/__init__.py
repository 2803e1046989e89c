"""Published Neuron latencies beside what the latency model says: `python -m benchmarks.calibration`."""
