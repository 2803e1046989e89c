"""DMA transposes, direct and of gathered rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import uint32
from nkisim.hardware import GEN3, source_of
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa._enums import dge_mode as DgeMode
from nkisim.isa._enums import oob_mode as OobMode
from nkisim.isa.dma import DGE_GUIDE, check_mode, check_operand, check_priority, skips
from nkisim.memory import SBUF, MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}
HWDGE_ROWS = "rows under hwdge"


def dma_transpose(
    dst: NkiTensor,
    src: NkiTensor,
    axes: Any = None,
    priority: int | None = None,
    dge_mode: Any = DgeMode.unknown,
    oob_mode: Any = OobMode.error,
    name: str | None = None,
) -> NkiInstruction:
    """Copy src to dst with its first and last dimensions swapped; src may be rows gathered by a vector_offset.

    Gathered rows are those that the index tensor names, read column after column.

    Spec: nki.isa.dma_transpose, NKI 0.6. Engine: DMA. Raises `NkiError` on other axes, a dst whose shape
    or dtype is not that of the transposed src, 1-byte types, and the size limits of hwdge and of gathers.
    """
    call = Call("dma_transpose", name)
    check_operand(call, "dst", dst, SBUF, "sbuf")
    check_operand(call, "src", src)
    if len(src.shape) not in AXES:
        call.refuse("src", "dimensions", len(src.shape), "2, 3 or 4")
    permutation = AXES[len(src.shape)]
    if axes is not None and (not isinstance(axes, (tuple, list)) or tuple(axes) != permutation):
        call.refuse("axes", f"axes of {len(src.shape)} dimensions", axes, f"{permutation} or None")
    expected = [src.shape[a] for a in permutation]
    if list(dst.shape) != expected:
        call.refuse("dst", "shape", list(dst.shape), f"{expected}, the transposed source's")
    if src.dtype is not dst.dtype:
        call.refuse("dst", "dtype", dst.dtype, f"{src.dtype}, the source's")
    # The API names 2-byte types for hwdge and gathers only; A3 has 2- and 4-byte transposes, and no 1-byte ones.
    if src.dtype.itemsize not in (2, 4):
        call.refuse("src", "dtype", src.dtype, "a type of 2 or 4 bytes")
    if dst.dynamic is not None and dst.dynamic.kind == "vector":
        call.refuse("dst", "vector_offset", "a scatter", "a view without vector_offset")
    check_mode(call, dge_mode)
    gather = src.dynamic is not None and src.dynamic.kind == "vector"
    if gather:
        _check_gather(call, src, dge_mode)
    else:
        _check_direct(call, src, dge_mode)
    check_priority(call, priority)
    skip = skips(call, oob_mode)
    if skip and src.dynamic is None:
        call.refuse("oob_mode", "mode without a run-time index on src", "skip", "error")

    source = call.locate("src", src, skip, by_column=True)
    target = call.locate("dst", dst, skip)
    rows_skipped, skipped = 0, True
    if source is not None and target is not None:
        values = call.read_at("src", src, source).transpose(permutation)
        valid = source.valid
        if valid is None or valid.all():
            call.write_at("dst", dst, target, values, bits=True)
        else:
            # A row of src is a position of dst's last dimension.
            mask = np.broadcast_to(valid, dst.shape)
            layout = (dst.shape[0], dst.free_size)
            call.write_where("dst", dst, values.reshape(layout), mask.reshape(layout), bits=True, where=target)
            rows_skipped = int((~valid).sum())
        skipped = valid is not None and not valid.any()
    return call.record(
        Engine.dma,
        dge=DgeMode.swdge if gather else dge_mode,
        priority=priority,
        axes=permutation,
        gather=gather,
        rows_skipped=rows_skipped,
        skipped=skipped,
    )


def _check_direct(call: Call, src: NkiTensor, mode: DgeMode) -> None:
    # The descriptor guide (older, as its size limits show) has `none` here too; the API does not.
    if mode not in (DgeMode.unknown, DgeMode.hwdge):
        call.refuse("dge_mode", "mode of a direct transpose", mode.name, "unknown or hwdge")
    if mode is DgeMode.unknown:
        return
    group = call.hardware.dma_transpose_row_group
    source = source_of("dma_transpose_row_group")
    rows = src.shape[0]
    if len(src.shape) == 2 and rows != group:
        call.refuse("src", HWDGE_ROWS, rows, group, source)
    if len(src.shape) > 2:
        allowed = [n for n in range(1, group + 1) if n & (n - 1) == 0 and group % n == 0]
        if rows not in allowed:
            call.refuse("src", HWDGE_ROWS, rows, ", ".join(map(str, allowed)), source)
        if rows * src.shape[-2] % group:
            received = f"{rows} * {src.shape[-2]}"
            call.refuse(
                "src", "first times second last dimension under hwdge", received, f"a multiple of {group}", source
            )
    _check_two_bytes(call, src)


def _check_gather(call: Call, src: NkiTensor, mode: DgeMode) -> None:
    if call.hardware.generation < GEN3:
        call.refuse("src", "gather and transpose on target", call.hardware.target, "NeuronCore-v3 or newer", DGE_GUIDE)
    if mode not in (DgeMode.unknown, DgeMode.swdge):
        call.refuse("dge_mode", "mode with vector_offset", mode.name, "swdge or unknown", DGE_GUIDE)
    assert src.dynamic is not None
    index = src.dynamic.index
    group, partitions = call.hardware.dma_transpose_row_group, call.hardware.partitions
    source = source_of("dma_transpose_row_group")
    if len(src.shape) == 4 and 1 not in src.shape[1:3]:
        call.refuse("src", "middle dimensions of a gather", list(src.shape[1:3]), "one of the two is 1")
    _check_two_bytes(call, src)
    if src.buffer is MemoryRegion.sbuf:
        call.refuse("src", "buffer of a gather", src.buffer.name, "HBM")
    if src.shape[0] % group:
        call.refuse("src", "gathered rows", src.shape[0], f"a multiple of {group}", source)
    if index.dtype is not uint32:
        call.refuse("src", "dtype of the indices", index.dtype, "uint32")
    n = index.shape[0]
    if n % group or not group <= n <= partitions:
        call.refuse("src", "partitions of the indices", n, f"a multiple of {group} in {group}..{partitions}", source)
    if index.shape[1] > 1 and n != partitions:
        call.refuse("src", "partitions of indices with several columns", n, partitions)


def _check_two_bytes(call: Call, src: NkiTensor) -> None:
    # The other documented limit, a last dimension of at most 128, is that of dst's partitions.
    if src.dtype.itemsize != 2:
        call.refuse("src", "dtype under hwdge or a gather", src.dtype, "a type of 2 bytes")
