"""`Tile`: a tensor of the `neuronxcc.nki` API, as a strided view of the simulator's storages.

A `Root` is what `nl.ndarray` made: block dimensions, each block with a storage of its own, then the partition dimension
and the free ones. A tile maps its own dimensions to those of its root by one affine function each, so that views of
views, `nl.arange` expressions and slices are the same thing.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from nkisim.dtypes import bool_
from nkisim.layout import merge
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._errors import refuse
from nkisim.legacy._index import Index
from nkisim.legacy._mask import Box
from nkisim.legacy._root import Spot, from_tensor
from nkisim.legacy._view import FREE_DIM, MODEL, DynamicIndex, TileView
from nkisim.tensor import NkiTensor
from nkisim.view import MAX_DIMS


class Tile(TileView):
    """What kernels index, compute with and assign to."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        from nkisim.legacy._assign import assign

        # Counted before the call below refers to it once more.
        unnamed = sys.getrefcount(value) <= _ASSIGNED
        assign(self[key], value, unnamed=unnamed)

    # -- other views

    def reshape(self, shape: Any) -> Tile:
        """The same elements under another shape, without a copy; on chip the partition dimension stays."""
        self._settle()
        new = tuple(shape)
        if -1 in new:
            refuse("reshape", "shape", "size", new, "sizes of all dimensions", MODEL)
        plain = tuple(int(n) for n in new)
        if self.lead:
            self._refuse_tile("reshape", "")
        return self._wrap(self.tensor("reshape", "").reshape(plain))

    def view(self, dtype: Any) -> Tile:
        """The same bytes as another element type."""
        self._settle()
        return self._wrap(self.tensor("view", "").view(kind_of(dtype, "view dtype")))

    def expand_dims(self, axis: int) -> Tile:
        """A view with a dimension of size 1 at `axis`."""
        self._settle()
        at = axis + self.ndim + 1 if axis < 0 else axis
        if not 0 <= at <= self.ndim or (self.on_chip and at <= self.lead):
            refuse("expand_dims", "axis", "value", axis, f"{self.lead + 1}..{self.ndim}", MODEL)
        dims = tuple((offset, (*coeffs[:at], 0, *coeffs[at:])) for offset, coeffs in self.dims)
        return Tile(self.root, (*self.shape[:at], 1, *self.shape[at:]), dims, self.lead, self.indirect)

    def broadcast_to(self, shape: Any) -> Tile:
        """A view with dimensions of size 1 repeated; a copy where the partition dimension is one of them."""
        from nkisim.legacy.language._move import broadcast_to

        return broadcast_to(self, shape=shape)

    def repeated(self, shape: tuple[int, ...]) -> Tile:
        """A view of `shape`, with free dimensions of size 1 repeated."""
        # A repeated dimension has no coefficient in any dimension of the root: stride 0.
        dims = tuple(
            (offset, tuple(0 if n != m else c for c, n, m in zip(coeffs, self.shape, shape, strict=True)))
            for offset, coeffs in self.dims
        )
        return Tile(self.root, shape, dims, self.lead, self.indirect)

    def transposed(self, order: tuple[int, ...]) -> Tile:
        """A view with the dimensions in another order."""
        dims = tuple((offset, tuple(coeffs[d] for d in order)) for offset, coeffs in self.dims)
        return Tile(self.root, tuple(self.shape[d] for d in order), dims, self.lead, self.indirect)

    def astype(self, dtype: Any) -> Tile:
        """A copy with another element type."""
        from nkisim.legacy.language._move import copy

        return copy(self, dtype=dtype)

    def _wrap(self, t: NkiTensor) -> Tile:
        return from_tensor(t, self.name, self.root.access, self.root.scope).tile()

    # -- the simulator's view

    def tensor(self, what: str, operand: str, box: Box | None = None) -> NkiTensor:
        """The rectangle as the simulator's tensor, its run-time indices included."""
        from nkisim.legacy._issue import settle

        spot = self.spot(what, operand, box)
        settle(spot.block)
        return self.at(spot, what, operand, box)

    def at(self, spot: Spot, what: str, operand: str, box: Box | None = None) -> NkiTensor:
        """The simulator's tensor of a spot of this tile."""
        t = spot.block.tensor
        shape, strides = spot.shape, spot.strides
        if len(shape) > MAX_DIMS:
            shape, strides = _merged(shape, strides)
        if (
            self.indirect is None
            and t.dynamic is None
            and (shape[0] == 1 or not t.on_chip or strides[0] == t.row_elements)
        ):
            if self._tensor is not None and self._found is not None and self._found[1] is spot:
                return self._tensor
            # `ap` would check the addresses, which are those of indices inside of the root.
            self._tensor = t._make("ap", shape, strides, spot.offset, None)
            return self._tensor
        pattern = [[stride, n] for stride, n in zip(strides, shape, strict=True)]
        shift = spot.offset - t.offset
        if self.indirect is None:
            return t.ap(pattern, offset=shift)
        r = self.indirect.dim - self.root.n_block
        index = self.indirect.index
        if not self.indirect.by_row:
            return t.ap(pattern, offset=shift, scalar_offset=index.tensor(what, f"{operand} index"), indirect_dim=r)
        if strides[0]:
            refuse(what, operand, FREE_DIM, "rows that also follow the partition", "rows that the index alone selects")
        rows = None if box is None else (box[0], (0, 1))
        selected = t.ap([[t.strides[r], t.shape[r]]])
        return selected.ap(pattern, offset=shift, vector_offset=index.tensor(what, f"{operand} index", rows))

    # -- operators; the functions of nl do the work

    def _binary(self, name: str, other: Any, reverse: bool = False) -> Any:
        if isinstance(other, Index):
            return DynamicIndex(self, other) if name == "add" else NotImplemented
        if not isinstance(other, (Tile, int, float, np.generic)):
            return NotImplemented
        from nkisim.legacy import language

        function = getattr(language, name)
        return function(other, self) if reverse else function(self, other)

    def _in_place(self, name: str, other: Any, unnamed: bool = False) -> Tile:
        from nkisim.legacy._assign import accumulate, assign

        # Another tile that is pending stays so: it may be the product that is added.
        self._settle()
        if unnamed and accumulate(self, other):
            self.accumulated = True
            return self
        result = self._binary(name, other)
        if result is NotImplemented:
            refuse(f"operator {name}=", "", "type", type(other).__name__, "a tile or a number", MODEL)
        assign(self, result, unnamed=True, reduces=True)
        self.accumulated = True
        return self

    def __add__(self, other: Any) -> Any:
        return self._binary("add", other)

    def __radd__(self, other: Any) -> Any:
        return self._binary("add", other, True)

    def __iadd__(self, other: Any) -> Tile:
        unnamed = sys.getrefcount(other) <= _ADDED
        return self._in_place("add", other, unnamed)

    def __sub__(self, other: Any) -> Any:
        return self._binary("subtract", other)

    def __rsub__(self, other: Any) -> Any:
        return self._binary("subtract", other, True)

    def __isub__(self, other: Any) -> Tile:
        return self._in_place("subtract", other)

    def __mul__(self, other: Any) -> Any:
        return self._binary("multiply", other)

    def __rmul__(self, other: Any) -> Any:
        return self._binary("multiply", other, True)

    def __imul__(self, other: Any) -> Tile:
        return self._in_place("multiply", other)

    def __truediv__(self, other: Any) -> Any:
        return self._binary("divide", other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._binary("divide", other, True)

    def __itruediv__(self, other: Any) -> Tile:
        return self._in_place("divide", other)

    def __pow__(self, other: Any) -> Any:
        return self._binary("power", other)

    def __rpow__(self, other: Any) -> Any:
        return self._binary("power", other, True)

    def __mod__(self, other: Any) -> Any:
        return self._binary("mod", other)

    def __and__(self, other: Any) -> Any:
        return self._binary("bitwise_and", other)

    def __rand__(self, other: Any) -> Any:
        return self._binary("bitwise_and", other, True)

    def __or__(self, other: Any) -> Any:
        return self._binary("bitwise_or", other)

    def __ror__(self, other: Any) -> Any:
        return self._binary("bitwise_or", other, True)

    def __xor__(self, other: Any) -> Any:
        return self._binary("bitwise_xor", other)

    def __rxor__(self, other: Any) -> Any:
        return self._binary("bitwise_xor", other, True)

    def __lshift__(self, other: Any) -> Any:
        return self._binary("left_shift", other)

    def __rshift__(self, other: Any) -> Any:
        return self._binary("right_shift", other)

    def __lt__(self, other: Any) -> Any:
        return self._binary("less", other)

    def __le__(self, other: Any) -> Any:
        return self._binary("less_equal", other)

    def __gt__(self, other: Any) -> Any:
        return self._binary("greater", other)

    def __ge__(self, other: Any) -> Any:
        return self._binary("greater_equal", other)

    def __eq__(self, other: object) -> Any:
        return self._binary("equal", other)

    def __ne__(self, other: object) -> Any:
        return self._binary("not_equal", other)

    def __neg__(self) -> Tile:
        return self._unary("negative")

    def __invert__(self) -> Tile:
        return self._unary("logical_not" if self.kind is bool_ else "invert")

    def __abs__(self) -> Tile:
        return self._unary("abs")

    def _unary(self, name: str) -> Tile:
        from nkisim.legacy import language

        result: Tile = getattr(language, name)(self)
        return result


class _Count:
    """How many references Python's operators hold to what they are given."""

    def __setitem__(self, key: int, value: object) -> None:
        self.seen = sys.getrefcount(value)

    def __iadd__(self, other: object) -> _Count:
        self.seen = sys.getrefcount(other)
        return self


def _references(add: bool, named: bool) -> int:
    count = _Count()
    value = object()
    if add and named:
        count += value
    elif add:
        count += object()
    elif named:
        count[0] = value
    else:
        count[0] = object()
    return count.seen


# An instruction's result that is assigned at once can be computed in place; one that has a name can still be read
# later. The running kernel holds a reference to what is pending. Where Python does not count the references of names
# every result counts as unnamed, and reading one after it was assigned is refused.
_TOLD_APART = _references(False, True) > _references(False, False) and _references(True, True) > _references(
    True, False
)
_ASSIGNED = _references(False, False) + 1 if _TOLD_APART else sys.maxsize
_ADDED = _references(True, False) + 1 if _TOLD_APART else sys.maxsize


def _merged(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Fewer free dimensions over the same elements, where neighbours are contiguous."""
    pairs: list[tuple[int, int]] = [(shape[0], strides[0])]
    for n, stride in zip(shape[1:], strides[1:], strict=True):
        joined = merge((pairs[-1][0], n), (pairs[-1][1], stride)) if len(pairs) > 1 else None
        if joined is not None:
            pairs[-1] = joined
        elif n > 1 or len(pairs) == 1:
            pairs.append((n, stride))
    return tuple(n for n, _ in pairs), tuple(s for _, s in pairs)
