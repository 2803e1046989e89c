"""DMA: copies between HBM and SBUF, gathers and scatters, transposes, and copies that add."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import Array, cast, to_float32
from nkisim.hardware import GEN3
from nkisim.isa._call import Call, NkiInstruction, Where
from nkisim.isa._enums import dge_mode as DgeMode
from nkisim.isa._enums import engine as EngineKind
from nkisim.isa._enums import oob_mode as OobMode
from nkisim.memory import DMA_ABLE, MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

DGE_GUIDE = "NKI descriptor generation guide, NKI 0.6"


def dma_copy(
    dst: NkiTensor,
    src: NkiTensor,
    priority: int | None = None,
    oob_mode: Any = OobMode.error,
    dge_mode: Any = DgeMode.unknown,
    engine: Any = EngineKind.unknown,
    name: str | None = None,
) -> NkiInstruction:
    """dst = src between HBM and SBUF, row-major element by element; casts through float32.

    Spec: nki.isa.dma_copy, NKI 0.6. Engine: DMA. Raises `NkiError` on PSUM operands, unequal element
    counts, indices out of bounds (unless `oob_mode.skip`), a cast or gather under `hwdge`.
    """
    call = Call("dma_copy", name)
    _dma_operand(call, "dst", dst)
    _dma_operand(call, "src", src)
    if dst.size != src.size:
        call.refuse(
            "src", "number of elements", f"{src.size} {list(src.shape)}", f"{dst.size} {list(dst.shape)}, dst's"
        )
    mode = _descriptor_mode(call, dst, src, dge_mode, engine)
    check_priority(call, priority)
    skip = _skips(call, oob_mode)

    source = call.locate("src", src, skip)
    target = call.locate("dst", dst, skip)
    if source is not None and target is not None:
        values = _convert(call.read_at("src", src, source), src, dst, call)
        if source.valid is not None and not source.valid.all():
            _write_valid_rows(call, dst, target, values, source.valid)
        else:
            call.write_at("dst", dst, target, values)
    return call.record(Engine.dma, dge=mode.name, priority=priority, trigger=engine.name)


def _dma_operand(call: Call, operand: str, t: Any) -> None:
    """Buffer, type and partition range of a DMA operand; the start partition is free."""
    if not isinstance(t, NkiTensor):
        call.refuse(operand, "type", type(t).__name__, "NkiTensor")
    if t.buffer not in DMA_ABLE:
        call.refuse(operand, "buffer", t.buffer.name, "sbuf or HBM; DMA does not reach PSUM")
    if t.buffer is MemoryRegion.sbuf and t.shape[0] > call.hardware.partitions:
        call.refuse(operand, "partitions", t.shape[0], f"1..{call.hardware.partitions}")
    if t.dynamic is not None and t.dynamic.kind == "columns":
        call.refuse(operand, "tensor indirection", ".indirect() view", "vector_select or ap(vector_offset=...)")


def _descriptor_mode(call: Call, dst: NkiTensor, src: NkiTensor, mode: Any, engine: Any) -> DgeMode:
    """The descriptor generation mode in force, after its rules were checked."""
    if not isinstance(mode, DgeMode):
        call.refuse("dge_mode", "type", repr(mode), "a member of nki.isa.dge_mode")
    if not isinstance(engine, EngineKind):
        call.refuse("engine", "type", repr(engine), "a member of nki.isa.engine")
    vector = any(t.dynamic is not None and t.dynamic.kind == "vector" for t in (dst, src))
    scalar = any(t.dynamic is not None and t.dynamic.kind == "scalar" for t in (dst, src))
    if engine is not EngineKind.unknown:
        if engine not in (EngineKind.sync, EngineKind.scalar):
            call.refuse("engine", "trigger engine", engine.name, "sync or scalar")
        if mode is not DgeMode.hwdge:
            call.refuse("engine", "trigger engine with dge_mode", mode.name, "hwdge")
    if mode is DgeMode.hwdge:
        if call.hardware.generation < GEN3:
            call.refuse("dge_mode", "hwdge on target", call.hardware.target, "NeuronCore-v3 or newer", DGE_GUIDE)
        if src.dtype is not dst.dtype:
            call.refuse("dst", "dtype under hwdge", dst.dtype, f"{src.dtype}, the source's", DGE_GUIDE)
    if vector:
        if mode not in (DgeMode.unknown, DgeMode.swdge):
            call.refuse("dge_mode", "mode with vector_offset", mode.name, "swdge or unknown", DGE_GUIDE)
        return DgeMode.swdge
    if scalar and mode is DgeMode.none:
        call.refuse("dge_mode", "mode with scalar_offset", "none", "unknown, swdge or hwdge", DGE_GUIDE)
    return mode


def check_priority(call: Call, priority: Any) -> None:
    """Refuse a DMA priority that the generation does not have."""
    levels = call.hardware.dma_priorities
    if priority is None:
        return
    if not levels:
        call.refuse("priority", "target", call.hardware.target, "None before NeuronCore-v4")
    if not isinstance(priority, int) or isinstance(priority, bool) or not 0 <= priority < levels:
        call.refuse("priority", "value", priority, f"0..{levels - 1} or None")


def _skips(call: Call, mode: Any) -> bool:
    if not isinstance(mode, OobMode):
        call.refuse("oob_mode", "type", repr(mode), "a member of nki.isa.oob_mode")
    return mode is OobMode.skip


def _convert(values: Array, src: NkiTensor, dst: NkiTensor, call: Call) -> Array:
    if src.dtype is dst.dtype:
        return values
    if "packed" in (src.dtype.kind, dst.dtype.kind):
        call.refuse("dst", "cast of a packed type", f"{src.dtype} to {dst.dtype}", "equal types; .view() reinterprets")
    return cast(to_float32(values, src.dtype), dst.dtype, precise=call.core.precise)


def _write_valid_rows(call: Call, dst: NkiTensor, target: Where, values: Array, valid: Array) -> None:
    """Write the rows of a gather whose index was inside; the others keep what dst holds."""
    if dst.shape[0] != valid.size:
        call.refuse("dst", "partitions of a gather with oob_mode.skip", dst.shape[0], valid.size)
    rows = np.flatnonzero(valid)
    if rows.size == 0:
        return
    where = Where(dst.shape, dst.strides, target.offset)
    starts = target.starts if target.starts is not None else target.offset + np.arange(valid.size) * dst.strides[0]
    where.starts = starts
    where.valid = valid if target.valid is None else valid & target.valid
    call.write_at("dst", dst, where, values.reshape(dst.shape))
