"""DMA costs computed by hand: payload efficiency, engines, descriptors, gathers, transposes, bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.hardware import TRN1, TRN2, TRN3, resolve_target
from nkisim.latency.constants import Constants
from nkisim.latency.transfers import Transfer, core_rate, efficiency, transfer
from nkisim.trace import Engine
from tests.latency.kernels import TARGETS, estimated, new, tile, traced

EVERY = pytest.mark.parametrize("target", TARGETS)
RATE = {"trn1": 17.0, "trn2": 23.0, "trn3": 33.0}  # GB/s of an engine


def moved(kernel: Any, *arrays: Any, target: str = "trn2") -> tuple[Transfer, set[str]]:
    """The cost of the kernel's last transfer, and what it rests on."""
    record = [r for r in traced(kernel, *arrays, target=target).records if r.engine is Engine.dma][-1]
    c = Constants(resolve_target(target))
    return transfer(record, c), c.assumed


def load(x: Any) -> None:
    nisa.dma_copy(dst=new(x.shape, x.dtype), src=x)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("nbytes", "share"),
    [(32, 0.016), (64, 0.028), (512, 0.208), (2048, 0.813), (4096, 0.967), (32768, 1.0), (65536, 1.0)],
)
def test_efficiency_at_the_published_points(nbytes: Any, share: Any) -> None:
    assert efficiency(nbytes, Constants(TRN1)) == share


@pytest.mark.parametrize(("nbytes", "share"), [(16, 0.008), (96, 0.04), (3072, 0.89), (1536, 0.6185)])
def test_efficiency_between_the_points(nbytes: Any, share: Any) -> None:
    assert efficiency(nbytes, Constants(TRN1)) == pytest.approx(share)


@pytest.mark.parametrize("hw", [TRN2, TRN3], ids=["trn2", "trn3"])
@pytest.mark.parametrize(
    ("nbytes", "share"), [(2, 1 / 128), (64, 0.25), (255, 255 / 256), (256, 1), (512, 1), (65536, 1)]
)
def test_a_run_takes_at_least_the_time_of_256_bytes(hw: Any, nbytes: Any, share: Any) -> None:
    c = Constants(hw)
    assert efficiency(nbytes, c) == share
    assert ("DMA: a run of bytes takes at least the time of 256" in c.assumed) is (nbytes < 256)


@pytest.mark.parametrize("hw", [TRN1, TRN2], ids=["trn1", "trn2"])
def test_efficiency_is_monotone(hw: Any) -> None:
    c = Constants(hw)
    values = [efficiency(n, c) for n in range(1, 40000, 97)]
    assert values == sorted(values)


@pytest.mark.parametrize(("hw", "gbps"), [(TRN1, 272.0), (TRN2, 368.0), (TRN3, 528.0)])
def test_rate_of_a_core(hw: Any, gbps: Any) -> None:
    assert core_rate(Constants(hw)) == pytest.approx(gbps)


@EVERY
@pytest.mark.parametrize(
    ("columns", "curve", "from_v3"),
    [(8192, 1.0, 1.0), (1024, 0.967, 1.0), (512, 0.813, 1.0), (64, 0.104, 1.0), (16, 0.028, 0.25)],
)
def test_load_of_all_partitions(target: Any, columns: Any, curve: Any, from_v3: Any) -> None:
    t, _ = moved(load, zeros(128, columns), target=target)
    share = curve if target == "trn1" else from_v3
    each = 8 * columns * 4 / (RATE[target] * share)
    assert t.engines_ns == pytest.approx([each] * 16)
    # One run per partition: the transfer is done when its bytes have moved at peak rate.
    assert t.data_share * each == pytest.approx(8 * columns * 4 / RATE[target])
    assert (t.hbm_read_bytes, t.hbm_write_bytes) == (128 * columns * 4, 0)
    assert t.bound_ns / 16 == pytest.approx(128 * columns * 4 / (16 * RATE[target]))


@EVERY
@pytest.mark.parametrize(
    ("partitions", "start", "by_engine"),
    [
        (4, 0, {0: 4}),
        (8, 0, {0: 8}),
        (9, 0, {0: 8, 1: 1}),
        (20, 0, {0: 8, 1: 8, 2: 4}),
        (32, 64, {8: 8, 9: 8, 10: 8, 11: 8}),
        (3, 126 - 32, {11: 2, 12: 1}),
        (1, 127, {15: 1}),
    ],
)
def test_eight_partitions_per_engine(target: Any, partitions: Any, start: Any, by_engine: Any) -> None:
    def kernel(x: Any) -> None:
        wide = new((128, 8192))
        nisa.dma_copy(dst=wide[start : start + partitions, :], src=x)

    t, _ = moved(kernel, zeros(partitions, 8192), target=target)
    expected = [by_engine.get(i, 0) * 32768 / RATE[target] for i in range(16)]
    assert t.engines_ns == pytest.approx(expected)


def test_a_store_is_spread_by_the_partitions_it_reads() -> None:
    def kernel() -> None:
        x = tile((128, 8192))
        nisa.dma_copy(dst=nl.ndarray((8, 8192), nl.float32, buffer=nl.shared_hbm), src=x[16:24, :])

    t, _ = moved(kernel)
    assert [i for i, ns in enumerate(t.engines_ns) if ns] == [2]
    assert t.queue == "store"
    assert (t.hbm_read_bytes, t.hbm_write_bytes) == (0, 8 * 32768)


@pytest.mark.parametrize(("target", "run", "share"), [("trn1", 256, 0.104), ("trn2", 256, 1.0), ("trn2", 64, 0.25)])
def test_short_runs_in_a_row_are_gathered_one_by_one(target: Any, run: Any, share: Any) -> None:
    # Rows made of 16 runs: 15 of 16 gaps are waited for.
    def kernel(x: Any) -> None:
        nisa.dma_copy(dst=new((128, 4 * run)), src=x.reshape((128, 16, 128))[:, :, 0 : run // 4])

    t, _ = moved(kernel, zeros(128, 2048), target=target)
    each = 8 * 16 * run / (RATE[target] * share)
    assert t.engines_ns == pytest.approx([each] * 16)
    gap = 8 * run / RATE[target] * (1 / share - 1)
    assert t.data_share * each == pytest.approx(each - gap)


@pytest.mark.parametrize(("target", "of_96", "of_512"), [("trn1", 0.04, 0.208), ("trn2", 0.375, 1.0)])
def test_runs_end_where_either_side_does(target: Any, of_96: Any, of_512: Any) -> None:
    # HBM gives 384 elements in a row, the tile takes 24, of which 16 times as many make the row: runs of 96 bytes.
    def kernel(x: Any) -> None:
        wide = new((128, 16, 48))
        nisa.dma_copy(dst=wide[:, :, 0:24], src=x[:, 0:384])

    t, _ = moved(kernel, zeros(128, 512), target=target)
    assert t.engines_ns[0] == pytest.approx(8 * 384 * 4 / (RATE[target] * of_96))

    def odd(x: Any) -> None:
        wide = new((128, 2, 384))
        nisa.dma_copy(dst=wide[:, :, 0:256], src=x.reshape((128, 4, 160))[:, :, 0:128])

    t, _ = moved(odd, zeros(128, 640), target=target)
    assert t.engines_ns[0] == pytest.approx(8 * 512 * 4 / (RATE[target] * of_512))


@pytest.mark.parametrize(("target", "of_128"), [("trn1", 0.052), ("trn2", 0.5)])
def test_runs_that_end_apart_are_cut_by_both(target: Any, of_128: Any) -> None:
    # 128 elements on one side and 96 on the other have 32 in common: 128 bytes.
    def kernel(x: Any) -> None:
        wide = new((128, 4, 100))
        nisa.dma_copy(dst=wide[:, :, 0:96], src=x.reshape((128, 3, 160))[:, :, 0:128])

    t, _ = moved(kernel, zeros(128, 480), target=target)
    assert t.engines_ns[0] == pytest.approx(8 * 384 * 4 / (RATE[target] * of_128))


@pytest.mark.parametrize(("target", "of_4"), [("trn1", 0.016 * 4 / 32), ("trn2", 4 / 256)])
def test_transposed_load_moves_element_by_element(target: Any, of_4: Any) -> None:
    def kernel(x: Any) -> None:
        nisa.dma_copy(dst=new((128, 64)), src=x.permute((1, 0)))

    t, _ = moved(kernel, zeros(64, 128), target=target)
    assert t.engines_ns[0] == pytest.approx(8 * 64 * 4 / (RATE[target] * of_4))


def test_inside_hbm_bytes_are_shared_equally_and_pass_the_hbm_twice() -> None:
    def kernel(x: Any) -> None:
        nisa.dma_copy(dst=nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm), src=x)

    t, _ = moved(kernel, zeros(128, 8192))
    share = 3000 / 8 / 16
    assert t.engines_ns == pytest.approx([8 * 32768 / (share / 2)] * 16)
    assert t.hbm_read_bytes == t.hbm_write_bytes == 128 * 32768
    assert t.bound_ns == pytest.approx(2 * 128 * 32768 / share)
    assert t.bound_ns <= sum(t.engines_ns) * (1 + 1e-9)
    small, _ = moved(kernel, zeros(128, 16))
    # 8 KiB are 64 bytes for each of the 128 parts: each takes the time of 256.
    assert small.engines_ns == pytest.approx([8 * 256 / (share / 2)] * 16)


def test_inside_sbuf() -> None:
    def kernel() -> None:
        nisa.dma_copy(dst=new((128, 8192)), src=tile((128, 8192)))

    t, _ = moved(kernel)
    assert t.engines_ns == pytest.approx([8 * 32768 / 23] * 16)
    assert (t.hbm_read_bytes, t.hbm_write_bytes, t.bound_ns) == (0, 0, 0)


@pytest.mark.parametrize(("src", "dst", "size"), [(np.float32, nl.bfloat16, 4), (np.float16, nl.float32, 4)])
def test_a_cast_moves_the_wider_type(src: Any, dst: Any, size: Any) -> None:
    def kernel(x: Any) -> None:
        nisa.dma_copy(dst=new(x.shape, dst), src=x)

    t, _ = moved(kernel, zeros(128, 8192, dtype=src))
    assert t.engines_ns[0] == pytest.approx(8 * 8192 * size / 23)
    assert t.hbm_read_bytes == 128 * 8192 * np.dtype(src).itemsize


# -- descriptors


@pytest.mark.parametrize(
    ("target", "held", "first_byte"), [("trn1", 70.0, 1370.0), ("trn2", 856.0, 1073.0), ("trn3", 856.0, 1370.0)]
)
def test_static_descriptors(target: Any, held: Any, first_byte: Any) -> None:
    # The queue is held within the latency, not before it.
    t, _ = moved(load, zeros(128, 512), target=target)
    assert (t.queue, t.trigger_ns, t.trigger_ns + t.start_ns, t.done_ns) == ("load", held, first_byte, 300.0)


@pytest.mark.parametrize(("engine", "queue"), [("unknown", "sync"), ("sync", "sync"), ("scalar", "scalar")])
@pytest.mark.parametrize(("target", "latency"), [("trn2", 1111.0), ("trn3", 1300.0)])
def test_hardware_descriptors(target: Any, latency: Any, engine: Any, queue: Any) -> None:
    def kernel(x: Any) -> None:
        nisa.dma_copy(dst=new(x.shape), src=x, dge_mode=nisa.dge_mode.hwdge, engine=getattr(nisa.engine, engine))

    t, assumed = moved(kernel, zeros(128, 512), target=target)
    assert (t.queue, t.trigger_ns, t.start_ns) == (queue, 600.0, latency)
    assert "hardware descriptors: latency of software ones" in assumed


def test_hardware_descriptors_of_a_transpose_are_those_of_sync() -> None:
    def kernel(x: Any) -> None:
        nisa.dma_transpose(dst=new((128, 16), nl.bfloat16), src=x, dge_mode=nisa.dge_mode.hwdge)

    assert moved(kernel, zeros(16, 128, dtype=np.float16).astype(nl.bfloat16.numpy))[0].queue == "sync"


@pytest.mark.parametrize(
    ("target", "held", "first_byte"), [("trn1", 70.0, 1370.0), ("trn2", 604.0, 1181.0), ("trn3", 604.0, 1370.0)]
)
def test_software_descriptors_of_a_plain_copy(target: Any, held: Any, first_byte: Any) -> None:
    def kernel(x: Any) -> None:
        nisa.dma_copy(dst=new(x.shape), src=x, dge_mode=nisa.dge_mode.swdge)

    t, _ = moved(kernel, zeros(128, 512), target=target)
    assert (t.queue, t.trigger_ns, t.trigger_ns + t.start_ns) == ("gpsimd", held, first_byte)


@pytest.mark.parametrize(
    ("target", "dtype", "queue"),
    [("trn1", nl.float32, "gpsimd"), ("trn2", nl.float32, "sync"), ("trn2", nl.bfloat16, "gpsimd")],
)
def test_an_address_known_at_run_time_only_is_not_static(target: Any, dtype: Any, queue: Any) -> None:
    def kernel(x: Any) -> None:
        at = tile((1, 1), nl.int32, value=1)
        row = x.ap([[512, 128], [1, 512]], scalar_offset=at, indirect_dim=0)
        nisa.dma_copy(dst=new((128, 512), dtype), src=row)

    t, assumed = moved(kernel, zeros(256, 512), target=target)
    assert t.queue == queue
    assert any(a.startswith("dge_mode.unknown") for a in assumed)


def _gather(rows: int, columns: int, skip: int = 0) -> Any:
    def kernel(x: Any, index: Any) -> None:
        at = new(index.shape, nl.int32)
        nisa.dma_copy(dst=at, src=index)
        dst = tile((rows, columns))
        nisa.dma_copy(
            dst=dst,
            src=x.ap([[columns, rows], [1, columns]], vector_offset=at, indirect_dim=0),
            oob_mode=nisa.oob_mode.skip if skip else nisa.oob_mode.error,
        )

    index = np.arange(rows, dtype=np.int32)[:, None]
    index[rows - skip :] = 10**6
    return kernel, zeros(256, columns), index


@EVERY
def test_gather(target: Any) -> None:
    t, assumed = moved(*_gather(64, 8192), target=target)
    clock = 1.4 if target == "trn1" else 1.2
    assert t.queue == "gpsimd"
    assert t.trigger_ns == pytest.approx(150 / clock + 64 * 10)
    assert t.engines_ns == pytest.approx([8 * 32768 / RATE[target]] * 8 + [0] * 8)
    # The indices are no bytes of the transfer.
    assert t.hbm_read_bytes == 64 * 32768
    assert "software descriptors: GpSimd time per row" in assumed


def test_rows_that_were_skipped_do_not_move() -> None:
    t, _ = moved(*_gather(64, 8192, skip=16))
    assert t.hbm_read_bytes == 48 * 32768
    assert t.engines_ns == pytest.approx([8 * 32768 / 23] * 6 + [0] * 10)
    assert t.trigger_ns == pytest.approx(125 + 48 * 10)
    nothing, _ = moved(*_gather(64, 8192, skip=64))
    assert (sum(nothing.engines_ns), nothing.hbm_read_bytes, nothing.bound_ns) == (0, 0, 0)


def test_rows_that_were_skipped_are_not_written_either() -> None:
    # The target's rows are not those of the gather, so the trace shows all of it as written.
    def kernel(x: Any, index: Any) -> None:
        at = new(index.shape, nl.int32)
        nisa.dma_copy(dst=at, src=index)
        rows = x.ap([[512, 64], [1, 512]], vector_offset=at, indirect_dim=0)
        y = nl.ndarray((32, 1024), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=y, src=rows, oob_mode=nisa.oob_mode.skip)

    index = np.arange(64, dtype=np.int32)[:, None]
    index[48:] = 10**6
    t, _ = moved(kernel, zeros(64, 512), index)
    assert t.hbm_read_bytes == t.hbm_write_bytes == 48 * 2048


def test_scatter() -> None:
    def kernel(index: Any) -> None:
        at, src = new(index.shape, nl.int32), tile((32, 512))
        nisa.dma_copy(dst=at, src=index)
        y = nl.ndarray((64, 512), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=y.ap([[512, 32], [1, 512]], vector_offset=at, indirect_dim=0), src=src)

    t, _ = moved(kernel, np.arange(32, dtype=np.int32)[:, None] * 2)
    assert (t.queue, t.hbm_read_bytes, t.hbm_write_bytes) == ("gpsimd", 0, 32 * 2048)
    assert t.engines_ns == pytest.approx([8 * 2048 / 23] * 4 + [0] * 12)


# -- transposes and sums


@pytest.mark.parametrize(
    ("target", "share", "of_8192"), [("trn1", 0.25, 0.983), ("trn2", 0.9, 1.0), ("trn3", 0.9, 1.0)]
)
def test_transpose_from_hbm(target: Any, share: Any, of_8192: Any) -> None:
    def kernel(x: Any) -> None:
        nisa.dma_transpose(dst=new((128, 2048), nl.float32), src=x)

    t, _ = moved(kernel, zeros(2048, 128), target=target)
    each = 8 * 8192 / (RATE[target] * share * of_8192)
    assert t.engines_ns == pytest.approx([each] * 16)
    assert t.data_share == pytest.approx(of_8192)


@pytest.mark.parametrize(("target", "rate"), [("trn1", 17 * 0.25 * 0.983), ("trn2", 23 * 0.9)])
def test_the_payload_of_a_transpose_is_the_row_it_writes(target: Any, rate: Any) -> None:
    def kernel(x: Any) -> None:
        nisa.dma_transpose(dst=new((128, 2048), nl.float32), src=x[:, 0:128])

    t, _ = moved(kernel, zeros(2048, 160), target=target)
    assert t.engines_ns == pytest.approx([8 * 8192 / rate] * 16)


@pytest.mark.parametrize(("target", "share"), [("trn1", 0.25 * 0.208), ("trn2", 0.5)])
def test_transpose_inside_sbuf(target: Any, share: Any) -> None:
    def kernel() -> None:
        nisa.dma_transpose(dst=new((128, 128)), src=tile((128, 128)))

    t, _ = moved(kernel, target=target)
    assert t.engines_ns[0] == pytest.approx(8 * 512 / (RATE[target] * share))


@pytest.mark.parametrize(("n", "times"), [(1, 2), (2, 2), (3, 3), (16, 16)])
def test_adding_takes_twice_a_copy_or_a_copy_per_source(n: Any, times: Any) -> None:
    # NeuronCore-v4's guide: B += A by DMA reached half the throughput of a copy before, and has no API since.
    def kernel(x: Any) -> None:
        total = new((128, 8192))
        nisa.dma_compute(dst=total, srcs=[x] * n, reduce_op=nl.add)

    t, _ = moved(kernel, zeros(128, 8192))
    assert t.engines_ns == pytest.approx([times * 8 * 32768 / 23] * 16)
    assert t.hbm_read_bytes == n * 128 * 32768
    assert t.bound_ns <= sum(t.engines_ns) * (1 + 1e-9)


def test_scatter_add_reads_and_writes_its_rows() -> None:
    def kernel(x: Any, index: Any) -> None:
        at, src = new(index.shape, nl.int32), tile((64, 8192))
        nisa.dma_copy(dst=at, src=index)
        rows = x.ap([[8192, 64], [1, 8192]], vector_offset=at, indirect_dim=0)
        nisa.dma_compute(dst=rows, srcs=[rows, src], reduce_op=nl.add)

    t, _ = moved(kernel, zeros(64, 8192), np.arange(64, dtype=np.int32)[:, None])
    assert (t.queue, t.hbm_read_bytes, t.hbm_write_bytes) == ("gpsimd", 64 * 32768, 64 * 32768)
    assert t.bound_ns == pytest.approx(2 * 64 * 32768 / (3000 / 8 / 16))
    assert t.bound_ns <= sum(t.engines_ns) * (1 + 1e-9)


# -- whole transfers against the published profile of trn2


@pytest.mark.parametrize(
    ("shape", "dge", "pending"), [((4, 4096), "none", 70 + 1003 + 1416), ((128, 128), "swdge", 1208 + 70)]
)
def test_profile_of_one_load(shape: Any, dge: Any, pending: Any) -> None:
    """Trigger to last byte: a transfer on one engine with static descriptors, one on all with software ones."""

    def kernel(x: Any) -> None:
        nisa.dma_copy(dst=new(x.shape, x.dtype), src=x, dge_mode=nisa.dge_mode[dge])

    slot = estimated(kernel, np.zeros(shape, np.float16)).slots[0]
    assert slot.busy_ns == pytest.approx(pending, rel=0.03)
    assert slot.end_ns - slot.start_ns - slot.busy_ns == pytest.approx(300)


@pytest.mark.parametrize(
    ("target", "columns", "gbps"),
    [
        ("trn1", 128, 272 * 0.208),
        ("trn1", 512, 272 * 0.813),
        ("trn2", 32, 368 * 0.052),
        ("trn2", 128, 368 * 0.208),
        ("trn2", 512, 128 * 2048 / 856),
        ("trn2", 1024, 368),
    ],
)
def test_a_stream_of_small_loads_runs_at_the_published_share(target: Any, columns: Any, gbps: Any) -> None:
    # From NeuronCore-v3 on the bytes of one load move beside the time that the next holds its queue for.
    def kernel(x: Any) -> None:
        for i in range(40):
            load(x[i])

    ends = [s.end_ns for s in estimated(kernel, zeros(40, 128, columns), target=target).slots]
    rate = 20 * 128 * 4 * columns / (ends[-1] - ends[-21])
    assert rate == pytest.approx(gbps, rel=1e-3)


def test_loads_of_any_size_up_to_the_engines_rate_follow_each_other_as_published() -> None:
    """66,048 transfers with software descriptors in 39.89 ms, 64 and 256 KiB by turns."""

    def kernel(x: Any) -> None:
        for i in range(21):
            dst = new((128, 128 if i % 2 else 512))
            nisa.dma_copy(dst=dst, src=x[:, 0 : dst.shape[1]], dge_mode=nisa.dge_mode.swdge)

    e = estimated(kernel, zeros(128, 512))
    ends = [s.end_ns for s in e.slots]
    assert (ends[-1] - ends[-11]) / 10 == pytest.approx(39.89e6 / 66048, rel=2e-3)
    # The descriptors are made by the GpSimd Engine.
    assert e.busy_us["0 gpsimd"] == pytest.approx(21 * 0.604)
