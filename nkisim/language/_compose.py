"""Functions of one tile that take several instructions: sine with range reduction, and rounding."""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np

from nkisim import isa as nisa
from nkisim.dtypes import INTEGERS, float32, int32, uint8
from nkisim.language._activation import abs, copy, reciprocal, sign
from nkisim.language._creation import ndarray
from nkisim.language._math import add, greater, less, maximum, minimum, multiply, subtract
from nkisim.language._wrap import dtype_of, tile
from nkisim.operators import operator
from nkisim.tensor import NkiTensor

# 2 pi in three parts. The first two have 8 and 11 significant bits, so that their products with up to
# 2^13 turns are exact in float32.
_TURN = (201 / 32, 2029 / 2**20, 2 * pi - 201 / 32 - 2029 / 2**20)
_PI = float(np.float32(pi))

# float32 values from here on are whole numbers.
_WHOLE = 2.0**23


def _reduced(x: NkiTensor, quarter_turns: int) -> NkiTensor:
    """`x + quarter_turns * pi / 2`, less whole turns, in [-pi, pi]; float32."""
    turns = ndarray(x.shape, int32)
    rest = ndarray(x.shape, float32)
    source = x
    # Far from 0 the number of turns is off by one near its ties; the second pass sees a small angle.
    for _ in range(2):
        nisa.tensor_scalar(
            dst=turns, data=source, op0=multiply, operand0=0.5 / pi, op1=add, operand1=0.25 * quarter_turns
        )
        for part in _TURN:
            nisa.scalar_tensor_tensor(dst=rest, data=turns, op0=multiply, operand0=-part, op1=add, operand1=source)
            source = rest
    if quarter_turns:
        nisa.tensor_scalar(dst=rest, data=rest, op0=add, operand0=quarter_turns * pi / 2)
    # Rounding may leave the angle a bit outside the engine's valid range.
    nisa.tensor_scalar(dst=rest, data=rest, op0=minimum, operand0=_PI, op1=maximum, operand1=-_PI)
    return rest


def _sine(x: NkiTensor, quarter_turns: int, dtype: Any) -> NkiTensor:
    dst = ndarray(x.shape, dtype)
    nisa.activation(dst=dst, op=sin, data=_reduced(x, quarter_turns))
    return dst


@operator
def sin(x: Any, dtype: Any = None) -> NkiTensor:
    """Sine of any x: brought into [-pi, pi] on the Vector Engine, then `activation`; as `op=` it is the latter alone.

    Beyond 2^13 turns the reduced argument has the error of float32 arithmetic on x.
    """
    x = tile("sin", "x", x)
    return _sine(x, 0, dtype_of("sin", dtype, x.dtype))


def cos(x: Any, dtype: Any = None) -> NkiTensor:
    """Cosine: the sine a quarter turn on."""
    x = tile("cos", "x", x)
    return _sine(x, 1, dtype_of("cos", dtype, x.dtype))


def tan(x: Any, dtype: Any = None) -> NkiTensor:
    """Tangent: sine times the reciprocal of the cosine."""
    x = tile("tan", "x", x)
    dst = ndarray(x.shape, dtype_of("tan", dtype, x.dtype))
    nisa.tensor_tensor(dst=dst, data1=_sine(x, 0, float32), data2=reciprocal(_sine(x, 1, float32)), op=multiply)
    return dst


def _round_with(what: str, x: Any, dtype: Any) -> NkiTensor:
    """`ceil`, `floor` or `trunc`: the cast to int32 rounds to nearest, the overshoot is taken back."""
    x = tile(what, "x", x)
    kind = dtype_of(what, dtype, x.dtype)
    if x.dtype in INTEGERS:
        return copy(x, kind)
    wide = x if x.dtype is float32 else copy(x, float32)
    side = abs(wide) if what == "trunc" else wide
    nearest = copy(side, int32)
    overshoot = ndarray(x.shape, float32)
    whole = ndarray(x.shape, float32)
    if what == "ceil":
        nisa.tensor_tensor(dst=overshoot, data1=nearest, data2=side, op=less)
        nisa.tensor_tensor(dst=whole, data1=nearest, data2=overshoot, op=add)
    else:
        nisa.tensor_tensor(dst=overshoot, data1=nearest, data2=side, op=greater)
        nisa.tensor_tensor(dst=whole, data1=nearest, data2=overshoot, op=subtract)
    if what == "trunc":
        nisa.tensor_tensor(dst=whole, data1=whole, data2=sign(wide), op=multiply)
    # int32 holds no infinity, no NaN and nothing beyond 2^31; large values have no fraction to remove.
    small = ndarray(x.shape, uint8)
    nisa.tensor_scalar(dst=small, data=wide, op0=abs, operand0=0.0, op1=less, operand1=_WHOLE)
    nisa.tensor_copy_predicated(dst=whole, src=wide, predicate=small, reverse_pred=True)
    return whole if kind is float32 else copy(whole, kind)


def ceil(x: Any, dtype: Any = None) -> NkiTensor:
    """The smallest whole number >= x."""
    return _round_with("ceil", x, dtype)


def floor(x: Any, dtype: Any = None) -> NkiTensor:
    """The largest whole number <= x."""
    return _round_with("floor", x, dtype)


def trunc(x: Any, dtype: Any = None) -> NkiTensor:
    """`x` without its fraction."""
    return _round_with("trunc", x, dtype)
