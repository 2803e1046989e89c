"""Traces of small kernels, and the cost of one of their instructions in cycles of its engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.hardware import resolve_target
from nkisim.latency import Estimate, estimate
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
