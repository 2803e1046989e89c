"""Start and end of instructions, from kernels small enough to place by hand (trn2 unless said)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.latency import estimate
from nkisim.trace import Trace
from tests.latency.kernels import (
    SCALAR,
    SEMAPHORE,
    TENSOR,
    VECTOR,
    copied,
    estimated,
    found,
    new,
    tile,
    zeros,
)

# -- queues and results


def test_an_engine_issues_in_order_and_results_take_their_latency() -> None:
    def kernel() -> None:
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


def test_another_engine_waits_for_a_semaphore_too() -> None:
    def kernel() -> None:
        x = tile((128, 960))
        nisa.activation(dst=new((128, 960)), op=nl.copy, data=x)

    memset, activation = estimated(kernel).slots
    assert activation.start_ns == memset.end_ns + SEMAPHORE
    assert activation.end_ns == pytest.approx(activation.start_ns + 960 / 1.2 + SCALAR)


def test_engines_that_need_nothing_of_each_other_run_at_once() -> None:
    def kernel() -> None:
        tile((128, 960))
        nisa.iota(dst=new((128, 960), nl.int32), pattern=[[1, 960]])

    assert [s.start_ns for s in estimated(kernel).slots] == [0.0, 0.0]


def test_matmuls_accumulate_without_waiting_for_each_others_sums() -> None:
    def kernel() -> None:
        x, psum = tile((128, 512), nl.bfloat16), new((128, 512), buffer=nl.psum)
        for i in range(4):
            nisa.nc_matmul(dst=psum, stationary=x[:, 0:128], moving=x, accumulate=i > 0)
        copied(512, psum)

    e = estimated(kernel)
    starts = [s.start_ns for s in found(e, "nc_matmul")]
    assert np.diff(starts) == pytest.approx([512 / 2.4] * 3)
    assert found(e, "tensor_copy")[0].start_ns == pytest.approx(starts[-1] + 512 / 2.4 + TENSOR + SEMAPHORE)


def test_a_write_waits_for_readers_on_other_engines() -> None:
    def kernel() -> None:
        x = tile((128, 960))
        nisa.activation(dst=new((128, 960)), op=nl.copy, data=x)
        nisa.memset(dst=x, value=2)
        nisa.memset(dst=x, value=3)

    _, reader, writer, again = estimated(kernel).slots
    assert writer.start_ns == reader.end_ns + SEMAPHORE
    assert again.start_ns == writer.start_ns + 1000


def test_a_write_waits_for_the_early_reader_of_another_engine() -> None:
    # The Vector Engine's own later read must not hide the Scalar Engine's.
    def kernel() -> None:
        x = tile((128, 4000))
        nisa.activation(dst=new((128, 4000)), op=nl.copy, data=x)
        for _ in range(2):
            nisa.tensor_copy(dst=new((128, 1)), src=x[:, 0:1])
        nisa.memset(dst=x[:, 0:1], value=2)

    slots = estimated(kernel).slots
    assert slots[-1].start_ns == pytest.approx(slots[1].end_ns + SEMAPHORE)


def test_disjoint_halves_do_not_wait() -> None:
    def kernel() -> None:
        x = new((128, 2, 64))
        nisa.memset(dst=x[:, 0, :], value=1)
        nisa.iota(dst=x.view(nl.int32)[:, 1, :], pattern=[[1, 64]])

    assert estimated(kernel).slots[1].start_ns == 0.0


# -- order edges and meetings


def test_with_schedule_holds_the_consumer() -> None:
    def kernel() -> None:
        tile((128, 960))
        nisa.memset(dst=new((128, 960)), value=1, name="producer")
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]], name="consumer")

    trace = Trace()
    nkisim.simulate(nkisim.jit(kernel).with_schedule([("consumer", "producer")]), target="trn2", trace=trace)()
    slots = estimate(trace).slots
    assert slots[2].start_ns == pytest.approx(2000 + VECTOR + SEMAPHORE)
    assert slots[2].cause == 1


def test_depends_on_holds_instructions_without_a_name() -> None:
    def kernel() -> None:
        first = nisa.memset(dst=new((128, 960)), value=1)
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]]).depends_on(first)

    assert estimated(kernel).slots[1].start_ns == pytest.approx(1000 + VECTOR + SEMAPHORE)


def test_an_edge_against_program_order_is_refused() -> None:
    def kernel() -> None:
        nisa.memset(dst=new((128, 960)), value=1, name="a")
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]], name="b")

    trace = Trace()
    nkisim.simulate(nkisim.jit(kernel).with_schedule([("a", "b")]), target="trn2", trace=trace)()
    with pytest.raises(NotImplementedError, match="'a' is to run after 'b', which comes later"):
        estimate(trace)


def test_edges_stay_on_their_core() -> None:
    def kernel() -> None:
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
def test_an_exchange_begins_when_both_cores_are_there(engine: Any, late: Any) -> None:
    e = estimated(_exchange(engine, late), cores=2)
    a, b = found(e, "sendrecv")
    assert a.start_ns == b.start_ns > 6 * 64 / 0.96
    causes = {e.slots[s.cause].record.core for s in (a, b) if s.cause is not None}
    assert causes == {late}
    assert {s.why for s in (a, b) if s.record.core != late} == {"meeting"}
    assert sum(step.held_us for step in e.critical_path) == pytest.approx(e.total_us)


def test_an_exchange_by_gpsimd_takes_the_time_of_its_bytes() -> None:
    # 128 partitions of 1024 bytes at 153 GB/s, after the start-up of 150 cycles.
    e = estimated(_exchange("gpsimd_dma", 0, 256), cores=2)
    assert found(e, "sendrecv")[0].busy_ns == pytest.approx(125 + 128 * 1024 / 153)


def test_a_barrier_orders_transfers_of_its_tensor_across_cores() -> None:
    def kernel() -> None:
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


def test_cores_share_one_clock_and_nothing_else() -> None:
    def kernel() -> None:
        for _ in range(3 if nl.program_id(0) == 0 else 1):
            tile((128, 960))

    e = estimated(kernel, cores=2)
    assert [s.start_ns for s in found(e, "memset")] == [0.0, 1000.0, 2000.0, 0.0]
    assert e.busy_us["0 vector"] == 3.0
    assert e.busy_us["1 vector"] == 1.0


# -- loops and registers


def test_a_tile_of_a_dynamic_loops_body_is_one_tile() -> None:
    def kernel(x: Any, dynamic: Any) -> None:
        def body(i: Any) -> None:
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


def test_two_tiles_of_one_line_stay_two() -> None:
    def kernel(x: Any) -> None:
        # Reading the second tile takes longer than a load holds its queue.
        def body(i: Any) -> None:
            first, second = (new((128, 4096)) for _ in range(2))
            for t in (first, second):
                nisa.dma_copy(dst=t, src=x)
            nisa.tensor_copy(dst=new((128, 1)), src=first[:, 0:1])
            nisa.tensor_copy(dst=new((128, 4096)), src=second)

        nl.fori_loop(0, 3, body)

    e = estimated(kernel, zeros(128, 4096))
    loads, readers = found(e, "dma_copy"), found(e, "tensor_copy")
    for trip in (1, 2):
        for i in (0, 1):
            assert loads[2 * trip + i].start_ns == readers[2 * (trip - 1) + i].end_ns + SEMAPHORE


def test_loops_that_share_a_line_do_not_share_its_tile() -> None:
    def kernel(x: Any) -> None:
        def body(i: Any) -> None:
            t = new((128, 2048))
            nisa.dma_copy(dst=t, src=x)
            nisa.activation(dst=new((128, 2048)), op=nl.copy, data=t)

        nl.fori_loop(0, 2, body)
        nl.fori_loop(0, 2, body)

    loads = found(estimated(kernel, zeros(128, 2048)), "dma_copy")
    assert [s.why for s in loads] == ["queue", "memory", "queue", "memory"]


def test_every_trip_costs_its_branch() -> None:
    def kernel() -> None:
        def body(i: Any) -> None:
            tile((128, 64))

        nl.fori_loop(0, 3, body)

    e = estimated(kernel)
    trips, memsets = found(e, "loop_iteration"), found(e, "memset")
    assert [s.start_ns for s in trips] == [0.0, 500.0, 1000.0]
    assert [s.start_ns for s in memsets] == [500.0, 1000.0, 1500.0]
    assert "loop_iteration_ns" in e.assumed


def test_an_address_from_a_register_waits_for_the_register() -> None:
    def kernel(x: Any) -> None:
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


def test_an_address_from_a_tile_waits_for_the_tile_only() -> None:
    def kernel(x: Any) -> None:
        register = nisa.register_alloc()
        nisa.register_load(register, tile((1, 1), nl.int32, value=1))
        at = tile((1, 1), nl.int32, value=1)
        row = x.ap([[512, 128], [1, 512]], scalar_offset=at, indirect_dim=0)
        nisa.dma_copy(dst=new((128, 512)), src=row)

    e = estimated(kernel, zeros(256, 512))
    assert found(e, "dma_copy")[0].start_ns == found(e, "memset")[1].end_ns + SEMAPHORE
