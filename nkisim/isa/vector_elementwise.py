"""Vector Engine: element-wise instructions on tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import INTEGERS, Array, int32, uint32
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa._enums import engine as EngineKind
from nkisim.memory import MemoryRegion
from nkisim.operators import ALU_TABLE, AluOp, alu, op_name
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

_INT32 = (int32, uint32)


def tensor_tensor(
    dst: NkiTensor,
    data1: NkiTensor,
    data2: NkiTensor,
    op: Any,
    engine: Any = EngineKind.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """dst = data1 op data2, element by element in float32 (integers: bit operators, or exact on GpSimd).

    Spec: nki.isa.tensor_tensor, NKI 0.6. Engine: Vector or GpSimd. Raises `NkiError` where both inputs
    are in PSUM, on unequal partitions or free sizes, on bit operators with non-integer tiles.
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
    tiles = (dst, data1, data2)
    in_psum = any(t.buffer is MemoryRegion.psum for t in tiles)
    exact = all(t.dtype in _INT32 for t in tiles)
    chosen = _engine(call, operator, engine, in_psum, exact)

    if operator.is_bitvec:
        require_integers(call, dst=dst, data1=data1, data2=data2)
        y = operator.function(call.read_2d("data1", data1), call.read_2d("data2", data2))
    elif exact and chosen is Engine.gpsimd:
        y = integer_arithmetic(operator, call.read_2d("data1", data1), call.read_2d("data2", data2), dst)
    else:
        with np.errstate(all="ignore"):
            y = operator.function(call.read_f32("data1", data1), call.read_f32("data2", data2))
    call.write("dst", dst, y)
    return call.record(chosen, op=operator.name)


def _engine(call: Call, operator: AluOp, engine: Any, in_psum: bool, exact: bool) -> Engine:
    if not isinstance(engine, EngineKind):
        call.refuse("engine", "type", repr(engine), "a member of nki.isa.engine")
    if engine not in (EngineKind.unknown, EngineKind.vector, EngineKind.gpsimd):
        call.refuse("engine", "value", engine.name, "vector, gpsimd or unknown")
    if operator.name == "power":
        if engine is EngineKind.vector:
            call.refuse("engine", "engine of nl.power", "vector", "gpsimd or unknown", ALU_TABLE)
        engine = Engine.gpsimd
    if engine is EngineKind.unknown:
        engine = Engine.gpsimd if exact and not in_psum and not operator.is_bitvec else Engine.vector
    if engine is Engine.gpsimd and in_psum:
        call.refuse("engine", "GpSimd Engine and PSUM", "an operand in psum", "operands in sbuf")
    if engine is Engine.gpsimd and operator.is_bitvec:
        call.refuse("engine", "engine of a bit operator", "gpsimd", "vector or unknown", ALU_TABLE)
    return engine


def binary_operator(call: Call, operand: str, op: Any) -> AluOp:
    """The two-input ALU operator that `op` names, usable on this generation."""
    found = alu(op)
    if found is None or found.kind == "unary" or found.name in ("bypass", "average", "invert"):
        call.refuse(operand, "operator", op_name(op), "a binary nki.language operator", ALU_TABLE)
    if found.name in ("abs_max", "abs_min"):
        call.require(call.hardware.generation >= 4, operand, f"{found.name} on target", call.hardware.target, "trn3")
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
    wide = operator.function(x.astype(np.int64), y.astype(np.int64))
    return np.asarray(wide).astype(np.int64).astype(dst.dtype.numpy)
