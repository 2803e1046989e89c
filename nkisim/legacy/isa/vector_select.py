"""Vector Engine of SDK 2.26: selection by position or predicate, and the eight largest elements of a row."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from nkisim import isa as nisa
from nkisim.dtypes import uint16, uint32
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import operand, perform, produce
from nkisim.legacy._operators import as_op
from nkisim.legacy._tile import Tile
from nkisim.legacy.isa._arguments import (
    as_mask_tile,
    column,
    first_dim,
    no_keywords,
    one_pass,
    read_like,
    require_dtype,
    result_buffer,
    write_column,
)
from nkisim.legacy.isa._enums import current, fp32
from nkisim.legacy.isa._enums import reduce_cmd as ReduceCmd
from nkisim.tensor import NkiTensor

EIGHT = 8


def range_select(
    *,
    on_true_tile: Any,
    comp_op0: Any,
    comp_op1: Any,
    bound0: Any,
    bound1: Any,
    reduce_cmd: Any = ReduceCmd.idle,
    reduce_res: Any = None,
    reduce_op: Any = np.amax,
    range_start: int = 0,
    on_false_value: float = fp32.min,
    mask: Any = None,
    dtype: Any = None,
    **kwargs: Any,
) -> Tile:
    """The elements whose position i has i comp_op0 bound0 and i comp_op1 bound1; float32's least elsewhere.

    i is `range_start` plus the element's number in its row. `reduce_res` needs a `reduce_cmd` that reduces.

    Raises:
        NkiError: as the current `range_select`.
        NotImplementedError: a mask that cuts a row into pieces without one position per column.
    """
    what = "range_select"
    buffer = result_buffer(what, kwargs)
    command = current(ReduceCmd, reduce_cmd, what, "reduce_cmd")
    t = operand(what, "on_true_tile", on_true_tile)
    test0, test1 = as_op(what, "comp_op0", comp_op0), as_op(what, "comp_op1", comp_op1)
    reduction = as_op(what, "reduce_op", reduce_op)
    low, high = (column(what, name, b, t.shape[0]) for name, b in (("bound0", bound0), ("bound1", bound1)))
    result = column(what, "reduce_res", reduce_res, t.shape[0])
    if command is not nisa.reduce_cmd.idle:
        one_pass(what, mask, t.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        nisa.range_select(
            dst,
            part.read(t),
            test0,
            test1,
            part.column(low),
            part.column(high),
            reduce_cmd=command,
            reduce_res=write_column(part, result),
            reduce_op=reduction,
            range_start=range_start + _first_position(what, part, t.shape),
            on_false_value=on_false_value,
        )

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)


def _first_position(what: str, part: Any, shape: tuple[int, ...]) -> int:
    """Where in its row the running rectangle begins."""
    free = part.box[1:]
    outer = [i for i, n in enumerate(shape[1:]) if n > 1]
    whole = all(size == shape[1 + i] for i, (_, size) in enumerate(free) if i in outer[1:])
    if not whole:
        raise NotImplementedError(f"nki.isa.{what}.mask: a mask over inner dimensions of a row")
    return sum(begin * prod(shape[2 + i :]) for i, (begin, _) in enumerate(free))


def _from_row_start(what: str, part: Any) -> None:
    """Refuse masks that leave the rest of a row, whose positions would count from there."""
    if any(begin for begin, _ in part.box[1:]):
        raise NotImplementedError(f"nki.isa.{what}.mask: a mask that leaves out the beginning of a row")


def select_reduce(
    *,
    dst: Any,
    predicate: Any,
    on_true: Any,
    on_false: Any,
    reduce_res: Any = None,
    reduce_cmd: Any = ReduceCmd.idle,
    reduce_op: Any = np.amax,
    reverse_pred: bool = False,
    mask: Any = None,
    dtype: Any = None,
    **kwargs: Any,
) -> None:
    """Write to `dst` on_true where the predicate is not zero (is zero: `reverse_pred`), else on_false.

    `on_false` is a number or a [P, 1] tile; the row maximum goes to `reduce_res` as `reduce_cmd` says.

    Raises:
        NkiError: as the current `select_reduce`; a `dtype` that is not dst's.
    """
    what = "select_reduce"
    no_keywords(what, kwargs)
    command = current(ReduceCmd, reduce_cmd, what, "reduce_cmd")
    target, chosen, source = (
        operand(what, name, value) for name, value in (("dst", dst), ("predicate", predicate), ("on_true", on_true))
    )
    require_dtype(what, dtype, target)
    reduction = as_op(what, "reduce_op", reduce_op)
    other = column(what, "on_false", on_false, target.shape[0])
    result = column(what, "reduce_res", reduce_res, target.shape[0])
    if command is not nisa.reduce_cmd.idle:
        one_pass(what, mask, target.shape)

    def issue(part: Any) -> None:
        nisa.select_reduce(
            part.write(target),
            as_mask_tile(read_like(part, "predicate", chosen)),
            read_like(part, "on_true", source),
            part.column(other),
            reduce_res=write_column(part, result),
            reduce_cmd=command,
            reduce_op=reduction,
            reverse_pred=reverse_pred,
        )

    perform(what, target.shape, issue, mask=mask)


def max8(*, src: Any, mask: Any = None, dtype: Any = None, **kwargs: Any) -> Tile:
    """The 8 largest values of each row, [P, 8], in descending order.

    Raises:
        NkiError: as the current `max8`.
    """
    what = "max8"
    buffer = result_buffer(what, kwargs)
    t = operand(what, "src", src)
    one_pass(what, mask, t.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        nisa.max8(dst, _rows(part.read(t)))

    shape = (t.shape[0], EIGHT)
    return produce(
        what, shape, issue, dtype=dtype, default=t.kind, mask=mask, over=t.shape, dims=(0, None), buffer=buffer
    )


def nc_find_index8(*, data: Any, vals: Any, mask: Any = None, dtype: Any = None, **kwargs: Any) -> Tile:
    """The position in its row of data of each of 8 values, [P, 8] of uint32 or uint16.

    Raises:
        NkiError: as the current `nc_find_index8`; another `dtype`.
        NotImplementedError: a mask that leaves out the beginning of a row.
    """
    what = "nc_find_index8"
    buffer = result_buffer(what, kwargs)
    t, wanted = operand(what, "data", data), operand(what, "vals", vals)
    kind = uint32 if dtype is None else kind_of(dtype)
    if kind not in (uint16, uint32):
        refuse(what, "dtype", "type of the indices", received=kind, allowed="uint16, uint32")
    one_pass(what, mask, t.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        _from_row_start(what, part)
        nisa.nc_find_index8(dst, _rows(part.read(t)), part.read(wanted, dims=first_dim(wanted)))

    shape = (t.shape[0], EIGHT)
    return produce(what, shape, issue, dtype=kind, default=kind, mask=mask, over=t.shape, dims=(0, None), buffer=buffer)


def nc_match_replace8(
    *, data: Any, vals: Any, imm: float, dst_idx: Any = None, mask: Any = None, dtype: Any = None, **kwargs: Any
) -> Tile:
    """data with the first occurrence of each of 8 values replaced by imm; `dst_idx` gets their positions.

    Equal values are paired with successive positions, the first with the first value, as the page of 2.26 lists it;
    the current instruction, which says that the hardware begins with the last value, gets the values reversed.

    Raises:
        NkiError: as the current `nc_match_replace8`.
        NotImplementedError: a mask that leaves out the beginning of a row.
    """
    what = "nc_match_replace8"
    buffer = result_buffer(what, kwargs)
    t, wanted = operand(what, "data", data), operand(what, "vals", vals)
    found = None if dst_idx is None else operand(what, "dst_idx", dst_idx)
    one_pass(what, mask, t.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        positions = None
        if found is not None:
            _from_row_start(what, part)
            positions = _reversed(part.write(found, dims=first_dim(found)))
        values = _reversed(part.read(wanted, dims=first_dim(wanted)))
        nisa.nc_match_replace8(dst, part.read(t), values, imm, dst_idx=positions)

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)


def _rows(t: NkiTensor) -> NkiTensor:
    """A tile with its free dimensions merged: the current instructions take at most three dimensions."""
    return t.reshape((t.shape[0], prod(t.shape[1:]))) if t.ndim > 2 else t


def _reversed(t: NkiTensor) -> NkiTensor:
    """The elements of each row from the last to the first, as a view with a negative stride."""
    rows = _rows(t)
    (partition, p), (step, n) = rows.get_pattern()
    return rows.ap([[partition, p], [-step, n]], offset=(n - 1) * step)
