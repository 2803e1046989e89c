"""`dma_copy` on top of `neuronxcc.nki`.

An address that the host knows is part of the instruction. Rows that it knows are moved in as few pieces as they form
arithmetic progressions: a piece has one stride. Addresses that only the device knows are those of neuronxcc's indirect
DMA: row numbers in SBUF, one per partition. What does not begin with a row of the tensor, or is longer than one, takes
several of these, with row numbers that the GpSimd Engine adds to.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np

from contributed._neuronxcc_launch import on_chip, program, repeat_first
from contributed._neuronxcc_tensors import (
    DTYPES,
    Array,
    Dims,
    Dynamic,
    Register,
    Tensor,
    arange,
    known_values,
    merged,
    note_copy,
    place,
    refined,
    tile,
)
from contributed._neuronxcc_vendor import nisa, nl

INT32 = DTYPES["int32"]
EXACT = 2**24  # to which float32, in which comparisons are made, holds all integers


def dma_copy(
    dst: Tensor,
    src: Tensor,
    oob_mode: Any = nisa.oob_mode.error,
    dge_mode: Any = nisa.dge_mode.unknown,
    engine: Any = nisa.engine.unknown,
) -> None:
    """dst = src, one of them in HBM. `dge_mode` and `engine` choose a queue, which the compiler does."""
    del dge_mode, engine
    program().writes(dst)
    note_copy(dst, src)
    if program().dry:
        return
    if not dst.on_chip and not src.on_chip:
        if dst.dynamic is None and src.dynamic is None and not program().trips:
            _between_hbm(dst, src)
            return
        # An address that only the device knows, and a store that may not be made, need the other side on chip.
        pmax = nl.tile_size.pmax
        for first in range(0, dst.shape[0], pmax):
            part = slice(first, min(first + pmax, dst.shape[0]))
            bounce = program().ndarray(dst[part].shape, src.dtype, "sbuf")
            dma_copy(bounce, src[part], oob_mode)
            dma_copy(dst[part], bounce, oob_mode)
        return
    if dst.on_chip and src.on_chip:
        raise NotImplementedError("neuronxcc: DMA from SBUF to SBUF")
    skip = oob_mode == nisa.oob_mode.skip
    chip, hbm = (dst, src) if dst.on_chip else (src, dst)
    if hbm.dynamic is None:
        _move(chip, hbm, dst.on_chip)
    elif hbm.dynamic.vector:
        _by_index(chip, hbm, dst.on_chip, skip)
    else:
        _by_number(chip, hbm, dst.on_chip, skip)


# -- addresses that the host knows


def _between_hbm(dst: Tensor, src: Tensor) -> None:
    to, data = refined(dst.dims(), src.dims())
    to, data = to or [(1, 1)], data or [(1, 1)]
    nisa.dma_copy(dst=_flat(dst, dst.offset, to), src=_flat(src, src.offset, data))


def _flat(t: Tensor, offset: int, dims: Dims) -> Any:
    """Elements of a tensor in HBM, [n, ...]."""
    rank = max(2, len(dims))
    index: Any = offset
    for axis, (stride, n) in enumerate(dims):
        index = index + stride * arange(n, axis, rank)
    if len(dims) < 2:
        index = index + arange(1, 1, rank)
    return t.storage.of(t.dtype)[index]


def _move(chip: Tensor, hbm: Tensor, load: bool) -> None:
    """A copy between a tile and a static pattern in HBM, partition by partition where the pattern asks for it."""
    outer, inner = _split(hbm.dims(), chip.shape[0])
    _move_rows(chip, 0, hbm, hbm.offset, merged(outer), inner, load)


def _split(dims: Dims, partitions: int) -> tuple[Dims, Dims]:
    """The first dimensions, of as many elements as there are partitions, and the others."""
    outer: Dims = []
    inner: Dims = []
    left = partitions
    for stride, n in dims:
        if left == 1:
            inner.append((stride, n))
        elif left % n == 0:
            outer.append((stride, n))
            left //= n
        else:
            assert n % left == 0, f"{partitions} partitions of a pattern {dims}"
            outer.append((stride * (n // left), left))
            inner.append((stride, n // left))
            left = 1
    assert left == 1, f"{partitions} partitions of a pattern {dims}"
    return outer, inner


def _move_rows(chip: Tensor, row: int, hbm: Tensor, offset: int, outer: Dims, inner: Dims, load: bool) -> None:
    """The partitions from `row` on whose places in HBM `outer` tells."""
    if len(outer) > 1:
        (stride, n), rest = outer[0], outer[1:]
        size = prod(count for _, count in rest)
        for i in range(n):
            _move_rows(chip, row + i * size, hbm, offset + i * stride, rest, inner, load)
        return
    stride, n = outer[0] if outer else (1, 1)
    rows = chip[row : row + n]
    free, elements = refined(rows.dims()[1:], inner)
    free, elements = free or [(1, 1)], elements or [(1, 1)]
    dims = [(stride, n), *elements]
    if any(s == 0 and n > 1 for s, n in dims):
        assert load, "a store to one place from several"
        _load_repeated(rows, free, hbm, offset, dims)
        return
    tensor, index = place(rows, free)
    place_hbm = _flat(hbm, offset, dims)
    if load:
        nisa.dma_copy(dst=tensor[index], src=place_hbm)
    elif program().trips:
        _store_if_live(place_hbm, tensor[index], rows.shape[0], [count for _, count in free], hbm)
    else:
        nisa.dma_copy(dst=place_hbm, src=tensor[index])


def _store_if_live(place_hbm: Any, values: Any, n: int, counts: list[int], hbm: Tensor) -> None:
    """A store of a trip that may not be made: what is there comes, and goes back where it is to stay."""
    chosen = nl.load(place_hbm)
    live = program().trips[-1].live[0:n, 0:1]
    # By DMA, which begins at any partition and casts.
    new = nl.ndarray((nl.par_dim(n), *counts), dtype=hbm.dtype.vendor, buffer=nl.sbuf)
    nisa.dma_copy(dst=new, src=values)
    nisa.tensor_copy_predicated(dst=chosen, src=new, predicate=live.broadcast_to((n, *counts)))
    nl.store(place_hbm, chosen)


def _load_repeated(rows: Tensor, free: Dims, hbm: Tensor, offset: int, dims: Dims) -> None:
    """What repeats in HBM is loaded once and repeated on chip."""
    once = [(stride, n if stride else 1) for stride, n in dims]
    counts = [n for _, n in dims[1:]]
    width = prod(counts)
    loaded = nl.load(_flat(hbm, offset, once))
    n = dims[0][1]
    all_of_it = on_chip((n, width), rows.dtype, "sbuf")
    part = all_of_it[0 : once[0][1], 0:width].reshape((once[0][1], *counts))
    part[...] = nisa.tensor_copy(loaded.broadcast_to((once[0][1], *counts)), dtype=rows.dtype.vendor)
    if once[0][1] < n:
        repeat_first(all_of_it, n, width)
    tensor, index = place(rows, free)
    # By DMA, which begins at any partition.
    nisa.dma_copy(dst=tensor[index], src=all_of_it.reshape((n, *counts)))


# -- a row number for each partition


def _by_index(chip: Tensor, hbm: Tensor, load: bool, skip: bool) -> None:
    """Partition p's elements begin with row index[p] in HBM."""
    dynamic = hbm.dynamic
    assert dynamic is not None
    n = hbm.shape[0]
    index: Tensor = dynamic.index[0:n]
    width = _width(hbm, dynamic.stride)
    free, elements = refined(chip.dims()[1:], hbm.dims()[1:])
    pieces = list(_pieces(hbm.offset, free or [(1, 1)], elements or [(1, 1)], width))
    values = known_values(index)
    if values is not None:
        runs = _runs(values.reshape(-1).astype(np.int64), dynamic, skip)
        if len(runs) <= len(pieces):
            for row, count, first, step in runs:
                offset, outer = hbm.offset + first * dynamic.stride, [(step * dynamic.stride, count)]
                _move_rows(chip, row, hbm, offset, outer, hbm.dims()[1:], load)
            return
    tensor, key = place(index, [(1, 1)])
    rows = tensor, key[0].start, key[1].start
    if rows[1] > 0:
        # Engines do not begin at every partition, DMA does.
        moved = on_chip((n, 1), INT32, "sbuf")
        nisa.dma_copy(dst=moved[0:n, 0:1], src=tensor[key])
        rows = moved, 0, 0
    if dynamic.extent * dynamic.stride != _elements(hbm):
        # neuronxcc sees the whole tensor, and would take numbers past the view's end.
        rows = _below(rows, dynamic.extent, n), 0, 0
    factor = dynamic.stride // width
    if factor != 1:
        column = rows[0][rows[1] : rows[1] + n, rows[2] : rows[2] + 1]
        rows = _keep_negative(_exact(column, _number(factor, n), nl.multiply, n), column, n), 0, 0
    _gather(chip, hbm, n, rows, width, pieces, load, skip)


def _runs(values: Array, dynamic: Dynamic, skip: bool) -> list[tuple[int, int, int, int]]:
    """Partitions whose rows are in an arithmetic progression: (first partition, how many, first row, step)."""
    there = (values >= 0) & (values < dynamic.extent)
    assert skip or there.all(), f"row numbers: received {values[~there]}, allowed 0..{dynamic.extent - 1}"
    runs: list[tuple[int, int, int, int]] = []
    p = 0
    while p < values.size:
        if not there[p]:
            p += 1
            continue
        end, step = p + 1, 0
        if end < values.size and there[end]:
            step = int(values[end] - values[p])
            while end < values.size and there[end] and values[end] - values[end - 1] == step:
                end += 1
        runs.append((p, end - p, int(values[p]), step))
        p = end
    return runs


def _width(hbm: Tensor, *strides: int) -> int:
    """Elements of the rows as which indirect DMA sees a tensor, so that all strides are whole numbers of them."""
    return gcd(_elements(hbm), *strides)


def _elements(hbm: Tensor) -> int:
    return hbm.storage.size * hbm.storage.dtype.itemsize // hbm.dtype.itemsize


class Piece(NamedTuple):
    """Elements of a partition that are part of one row in HBM: at `shift` on chip, and in which row and columns."""

    shift: int
    by: int
    row: int
    column: int
    step: int
    size: int


def _pieces(offset: int, free: Dims, elements: Dims, width: int) -> Iterator[Piece]:
    """A pattern, on chip and in HBM, as parts of rows of `width` elements."""
    (by, n), (step, _) = free[-1], elements[-1]
    assert step > 0 or n == 1, f"a pattern that repeats, at addresses that the device knows: {elements}"
    for shift, start in zip(_starts(0, free[:-1]), _starts(offset, elements[:-1]), strict=True):
        done = 0
        while done < n:
            row, column = divmod(start + done * step, width)
            count = min(n - done, (width - 1 - column) // max(step, 1) + 1)
            yield Piece(shift + done * by, by, row, column, step, count)
            done += count


def _starts(offset: int, dims: Dims) -> Iterator[int]:
    if not dims:
        yield offset
        return
    stride, n = dims[0]
    for i in range(n):
        yield from _starts(offset + i * stride, dims[1:])


def _gather(
    chip: Tensor, hbm: Tensor, n: int, rows: tuple[Any, int, int], width: int, pieces: Any, load: bool, skip: bool
) -> None:
    """Indirect DMA of every piece. `rows`: a tensor of row numbers, and the first partition and the column of them."""
    if not load and program().trips:
        rows = _if_live(rows, n), 0, 0
    table = hbm.storage.of(hbm.dtype).reshape((_elements(hbm) // width, width))
    mode = nisa.oob_mode.skip if skip or program().trips else nisa.oob_mode.error
    moved = {0: rows}
    for piece in pieces:
        if piece.row not in moved:
            tensor, first, column = rows
            index = tensor[first : first + n, column : column + 1]
            moved[piece.row] = _keep_negative(_exact(index, _number(piece.row, n), nl.add, n), index, n), 0, 0
        tensor, first, column = moved[piece.row]
        numbers = tensor[first + arange(n, 0, 2), column]
        place_hbm = table[numbers, piece.column + piece.step * arange(piece.size, 1, 2)]
        part = Tensor(chip.storage, chip.dtype, (n, piece.size), chip.strides[:2], chip.offset + piece.shift)
        tensor, key = place(part, [(piece.by, piece.size)])
        if load:
            nisa.dma_copy(dst=tensor[key], src=place_hbm, oob_mode=mode)
        else:
            nisa.dma_copy(dst=place_hbm, src=tensor[key], oob_mode=mode)


def _number(value: int, n: int) -> Any:
    """A number on n partitions, [n, 1] int32."""
    numbers = program().numbers
    if (value, n) not in numbers:
        x = on_chip((n, 1), INT32, "sbuf")
        x[...] = nisa.memset((n, 1), value, INT32.vendor)
        numbers[value, n] = x
    return numbers[value, n][0:n, 0:1]


def _exact(a: Any, b: Any, op: Any, n: int) -> Any:
    """a op b for int32, [n, 1], in integers."""
    x = on_chip((n, 1), INT32, "sbuf")
    x[...] = nisa.tensor_tensor(a, b, op, dtype=INT32.vendor, engine=nisa.engine.gpsimd)
    return x


def _keep_negative(x: Any, index: Any, n: int) -> Any:
    """x, but the index where that is negative: no row."""
    none = on_chip((n, 1), DTYPES["uint32"], "sbuf")
    none[...] = nisa.tensor_scalar(index, op0=nl.less, operand0=0, dtype=nl.uint32)
    nisa.tensor_copy_predicated(dst=x[0:n, 0:1], src=index, predicate=none[0:n, 0:1])
    return x


def _below(rows: tuple[Any, int, int], extent: int, n: int) -> Any:
    """Row numbers, -1 in place of those from `extent` on."""
    assert extent <= EXACT, f"rows of a part of a tensor: received {extent}, allowed {EXACT}"
    tensor, first, column = rows
    index = tensor[first : first + n, column : column + 1]
    inside, x = on_chip((n, 1), DTYPES["uint32"], "sbuf"), on_chip((n, 1), INT32, "sbuf")
    inside[...] = nisa.tensor_scalar(index, op0=nl.less, operand0=extent, dtype=nl.uint32)
    x[...] = nisa.memset((n, 1), -1, INT32.vendor)
    nisa.tensor_copy_predicated(dst=x[0:n, 0:1], src=index, predicate=inside[0:n, 0:1])
    return x


def _if_live(rows: tuple[Any, int, int], n: int) -> Any:
    """Row numbers of a store, -1 if its trip is not made."""
    tensor, first, column = rows
    index = on_chip((n, 1), INT32, "sbuf")
    index[...] = nisa.memset((n, 1), -1, INT32.vendor)
    live = program().trips[-1].live
    nisa.tensor_copy_predicated(
        dst=index[0:n, 0:1], src=tensor[first : first + n, column : column + 1], predicate=live[0:n, 0:1]
    )
    return index


# -- one number for the whole copy


def _by_number(chip: Tensor, hbm: Tensor, load: bool, skip: bool) -> None:
    """The pattern in HBM begins at a number times a stride, which only the device knows."""
    dynamic = hbm.dynamic
    assert dynamic is not None
    outer, inner = _split(hbm.dims(), chip.shape[0])
    outer = merged(outer) or [(0, 1)]
    assert len(outer) == 1, f"partitions at several strides: {hbm.dims()}"
    step, n = outer[0]
    width = _width(hbm, dynamic.stride, step)
    number = on_chip((n, 1), INT32, "sbuf")
    number[0:1, 0:1] = nisa.tensor_copy(_one(dynamic.index))
    repeat_first(number, n, 1)
    index = _exact(number[0:n, 0:1], _number(dynamic.stride // width, n), nl.multiply, n)
    if n > 1 and step:
        rows = nisa.iota(step // width * nl.arange(n)[:, None], INT32.vendor)
        index = _exact(index[0:n, 0:1], rows, nl.add, n)
    free, elements = refined(chip.dims()[1:], inner)
    pieces = _pieces(hbm.offset, free or [(1, 1)], elements or [(1, 1)], width)
    _gather(chip, hbm, n, (index, 0, 0), width, pieces, load, skip)


def _one(index: Any) -> Any:
    """A register or a tensor of one element, as an operand."""
    t = index.tile if isinstance(index, Register) else index
    assert t is not None
    return tile(t, [(1, 1)])
