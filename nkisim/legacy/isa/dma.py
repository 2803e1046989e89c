"""DMA of SDK 2.26: copies, gathers, scatters with addition, transposes."""

from __future__ import annotations

from typing import Any

from nkisim import isa as nisa
from nkisim import language
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import operand, perform, produce
from nkisim.legacy._operators import as_op
from nkisim.legacy._tile import Tile
from nkisim.legacy.isa._arguments import result_buffer
from nkisim.legacy.isa._enums import current
from nkisim.legacy.isa._enums import dge_mode as DgeMode
from nkisim.legacy.isa._enums import oob_mode as OobMode
from nkisim.memory import DMA_ABLE, SBUF
from nkisim.operators import op_name
from nkisim.tensor import NkiTensor

_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def dma_copy(
    *,
    dst: Any,
    src: Any,
    mask: Any = None,
    dst_rmw_op: Any = None,
    oob_mode: Any = OobMode.error,
    dge_mode: Any = DgeMode.unknown,
) -> None:
    """Copy `src` to `dst` between HBM and SBUF, or add it (`dst_rmw_op=np.add`); either may have rows named by a tile.

    Raises:
        NkiError: as the current `dma_copy`, or with an operator as `dma_compute`; an operator with `oob_mode.skip`.
        NotImplementedError: an operator other than add; an operator with a `dge_mode`.
    """
    what = "dma_copy"
    target = operand(what, "dst", dst, DMA_ABLE, indirect=True)
    source = operand(what, "src", src, DMA_ABLE, indirect=True)
    bounds = current(OobMode, oob_mode, what, "oob_mode")
    mode = current(DgeMode, dge_mode, what, "dge_mode")
    if dst_rmw_op is None:

        def copy(part: Any) -> None:
            nisa.dma_copy(part.write(target), part.read(source), oob_mode=bounds, dge_mode=mode)

        perform(what, target.shape, copy, mask=mask)
        return
    operator = as_op(what, "dst_rmw_op", dst_rmw_op)
    if op_name(operator) != "add":
        raise NotImplementedError(f"nki.isa.dma_copy.dst_rmw_op: {dst_rmw_op!r}; only np.add exists")
    if bounds is not nisa.oob_mode.error:
        refuse(what, "oob_mode", "mode with dst_rmw_op", received=bounds.name, allowed="error")
    if mode is not nisa.dge_mode.unknown:
        raise NotImplementedError("nki.isa.dma_copy.dge_mode: dma_compute, which adds, chooses its own")

    def add(part: Any) -> None:
        t = part.write(target)
        nisa.dma_compute(t, [t, part.read(source)], language.add)

    perform(what, target.shape, add, mask=mask)


def dma_transpose(src: Any, *, axes: Any = None, mask: Any = None, dtype: Any = None, **kwargs: Any) -> Tile:
    """`src` from HBM or SBUF with its first and last dimensions swapped, in SBUF.

    A result of another type is a transpose and a copy that casts. `dge_mode=` is taken too.

    Raises:
        NkiError: as the current `dma_transpose`; rows named by a tile.
    """
    what = "dma_transpose"
    mode = current(DgeMode, kwargs.pop("dge_mode", DgeMode.unknown), what, "dge_mode")
    buffer = result_buffer(what, kwargs, SBUF)
    t = operand(what, "src", src, DMA_ABLE)
    rank = len(t.shape)
    if rank not in _AXES:
        refuse(what, "src", "dimensions", received=rank, allowed="2, 3 or 4")
    order = _AXES[rank]
    if axes is not None and tuple(axes) != order:
        refuse(what, "axes", f"axes of {rank} dimensions", received=axes, allowed=order)

    def issue(dst: NkiTensor, part: Any) -> None:
        x = part.read(t)
        if dst.dtype is x.dtype:
            nisa.dma_transpose(dst, x, axes=order, dge_mode=mode)
            return
        moved = language.ndarray(tuple(x.shape[a] for a in order), x.dtype)
        nisa.dma_transpose(moved, x, axes=order, dge_mode=mode)
        nisa.tensor_copy(dst, moved)

    shape = tuple(t.shape[a] for a in order)
    return produce(
        what,
        shape,
        issue,
        dtype=dtype,
        default=t.kind,
        mask=mask,
        over=t.shape,
        dims=order,
        buffer=buffer,
        into=SBUF,
    )
