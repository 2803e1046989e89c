"""`estimate`: the modelled time of a traced kernel, what bounds it, and what it spends the time on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from nkisim.errors import Site
from nkisim.hardware import Hardware, resolve_target
from nkisim.latency.constants import Constants
from nkisim.latency.schedule import Scheduler, Slot
from nkisim.trace import Engine, Trace

ENGINES = (Engine.tensor, Engine.vector, Engine.scalar, Engine.gpsimd)
NS_PER_US = 1000.0


@dataclass(frozen=True)
class Step:
    """One link of the critical path: the instruction, its line, and how long it held the path."""

    instruction: str
    site: Site
    core: int
    start_us: float
    held_us: float
    why: str


@dataclass(frozen=True)
class Line:
    """A source line and the engine time of all instructions it issued."""

    site: Site
    instructions: int
    busy_us: float


@dataclass(frozen=True)
class Estimate:
    """Modelled, not measured.

    Args:
        target: generation.
        total_us: from the first trigger to the last result.
        busy_us: time each engine works, by core and engine name ("0 tensor"); "dma" is the mean over the
            sixteen DMA engines, the gaps behind short runs of bytes included.
        hbm_read_bytes: bytes the DMA engines fetch from HBM.
        hbm_write_bytes: bytes they bring there.
        dma_bound_us: those bytes over the DMA bandwidth, of the core that moves the most; bytes copied inside
            HBM count once for the DMA engines and twice for the core's share of the HBM.
        compute_bound_us: busy time of the busiest compute engine.
        critical_path: the chain of waits that ends with the last result, first link first.
        expensive_lines: the ten source lines with the most engine time.
        assumed: constants and formulas that took part and that no document gives.
        slots: every instruction in time.
    """

    target: str
    total_us: float
    busy_us: dict[str, float]
    hbm_read_bytes: int
    hbm_write_bytes: int
    dma_bound_us: float
    compute_bound_us: float
    critical_path: tuple[Step, ...]
    expensive_lines: tuple[Line, ...]
    assumed: tuple[str, ...]
    slots: tuple[Slot, ...]

    @property
    def n_assumed(self) -> int:
        """How many assumed constants and formulas the result rests on."""
        return len(self.assumed)

    @property
    def utilisation(self) -> dict[str, float]:
        """Busy time over total time, by core and engine."""
        return {name: us / self.total_us if self.total_us else 0.0 for name, us in self.busy_us.items()}


def estimate(trace: Trace, target: str | None = None) -> Estimate:
    """The modelled execution of a trace; runs nothing and changes nothing.

    Args:
        trace: what `nkisim.simulate(kernel, trace=...)` recorded.
        target: generation whose costs apply; default the trace's own.

    Raises:
        NotImplementedError: a scheduling edge goes against program order.
        ValueError: the trace is empty, or of more cores than the target's launches have.
    """
    if not trace.records:
        raise ValueError("trace: received no records, allowed the trace of a kernel that ran")
    hardware: Hardware = resolve_target(target or trace.target or None)
    n_cores = len({r.core for r in trace.records})
    if n_cores > hardware.cores_per_launch_max:
        raise ValueError(
            f"trace: received one of {n_cores} cores, allowed 1..{hardware.cores_per_launch_max} on {hardware.target}"
        )
    c = Constants(hardware)
    slots = Scheduler(trace, c).run()
    bound: dict[int, float] = defaultdict(float)
    for s in slots:
        bound[s.record.core] += s.bound_ns / hardware.dma_engines
    busy = _busy(slots, c)
    return Estimate(
        hardware.target,
        max(s.end_ns for s in slots) / NS_PER_US,
        busy,
        sum(s.hbm_read_bytes for s in slots),
        sum(s.hbm_write_bytes for s in slots),
        max(bound.values()) / NS_PER_US,
        max((us for name, us in busy.items() if not name.endswith("dma")), default=0.0),
        _critical_path(slots),
        _expensive_lines(slots, c),
        tuple(sorted(c.assumed)),
        tuple(slots),
    )


def _busy(slots: list[Slot], c: Constants) -> dict[str, float]:
    busy: dict[str, float] = defaultdict(float)
    for core in sorted({s.record.core for s in slots}):
        for engine in ENGINES:
            busy[f"{core} {engine.name}"] = 0.0
        busy[f"{core} dma"] = 0.0
    for s in slots:
        if s.record.engine in ENGINES:
            busy[f"{s.record.core} {s.record.engine.name}"] += s.busy_ns / NS_PER_US
        elif s.record.engine is Engine.dma:
            busy[f"{s.record.core} dma"] += s.taken_ns / c.dma_engines / NS_PER_US
            if s.queue == "dma gpsimd":
                busy[f"{s.record.core} gpsimd"] += s.trigger_ns / NS_PER_US
    return dict(busy)


def _critical_path(slots: list[Slot]) -> tuple[Step, ...]:
    """Back from the last result: every link began when the one before let it."""
    last = max(range(len(slots)), key=lambda i: slots[i].end_ns)
    index: int | None = last
    until = slots[last].end_ns
    whole = True  # whether the link's end counts, or only that it was issued
    steps = []
    while index is not None:
        s = slots[index]
        if whole and s.turn_of is not None:
            start, why, index = s.turn_ns, "queue", s.turn_of
            # The transfer before may have had its own turn later, on other DMA engines than the one waited for.
            whole = slots[index].begin_ns < start
        else:
            start, why, index = s.start_ns, s.why, s.cause
            whole = why != "queue"
        steps.append(
            Step(
                s.record.instruction,
                s.record.site,
                s.record.core,
                start / NS_PER_US,
                (until - start) / NS_PER_US,
                why,
            )
        )
        until = start
    return tuple(reversed(steps))


def _expensive_lines(slots: list[Slot], c: Constants, n: int = 10) -> tuple[Line, ...]:
    count: dict[Site, int] = defaultdict(int)
    busy: dict[Site, float] = defaultdict(float)
    for s in slots:
        count[s.record.site] += 1
        work = s.taken_ns / c.dma_engines if s.record.engine is Engine.dma else s.busy_ns
        busy[s.record.site] += work / NS_PER_US
    lines = [Line(site, count[site], busy[site]) for site in busy]
    return tuple(sorted(lines, key=lambda line: -line.busy_us)[:n])
