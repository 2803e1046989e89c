"""The calibration as text: the table, what is missing, the constants nobody publishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from benchmarks.calibration._row import WITHIN, Result
from benchmarks.calibration.rows import NOT_USED
from nkisim.hardware import GEN2, GEN3, GEN4, Hardware

CHIPS = {GEN2: "trn1, inf2", GEN3: "trn2", GEN4: "trn3"}


def number(value: float) -> str:
    """Four significant digits, without an exponent."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def line(result: Result) -> str:
    """A result as a line of the table."""
    row = result.row
    if row.defines:
        kind = "source of " + ", ".join(f"`{name}`" for name in row.defines.split(", "))
    elif not row.comparable:
        kind = "another kernel"
    else:
        kind = "within 25 %" if result.within else "**off**"
    cells = (
        f"`{row.key}`", row.what, row.target, f"{number(row.measured)} {row.unit}",
        f"{number(result.modelled)} {row.unit}", f"{result.ratio:.2f}", kind, row.source,
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


COLUMNS = ("row", "what", "on", "measured", "modelled", "modelled / measured", "verdict", "measured by")


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def summary(results: Sequence[Result]) -> str:
    """How many rows that check the model are within a quarter."""
    checks = [r for r in results if r.row.is_check]
    inside = sum(r.within for r in checks)
    return (
        f"{inside} of {len(checks)} rows that check the model are within {WITHIN:.0%}; "
        f"{sum(bool(r.row.defines) for r in results)} rows are the source of constants and check only their use."
    )


def table(results: Sequence[Result]) -> str:
    """All results, and the count."""
    return "\n".join([*_head(*COLUMNS), *map(line, results), "", summary(results)])


def misses(results: Sequence[Result]) -> str:
    """Rows outside a quarter by what they lack."""
    by_reason: dict[str, list[str]] = {}
    for r in results:
        if r.row.is_check and not r.within:
            by_reason.setdefault(r.row.missing, []).append(f"`{r.row.key}` ({r.ratio:.2f})")
    return "\n".join(f"- {', '.join(keys)}: {reason}" for reason, keys in by_reason.items()) or "None."


def expressed(results: Sequence[Result]) -> str:
    """How rows that are not simply run are expressed."""
    by_how: dict[str, list[str]] = {}
    for r in results:
        if r.row.how:
            by_how.setdefault(r.row.how, []).append(f"`{r.row.key}`")
    return "\n".join(f"- {', '.join(keys)}: {how}" for how, keys in by_how.items())


def assumed() -> str:
    """Timing constants that are not published for every generation, from `nkisim/hardware.py`."""
    lines = _head("constant", "value", "unit", "assumed on", "source")
    for f in fields(Hardware):
        if not f.metadata.get("assumed") or not _is_timing(f.name):
            continue
        by_value: dict[str, list[str]] = {}
        for generation in f.metadata["assumed"]:
            value = f.metadata["values"][generation]
            shown = f"{value:g}" if not isinstance(value, tuple) else f"{len(value)} point{'s'[: len(value) - 1]}"
            by_value.setdefault(shown, []).append(CHIPS[generation])
        for shown, chips in by_value.items():
            cells = (f"`{f.name}`", shown, f.metadata["unit"], ", ".join(chips), f.metadata["source"])
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_timing(name: str) -> bool:
    """The timing block of the record starts with the Tensor Engine's clock."""
    names = [f.name for f in fields(Hardware)]
    return names.index(name) >= names.index("tensor_ghz")


def not_used() -> str:
    """Published figures that have no row."""
    lines = _head("what", "published", "why it is not used")
    return "\n".join([*lines, *("| " + " | ".join(entry) + " |" for entry in NOT_USED)])


def blocks(results: Sequence[Result]) -> dict[str, str]:
    """The generated parts of the documentation by name."""
    return {
        "calibration": table(results),
        "misses": misses(results),
        "expressed": expressed(results),
        "assumed": assumed(),
        "not-used": not_used(),
    }


def replaced(text: str, parts: dict[str, str]) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- end name -->` replaced, for every part.

    Raises:
        ValueError: a part has no place in the text.
    """
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"text: received no {begin.strip()} ... {end}, allowed each once")
        before, rest = text.split(begin)
        text = before + begin + part + "\n" + end + rest.split(end)[1]
    return text


def updated(text: str, results: Sequence[Result]) -> str:
    """`text` with the parts between `<!-- name -->` and `<!-- end name -->` replaced.

    Raises:
        ValueError: a part has no place in the text.
    """
    return replaced(text, blocks(results))
