"""dma_copy: what it moves, and its rules."""

from __future__ import annotations

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.dma_kernels import BF16, fill, hbm
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced

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
