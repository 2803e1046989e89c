"""DMA: what a transfer costs its trigger, and how long each of the sixteen engines moves its part.

Engine i serves eight of the 128 partitions. A descriptor moves a run of bytes that is contiguous on both
sides; short runs reach only the published share of the engine's rate. Elsewhere than SBUF there are no
partitions and the bytes are shared equally.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import gcd

from nkisim.latency.constants import Constants
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.trace import Access, Record


@dataclass(frozen=True)
class Transfer:
    """A DMA transfer.

    `trigger_ns` is the time of the queue's engine (`queue` names it), `start_ns` from trigger to first byte,
    `engines_ns` the time each DMA engine moves data, `done_ns` from the last byte to a waiting engine.
    """

    queue: str
    trigger_ns: float
    start_ns: float
    engines_ns: tuple[float, ...]
    done_ns: float
    hbm_read_bytes: int
    hbm_write_bytes: int


def transfer(record: Record, c: Constants) -> Transfer:
    """The cost of a DMA record (dma_copy, dma_transpose, dma_compute, sendrecv)."""
    target = record.writes[0] if record.writes else None
    sources = [a for a in record.reads if not a.operand.endswith("index")]
    mode = record.attrs.get("dge", "none")
    n_engines: int = c.dma_engines
    engines = [0.0] * n_engines
    if target is not None and not record.attrs.get("skipped"):
        for source in sources:
            for i, ns in enumerate(_move(source, target, record, c)):
                engines[i] += ns
    rows = max((len(a.rows) for a in (*record.reads, *record.writes) if a.rows is not None), default=0)
    dynamic = mode in ("swdge", "hwdge")
    if mode == "swdge":
        queue, trigger = "gpsimd", c.gpsimd_start_cycles / c.gpsimd_ghz + rows * c.dma_swdge_row_ns
        c.assume("software descriptors: GpSimd time per row")
    elif mode == "hwdge":
        queue, trigger = str(record.attrs.get("trigger", "sync")), c.dma_hwdge_ns
    else:
        # The compiler spreads static transfers over queues; loads and stores on one each is assumed.
        stores = target is not None and target.storage.buffer not in ON_CHIP
        queue, trigger = ("store" if stores else "load"), c.dma_trigger_ns
    return Transfer(
        queue,
        trigger,
        c.dma_dynamic_latency_ns if dynamic else c.dma_static_latency_ns,
        tuple(engines),
        c.dma_done_ns,
        sum(a.nbytes for a in sources if a.storage.buffer not in ON_CHIP),
        target.nbytes if target is not None and target.storage.buffer not in ON_CHIP else 0,
    )


def engine_rate(c: Constants) -> float:
    """GB/s of one DMA engine, never above its core's share of the chip's HBM."""
    share = c.hbm_chip_gbps / c.cores_per_chip / c.dma_engines
    return float(min(c.dma_engine_gbps, share))


def core_rate(c: Constants) -> float:
    """GB/s of all DMA engines of one core."""
    return engine_rate(c) * float(c.dma_engines)


def efficiency(run_bytes: float, c: Constants) -> float:
    """Share of the peak rate at which runs of this many contiguous bytes move; linear between the points."""
    points = c.dma_payload_efficiency
    if run_bytes <= points[0][0]:
        return float(points[0][1] * run_bytes / points[0][0])
    if run_bytes >= points[-1][0]:
        return float(points[-1][1])
    i = bisect_left(points, (run_bytes, 0.0))
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return float(y0 + (y1 - y0) * (run_bytes - x0) / (x1 - x0))


def _move(source: Access, target: Access, record: Record, c: Constants) -> list[float]:
    size = max(source.dtype.itemsize, target.dtype.itemsize)
    n_elements = min(source.n_elements, target.n_elements)
    if not n_elements:
        return [0.0] * int(c.dma_engines)
    transpose = record.instruction == "dma_transpose"
    if transpose:
        on_chip = source.storage.buffer is MemoryRegion.sbuf
        share = c.dma_transpose_on_chip_efficiency if on_chip else c.dma_transpose_efficiency
    else:
        share = efficiency(gcd(_run(source), _run(target)) * size, c)
    if record.instruction == "dma_compute":
        share *= c.dma_compute_efficiency
    total_ns = n_elements * size / (engine_rate(c) * share)
    return _spread(total_ns, source, target, c)


def _spread(total_ns: float, source: Access, target: Access, c: Constants) -> list[float]:
    """Engine time in all, divided over the engines that serve the partitions touched."""
    n: int = c.dma_engines
    side = next((a for a in (target, source) if a.storage.buffer is MemoryRegion.sbuf), None)
    if side is None:
        return [total_ns / n] * n
    per_engine = c.partitions // n
    row = max(1, side.storage.bytes_per_partition // side.dtype.itemsize)
    first = side.offset // row
    engines = [0.0] * n
    each = total_ns / side.shape[0]
    for p in range(first, first + side.shape[0]):
        engines[min(p // per_engine, n - 1)] += each
    return engines


def _run(a: Access) -> int:
    """Elements in the longest contiguous run that all of the access is made of."""
    run = 1
    first = 1 if a.storage.buffer is MemoryRegion.sbuf or a.rows is not None else 0
    for n, s in zip(reversed(a.shape[first:]), reversed(a.strides[first:]), strict=True):
        if n == 1:
            continue
        if s != run:
            break
        run *= n
    return run
