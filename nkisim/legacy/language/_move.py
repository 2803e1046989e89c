"""Moving data: loads and stores, copies, transposes, products, gathers, selection."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from nkisim import isa
from nkisim import language as current
from nkisim.dtypes import bool_, float32, uint8, uint16, uint32
from nkisim.isa._call import Call
from nkisim.legacy import compiler
from nkisim.legacy._assign import assign, fill_view, move, number_for, reshaped
from nkisim.legacy._create import constant_tile, new_tile
from nkisim.legacy._dtypes import kind_of, promote, weak
from nkisim.legacy._errors import refuse
from nkisim.legacy._index import broadcast_shapes
from nkisim.legacy._issue import Part, fill_undefined, operand, perform, produce
from nkisim.legacy._mask import Mask, boxes, whole
from nkisim.legacy._operators import as_op
from nkisim.legacy._root import allocate
from nkisim.legacy._state import state
from nkisim.legacy._tile import Tile
from nkisim.legacy.language._shared import is_number, on_all_partitions
from nkisim.memory import HBM, ON_CHIP, PSUM, SBUF, MemoryRegion
from nkisim.operators import op_name
from nkisim.tensor import NkiTensor


def load(src: Any, *, mask: Any = None, dtype: Any = None) -> Tile:
    """An HBM tensor in a new SBUF tile; its first dimension becomes the partition dimension.

    What the mask leaves out is not read, and undefined in the tile. Rows may be selected by an index tile.
    """
    t = operand("load", "src", src, HBM, indirect=True)
    shape = t.shape if t.ndim > 1 else (*t.shape, 1)
    dims = tuple(range(t.ndim))

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.dma_copy(dst=dst, src=part.read(t, dims))

    return produce("load", shape, issue, dtype=dtype, default=t.kind, mask=mask, into=SBUF, any_start=True)


def store(dst: Any, value: Any, *, mask: Any = None) -> None:
    """Write a tile or a number to an HBM tensor; a tile in PSUM goes through SBUF."""
    source = None if is_number(value) else operand("store", "value", value)
    t = operand("store", "dst", dst, HBM, indirect=True)
    if source is None:
        source = constant_tile("store", t.shape if t.ndim > 1 else (*t.shape, 1), value, t.kind)
        source._settle()
    elif source.buffer is MemoryRegion.psum:
        source = copy(source, mask=mask if source.shape == t.shape else None)
        source._settle()
    shape = t.shape if t.ndim > 1 or source.ndim == 1 else (*t.shape, 1)
    target = t if shape == t.shape else t.expand_dims(1)
    if source.shape != shape:
        source = _as_stored(source, shape)

    def issue(part: Part) -> None:
        isa.dma_copy(dst=part.write(target), src=part.read(source))

    perform("store", shape, issue, mask=mask)


def _as_stored(source: Tile, shape: tuple[int, ...]) -> Tile:
    """`source` under the shape of what it is stored to: other dimensions of size 1, or repeated ones."""
    same = reshaped(source, shape)
    if same is not None:
        return same
    if source.ndim > len(shape) or broadcast_shapes("store", source.shape, shape) != shape:
        rule = "err_store_dst_shape_smaller_than_other_shape: shape of the destination"
        refuse("store", "dst", rule, list(shape), f"{list(source.shape)}, or larger where that has 1")
    wide = on_all_partitions(source, shape)
    wide._settle()
    return wide


def copy(src: Any, *, mask: Any = None, dtype: Any = None) -> Tile:
    """`src` in a new tile."""
    t = operand("copy", "src", src)

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.tensor_copy(dst=dst, src=part.read(t))

    return produce("copy", t.shape, issue, dtype=dtype, default=t.kind, mask=mask)


def broadcast_to(src: Any, *, shape: Any) -> Tile:
    """`src` repeated along dimensions of size 1: a view, or a copy where the partition dimension is one of them."""
    t = operand("broadcast_to", "src", src)
    wanted = tuple(int(n) for n in shape)
    if len(wanted) < t.ndim or any(
        n not in (1, m) for n, m in zip(t.shape, wanted[len(wanted) - t.ndim :], strict=True)
    ):
        refuse("broadcast_to", "shape", "size", list(wanted), f"{list(t.shape)} with dimensions of 1 repeated", _PAGE)
    extra = len(wanted) - t.ndim
    if extra and t.shape[0] != 1:
        rule = "dimensions in front of the partition dimension"
        refuse("broadcast_to", "shape", rule, list(wanted), f"the rank of {list(t.shape)}", _PAGE)
    if extra:
        dims = tuple((offset, (*[0] * extra, *coeffs)) for offset, coeffs in t.dims)
        t = Tile(t.root, (1,) * extra + t.shape, dims, 0)
    if t.shape[0] == wanted[0]:
        return t.repeated(wanted)
    column = _on_partitions(t, wanted[0])
    return column.repeated(wanted)


def _on_partitions(t: Tile, n: int) -> Tile:
    """A tile of one partition in each of n, in SBUF."""
    hw = state("broadcast_to").core.hardware
    result = new_tile((n, *t.shape[1:]), t.kind, MemoryRegion.sbuf)
    source, target = t.tensor("broadcast_to", "src"), result.tensor("broadcast_to", "src")
    if t.buffer is MemoryRegion.psum or source.start_partition % hw.partition_quadrant or not source.is_contiguous():
        base = new_tile(t.shape, t.kind, MemoryRegion.sbuf).tensor("broadcast_to", "src")
        move(base, source)
        source = base
    source, target = source.reshape((1, source.free_size)), target.reshape((n, target.free_size))
    if t.kind.is_float:
        _multiply_by_ones(target, source)
    else:
        _shuffle(target, source, hw.partition_quadrant)
    return result


def _multiply_by_ones(dst: NkiTensor, row: NkiTensor) -> None:
    """A row in every partition: the product of a column of ones and the row, which AWS's architecture guide names.

    The Scalar Engine brings it out of PSUM, a bank at a time.
    """
    st = state("broadcast_to")
    n, columns = dst.shape
    ones = st.ones.get(row.dtype)
    if ones is None:
        ones = allocate((1, st.core.hardware.partitions), row.dtype, MemoryRegion.sbuf, "ones", scope=()).tile()
        st.ones[row.dtype] = ones
        fill_view(ones.tensor("broadcast_to", "src"), 1.0)
    limit = st.core.hardware.gemm_moving_fmax
    for start in range(0, columns, limit):
        stop = min(start + limit, columns)
        product = new_tile((n, stop - start), float32, MemoryRegion.psum).tensor("broadcast_to", "src")
        isa.nc_matmul(
            dst=product,
            stationary=ones.tensor("broadcast_to", "src")[:, 0:n],
            moving=row[:, start:stop],
            is_stationary_onezero=True,
        )
        isa.activation(dst=dst[:, start:stop], op=current.copy, data=product)


def _shuffle(dst: NkiTensor, row: NkiTensor, quadrant: int) -> None:
    """A row in every partition: a shuffle per quadrant, all of whose outputs name partition 0. It moves any type."""
    for start in range(0, dst.shape[0], quadrant):
        isa.nc_stream_shuffle(
            dst=dst[start : min(start + quadrant, dst.shape[0])], src=row, shuffle_mask=[0] * quadrant
        )


_PAGE = "nki.language.broadcast_to, SDK 2.26"


def expand_dims(data: Any, axis: Any) -> Tile:
    """A view with a dimension of size 1 at `axis`."""
    return operand("expand_dims", "data", data, (*ON_CHIP, *HBM)).expand_dims(axis)


def transpose(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """A two-dimensional tile with rows and columns exchanged, by the Tensor Engine."""
    t = operand("transpose", "x", x)
    _check_2d("transpose", "x", t)
    return _transposed("transpose", t, dtype, mask)


def _check_2d(what: str, label: str, t: Tile) -> None:
    if t.ndim != 2:
        rule = "err_exceed_max_supported_dimension: dimensions"
        refuse(what, label, rule, t.ndim, 2)
    limit = state(what).core.hardware.partitions
    for d, n in enumerate(t.shape):
        if n > limit:
            rule = f"err_size_of_dimension_exceed_arch_limit: size of dimension {d}"
            refuse(what, label, rule, n, f"1..{limit}")


def _transposed(what: str, t: Tile, dtype: Any, mask: Any) -> Tile:
    compiler.note_implicit(
        f"nl.{what}",
        "err_transpose_on_tensor_engine_not_allowed_in_allocated_kernel: a transpose by the Tensor Engine",
        "nisa.nc_matmul with an identity that the kernel placed",
    )
    source = t if t.buffer is MemoryRegion.sbuf else copy(t)
    source._settle()
    if not source.kind.is_float:
        # The Tensor Engine moves floats. float32 holds integers of 24 bits, and 32-bit ones move as bits.
        if source.kind.itemsize == 4:
            moved = _transposed(what, source.view(float32), None, mask)
            moved._settle()
            return copy(moved.view(source.kind), dtype=dtype)
        wide = copy(source, dtype=float32)
        return copy(_transposed(what, wide, None, mask), dtype=source.kind if dtype is None else dtype)

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.nc_transpose(dst=dst, data=part.read(source, (1, 0)), engine=isa.engine.tensor)

    shape = (t.shape[1], t.shape[0])
    result = produce(what, shape, issue, default=source.kind, mask=mask, buffer=MemoryRegion.psum, into=PSUM)
    return result if dtype is None else copy(result, dtype=dtype)


def load_transpose2d(src: Any, *, mask: Any = None, dtype: Any = None) -> Tile:
    """A two-dimensional HBM tensor in a new SBUF tile, rows and columns exchanged.

    In pieces of at most 128 rows: loaded, transposed by the Tensor Engine, copied to their columns.
    """
    t = operand("load_transpose2d", "src", src, HBM)
    if t.ndim != 2:
        rule = "err_exceed_max_supported_dimension: dimensions"
        refuse("load_transpose2d", "src", rule, t.ndim, 2)
    limit = state("load_transpose2d").core.hardware.partitions
    rows, columns = t.shape
    if columns > limit:
        rule = "err_num_partition_exceed_arch_limit: partitions of the result"
        refuse("load_transpose2d", "src", rule, columns, f"1..{limit}")
    kind = kind_of(t.kind if dtype is None else dtype, "load_transpose2d dtype")
    covered = boxes("load_transpose2d", mask, (columns, rows))
    result = new_tile((columns, rows), kind, MemoryRegion.sbuf)
    if covered != [whole((columns, rows))]:
        fill_undefined(result)
    for (c0, n_columns), (r0, n_rows) in covered:
        for start in range(r0, r0 + n_rows, limit):
            stop = min(start + limit, r0 + n_rows)
            piece = load(t[start:stop, c0 : c0 + n_columns])
            assign(result[c0 : c0 + n_columns, start:stop], _transposed("load_transpose2d", piece, None, None))
    return result


def matmul(x: Any, y: Any, *, transpose_x: bool = False, mask: Any = None) -> Tile:
    """`x @ y`, or `x.T @ y` with `transpose_x`, in float32 in PSUM; without it x is transposed first."""
    a, b = operand("matmul", "x", x, masked=True), operand("matmul", "y", y, masked=True)
    for label, t in (("x", a), ("y", b)):
        if t.ndim != 2:
            refuse("matmul", label, "err_exceed_max_supported_dimension: dimensions", t.ndim, 2)
    a, b = masked_operand("matmul", "x", a), masked_operand("matmul", "y", b)
    contracted = a.shape[0] if transpose_x else a.shape[1]
    if contracted != b.shape[0]:
        rule = "err_num_partition_mismatch: contraction of x and y"
        refuse("matmul", "y", rule, b.shape[0], f"{contracted}, that of x")
    if not transpose_x:
        a = _transposed("matmul", a, None, None)
    stationary, moving = _in_sbuf(a), _in_sbuf(b)

    def product(dst: NkiTensor, part: Part, add: bool) -> None:
        isa.nc_matmul(
            dst=dst, stationary=part.read(stationary, (None, 0)), moving=part.read(moving, (None, 1)), accumulate=add
        )

    return produce(
        "matmul",
        (stationary.shape[1], moving.shape[1]),
        lambda dst, part: product(dst, part, False),
        default=float32,
        mask=mask,
        buffer=MemoryRegion.psum,
        into=PSUM,
        accumulate=lambda dst, part: product(dst, part, True),
    )


def _in_sbuf(t: Tile) -> Tile:
    if t.buffer is MemoryRegion.sbuf:
        t._settle()
        return t
    moved = copy(t)
    moved._settle()
    return moved


def masked_operand(what: str, label: str, t: Tile) -> Tile:
    """An operand of a matmul without its operand mask: the rectangle that it leaves."""
    if t.mask is None:
        return t
    found = boxes(what, t.mask, t.shape)
    if len(found) != 1:
        refuse(what, label, "operand mask", f"{len(found)} rectangles of {t.mask!r}", "one rectangle", _PAGE)
    plain = Tile(t.root, t.shape, t.dims, t.lead, t.indirect)
    return plain[tuple(slice(start, start + n) for start, n in found[0])]


def where(condition: Any, x: Any, y: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x` where `condition` is not 0, else y: a copy of y, and x over it."""
    c = operand("where", "condition", condition)
    a = x if is_number(x) else operand("where", "x", x)
    b = y if is_number(y) else operand("where", "y", y)
    shape = broadcast_shapes("where", c.shape, *(t.shape for t in (a, b) if isinstance(t, Tile)))
    c, a, b = (on_all_partitions(t, shape) if isinstance(t, Tile) else t for t in (c, a, b))
    kind = promote(*(t.kind if isinstance(t, Tile) else weak(t) for t in (a, b)))
    result = kind_of(kind if dtype is None else dtype, "where dtype")
    if c.kind is bool_:
        c._settle()
        c = c.view(uint8) if c.shape == shape else copy(c).view(uint8)
    elif c.kind not in (uint8, uint16, uint32):
        from nkisim.legacy.language._math import not_equal

        c = not_equal(c, 0, dtype=uint8)
    if isinstance(a, Tile) and a.kind is not result:
        a = copy(a, dtype=result)
    c._settle()
    predicate, on_true, on_false = c, a, b

    def issue(dst: NkiTensor, part: Part) -> None:
        if isinstance(on_false, Tile):
            isa.tensor_copy(dst=dst, src=part.read(on_false))
        else:
            fill_view(dst, number_for("where", dst.dtype, on_false))
        source = part.read(on_true) if isinstance(on_true, Tile) else number_for("where", dst.dtype, on_true)
        isa.tensor_copy_predicated(dst=dst, src=source, predicate=part.read(predicate))

    # Explicitly typed: the engine selects between values of one type.
    return produce("where", shape, issue, dtype=result, default=result, mask=mask, apart=(predicate, on_true))


def gather_flattened(data: Any, indices: Any, *, mask: Any = None, dtype: Any = None) -> Tile:
    """out[p, ...] = data[p].flatten()[indices[p, ...]]."""
    t, index = operand("gather_flattened", "data", data), operand("gather_flattened", "indices", indices)
    if not 2 <= t.ndim <= 4 or not 2 <= index.ndim <= 4:
        rule = "err_exceed_max_supported_dimension: dimensions"
        refuse("gather_flattened", "data", rule, f"{t.ndim} and {index.ndim}", "2..4")
    plain = (0, *[None] * (t.ndim - 1))

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.nc_n_gather(dst=dst, data=part.read(t, plain), indices=part.read(index))

    result = produce("gather_flattened", index.shape, issue, default=t.kind, mask=mask)
    return result if dtype is None else copy(result, dtype=dtype)


def atomic_rmw(dst: Any, value: Any, op: Any, *, mask: Any = None) -> None:
    """`dst = dst + value` for rows of an HBM tensor that an index tile selects; `op` is np.add."""
    t = operand("atomic_rmw", "dst", dst, HBM, indirect=True)
    page = "nki.language.atomic_rmw, SDK 2.26"
    if op_name(as_op("atomic_rmw", "op", op)) != "add":
        refuse("atomic_rmw", "op", "operator", op_name(op), "np.add", page)
    if t.indirect is None:
        refuse("atomic_rmw", "dst", "index", repr(t), "rows selected by an index tile", page)
    if is_number(value):
        source = constant_tile("atomic_rmw", t.shape, value, t.kind)
        source._settle()
    else:
        source = operand("atomic_rmw", "value", value)

    def issue(part: Part) -> None:
        target = part.write(t)
        isa.dma_compute(dst=target, srcs=[target, part.read(source)], reduce_op=current.add)

    perform("atomic_rmw", t.shape, issue, mask=mask)


def dropout(x: Any, rate: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x` with elements replaced by 0 with probability `rate`, a number or a [P, 1] tile."""
    t = operand("dropout", "x", x)
    p = rate if is_number(rate) else operand("dropout", "rate", rate)

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.dropout(dst=dst, data=part.read(t), prob=part.column(p))

    return produce("dropout", t.shape, issue, dtype=dtype, default=t.kind, mask=mask)


def device_print(prefix: Any, x: Any, *, mask: Any = None) -> None:
    """Write `prefix` and a tensor's values to standard output; a mask leaves a rectangle of them."""
    if not isinstance(prefix, str):
        refuse(
            "device_print", "prefix", "type", type(prefix).__name__, "a string", "nki.language.device_print, SDK 2.26"
        )
    t = operand("device_print", "x", x, (*ON_CHIP, *HBM))
    if isinstance(mask, Mask) and len(boxes("device_print", mask, t.shape)) > 1:
        refuse("device_print", "mask", "rectangles", len(boxes("device_print", mask, t.shape)), 1)

    def issue(part: Part) -> None:
        values = Call("device_print").read("x", part.read(t))
        sys.stdout.write(f"{prefix}\n{np.array2string(np.asarray(values))}\n")

    perform("device_print", t.shape, issue, mask=mask)
