"""DMA: what a transfer costs its trigger and its queue, and how long each of the sixteen engines moves its part.

Engine i serves eight of the 128 partitions. Elsewhere than SBUF there are no partitions and the bytes are
shared equally. A run of bytes that is contiguous on both sides takes up an engine for the bytes at peak rate and,
if it is short, for a gap. A transfer is done when its last bytes are there, the gap behind them not waited for.
Transposes have the published share of the rate on top.

The published throughput over bytes per partition has two readings. From NeuronCore-v3 on it is time that a transfer
holds its queue, however few its bytes: profiles show engines that move runs of 256 bytes at full rate. On
NeuronCore-v2, where the published times follow bytes and not transfers, it is the gap.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import gcd

from nkisim.hardware import GEN3
from nkisim.latency.constants import Constants
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.trace import Access, Record


@dataclass(frozen=True)
class Transfer:
    """A DMA transfer.

    `trigger_ns` is how long it holds its queue (`queue` names it) or the engine that makes its descriptors,
    `start_ns` from there to first byte, `engines_ns` how long each DMA engine is taken, `data_share` the part of that
    until its last byte, `done_ns` from the last byte to a waiting engine. `bound_ns` is the least time of all engines
    together for the bytes to and from HBM.
    """

    queue: str
    trigger_ns: float
    start_ns: float
    engines_ns: tuple[float, ...]
    data_share: float
    done_ns: float
    hbm_read_bytes: int
    hbm_write_bytes: int
    bound_ns: float


def transfer(record: Record, c: Constants) -> Transfer:
    """The cost of a DMA record (dma_copy, dma_transpose, dma_compute, sendrecv)."""
    sources, target = _sides(record)
    n_engines: int = c.dma_engines
    engines, gap = [0.0] * n_engines, 0.0
    read = written = 0
    if target is not None:
        for source in sources:
            total, gap = _move(source, target, record, c)
            engines = [a + b for a, b in zip(engines, _spread(total, source, target, c), strict=True)]
            read += source.nbytes if source.storage.buffer not in ON_CHIP else 0
        written = min(a.n_elements for a in (target, *sources)) * target.dtype.itemsize if sources else 0
        written = written if target.storage.buffer not in ON_CHIP else 0
        if record.instruction == "dma_compute":
            # Every source passes the engines once; adding one to what is there takes twice a copy's time.
            extra = max(1.0, 1 / c.dma_compute_efficiency / len(sources))
            engines = [ns * extra for ns in engines]
    busy = sum(engines)
    queue, trigger, start = _trigger(record, target, c)
    return Transfer(
        queue,
        trigger,
        start,
        tuple(engines),
        1.0 - gap / busy if busy else 1.0,
        c.dma_done_ns,
        read,
        written,
        max(max(read, written) / c.dma_engine_gbps, (read + written) / _hbm_share(c)),
    )


def queue_of(record: Record, c: Constants) -> str:
    """The queue that a transfer is put in."""
    return _trigger(record, _sides(record)[1], c)[0]


def core_rate(c: Constants) -> float:
    """GB/s of all DMA engines of one core, between HBM and SBUF."""
    return _engine_rate(1, c) * float(c.dma_engines)


def efficiency(run_bytes: float, c: Constants) -> float:
    """Share of the peak rate at which runs of this many contiguous bytes move; linear between the points.

    Runs shorter than the first point take as long as that.
    """
    points = c.dma_payload_efficiency
    if run_bytes < points[0][0]:
        c.assume(f"DMA: a run of bytes takes at least the time of {points[0][0]}")
    if run_bytes <= points[0][0]:
        return float(points[0][1] * run_bytes / points[0][0])
    if run_bytes >= points[-1][0]:
        return float(points[-1][1])
    i = bisect_left(points, (run_bytes, 0.0))
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return float(y0 + (y1 - y0) * (run_bytes - x0) / (x1 - x0))


def _sides(record: Record) -> tuple[list[Access], Access | None]:
    """Sources and target; nothing where run-time indices left nothing to move."""
    if record.attrs.get("skipped") or not record.writes:
        return [], None
    return [a for a in record.reads if not a.operand.endswith(" index")], record.writes[0]


def _trigger(record: Record, target: Access | None, c: Constants) -> tuple[str, float, float]:
    """Queue, how long it is held, and the time from there to the first byte."""
    mode = record.attrs.get("dge", "none")
    accesses = (*record.reads, *record.writes)
    if mode == "unknown" and any(a.dynamic for a in accesses):
        # The compiler's choice; an address known at run time only needs one of the modes on the device.
        same = len({a.dtype for a in (*_sides(record)[0], *record.writes)}) == 1
        mode = "hwdge" if c.hardware.generation >= GEN3 and same else "swdge"
        c.assume("dge_mode.unknown with a run-time address: hardware descriptors where they can")
    if mode == "swdge":
        rows = max((len(a.rows) for a in accesses if a.rows is not None), default=0)
        if rows:
            c.assume("software descriptors: GpSimd time per row")
            return "gpsimd", c.gpsimd_start_cycles / c.gpsimd_ghz + rows * c.dma_swdge_row_ns, c.dma_dynamic_latency_ns
        return "gpsimd", *_held(c.dma_swdge_ns, c.dma_dynamic_latency_ns, c)
    if mode == "hwdge":
        c.assume("hardware descriptors: latency of software ones")
        chosen = record.attrs.get("trigger")
        return (chosen if chosen == "scalar" else "sync"), c.dma_hwdge_ns, c.dma_dynamic_latency_ns
    # The compiler spreads static transfers over queues; loads and stores on one each is assumed.
    stores = target is not None and target.storage.buffer not in ON_CHIP
    return ("store" if stores else "load"), *_held(c.dma_static_queue_ns, c.dma_static_latency_ns, c)


def _held(per_transfer_ns: float, latency_ns: float, c: Constants) -> tuple[float, float]:
    """How long the queue is held, from the trigger on, and what remains of the latency behind the trigger."""
    held = max(per_transfer_ns, float(c.dma_trigger_ns))
    return held, c.dma_trigger_ns + latency_ns - held


def _hbm_share(c: Constants) -> float:
    """GB/s of the chip's HBM that one DMA engine may take when all of all cores run."""
    return float(c.hbm_chip_gbps / c.cores_per_chip / c.dma_engines)


def _engine_rate(n_hbm_sides: int, c: Constants) -> float:
    """GB/s of one DMA engine, never above its share of the HBM, which a copy inside HBM passes twice."""
    return min(float(c.dma_engine_gbps), _hbm_share(c) / max(1, n_hbm_sides))


def _move(source: Access, target: Access, record: Record, c: Constants) -> tuple[float, float]:
    """Engine time in all to move one source, and how much of it is the gap behind the last bytes."""
    size = max(source.dtype.itemsize, target.dtype.itemsize)
    n_elements = min(source.n_elements, target.n_elements)
    if not n_elements:
        return 0.0, 0.0
    nbytes = n_elements * size
    row = _row_bytes(source, target, nbytes, size, c)
    transpose = record.instruction == "dma_transpose"
    run = _run(target) if transpose else gcd(_run(source), _run(target))
    run_bytes = min(run * size, row)
    share = efficiency(run_bytes, c)
    gap_share = (1.0 - share) * run_bytes / row
    if transpose:
        on_chip = source.storage.buffer is MemoryRegion.sbuf
        share *= c.dma_transpose_on_chip_efficiency if on_chip else c.dma_transpose_efficiency
    n_hbm_sides = sum(a.storage.buffer not in ON_CHIP for a in (source, target))
    total = nbytes / (_engine_rate(n_hbm_sides, c) * share)
    return total, total * gap_share


def _row_bytes(source: Access, target: Access, nbytes: int, size: int, c: Constants) -> float:
    """Bytes per partition; without partitions, of the 128 equal parts that engines would move."""
    side = _sbuf_side(source, target)
    return float(side.free_size * size) if side is not None else max(float(size), nbytes / c.partitions)


def _sbuf_side(source: Access, target: Access) -> Access | None:
    return next((a for a in (target, source) if a.storage.buffer is MemoryRegion.sbuf), None)


def _spread(total_ns: float, source: Access, target: Access, c: Constants) -> list[float]:
    """Engine time in all, divided over the engines that serve the partitions touched."""
    n: int = c.dma_engines
    side = _sbuf_side(source, target)
    if side is None:
        return [total_ns / n] * n
    per_engine = c.partitions // n
    row = max(1, side.storage.bytes_per_partition // side.dtype.itemsize)
    starts = side.rows if side.rows is not None else range(side.offset, side.offset + side.shape[0] * row, row)
    engines = [0.0] * n
    for start in starts:
        partition = side.storage.start_partition + start // row
        engines[min(partition // per_engine, n - 1)] += total_ns / len(starts)
    return engines


def _run(a: Access) -> int:
    """Elements in the longest contiguous run that all of the access is made of."""
    run = 1
    first = 1 if a.storage.buffer is MemoryRegion.sbuf else 0
    for n, s in zip(reversed(a.shape[first:]), reversed(a.strides[first:]), strict=True):
        if n == 1:
            continue
        if s != run:
            break
        run *= n
    return run
