"""GpSimd Engine: affine patterns, selection by them, and reduction over partitions. It reaches SBUF only."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import Array, bool_, cast, int32
from nkisim.hardware import source_of
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa.vector_elementwise import require_integers
from nkisim.memory import SBUF
from nkisim.objects import VirtualRegister
from nkisim.operators import ALU, ALU_TABLE, NamedOperator, alu, listed, op_name
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

INT32 = np.iinfo(np.int32)
EQUAL = NamedOperator("equal")
PARTITION_REDUCTIONS = ("add", "average", "maximum", "bitwise_or", "bitwise_and")


def iota(
    dst: NkiTensor, pattern: Any, offset: Any = 0, channel_multiplier: int = 0, name: str | None = None
) -> NkiInstruction:
    """dst[p, ...] = offset + p * channel_multiplier + sum(step * index), in wrapping int32 arithmetic.

    `pattern` lists up to four [step, num], outermost first; `offset` may be a register. Integer
    destinations saturate; others are rounded from float32.

    Spec: nki.isa.iota, NKI 0.6. Engine: GpSimd. Raises `NkiError` on PSUM, on patterns whose element
    count is not that of a partition of dst, on numbers outside int32.
    """
    call = Call("iota", name)
    call.tile("dst", dst, SBUF)
    dims, base = _affine(call, dst, pattern, offset, channel_multiplier)

    values = _affine_values(dst.shape[0], dims, base, channel_multiplier)
    if dst.dtype.is_integer:
        # Integers are not converted through float32, which would round above 2^24.
        info = np.iinfo(dst.dtype.numpy)
        values = np.clip(values.astype(np.int64), info.min, info.max).astype(dst.dtype.numpy)
    elif dst.dtype is bool_:
        values = (values != 0).astype(bool_.numpy)
    call.write("dst", dst, values)
    return call.record(Engine.gpsimd, register_offset=isinstance(offset, VirtualRegister))


def affine_select(
    dst: NkiTensor,
    pattern: Any,
    channel_multiplier: int,
    on_true_tile: NkiTensor,
    on_false_value: Any,
    cmp_op: Any = EQUAL,
    offset: Any = 0,
    name: str | None = None,
) -> NkiInstruction:
    """Select: dst = on_true_tile where cmp_op(v, 0), else on_false_value; v is the affine value that `iota` generates.

    Equal dtypes of the tiles keep the selected bits; others convert through float32.

    Spec: nki.isa.affine_select, NKI 0.6. Engine: GpSimd. Raises `NkiError` on PSUM, on tiles or patterns
    of unequal element counts, on operators that compare nothing.
    """
    call = Call("affine_select", name)
    call.tile("dst", dst, SBUF)
    call.tile("on_true_tile", on_true_tile, SBUF)
    call.same_layout("dst", dst, "on_true_tile", on_true_tile)
    dims, base = _affine(call, dst, pattern, offset, channel_multiplier)
    number = (int, float, np.floating, np.integer)
    if not isinstance(on_false_value, number) or isinstance(on_false_value, bool):
        call.refuse("on_false_value", "type", type(on_false_value).__name__, "a number, taken as float32")
    compare = alu(cmp_op)
    if compare is None or compare.kind != "compare":
        names = listed(o.name for o in ALU.values() if o.kind == "compare")
        call.refuse("cmp_op", "operator", op_name(cmp_op), names, ALU_TABLE)

    chosen = compare.function(_affine_values(dst.shape[0], dims, base, channel_multiplier), np.int32(0)) != 0
    fill = np.full(1, on_false_value, np.float32)
    if dst.dtype is on_true_tile.dtype:
        fill = cast(fill, dst.dtype, precise=call.core.precise)
        call.write("dst", dst, np.where(chosen, call.read_2d("on_true_tile", on_true_tile), fill), bits=True)
    else:
        call.write("dst", dst, np.where(chosen, call.read_f32("on_true_tile", on_true_tile), fill))
    return call.record(Engine.gpsimd, op=compare.name, register_offset=isinstance(offset, VirtualRegister))


def tensor_partition_reduce(dst: NkiTensor, op: Any, data: NkiTensor, name: str | None = None) -> NkiInstruction:
    """dst[0, f] = data[0, f] op data[1, f] op ..., in float32 (bit operators: in the stored integers).

    Spec: nki.isa.tensor_partition_reduce, NKI 0.6. Engine: GpSimd. Raises `NkiError` on PSUM, on dst of
    more than one partition or other element counts, on operators other than nl.add, nl.average,
    nl.maximum, nl.bitwise_or and nl.bitwise_and. The page does not say how int32 adds; through float32,
    as the operator table has it for arithmetic.
    """
    call = Call("tensor_partition_reduce", name)
    call.tile("dst", dst, SBUF)
    call.tile("data", data, SBUF)
    if dst.shape[0] != 1:
        call.refuse("dst", "partitions", dst.shape[0], "1")
    if dst.free_size != data.free_size:
        call.refuse("data", "elements per partition", data.free_size, f"{dst.free_size}, those of dst")
    operator = alu(op)
    if operator is None or operator.name not in PARTITION_REDUCTIONS:
        call.refuse("op", "operator", op_name(op), listed(PARTITION_REDUCTIONS))

    if operator.is_bitvec:
        require_integers(call, dst=dst, data=data)
        assert operator.reduce is not None
        bits = operator.reduce(call.read_2d("data", data), axis=0)
        call.write("dst", dst, bits.view(dst.dtype.numpy), bits=True)
    else:
        x = call.read_f32("data", data)
        y = np.maximum.reduce(x, axis=0) if operator.name == "maximum" else np.add.reduce(x, axis=0)
        if operator.name == "average":
            y = y / np.float32(x.shape[0])
        call.write("dst", dst, y)
    return call.record(Engine.gpsimd, op=operator.name)


def _affine(
    call: Call, dst: NkiTensor, pattern: Any, offset: Any, channel_multiplier: Any
) -> tuple[list[tuple[int, int]], int]:
    """The checked pattern as (step, num) pairs, and the offset's value."""
    if not isinstance(pattern, (list, tuple)) or not all(isinstance(d, (list, tuple)) and len(d) == 2 for d in pattern):
        call.refuse("pattern", "type", repr(pattern), "a list of [step, num]")
    limit = call.hardware.affine_pattern_max_dims
    if not 1 <= len(pattern) <= limit:
        call.refuse("pattern", "dimensions", len(pattern), f"1..{limit}", source_of("affine_pattern_max_dims"))
    dims = [(d[0], d[1]) for d in pattern]
    count = 1
    for step, num in dims:
        check_int32(call, "pattern", "step", step)
        if not is_int(num) or num < 1:
            call.refuse("pattern", "num", repr(num), "an integer >= 1")
        count *= num
    if count != dst.free_size:
        call.refuse("pattern", "elements", f"{count} of {pattern}", f"{dst.free_size}, the elements per partition")
    base = offset
    if isinstance(offset, VirtualRegister):
        base = int(offset.value)
    else:
        check_int32(call, "offset", "value", offset)
    check_int32(call, "channel_multiplier", "value", channel_multiplier)
    return dims, int(base)


def check_int32(call: Call, operand: str, rule: str, value: Any) -> None:
    """Refuse what is not an integer of 32 bits, known when the kernel is built."""
    if not is_int(value) or not INT32.min <= value <= INT32.max:
        register = " or a VirtualRegister" if operand == "offset" else ""
        call.refuse(operand, rule, repr(value), f"an int32 number{register}")


def is_int(value: Any) -> bool:
    """Whether it is an integer, and not a truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _affine_values(partitions: int, dims: list[tuple[int, int]], base: int, channel_multiplier: int) -> Array:
    """The int32 values [P, F] of an affine pattern; partition numbers count from the tile's first."""
    values = base + channel_multiplier * np.arange(partitions, dtype=np.int64)
    for step, num in dims:
        values = values[..., np.newaxis] + step * np.arange(num, dtype=np.int64)
    return values.reshape(partitions, -1).astype(int32.numpy)
