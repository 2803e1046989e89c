"""Every published cost, as cycles computed by hand, on each generation."""

from __future__ import annotations

from typing import Any

import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.latency.costs import free_size
from tests.latency.kernels import TARGETS, copy, cycles, estimated, ghz, last, new, spent, tile

SBUF, PSUM = nl.sbuf, nl.psum
BF16, FP16, FP32 = nl.bfloat16, nl.float16, nl.float32
EVERY = pytest.mark.parametrize("target", TARGETS)


# -- Tensor Engine


def matmul(n: int, dtype: Any = BF16, m: int = 128, **how: Any) -> Any:
    def kernel() -> None:
        nisa.nc_matmul(
            dst=new((m, n), FP32, PSUM), stationary=tile((128, m), dtype), moving=tile((128, n), dtype), **how
        )

    return kernel


@EVERY
@pytest.mark.parametrize(
    ("n", "dtype", "m", "expected"),
    [
        (512, BF16, 128, 512),
        (128, FP16, 128, 128),
        (65, BF16, 128, 65),
        (64, BF16, 128, 64),
        (1, BF16, 128, 64),
        (1, BF16, 1, 64),
        (512, nl.float8_e4m3, 128, 512),
        (512, nl.tfloat32, 128, 512),
        (512, FP32, 128, 2048),
        (1, FP32, 128, 256),
    ],
)
def test_matmul(target: Any, n: Any, dtype: Any, m: Any, expected: Any) -> None:
    assert cycles(matmul(n, dtype, m), target=target) == expected


@EVERY
def test_matmul_of_float32_with_tfloat32_takes_the_passes_of_float32(target: Any) -> None:
    def kernel() -> None:
        nisa.nc_matmul(
            dst=new((128, 512), FP32, PSUM), stationary=tile((128, 128)), moving=tile((128, 512), nl.tfloat32)
        )

    assert cycles(kernel, target=target) == 2048


@EVERY
@pytest.mark.parametrize("hint", ["is_moving_onezero", "is_stationary_onezero"])
def test_matmul_onezero_halves_float32_only(target: Any, hint: Any) -> None:
    assert cycles(matmul(512, FP32, **{hint: True}), target=target) == 1024
    assert cycles(matmul(512, BF16, **{hint: True}), target=target) == 512


@EVERY
@pytest.mark.parametrize(("step", "expected"), [(1, 512), (8, 512), (9, 1024)])
def test_matmul_strided_moving(target: Any, step: Any, expected: Any) -> None:
    # 8 bfloat16 are the 16 bytes up to which memory serves at full rate.
    def kernel() -> None:
        moving = tile((128, 512 * step), BF16)[:, ::step]
        nisa.nc_matmul(dst=new((128, 512), FP32, PSUM), stationary=tile((128, 128), BF16), moving=moving)

    assert cycles(kernel, target=target) == expected


@pytest.mark.parametrize(
    ("target", "dtype", "shape", "expected"),
    [
        ("trn1", BF16, (128, 128), 128),
        ("trn2", BF16, (128, 128), 128),
        ("trn1", FP32, (128, 128), 512),
        ("trn2", FP32, (128, 128), 256),
        ("trn3", FP32, (128, 128), 256),
        ("trn2", BF16, (32, 128), 64),
    ],
)
def test_transpose_on_the_tensor_engine(target: Any, dtype: Any, shape: Any, expected: Any) -> None:
    def kernel() -> None:
        nisa.nc_transpose(dst=new(shape[::-1], dtype, PSUM), data=tile(shape, dtype), engine=nisa.engine.tensor)

    assert cycles(kernel, target=target) == expected


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_double_row_contracts_256_in_the_time_of_128(target: Any) -> None:
    def kernel() -> None:
        nisa.nc_matmul(
            dst=new((128, 512), FP32, PSUM),
            stationary=tile((128, 2, 128), nl.float8_e4m3),
            moving=tile((128, 2, 512), nl.float8_e4m3),
            perf_mode=nisa.matmul_perf_mode.double_row,
        )

    assert last(kernel, target=target).attrs["k"] == 256
    assert cycles(kernel, target=target) == cycles(matmul(512), target=target) == 512


def test_mx_matmul_contracts_512_in_the_time_of_128() -> None:
    def kernel() -> None:
        scale = tile((128, 512), nl.uint8, value=127)
        nisa.nc_matmul_mx(
            dst=new((128, 512), FP32, PSUM),
            stationary=tile((128, 128), nl.float8_e5m2_x4, value=0),
            moving=tile((128, 512), nl.float8_e5m2_x4, value=0),
            stationary_scale=scale[:, 0:128],
            moving_scale=scale,
        )

    assert last(kernel, target="trn3").attrs["k"] == 512
    assert cycles(kernel, target="trn3") == 512


@pytest.mark.parametrize(("target", "beyond"), [("trn1", 157.0), ("trn2", 165.0), ("trn3", 165.0)])
def test_matmul_result_is_there_later_than_the_engine_is_free(target: Any, beyond: Any) -> None:
    c, _ = spent(last(matmul(512), target=target), target)
    assert c.latency_ns - c.busy_ns == pytest.approx(beyond)


# -- Scalar Engine


def activation(
    n: int, op: Any = nl.exp, dtype: Any = FP32, buffer: Any = SBUF, read: bool = False, step: int = 1
) -> Any:
    def kernel() -> None:
        x, y = tile((128, n * step), dtype, buffer), new((128, n), dtype)
        how: dict[str, Any] = {"reduce_op": nl.add, "reduce_cmd": nisa.reduce_cmd.reset_reduce}
        if read:
            how["reduce_res"] = new((128, 1))
        nisa.activation(dst=y, op=op, data=x[:, ::step], scale=tile((128, 1)), bias=tile((128, 1)), **how)

    return kernel


@EVERY
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"n": 1}, 64),
        ({"n": 65}, 65),
        ({"n": 2048}, 2048),
        ({"n": 2048, "buffer": PSUM}, 2048),
        ({"n": 2048, "dtype": BF16}, 2048),
        ({"n": 2048, "read": True}, 2048 + 64),
        ({"n": 1, "read": True}, 64 + 64),
        ({"n": 512, "step": 5}, 1024),
    ],
)
def test_activation(target: Any, how: Any, expected: Any) -> None:
    assert cycles(activation(**how), target=target) == expected


@EVERY
@pytest.mark.parametrize(("n", "expected"), [(1, 128), (2048, 2112)])
def test_activation_reduce(target: Any, n: Any, expected: Any) -> None:
    def kernel() -> None:
        nisa.activation_reduce(
            dst=new((128, n)), op=nl.exp, data=tile((128, n)), reduce_op=nl.add, reduce_res=new((128, 1))
        )

    assert cycles(kernel, target=target) == expected


def test_activate2_costs_what_activation_does() -> None:
    def kernel() -> None:
        nisa.activate2(
            dst=new((128, 2048)), op=nl.exp, data=tile((128, 2048)), imm0=1.0, imm1=0.0, op0=nl.multiply, op1=nl.add
        )

    assert cycles(kernel, target="trn3") == 2048


@pytest.mark.parametrize(("target", "load"), [("trn1", 368.0), ("trn2", 1280.0), ("trn3", 1280.0)])
def test_activation_table_is_loaded_once_per_function(target: Any, load: Any) -> None:
    record = last(activation(128), target=target)
    loaded: set[str] = set()
    first, _ = spent(record, target, loaded)
    again, _ = spent(record, target, loaded)
    other, _ = spent(last(activation(128, nl.tanh), target=target), target, loaded)
    assert first.busy_ns - again.busy_ns == pytest.approx(load)
    assert first.latency_ns - again.latency_ns == pytest.approx(load)
    assert other.busy_ns == pytest.approx(first.busy_ns)
    assert loaded == {"exp", "tanh"}


def test_copy_and_square_need_no_table() -> None:
    for op in (nl.copy, nl.square, nl.relu):
        record = last(activation(128, op))
        assert spent(record, "trn2", set())[0] == spent(record, "trn2", {op.__name__})[0]


@pytest.mark.parametrize(("target", "beyond"), [("trn1", 263), ("trn2", 353), ("trn3", 353)])
def test_scalar_result_is_there_later_than_the_engine_is_free(target: Any, beyond: Any) -> None:
    record = last(activation(128), target=target)
    c, _ = spent(record, target)
    assert (c.latency_ns - c.busy_ns) * ghz(record, target) == pytest.approx(beyond)


def test_published_interval_of_dependent_one_element_instructions() -> None:
    # 189 ns or 264 cycles on trn1.
    c, _ = spent(last(activation(1), target="trn1"), "trn1")
    assert c.latency_ns == pytest.approx(189, rel=0.003)
    assert c.busy_ns == pytest.approx(64 / 1.4)


def test_published_length_of_exponentials() -> None:
    # 401 ns for 128 and 3,709 ns for 4096 elements on trn2.
    for n, ns in ((128, 401), (4096, 3709)):
        assert spent(last(activation(n)), "trn2")[0].latency_ns == pytest.approx(ns, rel=0.002)


@pytest.mark.parametrize(
    ("target", "dtype", "buffer", "step", "expected"),
    [
        ("trn2", BF16, SBUF, 1, 1024),
        ("trn3", BF16, SBUF, 1, 512),
        ("trn3", BF16, SBUF, 2, 512),
        ("trn3", BF16, PSUM, 1, 512),
        ("trn3", BF16, PSUM, 2, 1024),
        ("trn3", FP32, SBUF, 1, 1024),
    ],
)
def test_scalar_engine_copies(target: Any, dtype: Any, buffer: Any, step: Any, expected: Any) -> None:
    kernel = copy((dtype, SBUF), (dtype, buffer), 1024, step, nisa.engine.scalar)
    assert cycles(kernel, target=target) == expected


# -- GpSimd Engine


@EVERY
def test_iota_and_affine_select(target: Any) -> None:
    def iota() -> None:
        nisa.iota(dst=new((128, 512), nl.int32), pattern=[[1, 512]])

    def select() -> None:
        nisa.affine_select(
            dst=new((128, 512)),
            pattern=[[1, 512]],
            channel_multiplier=1,
            on_true_tile=tile((128, 512)),
            on_false_value=0.0,
        )

    assert cycles(iota, target=target) == 150 + 512
    assert cycles(select, target=target) == 150 + 512
    for kernel in (iota, select):
        assert not any("GpSimd" in a for a in spent(last(kernel, target=target), target)[1])


def test_topk() -> None:
    def kernel() -> None:
        src = tile((128, 64), BF16)
        nisa.topk(val_dst=new((128, 4), BF16), idx_dst=new((128, 4), nl.uint32), src=src, n=1000)

    assert last(kernel).attrs["k"] == 4
    assert cycles(kernel) == 4 * 1000 + 4


@EVERY
def test_copy_on_gpsimd(target: Any) -> None:
    for n, expected in ((512, 512), (8, 64)):
        assert cycles(copy((FP32, SBUF), (FP32, SBUF), n, 1, nisa.engine.gpsimd), target=target) == expected


def test_rsqrt_on_gpsimd_has_a_quarter_of_the_scalar_engines_rate() -> None:
    def kernel() -> None:
        nisa.tensor_scalar(dst=new((128, 512)), data=tile((128, 512)), op0=nl.rsqrt, operand0=None)

    assert cycles(kernel) == 150 + 4 * 512


def test_gather_groups() -> None:
    # Assumed: one start-up per group of 512 elements. The size of what is gathered from does not count.
    def kernel() -> None:
        data, at = tile((128, 4096)), tile((128, 1025), nl.uint32, value=3)
        nisa.nc_n_gather(dst=new((128, 1025)), data=data, indices=at)

    assert cycles(kernel) == 3 * 150 + 1025
    assert any(a.startswith("nc_n_gather on the GpSimd Engine") for a in spent(last(kernel), "trn2")[1])


@pytest.mark.parametrize(("run", "count", "rate"), [(1, 64, 8.0), (4, 16, 44 / 16), (32, 2, 156 / 128)])
def test_local_gather_is_faster_per_element_in_longer_runs(run: Any, count: Any, rate: Any) -> None:
    # float32: min(4 / 4, run) = 1, so C = (28 + 4 run) / (4 run).
    def kernel() -> None:
        src, at = tile((16, 64)), tile((16, 4), nl.uint16, value=0)
        nisa.local_gather(
            dst=new((16, run * count)), src_buffer=src, index=at, num_elem_per_idx=run, num_valid_indices=count
        )

    assert cycles(kernel) == pytest.approx(150 + run * count * rate)


# -- run-time addresses and sequencers


@EVERY
def test_run_time_address(target: Any) -> None:
    def moved(n: Any) -> Any:
        def kernel() -> None:
            at = tile((1, 1), nl.int32, value=2)
            x = tile((128, 4 * n))
            y = new((128, n))
            nisa.tensor_copy(dst=y, src=x.ap([[4 * n, 128], [1, n]], scalar_offset=at, indirect_dim=1))

        return kernel

    assert cycles(moved(100), target=target) == 600
    assert cycles(moved(1000), target=target) == 1000


def test_run_time_address_of_a_matmul_is_assumed_to_take_as_long() -> None:
    def kernel() -> None:
        at = tile((1, 1), nl.int32, value=2)
        x, w = tile((128, 256), BF16), tile((128, 128), BF16)
        moving = x.ap([[256, 128], [1, 64]], scalar_offset=at, indirect_dim=1)
        nisa.nc_matmul(dst=new((128, 64), FP32, PSUM), stationary=w, moving=moving)

    assert cycles(kernel) == 600
    assert any(a.startswith("run-time addresses outside") for a in spent(last(kernel), "trn2")[1])


def test_indirect_columns_are_no_run_time_address() -> None:
    def kernel() -> None:
        at = tile((128, 1), nl.uint16, value=1)
        nisa.tensor_copy(dst=new((128, 16)), src=tile((128, 64)).indirect(at, 16))

    assert cycles(kernel, target="trn3") == 64
    assert "tensor indirection: no extra time" in spent(last(kernel, target="trn3"), "trn3")[1]


def test_indices_of_a_view_do_not_count_as_elements() -> None:
    def kernel() -> None:
        at = tile((16, 64), nl.uint16, value=1)
        nisa.tensor_copy(dst=new((16, 8)), src=tile((16, 64)).indirect(at, 8))

    assert free_size(last(kernel, target="trn3")) == 8


@pytest.mark.parametrize(("target", "ns"), [("trn1", 600 / 1.4), ("trn2", 500.0), ("trn3", 500.0)])
def test_register_load(target: Any, ns: Any) -> None:
    def kernel() -> None:
        at = tile((1, 1), nl.int32, value=2)
        nisa.register_load(nisa.register_alloc(), at)

    assert spent(last(kernel, target=target), target)[0].busy_ns == pytest.approx(ns)


def test_no_reorder_costs_nothing() -> None:
    def plain() -> None:
        x = tile((128, 512))
        nisa.tensor_copy(dst=new((128, 512)), src=x)

    def ordered() -> None:
        with nl.no_reorder():
            x = tile((128, 512))
            nisa.tensor_copy(dst=new((128, 512)), src=x)

    assert estimated(ordered).total_us == estimated(plain).total_us


@pytest.mark.parametrize("engine", ["tensor", "vector", "scalar", "gpsimd", "sync", "unknown"])
def test_barrier_on_any_engine(engine: Any) -> None:
    def kernel() -> None:
        shared = nl.ndarray((2, 4), FP32, buffer=nl.shared_hbm)
        nisa.core_barrier(data=shared, cores=(0, 1), engine=getattr(nisa.engine, engine))

    e = estimated(kernel, cores=2)
    assert e.total_us == pytest.approx(0.033)
    assert e.assumed == ("core_barrier: one signal to the other core",)
