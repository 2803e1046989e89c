"""dma_transpose: direct and gathered, values, limits of each mode, trace."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16
AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def swapped(shape: Any) -> tuple[int, ...]:
    return (shape[-1], *shape[1:-1], shape[0])


def direct(x: Any, axes: Any = None, from_sbuf: bool = False, **arguments: Any) -> Any:
    """Inside a kernel: the transpose of an HBM tensor, by way of SBUF if asked."""
    t = tile(swapped(x.shape), x.dtype)
    nisa.dma_transpose(t, sb(x) if from_sbuf else x, axes, **arguments)
    return t


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("shape", [(5, 7), (300, 128), (1, 128), (6, 3, 5), (6, 2, 3, 5), (9, 1, 1, 1)])
@pytest.mark.parametrize("given", [True, False])
def test_direct_transposes(target, shape, given):
    x = normal(*shape)
    axes = AXES[len(shape)]

    def kernel(x):
        return out(direct(x, axes if given else None))

    np.testing.assert_array_equal(run(kernel, x, target=target), x.transpose(axes))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint16, np.float16, BF16])
def test_bits_survive(dtype):
    x = integers(7, 9, low=0, high=2**16, dtype=np.uint32)
    x = (x * np.uint32(65537)).view(dtype) if np.dtype(dtype).itemsize == 4 else x.astype(np.uint16).view(dtype)

    def kernel(x):
        t = direct(x, from_sbuf=True)
        o = nl.ndarray(t.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(o, t)
        return o

    bits = f"u{np.dtype(dtype).itemsize}"
    np.testing.assert_array_equal(run(kernel, x).view(bits), x.T.copy().view(bits))


def test_views_of_any_stride_and_start():
    x = normal(40, 4, 6)

    def kernel(x):
        t = tile((128, 64))
        nisa.memset(t, 0.0)
        nisa.dma_transpose(t[5:8, 2:62:6], x[0:10, 1, ::2])
        return out(t)

    expected = np.zeros((128, 64), np.float32)
    expected[5:8, 2:62:6] = x[0:10, 1, ::2].T
    np.testing.assert_array_equal(run(kernel, x), expected)


def test_in_place():
    x = normal(12, 12)

    def kernel(x):
        t = sb(x)
        nisa.dma_transpose(t, t)
        return out(t)

    np.testing.assert_array_equal(run(kernel, x), x.T)


def test_run_time_address():
    x = normal(5, 16, 8).astype(BF16)

    def kernel(x, index, mode, skip):
        t = tile((8, 16), nl.bfloat16)
        nisa.memset(t, 0.0)
        oob_mode = nisa.oob_mode.skip if skip else nisa.oob_mode.error
        view = x.select(0, nisa.register_alloc(index))
        nisa.dma_transpose(t, view, dge_mode=nisa.dge_mode[mode], oob_mode=oob_mode)
        return out(t)

    for mode in ("unknown", "hwdge"):
        np.testing.assert_array_equal(run(kernel, x, 3, mode, False), x[3].T)
    np.testing.assert_array_equal(run(kernel, x, 5, "unknown", True), np.zeros((8, 16), BF16))
    record = next(r for r in traced(kernel, x, -1, "hwdge", True).records if r.instruction == "dma_transpose")
    assert record.attrs["skipped"] is True
    assert record.writes == ()
    refused(
        kernel,
        x,
        5,
        "unknown",
        False,
        instruction="dma_transpose",
        operand="src",
        rule="run-time index out of bounds",
        received="5",
        allowed="0..4",
    )


HWDGE_OK = [(16, 128), (16, 1), (16, 1, 7), (1, 16, 7), (2, 8, 7), (4, 4, 7), (8, 6, 7), (16, 5, 3, 128), (1, 3, 32, 4)]


@pytest.mark.parametrize("shape", HWDGE_OK)
def test_hwdge_shapes(shape):
    x = normal(*shape).astype(BF16)

    def kernel(x):
        return out(direct(x, dge_mode=nisa.dge_mode.hwdge))

    np.testing.assert_array_equal(run(kernel, x), x.transpose(AXES[len(shape)]))


HWDGE_BAD = [
    ((15, 128), "rows under hwdge", "15", "16"),
    ((8, 128), "rows under hwdge", "8", "16"),
    ((32, 128), "rows under hwdge", "32", "16"),
    ((3, 16, 7), "rows under hwdge", "3", "1, 2, 4, 8, 16"),
    ((32, 16, 7), "rows under hwdge", "32", "1, 2, 4, 8, 16"),
    ((4, 3, 7), "first times second last dimension", "4 * 3", "a multiple of 16"),
    ((8, 16, 3, 7), "first times second last dimension", "8 * 3", "a multiple of 16"),
]


@pytest.mark.parametrize(("shape", "rule", "received", "allowed"), HWDGE_BAD)
def test_hwdge_limits(shape, rule, received, allowed):
    def kernel(x):
        nisa.dma_transpose(tile(swapped(x.shape), x.dtype), x, dge_mode=nisa.dge_mode.hwdge)

    refused(
        kernel,
        normal(*shape).astype(BF16),
        instruction="dma_transpose",
        operand="src",
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_hwdge_needs_two_bytes_and_generation_3():
    def kernel(x):
        nisa.dma_transpose(tile(swapped(x.shape), x.dtype), x, dge_mode=nisa.dge_mode.hwdge)

    refused(
        kernel,
        normal(16, 4),
        instruction="dma_transpose",
        operand="src",
        rule="dtype under hwdge",
        received="float32",
        allowed="2 bytes",
    )
    refused(
        kernel,
        normal(16, 4).astype(BF16),
        target="trn1",
        instruction="dma_transpose",
        operand="dge_mode",
        rule="hwdge on target",
        received="trn1",
        allowed="NeuronCore-v3",
    )


@pytest.mark.parametrize("mode", ["none", "swdge"])
def test_direct_modes(mode):
    def kernel(x):
        nisa.dma_transpose(tile(swapped(x.shape), x.dtype), x, dge_mode=nisa.dge_mode[mode])

    refused(
        kernel,
        normal(4, 4),
        instruction="dma_transpose",
        operand="dge_mode",
        rule="mode of a direct transpose",
        received=mode,
        allowed="unknown or hwdge",
    )


def _transpose(dst: Any, src: Any = lambda x: x, **arguments: Any) -> Any:
    def kernel(x):
        nisa.dma_transpose(dst(x), src(x), **arguments)

    return kernel


RULES = [
    (_transpose(lambda x: tile((4, 7))), "dst", "shape", "[4, 7]", "[4, 6]"),
    (_transpose(lambda x: tile((4, 1, 6))), "dst", "shape", "[4, 1, 6]", "[4, 6]"),
    (_transpose(lambda x: tile((4, 6), nl.bfloat16)), "dst", "dtype", "bfloat16", "float32"),
    (_transpose(lambda x: tile((4, 6), buffer=nl.psum)), "dst", "buffer", "psum", "sbuf"),
    (_transpose(lambda x: nl.ndarray((4, 6), x.dtype, buffer=nl.hbm)), "dst", "buffer", "private_hbm", "sbuf"),
    (
        _transpose(lambda x: tile((4, 6)), lambda x: tile((6, 4), buffer=nl.psum)),
        "src",
        "buffer",
        "psum",
        "sbuf or HBM",
    ),
    (_transpose(lambda x: tile((4, 6)), lambda x: x.reshape((24,))), "src", "dimensions", "1", "2, 3 or 4"),
    (_transpose(lambda x: tile((4, 6)), axes=(0, 1)), "axes", "axes of 2 dimensions", "(0, 1)", "(1, 0) or None"),
    (_transpose(lambda x: tile((4, 6)), axes=(2, 1, 0)), "axes", "axes of 2", "(2, 1, 0)", "(1, 0)"),
    (_transpose(lambda x: tile((4, 6)), axes=1), "axes", "axes of 2", "1", "(1, 0)"),
    (_transpose(lambda x: tile((4, 6)), priority=1), "priority", "target", "trn2", "None"),
    (_transpose(lambda x: tile((4, 6)), oob_mode=1), "oob_mode", "type", "1", "a member"),
    (_transpose(lambda x: tile((4, 6)), dge_mode="none"), "dge_mode", "type", "none", "a member"),
    (
        _transpose(lambda x: tile((4, 6)), oob_mode=nisa.oob_mode.skip),
        "oob_mode",
        "mode without a run-time index on src",
        "skip",
        "error",
    ),
    (
        _transpose(lambda x: tile((4, 6), nl.uint8), lambda x: tile((6, 4), nl.uint8)),
        "src",
        "dtype",
        "uint8",
        "2 or 4 bytes",
    ),
    (_transpose(lambda x: 1), "dst", "type", "int", "NkiTensor"),
    (
        _transpose(lambda x: tile((4, 1)).broadcast(1, 6)),
        "dst",
        "several elements at one address",
        "[4, 6]",
        "distinct",
    ),
]


@pytest.mark.parametrize(("kernel", "operand", "rule", "received", "allowed"), RULES)
def test_rules(kernel, operand, rule, received, allowed):
    refused(
        kernel,
        normal(6, 4),
        instruction="dma_transpose",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_priority_on_trn3():
    def kernel(x):
        direct(x, priority=2)

    assert traced(kernel, normal(3, 4), target="trn3").records[-1].attrs["priority"] == 2


def test_direct_transpose_is_recorded():
    def kernel(x):
        t = tile((4, 6))
        nisa.dma_transpose(t, x, name="turn")

    (record,) = traced(kernel, normal(6, 4)).records
    assert record.engine is Engine.dma
    assert record.name == "turn"
    assert record.attrs == {
        "dge": "unknown",
        "priority": None,
        "axes": (1, 0),
        "gather": False,
        "rows_skipped": 0,
        "skipped": False,
    }
    assert [(a.operand, a.shape) for a in (*record.writes, *record.reads)] == [("dst", (4, 6)), ("src", (6, 4))]


# -- gather and transpose


def cleared(n: int, *inner: int, dtype: Any) -> Any:
    """Inside a kernel: a zeroed destination for n gathered rows."""
    t = tile(swapped((n, *inner)), dtype)
    nisa.memset(t, 0)
    return t


def rows_of(x: Any, index: Any, n: int) -> Any:
    """Inside a kernel: n rows of an HBM tensor named by an index tensor."""
    inner = x.shape[1:]
    strides = [int(np.prod(inner[i:])) for i in range(1, len(inner) + 1)]
    pattern = [[int(np.prod(inner)), n], *([s, k] for s, k in zip(strides, inner, strict=True))]
    return x.ap(pattern, vector_offset=sb(index), indirect_dim=0)


GATHERS = [
    (128, 1, 128, (128,)),
    (16, 1, 16, (7,)),
    (48, 1, 32, (5,)),
    (128, 2, 256, (12,)),
    (128, 3, 272, (4,)),
    (16, 1, 16, (3, 5)),
    (32, 1, 32, (1, 3, 5)),
    (128, 2, 144, (2, 1, 6)),
]


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize(("partitions", "columns", "n", "inner"), GATHERS)
@pytest.mark.parametrize("mode", ["unknown", "swdge"])
def test_gathered_rows(target, partitions, columns, n, inner, mode):
    x = normal(50, *inner).astype(np.float16)
    index = integers(partitions, columns, low=0, high=50, dtype=np.uint32)

    def kernel(x, index):
        t = tile(swapped((n, *inner)), x.dtype)
        nisa.dma_transpose(t, rows_of(x, index, n), dge_mode=nisa.dge_mode[mode])
        return out(t)

    rows = x[index.T.reshape(-1)[:n]]
    np.testing.assert_array_equal(run(kernel, x, index, target=target), rows.transpose(AXES[rows.ndim]))


@pytest.mark.parametrize("inner", [(6,), (2, 3), (1, 2, 3)])
def test_skipped_rows_leave_dst_alone(inner):
    x = integers(9, *inner, low=1, high=1000, dtype=np.uint16)
    index = (np.arange(16).reshape(16, 1) % 9).astype(np.uint32)
    index[3], index[10] = 9, 0xFFFFFFFF

    def kernel(x, index, skip):
        t = cleared(16, *inner, dtype=x.dtype)
        oob_mode = nisa.oob_mode.skip if skip else nisa.oob_mode.error
        nisa.dma_transpose(t, rows_of(x, index, 16), oob_mode=oob_mode)
        return out(t)

    rows = x[np.where(index[:, 0] < 9, index[:, 0], 0)]
    rows[[3, 10]] = 0
    np.testing.assert_array_equal(run(kernel, x, index, True), rows.transpose(AXES[rows.ndim]))
    record = next(r for r in traced(kernel, x, index, True).records if r.instruction == "dma_transpose")
    assert record.attrs["rows_skipped"] == 2
    assert record.attrs["skipped"] is False
    assert record.attrs["dge"] == "swdge"
    assert record.attrs["gather"] is True
    source = next(a for a in record.reads if a.operand == "src")
    size = int(np.prod(inner))
    assert source.rows == tuple(size * int(i) for i in index[:, 0] if i < 9)
    refused(
        kernel,
        x,
        index,
        False,
        instruction="dma_transpose",
        operand="src",
        rule="run-time row index out of bounds in partition 3",
        received="9",
        allowed="0..8",
    )


def test_skipped_rows_stay_undefined():
    x = normal(9, 6).astype(BF16)
    index = np.zeros((16, 1), np.uint32)
    index[3] = 9

    def kernel(x, index):
        t = tile((6, 16), nl.bfloat16)
        source = x.ap([[6, 16], [1, 6]], vector_offset=sb(index))
        nisa.dma_transpose(t, source, oob_mode=nisa.oob_mode.skip)
        nisa.dma_copy(nl.ndarray((6, 16), nl.bfloat16, buffer=nl.hbm), t)

    refused(
        kernel,
        x,
        index,
        instruction="dma_copy",
        operand="src",
        rule="uninitialized read",
        received="6 of 96 elements never written, first at (0, 3)",
        allowed="written before",
    )


def test_every_row_skipped():
    x, index = normal(9, 6).astype(BF16), np.full((16, 1), 2**31, np.uint32)

    def kernel(x, index):
        t = cleared(16, 6, dtype=x.dtype)
        nisa.dma_transpose(t, rows_of(x, index, 16), oob_mode=nisa.oob_mode.skip)
        return out(t)

    np.testing.assert_array_equal(run(kernel, x, index), np.zeros((6, 16), BF16))
    record = next(r for r in traced(kernel, x, index).records if r.instruction == "dma_transpose")
    assert record.attrs["skipped"] is True
    assert record.attrs["rows_skipped"] == 16


GATHER_RULES = [
    ((16, 1), np.uint32, 16, (2, 3, 4), "middle dimensions of a gather", "[2, 3]", "one of the two is 1"),
    ((48, 1), np.uint32, 24, (4,), "gathered rows", "24", "a multiple of 16"),
    ((24, 1), np.uint32, 16, (4,), "partitions of the indices", "24", "a multiple of 16 in 16..128"),
    ((16, 1), np.int32, 16, (4,), "dtype of the indices", "int32", "uint32"),
    ((64, 2), np.uint32, 128, (4,), "partitions of indices with several columns", "64", "128"),
]


@pytest.mark.parametrize(("shape", "kind", "n", "inner", "rule", "received", "allowed"), GATHER_RULES)
def test_gather_limits(shape, kind, n, inner, rule, received, allowed):
    def kernel(x, index):
        nisa.dma_transpose(tile(swapped((n, *inner)), x.dtype), rows_of(x, index, n))

    refused(
        kernel,
        normal(4, *inner).astype(BF16),
        np.zeros(shape, kind),
        instruction="dma_transpose",
        operand="src",
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_gather_type_generation_and_modes():
    index = np.zeros((16, 1), np.uint32)

    def kernel(x, index, mode):
        source = x.ap([[4, 16], [1, 4]], vector_offset=sb(index))
        nisa.dma_transpose(tile((4, 16), x.dtype), source, dge_mode=nisa.dge_mode[mode])

    refused(
        kernel,
        normal(4, 4),
        index,
        "unknown",
        instruction="dma_transpose",
        operand="src",
        rule="dtype under hwdge or a gather",
        received="float32",
        allowed="2 bytes",
    )
    refused(
        kernel,
        normal(4, 4).astype(BF16),
        index,
        "unknown",
        target="trn1",
        instruction="dma_transpose",
        operand="src",
        rule="gather and transpose on target",
        received="trn1",
        allowed="NeuronCore-v3",
    )
    for mode in ("hwdge", "none"):
        refused(
            kernel,
            normal(4, 4).astype(BF16),
            index,
            mode,
            instruction="dma_transpose",
            operand="dge_mode",
            rule="mode with vector_offset",
            received=mode,
            allowed="swdge or unknown",
        )


def test_index_has_enough_elements():
    def kernel(x, index):
        x.ap([[4, 32], [1, 4]], vector_offset=sb(index))

    refused(
        kernel,
        normal(4, 4).astype(BF16),
        np.zeros((16, 1), np.uint32),
        instruction="NkiTensor.ap",
        operand="vector_offset",
        rule="number of elements",
        received="16",
        allowed="at least 32",
    )
