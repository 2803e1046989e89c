"""Element-wise functions: arithmetic, comparisons, bits and logic.

Each is also the name of an operator for `op=` arguments. Tiles are broadcast as NumPy's arrays; a tile of one
partition is copied to those of the other one first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim import isa
from nkisim.dtypes import DType, bool_, float32
from nkisim.legacy._create import constant_tile
from nkisim.legacy._dtypes import promote, weak
from nkisim.legacy._errors import refuse
from nkisim.legacy._index import broadcast_shapes
from nkisim.legacy._issue import Part, operand, produce
from nkisim.legacy._tile import Tile
from nkisim.legacy.language._shared import is_number, on_all_partitions, out_of_psum
from nkisim.operators import NamedOperator
from nkisim.tensor import NkiTensor


def _binary(name: str, x: Any, y: Any, dtype: Any, mask: Any, result: DType | None = None) -> Tile:
    """`x op y`; `result` is the element type where the inputs do not decide it."""
    a, b = _value(name, "x", x), _value(name, "y", y)
    if not isinstance(a, Tile) and not isinstance(b, Tile):
        refuse(name, "x", "type", f"{type(x).__name__} and {type(y).__name__}", "at least one tile", _page(name))
    default = promote(_kind(a), _kind(b)) if result is None else result
    op = NamedOperator(name)
    if not isinstance(a, Tile) or not isinstance(b, Tile):
        return _with_number(name, op, a, b, dtype, default, mask)
    shape = broadcast_shapes(name, a.shape, b.shape)
    a, b = on_all_partitions(a, shape), on_all_partitions(b, shape)
    for data, other, reverse in ((a, b, False), (b, a, True)):
        if data.shape == shape and other.kind is float32 and _is_column(other, shape) and name not in _BITS:
            return _with_column(name, op, data, other, reverse, dtype, default, mask)
    left, right = a, out_of_psum(a, b)

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.tensor_tensor(dst=dst, data1=part.read(left), data2=part.read(right), op=op)

    return produce(name, shape, issue, dtype=dtype, default=default, mask=mask)


def _value(name: str, label: str, x: Any) -> Any:
    if isinstance(x, Tile):
        return operand(name, label, x)
    if not is_number(x):
        refuse(name, label, "type", type(x).__name__, "a tile or a number", _page(name))
    return x


def _kind(x: Any) -> DType:
    return x.kind if isinstance(x, Tile) else weak(x)


def _page(name: str) -> str:
    return f"nki.language.{name}, SDK 2.26"


def _is_column(t: Tile, shape: tuple[int, ...]) -> bool:
    return t.shape != shape and all(n == 1 for n in t.shape[1:])


def _with_column(
    name: str, op: NamedOperator, data: Tile, column: Tile, reverse: bool, dtype: Any, default: DType, mask: Any
) -> Tile:
    def issue(dst: NkiTensor, part: Part) -> None:
        isa.tensor_scalar(
            dst=dst, data=part.read(data), op0=op, operand0=part.column(column), reverse0=reverse, engine=_engine(name)
        )

    return produce(name, data.shape, issue, dtype=dtype, default=default, mask=mask)


def _with_number(name: str, op: NamedOperator, a: Any, b: Any, dtype: Any, default: DType, mask: Any) -> Tile:
    reverse = not isinstance(a, Tile)
    data, number = (b, a) if reverse else (a, b)
    value = number.item() if isinstance(number, np.generic) else number
    value = int(value) if isinstance(value, bool) else value

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.tensor_scalar(dst=dst, data=part.read(data), op0=op, operand0=value, reverse0=reverse, engine=_engine(name))

    return produce(name, data.shape, issue, dtype=dtype, default=default, mask=mask)


def _engine(name: str) -> Any:
    return isa.engine.gpsimd if name in ("power", "rsqrt") else isa.engine.unknown


_BITS = ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift")


def add(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x + y`."""
    return _binary("add", x, y, dtype, mask)


def subtract(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x - y`."""
    return _binary("subtract", x, y, dtype, mask)


def multiply(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x * y`."""
    return _binary("multiply", x, y, dtype, mask)


def maximum(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """The larger of x and y."""
    return _binary("maximum", x, y, dtype, mask)


def minimum(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """The smaller of x and y."""
    return _binary("minimum", x, y, dtype, mask)


def power(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x` to the power of y, on the GpSimd Engine."""
    a, b = _value("power", "x", x), _value("power", "y", y)
    result = promote(_kind(a), _kind(b))
    # The engine's operator takes two tiles.
    if isinstance(b, Tile) and not isinstance(a, Tile):
        a = constant_tile("power", b.shape, a)
    elif isinstance(a, Tile) and not isinstance(b, Tile):
        b = constant_tile("power", a.shape, b)
    return _binary("power", a, b, dtype, mask, result)


def divide(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x / y`, as a product with the reciprocal: no engine divides."""
    a, b = _value("divide", "x", x), _value("divide", "y", y)
    # The quotient of integers is a float.
    promoted = promote(_kind(a), _kind(b))
    result = promoted if promoted.is_float else float32
    if not isinstance(b, Tile):
        if b == 0:
            refuse("divide", "y", "value", y, "a number other than 0", _page("divide"))
        return _binary("multiply", a, 1.0 / float(b), dtype, mask, result)
    if not isinstance(a, Tile) and a == 1:
        return _reciprocal(b, dtype, mask, result)
    inside = mask if not isinstance(a, Tile) or broadcast_shapes("divide", a.shape, b.shape) == b.shape else None
    return _binary("multiply", a, _reciprocal(b, None, inside, float32), dtype, mask, result)


def reciprocal(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`1 / x`, on the Vector Engine."""
    t = operand("reciprocal", "x", x)
    return _reciprocal(t, dtype, mask, t.kind)


def _reciprocal(t: Tile, dtype: Any, mask: Any, default: DType) -> Tile:
    def issue(dst: NkiTensor, part: Part) -> None:
        isa.reciprocal(dst=dst, data=part.read(t))

    return produce("reciprocal", t.shape, issue, dtype=dtype, default=default, mask=mask)


def negative(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """-x."""
    t = operand("negative", "x", x)
    return _with_number("multiply", NamedOperator("multiply"), t, -1.0, dtype, t.kind, mask)


def _remainder(name: str, x: Any, y: Any, dtype: Any, mask: Any) -> Tile:
    """x - y * q with the quotient q rounded down (`mod`) or toward zero (`fmod`)."""
    from nkisim.legacy.language._functions import floor, trunc

    kind = promote(_kind(_value(name, "x", x)), _kind(_value(name, "y", y)))
    quotient = divide(x, y, dtype=float32)
    whole = floor(quotient) if name == "mod" else trunc(quotient)
    return _binary("subtract", x, multiply(whole, y, dtype=float32), dtype, mask, kind)


def mod(x: Any, y: Any, dtype: Any = None, mask: Any = None) -> Tile:
    """`x - y * floor(x / y)`: the sign of y. No engine has it, so quotients next to whole numbers may round up."""
    return _remainder("mod", x, y, dtype, mask)


def fmod(x: Any, y: Any, dtype: Any = None, mask: Any = None) -> Tile:
    """`x - y * trunc(x / y)`: the sign of x. No engine has it, so quotients next to whole numbers may round up."""
    return _remainder("fmod", x, y, dtype, mask)


def equal(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """`x == y`."""
    return _binary("equal", x, y, dtype, mask, bool_)


def not_equal(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """`x != y`."""
    return _binary("not_equal", x, y, dtype, mask, bool_)


def less(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """`x < y`."""
    return _binary("less", x, y, dtype, mask, bool_)


def less_equal(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """`x <= y`."""
    return _binary("less_equal", x, y, dtype, mask, bool_)


def greater(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """`x > y`."""
    return _binary("greater", x, y, dtype, mask, bool_)


def greater_equal(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """`x >= y`."""
    return _binary("greater_equal", x, y, dtype, mask, bool_)


def logical_and(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """Whether x and y are both not 0."""
    return _binary("logical_and", x, y, dtype, mask, bool_)


def logical_or(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """Whether x or y is not 0."""
    return _binary("logical_or", x, y, dtype, mask, bool_)


def logical_xor(x: Any, y: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """Whether exactly one of x and y is not 0."""
    return _binary("logical_xor", x, y, dtype, mask, bool_)


def logical_not(x: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """Whether x is 0."""
    return _binary("equal", operand("logical_not", "x", x), 0, dtype, mask, bool_)


def bitwise_and(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x & y`."""
    return _bits("bitwise_and", x, y, dtype, mask)


def bitwise_or(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x | y`."""
    return _bits("bitwise_or", x, y, dtype, mask)


def bitwise_xor(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x ^ y`."""
    return _bits("bitwise_xor", x, y, dtype, mask)


def left_shift(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x << y`."""
    return _bits("left_shift", x, y, dtype, mask)


def right_shift(x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x >> y`, with zeros coming in."""
    return _bits("right_shift", x, y, dtype, mask)


def _bits(name: str, x: Any, y: Any, dtype: Any, mask: Any) -> Tile:
    kinds = [t.kind for t in (x, y) if isinstance(t, Tile)]
    if len(kinds) == 2 and all(k is bool_ for k in kinds):
        return _binary(name.replace("bitwise", "logical"), x, y, dtype, mask, bool_)
    # An engine works on the bits of one type; a number has that of the tile.
    return _binary(name, x, y, dtype, mask, kinds[0] if len(kinds) == 1 else None)


def invert(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """~x, as an exclusive or with all ones."""
    t = operand("invert", "x", x)
    if not t.kind.is_integer:
        refuse("invert", "x", "dtype", t.kind, "an integer type", _page("invert"))
    ones = -1 if t.kind.kind == "int" else 2 ** (8 * t.kind.itemsize) - 1
    return _binary("bitwise_xor", t, ones, dtype, mask, t.kind)
