"""dma_copy with run-time addresses: scalar offsets, gathers and scatters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.dma_kernels import BF16, fill, hbm
from tests.nkisim.harness import integers, normal, out, refused, run, sb, tile, traced


def at(value: int, how: str, dtype: Any = nl.int32) -> Any:
    """A run-time scalar: a register, or a 1x1 SBUF tensor."""
    if how == "register":
        return nisa.register_alloc(value)
    t = tile((1, 1), dtype)
    return fill(t, value)


# -- scalar offsets


@pytest.mark.parametrize("how", ["register", "tensor"])
def test_scalar_offset_on_source_and_destination(how):
    x = normal(6, 4, 5)

    def kernel(x):
        o = fill(tile((4, 15)), 0.0)
        nisa.dma_copy(o.ap([[15, 4], [1, 5]], scalar_offset=at(10, how), indirect_dim=1), x.select(0, at(4, how)))
        b = hbm((2, 5))
        nisa.dma_copy(b, x.ap([[20, 2], [1, 5]], offset=5, scalar_offset=at(3, how), indirect_dim=0))
        c = hbm((4, 2))
        nisa.dma_copy(c, x[1, :, nl.ds(at(3, how), 2)])
        d = hbm((5,))
        nisa.dma_copy(d, x[2, at(1, how), :])
        return out(o), b, c, d

    a, b, c, d = run(kernel, x)
    expected = np.zeros((4, 15), np.float32)
    expected[:, 10:] = x[4]
    np.testing.assert_array_equal(a, expected)
    np.testing.assert_array_equal(b, x[3:5, 1])
    np.testing.assert_array_equal(c, x[1, :, 3:])
    np.testing.assert_array_equal(d, x[2, 1])


def test_scalar_offset_follows_the_stride_of_the_dimension():
    x = np.arange(48, dtype=np.float32).reshape(6, 8)

    def kernel(x):
        o = hbm((1, 3))
        nisa.dma_copy(o, x[:, 0:4].ap([[8, 1], [1, 3]], scalar_offset=at(2, "register"), indirect_dim=0))
        # The index counts the base tensor's elements, whatever the type of the view.
        h = hbm((1, 2), nl.bfloat16)
        nisa.dma_copy(h, x.ap([[16, 1], [1, 2]], scalar_offset=at(9, "register"), indirect_dim=1, dtype=nl.bfloat16))
        return o, h

    o, h = run(kernel, x)
    np.testing.assert_array_equal(o, x[2:3, 0:3])
    np.testing.assert_array_equal(h.view(np.uint32), x.reshape(-1)[9:10].view(np.uint32).reshape(1, 1))


@pytest.mark.parametrize("how", ["register", "tensor"])
@pytest.mark.parametrize("value", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize("side", ["src", "dst"])
def test_scalar_index_out_of_bounds(how, value, side):
    x = normal(3, 2, 4)

    def build(oob_mode):
        def kernel(x):
            o = hbm(x.shape)
            nisa.dma_copy(o, x)
            other = fill(tile((2, 4)), 9.0)
            index = nisa.register_alloc(value) if how == "register" else sb(index_hbm(value))
            views = (other, x.select(0, index)) if side == "src" else (o.select(0, index), other)
            nisa.dma_copy(*views, oob_mode=oob_mode)
            return o, out(other)

        return kernel

    def index_hbm(value):
        return nl.shared_constant(np.array([[value]], np.int32))

    o, other = run(build(nisa.oob_mode.skip), x)
    np.testing.assert_array_equal(o, x)
    np.testing.assert_array_equal(other, np.full((2, 4), 9.0))
    trace = traced(build(nisa.oob_mode.skip), x)
    skipped = [r for r in trace.records if r.attrs.get("skipped")]
    assert len(skipped) == 1
    assert skipped[0].writes == ()
    assert skipped[0].attrs["rows_skipped"] == 0
    assert [a.operand for a in skipped[0].reads] == ([f"{side} index"] if how == "tensor" else [])
    refused(
        build(nisa.oob_mode.error),
        x,
        instruction="dma_copy",
        operand=side,
        rule="run-time index out of bounds",
        received=str(value),
        allowed="0..2",
    )


def test_negative_index_is_outside_even_with_an_offset():
    def kernel(x):
        nisa.dma_copy(tile((1, 4)), x.ap([[4, 1], [1, 4]], offset=8, scalar_offset=nisa.register_alloc(-1)))

    refused(
        kernel,
        normal(4, 4),
        instruction="dma_copy",
        operand="src",
        rule="run-time index out of bounds",
        received="-1",
        allowed="addresses inside",
    )


def test_run_time_slice_stays_inside():
    def kernel(x):
        t = sb(x)
        nisa.dma_copy(hbm((2, 3)), t[:, nl.ds(nisa.register_alloc(6), 3)])

    refused(
        kernel,
        normal(2, 8),
        instruction="dma_copy",
        operand="src",
        rule="run-time index out of bounds",
        received="6",
        allowed="0..5",
    )


def test_pattern_on_chip_stays_in_its_partitions():
    x = normal(4, 8)

    def kernel(x, index):
        o = hbm((4, 3))
        view = sb(x).ap([[8, 4], [1, 3]], offset=1, scalar_offset=nisa.register_alloc(index), indirect_dim=1)
        nisa.dma_copy(o, view)
        return o

    np.testing.assert_array_equal(run(kernel, x, 4), x[:, 5:8])
    refused(
        kernel,
        x,
        5,
        instruction="dma_copy",
        operand="src",
        rule="run-time index out of bounds",
        received="5",
        allowed="addresses inside",
    )


def test_partition_dimension_has_no_run_time_index():
    def pattern(x):
        sb(x).ap([[8, 2], [1, 8]], scalar_offset=nisa.register_alloc(1))

    def select(x):
        sb(x).select(0, nisa.register_alloc(1))

    for kernel, method, operand in ((pattern, "ap", "indirect_dim"), (select, "select", "key")):
        refused(
            kernel,
            normal(4, 8),
            instruction=f"NkiTensor.{method}",
            operand=operand,
            rule="dynamic index on the partition dimension",
            received="0",
            allowed="a free dimension",
        )


def test_scalar_index_operands():
    def wrong_shape(x):
        x.ap([[4, 1], [1, 4]], scalar_offset=sb(x))

    def in_hbm(x):
        x.ap([[4, 1], [1, 4]], scalar_offset=hbm((1, 1), nl.int32))

    def floats(x):
        x.ap([[4, 1], [1, 4]], scalar_offset=tile((1, 1)))

    for kernel in (wrong_shape, in_hbm, floats):
        refused(
            kernel,
            normal(2, 4),
            instruction="NkiTensor.ap",
            operand="scalar_offset",
            rule="index",
            received="NkiTensor",
            allowed="a register or an integer 1x1 SBUF tensor",
        )

    def float_register(x):
        register = nisa.register_alloc()
        nisa.register_load(register, x[0:1, 0:1])
        nisa.dma_copy(tile((1, 4)), x.select(0, register))

    refused(
        float_register,
        np.ones((2, 4), np.float32),
        instruction="dma_copy",
        operand="src",
        rule="register as an index",
        received="float 1.0",
        allowed="an integer register",
    )


def test_run_time_address_needs_a_mode_that_has_it():
    def kernel(x, mode):
        nisa.dma_copy(tile((1, 4)), x[nl.ds(nisa.register_alloc(1), 1), :], dge_mode=nisa.dge_mode[mode])

    for mode in ("unknown", "swdge", "hwdge"):
        record = traced(kernel, normal(2, 4), mode).records[-1]
        assert record.attrs["dge"] == mode
    refused(
        kernel,
        normal(2, 4),
        "none",
        instruction="dma_copy",
        operand="dge_mode",
        rule="mode with scalar_offset",
        received="none",
        allowed="unknown, swdge or hwdge",
    )


# -- gathers and scatters


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("kind", [np.int32, np.uint32])
def test_gather_rows(target, kind):
    x, index = normal(40, 6), integers(20, 1, low=0, high=40, dtype=kind)

    def kernel(x, index):
        i = sb(index)
        t = tile((20, 6))
        nisa.dma_copy(t, x.ap([[6, 20], [1, 6]], vector_offset=i, indirect_dim=0))
        u = hbm((20, 3))
        nisa.dma_copy(u, x.vector_select(0, i)[:, 1:4])
        v = tile((20, 2), nl.bfloat16)
        nisa.dma_copy(v, x.ap([[6, 20], [3, 2]], offset=1, vector_offset=i, indirect_dim=0))
        return out(t), u, out(v)

    t, u, v = run(kernel, x, index, target=target)
    rows = x[index[:, 0]]
    np.testing.assert_array_equal(t, rows)
    np.testing.assert_array_equal(u, rows[:, 1:4])
    np.testing.assert_array_equal(v, rows[:, 1::3].astype(BF16))


def test_gather_more_rows_than_partitions_into_hbm():
    x, index = normal(50, 3), integers(128, 1, low=0, high=50)

    def kernel(x, index):
        o = hbm((64, 2, 3))
        nisa.dma_copy(o, x.vector_select(0, sb(index)))
        return o

    np.testing.assert_array_equal(run(kernel, x, index), x[index[:, 0]].reshape(64, 2, 3))


def test_gather_of_a_4d_view():
    x, index = normal(9, 2, 3, 4), integers(5, 1, low=0, high=9, dtype=np.uint32)

    def kernel(x, index):
        t = tile((5, 3, 2, 4))
        nisa.dma_copy(t, x.vector_select(0, sb(index)).permute((0, 2, 1, 3)))
        return out(t)

    np.testing.assert_array_equal(run(kernel, x, index), x[index[:, 0]].transpose(0, 2, 1, 3))


def test_gather_from_a_slice_counts_from_the_slice():
    x, index = normal(30, 4), integers(6, 1, low=0, high=10)

    def kernel(x, index):
        t = tile((6, 4))
        nisa.dma_copy(t, x[20:30].vector_select(0, sb(index)))
        return out(t)

    np.testing.assert_array_equal(run(kernel, x, index), x[20 + index[:, 0]])

    def outside(x, index):
        nisa.dma_copy(tile((6, 4)), x[10:20].vector_select(0, sb(index)))

    # Both rows exist in the tensor, but not in the slice.
    for bad in (10, -1):
        refused(
            outside,
            x,
            np.array([[0], [1], [bad], [2], [3], [4]], np.int32),
            instruction="dma_copy",
            operand="src",
            rule="run-time row index out of bounds in partition 2",
            received=str(bad),
            allowed="0..9",
        )


def test_scatter_rows():
    x, index = normal(6, 5), np.array([[9], [0], [3], [7], [2], [11]], np.uint32)

    def kernel(x, index):
        o = hbm((12, 5))
        nisa.dma_copy(o, fill(tile((12, 5)), -1.0))
        nisa.dma_copy(o.ap([[5, 6], [1, 5]], vector_offset=sb(index), indirect_dim=0), sb(x))
        return o

    expected = np.full((12, 5), -1, np.float32)
    expected[index[:, 0]] = x
    np.testing.assert_array_equal(run(kernel, x, index), expected)


def test_scatter_into_an_argument_updates_the_array():
    x, index, cache = normal(3, 4), np.array([[4], [1], [0]], np.int32), np.zeros((5, 4), np.float32)

    def kernel(x, index, cache):
        nisa.dma_copy(cache.vector_select(0, sb(index)), x)

    run(kernel, x, index, cache)
    np.testing.assert_array_equal(cache[[4, 1, 0]], x)
    np.testing.assert_array_equal(cache[[2, 3]], 0)


def test_equal_scatter_indices_keep_the_last_row():
    x, index = normal(4, 3), np.array([[1], [1], [0], [1]], np.int32)

    def kernel(x, index):
        o = hbm((2, 3))
        nisa.dma_copy(o.vector_select(0, sb(index)), x)
        return o

    np.testing.assert_array_equal(run(kernel, x, index), x[[2, 3]])


def test_gather_into_scatter():
    x, take, put = normal(8, 3), np.array([[5], [9], [2], [7]], np.int32), np.array([[0], [1], [7], [3]], np.int32)

    def kernel(x, take, put):
        o = hbm((4, 3))
        nisa.dma_copy(o, fill(tile((4, 3)), 0.0))
        nisa.dma_copy(o.vector_select(0, sb(put)), x.vector_select(0, sb(take)), oob_mode=nisa.oob_mode.skip)
        return o

    expected = np.zeros((4, 3), np.float32)
    expected[0], expected[3] = x[5], x[7]  # row 1 has no source, row 2 no destination
    np.testing.assert_array_equal(run(kernel, x, take, put), expected)
    record = traced(kernel, x, take, put).records[-1]
    assert record.attrs["rows_skipped"] == 2
    assert record.attrs["skipped"] is False


BAD = [(np.int32, -1), (np.int32, 7), (np.int32, -(2**31)), (np.uint32, 0xFFFFFFFF), (np.uint32, 7)]


@pytest.mark.parametrize(("kind", "bad"), BAD)
def test_rows_out_of_bounds(kind, bad):
    x = normal(7, 4)
    index = np.array([[3], [0], [6], [2]]).astype(kind)
    index[1] = bad

    def gather(x, index, mode):
        t = fill(tile((4, 4)), 5.0)
        nisa.dma_copy(t, x.vector_select(0, sb(index)), oob_mode=nisa.oob_mode[mode])
        return out(t)

    def scatter(x, index, mode):
        o = hbm(x.shape)
        nisa.dma_copy(o, x)
        nisa.dma_copy(o.vector_select(0, sb(index)), fill(tile((4, 4)), 5.0), oob_mode=nisa.oob_mode[mode])
        return o

    expected = x[[3, 0, 6, 2]]
    expected[1] = 5.0
    np.testing.assert_array_equal(run(gather, x, index, "skip"), expected)
    expected = x.copy()
    expected[[3, 6, 2]] = 5.0
    np.testing.assert_array_equal(run(scatter, x, index, "skip"), expected)
    for kernel, operand in ((gather, "src"), (scatter, "dst")):
        refused(
            kernel,
            x,
            index,
            "error",
            instruction="dma_copy",
            operand=operand,
            rule="run-time row index out of bounds in partition 1",
            received=str(bad),
            allowed="0..6",
        )


def test_skipped_rows_stay_undefined():
    x, index = normal(7, 4), np.array([[3], [-1], [6]], np.int32)

    def kernel(x, index):
        t = tile((3, 4))
        nisa.dma_copy(t, x.vector_select(0, sb(index)), oob_mode=nisa.oob_mode.skip)
        nisa.dma_copy(hbm((3, 4)), t)

    refused(
        kernel,
        x,
        index,
        instruction="dma_copy",
        operand="src",
        rule="uninitialized read",
        received="4 of 12 elements never written, first at (1, 0)",
        allowed="written before",
    )

    def reshaped(x, index):
        o = hbm((2, 6))
        nisa.dma_copy(o, x.vector_select(0, sb(index)), oob_mode=nisa.oob_mode.skip)
        nisa.dma_copy(tile((2, 6)), o)

    refused(
        reshaped,
        x,
        index,
        instruction="dma_copy",
        operand="src",
        rule="uninitialized read",
        received="4 of 12 elements never written, first at (0, 4)",
        allowed="written before",
    )


def test_skip_into_rows_of_another_shape():
    x, index = normal(7, 4), np.array([[3], [-1], [6]], np.int32)

    def kernel(x, index):
        t = fill(tile((2, 6)), 5.0)
        nisa.dma_copy(t, x.vector_select(0, sb(index)), oob_mode=nisa.oob_mode.skip)
        return out(t)

    expected = np.concatenate([x[3], np.full(4, 5.0, np.float32), x[6]]).reshape(2, 6)
    np.testing.assert_array_equal(run(kernel, x, index), expected)


@pytest.mark.parametrize("kind", [np.int32, np.uint16, BF16])
def test_skip_keeps_bits_of_every_type(kind):
    x = integers(5, 4, low=1, high=2**15, dtype=np.uint16)
    x = x.view(kind) if kind is BF16 else (x.astype(kind) * (65537 if kind is np.int32 else 1)).astype(kind)

    def kernel(x, index):
        o = hbm((3, 4), x.dtype)
        nisa.dma_copy(o, x[0:3])
        nisa.dma_copy(o, x.vector_select(0, sb(index)), oob_mode=nisa.oob_mode.skip)
        return o

    got = run(kernel, x, np.array([[4], [5], [3]], np.int32))
    np.testing.assert_array_equal(got.view(np.uint8), x[[4, 1, 3]].view(np.uint8))


def test_all_rows_skipped_is_recorded():
    x, index = normal(5, 4), np.array([[-1], [9]], np.int32)

    def kernel(x, index):
        t = fill(tile((2, 4)), 0.0)
        nisa.dma_copy(t, x.vector_select(0, sb(index)), oob_mode=nisa.oob_mode.skip)
        return out(t)

    np.testing.assert_array_equal(run(kernel, x, index), np.zeros((2, 4)))
    trace = traced(kernel, x, index)
    record = next(r for r in trace.records if r.attrs.get("skipped"))
    assert record.attrs["rows_skipped"] == 2
    assert [a.rows for a in record.writes] == [()]
    assert [a.n_elements for a in record.writes] == [0]


def test_gathered_rows_must_be_written():
    def kernel(x, index):
        o = hbm((4, 3))
        nisa.dma_copy(o[0:2], x)
        nisa.dma_copy(tile((2, 3)), o.vector_select(0, sb(index)))

    x = normal(2, 3)
    traced(kernel, x, np.array([[1], [0]], np.int32))
    refused(
        kernel,
        x,
        np.array([[1], [2]], np.int32),
        instruction="dma_copy",
        operand="src",
        rule="uninitialized read",
        received="3 of 6 elements never written, first at (1, 0)",
        allowed="written before",
    )


def test_vector_offset_rules():
    index = np.zeros((4, 1), np.int32)

    def mode(x, index, mode):
        nisa.dma_copy(tile((4, 4)), x.vector_select(0, sb(index)), dge_mode=nisa.dge_mode[mode])

    for name in ("hwdge", "none"):
        refused(
            mode,
            normal(5, 4),
            index,
            name,
            instruction="dma_copy",
            operand="dge_mode",
            rule="mode with vector_offset",
            received=name,
            allowed="swdge or unknown",
        )
    for name in ("unknown", "swdge"):
        assert traced(mode, normal(5, 4), index, name).records[-1].attrs["dge"] == "swdge"

    def on_chip(x, index):
        sb(x).ap([[4, 4], [1, 4]], vector_offset=sb(index))

    refused(
        on_chip,
        normal(5, 4),
        index,
        instruction="NkiTensor.ap",
        operand="vector_offset",
        rule="buffer",
        received="sbuf",
        allowed="HBM",
    )

    def columns(x, index):
        nisa.dma_copy(tile((4, 4)), x.ap([[4, 4], [1, 4]], vector_offset=sb(index)))

    refused(
        columns,
        normal(5, 4),
        np.zeros((4, 2), np.int32),
        instruction="dma_copy",
        operand="src",
        rule="shape of vector_offset",
        received="[4, 2]",
        allowed="[4, 1]",
    )

    def floats(x, index):
        x.ap([[4, 4], [1, 4]], vector_offset=sb(index))

    refused(
        floats,
        normal(5, 4),
        index.astype(np.float32),
        instruction="NkiTensor.ap",
        operand="vector_offset",
        rule="index",
        received="float32",
        allowed="int32 or uint32",
    )


def test_indirect_columns_are_no_dma_operand():
    def kernel(x, index):
        nisa.dma_copy(tile((16, 4)), sb(x).indirect(sb(index), 4))

    refused(
        kernel,
        normal(16, 4),
        np.zeros((16, 1), np.uint32),
        target="trn3",
        instruction="dma_copy",
        operand="src",
        rule="tensor indirection",
        received=".indirect() view",
        allowed="vector_select",
    )


def test_dma_copy_is_recorded():
    x, index = normal(6, 4), np.array([[5], [-1], [2]], np.int32)

    def kernel(x, index):
        t = tile((6, 4))
        nisa.dma_copy(t, x, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar, name="load")
        g = tile((3, 4))
        nisa.dma_copy(g, x.vector_select(0, sb(index)), oob_mode=nisa.oob_mode.skip)

    records = traced(kernel, x, index).records
    assert [r.engine for r in records] == [Engine.dma] * 3
    assert [r.instruction for r in records] == ["dma_copy"] * 3
    assert records[0].name == "load"
    assert records[0].attrs == {
        "dge": "hwdge",
        "priority": None,
        "trigger": "scalar",
        "rows_skipped": 0,
        "skipped": False,
    }
    assert records[2].attrs["dge"] == "swdge"
    assert records[2].attrs["rows_skipped"] == 1
    reads = {a.operand: a for a in records[2].reads}
    assert set(reads) == {"src", "src index"}
    assert reads["src"].rows == (20, 8)
    assert reads["src"].nbytes == 2 * 4 * 4
    assert records[2].writes[0].rows == (0, 8)
    assert records[0].writes[0].rows is None
