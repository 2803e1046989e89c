"""`nki.language` of the kernels on top of `neuronxcc.nki`: tensors, loops, and the names of types and operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from contributed._neuronxcc_launch import program
from contributed._neuronxcc_tensors import DTYPES, Dtype, Tensor
from contributed._neuronxcc_vendor import nl as vendor

sbuf, psum, hbm, private_hbm, shared_hbm = "sbuf", "psum", "hbm", "private_hbm", "shared_hbm"
tile_size = SimpleNamespace(pmax=vendor.tile_size.pmax, psum_bank_fmax=vendor.tile_size.psum_fmax)
OPERATORS = (
    "add",
    "subtract",
    "multiply",
    "maximum",
    "minimum",
    "equal",
    "less",
    "less_equal",
    "greater",
    "greater_equal",
    "bitwise_and",
    "bitwise_or",
    "left_shift",
    "right_shift",
    "exp",
    "log",
    "tanh",
    "relu",
    "sign",
    "square",
    "abs",
    "copy",
    "sigmoid",
    "sqrt",
    "rsqrt",
    "reciprocal",
)


class NKIObject:
    """Base of classes that kernels use."""


def ndarray(shape: tuple[int, ...], dtype: Dtype, buffer: str = "sbuf") -> Tensor:
    """A new tensor."""
    return program().ndarray(tuple(shape), dtype, buffer)


def shared_identity_matrix(n: int, dtype: Dtype) -> Tensor:
    """The identity [n, n] in SBUF."""
    t = program().ndarray((n, n), dtype, "sbuf")
    t.storage.identity = True
    if not program().dry:
        constant = vendor.shared_constant(np.identity(n, np.int8), dtype=dtype.vendor)
        t.storage.of(dtype)[...] = vendor.load(constant)
    return t


def fori_loop(start: Any, end: Any, body: Any, step: int = 1) -> None:
    """body(i) for i from `start` to before `end`, one of which may be a register that only the device knows."""
    program().fori_loop(start, end, body, step)


def program_id(axis: int) -> int:
    """Number of the core, axis 0."""
    assert axis == 0, f"axis: received {axis}, allowed 0"
    return program().core


def num_programs() -> int:
    """Cores of the launch."""
    return program().cores


def __getattr__(name: str) -> Any:
    """Types of the adapter; operators of neuronxcc."""
    if name in DTYPES:
        return DTYPES[name]
    if name in OPERATORS:
        return getattr(vendor, name)
    raise AttributeError(f"nl.{name}: not in the adapter for neuronxcc.nki")
