"""Vector Engine: element-wise arithmetic on tiles.

`tensor_tensor` also runs on the GpSimd Engine, `tensor_scalar` also on the Scalar and GpSimd Engines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import (
    INTEGERS,
    Array,
    bfloat16,
    float8_e4m3,
    float8_e5m2,
    float16,
    float32,
    int8,
    int16,
    int32,
    tfloat32,
    uint8,
    uint16,
    uint32,
)
from nkisim.hardware import GEN3, GEN4, source_of
from nkisim.isa._access import INDIRECTION
from nkisim.isa._accumulate import VECTOR_COMMANDS, accumulate, check_command, check_result
from nkisim.isa._call import COMPUTABLE, Call, NkiInstruction
from nkisim.isa._choices import any_in_psum, check_flag, choose_engine
from nkisim.isa._enums import engine as EngineKind
from nkisim.isa._enums import reduce_cmd as ReduceCmd
from nkisim.isa._indirection import check_indirection, is_indirect
from nkisim.memory import MemoryRegion
from nkisim.operators import ALU, ALU_TABLE, AluOp, alu, listed, op_name
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

_INT32 = (int32, uint32)
_GEN4_OPERATORS = ("abs_max", "abs_min")
# Release notes of NKI 0.5: new in tensor_scalar, as op0, on trn3.
_GEN4_FIRST_OPERATORS = (*_GEN4_OPERATORS, "square", "relu")
_SCALAR_ENGINE_GEN3 = (("multiply", "add"), ("multiply", None), ("add", None))
_RESULTS = (float8_e4m3, float8_e5m2, float16, bfloat16, float32, tfloat32)
_SMALL_INTEGERS = (int8, int16, int32, uint8, uint16)
_EXPONENTIAL_DST = (*_RESULTS, *_SMALL_INTEGERS)
_EXPONENTIAL_SRC = (float8_e4m3, float8_e5m2, float16, bfloat16, float32, *_SMALL_INTEGERS, uint32)


def tensor_tensor(
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Any,
    engine: Any = EngineKind.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """`dst` = `data1` op `data2`, element by element in float32 (integers: bit operators, or exact on GpSimd).

    Spec: nki.isa.tensor_tensor, NKI 0.6. Engine: Vector or GpSimd; `unknown` is GpSimd for `power` and for
    int32/uint32 tiles in SBUF. Raises `NkiError` where both inputs are in PSUM, on unequal partitions or free
    sizes, on bit operators with non-integer tiles.
    """
    call = Call("tensor_tensor", name)
    call.tile("dst", dst, indirect=True)
    call.tile("data1", data1, indirect=True)
    call.tile("data2", data2)
    call.same_layout("dst", dst, "data1", data1)
    call.same_layout("dst", dst, "data2", data2)
    operator = binary_operator(call, "op", op)
    if data1.buffer is MemoryRegion.psum and data2.buffer is MemoryRegion.psum:
        call.refuse("data2", "buffer", "psum for both inputs", "at most one input in PSUM")
    if operator.is_bitvec:
        require_integers(call, dst=dst, data1=data1, data2=data2)
    exact = all(t.dtype in _INT32 for t in (dst, data1, data2))
    chosen = _tensor_tensor_engine(call, operator, engine, exact, dst, data1, data2)
    check_indirection(call, dst, "data1", data1, chosen)

    if operator.is_bitvec:
        y = operator.function(_read_bits(call, "data1", data1), _read_bits(call, "data2", data2))
        call.write("dst", dst, y.view(dst.dtype.numpy), bits=True)
    elif exact and chosen is Engine.gpsimd:
        y = integer_arithmetic(operator, call.read_2d("data1", data1), call.read_2d("data2", data2), dst)
        call.write("dst", dst, y, bits=True)
    else:
        y = operator.function(call.read_f32("data1", data1), call.read_f32("data2", data2))
        call.write("dst", dst, y)
    return call.record(chosen, op=operator.name)


def _tensor_tensor_engine(call: Call, operator: AluOp, engine: Any, exact: bool, *tiles: NkiTensor) -> Engine:
    if operator.name == "power":
        return choose_engine(call, engine, (Engine.gpsimd,), *tiles, what="engine of power")
    if operator.is_bitvec:
        return choose_engine(call, engine, (Engine.vector,), *tiles, what="engine of a bit operator")
    if exact and not any_in_psum(*tiles):
        return choose_engine(call, engine, (Engine.gpsimd, Engine.vector), *tiles)
    return choose_engine(call, engine, (Engine.vector, Engine.gpsimd), *tiles)


def tensor_scalar(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Any = EngineKind.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """`dst` = (`data` op0 `operand0`) op1 `operand1`; operands are numbers or [P, 1] columns.

    Spec: nki.isa.tensor_scalar, NKI 0.6. Engine: Vector, Scalar from NeuronCore-v3, GpSimd for `rsqrt` only.
    Raises `NkiError` on a bit operator with an arithmetic one or with tiles that are not integers, on columns
    that are not float32 (arithmetic) or not integers (bits), on operators the engine does not have.
    """
    call = Call("tensor_scalar", name)
    call.tile("dst", dst, indirect=True)
    call.tile("data", data, indirect=True)
    call.same_layout("dst", dst, "data", data)
    stages = [_stage(call, 0, op0, operand0, reverse0)]
    if op1 is not None:
        stages.append(_stage(call, 1, op1, operand1, reverse1))
    else:
        check_flag(call, "reverse1", reverse1)
        if operand1 is not None or reverse1:
            received = f"operand1={operand1!r}, reverse1={reverse1}"
            call.refuse("op1", "arguments without op1", received, "operand1=None, reverse1=False")
    operators = tuple(operator for operator, _, _ in stages)
    bits = operators[0].is_bitvec
    if operators[-1].is_bitvec is not bits:
        call.refuse("op1", "kinds of operators", " and ".join(o.name for o in operators), "two bit or two arithmetic")
    if bits:
        require_integers(call, dst=dst, data=data)
    chosen = _tensor_scalar_engine(call, engine, operators, dst, data, operand0, operand1)
    # The page excludes its int32 "address arithmetic" from indirection without saying which operators that is.
    if (is_indirect(dst) or is_indirect(data)) and not bits and dst.dtype in _INT32 and data.dtype in _INT32:
        received = f"{data.dtype} to {dst.dtype}"
        call.refuse("data", "arithmetic under tensor indirection", received, "no 32-bit integer pair", INDIRECTION)
    check_indirection(call, dst, "data", data, chosen)

    columns = [
        None if is_unary(operator) else _scalar_column(call, f"operand{i}", operand, data, bits)
        for i, (operator, operand, _) in enumerate(stages)
    ]
    y = _read_bits(call, "data", data) if bits else call.read_f32("data", data)
    for (operator, _, reverse), column in zip(stages, columns, strict=True):
        y = _apply(operator, y, column, reverse)
    call.write("dst", dst, y.view(dst.dtype.numpy) if bits else y, bits=bits)
    return call.record(chosen, op0=operators[0].name, op1=operators[1].name if len(operators) > 1 else None)


def _stage(call: Call, i: int, op: Any, operand: Any, reverse: Any) -> tuple[AluOp, Any, bool]:
    """One operator of `tensor_scalar` with its operand and order, checked as far as they are independent."""
    found = alu(op)
    if found is None or found.name in ("bypass", "average"):
        allowed = listed(o for o in ALU if o not in ("bypass", "average", "power"))
        call.refuse(f"op{i}", "operator", op_name(op), allowed, ALU_TABLE)
    if found.name == "power":
        # power runs on GpSimd, and the engine argument allows GpSimd for rsqrt only.
        call.refuse(f"op{i}", "operator", "power", "nki.isa.tensor_tensor(op=nl.power)")
    if found.name in _GEN4_FIRST_OPERATORS:
        if call.hardware.generation < GEN4:
            call.refuse(f"op{i}", f"{found.name} on target", call.hardware.target, "NeuronCore-v4 or newer")
        if i:
            call.refuse("op1", "operator", found.name, f"{found.name} as op0 only")
    check_flag(call, f"reverse{i}", reverse)
    if is_unary(found):
        number = isinstance(operand, (int, float, np.number)) and not isinstance(operand, bool) and operand == 0
        if operand is not None and not number:
            call.refuse(f"operand{i}", f"operand of unary {found.name}", repr(operand), "None or 0")
        if reverse:
            call.refuse(f"reverse{i}", f"order of unary {found.name}", True, "False")
    return found, operand, reverse


def _tensor_scalar_engine(call: Call, engine: Any, operators: tuple[AluOp, ...], *operands: Any) -> Engine:
    names = [o.name for o in operators]
    if "rsqrt" in names:
        if len(names) > 1:
            call.refuse("op1", "operators beside rsqrt", " and ".join(names), "rsqrt alone, as op0")
        return choose_engine(call, engine, (Engine.gpsimd,), *operands, what="engine of rsqrt")
    if operators[0].is_bitvec:
        return choose_engine(call, engine, (Engine.vector,), what="engine of a bit operator")
    chosen = choose_engine(call, engine, (Engine.vector, Engine.scalar), what=f"engine of {' and '.join(names)}")
    if chosen is Engine.scalar:
        generation, target = call.hardware.generation, call.hardware.target
        if generation < GEN3:
            # Said by the operator table of SDK 2.26 for add and multiply, the only ones that v3 has.
            call.refuse("engine", "Scalar Engine on target", target, "vector before NeuronCore-v3", ALU_TABLE)
        pair = (names[0], names[1] if len(names) > 1 else None)
        if generation == GEN3 and pair not in _SCALAR_ENGINE_GEN3:
            allowed = "; ".join(f"op0={a}, op1={b}" for a, b in _SCALAR_ENGINE_GEN3)
            call.refuse(
                "engine", f"operators of the Scalar Engine on {target}", f"op0={pair[0]}, op1={pair[1]}", allowed
            )
    return chosen


def _scalar_column(call: Call, operand: str, value: Any, data: NkiTensor, bits: bool) -> Array:
    """A number or a [P, 1] tile: float32 for arithmetic, unsigned of the tiles' width for bit operators."""
    if not bits:
        return call.column(operand, value, data.shape[0])
    width = data.dtype.itemsize
    unsigned = np.dtype(f"u{width}")
    if isinstance(value, NkiTensor):
        t = call.tile(operand, value, dtypes=INTEGERS)
        if t.shape[0] != data.shape[0] or t.free_size != 1:
            call.refuse(operand, "shape", list(t.shape), f"[{data.shape[0]}, 1]")
        require_integers(call, data=data, **{operand: t})
        return _read_bits(call, operand, t)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        call.refuse(operand, "type under a bit operator", repr(value), "an integer or a [P, 1] tensor of integers")
    low, high = -(1 << (8 * width - 1)), (1 << 8 * width) - 1
    if not low <= value <= high:
        call.refuse(operand, f"value for {8 * width} bits", value, f"{low}..{high}")
    return np.asarray(int(value) & high, unsigned)


def scalar_tensor_tensor(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    op1: Any,
    operand1: NkiTensor,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """`dst` = (`data` op0 `operand0`) op1 `operand1` in float32; `operand0` a number or a column, `operand1` a tile.

    Spec: nki.isa.scalar_tensor_tensor, NKI 0.6. Engine: Vector. Raises `NkiError` where `data` and `operand1`
    are both in PSUM, on bit operators and `power`, on unequal partitions or free sizes.
    """
    call = Call("scalar_tensor_tensor", name)
    call.tile("dst", dst)
    call.tile("data", data)
    call.tile("operand1", operand1)
    call.same_layout("dst", dst, "data", data)
    call.same_layout("dst", dst, "operand1", operand1)
    if data.buffer is MemoryRegion.psum and operand1.buffer is MemoryRegion.psum:
        call.refuse("operand1", "buffer", "psum for data and operand1", "at most one of them in PSUM")
    first = arithmetic_operator(call, "op0", op0)
    second = arithmetic_operator(call, "op1", op1)
    check_flag(call, "reverse0", reverse0)
    check_flag(call, "reverse1", reverse1)

    column = call.column("operand0", operand0, data.shape[0], COMPUTABLE)
    y = _apply(first, call.read_f32("data", data), column, reverse0)
    y = _apply(second, y, call.read_f32("operand1", operand1), reverse1)
    call.write("dst", dst, y)
    return call.record(Engine.vector, op0=first.name, op1=second.name)


def arithmetic_operator(call: Call, operand: str, op: Any) -> AluOp:
    """The two-input arithmetic operator that `op` names, if the Vector Engine has it."""
    operator = binary_operator(call, operand, op)
    if operator.is_bitvec:
        call.refuse(operand, "operator", operator.name, "an arithmetic operator", ALU_TABLE)
    if operator.name == "power":
        call.refuse(operand, "engine of nl.power", "vector", "gpsimd", ALU_TABLE)
    return operator


def reciprocal(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> NkiInstruction:
    """`dst` = 1 / `data`, element by element in float32.

    Spec: nki.isa.reciprocal, NKI 0.6. Engine: Vector. Raises `NkiError` on unequal partitions or free sizes.
    """
    call = Call("reciprocal", name)
    call.tile("dst", dst)
    call.tile("data", data)
    call.same_layout("dst", dst, "data", data)
    y = ALU["reciprocal"].function(call.read_f32("data", data))
    call.write("dst", dst, y)
    return call.record(Engine.vector)


def exponential(
    dst: NkiTensor,
    src: NkiTensor,
    max_value: Any = 0.0,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Any = ReduceCmd.idle,
    reduce_init: Any = 0.0,
    name: str | None = None,
) -> NkiInstruction:
    """`dst` = exp(`src` - `max_value`) in float32; the row sums go to the accumulator registers and `reduce_res`.

    Spec: nki.isa.exponential, NKI 0.6. Engine: Vector, from NeuronCore-v4. Raises `NkiError` on earlier
    targets, on dtypes and ranks the instruction does not take, on `reduce_res` under `idle`, on `reduce_init`
    without `load_reduce`, on `reduce` over registers that were never reset.
    """
    call = Call("exponential", name)
    call.need_generation(GEN4)
    call.tile("dst", dst, dtypes=_EXPONENTIAL_DST, indirect=True)
    call.tile("src", src, dtypes=_EXPONENTIAL_SRC, indirect=True)
    limit = call.hardware.exponential_max_dims
    for operand, t in (("dst", dst), ("src", src)):
        if t.ndim > limit:
            call.refuse(operand, "dimensions", t.ndim, f"at most {limit}", source_of("exponential_max_dims"))
    call.same_layout("dst", dst, "src", src)
    check_command(call, reduce_cmd, VECTOR_COMMANDS)
    check_result(call, reduce_res, dst.shape[0], _RESULTS)
    if reduce_cmd is ReduceCmd.idle and reduce_res is not None:
        call.refuse("reduce_res", "result under idle", "a tile", "None: idle accumulates nothing")
    initial = None
    if reduce_cmd is ReduceCmd.load_reduce:
        initial = call.column("reduce_init", reduce_init, dst.shape[0])
    elif isinstance(reduce_init, NkiTensor) or reduce_init != 0:
        call.refuse("reduce_init", f"initial value under {reduce_cmd.name}", repr(reduce_init), "0.0, the default")
    check_indirection(call, dst, "src", src, Engine.vector)

    maximum = call.column("max_value", max_value, dst.shape[0])
    y = np.exp(call.read_f32("src", src) - maximum)
    registers = accumulate(call, Engine.vector, reduce_cmd, dst, y, ALU["add"], initial, reduce_res)
    call.write("dst", dst, y)
    if reduce_res is not None:
        assert registers is not None
        call.write("reduce_res", reduce_res, registers)
    return call.record(Engine.vector, reduce_cmd=reduce_cmd)


# ---------------------------------------------------------------------------------------------------
# Operators


def is_unary(operator: AluOp) -> bool:
    """Whether the operator takes one input."""
    return operator.kind == "unary" or operator.name == "invert"


def binary_operator(call: Call, operand: str, op: Any) -> AluOp:
    """The two-input ALU operator that `op` names, usable on this generation."""
    found = alu(op)
    if found is None or is_unary(found) or found.name in ("bypass", "average"):
        allowed = listed(o.name for o in ALU.values() if not is_unary(o) and o.name not in ("bypass", "average"))
        call.refuse(operand, "operator", op_name(op), allowed, ALU_TABLE)
    if found.name in _GEN4_OPERATORS and call.hardware.generation < GEN4:
        call.refuse(operand, f"{found.name} on target", call.hardware.target, "trn3")
    return found


def require_integers(call: Call, **tiles: NkiTensor) -> None:
    """Refuse bit operators on tiles that are not integers of one width."""
    widths = {t.dtype.itemsize for t in tiles.values()}
    for operand, t in tiles.items():
        if t.dtype not in INTEGERS:
            call.refuse(operand, "dtype under a bit operator", t.dtype, ", ".join(INTEGERS), ALU_TABLE)
    if len(widths) > 1:
        received = ", ".join(f"{k} {t.dtype}" for k, t in tiles.items())
        call.refuse("dst", "widths under a bit operator", received, "one width: bits are not converted", ALU_TABLE)


def integer_arithmetic(operator: AluOp, x: Array, y: Array, dst: NkiTensor) -> Array:
    """32-bit integer arithmetic as the GpSimd Engine does it: exact, wrapping."""
    a, b = x.astype(np.int64), y.astype(np.int64)
    if operator.name == "power":
        if bool((b < 0).any()):
            raise NotImplementedError("tensor_tensor: power of integer tiles with a negative exponent")
        return np.power(a, b).astype(dst.dtype.numpy)
    return np.asarray(operator.function(a, b)).astype(np.int64).astype(dst.dtype.numpy)


def _read_bits(call: Call, operand: str, t: NkiTensor) -> Array:
    """An integer tile's bit patterns, unsigned, [P, F]: mixed signs must not promote to a wider type."""
    return call.read_2d(operand, t).view(np.dtype(f"u{t.dtype.itemsize}"))


def _apply(operator: AluOp, x: Array, y: Array | None, reverse: bool) -> Array:
    """`x` op `y`, or `y` op `x` where reversed; `y` is None under a unary operator."""
    if y is None:
        return operator.function(x)
    return operator.function(y, x) if reverse else operator.function(x, y)
