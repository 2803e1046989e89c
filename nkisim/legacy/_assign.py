"""Assignment: `dst[...] = value` and `dst += value`, in place where an instruction can write there itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim import isa
from nkisim.dtypes import DType
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import (
    Pending,
    fill_undefined,
    flush,
    operand,
    promised,
    settle_zeros,
    starts_legally,
    writable,
)
from nkisim.legacy._mask import whole
from nkisim.legacy._root import Spot, allocate, columns
from nkisim.legacy._state import state
from nkisim.legacy._tile import Tile
from nkisim.memory import BY_MATMUL, MemoryRegion
from nkisim.tensor import NkiTensor


def assign(dst: Tile, value: Any, unnamed: bool = False, reduces: bool = False) -> None:
    """`dst[...] = value`, a tile or a number.

    `unnamed`: nothing else refers to `value`. `reduces`: the value was made of what `dst` held.
    """
    what = "assignment"
    st = state(what)
    dst.role = "dst"
    if not isinstance(value, Tile):
        flush(st)
        operand(what, "dst", dst)
        _fill(dst, value, reduces)
        return
    if value.accumulated:
        value.accumulated = False
        if value.root is dst.root and value.dims == dst.dims and value.shape == dst.shape:
            return
    # A result that has a name can be read later: it needs memory of its own.
    pending = value.pending if unnamed else None
    target = None if pending is None else reshaped(dst, value.shape)
    if pending is not None and target is not None:
        straight = _goes_straight(target, value, pending)
        if pending.masked and dst.buffer is MemoryRegion.sbuf and target.is_inside():
            fill_undefined(target)
        if straight:
            st.pending = None
            value.pending = None
            value.moved = True
            pending.execute(target, pending.issue, reduces)
            return
        if pending.masked:
            flush(st)
            for rectangle in pending.rectangles(value.shape):
                key = tuple(slice(start, start + n) for start, n in rectangle)
                copy_tile(what, target[key], value[key], reduces)
            return
    if value.indirect is not None:
        rule = "err_copy_dynamic_indirect_indices_not_natively_supported: a copy of a view with an index tile"
        refuse(what, "value", rule, repr(value), "nisa.tensor_copy_dynamic_src, nl.load, nisa.dma_copy")
    value = operand(what, "value", value)
    operand(what, "dst", dst)
    # The running result of nl.loop_reduce goes to one place in every trip of its loops.
    reduces = reduces or any(value.root is t.root for loop in st.loops for t in loop.running.values())
    copy_tile(what, dst, value, reduces)


def _goes_straight(dst: Tile, value: Tile, pending: Pending) -> bool:
    """Whether a pending instruction can write to `dst` itself."""
    if dst.buffer not in pending.into or dst.lead or dst.indirect is not None or dst.root.access == "immutable":
        return False
    if pending.explicit and value.kind is not dst.kind:
        return False
    dst.check_scope("assignment", "dst")
    for rectangle in pending.rectangles(dst.shape):
        spot = dst.spot("assignment", "dst", rectangle)
        if any(_overlap(spot, t) for t in pending.apart):
            return False
        if not pending.any_start and not starts_legally(dst.at(spot, "assignment", "dst", rectangle)):
            return False
    return True


def _overlap(spot: Spot, t: Tile) -> bool:
    other = t.spot("assignment", "value")
    if other.block.tensor.storage is not spot.block.tensor.storage:
        return False
    a, b = columns(spot), columns(other)
    return a[0] <= b[1] and b[0] <= a[1] and a[2] <= b[3] and b[2] <= a[3]


def reshaped(dst: Tile, shape: tuple[int, ...]) -> Tile | None:
    """A view of `dst` with that shape: other dimensions of size 1; None where the others differ."""
    if dst.shape == shape:
        return dst
    old = [d for d, n in enumerate(dst.shape) if n != 1 or d == 0]
    new = [d for d, n in enumerate(shape) if n != 1 or d == 0]
    if [dst.shape[d] for d in old] != [shape[d] for d in new]:
        return None
    dims = []
    for offset, coeffs in dst.dims:
        out = [0] * len(shape)
        for d, e in zip(old, new, strict=True):
            out[e] = coeffs[d]
        dims.append((offset, tuple(out)))
    return Tile(dst.root, shape, tuple(dims), 0, dst.indirect)


def copy_tile(what: str, dst: Tile, src: Tile, reduces: bool = False) -> None:
    """Copy `src`, repeated along dimensions of size 1, to `dst`: by DMA where engines do not reach the partitions."""
    target = reshaped(dst, src.shape)
    if target is None:
        target = dst
        if src.ndim != dst.ndim or any(n not in (1, m) for n, m in zip(src.shape, dst.shape, strict=True)):
            rule = "err_store_dst_shape_smaller_than_other_shape: shape of the destination"
            refuse(what, "dst", rule, list(dst.shape), f"{list(src.shape)}, or larger where that has 1")
        if src.shape[0] != dst.shape[0]:
            from nkisim.legacy.language._move import broadcast_to

            src = operand(what, "value", broadcast_to(src, shape=(dst.shape[0], *src.shape[1:])))
        src = src.repeated(dst.shape)
    if src.dims == target.dims and src.root is target.root:
        return
    source = src.tensor(what, "value")
    out = writable(what, target, whole(target.shape), reduces)
    move(out, source)


def move(dst: NkiTensor, src: NkiTensor) -> None:
    """A copy between tiles: by an engine, or by DMA where engines do not reach the partitions of both."""
    if starts_legally(dst) and starts_legally(src):
        isa.tensor_copy(dst=dst, src=src)
    else:
        isa.dma_copy(dst=dst, src=src)


def number_for(what: str, kind: DType, value: Any) -> Any:
    """A number as `memset` takes it for an element type.

    Raises:
        NkiError: no number, or one that an integer type does not hold.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (bool, int, float)):
        refuse(what, "value", "type", type(value).__name__, "a tile or a number")
    if kind.is_float:
        return float(value)
    if isinstance(value, float):
        if not value.is_integer():
            refuse(what, "value", f"value of a {kind} tile", value, "an integer")
        value = int(value)
    return bool(value) if kind.kind == "bool" else int(value)


def _fill(dst: Tile, value: Any, reduces: bool) -> None:
    fill_view(writable("assignment", dst, whole(dst.shape), reduces), number_for("assignment", dst.kind, value))


def fill_view(out: NkiTensor, value: Any) -> None:
    """Set every element: by `memset`, through a tile of its own where no engine reaches the partitions."""
    if starts_legally(out):
        isa.memset(dst=out, value=value)
        return
    scratch = allocate(out.shape, out.dtype, MemoryRegion.sbuf).tile().tensor("assignment", "value")
    isa.memset(dst=scratch, value=value)
    isa.dma_copy(dst=out, src=scratch)


def accumulate(dst: Tile, value: Any) -> bool:
    """`dst += value` by the instruction that makes `value`; False where that is none that adds.

    The promised zeros of PSUM are overwritten, sums of matmuls are added to. Where nothing was written, the first
    product begins the sum: kernels that place their tensors cannot fill them, and rely on it.
    """
    if not isinstance(value, Tile) or value.pending is None or value.pending.accumulate is None:
        return False
    pending = value.pending
    if dst.buffer not in pending.into or dst.lead or (pending.explicit and value.kind is not dst.kind):
        return False
    target = reshaped(dst, value.shape)
    if target is None:
        return False
    target.role = "dst"
    dst.check_scope("operator +=", "dst")
    spot = target.spot("operator +=", "dst")
    t, zeros = spot.block.tensor, spot.block.zeros
    if zeros is None:
        view = (t.element_bytes, spot.shape, spot.strides, spot.offset)
        fresh = not t.storage.is_defined(*view) and not t.storage.defined_map(*view).any()
    else:
        fresh = bool(promised(spot).all()) and not pending.masked
    if fresh:
        issue = pending.issue
    else:
        settle_zeros(spot.block)
        state_of = t.storage.psum_state(t.element_bytes, spot.shape, spot.strides, spot.offset)
        if state_of.min() != BY_MATMUL:
            # PSUM adds to what a matmul wrote; the Vector Engine adds to the rest.
            return False
        issue = pending.accumulate
    spot.block.left_out |= pending.masked
    state("operator +=").pending = None
    value.pending = None
    value.moved = True
    pending.execute(target, issue, reduces=True)
    return True
