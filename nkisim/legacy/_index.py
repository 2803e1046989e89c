"""Index expressions: `nl.arange` and `nl.mgrid` as affine functions of a tile's indices.

The value at (i0, i1, ...) is `offset + coeffs[0] * i0 + coeffs[1] * i1 + ...`. Sums, differences and products with
integers stay of that form, so that indexing a tensor with them is a strided view of it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

from nkisim.legacy._errors import refuse
from nkisim.view import DynamicSlice, as_int

if TYPE_CHECKING:
    from nkisim.legacy._mask import Mask

AFFINE = "NKI programming model, tensor indexing (SDK 2.26)"


class ParDim(int):
    """A size that `nl.par_dim` marked as that of the partition dimension."""

    def __repr__(self) -> str:
        return f"par_dim({int(self)})"


def par_dim(value: Any) -> ParDim:
    """Mark a dimension of a shape as the partition dimension; the dimensions before it are block dimensions."""
    size = as_int(value)
    if size is None or size < 1:
        refuse("par_dim", "", "size", value, "a positive integer", AFFINE)
    return ParDim(size)


class Index:
    """An affine index expression of a shape; comparisons make a `Mask`."""

    __slots__ = ("coeffs", "offset", "shape")
    __array_ufunc__: ClassVar[None] = None
    __hash__ = None  # type: ignore[assignment]
    __iter__: ClassVar[None] = None

    def __init__(self, shape: tuple[int, ...], offset: int, coeffs: tuple[int, ...]) -> None:
        self.shape = shape
        self.offset = offset
        self.coeffs = coeffs

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def bounds(self) -> tuple[int, int]:
        """Least and greatest value."""
        low = high = self.offset
        for n, c in zip(self.shape, self.coeffs, strict=True):
            reach = c * (n - 1)
            low, high = (low + reach, high) if reach < 0 else (low, high + reach)
        return low, high

    def __getitem__(self, key: Any) -> Index:
        """New axes only: `nl.arange(128)[:, None]`."""
        keys = key if isinstance(key, tuple) else (key,)
        shape: list[int] = []
        coeffs: list[int] = []
        dims = iter(zip(self.shape, self.coeffs, strict=True))
        for k in keys:
            if k is None:
                shape.append(1)
                coeffs.append(0)
            elif isinstance(k, slice) and k == slice(None):
                n, c = next(dims, (0, 0))
                if n == 0:
                    refuse("index", "key", "number of dimensions", key, f"{self.ndim} of `:`", AFFINE)
                shape.append(n)
                coeffs.append(c)
            else:
                refuse("index", "key", "element", k, "`:` and None: an index expression gets new axes only", AFFINE)
        rest = list(dims)
        return Index((*shape, *(n for n, _ in rest)), self.offset, (*coeffs, *(c for _, c in rest)))

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        refuse(
            "index",
            "",
            "err_cannot_assign_to_index: index expressions have no elements",
            f"an assignment to [{key}]",
            "nisa.iota(index, dtype), which makes a tile",
        )

    def __add__(self, other: Any) -> Index:
        return _combine(self, other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Index:
        return _combine(self, other, -1)

    def __rsub__(self, other: Any) -> Index:
        return _combine(-self, other, 1)

    def __neg__(self) -> Index:
        return Index(self.shape, -self.offset, tuple(-c for c in self.coeffs))

    def __mul__(self, other: Any) -> Index:
        factor = as_int(other)
        if factor is None:
            if isinstance(other, Index):
                self._not_affine("*")
            return NotImplemented
        return Index(self.shape, self.offset * factor, tuple(c * factor for c in self.coeffs))

    __rmul__ = __mul__

    def _not_affine(self, symbol: str) -> NoReturn:
        refuse(
            "index",
            "",
            "err_unsupported_expression_in_mask: index expression that is not affine",
            f"operator {symbol} on {self!r}",
            "+ and - of index expressions and integers, * with an integer",
        )

    def __floordiv__(self, other: Any) -> NoReturn:
        self._not_affine("//")

    def __mod__(self, other: Any) -> NoReturn:
        self._not_affine("%")

    def __lt__(self, other: Any) -> Mask:
        return _mask(other - self - 1) if _comparable(other) else NotImplemented

    def __le__(self, other: Any) -> Mask:
        return _mask(other - self) if _comparable(other) else NotImplemented

    def __gt__(self, other: Any) -> Mask:
        return _mask(self - other - 1) if _comparable(other) else NotImplemented

    def __ge__(self, other: Any) -> Mask:
        return _mask(self - other) if _comparable(other) else NotImplemented

    def __eq__(self, other: Any) -> Mask:  # type: ignore[override]
        return _mask(self - other, other - self) if _comparable(other) else NotImplemented

    def __ne__(self, other: object) -> NoReturn:
        self._not_affine("!=")

    def __bool__(self) -> NoReturn:
        refuse(
            "index",
            "",
            "err_control_flow_condition_depending_on_arange: an index expression in Python control flow",
            repr(self),
            "mask=",
        )

    def __repr__(self) -> str:
        terms = [f"{c}*i{d}" for d, c in enumerate(self.coeffs) if c]
        return f"index({' + '.join([str(self.offset), *terms])}, shape {self.shape})"


def _comparable(other: Any) -> bool:
    return isinstance(other, Index) or as_int(other) is not None


def _mask(*terms: Index) -> Mask:
    from nkisim.legacy._mask import Mask

    return Mask(terms)


def _combine(a: Index, other: Any, sign: int) -> Index:
    number = as_int(other)
    if number is not None:
        return Index(a.shape, a.offset + sign * number, a.coeffs)
    if not isinstance(other, Index):
        return cast(Index, NotImplemented)
    shape = broadcast_shapes("index", a.shape, other.shape)
    ca, cb = padded(a.coeffs, len(shape), 0), padded(other.coeffs, len(shape), 0)
    return Index(shape, a.offset + sign * other.offset, tuple(x + sign * y for x, y in zip(ca, cb, strict=True)))


def padded(values: tuple[int, ...], rank: int, fill: int) -> tuple[int, ...]:
    """`values` with `fill` in front, `rank` of them."""
    return (*[fill] * (rank - len(values)), *values)


def broadcast_shapes(what: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape of several by NumPy's rules."""
    found = _common_shape(shapes)
    if found is None:
        refuse(what, "", "shapes that do not broadcast", " and ".join(map(str, shapes)), "equal sizes or 1")
    return found


@functools.lru_cache(maxsize=4096)
def _common_shape(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...] | None:
    rank = max(len(s) for s in shapes)
    out = [1] * rank
    for shape in shapes:
        for d, n in enumerate(padded(shape, rank, 1)):
            if out[d] == 1:
                out[d] = n
            elif n not in (1, out[d]):
                return None
    return tuple(out)


def as_index(value: Any) -> Index | None:
    """An integer or an index expression as an `Index`, else None."""
    if isinstance(value, Index):
        return value
    number = as_int(value)
    return None if number is None else Index((), number, ())


def arange(*args: Any) -> Index:
    """`arange(stop)`, `arange(start, stop)` or `arange(start, stop, step)` as an index expression of one dimension."""
    numbers = [as_int(a) for a in args]
    if not 1 <= len(args) <= 3 or None in numbers:
        refuse("arange", "", "arguments", args, "one to three integers known when the kernel is built", AFFINE)
    bounds = range(*(n for n in numbers if n is not None))
    if not bounds:
        refuse("arange", "", "number of elements", 0, "at least one", AFFINE)
    return Index((len(bounds),), bounds.start, (bounds.step if len(bounds) > 1 else 0,))


class Grid(tuple[Index, ...]):
    """The result of `nl.mgrid[...]`: an index expression per dimension, also as `.p`, `.x`, `.y`, `.z`, `.w`."""

    __slots__ = ()

    def _axis(self, name: str) -> Index:
        d = "pxyzw".index(name)
        if d >= len(self):
            refuse("mgrid", name, "dimensions", len(self), f"more than {d}", AFFINE)
        return self[d]

    @property
    def p(self) -> Index:
        """Index of the partition dimension."""
        return self._axis("p")

    @property
    def x(self) -> Index:
        """Index of the first free dimension."""
        return self._axis("x")

    @property
    def y(self) -> Index:
        """Index of the second free dimension."""
        return self._axis("y")

    @property
    def z(self) -> Index:
        """Index of the third free dimension."""
        return self._axis("z")

    @property
    def w(self) -> Index:
        """Index of the fourth free dimension."""
        return self._axis("w")


class _MGrid:
    """`nl.mgrid`, indexed with slices: every index expression has the shape of the whole grid."""

    def __getitem__(self, key: Any) -> Grid:
        keys = key if isinstance(key, tuple) else (key,)
        axes: list[Index] = []
        for k in keys:
            if not isinstance(k, slice) or k.stop is None:
                refuse("mgrid", "key", "element", k, "slices start:stop or start:stop:step", AFFINE)
            axes.append(arange(0 if k.start is None else k.start, k.stop, 1 if k.step is None else k.step))
        shape = tuple(axis.shape[0] for axis in axes)
        return Grid(
            Index(shape, axis.offset, tuple(axis.coeffs[0] if d == e else 0 for e in range(len(axes))))
            for d, axis in enumerate(axes)
        )


mgrid = _MGrid()


def ds(start: Any, size: Any) -> DynamicSlice:
    """The slice `start : start + size` inside `[]`."""
    return DynamicSlice(start, size)
