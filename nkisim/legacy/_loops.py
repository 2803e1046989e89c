"""Loop iterators and the place of a program in the launch grid.

Loops run as Python. What a kernel may not do with the tiles of a trip, because compiled loops do it otherwise, is
checked where a tile is used (`Tile.check_scope`) and written (`_issue`).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from nkisim.errors import call_site
from nkisim.legacy import compiler
from nkisim.legacy._errors import refuse
from nkisim.legacy._index import Index
from nkisim.legacy._state import Loop, State, state
from nkisim.legacy._tile import Tile
from nkisim.view import as_int

LOOPS = "nki.language loop iterators, SDK 2.26"


class LoopIndex(int):
    """An index of a loop: an integer that knows its loop, for `nl.loop_reduce`."""

    loop: Loop

    def __new__(cls, value: int, loop: Loop) -> LoopIndex:
        """The index `value` of `loop`."""
        self = super().__new__(cls, value)
        self.loop = loop
        return self


def affine_range(*args: Any, directives: Any = ()) -> Iterator[LoopIndex]:
    """`range` for trips that do not depend on each other, except through sums: `+=`.

    `directives` are those of `nki.compiler`; they steer the compiler only.
    """
    _check_directives("affine_range", directives)
    return _loop("affine_range", args, True)


def sequential_range(*args: Any, directives: Any = ()) -> Iterator[LoopIndex]:
    """`range` for trips that run one after the other; `directives` as for `affine_range`."""
    _check_directives("sequential_range", directives)
    return _loop("sequential_range", args, True)


def static_range(*args: Any) -> Iterator[LoopIndex]:
    """`range` for a loop that is unrolled: its tiles outlive their trips."""
    return _loop("static_range", args, False)


def _check_directives(kind: str, directives: Any) -> None:
    if not compiler.is_directive(directives):
        refuse(
            kind, "directives", "type", directives, "nki.compiler.multi_buffer(...), nki.compiler.no_reorder()", LOOPS
        )


def _loop(kind: str, args: tuple[Any, ...], scoped: bool) -> Iterator[LoopIndex]:
    st = state(kind)
    bounds = []
    for a in args:
        if isinstance(a, (Tile, Index)):
            rule = "err_dynamic_control_flow_not_supported: a loop bound"
            refuse(kind, "", rule, repr(a), "an integer known when the kernel is built")
        bounds.append(as_int(a))
    if not 1 <= len(args) <= 3 or None in bounds or (len(args) == 3 and bounds[2] == 0):
        refuse(kind, "", "arguments", args, "stop, or start and stop, or start, stop and step: integers", LOOPS)
    return _trips(st, Loop(kind, call_site(), scoped), range(*(b for b in bounds if b is not None)))


def _trips(st: State, loop: Loop, trips: range) -> Iterator[LoopIndex]:
    st.loops.append(loop)
    try:
        for i in trips:
            loop.trip = i
            yield LoopIndex(i, loop)
    finally:
        # Left early, the loops inside of this one have not ended themselves.
        if loop in st.loops:
            del st.loops[st.loops.index(loop) :]


def program_id(axis: Any) -> int:
    """This program's index along an axis of the launch grid."""
    st = state("program_id")
    d = as_int(axis)
    if d is None or not 0 <= d < len(st.grid):
        refuse("program_id", "axis", "value", axis, _axes(st), LOOPS)
    return st.program[d]


def num_programs(axes: Any = None) -> int:
    """Number of programs along an axis, along several together, or in the whole grid."""
    st = state("num_programs")
    if axes is None:
        return prod(st.grid)
    chosen = [as_int(a) for a in (axes if isinstance(axes, (tuple, list)) else (axes,))]
    if any(d is None or not 0 <= d < len(st.grid) for d in chosen):
        refuse("num_programs", "axes", "value", axes, _axes(st), LOOPS)
    return prod(st.grid[d] for d in chosen if d is not None)


def program_ndim() -> int:
    """Number of dimensions of the launch grid; 0 without one."""
    return len(state("program_ndim").grid)


def _axes(st: State) -> str:
    return f"0..{len(st.grid) - 1}" if st.grid else "none: the kernel was launched without a grid"
