"""tensor_copy_predicated and nc_stream_shuffle."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nkisim import NkiError
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16


def bits(x):
    """The bit patterns of an array."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


# ---------------------------------------------------------------------------------------------------
# tensor_copy_predicated


@pytest.mark.parametrize("predicate_dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("in_psum", ["", "src", "predicate", "dst"])
def test_predicated_copy_of_a_tile(predicate_dtype, reverse, in_psum):
    x, y = normal(32, 12, dtype=BF16), normal(32, 12, seed=1, dtype=BF16)
    p = integers(32, 12, low=0, high=3, seed=2, dtype=predicate_dtype)
    p[p == 2] = np.iinfo(predicate_dtype).max

    def kernel(x, y, p):
        dst, src, predicate = [(ps if n == in_psum else sb)(t) for n, t in (("dst", y), ("src", x), ("predicate", p))]
        nisa.tensor_copy_predicated(dst, src, predicate.reshape((32, 3, 4)), reverse_pred=reverse)
        return out(dst)

    expected = np.where((p != 0) != reverse, x, y)
    np.testing.assert_array_equal(bits(run(kernel, x, y, p)), bits(expected))


def test_predicated_copy_keeps_bits():
    x = np.array([[0x7F800001, 0xFFC12345, 0x80000000, 7]], np.uint32)
    y = np.array([[0x7F800002, 0xFFC54321, 0x80000001, 8]], np.uint32)
    p = np.array([[1, 0, 1, 0]], np.uint8)

    def kernel(x, y, p):
        dst = sb(y)
        nisa.tensor_copy_predicated(dst.view(nl.float32), sb(x).view(nl.float32), sb(p))
        nisa.tensor_copy_predicated(dst.view(nl.tfloat32), sb(x).view(nl.tfloat32), sb(p))
        return out(dst)

    np.testing.assert_array_equal(run(kernel, x, y, p), np.where(p != 0, x, y))


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.float32, -3e38), (BF16, 1.00390625), (np.int32, 2**24 + 1), (np.float16, 2)]
)
def test_predicated_copy_of_a_number(dtype, value):
    y, p = integers(4, 8, low=-9, high=9, dtype=dtype), integers(4, 8, low=0, high=2, seed=1, dtype=np.uint8)

    def kernel(y, p):
        dst = sb(y)
        nisa.tensor_copy_predicated(dst, value, sb(p))
        return out(dst)

    expected = y.copy()
    expected[p != 0] = dtype(value)
    np.testing.assert_array_equal(run(kernel, y, p), expected)


def test_predicated_copy_leaves_undefined_elements_undefined():
    p = np.array([[1, 0, 1, 1]], np.uint8)

    def kernel(p, upto):
        dst, src = tile((1, 4)), tile((1, 4))
        nisa.memset(src, 1.0)
        nisa.tensor_copy_predicated(dst, src, sb(p))
        return out(dst[:, upto:4])

    np.testing.assert_array_equal(run(lambda p: kernel(p, 2), p), np.ones((1, 2), np.float32))
    with pytest.raises(NkiError, match=r"1 of 3 elements never written, first at \(0, 0\)"):
        run(lambda p: kernel(p, 1), p)


def test_predicated_copy_in_place_and_strided():
    x = np.arange(32, dtype=np.float32).reshape(2, 16)
    p = integers(2, 8, low=0, high=2, dtype=np.uint8)

    def kernel(x, p):
        t = sb(x)
        nisa.tensor_copy_predicated(t[:, 0:16:2], t[:, 1:16:2], sb(p))
        return out(t)

    expected = x.copy()
    expected[:, ::2] = np.where(p != 0, x[:, 1::2], x[:, ::2])
    np.testing.assert_array_equal(run(kernel, x, p), expected)


def test_predicated_copy_needs_only_the_chosen_elements():
    def kernel(p, marked):
        dst, src, predicate = tile((1, 4)), tile((1, 4)), sb(p)
        nisa.memset(dst, 0.0)
        nisa.memset(src[:, 0:marked], 1.0)
        nisa.tensor_copy_predicated(dst, src, predicate)
        return out(dst)

    p = np.array([[1, 0, 1, 0]], np.uint8)
    np.testing.assert_array_equal(run(lambda p: kernel(p, 3), p), np.float32([[1, 0, 1, 0]]))
    with pytest.raises(NkiError, match=r"tensor_copy_predicated.src: uninitialized read"):
        run(lambda p: kernel(p, 2), p)


def test_predicated_copy_is_recorded_once():
    x, p = normal(4, 8), integers(4, 8, low=0, high=2, dtype=np.uint8)

    def kernel(x, p):
        t = sb(x)
        nisa.tensor_copy_predicated(t, sb(x), sb(p), reverse_pred=True)

    (record,) = [r for r in traced(kernel, x, p).records if r.instruction == "tensor_copy_predicated"]
    assert record.engine is Engine.vector
    assert record.attrs == {"reverse_pred": True}
    assert sorted(a.operand for a in record.reads) == ["predicate", "src"]
    assert [a.operand for a in record.writes] == ["dst"]


@pytest.mark.parametrize(
    ("call", "operand", "rule", "received", "allowed"),
    [
        (lambda s, t, p: (t, s, s), "predicate", "dtype", "float32", "uint8, uint16, uint32"),
        (lambda s, t, p: (t, s.view(nl.int32), p), "src", "dtype", "int32", "float32"),
        (lambda s, t, p: (t, s[:, 0:4], p), "src", "elements per partition", "4", "8"),
        (lambda s, t, p: (t, s, p[0:2]), "predicate", "partitions", "2", "4"),
        (lambda s, t, p: (t.view(nl.int32), 1.0, p), "src", "value of a int32 tile", "1.0", "integer literal"),
        (lambda s, t, p: (t, "1", p), "src", "type", "str", "a number"),
        (lambda s, t, p: (t, s, p, 1), "reverse_pred", "type", "1", "True or False"),
    ],
)
def test_predicated_copy_refuses(call, operand, rule, received, allowed):
    def kernel(x, p):
        nisa.tensor_copy_predicated(*call(sb(x), sb(x), sb(p)))

    refused(
        kernel,
        normal(4, 8),
        np.ones((4, 8), np.uint8),
        instruction="tensor_copy_predicated",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_predicated_copy_refuses_two_inputs_in_psum():
    refused(
        lambda x, p: nisa.tensor_copy_predicated(sb(x), ps(x), ps(p)),
        normal(4, 8),
        np.ones((4, 8), np.uint8),
        instruction="tensor_copy_predicated",
        operand="src",
        rule="buffer",
        received="psum",
        allowed="at most one",
    )


# ---------------------------------------------------------------------------------------------------
# nc_stream_shuffle

ROTATE = [(i + 5) % 32 for i in range(32)]


@pytest.mark.parametrize("buffers", [(sb, sb), (ps, sb), (sb, ps), (ps, ps)])
@pytest.mark.parametrize("partitions", [32, 64, 128])
def test_shuffle_moves_partitions_within_each_quadrant(buffers, partitions):
    x, y = normal(partitions, 6), normal(partitions, 6, seed=1)

    def kernel(x, y):
        src, dst = buffers[0](x), buffers[1](y)
        nisa.nc_stream_shuffle(dst, src, ROTATE)
        return out(dst)

    expected = np.concatenate([x[q : q + 32][ROTATE] for q in range(0, partitions, 32)])
    np.testing.assert_array_equal(run(kernel, x, y), expected)


def test_shuffle_keeps_partitions_marked_255_and_works_in_place():
    x = integers(64, 2, 3, low=-(2**31), high=2**31 - 1)
    mask = ROTATE.copy()
    mask[0] = mask[31] = 255

    def kernel(x):
        t = sb(x)
        nisa.nc_stream_shuffle(dst=t, src=t, shuffle_mask=tuple(mask))
        return out(t)

    expected = np.concatenate([x[q : q + 32][ROTATE] for q in (0, 32)])
    for p in (0, 31, 32, 63):
        expected[p] = x[p]
    np.testing.assert_array_equal(run(kernel, x), expected)


def test_shuffle_that_keeps_everything():
    x = normal(32, 3)

    def kernel(x):
        t = sb(x)
        nisa.nc_stream_shuffle(t, tile((32, 3)), [255] * 32)
        return out(t)

    np.testing.assert_array_equal(run(kernel, x), x)


def test_shuffle_broadcasts_one_partition_to_other_quadrants():
    x = normal(1, 5, dtype=BF16)

    def kernel(x):
        t, src = tile((128, 5), nl.bfloat16), sb(x)
        for q in range(4):
            n = 32 if q < 3 else 7
            nisa.nc_stream_shuffle(dst=t[32 * q : 32 * q + n], src=src, shuffle_mask=[0] * 32)
        return out(t[0:103])

    np.testing.assert_array_equal(run(kernel, x), np.repeat(x, 103, axis=0))


@pytest.mark.parametrize("row", [1, 2])
def test_shuffle_needs_only_the_partitions_it_names(row):
    def kernel():
        src, dst = tile((32, 4)), tile((32, 4))
        nisa.memset(src[0:2], 3.0)
        nisa.nc_stream_shuffle(dst, src, [row] * 32)
        return out(dst)

    if row == 1:
        np.testing.assert_array_equal(run(kernel), np.full((32, 4), 3.0, np.float32))
    else:
        with pytest.raises(NkiError, match=r"nc_stream_shuffle.src: uninitialized read: received 4 of 128"):
            run(kernel)


def test_shuffle_keeps_undefined_partitions_undefined():
    def kernel(stop):
        src, dst = tile((32, 4)), tile((32, 4))
        nisa.memset(src, 3.0)
        nisa.nc_stream_shuffle(dst, src, [0] * 16 + [255] * 16)
        return out(dst[0:stop])

    np.testing.assert_array_equal(run(lambda: kernel(16)), np.full((16, 4), 3.0, np.float32))
    with pytest.raises(NkiError, match="uninitialized read"):
        run(lambda: kernel(17))


def test_shuffle_of_strided_and_packed_tiles():
    x = integers(32, 8, low=0, high=2**31 - 1, dtype=np.uint32)

    def kernel(x):
        t, src = sb(x), sb(x)
        packed = nl.float8_e4m3fn_x4
        nisa.nc_stream_shuffle(t[:, 0:8:2].view(packed), src[:, 1:8:2].view(packed), ROTATE)
        return out(t)

    expected = x.copy()
    expected[:, ::2] = x[ROTATE, 1::2]
    np.testing.assert_array_equal(run(kernel, x, target="trn3"), expected)


def test_shuffle_is_recorded_once():
    x = normal(32, 3)

    def kernel(x):
        t = sb(x)
        nisa.nc_stream_shuffle(t, t, ROTATE, name="turn")

    (record,) = [r for r in traced(kernel, x).records if r.instruction == "nc_stream_shuffle"]
    assert record.engine is Engine.vector
    assert record.name == "turn"
    assert [a.operand for a in record.reads] == ["src"]
    assert [a.operand for a in record.writes] == ["dst"]


@pytest.mark.parametrize(
    ("mask", "rule", "received", "allowed"),
    [
        (ROTATE[:31], "length", "31 elements", "32 integers"),
        (np.arange(32), "length", "ndarray", "32 integers"),
        ([*ROTATE[:31], 32], "element 31", "32", "0..31 or 255"),
        ([-1, *ROTATE[1:]], "element 0", "-1", "0..31 or 255"),
        ([1.0, *ROTATE[1:]], "element 0", "1.0", "0..31 or 255"),
        ([True, *ROTATE[1:]], "element 0", "True", "0..31 or 255"),
        ([20] * 32, "partition outside src", "partition 20 for partition 0", "0..15"),
    ],
)
def test_shuffle_refuses_masks(mask, rule, received, allowed):
    refused(
        lambda x: nisa.nc_stream_shuffle(tile((32, 3)), sb(x), mask),
        normal(16, 3),
        instruction="nc_stream_shuffle",
        operand="shuffle_mask",
        rule=rule,
        received=received,
        allowed=allowed,
    )


def shuffling(src_start, dst_start, dst_partitions):
    """A kernel that shuffles 32 partitions at `src_start`."""

    def kernel():
        src, dst = tile((128, 2)), tile((128, 2))
        nisa.memset(src, 0.0)
        nisa.nc_stream_shuffle(dst[dst_start : dst_start + dst_partitions], src[src_start : src_start + 32], ROTATE)

    return kernel


@pytest.mark.parametrize(
    ("kernel", "rule", "received", "allowed"),
    [
        (lambda: nisa.nc_stream_shuffle(tile((32, 3), nl.int32), tile((32, 3)), ROTATE), "dtype", "float32", "int32"),
        (lambda: nisa.nc_stream_shuffle(tile((32, 4)), tile((32, 3)), ROTATE), "elements per partition", "3", "4"),
        (shuffling(32, 0, 64), "start partition of 64 active partitions", "32", "0, 64"),
        (shuffling(64, 0, 128), "start partition of 128 active partitions", "64", "0"),
        (shuffling(96, 0, 70), "start partition of 96 active partitions", "96", "0"),
    ],
)
def test_shuffle_refuses_sources(kernel, rule, received, allowed):
    refused(kernel, instruction="nc_stream_shuffle", operand="src", rule=rule, received=received, allowed=allowed)


def test_shuffle_refuses_a_dst_that_starts_where_the_larger_source_may_not():
    def kernel():
        src, dst = tile((64, 2)), tile((128, 2))
        nisa.memset(src, 0.0)
        nisa.nc_stream_shuffle(dst[32:64], src, ROTATE)

    refused(
        kernel,
        instruction="nc_stream_shuffle",
        operand="dst",
        rule="start partition of 64 active partitions",
        received="32",
        allowed="0, 64",
    )
