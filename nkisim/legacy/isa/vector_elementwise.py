"""Vector Engine of SDK 2.26: element-wise arithmetic on tiles (`tensor_scalar`, `tensor_tensor`: other engines too)."""

from __future__ import annotations

from math import prod
from typing import Any

from nkisim import isa as nisa
from nkisim import language
from nkisim.dtypes import float32
from nkisim.legacy._dtypes import promote
from nkisim.legacy._errors import refuse
from nkisim.legacy._index import broadcast_shapes
from nkisim.legacy._issue import operand, produce
from nkisim.legacy._operators import as_op
from nkisim.legacy._tile import Tile
from nkisim.legacy.isa._arguments import column, float32_column, read_like, result_buffer
from nkisim.legacy.isa._enums import current
from nkisim.legacy.isa._enums import engine as Engine
from nkisim.operators import alu
from nkisim.tensor import NkiTensor


def tensor_tensor(
    data1: Any,
    data2: Any,
    op: Any,
    *,
    dtype: Any = None,
    mask: Any = None,
    engine: Any = Engine.unknown,
    **kwargs: Any,
) -> Tile:
    """data1 op data2, element by element; by default in the promoted type of both.

    Tiles of as many elements per partition may have any shapes; between others free dimensions of size 1 are repeated.

    Raises:
        NkiError: as the current `tensor_tensor`.
    """
    what = "tensor_tensor"
    buffer = result_buffer(what, kwargs)
    chosen = current(Engine, engine, what, "engine")
    a, b = operand(what, "data1", data1), operand(what, "data2", data2)
    operator = as_op(what, "op", op)

    repeats = len(a.shape) == len(b.shape) and a.shape[0] == b.shape[0] and prod(a.shape) != prod(b.shape)
    shape = broadcast_shapes(what, a.shape, b.shape) if repeats else a.shape

    def issue(dst: NkiTensor, part: Any) -> None:
        y = part.read(b) if repeats else read_like(part, "data2", b)
        nisa.tensor_tensor(dst, part.read(a), y, operator, engine=chosen)

    default = promote(a.kind, b.kind)
    return produce(what, shape, issue, dtype=dtype, default=default, mask=mask, buffer=buffer)


def tensor_scalar(
    data: Any,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    *,
    dtype: Any = None,
    mask: Any = None,
    engine: Any = Engine.unknown,
    **kwargs: Any,
) -> Tile:
    """(data op0 operand0) op1 operand1; operands are numbers or [P, 1] tiles.

    A column of another type than float32 is copied to one first, unless the operators work on bits.

    Raises:
        NkiError: as the current `tensor_scalar`.
    """
    what = "tensor_scalar"
    buffer = result_buffer(what, kwargs)
    chosen = current(Engine, engine, what, "engine")
    t = operand(what, "data", data)
    first, column0 = _stage(what, 0, op0, operand0, t.shape[0])
    second, column1 = (None, operand1) if op1 is None else _stage(what, 1, op1, operand1, t.shape[0])
    found = alu(first)
    bits = found is not None and found.is_bitvec

    def issue(dst: NkiTensor, part: Any) -> None:
        scalar0, scalar1 = (part.column(c) if bits else float32_column(part, c) for c in (column0, column1))
        nisa.tensor_scalar(
            dst,
            part.read(t),
            first,
            scalar0,
            reverse0,
            second,
            scalar1,
            reverse1,
            engine=chosen,
        )

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)


def _stage(what: str, i: int, op: Any, operand: Any, partitions: int) -> tuple[Any, Any]:
    """An operator of `tensor_scalar` and its operand; nl.logical_not, gone since, is a comparison with 0."""
    if getattr(op, "__name__", None) == "logical_not":
        return language.equal, 0.0
    return as_op(what, f"op{i}", op), column(what, f"operand{i}", operand, partitions)


def scalar_tensor_tensor(
    *,
    data: Any,
    op0: Any,
    operand0: Any,
    op1: Any,
    operand1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    dtype: Any = None,
    mask: Any = None,
    **kwargs: Any,
) -> Tile:
    """(data op0 operand0) op1 operand1; `operand0` is a number or a [P, 1] tile, `operand1` a tile like `data`.

    Raises:
        NkiError: as the current `scalar_tensor_tensor`.
    """
    what = "scalar_tensor_tensor"
    buffer = result_buffer(what, kwargs)
    t, other = operand(what, "data", data), operand(what, "operand1", operand1)
    first, second = as_op(what, "op0", op0), as_op(what, "op1", op1)
    column0 = column(what, "operand0", operand0, t.shape[0])

    def issue(dst: NkiTensor, part: Any) -> None:
        scalar, y = part.column(column0), read_like(part, "operand1", other)
        nisa.scalar_tensor_tensor(dst, part.read(t), first, scalar, second, y, reverse0, reverse1)

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)


def reciprocal(data: Any, *, dtype: Any = None, mask: Any = None, **kwargs: Any) -> Tile:
    """1 / data, element by element.

    Raises:
        NkiError: as the current `reciprocal`.
    """
    what = "reciprocal"
    buffer = result_buffer(what, kwargs)
    t = operand(what, "data", data)

    def issue(dst: NkiTensor, part: Any) -> None:
        nisa.reciprocal(dst, part.read(t))

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)


def dropout(data: Any, prob: Any, *, mask: Any = None, dtype: Any = None, **kwargs: Any) -> Tile:
    """data with each element replaced by zero with probability `prob`, a number or a [P, 1] tile.

    A tile's probabilities above 1 count as 1, in an instruction of its own; a result of another type than the data's
    is copied from one of that type.

    Raises:
        NkiError: as the current `dropout`; integer data with a result of another type.
    """
    what = "dropout"
    buffer = result_buffer(what, kwargs)
    t = operand(what, "data", data)
    rate = column(what, "prob", prob, t.shape[0])

    def issue(dst: NkiTensor, part: Any) -> None:
        x, p = part.read(t), part.column(rate)
        if isinstance(p, NkiTensor):
            limited = language.ndarray(p.shape, float32)
            nisa.tensor_scalar(limited, p, language.minimum, 1.0)
            p = limited
        if dst.dtype is x.dtype:
            nisa.dropout(dst, x, p)
            return
        if not x.dtype.is_float:
            refuse(what, "dtype", "type of an integer tile's result", received=dst.dtype, allowed=x.dtype)
        kept = language.ndarray(x.shape, x.dtype)
        nisa.dropout(kept, x, p)
        nisa.tensor_copy(dst, kept)

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)
