"""When every instruction starts and ends: in-order engines that wait for each other through memory.

Each core has queues that issue in program order: one per engine, and one per stream of DMA transfers. An
instruction starts when its queue is free and everything it depends on is done; results cross from one
engine to another by semaphore. DMA transfers wait in their queue, then share the sixteen DMA engines.
A fresh tile waits for nothing but room: when a memory is full it takes the place of the tile that was
released first, so double-buffering pays exactly as far as the capacity goes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from dataclasses import dataclass, field

from nkisim.latency.constants import Constants
from nkisim.latency.costs import Cost, cost
from nkisim.latency.hazards import History
from nkisim.latency.transfers import transfer
from nkisim.memory import HBM, MemoryRegion, StorageInfo
from nkisim.trace import Access, Engine, Record

MEETINGS = ("core_barrier", "sendrecv")


@dataclass(frozen=True)
class Slot:
    """One record in time. `cause` is the slot it waited for last, None if it could start at once.

    `busy_ns` is how long it held its engine, `end_ns` when its result can be used, `why` what the cause was:
    "queue", "data", "memory", "meeting" or "start". A transfer starts with its trigger, or, where DMA engines
    were busy with others by then, with its turn.
    """

    record: Record
    queue: str
    start_ns: float
    busy_ns: float
    end_ns: float
    cause: int | None
    why: str
    hbm_read_bytes: int = 0
    hbm_write_bytes: int = 0
    moving_ns: float = 0.0  # time of all DMA engines together
    trigger_ns: float = 0.0


@dataclass
class _Pool:
    """Room in one memory of one core, in bytes per partition."""

    free: int
    released: deque[tuple[float, int, int]] = field(default_factory=deque)  # when, bytes, slot

    def take(self, need: int) -> tuple[float, int | None]:
        """When `need` bytes are there, and the slot that gave the last of them."""
        when, cause = 0.0, None
        while self.free < need and self.released:
            end, size, slot = self.released.popleft()
            self.free += size
            if end >= when:
                when, cause = end, slot
        self.free -= need
        return when, cause


class _Calendar:
    """When a DMA engine is taken. Transfers come in program order but are served as they are triggered."""

    def __init__(self) -> None:
        self._begins: list[float] = []
        self._ends: list[float] = []
        self._owners: list[int] = []

    def book(self, earliest: float, duration: float, owner: int) -> tuple[float, int | None]:
        """Take the first gap from `earliest` on; its begin, and whoever had to be waited for."""
        i = bisect_right(self._ends, earliest)
        begin, holder = earliest, None
        while i < len(self._begins) and self._begins[i] < begin + duration:
            begin, holder = self._ends[i], self._owners[i]
            i += 1
        self._begins.insert(i, begin)
        self._ends.insert(i, begin + duration)
        self._owners.insert(i, owner)
        return begin, holder


class _Core:
    def __init__(self, records: list[Record], c: Constants) -> None:
        hw = c.hardware
        self.records = records
        self.at = 0
        self.queue_free: dict[str, tuple[float, int | None]] = {}
        self.dma_engines = [_Calendar() for _ in range(hw.dma_engines)]
        self.pools = {
            MemoryRegion.sbuf: _Pool(hw.sbuf_usable_partition_bytes),
            MemoryRegion.psum: _Pool(hw.psum_partition_bytes),
        }
        self.alive: dict[int, float] = {}
        self.loaded: set[str] = set()
        self.loops: list[tuple[float, int]] = []
        self.floor: tuple[float, int | None] = (0.0, None)  # a device loop's branch holds everybody
        self.last_use = _last_uses(records)


def _last_uses(records: list[Record]) -> dict[int, list[StorageInfo]]:
    """On-chip storages by the position of their last use in the core's list."""
    last: dict[int, int] = {}
    infos: dict[int, StorageInfo] = {}
    for i, record in enumerate(records):
        for a in (*record.writes, *record.reads):
            if a.storage.buffer in (MemoryRegion.sbuf, MemoryRegion.psum):
                last[a.storage.id] = i
                infos[a.storage.id] = a.storage
    found: dict[int, list[StorageInfo]] = defaultdict(list)
    for number, i in last.items():
        found[i].append(infos[number])
    return found


def _settled(records: list[Record]) -> set[int]:
    """HBM storages that are only read or only written: nobody waits for anybody on them."""
    read = {a.storage.id for r in records for a in r.reads if a.storage.buffer in HBM}
    written = {a.storage.id for r in records for a in r.writes if a.storage.buffer in HBM}
    return read ^ written


class Scheduler:
    """Places the records of all cores on one clock."""

    def __init__(self, records: list[Record], edges: list[tuple[str, str]], c: Constants) -> None:
        self._c = c
        self._histories: dict[int, History] = {}
        self._settled = _settled(records)
        self._edges: dict[str, list[str]] = defaultdict(list)
        for consumer, producer in edges:
            self._edges[consumer].append(producer)
        self._named: dict[str, int] = {}
        by_core: dict[int, list[Record]] = defaultdict(list)
        for record in records:
            by_core[record.core].append(record)
        self._cores = {rank: _Core(by_core[rank], c) for rank in sorted(by_core)}
        self.slots: list[Slot] = []

    def run(self) -> list[Slot]:
        """All slots, in an order in which causes come first."""
        while True:
            progress = False
            for core in self._cores.values():
                while core.at < len(core.records) and core.records[core.at].instruction not in MEETINGS:
                    self._place(core, core.records[core.at])
                    core.at += 1
                    progress = True
            waiting = [core for core in self._cores.values() if core.at < len(core.records)]
            if waiting:
                self._meet(waiting)
                progress = True
            if not progress:
                return self.slots

    # -- one record

    def _place(self, core: _Core, record: Record, floor: tuple[float, int | None] = (0.0, None)) -> int:
        ready, cause, why = self._ready(core, record, floor)
        if record.engine is Engine.dma:
            self._place_transfer(core, record, ready, cause, why)
        else:
            self._place_on_engine(core, record, ready, cause, why)
        index = len(self.slots) - 1
        end = self.slots[index].end_ns
        for a in record.reads:
            if a.storage.id not in self._settled:
                self._history(a).read(a, index, end)
        for a in record.writes:
            if a.storage.id not in self._settled:
                self._history(a).written(a, index)
        for info in core.last_use.get(core.at, ()):
            core.pools[info.buffer].released.append((core.alive.get(info.id, end), info.bytes_per_partition, index))
        if record.name is not None:
            self._named[record.name] = index
        if record.instruction == "loop_iteration":
            core.floor = (end, index)
        return index

    def _place_on_engine(self, core: _Core, record: Record, ready: float, cause: int | None, why: str) -> None:
        spent: Cost = cost(record, self._c, core.loaded)
        queue = record.engine.name
        free, before = core.queue_free.get(queue, (0.0, None))
        if free > ready:
            ready, cause, why = free, before, "queue"
        self._append(core, record, queue, ready, spent.busy_ns, ready + spent.latency_ns, cause, why)
        core.queue_free[queue] = (ready + spent.busy_ns, len(self.slots) - 1)

    def _place_transfer(self, core: _Core, record: Record, ready: float, cause: int | None, why: str) -> None:
        t = transfer(record, self._c)
        # Software descriptors are the GpSimd Engine's work, hardware ones the trigger engine's; static ones Sync's.
        queue = t.queue if t.queue in ("gpsimd", "scalar") else f"dma {t.queue}"
        free, before = core.queue_free.get(queue, (0.0, None))
        if free > ready:
            ready, cause, why = free, before, "queue"
        triggered = ready + t.trigger_ns
        first_byte = triggered + t.start_ns
        start, end = ready, first_byte
        index = len(self.slots)
        for i, ns in enumerate(t.engines_ns):
            if ns > 0.0:
                begin, holder = core.dma_engines[i].book(first_byte, ns, index)
                if begin + ns > end:
                    end = begin + ns
                    if holder is not None:
                        start, cause, why = begin, holder, "queue"
        self._append(
            core, record, f"dma {t.queue}", start, end - start, end + t.done_ns, cause, why,
            t.hbm_read_bytes, t.hbm_write_bytes, sum(t.engines_ns), t.trigger_ns,
        )  # fmt: skip
        core.queue_free[queue] = (triggered, index)

    def _append(
        self,
        core: _Core,
        record: Record,
        queue: str,
        start: float,
        busy: float,
        end: float,
        cause: int | None,
        why: str,
        read: int = 0,
        written: int = 0,
        moving: float = 0.0,
        trigger: float = 0.0,
    ) -> None:
        for a in (*record.writes, *record.reads):
            if a.storage.id in core.alive:
                core.alive[a.storage.id] = max(core.alive[a.storage.id], end)
        self.slots.append(Slot(record, queue, start, busy, end, cause, why, read, written, moving, trigger))

    # -- waiting

    def _ready(self, core: _Core, record: Record, floor: tuple[float, int | None]) -> tuple[float, int | None, str]:
        """When everything but the queue lets the record start, and what held it longest."""
        when, cause = max(core.floor, floor, key=lambda f: f[0])
        why = "start" if cause is None else "meeting"
        for index in self._dependencies(record):
            at = self._visible(index, record)
            if at > when:
                when, cause, why = at, index, "data"
        for a in record.writes:
            pool = core.pools.get(a.storage.buffer)
            if pool is not None and a.storage.id not in core.alive:
                at, giver = pool.take(a.storage.bytes_per_partition)
                core.alive[a.storage.id] = 0.0
                if at > when:
                    when, cause, why = at, giver, "memory"
        return when, cause, why

    def _dependencies(self, record: Record) -> set[int]:
        found: set[int] = set()
        for a in record.reads:
            if a.storage.id not in self._settled:
                found |= self._history(a).producers(a)
        for a in record.writes:
            if a.storage.id not in self._settled:
                # An engine's own earlier instructions are out of its way by the time it writes.
                found.update(i for i in self._history(a).blockers(a) if not self._in_order(i, record))
        if record.name is not None:
            found.update(self._named[p] for p in self._edges.get(record.name, ()) if p in self._named)
        return found

    def _in_order(self, index: int, record: Record) -> bool:
        other = self.slots[index].record
        return other.engine is record.engine and other.core == record.core and record.engine is not Engine.dma

    def _visible(self, index: int, record: Record) -> float:
        """When a slot's result or release reaches `record`'s engine."""
        slot = self.slots[index]
        same = slot.record.engine is record.engine and slot.record.core == record.core
        if same or slot.record.engine is Engine.dma:
            return slot.end_ns
        return slot.end_ns + float(self._c.semaphore_ns)

    def _history(self, a: Access) -> History:
        history = self._histories.get(a.storage.id)
        if history is None:
            history = self._histories[a.storage.id] = History(a.storage)
        return history

    # -- two cores

    def _meet(self, waiting: list[_Core]) -> None:
        """Both cores are at an exchange: it starts for both when the later one is there."""
        arrivals = []
        for core in waiting:
            record = core.records[core.at]
            when, _, _ = self._ready(core, record, (0.0, None))
            free, before = core.queue_free.get(record.engine.name, (0.0, None))
            arrivals.append(max((when, None), (free, before), key=lambda f: f[0]))
        floor = max(arrivals, key=lambda f: f[0])
        for core in waiting:
            self._place(core, core.records[core.at], (floor[0], floor[1]))
            core.at += 1
