"""When every instruction starts and ends: in-order engines that wait for each other through memory.

Each core has queues that issue in program order: one per engine, and one per stream of DMA transfers. An
instruction starts when its queue is free and everything it depends on is done; results cross from one
engine to another by semaphore. DMA transfers wait in their queue, then share the sixteen DMA engines. These
work descriptor by descriptor and change between queues, so a transfer moves in pieces: it takes whatever time
of an engine those before it in the program leave free.
A fresh tile waits for nothing but room: when a memory is full it takes the place of the tile that was
released first, so double-buffering pays exactly as far as the capacity goes. The body of a dynamic loop is
one program on a device, so a tile it declares is one tile, reused on every trip. Engines that share a path
to memory take turns on it (`resources.py`).

`nl.no_reorder` has no effect: program order is kept everywhere. So an edge of `with_schedule` or `depends_on`
whose producer comes later in the program, which a compiler meets by reordering, is refused.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from nkisim.hardware import Hardware
from nkisim.latency.constants import Constants
from nkisim.latency.costs import cost
from nkisim.latency.hazards import History, history, touched
from nkisim.latency.resources import Calendar, Room, shared_paths
from nkisim.latency.transfers import queue_of, transfer
from nkisim.layout import row_major_strides
from nkisim.memory import HBM, ON_CHIP, StorageInfo
from nkisim.trace import Access, Engine, Record, Trace

MEETINGS = ("core_barrier", "sendrecv")


@dataclass(frozen=True)
class Slot:
    """One record in time. `cause` is the slot it waited for last, None if it could start at once.

    `busy_ns` is how long it held its engine, of a transfer from its trigger to the last byte; `end_ns` when
    its result can be used, `why` what the cause was: "queue", "data", "memory", "path", "meeting" or
    "start". A transfer that found DMA engines busy with `turn_of` got its turn at `turn_ns`, where its first piece
    begins on the DMA engine that is done last; those that come between its pieces make it longer and are not named,
    as they may have been triggered later than it. `moving_ns` and `taken_ns` are the times that all DMA engines
    together move its bytes and are taken up by it.
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
    moving_ns: float = 0.0
    taken_ns: float = 0.0
    bound_ns: float = 0.0
    trigger_ns: float = 0.0
    turn_of: int | None = None
    turn_ns: float = 0.0

    @property
    def begin_ns(self) -> float:
        """Start, or of a transfer that had to wait for others its turn."""
        return self.start_ns if self.turn_of is None else self.turn_ns

    @property
    def shown_ns(self) -> float:
        """How long it is drawn, from `begin_ns` on."""
        return self.start_ns + self.busy_ns - self.begin_ns


class _Wait(NamedTuple):
    """Until when something waits, for which slot, and why."""

    until: float = 0.0
    cause: int | None = None
    why: str = "start"

    def later(self, until: float, cause: int | None, why: str) -> _Wait:
        return _Wait(until, cause, why) if until > self.until else self


class _Core:
    def __init__(self, records: list[Record], c: Constants) -> None:
        hw: Hardware = c.hardware
        self.records = records
        self.at = 0
        self.queue_free: dict[str, tuple[float, int | None]] = {}
        self.dma_engines = [Calendar() for _ in range(hw.dma_engines)]
        self.paths: dict[tuple[object, ...], Calendar] = defaultdict(Calendar)
        self.last_use = _last_uses(records)
        tiles = [info for infos in self.last_use.values() for info in infos]
        capacity = {"sbuf": c.sbuf_usable_partition_bytes, "psum": hw.psum_partition_bytes}
        self.rooms = {b: Room(b, hw, capacity[b.value], tiles) for b in ON_CHIP}
        self.before = _same_places(records)
        self.after = {old: new for new, old in self.before.items()}
        self.housed: set[int] = set()  # on-chip tiles that have got their place
        self.left: dict[int, set[int]] = {}  # last users of tiles whose place goes to one of the next trip
        self.loaded: set[str] = set()
        self.floor = _Wait()  # a device loop's branch holds everybody
        self.register = _Wait()  # the last change of a register
        self.named: dict[str, int] = {}
        self.last_start: dict[str, float] = {}


def _last_uses(records: list[Record]) -> dict[int, list[StorageInfo]]:
    """On-chip storages by the position of their last use in the core's list."""
    last: dict[int, int] = {}
    infos: dict[int, StorageInfo] = {}
    for i, record in enumerate(records):
        for a in (*record.writes, *record.reads):
            if a.storage.buffer in ON_CHIP:
                last[a.storage.id] = i
                infos[a.storage.id] = a.storage
    found: dict[int, list[StorageInfo]] = defaultdict(list)
    for number, i in last.items():
        found[i].append(infos[number])
    return found


def _same_places(records: list[Record]) -> dict[int, int]:
    """Tiles that a dynamic loop's body declares, with the tile of the trip before: on a device they are one."""
    places: dict[int, int] = {}
    latest: dict[tuple[object, ...], int] = {}
    seen: set[int] = set()
    loops: list[object] = []
    counts: list[dict[tuple[object, ...], int]] = []
    for record in records:
        if record.instruction == "loop_begin":
            loops.append(record.site)
            counts.append({})
        elif record.instruction == "loop_end":
            loops.pop()
            counts.pop()
        elif record.instruction == "loop_iteration":
            counts[-1] = {}
        for a in record.writes:
            info = a.storage
            if info.id in seen or info.buffer not in ON_CHIP:
                continue
            seen.add(info.id)
            if not loops or info.scope_end is None or info.address is not None:
                continue
            kind = (tuple(loops), info.site, info.buffer, info.shape, info.dtype)
            counts[-1][kind] = counts[-1].get(kind, 0) + 1
            key = (*kind, counts[-1][kind])
            if key in latest:
                places[info.id] = latest[key]
            latest[key] = info.id
    return places


def _settled(records: list[Record]) -> set[int]:
    """HBM storages that are only read or only written: nobody waits for anybody on them."""
    read = {a.storage.id for r in records for a in r.reads if a.storage.buffer in HBM}
    written = {a.storage.id for r in records for a in r.writes if a.storage.buffer in HBM}
    return read ^ written


def _label(record: Record) -> str:
    """What scheduling edges call a record."""
    return record.name if record.name is not None else str(record.index)


def _refuse_backward(edges: list[tuple[str, str]], records: list[Record]) -> None:
    first: dict[str, int] = {}
    for i, record in enumerate(records if edges else ()):
        first.setdefault(_label(record), i)
    for consumer, producer in edges:
        if first.get(consumer, len(records)) < first.get(producer, -1):
            raise NotImplementedError(
                f"nkisim.latency.estimate: {consumer!r} is to run after {producer!r}, which comes later in the "
                "program; the model keeps program order"
            )


class Scheduler:
    """Places the records of all cores on one clock."""

    def __init__(self, trace: Trace, c: Constants) -> None:
        self._c = c
        self._histories: dict[int, History] = {}
        self._settled = _settled(trace.records)
        self._hbm = {
            a.storage.id: a.storage
            for r in trace.records
            for a in (*r.reads, *r.writes)
            if a.storage.buffer in HBM and a.storage.id not in self._settled
        }
        self._edges: dict[str, list[str]] = defaultdict(list)
        for consumer, producer in trace.edges:
            self._edges[consumer].append(producer)
        by_core: dict[int, list[Record]] = defaultdict(list)
        for record in trace.records:
            by_core[record.core].append(record)
        for records in by_core.values():
            _refuse_backward(trace.edges, records)
        self._cores = {rank: _Core(by_core[rank], c) for rank in sorted(by_core)}
        self.slots: list[Slot] = []

    def run(self) -> list[Slot]:
        """All slots, in an order in which causes come first."""
        while True:
            for core in self._cores.values():
                while core.at < len(core.records) and core.records[core.at].instruction not in MEETINGS:
                    self._place(core, core.records[core.at], self._ready(core, core.records[core.at]))
            waiting = [core for core in self._cores.values() if core.at < len(core.records)]
            if not waiting:
                return self.slots
            self._meet(waiting)

    # -- one record

    def _place(self, core: _Core, record: Record, ready: _Wait) -> None:
        index = len(self.slots)
        if record.engine is Engine.dma:
            self._place_transfer(core, record, ready)
        else:
            self._place_on_engine(core, record, ready)
        slot = self.slots[index]
        end = slot.end_ns
        for a in record.reads:
            if a.storage.id not in self._settled:
                self._history(a).read(touched(record, a), index, end, record.engine)
        for a in record.writes:
            if a.storage.id not in self._settled:
                self._history(a).written(touched(record, a), index)
        if record.instruction == "core_barrier" and record.attrs["data"] in self._hbm:
            whole = _whole(self._hbm[record.attrs["data"]])
            self._history(whole).written(whole, index)
        for info in core.last_use.get(core.at, ()):
            users = self._histories.pop(info.id).blockers(_whole(info))
            if info.id in core.after:
                core.left[info.id] = users
            else:
                core.rooms[info.buffer].give(info, users)
        core.named[_label(record)] = index
        if record.instruction == "loop_iteration":
            core.floor = _Wait(end, index, "queue")
        elif record.instruction.startswith("register_"):
            core.register = core.register.later(end, index, "data")
        core.at += 1

    def _place_on_engine(self, core: _Core, record: Record, ready: _Wait) -> None:
        spent = cost(record, self._c, core.loaded)
        queue = record.engine.name
        ready = ready.later(*core.queue_free.get(queue, (0.0, None)), "queue")
        paths = [core.paths[key] for key in shared_paths(record, self._c.hardware)]
        settled = False
        while not settled:
            settled = True
            for path in paths:
                begin, holder = path.gap(ready.until, spent.busy_ns)
                if begin > ready.until:
                    ready, settled = _Wait(begin, holder, "path"), False
        index = len(self.slots)
        for path in paths:
            path.take(ready.until, spent.busy_ns, index)
        start = ready.until
        self.slots.append(Slot(record, queue, start, spent.busy_ns, start + spent.latency_ns, ready.cause, ready.why))
        core.queue_free[queue] = (start + spent.busy_ns, index)
        core.last_start[queue] = start

    def _place_transfer(self, core: _Core, record: Record, ready: _Wait) -> None:
        t = transfer(record, self._c)
        ready = ready.later(*core.queue_free.get(_trigger_queue(t.queue), (0.0, None)), "queue")
        index = len(self.slots)
        if t.queue == "scalar":
            # The Scalar Engine's sequencer passes the transfer on between two instructions of its own, which
            # compute beside the descriptor generation.
            ready = self._after_issue(core, "scalar", ready)
            free, before = core.queue_free.get("scalar", (0.0, None))
            core.queue_free["scalar"] = (ready.until, index) if ready.until > free else (free, before)
        triggered = ready.until + t.trigger_ns
        core.queue_free[_trigger_queue(t.queue)] = (triggered, index)
        first_byte = triggered + t.start_ns
        last_byte, turn_of, turn = first_byte, None, 0.0
        for engine, ns in zip(core.dma_engines, t.engines_ns, strict=True):
            if ns > 0.0:
                begin, last, holder = engine.fill(first_byte, ns * t.data_share, index)
                engine.fill(last, ns * (1.0 - t.data_share), index)
                if last > last_byte:
                    last_byte, turn_of, turn = last, holder, begin
        taken = sum(t.engines_ns)
        start = ready.until
        self.slots.append(
            Slot(
                record,
                f"dma {t.queue}",
                start,
                last_byte - start,
                last_byte + t.done_ns,
                ready.cause,
                ready.why,
                t.hbm_read_bytes,
                t.hbm_write_bytes,
                taken * t.data_share,
                taken,
                t.bound_ns,
                t.trigger_ns,
                turn_of,
                turn,
            )
        )

    def _after_issue(self, core: _Core, queue: str, ready: _Wait) -> _Wait:
        """Not before the last instruction of an engine has started."""
        _, before = core.queue_free.get(queue, (0.0, None))
        return ready.later(core.last_start.get(queue, 0.0), before, "queue")

    # -- waiting

    def _ready(self, core: _Core, record: Record) -> _Wait:
        """When everything but the queue lets the record start, and what held it longest."""
        ready = core.floor
        for index in self._dependencies(core, record):
            ready = ready.later(self._visible(index, record), index, "data")
        if _uses_register(record):
            ready = ready.later(*core.register)
        for a in record.writes:
            if a.storage.buffer in ON_CHIP and a.storage.id not in core.housed:
                core.housed.add(a.storage.id)
                old = core.before.get(a.storage.id)
                users = core.left.pop(old) if old in core.left else core.rooms[a.storage.buffer].take(a.storage)
                for index in users:
                    if not self._in_order(index, record):
                        ready = ready.later(self._visible(index, record), index, "memory")
        return ready

    def _dependencies(self, core: _Core, record: Record) -> set[int]:
        found: set[int] = set()
        for a in record.reads:
            if a.storage.id not in self._settled:
                found |= self._history(a).producers(touched(record, a))
        for a in record.writes:
            if a.storage.id not in self._settled:
                # An engine's own earlier instructions are out of its way by the time it writes.
                blockers = self._history(a).blockers(touched(record, a))
                found.update(i for i in blockers if not self._in_order(i, record))
        if record.instruction == "core_barrier" and record.attrs["data"] in self._hbm:
            whole = _whole(self._hbm[record.attrs["data"]])
            found.update(i for i in self._history(whole).blockers(whole) if self.slots[i].record.core == record.core)
        found.update(core.named[p] for p in self._edges.get(_label(record), ()) if p in core.named)
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
        found = self._histories.get(a.storage.id)
        if found is None:
            found = self._histories[a.storage.id] = history(a.storage)
        return found

    # -- two cores

    def _meet(self, waiting: list[_Core]) -> None:
        """Both cores are at an exchange: it starts for both when the later one is there."""
        arrivals = []
        for core in waiting:
            record = core.records[core.at]
            queue = record.engine.name if record.engine is not Engine.dma else _trigger_queue(queue_of(record, self._c))
            arrivals.append(self._ready(core, record).later(*core.queue_free.get(queue, (0.0, None)), "queue"))
        last = max(arrivals, key=lambda wait: wait.until)
        for core, arrival in zip(waiting, arrivals, strict=True):
            self._place(core, core.records[core.at], arrival.later(last.until, last.cause, "meeting"))


def _trigger_queue(queue: str) -> str:
    """Whose time a trigger takes: software descriptors the GpSimd Engine's, others that of a queue of their own."""
    return queue if queue == "gpsimd" else f"dma {queue}"


def _uses_register(record: Record) -> bool:
    """Whether a run-time address comes from a register, and not from a tile, which the record would read."""
    if record.attrs.get("register_offset"):
        return True
    tiles = {r.operand for r in record.reads if r.operand.endswith(" index")}
    return any(a.dynamic and f"{a.operand} index" not in tiles for a in (*record.writes, *record.reads))


def _whole(info: StorageInfo) -> Access:
    return Access("all", info, info.dtype, info.shape, row_major_strides(info.shape), 0)
