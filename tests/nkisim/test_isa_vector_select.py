"""Selection instructions of the Vector Engine against plain NumPy, and every rule they enforce."""

from __future__ import annotations

import warnings
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
FP32_MIN = f32(-3.4028235e38)


def only(trace: Any, instruction: str) -> Any:
    """The one record of an instruction."""
    records = [r for r in trace.records if r.instruction == instruction]
    assert len(records) == 1
    assert records[0].engine is Engine.vector
    return records[0]


# ---------------------------------------------------------------------------------------------------
# range_select


def ranger(op0: Any, op1: Any, dtype: Any = None, place: Any = sb, **kwargs: Any) -> Any:
    def kernel(x, low, high):
        dst, res = tile(x.shape, dtype or x.dtype), tile((x.shape[0], 1))
        nisa.range_select(dst, place(x), op0, op1, sb(low), sb(high), reduce_res=res, **kwargs)
        return out(dst), out(res)

    return kernel


COMPARE = {
    "equal": np.equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
}


def bounds(*values: float) -> Any:
    return np.array(values, f32).reshape(-1, 1)


@pytest.mark.parametrize("op0", COMPARE)
@pytest.mark.parametrize("op1", ["less", "equal", "greater_equal"])
@pytest.mark.parametrize("range_start", [0, 7, -3])
def test_range_values(op0, op1, range_start):
    x = normal(5, 12, seed=1)
    low = bounds(0, 3, 9.5, 11, -2) + range_start
    high = bounds(12, 5, 9.5, 11, 4) + range_start
    got, res = run(ranger(getattr(nl, op0), getattr(nl, op1), range_start=range_start), x, low, high)
    i = range_start + np.arange(12)
    want = np.where(COMPARE[op0](i, low) & COMPARE[op1](i, high), x, FP32_MIN)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(res[:, 0], want.max(axis=1))


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("place", [sb, ps])
def test_range_numbers_flattened_positions(place, target):
    x = normal(4, 3, 5, seed=2)
    got, res = run(
        ranger(nl.greater_equal, nl.less, place=place), x, bounds(0, 4, 7, 14), bounds(15, 9, 8, 15), target=target
    )
    i = np.arange(15)
    low, high = np.array([[0], [4], [7], [14]]), np.array([[15], [9], [8], [15]])
    want = np.where((i >= low) & (i < high), x.reshape(4, 15), FP32_MIN)
    np.testing.assert_array_equal(got.reshape(4, 15), want)
    np.testing.assert_array_equal(res[:, 0], want.max(axis=1))


@pytest.mark.parametrize("dtype", [bf16, np.float16, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3])
@pytest.mark.parametrize("precise", [True, False])
def test_range_masked_row_of_a_narrow_type_is_minus_infinity(dtype, precise):
    x = np.full((2, 4), 3.0, dtype)
    kernel = ranger(nl.greater_equal, nl.less)
    got, res = run(kernel, x, bounds(0, 2), bounds(0, 3), precise=precise)
    wide = got.astype(f32)
    assert np.all(wide[0] == -np.inf)
    assert wide[1].tolist() == [-np.inf, -np.inf, 3.0, -np.inf]
    # The registers hold the float32 maximum, so a softmax over the masked row sees exp(-inf - FP32_MIN) = 0.
    assert res[0, 0] == FP32_MIN
    assert res[1, 0] == 3.0
    assert np.all(np.exp(wide[0] - res[0, 0]) == 0.0)


def test_range_masked_row_of_float32_subtracts_to_zero():
    got, res = run(ranger(nl.greater_equal, nl.less), np.ones((1, 4), f32), bounds(0), bounds(0))
    assert np.all(got == FP32_MIN)
    assert np.all(np.exp(got - res) == 1.0)


def test_range_fill_takes_part_in_the_maximum():
    # -inf data under a mask: FP32_MIN is larger.
    x = np.full((1, 4), -np.inf, f32)
    _, res = run(ranger(nl.greater_equal, nl.less), x, bounds(1), bounds(3))
    assert res[0, 0] == FP32_MIN


def test_range_casts_and_works_in_place():
    x = normal(3, 6, seed=4).astype(np.float16)

    def kernel(x, low, high):
        a = sb(x)
        wide = tile((3, 6))
        lower, upper = sb(low), sb(high)
        nisa.range_select(wide, a, nl.greater_equal, nl.less, lower, upper)
        nisa.range_select(a[:, 0:5], a[:, 0:5], nl.greater_equal, nl.less, lower, upper)
        return out(wide), out(a)

    wide, a = run(kernel, x, bounds(0, 0, 0), bounds(6, 6, 2))
    kept = np.arange(6) < np.array([[6], [6], [2]])
    np.testing.assert_array_equal(wide, np.where(kept, x.astype(f32), FP32_MIN))
    np.testing.assert_array_equal(a[:, :5], np.where(kept[:, :5], x[:, :5], np.float16(-np.inf)))
    np.testing.assert_array_equal(a[:, 5], x[:, 5])


def test_range_chain():
    x = normal(3, 8, seed=6)

    def kernel(x, low, high):
        data, res, mid, dst = sb(x), tile((3, 1)), tile((3, 1)), tile((3, 4))
        lower, upper = sb(low), sb(high)
        nisa.range_select(dst, data[:, 0:4], nl.greater_equal, nl.less, lower, upper)
        nisa.range_select(
            dst,
            data[:, 4:8],
            nl.greater_equal,
            nl.less,
            lower,
            upper,
            reduce_cmd=CMD.reduce,
            reduce_res=res,
            range_start=4,
        )
        nisa.range_select(
            dst, data[:, 0:4], nl.greater_equal, nl.less, lower, upper, reduce_cmd=CMD.reset, reduce_res=mid
        )
        return out(res), out(mid)

    res, mid = run(kernel, x, bounds(0, 2, 5), bounds(8, 6, 8))
    i = np.arange(8)
    kept = (i >= np.array([[0], [2], [5]])) & (i < np.array([[8], [6], [8]]))
    np.testing.assert_array_equal(res[:, 0], np.where(kept, x, FP32_MIN).max(axis=1))
    assert np.all(mid == -np.inf)


def test_range_index_limit():
    x = normal(1, 4)
    limit = 2**24 - 1
    top = bounds(float(limit))
    got, _ = run(ranger(nl.equal, nl.equal, range_start=limit - 3), x, top, top)
    assert np.flatnonzero(got[0] != FP32_MIN).tolist() == [3]


def test_range_record():
    trace = traced(ranger(nl.greater, nl.less_equal, range_start=np.int64(5)), normal(2, 4), bounds(0, 0), bounds(9, 9))
    record = only(trace, "range_select")
    assert record.attrs == {
        "comp_op0": "greater",
        "comp_op1": "less_equal",
        "reduce_cmd": "reset_reduce",
        "range_start": 5,
    }
    assert [a.operand for a in record.writes] == ["dst", "reduce_res"]
    assert sorted(a.operand for a in record.reads) == ["bound0", "bound1", "on_true_tile"]


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"comp_op0": "not_equal"}, "comp_op0", "operator", "not_equal", "nl.equal, nl.less, nl.less_equal"),
        ({"comp_op1": "add"}, "comp_op1", "operator", "add", "nl.equal, nl.less, nl.less_equal"),
        ({"reduce_op": "add"}, "reduce_op", "operator", "add", "maximum"),
        ({"on_false_value": 0.0}, "on_false_value", "value", "0.0", "FP32_MIN"),
        ({"on_false_value": float("-inf")}, "on_false_value", "value", "-inf", "FP32_MIN"),
        ({"on_false_value": None}, "on_false_value", "type", "NoneType", "FP32_MIN"),
        ({"range_start": 2**24 - 4}, "range_start", "positions", "16777212..16777216", "16777215"),
        ({"range_start": -(2**24)}, "range_start", "positions", "-16777216", "-16777215"),
        ({"range_start": 1.0}, "range_start", "type", "float", "an int"),
        ({"reduce_cmd": CMD.load_reduce}, "reduce_cmd", "value", "load_reduce", "reset_reduce"),
        ({"reduce_cmd": CMD.reduce}, "reduce_cmd", "undefined accumulator", "reduce", "reset_reduce"),
        ({"reduce_cmd": CMD.idle, "reduce_res": (2, 1)}, "reduce_res", "result under idle", "a tile", "None"),
        ({"reduce_res": (2, 2)}, "reduce_res", "shape", "[2, 2]", "[2, 1]"),
        ({"bound0": 0.0}, "bound0", "type", "float", "[P, 1] float32 tile"),
        ({"bound1": 3}, "bound1", "type", "int", "[P, 1] float32 tile"),
        ({"dst": (2, 4)}, "on_true_tile", "elements per partition", "5", "4"),
    ],
)
def test_range_refusals(kwargs, operand, rule, received, allowed):
    options = {"comp_op0": "less", "comp_op1": "less", "reduce_op": "maximum", "dst": (2, 5), **kwargs}
    for k in ("comp_op0", "comp_op1", "reduce_op"):
        options[k] = getattr(nl, options[k])

    def kernel(x, b):
        for k in ("dst", "reduce_res"):
            if k in options:
                options[k] = tile(options[k])
        arguments = {"bound0": sb(b), "bound1": sb(b), **options}
        nisa.range_select(on_true_tile=sb(x), **arguments)

    refused(
        kernel,
        np.ones((2, 5), f32),
        bounds(0, 0),
        instruction="range_select",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_range_refuses_types_and_old_targets():
    def data(x, b):
        nisa.range_select(tile((2, 4)), sb(x), nl.less, nl.less, sb(b), sb(b))

    def bound(x, b):
        narrow = tile((2, 1), nl.bfloat16)
        nisa.memset(narrow, 0.0)
        nisa.range_select(tile((2, 4)), sb(x), nl.less, nl.less, sb(b), narrow)

    def wide_bound(x, b):
        nisa.range_select(tile((2, 4)), sb(x), nl.less, nl.less, sb(x), sb(b))

    x, b = np.ones((2, 4), f32), bounds(0, 0)
    name = "range_select"
    for dtype in (np.int32, np.uint8):
        refused(
            data,
            x.astype(dtype),
            b,
            instruction=name,
            operand="on_true_tile",
            rule="dtype",
            received="int",
            allowed="float16",
        )
    refused(bound, x, b, instruction=name, operand="bound1", rule="dtype", received="bfloat16", allowed="float32")
    refused(wide_bound, x, b, instruction=name, operand="bound0", rule="shape", received="[2, 4]", allowed="[2, 1]")
    refused(data, x, b, instruction=name, rule="target", received="trn1", allowed="NeuronCore-v3", target="trn1")


# ---------------------------------------------------------------------------------------------------
# select_reduce


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("predicate", [np.int8, np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("dtype", [f32, bf16, np.int16])
def test_select_values(reverse, predicate, dtype):
    x = (normal(5, 9, seed=1) * 8).astype(dtype)
    p = integers(5, 9, low=0, high=3, seed=2, dtype=predicate)

    def kernel(x, p):
        dst, res = tile((5, 9)), tile((5, 1))
        nisa.select_reduce(dst, sb(p), sb(x), -2.5, res, CMD.reset_reduce, reverse_pred=reverse)
        return out(dst), out(res)

    dst, res = run(kernel, x, p)
    want = np.where((p == 0) if reverse else (p != 0), x.astype(f32), f32(-2.5))
    np.testing.assert_array_equal(dst, want)
    np.testing.assert_array_equal(res[:, 0], want.max(axis=1))


def test_select_column_chain_ranks_and_rounding():
    x = normal(4, 2, 3, seed=3)
    p = integers(4, 6, low=-1, high=1, seed=4, dtype=np.int8)
    other = normal(4, 1, seed=5)

    def kernel(x, p, other):
        dst, res = tile((4, 2, 3), nl.bfloat16), tile((4, 1), nl.float16)
        predicate, column = ps(p), sb(other)
        data = sb(x)
        nisa.select_reduce(dst, predicate, data, column, reduce_cmd=CMD.reset_reduce)
        nisa.select_reduce(
            data, predicate, data, column, res, reduce_cmd=CMD.reduce, reduce_op=nl.maximum, reverse_pred=True
        )
        return out(dst), out(data), out(res)

    dst, data, res = run(kernel, x, p, other)
    flat, chosen = x.reshape(4, 6), p != 0
    np.testing.assert_array_equal(dst.reshape(4, 6), np.where(chosen, flat, other).astype(bf16))
    np.testing.assert_array_equal(data.reshape(4, 6), np.where(chosen, other, flat))
    best = np.maximum(flat.max(axis=1, keepdims=True), other)
    np.testing.assert_array_equal(res, best.astype(np.float16))


def test_select_from_psum_keeps_infinities_without_warnings():
    x = np.array([[np.inf, 1.0, -np.inf, np.nan]], f32)

    def kernel(x, p):
        dst, res = tile((1, 4), buffer=nl.psum), tile((1, 1), buffer=nl.psum)
        nisa.select_reduce(dst, sb(p), ps(x), -np.inf, res, CMD.reset_reduce)
        return out(dst), out(res)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dst, res = run(kernel, x, np.array([[0, 1, 1, 0]], np.uint8))
    assert dst.tolist() == [[-np.inf, 1.0, -np.inf, -np.inf]]
    assert res.tolist() == [[1.0]]


def test_select_idle_clobbers_the_registers():
    x, p = np.ones((2, 4), f32), np.ones((2, 4), np.uint8)

    def kernel(x, p):
        data, predicate, dst, res = sb(x), sb(p), tile((2, 4)), tile((2, 1))
        nisa.select_reduce(dst, predicate, data, 0.0, reduce_cmd=CMD.reset_reduce)
        nisa.select_reduce(dst, predicate, data, 0.0)
        nisa.select_reduce(dst, predicate, data, 0.0, res, reduce_cmd=CMD.reduce)

    refused(
        kernel,
        x,
        p,
        instruction="select_reduce",
        operand="reduce_cmd",
        rule="undefined accumulator",
        received="clobbered by idle",
        allowed="reset_reduce",
    )


def test_select_record():
    def kernel(x, p):
        nisa.select_reduce(tile((2, 4)), sb(p), sb(x), 0.0)

    record = only(traced(kernel, np.ones((2, 4), f32), np.ones((2, 4), np.uint8)), "select_reduce")
    assert record.attrs == {"reduce_cmd": "idle"}
    assert [a.operand for a in record.writes] == ["dst"]


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"reduce_op": "minimum"}, "reduce_op", "operator", "minimum", "maximum"),
        ({"reduce_cmd": CMD.reset}, "reduce_cmd", "value", "reset", "idle, reduce, reset_reduce"),
        ({"reduce_cmd": CMD.load_reduce}, "reduce_cmd", "value", "load_reduce", "idle, reduce, reset_reduce"),
        ({"reduce_res": ((2, 1), "int32")}, "reduce_res", "dtype", "int32", "float32"),
        ({"reduce_res": ((1, 1), "float32")}, "reduce_res", "shape", "[1, 1]", "[2, 1]"),
        ({"reduce_res": ((2, 1), "float32")}, "reduce_res", "result under idle", "a tile", "None"),
        ({"reverse_pred": 1}, "reverse_pred", "type", "1", "True or False"),
        ({"on_false": None}, "on_false", "type", "NoneType", "a number"),
        ({"predicate": "int32"}, "predicate", "dtype", "int32", "int8, uint8, int16, uint16"),
        ({"predicate": "float32"}, "predicate", "dtype", "float32", "int8, uint8, int16, uint16"),
        ({"on_true": "int32"}, "on_true", "dtype", "int32", "bfloat16"),
        ({"on_true": "uint32"}, "on_true", "dtype", "uint32", "bfloat16"),
        ({"on_true": "tfloat32"}, "on_true", "dtype", "tfloat32", "bfloat16"),
        ({"dst": (2, 3)}, "predicate", "elements per partition", "4", "3"),
        ({"dst": (1, 4)}, "predicate", "partitions", "2", "1"),
    ],
)
def test_select_refusals(kwargs, operand, rule, received, allowed):
    options = {"predicate": "uint8", "on_true": "float32", "on_false": 0.0, "dst": (2, 4), **kwargs}

    def kernel(x):
        for k in ("predicate", "on_true"):
            options[k] = sb(x, getattr(nl, options[k]))
        options["dst"] = tile(options["dst"])
        if "reduce_res" in options:
            shape, dtype = options["reduce_res"]
            options["reduce_res"] = tile(shape, getattr(nl, dtype))
        if "reduce_op" in options:
            options["reduce_op"] = getattr(nl, options["reduce_op"])
        nisa.select_reduce(**options)

    refused(
        kernel,
        np.ones((2, 4), f32),
        instruction="select_reduce",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_select_refuses_two_inputs_in_psum():
    def kernel(x, p):
        nisa.select_reduce(tile((2, 4)), ps(p), ps(x), 0.0)

    refused(
        kernel,
        np.ones((2, 4), f32),
        np.ones((2, 4), np.uint8),
        instruction="select_reduce",
        operand="on_true",
        rule="buffer",
        received="psum",
        allowed="at most one",
    )


# ---------------------------------------------------------------------------------------------------
# max8


def top8(x):
    dst = tile((x.shape[0], 8))
    nisa.max8(dst, sb(x))
    return out(dst)


@pytest.mark.parametrize("dtype", [f32, bf16, np.int8])
@pytest.mark.parametrize("shape", [(5, 8), (7, 40), (3, 4, 5)])
def test_max8_values(shape, dtype):
    x = (normal(*shape, seed=2) * 5).astype(dtype)
    want = -np.sort(-x.reshape(shape[0], -1).astype(f32), axis=1)[:, :8]
    np.testing.assert_array_equal(run(top8, x), want)


def test_max8_ties_infinities_and_casts():
    x = np.array([[1, 9, 9, -np.inf, 9, 2, np.inf, 3, 2, -np.inf]], f32)
    assert run(top8, x).tolist() == [[np.inf, 9, 9, 9, 3, 2, 2, 1]]

    def kernel(x):
        a = ps(x)
        narrow = tile((2, 8), nl.bfloat16)
        nisa.max8(narrow, a[:, ::2])
        nisa.max8(a[:, 0:8], a[:, 8:])
        return out(narrow), out(a)

    y = normal(2, 20, seed=8)
    narrow, a = run(kernel, y)
    np.testing.assert_array_equal(narrow, -np.sort(-y[:, ::2], axis=1)[:, :8].astype(bf16))
    np.testing.assert_array_equal(a[:, :8], -np.sort(-y[:, 8:], axis=1)[:, :8])
    np.testing.assert_array_equal(a[:, 8:], y[:, 8:])


def test_max8_takes_16384_elements():
    x = np.arange(16384, dtype=f32).reshape(1, -1)
    assert run(top8, x).tolist() == [[16383 - i for i in range(8)]]


@pytest.mark.parametrize(
    ("shape", "dst", "operand", "rule", "received", "allowed"),
    [
        ((2, 7), (2, 8), "src", "elements per partition", "7", "8..16384"),
        ((1, 16385), (1, 8), "src", "elements per partition", "16385", "8..16384"),
        ((2, 2, 2, 3), (2, 8), "src", "dimensions", "4", "at most 3"),
        ((2, 9), (2, 7), "dst", "shape", "[2, 7]", "[2, 8]"),
        ((2, 9), (2, 2, 4), "dst", "shape", "[2, 2, 4]", "[2, 8]"),
        ((2, 9), (3, 8), "dst", "shape", "[3, 8]", "[2, 8]"),
    ],
)
def test_max8_refusals(shape, dst, operand, rule, received, allowed):
    def kernel(x):
        nisa.max8(tile(dst), sb(x))

    refused(
        kernel,
        np.ones(shape, f32),
        instruction="max8",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


# ---------------------------------------------------------------------------------------------------
# nc_find_index8


def finder(dtype: Any, place: Any = sb) -> Any:
    def kernel(x, vals):
        dst = tile((x.shape[0], 8), dtype)
        nisa.nc_find_index8(dst, place(x), sb(vals))
        return out(dst)

    return kernel


@pytest.mark.parametrize(("dtype", "ones"), [(nl.uint32, 0xFFFFFFFF), (nl.uint16, 0xFFFF)])
@pytest.mark.parametrize("place", [sb, ps])
def test_find_index8_by_hand(dtype, ones, place):
    x = np.array([[5, 3, 8, 3, 1, 8, 8, 0, 3, 7], [0, 0, 0, 0, 0, 0, 0, 0, 0, -1]], f32)
    vals = np.array([[8, 3, 8, 9, 8, 8, 3, 7], [0, -0.0, 0, -1, 4, -1, 0, 0]], f32)
    got = run(finder(dtype, place), x, vals)
    assert got.tolist() == [[2, 1, 5, ones, 6, ones, 3, 9], [0, 1, 2, 9, ones, ones, 3, 4]]


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_find_index8_inverts_max8(dtype):
    # bfloat16 values repeat: then the pairs must still be distinct positions holding the values.
    x = normal(6, 4, 25, seed=3).astype(dtype)

    def kernel(x):
        data, best, at = sb(x), tile((6, 8)), tile((6, 8), nl.uint32)
        nisa.max8(best, data)
        nisa.nc_find_index8(at, data, best)
        return out(best), out(at)

    best, at = run(kernel, x)
    flat = x.reshape(6, 100).astype(f32)
    np.testing.assert_array_equal(np.take_along_axis(flat, at.astype(np.int64), 1), best)
    np.testing.assert_array_equal(at, np.argsort(-flat, axis=1, kind="stable")[:, :8])


def test_find_index8_of_one_value_repeated():
    # The first column is the argmax when a row's maximum is broadcast over the eight values.
    x = normal(5, 30, seed=4)

    def kernel(x):
        data, best, at = sb(x), tile((5, 1)), tile((5, 8), nl.uint16)
        nisa.tensor_reduce(best, nl.maximum, data, 1)
        nisa.nc_find_index8(at, data, best.broadcast(1, 8))
        return out(at)

    got = run(kernel, x)
    np.testing.assert_array_equal(got[:, 0], x.argmax(axis=1))
    assert np.all(got[:, 1:] == 0xFFFF)


@pytest.mark.parametrize(
    ("data", "vals", "dst", "dtype", "operand", "rule", "received", "allowed"),
    [
        ((2, 7), (2, 8), (2, 8), "uint32", "data", "elements per partition", "7", "8..16384"),
        ((1, 16385), (1, 8), (1, 8), "uint32", "data", "elements per partition", "16385", "8..16384"),
        ((2, 2, 2, 4), (2, 8), (2, 8), "uint32", "data", "dimensions", "4", "at most 3"),
        ((2, 9), (2, 1, 2, 4), (2, 8), "uint32", "vals", "dimensions", "4", "at most 3"),
        ((2, 9), (2, 7), (2, 8), "uint32", "vals", "elements per partition", "7", "8"),
        ((2, 9), (1, 8), (2, 8), "uint32", "vals", "partitions", "1", "2"),
        ((2, 9), (2, 8), (2, 9), "uint32", "dst", "shape", "[2, 9]", "[2, 8]"),
        ((2, 9), (2, 8), (2, 8), "int32", "dst", "dtype", "int32", "uint16, uint32"),
    ],
)
def test_find_index8_refusals(data, vals, dst, dtype, operand, rule, received, allowed):
    def kernel(x, v):
        nisa.nc_find_index8(tile(dst, getattr(nl, dtype)), sb(x), sb(v))

    refused(
        kernel,
        np.ones(data, f32),
        np.ones(vals, f32),
        instruction="nc_find_index8",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


# ---------------------------------------------------------------------------------------------------
# nc_match_replace8


def replacer(imm: Any, index: Any = nl.uint32, dtype: Any = None) -> Any:
    def kernel(x, vals):
        dst, at = tile(x.shape, dtype or x.dtype), tile((x.shape[0], 8), index)
        nisa.nc_match_replace8(dst, sb(x), sb(vals), imm, at)
        return out(dst), out(at)

    return kernel


def test_match_replace8_documented_example():
    x = np.array([[1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8]], f32)
    vals = np.array([[3, 8, 8, 8, 8, 8, 8, 8]], f32)
    got, at = run(replacer(-1.0), x, vals)
    assert at.tolist() == [[2, 10, 9, 8, 7, 6, 5, 4]]
    assert got.tolist() == [[1, 2, -1, 4, -1, -1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize(("index", "ones"), [(nl.uint32, 0xFFFFFFFF), (nl.uint16, 0xFFFF)])
def test_match_replace8_by_hand(index, ones):
    # 7 occurs once for two values: the later value gets it. 5 is not there.
    x = np.array([[4, 7, 2, 2, 9, 2, 0, 4, 1, 6]], f32)
    vals = np.array([[2, 7, 4, 2, 7, 5, 4, 0]], f32)
    got, at = run(replacer(0.5, index), x, vals)
    assert at.tolist() == [[3, ones, 7, 2, 1, ones, 0, 6]]
    assert got.tolist() == [[0.5, 0.5, 0.5, 0.5, 9, 2, 0.5, 0.5, 1, 6]]


def test_match_replace8_does_not_match_what_it_wrote():
    # imm is one of vals: the element replaced by it must not be found again.
    x = np.array([[3, 1, 3, 5, 0, 0, 0, 0, 2]], f32)
    vals = np.array([[3, 3, 3, 5, 9, 9, 9, 3]], f32)
    got, at = run(replacer(3.0), x, vals)
    ones = 0xFFFFFFFF
    assert at.tolist() == [[ones, ones, 2, 3, ones, ones, ones, 0]]
    assert got.tolist() == [[3, 1, 3, 3, 0, 0, 0, 0, 2]]


def test_match_replace8_peels_the_top_k():
    x = normal(6, 3, 30, seed=5)

    def kernel(x):
        a = sb(x)
        tops = tile((6, 24))
        for r in range(3):
            best = tops[:, 8 * r : 8 * r + 8]
            nisa.max8(best, a)
            nisa.nc_match_replace8(a, a, best, float("-inf"))
        return out(tops), out(a)

    tops, a = run(kernel, x)
    flat = x.reshape(6, 90)
    np.testing.assert_array_equal(tops, -np.sort(-flat, axis=1)[:, :24])
    cut = tops[:, -1:]
    np.testing.assert_array_equal(a.reshape(6, 90), np.where(flat >= cut, f32(-np.inf), flat))


def test_match_replace8_casts_and_keeps_its_input():
    x = normal(3, 10, seed=6)

    def kernel(x):
        a, dst, best = ps(x), tile((3, 10), nl.bfloat16), tile((3, 8))
        at = tile((3, 2, 4), nl.uint16)
        nisa.max8(best, a)
        nisa.nc_match_replace8(dst, a, best.reshape((3, 4, 2)), np.float32(1.00390625), at)
        return out(dst), out(a), out(at)

    dst, a, at = run(kernel, x)
    np.testing.assert_array_equal(a, x)
    order = np.argsort(-x, axis=1)
    np.testing.assert_array_equal(at.reshape(3, 8), order[:, :8])
    want = x.copy()
    np.put_along_axis(want, order[:, :8], 1.00390625, 1)
    np.testing.assert_array_equal(dst, want.astype(bf16))


@pytest.mark.parametrize(
    ("kwargs", "operand", "rule", "received", "allowed"),
    [
        ({"data": (1, 16385), "vals": (1, 8)}, "data", "elements per partition", "16385", "16384"),
        ({"vals": (2, 9)}, "vals", "elements per partition", "9", "8"),
        ({"vals": (1, 8)}, "vals", "partitions", "1", "2"),
        ({"vals": (2, 2, 2, 2)}, "vals", "dimensions", "4", "at most 3"),
        ({"dst": (2, 8)}, "dst", "elements per partition", "8", "9"),
        ({"dst": (1, 9)}, "dst", "partitions", "1", "2"),
        ({"imm": None}, "imm", "type", "NoneType", "a number"),
        ({"dst_idx": ((2, 8), "int32")}, "dst_idx", "dtype", "int32", "uint16, uint32"),
        ({"dst_idx": ((2, 9), "uint32")}, "dst_idx", "shape", "[2, 9]", "[2, 8]"),
        ({"dst_idx": ((1, 8), "uint32")}, "dst_idx", "shape", "[1, 8]", "[2, 8]"),
    ],
)
def test_match_replace8_refusals(kwargs, operand, rule, received, allowed):
    options = {"data": (2, 9), "vals": (2, 8), "imm": 0.0, **kwargs}
    data, vals = options.pop("data"), options.pop("vals")
    options.setdefault("dst", data)

    def kernel(x, v):
        options["dst"] = tile(options["dst"])
        if "dst_idx" in options:
            shape, dtype = options["dst_idx"]
            options["dst_idx"] = tile(shape, getattr(nl, dtype))
        nisa.nc_match_replace8(data=sb(x), vals=sb(v), **options)

    refused(
        kernel,
        np.ones(data, f32),
        np.ones(vals, f32),
        instruction="nc_match_replace8",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_eight_records():
    def kernel(x):
        data, best, at = sb(x), tile((2, 8)), tile((2, 8), nl.uint32)
        nisa.max8(best, data)
        nisa.nc_find_index8(at, data, best)
        nisa.nc_match_replace8(data, data, best, 0.0)

    trace = traced(kernel, normal(2, 20))
    for name in ("max8", "nc_find_index8", "nc_match_replace8"):
        assert only(trace, name).attrs == {}
    assert [a.operand for a in only(trace, "nc_match_replace8").writes] == ["dst"]
