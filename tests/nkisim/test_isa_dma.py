"""dma_copy and dma_compute: values, run-time addresses, rules, trace."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3


def hbm(shape: Any, dtype: Any = nl.float32) -> Any:
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def fill(t: Any, value: Any) -> Any:
    nisa.memset(t, value)
    return t


# -- copies


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_copies_between_memories(target):
    x = normal(5, 7)

    def kernel(x):
        private = nl.ndarray(x.shape, x.dtype, buffer=nl.hbm)
        nisa.dma_copy(private, x)
        on_chip = sb(private)
        second = tile(x.shape)
        nisa.dma_copy(dst=second, src=on_chip)
        return out(second)

    np.testing.assert_array_equal(run(kernel, x, target=target), x)


@pytest.mark.parametrize("start", [0, 1, 3, 31, 100])
def test_any_start_partition(start):
    x = normal(128, 4)

    def kernel(x):
        t = sb(x)
        o = hbm((20, 4))
        nisa.dma_copy(o, t[start : start + 20, :])
        return o

    np.testing.assert_array_equal(run(kernel, x), x[start : start + 20])


def test_row_major_order_across_shapes():
    x = normal(4, 6)

    def kernel(x):
        o = hbm((2, 3, 4))
        nisa.dma_copy(o, x)
        t = tile((8, 3))
        nisa.dma_copy(t, o)
        return o, out(t)

    a, b = run(kernel, x)
    np.testing.assert_array_equal(a, x.reshape(2, 3, 4))
    np.testing.assert_array_equal(b, x.reshape(8, 3))


def test_strided_and_permuted_views():
    x = normal(2, 3, 4, 5, 6)

    def kernel(x):
        o = hbm((6, 4, 3, 2, 3))
        nisa.dma_copy(o, x.permute((4, 2, 1, 0, 3))[:, :, :, :, ::2])
        t = fill(tile((4, 10)), 0.0)
        nisa.dma_copy(t[1:3, 1::3], x[0, 0:2, 1, 2, 0:3])
        return o, out(t)

    a, b = run(kernel, x)
    np.testing.assert_array_equal(a, x.transpose(4, 2, 1, 0, 3)[..., ::2])
    expected = np.zeros((4, 10), np.float32)
    expected[1:3, 1::3] = x[0, 0:2, 1, 2, 0:3]
    np.testing.assert_array_equal(b, expected)


def test_broadcast_source():
    x = normal(1, 6)

    def kernel(x):
        t = tile((9, 6))
        nisa.dma_copy(t, x.broadcast(0, 9))
        return out(t)

    np.testing.assert_array_equal(run(kernel, x), np.tile(x, (9, 1)))


# Ties, overflow and negative zero; by hand.
CASTS = [
    (np.float32, nl.bfloat16, [1.00390625, 1.01171875, -0.0, 3.4e38], [1.0, 1.015625, -0.0, np.inf]),
    (np.float32, nl.float16, [2049.0, 2051.0, 65520.0, 1e-8], [2048.0, 2052.0, np.inf, 0.0]),
    (np.float32, nl.int32, [0.5, 1.5, -2.5, 3e9], [0, 2, -2, 2**31 - 1]),
    (np.float32, nl.uint8, [-4.0, 255.4, 300.0, 2.5], [0, 255, 255, 2]),
    (np.float32, nl.int8, [-128.5, 127.5, -200.0, 0.49], [-128, 127, -128, 0]),
    (np.float32, nl.float8_e4m3, [240.0, 17.0, 19.0, 0.0], [240.0, 16.0, 20.0, 0.0]),
    (np.int32, nl.float32, [2**24 + 1, -(2**24) - 3, 7, -1], [2.0**24, -(2.0**24) - 4, 7.0, -1.0]),
    # Through float32, so bits are lost between integers too.
    (np.int32, nl.uint32, [2**24 + 1, -5, 9, 2**31 - 1], [2**24, 0, 9, 2**31]),
    (np.float32, nl.tfloat32, [1 + 2.0**-11, 1 + 3 * 2.0**-11, 5.0, -1.5], [1.0, 1 + 2.0**-9, 5.0, -1.5]),
    (np.float32, nl.bool_, [0.0, 2.0, -0.5, 1.0], [False, True, True, True]),
]


@pytest.mark.parametrize(
    ("given", "dtype", "values", "expected"), CASTS, ids=[f"{np.dtype(c[0])}-{c[1]}" for c in CASTS]
)
def test_casts_through_float32(given, dtype, values, expected):
    x = np.array([values], given)

    def kernel(x):
        o = hbm((1, 4), dtype)
        nisa.dma_copy(o, x)
        return o

    got = run(kernel, x)
    np.testing.assert_array_equal(got.astype(np.float64), np.array([expected], np.float64))
    np.testing.assert_array_equal(np.signbit(got.astype(np.float64)), np.signbit(np.array([expected], np.float64)))


def test_equal_types_keep_bits():
    bits = np.array([[0x7FC00001, 0xFF800001, 0x3F800FFF, 1]], np.uint32)

    def kernel(x):
        o = hbm((1, 4), nl.uint32)
        nisa.dma_copy(o.view(nl.tfloat32), x.view(nl.tfloat32))
        b = hbm((1, 16), nl.uint8)
        nisa.dma_copy(b.view(nl.bool_), x.view(nl.bool_))
        f = hbm((1, 4), nl.uint32)
        nisa.dma_copy(f.view(nl.float32), x.view(nl.float32))
        return o, b, f

    o, b, f = run(kernel, bits)
    np.testing.assert_array_equal(o, bits)
    np.testing.assert_array_equal(b, bits.view(np.uint8))
    np.testing.assert_array_equal(f, bits)


def test_packed_types_are_copied_not_cast():
    x = integers(4, 8, low=0, high=2**31, dtype=np.uint32)

    def kernel(x):
        t = tile((4, 8), nl.float8_e4m3fn_x4)
        nisa.dma_copy(t, x.view(nl.float8_e4m3fn_x4))
        o = hbm((4, 8), nl.uint32)
        nisa.dma_copy(o.view(nl.float8_e4m3fn_x4), t)
        return o

    np.testing.assert_array_equal(run(kernel, x, target="trn3"), x)

    def cast(x):
        t = tile((4, 8), nl.float8_e4m3fn_x4)
        nisa.dma_copy(t, x)

    refused(
        cast,
        x,
        target="trn3",
        instruction="dma_copy",
        operand="dst",
        rule="cast of a packed type",
        received="uint32 to float8_e4m3fn_x4",
        allowed="equal types",
    )


def test_all_float32_mode_does_not_round():
    x = np.array([[1.00390625, 3.14159]], np.float32)

    def kernel(x):
        t = tile((1, 2), nl.bfloat16)
        nisa.dma_copy(t, x)
        o = hbm((1, 2))
        nisa.dma_copy(o, t)
        return o

    np.testing.assert_array_equal(run(kernel, x, precise=False), x)
    np.testing.assert_array_equal(run(kernel, x), x.astype(BF16).astype(np.float32))


# -- rules of dma_copy


def test_psum_is_refused():
    def source(x):
        nisa.dma_copy(hbm(x.shape), ps(x))

    def target(x):
        nisa.dma_copy(tile(x.shape, buffer=nl.psum), x)

    for kernel, operand in ((source, "src"), (target, "dst")):
        refused(
            kernel,
            normal(4, 4),
            instruction="dma_copy",
            operand=operand,
            rule="buffer",
            received="psum",
            allowed="sbuf or HBM",
        )


def test_element_counts_agree():
    def kernel(x):
        nisa.dma_copy(tile((2, 5)), x)

    refused(
        kernel,
        normal(2, 4),
        instruction="dma_copy",
        operand="src",
        rule="number of elements",
        received="8 [2, 4]",
        allowed="10 [2, 5]",
    )


def test_operands_are_tensors():
    def kernel(x):
        nisa.dma_copy(x, 3.0)

    refused(
        kernel, normal(2, 2), instruction="dma_copy", operand="src", rule="type", received="float", allowed="NkiTensor"
    )


def test_more_than_five_dimensions_are_refused():
    def kernel(x):
        nisa.dma_copy(tile((1, 2)), x)

    refused(
        kernel,
        normal(1, 1, 1, 1, 1, 2),
        instruction="dma_copy",
        operand="src",
        rule="dimensions",
        received="6",
        allowed="at most 5",
    )


def test_uninitialized_source_is_refused():
    def kernel(x):
        t = tile((2, 4))
        nisa.dma_copy(t[:, 0:3], x)
        nisa.dma_copy(hbm((2, 4)), t)

    refused(
        kernel,
        normal(2, 3),
        instruction="dma_copy",
        operand="src",
        rule="uninitialized read",
        received="2 of 8 elements never written, first at (0, 3)",
        allowed="written before",
    )


@pytest.mark.parametrize(
    ("pattern", "strides"),
    [([[0, 3], [1, 4]], "[0, 1]"), ([[2, 3], [1, 4]], "[2, 1]"), ([[3, 2], [2, 2], [1, 3]], "[3, 2, 1]")],
)
def test_destinations_name_an_address_once(pattern, strides):
    n = int(np.prod([p[1] for p in pattern]))

    def kernel(x):
        o = hbm((64,))
        nisa.dma_copy(o.ap(pattern), x)

    refused(
        kernel,
        normal(n),
        instruction="dma_copy",
        operand="dst",
        rule="several elements at one address",
        received=strides,
        allowed="distinct addresses",
    )


def test_interleaved_destination_is_legal():
    x = normal(12)

    def kernel(x):
        o = hbm((12,))
        # Strides smaller than the reach of the inner dimension, and yet no address twice.
        nisa.dma_copy(o.ap([[1, 2], [4, 3], [2, 2]]), x)
        return o

    expected = np.empty(12, np.float32)
    for i, (a, b, c) in enumerate(np.ndindex(2, 3, 2)):
        expected[a + 4 * b + 2 * c] = x[i]
    np.testing.assert_array_equal(run(kernel, x), expected)


@pytest.mark.parametrize("engine", ["tensor", "vector", "gpsimd", "dma"])
def test_trigger_engine(engine):
    def kernel(x):
        nisa.dma_copy(tile(x.shape), x, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine[engine])

    refused(
        kernel,
        normal(2, 2),
        instruction="dma_copy",
        operand="engine",
        rule="trigger engine",
        received=engine,
        allowed="sync or scalar",
    )


@pytest.mark.parametrize("mode", ["unknown", "swdge", "none"])
def test_trigger_engine_needs_hwdge(mode):
    def kernel(x):
        nisa.dma_copy(tile(x.shape), x, dge_mode=nisa.dge_mode[mode], engine=nisa.engine.scalar)

    refused(
        kernel,
        normal(2, 2),
        instruction="dma_copy",
        operand="engine",
        rule="trigger engine with dge_mode",
        received=mode,
        allowed="hwdge",
    )


def test_hwdge_rules():
    def cast(x):
        nisa.dma_copy(tile(x.shape, nl.bfloat16), x, dge_mode=nisa.dge_mode.hwdge)

    def plain(x):
        nisa.dma_copy(tile(x.shape), x, dge_mode=nisa.dge_mode.hwdge)

    refused(
        cast,
        normal(2, 2),
        instruction="dma_copy",
        operand="dst",
        rule="dtype under hwdge",
        received="bfloat16",
        allowed="float32",
    )
    refused(
        plain,
        normal(2, 2),
        target="trn1",
        instruction="dma_copy",
        operand="dge_mode",
        rule="hwdge on target",
        received="trn1",
        allowed="NeuronCore-v3",
    )
    traced(plain, normal(2, 2), target="trn3")


@pytest.mark.parametrize("argument", ["dge_mode", "engine", "oob_mode"])
def test_enumerations_are_members(argument):
    def kernel(x):
        nisa.dma_copy(tile(x.shape), x, **{argument: 2})

    refused(
        kernel,
        normal(2, 2),
        instruction="dma_copy",
        operand=argument,
        rule="type",
        received="2",
        allowed=f"a member of nki.isa.{argument}",
    )


def test_priority():
    def kernel(x, priority):
        nisa.dma_copy(tile(x.shape), x, priority=priority)

    for priority in (None, 0, 3):
        record = traced(kernel, normal(2, 2), priority, target="trn3").records[0]
        assert record.attrs["priority"] == priority
    for priority in (4, -1, 1.0, True):
        refused(
            kernel,
            normal(2, 2),
            priority,
            target="trn3",
            instruction="dma_copy",
            operand="priority",
            rule="value",
            received=str(priority),
            allowed="0..3 or None",
        )
    refused(
        kernel,
        normal(2, 2),
        0,
        instruction="dma_copy",
        operand="priority",
        rule="target",
        received="trn2",
        allowed="None before NeuronCore-v4",
    )


def test_fn_float8_before_trn3():
    def kernel(x):
        nisa.dma_copy(tile(x.shape, nl.float8_e4m3fn), x)

    refused(
        kernel,
        normal(2, 2),
        instruction="dma_copy",
        operand="dst",
        rule="dtype",
        received="float8_e4m3fn on trn2",
        allowed="float8_e4m3",
    )
    traced(kernel, normal(2, 2), target="trn3")


def test_instruction_name_is_a_string():
    def kernel(x):
        nisa.dma_copy(tile(x.shape), x, name=3)

    with pytest.raises(TypeError, match=r"dma_copy\.name: received 3"):
        run(kernel, normal(2, 2))


# -- scalar offsets


def at(value: int, how: str, dtype: Any = nl.int32) -> Any:
    """A run-time scalar: a register, or a 1x1 SBUF tensor."""
    if how == "register":
        return nisa.register_alloc(value)
    t = tile((1, 1), dtype)
    return fill(t, value)


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


# -- dma_compute


def test_sum_of_sources():
    xs = [normal(4, 6, seed=i) for i in range(3)]

    def kernel(a, b, c):
        o = hbm((24,))
        nisa.dma_compute(o, [a, sb(b), c.reshape((2, 12))], nl.add, scales=[1.0, 1.0, 1])
        return o

    expected = (xs[0] + xs[1] + xs[2]).reshape(-1)
    np.testing.assert_array_equal(run(kernel, *xs), expected)
    record = traced(kernel, *xs).records[-1]
    assert record.engine is Engine.dma
    assert record.attrs == {"dge": "none", "op": "add", "mode": "sum", "rows_skipped": 0, "skipped": False}
    assert [a.operand for a in record.reads] == ["srcs[0]", "srcs[1]", "srcs[2]"]


def test_sum_rounds_once_and_in_float32():
    a = np.array([[256.0, 1.0, 2.0**24]], np.float32)
    b = np.array([[1.0, 2.0**-8, 1.0]], np.float32)

    def kernel(a, b):
        o = hbm((1, 3), nl.bfloat16)
        nisa.dma_compute(o, (a, b, b), nl.add)
        f = hbm((1, 3))
        nisa.dma_compute(f, (a, b, b), nl.add)
        i = hbm((1, 3), nl.int32)
        nisa.dma_compute(i, (a,), nl.add)
        return o, f, i

    o, f, i = run(kernel, a, b)
    # Rounding to bfloat16 after each source would leave 256 and 1.
    np.testing.assert_array_equal(o.astype(np.float32), [[258.0, 1.0078125, 2.0**24]])
    np.testing.assert_array_equal(f, [[258.0, 1.0078125, 2.0**24]])
    np.testing.assert_array_equal(i, [[256, 1, 2**24]])


def test_sum_in_place():
    x = normal(3, 4)

    def kernel(x):
        t = sb(x)
        nisa.dma_compute(t, [t, t, x], nl.add)
        return out(t)

    np.testing.assert_array_equal(run(kernel, x), x + x + x)


def test_scatter_add():
    x, base, index = normal(4, 5), normal(9, 5, seed=1), np.array([[8], [2], [0], [5]], np.uint32)

    def kernel(x, base, index):
        o = hbm((9, 5))
        nisa.dma_copy(o, base)
        rows = o.ap([[5, 4], [1, 5]], vector_offset=sb(index), indirect_dim=0)
        nisa.dma_compute(rows, [sb(x), rows], nl.add)
        return o

    expected = base.copy()
    expected[index[:, 0]] += x
    np.testing.assert_array_equal(run(kernel, x, base, index), expected)
    record = traced(kernel, x, base, index).records[-1]
    assert (record.attrs["dge"], record.attrs["mode"]) == ("swdge", "scatter")
    assert record.writes[0].rows == (40, 10, 0, 25)


def test_gather_add_and_skip():
    x, table, index = normal(4, 5), normal(9, 5, seed=1), np.array([[8], [-1], [9], [5]], np.int32)

    def gather(x, table, index):
        t = sb(x)
        nisa.dma_compute(t, [table.vector_select(0, sb(index)), t], nl.add, oob_mode=nisa.oob_mode.skip)
        return out(t)

    expected = x.copy()
    expected[0] += table[8]
    expected[3] += table[5]
    np.testing.assert_array_equal(run(gather, x, table, index), expected)
    record = next(r for r in traced(gather, x, table, index).records if r.instruction == "dma_compute")
    assert (record.attrs["mode"], record.attrs["rows_skipped"]) == ("gather", 2)

    def scatter(x, table, index):
        rows = table.vector_select(0, sb(index))
        nisa.dma_compute(rows, [rows, sb(x)], nl.add, oob_mode=nisa.oob_mode.skip)

    expected = table.copy()
    expected[8] += x[0]
    expected[5] += x[3]
    run(scatter, x, table, index)
    np.testing.assert_array_equal(table, expected)


def test_indexed_sums_refuse_indices_outside():
    def kernel(x, table, index):
        t = sb(x)
        nisa.dma_compute(t, [table.vector_select(0, sb(index)), t], nl.add)

    refused(
        kernel,
        normal(2, 3),
        normal(4, 3),
        np.array([[1], [4]], np.int32),
        instruction="dma_compute",
        operand="srcs[0]",
        rule="run-time row index out of bounds in partition 1",
        received="4",
        allowed="0..3",
    )


@pytest.mark.parametrize("mode", ["scatter", "gather"])
def test_repeated_indices_are_refused(mode):
    def kernel(x, table, index):
        t, rows = sb(x), table.vector_select(0, sb(index))
        dst, srcs = (rows, [rows, t]) if mode == "scatter" else (t, [rows, t])
        nisa.dma_compute(dst, srcs, nl.add, oob_mode=nisa.oob_mode.skip)

    index = np.array([[1], [3], [3], [-1], [-1]], np.int32)
    refused(
        kernel,
        normal(5, 3),
        normal(4, 3),
        index,
        instruction="dma_compute",
        operand="srcs[0]",
        rule="repeated index",
        received="3",
        allowed="differ",
    )
    index[2] = 0  # indices outside may repeat: they move nothing
    traced(kernel, normal(5, 3), normal(4, 3), index)


def _sum(**changes: Any) -> Any:
    def kernel(x, index):
        t = sb(x)
        arguments = {"dst": t, "srcs": [x, t], "reduce_op": nl.add}
        for key, value in changes.items():
            arguments[key] = value(x, t, sb(index)) if callable(value) and key != "reduce_op" else value
        nisa.dma_compute(**arguments)

    return kernel


SUM_RULES = [
    ({"reduce_op": nl.multiply}, "reduce_op", "operator", "multiply", "nl.add"),
    ({"srcs": lambda x, t, i: []}, "srcs", "number of sources", "0", "1..16"),
    ({"srcs": lambda x, t, i: [x] * 17}, "srcs", "number of sources", "17", "1..16"),
    ({"srcs": lambda x, t, i: x}, "srcs", "type", "NkiTensor", "a list"),
    ({"srcs": lambda x, t, i: [x, 1.0]}, "srcs[1]", "type", "float", "NkiTensor"),
    ({"srcs": lambda x, t, i: [x, x[:, 0:2]]}, "srcs[1]", "number of elements", "6 [3, 2]", "12"),
    ({"scales": [1.0]}, "scales", "number of scales", "[1.0]", "2 scales"),
    ({"scales": [1.0, 0.5]}, "scales", "value", "0.5", "1.0"),
    ({"scales": [1.0, True]}, "scales", "value", "True", "1.0"),
    ({"unique_indices": 1}, "unique_indices", "type", "1", "True or False"),
    ({"oob_mode": nisa.oob_mode.skip}, "oob_mode", "mode without vector_offset", "skip", "error"),
    ({"oob_mode": None}, "oob_mode", "type", "None", "a member"),
    ({"dst": lambda x, t, i: tile((3, 4), buffer=nl.psum)}, "dst", "buffer", "psum", "sbuf or HBM"),
    ({"dst": lambda x, t, i: tile((3, 4), nl.float8_e4m3fn_x4)}, "dst", "dtype", "float8_e4m3fn_x4", "one number"),
    ({"srcs": lambda x, t, i: [x.vector_select(0, i)]}, "srcs", "number of sources with vector_offset", "1", "2"),
    (
        {"srcs": lambda x, t, i: [x.vector_select(0, i)] * 2},
        "srcs",
        "sources with vector_offset",
        "2",
        "1 of the 2",
    ),
    (
        {"srcs": lambda x, t, i: [x.vector_select(0, i), t], "unique_indices": False},
        "unique_indices",
        "value with vector_offset",
        "False",
        "True",
    ),
    (
        {"srcs": lambda x, t, i: [x.vector_select(0, i), x]},
        "srcs[1]",
        "source that is read and written",
        "float32",
        "the same view",
    ),
    (
        {"dst": lambda x, t, i: x.vector_select(0, i), "srcs": lambda x, t, i: [t, x[0:3].vector_select(0, i)]},
        "srcs[1]",
        "source that is read and written",
        "float32",
        "the same view and indices",
    ),
    (
        {"dst": lambda x, t, i: x, "srcs": lambda x, t, i: [x.vector_select(0, i), x]},
        "dst",
        "buffer beside an indexed tensor",
        "private_hbm",
        "sbuf",
    ),
    (
        {"srcs": lambda x, t, i: [x[nl.ds(nisa.register_alloc(0), 3), :], t]},
        "srcs[0]",
        "run-time address",
        "scalar_offset",
        "compile-time",
    ),
]


@pytest.mark.parametrize(
    ("changes", "operand", "rule", "received", "allowed"),
    SUM_RULES,
    ids=lambda v: "+".join(v) if isinstance(v, dict) else str(v)[:40],
)
def test_dma_compute_rules(changes, operand, rule, received, allowed):
    refused(
        _sum(**changes),
        normal(3, 4),
        np.array([[2], [0], [1]], np.int32),
        instruction="dma_compute",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )
