"""Masks, and the rectangles of a tile that they leave.

A mask is a conjunction of affine inequalities. What it leaves of a tile is cut into rectangles, and the instruction is
issued once for each, so that masked-out elements are neither read nor written.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import numpy as np

from nkisim.legacy._errors import refuse
from nkisim.legacy._index import Index, padded

Box = tuple[tuple[int, int], ...]  # (start, size) per dimension
_Term = tuple[int, tuple[int, ...]]  # offset and coefficients of an expression that has to be >= 0

_QUADRANT = 32  # partitions between those where an engine can start


class Mask:
    """A conjunction of terms that have to be >= 0; `&` joins masks."""

    __slots__ = ("terms",)
    __array_ufunc__: ClassVar[None] = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, terms: tuple[Index, ...]) -> None:
        self.terms = terms

    def __and__(self, other: Any) -> Mask | bool:
        if isinstance(other, Mask):
            return Mask(self.terms + other.terms)
        if isinstance(other, (bool, np.bool_)):
            return self if other else False
        return NotImplemented

    __rand__ = __and__

    def _refuse(self, symbol: str) -> NoReturn:
        refuse(
            "mask",
            "",
            "err_unsupported_expression_in_mask: masks are joined by & only",
            f"operator {symbol}",
            "comparisons of affine expressions joined by &",
        )

    def __or__(self, other: Any) -> NoReturn:
        self._refuse("|")

    def __xor__(self, other: Any) -> NoReturn:
        self._refuse("^")

    def __invert__(self) -> NoReturn:
        self._refuse("~")

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        refuse("mask", "", "err_cannot_assign_to_index: a mask has no elements", f"[{key}]", "a tile")

    def __bool__(self) -> NoReturn:
        refuse(
            "mask",
            "",
            "err_control_flow_condition_depending_on_arange: a mask in Python control flow",
            repr(self),
            "mask=, and & instead of `and`",
        )

    def __repr__(self) -> str:
        return f"mask({' & '.join(f'{t!r} >= 0' for t in self.terms)})"


def whole(shape: tuple[int, ...]) -> Box:
    """The rectangle of a whole tile."""
    return tuple([(0, n) for n in shape])


def boxes(what: str, mask: Any, shape: tuple[int, ...]) -> list[Box]:
    """The rectangles of a tile of `shape` that `mask` leaves: none where it leaves nothing.

    Raises:
        NkiError: `mask` is no mask, or its index expressions do not fit the tile.
    """
    if mask is None or isinstance(mask, (bool, np.bool_)):
        return [whole(shape)] if mask is None or mask else []
    if not isinstance(mask, Mask):
        refuse(
            what,
            "mask",
            "err_unsupported_expression_in_mask: type",
            type(mask).__name__,
            "a comparison of affine index expressions, joined by &",
        )
    rank = len(shape)
    terms: list[_Term] = []
    for term in mask.terms:
        extra, sizes = term.shape[: max(len(term.shape) - rank, 0)], term.shape[max(len(term.shape) - rank, 0) :]
        if any(n != 1 for n in extra) or any(
            n not in (1, m) for n, m in zip(padded(sizes, rank, 1), shape, strict=True)
        ):
            refuse(what, "mask", "shape of its index expressions", term.shape, f"one that broadcasts to {shape}")
        terms.append((term.offset, padded(term.coeffs[len(extra) :], rank, 0)))
    candidates = []
    for order in (tuple(range(rank)), tuple(range(rank - 1, -1, -1))):
        found = _cut(list(whole(shape)), terms, order)
        candidates.append((sum(box[0][0] % _QUADRANT != 0 for box in found), len(found), found))
        if all(sum(c != 0 for c in coeffs) <= 1 for _, coeffs in terms):
            break
    # Fewest rectangles that no engine can address, then fewest rectangles.
    return min(candidates, key=lambda c: c[:2])[2]


def _cut(box: list[tuple[int, int]], terms: list[_Term], order: tuple[int, ...]) -> list[Box]:
    """Rectangles of `box` where all terms hold; coupled dimensions are walked in `order`."""
    coupled: list[_Term] = []
    for offset, coeffs in terms:
        used = [d for d, c in enumerate(coeffs) if c]
        if len(used) > 1:
            coupled.append((offset, coeffs))
        elif used:
            d = used[0]
            start, stop = box[d][0], box[d][0] + box[d][1]
            c = coeffs[d]
            if c > 0:
                start = max(start, -(offset // c))  # ceil(-offset / c)
            else:
                stop = min(stop, offset // -c + 1)
            if start >= stop:
                return []
            box[d] = (start, stop - start)
        elif offset < 0:
            return []
    if not coupled:
        return [tuple(box)]
    walked = next(d for d in order if any(coeffs[d] for _, coeffs in coupled))
    runs: list[tuple[int, int, list[Box]]] = []  # first value, number of values, rectangles of the other dimensions
    first, size = box[walked]
    for i in range(first, first + size):
        inner = [(offset + coeffs[walked] * i, _without(coeffs, walked)) for offset, coeffs in coupled]
        cut = box.copy()
        cut[walked] = (0, 1)
        found = _cut(cut, inner, order)
        if runs and runs[-1][2] == found:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, found)
        else:
            runs.append((i, 1, found))
    return [(*b[:walked], (i, n), *b[walked + 1 :]) for i, n, found in runs for b in found]


def _without(coeffs: tuple[int, ...], d: int) -> tuple[int, ...]:
    return (*coeffs[:d], 0, *coeffs[d + 1 :])
