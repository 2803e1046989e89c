"""Published costs of the Vector Engine, as cycles computed by hand, on each generation."""

from __future__ import annotations

from typing import Any

import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.latency.kernels import TARGETS, copy, cycles, ghz, last, new, spent, tile

SBUF, PSUM = nl.sbuf, nl.psum
BF16, FP16, FP32 = nl.bfloat16, nl.float16, nl.float32
EVERY = pytest.mark.parametrize("target", TARGETS)


# -- Vector Engine


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
def test_performance_modes(target: Any, kernel: Any, dst: Any, src: Any, step: Any, gen2: Any, later: Any) -> None:
    assert cycles(kernel(dst, src, 1024, step), target=target) == (gen2 if target == "trn1" else later)


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_a_float32_column_operand_does_not_end_the_performance_mode(target: Any) -> None:
    assert cycles(scaled((BF16, SBUF), (BF16, SBUF), column=True), target=target) == 256


@pytest.mark.parametrize(("target", "expected"), [("trn2", 1024), ("trn3", 256)])
def test_performance_mode_of_8_bit_floats(target: Any, expected: Any) -> None:
    kernel = copy((BF16, SBUF), (nl.float8_e4m3, SBUF))
    assert cycles(kernel, target=target) == expected
    _, assumed = spent(last(kernel, target=target), target)
    assert ("performance modes of 8-bit floats" in assumed) is (target == "trn3")


@EVERY
@pytest.mark.parametrize("n", [1, 63, 64])
def test_small_instructions_take_64_cycles(target: Any, n: Any) -> None:
    assert cycles(copy((FP32, SBUF), (FP32, SBUF), n), target=target) == 64


@EVERY
def test_a_column_has_no_stride(target: Any) -> None:
    # One element per partition out of a wide tile: nothing is apart from anything.
    def kernel() -> None:
        wide, y = tile((128, 512)), new((128, 1))
        nisa.tensor_copy(dst=y, src=wide[:, 7:8])

    assert cycles(kernel, target=target) == 64


@EVERY
def test_dimensions_of_one_element_have_no_stride(target: Any) -> None:
    # Every eighth element, seen as [128, 512, 1]: 32 bytes apart.
    def kernel() -> None:
        nisa.tensor_copy(dst=new((128, 512)), src=tile((128, 512, 8))[:, :, 0:1])

    assert cycles(kernel, target=target) == 1024


@pytest.mark.parametrize(("stride", "expected"), [(-4, 512), (-5, 1024)])
def test_strides_backwards(stride: Any, expected: Any) -> None:
    def kernel() -> None:
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
def test_tensor_tensor(target: Any, op: Any, dtypes: Any, buffers: Any, step: Any, gen2: Any, later: Any) -> None:
    assert cycles(two(op, dtypes, buffers, 1024, step), target=target) == (gen2 if target == "trn1" else later)


def test_tensor_tensor_of_columns_reads_two_inputs() -> None:
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
def test_scalar_tensor_tensor(target: Any, ops: Any, dtype: Any, operand1: Any, n: Any, expected: Any) -> None:
    def kernel() -> None:
        a, b, factor = tile((128, n), dtype), tile((128, n), dtype, operand1), tile((128, 1))
        nisa.scalar_tensor_tensor(dst=new((128, n), dtype), data=a, op0=ops[0], operand0=factor, op1=ops[1], operand1=b)

    assert cycles(kernel, target=target) == expected


@EVERY
@pytest.mark.parametrize(
    ("src", "predicate", "expected"), [(SBUF, SBUF, 2048), (PSUM, SBUF, 1024), (SBUF, PSUM, 1024), (None, SBUF, 1024)]
)
def test_tensor_copy_predicated(target: Any, src: Any, predicate: Any, expected: Any) -> None:
    def kernel() -> None:
        dst = tile((128, 1024))
        chosen = tile((128, 1024), nl.uint8, predicate)
        value = 0.0 if src is None else tile((128, 1024), FP32, src)
        nisa.tensor_copy_predicated(dst=dst, src=value, predicate=chosen)

    assert cycles(kernel, target=target) == expected


@EVERY
@pytest.mark.parametrize(("on_true", "expected"), [(SBUF, 2048), (PSUM, 1024)])
def test_select_reduce_is_assumed(target: Any, on_true: Any, expected: Any) -> None:
    def kernel() -> None:
        chosen, x = tile((128, 1024), nl.uint8), tile((128, 1024), FP32, on_true)
        nisa.select_reduce(dst=new((128, 1024)), predicate=chosen, on_true=x, on_false=0.0)

    assert cycles(kernel, target=target) == expected
    assert "select_reduce: as tensor_tensor" in spent(last(kernel, target=target), target)[1]


@EVERY
@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [(0, BF16, 512), (0.0, FP16, 512), (1, BF16, 1024), (0, FP32, 1024), (0, nl.int16, 1024)],
)
def test_memset(target: Any, value: Any, dtype: Any, expected: Any) -> None:
    def kernel() -> None:
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
def test_tensor_reduce(target: Any, op: Any, data: Any, dst: Any, expected: Any) -> None:
    def kernel() -> None:
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
def test_one_input(target: Any, name: Any, n: Any, expected: Any) -> None:
    assert cycles(_single(name, n), target=target) == expected
    assumed = "tensor_scalar_cumulative: N cycles" in spent(last(_single(name, n), target=target), target)[1]
    assert assumed is (name == "tensor_scalar_cumulative")


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize(("n", "expected"), [(512, 512), (8, 64)])
def test_range_select_reads_its_result_at_no_extra_time(target: Any, n: Any, expected: Any) -> None:
    def kernel() -> None:
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
def test_transpose_on_the_vector_engine(target: Any, n: Any) -> None:
    def kernel() -> None:
        nisa.nc_transpose(dst=new((n, 32)), data=tile((32, n)), engine=nisa.engine.vector)

    assert cycles(kernel, target=target) == 64


def test_exponential_is_four_times_as_fast_as_activation() -> None:
    def fast() -> None:
        nisa.exponential(dst=new((128, 2048)), src=tile((128, 2048)), max_value=tile((128, 1)))

    def read() -> None:
        nisa.exponential(
            dst=new((128, 2048)),
            src=tile((128, 2048)),
            reduce_res=new((128, 1)),
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )

    def slow() -> None:
        nisa.activation(dst=new((128, 2048)), op=nl.exp, data=tile((128, 2048)))

    assert cycles(slow, target="trn3") == 2048
    assert cycles(fast, target="trn3") == 512
    assert cycles(read, target="trn3") == 512 + 64
    assert "exponential: time to read the accumulator" in spent(last(read, target="trn3"), "trn3")[1]


def test_quantize_mx_takes_four_elements_per_cycle() -> None:
    def kernel() -> None:
        x = tile((128, 2048), BF16)
        scale = new((128, 512), nl.uint8)
        nisa.quantize_mx(dst=new((128, 512), nl.float8_e4m3fn_x4), src=x, dst_scale=scale)

    assert cycles(kernel, target="trn3") == 512


@pytest.mark.parametrize(("target", "beyond"), [("trn1", 100), ("trn2", 144), ("trn3", 144)])
def test_vector_result_is_there_later_than_the_engine_is_free(target: Any, beyond: Any) -> None:
    record = last(copy((FP32, SBUF), (FP32, SBUF)), target=target)
    c, _ = spent(record, target)
    assert (c.latency_ns - c.busy_ns) * ghz(record, target) == pytest.approx(beyond)


@pytest.mark.parametrize(("target", "expected"), [("trn1", 1 + 100), ("trn2", 1 + 144), ("trn3", 1 + 144)])
def test_latency_is_on_top_of_the_work_and_not_of_the_least_cycles(target: Any, expected: Any) -> None:
    record = last(copy((FP32, SBUF), (FP32, SBUF), 1), target=target)
    c, _ = spent(record, target)
    assert c.latency_ns * ghz(record, target) == pytest.approx(expected)
