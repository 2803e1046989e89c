"""Start and end of instructions, from kernels small enough to place by hand (trn2 unless said)."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.hardware import TRN2, resolve_target
from nkisim.latency import Estimate, Slot, estimate
from nkisim.latency.constants import Constants
from nkisim.latency.resources import Calendar, Room, shared_paths
from nkisim.latency.schedule import Scheduler
from nkisim.memory import MemoryRegion
from nkisim.trace import Engine, Trace
from tests.latency.accesses import access, record, storage
from tests.latency.kernels import estimated, new, tile, traced

pytestmark = pytest.mark.filterwarnings("ignore:nl.dynamic_range:DeprecationWarning")

VECTOR, SCALAR, TENSOR, SEMAPHORE, DONE = 144 / 0.96, 353 / 1.2, 165.0, 33.0, 300.0


def found(e: Estimate, instruction: str, core: int | None = None) -> list[Slot]:
    """Executions of an instruction in program order."""
    slots = [s for s in e.slots if s.record.instruction == instruction and core in (None, s.record.core)]
    return sorted(slots, key=lambda s: (s.record.core, s.record.index))


def copied(n: int = 960, src: Any = None, engine: Any = nisa.engine.vector) -> Any:
    """Inside a kernel: a float32 copy that takes n cycles."""
    y = new((128, n))
    nisa.tensor_copy(dst=y, src=tile((128, n)) if src is None else src, engine=engine)
    return y


def hbm(*shape: int) -> Any:
    return nl.ndarray(shape, nl.float32, buffer=nl.private_hbm)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


# -- queues and results


def test_an_engine_issues_in_order_and_results_take_their_latency():
    def kernel():
        x = tile((128, 960))
        y = copied(960, x)
        copied(960, x)
        copied(960, y)

    memset, first, second, third = estimated(kernel).slots
    assert (memset.start_ns, memset.busy_ns, memset.end_ns) == (0.0, 1000.0, 1000.0 + VECTOR)
    assert (first.start_ns, first.cause, first.why) == (memset.end_ns, 0, "data")
    assert (second.start_ns, second.cause, second.why) == (first.start_ns + 1000, 1, "queue")
    assert third.start_ns == second.start_ns + 1000
    assert third.end_ns == third.start_ns + 1000 + VECTOR


def test_another_engine_waits_for_a_semaphore_too():
    def kernel():
        x = tile((128, 960))
        nisa.activation(dst=new((128, 960)), op=nl.copy, data=x)

    memset, activation = estimated(kernel).slots
    assert activation.start_ns == memset.end_ns + SEMAPHORE
    assert activation.end_ns == pytest.approx(activation.start_ns + 960 / 1.2 + SCALAR)


def test_engines_that_need_nothing_of_each_other_run_at_once():
    def kernel():
        tile((128, 960))
        nisa.iota(dst=new((128, 960), nl.int32), pattern=[[1, 960]])

    assert [s.start_ns for s in estimated(kernel).slots] == [0.0, 0.0]


def test_matmuls_accumulate_without_waiting_for_each_others_sums():
    def kernel():
        x, psum = tile((128, 512), nl.bfloat16), new((128, 512), buffer=nl.psum)
        for i in range(4):
            nisa.nc_matmul(dst=psum, stationary=x[:, 0:128], moving=x, accumulate=i > 0)
        copied(512, psum)

    e = estimated(kernel)
    starts = [s.start_ns for s in found(e, "nc_matmul")]
    assert np.diff(starts) == pytest.approx([512 / 2.4] * 3)
    assert found(e, "tensor_copy")[0].start_ns == pytest.approx(starts[-1] + 512 / 2.4 + TENSOR + SEMAPHORE)


def test_a_write_waits_for_readers_on_other_engines():
    def kernel():
        x = tile((128, 960))
        nisa.activation(dst=new((128, 960)), op=nl.copy, data=x)
        nisa.memset(dst=x, value=2)
        nisa.memset(dst=x, value=3)

    _, reader, writer, again = estimated(kernel).slots
    assert writer.start_ns == reader.end_ns + SEMAPHORE
    assert again.start_ns == writer.start_ns + 1000


def test_a_write_waits_for_the_early_reader_of_another_engine():
    # The Vector Engine's own later read must not hide the Scalar Engine's.
    def kernel():
        x = tile((128, 4000))
        nisa.activation(dst=new((128, 4000)), op=nl.copy, data=x)
        for _ in range(2):
            nisa.tensor_copy(dst=new((128, 1)), src=x[:, 0:1])
        nisa.memset(dst=x[:, 0:1], value=2)

    slots = estimated(kernel).slots
    assert slots[-1].start_ns == pytest.approx(slots[1].end_ns + SEMAPHORE)


def test_disjoint_halves_do_not_wait():
    def kernel():
        x = new((128, 2, 64))
        nisa.memset(dst=x[:, 0, :], value=1)
        nisa.iota(dst=x.view(nl.int32)[:, 1, :], pattern=[[1, 64]])

    assert estimated(kernel).slots[1].start_ns == 0.0


# -- memory


def test_a_loads_place_in_full_memory_is_that_of_the_tile_used_up_first():
    # 200 KiB of 207: the third load of 80 KiB has to wait until the first one's reader is done.
    def kernel(x):
        for i in range(3):
            t = new((128, 20480))
            nisa.dma_copy(dst=t, src=x[i])
            nisa.tensor_copy(dst=new((128, 1)), src=t[:, 0:1])

    e = estimated(kernel, zeros(3, 128, 20480))
    loads, readers = found(e, "dma_copy"), found(e, "tensor_copy")
    assert [s.start_ns for s in loads[:2]] == [0.0, 70.0]
    assert (loads[2].why, loads[2].start_ns) == ("memory", readers[0].end_ns + SEMAPHORE)
    assert e.slots[loads[2].cause] is readers[0]


@pytest.mark.parametrize(("columns", "fit"), [(512, 8), (300, 8), (256, 16), (170, 24), (1024, 4)])
def test_psum_is_given_out_by_banks(columns, fit):
    # All but the last tile are read late, so there is no room for it before.
    def kernel():
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


def test_a_place_is_free_when_the_last_of_all_users_is_done():
    # The Scalar Engine reads first in the program and is done last.
    def kernel(x):
        t = new((128, 30000))
        nisa.dma_copy(dst=t, src=x[0])
        nisa.activation(dst=new((128, 4000), buffer=nl.psum), op=nl.copy, data=t[:, 0:4000])
        nisa.tensor_copy(dst=new((128, 1)), src=t[:, 0:1])
        nisa.dma_copy(dst=new((128, 30000)), src=x[1])

    e = estimated(kernel, zeros(2, 128, 30000))
    second, slow = found(e, "dma_copy")[1], found(e, "activation")[0]
    assert (second.why, second.start_ns) == ("memory", slow.end_ns + SEMAPHORE)


def test_an_engine_takes_over_its_own_tiles_place_at_once():
    # As for a write over what it read itself: its later instructions come behind.
    def kernel():
        for _ in range(3):
            tile((128, 30000))

    assert [s.why for s in estimated(kernel).slots] == ["start", "queue", "queue"]


def test_room_counts_whole_banks_and_shares_of_one():
    room = Room(MemoryRegion.psum, TRN2, 16384, [])
    big = storage((128, 513), MemoryRegion.psum, number=1)
    assert room.take(big) == set()
    room.give(big, {7, 8})
    for number in range(6):
        assert room.take(storage((128, 512), MemoryRegion.psum, number=number)) == set()
    assert room.take(storage((128, 1), MemoryRegion.psum, number=9)) == {7, 8}


def test_room_waits_for_as_many_tiles_as_it_needs():
    room = Room(MemoryRegion.sbuf, TRN2, 1200, [])
    for i in range(3):
        tile_i = storage((128, 100), number=i)
        assert room.take(tile_i) == set()
        room.give(tile_i, {i})
    assert room.take(storage((128, 200), number=5)) == {0, 1}
    assert room.take(storage((128, 100), number=6)) == {2}


def test_placed_tiles_wait_for_each_other_where_they_overlap():
    def kernel():
        for address in ((0, 0), (0, 512), (0, 768)):
            t = nl.ndarray((128, 128), nl.float32, address=address)
            nisa.memset(dst=t, value=1)
            nisa.activation(dst=new((128, 128)), op=nl.copy, data=t)

    e = estimated(kernel)
    memsets, readers = found(e, "memset"), found(e, "activation")
    assert [s.why for s in memsets] == ["start", "queue", "memory"]
    # Its bytes 768 to 1279 are partly those of the second, and none of the first.
    assert e.slots[memsets[2].cause] is readers[1]


def test_placed_tiles_on_the_same_bytes_of_other_partitions_do_not_wait():
    def kernel():
        for partition in (0, 64):
            t = nl.ndarray((64, 128), nl.float32, address=(partition, 0))
            nisa.memset(dst=t, value=1)
            nisa.activation(dst=new((64, 128)), op=nl.copy, data=t)

    assert found(estimated(kernel), "memset")[1].why == "queue"


def test_placed_tiles_take_their_bytes_once():
    placed = [storage((128, 100), number=1, address=(0, 0)), storage((128, 100), number=2, address=(0, 200))]
    room = Room(MemoryRegion.sbuf, TRN2, 1000, placed)
    first = storage((128, 100), number=3)
    assert room.take(first) == set()
    room.give(first, {1})
    # 600 bytes hold placed tiles, 400 another: there is none left.
    assert room.take(storage((128, 1), number=4)) == {1}


# -- shared paths


def test_on_neuroncore_v2_vector_and_gpsimd_take_turns_at_sbuf():
    def kernel():
        tile((128, 1120))
        nisa.iota(dst=new((128, 512), nl.int32), pattern=[[1, 512]])

    second = estimated(kernel, target="trn1").slots[1]
    assert (second.start_ns, second.cause, second.why) == (pytest.approx(1000.0), 0, "path")
    for target in ("trn2", "trn3"):
        assert estimated(kernel, target=target).slots[1].start_ns == 0.0


def test_on_neuroncore_v2_vector_and_scalar_take_turns_at_psum():
    def kernel(same):
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


def test_from_neuroncore_v3_on_they_take_turns_at_a_bank():
    def kernel():
        x, t = tile((128, 256)), new((128, 512), buffer=nl.psum)
        nisa.activation(dst=t[:, 0:256], op=nl.copy, data=x)
        nisa.tensor_copy(dst=t[:, 256:512], src=x)

    slots = estimated(kernel).slots
    assert slots[2].why == "path"
    assert slots[2].start_ns == pytest.approx(slots[1].start_ns + slots[1].busy_ns)


def test_banks_of_placed_tiles_are_known():
    def paths(column, engine=Engine.vector, hw=TRN2):
        info = storage((128, 512), MemoryRegion.psum, number=column, address=(0, column * 4))
        return shared_paths(record(0, engine, "tensor_copy", (access(info),)), hw)

    assert paths(0) == {("bank", None, 0)}
    assert paths(512) == {("bank", None, 1)}
    assert paths(256) == {("bank", None, 0), ("bank", None, 1)}
    assert paths(0, Engine.tensor) == paths(0, Engine.gpsimd) == set()
    assert paths(0, Engine.scalar, resolve_target("trn1")) == {("psum",)}


def test_an_engine_alone_never_waits_for_a_path():
    def kernel():
        t = new((128, 512), buffer=nl.psum)
        for _ in range(3):
            nisa.memset(dst=t, value=1)

    assert [s.why for s in estimated(kernel, target="trn1").slots] == ["start", "queue", "queue"]


# -- order edges and meetings


def test_with_schedule_holds_the_consumer():
    def kernel():
        tile((128, 960))
        nisa.memset(dst=new((128, 960)), value=1, name="producer")
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]], name="consumer")

    trace = Trace()
    nkisim.simulate(nkisim.jit(kernel).with_schedule([("consumer", "producer")]), target="trn2", trace=trace)()
    slots = estimate(trace).slots
    assert slots[2].start_ns == pytest.approx(2000 + VECTOR + SEMAPHORE)
    assert slots[2].cause == 1


def test_depends_on_holds_instructions_without_a_name():
    def kernel():
        first = nisa.memset(dst=new((128, 960)), value=1)
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]]).depends_on(first)

    assert estimated(kernel).slots[1].start_ns == pytest.approx(1000 + VECTOR + SEMAPHORE)


def test_an_edge_against_program_order_is_left_out():
    def kernel():
        nisa.memset(dst=new((128, 960)), value=1, name="a")
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]], name="b")

    trace = traced(kernel)
    trace.edges.append(("a", "b"))
    assert [s.start_ns for s in estimate(trace).slots] == [0.0, 0.0]


def test_edges_stay_on_their_core():
    def kernel():
        for _ in range(1 if nl.program_id(0) == 0 else 40):
            tile((128, 960))
        nisa.memset(dst=new((128, 960)), value=1, name="producer")
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]], name="consumer")

    trace = Trace()
    nkisim.simulate(nkisim.jit(kernel)[2].with_schedule([("consumer", "producer")]), target="trn2", trace=trace)()
    starts = [s.start_ns for s in found(estimate(trace), "iota")]
    assert starts == pytest.approx([2000 + VECTOR + SEMAPHORE, 41000 + VECTOR + SEMAPHORE])


def _exchange(engine: str, late: int, n: int = 64) -> Any:
    def kernel() -> None:
        rank = nl.program_id(0)
        x, y = tile((128, n)), new((128, n))
        if rank == late:
            for _ in range(5):
                nisa.memset(dst=x, value=2)
        other = 1 - rank
        nisa.sendrecv(
            src=x, dst=y, send_to_rank=other, recv_from_rank=other, pipe_id=0, dma_engine=nisa.dma_engine[engine]
        )

    return kernel


@pytest.mark.parametrize("engine", ["dma", "gpsimd_dma"])
@pytest.mark.parametrize("late", [0, 1])
def test_an_exchange_begins_when_both_cores_are_there(engine, late):
    e = estimated(_exchange(engine, late), cores=2)
    a, b = found(e, "sendrecv")
    assert a.start_ns == b.start_ns > 6 * 64 / 0.96
    causes = {e.slots[s.cause].record.core for s in (a, b) if s.cause is not None}
    assert causes == {late}
    assert {s.why for s in (a, b) if s.record.core != late} == {"meeting"}
    assert sum(step.held_us for step in e.critical_path) == pytest.approx(e.total_us)


def test_an_exchange_by_gpsimd_takes_the_time_of_its_bytes():
    # 128 partitions of 1024 bytes at 153 GB/s, after the start-up of 150 cycles.
    e = estimated(_exchange("gpsimd_dma", 0, 256), cores=2)
    assert found(e, "sendrecv")[0].busy_ns == pytest.approx(125 + 128 * 1024 / 153)


def test_a_barrier_orders_transfers_of_its_tensor_across_cores():
    def kernel():
        shared = nl.ndarray((2, 128, 512), nl.float32, buffer=nl.shared_hbm)
        rank = nl.program_id(0)
        x = tile((128, 512))
        if rank == 1:
            for _ in range(9):
                nisa.memset(dst=x, value=2)
        nisa.dma_copy(dst=shared[rank], src=x)
        nisa.core_barrier(data=shared, cores=(0, 1))
        nisa.dma_copy(dst=x, src=shared[rank])

    e = estimated(kernel, cores=2)
    barriers = found(e, "core_barrier")
    stores, loads = ([found(e, "dma_copy", core)[i] for core in (0, 1)] for i in (0, 1))
    assert barriers[0].start_ns == barriers[1].start_ns == max(s.end_ns for s in stores)
    # Also the core that reads only what it wrote itself, long before, waits for the other at the barrier.
    assert all(s.start_ns >= barriers[0].end_ns for s in loads)


def test_cores_share_one_clock_and_nothing_else():
    def kernel():
        for _ in range(3 if nl.program_id(0) == 0 else 1):
            tile((128, 960))

    e = estimated(kernel, cores=2)
    assert [s.start_ns for s in found(e, "memset")] == [0.0, 1000.0, 2000.0, 0.0]
    assert e.busy_us["0 vector"] == 3.0
    assert e.busy_us["1 vector"] == 1.0


# -- loops and registers


def test_a_tile_of_a_dynamic_loops_body_is_one_tile():
    def kernel(x, dynamic):
        def body(i):
            t = new((128, 2048))
            nisa.dma_copy(dst=t, src=x[0])
            nisa.tensor_copy(dst=new((128, 2048)), src=t)

        if dynamic:
            nl.fori_loop(0, 4, body)
        else:
            for i in range(4):
                body(i)

    once = estimated(lambda x: kernel(x, True), zeros(1, 128, 2048))
    fresh = estimated(lambda x: kernel(x, False), zeros(1, 128, 2048))
    loads, readers = found(once, "dma_copy"), found(once, "tensor_copy")
    for i in range(1, 4):
        assert loads[i].start_ns >= readers[i - 1].end_ns
        assert loads[i].why == "memory"
    assert [s.why for s in found(fresh, "dma_copy")] == ["start", "queue", "queue", "queue"]
    assert once.total_us > fresh.total_us


def test_two_tiles_of_one_line_stay_two():
    def kernel(x):
        def body(i):
            first, second = (new((128, 2048)) for _ in range(2))
            for t in (first, second):
                nisa.dma_copy(dst=t, src=x)
            nisa.tensor_copy(dst=new((128, 1)), src=first[:, 0:1])
            nisa.tensor_copy(dst=new((128, 2048)), src=second)

        nl.fori_loop(0, 3, body)

    e = estimated(kernel, zeros(128, 2048))
    loads, readers = found(e, "dma_copy"), found(e, "tensor_copy")
    for trip in (1, 2):
        for i in (0, 1):
            assert loads[2 * trip + i].start_ns == readers[2 * (trip - 1) + i].end_ns + SEMAPHORE


def test_loops_that_share_a_line_do_not_share_its_tile():
    def kernel(x):
        def body(i):
            t = new((128, 2048))
            nisa.dma_copy(dst=t, src=x)
            nisa.activation(dst=new((128, 2048)), op=nl.copy, data=t)

        nl.fori_loop(0, 2, body)
        nl.fori_loop(0, 2, body)

    loads = found(estimated(kernel, zeros(128, 2048)), "dma_copy")
    assert [s.why for s in loads] == ["queue", "memory", "queue", "memory"]


def test_every_trip_costs_its_branch():
    def kernel():
        def body(i):
            tile((128, 64))

        nl.fori_loop(0, 3, body)

    e = estimated(kernel)
    trips, memsets = found(e, "loop_iteration"), found(e, "memset")
    assert [s.start_ns for s in trips] == [0.0, 500.0, 1000.0]
    assert [s.start_ns for s in memsets] == [500.0, 1000.0, 1500.0]
    assert "loop_iteration_ns" in e.assumed


def test_an_address_from_a_register_waits_for_the_register():
    def kernel(x):
        at = tile((1, 1), nl.int32, value=1)
        register = nisa.register_alloc()
        nisa.register_load(register, at)
        row = x.ap([[512, 128], [1, 512]], scalar_offset=register, indirect_dim=0)
        nisa.dma_copy(dst=new((128, 512)), src=row)
        nisa.dma_copy(dst=new((128, 512)), src=x[0:128])

    e = estimated(kernel, zeros(256, 512))
    load = found(e, "register_load")[0]
    dynamic, static = found(e, "dma_copy")
    assert dynamic.start_ns == load.end_ns
    assert dynamic.why == "data"
    assert static.start_ns == 0.0


def test_an_address_from_a_tile_waits_for_the_tile_only():
    def kernel(x):
        register = nisa.register_alloc()
        nisa.register_load(register, tile((1, 1), nl.int32, value=1))
        at = tile((1, 1), nl.int32, value=1)
        row = x.ap([[512, 128], [1, 512]], scalar_offset=at, indirect_dim=0)
        nisa.dma_copy(dst=new((128, 512)), src=row)

    e = estimated(kernel, zeros(256, 512))
    assert found(e, "dma_copy")[0].start_ns == found(e, "memset")[1].end_ns + SEMAPHORE


# -- transfers


def load(x: Any, **how: Any) -> Any:
    t = new(x.shape, x.dtype)
    nisa.dma_copy(dst=t, src=x, **how)
    return t


def test_one_load():
    # 64 KiB on each engine at 23 GB/s.
    def kernel(x):
        load(x)

    (slot,) = estimated(kernel, zeros(128, 2048)).slots
    last_byte = 70 + 1003 + 8 * 8192 / 23
    assert slot.busy_ns == pytest.approx(last_byte, rel=1e-9)
    assert slot.end_ns == pytest.approx(last_byte + DONE)
    assert slot.moving_ns / 16 == pytest.approx(8 * 8192 / 23)
    assert slot.taken_ns / 16 == pytest.approx(8 * 8192 / (23 * 0.983))


def test_loads_queue_for_triggers_and_share_the_engines():
    def kernel(x):
        for i in range(3):
            load(x[i])

    slots = estimated(kernel, zeros(3, 128, 8192)).slots
    each = 8 * 32768 / 23
    assert [s.start_ns for s in slots] == [0.0, 70.0, 140.0]
    assert [s.end_ns for s in slots] == pytest.approx([1073 + each * i + DONE for i in (1, 2, 3)])
    assert [s.turn_of for s in slots] == [None, 0, 1]
    assert slots[1].begin_ns == pytest.approx(1073 + each)


def test_loads_of_other_partitions_use_other_engines():
    def kernel(x):
        t = new((128, 8192))
        for start in (0, 64):
            nisa.dma_copy(dst=t[start : start + 64], src=x[start : start + 64])

    slots = estimated(kernel, zeros(128, 8192)).slots
    assert slots[1].turn_of is None
    assert slots[1].end_ns == pytest.approx(slots[0].end_ns + 70)


def test_a_transfer_that_is_ready_early_does_not_wait_for_an_earlier_one_that_is_not():
    def kernel(x):
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


def test_stores_to_an_output_wait_for_nobody():
    def kernel():
        y = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        x = tile((128, 64))
        nisa.dma_copy(dst=y, src=x)
        nisa.dma_copy(dst=y, src=x)

    first, second = found(estimated(kernel), "dma_copy")
    assert second.start_ns == first.start_ns + 70


def test_a_load_waits_for_the_store_of_what_it_reads():
    def kernel():
        scratch = hbm(2, 128, 64)
        x = tile((128, 64))
        nisa.dma_copy(dst=scratch[0], src=x)
        load(scratch[0])
        nisa.dma_copy(dst=scratch[1], src=x)

    store, back, other = found(estimated(kernel), "dma_copy")
    assert back.start_ns == store.end_ns
    assert other.start_ns == store.start_ns + 70


def test_software_descriptors_are_work_of_gpsimd():
    def kernel(x):
        at = tile((64, 1), nl.int32, value=0)
        rows = x.ap([[64, 64], [1, 64]], vector_offset=at, indirect_dim=0)
        nisa.dma_copy(dst=new((64, 64)), src=rows)
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]])

    e = estimated(kernel, zeros(64, 64))
    gather, iota = found(e, "dma_copy")[0], found(e, "iota")[0]
    assert iota.start_ns == pytest.approx(gather.start_ns + 125 + 64 * 10)
    assert e.slots[iota.cause] is gather
    assert e.busy_us["0 gpsimd"] * 1000 == pytest.approx(125 + 640 + (150 + 64) / 1.2)


def test_hardware_descriptors_triggered_by_scalar_run_beside_its_work():
    def kernel(x):
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


def test_the_scalar_engine_stands_still_before_a_trigger_that_has_to_wait():
    def kernel():
        y = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        early, late = tile((128, 64)), tile((128, 9600))
        nisa.dma_copy(dst=y, src=late[:, 0:64], dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar)
        nisa.activation(dst=new((128, 64)), op=nl.copy, data=early)

    e = estimated(kernel)
    store, activation = found(e, "dma_copy")[0], found(e, "activation")[0]
    assert activation.start_ns == store.start_ns > 10000
    assert e.slots[activation.cause] is store


# -- the parts


def test_calendar_gives_the_first_gap():
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
def test_calendar_is_that_of_every_instant(bookings):
    calendar, taken = Calendar(), {}
    for owner, (earliest, duration) in enumerate(bookings):
        begin, holder = calendar.gap(earliest, duration)
        expected = next(t for t in range(earliest, 200) if all(t + k not in taken for k in range(duration)))
        assert begin == expected
        assert holder == (taken[begin - 1] if begin > earliest else None)
        calendar.take(begin, duration, owner)
        taken.update(dict.fromkeys(range(begin, begin + duration), owner))


def test_sequencer_marks_take_no_time():
    records = [record(i, Engine.sync, name) for i, name in enumerate(("no_reorder_begin", "no_reorder_end"))]
    slots = Scheduler(Trace("trn2", records), Constants(TRN2)).run()
    assert [(s.start_ns, s.end_ns) for s in slots] == [(0.0, 0.0)] * 2
