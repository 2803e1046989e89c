"""Accumulator registers that `reduce_cmd` addresses: one float32 per lane in the Vector and in the Scalar Engine.

Usage, in an instruction whose result of shape [P, F] is `y` (float32, before rounding to dst's dtype):

    check_command(call, reduce_cmd, VECTOR_COMMANDS)                    # with the other legality checks
    check_result(call, reduce_res, dst.shape[0], dtypes)
    ...
    registers = accumulate(call, Engine.vector, reduce_cmd, dst, y, ALU["add"], result=reduce_res)
    call.write("dst", dst, y)
    if reduce_res is not None:
        call.write("reduce_res", reduce_res, registers)

An instruction with a running result (a scan) calls `start_values` and `store_registers` instead.

The registers of an engine are shared by all its instructions with a `reduce_cmd`. Lane p of them belongs to
partition p of dst. A lane is undefined until a reset or a load. `idle` leaves the Scalar Engine's registers alone,
and may clobber the Vector Engine's, which are undefined from then on. Results count once: the pseudo code of
nki.isa.activation, which adds the registers to a sum that holds them already, is read as meaning that.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from nkisim.dtypes import Array, DType
from nkisim.isa._call import COMPUTABLE, Call
from nkisim.isa._enums import reduce_cmd as ReduceCmd
from nkisim.machine import Registers
from nkisim.operators import AluOp
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

VECTOR_COMMANDS = (ReduceCmd.idle, ReduceCmd.reset_reduce, ReduceCmd.reduce, ReduceCmd.load_reduce)
SCALAR_COMMANDS = (ReduceCmd.idle, ReduceCmd.reset, ReduceCmd.reduce, ReduceCmd.reset_reduce)


def check_command(call: Call, command: Any, allowed: tuple[ReduceCmd, ...]) -> None:
    """Refuse a `reduce_cmd` argument that the instruction does not take."""
    if not isinstance(command, ReduceCmd):
        call.refuse("reduce_cmd", "type", repr(command), "a member of nki.isa.reduce_cmd")
    if command not in allowed:
        call.refuse("reduce_cmd", "value", command.name, ", ".join(c.name for c in allowed))


def check_result(
    call: Call, reduce_res: Any, partitions: int, dtypes: tuple[DType, ...] = COMPUTABLE, operand: str = "reduce_res"
) -> None:
    """Refuse a `reduce_res` argument that is neither None nor a tile of shape [partitions, 1]."""
    if reduce_res is None:
        return
    t = call.tile(operand, reduce_res, dtypes=dtypes)
    if t.shape[0] != partitions or t.free_size != 1:
        call.refuse(operand, "shape", list(t.shape), f"[{partitions}, 1]")


def accumulate(
    call: Call,
    engine: Engine,
    command: ReduceCmd,
    dst: NkiTensor,
    values: Array,
    reduce: AluOp | None,
    initial: Array | float | None = None,
    result: NkiTensor | None = None,
) -> Array | None:
    """Do what `command` says to the lanes of `dst` and return their registers afterwards, shape [P, 1].

    Args:
        call: the running instruction.
        engine: whose registers, `Engine.vector` or `Engine.scalar`.
        command: the checked `reduce_cmd`.
        dst: the destination; its partitions are the lanes.
        values: float32 [P, F], what the instruction computed; unused by `idle` and `reset`.
        reduce: the reduction; its identity is what a reset stores (0 without a reduction).
        initial: what `load_reduce` loads, a number or [P, 1].
        result: the tile the registers are read out to, if any.

    Returns None where the registers are undefined; they are not when `result` is given.

    Raises:
        NkiError: registers that were never reset are accumulated on or read out to `result`.
    """
    if command is ReduceCmd.idle:
        if engine is Engine.vector:
            call.core.accumulators.vector = None
        held = _held(call, engine, dst)
        if held is None and result is not None:
            _refuse_undefined(call, "reduce_res", command)
        return held
    start = start_values(call, engine, command, dst, reduce, initial)
    if command is not ReduceCmd.reset:
        assert reduce is not None
        assert reduce.reduce is not None
        start = reduce.function(start, reduce.reduce(values, axis=1).reshape(-1, 1))
    return store_registers(call, engine, dst, start)


def start_values(
    call: Call,
    engine: Engine,
    command: ReduceCmd,
    dst: NkiTensor,
    reduce: AluOp | None,
    initial: Array | float | None = None,
) -> Array:
    """What the lanes of `dst` hold when accumulation starts, float32 [P, 1]; not for `idle`.

    Raises:
        NkiError: `reduce` on lanes that are undefined.
    """
    shape = (dst.shape[0], 1)
    if command in (ReduceCmd.reset, ReduceCmd.reset_reduce):
        identity = reduce.identity if reduce is not None and reduce.identity is not None else 0.0
        return np.full(shape, identity, np.float32)
    if command is ReduceCmd.load_reduce:
        assert initial is not None
        return np.broadcast_to(np.asarray(initial, np.float32), shape).copy()
    held = _held(call, engine, dst)
    if held is None:
        _refuse_undefined(call, "reduce_cmd", command)
    return held


def store_registers(call: Call, engine: Engine, dst: NkiTensor, values: Array) -> Array:
    """Put `values`, one per lane of `dst`, into the registers; returns them as float32 [P, 1]."""
    known = _registers(call, engine)
    if known is None:
        n = call.hardware.partitions
        known = Registers(np.zeros(n, np.float32), np.zeros(n, np.bool_))
        if engine is Engine.vector:
            call.core.accumulators.vector = known
        else:
            call.core.accumulators.scalar = known
    column = np.asarray(values, np.float32).reshape(-1, 1)
    lanes = _lanes(dst)
    known.values[lanes] = column[:, 0]
    known.defined[lanes] = True
    return column


def _registers(call: Call, engine: Engine) -> Registers | None:
    return call.core.accumulators.vector if engine is Engine.vector else call.core.accumulators.scalar


def _held(call: Call, engine: Engine, dst: NkiTensor) -> Array | None:
    """A copy of what the lanes of `dst` hold, float32 [P, 1], or None where one is undefined."""
    known = _registers(call, engine)
    lanes = _lanes(dst)
    if known is None or not known.defined[lanes].all():
        return None
    return known.values[lanes].reshape(-1, 1).copy()


def _lanes(dst: NkiTensor) -> slice:
    return slice(dst.start_partition, dst.start_partition + dst.shape[0])


def _refuse_undefined(call: Call, operand: str, command: ReduceCmd) -> NoReturn:
    if command is ReduceCmd.idle:
        received = "reduce_cmd is idle (its default), so nothing is accumulated, and the registers were not before"
        call.refuse(operand, "undefined accumulator registers", received, "reduce_cmd=reset_reduce, or reduce")
    call.refuse(
        operand,
        "undefined accumulator registers",
        f"{command.name} on lanes that were never reset, or were clobbered by idle",
        "reset_reduce (or load_reduce) earlier, with no idle instruction in between on the Vector Engine",
    )
