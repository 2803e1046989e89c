"""GpSimd Engine of SDK 2.26: affine patterns, selection by them, reduction over partitions, gathers. SBUF only."""

from __future__ import annotations

from math import prod
from typing import Any

from nkisim import isa as nisa
from nkisim import language
from nkisim.dtypes import float32, int32, uint32
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._errors import refuse
from nkisim.legacy._index import Index, as_index, padded
from nkisim.legacy._issue import operand, produce
from nkisim.legacy._mask import Mask
from nkisim.legacy._operators import as_op
from nkisim.legacy._tile import Tile
from nkisim.legacy.isa._arguments import one_pass, result_buffer
from nkisim.machine import current_core
from nkisim.memory import SBUF, MemoryRegion
from nkisim.tensor import NkiTensor


def iota(expr: Any, dtype: Any, *, mask: Any = None, **kwargs: Any) -> Tile:
    """The values of an affine index expression of `nl.arange`, as a tile of its shape.

    Raises:
        NkiError: what is no such expression, and as the current `iota`.
    """
    what = "iota"
    buffer = result_buffer(what, kwargs, SBUF)
    index = as_index(expr)
    if index is None:
        refuse(what, "expr", "type", received=type(expr).__name__, allowed="an affine expression of nl.arange")
    rank = max(len(index.shape), 2)
    # A value per partition only has no free dimension of its own.
    front = len(index.shape) == 1
    shape = (*index.shape, 1) if front else padded(index.shape, rank, 1)
    coeffs = (*index.coeffs, 0) if front else padded(index.coeffs, rank, 0)
    kind = kind_of(dtype, "nki.isa.iota.dtype")

    def issue(dst: NkiTensor, part: Any) -> None:
        pattern, offset = _pattern(coeffs, index.offset, part)
        nisa.iota(dst, pattern, offset=offset, channel_multiplier=coeffs[0])

    return produce(what, shape, issue, dtype=kind, default=kind, mask=mask, buffer=buffer, into=SBUF)


def _pattern(coeffs: tuple[int, ...], offset: int, part: Any) -> tuple[list[list[int]], int]:
    """`[step, num]` per free dimension and the first value of an affine expression in the running rectangle."""
    first = offset + sum(c * begin for c, (begin, _) in zip(coeffs, part.box, strict=True))
    steps = [[c, size] for c, (_, size) in zip(coeffs[1:], part.box[1:], strict=True)]
    # Dimensions of one element take a slot of the pattern and say nothing.
    return [step for step in steps if step[1] > 1] or [[0, 1]], first


def affine_select(
    pred: Any, on_true_tile: Any, on_false_value: Any, *, mask: Any = None, dtype: Any = None, **kwargs: Any
) -> Tile:
    """on_true_tile where one comparison of affine index expressions holds, on_false_value elsewhere.

    A tile in PSUM, which the engine does not reach, is copied to SBUF first: AWS's attention kernels pass such tiles.

    Raises:
        NkiError: several comparisons joined by `&`, 32-bit integer tiles, and as the current `affine_select`.
    """
    what = "affine_select"
    buffer = result_buffer(what, kwargs, SBUF)
    t = operand(what, "on_true_tile", on_true_tile)
    for name, kind in (("on_true_tile", t.kind), ("dtype", t.kind if dtype is None else kind_of(dtype))):
        if kind in (int32, uint32):
            refuse(what, name, "type", received=kind, allowed="floats and integers of 8 or 16 bits")
    term, compare = _comparison(pred)
    rank = len(t.shape)
    if len(term.shape) > rank or any(
        n not in (1, m) for n, m in zip(padded(term.shape, rank, 1), t.shape, strict=True)
    ):
        refuse(what, "pred", "shape", received=term.shape, allowed=f"{t.shape}, that of on_true_tile")
    coeffs = padded(term.coeffs, rank, 0)

    def issue(dst: NkiTensor, part: Any) -> None:
        pattern, offset = _pattern(coeffs, term.offset, part)
        x = part.read(t)
        if x.buffer is MemoryRegion.psum:
            reachable = language.ndarray(x.shape, x.dtype)
            nisa.tensor_copy(reachable, x)
            x = reachable
        nisa.affine_select(dst, pattern, coeffs[0], x, on_false_value, cmp_op=compare, offset=offset)

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer, into=SBUF)


def _comparison(pred: Any) -> tuple[Index, Any]:
    """The affine expression of a predicate and how it compares with 0."""
    allowed = "one comparison of affine index expressions"
    if isinstance(pred, bool):
        return Index((), 0 if pred else -1, ()), language.greater_equal
    if not isinstance(pred, Mask):
        refuse("affine_select", "pred", "type", received=type(pred).__name__, allowed=allowed)
    if len(pred.terms) == 1:
        return pred.terms[0], language.greater_equal
    # a == b stands as a - b >= 0 and b - a >= 0.
    first, second = pred.terms[0], -pred.terms[1]
    if len(pred.terms) > 2 or (first.shape, first.offset, first.coeffs) != (second.shape, second.offset, second.coeffs):
        refuse("affine_select", "pred", "number of comparisons", received=len(pred.terms), allowed=allowed)
    return first, language.equal


def tensor_partition_reduce(op: Any, data: Any, *, mask: Any = None, dtype: Any = None, **kwargs: Any) -> Tile:
    """data[0] op data[1] op ... over the partitions, [1, ...].

    Raises:
        NkiError: as the current `tensor_partition_reduce`.
    """
    what = "tensor_partition_reduce"
    buffer = result_buffer(what, kwargs, SBUF)
    t = operand(what, "data", data, SBUF)
    operator = as_op(what, "op", op)
    one_pass(what, mask, t.shape, 1)

    def issue(dst: NkiTensor, part: Any) -> None:
        nisa.tensor_partition_reduce(dst, operator, part.read(t))

    return produce(
        what,
        (1, *t.shape[1:]),
        issue,
        dtype=dtype,
        default=t.kind,
        mask=mask,
        over=t.shape,
        dims=(None, *range(1, len(t.shape))),
        buffer=buffer,
        into=SBUF,
    )


def local_gather(
    src_buffer: Any, index: Any, num_elem_per_idx: int = 1, num_valid_indices: Any = None, *, mask: Any = None
) -> Tile:
    """The runs of `num_elem_per_idx` elements that the indices of each 16 partitions name, for each of them.

    [P, columns of index, 16, run], or [P, valid indices, run] where not all are valid.

    Raises:
        NkiError: as the current `local_gather`.
        NotImplementedError: a mask.
    """
    what = "local_gather"
    if isinstance(mask, Mask):
        raise NotImplementedError("nki.isa.local_gather.mask: gathers have no rectangles to cut")
    t, where = operand(what, "src_buffer", src_buffer, SBUF), operand(what, "index", index, SBUF)
    group = current_core("nki.isa.local_gather").hardware.gpsimd_core_partitions
    columns = prod(where.shape[1:])
    every = num_valid_indices is None or num_valid_indices == group * columns
    shape = (t.shape[0], *((columns, group) if every else (num_valid_indices,)), num_elem_per_idx)

    def issue(dst: NkiTensor, part: Any) -> None:
        source, indices = (part.read(x, dims=(None,) * len(x.shape)) for x in (t, where))
        nisa.local_gather(dst, source, indices, num_elem_per_idx, group * columns if every else num_valid_indices)

    # Nothing is converted on the way: a destination of another type gets a copy.
    return produce(what, shape, issue, dtype=t.kind, default=t.kind, mask=mask, into=SBUF)


def sequence_bounds(*, segment_ids: Any, dtype: Any = None) -> Tile:
    """Start and end (exclusive) of the run of equal ids that each of n elements belongs to, [1, 2, n]; id 0 is padding.

    Raises:
        NkiError: as the current `sequence_bounds`; a type other than float32 and int32.
    """
    what = "sequence_bounds"
    t = operand(what, "segment_ids", segment_ids, SBUF)
    kind = t.kind if dtype is None else kind_of(dtype)
    if kind not in (float32, int32):
        refuse(what, "dtype", "type", received=kind, allowed="float32, int32")
    n = prod(t.shape[1:])

    def issue(dst: NkiTensor, part: Any) -> None:
        nisa.sequence_bounds(dst, part.read(t, dims=(None,) * len(t.shape)))

    # A destination of a type that the instruction does not write gets a copy.
    return produce(what, (1, 2, n), issue, dtype=kind, default=kind, into=SBUF)
