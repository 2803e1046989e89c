"""tensor_copy and memset."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nkisim import NkiError
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import normal, out, ps, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16


def bits(x):
    """The bit patterns of an array."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


# ---------------------------------------------------------------------------------------------------
# tensor_copy


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, ml_dtypes.float8_e4m3, ml_dtypes.float8_e5m2])
def test_copy_between_equal_float_types_keeps_every_bit_pattern(dtype):
    size = np.dtype(dtype).itemsize
    patterns = np.random.default_rng(1).integers(0, 1 << 8 * size, (4, 64), dtype=np.uint64).astype(f"u{size}")
    if size == 4:
        patterns[0, :3] = [0x7F800001, 0xFFC12345, 0x80000000]  # signalling NaN, NaN with payload, -0
    x = patterns.view(dtype)

    def kernel(x):
        t = tile(x.shape, x.dtype)
        nisa.tensor_copy(t, sb(x))
        return out(t)

    np.testing.assert_array_equal(bits(run(kernel, x)), patterns)


def test_copy_of_large_integers_is_exact_between_equal_types_only():
    x = np.array([[2**24 + 1, -(2**24) - 1, 2**31 - 1, -(2**31)]], np.int32)

    def kernel(x):
        same, wide = tile(x.shape, nl.int32), tile(x.shape, nl.float32)
        other, back = tile(x.shape, nl.uint32), tile(x.shape, nl.int32)
        source = sb(x)
        nisa.tensor_copy(same, source)
        nisa.tensor_copy(wide, source)
        nisa.tensor_copy(other, source)
        nisa.tensor_copy(back, wide)
        return out(same), out(wide), out(other), out(back)

    same, wide, other, back = run(kernel, x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(wide, np.array([[2.0**24, -(2.0**24), 2.0**31, -(2.0**31)]], np.float32))
    np.testing.assert_array_equal(other, np.array([[2**24, 0, 2**31, 0]], np.uint32))
    np.testing.assert_array_equal(back, np.array([[2**24, -(2**24), 2**31 - 1, -(2**31)]], np.int32))


def test_copy_rounds_to_nearest_even_and_saturates():
    x = np.array([[0.5, 1.5, 2.5, -2.5, 300.0, -300.0, 126.5, np.inf]], np.float32)

    def kernel(x):
        i8, u8, half = tile(x.shape, nl.int8), tile(x.shape, nl.uint8), tile(x.shape, nl.bfloat16)
        source = sb(x)
        nisa.tensor_copy(i8, source)
        nisa.tensor_copy(u8, source)
        nisa.tensor_copy(half, source)
        return out(i8), out(u8), out(half)

    i8, u8, half = run(kernel, x)
    np.testing.assert_array_equal(i8, np.array([[0, 2, 2, -2, 127, -128, 126, 127]], np.int8))
    np.testing.assert_array_equal(u8, np.array([[0, 2, 2, 0, 255, 0, 126, 255]], np.uint8))
    np.testing.assert_array_equal(half, x.astype(BF16))


def test_copy_of_tfloat32_and_bool_keeps_bits_that_a_rounding_write_would_change():
    x = np.array([[0x3F801234, 0x7F800001, 0x00001FFF]], np.uint32)
    b = np.array([[0, 1, 2, 255]], np.uint8)

    def kernel(x, b):
        t, u = tile(x.shape, nl.tfloat32), tile(b.shape, nl.bool_)
        nisa.tensor_copy(t, sb(x).view(nl.tfloat32))
        nisa.tensor_copy(u, sb(b).view(nl.bool_))
        return out(t.view(nl.uint32)), out(u.view(nl.uint8))

    t, u = run(kernel, x, b)
    np.testing.assert_array_equal(t, x)
    np.testing.assert_array_equal(u, b)


@pytest.mark.parametrize("dtype", ["float8_e5m2_x4", "float8_e4m3fn_x4", "float4_e2m1fn_x4"])
def test_copy_of_packed_types(dtype):
    unsigned = np.uint16 if dtype.startswith("float4") else np.uint32
    x = np.random.default_rng(2).integers(0, np.iinfo(unsigned).max, (32, 8), endpoint=True).astype(unsigned)

    def kernel(x):
        t = tile(x.shape, dtype)
        nisa.tensor_copy(t, sb(x).view(dtype))
        return out(t.view(x.dtype))

    np.testing.assert_array_equal(run(kernel, x, target="trn3"), x)


def test_copy_of_scale_type():
    x = np.arange(256, dtype=np.uint8).reshape(1, 256)

    def kernel(x):
        t = tile(x.shape, nl.float8_e8m0fnu)
        nisa.tensor_copy(t, sb(x).view(nl.float8_e8m0fnu))
        return out(t.view(nl.uint8))

    np.testing.assert_array_equal(run(kernel, x, target="trn3"), x)


@pytest.mark.parametrize("engine", ["vector", "scalar", "gpsimd", "unknown"])
def test_copy_is_the_same_on_every_engine_and_recorded_once(engine):
    x = normal(128, 9, dtype=BF16)

    def kernel(x):
        t = tile(x.shape, nl.bfloat16)
        nisa.tensor_copy(t, sb(x), engine=getattr(nisa.engine, engine), name="move")
        return out(t)

    np.testing.assert_array_equal(run(kernel, x), x)
    records = [r for r in traced(kernel, x).records if r.instruction == "tensor_copy"]
    assert len(records) == 1
    assert records[0].engine is (Engine.vector if engine == "unknown" else Engine[engine])
    assert records[0].name == "move"
    assert records[0].attrs == {}
    assert [(a.operand, a.shape) for a in records[0].reads + records[0].writes] == [
        ("src", (128, 9)),
        ("dst", (128, 9)),
    ]


@pytest.mark.parametrize(
    ("target", "engine"), [("trn1", "vector"), *((t, e) for t in ("trn2", "trn3") for e in ("vector", "scalar"))]
)
def test_copy_from_and_to_psum(target, engine):
    x = normal(32, 8)

    def kernel(x):
        p, q = ps(x), tile(x.shape, nl.float32, nl.psum)
        nisa.tensor_copy(q, p, engine=getattr(nisa.engine, engine))
        return out(q)

    np.testing.assert_array_equal(run(kernel, x, target=target), x)


def test_copy_of_views():
    x = np.arange(4 * 24, dtype=np.float32).reshape(4, 24)

    def kernel(x):
        source, t = sb(x), tile((4, 2, 3, 2))
        nisa.tensor_copy(t, source.reshape((4, 2, 3, 4))[:, :, :, 1::2])
        u = tile((4, 12))
        nisa.tensor_copy(u, t.permute((0, 3, 2, 1)))
        w = tile((4, 3, 4))
        nisa.tensor_copy(w, source[:, 0:4].expand_dim(1).broadcast(1, 3))
        return out(t), out(u), out(w)

    t, u, w = run(kernel, x)
    expected = x.reshape(4, 2, 3, 4)[:, :, :, 1::2]
    np.testing.assert_array_equal(t, expected)
    np.testing.assert_array_equal(u, expected.transpose(0, 3, 2, 1).reshape(4, 12))
    np.testing.assert_array_equal(w, np.repeat(x[:, None, :4], 3, axis=1))


def test_copy_with_a_run_time_offset():
    x = np.arange(32, dtype=np.float32).reshape(2, 16)

    def kernel(x):
        t, at = tile((2, 4)), tile((1, 1), nl.int32)
        nisa.memset(at, 5)
        nisa.tensor_copy(t, sb(x).ap([[16, 2], [1, 4]], scalar_offset=at, indirect_dim=1))
        return out(t)

    np.testing.assert_array_equal(run(kernel, x), x[:, 5:9])


def test_copy_in_all_float32_mode_rounds_nothing():
    x = normal(4, 8)

    def kernel(x):
        t, u = tile(x.shape, nl.bfloat16), tile(x.shape, nl.bfloat16)
        nisa.tensor_copy(t, sb(x))
        nisa.tensor_copy(u, t)
        return out(u)

    np.testing.assert_array_equal(
        np.asarray(run(kernel, x, precise=False), np.float32), x.astype(BF16).astype(np.float32)
    )

    def widened(x):
        t, u = tile(x.shape, nl.bfloat16), tile(x.shape, nl.float32)
        nisa.tensor_copy(t, sb(x))
        nisa.tensor_copy(u, t)
        return out(u)

    np.testing.assert_array_equal(run(widened, x, precise=False), x)


def casting(dtype, operand):
    """A kernel that copies between `dtype` and float32."""

    def kernel():
        a, b = tile((4, 8), dtype), tile((4, 8))
        nisa.tensor_copy(*((b, a) if operand == "src" else (a, b)))

    return kernel


T, S, G = nisa.engine.tensor, nisa.engine.scalar, nisa.engine.gpsimd


def ok(shape=(4, 8), dtype=nl.float32, buffer=nl.sbuf):
    """Inside a kernel: a tile that every rule accepts."""
    return tile(shape, dtype, buffer)


@pytest.mark.parametrize(
    ("kernel", "target", "operand", "rule", "received", "allowed"),
    [
        (lambda: nisa.tensor_copy(ok((5, 8)), ok()), "trn2", "src", "partitions", "4", "5"),
        (lambda: nisa.tensor_copy(ok((4, 2, 3)), ok()), "trn2", "src", "elements per partition", "8", "6"),
        (lambda: nisa.tensor_copy(ok(), ok()), "trn2", "src", "uninitialized read", "32 of 32", "written"),
        (lambda: nisa.tensor_copy(ok(buffer=nl.shared_hbm), ok()), "trn2", "dst", "buffer", "hbm", "sbuf or psum"),
        (lambda: nisa.tensor_copy(ok(), 1.0), "trn2", "src", "type", "float", "NkiTensor"),
        (lambda: nisa.tensor_copy(ok(buffer=nl.psum), ok(), engine=G), "trn2", "engine", "PSUM", "gpsimd", "sbuf"),
        (lambda: nisa.tensor_copy(ok(), ok(buffer=nl.psum), G), "trn2", "engine", "PSUM", "gpsimd", "sbuf"),
        (lambda: nisa.tensor_copy(ok(), ok(), S), "trn1", "engine", "Scalar Engine", "trn1", "op=nl.copy"),
        (
            lambda: nisa.tensor_copy(ok(), ok(), T),
            "trn2",
            "engine",
            "engine",
            "tensor",
            "vector, scalar, gpsimd, unknown",
        ),
        (lambda: nisa.tensor_copy(ok(), ok(), "vector"), "trn2", "engine", "type", "'vector'", "nki.isa.engine"),
        (casting("float8_e4m3fn_x4", "src"), "trn3", "src", "cast", "float8_e4m3fn_x4 to float32", "equal dtypes"),
        (casting("float8_e8m0fnu", "src"), "trn3", "src", "cast", "float8_e8m0fnu to float32", "equal dtypes"),
        (casting("float8_e5m2_x4", "dst"), "trn3", "dst", "cast", "float32 to float8_e5m2_x4", "equal dtypes"),
        (casting("float8_e4m3fn", "dst"), "trn2", "dst", "dtype", "float8_e4m3fn on trn2", "float8_e4m3"),
    ],
)
def test_copy_refuses(kernel, target, operand, rule, received, allowed):
    refused(
        kernel, target=target, instruction="tensor_copy", operand=operand, rule=rule, received=received, allowed=allowed
    )


# ---------------------------------------------------------------------------------------------------
# memset


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float32", 1, np.float32(1)),
        ("float32", -np.inf, np.float32(-np.inf)),
        ("bfloat16", 1.00390625, BF16(1.0)),
        ("bfloat16", -3.4028235e38, BF16(-np.inf)),
        ("float16", np.float32(0.1), np.float16(np.float32(0.1))),
        ("float8_e4m3", 17.0, ml_dtypes.float8_e4m3(16.0)),
        ("float8_e5m2", -0.0, ml_dtypes.float8_e5m2(-0.0)),
        ("int32", 2**24 + 1, np.int32(2**24 + 1)),
        ("uint32", 2**32 - 1, np.uint32(2**32 - 1)),
        ("int8", -128, np.int8(-128)),
        ("uint16", np.int64(65535), np.uint16(65535)),
    ],
)
@pytest.mark.parametrize("engine", ["unknown", "gpsimd"])
def test_memset_fills(dtype, value, expected, engine):
    def kernel():
        t = tile((8, 2, 3), dtype)
        nisa.memset(t, value, engine=getattr(nisa.engine, engine))
        return out(t)

    y = run(kernel)
    np.testing.assert_array_equal(bits(y), bits(np.full((8, 2, 3), expected)))


def test_memset_of_bool_packed_and_scale_types():
    def kernel():
        flag, zero = tile((1, 2), nl.bool_), tile((1, 2), nl.bool_)
        nisa.memset(flag, True)
        nisa.memset(zero, 0)
        packed, scale = tile((1, 4), nl.float4_e2m1fn_x4), tile((1, 4), nl.float8_e8m0fnu)
        nisa.memset(packed, 0)
        nisa.memset(scale, 0.25)
        return (
            out(flag.view(nl.uint8)),
            out(zero.view(nl.uint8)),
            out(packed.view(nl.uint16)),
            out(scale.view(nl.uint8)),
        )

    flag, zero, packed, scale = run(kernel, target="trn3")
    np.testing.assert_array_equal(flag, np.ones((1, 2), np.uint8))
    np.testing.assert_array_equal(zero, np.zeros((1, 2), np.uint8))
    np.testing.assert_array_equal(packed, np.zeros((1, 4), np.uint16))
    np.testing.assert_array_equal(scale, np.full((1, 4), 125, np.uint8))


def test_memset_of_a_view_leaves_the_rest_undefined():
    def kernel(upto):
        t = tile((4, 8))
        nisa.memset(t[:, 0:8:2], 2.0)
        nisa.memset(t[:, 1:upto:2], 3.0)
        return out(t)

    np.testing.assert_array_equal(run(lambda: kernel(8)), np.tile(np.float32([2, 3]), (4, 4)))
    with pytest.raises(NkiError, match="uninitialized read: received 4 of 32"):
        run(lambda: kernel(6))


def test_memset_of_psum_and_its_record():
    def kernel():
        t = tile((8, 16), buffer=nl.psum)
        nisa.memset(t, 4.0)
        return out(t)

    np.testing.assert_array_equal(run(kernel), np.full((8, 16), 4.0, np.float32))
    (record,) = [r for r in traced(kernel).records if r.instruction == "memset"]
    assert record.engine is Engine.vector
    assert record.attrs == {"value": 4.0}
    assert record.reads == ()
    assert [a.operand for a in record.writes] == ["dst"]


@pytest.mark.parametrize(
    ("dtype", "value", "rule", "received", "allowed"),
    [
        ("int32", 2.0, "value of a int32 tile", "2.0", "an integer literal"),
        ("int32", True, "value of a int32 tile", "True", "an integer or a float"),
        ("float32", True, "value of a float32 tile", "True", "an integer or a float"),
        ("int8", 128, "value of a int8 tile", "128", "-128..127"),
        ("uint32", -1, "value of a uint32 tile", "-1", "0..4294967295"),
        ("bool_", 2, "value of a bool_ tile", "2", "True, False, 1 or 0"),
        ("bool_", 1.0, "value of a bool_ tile", "1.0", "True, False, 1 or 0"),
        ("float8_e4m3fn_x4", 1, "value of a float8_e4m3fn_x4 tile", "1", "0"),
        ("float32", "0", "type", "str", "a number"),
        ("float32", None, "type", "NoneType", "a number"),
    ],
)
def test_memset_refuses_values_of_another_class(dtype, value, rule, received, allowed):
    refused(
        lambda: nisa.memset(tile((4, 4), dtype), value),
        target="trn3",
        instruction="memset",
        operand="value",
        rule=rule,
        received=received,
        allowed=allowed,
    )


@pytest.mark.parametrize(
    ("kernel", "operand", "rule", "received", "allowed"),
    [
        (lambda: nisa.memset(tile((4, 4)), 0.0, engine=S), "engine", "engine", "scalar", "vector, gpsimd, unknown"),
        (lambda: nisa.memset(tile((4, 4), buffer=nl.psum), 0.0, engine=G), "engine", "PSUM", "gpsimd", "sbuf"),
        (lambda: nisa.memset(tile((4, 4), buffer=nl.shared_hbm), 0.0), "dst", "buffer", "hbm", "sbuf or psum"),
    ],
)
def test_memset_refuses(kernel, operand, rule, received, allowed):
    refused(kernel, target="trn3", instruction="memset", operand=operand, rule=rule, received=received, allowed=allowed)


def test_a_run_time_index_outside_cites_the_instructions_own_page():
    def kernel(x, at):
        t = sb(x)
        nisa.tensor_copy(tile((2, 1)), t.select(1, sb(at)).reshape((2, 1)))

    error = refused(
        kernel,
        np.zeros((2, 4), np.float32),
        np.full((1, 1), 4, np.int32),
        instruction="tensor_copy",
        operand="src",
        rule="run-time index out of bounds",
        received="4",
        allowed="0..3",
    )
    assert error.source == "nki.isa.tensor_copy, NKI 0.6"
