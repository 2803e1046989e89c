"""The body of a dynamic loop as its first trip issued it, and the comparison of later trips with that.

The device holds one copy of a body, which is built once. Python runs it on every trip, so Python state that
changes from trip to trip would give results that no device gives.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from nkisim.errors import Site

# Names and values in turn: a tuple for each pair would be most of what a first trip leaves behind.
Facts = tuple[Hashable, ...]


class TensorFacts(NamedTuple):
    """What is fixed when the kernel is built of a tensor operand; `run_time` names what moves it at run time."""

    tensor: Hashable
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    run_time: Hashable


class RegisterFacts(NamedTuple):
    """A register as an operand: which one, not what it holds."""

    place: tuple[int, ...]


class Step(NamedTuple):
    """One instruction, declaration or inner loop of a body; `facts` are its compile-time arguments by name."""

    instruction: str
    site: Site
    facts: Facts


class Body:
    """The steps of a body; `inner` holds the bodies of the loops in it, by the number of their step."""

    __slots__ = ("at", "complete", "inner", "steps")

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.inner: dict[int, Body] = {}
        self.complete = False
        self.at = 0

    def known(self) -> Step | None:
        """The first trip's step at this place; None on the first trip, and past its end."""
        return self.steps[self.at] if self.complete and self.at < len(self.steps) else None

    def note(self, step: Step) -> Step | None:
        """The next step; returns the first trip's one where that differs (past its end: its last one)."""
        at = self.at
        self.at = at + 1
        if not self.complete:
            self.steps.append(step)
            return None
        known = self.steps[at] if at < len(self.steps) else None
        return None if step == known else known or Step("the end of the body", step.site, ())

    def end_trip(self) -> Step | None:
        """A trip ends; returns the first step of the first trip that it did not get to."""
        left = self.known()
        self.complete = True
        self.at = 0
        return left


def difference(step: Step, known: Step) -> tuple[str, str, str]:
    """Operand, what was issued and what the first trip issued, of two steps that differ."""
    if step.instruction != known.instruction or step.site != known.site:
        return "", f"{step.instruction} at {step.site}", f"{known.instruction} at {known.site}"
    for operand, new, old in zip(step.facts[::2], step.facts[1::2], known.facts[1::2], strict=True):
        assert isinstance(operand, str)
        if new == old:
            continue
        if isinstance(new, TensorFacts) and isinstance(old, TensorFacts):
            for field, a, b in zip(TensorFacts._fields, new, old, strict=True):
                if a != b and field == "tensor":
                    return operand, "another tensor", "the same tensor"
                if a != b and field == "run_time":
                    return operand, "another run-time index", "the same register or index tensor"
                if a != b:
                    return operand, f"{field} {a}", f"{field} {b}"
        if isinstance(new, RegisterFacts) and isinstance(old, RegisterFacts):
            return operand, "another register", "the same register"
        if operand == "constant":
            return operand, "other values", "the same values"
        return operand, _text(new), _text(old)
    raise AssertionError("steps do not differ")


def _text(value: Any) -> str:
    return getattr(value, "__name__", None) or getattr(value, "name", None) or str(value)
