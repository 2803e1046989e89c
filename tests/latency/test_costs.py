"""Every published cost, as cycles computed by hand, on each generation."""

from __future__ import annotations

from typing import Any

import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.latency.costs import free_size
from tests.latency.kernels import TARGETS, cycles, estimated, ghz, last, new, spent, tile

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
def test_matmul(target, n, dtype, m, expected):
    assert cycles(matmul(n, dtype, m), target=target) == expected


@EVERY
def test_matmul_of_float32_with_tfloat32_takes_the_passes_of_float32(target):
    def kernel():
        nisa.nc_matmul(
            dst=new((128, 512), FP32, PSUM), stationary=tile((128, 128)), moving=tile((128, 512), nl.tfloat32)
        )

    assert cycles(kernel, target=target) == 2048


@EVERY
@pytest.mark.parametrize("hint", ["is_moving_onezero", "is_stationary_onezero"])
def test_matmul_onezero_halves_float32_only(target, hint):
    assert cycles(matmul(512, FP32, **{hint: True}), target=target) == 1024
    assert cycles(matmul(512, BF16, **{hint: True}), target=target) == 512


@EVERY
@pytest.mark.parametrize(("step", "expected"), [(1, 512), (8, 512), (9, 1024)])
def test_matmul_strided_moving(target, step, expected):
    # 8 bfloat16 are the 16 bytes up to which memory serves at full rate.
    def kernel():
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
def test_transpose_on_the_tensor_engine(target, dtype, shape, expected):
    def kernel():
        nisa.nc_transpose(dst=new(shape[::-1], dtype, PSUM), data=tile(shape, dtype), engine=nisa.engine.tensor)

    assert cycles(kernel, target=target) == expected


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_double_row_contracts_256_in_the_time_of_128(target):
    def kernel():
        nisa.nc_matmul(
            dst=new((128, 512), FP32, PSUM),
            stationary=tile((128, 2, 128), nl.float8_e4m3),
            moving=tile((128, 2, 512), nl.float8_e4m3),
            perf_mode=nisa.matmul_perf_mode.double_row,
        )

    assert last(kernel, target=target).attrs["k"] == 256
    assert cycles(kernel, target=target) == cycles(matmul(512), target=target) == 512


def test_mx_matmul_contracts_512_in_the_time_of_128():
    def kernel():
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
def test_matmul_result_is_there_later_than_the_engine_is_free(target, beyond):
    c, _ = spent(last(matmul(512), target=target), target)
    assert c.latency_ns - c.busy_ns == pytest.approx(beyond)


# -- Vector Engine


def copy(
    dst: tuple[Any, Any], src: tuple[Any, Any], n: int = 1024, step: int = 1, engine: Any = nisa.engine.vector
) -> Any:
    """tensor_copy between (dtype, buffer) pairs, both `step` elements apart."""

    def kernel() -> None:
        a, b = new((128, n * step), *dst), tile((128, n * step), *src)
        nisa.tensor_copy(dst=a[:, ::step], src=b[:, ::step], engine=engine)

    return kernel


def scaled(dst: tuple[Any, Any], src: tuple[Any, Any], n: int = 1024, step: int = 1, column: bool = False) -> Any:
    def kernel() -> None:
        factor = tile((128, 1)) if column else 2.0
        a, b = new((128, n * step), *dst), tile((128, n * step), *src)
        nisa.tensor_scalar(
            dst=a[:, ::step], data=b[:, ::step], op0=nl.multiply, operand0=factor, engine=nisa.engine.vector
        )

    return kernel


MODES = [
    # dst, src, step, cycles for 1024 elements on trn1 and from trn2 on
    ((BF16, SBUF), (BF16, SBUF), 1, 1024, 256),
    ((FP16, SBUF), (BF16, SBUF), 1, 1024, 256),
    ((BF16, SBUF), (BF16, SBUF), 2, 1024, 512),
    ((BF16, SBUF), (BF16, PSUM), 1, 1024, 512),
    ((BF16, PSUM), (FP16, SBUF), 1, 1024, 512),
    ((BF16, SBUF), (BF16, PSUM), 2, 1024, 1024),
    ((BF16, PSUM), (BF16, PSUM), 1, 1024, 1024),
    ((FP32, SBUF), (BF16, SBUF), 1, 1024, 1024),
    ((BF16, SBUF), (FP32, SBUF), 1, 1024, 1024),
    ((FP32, SBUF), (FP32, SBUF), 1, 1024, 1024),
    ((FP32, SBUF), (FP32, SBUF), 4, 1024, 1024),
    ((FP32, SBUF), (FP32, SBUF), 5, 2048, 2048),
    ((BF16, SBUF), (BF16, SBUF), 9, 2048, 1024),
]


@EVERY
@pytest.mark.parametrize(("dst", "src", "step", "gen2", "later"), MODES)
@pytest.mark.parametrize("kernel", [copy, scaled])
def test_performance_modes(target, kernel, dst, src, step, gen2, later):
    assert cycles(kernel(dst, src, 1024, step), target=target) == (gen2 if target == "trn1" else later)


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_a_float32_column_operand_does_not_end_the_performance_mode(target):
    assert cycles(scaled((BF16, SBUF), (BF16, SBUF), column=True), target=target) == 256


@pytest.mark.parametrize(("target", "expected"), [("trn2", 1024), ("trn3", 256)])
def test_performance_mode_of_8_bit_floats(target, expected):
    kernel = copy((BF16, SBUF), (nl.float8_e4m3, SBUF))
    assert cycles(kernel, target=target) == expected
    _, assumed = spent(last(kernel, target=target), target)
    assert ("performance modes of 8-bit floats" in assumed) is (target == "trn3")


@EVERY
@pytest.mark.parametrize("n", [1, 63, 64])
def test_small_instructions_take_64_cycles(target, n):
    assert cycles(copy((FP32, SBUF), (FP32, SBUF), n), target=target) == 64


@EVERY
def test_a_column_has_no_stride(target):
    # One element per partition out of a wide tile: nothing is apart from anything.
    def kernel():
        wide, y = tile((128, 512)), new((128, 1))
        nisa.tensor_copy(dst=y, src=wide[:, 7:8])

    assert cycles(kernel, target=target) == 64


@EVERY
def test_dimensions_of_one_element_have_no_stride(target):
    # Every eighth element, seen as [128, 512, 1]: 32 bytes apart.
    def kernel():
        nisa.tensor_copy(dst=new((128, 512)), src=tile((128, 512, 8))[:, :, 0:1])

    assert cycles(kernel, target=target) == 1024


@pytest.mark.parametrize(("stride", "expected"), [(-4, 512), (-5, 1024)])
def test_strides_backwards(stride, expected):
    def kernel():
        x = tile((128, 2560))
        nisa.tensor_copy(dst=new((128, 512)), src=x.ap([[2560, 128], [stride, 512]], offset=2559))

    assert cycles(kernel) == expected


def two(
    op: Any, dtypes: tuple[Any, Any, Any], buffers: tuple[Any, Any] = (SBUF, SBUF), n: int = 1024, step: int = 1
) -> Any:
    """tensor_tensor on the Vector Engine; dtypes of dst, data1 and data2."""

    def kernel() -> None:
        a, b = (tile((128, n * step), dtypes[i + 1], buffers[i])[:, ::step] for i in range(2))
        nisa.tensor_tensor(dst=new((128, n), dtypes[0]), data1=a, data2=b, op=op, engine=nisa.engine.vector)

    return kernel


@EVERY
@pytest.mark.parametrize(
    ("op", "dtypes", "buffers", "step", "gen2", "later"),
    [
        (nl.add, (FP32, FP32, FP32), (SBUF, SBUF), 1, 2048, 2048),
        (nl.add, (FP32, FP32, FP32), (PSUM, SBUF), 1, 1024, 1024),
        (nl.add, (FP32, FP32, FP32), (SBUF, PSUM), 1, 1024, 1024),
        (nl.add, (BF16, BF16, BF16), (SBUF, SBUF), 1, 1024, 1024),
        (nl.multiply, (BF16, BF16, BF16), (SBUF, SBUF), 1, 1024, 1024),
        (nl.subtract, (BF16, BF16, BF16), (SBUF, SBUF), 1, 1024, 1024),
        (nl.maximum, (BF16, BF16, BF16), (SBUF, SBUF), 1, 2048, 1024),
        (nl.add, (FP16, FP16, FP16), (SBUF, SBUF), 1, 2048, 1024),
        (nl.add, (BF16, BF16, BF16), (SBUF, SBUF), 2, 2048, 1024),
        (nl.add, (FP32, BF16, BF16), (SBUF, SBUF), 1, 2048, 2048),
        (nl.add, (BF16, FP32, BF16), (SBUF, SBUF), 1, 2048, 2048),
    ],
)
def test_tensor_tensor(target, op, dtypes, buffers, step, gen2, later):
    assert cycles(two(op, dtypes, buffers, 1024, step), target=target) == (gen2 if target == "trn1" else later)


def test_tensor_tensor_of_columns_reads_two_inputs():
    assert cycles(two(nl.add, (FP32, FP32, FP32), n=1)) == 64
    assert cycles(two(nl.add, (FP32, FP32, FP32), n=33)) == 66


@EVERY
@pytest.mark.parametrize(
    ("ops", "dtype", "operand1", "n", "expected"),
    [
        ((nl.multiply, nl.add), FP32, SBUF, 1024, 2048),
        ((nl.multiply, nl.add), FP32, PSUM, 1024, 1024),
        ((nl.subtract, nl.multiply), BF16, SBUF, 1024, 1024),
        ((nl.subtract, nl.multiply), BF16, SBUF, 1023, 2046),
        ((nl.subtract, nl.multiply), FP16, SBUF, 1024, 2048),
        ((nl.multiply, nl.add), BF16, SBUF, 1024, 2048),
    ],
)
def test_scalar_tensor_tensor(target, ops, dtype, operand1, n, expected):
    def kernel():
        a, b, factor = tile((128, n), dtype), tile((128, n), dtype, operand1), tile((128, 1))
        nisa.scalar_tensor_tensor(dst=new((128, n), dtype), data=a, op0=ops[0], operand0=factor, op1=ops[1], operand1=b)

    assert cycles(kernel, target=target) == expected


@EVERY
@pytest.mark.parametrize(
    ("src", "predicate", "expected"), [(SBUF, SBUF, 2048), (PSUM, SBUF, 1024), (SBUF, PSUM, 1024), (None, SBUF, 1024)]
)
def test_tensor_copy_predicated(target, src, predicate, expected):
    def kernel():
        dst = tile((128, 1024))
        chosen = tile((128, 1024), nl.uint8, predicate)
        value = 0.0 if src is None else tile((128, 1024), FP32, src)
        nisa.tensor_copy_predicated(dst=dst, src=value, predicate=chosen)

    assert cycles(kernel, target=target) == expected


@EVERY
@pytest.mark.parametrize(("on_true", "expected"), [(SBUF, 2048), (PSUM, 1024)])
def test_select_reduce_is_assumed(target, on_true, expected):
    def kernel():
        chosen, x = tile((128, 1024), nl.uint8), tile((128, 1024), FP32, on_true)
        nisa.select_reduce(dst=new((128, 1024)), predicate=chosen, on_true=x, on_false=0.0)

    assert cycles(kernel, target=target) == expected
    assert "select_reduce: as tensor_tensor" in spent(last(kernel, target=target), target)[1]


@EVERY
@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [(0, BF16, 512), (0.0, FP16, 512), (1, BF16, 1024), (0, FP32, 1024), (0, nl.int16, 1024)],
)
def test_memset(target, value, dtype, expected):
    def kernel():
        tile((128, 1024), dtype, value=value)

    assert cycles(kernel, target=target) == expected


@EVERY
@pytest.mark.parametrize(
    ("op", "data", "dst", "expected"),
    [
        (nl.add, BF16, BF16, 512),
        (nl.maximum, BF16, BF16, 512),
        (nl.minimum, BF16, BF16, 1024),
        (nl.add, BF16, FP32, 1024),
        (nl.add, FP16, FP16, 1024),
        (nl.add, FP32, FP32, 1024),
    ],
)
def test_tensor_reduce(target, op, data, dst, expected):
    def kernel():
        nisa.tensor_reduce(dst=new((128, 1), dst), op=op, data=tile((128, 1024), data), axis=1)

    assert cycles(kernel, target=target) == expected
    halved = "halved costs of 16-bit types: as on NeuronCore-v2" in spent(last(kernel, target=target), target)[1]
    assert halved is (expected == 512 and target != "trn1")


def _single(name: str, n: int) -> Any:
    """A kernel whose last instruction is `name` on N elements per partition."""

    def kernel() -> None:
        x, y = tile((128, n)), new((128, n))
        eight, positions = new((128, 8)), new((128, 8), nl.uint32)
        if name == "reciprocal":
            nisa.reciprocal(dst=y, data=x)
        elif name == "tensor_tensor_scan":
            nisa.tensor_tensor_scan(dst=y, data0=x, data1=x, initial=0.0, op0=nl.multiply, op1=nl.add)
        elif name == "bn_stats":
            nisa.bn_stats(dst=new((128, 6)), data=x)
        elif name == "bn_aggr":
            nisa.bn_aggr(dst=new((128, 2)), data=x)
        elif name == "dropout":
            nisa.dropout(dst=y, data=x, prob=0.5)
        elif name == "max8":
            nisa.max8(dst=eight, src=x)
        elif name == "nc_find_index8":
            nisa.nc_find_index8(dst=positions, data=x, vals=tile((128, 8)))
        elif name == "nc_match_replace8":
            nisa.nc_match_replace8(dst=y, data=x, vals=tile((128, 8)), imm=0.0)
        elif name == "nc_stream_shuffle":
            nisa.nc_stream_shuffle(dst=y, src=x, shuffle_mask=list(range(32)))
        elif name == "tensor_scalar_reduce":
            nisa.tensor_scalar_reduce(
                dst=y, data=x, op0=nl.multiply, operand0=2.0, reduce_op=nl.add, reduce_res=new((128, 1))
            )
        elif name == "unread tensor_scalar_reduce":
            nisa.tensor_scalar_reduce(dst=y, data=x, op0=nl.multiply, operand0=2.0, reduce_op=nl.add)
        elif name == "tensor_scalar_cumulative":
            nisa.tensor_scalar_cumulative(dst=y, src=x, op0=nl.multiply, op1=nl.add, imm0=1.0)

    return kernel


@EVERY
@pytest.mark.parametrize(
    ("name", "n", "expected"),
    [
        ("reciprocal", 512, 4096),
        ("reciprocal", 7, 64),
        ("tensor_tensor_scan", 512, 1024),
        ("bn_stats", 512, 512),
        ("bn_aggr", 300, 1300),
        ("dropout", 512, 512),
        ("max8", 512, 512),
        ("max8", 8, 64),
        ("nc_find_index8", 512, 512),
        ("nc_match_replace8", 512, 512),
        ("nc_stream_shuffle", 512, 512),
        ("tensor_scalar_reduce", 512, 512 + 64),
        ("tensor_scalar_reduce", 8, 64 + 64),
        ("unread tensor_scalar_reduce", 512, 512),
        ("tensor_scalar_cumulative", 512, 512),
    ],
)
def test_one_input(target, name, n, expected):
    assert cycles(_single(name, n), target=target) == expected
    assumed = "tensor_scalar_cumulative: N cycles" in spent(last(_single(name, n), target=target), target)[1]
    assert assumed is (name == "tensor_scalar_cumulative")


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize(("n", "expected"), [(512, 512), (8, 64)])
def test_range_select_reads_its_result_at_no_extra_time(target, n, expected):
    def kernel():
        nisa.range_select(
            dst=new((128, n)),
            on_true_tile=tile((128, n)),
            comp_op0=nl.greater_equal,
            comp_op1=nl.less,
            bound0=tile((128, 1), value=0),
            bound1=tile((128, 1), value=9),
            reduce_res=new((128, 1)),
        )

    assert cycles(kernel, target=target) == expected


@EVERY
@pytest.mark.parametrize("n", [32, 8])
def test_transpose_on_the_vector_engine(target, n):
    def kernel():
        nisa.nc_transpose(dst=new((n, 32)), data=tile((32, n)), engine=nisa.engine.vector)

    assert cycles(kernel, target=target) == 64


def test_exponential_is_four_times_as_fast_as_activation():
    def fast():
        nisa.exponential(dst=new((128, 2048)), src=tile((128, 2048)), max_value=tile((128, 1)))

    def read():
        nisa.exponential(
            dst=new((128, 2048)),
            src=tile((128, 2048)),
            reduce_res=new((128, 1)),
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )

    def slow():
        nisa.activation(dst=new((128, 2048)), op=nl.exp, data=tile((128, 2048)))

    assert cycles(slow, target="trn3") == 2048
    assert cycles(fast, target="trn3") == 512
    assert cycles(read, target="trn3") == 512 + 64
    assert "exponential: time to read the accumulator" in spent(last(read, target="trn3"), "trn3")[1]


def test_quantize_mx_takes_four_elements_per_cycle():
    def kernel():
        x = tile((128, 2048), BF16)
        scale = new((128, 512), nl.uint8)
        nisa.quantize_mx(dst=new((128, 512), nl.float8_e4m3fn_x4), src=x, dst_scale=scale)

    assert cycles(kernel, target="trn3") == 512


@pytest.mark.parametrize(("target", "beyond"), [("trn1", 100), ("trn2", 144), ("trn3", 144)])
def test_vector_result_is_there_later_than_the_engine_is_free(target, beyond):
    record = last(copy((FP32, SBUF), (FP32, SBUF)), target=target)
    c, _ = spent(record, target)
    assert (c.latency_ns - c.busy_ns) * ghz(record, target) == pytest.approx(beyond)


@pytest.mark.parametrize(("target", "expected"), [("trn1", 1 + 100), ("trn2", 1 + 144), ("trn3", 1 + 144)])
def test_latency_is_on_top_of_the_work_and_not_of_the_least_cycles(target, expected):
    record = last(copy((FP32, SBUF), (FP32, SBUF), 1), target=target)
    c, _ = spent(record, target)
    assert c.latency_ns * ghz(record, target) == pytest.approx(expected)


# -- Scalar Engine


def activation(
    n: int, op: Any = nl.exp, dtype: Any = FP32, buffer: Any = SBUF, read: bool = False, step: int = 1
) -> Any:
    def kernel() -> None:
        x, y = tile((128, n * step), dtype, buffer), new((128, n), dtype)
        how = {"reduce_op": nl.add, "reduce_cmd": nisa.reduce_cmd.reset_reduce}
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
def test_activation(target, how, expected):
    assert cycles(activation(**how), target=target) == expected


@EVERY
@pytest.mark.parametrize(("n", "expected"), [(1, 128), (2048, 2112)])
def test_activation_reduce(target, n, expected):
    def kernel():
        nisa.activation_reduce(
            dst=new((128, n)), op=nl.exp, data=tile((128, n)), reduce_op=nl.add, reduce_res=new((128, 1))
        )

    assert cycles(kernel, target=target) == expected


def test_activate2_costs_what_activation_does():
    def kernel():
        nisa.activate2(
            dst=new((128, 2048)), op=nl.exp, data=tile((128, 2048)), imm0=1.0, imm1=0.0, op0=nl.multiply, op1=nl.add
        )

    assert cycles(kernel, target="trn3") == 2048


@pytest.mark.parametrize(("target", "load"), [("trn1", 368.0), ("trn2", 1280.0), ("trn3", 1280.0)])
def test_activation_table_is_loaded_once_per_function(target, load):
    record = last(activation(128), target=target)
    loaded: set[str] = set()
    first, _ = spent(record, target, loaded)
    again, _ = spent(record, target, loaded)
    other, _ = spent(last(activation(128, nl.tanh), target=target), target, loaded)
    assert first.busy_ns - again.busy_ns == pytest.approx(load)
    assert first.latency_ns - again.latency_ns == pytest.approx(load)
    assert other.busy_ns == pytest.approx(first.busy_ns)
    assert loaded == {"exp", "tanh"}


def test_copy_and_square_need_no_table():
    for op in (nl.copy, nl.square, nl.relu):
        record = last(activation(128, op))
        assert spent(record, "trn2", set())[0] == spent(record, "trn2", {op.__name__})[0]


@pytest.mark.parametrize(("target", "beyond"), [("trn1", 263), ("trn2", 353), ("trn3", 353)])
def test_scalar_result_is_there_later_than_the_engine_is_free(target, beyond):
    record = last(activation(128), target=target)
    c, _ = spent(record, target)
    assert (c.latency_ns - c.busy_ns) * ghz(record, target) == pytest.approx(beyond)


def test_published_interval_of_dependent_one_element_instructions():
    # 189 ns or 264 cycles on trn1.
    c, _ = spent(last(activation(1), target="trn1"), "trn1")
    assert c.latency_ns == pytest.approx(189, rel=0.003)
    assert c.busy_ns == pytest.approx(64 / 1.4)


def test_published_length_of_exponentials():
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
def test_scalar_engine_copies(target, dtype, buffer, step, expected):
    kernel = copy((dtype, SBUF), (dtype, buffer), 1024, step, nisa.engine.scalar)
    assert cycles(kernel, target=target) == expected


# -- GpSimd Engine


@EVERY
def test_iota_and_affine_select(target):
    def iota():
        nisa.iota(dst=new((128, 512), nl.int32), pattern=[[1, 512]])

    def select():
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


def test_topk():
    def kernel():
        src = tile((128, 64), BF16)
        nisa.topk(val_dst=new((128, 4), BF16), idx_dst=new((128, 4), nl.uint32), src=src, n=1000)

    assert last(kernel).attrs["k"] == 4
    assert cycles(kernel) == 4 * 1000 + 4


@EVERY
def test_copy_on_gpsimd(target):
    for n, expected in ((512, 512), (8, 64)):
        assert cycles(copy((FP32, SBUF), (FP32, SBUF), n, 1, nisa.engine.gpsimd), target=target) == expected


def test_rsqrt_on_gpsimd_has_a_quarter_of_the_scalar_engines_rate():
    def kernel():
        nisa.tensor_scalar(dst=new((128, 512)), data=tile((128, 512)), op0=nl.rsqrt, operand0=None)

    assert cycles(kernel) == 150 + 4 * 512


def test_gather_groups():
    # Assumed: one start-up per group of 512 elements. The size of what is gathered from does not count.
    def kernel():
        data, at = tile((128, 4096)), tile((128, 1025), nl.uint32, value=3)
        nisa.nc_n_gather(dst=new((128, 1025)), data=data, indices=at)

    assert cycles(kernel) == 3 * 150 + 1025
    assert any(a.startswith("nc_n_gather on the GpSimd Engine") for a in spent(last(kernel), "trn2")[1])


@pytest.mark.parametrize(("run", "count", "rate"), [(1, 64, 8.0), (4, 16, 44 / 16), (32, 2, 156 / 128)])
def test_local_gather_is_faster_per_element_in_longer_runs(run, count, rate):
    # float32: min(4 / 4, run) = 1, so C = (28 + 4 run) / (4 run).
    def kernel():
        src, at = tile((16, 64)), tile((16, 4), nl.uint16, value=0)
        nisa.local_gather(
            dst=new((16, run * count)), src_buffer=src, index=at, num_elem_per_idx=run, num_valid_indices=count
        )

    assert cycles(kernel) == pytest.approx(150 + run * count * rate)


# -- run-time addresses and sequencers


@EVERY
def test_run_time_address(target):
    def moved(n):
        def kernel():
            at = tile((1, 1), nl.int32, value=2)
            x = tile((128, 4 * n))
            y = new((128, n))
            nisa.tensor_copy(dst=y, src=x.ap([[4 * n, 128], [1, n]], scalar_offset=at, indirect_dim=1))

        return kernel

    assert cycles(moved(100), target=target) == 600
    assert cycles(moved(1000), target=target) == 1000


def test_run_time_address_of_a_matmul_is_assumed_to_take_as_long():
    def kernel():
        at = tile((1, 1), nl.int32, value=2)
        x, w = tile((128, 256), BF16), tile((128, 128), BF16)
        moving = x.ap([[256, 128], [1, 64]], scalar_offset=at, indirect_dim=1)
        nisa.nc_matmul(dst=new((128, 64), FP32, PSUM), stationary=w, moving=moving)

    assert cycles(kernel) == 600
    assert any(a.startswith("run-time addresses outside") for a in spent(last(kernel), "trn2")[1])


def test_indirect_columns_are_no_run_time_address():
    def kernel():
        at = tile((128, 1), nl.uint16, value=1)
        nisa.tensor_copy(dst=new((128, 16)), src=tile((128, 64)).indirect(at, 16))

    assert cycles(kernel, target="trn3") == 64
    assert "tensor indirection: no extra time" in spent(last(kernel, target="trn3"), "trn3")[1]


def test_indices_of_a_view_do_not_count_as_elements():
    def kernel():
        at = tile((16, 64), nl.uint16, value=1)
        nisa.tensor_copy(dst=new((16, 8)), src=tile((16, 64)).indirect(at, 8))

    assert free_size(last(kernel, target="trn3")) == 8


@pytest.mark.parametrize(("target", "ns"), [("trn1", 600 / 1.4), ("trn2", 500.0), ("trn3", 500.0)])
def test_register_load(target, ns):
    def kernel():
        at = tile((1, 1), nl.int32, value=2)
        nisa.register_load(nisa.register_alloc(), at)

    assert spent(last(kernel, target=target), target)[0].busy_ns == pytest.approx(ns)


def test_no_reorder_costs_nothing():
    def plain():
        x = tile((128, 512))
        nisa.tensor_copy(dst=new((128, 512)), src=x)

    def ordered():
        with nl.no_reorder():
            x = tile((128, 512))
            nisa.tensor_copy(dst=new((128, 512)), src=x)

    assert estimated(ordered).total_us == estimated(plain).total_us


@pytest.mark.parametrize("engine", ["tensor", "vector", "scalar", "gpsimd", "sync", "unknown"])
def test_barrier_on_any_engine(engine):
    def kernel():
        shared = nl.ndarray((2, 4), FP32, buffer=nl.shared_hbm)
        nisa.core_barrier(data=shared, cores=(0, 1), engine=nisa.engine[engine])

    e = estimated(kernel, cores=2)
    assert e.total_us == pytest.approx(0.033)
    assert e.assumed == ("core_barrier: one signal to the other core",)
