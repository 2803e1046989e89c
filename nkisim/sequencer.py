"""Dynamic control flow of one core: loops that run on the device, and registers.

The device holds one copy of a loop's body, so what the body allocates exists once and whatever the loop
touches stays allocated until the loop ends. The simulator runs the body again on every trip; this module
turns what it saw back into what the device has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import numpy as np

from nkisim.body import Body, Facts, Step, difference
from nkisim.dtypes import Array
from nkisim.errors import NkiError, Site, call_site
from nkisim.hardware import Hardware, source_of
from nkisim.memory import StorageInfo

LOOPS = "NKI dynamic loops guide, NKI 0.6"


class _Lived(Protocol):
    """Something alive from its first to its last use, in positions of the core's program; -1: never used."""

    first_use: int
    last_use: int


@dataclass(eq=False)
class RegisterLife:
    """Uses of one register, and the dynamic loops it was allocated in.

    `place` is what it is to the body of a loop: the same on every trip if that allocates it.
    """

    site: Site
    scope: tuple[int, ...]
    place: tuple[int, ...]
    first_use: int = -1
    last_use: int = -1
    carried: frozenset[int] = frozenset()

    def touch(self, position: int) -> None:
        """The register is read or written."""
        if self.first_use < 0:
            self.first_use = position
        self.last_use = position


@dataclass(eq=False)
class Loop:
    """One run of a dynamic loop.

    `first_storage` and `first_register` count what was allocated before it; `after_trip` is what was
    allocated at the end of its first trip, None until then.
    """

    number: int
    construct: str
    site: Site
    begin: int
    first_storage: int
    first_register: int
    trips: int = 0
    after_trip: tuple[int, int] | None = None
    declared: list[StorageInfo] = field(default_factory=list)
    body: Body = field(default_factory=Body)
    # Storages and registers that this trip declared so far.
    placed: list[int] = field(default_factory=list)
    n_registers: int = 0


class Sequencer:
    """Open dynamic loops, the loops that ran, and every register of a core."""

    def __init__(self) -> None:
        self.loops: list[Loop] = []
        self.history: list[Loop] = []
        self.registers: list[RegisterLife] = []
        # Numbers of the open loops, outermost first.
        self.scope: tuple[int, ...] = ()
        self._n_registers = 0
        # Of storages that the open loops declared in this trip: the depth of the loop, and how many came before.
        self._places: dict[int, tuple[int, ...]] = {}

    # -- loops

    def enter(self, construct: str, facts: Facts, position: int, storages: list[StorageInfo]) -> Loop:
        """A loop begins."""
        body = Body()
        if self.loops:
            self.note(Step(construct, call_site(), facts))
            around = self.loops[-1].body
            body = around.inner.setdefault(around.at, body)
        loop = Loop(len(self.history), construct, call_site(), position, len(storages), len(self.registers))
        loop.body = body
        self.loops.append(loop)
        self.scope = (*self.scope, loop.number)
        self.history.append(loop)
        return loop

    def next_trip(self, loop: Loop, storages: list[StorageInfo]) -> None:
        """A trip begins, and with it the previous one ends."""
        self._check_innermost(loop)
        self._end_trip(loop, storages)
        loop.trips += 1

    def leave(self, loop: Loop, position: int, storages: list[StorageInfo]) -> None:
        """A loop ends: what it used was alive to its end, and what its body made exists once."""
        self._check_innermost(loop)
        self._end_trip(loop, storages)
        self.loops.pop()
        outside = {self.scope[:depth] for depth in range(len(self.scope) + 1)}
        self.scope = self.scope[:-1]
        if loop.after_trip is not None:
            del storages[loop.after_trip[0] :]
            del self.registers[loop.after_trip[1] :]
        _extend(storages, loop.begin, position)
        # Registers of a loop inside were alive to that one's end: each time it runs, they are new.
        _extend([r for r in self.registers if r.scope in outside], loop.begin, position)

    def _end_trip(self, loop: Loop, storages: list[StorageInfo]) -> None:
        if loop.trips:
            left = loop.body.end_trip()
            if left is not None:
                self._refuse_trip(left.instruction, "", "not issued", "issued as on the first trip", left.site)
        for info in loop.declared:
            info.scope_end = loop.site
        loop.declared.clear()
        for number in loop.placed:
            del self._places[number]
        loop.placed.clear()
        loop.n_registers = 0
        if loop.trips == 1:
            loop.after_trip = (len(storages), len(self.registers))

    def _check_innermost(self, loop: Loop) -> None:
        if self.loops[-1] is not loop:
            _refuse_left(self.loops[-1])

    # -- bodies, which are built once

    def declare(self, info: StorageInfo, data: Array | None) -> None:
        """A tensor declared inside a loop's body is gone when the trip ends; `data` are a constant's bytes."""
        if self.loops:
            self.loops[-1].declared.append(info)
            self.place(info, data)

    def place(self, info: StorageInfo, data: Array | None) -> None:
        """A declaration is a part of the body."""
        if not self.loops:
            return
        loop = self.loops[-1]
        self._places[info.id] = (len(self.loops), len(loop.placed))
        loop.placed.append(info.id)
        constant = None if data is None else hash(data.tobytes())
        facts: Facts = ("shape", info.shape, "dtype", str(info.dtype), "buffer", info.buffer)
        facts = (*facts, "address", info.address, "constant", constant)
        self.note(Step("ndarray", call_site(), facts))

    def place_of(self, info: StorageInfo) -> tuple[int, ...]:
        """What a storage is to the body of the innermost loop: the same on every trip if the trip declares it."""
        return self._places.get(info.id) or info.place

    def is_inside(self, info: StorageInfo) -> bool:
        """Whether the body of the innermost loop declared it; everything is where no loop runs."""
        return not self.loops or self._places.get(info.id, (0,))[0] == len(self.loops)

    def known(self) -> Step | None:
        """The step that the first trip of the innermost loop took here; None on that trip itself."""
        return self.loops[-1].body.known()

    def note(self, step: Step) -> None:
        """A step of the innermost loop's body; refuse it where the first trip took another one."""
        known = self.loops[-1].body.note(step)
        if known is not None:
            operand, received, allowed = difference(step, known)
            self._refuse_trip(step.instruction, operand, received, f"{allowed} as on the first trip")

    def _refuse_trip(
        self, instruction: str, operand: str, received: str, allowed: str, site: Site | None = None
    ) -> NoReturn:
        trip = " in ".join(f"trip {loop.trips} of {loop.construct}" for loop in reversed(self.loops))
        raise NkiError(
            instruction,
            operand,
            f"body of a dynamic loop, which is built once, differs between trips: {trip}",
            received=received,
            allowed=f"{allowed}: what changes has to be a register or in memory",
            source=LOOPS,
            site=site,
        )

    def instruction_key(self, position: int) -> tuple[int, ...]:
        """A key of the instruction issued last that is the same on every trip."""
        loops = self.loops
        if not loops:
            return (position,)
        if len(loops) == 1:
            return (loops[0].number, loops[0].body.at)
        return (loops[0].number, *[loop.body.at for loop in loops])

    def check_edge(self, instruction: str, consumer: tuple[int, ...], producer: tuple[int, ...]) -> None:
        """Refuse a scheduling edge whose producer stands in a dynamic loop that the consumer is not in."""
        if consumer[: len(producer)] != producer:
            raise NkiError(
                instruction,
                "producers",
                "edge out of a dynamic loop",
                received=f"a producer in the loop at {self.history[producer[-1]].site}",
                allowed="a producer in the consumer's loop or in one around it",
                source="nki.isa.NkiInstruction.depends_on, NKI 0.6",
            )

    # -- registers

    def new_register(self) -> RegisterLife:
        """A register that is allocated now; it is alive from its first write on."""
        if self.loops:
            place: tuple[int, ...] = (len(self.loops), self.loops[-1].n_registers)
            self.loops[-1].n_registers += 1
        else:
            place = (self._n_registers,)
            self._n_registers += 1
        life = RegisterLife(call_site(), self.scope, place)
        self.registers.append(life)
        return life

    def write_register(self, life: RegisterLife, position: int) -> None:
        """A register written in a loop that it was allocated outside of is carried by that loop."""
        life.touch(position)
        inner = self.scope[len(life.scope) :]
        if inner:
            life.carried |= frozenset(inner)

    # -- end

    def finish(self, hardware: Hardware) -> None:
        """Refuse loops that were left early, and more registers alive at once than an engine has."""
        if self.loops:
            _refuse_left(self.loops[-1])
        used = [r for r in self.registers if r.first_use >= 0]
        if len(used) <= hardware.registers_per_engine:
            return
        first = np.array([r.first_use for r in used])
        last = np.array([r.last_use for r in used])
        # Every engine follows a loop and resolves addresses, so one register takes one on each of them.
        # An instruction may write into the register that it reads for the last time.
        alive = np.array([int(((first <= p) & ((p < last) | (first == p))).sum()) for p in first])
        over = np.flatnonzero(alive > hardware.registers_per_engine)
        if over.size:
            raise NkiError(
                "register_alloc",
                "",
                "registers alive at once",
                received=int(alive[over[0]]),
                allowed=f"1..{hardware.registers_per_engine}",
                source=source_of("registers_per_engine"),
                site=used[int(over[0])].site,
            )


def _extend(lives: Iterable[_Lived], begin: int, end: int) -> None:
    for life in lives:
        if life.last_use >= begin:
            life.last_use = end


def _refuse_left(loop: Loop) -> NoReturn:
    raise NkiError(
        loop.construct,
        "",
        "dynamic loop left before its end",
        received="a break, a return, or a register tested outside `while`",
        allowed="a loop that ends by its bound or condition",
        source=LOOPS,
        site=loop.site,
    )
