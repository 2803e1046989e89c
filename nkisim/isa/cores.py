"""Instructions between the two cores of a launch on `kernel[2]`."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.hardware import GEN3, source_of
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa._enums import dma_engine as DmaEngine
from nkisim.isa._enums import engine as EngineKind
from nkisim.isa._races import forget_accesses
from nkisim.isa.dma import check_operand
from nkisim.memory import SBUF, MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

CORES = (0, 1)


def sendrecv(
    src: NkiTensor,
    dst: NkiTensor,
    send_to_rank: Any,
    recv_from_rank: Any,
    pipe_id: Any,
    dma_engine: Any = DmaEngine.dma,
    name: str | None = None,
) -> NkiInstruction:
    """Exchange tiles: this core's dst takes the other core's src, and the other way round.

    Exchanges are met in program order: the documentation lets pipes run past each other, but both cores
    must run the same program, and one whose order of pipes differs is refused as a deadlock.

    Spec: nki.isa.sendrecv, NKI 0.6. Engine: DMA, or GpSimd's DMA. Raises `NkiError` before NeuronCore-v3, on
    one core, on tiles outside SBUF or of unequal shape or dtype, on tiles too large for GpSimd's DMA.
    """
    call = Call("sendrecv", name)
    _need_two_cores(call)
    check_operand(call, "src", src, SBUF, "sbuf")
    check_operand(call, "dst", dst, SBUF, "sbuf")
    if dst.shape != src.shape:
        call.refuse("dst", "shape", list(dst.shape), f"{list(src.shape)}, the source's")
    if dst.dtype is not src.dtype:
        call.refuse("dst", "dtype", dst.dtype, f"{src.dtype}, the source's")
    other = 1 - call.core.rank
    for operand, rank in (("send_to_rank", send_to_rank), ("recv_from_rank", recv_from_rank)):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank != other:
            call.refuse(operand, "rank", rank, f"{other}, the other core")
    if not isinstance(pipe_id, int) or isinstance(pipe_id, bool) or pipe_id < 0:
        call.refuse("pipe_id", "value", pipe_id, "an integer >= 0")
    if not isinstance(dma_engine, DmaEngine):
        call.refuse("dma_engine", "type", repr(dma_engine), "a member of nki.isa.dma_engine")
    by_gpsimd = dma_engine is DmaEngine.gpsimd_dma
    if by_gpsimd:
        number = f"sendrecv_gpsimd_bytes_{8 * src.dtype.itemsize}bit"
        limit, need = getattr(call.hardware, number), src.free_size * src.dtype.itemsize
        if need > limit:
            rule = f"bytes per partition of a {8 * src.dtype.itemsize}-bit type by gpsimd_dma"
            call.refuse("src", rule, need, f"1..{limit}", source_of(number))

    sent = np.array(call.read("src", src))
    message = (sent, src.dtype)
    (received, dtype), _ = call.core.meet("sendrecv", f"pipe_id={pipe_id}", ("sendrecv", pipe_id), message)
    if received.shape != dst.shape or dtype is not dst.dtype:
        expected = f"{dst.dtype}{list(dst.shape)}, this core's dst"
        call.refuse("dst", f"tile sent by core {other}", f"{dtype}{list(received.shape)}", expected)
    call.write("dst", dst, received, bits=True)
    return call.record(
        Engine.gpsimd if by_gpsimd else Engine.dma,
        pipe_id=pipe_id,
        send_to_rank=send_to_rank,
        recv_from_rank=recv_from_rank,
        dma_engine=dma_engine,
    )


def core_barrier(
    data: NkiTensor, cores: Any, engine: Any = EngineKind.gpsimd, name: str | None = None
) -> NkiInstruction:
    """Wait until both cores are here; afterwards what they did to `data` before is ordered, and nothing else.

    Spec: nki.isa.core_barrier, NKI 0.6. Engine: the chosen one. Raises `NkiError` before NeuronCore-v3, on
    one core, on data outside shared HBM, on cores other than (0, 1), where the other core brings other data.
    """
    call = Call("core_barrier", name)
    _need_two_cores(call)
    if not isinstance(data, NkiTensor):
        call.refuse("data", "type", type(data).__name__, "NkiTensor")
    if data.buffer is not MemoryRegion.shared_hbm:
        call.refuse("data", "buffer", data.buffer.name, "shared_hbm")
    if data.dynamic is not None:
        call.refuse("data", "indirect view", data.dynamic.kind, "a view without run-time index")
    if not isinstance(cores, (tuple, list)) or tuple(cores) != CORES:
        call.refuse("cores", "value", cores, CORES)
    if not isinstance(engine, EngineKind):
        call.refuse("engine", "type", repr(engine), "a member of nki.isa.engine")
    if engine is EngineKind.dma:
        call.refuse("engine", "value", engine.name, "an engine with instructions of its own")

    view = (data.element_bytes, data.shape, data.strides, data.offset)
    other, last = call.core.meet("core_barrier", f"data={data.name}", ("core_barrier", data.storage), view)
    if last and data.storage.users is not None:
        forget_accesses(data.storage, *view)
        forget_accesses(data.storage, *other)
    chosen = Engine.gpsimd if engine is EngineKind.unknown else Engine[engine.name]
    return call.record(chosen, cores=CORES, data=data.storage.info.id)


def _need_two_cores(call: Call) -> None:
    call.need_generation(GEN3)
    if call.core.launch.n_cores != 2:
        call.refuse("", "cores of the launch", call.core.launch.n_cores, "2: kernel[2]")
