"""Scalar Engine: activation functions with scale, bias and a running reduction along the free dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from nkisim.dtypes import Array, float32, tfloat32
from nkisim.hardware import GEN3, GEN4
from nkisim.isa._accumulate import SCALAR_COMMANDS, accumulate, check_command, check_result
from nkisim.isa._call import COMPUTABLE, Call, NkiInstruction
from nkisim.isa._choices import check_flag
from nkisim.isa._enums import reduce_cmd as ReduceCmd
from nkisim.isa._indirection import check_indirection
from nkisim.operators import ACTIVATION_TABLE, ACTIVATIONS, ALU, AluOp, alu, listed, op_name, prelu
from nkisim.operators import activation as find_activation
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

BIAS_DTYPES = tuple(d for d in COMPUTABLE if d is not tfloat32)
ENGINE_SELECTION = "NKI engine selection for operators supported on multiple engines (NKI 0.6)"
_REDUCING = (ReduceCmd.reduce, ReduceCmd.reset_reduce)
# The (op0, op1) pairs of activate2.
STAGES = (
    ("multiply", "add"),
    ("multiply", "subtract"),
    ("multiply", "bypass"),
    ("add", "bypass"),
    ("subtract", "bypass"),
    ("bypass", "bypass"),
)


def activation(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: float | NkiTensor | None = None,
    scale: float | NkiTensor = 1.0,
    reduce_op: Any = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Any = ReduceCmd.idle,
    name: str | None = None,
) -> NkiInstruction:
    """Compute dst = op(data * scale + bias) in float32, and row sums in the engine's accumulator registers.

    `reduce_cmd` says whether the registers are reset and whether the row sums are added to them;
    `reduce_res` ([P, 1]) receives them afterwards.

    Spec: nki.isa.activation, NKI 0.6. Engine: Scalar. Raises `NkiError` on operators that are no
    activation function, on a constant bias before NeuronCore-v3 and any bias of a reciprocal there, on
    reductions other than nl.add, on registers that are read but were never reset.
    """
    call = Call("activation", name)
    return _activation(call, dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd)


def activation_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    reduce_op: Any,
    reduce_res: NkiTensor | None,
    bias: float | NkiTensor | None = None,
    scale: float | NkiTensor = 1.0,
    name: str | None = None,
) -> NkiInstruction:
    """`activation` with `reduce_cmd.reset_reduce`: dst = op(data * scale + bias), reduce_res = its row sums.

    Spec: nki.isa.activation_reduce, NKI 0.6. Engine: Scalar. Raises as `activation` does. The page asks
    for nl.add on NeuronCore-v2 only; `activation`, which it says it equals, takes nothing else anywhere.
    """
    call = Call("activation_reduce", name)
    return _activation(call, dst, op, data, bias, scale, reduce_op, reduce_res, ReduceCmd.reset_reduce)


def _activation(
    call: Call,
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: Any,
    scale: Any,
    reduce_op: Any,
    reduce_res: NkiTensor | None,
    command: ReduceCmd,
) -> NkiInstruction:
    _check_tiles(call, dst, data)
    function = find_activation(op)
    if function is None:
        call.refuse("op", "activation function", op_name(op), listed(ACTIVATIONS), ACTIVATION_TABLE)
    partitions = data.shape[0]
    if bias is not None and call.hardware.generation < GEN3:
        target = call.hardware.target
        if function.name == "reciprocal":
            call.refuse("bias", f"bias of nl.reciprocal on {target}", "a bias", "None", ENGINE_SELECTION)
        if not isinstance(bias, NkiTensor):
            call.refuse("bias", f"constant bias on {target}", bias, f"a [{partitions}, 1] tensor before NeuronCore-v3")
    check_command(call, command, SCALAR_COMMANDS)
    reduction = _reduction(call, reduce_op, (ALU["add"],), command)
    check_result(call, reduce_res, partitions)

    factor = None if type(scale) in (int, float) and scale == 1 else call.column("scale", scale, partitions)
    addend = None if bias is None else call.column("bias", bias, partitions, BIAS_DTYPES)
    x, owned = _read(call, data)
    if factor is not None:
        x, owned = np.multiply(x, factor, out=x if owned else None), True
    if addend is not None:
        x, owned = np.add(x, addend, out=x if owned else None), True
    y = function(x, x if owned else None)
    _finish(call, dst, y, command, reduction, reduce_res)
    return call.record(Engine.scalar, op=function.name, reduce_cmd=command)


def activate2(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    imm0: float | NkiTensor,
    imm1: float | NkiTensor,
    op0: Any,
    op1: Any,
    relu_param: float | NkiTensor = 0.0,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_op: Any = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: Any = ReduceCmd.idle,
    name: str | None = None,
) -> NkiInstruction:
    """Compute dst = op((data op0 imm0) op1 imm1) in float32, and reduce rows into the accumulator registers.

    `reverse0` and `reverse1` swap the sides of op0 and op1; nl.bypass leaves a step out. `relu_param` is
    the slope of nl.prelu for negative inputs.

    Spec: nki.isa.activate2, NKI 0.6. Engine: Scalar. Raises `NkiError` before NeuronCore-v4, on other
    (op0, op1) than the six documented pairs, on a reverse flag of a bypassed step, on immediates of
    different dtypes, on a `relu_param` that the function does not use.
    """
    call = Call("activate2", name)
    call.need_generation(GEN4)
    _check_tiles(call, dst, data)
    function = None if op_name(op) == "prelu" else find_activation(op)
    if function is None and op_name(op) != "prelu":
        call.refuse("op", "activation function", op_name(op), listed((*ACTIVATIONS, "prelu")), ACTIVATION_TABLE)
    first, second = _stages(call, op0, op1, reverse0, reverse1)
    if function is not None and (isinstance(relu_param, NkiTensor) or relu_param != 0):
        call.refuse("relu_param", f"parameter of nl.{function.name}", relu_param, "0.0; only nl.prelu has a parameter")
    if isinstance(imm0, NkiTensor) and isinstance(imm1, NkiTensor) and imm0.dtype is not imm1.dtype:
        call.refuse("imm1", "dtype", imm1.dtype, f"{imm0.dtype}, that of imm0")
    check_command(call, reduce_cmd, SCALAR_COMMANDS)
    reduction = _reduction(call, reduce_op, ACTIVATE2_REDUCTIONS, reduce_cmd)
    if reduce_cmd is ReduceCmd.reset and reduction is None:
        call.refuse("reduce_op", "operator under reset", "None", "the operator whose identity the registers are set to")
    check_result(call, reduce_res, data.shape[0])

    operand0 = _immediate(call, "imm0", imm0, data.shape[0], first is not None)
    operand1 = _immediate(call, "imm1", imm1, data.shape[0], second is not None)
    x, owned = _read(call, data)
    for step, operand, swapped in ((first, operand0, reverse0), (second, operand1, reverse1)):
        if step is not None:
            sides = (operand, x) if swapped else (x, operand)
            x, owned = step(*sides, out=x if owned else None), True
    if function is None:
        y = prelu(x, call.column("relu_param", relu_param, data.shape[0], COMPUTABLE))
    else:
        y = function(x, x if owned else None)
    _finish(call, dst, y, reduce_cmd, reduction, reduce_res)
    return call.record(Engine.scalar, op=op_name(op), reduce_cmd=reduce_cmd, op0=op_name(op0), op1=op_name(op1))


def _check_tiles(call: Call, dst: NkiTensor, data: NkiTensor) -> None:
    call.tile("dst", dst, indirect=True)
    call.tile("data", data, indirect=True)
    call.same_layout("dst", dst, "data", data)
    check_indirection(call, dst, "data", data, Engine.scalar)


def _read(call: Call, data: NkiTensor) -> tuple[Array, bool]:
    """The input as float32 [P, F], and whether it is a copy that may be overwritten."""
    stored = call.read_2d("data", data)
    if stored.dtype == float32.numpy:
        return stored, False
    return stored.astype(np.float32), True


def _reduction(call: Call, reduce_op: Any, allowed: tuple[AluOp, ...], command: ReduceCmd) -> AluOp | None:
    """The reduction that `reduce_op` names, or None where the command needs none."""
    if reduce_op is None:
        if command in _REDUCING:
            call.refuse("reduce_op", f"operator under {command.name}", "None", listed(a.name for a in allowed))
        return None
    found = alu(reduce_op)
    for candidate in allowed:
        if found is not None and found.name == candidate.name:
            return candidate
    call.refuse("reduce_op", "operator", op_name(reduce_op), listed(a.name for a in allowed))


def _finish(
    call: Call, dst: NkiTensor, y: Array, command: ReduceCmd, reduction: AluOp | None, reduce_res: NkiTensor | None
) -> None:
    """Accumulate `y` and write dst and the registers; reduce_res may alias dst and is written last.

    The documentation leaves open whether the sum is of the float32 results or of dst's rounded ones; the
    engine casts on its way out, so it is taken to be of the float32 results.
    """
    if command is ReduceCmd.idle and reduce_res is None:
        call.write("dst", dst, y)
        return
    registers = accumulate(call, Engine.scalar, command, dst, y, reduction, result=reduce_res)
    call.write("dst", dst, y)
    if reduce_res is not None:
        assert registers is not None
        call.write("reduce_res", reduce_res, registers)


def _stages(
    call: Call, op0: Any, op1: Any, reverse0: bool, reverse1: bool
) -> tuple[Callable[..., Array] | None, Callable[..., Array] | None]:
    """The two tensor-scalar steps of activate2; None for a bypassed one."""
    names = (op_name(op0), op_name(op1))
    if names not in STAGES:
        call.refuse(
            "op0",
            "operators (op0, op1)",
            f"({names[0]}, {names[1]})",
            ", ".join(f"(nl.{a}, nl.{b})" for a, b in STAGES),
        )
    for operand, flag, step in (("reverse0", reverse0, names[0]), ("reverse1", reverse1, names[1])):
        check_flag(call, operand, flag)
        if flag and step == "bypass":
            call.refuse(operand, "reversal of a bypassed operator", "True", "False")
    first, second = (None if n == "bypass" else ALU[n].function for n in names)
    return first, second


def _immediate(call: Call, operand: str, value: Any, partitions: int, used: bool) -> Array | None:
    """An immediate of activate2; one whose step is bypassed is checked but not read."""
    if used or not isinstance(value, NkiTensor):
        return call.column(operand, value, partitions, COMPUTABLE)
    t = call.tile(operand, value)
    if t.shape[0] != partitions or t.free_size != 1:
        call.refuse(operand, "shape", list(t.shape), f"[{partitions}, 1]")
    return None


def _reduce_by_magnitude(pick: Callable[..., Array]) -> Callable[..., Array]:
    """Signed element of the extreme magnitude of each row; of equals the last, as the two-operand form returns y."""

    def reduce(x: Array, axis: int) -> Array:
        assert axis == 1
        at = x.shape[1] - 1 - pick(np.abs(x[:, ::-1]), axis=1)
        return np.asarray(x[np.arange(x.shape[0]), at])

    return reduce


ACTIVATE2_REDUCTIONS = (
    ALU["add"],
    ALU["maximum"],
    ALU["minimum"],
    replace(ALU["abs_max"], identity=0.0, reduce=_reduce_by_magnitude(np.argmax)),
    replace(ALU["abs_min"], identity=np.inf, reduce=_reduce_by_magnitude(np.argmin)),
)
