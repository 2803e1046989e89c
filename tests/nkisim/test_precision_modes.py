"""Precise mode stores low-precision floats in their type; the all-float32 mode rounds nothing."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import language as nl
from nkisim import nki
from tests.nkisim.harness import normal, out, sb

BF16 = ml_dtypes.bfloat16
VARIABLE = "NKI_PRECISE_FP"
X = normal(4, 8, seed=41)
LOW = {
    "bfloat16": BF16,
    "float16": np.float16,
    "float8_e4m3": ml_dtypes.float8_e4m3,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def through(name: str) -> Any:
    """A kernel that rounds float32 to a type and back."""

    def kernel(x: Any) -> Any:
        t = nl.copy(sb(x), dtype=getattr(nl, name))
        assert t.dtype == name
        return out(nl.copy(t, dtype=nl.float32))

    return kernel


@pytest.mark.parametrize("name", LOW)
def test_precise_mode_rounds_on_every_write(name: str) -> None:
    np.testing.assert_array_equal(nki.simulate(through(name))(X), X.astype(LOW[name]).astype(np.float32))


@pytest.mark.parametrize("name", [*LOW, "tfloat32"])
def test_all_float32_mode_rounds_nothing(name: str) -> None:
    np.testing.assert_array_equal(nki.simulate(through(name), precise=False)(X), X)


def test_integers_are_the_same_in_both_modes() -> None:
    def kernel(x: Any) -> Any:
        return out(nl.copy(sb(x), dtype=nl.int32))

    for precise in (True, False):
        got = nki.simulate(kernel, precise=precise)(X * 10)
        np.testing.assert_array_equal(got, np.rint(X * 10).astype(np.int32))


@pytest.mark.parametrize(("value", "precise"), [("1", True), ("0", False), (None, True)])
def test_mode_by_environment(value: str | None, precise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    rounded = X.astype(BF16).astype(np.float32)
    np.testing.assert_array_equal(nki.simulate(through("bfloat16"))(X), rounded if precise else X)
    np.testing.assert_array_equal(nki.simulate(through("bfloat16"), precise=True)(X), rounded)
    np.testing.assert_array_equal(nki.simulate(through("bfloat16"), precise=False)(X), X)


def test_other_values_of_the_variable_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "no")
    with pytest.raises(ValueError, match="NKI_PRECISE_FP: received 'no', allowed 0 or 1"):
        nki.simulate(through("bfloat16"))(X)


def test_low_precision_arrays_come_and_go_in_their_type() -> None:
    half = X.astype(BF16)
    kept = half.copy()

    def kernel(x: Any) -> Any:
        assert x.dtype == nl.bfloat16
        nl.store(x, nl.multiply(nl.load(x), 1.0 / 3.0))
        return x, out(nl.multiply(nl.load(x), 3.0, dtype=nl.float32))

    returned, back = nki.simulate(kernel, precise=False)(half)
    assert returned.dtype == half.dtype == BF16
    third = kept.astype(np.float32) * np.float32(1 / 3)
    np.testing.assert_array_equal(half, third.astype(BF16))
    np.testing.assert_array_equal(returned, half)
    # Inside, the third was not rounded to bfloat16.
    np.testing.assert_array_equal(back, third * np.float32(3))


def test_all_float32_mode_has_no_bits_to_reinterpret() -> None:
    def kernel(x: Any) -> Any:
        return out(sb(x).view(nl.uint16))

    half = X.astype(BF16)
    np.testing.assert_array_equal(nki.simulate(kernel)(half), half.view(np.uint16))
    with pytest.raises(NotImplementedError, match="all-float32 mode"):
        nki.simulate(kernel, precise=False)(half)


def test_read_only_low_precision_arrays_stay_read_only() -> None:
    half = X.astype(BF16)
    half.flags.writeable = False

    def kernel(x: Any) -> None:
        nl.store(x, nl.load(x))

    with pytest.raises(Exception, match="read-only"):
        nki.simulate(kernel, precise=False)(half)
