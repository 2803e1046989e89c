"""What the tests of `neuronxcc.nki.isa` share: a kernel around a few instructions, and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nkisim import NkiError, Trace
from nkisim import legacy as nki
from nkisim.nki import recording

nl, nisa = nki.language, nki.isa
BF16 = np.dtype(nl.bfloat16)


def run(body: Callable[..., Any], *arrays: Any, target: str = "trn2") -> Any:
    """The tile that `body` makes of the loaded arrays, stored and returned as an array."""

    @nki.jit(mode="simulation", platform_target=target)
    def kernel(*inputs: Any) -> Any:
        made = body(*(nl.load(x) for x in inputs))
        result = nl.ndarray(made.shape, dtype=made.dtype, buffer=nl.shared_hbm)
        nl.store(result, made)
        return result

    return kernel(*arrays)


def traced(body: Callable[..., Any], *arrays: Any, target: str = "trn2") -> Trace:
    """The trace of `run`."""
    with recording() as found:
        run(body, *arrays, target=target)
    return found["kernel"]


def instructions(trace: Trace) -> list[str]:
    """The instructions of a trace but for loads and stores."""
    return [r.instruction for r in trace.records if r.instruction != "dma_copy"]


def refused(match: str, body: Callable[..., Any], *arrays: Any, target: str = "trn2") -> None:
    """The kernel is refused with a text that has `match` in it."""
    with pytest.raises(NkiError, match=match):
        run(body, *arrays, target=target)


def normal(*shape: int, seed: int = 0) -> Any:
    """float32 from a normal distribution."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(*shape: int, high: int = 100, dtype: Any = np.int32, seed: int = 0) -> Any:
    """Integers 0..high - 1."""
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def full(shape: tuple[int, ...], value: float, dtype: Any = np.float32) -> Any:
    """A tile of one value."""
    return nisa.memset(shape, value, dtype)
