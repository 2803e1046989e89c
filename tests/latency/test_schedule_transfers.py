"""Queues of transfers, their triggers, and the DMA engines they share (trn2)."""

from __future__ import annotations

from typing import Any

import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.latency.kernels import (
    DONE,
    cause,
    estimated,
    found,
    new,
    tile,
    zeros,
)


def hbm(*shape: int) -> Any:
    return nl.ndarray(shape, nl.float32, buffer=nl.private_hbm)


# -- transfers


def load(x: Any, **how: Any) -> Any:
    t = new(x.shape, x.dtype)
    nisa.dma_copy(dst=t, src=x, **how)
    return t


def test_one_load() -> None:
    # 64 KiB on each engine at 23 GB/s.
    def kernel(x: Any) -> None:
        load(x)

    (slot,) = estimated(kernel, zeros(128, 2048)).slots
    last_byte = 70 + 1003 + 8 * 8192 / 23
    assert slot.busy_ns == pytest.approx(last_byte, rel=1e-9)
    assert slot.end_ns == pytest.approx(last_byte + DONE)
    assert slot.moving_ns / 16 == slot.taken_ns / 16 == pytest.approx(8 * 8192 / 23)
    (v2,) = estimated(kernel, zeros(128, 2048), target="trn1").slots
    assert v2.moving_ns / 16 == pytest.approx(8 * 8192 / 17)
    assert v2.taken_ns / 16 == pytest.approx(8 * 8192 / (17 * 0.983))


def test_loads_queue_for_triggers_and_share_the_engines() -> None:
    def kernel(x: Any) -> None:
        for i in range(3):
            load(x[i])

    slots = estimated(kernel, zeros(3, 128, 8192)).slots
    each = 8 * 32768 / 23
    assert [s.start_ns for s in slots] == [0.0, 856.0, 1712.0]
    assert [s.end_ns for s in slots] == pytest.approx([1073 + each * i + DONE for i in (1, 2, 3)])
    assert [s.turn_of for s in slots] == [None, 0, 1]
    assert slots[1].begin_ns == pytest.approx(1073 + each)


def test_loads_of_other_partitions_use_other_engines() -> None:
    def kernel(x: Any) -> None:
        t = new((128, 8192))
        for start in (0, 64):
            nisa.dma_copy(dst=t[start : start + 64], src=x[start : start + 64])

    slots = estimated(kernel, zeros(128, 8192)).slots
    assert slots[1].turn_of is None
    assert slots[1].end_ns == pytest.approx(slots[0].end_ns + 856)


def test_a_transfer_that_is_ready_early_does_not_wait_for_an_earlier_one_that_is_not() -> None:
    def kernel(x: Any) -> None:
        y = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        late = tile((128, 9600))
        nisa.dma_copy(dst=y, src=late[:, 0:64])
        load(x)

    e = estimated(kernel, zeros(128, 8192))
    store, early = found(e, "dma_copy")
    assert (store.queue, early.queue) == ("dma store", "dma load")
    assert early.start_ns == 0.0
    assert store.start_ns > 10000
    assert store.turn_of is None or store.turn_ns >= early.begin_ns


def load_and_store(columns: int, small: int, store_first: bool) -> Any:
    """Estimate and slots of a load of `columns` float32 per partition and a store of `small`, 10,183 ns later."""

    def kernel(x: Any) -> None:
        y, late = nl.ndarray((128, small), nl.float32, buffer=nl.shared_hbm), tile((128, 9600))
        if not store_first:
            load(x)
        nisa.dma_copy(dst=y, src=late[:, 0:small])
        if store_first:
            load(x)

    e = estimated(kernel, zeros(128, columns))
    copies = {s.queue: s for s in found(e, "dma_copy")}
    return e, copies["dma load"], copies["dma store"]


# First bytes: 1,073 ns after the trigger, of the store after its producer's 10,000, 150 of latency and 33 of semaphore.
FIRST, STORE_FIRST = 1073.0, 9600 / 0.96 + 150 + 33 + 1073


def test_a_large_transfer_goes_on_behind_a_small_one() -> None:
    e, large, small = load_and_store(20480, 512, store_first=True)
    alone, least = 8 * 81920 / 23, 8 * 2048 / 23
    assert (small.end_ns - DONE, large.end_ns - DONE) == pytest.approx((STORE_FIRST + least, FIRST + alone + least))
    # The bytes and their time are those of the two, however they were cut.
    assert (large.hbm_read_bytes, small.hbm_write_bytes) == (128 * 81920, 128 * 2048)
    assert (large.taken_ns, small.taken_ns) == pytest.approx((16 * alone, 16 * least))
    assert e.busy_us["0 dma"] * 1000 == pytest.approx(alone + least)


def test_a_large_transfer_that_began_at_once_has_waited_for_nobody() -> None:
    e, large, small = load_and_store(20480, 512, store_first=True)
    assert small.start_ns > large.start_ns + FIRST
    assert large.turn_of is None
    (step,) = e.critical_path
    assert (step.start_us, step.held_us, step.why) == (0.0, e.total_us, "start")


def test_the_later_transfer_in_the_program_gives_way() -> None:
    # The other way round the small one waits for all of the large one: the order of queues is the program's.
    alone, least = 8 * 81920 / 23, 8 * 2048 / 23
    e, large, small = load_and_store(20480, 512, store_first=False)
    assert large.end_ns - DONE == pytest.approx(FIRST + alone)
    assert small.end_ns - DONE == pytest.approx(FIRST + alone + least)
    assert small.turn_of == e.slots.index(large)
    # Both together take the same time in either order, and bytes and busy time are the same.
    other, *_ = load_and_store(20480, 512, store_first=True)
    assert other.total_us == pytest.approx(e.total_us)
    assert other.busy_us == pytest.approx(e.busy_us)
    assert (other.hbm_read_bytes, other.hbm_write_bytes) == (e.hbm_read_bytes, e.hbm_write_bytes)


@pytest.mark.parametrize("store_first", [True, False])
def test_transfers_that_do_not_meet_are_as_if_alone(store_first: bool) -> None:
    # 6,144 float32 per partition are there after 1,073 + 8,548 ns, before the store's first byte.
    _, large, small = load_and_store(6144, 512, store_first)
    assert large.end_ns - DONE == pytest.approx(FIRST + 8 * 24576 / 23)
    assert small.end_ns - DONE == pytest.approx(STORE_FIRST + 8 * 2048 / 23)


def test_bytes_that_moved_do_not_wait_for_the_gap_behind_them() -> None:
    # trn1: runs of 2 KiB move at 0.813 of 17 GB/s. So each engine moves the load's bytes from 1,370 ns for 963.8, and
    # is taken 221.7 ns more, within which the store's first byte comes.
    def kernel(x: Any) -> None:
        y, late = nl.ndarray((128, 512), nl.float32, buffer=nl.shared_hbm), tile((128, 1030))
        nisa.dma_copy(dst=y, src=late[:, 0:512])
        load(x)

    store, early = found(estimated(kernel, zeros(128, 512), target="trn1"), "dma_copy")
    each = 8 * 2048 / 17
    assert each < store.start_ns < each / 0.813
    assert early.end_ns - DONE == pytest.approx(1370 + each)
    assert store.end_ns - DONE == pytest.approx(store.start_ns + 1370 + each)
    assert store.taken_ns == early.taken_ns == pytest.approx(16 * each / 0.813)


def test_the_next_transfer_waits_for_the_gap_too() -> None:
    def kernel(x: Any) -> None:
        for i in range(2):
            load(x[i])

    first, second = estimated(kernel, zeros(2, 128, 512), target="trn1").slots
    each = 8 * 2048 / 17
    assert (second.turn_of, second.turn_ns) == (0, pytest.approx(1370 + each / 0.813))
    assert second.end_ns - DONE == pytest.approx(first.end_ns - DONE + each / 0.813)


def test_stores_to_an_output_wait_for_nobody() -> None:
    def kernel() -> None:
        y = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        x = tile((128, 64))
        nisa.dma_copy(dst=y, src=x)
        nisa.dma_copy(dst=y, src=x)

    first, second = found(estimated(kernel), "dma_copy")
    assert second.start_ns == first.start_ns + 856


def test_a_load_waits_for_the_store_of_what_it_reads() -> None:
    def kernel() -> None:
        scratch = hbm(2, 128, 64)
        x = tile((128, 64))
        nisa.dma_copy(dst=scratch[0], src=x)
        load(scratch[0])
        nisa.dma_copy(dst=scratch[1], src=x)

    store, back, other = found(estimated(kernel), "dma_copy")
    assert back.start_ns == store.end_ns
    assert other.start_ns == store.start_ns + 856


def test_software_descriptors_are_work_of_gpsimd() -> None:
    def kernel(x: Any) -> None:
        at = tile((64, 1), nl.int32, value=0)
        rows = x.ap([[64, 64], [1, 64]], vector_offset=at, indirect_dim=0)
        nisa.dma_copy(dst=new((64, 64)), src=rows)
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]])

    e = estimated(kernel, zeros(64, 64))
    gather, iota = found(e, "dma_copy")[0], found(e, "iota")[0]
    assert iota.start_ns == pytest.approx(gather.start_ns + 125 + 64 * 10)
    assert cause(e, iota) is gather
    assert e.busy_us["0 gpsimd"] * 1000 == pytest.approx(125 + 640 + (150 + 64) / 1.2)


def test_hardware_descriptors_triggered_by_scalar_run_beside_its_work() -> None:
    def kernel(x: Any) -> None:
        t = tile((128, 960))
        nisa.activation(dst=new((128, 960)), op=nl.copy, data=t)
        load(x, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar)
        load(x, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar)
        nisa.activation(dst=new((128, 960)), op=nl.copy, data=t)

    e = estimated(kernel, zeros(128, 64))
    (first, second), loads = found(e, "activation"), found(e, "dma_copy")
    # The first is passed on when the activation before it has begun, the second when the generator is free.
    assert [s.start_ns for s in loads] == [first.start_ns, first.start_ns + 600]
    assert second.start_ns == pytest.approx(max(first.start_ns + 800, loads[1].start_ns))


def test_the_scalar_engine_stands_still_before_a_trigger_that_has_to_wait() -> None:
    def kernel() -> None:
        y = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        early, late = tile((128, 64)), tile((128, 9600))
        nisa.dma_copy(dst=y, src=late[:, 0:64], dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar)
        nisa.activation(dst=new((128, 64)), op=nl.copy, data=early)

    e = estimated(kernel)
    store, activation = found(e, "dma_copy")[0], found(e, "activation")[0]
    assert activation.start_ns == store.start_ns > 10000
    assert cause(e, activation) is store
