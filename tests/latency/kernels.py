"""Traces of small kernels, and the cost of one of their instructions in cycles of its engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.hardware import resolve_target
from nkisim.latency import Estimate, Slot, estimate
from nkisim.latency.constants import Constants
from nkisim.latency.costs import Cost, cost
from nkisim.trace import Engine, Record

TARGETS = ("trn1", "trn2", "trn3")


def tile(shape: Sequence[int], dtype: Any = nl.float32, buffer: Any = nl.sbuf, value: Any = 1) -> Any:
    """Inside a kernel: a tile that was written."""
    t = nl.ndarray(tuple(shape), dtype, buffer=buffer)
    nisa.memset(dst=t, value=value)
    return t


def new(shape: Sequence[int], dtype: Any = nl.float32, buffer: Any = nl.sbuf) -> Any:
    """Inside a kernel: a tile that was not."""
    return nl.ndarray(tuple(shape), dtype, buffer=buffer)


def traced(kernel: Callable[..., Any], *arrays: Any, target: str = "trn2", cores: int = 1) -> nkisim.Trace:
    """The kernel's trace."""
    trace = nkisim.Trace()
    jitted = nkisim.jit(kernel)
    nkisim.simulate(jitted[cores] if cores > 1 else jitted, target=target, trace=trace)(*arrays)
    return trace


def estimated(kernel: Callable[..., Any], *arrays: Any, target: str = "trn2", cores: int = 1) -> Estimate:
    """The estimate of the kernel's trace."""
    return estimate(traced(kernel, *arrays, target=target, cores=cores))


def last(kernel: Callable[..., Any], *arrays: Any, target: str = "trn2") -> Record:
    """The last instruction of the kernel."""
    return traced(kernel, *arrays, target=target).records[-1]


def ghz(record: Record, target: str) -> float:
    """Clock of the record's engine."""
    clock = {"trn1": (2.8, 1.12, 1.4, 1.4), "trn2": (2.4, 0.96, 1.2, 1.2), "trn3": (2.4, 1.2, 1.2, 1.2)}[target]
    return clock[(Engine.tensor, Engine.vector, Engine.scalar, Engine.gpsimd).index(record.engine)]


def spent(record: Record, target: str, loaded: set[str] | None = None) -> tuple[Cost, set[str]]:
    """A record's cost, activation tables loaded unless `loaded` says which are, and what it rests on."""
    c = Constants(resolve_target(target))
    loaded = {str(record.attrs.get("op"))} if loaded is None else loaded
    return cost(record, c, loaded), c.assumed


def cycles(kernel: Callable[..., Any], *arrays: Any, target: str = "trn2") -> float:
    """Engine cycles that the kernel's last instruction is busy."""
    record = last(kernel, *arrays, target=target)
    return round(spent(record, target)[0].busy_ns * ghz(record, target), 6)


# What a result takes beyond its instruction on trn2, in ns: latencies, semaphore, notice of a transfer.
VECTOR, SCALAR, TENSOR, SEMAPHORE, DONE = 144 / 0.96, 353 / 1.2, 165.0, 33.0, 300.0


def found(e: Estimate, instruction: str, core: int | None = None) -> list[Slot]:
    """Executions of an instruction in program order."""
    slots = [s for s in e.slots if s.record.instruction == instruction and core in (None, s.record.core)]
    return sorted(slots, key=lambda s: (s.record.core, s.record.index))


def cause(e: Estimate, slot: Slot) -> Slot | None:
    """What a slot waited for last."""
    return None if slot.cause is None else e.slots[slot.cause]


def copied(n: int = 960, src: Any = None) -> Any:
    """Inside a kernel: a float32 copy that takes the Vector Engine n cycles."""
    y = new((128, n))
    nisa.tensor_copy(dst=y, src=tile((128, n)) if src is None else src, engine=nisa.engine.vector)
    return y


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    """An input; only its shape and type count."""
    return np.zeros(shape, dtype)


def copy(
    dst: tuple[Any, Any], src: tuple[Any, Any], n: int = 1024, step: int = 1, engine: Any = nisa.engine.vector
) -> Any:
    """A kernel: tensor_copy between (dtype, buffer) pairs, both `step` elements apart."""

    def kernel() -> None:
        a, b = new((128, n * step), *dst), tile((128, n * step), *src)
        nisa.tensor_copy(dst=a[:, ::step], src=b[:, ::step], engine=engine)

    return kernel
