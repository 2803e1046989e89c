"""A launch: the cores that run a kernel, their state, and how two of them take turns.

The state of a simulation is an object; `current_core` finds the one whose kernel is running. Two
launches in one process, nested or in threads, do not see each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nkisim.dtypes import Array, DType
from nkisim.errors import NkiError, Site, call_site
from nkisim.hardware import Hardware
from nkisim.memory import MemoryRegion, Storage, StorageInfo, check_capacity
from nkisim.trace import Trace

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
class Accumulators:
    """Engine accumulator registers that `reduce_cmd` addresses: one float32 per lane, or None before the first reset."""

    vector: Array | None = None
    scalar: Array | None = None


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
        self.names: set[str] = set()
        self.no_reorder_depth = 0
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
        """A new storage; `shared_hbm` ones are the same object on every core of the launch."""
        if buffer is MemoryRegion.shared_hbm and self.launch.n_cores > 1 and data is None:
            self._n_shared += 1
            return self.launch.shared_storage(self._n_shared, self.rank, shape, dtype, name)
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
        info = StorageInfo(number, name or f"t{number}", buffer, shape, dtype, call_site(), address)
        if buffer in (MemoryRegion.sbuf, MemoryRegion.psum):
            self.storages.append(info)
        return Storage(info, self.precise, data)

    def finish(self) -> None:
        """Check what can only be known at the end: that everything alive together fits."""
        use = check_capacity(self.storages, self.hardware)
        if self.trace is not None:
            self.trace.memory[self.rank] = use


@dataclass
class _Shared:
    storage: Storage
    rank: int
    site: Site


@dataclass(eq=False)
class Launch:
    """One call of a kernel on `n_cores` physical cores."""

    hardware: Hardware
    precise: bool = True
    n_cores: int = 1
    trace: Trace | None = None
    _ids: int = 0
    _shared: dict[int, _Shared] = field(default_factory=dict)
    baton: Baton | None = None

    def next_id(self) -> int:
        """A number for a new storage."""
        self._ids += 1
        return self._ids

    def shared_storage(self, number: int, rank: int, shape: tuple[int, ...], dtype: DType, name: str) -> Storage:
        """The `number`-th shared HBM tensor: made by the first core that gets there, found by the other."""
        known = self._shared.get(number)
        site = call_site()
        if known is None:
            info = StorageInfo(self.next_id(), name or f"shared{number}", MemoryRegion.shared_hbm, shape, dtype, site)
            storage = Storage(info, self.precise)
            storage.writer = np.zeros(int(np.prod(shape)), np.int8)
            self._shared[number] = _Shared(storage, rank, site)
            return storage
        info = known.storage.info
        if info.shape != shape or info.dtype != dtype:
            raise NkiError(
                "ndarray",
                name,
                f"shared_hbm tensor number {number} differs between the cores",
                received=f"{dtype}{list(shape)} on core {rank}",
                allowed=f"{info.dtype}{list(info.shape)} as on core {known.rank} ({known.site})",
                source="Logical NeuronCore guide: both cores execute the same control flow",
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
        return self._run_together(cores, body)

    def _run_together(self, cores: list[Core], body: Callable[[], Any]) -> list[Any]:
        self.baton = baton = Baton(len(cores))
        results: list[Any] = [None] * len(cores)
        errors: dict[int, BaseException] = {}

        def work(core: Core) -> None:
            try:
                baton.take(core.rank)
                with _running(core):
                    results[core.rank] = body()
                    core.finish()
            except BaseException as error:
                errors[core.rank] = error
                baton.fail()
            finally:
                baton.leave(core.rank)

        threads = []
        for core in cores:
            context = copy_context()
            threads.append(threading.Thread(target=context.run, args=(work, core), name=f"nkisim-core-{core.rank}"))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            # A core that failed makes its partner give up; the partner's error is only an echo.
            first = next((e for e in errors.values() if not isinstance(e, Abandoned)), None)
            raise first if first is not None else next(iter(errors.values()))
        return results


class Abandoned(Exception):
    """The other core failed, so this one stops too."""


class Baton:
    """Lets one core run at a time, so that a run on two cores is deterministic.

    A core keeps the baton until it waits for the other or ends.
    """

    def __init__(self, n_cores: int) -> None:
        self._condition = threading.Condition()
        self._n = n_cores
        self._turn = 0
        self._done: set[int] = set()
        self._waiting: dict[int, str] = {}
        self._failed = False

    def take(self, rank: int) -> None:
        """Wait for `rank`'s turn."""
        with self._condition:
            self._condition.wait_for(lambda: self._turn == rank or self._failed)
            if self._failed:
                raise Abandoned

    def wait(self, rank: int, what: str, ready: Callable[[], bool]) -> None:
        """Let the other core run until `ready()`.

        Raises:
            NkiError: the other core has ended or waits too, so `ready` can never hold.
        """
        with self._condition:
            while not ready():
                other = 1 - rank
                blocked = other in self._done or other in self._waiting
                if blocked:
                    state = "has ended" if other in self._done else f"waits in {self._waiting[other]}"
                    raise NkiError(
                        what,
                        "",
                        f"deadlock: core {rank} waits for core {other}",
                        received=f"core {other} {state}",
                        allowed="both cores reach the same exchange",
                        source="Logical NeuronCore guide: both cores execute the same control flow",
                    )
                self._waiting[rank] = what
                self._turn = other
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._turn == rank or self._failed)
                self._waiting.pop(rank, None)
                if self._failed:
                    raise Abandoned

    def wake(self, rank: int) -> None:
        """Core `rank` made progress that the other may wait for: it is no longer blocked."""
        with self._condition:
            self._waiting.pop(1 - rank, None)

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


@contextmanager
def _running(core: Core) -> Iterator[None]:
    token = _core.set(core)
    try:
        yield
    finally:
        _core.reset(token)
