"""What is alive at once in SBUF and PSUM, and whether it fits.

Storages that the kernel did not place are taken to start at partition 0, and the compiler to pack
their bytes without gaps; so what is refused here cannot fit, but what passes may still not.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nkisim.errors import NkiError
from nkisim.hardware import Hardware, source_of
from nkisim.memory import MemoryRegion, StorageInfo


@dataclass(frozen=True)
class Peak:
    """Most bytes (SBUF) or banks (PSUM) of a partition in use at once, and the storages alive then."""

    amount: int = 0
    position: int = -1
    alive: tuple[StorageInfo, ...] = ()


@dataclass(frozen=True)
class MemoryUse:
    """Peak use of a core's SBUF (bytes per partition) and PSUM (banks)."""

    sbuf: Peak = field(default_factory=Peak)
    psum: Peak = field(default_factory=Peak)


def check_capacity(storages: Iterable[StorageInfo], hardware: Hardware, spills: bool = False) -> MemoryUse:
    """The peak memory use; a storage is alive from its first to its last use, in program order.

    With `spills`, what does not fit is no error but a warning: a compiler moves it to HBM and back.

    Raises:
        NkiError: SBUF or PSUM does not hold what is alive at once, at the allocation that goes over the
            limit first; or two placed storages overlap while both are alive.
    """
    used = sorted((s for s in storages if s.first_use >= 0), key=lambda s: s.first_use)
    sbuf = [s for s in used if s.buffer is MemoryRegion.sbuf]
    psum = [s for s in used if s.buffer is MemoryRegion.psum]
    use = MemoryUse(_sbuf_peak(sbuf, hardware, spills), _psum_peak(psum, hardware, spills))
    _check_placed(sbuf)
    _check_placed(psum)
    return use


def _start_partitions(storages: list[StorageInfo]) -> list[int]:
    """Partitions among which the fullest one is: those where a storage starts."""
    return sorted({s.start_partition for s in storages})


def _at(storages: list[StorageInfo], partition: int) -> list[StorageInfo]:
    return [s for s in storages if s.start_partition <= partition < s.start_partition + s.partitions]


def _sbuf_peak(storages: list[StorageInfo], hardware: Hardware, spills: bool) -> Peak:
    limit = hardware.sbuf_usable_partition_bytes
    peak = Peak()
    for partition in _start_partitions(storages):
        here = _at(storages, partition)
        first = np.array([s.first_use for s in here])
        last = np.array([s.last_use for s in here])
        size = np.array([s.bytes_per_partition for s in here])
        change = np.zeros(int(last.max()) + 2, np.int64)
        np.add.at(change, first, size)
        np.subtract.at(change, last + 1, size)
        total = np.cumsum(change)
        over = np.flatnonzero(total > limit)
        position = int(over[0]) if over.size and not spills else int(total.argmax())
        if total[position] > peak.amount:
            alive = tuple(s for s in here if s.first_use <= position <= s.last_use)
            peak = Peak(int(total[position]), position, alive)
        if over.size and not spills:
            break
    if peak.amount > limit:
        _refuse(peak, "SBUF capacity", "bytes per partition", limit, "sbuf_usable_partition_bytes", hardware, spills)
    return peak


def _psum_peak(storages: list[StorageInfo], hardware: Hardware, spills: bool) -> Peak:
    limit = hardware.psum_banks
    peak = Peak()
    for partition in _start_partitions(storages):
        alive: list[StorageInfo] = []
        for s in _at(storages, partition):
            alive = [a for a in alive if a.last_use >= s.first_use]
            alive.append(s)
            banks = _banks(alive, hardware.psum_bank_bytes)
            if banks > peak.amount:
                peak = Peak(banks, s.first_use, tuple(alive))
            if banks > limit and not spills:
                break
        if peak.amount > limit and not spills:
            break
    if peak.amount > limit:
        _refuse(peak, "PSUM capacity", "banks", limit, "psum_banks", hardware, spills)
    return peak


def _banks(storages: list[StorageInfo], bank: int) -> int:
    """Banks that storages take: whole ones from a bank's size up, shared ones below it.

    Placed storages are in the banks of their addresses. The rest goes first-fit, largest first: as few
    banks as possible where sizes divide one another, rarely one more than that otherwise.
    """
    free: dict[int, int] = {}
    for s in storages:
        if s.address is not None:
            start, end = s.address[1], s.address[1] + s.bytes_per_partition
            for b in range(start // bank, -(-end // bank)):
                taken = min(end, (b + 1) * bank) - max(start, b * bank)
                free[b] = max(free.get(b, bank) - taken, 0)
    room = list(free.values())
    whole = 0
    for size in sorted((s.bytes_per_partition for s in storages if s.address is None), reverse=True):
        if size >= bank:
            whole += -(-size // bank)
            continue
        for i, left in enumerate(room):
            if size <= left:
                room[i] -= size
                break
        else:
            room.append(bank - size)
    return whole + len(room)


def _refuse(peak: Peak, rule: str, unit: str, limit: int, number: str, hardware: Hardware, spills: bool) -> None:
    last = max(peak.alive, key=lambda s: s.first_use)
    kinds = Counter((s.bytes_per_partition, f"{s.dtype}{list(s.shape)} from line {s.site.line}") for s in peak.alive)
    largest = sorted(kinds.items(), key=lambda kind: -kind[0][0] * kind[1])[:5]
    listing = "; ".join(f"{count} x {size} B {what}" for (size, what), count in largest)
    error = NkiError(
        "ndarray",
        last.name,
        rule,
        received=f"{peak.amount} {unit} alive at once in {len(peak.alive)} tensors (largest: {listing})",
        allowed=f"{limit} {unit} on {hardware.target}",
        source=source_of(number, hardware.generation),
        site=last.site,
        caller=last.caller,
    )
    if not spills:
        raise error
    warnings.warn(f"{error}; the compiler moves the rest to HBM and back, which is not modelled", stacklevel=2)


def _check_placed(storages: list[StorageInfo]) -> None:
    """Refuse placed storages that share a byte while both are alive; `storages` come by first use."""
    placed = [(s, s.address) for s in storages if s.address is not None]
    for i, (a, (partition_a, byte_a)) in enumerate(placed):
        for b, (partition_b, byte_b) in placed[i + 1 :]:
            if b.first_use > a.last_use:
                break
            if _overlap(partition_a, a.partitions, partition_b, b.partitions) and _overlap(
                byte_a, a.bytes_per_partition, byte_b, b.bytes_per_partition
            ):
                raise NkiError(
                    "ndarray",
                    "address",
                    "two tensors placed on the same bytes while both are in use",
                    received=f"{b.name} at {b.address} over {a.name} at {a.address} from line {a.site.line}",
                    allowed="addresses that do not overlap, or uses that do not",
                    source="nki.language.ndarray, NKI 0.6",
                    site=b.site,
                    caller=b.caller,
                )


def _overlap(a: int, size_a: int, b: int, size_b: int) -> bool:
    return a < b + size_b and b < a + size_a
