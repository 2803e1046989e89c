"""Who waits for whom, against a model that keeps the users of every single byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.dtypes import bfloat16, float32, uint8
from nkisim.latency.hazards import HbmHistory, TileHistory, history, touched
from nkisim.memory import MemoryRegion, StorageInfo
from nkisim.trace import Access, Engine
from tests.latency.accesses import access, storage, touched_bytes
from tests.latency.kernels import new, tile, traced

SBUF, PSUM, HBM = MemoryRegion.sbuf, MemoryRegion.psum, MemoryRegion.private_hbm


@dataclass
class Users:
    """Of one byte: the last writer, and since then the last reader of each engine with its end."""

    writer: int | None = None
    readers: dict[Engine, tuple[int, float]] = field(default_factory=dict)
    writers_ever: set[int] = field(default_factory=set)
    ever: set[int] = field(default_factory=set)


class Model:
    def __init__(self, info: StorageInfo) -> None:
        self.bytes = [Users() for _ in range(info.nbytes)]

    def users(self, a: Access) -> list[Users]:
        return [self.bytes[i] for i in touched_bytes(a)]

    def producers(self, a: Access) -> set[int]:
        return {u.writer for u in self.users(a) if u.writer is not None}

    def blockers(self, a: Access) -> set[int]:
        return self.producers(a) | {who for u in self.users(a) for who, _ in u.readers.values()}

    def read(self, a: Access, who: int, end: float, engine: Engine) -> None:
        for u in self.users(a):
            u.ever.add(who)
            _, before = u.readers.get(engine, (0, -1.0))
            if engine is not Engine.dma or end >= before:
                u.readers[engine] = (who, end)

    def written(self, a: Access, who: int) -> None:
        for u in self.users(a):
            u.writer, u.readers = who, {}
            u.ever.add(who)
            u.writers_ever.add(who)


ENGINES = (Engine.vector, Engine.scalar, Engine.dma)


@st.composite
def tile_accesses(draw: st.DrawFn, info: StorageInfo) -> Access:
    """A view of a tile: any partitions, strided free dimensions, maybe as another type, maybe rows of it."""
    dtype = draw(st.sampled_from((float32, bfloat16, uint8)))
    row = info.bytes_per_partition // dtype.itemsize
    partitions = info.shape[0]
    if draw(st.booleans()):
        first, count = 0, partitions
    else:
        first = draw(st.integers(0, partitions - 1))
        count = draw(st.integers(1, partitions - first))
        if draw(st.booleans()):
            first, count = first // 32 * 32, min(partitions, (first + count + 31) // 32 * 32) - first // 32 * 32
    inner = draw(st.integers(1, 3))
    outer = draw(st.integers(1, 3))
    inner_step = draw(st.integers(0, 2))
    outer_step = draw(st.integers(0, 4))
    reach = (inner - 1) * inner_step + (outer - 1) * outer_step
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    if draw(st.integers(0, 3)) == 0 or reach >= row:
        shape, strides, column = (count, row), (row, 1), 0
    else:
        column = draw(st.integers(0, row - 1 - reach))
        shape, strides = (count, outer, inner), (row, outer_step, inner_step)
        if draw(st.booleans()) and outer > 1:
            column += (outer - 1) * outer_step
            strides = (row, -outer_step, inner_step)
    rows = None
    if draw(st.integers(0, 5)) == 0:
        chosen = draw(st.sets(st.integers(first, first + count - 1), max_size=3))
        rows = tuple(p * row + column for p in sorted(chosen))
    return access(info, shape, strides, first * row + column, dtype, rows)


@st.composite
def hbm_accesses(draw: st.DrawFn, info: StorageInfo) -> Access:
    """Any strided view of an HBM storage, maybe rows of it."""
    total = info.nbytes // 4
    dims = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    strides = tuple(draw(st.integers(-6, 12)) for _ in range(dims))
    low = sum(min(0, s * (n - 1)) for n, s in zip(shape, strides, strict=True))
    high = sum(max(0, s * (n - 1)) for n, s in zip(shape, strides, strict=True))
    if high - low >= total:
        return access(info, (total,), (1,))
    offset = draw(st.integers(-low, total - 1 - high))
    if dims > 1 and draw(st.booleans()):
        inner_low = sum(min(0, s * (n - 1)) for n, s in zip(shape[1:], strides[1:], strict=True))
        inner_high = sum(max(0, s * (n - 1)) for n, s in zip(shape[1:], strides[1:], strict=True))
        starts = st.integers(-inner_low, total - 1 - inner_high)
        rows = tuple(draw(st.lists(starts, max_size=4)))
        return access(info, shape, (0, *strides[1:]), offset, rows=rows)
    return access(info, shape, strides, offset)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_tile_history_is_that_of_every_byte(data: Any) -> None:
    partitions = data.draw(st.sampled_from((1, 3, 32, 36)))
    info = storage((partitions, 3), data.draw(st.sampled_from((SBUF, PSUM))))
    seen, model = TileHistory(info), Model(info)
    for who in range(data.draw(st.integers(1, 7))):
        a = data.draw(tile_accesses(info))
        assert seen.producers(a) == model.producers(a)
        assert seen.blockers(a) == model.blockers(a)
        if data.draw(st.booleans()):
            seen.written(a, who)
            model.written(a, who)
        else:
            end = float(data.draw(st.integers(0, 3)))
            engine = data.draw(st.sampled_from(ENGINES))
            seen.read(a, who, end, engine)
            model.read(a, who, end, engine)
        everything = access(info)
        assert seen.producers(everything) == model.producers(everything)
        assert seen.blockers(everything) == model.blockers(everything)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_hbm_history_misses_nobody_and_invents_nobody(data: Any) -> None:
    info = storage((40,), HBM)
    seen, model = HbmHistory(), Model(info)
    for who in range(data.draw(st.integers(1, 7))):
        a = data.draw(hbm_accesses(info))
        users = model.users(a)
        assert model.producers(a) <= seen.producers(a) <= set().union(*(u.writers_ever for u in users))
        needed = model.producers(a) | {who for u in users for who, _ in u.readers.values()}
        assert needed <= seen.blockers(a) <= set().union(*(u.ever for u in users))
        if data.draw(st.booleans()):
            seen.written(a, who)
            model.written(a, who)
        else:
            seen.read(a, who, 0.0, Engine.dma)
            model.read(a, who, 0.0, Engine.dma)


def test_kinds() -> None:
    assert isinstance(history(storage((128, 4), SBUF)), TileHistory)
    assert isinstance(history(storage((128, 4), PSUM)), TileHistory)
    assert isinstance(history(storage((128, 4), HBM)), HbmHistory)
    assert isinstance(history(storage((128, 4), MemoryRegion.shared_hbm)), HbmHistory)


def test_interleaved_columns_do_not_meet() -> None:
    info = storage((128, 64))
    h = TileHistory(info)
    even, odd = access(info, (128, 32), (64, 2)), access(info, (128, 32), (64, 2), 1)
    h.written(even, 1)
    assert h.blockers(odd) == set()
    h.written(odd, 2)
    assert h.producers(even) == {1}
    assert h.producers(odd) == {2}
    assert h.producers(access(info, (128, 2))) == {1, 2}


def test_quadrants_and_single_partitions_do_not_meet() -> None:
    info = storage((128, 64))
    h = TileHistory(info)
    for quadrant in range(4):
        part = access(info, (32, 64), (64, 1), quadrant * 32 * 64)
        assert h.blockers(part) == set()
        h.written(part, quadrant)
    for partition in range(128):
        row = access(info, (1, 64), (64, 1), partition * 64)
        assert h.producers(row) == {partition // 32}
        h.written(row, 100 + partition)
    assert h.producers(access(info, (2, 64), (64, 1), 63 * 64)) == {163, 164}


def test_another_type_meets_exactly_its_bytes() -> None:
    info = storage((128, 8))
    h = TileHistory(info)
    low = access(info, (128, 8), (16, 2), 0, bfloat16)
    high = access(info, (128, 8), (16, 2), 1, bfloat16)
    h.written(low, 1)
    assert h.blockers(high) == set()
    assert h.producers(access(info, (128, 1), (8, 1), 3)) == {1}


def test_the_last_reader_of_each_engine_blocks() -> None:
    # A reader that is done late on one engine must not hide an earlier one of another engine.
    info = storage((128, 8))
    for part in (access(info), access(info, (128, 4), (8, 1))):
        h = TileHistory(info)
        h.written(access(info), 0)
        h.read(part, 1, 10.0, Engine.tensor)
        h.read(part, 2, 20.0, Engine.vector)
        h.read(part, 3, 30.0, Engine.vector)
        assert h.blockers(part) == {0, 1, 3}


def test_of_transfers_the_one_done_last_blocks() -> None:
    info = storage((128, 8))
    for part in (access(info), access(info, (128, 4), (8, 1))):
        h = TileHistory(info)
        h.written(access(info), 0)
        h.read(part, 1, 50.0, Engine.dma)
        h.read(part, 2, 20.0, Engine.dma)
        assert h.blockers(part) == {0, 1}
        h.read(part, 3, 60.0, Engine.dma)
        assert h.blockers(part) == {0, 3}


def test_a_write_settles_earlier_readers() -> None:
    info = storage((128, 8))
    h = TileHistory(info)
    h.written(access(info), 0)
    h.read(access(info), 1, 10.0, Engine.vector)
    h.written(access(info, (128, 4), (8, 1)), 2)
    assert h.blockers(access(info, (128, 4), (8, 1))) == {2}
    assert h.blockers(access(info, (128, 4), (8, 1), 4)) == {0, 1}


def test_overlapping_windows_are_no_cover() -> None:
    # As many elements as the tile has, but the last ones never.
    info = storage((128, 8))
    h = TileHistory(info)
    h.written(access(info), 1)
    h.written(access(info, (128, 4, 2), (8, 1, 1)), 2)
    assert h.producers(access(info)) == {1, 2}


def test_transposed_slices_of_hbm_do_not_meet() -> None:
    info = storage((128, 1024), HBM)
    h = HbmHistory()
    first, second = access(info, (128, 512), (1024, 1)), access(info, (128, 512), (1024, 1), 512)
    h.written(first, 1)
    assert h.blockers(second) == set()
    h.written(second, 2)
    # The second one lies within the span of the first; it must not be forgotten for that.
    assert h.producers(first) == {1}
    h.written(access(info, (128, 512), (1024, 1)), 3)
    assert h.producers(first) == {3}
    h.written(access(info), 4)
    assert h.producers(access(info, (1, 1), (1, 1), 600)) == {4}


def test_rows_of_hbm() -> None:
    info = storage((64, 16), HBM)
    h = HbmHistory()
    h.written(access(info, (3, 16), (0, 1), rows=(0, 32, 640)), 1)
    assert h.producers(access(info, (1, 16), (16, 1), 16)) == set()
    assert h.producers(access(info, (1, 16), (16, 1), 32)) == {1}
    assert h.producers(access(info, (2, 16), (0, 1), rows=(16, 48))) == set()
    assert h.producers(access(info, (2, 16), (0, 1), rows=(16, 640))) == {1}
    assert h.producers(access(info, (2, 16), (0, 1), rows=())) == set()


def test_gathered_columns_stand_for_whole_partitions() -> None:
    def kernel() -> None:
        at = tile((16, 1), nl.uint16, value=1)
        wide = tile((32, 64))
        nisa.tensor_copy(dst=new((16, 8)), src=wide[0:16, :].indirect(at, 8))

    r = traced(kernel, target="trn3").records[-1]
    src = next(a for a in r.reads if a.operand == "src")
    whole = touched(r, src)
    assert (whole.shape, whole.strides, whole.offset) == ((16, 64), (64, 1), 0)
    index = next(a for a in r.reads if a.operand == "src index")
    assert touched(r, index) is index
    assert touched(r, r.writes[0]) is r.writes[0]


def test_an_address_known_at_run_time_is_exact_in_the_trace() -> None:
    def kernel() -> None:
        at = tile((1, 1), nl.int32, value=2)
        x = tile((128, 64))
        nisa.tensor_copy(dst=new((128, 8)), src=x.ap([[64, 128], [1, 8]], scalar_offset=at, indirect_dim=1))

    r = traced(kernel).records[-1]
    src = next(a for a in r.reads if a.operand == "src")
    assert touched(r, src) is src
    assert src.offset == 2


@pytest.mark.parametrize("partitions", [1, 33, 128])
def test_maps_stay_small(partitions: Any) -> None:
    """Whole accesses keep no map at all, however many there are."""
    info = storage((partitions, 1000))
    h = TileHistory(info)
    for who in range(5):
        h.written(access(info), who)
        h.read(access(info), who, float(who), Engine.tensor)
    arrays = [v for v in vars(h).values() if isinstance(v, np.ndarray)]
    assert arrays == []
