"""tensor_reduce and tensor_scalar_reduce."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced
from tests.nkisim.reduce_kernels import CMD, bf16, f32, only


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


# -- tensor_reduce


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


def scalar_reducer(op0: Any, operand0: Any, reduce_op: Any, dst_dtype: Any = None, **kwargs: Any) -> Any:
    def kernel(x):
        dst = tile(x.shape, dst_dtype or x.dtype)
        res = tile((x.shape[0], 1))
        nisa.tensor_scalar_reduce(dst, sb(x), op0, operand0, reduce_op, res, **kwargs)
        return out(dst), out(res)

    return kernel


# -- tensor_scalar_reduce


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
