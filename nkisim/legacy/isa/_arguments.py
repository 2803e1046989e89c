"""Arguments that several instructions share: undocumented keywords, result memory, columns, predicates."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from nkisim import isa, language
from nkisim.dtypes import bool_, float32, uint8
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import operand
from nkisim.legacy._mask import Mask, boxes
from nkisim.legacy._tile import Tile
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.tensor import NkiTensor


def result_buffer(what: str, kwargs: dict[str, Any], allowed: tuple[MemoryRegion, ...] = ON_CHIP) -> MemoryRegion:
    """The memory that `buffer=` asks for, the first of `allowed` without it; refuses every other keyword.

    Raises:
        TypeError: an unknown keyword, or a `buffer` that the instruction does not write.
    """
    buffer = kwargs.pop("buffer", None)
    no_keywords(what, kwargs)
    if buffer is None:
        return allowed[0]
    region: Any = getattr(buffer, "region", buffer)
    if region not in allowed:
        raise TypeError(f"nki.isa.{what}.buffer: received {buffer!r}, allowed {', '.join(m.name for m in allowed)}")
    chosen: MemoryRegion = region
    return chosen


def no_keywords(what: str, kwargs: dict[str, Any]) -> None:
    """Refuse keywords that the page of SDK 2.26 does not have, though its signatures end in `**kwargs`.

    Raises:
        TypeError: there is one.
    """
    if kwargs:
        raise TypeError(f"nki.isa.{what}: received keyword {sorted(kwargs)[0]!r}, allowed those of SDK 2.26")


def is_number(value: Any) -> bool:
    """Whether it is a number known when the kernel is built."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def read_like(part: Any, name: str, t: Tile) -> NkiTensor:
    """The part of a source with as many elements per partition as the instruction covers, in whatever shape.

    Raises:
        NkiError: another number of elements; these instructions repeat nothing.
        NotImplementedError: a mask over free dimensions that the source does not have.
    """
    if t.shape == part.over:
        view: NkiTensor = part.read(t)
        return view
    if prod(t.shape[1:]) != prod(part.over[1:]):
        allowed = f"{prod(part.over[1:])}, as many as the other operands"
        refuse(part.what, name, "elements per partition", received=prod(t.shape[1:]), allowed=allowed)
    if any(size != n for (_, size), n in zip(part.box[1:], part.over[1:], strict=True)):
        raise NotImplementedError(f"nki.isa.{part.what}.mask: operands of different shapes, {part.over} and {t.shape}")
    flat: NkiTensor = part.read(t, dims=first_dim(t))
    return flat


def column(what: str, name: str, value: Any, partitions: int) -> Any:
    """A `[P, 1]` operand as a tile; a number or None comes back as it is.

    Raises:
        NkiError: a tile of another shape, or what is neither.
    """
    if value is None or is_number(value):
        return value
    t = operand(what, name, value)
    if t.shape[0] != partitions or prod(t.shape[1:]) != 1:
        refuse(what, name, "shape of an operand per partition", received=list(t.shape), allowed=f"[{partitions}, 1]")
    return t


def write_column(part: Any, value: Tile | None) -> Any:
    """The part of a `[P, 1]` destination for the running rectangle, or None."""
    return None if value is None else part.write(value, dims=first_dim(value))


def first_dim(t: Tile) -> tuple[int | None, ...]:
    """The `dims=` of an operand that follows the partitions only."""
    return (0, *(None for _ in t.shape[1:]))


def float32_column(part: Any, value: Any) -> Any:
    """`part.column(value)` as float32, through a copy where the tile has another type.

    The current instructions take float32 columns; SDK 2.26 names no type, and casts every input to float32.
    """
    t = part.column(value)
    if not isinstance(t, NkiTensor) or t.dtype is float32:
        return t
    wide = language.ndarray(t.shape, float32)
    isa.tensor_copy(wide, t)
    return wide


def as_mask_tile(t: NkiTensor) -> NkiTensor:
    """A predicate as unsigned bytes where it holds truth values: comparisons and NumPy's bool arrays give those."""
    return t.view(uint8) if t.dtype is bool_ else t


def integral(value: Any, is_integer: bool) -> Any:
    """A constant for a tile: a float without a fraction as an int where the tile holds integers, 2.26 takes both."""
    if isinstance(value, (bool, np.bool_)):
        return value
    if is_integer and isinstance(value, (float, np.floating)) and float(value).is_integer():
        return int(value)
    return value


def require_dtype(what: str, dtype: Any, t: Tile) -> None:
    """Refuse a `dtype=` that is not the destination's, where the call names the destination."""
    if dtype is not None and kind_of(dtype) is not t.kind:
        refuse(what, "dtype", "type of a named destination", received=kind_of(dtype), allowed=f"{t.kind}, dst's")


def one_pass(what: str, mask: Any, shape: tuple[int, ...], kept: int = 0) -> None:
    """Refuse a mask under which an instruction would see a row (or column, `kept=1`) of the tile in several pieces.

    What it makes of a row as a whole (a reduction, a running result, positions) cannot be put together again.

    Raises:
        NotImplementedError: such a mask.
    """
    if not isinstance(mask, Mask):
        return
    seen: set[int] = set()
    for box in boxes(what, mask, shape):
        rows = set(range(box[kept][0], box[kept][0] + box[kept][1]))
        if rows & seen:
            raise NotImplementedError(
                f"nki.isa.{what}.mask: what the mask leaves of a row takes several instructions; use affine_select"
            )
        seen |= rows
