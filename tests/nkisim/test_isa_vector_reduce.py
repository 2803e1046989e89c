"""Reductions, scans and statistics of the Vector Engine against plain NumPy, and every rule they enforce."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced

bf16 = ml_dtypes.bfloat16
f32 = np.float32
CMD = nisa.reduce_cmd


def only(trace: Any, instruction: str) -> Any:
    """The one record of an instruction."""
    records = [r for r in trace.records if r.instruction == instruction]
    assert len(records) == 1
    assert records[0].engine is Engine.vector
    return records[0]


# ---------------------------------------------------------------------------------------------------
# tensor_reduce


def reducer(op: Any, axis: Any, shape: tuple[int, ...], dtype: Any = None, place: Any = sb, **kwargs: Any) -> Any:
    def kernel(x):
        data = place(x)
        dst = tile(shape, dtype or x.dtype)
        nisa.tensor_reduce(dst, op, data, axis, **kwargs)
        return out(dst)

    return kernel


REDUCTIONS = {
    "add": np.sum,
    "multiply": np.prod,
    "maximum": np.max,
    "minimum": np.min,
    "subtract": lambda x, axis: -np.sum(x, axis=axis),
    "logical_and": lambda x, axis: np.all(x != 0, axis=axis).astype(f32),
    "logical_or": lambda x, axis: np.any(x != 0, axis=axis).astype(f32),
    "logical_xor": lambda x, axis: (np.sum(x != 0, axis=axis) % 2).astype(f32),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, bf16, np.float16, np.int32, np.uint8])
def test_reduce_values(name, dtype):
    # Small integers: every partial result is exact in float32, so the order of the sum does not matter.
    low = 0 if dtype == np.uint8 else -2
    x = integers(5, 9, low=low, high=3, seed=3, dtype=dtype)
    got = run(reducer(getattr(nl, name), 1, (5, 1), nl.float32), x)
    want = REDUCTIONS[name](x.astype(np.float64), axis=1)
    np.testing.assert_array_equal(got[:, 0], want)


@pytest.mark.parametrize(
    ("axis", "kept"),
    [(3, (4, 3)), ((3,), (4, 3)), ([2, 3], (4,)), ((3, 2), (4,)), ((1, 2, 3), ()), (np.int64(3), (4, 3))],
)
def test_reduce_axes(axis, kept):
    x = integers(6, 4, 3, 5, low=-50, high=50, dtype=f32)
    dims = tuple(range(1 + len(kept), 4))
    got = run(reducer(nl.add, axis, (6, *(kept or (1,)))), x)
    np.testing.assert_array_equal(got.reshape(6, *kept), x.sum(axis=dims))
    # The result's shape matters by its number of elements only.
    flat = run(reducer(nl.add, axis, (6, int(np.prod(kept))), keepdims=True), x)
    np.testing.assert_array_equal(flat.ravel(), got.ravel())


def test_reduce_accumulates_in_float32_and_rounds_once():
    x = np.ones((2, 1000), bf16)
    assert run(reducer(nl.add, 1, (2, 1), nl.float32), x).tolist() == [[1000.0], [1000.0]]
    assert run(reducer(nl.add, 1, (2, 1)), x).astype(f32).tolist() == [[1000.0], [1000.0]]
    # 257 is a tie between the bfloat16 values 256 and 258, to even 256; added in bfloat16 it would stick at 256.
    y = np.ones((1, 259), bf16)
    assert float(run(reducer(nl.add, 1, (1, 1)), y)[0, 0]) == 260.0
    assert float(run(reducer(nl.add, 1, (1, 1)), y[:, :257])[0, 0]) == 256.0


def test_reduce_sum_is_accurate():
    x = normal(8, 700, seed=5)
    got = run(reducer(nl.add, 1, (8, 1)), x)
    want = x.astype(np.float64).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=700 * 6e-8 * np.abs(x).max())


@pytest.mark.parametrize("name", ["add", "maximum", "minimum"])
def test_reduce_negate(name):
    x = integers(4, 6, low=-9, high=9, dtype=f32)
    got = run(reducer(getattr(nl, name), 1, (4, 1), negate=True), x)
    np.testing.assert_array_equal(got[:, 0], -REDUCTIONS[name](x, axis=1))


@pytest.mark.parametrize(
    ("name", "ufunc"), [("bitwise_and", np.bitwise_and), ("bitwise_or", np.bitwise_or), ("bitwise_xor", np.bitwise_xor)]
)
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint32])
def test_reduce_bits(name, ufunc, dtype):
    info = np.iinfo(dtype)
    x = integers(7, 3, 4, low=info.min, high=info.max, dtype=dtype)
    got = run(reducer(getattr(nl, name), 2, (7, 3)), x)
    np.testing.assert_array_equal(got, ufunc.reduce(x, axis=2))
    unsigned = np.dtype(f"u{info.bits // 8}")
    as_unsigned = run(reducer(getattr(nl, name), (1, 2), (7, 1), unsigned), x)
    np.testing.assert_array_equal(as_unsigned[:, 0], ufunc.reduce(x.reshape(7, -1), axis=1).view(unsigned))


@pytest.mark.parametrize(("dtype", "expected"), [(np.int8, 127), (np.uint8, 255), (np.int16, 300), (np.int32, 300)])
def test_reduce_to_integers_saturates(dtype, expected):
    x = np.full((3, 3), 100, f32)
    assert run(reducer(nl.add, 1, (3, 1), dtype), x).tolist() == [[expected]] * 3


def test_reduce_psum_strides_and_in_place():
    x = integers(8, 12, low=-9, high=9, dtype=f32)

    def kernel(x):
        a = ps(x)
        total = tile((8, 4), buffer=nl.psum)
        nisa.tensor_reduce(total, nl.add, a.reshape((8, 3, 4)).permute((0, 2, 1)), axis=2)
        b = sb(x)
        odd = b[:, 1::2]
        nisa.tensor_reduce(b[:, 0:1], nl.maximum, odd, axis=1)
        c = sb(x)
        nisa.tensor_reduce(c[:, 0:1], nl.add, c, axis=1)
        return out(total), out(b), out(c)

    total, b, c = run(kernel, x)
    np.testing.assert_array_equal(total, x.reshape(8, 3, 4).sum(axis=1))
    np.testing.assert_array_equal(b[:, 0], x[:, 1::2].max(axis=1))
    np.testing.assert_array_equal(b[:, 1:], x[:, 1:])
    np.testing.assert_array_equal(c[:, 0], x.sum(axis=1))


def test_gathered_and_scattered_columns():
    x = integers(32, 10, low=-9, high=9, dtype=f32)
    # Partitions 0..15 read columns 2 and 5 in turn, partitions 16..31 columns 7 and 0.
    index = np.repeat(np.array([[2], [7]], np.int32), 16, axis=0)
    index[1::2, 0] = np.repeat([5, 0], 8)
    first = np.zeros((32, 1), np.int32)
    first[::16] = 3

    def kernel(x, index, first):
        data = sb(x).indirect(sb(index), 4)
        total, res, runs, spread = tile((32, 1)), tile((32, 1)), tile((32, 4)), sb(x)
        nisa.tensor_reduce(total, nl.add, data, axis=1)
        nisa.tensor_scalar_reduce(tile((32, 4)), data, nl.add, 1.0, nl.maximum, res)
        nisa.tensor_scalar_cumulative(runs, data, nl.add, nl.add, 0.0)
        nisa.tensor_reduce(spread.indirect(sb(first), 1), nl.add, sb(x), axis=1)
        return out(total), out(res), out(runs), out(spread)

    total, res, runs, spread = run(kernel, x, index, first, target="trn3")
    taken = np.concatenate((x[:16, [2, 5, 2, 5]], x[16:, [7, 0, 7, 0]]))
    np.testing.assert_array_equal(total[:, 0], taken.sum(axis=1))
    np.testing.assert_array_equal(res[:, 0], taken.max(axis=1) + 1)
    np.testing.assert_array_equal(runs, np.cumsum(taken, axis=1))
    want = x.copy()
    want[:, 3] = x.sum(axis=1)
    np.testing.assert_array_equal(spread, want)


def test_reduce_record():
    trace = traced(reducer(nl.maximum, 1, (4, 1), negate=True), normal(4, 6))
    record = only(trace, "tensor_reduce")
    assert record.attrs == {"op": "maximum", "negate": True, "keepdims": False}
    assert [a.operand for a in record.reads] == ["data"]
    assert [a.operand for a in record.writes] == ["dst"]


X3 = np.ones((4, 3, 5), f32)


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"axis": 0}, "axis", "partition axis", "0", "free dimensions"),
        ({"axis": (0, 1, 2)}, "axis", "partition axis", "(0, 1, 2)", "free dimensions"),
        ({"axis": 1}, "axis", "reduced dimensions", "1", "(2,) or (1, 2)"),
        ({"axis": (1, 1, 2)}, "axis", "reduced dimensions", "(1, 1, 2)", "(2,) or (1, 2)"),
        ({"axis": 3}, "axis", "reduced dimensions", "3", "(2,) or (1, 2)"),
        ({"axis": -1}, "axis", "reduced dimensions", "-1", "(2,) or (1, 2)"),
        ({"axis": ()}, "axis", "type", "()", "an int or a tuple"),
        ({"axis": "x"}, "axis", "type", "'x'", "an int or a tuple"),
        ({"axis": True}, "axis", "type", "True", "an int or a tuple"),
        ({"shape": (4, 4)}, "dst", "elements per partition", "4", "3"),
        ({"shape": (3, 3)}, "dst", "partitions", "3", "4"),
        ({"op": "equal"}, "op", "operator", "equal", "nl.add, nl.multiply"),
        ({"op": "abs"}, "op", "operator", "abs", "nl.add, nl.multiply"),
        ({"op": "bitwise_and"}, "dst", "dtype under a bit operator", "float32", "int8"),
        ({"negate": 1}, "negate", "type", "1", "True or False"),
        ({"keepdims": None}, "keepdims", "type", "None", "True or False"),
    ],
)
def test_reduce_refusals(kwargs, operand, rule, received, allowed):
    options = {"op": "add", "axis": 2, "shape": (4, 3), **kwargs}
    op = getattr(nl, options.pop("op"))

    def kernel(x):
        nisa.tensor_reduce(tile(options.pop("shape")), op, sb(x), **options)

    refused(kernel, X3, instruction="tensor_reduce", operand=operand, rule=rule, received=received, allowed=allowed)


def test_reduce_refuses_negated_bits_and_mixed_widths():
    x = np.ones((4, 3), np.int32)

    def negated(x):
        nisa.tensor_reduce(tile((4, 1), nl.int32), nl.bitwise_or, sb(x), 1, negate=True)

    def widths(x):
        nisa.tensor_reduce(tile((4, 1), nl.int16), nl.bitwise_or, sb(x), 1)

    refused(
        negated,
        x,
        instruction="tensor_reduce",
        operand="negate",
        rule="operator",
        received="bitwise_or",
        allowed="arith",
    )
    refused(widths, x, instruction="tensor_reduce", operand="dst", rule="widths", received="int16", allowed="one width")


def test_reduce_refuses_hbm_and_gather_before_trn3():
    x = np.ones((32, 4), f32)

    def hbm(x):
        nisa.tensor_reduce(tile((32, 1)), nl.add, x, 1)

    def gather(x):
        index = tile((32, 1), nl.int32)
        nisa.memset(index, 0)
        nisa.tensor_reduce(tile((32, 1)), nl.add, sb(x).indirect(index), 1)

    refused(hbm, x, instruction="tensor_reduce", operand="data", rule="buffer", received="hbm", allowed="sbuf or psum")
    refused(gather, x, instruction="tensor_reduce", operand="data", rule="indirection", received="trn2", allowed="v4")


# ---------------------------------------------------------------------------------------------------
# tensor_scalar_reduce


def scalar_reducer(op0: Any, operand0: Any, reduce_op: Any, dst_dtype: Any = None, **kwargs: Any) -> Any:
    def kernel(x):
        dst = tile(x.shape, dst_dtype or x.dtype)
        res = tile((x.shape[0], 1))
        nisa.tensor_scalar_reduce(dst, sb(x), op0, operand0, reduce_op, res, **kwargs)
        return out(dst), out(res)

    return kernel


@pytest.mark.parametrize("dtype", [f32, bf16, np.float16, np.int32])
@pytest.mark.parametrize("name", ["add", "multiply", "maximum", "minimum"])
def test_scalar_reduce_values(name, dtype):
    x = integers(6, 7, low=-3, high=4, dtype=dtype)
    dst, res = run(scalar_reducer(nl.subtract, 2.0, getattr(nl, name), nl.float32), x)
    y = x.astype(np.float64) - 2
    np.testing.assert_array_equal(dst, y)
    np.testing.assert_array_equal(res[:, 0], REDUCTIONS[name](y, axis=1))


@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("add", lambda x: x + 3),
        ("multiply", lambda x: x * 3),
        ("maximum", lambda x: np.maximum(x, 3)),
        ("less", lambda x: x < 3),
        ("logical_xor", lambda x: x == 0),
    ],
)
def test_scalar_reduce_first_operators(name, f):
    x = integers(4, 5, low=-6, high=7, dtype=f32)
    dst, res = run(scalar_reducer(getattr(nl, name), 3.0, nl.add), x)
    np.testing.assert_array_equal(dst, f(x).astype(f32))
    np.testing.assert_array_equal(res[:, 0], f(x).astype(np.float64).sum(axis=1))


def test_scalar_reduce_unary_operators():
    x = np.array([[-4.0, 2.0, -0.5]], f32)
    for operand0 in (None, 0, 0.0):
        dst, res = run(scalar_reducer(nl.abs, operand0, nl.add), x)
        assert dst.tolist() == [[4.0, 2.0, 0.5]]
        assert res.tolist() == [[6.5]]
    assert run(scalar_reducer(nl.reciprocal, None, nl.add), x)[0].tolist() == [[-0.25, 0.5, -2.0]]
    assert run(scalar_reducer(nl.square, None, nl.add), x, target="trn3")[1].tolist() == [[20.25]]
    assert run(scalar_reducer(nl.relu, None, nl.add), x, target="trn3")[0].tolist() == [[0.0, 2.0, 0.0]]


def test_scalar_reduce_sums_before_rounding():
    # Each element rounds to 1 in bfloat16; the float32 row still adds up with its small part.
    x = np.full((2, 64), 2.0**-10, f32)
    dst, res = run(scalar_reducer(nl.add, 1.0, nl.add, nl.bfloat16), x)
    assert np.all(dst.astype(f32) == 1.0)
    assert res.tolist() == [[64.0625], [64.0625]]


def test_scalar_reduce_column_operand_psum_and_in_place():
    x = integers(8, 6, low=-9, high=9, dtype=f32)
    column = integers(8, 1, low=-9, high=9, seed=1, dtype=f32)

    def kernel(x, column):
        a = ps(x)
        res = tile((8, 1), buffer=nl.psum)
        nisa.tensor_scalar_reduce(a, a, nl.multiply, ps(column), nl.add, res)
        return out(a), out(res)

    a, res = run(kernel, x, column)
    np.testing.assert_array_equal(a, x * column)
    np.testing.assert_array_equal(res, (x * column).sum(axis=1, keepdims=True))


def test_scalar_reduce_chain():
    x = integers(3, 4, low=-9, high=9, dtype=f32)

    def kernel(x):
        data, dst, res, negated = sb(x), tile((3, 4)), tile((3, 1)), tile((3, 1))
        nisa.tensor_scalar_reduce(dst, data, nl.add, 0.0, nl.add)
        nisa.tensor_scalar_reduce(
            dst, data, nl.multiply, 10.0, nl.add, negated, reduce_cmd=CMD.reduce, reduce_res_negate=True
        )
        nisa.tensor_scalar_reduce(dst, data, nl.multiply, 100.0, nl.add, res, reduce_cmd=CMD.reduce)
        return out(res), out(negated)

    res, negated = run(kernel, x)
    total = x.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(res, 111 * total)
    np.testing.assert_array_equal(negated, -11 * total)


@pytest.mark.parametrize("column", [False, True])
def test_scalar_reduce_load(column):
    x = integers(3, 4, low=-9, high=9, dtype=f32)
    init = np.array([[5.0], [-20.0], [1.0]], f32)

    def kernel(x, init):
        dst, res = tile((3, 4)), tile((3, 1))
        start = sb(init) if column else 6.0
        nisa.tensor_scalar_reduce(
            dst, sb(x), nl.add, 0.0, nl.maximum, res, reduce_cmd=CMD.load_reduce, reduce_init=start
        )
        return out(res)

    want = np.maximum(x.max(axis=1, keepdims=True), init if column else 6.0)
    np.testing.assert_array_equal(run(kernel, x, init), want)


def test_scalar_reduce_record():
    record = only(traced(scalar_reducer(nl.add, 1.0, nl.maximum), normal(4, 6)), "tensor_scalar_reduce")
    assert record.attrs == {
        "op0": "add",
        "reduce_op": "maximum",
        "reduce_cmd": "reset_reduce",
        "reduce_res_negate": False,
    }
    assert [a.operand for a in record.writes] == ["dst", "reduce_res"]


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"reverse0": True}, "reverse0", "value", "True", "False"),
        ({"op0": "bitwise_and"}, "op0", "operator", "bitwise_and", "arithmetic"),
        ({"op0": "power"}, "op0", "engine of nl.power", "vector", "gpsimd"),
        ({"op0": "rsqrt", "operand0": None}, "op0", "rsqrt on the Vector Engine", "rsqrt", "abs, reciprocal"),
        ({"op0": "invert", "operand0": None}, "op0", "invert on the Vector Engine", "invert", "abs, reciprocal"),
        ({"op0": "square", "operand0": None}, "op0", "square on target", "trn2", "trn3"),
        ({"op0": "abs", "operand0": 2.0}, "operand0", "operand of unary abs", "2.0", "None or 0"),
        ({"op0": "abs", "operand0": False}, "operand0", "operand of unary abs", "False", "None or 0"),
        ({"operand0": None}, "operand0", "type", "NoneType", "a number"),
        ({"reduce_op": "subtract"}, "reduce_op", "operator", "subtract", "nl.add, nl.multiply, nl.maximum, nl.minimum"),
        ({"reduce_cmd": CMD.idle}, "reduce_cmd", "value", "idle", "reset_reduce"),
        ({"reduce_cmd": CMD.reset}, "reduce_cmd", "value", "reset", "reset_reduce"),
        ({"reduce_cmd": 3}, "reduce_cmd", "type", "3", "reduce_cmd"),
        ({"reduce_cmd": CMD.load_reduce}, "reduce_init", "start value under load_reduce", "None", "a value"),
        ({"reduce_init": 1.0}, "reduce_init", "start value under reset_reduce", "a value", "None unless"),
        ({"reduce_cmd": CMD.reduce}, "reduce_cmd", "undefined accumulator", "reduce", "reset_reduce"),
        ({"reduce_res": (4, 2)}, "reduce_res", "shape", "[4, 2]", "[4, 1]"),
        ({"reduce_res_negate": 0}, "reduce_res_negate", "type", "0", "True or False"),
        ({"reduce_res": None, "reduce_res_negate": True}, "reduce_res_negate", "reduce_res", "None", "a tile"),
        ({"dst": (4, 5)}, "data", "elements per partition", "3", "5"),
        ({"dst": (2, 3)}, "data", "partitions", "4", "2"),
    ],
)
def test_scalar_reduce_refusals(kwargs, operand, rule, received, allowed):
    options = {"op0": "add", "operand0": 1.0, "reduce_op": "add", "reduce_res": (4, 1), "dst": (4, 3), **kwargs}

    def kernel(x):
        if options["reduce_res"] is not None:
            options["reduce_res"] = tile(options["reduce_res"])
        options["dst"] = tile(options["dst"])
        for k in ("op0", "reduce_op"):
            options[k] = getattr(nl, options[k])
        nisa.tensor_scalar_reduce(data=sb(x), **options)

    refused(
        kernel,
        np.ones((4, 3), f32),
        instruction="tensor_scalar_reduce",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_nothing_is_written_by_a_refused_chain():
    x = np.ones((2, 3), f32)
    seen = []

    def kernel(x):
        dst, res = sb(x), tile((2, 1))
        nisa.tensor_scalar_reduce(dst, dst, nl.add, 1.0, nl.add, res)
        for bad in ({"reduce_cmd": CMD.idle}, {"reduce_init": 4.0}, {"reverse0": True}):
            with pytest.raises(nisa.NkiValidationError):
                nisa.tensor_scalar_reduce(dst, dst, nl.add, 5.0, nl.add, res, **bad)
        seen.append(dst)
        return out(dst), out(res)

    dst, res = run(kernel, x)
    assert dst.tolist() == [[2.0] * 3] * 2
    assert res.tolist() == [[6.0]] * 2


# ---------------------------------------------------------------------------------------------------
# tensor_scalar_cumulative


def cumulative(op0: Any, op1: Any, imm0: Any, dtype: Any = None, **kwargs: Any) -> Any:
    def kernel(x):
        dst = tile(x.shape, dtype or x.dtype)
        nisa.tensor_scalar_cumulative(dst, sb(x), op0, op1, imm0, **kwargs)
        return out(dst)

    return kernel


STEPS = {
    "add": (0.0, lambda y, r: y + r),
    "subtract": (0.0, lambda y, r: y - r),
    "multiply": (1.0, lambda y, r: y * r),
    "maximum": (-np.inf, np.maximum),
    "minimum": (np.inf, np.minimum),
}


def running(y: Any, name: str, start: Any = None) -> Any:
    """r = op1(y, r) along axis 1, in float32 step by step."""
    first, step = STEPS[name]
    r = np.full(y.shape[0], first if start is None else start, f32)
    result = np.empty(y.shape, f32)
    for i in range(y.shape[1]):
        r = step(y[:, i].astype(f32), r).astype(f32)
        result[:, i] = r
    return result


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [f32, bf16, np.float16, np.int8, np.uint16, ml_dtypes.float8_e5m2])
def test_cumulative_values(name, dtype):
    x = np.abs(normal(6, 9, seed=2) * 4).astype(dtype)
    got = run(cumulative(nl.add, getattr(nl, name), f32(0.5), nl.float32), x)
    np.testing.assert_array_equal(got, running(x.astype(f32) + f32(0.5), name))


def test_cumulative_keeps_float32_between_elements():
    # In bfloat16 the running sum would stop at 256.
    x = np.ones((1, 300), bf16)
    got = run(cumulative(nl.multiply, nl.add, 1.0), x)
    np.testing.assert_array_equal(got[0], np.arange(1, 301).astype(f32).astype(bf16))


def test_cumulative_other_first_operators_and_flattening():
    x = integers(4, 3, 5, low=-5, high=6, dtype=f32)
    imm = integers(4, 1, low=-5, high=6, seed=9, dtype=f32)

    def kernel(x, imm):
        a, dst = ps(x), tile((4, 15), nl.float16, nl.psum)
        nisa.tensor_scalar_cumulative(dst, a, nl.greater, nl.add, sb(imm))
        nisa.tensor_scalar_cumulative(a, a, nl.maximum, nl.minimum, 0.0)
        return out(dst), out(a)

    dst, a = run(kernel, x, imm)
    flat = x.reshape(4, 15)
    np.testing.assert_array_equal(dst, np.cumsum(flat > imm, axis=1).astype(np.float16))
    np.testing.assert_array_equal(a.reshape(4, 15), np.minimum.accumulate(np.maximum(flat, 0), axis=1))


def test_cumulative_chain_and_load():
    x = integers(3, 4, low=-5, high=6, dtype=f32)
    init = np.array([[100.0], [200.0], [300.0]], f32)

    def kernel(x, init):
        data, a, b, c, res = sb(x), tile((3, 4)), tile((3, 4)), tile((3, 4)), tile((3, 1))
        nisa.tensor_scalar_cumulative(a, data, nl.add, nl.add, 0.0, sb(init), CMD.load_reduce)
        nisa.tensor_scalar_cumulative(b, data, nl.multiply, nl.add, 2.0, reduce_cmd=CMD.reduce)
        # The registers are those of tensor_scalar_reduce too.
        nisa.tensor_scalar_reduce(c, data, nl.add, 0.0, nl.add, res, reduce_cmd=CMD.reduce)
        nisa.tensor_scalar_cumulative(c, data, nl.add, nl.subtract, 0.0, 7.0, CMD.load_reduce)
        return out(a), out(b), out(res), out(c)

    a, b, res, c = run(kernel, x, init)
    np.testing.assert_array_equal(a, init + np.cumsum(x, axis=1))
    np.testing.assert_array_equal(b, a[:, -1:] + np.cumsum(2 * x, axis=1))
    np.testing.assert_array_equal(res, b[:, -1:] + x.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(c, running(x, "subtract", 7.0))


def test_cumulative_record():
    record = only(traced(cumulative(nl.add, nl.multiply, 0.0), normal(4, 6)), "tensor_scalar_cumulative")
    assert record.attrs == {"op0": "add", "op1": "multiply", "reduce_cmd": "reset_reduce"}


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"op0": "bitwise_or"}, "op0", "operator", "bitwise_or", "arithmetic"),
        ({"op0": "abs"}, "op0", "operator", "abs", "nl.add, nl.multiply"),
        ({"op1": "greater"}, "op1", "operator", "greater", "nl.add, nl.subtract, nl.multiply, nl.maximum, nl.minimum"),
        ({"op1": "logical_or"}, "op1", "operator", "logical_or", "nl.add, nl.subtract"),
        ({"imm0": None}, "imm0", "type", "NoneType", "a number"),
        ({"imm1": 1.0}, "imm1", "start value under reset_reduce", "a value", "None unless"),
        ({"reduce_cmd": CMD.load_reduce}, "imm1", "start value under load_reduce", "None", "a value"),
        ({"reduce_cmd": CMD.idle}, "reduce_cmd", "value", "idle", "reset_reduce, reduce, load_reduce"),
        ({"reduce_cmd": CMD.reduce}, "reduce_cmd", "undefined accumulator", "reduce", "reset_reduce"),
        ({"dtype": nl.int32}, "dst", "dtype", "int32", "bfloat16"),
        ({"dtype": nl.tfloat32}, "dst", "dtype", "tfloat32", "bfloat16"),
    ],
)
def test_cumulative_refusals(kwargs, operand, rule, received, allowed):
    options = {"op0": "add", "op1": "add", "imm0": 1.0, "dtype": nl.float32, **kwargs}
    op0, op1 = getattr(nl, options.pop("op0")), getattr(nl, options.pop("op1"))

    def kernel(x):
        dst = tile((4, 3), options.pop("dtype"))
        nisa.tensor_scalar_cumulative(dst, sb(x), op0, op1, **options)

    refused(
        kernel,
        np.ones((4, 3), f32),
        instruction="tensor_scalar_cumulative",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_cumulative_refuses_wide_integers_and_narrow_columns():
    def wide(x):
        nisa.tensor_scalar_cumulative(tile((4, 3)), sb(x), nl.add, nl.add, 0.0)

    def column(x):
        data = sb(x)
        nisa.tensor_scalar_cumulative(tile((4, 3)), data, nl.add, nl.add, data[:, 0:1])

    name = "tensor_scalar_cumulative"
    refused(
        wide,
        np.ones((4, 3), np.uint32),
        instruction=name,
        operand="src",
        rule="dtype",
        received="uint32",
        allowed="int16",
    )
    refused(
        column,
        np.ones((4, 3), bf16),
        instruction=name,
        operand="imm0",
        rule="dtype",
        received="bfloat16",
        allowed="float32",
    )


# ---------------------------------------------------------------------------------------------------
# tensor_tensor_scan


def scanned(x0: Any, x1: Any, start: Any, f: Any, g: Any) -> Any:
    """r = g(f(x0, r), x1) along axis 1, in float32 step by step."""
    r = np.broadcast_to(np.asarray(start, f32).reshape(-1), (x0.shape[0],))
    result = np.empty(x0.shape, f32)
    for i in range(x0.shape[1]):
        r = np.asarray(f(x0[:, i].astype(f32), r), f32)
        r = np.asarray(g(r, x1[:, i].astype(f32)), f32)
        result[:, i] = r
    return result


def scan(op0: Any, op1: Any, initial: Any, dtype: Any = nl.float32, **kwargs: Any) -> Any:
    def kernel(a, b):
        dst = tile(a.shape, dtype)
        nisa.tensor_tensor_scan(dst, sb(a), sb(b), initial, op0, op1, **kwargs)
        return out(dst)

    return kernel


BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "greater": np.greater,
    "logical_and": lambda x, y: (x != 0) & (y != 0),
}


@pytest.mark.parametrize(
    ("op0", "op1"),
    [
        ("multiply", "add"),
        ("add", "add"),
        ("multiply", "multiply"),
        ("maximum", "maximum"),
        ("minimum", "minimum"),
        ("subtract", "subtract"),
        ("subtract", "multiply"),
        ("multiply", "minimum"),
        ("greater", "add"),
        ("logical_and", "maximum"),
    ],
)
def test_scan_values(op0, op1):
    a, b = normal(7, 11, seed=1), normal(7, 11, seed=2)
    got = run(scan(getattr(nl, op0), getattr(nl, op1), 0.75), a, b)
    np.testing.assert_array_equal(got, scanned(a, b, 0.75, BINARY[op0], BINARY[op1]))


@pytest.mark.parametrize("reverse0", [False, True])
@pytest.mark.parametrize("reverse1", [False, True])
def test_scan_reversed(reverse0, reverse1):
    a, b = normal(4, 9, seed=3), normal(4, 9, seed=4)
    sub = lambda x, y: x - y  # noqa: E731
    rsub = lambda x, y: y - x  # noqa: E731
    got = run(scan(nl.subtract, nl.subtract, -1.5, reverse0=reverse0, reverse1=reverse1), a, b)
    want = scanned(a, b, -1.5, rsub if reverse0 else sub, rsub if reverse1 else sub)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [bf16, np.float16, np.int16])
def test_scan_keeps_float32_and_rounds_on_the_way_out(dtype):
    a, b = np.ones((2, 300), dtype), np.ones((2, 300), dtype)
    got = run(scan(nl.multiply, nl.add, 0.0, nl.bfloat16), a, b)
    np.testing.assert_array_equal(got[1], np.arange(1, 301).astype(f32).astype(bf16))


@pytest.mark.parametrize("psum", ["data0", "data1"])
def test_scan_initial_column_psum_in_place(psum):
    a, b = normal(5, 3, 4, seed=5), normal(5, 12, seed=6)
    initial = normal(5, 1, seed=7).astype(np.float16)

    def kernel(a, b, initial):
        x = ps(a) if psum == "data0" else sb(a)
        y = ps(b) if psum == "data1" else sb(b)
        nisa.tensor_tensor_scan(x, x, y, sb(initial), nl.multiply, nl.add)
        return out(x)

    want = scanned(a.reshape(5, 12), b, initial.astype(f32), np.multiply, np.add)
    np.testing.assert_array_equal(run(kernel, a, b, initial), want.reshape(5, 3, 4))


def test_scan_record():
    x = normal(4, 6)
    record = only(traced(scan(nl.multiply, nl.add, 0.0), x, x), "tensor_tensor_scan")
    assert record.attrs == {"op0": "multiply", "op1": "add"}


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"op0": "bitwise_and"}, "op0", "operator", "bitwise_and", "arithmetic"),
        ({"op1": "power"}, "op1", "engine of nl.power", "vector", "gpsimd"),
        ({"op1": "square"}, "op1", "operator", "square", "nl.add, nl.multiply"),
        ({"op0": "abs_max"}, "op0", "abs_max on target", "trn2", "trn3"),
        ({"reverse0": 1}, "reverse0", "type", "1", "True or False"),
        ({"reverse1": None}, "reverse1", "type", "None", "True or False"),
        ({"initial": None}, "initial", "type", "NoneType", "a number"),
    ],
)
def test_scan_refusals(kwargs, operand, rule, received, allowed):
    options = {"op0": "add", "op1": "add", "initial": 0.0, **kwargs}
    for k in ("op0", "op1"):
        options[k] = getattr(nl, options[k])

    def kernel(x):
        nisa.tensor_tensor_scan(tile((4, 3)), sb(x), sb(x), **options)

    x = np.ones((4, 3), f32)
    name = "tensor_tensor_scan"
    refused(kernel, x, instruction=name, operand=operand, rule=rule, received=received, allowed=allowed)


def test_scan_refuses_layouts():
    x = np.ones((4, 3), f32)

    def both_psum(x):
        nisa.tensor_tensor_scan(tile((4, 3)), ps(x), ps(x), 0.0, nl.add, nl.add)

    def free_size(x):
        nisa.tensor_tensor_scan(tile((4, 3)), sb(x), sb(x)[:, 0:2], 0.0, nl.add, nl.add)

    def partitions(x):
        nisa.tensor_tensor_scan(tile((4, 3)), sb(x)[0:2], sb(x), 0.0, nl.add, nl.add)

    def initial(x):
        nisa.tensor_tensor_scan(tile((4, 3)), sb(x), sb(x), sb(x), nl.add, nl.add)

    def gather(x):
        index = tile((4, 1), nl.int32)
        nisa.memset(index, 0)
        view = sb(x).indirect(index, 3)
        nisa.tensor_tensor_scan(tile((4, 3)), view, sb(x), 0.0, nl.add, nl.add)

    name = "tensor_tensor_scan"
    refused(both_psum, x, instruction=name, operand="data1", rule="buffer", received="psum", allowed="at most one")
    refused(free_size, x, instruction=name, operand="data1", rule="elements per", received="2", allowed="3")
    refused(partitions, x, instruction=name, operand="data0", rule="partitions", received="2", allowed="4")
    refused(initial, x, instruction=name, operand="initial", rule="shape", received="[4, 3]", allowed="[4, 1]")
    refused(
        gather,
        x,
        instruction=name,
        operand="data0",
        rule="indirection",
        received="indirect",
        allowed="ordinary",
        target="trn3",
    )


# ---------------------------------------------------------------------------------------------------
# bn_stats, bn_aggr


def stats(x):
    dst = tile((x.shape[0], 6))
    nisa.bn_stats(dst, sb(x))
    return out(dst)


@pytest.mark.parametrize("dtype", [f32, bf16, np.int16])
@pytest.mark.parametrize("count", [1, 2, 7, 512])
def test_bn_stats(count, dtype):
    x = (normal(5, count, seed=count) * 10).astype(dtype)
    got = run(stats, x)
    wide = x.astype(np.float64)
    for parity in (0, 1):
        half = wide[:, parity::2]
        n = half.shape[1]
        mean = half.mean(axis=1) if n else np.zeros(5)
        scatter = ((half - mean[:, None]) ** 2).sum(axis=1)
        assert got[:, 3 * parity].tolist() == [n] * 5
        np.testing.assert_allclose(got[:, 3 * parity + 1], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[:, 3 * parity + 2], scatter, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("place", [sb, ps])
def test_bn_aggr_merges_unequal_tiles(place):
    x = normal(6, 700, seed=4) * 3 + 50

    def kernel(x):
        data, many, dst = place(x), tile((6, 2, 6)), tile((6, 2))
        nisa.bn_stats(many[:, 0, :], data[:, 0:512])
        nisa.bn_stats(many[:, 1, :], data[:, 512:700])
        nisa.bn_aggr(dst, many)
        return out(dst)

    got = run(kernel, x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(got[:, 0], wide.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], wide.var(axis=1), rtol=1e-5)


def test_bn_aggr_by_hand_and_rounded():
    # Two elements of mean 1 (variance * count 2), six of mean 5 (0): mean 4, variance (2 + 2*9 + 6*1) / 8.
    x = np.array([[2, 1, 2, 6, 5, 0]], f32)

    def kernel(x):
        dst, narrow = tile((1, 2)), tile((1, 2), nl.bfloat16)
        data = sb(x)
        nisa.bn_aggr(dst, data)
        nisa.bn_aggr(narrow, data)
        return out(dst), out(narrow)

    dst, narrow = run(kernel, x)
    assert dst.tolist() == [[4.0, 3.25]]
    assert narrow.astype(f32).tolist() == [[4.0, 3.25]]


def test_bn_records():
    def kernel(x):
        six, two = tile((4, 6)), tile((4, 2))
        nisa.bn_stats(six, sb(x))
        nisa.bn_aggr(two, six)

    trace = traced(kernel, normal(4, 6))
    assert only(trace, "bn_stats").attrs == {}
    assert only(trace, "bn_aggr").attrs == {}


@pytest.mark.parametrize(
    ("instruction", "shape", "dst", "operand", "rule", "received", "allowed"),
    [
        ("bn_stats", (2, 513), (2, 6), "data", "elements per partition", "513", "512"),
        ("bn_stats", (2, 8), (2, 5), "dst", "elements per partition", "5", "6"),
        ("bn_stats", (2, 8), (1, 6), "dst", "partitions", "1", "2"),
        ("bn_aggr", (2, 8), (2, 2), "data", "elements per partition", "8", "multiple of 3"),
        ("bn_aggr", (2, 9), (2, 3), "dst", "elements per partition", "3", "2"),
        ("bn_aggr", (2, 9), (3, 2), "dst", "partitions", "3", "2"),
    ],
)
def test_bn_refusals(instruction, shape, dst, operand, rule, received, allowed):
    def kernel(x):
        getattr(nisa, instruction)(tile(dst), sb(x))

    refused(
        kernel,
        np.ones(shape, f32),
        instruction=instruction,
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )
