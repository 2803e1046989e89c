"""Vector Engine: reductions, running results and statistics along the free dimensions."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from nkisim.dtypes import (
    Array,
    bfloat16,
    float8_e4m3,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    int8,
    int16,
    uint8,
    uint16,
)
from nkisim.hardware import GEN2, GEN4, source_of
from nkisim.isa._accumulate import accumulate, check_command, check_result, start_values, store_registers
from nkisim.isa._call import COMPUTABLE, Call, NkiInstruction
from nkisim.isa._choices import check_flag
from nkisim.isa._enums import reduce_cmd as ReduceCmd
from nkisim.isa._indirection import check_indirection
from nkisim.isa.vector_elementwise import arithmetic_operator, is_unary, require_integers
from nkisim.memory import MemoryRegion
from nkisim.operators import ALU, ALU_TABLE, AluOp, alu, listed, op_name
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

CHAIN_COMMANDS = (ReduceCmd.reset_reduce, ReduceCmd.reduce, ReduceCmd.load_reduce)
_REDUCE_OPS = ("add", "multiply", "maximum", "minimum")
_CUMULATIVE_OPS = ("add", "subtract", "multiply", "maximum", "minimum")
_CUMULATIVE_DTYPES = (
    *(bfloat16, float16, float32, float8_e4m3, float8_e4m3fn, float8_e5m2),
    *(uint8, uint16, int8, int16),
)
_COMMUTATIVE = {"add": np.add, "multiply": np.multiply, "maximum": np.maximum, "minimum": np.minimum}
# One-input operators of the Vector Engine and the generation that brought them; rsqrt runs elsewhere.
_UNARY = {"abs": GEN2, "reciprocal": GEN2, "square": GEN4, "relu": GEN4}
_STATISTICS = 6  # bn_stats: count, mean and variance * count of the even elements, then of the odd ones
_TRIPLE = 3


def tensor_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """Reduce the last free dimensions of data by `op`, in float32 (bit operators: on the stored bits).

    Spec: nki.isa.tensor_reduce, NKI 0.6. Engine: Vector. Raises `NkiError` where `axis` is not a run of
    dimensions that ends at the last one, names the partition dimension or is negative, where dst does not
    hold one element per reduced group, on operators that are no reduction, on `negate` with a bit operator.
    """
    call = Call("tensor_reduce", name)
    call.tile("dst", dst, indirect=True)
    call.tile("data", data, indirect=True)
    operator = _reduction(call, op)
    kept = _kept_dims(call, data, axis)
    groups = prod(data.shape[1:kept])
    if dst.shape[0] != data.shape[0]:
        call.refuse("dst", "partitions", dst.shape[0], f"{data.shape[0]}, those of data")
    if dst.free_size != groups:
        # keepdims says how the result's shape is written; only the number of elements reaches the engine.
        call.refuse("dst", "elements per partition", dst.free_size, f"{groups}, what the reduction of data leaves")
    check_flag(call, "negate", negate)
    check_flag(call, "keepdims", keepdims)
    if operator.is_bitvec:
        require_integers(call, dst=dst, data=data)
        if negate:
            call.refuse("negate", "operator", operator.name, "an arithmetic operator")
    check_indirection(call, dst, "data", data, Engine.vector)

    assert operator.reduce is not None
    x = call.read_2d("data", data) if operator.is_bitvec else call.read_f32("data", data)
    y = operator.reduce(x.reshape(x.shape[0], groups, -1), axis=2)
    if operator.is_bitvec:
        call.write("dst", dst, y.view(dst.dtype.numpy), bits=True)
    else:
        call.write("dst", dst, -y if negate else y)
    return call.record(Engine.vector, op=operator.name, negate=negate, keepdims=keepdims)


def tensor_scalar_reduce(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: float | NkiTensor,
    reduce_op: Any,
    reduce_res: NkiTensor | None = None,
    reverse0: bool = False,
    reduce_cmd: Any = ReduceCmd.reset_reduce,
    reduce_init: float | NkiTensor | None = None,
    reduce_res_negate: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """Compute dst = data op0 operand0, and reduce each row of it by reduce_op into the accumulator registers.

    The row is reduced in float32, before dst is rounded; reduce_res, if given, gets the registers.
    Spec: nki.isa.tensor_scalar_reduce, NKI 0.6. Engine: Vector. Raises `NkiError` on `reverse0`, on bit
    operators, on a `reduce_op` other than add, multiply, maximum and minimum, on `reduce_init` without
    `load_reduce` or the reverse.
    """
    call = Call("tensor_scalar_reduce", name)
    call.tile("dst", dst, indirect=True)
    call.tile("data", data, indirect=True)
    call.same_layout("dst", dst, "data", data)
    check_flag(call, "reverse0", reverse0)
    if reverse0:
        call.refuse("reverse0", "value", True, "False: the instruction does not support it yet")
    operator = _first_operator(call, op0, operand0)
    reduction = one_of(call, "reduce_op", reduce_op, _REDUCE_OPS)
    check_command(call, reduce_cmd, CHAIN_COMMANDS)
    check_result(call, reduce_res, data.shape[0])
    check_flag(call, "reduce_res_negate", reduce_res_negate)
    if reduce_res_negate and reduce_res is None:
        call.refuse("reduce_res_negate", "reduce_res", None, "a tile to write the negated result to")
    check_indirection(call, dst, "data", data, Engine.vector)
    initial = _initial(call, "reduce_init", reduce_init, reduce_cmd, data.shape[0])
    scalar = None if is_unary(operator) else call.column("operand0", operand0, data.shape[0])

    x = call.read_f32("data", data)
    y = operator.function(x) if scalar is None else operator.function(x, scalar)
    registers = accumulate(call, Engine.vector, reduce_cmd, dst, y, reduction, initial, reduce_res)
    call.write("dst", dst, y)
    if reduce_res is not None:
        assert registers is not None
        call.write("reduce_res", reduce_res, -registers if reduce_res_negate else registers)
    return call.record(
        Engine.vector,
        op0=operator.name,
        reduce_op=reduction.name,
        reduce_cmd=reduce_cmd,
        reduce_res_negate=reduce_res_negate,
    )


def tensor_scalar_cumulative(
    dst: NkiTensor,
    src: NkiTensor,
    op0: Any,
    op1: Any,
    imm0: float | NkiTensor,
    imm1: float | NkiTensor | None = None,
    reduce_cmd: Any = ReduceCmd.reset_reduce,
    name: str | None = None,
) -> NkiInstruction:
    """Running result dst[:, i] = r_i = (src[:, i] op0 imm0) op1 r_(i-1), in float32 along the row.

    The last r stays in the accumulator registers. Spec: nki.isa.tensor_scalar_cumulative, NKI 0.6.
    Engine: Vector. Raises `NkiError` on 32-bit integers, on an op1 other than add, subtract, multiply,
    maximum and minimum, on `imm1` without `load_reduce` or the reverse. The page's pseudo-code has a
    `reverse0` that the signature has not; it does not exist here.
    """
    call = Call("tensor_scalar_cumulative", name)
    call.tile("dst", dst, dtypes=_CUMULATIVE_DTYPES, indirect=True)
    call.tile("src", src, dtypes=_CUMULATIVE_DTYPES, indirect=True)
    call.same_layout("dst", dst, "src", src)
    first = arithmetic_operator(call, "op0", op0)
    running = one_of(call, "op1", op1, _CUMULATIVE_OPS)
    check_command(call, reduce_cmd, CHAIN_COMMANDS)
    check_indirection(call, dst, "src", src, Engine.vector)
    scalar = call.column("imm0", imm0, src.shape[0])
    initial = _initial(call, "imm1", imm1, reduce_cmd, src.shape[0])

    start = start_values(call, Engine.vector, reduce_cmd, dst, running, initial)
    x = first.function(call.read_f32("src", src), scalar)
    if running.name in _COMMUTATIVE:
        y = _COMMUTATIVE[running.name].accumulate(np.concatenate((start, x), axis=1), axis=1)[:, 1:]
    else:
        y = np.empty_like(x)
        r = start[:, 0]
        for i in range(x.shape[1]):
            r = running.function(x[:, i], r)
            y[:, i] = r
    store_registers(call, Engine.vector, dst, y[:, -1:])
    call.write("dst", dst, y)
    return call.record(Engine.vector, op0=first.name, op1=running.name, reduce_cmd=reduce_cmd)


def tensor_tensor_scan(
    dst: NkiTensor,
    data0: NkiTensor,
    data1: NkiTensor,
    initial: float | NkiTensor,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> NkiInstruction:
    """Running result dst[:, i] = r_i = (data0[:, i] op0 r_(i-1)) op1 data1[:, i] in float32, r_(-1) = initial.

    Spec: nki.isa.tensor_tensor_scan, NKI 0.6. Engine: Vector. Raises `NkiError` where both inputs are in
    PSUM, on unequal partitions or free sizes, on operators that are not arithmetic ones of two inputs.
    """
    call = Call("tensor_tensor_scan", name)
    call.tile("dst", dst)
    call.tile("data0", data0)
    call.tile("data1", data1)
    call.same_layout("dst", dst, "data0", data0)
    call.same_layout("dst", dst, "data1", data1)
    if data0.buffer is MemoryRegion.psum and data1.buffer is MemoryRegion.psum:
        call.refuse("data1", "buffer", "psum for both inputs", "at most one input in PSUM")
    first = arithmetic_operator(call, "op0", op0)
    second = arithmetic_operator(call, "op1", op1)
    check_flag(call, "reverse0", reverse0)
    check_flag(call, "reverse1", reverse1)
    start = call.column("initial", initial, data0.shape[0], dtypes=COMPUTABLE)

    x0, x1 = call.read_f32("data0", data0), call.read_f32("data1", data1)
    state = np.broadcast_to(start.reshape(-1), (x0.shape[0],))
    if first.name == second.name and first.name in _COMMUTATIVE:
        y = _interleaved_scan(_COMMUTATIVE[first.name], x0, x1, state)
    else:
        y = _scan(first, second, x0, x1, state, reverse0, reverse1)
    call.write("dst", dst, y)
    return call.record(Engine.vector, op0=first.name, op1=second.name)


def _scan(first: AluOp, second: AluOp, x0: Array, x1: Array, state: Array, reverse0: bool, reverse1: bool) -> Array:
    """The recurrence step by step: one step for all partitions at a time."""
    columns0, columns1 = np.ascontiguousarray(x0.T), np.ascontiguousarray(x1.T)
    y: Array = np.empty(columns0.shape, np.float32)
    f, g = first.function, second.function
    for i in range(y.shape[0]):
        state = f(state, columns0[i]) if reverse0 else f(columns0[i], state)
        state = g(columns1[i], state) if reverse1 else g(state, columns1[i])
        y[i] = state
    return y.T


def _interleaved_scan(ufunc: Any, x0: Array, x1: Array, state: Array) -> Array:
    """The recurrence where both operators are one commutative ufunc: one accumulation of state, x0, x1, x0, ..."""
    terms = np.empty((x0.shape[0], 2 * x0.shape[1] + 1), np.float32)
    terms[:, 0] = state
    terms[:, 1::2] = x0
    terms[:, 2::2] = x1
    result: Array = ufunc.accumulate(terms, axis=1)[:, 2::2]
    return result


def bn_stats(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> NkiInstruction:
    """Count, mean and variance * count of the even elements of each row, then of the odd ones, in float32.

    Spec: nki.isa.bn_stats, NKI 0.6. Engine: Vector. Raises `NkiError` on more than 512 elements per
    partition and where dst does not hold 6. A row without odd elements gets zeros for them.
    """
    call = Call("bn_stats", name)
    call.tile("dst", dst)
    call.tile("data", data)
    limit = call.hardware.bn_stats_fmax
    if data.free_size > limit:
        call.refuse("data", "elements per partition", data.free_size, f"1..{limit}", source_of("bn_stats_fmax"))
    _columns_of(call, dst, data, _STATISTICS)

    x = call.read_f32("data", data)
    y = np.zeros((x.shape[0], _STATISTICS), np.float32)
    for parity in (0, 1):
        half = x[:, parity::2]
        if half.shape[1]:
            mean = half.mean(axis=1, keepdims=True)
            y[:, _TRIPLE * parity] = half.shape[1]
            y[:, _TRIPLE * parity + 1] = mean[:, 0]
            y[:, _TRIPLE * parity + 2] = np.square(half - mean).sum(axis=1)
    call.write("dst", dst, y)
    return call.record(Engine.vector)


def bn_aggr(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> NkiInstruction:
    """Mean and variance of the rows that the (count, mean, variance * count) triples in data describe.

    Spec: nki.isa.bn_aggr, NKI 0.6. Engine: Vector. Raises `NkiError` where data's elements per partition
    are no multiple of 3 and where dst does not hold 2.
    """
    call = Call("bn_aggr", name)
    call.tile("dst", dst)
    call.tile("data", data)
    if data.free_size % _TRIPLE:
        call.refuse("data", "elements per partition", data.free_size, f"a multiple of {_TRIPLE}")
    _columns_of(call, dst, data, 2)

    triples = call.read_f32("data", data).reshape(data.shape[0], -1, _TRIPLE)
    count, mean, scatter = triples[..., 0], triples[..., 1], triples[..., 2]
    total = count.sum(axis=1, keepdims=True)
    overall = (count * mean).sum(axis=1, keepdims=True) / total
    variance = (scatter + count * np.square(mean - overall)).sum(axis=1, keepdims=True) / total
    call.write("dst", dst, np.concatenate((overall, variance), axis=1))
    return call.record(Engine.vector)


def one_of(call: Call, operand: str, op: Any, names: tuple[str, ...]) -> AluOp:
    """The operator that `op` names, which must be one of `names`."""
    found = alu(op)
    if found is None or found.name not in names:
        call.refuse(operand, "operator", op_name(op), listed(names))
    return found


def _reduction(call: Call, op: Any) -> AluOp:
    found = alu(op)
    if found is None or not found.is_reduction:
        call.refuse("op", "operator", op_name(op), listed(o.name for o in ALU.values() if o.is_reduction), ALU_TABLE)
    return found


def _first_operator(call: Call, op0: Any, operand0: Any) -> AluOp:
    """The operator of `data op0 operand0`; one with a single input takes operand0 None or 0."""
    found = alu(op0)
    if found is None or not is_unary(found):
        return arithmetic_operator(call, "op0", op0)
    if found.name not in _UNARY:
        call.refuse("op0", f"{found.name} on the Vector Engine", found.name, ", ".join(_UNARY), ALU_TABLE)
    if call.hardware.generation < _UNARY[found.name]:
        call.refuse("op0", f"{found.name} on target", call.hardware.target, "trn3", ALU_TABLE)
    number = isinstance(operand0, (int, float, np.number)) and not isinstance(operand0, bool)
    if operand0 is not None and not (number and operand0 == 0):
        call.refuse("operand0", f"operand of unary {found.name}", repr(operand0), "None or 0")
    return found


def _kept_dims(call: Call, data: NkiTensor, axis: Any) -> int:
    """How many leading dimensions `axis` leaves."""
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not given or any(isinstance(a, bool) or not isinstance(a, (int, np.integer)) for a in given):
        call.refuse("axis", "type", repr(axis), "an int or a tuple or list of ints")
    axes = sorted(int(a) for a in given)
    if 0 in axes:
        call.refuse("axis", "partition axis", axis, "free dimensions; nc_transpose or nc_matmul reduce partitions")
    rank = len(data.shape)
    if axes != list(range(axes[0], rank)):
        # Negative numbers end here too: the page lists the valid values, and they are not among them.
        allowed = " or ".join(str(tuple(range(first, rank))) for first in range(rank - 1, 0, -1))
        call.refuse("axis", "reduced dimensions", axis, allowed)
    return axes[0]


def _initial(call: Call, operand: str, value: Any, command: ReduceCmd, partitions: int) -> Array | None:
    """The float32 start value of `load_reduce`, which alone takes and needs one."""
    if (value is not None) != (command is ReduceCmd.load_reduce):
        received = "None" if value is None else "a value"
        allowed = "a value" if value is None else "None unless reduce_cmd is load_reduce"
        call.refuse(operand, f"start value under {command.name}", received, allowed)
    return None if value is None else call.column(operand, value, partitions)


def _columns_of(call: Call, dst: NkiTensor, data: NkiTensor, count: int) -> None:
    """Refuse a dst that is not `count` elements for each of data's partitions."""
    if dst.shape[0] != data.shape[0]:
        call.refuse("dst", "partitions", dst.shape[0], f"{data.shape[0]}, those of data")
    if dst.free_size != count:
        call.refuse("dst", "elements per partition", dst.free_size, count)
