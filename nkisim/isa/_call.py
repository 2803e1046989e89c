"""One `nki.isa` call: legality, read, compute, round and write, record; always in this order.

`Call` gives every instruction the same operand checks, the same access to memory and the same error
text, so that the modules of the engines hold only what is particular to an instruction.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import Any

import numpy as np

from nkisim.body import Step
from nkisim.dtypes import ORDINARY, Array, DType, float8_e4m3fn, float32
from nkisim.errors import NkiError, call_site
from nkisim.facts import have_facts, static_facts
from nkisim.hardware import A2, GEN4, source_of
from nkisim.isa._access import ACCESS_PATTERN, INDIRECTION, OperandAccess
from nkisim.machine import current_core
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.objects import NKIObject
from nkisim.ordering import Issued
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine, Record

START_PARTITIONS = A2 + ", start partitions"
EDGES = "nki.isa.NkiInstruction.depends_on, NKI 0.6"
# Operand types that engines compute on; packed x4 types belong to the MX instructions and to copies.
COMPUTABLE = tuple(d for d in ORDINARY if d != "float8_e8m0fnu")


class NkiInstruction(NKIObject):
    """Handle of an issued instruction, for scheduling edges."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.issued: Issued | None = None

    def depends_on(self, *producers: NkiInstruction) -> NkiInstruction:
        """Order this instruction after `producers`; returns self."""
        core = current_core("NkiInstruction.depends_on")
        for producer in producers:
            if not isinstance(producer, NkiInstruction):
                raise TypeError(f"depends_on: received {producer!r}, allowed NkiInstruction")
            if self.issued is None or producer.issued is None:
                raise NkiError(
                    "depends_on",
                    "producers",
                    "edge of an instruction that was not issued",
                    received=f"{self.handle!r} after {producer.handle!r}",
                    allowed="instructions as nki.isa returned them",
                    source=EDGES,
                )
            core.sequencer.check_edge("depends_on", self.issued.scope, producer.issued.scope)
            core.ordering.add(self.issued, producer.issued, "depends_on", EDGES)
            if core.trace is not None:
                core.trace.edges.append((str(self.handle), str(producer.handle)))
        return self


class Call(OperandAccess):
    """State of one instruction call.

    Args:
        instruction: name as in `nki.isa`; errors start with it.
        name: the caller's `name=` argument, kept in the trace.
        indirect_group: the hardware's number of partitions that share `.indirect` indices.

    In a loop `repeated` says that an earlier trip issued this instruction with arguments that are alike in all that
    is fixed when the kernel is built. What depends on that alone was legal then, and is not checked again.
    """

    __slots__ = ("_step", "name", "repeated")

    def __init__(
        self, instruction: str, name: str | None = None, indirect_group: str = "gpsimd_core_partitions"
    ) -> None:
        super().__init__(instruction, indirect_group)
        self.name = name
        self.repeated = False
        self._step: Step | None = None
        sequencer = self.core.sequencer
        if sequencer.loops:
            # The instruction's own arguments: it makes the call before anything else.
            arguments = sys._getframe(1).f_locals
            site, known = call_site(), sequencer.known()
            if known is not None and known.instruction == instruction and known.site == site:
                self.repeated = have_facts(sequencer, arguments, known.facts)
            self._step = known if self.repeated else Step(instruction, site, static_facts(sequencer, arguments))
        if name is not None and not isinstance(name, str):
            raise TypeError(f"{instruction}.name: received {name!r}, allowed a string or None")

    def require(
        self, ok: bool, operand: str, rule: str, received: object, allowed: object, source: str | None = None
    ) -> None:
        """`refuse` unless `ok`. Where the texts cost time to make, test first and call `refuse`."""
        if not ok:
            self.refuse(operand, rule, received, allowed, source)

    def need_generation(self, generation: int) -> None:
        """Refuse the whole instruction before `generation`."""
        if self.hardware.generation < generation:
            self.refuse("", "target", self.hardware.target, f"NeuronCore-v{generation} or newer")

    # -- operands

    def tile(
        self,
        operand: str,
        value: Any,
        buffers: tuple[MemoryRegion, ...] = ON_CHIP,
        dtypes: tuple[DType, ...] = COMPUTABLE,
        indirect: bool = False,
        free_max: int | None = None,
        any_start: bool = False,
    ) -> NkiTensor:
        """Check an on-chip operand: buffer, dtype, partitions, start partition, access pattern.

        `free_max` replaces the free-size limit of the Vector and Scalar Engines; with `any_start` the
        caller has its own rule for the start partition.
        """
        if self.repeated:
            assert isinstance(value, NkiTensor)
            return value
        if not isinstance(value, NkiTensor):
            self.refuse(operand, "type", type(value).__name__, "NkiTensor")
        if value.buffer not in buffers:
            self.refuse(operand, "buffer", value.buffer.name, " or ".join(b.name for b in buffers))
        if value.dtype not in dtypes:
            self.refuse(operand, "dtype", value.dtype, ", ".join(dtypes))
        if value.dtype is float8_e4m3fn:
            self.check_float8(operand, value)
        if value.on_chip:
            self._check_access_pattern(operand, value, free_max, any_start)
        dynamic = value.dynamic
        if dynamic is not None and dynamic.kind == "columns":
            if not indirect:
                self.refuse(operand, "tensor indirection", ".indirect() view", "an ordinary view", INDIRECTION)
            if self.hardware.generation < GEN4:
                self.refuse(operand, "tensor indirection", self.hardware.target, "NeuronCore-v4", INDIRECTION)
        return value

    def check_float8(self, operand: str, value: NkiTensor) -> None:
        """Refuse the 8-bit float type that only NeuronCore-v4 has."""
        if value.dtype is float8_e4m3fn and self.hardware.generation < GEN4:
            self.refuse(operand, "dtype", f"float8_e4m3fn on {self.hardware.target}", "float8_e4m3 before trn3")

    def _check_access_pattern(self, operand: str, t: NkiTensor, free_max: int | None, any_start: bool) -> None:
        hw = self.hardware
        shape = t.shape
        pattern = (shape, t.strides, t.buffer, free_max)
        legal = self.core.legal_patterns
        known = pattern in legal
        if not known and shape[0] > hw.partitions:
            self.refuse(operand, "partitions", shape[0], f"1..{hw.partitions}", source_of("partitions"))
        if not any_start and (t.offset or t.storage.info.address is not None):
            self._check_start_partition(operand, t)
        if known:
            return
        if len(shape) > hw.view_max_dims:
            self.refuse(operand, "dimensions", len(shape), f"at most {hw.view_max_dims}", ACCESS_PATTERN)
        elements = 1
        for n, stride in zip(shape[1:], t.strides[1:], strict=True):
            elements *= n
            if n > 1 and not hw.access_stride_min <= stride <= hw.access_stride_max:
                allowed = f"{hw.access_stride_min}..{hw.access_stride_max} elements"
                self.refuse(operand, "free stride (int16)", stride, allowed, ACCESS_PATTERN)
            if n > hw.access_count_max:
                self.refuse(operand, "free dimension (uint16)", n, f"1..{hw.access_count_max} elements", ACCESS_PATTERN)
        if free_max is None:
            in_psum = t.buffer is MemoryRegion.psum
            free_max = hw.psum_access_max_elements if in_psum else hw.sbuf_access_max_elements
        if elements > free_max:
            fact = "psum_access_max_elements" if t.buffer is MemoryRegion.psum else "sbuf_access_max_elements"
            self.refuse(operand, "elements per partition", elements, f"1..{free_max}", source_of(fact))
        legal.add(pattern)

    def _check_start_partition(self, operand: str, t: NkiTensor) -> None:
        start, partitions = t.start_partition, t.shape[0]
        limit, quadrant = self.hardware.partitions, self.hardware.partition_quadrant
        step = limit if partitions > 2 * quadrant else 2 * quadrant if partitions > quadrant else quadrant
        if start % step:
            allowed = ", ".join(str(s) for s in range(0, limit, step))
            self.refuse(operand, f"start partition of {partitions} partitions", start, allowed, START_PARTITIONS)

    def same_layout(self, first: str, a: NkiTensor, second: str, b: NkiTensor) -> None:
        """Refuse unless both have equal partitions and equal elements per partition."""
        if a.shape == b.shape:
            return
        if a.shape[0] != b.shape[0]:
            self.refuse(second, "partitions", b.shape[0], f"{a.shape[0]}, those of {first}")
        if a.free_size != b.free_size:
            self.refuse(second, "elements per partition", b.free_size, f"{a.free_size}, those of {first}")

    def column(
        self,
        operand: str,
        value: Any,
        partitions: int,
        dtypes: tuple[DType, ...] = (float32,),
        buffers: tuple[MemoryRegion, ...] = ON_CHIP,
    ) -> Array:
        """A compile-time number or a [P, 1] tensor, as float32 that broadcasts over [P, F]."""
        if not isinstance(value, NkiTensor):
            if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
                self.refuse(operand, "type", type(value).__name__, "a number or a [P, 1] tensor")
            return np.asarray(value, np.float32)
        t = self.tile(operand, value, buffers, dtypes)
        if t.shape[0] != partitions or t.free_size != 1:
            self.refuse(operand, "shape", list(t.shape), f"[{partitions}, 1]")
        return self.read_f32(operand, t)

    # -- record

    def record(self, engine: Engine, **attrs: Any) -> NkiInstruction:
        """Append the trace record, where members of enumerations go by name, and return the instruction's handle."""
        core, name = self.core, self.name
        index = core.position
        core.position = index + 1
        sequencer = core.sequencer
        if self._step is not None:
            sequencer.note(self._step)
        handle = NkiInstruction(index if name is None else name)
        handle.issued = issued = Issued(handle.handle, index, sequencer.scope, sequencer.instruction_key(index))
        if name is not None:
            core.ordering.name(name, issued)
        if core.trace is not None:
            core.trace.records.append(
                Record(
                    index,
                    core.rank,
                    engine,
                    self.instruction,
                    name,
                    call_site() if self._step is None else self._step.site,
                    tuple(self._writes),
                    tuple(self._reads),
                    {key: value.name if isinstance(value, Enum) else value for key, value in attrs.items()},
                )
            )
        return handle
