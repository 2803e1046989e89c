"""What every estimate has to satisfy, of the teaching kernels and of random programs."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import nkisim
from contributed.decode_attention import decode_attention_fwd, decode_attention_gqa_fwd
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.dtypes import bfloat16, float32
from nkisim.latency import Estimate, estimate
from nkisim.memory import MemoryRegion
from nkisim.trace import Engine, Trace
from tests.latency.accesses import access, record, storage, touched_bytes
from tests.latency.kernels import TARGETS, estimated, new, tile, traced

EVERY = pytest.mark.parametrize("target", TARGETS)


def one_head(seqlen_kv: int, target: str = "trn2", dtype: Any = ml_dtypes.bfloat16, d: int = 64) -> Trace:
    q, k, v = (np.zeros(shape, dtype) for shape in ((d, 1), (d, seqlen_kv), (d, seqlen_kv)))
    trace = nkisim.Trace()
    nkisim.simulate(decode_attention_fwd, target=target, trace=trace)(q, k, v)
    return trace


def gqa(n_kv_heads: int, group: int, seqlen_kv: int, target: str = "trn2", dtype: Any = ml_dtypes.bfloat16) -> Trace:
    heads = n_kv_heads * group
    q, cache = np.zeros((64, heads), dtype), np.zeros((n_kv_heads, 64, seqlen_kv), dtype)
    trace = nkisim.Trace()
    nkisim.simulate(decode_attention_gqa_fwd, target=target, trace=trace)(q, cache, cache.copy(), heads, n_kv_heads)
    return trace


def check_bounds(e: Estimate) -> None:
    total = e.total_us
    slack = total * 1e-9
    assert max(e.busy_us.values()) <= total + slack
    assert e.compute_bound_us <= total + slack
    assert e.dma_bound_us <= total + slack
    assert all(0.0 <= u <= 1 + 1e-9 for u in e.utilisation.values())
    # At any time the critical path is in an instruction or in one crossing between engines.
    assert total <= sum(s.end_ns - s.start_ns + 33.0 for s in e.slots) / 1000 + slack
    assert e.critical_path[0].start_us == 0.0
    assert all(step.held_us >= -1e-9 for step in e.critical_path)
    assert sum(step.held_us for step in e.critical_path) == pytest.approx(total)
    starts = [step.start_us for step in e.critical_path]
    assert starts == sorted(starts)
    for slot in e.slots:
        assert slot.start_ns <= slot.begin_ns
        assert slot.begin_ns <= slot.end_ns + 1e-6
        assert slot.cause is None or e.slots[slot.cause].start_ns <= slot.start_ns + 1e-6
        assert slot.cause is not None or slot.start_ns == 0.0


# -- the teaching kernels


@EVERY
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_bounds_of_the_teaching_kernels(target: Any, dtype: Any) -> None:
    for trace in (one_head(300, target, dtype), gqa(2, 4, 257, target, dtype)):
        check_bounds(estimate(trace))


def counts(**expected: int) -> dict[str, int]:
    return {name: n for name, n in expected.items() if n}


@EVERY
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_instructions_of_the_one_head_kernel(target: Any, tiles: Any) -> None:
    trace = one_head(128 * tiles, target)
    assert trace.counts() == counts(
        dma_copy=3 + 2 * tiles + 1,  # two identities, q; K and V; o
        nc_matmul=3 + 3 * tiles,  # transpose and broadcast of the maximum, sum; QK, V transpose, PV
        tensor_scalar=tiles + 1,
        tensor_copy=tiles + 1,
        memset=3,
        tensor_reduce=2,
        activation=1,
        reciprocal=1,
    )


@EVERY
@pytest.mark.parametrize(("n_kv_heads", "group", "tiles"), [(1, 2, 1), (2, 2, 3), (3, 1, 2)])
def test_instructions_of_the_gqa_kernel(target: Any, n_kv_heads: Any, group: Any, tiles: Any) -> None:
    trace = gqa(n_kv_heads, group, 128 * tiles, target)
    per_head, per_tile = n_kv_heads, n_kv_heads * tiles
    assert trace.counts() == counts(
        dma_copy=1 + 2 * per_head + 2 * per_tile,  # identity; q and o; K and V
        nc_matmul=4 * per_tile,
        tensor_scalar=2 * per_tile + per_head,
        tensor_reduce=per_tile,
        tensor_tensor=per_tile,
        activation=2 * per_tile,
        scalar_tensor_tensor=2 * per_tile,
        tensor_copy=2 * per_tile,
        memset=3 * per_head,
        reciprocal=per_head,
    )
    assert len(estimate(trace).slots) == len(trace.records)


@EVERY
def test_bytes_of_the_gqa_kernel(target: Any) -> None:
    e = estimate(gqa(2, 4, 256, target))
    identity, q, cache = 128 * 128 * 2, 64 * 8 * 2, 2 * 64 * 256 * 2
    assert e.hbm_read_bytes == identity + q + 2 * cache
    assert e.hbm_write_bytes == 8 * 64 * 2
    rate = {"trn1": 272.0, "trn2": 368.0, "trn3": 528.0}[target]
    assert e.dma_bound_us == pytest.approx((e.hbm_read_bytes + e.hbm_write_bytes) / rate / 1000)


@EVERY
def test_more_tiles_or_heads_take_longer(target: Any) -> None:
    for traces in (
        [one_head(128 * n, target) for n in (1, 2, 3, 8)],
        [gqa(1, 4, 128 * n, target) for n in (1, 2, 3, 8)],
        [gqa(n, 4, 128, target) for n in (1, 2, 3, 6)],
    ):
        totals = [estimate(t).total_us for t in traces]
        assert totals == sorted(totals)
        assert len(set(totals)) == len(totals)


def test_float32_takes_longer_than_bfloat16() -> None:
    assert estimate(gqa(1, 4, 512, dtype=np.float32)).total_us > estimate(gqa(1, 4, 512)).total_us


def test_a_newer_target_has_a_lower_dma_bound() -> None:
    trace = gqa(1, 4, 512)
    bounds = [estimate(trace, target).dma_bound_us for target in TARGETS]
    assert bounds == sorted(bounds, reverse=True)


# -- double-buffering


def _streamed(n_tiles: int, columns: int, reuse: bool) -> Any:
    def kernel(x: Any) -> None:
        t, y = new((128, columns)), new((128, 1))
        for i in range(n_tiles):
            t = t if reuse or i == 0 else new((128, columns))
            nisa.dma_copy(dst=t, src=x[i])
            nisa.tensor_reduce(dst=y, op=nl.add, data=t, axis=1)

    return kernel


@EVERY
def test_double_buffering_pays(target: Any) -> None:
    x = np.zeros((6, 128, 2048), np.float32)
    single = estimated(_streamed(6, 2048, True), x, target=target)
    double = estimated(_streamed(6, 2048, False), x, target=target)
    assert double.total_us < 0.8 * single.total_us
    assert double.busy_us == single.busy_us
    assert double.dma_bound_us == single.dma_bound_us


@pytest.mark.parametrize(("columns", "fits"), [(20000, 2), (30000, 1)])
def test_double_buffering_ends_where_memory_does(columns: Any, fits: Any) -> None:
    # 120,000 of 212,984 bytes: a fresh tile has to wait for the one before, as if it were the same.
    x = np.zeros((4, 128, columns), np.float32)
    single = estimated(_streamed(4, columns, True), x)
    fresh = estimated(_streamed(4, columns, False), x)
    if fits == 1:
        assert fresh.total_us == single.total_us
    else:
        assert fresh.total_us < single.total_us


# -- a pure function


def test_estimating_twice_gives_the_same_and_changes_nothing() -> None:
    trace = gqa(2, 2, 257)
    before = copy.deepcopy(trace)
    first, second = estimate(trace), estimate(trace)
    assert first == second
    assert repr(trace) == repr(before)


def test_targets_do_not_leak_into_each_other() -> None:
    trace = gqa(1, 2, 128)
    assert estimate(trace, "trn1") == estimate(trace, "inf2").__class__(
        **{**vars(estimate(trace, "inf2")), "target": "trn1"}
    )
    estimate(trace, "trn3")
    assert estimate(trace) == estimate(trace, "trn2")
    assert estimate(trace).target == "trn2"


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="trace: received no records, allowed the trace of a kernel that ran"):
        estimate(Trace("trn2"))


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target: received 'trn9'"):
        estimate(one_head(128), "trn9")


def test_more_cores_than_the_target_launches_are_refused() -> None:
    trace = traced(_one_memset, cores=2)
    with pytest.raises(ValueError, match=r"trace: received one of 2 cores, allowed 1\.\.1 on trn1"):
        estimate(trace, "trn1")
    assert set(estimate(trace).busy_us) == {
        f"{c} {e}" for c in "01" for e in ("tensor", "vector", "scalar", "gpsimd", "dma")
    }


# -- what it reports


def _one_memset() -> None:
    tile((128, 960))


def test_lines_add_up() -> None:
    trace = gqa(1, 2, 256)
    e = estimate(trace)
    assert len(e.expensive_lines) == 10
    times = [line.busy_us for line in e.expensive_lines]
    assert times == sorted(times, reverse=True)
    for line in e.expensive_lines:
        assert line.instructions == sum(r.site == line.site for r in trace.records)
        assert line.site.file.endswith("decode_attention.py")
    few = estimated(_one_memset)
    assert [(line.instructions, line.busy_us) for line in few.expensive_lines] == [(1, 1.0)]
    assert sum(times) <= sum(us for us in e.busy_us.values()) + 1e-9


def test_lines_of_transfers_count_the_mean_of_the_dma_engines() -> None:
    def kernel(x: Any) -> None:
        nisa.dma_copy(dst=new((128, 8192)), src=x)

    e = estimated(kernel, np.zeros((128, 8192), np.float32))
    assert e.expensive_lines[0].busy_us == e.busy_us["0 dma"] == pytest.approx(128 * 8192 * 4 / 368e3)
    assert e.utilisation["0 dma"] == pytest.approx(e.busy_us["0 dma"] / e.total_us)


@pytest.mark.parametrize(("target", "assumed"), [("trn1", False), ("trn2", False), ("trn3", True)])
def test_assumed_constants_are_those_that_took_part(target: Any, assumed: Any) -> None:
    def kernel() -> None:
        x = tile((128, 960))
        nisa.activation(dst=new((128, 960)), op=nl.copy, data=x)

    e = estimated(kernel, target=target)
    assert ("vector_latency_cycles" in e.assumed) is assumed
    assert ("semaphore_ns" in e.assumed) is (target != "trn2")
    assert "dma_payload_efficiency" not in e.assumed
    assert e.n_assumed == len(e.assumed) == len(set(e.assumed))
    assert list(e.assumed) == sorted(e.assumed)


def test_the_dma_bound_is_that_of_the_core_that_moves_most() -> None:
    def kernel(x: Any) -> None:
        for i in range(3 if nl.program_id(0) == 1 else 1):
            nisa.dma_copy(dst=new((128, 2048)), src=x[i])

    e = estimated(kernel, np.zeros((3, 128, 2048), np.float32), cores=2)
    assert e.dma_bound_us == pytest.approx(3 * 128 * 8192 / 368e3)
    assert e.hbm_read_bytes == 4 * 128 * 8192


def test_critical_path_names_instruction_line_and_reason() -> None:
    def kernel(x: Any) -> None:
        t = new((128, 2048))
        nisa.dma_copy(dst=t, src=x)
        nisa.tensor_copy(dst=new((128, 2048)), src=t)

    load, copied = estimated(kernel, np.zeros((128, 2048), np.float32)).critical_path
    assert (load.instruction, load.why, load.core) == ("dma_copy", "start", 0)
    assert (copied.instruction, copied.why) == ("tensor_copy", "data")
    assert copied.site.line == load.site.line + 1
    assert copied.held_us == pytest.approx((2048 + 144) / 960)


def test_critical_path_of_a_trigger_that_waited_for_a_trigger_only() -> None:
    # The second load waits for the DMA engines of the first; the third, elsewhere, only for its trigger.
    def kernel(x: Any) -> None:
        for first, columns in ((0, 8192), (0, 8192), (64, 32768)):
            nisa.dma_copy(dst=new((128, columns))[first : first + 64], src=x[0:64, 0:columns])

    e = estimated(kernel, np.zeros((64, 32768), np.float32))
    check_bounds(e)
    assert [step.start_us for step in e.critical_path] == pytest.approx([0.0, 0.856, 1.712])
    assert e.slots[1].begin_ns > 1000


def test_critical_path_of_turns_on_different_dma_engines() -> None:
    # The second load gets engine 1 at once and engine 0 late; the third waits for engine 1 only.
    def kernel(x: Any) -> None:
        for first, count, columns in ((0, 8, 8192), (0, 16, 2048), (8, 8, 32768)):
            nisa.dma_copy(dst=new((128, columns))[first : first + count], src=x[0:count, 0:columns])

    e = estimated(kernel, np.zeros((16, 32768), np.float32))
    check_bounds(e)
    assert e.slots[2].turn_of == 1
    assert e.slots[2].turn_ns < e.slots[1].turn_ns
    assert [step.start_us for step in e.critical_path[:2]] == pytest.approx([0.0, 0.856])


# -- random programs


MOVES = (Engine.vector, Engine.scalar, Engine.gpsimd, Engine.dma, Engine.dma)


@st.composite
def programs(draw: st.DrawFn) -> Trace:
    """Copies by random engines between parts of a few tiles and an HBM storage, on one or two cores."""
    n_cores = draw(st.integers(1, 2))
    infos = {
        core: [
            storage((40, 6), MemoryRegion.sbuf, float32, 10 * core + 1),
            storage((40, 6), MemoryRegion.sbuf, bfloat16, 10 * core + 2),
            storage((40, 6), MemoryRegion.private_hbm, float32, 10 * core + 3),
        ]
        for core in range(n_cores)
    }
    records = []
    for core in range(n_cores):
        for i in range(draw(st.integers(1, 8))):
            engine = draw(st.sampled_from(MOVES))
            sides = []
            for operand in ("dst", "src"):
                info = draw(st.sampled_from(infos[core] if engine is Engine.dma else infos[core][:2]))
                first = draw(st.integers(0, 39))
                count = draw(st.integers(1, 40 - first))
                column, step = draw(st.integers(0, 1)), draw(st.integers(1, 2))
                shape = (count, draw(st.integers(1, 2)))
                sides.append(access(info, shape, (6, step), first * 6 + column, operand=operand))
            name = "dma_copy" if engine is Engine.dma else "tensor_copy"
            attrs = {"dge": draw(st.sampled_from(("none", "swdge", "hwdge")))} if engine is Engine.dma else {}
            records.append(record(i, engine, name, (sides[0],), (sides[1],), core, **attrs))
    return Trace("trn2", records)


@settings(max_examples=120, deadline=None)
@given(programs(), st.sampled_from(TARGETS[1:]))
def test_no_program_outruns_its_data(trace: Any, target: Any) -> None:
    e = estimate(trace, target)
    check_bounds(e)
    for core in {s.record.core for s in e.slots}:
        slots = sorted((s for s in e.slots if s.record.core == core), key=lambda s: s.record.index)
        for j, later in enumerate(slots):
            for earlier in slots[:j]:
                same = earlier.record.engine is later.record.engine is not Engine.dma
                if same:
                    assert later.start_ns >= earlier.start_ns + earlier.busy_ns - 1e-6
                for a in (*earlier.record.writes, *earlier.record.reads):
                    for b in (*later.record.writes, *later.record.reads):
                        writes = (a in earlier.record.writes, b in later.record.writes)
                        if a.storage is not b.storage or not any(writes) or not touched_bytes(a) & touched_bytes(b):
                            continue
                        if not (same and writes[1]) and not _output(trace, a.storage):
                            assert later.start_ns >= earlier.end_ns - 1e-6


def _output(trace: Trace, info: Any) -> bool:
    """An HBM storage that is only written: the order of its writes is not kept."""
    return info.buffer is MemoryRegion.private_hbm and all(
        a.storage is not info for r in trace.records for a in r.reads
    )
