"""GpSimd Engine: patterns, selection by them, partition reduction; records and signatures of all its instructions."""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import normal, out, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16


def affine(partitions, pattern, offset=0, channel_multiplier=0):
    """The affine value of each element, written as the loops that define it; wraps at 32 bits."""
    pattern = [[0, 1]] * (4 - len(pattern)) + pattern
    (sw, nw), (sz, nz), (sy, ny), (sx, nx) = pattern
    rows = []
    for p in range(partitions):
        row = [
            offset + p * channel_multiplier + w * sw + z * sz + y * sy + x * sx
            for w in range(nw)
            for z in range(nz)
            for y in range(ny)
            for x in range(nx)
        ]
        rows.append([(v + 2**31) % 2**32 - 2**31 for v in row])
    return np.array(rows, np.int64)


# -- iota

PATTERNS = [
    ([[1, 12]], 0, 0),
    ([[1, 12]], 5, 12),
    ([[-3, 12]], -7, 1),
    ([[100, 3], [1, 4]], 0, -50),
    ([[1000, 2], [0, 3], [-1, 2]], 9, 1),
    ([[1000, 2], [100, 3], [10, 1], [1, 2]], 1, 10000),
    ([[2**30, 12]], 2**31 - 1, 2**31 - 1),
]


@pytest.mark.parametrize(("pattern", "offset", "multiplier"), PATTERNS)
def test_iota_int32(pattern, offset, multiplier):
    def kernel():
        t = tile((5, 12), nl.int32)
        nisa.iota(t, pattern, offset, multiplier)
        return out(t)

    np.testing.assert_array_equal(run(kernel), affine(5, pattern, offset, multiplier))


@pytest.mark.parametrize(
    ("dtype", "convert"),
    [
        (nl.float32, lambda v: v.astype(np.float32)),
        (nl.bfloat16, lambda v: v.astype(np.float32).astype(BF16)),
        (nl.float16, lambda v: v.astype(np.float32).astype(np.float16)),
        (nl.uint32, lambda v: np.clip(v, 0, 2**32 - 1).astype(np.uint32)),
        (nl.int16, lambda v: np.clip(v, -(2**15), 2**15 - 1).astype(np.int16)),
        (nl.uint16, lambda v: np.clip(v, 0, 2**16 - 1).astype(np.uint16)),
        (nl.int8, lambda v: np.clip(v, -128, 127).astype(np.int8)),
        (nl.uint8, lambda v: np.clip(v, 0, 255).astype(np.uint8)),
        (nl.bool_, lambda v: v != 0),
    ],
)
def test_iota_converts_its_integers(dtype, convert):
    pattern = [[2**25 + 1, 3], [1, 8]]  # beyond float32's integers
    values = affine(4, pattern, -17, 3)

    def kernel():
        t = tile((4, 24), dtype)
        nisa.iota(t, pattern, offset=-17, channel_multiplier=3)
        return out(t)

    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(run(kernel), convert(values))


def test_iota_into_a_strided_part_counts_partitions_from_the_view():
    def kernel():
        t = tile((64, 3, 8), nl.int32)
        nisa.memset(t, 0)
        nisa.iota(t[32:64, :, 0:8:2], [[10, 3], [1, 4]], channel_multiplier=100)
        return out(t)

    expected = np.zeros((64, 3, 8), np.int32)
    expected[32:, :, ::2] = affine(32, [[10, 3], [1, 4]], 0, 100).reshape(32, 3, 4)
    np.testing.assert_array_equal(run(kernel), expected)


def test_offset_may_be_a_register():
    x = normal(4, 6)

    def kernel(x):
        register = nisa.VirtualRegister(40)
        t, y = tile((4, 6), nl.int32), tile((4, 6))
        nisa.iota(t, [[1, 6]], register, 2)
        nisa.affine_select(y, [[1, 6]], 0, sb(x), 0.0, nl.less, nisa.VirtualRegister(-3))
        return out(t), out(y)

    t, y = run(kernel, x)
    np.testing.assert_array_equal(t, affine(4, [[1, 6]], 40, 2))
    np.testing.assert_array_equal(y, np.where(np.arange(6) < 3, x, 0))


@pytest.mark.parametrize(
    ("arguments", "operand", "rule", "received", "allowed"),
    [
        ({"pattern": [[1, 5]]}, "pattern", "elements", "5 of", "6"),
        ({"pattern": [[1, 1]] * 4 + [[1, 6]]}, "pattern", "dimensions", "5", "1..4"),
        ({"pattern": []}, "pattern", "dimensions", "0", "1..4"),
        ({"pattern": [1, 6]}, "pattern", "type", "[1, 6]", "[step, num]"),
        ({"pattern": [[1, 6, 1]]}, "pattern", "type", "[[1, 6, 1]]", "[step, num]"),
        ({"pattern": [[1.5, 6]]}, "pattern", "step", "1.5", "int32"),
        ({"pattern": [[2**31, 6]]}, "pattern", "step", str(2**31), "int32"),
        ({"pattern": [[1, 0]]}, "pattern", "num", "0", ">= 1"),
        ({"pattern": [[1, 2], [1, True]]}, "pattern", "num", "True", ">= 1"),
        ({"offset": 2**31}, "offset", "value", str(2**31), "int32"),
        ({"offset": 0.5}, "offset", "value", "0.5", "VirtualRegister"),
        ({"channel_multiplier": -(2**31) - 1}, "channel_multiplier", "value", "-2147483649", "int32"),
        ({"channel_multiplier": 1.0}, "channel_multiplier", "value", "1.0", "int32"),
    ],
)
def test_affine_patterns_are_checked(arguments, operand, rule, received, allowed):
    def iota():
        nisa.iota(**{"dst": tile((4, 6), nl.int32), "pattern": [[1, 6]], **arguments})

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(iota, instruction="iota", **facts)

    def select(x):
        common = {"dst": tile((4, 6)), "on_true_tile": sb(x), "on_false_value": 0.0}
        nisa.affine_select(**{**common, "pattern": [[1, 6]], "channel_multiplier": 0, **arguments})

    refused(select, normal(4, 6), instruction="affine_select", **facts)


def test_iota_refuses_psum_and_packed_types():
    def psum():
        nisa.iota(tile((4, 6), nl.int32, nl.psum), [[1, 6]])

    refused(psum, instruction="iota", operand="dst", rule="buffer", received="psum", allowed="sbuf")

    def packed():
        nisa.iota(tile((4, 6), nl.float8_e4m3fn_x4), [[1, 6]])

    refused(packed, instruction="iota", operand="dst", rule="dtype", received="x4", allowed="int32", target="trn3")


# -- affine_select

COMPARE = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}


@pytest.mark.parametrize("name", COMPARE)
@pytest.mark.parametrize(
    ("pattern", "offset", "multiplier"), [([[-1, 24]], 3, 1), ([[4, 2], [-3, 3], [1, 4]], -2, 1), ([[2**30, 24]], 5, 0)]
)
def test_affine_select_compares_with_zero(name, pattern, offset, multiplier):
    x = normal(16, 24)

    def kernel(x):
        y = tile(x.shape)
        nisa.affine_select(y, pattern, multiplier, sb(x), -9.5, getattr(nl, name), offset)
        return out(y)

    chosen = COMPARE[name](affine(16, pattern, offset, multiplier), 0)
    np.testing.assert_array_equal(run(kernel, x), np.where(chosen, x, np.float32(-9.5)))


def test_affine_select_compares_for_equality_by_default():
    x = normal(6, 6)

    def kernel(x):
        y = tile(x.shape)
        nisa.affine_select(dst=y, pattern=[[-1, 6]], channel_multiplier=1, on_true_tile=sb(x), on_false_value=0)
        return out(y)

    np.testing.assert_array_equal(run(kernel, x), np.diag(np.diag(x)))


def test_affine_select_causal_mask_in_place_with_the_smallest_float():
    x = normal(32, 40)
    smallest = float(np.finfo(np.float32).min)

    def kernel(x):
        t, b = sb(x), tile(x.shape, nl.bfloat16)
        nisa.affine_select(t, [[-1, 40]], 1, t, smallest, nl.greater_equal, 4)
        nisa.affine_select(b, [[-1, 40]], 1, t, smallest, nl.greater_equal, 4)
        return out(t), out(b)

    t, b = run(kernel, x)
    expected = np.where(np.arange(40) <= np.arange(32)[:, None] + 4, x, np.float32(smallest))
    np.testing.assert_array_equal(t, expected)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(b, expected.astype(BF16))
    assert np.isneginf(b[0, 39].astype(np.float32))


def test_affine_select_keeps_bits_between_equal_dtypes_only():
    x = np.array([[2**24 + 1, 2**31 - 1, -5, 7]], np.int32)

    def kernel(x):
        t, same, other = sb(x), tile(x.shape, nl.int32), tile(x.shape, nl.uint32)
        nisa.affine_select(same, [[1, 4]], 0, t, 2.5, nl.less, -3)
        nisa.affine_select(other, [[1, 4]], 0, t, 2.5, nl.less, -3)
        return out(same), out(other)

    same, other = run(kernel, x)
    np.testing.assert_array_equal(same, [[2**24 + 1, 2**31 - 1, -5, 2]])
    np.testing.assert_array_equal(other, [[2**24, 2**31, 0, 2]])


@pytest.mark.parametrize("precise", [True, False])
def test_affine_select_in_half_precision(precise):
    x = normal(8, 10)

    def kernel(x):
        y = tile(x.shape, nl.bfloat16)
        nisa.affine_select(y, [[-1, 10]], 1, sb(x, nl.bfloat16), 0.1, nl.greater)
        return out(y)

    fill = np.float32(0.1).astype(BF16)
    expected = np.where(np.arange(8)[:, None] > np.arange(10), x.astype(BF16), fill)
    np.testing.assert_array_equal(run(kernel, x, precise=precise), expected)


@pytest.mark.parametrize(
    ("make", "operand", "rule", "received", "allowed"),
    [
        (lambda: {"dst": tile((4, 6), nl.float32, nl.psum)}, "dst", "buffer", "psum", "sbuf"),
        (lambda: {"on_true_tile": tile((4, 6), nl.float32, nl.psum)}, "on_true_tile", "buffer", "psum", "sbuf"),
        (lambda: {"on_true_tile": tile((3, 6))}, "on_true_tile", "partitions", "3", "4"),
        (lambda: {"on_true_tile": tile((4, 5))}, "on_true_tile", "elements per partition", "5", "6"),
        (lambda: {"on_true_tile": tile((4, 6))}, "on_true_tile", "uninitialized read", "24 of 24", "written"),
        (lambda: {"cmp_op": nl.add}, "cmp_op", "operator", "add", "nl.greater_equal"),
        (lambda: {"cmp_op": None}, "cmp_op", "operator", "None", "nl.equal"),
        (lambda: {"on_false_value": "0"}, "on_false_value", "type", "str", "a number"),
        (lambda: {"on_false_value": False}, "on_false_value", "type", "bool", "a number"),
        (lambda: {"on_false_value": tile((4, 1))}, "on_false_value", "type", "NkiTensor", "a number"),
    ],
)
def test_affine_select_refuses(make, operand, rule, received, allowed):
    def kernel(x):
        common = {"dst": tile((4, 6)), "pattern": [[1, 6]], "channel_multiplier": 0, "on_false_value": 0.0}
        nisa.affine_select(**{**common, "on_true_tile": sb(x), **make()})

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(kernel, normal(4, 6), instruction="affine_select", **facts)


# -- tensor_partition_reduce


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("add", lambda x: x.sum(0)),
        ("average", lambda x: x.mean(0)),
        ("maximum", lambda x: x.max(0)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int16])
def test_partition_reduce(name, exact, dtype):
    x = (100 * normal(96, 3, 7)).astype(dtype)

    def kernel(x):
        y, b = tile((1, 21)), tile((1, 3, 7), nl.bfloat16)
        nisa.tensor_partition_reduce(y, getattr(nl, name), sb(x))
        nisa.tensor_partition_reduce(b, getattr(nl, name), sb(x))
        return out(y), out(b)

    y, b = run(kernel, x)
    expected = exact(x.astype(np.float64))
    np.testing.assert_allclose(y.reshape(3, 7), expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(b, y.astype(BF16).reshape(1, 3, 7))


@pytest.mark.parametrize(("name", "ufunc"), [("bitwise_or", np.bitwise_or), ("bitwise_and", np.bitwise_and)])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int8])
def test_partition_reduce_of_bits(name, ufunc, dtype):
    info = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(info.min, info.max, (5, 9), dtype, endpoint=True)
    x |= dtype(64)

    def kernel(x):
        t = sb(x)
        y = tile((1, 9), x.dtype)
        nisa.tensor_partition_reduce(y, getattr(nl, name), t)
        return out(y)

    np.testing.assert_array_equal(run(kernel, x)[0], ufunc.reduce(x, axis=0))


def test_partition_reduce_within_one_tile_and_of_one_partition():
    x = normal(64, 6)

    def kernel(x):
        t = sb(x)
        nisa.tensor_partition_reduce(t[0:1], nl.maximum, t[32:64])
        first = out(t[0:1])
        nisa.tensor_partition_reduce(t[0:1, ::2], nl.average, t[0:1, 1::2])
        return first, out(t[0:1])

    first, second = run(kernel, x)
    np.testing.assert_array_equal(first[0], x[32:].max(0))
    np.testing.assert_array_equal(second[0], np.repeat(x[32:].max(0)[1::2], 2))


@pytest.mark.parametrize(
    ("make", "operand", "rule", "received", "allowed"),
    [
        (lambda: {"dst": tile((4, 6))}, "dst", "partitions", "4", "1"),
        (lambda: {"dst": tile((1, 5))}, "data", "elements per partition", "6", "5"),
        (lambda: {"dst": tile((1, 6), nl.float32, nl.psum)}, "dst", "buffer", "psum", "sbuf"),
        (lambda: {"data": tile((4, 6), nl.float32, nl.psum)}, "data", "buffer", "psum", "sbuf"),
        (lambda: {"op": nl.minimum}, "op", "operator", "minimum", "nl.average"),
        (lambda: {"op": nl.bitwise_xor}, "op", "operator", "bitwise_xor", "nl.bitwise_or"),
        (lambda: {"op": nl.bitwise_or}, "dst", "bit operator", "float32", "int32"),
    ],
)
def test_partition_reduce_refuses(make, operand, rule, received, allowed):
    def kernel(x):
        nisa.tensor_partition_reduce(**{"dst": tile((1, 6)), "op": nl.add, "data": sb(x), **make()})

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(kernel, normal(4, 6), instruction="tensor_partition_reduce", **facts)


# -- records and signatures


def test_one_record_on_the_gpsimd_engine():
    def kernel(x, ids, index, local):
        t, i = sb(x), tile((16, 6), nl.int32)
        nisa.iota(i, [[1, 6]], name="i")
        nisa.affine_select(t, [[1, 6]], 1, t, 0.0, nl.less, nisa.VirtualRegister(1))
        nisa.tensor_partition_reduce(tile((1, 6)), nl.average, t)
        nisa.nc_n_gather(tile((16, 2)), t, sb(index))
        nisa.local_gather(tile((16, 20)), t, sb(local), 2, 10)
        nisa.nonzero_with_count(tile((16, 7), nl.int32), t)
        nisa.sequence_bounds(tile((1, 2, 3)), sb(ids))
        nisa.topk(tile((16, 4), nl.bfloat16), tile((16, 4), nl.uint32), sb(x, nl.bfloat16), 96)

    arrays = (normal(16, 6), np.ones((1, 3), np.float32), np.zeros((16, 2), np.uint32), np.zeros((16, 1), np.uint16))
    records = [r for r in traced(kernel, *arrays).records if r.instruction != "dma_copy"]
    assert {r.engine for r in records} == {Engine.gpsimd}
    assert records[0].name == "i"
    assert [(r.instruction, r.attrs) for r in records] == [
        ("iota", {"register_offset": False}),
        ("affine_select", {"op": "less", "register_offset": True}),
        ("tensor_partition_reduce", {"op": "average"}),
        ("nc_n_gather", {}),
        ("local_gather", {"num_elem_per_idx": 2, "num_valid_indices": 10}),
        ("nonzero_with_count", {}),
        ("sequence_bounds", {}),
        ("topk", {"n": 96, "k": 4}),
    ]
    assert [[a.operand for a in r.reads] for r in records] == [
        [],
        ["on_true_tile"],
        ["data"],
        ["indices", "data"],
        ["index", "src_buffer"],
        ["src"],
        ["segment_ids"],
        ["src"],
    ]
    assert all([a.operand for a in r.writes] == ["dst"] for r in records[:-1])
    assert [(a.operand, a.shape) for a in records[-1].writes] == [("val_dst", (16, 1)), ("idx_dst", (16, 1))]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("iota", "dst pattern offset channel_multiplier name"),
        ("affine_select", "dst pattern channel_multiplier on_true_tile on_false_value cmp_op offset name"),
        ("tensor_partition_reduce", "dst op data name"),
        ("nc_n_gather", "dst data indices name"),
        ("local_gather", "dst src_buffer index num_elem_per_idx num_valid_indices name"),
        ("nonzero_with_count", "dst src index_offset padding_val name"),
        ("sequence_bounds", "dst segment_ids name"),
        ("topk", "val_dst idx_dst src n name"),
    ],
)
def test_signatures(function, names):
    parameters = inspect.signature(getattr(nisa, function)).parameters
    assert list(parameters) == names.split()
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters.values())
