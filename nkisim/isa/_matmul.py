"""What the matmuls of the Tensor Engine share: tiles of the array, indirection, and accumulation in PSUM."""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np

from nkisim.dtypes import FLOATS, Array, DType, bfloat16, float32
from nkisim.hardware import A2, A3, GEN4, source_of
from nkisim.isa._access import INDIRECTION, Where
from nkisim.isa._call import Call
from nkisim.isa._choices import check_flag
from nkisim.isa._indirection import is_indirect
from nkisim.layout import span
from nkisim.memory import BY_MATMUL, NO_MATMUL, OVERWRITTEN, PSUM
from nkisim.tensor import NkiTensor

ARRAY_ROWS = A3 + ", Double FP8: SBUF partition p feeds row p of the array"
ACCUMULATION = A2 + ", near-memory accumulation in PSUM; nki.isa.nc_matmul, accumulation mode"
# Every value of the one-byte types as float32: a table is several times faster than ml_dtypes' casts.
BYTES = np.arange(256, dtype=np.uint8)
FLOAT8 = {d.numpy: BYTES.view(d.numpy).astype(np.float32) for d in FLOATS if d.itemsize == 1}

Pair = tuple[int, int]
Layout = tuple[tuple[int, ...], tuple[int, ...], int]


class _Scratch(threading.local):
    """Buffers that one instruction after the other reuses: fresh pages would cost more than the casts."""

    def __init__(self) -> None:
        self.buffers: dict[str, Array] = {}
        self.views: dict[tuple[str, tuple[int, ...]], Array] = {}


_scratch = _Scratch()


def _buffer(use: str, shape: tuple[int, ...]) -> Array:
    scratch = _scratch
    view = scratch.views.get((use, shape))
    if view is not None:
        return view
    size = prod(shape)
    buffer = scratch.buffers.get(use)
    if buffer is None or buffer.size < size:
        buffer = scratch.buffers[use] = np.empty(size, np.float32)
        scratch.views = {key: known for key, known in scratch.views.items() if key[0] != use}
    view = scratch.views[use, shape] = buffer[:size].reshape(shape)
    return view


def operand_f32(call: Call, operand: str, t: NkiTensor) -> Array:
    """The operand as float32 of shape [P, elements per partition], valid until the next instruction."""
    stored = call.read(operand, t)
    if stored.dtype == float32.numpy:
        return stored.reshape(stored.shape[0], -1)
    f = _buffer(operand, stored.shape)
    table = FLOAT8.get(stored.dtype)
    if table is None:
        f[...] = stored
    else:
        np.take(table, stored.view(np.uint8), out=f, mode="clip")
    return f.reshape(stored.shape[0], -1)


def product(stationary: Array, moving: Array) -> Array:
    """stationary.T @ moving in float32, valid until the next instruction."""
    y = _buffer("dst", (stationary.shape[1], moving.shape[1]))
    return np.matmul(stationary.T, moving, out=y)


# ---------------------------------------------------------------------------------------------------
# Shapes


def destination(call: Call, dst: Any, dtypes: tuple[DType, ...]) -> NkiTensor:
    """Check the PSUM tile that a matmul writes; its free size is bounded by PSUM alone."""
    free_max = call.hardware.psum_partition_bytes // dst.dtype.itemsize if isinstance(dst, NkiTensor) else None
    return call.tile("dst", dst, PSUM, dtypes, indirect=True, free_max=free_max)


def check_result(call: Call, dst: NkiTensor, m: int, n: int) -> None:
    """Refuse a `dst` that is not [m, n], or a moving tile wider than one instruction can stream."""
    hw = call.hardware
    fact = "matmul_moving_fmax_bfloat16" if dst.dtype is bfloat16 and hw.generation >= GEN4 else "matmul_moving_fmax"
    limit = getattr(hw, fact)
    if n > limit:
        call.refuse("moving", "free size", n, f"1..{limit} for a {dst.dtype} dst", source_of(fact))
    if dst.shape[0] != m:
        call.refuse("dst", "partitions", dst.shape[0], f"{m}, the free size of stationary")
    if dst.free_size != n:
        call.refuse("dst", "elements per partition", dst.free_size, f"{n}, the free size of moving")


def check_bank(call: Call, dst: NkiTensor, where: Where) -> None:
    """Refuse a result that lies in two PSUM banks; NeuronCore-v4 writes across all of them."""
    if call.hardware.generation >= GEN4:
        return
    size, bank = dst.dtype.itemsize, call.hardware.psum_bank_bytes
    row, address = dst.row_elements, dst.storage.info.address
    if address is None and row * size <= bank:
        return
    low, high = span(dst.shape[1:], dst.strides[1:])
    base = address[1] if address is not None else 0
    first = base + (where.offset % row + low) * size
    last = base + (where.offset % row + high + 1) * size - 1
    if first // bank != last // bank:
        call.refuse(
            "dst",
            "PSUM bank",
            f"bytes {first}..{last} of each partition",
            f"one bank of {bank} bytes",
            source_of("psum_bank_bytes"),
        )


# ---------------------------------------------------------------------------------------------------
# Which processing elements


def tiling(call: Call, tile_position: Any, tile_size: Any, k: int) -> tuple[Pair, Pair]:
    """The (row, column) position and size of the array tile in use, after its rules were checked.

    The parameter texts allow row tiles only (column 0, 128 columns), the prose of `nc_matmul` column
    tiles too; the parameter texts are followed.
    """
    hw = call.hardware
    rows, columns = hw.matmul_contraction_max, hw.matmul_stationary_fmax
    given = [_is_set(tile_position), _is_set(tile_size)]
    if True not in given:
        return (0, 0), (rows, columns)
    if not all(given):
        missing = "tile_size" if given[0] else "tile_position"
        call.refuse(missing, "tiling mode", "not set", "both tile_position and tile_size, or neither")
    position, size = _pair(call, "tile_position", tile_position), _pair(call, "tile_size", tile_size)
    sizes = [rows >> i for i in range(rows.bit_length()) if rows >> i >= hw.matmul_row_tile_min]
    if size[0] not in sizes:
        allowed = ", ".join(str(s) for s in sorted(sizes))
        call.refuse("tile_size", "row size", size[0], f"{allowed} on {hw.target}", source_of("matmul_row_tile_min"))
    if size[1] != columns:
        call.refuse("tile_size", "column size", size[1], columns)
    if position[0] % size[0] or not 0 <= position[0] < rows:
        allowed = ", ".join(str(r) for r in range(0, rows, size[0]))
        call.refuse("tile_position", "start row", position[0], f"{allowed} with a row size of {size[0]}")
    if position[1] != 0:
        call.refuse("tile_position", "start column", position[1], 0)
    if k > size[0]:
        call.refuse("stationary", "partitions in tiling mode", k, f"1..{size[0]}, the row size of tile_size")
    return position, size


def _is_set(value: Any) -> bool:
    return value is not None and value != ()


def _pair(call: Call, operand: str, value: Any) -> Pair:
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in value)
    ):
        call.refuse(operand, "type", repr(value), "two integers (row, column)")
    return int(value[0]), int(value[1])


def start_partitions(call: Call, t: NkiTensor) -> set[int]:
    """Where the view can start: the compiler puts a tensor without address on any slot of its size."""
    info, hw = t.storage.info, call.hardware
    if info.address is not None:
        return {t.start_partition}
    quadrant = hw.partition_quadrant
    slot = quadrant if info.partitions <= quadrant else 2 * quadrant
    if info.partitions > slot:
        slot = hw.partitions
    return {base + t.start_partition for base in range(0, hw.partitions, slot)}


def check_rows(call: Call, stationary: NkiTensor, moving: NkiTensor, position: Pair, size: Pair) -> None:
    """Refuse operands on other partitions than each other, or than the rows of the array tile."""
    k = stationary.shape[0]
    whole = size[0] == call.hardware.matmul_contraction_max
    if whole and stationary.start_partition == moving.start_partition:
        return
    starts = start_partitions(call, stationary) & start_partitions(call, moving)
    if not starts:
        call.refuse(
            "moving",
            "start partition",
            moving.start_partition,
            f"{stationary.start_partition}, that of stationary",
            ARRAY_ROWS,
        )
    if not any(position[0] <= p and p + k <= position[0] + size[0] for p in starts):
        p = min(starts)
        rows = f"{position[0]}..{position[0] + size[0] - 1}"
        call.refuse(
            "tile_position", "rows of the tile", f"{rows}, operands in partitions {p}..{p + k - 1}", rows, ARRAY_ROWS
        )


# ---------------------------------------------------------------------------------------------------
# Indirection


def index_of(t: NkiTensor) -> NkiTensor:
    """The index tensor of an `.indirect` view."""
    assert t.dynamic is not None
    index = t.dynamic.index
    assert isinstance(index, NkiTensor)
    return index


def check_indirection(call: Call, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor, position: Pair) -> None:
    """Refuse `.indirect` operands together with tiling or where their index cannot stand.

    Start partitions are compared where both tensors were placed by the kernel.
    """
    quadrant = call.hardware.partition_quadrant
    for operand, t in (("dst", dst), ("stationary", stationary), ("moving", moving)):
        if not is_indirect(t):
            continue
        if position != (0, 0):
            call.refuse("tile_position", f"tiling with an .indirect() {operand}", position, "(0, 0) or not set")
        index = index_of(t)
        if index.start_partition % quadrant:
            call.refuse(operand, "start partition of the index", index.start_partition, f"a multiple of {quadrant}")
        other, name = (stationary, "stationary") if operand == "dst" else (t, operand)
        placed = index.storage.info.address is not None and other.storage.info.address is not None
        if placed and index.start_partition != other.start_partition:
            call.refuse(
                operand,
                "start partition of the index",
                index.start_partition,
                f"{other.start_partition}, that of {name}",
            )


# ---------------------------------------------------------------------------------------------------
# Accumulation


def accumulation(call: Call, dst: NkiTensor, where: Where, accumulate: Any) -> Array | bool:
    """Whether the result is added to what `dst` holds; a mask where only some elements are.

    `accumulate=None` adds to the elements that a matmul has written before and overwrites the others,
    as NKI 0.6 documents for overlapping results. Before NeuronCore-v4 an element that another
    instruction wrote since cannot be added to, so it is refused: overwriting would drop its value.
    """
    if accumulate is not None:
        accumulate = check_flag(call, "accumulate", accumulate)
    if accumulate is False:
        return False
    if accumulate is None and not call.core.sequencer.is_inside(dst.storage.info):
        # The choice is made once, when the loop's body is built, and holds for every trip.
        loop = call.core.sequencer.loops[-1]
        call.refuse(
            "accumulate",
            "accumulation inferred in a dynamic loop",
            f"None for {dst.name}, declared outside the {loop.construct} at {loop.site}",
            "True or False: one instruction runs on every trip; the first product may stand before the loop",
            ACCUMULATION,
        )
    state = _states(dst, where)
    if np.minimum.reduce(state, axis=None) == BY_MATMUL:
        return True
    if accumulate is True:
        undefined = int((~_defined(dst, where)).sum())
        if undefined:
            call.refuse(
                "accumulate",
                "accumulation onto uninitialized PSUM",
                f"True, {undefined} of {state.size} elements of dst never written",
                "False for the first matmul into a PSUM location",
                ACCUMULATION,
            )
        foreign = state != BY_MATMUL
    else:
        foreign = state == OVERWRITTEN
    if call.hardware.generation < GEN4 and foreign.any():
        call.refuse(
            "accumulate",
            "accumulation onto values of another instruction",
            f"{accumulate}, {foreign.sum()} of {state.size} elements of dst last written by another instruction",
            f"False to overwrite; {call.hardware.target} adds only to results of matmuls",
            ACCUMULATION,
        )
    added = state != NO_MATMUL
    if accumulate is True or added.all():
        return True
    return added if added.any() else False


def store(call: Call, dst: NkiTensor, where: Where, y: Array, add: Array | bool, *, bits: bool = False) -> bool:
    """Write the result `y` [M, N], which may be changed, to PSUM; returns whether anything was added."""
    added = not isinstance(add, bool) or add
    if added:
        if where.columns is not None and _repeats(where.columns):
            call.refuse("dst", "columns while accumulating", "a column named twice", "distinct columns", INDIRECTION)
        # PSUM adds in float32 and rounds once, also where it holds bfloat16.
        old = _held(dst, where).astype(np.float32, copy=False).reshape(y.shape)
        np.add(y, old, out=y, where=add if isinstance(add, bool) else add.reshape(y.shape))
    call.write_at("dst", dst, where, y, by_matmul=True, bits=bits)
    storage = dst.storage
    if where.columns is None:
        storage.psum_state(dst.element_bytes, dst.shape, dst.strides, where.offset)[...] = BY_MATMUL
    else:
        layout, columns = _rows(dst, where)
        mask = np.zeros(layout[0], np.bool_)
        np.put_along_axis(mask, columns, True, 1)
        storage.psum_state(dst.element_bytes, *layout)[mask] = BY_MATMUL
    return added


def _rows(dst: NkiTensor, where: Where) -> tuple[Layout, Array]:
    """The whole rows under an `.indirect` view, and the view's columns in them."""
    assert where.columns is not None
    column0 = dst.offset % dst.row_elements
    return ((dst.shape[0], dst.row_elements), (dst.row_elements, 1), dst.offset - column0), where.columns + column0


def _states(dst: NkiTensor, where: Where) -> Array:
    """Per element of `dst`: NO_MATMUL, OVERWRITTEN or BY_MATMUL, the least of an element's parts."""
    if where.columns is None:
        state = dst.storage.psum_state(dst.element_bytes, dst.shape, dst.strides, where.offset)
        return state if state.ndim == len(dst.shape) else np.asarray(state.min(axis=-1))
    layout, columns = _rows(dst, where)
    state = dst.storage.psum_state(dst.element_bytes, *layout)
    return np.take_along_axis(state.reshape(*layout[0], -1).min(axis=-1), columns, 1)


def _defined(dst: NkiTensor, where: Where) -> Array:
    if where.columns is None:
        return dst.storage.defined_map(dst.element_bytes, dst.shape, dst.strides, where.offset)
    layout, columns = _rows(dst, where)
    return np.take_along_axis(dst.storage.defined_map(dst.element_bytes, *layout), columns, 1)


def _held(dst: NkiTensor, where: Where) -> Array:
    """What PSUM holds under `dst`. Not an operand: the addition happens in the memory."""
    if where.columns is None:
        return dst.storage.array(dst.carrier, dst.shape, dst.strides, where.offset)
    layout, columns = _rows(dst, where)
    return np.take_along_axis(dst.storage.array(dst.carrier, *layout), columns, 1)


def _repeats(columns: Array) -> bool:
    ordered = np.sort(columns, axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


def result_dtypes(call: Call) -> tuple[DType, ...]:
    """The types of PSUM that a matmul's sums can be written in."""
    return (float32, bfloat16) if call.hardware.generation >= GEN4 else (float32,)
