"""How the front end issues instructions: tiles by value over instructions that write to a destination.

An instruction that returns a tile is pending until something needs the tile. Assigned at once (`dst[...] = op(...)`,
`psum[...] += nc_matmul(...)`) it writes straight to where it is assigned, as compiled kernels do; otherwise it writes
to new memory. At most one instruction is pending, and the next one executes it first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nkisim import isa
from nkisim.dtypes import Array
from nkisim.errors import Site, call_sites, issued_at
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._errors import refuse
from nkisim.legacy._mask import Box, boxes, whole
from nkisim.legacy._root import Block, Spot, allocate
from nkisim.legacy._state import State, state
from nkisim.legacy._tile import Tile
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.tensor import NkiTensor

Dims = tuple[int | None, ...]
Issue = Callable[[NkiTensor, "Part"], object]


class Part:
    """One rectangle of what an instruction covers: its operands are cut to it."""

    __slots__ = ("box", "over", "what")

    def __init__(self, what: str, over: tuple[int, ...], box: Box) -> None:
        self.what = what
        self.over = over
        self.box = box

    def read(self, x: Any, dims: Dims | None = None) -> Any:
        """A source, cut, with free dimensions of size 1 repeated; anything but a tile passes through.

        `dims` says which dimension of the whole each dimension of x follows, None for one that is not cut.
        """
        if not isinstance(x, Tile):
            return x
        view, box = self._cut(x, dims, True)
        return view.tensor(self.what, x.role, box)

    def column(self, x: Any) -> Any:
        """A source of one element per partition, not repeated; anything but a tile passes through."""
        return self.read(x, (0, *[None] * (x.ndim - 1))) if isinstance(x, Tile) else x

    def write(self, x: Tile, dims: Dims | None = None) -> NkiTensor:
        """A destination, cut."""
        view, box = self._cut(x, dims, False)
        return writable(self.what, view, box)

    def _cut(self, x: Tile, dims: Dims | None, repeat: bool) -> tuple[Tile, Box]:
        over = self.over
        if dims is None:
            if x.shape == over:
                return x, self.box
            same = x.ndim == len(over)
            dims = tuple(range(x.ndim)) if same else (0, *[None] * (x.ndim - 1))
        shape = list(x.shape)
        box = []
        for d, (n, m) in enumerate(zip(x.shape, dims, strict=True)):
            if m is None:
                box.append((0, n))
            elif n == over[m]:
                box.append(self.box[m])
            elif n == 1 and d > 0 and repeat:
                shape[d] = over[m]
                box.append(self.box[m])
            elif d == 0:
                rule = "err_num_partition_mismatch: partitions"
                refuse(self.what, x.role, rule, n, f"{over[m]}, those of the other operands")
            else:
                refuse(self.what, x.role, f"size of dimension {d}", n, f"{over[m]}, that of the other operands")
        return (x if tuple(shape) == x.shape else x.repeated(tuple(shape))), tuple(box)


@dataclass(eq=False)
class Pending:
    """An instruction that was called and not executed."""

    what: str
    over: tuple[int, ...]
    boxes: list[Box]
    dims: Dims
    issue: Issue
    accumulate: Issue | None
    explicit: bool
    into: tuple[MemoryRegion, ...]
    any_start: bool
    apart: tuple[Tile, ...]
    sites: tuple[Site, Site | None]

    @property
    def masked(self) -> bool:
        """Whether the mask leaves something out."""
        return self.boxes != [whole(self.over)]

    def rectangles(self, shape: tuple[int, ...]) -> list[Box]:
        """What the instruction writes of a destination of `shape`."""
        return [
            tuple([(0, n) if m is None else box[m] for n, m in zip(shape, self.dims, strict=True)])
            for box in self.boxes
        ]

    def execute(self, dst: Tile, issue: Issue, reduces: bool = False) -> None:
        """Issue the instruction for each rectangle that its mask leaves."""
        with issued_at(self.sites):
            for box, cut in zip(self.boxes, self.rectangles(dst.shape), strict=True):
                issue(writable(self.what, dst, cut, reduces), Part(self.what, self.over, box))


def operand(
    what: str,
    name: str,
    value: Any,
    buffers: tuple[MemoryRegion, ...] = ON_CHIP,
    indirect: bool = False,
    masked: bool = False,
) -> Tile:
    """`value`, a tile in one of `buffers` that can be used here; what is pending is executed first.

    `indirect` allows views with an index tile, `masked` operand masks.

    Raises:
        NkiError: it is no such tile.
    """
    st = state(what)
    flush(st)
    if not isinstance(value, Tile):
        refuse(what, name, "type", type(value).__name__, "a tensor", f"nki {what}, SDK 2.26")
    if value.moved:
        raise NotImplementedError(
            f"{what}.{name}: a result that was assigned to a tensor is used again; this Python does not tell results "
            "with a name from others: read the tensor that it was assigned to"
        )
    root = value.root
    if root.scope:
        value.check_scope(what, name)
    if root.region not in buffers:
        rule = "err_unsupported_memory: memory"
        refuse(what, name, rule, root.region.name, " or ".join(b.name for b in buffers))
    if value.lead and root.on_chip:
        value._refuse_tile(what, name)
    if value.indirect is not None and not indirect:
        rule = "err_indirect_indices_are_not_supported_with_nki_api: view with an index tile"
        refuse(what, name, rule, repr(value), "nl.load, nl.store, nisa.dma_copy, nisa.tensor_copy_dynamic_src")
    if value.mask is not None and not masked:
        refuse(what, name, "operand mask", repr(value.mask), "mask=; operands of matmul only have one of their own")
    value.role = name
    if root.region is MemoryRegion.psum:
        # Now: the instruction's destination, which may be the same, counts as written before its sources are read.
        block = root.blocks.get(tuple([offset for offset, _ in value.dims[: root.n_block]]))
        if block is not None:
            settle(block)
    return value


def produce(
    what: str,
    shape: tuple[int, ...],
    issue: Issue,
    *,
    default: Any,
    dtype: Any = None,
    mask: Any = None,
    over: tuple[int, ...] | None = None,
    dims: Dims | None = None,
    buffer: MemoryRegion = MemoryRegion.sbuf,
    into: tuple[MemoryRegion, ...] = ON_CHIP,
    accumulate: Issue | None = None,
    any_start: bool = False,
    apart: tuple[Any, ...] = (),
) -> Tile:
    """The result of an instruction that is executed when it is needed.

    Args:
        what: the instruction, for errors.
        shape: of the result, partitions first, at least two dimensions.
        issue: `issue(dst, part)` issues it for one rectangle.
        default: element type where `dtype` is None.
        dtype: the caller's.
        mask: the caller's; what it leaves is cut into rectangles.
        over: what the mask speaks of, where that is not the result.
        dims: the dimension of `over` that each dimension of the result follows, None for none.
        buffer: memory of the result where it is not assigned at once.
        into: memories that the instruction writes to.
        accumulate: `issue` where the result is to be added to what `dst` holds.
        any_start: whether it writes to partitions from anywhere (DMA).
        apart: tiles that may not overlap where it writes (several instructions, these read late).
    """
    st = state(what)
    flush(st)
    over = shape if over is None else over
    kind = kind_of(default if dtype is None else dtype, f"{what} dtype")
    partitions = st.core.hardware.partitions
    if shape[0] > partitions:
        rule = "err_num_partition_exceed_arch_limit: partitions"
        refuse(what, "", rule, f"{shape[0]} in {list(shape)}", f"1..{partitions}")
    sites = call_sites()
    tile = allocate(shape, kind, buffer, sites=sites).tile()
    tile.pending = Pending(
        what,
        over,
        boxes(what, mask, over),
        tuple(range(len(shape))) if dims is None else dims,
        issue,
        accumulate,
        dtype is not None,
        into,
        any_start,
        tuple(t for t in apart if isinstance(t, Tile)),
        sites,
    )
    st.pending = tile
    return tile


def perform(what: str, shape: tuple[int, ...], issue: Callable[[Part], object], *, mask: Any = None) -> None:
    """Execute an instruction that returns nothing, for each rectangle of `shape` that the mask leaves."""
    flush(state(what))
    for box in boxes(what, mask, shape):
        issue(Part(what, shape, box))


def flush(st: State | None = None) -> None:
    """Execute what is pending, to memory of its own."""
    st = state("flush") if st is None else st
    tile = st.pending
    if tile is None:
        return
    st.pending = None
    pending = tile.pending
    tile.pending = None
    if pending.masked:
        with issued_at(pending.sites):
            fill_undefined(tile)
    pending.execute(tile, pending.issue)


def fill_undefined(tile: Tile) -> None:
    """Stand-ins for what the hardware finds in memory that nothing wrote: NaN, and the largest integers.

    For what a mask leaves out. Compiled kernels may compute with it, and the documented ones do; a stored NaN tells
    that the result was used.
    """
    spot = tile.spot("mask", tile.name)
    _fill_undefined(spot.block.tensor, spot.shape, spot.strides, spot.offset)


def _fill_undefined(t: NkiTensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
    storage, view = t.storage, (t.element_bytes, shape, strides, offset)
    if storage.is_defined(*view):
        return
    storage.array(t.carrier, shape, strides, offset)[~storage.defined_map(*view)] = garbage(t.carrier)
    storage.mark_written(*view)


def garbage(carrier: np.dtype[Any]) -> Any:
    """The value that stands for undefined elements."""
    return np.iinfo(carrier).max if carrier.kind in "iu" else np.nan


# -- destinations


def writable(what: str, dst: Tile, box: Box, reduces: bool = False) -> NkiTensor:
    """A rectangle of `dst` to write to; `reduces` where a loop may write it on every trip."""
    role = dst.role or "dst"
    if dst.root.access == "immutable":
        rule = "err_cannot_update_immutable_parameter: a write to a parameter"
        refuse(what, role, rule, repr(dst), "a parameter annotated as nki.typing.mutable_tensor")
    spot = dst.spot(what, role, box)
    if dst.indirect is None and not reduces:
        _check_trips(what, dst, spot)
    if spot.block.zeros is not None:
        promised(spot)[...] = False
    return dst.at(spot, what, role, box)


def _check_trips(what: str, dst: Tile, spot: Spot) -> None:
    """Refuse a place that two trips of an affine_range write."""
    loops = [loop for loop in state(what).loops if loop.kind == "affine_range"]
    if not loops:
        return
    outside = {loop for loop, _ in dst.root.scope}
    place = (spot.block.tensor.storage.info.id, spot.offset, spot.shape, spot.strides)
    for loop in loops:
        if loop not in outside and loop.written.setdefault(place, loop.trip) != loop.trip:
            refuse(
                what,
                dst.role or "dst",
                "err_unexpected_output_dependencies: trips of an affine_range that write the same place",
                f"{dst!r} in trips {loop.written[place]} and {loop.trip} of the loop at {loop.site}",
                "a place for each trip, +=, or nl.sequential_range",
            )


def starts_legally(t: NkiTensor) -> bool:
    """Whether engines reach the partitions of a tensor; DMA reaches all."""
    hw = state("assignment").core.hardware
    quadrant, n = hw.partition_quadrant, t.shape[0]
    step = quadrant if n <= quadrant else 2 * quadrant if n <= 2 * quadrant else hw.partitions
    return t.start_partition % step == 0


# -- promised zeros


def promised(spot: Spot) -> Array:
    """The part of a block's map of promised zeros under a spot."""
    zeros, t = spot.block.zeros, spot.block.tensor
    assert zeros is not None
    return np.ndarray(spot.shape, zeros.dtype, zeros, spot.offset - t.offset, spot.strides)


def promise_zeros(block: Block) -> None:
    """Let a new block in PSUM count as zero without an instruction."""
    block.zeros = np.ones((block.tensor.shape[0], block.tensor.free_size), np.bool_)


def settle(block: Block) -> None:
    """What a block in PSUM holds, now that it is read: its promised zeros, and what masks left out of its sums."""
    settle_zeros(block)
    if block.left_out:
        block.left_out = False
        t = block.tensor
        _fill_undefined(t, t.shape, t.strides, t.offset)


def settle_zeros(block: Block) -> None:
    """Write the zeros that were promised and that nothing has overwritten."""
    zeros = block.zeros
    if zeros is None:
        return
    block.zeros = None
    if not zeros.any():
        return
    t = block.tensor
    row = t.row_elements
    first = 0
    while first < zeros.shape[0]:
        same = first + 1
        while same < zeros.shape[0] and np.array_equal(zeros[same], zeros[first]):
            same += 1
        edges = np.flatnonzero(np.diff(np.concatenate(([False], zeros[first], [False])).astype(np.int8)))
        for start, stop in edges.reshape(-1, 2).tolist():
            part = t.ap([[row, same - first], [1, stop - start]], offset=first * row + start)
            isa.memset(dst=part, value=0.0 if t.dtype.is_float else 0)
        first = same
