"""Room in memory, paths that engines share, and when something is taken."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.hardware import TRN2, resolve_target
from nkisim.latency.constants import Constants
from nkisim.latency.resources import Calendar, Room, shared_paths
from nkisim.latency.schedule import Scheduler
from nkisim.memory import MemoryRegion
from nkisim.trace import Engine, Trace
from tests.latency.accesses import access, record, storage
from tests.latency.kernels import (
    SEMAPHORE,
    cause,
    estimated,
    found,
    new,
    tile,
    zeros,
)

# -- memory


def test_a_loads_place_in_full_memory_is_that_of_the_tile_used_up_first() -> None:
    # 200 KiB of 207: the third load of 80 KiB has to wait until the first one's reader is done.
    def kernel(x: Any) -> None:
        for i in range(3):
            t = new((128, 20480))
            nisa.dma_copy(dst=t, src=x[i])
            nisa.tensor_copy(dst=new((128, 1)), src=t[:, 0:1])

    e = estimated(kernel, zeros(3, 128, 20480))
    loads, readers = found(e, "dma_copy"), found(e, "tensor_copy")
    assert [s.start_ns for s in loads[:2]] == [0.0, 856.0]
    assert (loads[2].why, loads[2].start_ns) == ("memory", readers[0].end_ns + SEMAPHORE)
    assert cause(e, loads[2]) is readers[0]


@pytest.mark.parametrize(("columns", "fit"), [(512, 8), (300, 8), (256, 16), (170, 24), (1024, 4)])
def test_psum_is_given_out_by_banks(columns: Any, fit: Any) -> None:
    # All but the last tile are read late, so there is no room for it before.
    def kernel() -> None:
        x = tile((128, columns))
        tiles = [new((128, columns), buffer=nl.psum) for _ in range(fit + 1)]
        for t in tiles[:-1]:
            nisa.activation(dst=t, op=nl.copy, data=x)
        tile((128, 40000))
        for t in tiles[:-1]:
            nisa.tensor_copy(dst=new((128, 1)), src=t[:, 0:1])
        nisa.activation(dst=tiles[-1], op=nl.copy, data=x)

    e = estimated(kernel)
    activations, readers = found(e, "activation"), found(e, "tensor_copy")
    assert [s.why == "memory" for s in activations] == [False] * fit + [True]
    assert activations[-1].start_ns == readers[0].end_ns + SEMAPHORE


def test_a_place_is_free_when_the_last_of_all_users_is_done() -> None:
    # The Scalar Engine reads first in the program and is done last.
    def kernel(x: Any) -> None:
        t = new((128, 30000))
        nisa.dma_copy(dst=t, src=x[0])
        nisa.activation(dst=new((128, 4000), buffer=nl.psum), op=nl.copy, data=t[:, 0:4000])
        nisa.tensor_copy(dst=new((128, 1)), src=t[:, 0:1])
        nisa.dma_copy(dst=new((128, 30000)), src=x[1])

    e = estimated(kernel, zeros(2, 128, 30000))
    second, slow = found(e, "dma_copy")[1], found(e, "activation")[0]
    assert (second.why, second.start_ns) == ("memory", slow.end_ns + SEMAPHORE)


def test_an_engine_takes_over_its_own_tiles_place_at_once() -> None:
    # As for a write over what it read itself: its later instructions come behind.
    def kernel() -> None:
        for _ in range(3):
            tile((128, 30000))

    assert [s.why for s in estimated(kernel).slots] == ["start", "queue", "queue"]


def test_room_counts_whole_banks_and_shares_of_one() -> None:
    room = Room(MemoryRegion.psum, TRN2, 16384, [])
    big = storage((128, 513), MemoryRegion.psum, number=1)
    assert room.take(big) == set()
    room.give(big, {7, 8})
    for number in range(6):
        assert room.take(storage((128, 512), MemoryRegion.psum, number=number)) == set()
    assert room.take(storage((128, 1), MemoryRegion.psum, number=9)) == {7, 8}


def test_room_waits_for_as_many_tiles_as_it_needs() -> None:
    room = Room(MemoryRegion.sbuf, TRN2, 1200, [])
    for i in range(3):
        tile_i = storage((128, 100), number=i)
        assert room.take(tile_i) == set()
        room.give(tile_i, {i})
    assert room.take(storage((128, 200), number=5)) == {0, 1}
    assert room.take(storage((128, 100), number=6)) == {2}


def test_placed_tiles_wait_for_each_other_where_they_overlap() -> None:
    def kernel() -> None:
        for address in ((0, 0), (0, 512), (0, 768)):
            t = nl.ndarray((128, 128), nl.float32, address=address)
            nisa.memset(dst=t, value=1)
            nisa.activation(dst=new((128, 128)), op=nl.copy, data=t)

    e = estimated(kernel)
    memsets, readers = found(e, "memset"), found(e, "activation")
    assert [s.why for s in memsets] == ["start", "queue", "memory"]
    # Its bytes 768 to 1279 are partly those of the second, and none of the first.
    assert cause(e, memsets[2]) is readers[1]


def test_placed_tiles_on_the_same_bytes_of_other_partitions_do_not_wait() -> None:
    def kernel() -> None:
        for partition in (0, 64):
            t = nl.ndarray((64, 128), nl.float32, address=(partition, 0))
            nisa.memset(dst=t, value=1)
            nisa.activation(dst=new((64, 128)), op=nl.copy, data=t)

    assert found(estimated(kernel), "memset")[1].why == "queue"


def test_placed_tiles_in_turn_wait_for_the_one_before() -> None:
    room = Room(MemoryRegion.sbuf, TRN2, 1000, [])
    for number, (column, expected) in enumerate(
        [(0, set()), (0, {0}), (200, {1}), (0, {1, 2}), (600, set()), (400, {2, 4})]
    ):
        info = storage((128, 100), number=number, address=(0, column))
        assert room.take(info) == expected
        room.give(info, {number})


def test_placed_tiles_take_their_bytes_once() -> None:
    placed = [storage((128, 100), number=1, address=(0, 0)), storage((128, 100), number=2, address=(0, 200))]
    room = Room(MemoryRegion.sbuf, TRN2, 1000, placed)
    first = storage((128, 100), number=3)
    assert room.take(first) == set()
    room.give(first, {1})
    # 600 bytes hold placed tiles, 400 another: there is none left.
    assert room.take(storage((128, 1), number=4)) == {1}


# -- shared paths


def test_on_neuroncore_v2_vector_and_gpsimd_take_turns_at_sbuf() -> None:
    def kernel() -> None:
        tile((128, 1120))
        nisa.iota(dst=new((128, 512), nl.int32), pattern=[[1, 512]])

    second = estimated(kernel, target="trn1").slots[1]
    assert second.start_ns == pytest.approx(1000.0)
    assert (second.cause, second.why) == (0, "path")
    for target in ("trn2", "trn3"):
        assert estimated(kernel, target=target).slots[1].start_ns == 0.0


def test_on_neuroncore_v2_vector_and_scalar_take_turns_at_psum() -> None:
    def kernel(same: Any) -> None:
        x, t = tile((128, 512)), [new((128, 1024), buffer=nl.psum) for _ in range(2)]
        nisa.activation(dst=t[0][:, 0:512], op=nl.copy, data=x)
        other = t[0] if same else t[1]
        nisa.tensor_copy(dst=other[:, 512:1024], src=x)
        nisa.tensor_copy(dst=new((128, 512)), src=x)

    for same in (False, True):
        slots = estimated(lambda same=same: kernel(same), target="trn1").slots
        assert slots[2].why == "path"
        assert slots[2].start_ns == pytest.approx(slots[1].start_ns + slots[1].busy_ns)
        # From NeuronCore-v3 on only at one bank, and these are two.
        slots = estimated(lambda same=same: kernel(same), target="trn2").slots
        assert slots[2].start_ns == slots[0].end_ns


def test_from_neuroncore_v3_on_they_take_turns_at_a_bank() -> None:
    def kernel() -> None:
        x, t = tile((128, 256)), new((128, 512), buffer=nl.psum)
        nisa.activation(dst=t[:, 0:256], op=nl.copy, data=x)
        nisa.tensor_copy(dst=t[:, 256:512], src=x)

    slots = estimated(kernel).slots
    assert slots[2].why == "path"
    assert slots[2].start_ns == pytest.approx(slots[1].start_ns + slots[1].busy_ns)


def test_banks_of_placed_tiles_are_known() -> None:
    def paths(column: Any, engine: Any = Engine.vector, hw: Any = TRN2) -> Any:
        info = storage((128, 512), MemoryRegion.psum, number=column, address=(0, column * 4))
        return shared_paths(record(0, engine, "tensor_copy", (access(info),)), hw)

    assert paths(0) == {("bank", None, 0)}
    assert paths(512) == {("bank", None, 1)}
    assert paths(256) == {("bank", None, 0), ("bank", None, 1)}
    assert paths(0, Engine.tensor) == paths(0, Engine.gpsimd) == set()
    assert paths(0, Engine.scalar, resolve_target("trn1")) == {("psum",)}


def test_an_engine_alone_never_waits_for_a_path() -> None:
    def kernel() -> None:
        t = new((128, 512), buffer=nl.psum)
        for _ in range(3):
            nisa.memset(dst=t, value=1)

    assert [s.why for s in estimated(kernel, target="trn1").slots] == ["start", "queue", "queue"]


# -- the parts


def test_calendar_gives_the_first_gap() -> None:
    calendar = Calendar()
    for begin, duration, owner in ((10.0, 5.0, 1), (20.0, 5.0, 2)):
        calendar.take(begin, duration, owner)
    assert calendar.gap(0.0, 10.0) == (0.0, None)
    assert calendar.gap(0.0, 11.0) == (25.0, 2)
    assert calendar.gap(12.0, 5.0) == (15.0, 1)
    assert calendar.gap(12.0, 6.0) == (25.0, 2)
    assert calendar.gap(25.0, 1.0) == (25.0, None)
    calendar.take(15.0, 5.0, 3)
    assert calendar.gap(12.0, 1.0) == (25.0, 2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=12))
def test_calendar_is_that_of_every_instant(bookings: Any) -> None:
    calendar = Calendar()
    taken: dict[int, int] = {}
    for owner, (earliest, duration) in enumerate(bookings):
        at, holder = calendar.gap(earliest, duration)
        begin = int(at)
        expected = next(t for t in range(earliest, 200) if all(t + k not in taken for k in range(duration)))
        assert at == expected
        assert holder == (taken[begin - 1] if begin > earliest else None)
        calendar.take(begin, duration, owner)
        taken.update(dict.fromkeys(range(begin, begin + duration), owner))


def booked(*times: tuple[float, float]) -> Calendar:
    """A calendar in which owner i has the i-th time (begin, duration)."""
    calendar = Calendar()
    for owner, (begin, duration) in enumerate(times):
        calendar.take(begin, duration, owner)
    return calendar


@pytest.mark.parametrize(
    ("earliest", "duration", "expected"),
    [
        (0.0, 10.0, (0.0, 10.0, None)),  # exactly up to the first
        (0.0, 11.0, (0.0, 16.0, None)),  # 10 before it, 1 behind
        (0.0, 15.0, (0.0, 20.0, None)),  # exactly up to the second
        (0.0, 16.0, (0.0, 26.0, None)),  # 10, 5 between them, 1 behind
        (10.0, 5.0, (15.0, 20.0, 0)),  # begins with the first
        (12.0, 6.0, (15.0, 26.0, 0)),
        (15.0, 5.0, (15.0, 20.0, None)),  # the first has just ended
        (20.0, 3.0, (25.0, 28.0, 1)),
        (25.0, 3.0, (25.0, 28.0, None)),
        (12.0, 0.0, (12.0, 12.0, None)),  # nothing to take
    ],
)
def test_calendar_fills_what_is_free(earliest: float, duration: float, expected: Any) -> None:
    calendar = booked((10.0, 5.0), (20.0, 5.0))
    assert calendar.fill(earliest, duration, 7) == expected


def test_a_filled_stretch_belongs_to_who_ends_it() -> None:
    calendar = booked((10.0, 5.0), (20.0, 5.0))
    assert calendar.fill(2.0, 10.0, 7) == (2.0, 17.0, None)
    # Taken are 2 to 17 and 20 to 25.
    assert calendar.gap(4.0, 3.0) == (17.0, 7)
    assert calendar.gap(4.0, 4.0) == (25.0, 1)
    assert calendar.fill(0.0, 5.0, 8) == (0.0, 20.0, None)
    # Now 0 to 25 is one stretch, and its end is still that of 1.
    assert calendar.fill(0.0, 1.0, 9) == (25.0, 26.0, 1)


def test_filling_nothing_leaves_the_calendar_as_it_is() -> None:
    calendar = booked((10.0, 5.0))
    calendar.fill(3.0, 0.0, 7)
    assert calendar.gap(0.0, 10.0) == (0.0, None)
    assert calendar.gap(0.0, 11.0) == (15.0, 0)


def test_rounding_makes_no_piece() -> None:
    # 0.1 + 0.2 is more than 0.3 by a rounding error: the gap is the whole of it, none is left for behind.
    calendar = booked((0.3, 5.0))
    assert calendar.fill(0.0, 0.1 + 0.2, 7) == (0.0, 0.3, None)
    assert calendar.fill(0.0, 1.0, 8) == pytest.approx((5.3, 6.3, 0))
    # Nor is the error between two times a gap in which to begin.
    calendar = booked((0.0, 0.3), (0.1 + 0.2, 5.0))
    assert calendar.fill(0.2, 1.0, 7) == pytest.approx((5.3, 6.3, 1))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=12))
def test_filling_takes_the_first_free_instants(bookings: Any) -> None:
    calendar = Calendar()
    taken: dict[int, int] = {}
    for owner, (earliest, duration) in enumerate(bookings):
        free = [t for t in range(earliest, 200) if t not in taken][:duration]
        begin, end, holder = calendar.fill(earliest, duration, owner)
        assert (begin, end) == ((free[0], free[-1] + 1) if free else (earliest, earliest))
        assert holder == (taken[free[0] - 1] if free and free[0] > earliest else None)
        taken.update(dict.fromkeys(free, owner))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=8), st.randoms(use_true_random=False))
def test_when_anybody_is_served_does_not_depend_on_the_order_of_filling(bookings: Any, random: Any) -> None:
    # Who gives way does; that no time is lost while somebody waits does not.
    shuffled = bookings.copy()
    random.shuffle(shuffled)
    free = []
    for order in (bookings, shuffled):
        calendar = Calendar()
        for owner, (earliest, duration) in enumerate(order):
            calendar.fill(earliest, duration, owner)
        free.append([t for t in range(100) if calendar.gap(t, 1.0)[0] == t])
    assert free[0] == free[1]
    assert len(free[0]) == 100 - sum(duration for _, duration in bookings)


def test_sequencer_marks_take_no_time() -> None:
    records = [record(i, Engine.sync, name) for i, name in enumerate(("no_reorder_begin", "no_reorder_end"))]
    slots = Scheduler(Trace("trn2", records), Constants(TRN2)).run()
    assert [(s.start_ns, s.end_ns) for s in slots] == [(0.0, 0.0)] * 2
