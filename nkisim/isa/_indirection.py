"""Tensor indirection on the Vector, Scalar and GpSimd Engines: where `.indirect` views and their indices may stand."""

from __future__ import annotations

from nkisim.isa._access import INDIRECTION
from nkisim.isa._call import Call
from nkisim.memory import MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine


def is_indirect(t: NkiTensor) -> bool:
    """Whether the view gathers or scatters columns."""
    return t.dynamic is not None and t.dynamic.kind == "columns"


def check_indirection(call: Call, dst: NkiTensor, operand: str, data: NkiTensor, engine: Engine) -> None:
    """Refuse `.indirect` views of `dst` and of the gathered input `data` that the engine cannot address.

    An index starts on a partition quadrant. Two start partitions are compared where both tensors were
    placed by the kernel: the compiler places the others to suit.
    """
    if dst.dynamic is None and data.dynamic is None:
        return
    for name, t in (("dst", dst), (operand, data)):
        if is_indirect(t):
            start = _index(t).start_partition
            quadrant = call.hardware.partition_quadrant
            if start % quadrant:
                call.refuse(name, "start partition of the index", start, f"a multiple of {quadrant}")
    if is_indirect(data):
        _same_start(call, operand, "start partition of the index", _index(data), data, operand)
    if is_indirect(dst):
        if engine is Engine.scalar and dst.buffer is MemoryRegion.psum:
            call.refuse("dst", "scatter on the Scalar Engine", "psum", "sbuf, or another engine")
        if data.buffer is MemoryRegion.sbuf:
            _same_start(call, "dst", "start partition of the index", _index(dst), data, operand)
        elif is_indirect(data):
            _same_start(call, "dst", "start partition of the index", _index(dst), _index(data), f"{operand}'s index")


def _index(t: NkiTensor) -> NkiTensor:
    assert t.dynamic is not None
    index = t.dynamic.index
    assert isinstance(index, NkiTensor)
    return index


def _same_start(call: Call, operand: str, rule: str, a: NkiTensor, b: NkiTensor, other: str) -> None:
    if a.storage.info.address is None or b.storage.info.address is None:
        return
    if a.start_partition != b.start_partition:
        allowed = f"{b.start_partition}, that of {other}"
        call.refuse(operand, rule, a.start_partition, allowed, INDIRECTION)
