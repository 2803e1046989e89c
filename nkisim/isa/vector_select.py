"""Vector Engine: selection by position or predicate, and the eight largest elements of a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nkisim.dtypes import (
    FLOATS,
    Array,
    DType,
    float8_e8m0fnu,
    int8,
    int16,
    int32,
    tfloat32,
    uint8,
    uint16,
    uint32,
)
from nkisim.hardware import GEN3, source_of
from nkisim.isa._accumulate import accumulate, check_command, check_result
from nkisim.isa._call import COMPUTABLE, Call, NkiInstruction
from nkisim.isa._choices import check_flag
from nkisim.isa._enums import reduce_cmd as ReduceCmd
from nkisim.isa.vector_reduce import one_of
from nkisim.memory import MemoryRegion
from nkisim.operators import NamedOperator
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

MAXIMUM = NamedOperator("maximum")
FP32_MIN = float(np.finfo(np.float32).min)
EIGHT = 8  # values that max8, nc_find_index8 and nc_match_replace8 handle per row
ARITHMETIC_FLOATS = tuple(d for d in FLOATS if d is not float8_e8m0fnu)
_POSITION_TESTS = ("equal", "less", "less_equal", "greater", "greater_equal")
_RANGE_COMMANDS = (ReduceCmd.idle, ReduceCmd.reset, ReduceCmd.reduce, ReduceCmd.reset_reduce)
_SELECT_COMMANDS = (ReduceCmd.idle, ReduceCmd.reduce, ReduceCmd.reset_reduce)
_SELECTABLE = tuple(d for d in COMPUTABLE if d not in (tfloat32, int32, uint32))
_INDEX_DTYPES: tuple[DType, ...] = (uint16, uint32)


def range_select(
    dst: NkiTensor,
    on_true_tile: NkiTensor,
    comp_op0: Any,
    comp_op1: Any,
    bound0: NkiTensor,
    bound1: NkiTensor,
    reduce_cmd: Any = ReduceCmd.reset_reduce,
    reduce_res: NkiTensor | None = None,
    reduce_op: Any = MAXIMUM,
    range_start: int = 0,
    on_false_value: float = FP32_MIN,
    name: str | None = None,
) -> NkiInstruction:
    """Keep the elements whose position i has i comp_op0 bound0 and i comp_op1 bound1; the rest become FP32_MIN.

    i is range_start plus the element's number in its row. The accumulator registers take the row maximum
    of the float32 result, so a row with nothing kept gives FP32_MIN there, while dst holds -inf if its
    float type is narrower than float32. Spec: nki.isa.range_select, NKI 0.6. Engine: Vector, from
    NeuronCore-v3 on. Raises `NkiError` on inputs that are not floats, bounds that are not [P, 1] float32
    tiles, other comparisons, other fill values, positions that float32 cannot hold.
    """
    call = Call("range_select", name)
    call.need_generation(GEN3)
    call.tile("dst", dst)
    call.tile("on_true_tile", on_true_tile, dtypes=ARITHMETIC_FLOATS)
    call.same_layout("dst", dst, "on_true_tile", on_true_tile)
    test0 = one_of(call, "comp_op0", comp_op0, _POSITION_TESTS)
    test1 = one_of(call, "comp_op1", comp_op1, _POSITION_TESTS)
    check_command(call, reduce_cmd, _RANGE_COMMANDS)
    _check_result(call, reduce_res, reduce_cmd, dst, COMPUTABLE)
    reduction = one_of(call, "reduce_op", reduce_op, (MAXIMUM.nki_op,))
    _check_range(call, range_start, on_true_tile.free_size)
    _check_fill(call, on_false_value)
    for operand, bound in (("bound0", bound0), ("bound1", bound1)):
        if not isinstance(bound, NkiTensor):
            call.refuse(operand, "type", type(bound).__name__, "a [P, 1] float32 tile")
    low = call.column("bound0", bound0, dst.shape[0])
    high = call.column("bound1", bound1, dst.shape[0])

    x = call.read_f32("on_true_tile", on_true_tile)
    position = (np.arange(x.shape[1]) + int(range_start)).astype(np.float32)
    kept = (test0.function(position, low) != 0) & (test1.function(position, high) != 0)
    y = np.where(kept, x, np.float32(FP32_MIN))
    registers = accumulate(call, Engine.vector, reduce_cmd, dst, y, reduction, result=reduce_res)
    if dst.dtype.is_low_precision and not call.core.precise:
        # Rounding FP32_MIN to a narrow float gives -inf; storing the tile as float32 must not undo that.
        y = np.where(kept, x, np.float32(-np.inf))
    call.write("dst", dst, y)
    if reduce_res is not None:
        assert registers is not None
        call.write("reduce_res", reduce_res, registers)
    return call.record(
        Engine.vector,
        comp_op0=test0.name,
        comp_op1=test1.name,
        reduce_cmd=reduce_cmd,
        range_start=int(range_start),
    )


def select_reduce(
    dst: NkiTensor,
    predicate: NkiTensor,
    on_true: NkiTensor,
    on_false: float | NkiTensor,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Any = ReduceCmd.idle,
    reduce_op: Any = MAXIMUM,
    reverse_pred: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """Select on_true where predicate is not zero (is zero, with reverse_pred) and on_false elsewhere.

    The accumulator registers take the row maximum of the float32 result. Spec: nki.isa.select_reduce,
    NKI 0.6. Engine: Vector. Raises `NkiError` where predicate and on_true are both in PSUM, on
    predicates that are not 8- or 16-bit integers, on 32-bit integer and tfloat32 inputs.
    """
    call = Call("select_reduce", name)
    call.tile("dst", dst)
    call.tile("predicate", predicate, dtypes=(int8, uint8, int16, uint16))
    call.tile("on_true", on_true, dtypes=_SELECTABLE)
    call.same_layout("dst", dst, "predicate", predicate)
    call.same_layout("dst", dst, "on_true", on_true)
    if predicate.buffer is MemoryRegion.psum and on_true.buffer is MemoryRegion.psum:
        call.refuse("on_true", "buffer", "psum for predicate and on_true", "at most one of them in PSUM")
    check_command(call, reduce_cmd, _SELECT_COMMANDS)
    _check_result(call, reduce_res, reduce_cmd, dst, ARITHMETIC_FLOATS)
    reduction = one_of(call, "reduce_op", reduce_op, (MAXIMUM.nki_op,))
    check_flag(call, "reverse_pred", reverse_pred)
    other = call.column("on_false", on_false, dst.shape[0], dtypes=COMPUTABLE)

    chosen = call.read_2d("predicate", predicate) != 0
    if reverse_pred:
        chosen = ~chosen
    y = np.where(chosen, call.read_f32("on_true", on_true), other)
    registers = accumulate(call, Engine.vector, reduce_cmd, dst, y, reduction, result=reduce_res)
    call.write("dst", dst, y)
    if reduce_res is not None:
        assert registers is not None
        call.write("reduce_res", reduce_res, registers)
    return call.record(Engine.vector, reduce_cmd=reduce_cmd)


def max8(dst: NkiTensor, src: NkiTensor, name: str | None = None) -> NkiInstruction:
    """Find the 8 largest values of each row, equal ones repeated, in descending order.

    NaN counts as the largest, so that it stays visible (no document says). Spec: nki.isa.max8, NKI 0.6.
    Engine: Vector. Raises `NkiError` where src has more than 3 dimensions or not 8 to 16,384 elements per
    partition, and where dst is not [P, 8].
    """
    call = Call("max8", name)
    call.tile("dst", dst)
    call.tile("src", src)
    _check_dims(call, "src", src)
    _check_count(call, "src", src, "max8_min_elements", "max8_max_elements")
    _check_eight(call, "dst", dst, src)

    x = call.read_f32("src", src)
    top = np.partition(x, x.shape[1] - EIGHT, axis=1)[:, -EIGHT:]
    call.write("dst", dst, np.sort(top, axis=1)[:, ::-1])
    return call.record(Engine.vector)


def nc_find_index8(dst: NkiTensor, data: NkiTensor, vals: NkiTensor, name: str | None = None) -> NkiInstruction:
    """Find the position in its row of data of each of 8 values; all ones where there is none.

    Equal values are paired with successive positions, first position to first value. Spec:
    nki.isa.nc_find_index8, NKI 0.6. Engine: Vector. Raises `NkiError` where data has more than 3 dimensions
    or not 8 to 16,384 elements per partition, where vals does not hold 8, where dst is not [P, 8] of
    uint16 or uint32.
    """
    call = Call("nc_find_index8", name)
    call.tile("dst", dst, dtypes=_INDEX_DTYPES)
    call.tile("data", data)
    _check_dims(call, "data", data)
    _check_count(call, "data", data, "find_index8_min_elements", "find_index8_max_elements")
    _check_vals(call, vals, data)
    _check_eight(call, "dst", dst, data)

    found = _match(call.read_f32("data", data), call.read_f32("vals", vals), range(EIGHT))
    call.write("dst", dst, found.astype(dst.dtype.numpy))
    return call.record(Engine.vector)


def nc_match_replace8(
    dst: NkiTensor,
    data: NkiTensor,
    vals: NkiTensor,
    imm: float,
    dst_idx: NkiTensor | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """Copy data with one occurrence of each of 8 values replaced by imm; dst_idx gets their positions.

    Equal values are paired with successive positions, first position to last value: the hardware takes
    vals from 7 to 0. Spec: nki.isa.nc_match_replace8, NKI 0.6. Engine: Vector. Raises `NkiError` on more
    than 16,384 elements per partition, on vals that do not hold 8, on a dst_idx that is not uint16 or uint32.
    """
    call = Call("nc_match_replace8", name)
    call.tile("dst", dst)
    call.tile("data", data)
    _check_count(call, "data", data, None, "match_replace8_max_elements")
    _check_vals(call, vals, data)
    call.same_layout("data", data, "dst", dst)
    if isinstance(imm, bool) or not isinstance(imm, (int, float, np.floating, np.integer)):
        call.refuse("imm", "type", type(imm).__name__, "a number known when the kernel is built")
    if dst_idx is not None:
        call.tile("dst_idx", dst_idx, dtypes=_INDEX_DTYPES)
        if dst_idx.shape[0] != data.shape[0] or dst_idx.free_size != EIGHT:
            call.refuse("dst_idx", "shape", list(dst_idx.shape), f"[{data.shape[0]}, {EIGHT}]")

    x = call.read_f32("data", data)
    # Matches are sought in data as read: an imm that equals one of vals is not matched again.
    found = _match(x, call.read_f32("vals", vals), reversed(range(EIGHT)))
    y = x.copy()
    rows, slots = np.nonzero(found >= 0)
    y[rows, found[rows, slots]] = np.float32(imm)
    call.write("dst", dst, y)
    if dst_idx is not None:
        # Positions of values that data lacks are undefined; all ones as in nc_find_index8 is assumed.
        call.write("dst_idx", dst_idx, found.astype(dst_idx.dtype.numpy))
    return call.record(Engine.vector)


def _match(data: Array, vals: Array, order: Iterable[int]) -> Array:
    """Positions, int64 [P, 8], that vals are paired with when taken in `order`; -1 without a match.

    Each value takes the first position that equals it and no earlier value took.
    """
    rows = np.arange(data.shape[0])
    free = np.ones(data.shape, np.bool_)
    found = np.full((data.shape[0], EIGHT), -1, np.int64)
    for i in order:
        hits = (data == vals[:, i : i + 1]) & free
        first = hits.argmax(axis=1)
        matched = hits[rows, first]
        found[matched, i] = first[matched]
        free[rows[matched], first[matched]] = False
    return found


def _check_result(call: Call, result: Any, command: ReduceCmd, dst: NkiTensor, dtypes: tuple[DType, ...]) -> None:
    check_result(call, result, dst.shape[0], dtypes)
    if result is not None and command is ReduceCmd.idle:
        call.refuse("reduce_res", "result under idle", "a tile", "None: idle accumulates nothing")


def _check_range(call: Call, range_start: Any, count: int) -> None:
    if isinstance(range_start, bool) or not isinstance(range_start, (int, np.integer)):
        call.refuse("range_start", "type", type(range_start).__name__, "an int known when the kernel is built")
    limit = call.hardware.range_select_index_max
    if range_start < -limit or range_start + count - 1 > limit:
        received = f"{range_start}..{range_start + count - 1}"
        call.refuse("range_start", "positions", received, f"-{limit}..{limit}", source_of("range_select_index_max"))


def _check_fill(call: Call, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        call.refuse("on_false_value", "type", type(value).__name__, f"FP32_MIN, {FP32_MIN}")
    rounded = np.float32(value)
    if rounded != np.float32(FP32_MIN):
        call.refuse("on_false_value", "value", value, f"FP32_MIN, {FP32_MIN}")


def _check_dims(call: Call, operand: str, t: NkiTensor) -> None:
    limit = call.hardware.max8_max_dims
    if len(t.shape) > limit:
        call.refuse(operand, "dimensions", len(t.shape), f"at most {limit}", source_of("max8_max_dims"))


def _check_count(call: Call, operand: str, t: NkiTensor, least: str | None, most: str) -> None:
    low = 1 if least is None else getattr(call.hardware, least)
    high = getattr(call.hardware, most)
    if not low <= t.free_size <= high:
        call.refuse(operand, "elements per partition", t.free_size, f"{low}..{high}", source_of(most))


def _check_vals(call: Call, vals: Any, data: NkiTensor) -> None:
    call.tile("vals", vals)
    _check_dims(call, "vals", vals)
    if vals.shape[0] != data.shape[0]:
        call.refuse("vals", "partitions", vals.shape[0], f"{data.shape[0]}, those of data")
    if vals.free_size != EIGHT:
        call.refuse("vals", "elements per partition", vals.free_size, EIGHT)


def _check_eight(call: Call, operand: str, t: NkiTensor, data: NkiTensor) -> None:
    if t.shape != (data.shape[0], EIGHT):
        call.refuse(operand, "shape", list(t.shape), f"[{data.shape[0]}, {EIGHT}]")
