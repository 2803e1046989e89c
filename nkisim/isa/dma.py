"""DMA between HBM and SBUF: copies, gathers and scatters, and sums on the way."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import Array, cast, to_float32
from nkisim.hardware import GEN3, source_of
from nkisim.isa._access import Where
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa._choices import check_flag
from nkisim.isa._enums import dge_mode as DgeMode
from nkisim.isa._enums import engine as EngineKind
from nkisim.isa._enums import oob_mode as OobMode
from nkisim.memory import DMA_ABLE, MemoryRegion
from nkisim.objects import VirtualRegister
from nkisim.operators import alu, op_name
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
    """Copy src to dst between HBM and SBUF, row-major element by element; casts through float32.

    Rows of a scatter are written in order, so that of equal indices the last one counts; the hardware's
    order is not documented.

    Spec: nki.isa.dma_copy, NKI 0.6. Engine: DMA. Raises `NkiError` on PSUM operands, unequal element
    counts, indices out of bounds (unless `oob_mode.skip`), a cast or gather under `hwdge`, a run-time
    address under `none`, a destination that names an element twice.
    """
    call = Call("dma_copy", name)
    check_operand(call, "dst", dst)
    check_operand(call, "src", src)
    if dst.size != src.size:
        received = f"{src.size} {list(src.shape)}"
        call.refuse("src", "number of elements", received, f"{dst.size} {list(dst.shape)}, dst's")
    if "packed" in (src.dtype.kind, dst.dtype.kind) and src.dtype is not dst.dtype:
        call.refuse("dst", "cast of a packed type", f"{src.dtype} to {dst.dtype}", "equal types; .view() reinterprets")
    mode = _descriptor_mode(call, dst, src, dge_mode, engine)
    check_priority(call, priority)
    skip = skips(call, oob_mode)

    source = call.locate("src", src, skip)
    target = call.locate("dst", dst, skip)
    moved, n_rows = 0, 0
    if source is not None and target is not None:
        values = call.read_at("src", src, source)
        if src.dtype is not dst.dtype:
            values = cast(to_float32(values, src.dtype), dst.dtype, precise=call.core.precise)
        moved, n_rows = _store(call, dst, target, values, source.valid, bits=src.dtype is dst.dtype)
    return call.record(
        Engine.dma,
        dge=mode,
        priority=priority,
        trigger=engine,
        rows_skipped=n_rows - moved,
        skipped=moved == 0,
    )


def _store(
    call: Call, dst: NkiTensor, target: Where, values: Array, valid: Array | None, *, bits: bool
) -> tuple[int, int]:
    """Write the rows whose indices are inside on both sides; returns how many, and of how many."""
    if target.valid is not None:
        if valid is not None:
            if valid.size != target.valid.size:
                call.refuse("src", "rows of a gather into a scatter", valid.size, f"{target.valid.size}, dst's")
            target.valid = target.valid & valid
        call.write_at("dst", dst, target, values.reshape(dst.shape), bits=bits)
        return int(target.valid.sum()), target.valid.size
    if valid is None or valid.all():
        call.write_at("dst", dst, target, values, bits=bits)
        n = 1 if valid is None else valid.size
        return n, n
    if dst.shape[0] == valid.size:
        # As a scatter to consecutive rows, so that the trace shows which ones.
        target.starts = target.offset + np.arange(valid.size) * dst.strides[0]
        target.valid = valid
        call.write_at("dst", dst, target, values.reshape(dst.shape), bits=bits)
    else:
        layout = (dst.shape[0], dst.free_size)
        mask = np.repeat(valid, dst.size // valid.size).reshape(layout)
        call.write_where("dst", dst, values.reshape(layout), mask, bits=bits, where=target)
    return int(valid.sum()), valid.size


def dma_compute(
    dst: NkiTensor,
    srcs: list[NkiTensor],
    reduce_op: Any,
    scales: list[float] | None = None,
    unique_indices: bool = True,
    oob_mode: Any = OobMode.error,
    name: str | None = None,
) -> NkiInstruction:
    """Sum up to 16 sources into dst in float32, or add rows to an indexed tensor (scatter-add) or back (gather-add).

    Spec: nki.isa.dma_compute, NKI 0.6. Engine: DMA. Raises `NkiError` on an operator other than nl.add,
    scales other than 1.0, unequal element counts, run-time addresses other than one vector_offset, and
    with a vector_offset on other than two sources, indices that repeat, sources that do not fit the mode.
    """
    call = Call("dma_compute", name)
    check_operand(call, "dst", dst)
    if not isinstance(srcs, (list, tuple)):
        call.refuse("srcs", "type", type(srcs).__name__, "a list of NkiTensor")
    limit = call.hardware.dma_compute_max_sources
    if not 1 <= len(srcs) <= limit:
        call.refuse("srcs", "number of sources", len(srcs), f"1..{limit}", source_of("dma_compute_max_sources"))
    for i, (operand, t) in enumerate([("dst", dst), *((f"srcs[{i}]", s) for i, s in enumerate(srcs))]):
        if i:
            check_operand(call, operand, t)
        if t.size != dst.size:
            call.refuse(operand, "number of elements", f"{t.size} {list(t.shape)}", f"{dst.size}, dst's")
        if t.dtype.kind == "packed":
            call.refuse(operand, "dtype", t.dtype, "a type of one number per element")
        if t.dynamic is not None and t.dynamic.kind == "scalar":
            call.refuse(operand, "run-time address", "scalar_offset", "a compile-time address or vector_offset")
    found = alu(reduce_op)
    if found is None or found.name != "add":
        call.refuse("reduce_op", "operator", op_name(reduce_op), "nl.add")
    _check_scales(call, scales, len(srcs))
    check_flag(call, "unique_indices", unique_indices)
    skip = skips(call, oob_mode)

    indexed = [i for i, s in enumerate(srcs) if s.dynamic is not None]
    if indexed or dst.dynamic is not None:
        return _add_indexed(call, dst, list(srcs), indexed, unique_indices, skip)
    if skip:
        call.refuse("oob_mode", "mode without vector_offset", "skip", "error: no address is known at run time only")
    total = to_float32(call.read("srcs[0]", srcs[0]), srcs[0].dtype).reshape(-1)
    for i, s in enumerate(srcs[1:], 1):
        total = total + to_float32(call.read(f"srcs[{i}]", s), s.dtype).reshape(-1)
    call.write("dst", dst, total)
    return call.record(Engine.dma, dge="none", op="add", mode="sum", rows_skipped=0, skipped=False)


def _add_indexed(
    call: Call, dst: NkiTensor, srcs: list[NkiTensor], indexed: list[int], unique_indices: bool, skip: bool
) -> NkiInstruction:
    """Read-modify-write with one vector_offset: `dst[index] += src`, or `dst += src[index]`."""
    if not unique_indices:
        call.refuse("unique_indices", "value with vector_offset", False, "True: repeated indices are not supported")
    if len(srcs) != 2:
        call.refuse("srcs", "number of sources with vector_offset", len(srcs), "2")
    if len(indexed) != 1:
        call.refuse("srcs", "sources with vector_offset", len(indexed), "1 of the 2")
    scatter = dst.dynamic is not None
    rows, other = srcs[indexed[0]], srcs[1 - indexed[0]]
    operand, same = f"srcs[{indexed[0]}]", rows if scatter else other
    if not _same_access(dst, same):
        at = indexed[0] if scatter else 1 - indexed[0]
        received = f"{same.dtype}{same.get_pattern()} at {same.offset} of {same.name}"
        call.refuse(f"srcs[{at}]", "source that is read and written", received, "the same view and indices as dst")
    data, data_operand = (other, f"srcs[{1 - indexed[0]}]") if scatter else (dst, "dst")
    if data.buffer is not MemoryRegion.sbuf:
        call.refuse(data_operand, "buffer beside an indexed tensor", data.buffer.name, "sbuf")

    where = call.locate(operand, rows, skip)
    assert where is not None
    assert where.starts is not None
    assert where.valid is not None
    starts = where.starts[where.valid]
    if np.unique(starts).size != starts.size:
        twice = int(starts[np.flatnonzero(np.bincount(np.unique(starts, return_inverse=True)[1]) > 1)[0]])
        call.refuse(operand, "repeated index under unique_indices=True", _index_of(rows, twice), "indices that differ")
    gathered = to_float32(call.read_at(operand, rows, where), rows.dtype).reshape(-1)
    total = to_float32(call.read(f"srcs[{1 - indexed[0]}]", other), other.dtype).reshape(-1) + gathered
    target = call.locate("dst", dst, skip)
    assert target is not None
    moved, n_rows = _store(call, dst, target, total, where.valid, bits=False)
    return call.record(
        Engine.dma,
        dge="swdge",
        op="add",
        mode="scatter" if scatter else "gather",
        rows_skipped=n_rows - moved,
        skipped=moved == 0,
    )


def _same_access(a: NkiTensor, b: NkiTensor) -> bool:
    """Whether two views name the same elements, run-time indices included."""
    if (a.storage, a.shape, a.strides, a.offset, a.dtype) != (b.storage, b.shape, b.strides, b.offset, b.dtype):
        return False
    if a.dynamic is None or b.dynamic is None:
        return a.dynamic is b.dynamic
    if isinstance(a.dynamic.index, VirtualRegister) or isinstance(b.dynamic.index, VirtualRegister):
        return False
    return a.dynamic.stride == b.dynamic.stride and _same_access(a.dynamic.index, b.dynamic.index)


def _index_of(t: NkiTensor, start: int) -> int:
    assert t.dynamic is not None
    return (start - t.offset) // t.dynamic.stride


def _check_scales(call: Call, scales: Any, n: int) -> None:
    if scales is None:
        return
    if not isinstance(scales, (list, tuple)) or len(scales) != n:
        call.refuse("scales", "number of scales", scales, f"None or {n} scales, one per source")
    for scale in scales:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale != 1.0:
            call.refuse("scales", "value", scale, "1.0")


# -- rules that the DMA instructions share


def check_operand(
    call: Call, operand: str, t: Any, buffers: tuple[MemoryRegion, ...] = DMA_ABLE, where: str = "sbuf or HBM"
) -> None:
    """Refuse what DMA does not reach. It has no rule for start partitions and none for free sizes."""
    if call.repeated:
        return
    if not isinstance(t, NkiTensor):
        call.refuse(operand, "type", type(t).__name__, "NkiTensor")
    if t.buffer not in buffers:
        call.refuse(operand, "buffer", t.buffer.name, where)
    if len(t.shape) > call.hardware.view_max_dims:
        limit = f"at most {call.hardware.view_max_dims}"
        call.refuse(operand, "dimensions", len(t.shape), limit, source_of("view_max_dims"))
    if t.buffer is MemoryRegion.sbuf and t.shape[0] > call.hardware.partitions:
        call.refuse(operand, "partitions", t.shape[0], f"1..{call.hardware.partitions}", source_of("partitions"))
    if t.dynamic is not None and t.dynamic.kind == "columns":
        call.refuse(operand, "tensor indirection", ".indirect() view", "vector_select or ap(vector_offset=...)")
    call.check_float8(operand, t)


def _descriptor_mode(call: Call, dst: NkiTensor, src: NkiTensor, mode: Any, engine: Any) -> DgeMode:
    """The descriptor generation mode in force, after its rules were checked."""
    check_mode(call, mode)
    if not isinstance(engine, EngineKind):
        call.refuse("engine", "type", repr(engine), "a member of nki.isa.engine")
    if engine is not EngineKind.unknown:
        if engine not in (EngineKind.sync, EngineKind.scalar):
            call.refuse("engine", "trigger engine", engine.name, "sync or scalar")
        if mode is not DgeMode.hwdge:
            call.refuse("engine", "trigger engine with dge_mode", mode.name, "hwdge")
    if mode is DgeMode.hwdge and src.dtype is not dst.dtype:
        call.refuse("dst", "dtype under hwdge", dst.dtype, f"{src.dtype}, the source's", DGE_GUIDE)
    kinds = [t.dynamic.kind for t in (dst, src) if t.dynamic is not None]
    if "vector" in kinds:
        # The guide's table asks NeuronCore-v3 for indirect use of swdge; its text asks that of transposes only, and
        # software descriptors are older than NeuronCore-v3 (A3), so gathers run on every generation here.
        if mode not in (DgeMode.unknown, DgeMode.swdge):
            call.refuse("dge_mode", "mode with vector_offset", mode.name, "swdge or unknown", DGE_GUIDE)
        return DgeMode.swdge
    assert isinstance(mode, DgeMode)
    # The guide's table allows any mode with scalar_offset, its text and the API only those that run on the device.
    if kinds and mode is DgeMode.none:
        call.refuse("dge_mode", "mode with scalar_offset", "none", "unknown, swdge or hwdge", DGE_GUIDE)
    return mode


def check_mode(call: Call, mode: Any) -> None:
    """Refuse what is no descriptor generation mode, or hwdge where there is no such block."""
    if not isinstance(mode, DgeMode):
        call.refuse("dge_mode", "type", repr(mode), "a member of nki.isa.dge_mode")
    if mode is DgeMode.hwdge and call.hardware.generation < GEN3:
        call.refuse("dge_mode", "hwdge on target", call.hardware.target, "NeuronCore-v3 or newer", DGE_GUIDE)


def check_priority(call: Call, priority: Any) -> None:
    """Refuse a DMA priority that the generation does not have."""
    levels = call.hardware.dma_priorities
    if priority is None:
        return
    if not levels:
        call.refuse("priority", "target", call.hardware.target, "None before NeuronCore-v4")
    if not isinstance(priority, int) or isinstance(priority, bool) or not 0 <= priority < levels:
        call.refuse("priority", "value", priority, f"0..{levels - 1} or None")


def skips(call: Call, mode: Any) -> bool:
    """Whether run-time indices outside the tensor are left out instead of refused."""
    if not isinstance(mode, OobMode):
        call.refuse("oob_mode", "type", repr(mode), "a member of nki.isa.oob_mode")
    return mode is OobMode.skip
