"""Element types: names, storage and the hardware's casts, against bit-level computations of their own."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nkisim import dtypes
from nkisim import language as nl
from nkisim.dtypes import ALL, FLOATS, INTEGERS, ORDINARY, DType, as_dtype, cast, to_float32

F32 = np.float32
INF, NAN = F32(np.inf), F32(np.nan)


def f32(*values: float) -> np.ndarray:
    return np.array(values, F32)


def quiet_cast(values: np.ndarray, dtype: DType, precise: bool = True) -> np.ndarray:
    """`cast` as a launch calls it: without NumPy's warnings."""
    with np.errstate(all="ignore"):
        return cast(values, dtype, precise=precise)


# -- names and storage

SIZES = {
    "bool_": 1, "int8": 1, "int16": 2, "int32": 4, "uint8": 1, "uint16": 2, "uint32": 4, "float16": 2, "float32": 4,
    "bfloat16": 2, "tfloat32": 4, "float8_e4m3": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "float8_e5m2_x4": 4, "float8_e4m3fn_x4": 4, "float4_e2m1fn_x4": 2,
}  # fmt: skip


def test_every_documented_type_is_there():
    assert {str(d): d.itemsize for d in ALL.values()} == SIZES
    for name in SIZES:
        assert getattr(nl, name) is ALL[name]
        assert getattr(nl, name) == name
        assert ALL[name].numpy.itemsize == SIZES[name]


def test_kinds():
    packed = {"float8_e5m2_x4", "float8_e4m3fn_x4", "float4_e2m1fn_x4"}
    integers = {"int8", "int16", "int32", "uint8", "uint16", "uint32"}
    assert {d for d in ALL.values() if d.is_integer} == set(INTEGERS) == integers
    assert {d for d in ALL.values() if d.is_float} == set(FLOATS) == set(SIZES) - packed - integers - {"bool_"}
    assert set(ORDINARY) == set(SIZES) - packed
    low = {"float16", "bfloat16", "float8_e4m3", "float8_e4m3fn", "float8_e5m2"}
    assert {d for d in ALL.values() if d.is_low_precision} == low


def test_carrier():
    for d in ALL.values():
        assert d.carrier(True) == d.numpy
        assert d.carrier(False) == (np.float32 if d.is_low_precision else d.numpy)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("float32", "float32"), ("bool", "bool_"), ("tfloat32", "tfloat32"), ("float4_e2m1fn_x4", "float4_e2m1fn_x4"),
        (np.float32, "float32"), (np.dtype("int8"), "int8"), (np.uint16, "uint16"), (np.bool_, "bool_"),
        (bool, "bool_"), (np.dtype(bool), "bool_"), (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
        (ml_dtypes.float8_e4m3, "float8_e4m3"), (ml_dtypes.float8_e4m3fn, "float8_e4m3fn"),
        (ml_dtypes.float8_e5m2, "float8_e5m2"), (ml_dtypes.float8_e8m0fnu, "float8_e8m0fnu"), (np.half, "float16"),
        (np.intc, "int32"), (np.dtype("<f4"), "float32"),
    ],
)  # fmt: skip
def test_as_dtype(value, name):
    assert as_dtype(value) is ALL[name]


def test_as_dtype_keeps_types():
    for d in ALL.values():
        assert as_dtype(d) is d
        assert as_dtype(str(d)) is d


@pytest.mark.parametrize(
    "value",
    [
        "float64", "int64", "f4", "", np.float64, np.int64, float, int, np.dtype(">f4"), np.dtype(">i2"), complex, None,
        3, [], {"a": 1}, np.dtype([("a", "f4")]), ml_dtypes.float8_e3m4, object(), np.str_,
    ],
)  # fmt: skip
def test_as_dtype_refuses(value):
    with pytest.raises(TypeError) as caught:
        as_dtype(value, "ndarray dtype")
    assert str(caught.value).startswith(f"ndarray dtype: received {value!r}, allowed bool_, int8")


def test_copies_and_pickles_are_the_same_object():
    for d in ALL.values():
        assert copy.copy(d) is d
        assert copy.deepcopy(d) is d
        assert pickle.loads(pickle.dumps(d)) is d


# -- casts to floats


def exact(value: float, mantissa: int, exponent: int, largest: float, overflow: float) -> float:
    """`value` rounded to nearest even in a binary format, by rational arithmetic."""
    if np.isnan(value):
        return np.nan
    if np.isinf(value):
        return np.copysign(overflow, value)
    if value == 0.0:
        return value
    bias = 2 ** (exponent - 1) - 1
    x = abs(Fraction(value))
    power = max(np.frexp(abs(value))[1] - 1, 1 - bias) - mantissa
    step = Fraction(2) ** int(power)
    rounded = round(x / step) * step  # Fraction rounds halves to even
    if rounded > Fraction(largest):
        return float(np.copysign(overflow, value))
    return float(np.copysign(float(rounded), value))


FORMATS = {
    # name: mantissa bits, exponent bits, largest finite, what overflow becomes
    "float16": (10, 5, 65504.0, np.inf),
    "bfloat16": (7, 8, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), np.inf),
    "tfloat32": (10, 8, 2.0**127 * (2 - 2.0**-10), np.inf),
    "float8_e4m3": (3, 4, 240.0, np.inf),
    "float8_e4m3fn": (3, 4, 448.0, np.nan),
    "float8_e5m2": (2, 5, 57344.0, np.inf),
}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=8), name=st.sampled_from(sorted(FORMATS)))
def test_float_casts_round_to_nearest_even(values, name):
    x = np.array(values, F32)
    got = quiet_cast(x, ALL[name])
    assert got.dtype == ALL[name].numpy
    expected = np.array([exact(float(v), *FORMATS[name]) for v in x], F32)
    np.testing.assert_array_equal(got.astype(F32), expected)
    np.testing.assert_array_equal(
        np.signbit(got.astype(F32))[~np.isnan(expected)], np.signbit(expected)[~np.isnan(expected)]
    )


def test_halfway_cases():
    # 1 + 1/2 ulp and 1 + 3/2 ulp of each format.
    for name, (mantissa, *_rest) in FORMATS.items():
        ulp = 2.0**-mantissa
        got = cast(f32(1 + ulp / 2, 1 + 3 * ulp / 2, -1 - ulp / 2), ALL[name]).astype(F32)
        np.testing.assert_array_equal(got, f32(1.0, 1 + 2 * ulp, -1.0))


def test_overflow_of_each_float():
    lowest = np.finfo(F32).min
    for name in ("float16", "bfloat16", "float8_e4m3", "float8_e5m2"):
        got = quiet_cast(f32(lowest, INF, -INF, NAN), ALL[name]).astype(F32)
        np.testing.assert_array_equal(got, f32(-INF, INF, -INF, NAN))
    assert np.isnan(quiet_cast(f32(lowest, 1e6, INF, NAN), nl.float8_e4m3fn).astype(F32)).all()
    np.testing.assert_array_equal(quiet_cast(f32(248.0, 247.9), nl.float8_e4m3).astype(F32), f32(INF, 240.0))
    np.testing.assert_array_equal(quiet_cast(f32(464.0, 464.1), nl.float8_e4m3fn).astype(F32), f32(448.0, NAN))


def test_tfloat32_keeps_special_values():
    x = f32(INF, -INF, NAN, 0.0, -0.0, np.finfo(F32).max, 1 + 2.0**-10)
    got = quiet_cast(x, nl.tfloat32)
    np.testing.assert_array_equal(got, f32(INF, -INF, NAN, 0.0, -0.0, INF, 1 + 2.0**-10))
    assert np.signbit(got[4])
    nans = np.array([0x7FFF_FFFF, 0xFFFF_FFFF, 0x7F80_0001], np.uint32).view(F32)
    assert np.isnan(quiet_cast(nans, nl.tfloat32)).all()
    bits = np.array([0x3F80_1000, 0x3F80_3000, 0x3F80_1001, 0x3F80_0FFF], np.uint32)
    expected = np.array([0x3F80_0000, 0x3F80_4000, 0x3F80_2000, 0x3F80_0000], np.uint32)
    np.testing.assert_array_equal(cast(bits.view(F32), nl.tfloat32).view(np.uint32), expected)


def test_scales_round_to_powers_of_two():
    got = quiet_cast(f32(1.0, 2.9, 3.1, 0.25, -1.0), nl.float8_e8m0fnu).astype(F32)
    np.testing.assert_array_equal(got, f32(1.0, 2.0, 4.0, 0.25, NAN))


def test_float64_goes_through_float32():
    # Directly to bfloat16 this would round up; float32 first drops the last bit and the tie goes to even.
    x = np.array([1 + 2.0**-8 + 2.0**-40])
    assert float(cast(x, nl.bfloat16)[0]) == 1.0
    assert float(cast(x, nl.float32)[0]) == 1 + 2.0**-8


def test_integers_go_through_float32():
    x = np.array([2**24 + 1, -(2**24) - 1, 2**31 - 1, 7], np.int64)
    np.testing.assert_array_equal(cast(x, nl.int32), [2**24, -(2**24), 2**31 - 1, 7])
    np.testing.assert_array_equal(cast(np.array([2**24 + 1], np.int32), nl.float32), f32(2**24))
    np.testing.assert_array_equal(cast(np.array([257], np.int32), nl.bfloat16).astype(F32), f32(256.0))


# -- casts to integers


@pytest.mark.parametrize("dtype", INTEGERS)
def test_float_to_integer_rounds_to_even_and_saturates(dtype):
    info = np.iinfo(dtype.numpy)
    x = f32(0.5, 1.5, 2.5, 2.4999998, 100.7, 1e30, -1e30, INF, -INF, -0.5, -1.5)
    low = [0, -2] if info.min < 0 else [0, 0]
    expected = np.array([0, 2, 2, 2, 101, info.max, info.min, info.max, info.min, *low], dtype.numpy)
    got = cast(x, dtype)
    assert got.dtype == dtype.numpy
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_nan_becomes_zero(dtype):
    np.testing.assert_array_equal(quiet_cast(f32(NAN, -NAN, 3.0), dtype), np.array([0, 0, 3], dtype.numpy))


@pytest.mark.parametrize("dtype", [nl.int32, nl.uint32])
def test_bounds_of_32_bit_integers(dtype):
    info = np.iinfo(dtype.numpy)
    top = float(2.0 ** (31 if info.min else 32))
    below = np.nextafter(F32(top), F32(0))
    np.testing.assert_array_equal(cast(f32(top, below), dtype), np.array([info.max, int(below)], dtype.numpy))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8), dtype=st.sampled_from(INTEGERS))
def test_integer_casts_by_exact_arithmetic(values, dtype):
    info = np.iinfo(dtype.numpy)
    expected = [
        (info.max if v > 0 else info.min) if np.isinf(v) else min(max(round(Fraction(v)), info.min), info.max)
        for v in values
    ]
    np.testing.assert_array_equal(cast(np.array(values, F32), dtype), np.array(expected, dtype.numpy))


def test_bool():
    got = quiet_cast(f32(0.0, -0.0, 0.25, -3.0, NAN), nl.bool_)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(cast(np.array([0, 7, 255], np.uint8), nl.bool_), [0, 1, 1])
    np.testing.assert_array_equal(cast(np.array([True, False]), nl.bool_), [1, 0])


def test_zero_dimensional_values():
    assert int(cast(np.asarray(2.5, F32), nl.int8)) == 2
    assert float(cast(np.asarray(1 + 2.0**-12, F32), nl.tfloat32)) == 1.0


# -- what stays as it is


def test_same_type_is_kept_to_the_bit():
    bits = np.array([0x7F81, 0x0001, 0x8000], np.uint16)
    x = bits.view(ml_dtypes.bfloat16)
    assert cast(x, nl.bfloat16) is x
    x32 = np.array([0x7F80_0001], np.uint32).view(F32)
    assert cast(x32, nl.float32) is x32
    big = np.array([2**31 - 1, 2**24 + 1], np.int32)
    assert cast(big, nl.int32) is big
    packed = np.array([0xDEADBEEF], np.uint32)
    assert cast(packed, nl.float8_e4m3fn_x4) is packed


def test_packed_types_are_not_computed():
    for name in ("float8_e5m2_x4", "float8_e4m3fn_x4", "float4_e2m1fn_x4"):
        with pytest.raises(TypeError, match=f"{name} is written by quantize_mx"):
            cast(f32(1.0), ALL[name])
        with pytest.raises(TypeError, match=f"{name} holds four values"):
            to_float32(np.zeros(2, ALL[name].numpy), ALL[name])


def test_float32_mode_rounds_no_float():
    x = f32(1 + 2.0**-20, 1e30)
    for d in FLOATS:
        if d != "float8_e8m0fnu":
            assert cast(x, d, precise=False) is x
    np.testing.assert_array_equal(cast(f32(2.9), nl.float8_e8m0fnu, precise=False).astype(F32), f32(2.0))
    np.testing.assert_array_equal(cast(f32(2.5), nl.int8, precise=False), [2])


def test_to_float32():
    x = f32(1.5)
    assert to_float32(x, nl.float32) is x
    assert to_float32(x, nl.tfloat32) is x
    for d in ORDINARY:
        stored = np.array([1, 4], F32).astype(d.numpy)
        got = to_float32(stored, d)
        assert got.dtype == F32
        np.testing.assert_array_equal(got, f32(1.0, 4.0))
    assert to_float32(np.array([2**24 + 1], np.int32), nl.int32)[0] == 2**24


def test_every_small_float_survives_a_round_trip():
    for d in (nl.float8_e4m3, nl.float8_e4m3fn, nl.float8_e5m2):
        every = np.arange(256).astype(np.uint8).view(d.numpy)
        wide = to_float32(every, d)
        back = quiet_cast(wide, d)
        same = ~np.isnan(wide)
        np.testing.assert_array_equal(back.view(np.uint8)[same], every.view(np.uint8)[same])
        assert np.isnan(back.astype(F32)[~same]).all()
    assert dtypes.float8_e4m3.numpy != dtypes.float8_e4m3fn.numpy
