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
from nkisim.memory import MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.view import DynamicSlice, as_int

if TYPE_CHECKING:
    from nkisim.legacy._tile import Tile

Dim = tuple[int, tuple[int, ...]]  # offset and coefficients: a dimension of the root by those of the tile

_View = TypeVar("_View", bound="TileView")

MODEL = "NKI programming model (SDK 2.26)"
_BASIC = frozenset((slice, DynamicSlice, type(Ellipsis), type(None)))
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
        "_found", "_tensor", "accumulated", "dims", "indirect", "lead", "mask", "moved", "pending", "role", "root",
        "shape",
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
        self.role = ""  # as which operand it was given to an instruction last
        # The last answers of `spot`, with its question, and of `Tile.at`.
        self._found: tuple[Box, Spot] | None = None
        self._tensor: NkiTensor | None = None

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
        return self.root.on_chip

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
        if box is None:
            box = whole(self.shape)
        found = self._found
        if found is not None and found[0] == box:
            return found[1]
        root, shape = self.root, self.shape
        n_block = root.n_block
        block = root.block(self._block_index(what, operand) if n_block else ())
        t = block.tensor
        base = t.offset
        strides = [0] * len(shape)
        on_chip = root.on_chip
        r = n_block
        for (offset, coeffs), n, step in zip(self.dims[n_block:], root.shape[n_block:], t.strides, strict=True):
            below = above = 0
            for d, c in enumerate(coeffs):
                if not c:
                    continue
                if on_chip and (d == 0) != (r == n_block) and shape[d] > 1:
                    # The first dimension has to walk the partitions, and no other one may.
                    self._refuse_tile(what, operand)
                start, size = box[d]
                strides[d] += c * step
                offset += c * start
                if c > 0:
                    above += c * (size - 1)
                else:
                    below += c * (size - 1)
            if (offset + below < 0 or offset + above >= n) and (self.indirect is None or r != self.indirect.dim):
                self._refuse_bounds(what, operand, r, offset + below, offset + above)
            base += step * offset
            r += 1
        spot = Spot(block, tuple([size for _, size in box]), tuple(strides), base)
        self._found, self._tensor = (box, spot), None
        return spot

    def _block_index(self, what: str, operand: str) -> tuple[int, ...]:
        root = self.root
        index = []
        for r in range(root.n_block):
            offset, coeffs = self.dims[r]
            if any(coeffs) and any(c and n > 1 for c, n in zip(coeffs, self.shape, strict=True)):
                self._refuse_tile(what, operand)
            if not 0 <= offset < root.shape[r]:
                self._refuse_bounds(what, operand, r, offset, offset)
            index.append(offset)
        return tuple(index)

    def is_inside(self) -> bool:
        """Whether all of it is in its tensor; what is not needs a mask."""
        for n, (low, coeffs) in zip(self.root.shape, self.dims, strict=True):
            high = low
            for c, size in zip(coeffs, self.shape, strict=True):
                low += min(c * (size - 1), 0)
                high += max(c * (size - 1), 0)
            if low < 0 or high >= n:
                return False
        return True

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
        if key is Ellipsis and self.indirect is None:
            return type(self)(self.root, self.shape, self.dims, self.lead)
        keys = key if isinstance(key, tuple) else (key,)
        for k in keys:
            if isinstance(k, (Index, TileView, DynamicIndex)):
                return self._advanced(keys)
        if len(keys) == 1 and isinstance(keys[0], Mask):
            return type(self)(self.root, self.shape, self.dims, self.lead, self.indirect, keys[0])
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
        # A slice of a whole tensor may end behind it: the mask of its use can leave that out, see `spot`.
        open_ended = self.dims is self.root.dims
        for d, (k, n) in enumerate(zip(keys, self.shape, strict=True)):
            start, size, step, keep = _basic_key(d, k, n, open_ended)
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
        if open_ended and all(at == d and step == 1 for d, (at, step) in enumerate(steps)):
            # Each dimension still is a function of the same one of the tile.
            dims = tuple([(start, coeffs) for start, (_, coeffs) in zip(starts, self.dims, strict=True)])
        else:
            dims = tuple([_compose(dim, starts, steps, len(shape)) for dim in self.dims])
        return type(self)(self.root, tuple(shape), dims, lead)

    def _filled(self, keys: tuple[Any, ...]) -> tuple[Any, ...]:
        dots = [i for i, k in enumerate(keys) if k is Ellipsis]
        missing = len(self.shape) - len(keys) + len(dots)
        if missing < 0 or len(dots) > 1:
            refuse("index", "key", "number of indices", len(keys), f"at most {self.ndim}", MODEL)
        at = dots[0] if dots else len(keys)
        return (*keys[:at], *[slice(None)] * missing, *keys[at + len(dots) :])

    def _advanced(self: _View, keys: tuple[Any, ...]) -> _View:
        if len(keys) != len(self.shape) or not _BASIC.isdisjoint(map(type, keys)):
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
        new = tuple([(i.offset, i.coeffs if len(i.coeffs) == rank else padded(i.coeffs, rank, 0)) for i in plain])
        root_dim = -1 if chosen is None else self._root_dim(chosen[0])
        if self.shape != self.root.shape:
            # A view's own limits are not those of the root, which are checked when the tile is used.
            for d, index in enumerate(plain):
                low, high = index.bounds()
                if (low < 0 or high >= self.shape[d]) and (chosen is None or d != chosen[0]):
                    rule = f"err_tensor_access_out_of_bound: indices of dimension {d} of a view"
                    refuse("index", "key", rule, f"{low}..{high}", f"0..{self.shape[d] - 1}")
        # The dimensions of a whole root are its own.
        dims = new if self.dims is self.root.dims else tuple([_expanded(dim, new, rank) for dim in self.dims])
        indirect = None if chosen is None else self._select(root_dim, chosen[1], shape)
        return type(self)(self.root, shape, dims, 0, indirect)

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


def _basic_key(d: int, k: Any, n: int, open_ended: bool) -> tuple[int, int, int, bool]:
    """Start, size, step of a basic index of a dimension of size n, and whether the dimension stays.

    With `open_ended` a slice or `nl.ds` may begin inside and end behind it.
    """
    if isinstance(k, DynamicSlice):
        first, count = as_int(k.start), as_int(k.size)
        if first is None or count is None:
            refuse("index", "key", f"nl.ds of dimension {d}", k, "integers known when the kernel is built", MODEL)
        start, size, step, keep = first, count, 1, True
    elif isinstance(k, slice):
        first = 0 if k.start is None else as_int(k.start)
        stop = n if k.stop is None else as_int(k.stop)
        by = 1 if k.step is None else as_int(k.step)
        if first is None or stop is None or by is None:
            refuse("index", "key", f"slice of dimension {d}", k, "integers known when the kernel is built", MODEL)
        if by < 1:
            refuse("index", "key", f"step of dimension {d}", by, ">= 1", MODEL)
        start, size, step, keep = first, -(-(stop - first) // by), by, True
    else:
        number = as_int(k)
        if number is None:
            refuse("index", "key", f"index of dimension {d}", repr(k), "an integer, a slice, nl.ds or ...", MODEL)
        start, size, step, keep = number, 1, 1, False
    last = start if open_ended and keep else start + (size - 1) * step
    if size < 1 or start < 0 or last >= n:
        # A slice that NumPy would shorten is a wrong bound here.
        rule = f"err_tensor_access_out_of_bound: index of dimension {d}"
        refuse("index", "key", rule, k, f"0..{n - 1}, at least one element")
    return start, size, step, keep


def _expanded(dim: Dim, new: tuple[Dim, ...], rank: int) -> Dim:
    """`dim`, a function of a view's indices, where these are the functions `new` of others."""
    total, coeffs = dim
    out = [0] * rank
    for c, (first, inner) in zip(coeffs, new, strict=True):
        if c:
            total += c * first
            for e, k in enumerate(inner):
                out[e] += c * k
    return total, tuple(out)


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
