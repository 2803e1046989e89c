"""What a benchmark is: named cases, what a run of one gives, and the tables that show it.

Later benchmarks add a module with a `Benchmark` and its name to `benchmarks/run.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any, Protocol

from benchmarks.calibration.report import number, replaced
from nkisim.latency import Estimate

ENGINES = ("tensor", "vector", "scalar", "gpsimd", "dma")
PATH_PARTS = 3


@dataclass(frozen=True)
class Goal:
    """What a case should reach on one target.

    Args:
        quantity: `ratio`, `over_busiest`, `modelled_us` or `slow_down`, at most `limit`; or `speed_up` or `useful`, at
            least `limit`.
        limit: in the quantity's unit.
        target: the only chip it is meant for.
        over: the baseline, for `speed_up` and `slow_down`.

    Which of these a benchmark knows is said by its `Result.values`.
    """

    quantity: str
    limit: float
    target: str = "trn2"
    over: str = "the teaching kernel"

    def met(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.limit if self.quantity in ("speed_up", "useful") else value <= self.limit

    def __str__(self) -> str:
        limit = number(self.limit)
        return {
            "ratio": f"{limit}x the bound",
            "over_busiest": f"{limit}x the busiest engine",
            "useful": f"{self.limit:.0%} useful TensorE",
            "modelled_us": f"at most {limit} us",
            "speed_up": f"{limit}x {self.over}",
            "slow_down": f"at most {limit}x the time of {self.over}",
        }[self.quantity]


@dataclass(frozen=True)
class Published:
    """A time that somebody measured on a device for the same or nearly the same problem.

    Args:
        what: implementation, and how its problem differs.
        us: microseconds.
        target: chip.
        by: who measured it, and how.
    """

    what: str
    us: float
    target: str
    by: str


class Case(Protocol):
    """A named problem."""

    @property
    def name(self) -> str:
        """On the command line and in tables."""

    @property
    def shape(self) -> str:
        """Its shape and options in short, a model's name among them."""

    @property
    def goals(self) -> tuple[Goal, ...]:
        """What it should reach."""

    @property
    def published(self) -> tuple[Published, ...]:
        """What others measured."""

    def refused(self, target: str) -> str:
        """Why it cannot run on a target; empty if it can."""


@dataclass(frozen=True)
class Check:
    """The comparison with the float64 oracle, by the budget of `reference/budget.py`.

    Args:
        checked: how many `units` were compared.
        of: how many there are.
        units: what is counted.
        share: largest share of its error budget that a row uses; above 1 the case has failed.
        failure: why it failed; empty if it did not.
    """

    checked: int
    of: int
    units: str
    share: float
    failure: str = ""

    def __str__(self) -> str:
        return f"{self.checked} of {self.of} {self.units}, {self.share:.2f} of the budget"


@dataclass(frozen=True)
class Timing:
    """Modelled, not measured; of all kernels of the case, one after the other.

    Args:
        modelled_us: from the first trigger to the last result, summed over the kernels.
        dma_bound_us: the bytes that have to be read at least, over the DMA rate of the cores in use.
        traffic_bound_us: the same of all bytes that the kernels do move (`Estimate.dma_bound_us`).
        busy_us: time that each engine works, of the core where it works longest.
        hbm_read_bytes: bytes read from HBM.
        hbm_write_bytes: bytes written there.
        path_us: the critical path by instruction.
        instructions: executed on all cores.
    """

    modelled_us: float
    dma_bound_us: float
    traffic_bound_us: float
    busy_us: dict[str, float]
    hbm_read_bytes: int
    hbm_write_bytes: int
    path_us: dict[str, float]
    instructions: int

    @classmethod
    def of(cls, estimates: Sequence[Estimate], dma_bound_us: float) -> Timing:
        """The sum of the kernels' estimates."""
        path: Counter[str] = Counter()
        for e in estimates:
            for step in e.critical_path:
                path[step.instruction] += step.held_us  # type: ignore[assignment]
        return cls(
            sum(e.total_us for e in estimates),
            dma_bound_us,
            sum(e.dma_bound_us for e in estimates),
            {name: sum(_busiest(e, name) for e in estimates) for name in ENGINES},
            sum(e.hbm_read_bytes for e in estimates),
            sum(e.hbm_write_bytes for e in estimates),
            dict(path.most_common()),
            sum(len(e.slots) for e in estimates),
        )

    @property
    def ratio(self) -> float:
        """Modelled time over the bound."""
        return self.modelled_us / self.dma_bound_us


def _busiest(e: Estimate, engine: str) -> float:
    return max(us for name, us in e.busy_us.items() if name.split()[1] == engine)


@dataclass(frozen=True)
class Baseline:
    """Another kernel on the same problem.

    Args:
        us: modelled time, None where it cannot solve the problem.
        how: how the time came about, or why there is none.
        kernel: which one.
    """

    us: float | None
    how: str
    kernel: str = "teaching kernel"


@dataclass(frozen=True)
class Skipped:
    """What a case leaves out: (KV head, tile) pairs of all sequences, as the oracle counts and the kernel reads them.

    Args:
        threshold: of the rule that the benchmark is named after.
        k_tiles: pairs whose K is not read.
        v_tiles: pairs whose V is not read.
        of: all pairs.
        error: largest |o - dense o| / |dense o| of a query head; dense is the float64 result of all tiles. NaN where
            nobody looked.
    """

    threshold: float
    k_tiles: int
    v_tiles: int
    of: int
    error: float

    @property
    def share(self) -> float:
        """Of the pairs whose V is not read."""
        return self.v_tiles / self.of


@dataclass(frozen=True)
class Result:
    """A case that ran. A failed one has no times."""

    case: Case
    target: str
    check: Check
    timing: Timing | None = None
    baseline: Baseline | None = None
    skipped: Skipped | None = None

    @property
    def failed(self) -> bool:
        """Whether the result of the kernel is wrong."""
        return self.timing is None

    @property
    def speed_up(self) -> float | None:
        """The baseline's time over the kernel's."""
        if self.timing is None or self.baseline is None or self.baseline.us is None:
            return None
        return self.baseline.us / self.timing.modelled_us

    def goals(self) -> list[tuple[Goal, bool]]:
        """The case's goals on this target, and whether they are met; a time that does not exist meets none."""
        if self.timing is None:
            return []
        values = self.values(self.timing)
        return [(goal, goal.met(values[goal.quantity])) for goal in self.case.goals if goal.target == self.target]

    def values(self, timing: Timing) -> dict[str, float]:
        """What goals speak of, by quantity."""
        return {
            "ratio": timing.ratio,
            "modelled_us": timing.modelled_us,
            "speed_up": self.speed_up or 0.0,
            "slow_down": 1 / self.speed_up if self.speed_up else inf,
        }

    def verdicts(self) -> list[tuple[str, bool]]:
        """The goals in words. One that not even the bound would reach says so."""
        found = []
        for goal, met in self.goals():
            words = str(goal)
            if goal.quantity == "speed_up" and self.timing and self.baseline and self.baseline.us is not None:
                most = self.baseline.us / self.timing.dma_bound_us
                words += "" if goal.met(most) else f" (the bound is at {most:.1f}x)"
            found.append((words, met))
        return found

    def as_json(self) -> dict[str, Any]:
        """The result as plain data; times are in microseconds, all modelled but those of `published`."""
        found: dict[str, Any] = {
            "case": self.case.name,
            "shape": self.case.shape,
            "target": self.target,
            "correct": not self.failed,
            "check": asdict(self.check) | {"share": self.check.share if isfinite(self.check.share) else None},
        }
        if self.timing is None:
            return found
        found |= asdict(self.timing)
        found["ratio"] = self.timing.ratio
        found["baseline"] = asdict(self.baseline) if self.baseline else None
        found["skipped"] = asdict(self.skipped) | {"share": self.skipped.share} if self.skipped else None
        found["speed_up"] = self.speed_up
        found["goals"] = [{"goal": goal, "met": met} for goal, met in self.verdicts()]
        found["published"] = [asdict(p) for p in self.case.published if p.target == self.target]
        return found


@dataclass(frozen=True)
class Benchmark:
    """A kernel's cases and how one of them is run.

    Args:
        name: on the command line.
        what: the kernel, and what the bound counts.
        cases: to choose from.
        run: result of a case on a target.
        tables: the generated parts of the documentation, by what follows the benchmark's name and target in their
            names; `standard_tables` if it is None.
        text: a result for the terminal; that of `benchmarks/run.py` if it is None.
    """

    name: str
    what: str
    cases: tuple[Any, ...]
    run: Callable[[Any, str], Result]
    tables: Callable[[Sequence[Any]], dict[str, str]] | None = None
    text: Callable[[Any], str] | None = None

    def case(self, name: str) -> Any:
        """The case of that name.

        Raises:
            ValueError: there is none.
        """
        for case in self.cases:
            if case.name == name:
                return case
        raise ValueError(f"case: received {name!r}, allowed {', '.join(c.name for c in self.cases)}")


def table(columns: Sequence[str], lines: Sequence[str]) -> str:
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines])


def line(*cells: str) -> str:
    """A line of one."""
    return "| " + " | ".join(cells) + " |"


def times_line(result: Result) -> str:
    """A line of the table of times; of a failed case only why it failed."""
    name, shape, check, left_out = f"`{result.case.name}`", result.case.shape, result.check, _skipped_cells(result)
    if result.timing is None:
        return line(name, shape, f"**FAIL** {check.failure}", *[""] * 6)
    t, base = result.timing, result.baseline
    goals = "; ".join(f"{goal}: {'met' if met else '**not met**'}" for goal, met in result.verdicts())
    other = "" if base is None else base.how if base.us is None else f"{number(base.us)}{_mark(base)}"
    digits = 1 if result.skipped is None else 3  # goals near 1 need them
    speed_up = "" if result.speed_up is None else f"{result.speed_up:.{digits}f}x"
    times = number(t.modelled_us), number(t.dma_bound_us), f"{t.ratio:.3f}"
    return line(name, shape, *left_out, *times, goals, other, speed_up, str(check))


def _skipped_cells(result: Result) -> tuple[str, ...]:
    """The cells of `SKIPPED`, where the case is one that leaves out tiles."""
    x = result.skipped
    if x is None:
        return ()
    tiles = f"{x.v_tiles:,} of {x.of:,} ({x.share:.1%})"
    return f"{x.threshold:.3g}", f"{x.k_tiles:,} of {x.of:,}", tiles, f"{x.error:.2e}"


def _mark(base: Baseline) -> str:
    return f" ({base.how})" if base.how else ""


def work_line(result: Result) -> str:
    """A line of the table of work."""
    t = result.timing
    assert t is not None, "a failed case has no work"
    busy = [f"{number(t.busy_us[name])} ({t.busy_us[name] / t.modelled_us:.0%})" for name in ENGINES]
    path = sorted(t.path_us.items(), key=lambda item: -item[1])[:PATH_PARTS]
    shown = ", ".join(f"{name} {us / t.modelled_us:.0%}" for name, us in path)
    moved = [f"{n / 1e6:,.3f}" for n in (t.hbm_read_bytes, t.hbm_write_bytes)]
    return line(f"`{result.case.name}`", *busy, *moved, f"{t.instructions:,}", shown)


def published_lines(results: Sequence[Result]) -> list[str]:
    """Lines of the table of published times beside the modelled ones."""
    return [
        line(f"`{r.case.name}`", number(r.timing.modelled_us), number(p.us), p.what, p.by)
        for r in results
        for p in r.case.published
        if r.timing is not None and p.target == r.target
    ]


SKIPPED = ("threshold", "K tiles not read", "V tiles not read", "error")
WORK = (
    "case", *(f"{name} busy us" for name in ENGINES), "MB read", "MB written", "instructions", "critical path",
)  # fmt: skip
PUBLISHED = ("case", "ours, modelled us", "measured by others, us", "what was measured", "by whom")


def blocks(benchmark: Benchmark, results: Sequence[Result]) -> dict[str, str]:
    """The generated parts of the documentation by name; results are of one target.

    Raises:
        ValueError: a case has failed; nothing about it may be shown.
    """
    wrong = [r.case.name for r in results if r.failed]
    if wrong:
        raise ValueError(f"results: received failed cases {', '.join(wrong)}, allowed correct ones")
    parts = (benchmark.tables or standard_tables)(results)
    return {f"{benchmark.name} {results[0].target} {name}": text for name, text in parts.items()}


def standard_tables(results: Sequence[Result]) -> dict[str, str]:
    """Times against the DMA bound, work, and what others published."""
    baseline = next((r.baseline.kernel for r in results if r.baseline), "baseline")
    times = (
        "case", "shape", *(SKIPPED if results[0].skipped else ()), "modelled us", "DMA bound us", "ratio", "goal",
        f"{baseline}, modelled us", "speed-up", "checked",
    )  # fmt: skip
    found = {
        "times": table(times, [times_line(r) for r in results]),
        "work": table(WORK, [work_line(r) for r in results]),
    }
    lines = published_lines(results)
    if lines:
        found["published"] = table(PUBLISHED, lines)
    return found


def replace_blocks(path: Path, parts: dict[str, str]) -> None:
    """`replaced` in a file, which a part without a place leaves as it is."""
    path.write_text(replaced(path.read_text(encoding="utf-8"), parts), encoding="utf-8")
