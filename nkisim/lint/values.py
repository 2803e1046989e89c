"""What the checker knows of a value without running the kernel."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from nkisim.lint.program import Binding, Class, Function

Loops = tuple[int, ...]


@dataclass(frozen=True)
class Unknown:
    """Nothing is known."""


@dataclass(frozen=True)
class Const:
    """A compile-time None, bool, number or string."""

    value: Any


@dataclass(frozen=True)
class Outside:
    """A function, class or module: what the sources or NKI define."""

    binding: Binding


@dataclass(eq=False)
class Tensor:
    """A tensor; `buffer` is its memory if that is known, `loops` the dynamic loops it was declared in."""

    buffer: str | None = None
    loops: Loops = ()


@dataclass(eq=False)
class Register:
    """A register; `index` is the one that a dynamic loop counts with, which must not be written."""

    index: bool = False


@dataclass(eq=False)
class Items:
    """A list, tuple or dict; `values` are its elements in order if they are known, by key for a dict."""

    kind: str
    values: list[Value] | dict[str, Value] | None = None
    loops: Loops = ()

    def elements(self) -> list[Value] | None:
        """What iterating over a list or tuple gives."""
        return None if self.values is None or isinstance(self.values, dict) else self.values


@dataclass(eq=False)
class Instance:
    """An object of a class of the sources."""

    cls: Class
    attributes: dict[str, Value] = field(default_factory=dict)
    loops: Loops = ()


@dataclass(eq=False)
class Closure:
    """A function defined inside another one, with the frame it sees."""

    function: Function
    frame: Frame


@dataclass(eq=False)
class Method:
    """A method taken from a value: of a class of the sources, a container, a string or a tensor."""

    receiver: Value
    name: str
    function: Function | None = None


@dataclass(eq=False)
class Range:
    """What a range gives; `trips` if it is known, and whether the loop over it stays a loop on the device."""

    trips: int | None
    dynamic: bool = False
    by_register: bool = False


Value = Unknown | Const | Outside | Tensor | Register | Items | Instance | Closure | Method | Range
UNKNOWN = Unknown()


@dataclass(eq=False)
class Frame:
    """Names of one running function; `outer` is the frame that an inner function sees.

    `passed` are the identities of the arguments; `doubtful`: the call stands in a branch that may not be taken.
    """

    function: Function
    names: dict[str, Value] = field(default_factory=dict)
    outer: Frame | None = None
    returned: list[Value] = field(default_factory=list)
    is_kernel: bool = False
    passed: frozenset[int] = frozenset()
    doubtful: bool = False

    def find(self, name: str) -> Value | None:
        """The value of a local name of this function or of one around it."""
        frame: Frame | None = self
        while frame is not None:
            if name in frame.names:
                return frame.names[name]
            frame = frame.outer
        return None


def join(a: Value, b: Value) -> Value:
    """What holds on both of two ways."""
    if a is b or a == b:
        return a
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return Tensor(a.buffer if a.buffer == b.buffer else None, a.loops if len(a.loops) < len(b.loops) else b.loops)
    if isinstance(a, Register) and isinstance(b, Register):
        return Register(a.index and b.index)
    if isinstance(a, Items) and isinstance(b, Items) and a.kind == b.kind:
        return Items(a.kind, None, a.loops)
    return UNKNOWN


def key_of(value: Value) -> Hashable:
    """A key for values that stay what they are; None where a callee could change or keep the value."""
    if isinstance(value, Const):
        return ("const", type(value.value).__name__, repr(value.value))
    if isinstance(value, Unknown):
        return "unknown"
    if isinstance(value, Outside):
        return ("outside", value.binding)
    if isinstance(value, Tensor):
        return ("tensor", value.buffer, value.loops)
    if isinstance(value, Register):
        return ("register", value.index)
    if isinstance(value, Items) and value.kind == "tuple" and isinstance(value.values, list):
        keys = tuple(key_of(v) for v in value.values)
        return None if None in keys else ("tuple", keys)
    if isinstance(value, Closure):
        return ("closure", id(value.function), id(value.frame))
    return None
