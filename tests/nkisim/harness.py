"""Small kernels for tests of single instructions: bring arrays on chip, run, bring the result back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl

TARGETS = ("trn1", "trn2", "trn3")


def sb(x: Any, dtype: Any = None) -> Any:
    """Inside a kernel: an HBM tensor's values in a new SBUF tile of the same shape."""
    t = nl.ndarray(x.shape, dtype or x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=t, src=x)
    return t


def ps(x: Any, dtype: Any = None) -> Any:
    """Inside a kernel: an HBM tensor's values in a new PSUM tile of the same shape."""
    t = nl.ndarray(x.shape, dtype or x.dtype, buffer=nl.psum)
    nisa.tensor_copy(dst=t, src=sb(x))
    return t


def tile(shape: Sequence[int], dtype: Any = nl.float32, buffer: Any = nl.sbuf) -> Any:
    """Inside a kernel: a new, undefined tile."""
    return nl.ndarray(tuple(shape), dtype, buffer=buffer)


def out(t: Any) -> Any:
    """Inside a kernel: a tile's values in a new shared HBM tensor, to be returned."""
    if t.buffer is nl.psum:
        copy = nl.ndarray(t.shape, t.dtype)
        nisa.tensor_copy(dst=copy, src=t)
        t = copy
    o = nl.ndarray(t.shape, t.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=o, src=t)
    return o


def run(kernel: Callable[..., Any], *arrays: Any, target: str = "trn2", precise: bool = True) -> Any:
    """The kernel's result in the simulator."""
    return nkisim.simulate(kernel, target=target, precise=precise)(*arrays)


def traced(kernel: Callable[..., Any], *arrays: Any, target: str = "trn2") -> nkisim.Trace:
    """The kernel's trace."""
    trace = nkisim.Trace()
    nkisim.simulate(kernel, target=target, trace=trace)(*arrays)
    return trace


def refused(
    kernel: Callable[..., Any],
    *arrays: Any,
    instruction: str,
    operand: str = "",
    rule: str,
    received: str,
    allowed: str,
    target: str = "trn2",
) -> nkisim.NkiError:
    """Assert that the kernel is refused with these facts, at a line of the test file that defined it."""
    with pytest.raises(nkisim.NkiError) as caught:
        run(kernel, *arrays, target=target)
    error = caught.value
    assert error.instruction == instruction
    assert error.operand == operand
    assert rule in error.rule, str(error)
    assert received in str(error.received), str(error)
    assert allowed in str(error.allowed), str(error)
    assert error.source
    assert error.site.file == kernel.__code__.co_filename, str(error)
    first = kernel.__code__.co_firstlineno
    assert first <= error.site.line, str(error)
    return error


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def integers(*shape: int, low: int, high: int, seed: int = 0, dtype: Any = np.int32) -> np.ndarray:
    """Uniform integers in [low, high)."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
