"""From a kernel to a modelled number: run it in the simulator, estimate the trace, pick what a profile shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import nkisim
from nkisim import resolve_target
from nkisim.latency import Estimate, Slot, estimate
from nkisim.trace import Engine

NS_PER_US = 1000.0


def modelled(kernel: Callable[..., Any], *args: Any, target: str) -> Estimate:
    """The estimate of one run of `kernel` on `target`."""
    trace = nkisim.Trace()
    nkisim.simulate(kernel, target=target, trace=trace)(*args)
    return estimate(trace)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    """An input whose values do not matter: the model looks at shapes and types."""
    return np.zeros(shape, dtype)


def slots(e: Estimate, instruction: str, engine: Engine | None = None) -> list[Slot]:
    """All executions of an instruction, in program order."""
    found = [s for s in e.slots if s.record.instruction == instruction]
    found = [s for s in found if engine is None or s.record.engine is engine]
    return sorted(found, key=lambda s: s.record.index)


def duration_ns(slot: Slot) -> float:
    """From start to result, as a profile draws an instruction."""
    return slot.end_ns - slot.start_ns


def busy_us(e: Estimate, engine: str) -> float:
    """Time one compute engine of core 0 works."""
    return e.busy_us[f"0 {engine}"]


def moving_us(e: Estimate) -> float:
    """Mean time for which a DMA engine moves bytes, as a profile's packet time."""
    return sum(s.moving_ns for s in e.slots) / resolve_target(e.target).dma_engines / NS_PER_US


def last_byte_us(e: Estimate) -> float:
    """From the first trigger to the last byte of the last transfer, without the notice that it is done."""
    moves = [s for s in e.slots if s.record.engine is Engine.dma]
    return (max(s.start_ns + s.busy_ns for s in moves) - min(s.start_ns for s in moves)) / NS_PER_US


def extrapolated(f: Callable[[int], float], few: int, more: int, all_: int) -> float:
    """f(all_) from two smaller runs: what the first costs, and what every further unit adds.

    Only for kernels that repeat one unit of work; start and end effects are those of the small run.
    """
    first, second = f(few), f(more)
    return first + (second - first) / (more - few) * (all_ - few)
