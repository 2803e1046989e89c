"""Vector Engine: instructions that move or set elements without computing on them.

`tensor_copy` also runs on the Scalar and GpSimd Engines and `memset` on GpSimd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nkisim.dtypes import ALL, INTEGERS, Array, bool_, cast, uint8, uint16, uint32
from nkisim.hardware import GEN3
from nkisim.isa._call import COMPUTABLE, Call, NkiInstruction
from nkisim.isa._choices import check_flag, choose_engine
from nkisim.isa._enums import engine as EngineKind
from nkisim.isa._indirection import check_indirection, is_indirect
from nkisim.memory import MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

EVERY = tuple(ALL.values())
MIGRATION = "NKI migration guide, memset"
KEEP = 255  # in a shuffle mask: leave the partition alone


def tensor_copy(
    dst: NkiTensor, src: NkiTensor, engine: Any = EngineKind.unknown, name: str | None = None
) -> NkiInstruction:
    """`dst` = `src`: bit by bit between equal dtypes, through float32 otherwise.

    Spec: nki.isa.tensor_copy, NKI 0.6. Engine: Vector (chosen for `unknown`), Scalar or GpSimd. Raises
    `NkiError` on GpSimd with PSUM or an `.indirect` view, on Scalar before NeuronCore-v3, on a cast of
    packed types.
    """
    call = Call("tensor_copy", name)
    call.tile("dst", dst, dtypes=EVERY, indirect=True)
    call.tile("src", src, dtypes=EVERY, indirect=True)
    call.same_layout("dst", dst, "src", src)
    same = dst.dtype is src.dtype
    if not same:
        # That an engine reads or makes float8_e8m0fnu values is documented for MX scales only.
        for operand, t in (("dst", dst), ("src", src)):
            if t.dtype not in COMPUTABLE:
                call.refuse(operand, "cast of a packed or scale type", f"{src.dtype} to {dst.dtype}", "equal dtypes")
    chosen = choose_engine(call, engine, (Engine.vector, Engine.scalar, Engine.gpsimd), dst, src)
    if chosen is Engine.scalar and call.hardware.generation < GEN3:
        # The page also describes such copies as casts through float32; its plain statement is followed.
        call.refuse("engine", "Scalar Engine copy on target", call.hardware.target, "nki.isa.activation(op=nl.copy)")
    if chosen is Engine.gpsimd and (is_indirect(dst) or is_indirect(src)):
        call.refuse("engine", "engine under tensor indirection", "gpsimd", "vector or scalar")
    check_indirection(call, dst, "src", src, chosen)

    if same:
        call.write("dst", dst, call.read("src", src), bits=True)
    else:
        call.write("dst", dst, call.read_f32("src", src))
    return call.record(chosen)


def memset(dst: NkiTensor, value: Any, engine: Any = EngineKind.unknown, name: str | None = None) -> NkiInstruction:
    """Every element of dst = value, a number known when the kernel is built.

    Spec: nki.isa.memset, NKI 0.6. Engine: Vector (chosen for `unknown`) or GpSimd. Raises `NkiError` on a
    float for an integer tile, on an integer out of the dtype's range, on anything but 0 for packed types,
    on GpSimd with PSUM.
    """
    call = Call("memset", name)
    call.tile("dst", dst, dtypes=EVERY)
    constant = _constant(call, "value", dst, value)
    chosen = choose_engine(call, engine, (Engine.vector, Engine.gpsimd), dst)

    # Rounded once, not in every element.
    stored = cast(_stored_constant(dst, constant), dst.dtype, precise=call.core.precise)
    call.write("dst", dst, np.broadcast_to(stored, dst.shape), bits=True)
    return call.record(chosen, value=constant)


def tensor_copy_predicated(
    dst: NkiTensor, src: Any, predicate: NkiTensor, reverse_pred: bool = False, name: str | None = None
) -> NkiInstruction:
    """`dst` = `src` where `predicate` is not zero (`reverse_pred`: where it is zero); elsewhere `dst` stays.

    Spec: nki.isa.tensor_copy_predicated, NKI 0.6. Engine: Vector. Raises `NkiError` where `src` and
    `predicate` are both in PSUM, on a predicate that is no unsigned integer, on a `src` of another dtype.
    """
    call = Call("tensor_copy_predicated", name)
    call.tile("dst", dst, dtypes=EVERY, indirect=True)
    call.tile("predicate", predicate, dtypes=(uint8, uint16, uint32), indirect=True)
    call.same_layout("dst", dst, "predicate", predicate)
    check_flag(call, "reverse_pred", reverse_pred)
    check_indirection(call, dst, "predicate", predicate, Engine.vector)
    if isinstance(src, NkiTensor):
        call.tile("src", src, dtypes=EVERY)
        call.same_layout("dst", dst, "src", src)
        if src.dtype is not dst.dtype:
            call.refuse("src", "dtype", src.dtype, f"{dst.dtype}, that of dst")
        if src.buffer is MemoryRegion.psum and predicate.buffer is MemoryRegion.psum:
            call.refuse("src", "buffer", "psum for src and predicate", "at most one of them in PSUM")
    else:
        # The page gives no rule for a number's class of dtype; it is held to that of memset.
        number = _stored_constant(dst, _constant(call, "src", dst, src))

    chosen = (call.read_2d("predicate", predicate) != 0) ^ reverse_pred
    if isinstance(src, NkiTensor):
        # What is not chosen does not reach dst, so it may be undefined.
        call.write_where("dst", dst, call.read_needed("src", src, chosen), chosen, bits=True)
    else:
        call.write_where("dst", dst, number, chosen)
    return call.record(Engine.vector, reverse_pred=reverse_pred)


def nc_stream_shuffle(
    dst: NkiTensor, src: NkiTensor, shuffle_mask: Sequence[int], name: str | None = None
) -> NkiInstruction:
    """Partition i of each group of 32 of `dst` = partition `shuffle_mask[i]` of the same group of `src`; 255 keeps it.

    Spec: nki.isa.nc_stream_shuffle, NKI 0.6. Engine: Vector. Raises `NkiError` on unequal dtypes or free
    sizes, on a mask that is not 32 numbers in 0..31 or 255 or that names a partition outside `src`, on start
    partitions that do not suit the larger of the two tiles.
    """
    call = Call("nc_stream_shuffle", name)
    call.tile("dst", dst, dtypes=EVERY)
    call.tile("src", src, dtypes=EVERY)
    if src.dtype is not dst.dtype:
        call.refuse("src", "dtype", src.dtype, f"{dst.dtype}, that of dst")
    if src.free_size != dst.free_size:
        call.refuse("src", "elements per partition", src.free_size, f"{dst.free_size}, those of dst")
    _check_shuffle_starts(call, dst, src)
    rows = _shuffle_rows(call, dst, src, shuffle_mask)

    moved = rows >= 0
    needed = np.isin(np.arange(src.shape[0]), rows)[:, None]
    values = call.read_needed("src", src, np.broadcast_to(needed, (src.shape[0], src.free_size)))[rows]
    call.write_where("dst", dst, values, moved[:, None], bits=True)
    return call.record(Engine.vector)


def _check_shuffle_starts(call: Call, dst: NkiTensor, src: NkiTensor) -> None:
    """Both tiles start where a tile of the larger one's quadrants may start."""
    quadrant, limit = call.hardware.partition_quadrant, call.hardware.partitions
    active = -(-max(src.shape[0], dst.shape[0]) // quadrant) * quadrant
    step = limit if active > 2 * quadrant else active
    for operand, t in (("dst", dst), ("src", src)):
        if t.start_partition % step:
            allowed = ", ".join(str(s) for s in range(0, limit, step))
            call.refuse(operand, f"start partition of {active} active partitions", t.start_partition, allowed)


def _shuffle_rows(call: Call, dst: NkiTensor, src: NkiTensor, mask: Any) -> Array:
    """The partition of `src` that each partition of `dst` copies, -1 where it keeps its own."""
    quadrant = call.hardware.partition_quadrant
    if not isinstance(mask, (list, tuple)) or len(mask) != quadrant:
        received = f"{len(mask)} elements" if isinstance(mask, (list, tuple)) else type(mask).__name__
        call.refuse("shuffle_mask", "length", received, f"a list of {quadrant} integers")
    for i, m in enumerate(mask):
        integer = isinstance(m, (int, np.integer)) and not isinstance(m, bool)
        if not integer or not (0 <= m < quadrant or m == KEEP):
            call.refuse("shuffle_mask", f"element {i}", repr(m), f"0..{quadrant - 1} or {KEEP}")
    p = np.arange(dst.shape[0])
    wanted = np.asarray(mask, np.int64)[p % quadrant]
    rows = np.where(wanted == KEEP, -1, p // quadrant * quadrant + wanted)
    if rows.max() >= src.shape[0]:
        i = int(rows.argmax())
        received = f"partition {rows[i]} for partition {i} of dst"
        call.refuse("shuffle_mask", "partition outside src", received, f"0..{src.shape[0] - 1}")
    return rows


def _stored_constant(dst: NkiTensor, constant: int | float) -> Array:
    """The constant as float32 for a float dtype, and exactly for an integer, which float32 may not hold."""
    kind = np.dtype(np.float32) if dst.dtype.is_float else dst.dtype.numpy
    return np.asarray(constant).astype(kind)


def _constant(call: Call, operand: str, dst: NkiTensor, value: Any) -> int | float:
    """`value` as a Python number, checked against dst's class of dtype."""
    dtype = dst.dtype
    boolean = isinstance(value, (bool, np.bool_))
    integer = isinstance(value, (int, np.integer)) and not boolean
    if not (boolean or integer or isinstance(value, (float, np.floating))):
        call.refuse(operand, "type", type(value).__name__, "a number known when the kernel is built")
    if dtype.kind == "packed":
        if boolean or value != 0:
            call.refuse(operand, f"value of a {dtype} tile", value, "0", MIGRATION)
        return 0
    if dtype is bool_:
        if not boolean and not (integer and value in (0, 1)):
            call.refuse(operand, "value of a bool_ tile", repr(value), "True, False, 1 or 0", MIGRATION)
        return int(value)
    if boolean:
        call.refuse(operand, f"value of a {dtype} tile", value, "an integer or a float", MIGRATION)
    if dtype in INTEGERS:
        if not integer:
            call.refuse(operand, f"value of a {dtype} tile", repr(value), "an integer literal", MIGRATION)
        info = np.iinfo(dtype.numpy)
        if not info.min <= value <= info.max:
            call.refuse(operand, f"value of a {dtype} tile", value, f"{info.min}..{info.max}", MIGRATION)
        return int(value)
    return float(value)
