"""Tensor Engine of SDK 2.26: matrix products into PSUM, and transposes."""

from __future__ import annotations

from math import prod
from typing import Any
from weakref import WeakSet

import numpy as np

from nkisim import isa as nisa
from nkisim import language
from nkisim.dtypes import bfloat16, float32
from nkisim.hardware import GEN3, Hardware
from nkisim.isa.matmul import FLOAT8
from nkisim.legacy import compiler
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import operand, produce
from nkisim.legacy._mask import Box, Mask, boxes
from nkisim.legacy._root import Root
from nkisim.legacy._tile import Tile
from nkisim.legacy.isa._arguments import result_buffer
from nkisim.legacy.isa._enums import current
from nkisim.legacy.isa._enums import engine as Engine
from nkisim.machine import current_core
from nkisim.memory import ON_CHIP, PSUM, SBUF, MemoryRegion
from nkisim.tensor import NkiTensor

Pair = tuple[int, int]
Range = tuple[int, int]  # start and size

# Results of transposes that are in PSUM of their own. AWS's kernels multiply them as if they were in SBUF.
_transposes: WeakSet[Root] = WeakSet()

# `perf_mode` is an undocumented keyword of 2.26 that AWS's example of double rows uses.
_PERF_MODES = {None: nisa.matmul_perf_mode.none, "double_row_gen3": nisa.matmul_perf_mode.double_row}


def nc_matmul(
    stationary: Any,
    moving: Any,
    *,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    tile_position: Any = (),
    tile_size: Any = (),
    mask: Any = None,
    **kwargs: Any,
) -> Tile:
    """The product stationary.T @ moving in float32, [M, N] in PSUM, which `psum[...] +=` accumulates.

    `mask` may name the contraction (partitions of both operands) only; an operand's own columns are cut with
    `operand[mask]`. `is_transpose` moves bits where the target can and the result has the operand's type.

    Raises:
        NkiError: as the current `nc_matmul`; a tile of the array that breaks the rules of 2.26.
        NotImplementedError: a mask over columns; a `perf_mode` other than "double_row_gen3".
    """
    what = "nc_matmul"
    perf_mode = kwargs.pop("perf_mode", None)
    if perf_mode not in _PERF_MODES:
        raise NotImplementedError(f"nki.isa.nc_matmul.perf_mode: {perf_mode!r} has no counterpart in NKI 0.6")
    mode = _PERF_MODES[perf_mode]
    buffer = result_buffer(what, kwargs, PSUM)
    a, b = _input("stationary", stationary), _input("moving", moving)
    if a.shape[0] != b.shape[0]:
        refuse(
            what,
            "moving",
            "err_num_partition_mismatch: contraction sizes differ",
            received=b.shape[0],
            allowed=f"{a.shape[0]}, the partitions of stationary",
        )
    columns = prod(a.shape[1:])
    free = b.shape[1:]
    if mode is nisa.matmul_perf_mode.double_row:
        columns //= 2
        free = free[1:]
    hardware = current_core("nki.isa.nc_matmul").hardware
    transposes = bool(is_transpose) and hardware.generation >= GEN3
    position, size = _array_tile(hardware, tile_position, tile_size, a.shape[0], columns)
    box_a, box_b = _left(a, "stationary"), _left(b, "moving")
    masked = a.mask is not None or b.mask is not None
    if masked and (len(a.shape) > 2 or mode is not nisa.matmul_perf_mode.none):
        raise NotImplementedError("nki.isa.nc_matmul: an operand mask beside more than two dimensions of stationary")

    def run(dst: NkiTensor, part: Any, accumulate: bool | None) -> None:
        rows = _common(part.box[0], box_a[0], box_b[0])
        if min(rows[1], *(n for _, n in (*box_a, *box_b))) < 1:
            return
        x = _reachable(a.tensor(what, "stationary", (rows, *box_a[1:])))
        y = _reachable(b.tensor(what, "moving", (rows, *box_b[1:])))
        if masked:
            dst = dst[tuple(slice(begin, begin + n) for begin, n in (*box_a[1:], *box_b[1:]))]
        nisa.nc_matmul(
            dst,
            x,
            y,
            is_stationary_onezero=is_stationary_onezero,
            is_moving_onezero=is_moving_onezero,
            # 2.26 calls it a hint; the mode that moves bits needs a result of the operand's type.
            is_transpose=transposes and dst.dtype is x.dtype,
            accumulate=accumulate,
            tile_position=position,
            tile_size=size,
            perf_mode=mode,
        )

    shape = (columns, *(free or (1,)))
    return produce(
        what,
        shape,
        lambda dst, part: run(dst, part, False),
        # A product is float32, and a destination of another type gets a copy of it.
        dtype=None if transposes else float32,
        default=a.kind,
        mask=_contraction_mask(mask),
        over=(a.shape[0], 1),
        dims=(None,) * len(shape),
        buffer=buffer,
        into=PSUM,
        accumulate=lambda dst, part: run(dst, part, None),
    )


def _input(name: str, value: Any) -> Tile:
    """An operand of a product: a tile in SBUF, or a transpose that was assigned nowhere."""
    t = operand("nc_matmul", name, value, masked=True)
    return t if t.root in _transposes else operand("nc_matmul", name, t, SBUF, masked=True)


def _reachable(t: NkiTensor) -> NkiTensor:
    """The tensor, or a copy of it in SBUF."""
    if t.buffer is not MemoryRegion.psum:
        return t
    copied = language.ndarray(t.shape, t.dtype)
    nisa.tensor_copy(copied, t)
    return copied


def _left(t: Tile, name: str) -> Box:
    """The rectangle that an operand's own mask leaves of it, without elements where it leaves none."""
    found = boxes("nc_matmul", t.mask, t.shape)
    if len(found) > 1:
        raise NotImplementedError(f"nki.isa.nc_matmul.{name}: an operand mask that leaves more than a rectangle")
    return found[0] if found else tuple((0, 0) for _ in t.shape)


def _common(*ranges: Range) -> Range:
    """What (start, size) ranges share; of size 0 or less where that is nothing."""
    start = max(begin for begin, _ in ranges)
    return start, min(begin + n for begin, n in ranges) - start


def _contraction_mask(mask: Any) -> Any:
    """The mask, if it speaks about the partitions only."""
    if isinstance(mask, Mask) and any(any(term.coeffs[1:]) for term in mask.terms):
        raise NotImplementedError(
            "nki.isa.nc_matmul.mask: a mask over columns does not say of which operand; cut the operand: x[mask]"
        )
    return mask


def _array_tile(hardware: Hardware, position: Any, size: Any, k: int, m: int) -> tuple[Any, Any]:
    """The array tile for the current API, which has row tiles of full width only; () where none was asked for.

    Column tiles change which products run side by side, not the results: they run, and are modelled, one after
    the other here.
    """
    if position in ((), None) and size in ((), None):
        return (), ()
    rows = hardware.matmul_contraction_max
    first, extent = _pair("tile_position", position), _pair("tile_size", size)
    quadrant = hardware.partition_quadrant
    for name, pair in (("tile_position", first), ("tile_size", extent)):
        if pair[0] % quadrant or pair[1] % quadrant:
            refuse("nc_matmul", name, "tiling", received=pair, allowed=f"multiples of {quadrant}")
    for i, (begin, n) in enumerate(zip(first, extent, strict=True)):
        if n < 1 or begin < 0 or begin + n > rows:
            refuse("nc_matmul", "tile_size", "tiling", received=f"{begin} + {n}", allowed=f"within 0..{rows}")
        if n < (k, m)[i]:
            axis = ("rows", "columns")[i]
            refuse("nc_matmul", "tile_size", f"{axis} of stationary", received=(k, m)[i], allowed=f"1..{n}")
    if hardware.generation < GEN3 and extent == (quadrant, quadrant):
        allowed = "another size before NeuronCore-v3"
        refuse("nc_matmul", "tile_size", f"tiling on {hardware.target}", received=extent, allowed=allowed)
    tile = hardware.matmul_row_tile_min
    while first[0] // tile != (first[0] + extent[0] - 1) // tile:
        tile *= 2
    return (first[0] // tile * tile, 0), (tile, hardware.matmul_stationary_fmax)


def _pair(name: str, value: Any) -> Pair:
    integers = isinstance(value, (tuple, list)) and all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in value
    )
    if not integers or len(value) != 2:
        refuse("nc_matmul", name, "tiling", received=repr(value), allowed="(row, column), both arguments or neither")
    return int(value[0]), int(value[1])


def nc_transpose(
    data: Any, *, mask: Any = None, dtype: Any = None, engine: Any = Engine.unknown, **kwargs: Any
) -> Tile:
    """The transpose [F, P] of a tile [P, F], free dimensions flattened.

    Tensor Engine: up to [128, 128], from SBUF to PSUM; Vector Engine: up to [32, 32], anywhere. Without `engine` the
    Vector Engine takes what it can. A result of another type than the data's is a transpose and a copy that casts.
    A transpose in PSUM that is assigned nowhere may be an operand of `nc_matmul`, which copies it to SBUF first.

    Raises:
        NkiError: as the current `nc_transpose`.
        NotImplementedError: a mask.
    """
    what = "nc_transpose"
    given = current(Engine, engine, what, "engine")
    t = operand(what, "data", data)
    if isinstance(mask, Mask):
        raise NotImplementedError("nki.isa.nc_transpose.mask: cut the operand instead: x[mask]")
    p, f = t.shape[0], prod(t.shape[1:])
    hardware = current_core("nki.isa.nc_transpose").hardware
    limit = hardware.vector_transpose_max
    chosen = given
    if given is nisa.engine.unknown:
        chosen = nisa.engine.vector if p <= limit and f <= limit else nisa.engine.tensor
    into: tuple[MemoryRegion, ...] = PSUM if chosen is nisa.engine.tensor else ON_CHIP
    buffer = result_buffer(what, kwargs, into)
    # The Tensor Engine makes 16-bit elements of bytes (float8) when it moves them: they go through bfloat16.
    widens = chosen is nisa.engine.tensor and t.kind in FLOAT8 and hardware.generation >= GEN3
    if chosen is nisa.engine.tensor:
        compiler.note_implicit(
            what,
            "err_transpose_on_tensor_engine_not_allowed_in_allocated_kernel: transpose on the Tensor Engine",
            "nc_matmul with an identity of the kernel's own, or engine=nki.isa.vector_engine",
        )

    def issue(dst: NkiTensor, part: Any) -> None:
        x = part.read(t, dims=(None,) * len(t.shape))
        if widens:
            wide = language.ndarray(x.shape, bfloat16)
            nisa.tensor_copy(wide, x)
            x = wide
        if dst.dtype is x.dtype:
            nisa.nc_transpose(dst, x, engine=chosen)
            return
        moved = language.ndarray((f, p), x.dtype, buffer=buffer)
        nisa.nc_transpose(moved, x, engine=chosen)
        nisa.tensor_copy(dst, moved)

    made = produce(what, (f, p), issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer, into=into)
    if made.buffer is MemoryRegion.psum:
        _transposes.add(made.root)
    return made
