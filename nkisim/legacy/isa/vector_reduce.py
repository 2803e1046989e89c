"""Vector Engine of SDK 2.26: reductions, running results and statistics along the free dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim import isa as nisa
from nkisim import language
from nkisim.legacy._dtypes import promote
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import operand, produce
from nkisim.legacy._operators import as_op
from nkisim.legacy._tile import Tile
from nkisim.legacy.isa._arguments import column, float32_column, one_pass, read_like, result_buffer, write_column
from nkisim.operators import op_name
from nkisim.tensor import NkiTensor

_STATISTICS = 6


def tensor_reduce(
    op: Any,
    data: Any,
    axis: Any,
    *,
    mask: Any = None,
    dtype: Any = None,
    negate: bool = False,
    keepdims: bool = False,
    **kwargs: Any,
) -> Tile:
    """The last free dimensions of data reduced by `op`; [P, 1] where all are.

    Axes that do not end at the last dimension count from it, axis 1 the most minor, as the page has them: on a tile
    [P, A, B] axis 1 is B, and so is axis 2.

    Raises:
        NkiError: as the current `tensor_reduce`.
    """
    what = "tensor_reduce"
    buffer = result_buffer(what, kwargs)
    t = operand(what, "data", data)
    operator = as_op(what, "op", op)
    rank = len(t.shape)
    axes = _axes(axis, rank)
    kept = axes[0]
    dims: tuple[int | None, ...] = tuple(range(kept))
    shape = t.shape[:kept]
    if keepdims or kept == 1:
        ones = rank - kept if keepdims else 1
        dims, shape = dims + (None,) * ones, shape + (1,) * ones
    one_pass(what, mask, t.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        nisa.tensor_reduce(dst, operator, part.read(t), axes, negate=negate, keepdims=keepdims)

    return produce(what, shape, issue, dtype=dtype, default=t.kind, mask=mask, over=t.shape, dims=dims, buffer=buffer)


def _axes(axis: Any, rank: int) -> tuple[int, ...]:
    """The reduced dimensions, a run that ends at the last one, in the current API's count."""
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    allowed = "free axes from the most minor one on: 1, [1], [1, 2], ..."
    if not given or not all(isinstance(a, (int, np.integer)) and not isinstance(a, bool) for a in given):
        refuse("tensor_reduce", "axis", "type", received=repr(axis), allowed=allowed)
    axes = sorted(int(a) for a in given)
    n = len(axes)
    consecutive = axes == list(range(axes[0], axes[0] + n))
    if not consecutive or axes[0] < 1 or axes[-1] >= rank or (axes[-1] != rank - 1 and axes[0] != 1):
        refuse("tensor_reduce", "axis", "reduced axes", received=axis, allowed=allowed)
    return tuple(range(rank - n, rank))


def tensor_scalar_reduce(
    *,
    data: Any,
    op0: Any,
    operand0: Any,
    reduce_op: Any,
    reduce_res: Any,
    reverse0: bool = False,
    dtype: Any = None,
    mask: Any = None,
    **kwargs: Any,
) -> Tile:
    """data op0 operand0, with each row of it reduced by `reduce_op` to `reduce_res`, [P, 1].

    `reduce_op=nl.subtract` starts at 0 and subtracts each element.

    Raises:
        NkiError: as the current `tensor_scalar_reduce`; no `reduce_res`.
    """
    what = "tensor_scalar_reduce"
    buffer = result_buffer(what, kwargs)
    t = operand(what, "data", data)
    first, reduction = as_op(what, "op0", op0), as_op(what, "reduce_op", reduce_op)
    column0 = column(what, "operand0", operand0, t.shape[0])
    if reduce_res is None:
        refuse(what, "reduce_res", "result of the reduction", received=None, allowed=f"a [{t.shape[0]}, 1] tile")
    result = column(what, "reduce_res", reduce_res, t.shape[0])
    # The current instruction has no subtraction: 0 - x0 - x1 - ... is the negated sum.
    negate = op_name(reduction) == "subtract"
    combine = language.add if negate else reduction
    one_pass(what, mask, t.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        nisa.tensor_scalar_reduce(
            dst,
            part.read(t),
            first,
            float32_column(part, column0),
            combine,
            write_column(part, result),
            reverse0,
            reduce_res_negate=negate,
        )

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)


def tensor_tensor_scan(
    data0: Any,
    data1: Any,
    initial: Any,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    *,
    dtype: Any = None,
    mask: Any = None,
    **kwargs: Any,
) -> Tile:
    """r[:, i] = (data0[:, i] op0 r[:, i - 1]) op1 data1[:, i], before the first column `initial`.

    By default in the promoted type of both tiles; `initial` is a number or a [P, 1] tile.

    Raises:
        NkiError: as the current `tensor_tensor_scan`.
    """
    what = "tensor_tensor_scan"
    buffer = result_buffer(what, kwargs)
    a, b = operand(what, "data0", data0), operand(what, "data1", data1)
    first, second = as_op(what, "op0", op0), as_op(what, "op1", op1)
    start = column(what, "initial", initial, a.shape[0])
    one_pass(what, mask, a.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        state = part.column(start)
        y = read_like(part, "data1", b)
        nisa.tensor_tensor_scan(dst, part.read(a), y, state, first, second, reverse0, reverse1)

    default = promote(a.kind, b.kind)
    return produce(what, a.shape, issue, dtype=dtype, default=default, mask=mask, buffer=buffer)


def bn_stats(data: Any, *, mask: Any = None, dtype: Any = None, **kwargs: Any) -> Tile:
    """[P, 6]: count, mean and variance * count of the even elements of each row, then of the odd ones.

    Raises:
        NkiError: as the current `bn_stats`.
    """
    return _statistics("bn_stats", nisa.bn_stats, _STATISTICS, data, mask, dtype, kwargs)


def bn_aggr(data: Any, *, mask: Any = None, dtype: Any = None, **kwargs: Any) -> Tile:
    """[P, 2]: mean and variance of the rows that (count, mean, variance * count) triples describe.

    Raises:
        NkiError: as the current `bn_aggr`.
    """
    return _statistics("bn_aggr", nisa.bn_aggr, 2, data, mask, dtype, kwargs)


def _statistics(what: str, instruction: Any, n: int, data: Any, mask: Any, dtype: Any, kwargs: dict[str, Any]) -> Tile:
    buffer = result_buffer(what, kwargs)
    t = operand(what, "data", data)
    one_pass(what, mask, t.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        instruction(dst, part.read(t))

    return produce(
        what,
        (t.shape[0], n),
        issue,
        dtype=dtype,
        default=t.kind,
        mask=mask,
        over=t.shape,
        dims=(0, None),
        buffer=buffer,
    )
