"""SDK 2.26: instructions that move or set elements on chip without computing on them."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim import isa as nisa
from nkisim import language
from nkisim.hardware import GEN3
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import operand, perform, produce
from nkisim.legacy._tile import Tile
from nkisim.legacy.isa._arguments import (
    as_mask_tile,
    integral,
    is_number,
    no_keywords,
    read_like,
    require_dtype,
    result_buffer,
)
from nkisim.legacy.isa._enums import current
from nkisim.legacy.isa._enums import engine as Engine
from nkisim.machine import current_core
from nkisim.tensor import NkiTensor


def tensor_copy(src: Any, *, mask: Any = None, dtype: Any = None, engine: Any = Engine.unknown, **kwargs: Any) -> Tile:
    """A copy of `src`: bit by bit where the type stays, through float32 otherwise.

    On the Scalar Engine of NeuronCore-v2 every copy goes through float32.

    Raises:
        NkiError: as the current `tensor_copy`.
    """
    return _copy("tensor_copy", src, False, mask, dtype, engine, kwargs)


def tensor_copy_dynamic_src(
    src: Any, *, mask: Any = None, dtype: Any = None, engine: Any = Engine.unknown, **kwargs: Any
) -> Tile:
    """`tensor_copy` of a tile at a run-time offset in its partitions: `t[i_p, offset[0, 0] + i_f]`.

    Modelled as an ordinary copy; SDK 2.26 gives it about 600 cycles at least.

    Raises:
        NkiError: as the current `tensor_copy`; an offset outside the tile.
    """
    return _copy("tensor_copy_dynamic_src", src, True, mask, dtype, engine, kwargs)


def _copy(what: str, src: Any, indirect: bool, mask: Any, dtype: Any, engine: Any, kwargs: dict[str, Any]) -> Tile:
    buffer = result_buffer(what, kwargs)
    chosen = current(Engine, engine, what, "engine")
    t = operand(what, "src", src, indirect=indirect)

    def issue(dst: NkiTensor, part: Any) -> None:
        _move(dst, part.read(t), chosen)

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)


def _move(dst: NkiTensor, src: NkiTensor, engine: nisa.engine) -> None:
    if engine is nisa.engine.scalar and current_core("nki.isa.tensor_copy").hardware.generation < GEN3:
        nisa.activation(dst, language.copy, src)
    else:
        nisa.tensor_copy(dst, src, engine=engine)


def tensor_copy_dynamic_dst(
    *, dst: Any, src: Any, mask: Any = None, dtype: Any = None, engine: Any = Engine.unknown, **kwargs: Any
) -> None:
    """Copy `src` to a tile at a run-time offset in its partitions: `dst=t[i_p, offset[0, 0] + i_f]`.

    Modelled as an ordinary copy; SDK 2.26 gives it about 600 cycles at least.

    Raises:
        NkiError: as the current `tensor_copy`; an offset outside the tile; a `dtype` that is not dst's.
    """
    what = "tensor_copy_dynamic_dst"
    no_keywords(what, kwargs)
    chosen = current(Engine, engine, what, "engine")
    target, t = operand(what, "dst", dst, indirect=True), operand(what, "src", src)
    require_dtype(what, dtype, target)

    def issue(part: Any) -> None:
        _move(part.write(target), read_like(part, "src", t), chosen)

    perform(what, target.shape, issue, mask=mask)


def tensor_copy_predicated(
    *,
    src: Any,
    dst: Any,
    predicate: Any,
    reverse_pred: bool = False,
    mask: Any = None,
    dtype: Any = None,
    **kwargs: Any,
) -> None:
    """Copy `src`, a tile or a number, to `dst` where the predicate is not zero (is zero: `reverse_pred`).

    Raises:
        NkiError: as the current `tensor_copy_predicated`; a `dtype` that is not dst's.
    """
    what = "tensor_copy_predicated"
    no_keywords(what, kwargs)
    target, chosen = operand(what, "dst", dst), operand(what, "predicate", predicate)
    source = integral(src, target.kind.is_integer) if is_number(src) else operand(what, "src", src)
    require_dtype(what, dtype, target)

    def issue(part: Any) -> None:
        moved = read_like(part, "src", source) if isinstance(source, Tile) else source
        nisa.tensor_copy_predicated(
            part.write(target), moved, as_mask_tile(read_like(part, "predicate", chosen)), reverse_pred=reverse_pred
        )

    perform(what, target.shape, issue, mask=mask)


def memset(
    shape: Any, value: Any, dtype: Any, *, mask: Any = None, engine: Any = Engine.unknown, **kwargs: Any
) -> Tile:
    """A tile of `shape`, partitions first whatever `nl.par_dim` says, filled with a number.

    Raises:
        NkiError: as the current `memset`; a shape that is no tile's.
    """
    what = "memset"
    buffer = result_buffer(what, kwargs)
    chosen = current(Engine, engine, what, "engine")
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if len(sizes) < 2 or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in sizes):
        refuse(what, "shape", "shape of a tile", received=repr(shape), allowed="two or more positive integers")
    kind = kind_of(dtype, "nki.isa.memset.dtype")
    constant = integral(value, kind.is_integer)

    def issue(dst: NkiTensor, _part: Any) -> None:
        nisa.memset(dst, constant, engine=chosen)

    return produce(what, tuple(int(n) for n in sizes), issue, dtype=kind, default=kind, mask=mask, buffer=buffer)


def nc_stream_shuffle(
    src: Any, dst: Any, shuffle_mask: Any, *, dtype: Any = None, mask: Any = None, **kwargs: Any
) -> None:
    """Partition i of each 32 of `dst` = partition `shuffle_mask[i]` of the same 32 of `src`; 255 keeps it.

    `mask` speaks about `dst`.

    Raises:
        NkiError: as the current `nc_stream_shuffle`; a `dtype` that is not dst's.
        NotImplementedError: a mask that does not keep whole groups of 32 up to where `dst` ends in it.
    """
    what = "nc_stream_shuffle"
    no_keywords(what, kwargs)
    target, t = operand(what, "dst", dst), operand(what, "src", src)
    require_dtype(what, dtype, target)
    free = (None, *range(1, len(t.shape)))

    def issue(part: Any) -> None:
        if part.box[0][0]:
            raise NotImplementedError("nki.isa.nc_stream_shuffle.mask: a mask that leaves out the first partitions")
        nisa.nc_stream_shuffle(part.write(target), part.read(t, dims=free), shuffle_mask)

    perform(what, target.shape, issue, mask=mask)
