"""Element-wise arithmetic, comparisons, bit and logical operators.

Each callable is also the name of the ALU operator: `op=nl.add`. Called, it lowers to one instruction:
`tensor_tensor` for two tiles, `tensor_scalar` for a tile and a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from nkisim import isa as nisa
from nkisim.dtypes import INTEGERS
from nkisim.language._creation import ndarray
from nkisim.language._wrap import KNOWN_ISSUES, dtype_of, is_number, refuse, tile
from nkisim.operators import op_name, operator
from nkisim.tensor import NkiTensor

Op = Callable[..., NkiTensor]


def _binary(op: Op, x: Any, y: Any, dtype: Any) -> NkiTensor:
    what = op_name(op)
    if not isinstance(x, NkiTensor) and not isinstance(y, NkiTensor):
        refuse(what, "x", "type", f"{type(x).__name__} and {type(y).__name__}", "at least one tile")
    for operand, value in (("x", x), ("y", y)):
        if isinstance(value, NkiTensor):
            tile(what, operand, value)
        elif not is_number(value):
            refuse(what, operand, "type", type(value).__name__, "a tile or a number")
    if isinstance(x, NkiTensor) and isinstance(y, NkiTensor):
        return _two_tiles(op, what, x, y, dtype)
    return _with_number(op, what, x, y, dtype)


def _two_tiles(op: Op, what: str, x: NkiTensor, y: NkiTensor, dtype: Any) -> NkiTensor:
    if x.shape != y.shape:
        allowed = f"{list(x.shape)}, that of x: tiles are not broadcast"
        refuse(what, "y", "shape", list(y.shape), allowed, KNOWN_ISSUES)
    if dtype is None and x.dtype is not y.dtype:
        # NKI 0.6 dropped the type promotion table of the legacy API and put nothing in its place.
        refuse(what, "dtype", "result type of unequal inputs", f"{x.dtype} and {y.dtype}", "equal dtypes, or dtype=")
    dst = ndarray(x.shape, dtype_of(what, dtype, x.dtype))
    nisa.tensor_tensor(dst=dst, data1=x, data2=y, op=op)
    return dst


def _with_number(op: Op, what: str, x: Any, y: Any, dtype: Any) -> NkiTensor:
    reverse = not isinstance(x, NkiTensor)
    data, number = (y, x) if reverse else (x, y)
    dst = ndarray(data.shape, dtype_of(what, dtype, data.dtype))
    nisa.tensor_scalar(dst=dst, data=data, op0=op, operand0=number, reverse0=reverse)
    return dst


def _by_magnitude(op: Op, x: Any, y: Any, dtype: Any) -> NkiTensor:
    """`abs_max` and `abs_min`, whose documented examples pass a [P, 1] tile as `y`."""
    what = op_name(op)
    column = isinstance(y, NkiTensor) and isinstance(x, NkiTensor) and y.free_size == 1 and x.shape != y.shape
    if not column:
        return _binary(op, x, y, dtype)
    tile(what, "x", x)
    tile(what, "y", y)
    dst = ndarray(x.shape, dtype_of(what, dtype, x.dtype))
    nisa.tensor_scalar(dst=dst, data=x, op0=op, operand0=y)
    return dst


# ---------------------------------------------------------------------------------------------------
# Arithmetic


@operator
def add(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x + y`."""
    return _binary(add, x, y, dtype)


@operator
def subtract(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x - y`."""
    return _binary(subtract, x, y, dtype)


@operator
def multiply(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x * y`."""
    return _binary(multiply, x, y, dtype)


@operator
def maximum(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """The larger of x and y."""
    return _binary(maximum, x, y, dtype)


@operator
def minimum(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """The smaller of x and y."""
    return _binary(minimum, x, y, dtype)


@operator
def abs_max(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x` where |x| > |y|, else y, signs kept (NeuronCore-v4)."""
    return _by_magnitude(abs_max, x, y, dtype)


@operator
def abs_min(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x` where |x| < |y|, else y, signs kept (NeuronCore-v4)."""
    return _by_magnitude(abs_min, x, y, dtype)


@operator
def power(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x` to the power of y, both tiles: a number is refused as base and as exponent."""
    for operand, value in (("x", x), ("y", y)):
        if not isinstance(value, NkiTensor):
            refuse("power", operand, "type", type(value).__name__, "a tile: use nl.full", KNOWN_ISSUES)
    return _binary(power, x, y, dtype)


def _not_on_hardware(what: str, instead: str) -> NoReturn:
    refuse(what, "", "no such hardware operation", f"nl.{what}", instead, KNOWN_ISSUES)


def divide(x: Any, y: Any, dtype: Any = None) -> NkiTensor:  # noqa: ARG001
    """Refused: no engine divides."""
    _not_on_hardware("divide", "nl.multiply(x, nl.reciprocal(y))")


def fmod(x: Any, y: Any, dtype: Any = None) -> NkiTensor:  # noqa: ARG001
    """Refused: no engine has a remainder."""
    _not_on_hardware("fmod", "q = nl.trunc(nl.multiply(x, nl.reciprocal(y))), then x - q * y")


def mod(x: Any, y: Any, dtype: Any = None) -> NkiTensor:  # noqa: ARG001
    """Refused: no engine has a remainder."""
    _not_on_hardware("mod", "q = nl.floor(nl.multiply(x, nl.reciprocal(y))), then x - q * y")


def negative(x: Any, dtype: Any = None) -> NkiTensor:
    """-x."""
    x = tile("negative", "x", x)
    dst = ndarray(x.shape, dtype_of("negative", dtype, x.dtype))
    nisa.tensor_scalar(dst=dst, data=x, op0=multiply, operand0=-1.0)
    return dst


# ---------------------------------------------------------------------------------------------------
# Comparisons: 1 where true, 0 elsewhere, in the input's dtype


@operator
def equal(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where x == y, else 0."""
    return _binary(equal, x, y, dtype)


@operator
def not_equal(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where x != y, else 0."""
    return _binary(not_equal, x, y, dtype)


@operator
def less(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where x < y, else 0."""
    return _binary(less, x, y, dtype)


@operator
def less_equal(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where x <= y, else 0."""
    return _binary(less_equal, x, y, dtype)


@operator
def greater(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where x > y, else 0."""
    return _binary(greater, x, y, dtype)


@operator
def greater_equal(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where x >= y, else 0."""
    return _binary(greater_equal, x, y, dtype)


# ---------------------------------------------------------------------------------------------------
# Bits of integer tiles


@operator
def bitwise_and(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x & y`."""
    return _binary(bitwise_and, x, y, dtype)


@operator
def bitwise_or(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x | y`."""
    return _binary(bitwise_or, x, y, dtype)


@operator
def bitwise_xor(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x ^ y`."""
    return _binary(bitwise_xor, x, y, dtype)


@operator
def left_shift(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x << y`."""
    return _binary(left_shift, x, y, dtype)


@operator
def right_shift(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """`x >> y`, with zeros coming in."""
    return _binary(right_shift, x, y, dtype)


@operator
def invert(x: Any, dtype: Any = None) -> NkiTensor:
    """~x, as an exclusive or with all ones."""
    x = tile("invert", "x", x)
    if x.dtype not in INTEGERS:
        refuse("invert", "x", "dtype", x.dtype, ", ".join(INTEGERS))
    ones = -1 if x.dtype.kind == "int" else 2 ** (8 * x.dtype.itemsize) - 1
    dst = ndarray(x.shape, dtype_of("invert", dtype, x.dtype))
    nisa.tensor_scalar(dst=dst, data=x, op0=bitwise_xor, operand0=ones)
    return dst


# ---------------------------------------------------------------------------------------------------
# Logic on 0 and 1


@operator
def logical_and(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where x and y are both not 0, else 0."""
    return _binary(logical_and, x, y, dtype)


@operator
def logical_or(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where x or y is not 0, else 0."""
    return _binary(logical_or, x, y, dtype)


@operator
def logical_xor(x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """1 where exactly one of x and y is not 0, else 0."""
    return _binary(logical_xor, x, y, dtype)


def logical_not(x: Any, dtype: Any = None) -> NkiTensor:
    """1 - x for x of 0 and 1, as an exclusive or with 1: of bits for integers (2 becomes 3), of truth for floats."""
    x = tile("logical_not", "x", x)
    dst = ndarray(x.shape, dtype_of("logical_not", dtype, x.dtype))
    if x.dtype in INTEGERS:
        nisa.tensor_scalar(dst=dst, data=x, op0=bitwise_xor, operand0=1)
    else:
        nisa.tensor_scalar(dst=dst, data=x, op0=logical_xor, operand0=1.0)
    return dst
