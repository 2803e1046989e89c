"""Which elements of a root a tile is: affine functions of its own indices, and how indexing composes them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import numpy as np

from nkisim.dtypes import DType
from nkisim.legacy._dtypes import user_dtype
from nkisim.legacy._errors import refuse
from nkisim.legacy._index import Index, as_index, broadcast_shapes, padded
from nkisim.legacy._mask import Box, Mask, whole
from nkisim.legacy._root import Root, Spot
from nkisim.legacy._state import state
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.view import DynamicSlice, as_int

if TYPE_CHECKING:
    from nkisim.legacy._tile import Tile

Dim = tuple[int, tuple[int, ...]]  # offset and coefficients: a dimension of the root by those of the tile

_View = TypeVar("_View", bound="TileView")

MODEL = "NKI programming model (SDK 2.26)"
FREE_DIM = (
    "err_indirect_indices_free_dim: an index tile selects rows of the partition or a block dimension, with nl.arange"
)


@dataclass(frozen=True)
class Indirect:
    """A dimension of the root that a tile of indices selects: a row per partition, or one index for all."""

    dim: int
    index: Tile
    by_row: bool


class TileView:
    """A view of a root, and the indices that make further ones; `Tile` adds what kernels compute with."""

    __slots__ = (
        "accumulated", "dims", "indirect", "lead", "mask", "moved", "pending", "root", "shape",
    )  # fmt: skip
    __array_ufunc__: ClassVar[None] = None
    __iter__: ClassVar[None] = None
    __hash__: ClassVar[Any] = object.__hash__

    def __init__(
        self,
        root: Root,
        shape: tuple[int, ...],
        dims: tuple[Dim, ...],
        lead: int = 0,
        indirect: Indirect | None = None,
        mask: Mask | None = None,
    ) -> None:
        self.root = root
        self.shape = shape
        self.dims = dims
        self.lead = lead  # how many of the own dimensions, the first ones, are block dimensions
        self.indirect = indirect
        self.mask = mask  # operand mask of a matmul
        self.pending: Any = None  # the instruction that will write it, see _issue
        self.accumulated = False  # just written by an in-place operator: assigning it to itself does nothing
        self.moved = False  # it was computed into what it was assigned to, and has no memory of its own

    # -- what it is

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type, as NumPy knows it."""
        return user_dtype(self.root.kind)

    @property
    def kind(self) -> DType:
        """Element type, as the simulator knows it."""
        return self.root.kind

    @property
    def buffer(self) -> MemoryRegion:
        """Memory."""
        return self.root.region

    @property
    def name(self) -> str:
        """Name in errors."""
        return self.root.name

    @property
    def on_chip(self) -> bool:
        """Whether it is in SBUF or PSUM."""
        return self.root.region in ON_CHIP

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.root.kind.itemsize

    def __repr__(self) -> str:
        return f"tensor({self.name or 'tile'}: {self.kind}{list(self.shape)} in {self.buffer.name})"

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> NoReturn:
        if prod(self.shape) > 1:
            rule = "err_ambiguous_tensor_truth_value: truth value of a tensor"
            refuse("tensor", "", rule, repr(self), "element-wise operators (~, &, |), or `is not None`")
        rule = "err_dynamic_control_flow_not_supported: Python control flow on a tensor's value"
        refuse("tensor", "", rule, repr(self), "values known when the kernel is built")

    def __index__(self) -> NoReturn:
        rule = "err_dynamic_control_flow_not_supported: a tensor's value as a Python number"
        refuse("tensor", "", rule, repr(self), "values known when the kernel is built")

    __int__ = __float__ = __index__

    def assert_shape(self: _View, shape: Any) -> _View:
        """The tile itself; refused unless it has that shape."""
        if tuple(shape) != self.shape:
            refuse("assert_shape", "", "err_annotation_shape_mismatch: shape", self.shape, tuple(shape))
        return self

    # -- where it is

    def check_scope(self, what: str, operand: str) -> None:
        """Refuse a tile whose loop trip has ended."""
        scope = self.root.scope
        if not scope:
            return
        loops = state(what).scope
        if loops[: len(scope)] != scope:
            ended = next(loop for i, (loop, trip) in enumerate(scope) if loops[i : i + 1] != ((loop, trip),))
            refuse(
                what,
                operand,
                "err_local_variable_used_out_of_scope: a tensor used after the loop trip that made it",
                f"{self!r} of a trip of the {ended.kind} at {ended.site}",
                "a tensor made outside of the loop, written with t[...] =",
            )

    def spot(self, what: str, operand: str, box: Box | None = None) -> Spot:
        """The rectangle of the tile in memory.

        Raises:
            NkiError: it leaves the tensor, or is no tile: its partition dimension is not the first one.
        """
        root = self.root
        if box is None:
            box = whole(self.shape)
        n_block = root.n_block
        index = []
        for r in range(n_block):
            offset, coeffs = self.dims[r]
            if any(coeffs) and any(c and n > 1 for c, n in zip(coeffs, self.shape, strict=True)):
                self._refuse_tile(what, operand)
            if not 0 <= offset < root.shape[r]:
                self._refuse_bounds(what, operand, r, offset, offset)
            index.append(offset)
        block = root.block(tuple(index))
        t = block.tensor
        base = t.offset
        strides = [0] * len(self.shape)
        selected = -1 if self.indirect is None else self.indirect.dim
        on_chip = root.on_chip
        for r in range(n_block, len(root.shape)):
            offset, coeffs = self.dims[r]
            step = t.strides[r - n_block]
            low = high = offset
            for d, c in enumerate(coeffs):
                if not c:
                    continue
                if on_chip and (d == 0) != (r == n_block) and self.shape[d] > 1:
                    # The first dimension has to walk the partitions, and no other one may.
                    self._refuse_tile(what, operand)
                start, size = box[d]
                strides[d] += c * step
                offset += c * start
                reach = c * (size - 1)
                if reach < 0:
                    low += c * start + reach
                    high += c * start
                else:
                    low += c * start
                    high += c * start + reach
            if (low < 0 or high >= root.shape[r]) and r != selected:
                self._refuse_bounds(what, operand, r, low, high)
            base += step * offset
        return Spot(block, tuple([size for _, size in box]), tuple(strides), base)

    def _refuse_tile(self, what: str, operand: str) -> NoReturn:
        refuse(
            what,
            operand,
            "err_failed_to_infer_tile_from_local_tensor: the first dimension is not the partition dimension",
            f"{self!r} of {list(self.root.shape)} with {self.root.n_block} block dimensions",
            "a tile: block dimensions indexed with integers, the partition dimension first",
        )

    def _refuse_bounds(self, what: str, operand: str, r: int, low: int, high: int) -> NoReturn:
        n = self.root.shape[r]
        rule = f"err_tensor_access_out_of_bound: indices of dimension {r} of {self.name or 'the tensor'}"
        refuse(what, operand, rule, f"{low}..{high}", f"0..{n - 1}, or a mask that leaves out the others")

    # -- indexing

    def __getitem__(self: _View, key: Any) -> _View:
        """A view: basic indexing (integers, slices, nl.ds, ...), or nl.arange expressions and integers."""
        self._settle()
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) == 1 and isinstance(keys[0], Mask):
            return type(self)(self.root, self.shape, self.dims, self.lead, self.indirect, keys[0])
        if any(isinstance(k, (Index, TileView, DynamicIndex)) for k in keys):
            return self._advanced(keys)
        return self._basic(keys)

    def _settle(self) -> None:
        """Execute the pending instruction that writes this tile."""
        if self.pending is not None:
            from nkisim.legacy._issue import flush

            flush()

    def _basic(self: _View, keys: tuple[Any, ...]) -> _View:
        keys = self._filled(keys)
        if self.indirect is not None:
            refuse("index", "key", "index of a view with an index tile", keys, "one set of indices", MODEL)
        shape: list[int] = []
        starts: list[int] = []
        steps: list[tuple[int, int]] = []  # own dimension's new position (-1: dropped) and step
        lead = self.lead
        for d, (k, n) in enumerate(zip(keys, self.shape, strict=True)):
            start, size, step, keep = _basic_key(d, k, n)
            # On chip the partition dimension stays, with size 1.
            keep = keep or (self.on_chip and d == self.lead)
            if not keep and d < self.lead:
                lead -= 1
            starts.append(start)
            steps.append((len(shape) if keep else -1, step))
            if keep:
                shape.append(size)
        least = lead + 2 if self.on_chip else 1
        shape.extend([1] * (least - len(shape)))
        dims = tuple(_compose(dim, starts, steps, len(shape)) for dim in self.dims)
        return type(self)(self.root, tuple(shape), dims, lead)

    def _filled(self, keys: tuple[Any, ...]) -> tuple[Any, ...]:
        dots = [i for i, k in enumerate(keys) if k is Ellipsis]
        missing = self.ndim - len(keys) + len(dots)
        if missing < 0 or len(dots) > 1:
            refuse("index", "key", "number of indices", len(keys), f"at most {self.ndim}", MODEL)
        at = dots[0] if dots else len(keys)
        return (*keys[:at], *[slice(None)] * missing, *keys[at + len(dots) :])

    def _advanced(self: _View, keys: tuple[Any, ...]) -> _View:
        if len(keys) != self.ndim or any(
            isinstance(k, (slice, DynamicSlice)) or k is Ellipsis or k is None for k in keys
        ):
            refuse(
                "index",
                "key",
                "err_unsupported_mixing_basic_advanced_tensor_indexing: nl.arange expressions beside other indices",
                f"{len(keys)} indices of {self.ndim}: {_described(keys)}",
                "an nl.arange expression or an integer for each dimension",
            )
        if self.indirect is not None:
            refuse("index", "key", "index of a view with an index tile", _described(keys), "one set of indices", MODEL)
        plain: list[Index] = []
        shapes: list[tuple[int, ...]] = []
        chosen: tuple[int, Any] | None = None  # dimension and tile
        for d, k in enumerate(keys):
            if isinstance(k, (TileView, DynamicIndex)):
                if chosen is not None:
                    refuse("index", "key", "index tiles", 2, "one", MODEL)
                tile, extra = (k.tile, k.extra) if isinstance(k, DynamicIndex) else (k, Index((), 0, ()))
                tile._settle()
                chosen = (d, tile)
                shapes.append(() if prod(tile.shape) == 1 else tile.shape)
                plain.append(extra)
                shapes.append(extra.shape)
                continue
            index = as_index(k)
            if index is None:
                refuse(
                    "index", "key", f"index of dimension {d}", repr(k), "an nl.arange expression or an integer", MODEL
                )
            if len(index.shape) == 1:
                refuse(
                    "index",
                    "key",
                    "err_1d_arange_not_supported: an nl.arange of one dimension",
                    repr(index),
                    "nl.arange(n)[:, None] or nl.arange(n)[None, :]",
                )
            plain.append(index)
            shapes.append(index.shape)
        shape = broadcast_shapes("index", *shapes)
        if len(shape) < 2:
            shape = (1,) * (2 - len(shape)) + shape
        rank = len(shape)
        new = [(i.offset, padded(i.coeffs, rank, 0)) for i in plain]
        root_dim = -1 if chosen is None else self._root_dim(chosen[0])
        if self.shape != self.root.shape:
            # A view's own limits are not those of the root, which are checked when the tile is used.
            for d, index in enumerate(plain):
                low, high = index.bounds()
                if (low < 0 or high >= self.shape[d]) and (chosen is None or d != chosen[0]):
                    rule = f"err_tensor_access_out_of_bound: indices of dimension {d} of a view"
                    refuse("index", "key", rule, f"{low}..{high}", f"0..{self.shape[d] - 1}")
        dims = []
        for offset, coeffs in self.dims:
            total = offset
            out = [0] * rank
            for c, (first, inner) in zip(coeffs, new, strict=True):
                if c:
                    total += c * first
                    for e, k in enumerate(inner):
                        out[e] += c * k
            dims.append((total, tuple(out)))
        indirect = None if chosen is None else self._select(root_dim, chosen[1], shape)
        return type(self)(self.root, shape, tuple(dims), 0, indirect)

    def _root_dim(self, d: int) -> int:
        """The dimension of the root that own dimension d walks alone."""
        found = [r for r, (_, coeffs) in enumerate(self.dims) if coeffs[d]]
        if len(found) != 1 or self.dims[found[0]][1][d] != 1:
            refuse("index", "key", "index tile on a view", repr(self), "a dimension of the tensor itself", MODEL)
        return found[0]

    def _select(self, r: int, index: Tile, shape: tuple[int, ...]) -> Indirect:
        if index.buffer is not MemoryRegion.sbuf:
            refuse("index", "key", "err_unsupported_memory: index tile", index.buffer.name, "sbuf")
        if prod(index.shape) == 1:
            return Indirect(r, index, False)
        if self.on_chip or len(index.shape) != 2 or index.shape[1] != 1 or index.shape[0] != shape[0]:
            refuse(
                "index", "key", FREE_DIM, f"index {index!r}", f"[{shape[0]}, 1], one per partition, of an HBM tensor"
            )
        return Indirect(r, index, True)


class DynamicIndex:
    """The sum of an index tile and an index expression, as an index."""

    __slots__ = ("extra", "tile")

    def __init__(self, tile: Tile, extra: Index) -> None:
        self.tile = tile
        self.extra = extra

    def __add__(self, other: Any) -> DynamicIndex:
        return DynamicIndex(self.tile, self.extra + other)

    __radd__ = __add__


def _basic_key(d: int, k: Any, n: int) -> tuple[int, int, int, bool]:
    """Start, size, step of a basic index, and whether its dimension stays."""
    if isinstance(k, DynamicSlice):
        start, size = as_int(k.start), as_int(k.size)
        if start is None or size is None:
            refuse("index", "key", f"nl.ds of dimension {d}", k, "integers known when the kernel is built", MODEL)
        step, keep = 1, True
    elif isinstance(k, slice):
        bounds = [None if b is None else as_int(b) for b in (k.start, k.stop, k.step)]
        if any(b is None and given is not None for b, given in zip(bounds, (k.start, k.stop, k.step), strict=True)):
            refuse("index", "key", f"slice of dimension {d}", k, "integers known when the kernel is built", MODEL)
        start = bounds[0] or 0
        stop = n if bounds[1] is None else bounds[1]
        step = 1 if bounds[2] is None else bounds[2]
        if step < 1:
            refuse("index", "key", f"step of dimension {d}", step, ">= 1", MODEL)
        size, keep = -(-(stop - start) // step), True
    else:
        number = as_int(k)
        if number is None:
            refuse("index", "key", f"index of dimension {d}", repr(k), "an integer, a slice, nl.ds or ...", MODEL)
        start, size, step, keep = number, 1, 1, False
    last = start + (size - 1) * step
    if size < 1 or start < 0 or last >= n:
        # A slice that NumPy would shorten is a wrong bound here.
        rule = f"err_tensor_access_out_of_bound: index of dimension {d}"
        refuse("index", "key", rule, k, f"0..{n - 1}, at least one element")
    return start, size, step, keep


def _compose(dim: Dim, starts: list[int], steps: list[tuple[int, int]], rank: int) -> Dim:
    offset, coeffs = dim
    out = [0] * rank
    for c, start, (at, step) in zip(coeffs, starts, steps, strict=True):
        if c:
            offset += c * start
            if at >= 0:
                out[at] += c * step
    return offset, tuple(out)


def _described(keys: tuple[Any, ...]) -> str:
    return ", ".join("..." if k is Ellipsis else repr(k) for k in keys)
