"""The `neuronxcc.nki` module of SDK 2.26, over the simulator's instructions.

Simulation is eager: loops run as Python, one program of a grid after the other. Index expressions become strided views,
masks the rectangles that they leave, tiles by value the destinations of instructions (`_issue`).

Rules of "NKI API errors" that it does not see, because they are about the text of the program, or about the device:

- err_local_variable_used_out_of_scope for the branches of an `if` and for loops over Python's `range`
  (the compiler makes those sequential loops; here they are unrolled);
- err_annotation_shape_mismatch for annotated variables of functions without `jit` that a kernel calls;
- err_shared_hbm_must_in_kernel_level under an `if`;
- err_unexpected_output_dependencies between the programs of a grid, and between places that overlap in part.
"""

from __future__ import annotations

from nkisim.legacy import compiler, isa, language, typing
from nkisim.legacy._device import benchmark, profile
from nkisim.legacy._launch import baremetal, jit, simulate_kernel, trace
from nkisim.legacy._tile import Tile as tensor

__all__ = [
    "baremetal",
    "benchmark",
    "compiler",
    "isa",
    "jit",
    "language",
    "profile",
    "simulate_kernel",
    "tensor",
    "trace",
    "typing",
]
