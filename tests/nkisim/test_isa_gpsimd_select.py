"""GpSimd Engine: gathers, top-k, nonzero positions and segment bounds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import integers, normal, out, refused, run, sb, tile

BF16 = ml_dtypes.bfloat16


# -- nc_n_gather


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32, np.uint8])
def test_n_gather_takes_elements_within_partitions(dtype):
    x = (50 * np.abs(normal(8, 4, 5))).astype(dtype)
    indices = integers(8, 33, low=0, high=20, dtype=np.uint32)

    def kernel(x, indices):
        y = tile((8, 3, 11), x.dtype)
        nisa.nc_n_gather(y, sb(x), sb(indices))
        return out(y)

    expected = np.take_along_axis(x.reshape(8, 20), indices.astype(np.int64), 1)
    np.testing.assert_array_equal(run(kernel, x, indices).reshape(8, 33), expected)


def test_n_gather_of_a_strided_view_in_place_and_of_packed_elements():
    x = integers(8, 12, low=-(2**31), high=2**31 - 1)
    indices = np.tile(np.array([[5, 0, 3, 3, 1, 4]], np.uint32), (8, 1))

    def kernel(x, indices):
        t, i, y = sb(x), sb(indices), tile((8, 6), nl.float8_e4m3fn_x4)
        nisa.nc_n_gather(y, t[:, 1::2].view(nl.float8_e4m3fn_x4), i)
        nisa.nc_n_gather(t[:, 0::2], t[:, 0::2], i)
        return out(y.view(nl.int32)), out(t)

    y, t = run(kernel, x, indices, target="trn3")
    np.testing.assert_array_equal(y, x[:, 1::2][:, indices[0]])
    np.testing.assert_array_equal(t[:, ::2], x[:, ::2][:, indices[0]])
    np.testing.assert_array_equal(t[:, 1::2], x[:, 1::2])


def test_n_gather_needs_only_the_gathered_elements():
    x = normal(4, 3)

    def gather(x, indices):
        t, y = tile((4, 9)), tile((4, 2))
        nisa.dma_copy(t[:, 3:6], x)
        nisa.nc_n_gather(y, t, sb(indices))
        return out(y)

    y = run(gather, x, np.full((4, 2), 5, np.uint32))
    np.testing.assert_array_equal(y, np.repeat(x[:, 2:], 2, 1))
    bad = np.full((4, 2), 5, np.uint32)
    bad[2, 1] = 6
    facts = {"operand": "data", "rule": "uninitialized read", "received": "first at (2, 6)", "allowed": "written"}
    refused(gather, x, bad, instruction="nc_n_gather", **facts)


def test_n_gather_from_and_to_columns_chosen_at_run_time():
    x, indices = normal(8, 12), np.tile(np.array([[2, 0]], np.uint32), (8, 1))

    def kernel(x, indices):
        t, y = sb(x), tile((8, 6))
        nisa.memset(y, 0.0)
        at = nisa.VirtualRegister(4)
        nisa.nc_n_gather(y[:, nl.ds(at, 2)], t[:, nl.ds(at, 3)], sb(indices))
        return out(y)

    expected = np.zeros((8, 6), np.float32)
    expected[:, 4:] = x[:, [6, 4]]
    np.testing.assert_array_equal(run(kernel, x, indices), expected)


@pytest.mark.parametrize(
    ("make", "operand", "rule", "received", "allowed"),
    [
        (lambda: {"dst": tile((4, 3), nl.bfloat16)}, "dst", "dtype", "bfloat16", "float32"),
        (lambda: {"dst": tile((4, 2))}, "indices", "elements per partition", "3", "2"),
        (lambda: {"dst": tile((8, 3))}, "data", "partitions", "4", "8"),
        (lambda: {"indices": tile((4, 3), nl.int32)}, "indices", "dtype", "int32", "uint32"),
        (lambda: {"indices": tile((2, 3), nl.uint32)}, "indices", "partitions", "2", "4"),
        (lambda: {"data": tile((4, 6), nl.float32, nl.psum)}, "data", "buffer", "psum", "sbuf"),
        (lambda: {"dst": tile((4, 3), nl.float32, nl.psum)}, "dst", "buffer", "psum", "sbuf"),
        (lambda: {"indices": tile((4, 3), nl.uint32, nl.psum)}, "indices", "buffer", "psum", "sbuf"),
        (lambda: {}, "indices", "index out of bounds", "6 at (1, 2)", "0..5"),
    ],
)
def test_n_gather_refuses(make, operand, rule, received, allowed):
    indices = np.zeros((4, 3), np.uint32)
    indices[1, 2] = 6

    def kernel(x, indices):
        nisa.nc_n_gather(**{"dst": tile((4, 3)), "data": sb(x), "indices": sb(indices), **make()})

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(kernel, normal(4, 6), indices, instruction="nc_n_gather", **facts)


# -- local_gather


def local_gather(x, index, run_length, count):
    """The documented semantics, index by index."""
    p = x.shape[0]
    flat = x.reshape(p, -1)
    y = np.zeros((p, count * run_length), x.dtype)
    for row in range(p):
        group = index[row // 16 * 16 : row // 16 * 16 + 16].flatten(order="F")
        for j in range(count):
            y[row, j * run_length : (j + 1) * run_length] = flat[row, group[j] : group[j] + run_length]
    return y


@pytest.mark.parametrize("run_length", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(("partitions", "count"), [(128, None), (32, 40), (16, 1)])
def test_local_gather(run_length, partitions, count):
    x = normal(partitions, 96)
    index = integers(partitions, 3, low=0, high=96 - run_length + 1, dtype=np.uint16)
    n = 48 if count is None else count

    def kernel(x, index):
        y = tile((partitions, n, run_length))
        nisa.local_gather(y, sb(x), sb(index), run_length, count)
        return out(y)

    got = run(kernel, x, index).reshape(partitions, -1)
    np.testing.assert_array_equal(got, local_gather(x, index, run_length, n))


def test_local_gather_into_a_part_of_a_tile_and_from_a_view():
    x = (100 * normal(32, 4, 12)).astype(np.int16)
    index = integers(32, 2, low=0, high=20, dtype=np.uint16)

    def kernel(x, index):
        t, y = sb(x), tile((32, 70), nl.int16)
        nisa.memset(y, 0)
        nisa.local_gather(y.ap([[70, 32], [2, 32]], offset=3), t[:, 1:3, 1:12], sb(index))
        return out(y)

    expected = np.zeros((32, 70), np.int16)
    expected[:, 3:67:2] = local_gather(np.ascontiguousarray(x[:, 1:3, 1:12]), index, 1, 32)
    np.testing.assert_array_equal(run(kernel, x, index), expected)


def test_local_gather_needs_only_valid_indices_and_gathered_elements():
    x = normal(16, 4)
    column = np.arange(16, dtype=np.uint16).reshape(16, 1) % 4

    def gather(x, column, count):
        t, index, y = tile((16, 9)), tile((16, 2), nl.uint16), tile((16, count))
        nisa.dma_copy(t[:, 5:9], x)
        nisa.dma_copy(index[:, 0:1], column)
        nisa.tensor_scalar(index[:, 0:1], index[:, 0:1], nl.add, 5.0)
        nisa.local_gather(y, t, index, num_valid_indices=count)
        return out(y)

    np.testing.assert_array_equal(run(gather, x, column, 16), np.tile(x, (1, 4)))
    facts = {"operand": "index", "rule": "uninitialized read", "received": "first at (0, 1)", "allowed": "written"}
    refused(gather, x, column, 17, instruction="local_gather", **facts)


@pytest.mark.parametrize(
    ("make", "operand", "rule", "received", "allowed"),
    [
        (lambda: {"num_elem_per_idx": 3}, "num_elem_per_idx", "value", "3", "1, 2, 4, 8, 16, 32"),
        (lambda: {"num_elem_per_idx": 64}, "num_elem_per_idx", "value", "64", "32"),
        (lambda: {"num_elem_per_idx": 2}, "dst", "elements per partition", "32", "64, 32 indices times 2"),
        (lambda: {"num_valid_indices": 31}, "dst", "elements per partition", "32", "31"),
        (lambda: {"num_valid_indices": 33}, "num_valid_indices", "value", "33", "1..32"),
        (lambda: {"num_valid_indices": 0}, "num_valid_indices", "value", "0", "1..32"),
        (lambda: {"index": tile((16, 2), nl.int32)}, "index", "dtype", "int32", "uint16"),
        (lambda: {"index": tile((32, 2), nl.uint16)}, "index", "partitions", "32", "16"),
        (lambda: {"dst": tile((32, 32))}, "dst", "partitions", "32", "16"),
        (lambda: {"dst": tile((16, 32), nl.int32)}, "dst", "dtype", "int32", "float32"),
        (lambda: {"src_buffer": tile((8, 6))}, "src_buffer", "partitions", "8", "a multiple of 16"),
        (lambda: {"src_buffer": tile((16, 6), nl.float32, nl.psum)}, "src_buffer", "buffer", "psum", "sbuf"),
        (lambda: {"index": tile((16, 2), nl.uint16, nl.psum)}, "index", "buffer", "psum", "sbuf"),
        (lambda: {"dst": tile((16, 32), nl.float32, nl.psum)}, "dst", "buffer", "psum", "sbuf"),
        (
            lambda: {"index": tile((16, 257), nl.uint16), "dst": tile((16, 4112))},
            "index",
            "indices per GpSimd core",
            "4112",
            "1..4096",
        ),
        (lambda: {}, "index", "index out of bounds", "6 at (0, 19)", "0..5"),
        (
            lambda: {"num_elem_per_idx": 2, "num_valid_indices": 16, "src_buffer": tile((16, 5))},
            "index",
            "index out of bounds",
            "4 at (0, 7)",
            "0..3",
        ),
    ],
)
def test_local_gather_refuses(make, operand, rule, received, allowed):
    index = np.zeros((16, 2), np.uint16)
    index[3, 1] = 6
    index[7, 0] = 4

    def kernel(x, index):
        nisa.local_gather(**{"dst": tile((16, 32)), "src_buffer": sb(x), "index": sb(index), **make()})

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(kernel, normal(16, 6), index, instruction="local_gather", **facts)


# -- topk


def snake(lists, width):
    """Lists [groups, n] laid out over 16 partitions each; the rest is NaN."""
    groups, n = lists.shape
    t = np.full((groups * 16, width), np.nan, np.float32)
    for g in range(groups):
        for i in range(n):
            t[16 * g + i % 16, i // 16] = lists[g, i]
    return t.astype(BF16)


def unsnake(t, k):
    """The first k elements of each group's list."""
    return np.array([[t[16 * g + j % 16, j // 16] for j in range(k)] for g in range(t.shape[0] // 16)])


@pytest.mark.parametrize(
    ("groups", "n", "k", "width"), [(8, 42, 8, 3), (1, 8, 8, 1), (2, 160, 33, 10), (3, 37, 1, 5), (2, 64, 64, 4)]
)
def test_topk_finds_the_largest_of_each_group(groups, n, k, width):
    lists = np.random.default_rng(1).permuted(np.tile(np.arange(n) - n // 3, (groups, 1)), axis=1).astype(np.float32)

    def kernel(x):
        val, idx = tile((groups * 16, k), nl.bfloat16), tile((groups * 16, k), nl.uint32)
        nisa.topk(val, idx, sb(x), n)
        columns = -(-k // 16)
        return out(val[:, :columns]), out(idx[:, :columns])

    val, idx = run(kernel, snake(lists, width))
    values, indices = unsnake(val.astype(np.float32), k), unsnake(idx, k)
    # Sets only: no order is to be relied on.
    np.testing.assert_array_equal(np.sort(values, 1), np.sort(lists, 1)[:, n - k :])
    np.testing.assert_array_equal(np.take_along_axis(lists, indices.astype(np.int64), 1), values)


def test_topk_of_equal_values_returns_different_positions():
    def kernel(x):
        val, idx = tile((16, 20), nl.bfloat16), tile((16, 20), nl.uint32)
        nisa.topk(val, idx, sb(x), 50)
        return out(val[:, :2]), out(idx[:, :2])

    val, idx = run(kernel, np.ones((16, 4), BF16))
    assert (unsnake(val, 20) == 1).all()
    positions = unsnake(idx, 20)[0]
    assert len(set(positions)) == 20
    assert positions.max() < 50


def test_topk_fills_the_last_column_and_leaves_the_others_undefined():
    def kernel(x, columns):
        val, idx = tile((16, 20), nl.bfloat16), tile((16, 20), nl.uint32)
        nisa.topk(val, idx, sb(x), 64)
        v, i = tile((16, columns), nl.bfloat16), tile((16, columns), nl.uint32)
        nisa.tensor_copy(i, idx[:, :columns])
        nisa.tensor_copy(v, val[:, :columns])
        return out(v), out(i)

    val, idx = run(kernel, normal(16, 4).astype(BF16), 2)
    assert np.isnan(val[4:, 1].astype(np.float32)).all()
    assert (idx[4:, 1] == 2**32 - 1).all()
    assert not np.isnan(val[:4, 1].astype(np.float32)).any()
    facts = {"operand": "src", "rule": "uninitialized read", "received": "16 of 48", "allowed": "written"}
    refused(kernel, normal(16, 4).astype(BF16), 3, instruction="tensor_copy", **facts)


def test_topk_reads_active_elements_only():
    x = normal(16, 2).astype(BF16)

    def kernel(x, n):
        t, val, idx = tile((16, 3), nl.bfloat16), tile((16, 1), nl.bfloat16), tile((16, 1), nl.uint32)
        nisa.dma_copy(t[0:10, 0:2], x[0:10])
        nisa.dma_copy(t[10:16, 0:1], x[10:16, 0:1])
        nisa.topk(val, idx, t, n)
        return out(idx)

    active = np.concatenate([x[:, 0], x[:10, 1]]).astype(np.float32)
    assert run(kernel, x, 26)[0, 0] == active.argmax()
    facts = {"operand": "src", "rule": "uninitialized read", "received": "first at (10, 1)", "allowed": "written"}
    refused(kernel, x, 27, instruction="topk", **facts)


@pytest.mark.parametrize(
    ("make", "operand", "rule", "received", "allowed"),
    [
        (lambda: {"n": 7}, "n", "value", "7", "8..65535"),
        (lambda: {"n": 65536}, "n", "value", "65536", "8..65535"),
        (lambda: {"n": 8.0}, "n", "value", "8.0", "8..65535"),
        (lambda: {"n": 65}, "src", "elements per partition", "4", ">= 5 for 65"),
        (lambda: {"n": 9, "k": 10}, "val_dst", "k, elements per partition", "10", "1..9"),
        (lambda: {"n": 40000, "k": 32768}, "val_dst", "k, elements per partition", "32768", "1..32767"),
        (lambda: {"src": tile((8, 4), nl.bfloat16)}, "src", "partitions", "8", "a multiple of 16"),
        (lambda: {"src": tile((16, 4))}, "src", "dtype", "float32", "bfloat16"),
        (lambda: {"src": tile((32, 4), nl.bfloat16)}, "val_dst", "partitions", "16", "32"),
        (lambda: {"src": tile((16, 4), nl.bfloat16, nl.psum)}, "src", "buffer", "psum", "sbuf"),
        (lambda: {"val_dst": tile((16, 8))}, "val_dst", "dtype", "float32", "bfloat16"),
        (lambda: {"val_dst": tile((16, 2, 4), nl.bfloat16)}, "val_dst", "shape", "[16, 2, 4]", "[16, k]"),
        (lambda: {"idx_dst": tile((16, 8), nl.int32)}, "idx_dst", "dtype", "int32", "uint32"),
        (lambda: {"idx_dst": tile((16, 9), nl.uint32)}, "idx_dst", "shape", "[16, 9]", "[16, 8]"),
    ],
)
def test_topk_refuses(make, operand, rule, received, allowed):
    def kernel(x):
        changes = make()
        k = changes.pop("k", 8)
        tiles = {"val_dst": tile((16, k), nl.bfloat16), "idx_dst": tile((16, k), nl.uint32)}
        nisa.topk(**{**tiles, "src": sb(x), "n": 64, **changes})

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(kernel, normal(16, 4).astype(BF16), instruction="topk", **facts)


# -- nonzero_with_count


def nonzero(row, offset, padding):
    found = [i + offset for i, v in enumerate(row) if v != 0]
    return [*found, *[padding] * (len(row) - len(found)), len(found)]


def test_nonzero_documented_example():
    def kernel(x):
        y = tile((1, 9), nl.int32)
        nisa.nonzero_with_count(y, sb(x), index_offset=16, padding_val=-1)
        return out(y)

    y = run(kernel, np.array([[0, 1, 1, 0, 0, 1, 0, 0]], np.int32))
    np.testing.assert_array_equal(y, [[17, 18, 21, -1, -1, -1, -1, -1, 3]])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("partitions", [128, 40, 1])
def test_nonzero_works_on_every_16th_partition(dtype, partitions):
    x = integers(partitions, 3, 7, low=-1, high=2).astype(dtype)
    x[0] = 0

    def kernel(x):
        y = tile((partitions, 22), nl.int32)
        nisa.memset(y, 77)
        nisa.nonzero_with_count(y, sb(x), -3, 5)
        return out(y)

    expected = np.full((partitions, 22), 77)
    for p in range(0, partitions, 16):
        expected[p] = nonzero(x[p].ravel(), -3, 5)
    np.testing.assert_array_equal(run(kernel, x), expected)


def test_nonzero_leaves_rows_of_idle_cores_undefined():
    x = np.array([[0.0, 2.0, 0.0]], np.float32)

    def kernel(x, p, defined):
        t, y = tile((64, 3)), tile((64, 4), nl.int32)
        nisa.dma_copy(t[0:1], x)
        if defined:
            nisa.memset(y, 0)
        nisa.nonzero_with_count(y, t)
        row = tile((1, 4), nl.int32)
        nisa.tensor_copy(row, y[p : p + 1])
        return out(row)

    np.testing.assert_array_equal(run(kernel, x, 0, False), [[1, -1, -1, 1]])
    facts = {"operand": "src", "rule": "uninitialized read", "received": "4 of 4", "allowed": "written"}
    refused(kernel, x, 32, False, instruction="tensor_copy", **facts)
    facts = {"operand": "src", "rule": "uninitialized read", "received": "partition 16", "allowed": "written"}
    refused(kernel, x, 0, True, instruction="nonzero_with_count", **facts)


def test_nonzero_refuses_rows_that_are_written_in_part_or_not_at_all():
    def kernel(x, n):
        t = tile((32, 3))
        nisa.dma_copy(t[16:17, 0:n], x[:, 0:n])
        nisa.nonzero_with_count(tile((32, 4), nl.int32), t)

    facts = {"operand": "src", "rule": "uninitialized read", "allowed": "written"}
    refused(kernel, np.ones((1, 3), np.float32), 2, instruction="nonzero_with_count", received="(16, 2)", **facts)

    def nothing():
        nisa.nonzero_with_count(tile((32, 4), nl.int32), tile((32, 3)))

    refused(nothing, instruction="nonzero_with_count", received="first at (0, 0)", **facts)


@pytest.mark.parametrize(
    ("make", "operand", "rule", "received", "allowed"),
    [
        (lambda: {"dst": tile((4, 6), nl.int32)}, "dst", "elements per partition", "6", "7, one more"),
        (lambda: {"dst": tile((8, 7), nl.int32)}, "dst", "partitions", "8", "4"),
        (lambda: {"dst": tile((4, 7), nl.uint32)}, "dst", "dtype", "uint32", "int32"),
        (lambda: {"dst": tile((4, 7), nl.int32, nl.psum)}, "dst", "buffer", "psum", "sbuf"),
        (lambda: {"src": tile((4, 6), nl.bfloat16)}, "src", "dtype", "bfloat16", "float32, int32"),
        (lambda: {"src": tile((4, 6), nl.int32, nl.psum)}, "src", "buffer", "psum", "sbuf"),
        (lambda: {"index_offset": 2**31}, "index_offset", "value", "2147483648", "int32"),
        (lambda: {"padding_val": 0.5}, "padding_val", "value", "0.5", "int32"),
    ],
)
def test_nonzero_refuses(make, operand, rule, received, allowed):
    def kernel(x):
        nisa.nonzero_with_count(**{"dst": tile((4, 7), nl.int32), "src": sb(x), **make()})

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(kernel, normal(4, 6), instruction="nonzero_with_count", **facts)


def test_nonzero_needs_neuroncore_v3():
    def kernel(x):
        nisa.nonzero_with_count(tile((4, 7), nl.int32), sb(x))

    facts = {"rule": "target", "received": "trn1", "allowed": "NeuronCore-v3"}
    refused(kernel, normal(4, 6), instruction="nonzero_with_count", target="trn1", **facts)


# -- sequence_bounds


def bounds(ids):
    n = len(ids)
    start, end = [], []
    for i, v in enumerate(ids):
        if v == 0:
            start.append(n)
            end.append(-1)
            continue
        a = i
        while a > 0 and ids[a - 1] == v:
            a -= 1
        b = i
        while b < n and ids[b] == v:
            b += 1
        start.append(a)
        end.append(b)
    return np.array([start, end])


@pytest.mark.parametrize("source", [np.int32, np.float32])
@pytest.mark.parametrize("target", [nl.int32, nl.float32])
@pytest.mark.parametrize(
    "ids",
    [
        [0, 1, 1, 2, 2, 2, 0, 3, 3],
        [4],
        [0],
        [0, 0, 7],
        [5, 5, 0, 0, 5, 1, 1],
        list(np.sort(np.random.default_rng(0).integers(0, 12, 40))),
    ],
)
def test_sequence_bounds(source, target, ids):
    def kernel(x):
        y = tile((1, 2, x.shape[1]), target)
        nisa.sequence_bounds(y, sb(x))
        return out(y)

    y = run(kernel, np.array([ids], source))
    assert y.dtype == target.numpy
    np.testing.assert_array_equal(y[0], bounds(ids))


@pytest.mark.parametrize(
    ("make", "operand", "rule", "received", "allowed"),
    [
        (lambda: {"dst": tile((1, 8), nl.int32)}, "dst", "elements per partition", "8", "12"),
        (lambda: {"dst": tile((2, 12), nl.int32)}, "dst", "partitions", "2", "1"),
        (lambda: {"segment_ids": tile((2, 6), nl.int32)}, "segment_ids", "partitions", "2", "1"),
        (lambda: {"segment_ids": tile((1, 6), nl.uint32)}, "segment_ids", "dtype", "uint32", "float32, int32"),
        (lambda: {"dst": tile((1, 2, 6), nl.bfloat16)}, "dst", "dtype", "bfloat16", "float32, int32"),
        (lambda: {"dst": tile((1, 2, 6), nl.int32, nl.psum)}, "dst", "buffer", "psum", "sbuf"),
        (lambda: {"segment_ids": tile((1, 6), nl.int32, nl.psum)}, "segment_ids", "buffer", "psum", "sbuf"),
        (lambda: {}, "segment_ids", "value", "-1", "non-negative integers"),
    ],
)
def test_sequence_bounds_refuses(make, operand, rule, received, allowed):
    def kernel(x):
        nisa.sequence_bounds(**{"dst": tile((1, 2, 6), nl.int32), "segment_ids": sb(x), **make()})

    facts = {"operand": operand, "rule": rule, "received": received, "allowed": allowed}
    refused(kernel, np.array([[0, 1, 1, -1, 0, 2]], np.int32), instruction="sequence_bounds", **facts)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_sequence_bounds_refuses_fractions(value):
    def kernel(x):
        nisa.sequence_bounds(tile((1, 2, 2)), sb(x))

    facts = {"operand": "segment_ids", "rule": "value", "received": str(value), "allowed": "non-negative integers"}
    refused(kernel, np.array([[1.0, value]], np.float32), instruction="sequence_bounds", **facts)
