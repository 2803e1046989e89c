"""A launch: the cores that run a kernel, their state, and how two of them take turns.

The state of a simulation is an object; `current_core` finds the one whose kernel is running. Two
launches in one process, nested or in threads, do not see each other.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from nkisim.body import Facts
from nkisim.capacity import check_capacity
from nkisim.dtypes import Array, DType
from nkisim.errors import NkiError, Site, call_site, call_sites
from nkisim.hardware import Hardware
from nkisim.memory import MemoryRegion, Storage, StorageInfo
from nkisim.ordering import Ordering
from nkisim.sequencer import LOOPS, Loop, Sequencer
from nkisim.trace import Engine, Record, Trace

LNC_GUIDE = "Logical NeuronCore guide: both cores execute the same control flow"

_core: ContextVar[Core | None] = ContextVar("nkisim_core", default=None)


def current_core(what: str) -> Core:
    """The core that runs the calling kernel.

    Raises:
        RuntimeError: no kernel is running; `what` is the name the message starts with.
    """
    core = _core.get()
    if core is None:
        raise RuntimeError(f"{what}: called outside a kernel; run the kernel with nkisim.simulate(kernel)(*args)")
    return core


def running_core() -> Core | None:
    """The core that runs the calling kernel, or None outside kernels."""
    return _core.get()


@dataclass
class Registers:
    """The accumulator registers of an engine: a float32 per lane, and which lanes are defined."""

    values: Array
    defined: Array


@dataclass
class Accumulators:
    """Engine accumulator registers that `reduce_cmd` addresses, None before the first reset."""

    vector: Registers | None = None
    scalar: Registers | None = None


class Core:
    """One NeuronCore of a launch: its program counter, memories' book-keeping and engine state."""

    def __init__(self, launch: Launch, rank: int) -> None:
        self.launch = launch
        self.rank = rank
        self.hardware: Hardware = launch.hardware
        self.precise: bool = launch.precise
        self.trace: Trace | None = launch.trace
        self.position = 0
        self.storages: list[StorageInfo] = []
        self.accumulators = Accumulators()
        self.random: dict[str, Any] = {}
        self.ordering = Ordering()
        self.no_reorder_depth = 0
        self.spills = False  # whether a compiler moves what does not fit on chip to HBM and back
        self.sequencer = Sequencer()
        # Shape, strides, buffer and limit of tiles that engines can address, start partitions apart; and of
        # destinations, shape and strides that name no address twice.
        self.legal_patterns: set[tuple[tuple[int, ...], tuple[int, ...], MemoryRegion, int | None]] = set()
        self.distinct: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self._n_shared = 0

    def allocate(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        buffer: MemoryRegion,
        name: str = "",
        address: tuple[int, int] | None = None,
        data: Array | None = None,
    ) -> Storage:
        """A new storage; `shared_hbm` ones are the same object on every core of the launch.

        `data` are the bytes of a constant.
        """
        if buffer is MemoryRegion.shared_hbm and self.launch.n_cores > 1:
            self._n_shared += 1
            storage = self.launch.shared_storage(self._n_shared, self.rank, shape, dtype, name, data)
            # The other core may still need it when this core's trip ends.
            self.sequencer.place(storage.info, data)
            return storage
        return self._new(shape, dtype, buffer, name, address, data)

    def _new(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        buffer: MemoryRegion,
        name: str,
        address: tuple[int, int] | None,
        data: Array | None,
    ) -> Storage:
        number = self.launch.next_id()
        site, caller = call_sites()
        info = StorageInfo(number, name or f"t{number}", buffer, shape, dtype, site, address, caller=caller)
        if buffer in (MemoryRegion.sbuf, MemoryRegion.psum):
            self.storages.append(info)
        self.sequencer.declare(info, data)
        return Storage(info, self.precise, data)

    # -- dynamic control flow

    def mark(self, instruction: str, **attrs: Any) -> None:
        """A trace record of what the engines' sequencers do between instructions."""
        if self.trace is not None:
            self.trace.records.append(
                Record(self.position, self.rank, Engine.sync, instruction, None, call_site(), (), (), attrs)
            )
        self.position += 1

    def enter_loop(self, construct: str, kind: str, facts: Facts = (), **attrs: Any) -> Loop:
        """A dynamic loop begins; `kind` is "for" or "while", `facts` what is fixed of its bounds."""
        if self.no_reorder_depth:
            raise NkiError(
                construct,
                "",
                "dynamic loop inside no_reorder",
                received="a loop in the block",
                allowed="the block inside the loop's body",
                source=LOOPS,
            )
        depth = len(self.sequencer.loops) + 1
        loop = self.sequencer.enter(construct, facts, self.position, self.storages)
        self.mark("loop_begin", kind=kind, construct=construct, depth=depth, **attrs)
        return loop

    def next_trip(self, loop: Loop, kind: str) -> None:
        """One more trip through the body of the innermost loop."""
        self.sequencer.next_trip(loop, self.storages)
        self.mark("loop_iteration", kind=kind)

    def leave_loop(self, loop: Loop, kind: str) -> None:
        """The loop has ended."""
        self.mark("loop_end", kind=kind, trips=loop.trips)
        self.sequencer.leave(loop, self.position, self.storages)

    def test_condition(self, loop: Loop | None, value: bool) -> Loop | None:
        """One test of `while register:`; returns the loop while it runs."""
        if loop is None:
            warnings.warn(
                "while register: is deprecated in NKI 0.6; use nl.while_loop", DeprecationWarning, stacklevel=3
            )
            loop = self.enter_loop("while", "while")
        if value:
            self.next_trip(loop, "while")
            return loop
        self.leave_loop(loop, "while")
        return None

    # -- two cores

    def meet(self, instruction: str, what: str, key: Hashable, payload: Any) -> tuple[Any, bool]:
        """Wait until the other core calls `meet` with an equal key; its payload, and whether it was there before.

        Of two calls that meet exactly one is told that the other was there before, and it goes on first.

        Raises:
            NkiError: the other core ends, or waits for something else.
        """
        baton = self.launch.baton
        assert baton is not None
        return baton.meet(self.rank, _Post(instruction, what, key, payload, call_site()))

    def finish(self) -> None:
        """Check what can only be known at the end: that everything alive together fits."""
        self.sequencer.finish(self.hardware)
        self.ordering.check()
        use = check_capacity(self.storages, self.hardware, self.spills)
        if self.trace is not None:
            self.trace.memory[self.rank] = use


@dataclass
class _Shared:
    storage: Storage
    rank: int
    site: Site
    constant: bytes | None


@dataclass(eq=False)
class Launch:
    """One call of a kernel on `n_cores` physical cores."""

    hardware: Hardware
    precise: bool = True
    n_cores: int = 1
    trace: Trace | None = None
    baton: Baton | None = None
    _ids: int = 0
    _shared: dict[int, _Shared] = field(default_factory=dict)

    def next_id(self) -> int:
        """A number for a new storage."""
        self._ids += 1
        return self._ids

    def shared_storage(
        self, number: int, rank: int, shape: tuple[int, ...], dtype: DType, name: str, data: Array | None
    ) -> Storage:
        """The `number`-th shared HBM tensor: made by the first core that gets there, found by the other."""
        known = self._shared.get(number)
        site = call_site()
        constant = None if data is None else data.tobytes()
        if known is None:
            info = StorageInfo(self.next_id(), name or f"shared{number}", MemoryRegion.shared_hbm, shape, dtype, site)
            storage = Storage(info, self.precise, data)
            storage.users = storage.new_map()
            self._shared[number] = _Shared(storage, rank, site, constant)
            return storage
        info = known.storage.info
        if (info.shape, info.dtype, known.site, known.constant) != (shape, dtype, site, constant):
            raise NkiError(
                "ndarray",
                name,
                f"shared_hbm tensor number {number} differs between the cores",
                received=f"{dtype}{list(shape)} on core {rank}",
                allowed=f"{info.dtype}{list(info.shape)} as on core {known.rank} ({known.site})",
                source=LNC_GUIDE,
            )
        return known.storage

    def run(self, body: Callable[[], Any]) -> list[Any]:
        """Run `body` once per core and return the results by rank; the first error wins."""
        cores = [Core(self, rank) for rank in range(self.n_cores)]
        if self.n_cores == 1:
            with _running(cores[0]):
                result = body()
                cores[0].finish()
            return [result]
        results = self._run_together(cores, body)
        _check_same_trips(cores)
        _check_same_results(results)
        return results

    def _run_together(self, cores: list[Core], body: Callable[[], Any]) -> list[Any]:
        self.baton = baton = Baton()
        results: list[Any] = [None] * len(cores)
        errors: dict[int, BaseException] = {}

        def work(core: Core) -> None:
            try:
                baton.take(core.rank)
                with _running(core):
                    results[core.rank] = body()
                    core.finish()
            except BaseException as error:  # noqa: BLE001 raised again below, in the caller's thread
                errors[core.rank] = error
                baton.fail()
            finally:
                baton.leave(core.rank)

        threads = [
            # Daemons: a kernel that loops for ever must not keep the interpreter from ending.
            threading.Thread(target=copy_context().run, args=(work, core), name=f"nkisim-core-{core.rank}", daemon=True)
            for core in cores
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            baton.fail()
            raise
        # A core that failed makes its partner give up; the partner's error is only an echo.
        for error in sorted(errors.values(), key=lambda e: isinstance(e, Abandoned)):
            raise error
        return results


def _check_same_trips(cores: list[Core]) -> None:
    """Refuse dynamic loops that ran differently on the cores: undefined behaviour on the device."""
    first, second = (core.sequencer.history for core in cores)
    for a, b in zip(first, second, strict=False):
        if (a.site, a.trips) != (b.site, b.trips):
            raise NkiError(
                a.construct,
                "",
                "dynamic control flow differs between the cores",
                received=f"core 0: {a.trips} trips; core 1: {b.trips} trips of the loop at {b.site}",
                allowed="the same loops with the same number of trips",
                source=LNC_GUIDE,
                site=a.site,
            )
    if len(first) != len(second):
        rank, extra = (0, first[len(second)]) if len(first) > len(second) else (1, second[len(first)])
        raise NkiError(
            extra.construct,
            "",
            "dynamic control flow differs between the cores",
            received=f"a loop that only core {rank} runs",
            allowed="the same loops with the same number of trips",
            source=LNC_GUIDE,
            site=extra.site,
        )


def _check_same_results(results: list[Any]) -> None:
    """Refuse kernels whose cores return different tensors."""
    a, b = (list(_tensors(result)) for result in results)
    if len(a) != len(b) or any(
        (x.storage, x.shape, x.strides, x.offset) != (y.storage, y.shape, y.strides, y.offset)
        for x, y in zip(a, b, strict=False)
    ):
        raise NkiError(
            "return",
            "",
            "the cores return different tensors",
            received=f"{a} on core 0, {b} on core 1",
            allowed="the same shared_hbm tensors on both cores",
            source=LNC_GUIDE,
            site=(a or b)[0].storage.info.site,
        )


def _tensors(result: Any) -> Iterator[Any]:
    if hasattr(result, "storage"):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)
    elif isinstance(result, dict):
        for key in sorted(result, key=str):
            yield from _tensors(result[key])


class Abandoned(BaseException):
    """The other core failed, so this one stops too; no `except Exception` of a kernel holds it up."""


@dataclass
class _Post:
    """What one core waits for: an instruction, its description, and what it brings."""

    instruction: str
    what: str
    key: Hashable
    payload: Any
    site: Site


class Baton:
    """Lets one of two cores run at a time, so that a run on two cores is deterministic.

    Core 0 begins. A core keeps the baton until it waits for the other or ends. A wait ends with what
    the other brings, or with an error: there is no state in which both wait.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._turn = 0
        self._done: set[int] = set()
        self._posts: dict[int, _Post] = {}
        self._delivered: dict[int, Any] = {}
        self._failed = False

    def take(self, rank: int) -> None:
        """Wait for `rank`'s turn."""
        with self._condition:
            self._wait_for_turn(rank)

    def meet(self, rank: int, mine: _Post) -> tuple[Any, bool]:
        """Exchange payloads with the other core (see `Core.meet`)."""
        other = 1 - rank
        with self._condition:
            if self._failed:
                raise Abandoned
            theirs = self._posts.pop(other, None)
            if theirs is not None:
                if theirs.key != mine.key:
                    _refuse_deadlock(rank, mine, f"waits in {theirs.instruction}({theirs.what}) at {theirs.site}")
                self._delivered[other] = mine.payload
                return theirs.payload, True
            if other not in self._done:
                self._posts[rank] = mine
                self._turn = other
                self._condition.notify_all()
                self._wait_for_turn(rank)
                if rank in self._delivered:
                    return self._delivered.pop(rank), False
            _refuse_deadlock(rank, mine, "has ended")

    def _wait_for_turn(self, rank: int) -> None:
        self._condition.wait_for(lambda: self._turn == rank or self._failed)
        if self._failed:
            raise Abandoned

    def leave(self, rank: int) -> None:
        """Core `rank` has ended: hand the baton on."""
        with self._condition:
            self._done.add(rank)
            self._turn = 1 - rank
            self._condition.notify_all()

    def fail(self) -> None:
        """A core failed: nobody waits any longer."""
        with self._condition:
            self._failed = True
            self._condition.notify_all()


def _refuse_deadlock(rank: int, mine: _Post, state: str) -> NoReturn:
    raise NkiError(
        mine.instruction,
        "",
        "deadlock between the two cores",
        received=f"core {rank} waits in {mine.instruction}({mine.what}) at {mine.site}; core {1 - rank} {state}",
        allowed="both cores reach the same exchanges in the same order",
        source=LNC_GUIDE,
        site=mine.site,
    )


@contextmanager
def _running(core: Core) -> Iterator[None]:
    token = _core.set(core)
    try:
        # The engines do not warn of overflow or NaN; once here costs less than in every instruction.
        with np.errstate(all="ignore"):
            yield
    finally:
        _core.reset(token)
