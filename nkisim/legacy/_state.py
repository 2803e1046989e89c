"""What the front end knows of the running kernel: its place in the grid, the loops around it, what is pending."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nkisim.dtypes import DType
from nkisim.errors import Site
from nkisim.legacy._errors import refuse
from nkisim.machine import Core

if TYPE_CHECKING:
    from nkisim.legacy._root import Root
    from nkisim.legacy._tile import Tile

Place = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # storage id, offset, shape, strides
Scope = tuple[tuple["Loop", int], ...]  # the loops around a statement, and which trip of each


@dataclass(eq=False)
class Loop:
    """One run of a loop. `scoped` loops end the life of the tiles that a trip makes; unrolled ones do not."""

    kind: str
    site: Site
    scoped: bool
    trip: int = -1
    # affine_range: which trip wrote a place outside of the loop.
    written: dict[Place, int] = field(default_factory=dict)
    # nl.loop_reduce: the running results by call and by the trips of the loops inside this one.
    running: dict[Any, Tile] = field(default_factory=dict)


@dataclass(eq=False)
class State:
    """The running program of a core."""

    core: Core
    grid: tuple[int, ...] = ()
    program: tuple[int, ...] = ()
    loops: list[Loop] = field(default_factory=list)
    pending: Tile | None = None
    # shared_hbm tensors are the same for all programs of a grid: the n-th one that a program makes.
    shared: list[Root] = field(default_factory=list)
    n_shared: int = 0
    # Lines of the loops with a `nki.typing.scalar` for a condition that have begun.
    entered: set[Site] = field(default_factory=set)
    # [1, partitions] tiles of ones, by element type: what broadcasts multiply a row with.
    ones: dict[DType, Tile] = field(default_factory=dict)

    @property
    def scope(self) -> Scope:
        """The loops around the running statement."""
        return tuple([(loop, loop.trip) for loop in self.loops if loop.scoped])


_state: ContextVar[State | None] = ContextVar("nkisim_legacy_state", default=None)


def running_state() -> State | None:
    """The state of the running kernel, or None outside kernels."""
    return _state.get()


def state(what: str) -> State:
    """The state of the running kernel.

    Raises:
        NkiError: no kernel is running; `what` is the name of the function that was called.
    """
    found = _state.get()
    if found is None:
        refuse(
            what,
            "",
            "err_nki_api_outside_of_nki_kernel: called outside a kernel",
            what,
            "a function with nki.jit, or nki.simulate_kernel(kernel, ...)",
        )
    return found
