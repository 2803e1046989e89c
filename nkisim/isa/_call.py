"""One `nki.isa` call: legality, read, compute, round and write, record; always in this order.

`Call` gives every instruction the same operand checks, the same access to memory and the same error
text, so that the modules of the engines hold only what is particular to an instruction.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from nkisim.dtypes import ORDINARY, Array, DType, cast, float32, to_float32
from nkisim.errors import NkiError, call_site
from nkisim.hardware import A2, GEN4, Hardware, source_of
from nkisim.machine import Core, current_core
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.tensor import MAX_DIMS, NKIObject, NkiTensor, VirtualRegister
from nkisim.trace import Access, Engine, Record

START_PARTITIONS = A2 + ", start partitions"
ACCESS_PATTERN = A2 + ", tensor access patterns"
UNINITIALIZED = "NKI language guide: the contents of a new tensor are undefined"
INDIRECTION = "nki.language.NkiTensor.indirect, NKI 0.6"
# Operand types that engines compute on; packed x4 types belong to the MX instructions and to copies.
COMPUTABLE = tuple(d for d in ORDINARY if d != "float8_e8m0fnu")


class NkiInstruction(NKIObject):
    """Handle of an issued instruction, for scheduling edges."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def depends_on(self, *producers: NkiInstruction) -> NkiInstruction:
        """Order this instruction after `producers`; returns self."""
        core = current_core("NkiInstruction.depends_on")
        for producer in producers:
            if not isinstance(producer, NkiInstruction):
                raise TypeError(f"depends_on: received {producer!r}, allowed NkiInstruction")
            if core.trace is not None:
                core.trace.edges.append((str(self.handle), str(producer.handle)))
        return self


class Where:
    """An operand's address once run-time indices are known.

    `starts` are the element offsets of the rows of an indirect access (dim 0), `valid` the mask of
    rows inside the tensor; `columns` the column numbers of an `.indirect` view, per partition.
    """

    __slots__ = ("columns", "offset", "shape", "starts", "strides", "valid")

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
        self.shape = shape
        self.strides = strides
        self.offset = offset
        self.starts: Array | None = None
        self.valid: Array | None = None
        self.columns: Array | None = None


class Call:
    """State of one instruction call.

    Args:
        instruction: name as in `nki.isa`; errors start with it.
        name: the caller's `name=` argument, kept in the trace.
        indirect_group: partitions that share `.indirect` indices (16; 32 on the Tensor Engine).
    """

    __slots__ = ("_indirect_group", "_reads", "_writes", "core", "hardware", "instruction", "name", "source")

    def __init__(self, instruction: str, name: str | None = None, indirect_group: int = 16) -> None:
        self.instruction = instruction
        self.name = name
        self.source = f"nki.isa.{instruction}, NKI 0.6"
        self.core: Core = current_core(f"nki.isa.{instruction}")
        self.hardware: Hardware = self.core.hardware
        self._indirect_group = indirect_group
        self._reads: list[Access] = []
        self._writes: list[Access] = []
        if name is not None and not isinstance(name, str):
            raise TypeError(f"{instruction}.name: received {name!r}, allowed a string or None")

    # -- refusal

    def refuse(self, operand: str, rule: str, received: object, allowed: object, source: str | None = None) -> NoReturn:
        """Raise `NkiError` for this instruction."""
        raise NkiError(
            self.instruction, operand, rule, received=received, allowed=allowed, source=source or self.source
        )

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
    ) -> NkiTensor:
        """Check an on-chip operand: buffer, dtype, partitions, start partition, access pattern."""
        if not isinstance(value, NkiTensor):
            self.refuse(operand, "type", type(value).__name__, "NkiTensor")
        if value.buffer not in buffers:
            self.refuse(operand, "buffer", value.buffer.name, " or ".join(b.name for b in buffers))
        if value.dtype not in dtypes:
            self.refuse(operand, "dtype", value.dtype, ", ".join(dtypes))
        self._check_float8(operand, value)
        if value.on_chip:
            self._check_access_pattern(operand, value)
        dynamic = value.dynamic
        if dynamic is not None and dynamic.kind == "columns":
            if not indirect:
                self.refuse(operand, "tensor indirection", ".indirect() view", "an ordinary view", INDIRECTION)
            if self.hardware.generation < GEN4:
                self.refuse(operand, "tensor indirection", self.hardware.target, "NeuronCore-v4", INDIRECTION)
        return value

    def _check_float8(self, operand: str, value: NkiTensor) -> None:
        if value.dtype == "float8_e4m3fn" and self.hardware.generation < GEN4:
            self.refuse(operand, "dtype", f"float8_e4m3fn on {self.hardware.target}", "float8_e4m3 before trn3")

    def _check_access_pattern(self, operand: str, t: NkiTensor) -> None:
        partitions = t.shape[0]
        limit = self.hardware.partitions
        if partitions > limit:
            self.refuse(operand, "partitions", partitions, f"1..{limit}", source_of("partitions"))
        start = t.start_partition
        if start:
            quadrant = self.hardware.partition_quadrant
            step = limit if partitions > 2 * quadrant else 2 * quadrant if partitions > quadrant else quadrant
            if start % step or start + partitions > limit:
                allowed = ", ".join(str(s) for s in range(0, limit, step))
                self.refuse(operand, f"start partition of {partitions} partitions", start, allowed, START_PARTITIONS)
        if len(t.shape) > MAX_DIMS:
            self.refuse(operand, "dimensions", len(t.shape), f"at most {MAX_DIMS}", ACCESS_PATTERN)
        for stride, n in zip(t.strides[1:], t.shape[1:], strict=True):
            if n > 1 and not -32768 <= stride <= 32767:
                self.refuse(operand, "free stride (int16)", stride, "-32768..32767 elements", ACCESS_PATTERN)
            if n > 65535:
                self.refuse(operand, "free dimension (uint16)", n, "1..65535 elements", ACCESS_PATTERN)
        fact = "psum_access_max_elements" if t.buffer is MemoryRegion.psum else "sbuf_access_max_elements"
        if t.free_size > getattr(self.hardware, fact):
            self.refuse(
                operand, "elements per partition", t.free_size, f"1..{getattr(self.hardware, fact)}", source_of(fact)
            )

    def same_layout(self, first: str, a: NkiTensor, second: str, b: NkiTensor) -> None:
        """Refuse unless both have equal partitions and equal elements per partition."""
        if a.shape == b.shape:
            return
        if a.shape[0] != b.shape[0]:
            self.refuse(second, "partitions", b.shape[0], f"{a.shape[0]}, those of {first}")
        if a.free_size != b.free_size:
            self.refuse(second, "elements per partition", b.free_size, f"{a.free_size}, those of {first}")

    def is_column(self, value: Any) -> bool:
        """Whether a scalar-or-[P, 1] operand is a tensor."""
        return isinstance(value, NkiTensor)

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
            with np.errstate(over="ignore"):
                return np.asarray(value, np.float32)
        t = self.tile(operand, value, buffers, dtypes)
        if t.shape[0] != partitions or t.free_size != 1:
            self.refuse(operand, "shape", list(t.shape), f"[{partitions}, 1]")
        return self.read_f32(operand, t)

    # -- addresses

    def locate(self, operand: str, t: NkiTensor, skip_out_of_bounds: bool = False) -> Where | None:
        """The operand's address with run-time indices resolved; None if a skipped scalar index is outside.

        Rows of a vector index that are outside are left out of `valid` when skipping.
        """
        dynamic = t.dynamic
        if dynamic is None:
            return Where(t.shape, t.strides, t.offset)
        if dynamic.kind == "scalar":
            value = self._index_value(operand, dynamic.index)
            where = Where(t.shape, t.strides, t.offset + value * dynamic.stride)
            inside = 0 <= value < dynamic.extent if dynamic.extent is not None else self._inside(t, where.offset)
            if inside:
                return where
            if skip_out_of_bounds:
                return None
            limit = f"0..{dynamic.extent - 1}" if dynamic.extent is not None else f"addresses inside {t.name}"
            self.refuse(operand, "run-time index out of bounds", value, limit, "nki.isa.dma_copy, oob_mode")
        if dynamic.kind == "vector":
            return self._locate_rows(operand, t, skip_out_of_bounds)
        return self._locate_columns(operand, t)

    def _index_value(self, operand: str, index: Any) -> int:
        if isinstance(index, VirtualRegister):
            return int(index.value)
        return int(self.read(f"{operand} index", index).reshape(-1)[0])

    def _span(self, t: NkiTensor, first: int) -> tuple[int, int]:
        low = high = 0
        for stride, n in zip(t.strides[first:], t.shape[first:], strict=True):
            low += min(0, stride * (n - 1))
            high += max(0, stride * (n - 1))
        return low, high

    def _inside(self, t: NkiTensor, offset: int) -> bool:
        low, high = self._span(t, 0)
        return offset + low >= 0 and offset + high < t.storage.nbytes // t.element_bytes

    def _locate_rows(self, operand: str, t: NkiTensor, skip: bool) -> Where:
        dynamic = t.dynamic
        assert dynamic is not None
        index = self.read(f"{operand} index", dynamic.index).reshape(-1).astype(np.int64)
        where = Where(t.shape, t.strides, t.offset)
        where.starts = t.offset + index * dynamic.stride
        low, high = self._span(t, 1)
        total = t.storage.nbytes // t.element_bytes
        where.valid = (index >= 0) & (where.starts + low >= 0) & (where.starts + high < total)
        if dynamic.extent is not None:
            where.valid &= index < dynamic.extent
        if not skip and not where.valid.all():
            p = int(np.flatnonzero(~where.valid)[0])
            rows = dynamic.extent if dynamic.extent is not None else total // max(dynamic.stride, 1)
            self.refuse(
                operand,
                f"run-time row index out of bounds in partition {p}",
                int(index[p]),
                f"0..{rows - 1}",
                "nki.isa.dma_copy, oob_mode",
            )
        return where

    def _locate_columns(self, operand: str, t: NkiTensor) -> Where:
        dynamic = t.dynamic
        assert dynamic is not None
        index = self.read(f"{operand} index", dynamic.index)
        partitions, count = t.shape
        group = self._indirect_group
        columns = np.empty((partitions, count), np.int64)
        i = np.arange(count)
        for p0 in range(0, partitions, group):
            rows = min(group, partitions - p0)
            if count > rows * index.shape[1]:
                self.refuse(operand, "indices per group", count, f"1..{rows * index.shape[1]}", INDIRECTION)
            columns[p0 : p0 + rows] = index[p0 + i % rows, i // rows]
        assert dynamic.extent is not None
        if columns.min() < 0 or columns.max() >= dynamic.extent:
            self.refuse(
                operand, "column index", f"{columns.min()}..{columns.max()}", f"0..{dynamic.extent - 1}", INDIRECTION
            )
        where = Where(t.shape, t.strides, t.offset)
        where.columns = columns
        return where

    # -- memory

    def read(self, operand: str, t: NkiTensor) -> Array:
        """The operand's elements as stored, in the view's shape. Do not write into the result.

        Raises:
            NkiError: an element was never written.
        """
        where = self.locate(operand, t)
        assert where is not None
        return self.read_at(operand, t, where)

    def read_at(self, operand: str, t: NkiTensor, where: Where) -> Array:
        """`read` at a located address; rows that are not valid read as zero bytes."""
        storage = t.storage
        size = t.element_bytes
        kind = t.dtype.carrier(storage.precise)
        self._touch(self._reads, operand, t, where)
        if where.starts is not None:
            assert where.valid is not None
            starts = where.starts[where.valid]
            inner, steps = t.shape[1:], t.strides[1:]
            out = np.zeros(t.shape, kind)
            if starts.size:
                base = _row_windows(storage.array, kind, inner, steps, starts)
                out[where.valid] = base[starts - int(starts.min())]
                for start in starts if not storage.is_defined(1, (storage.nbytes,), (1,), 0) else ():
                    self._check_defined(operand, t, size, inner, steps, int(start))
            return out
        if where.columns is not None:
            full, steps2 = (t.shape[0], t.row_elements), (t.row_elements, 1)
            column0 = t.offset % t.row_elements
            offset = t.offset - column0
            at = where.columns + column0
            if not storage.is_defined(size, full, steps2, offset):
                seen = np.take_along_axis(storage.defined_map(size, full, steps2, offset), at, 1)
                if not seen.all():
                    self._refuse_undefined(operand, seen)
            return np.take_along_axis(storage.array(kind, full, steps2, offset), at, 1)
        self._check_defined(operand, t, size, t.shape, t.strides, where.offset)
        if storage.writer is not None:
            self._check_race(operand, t, where.offset, writing=False)
        return storage.array(kind, t.shape, t.strides, where.offset)

    def read_f32(self, operand: str, t: NkiTensor) -> Array:
        """The operand as float32 of shape [P, elements per partition]."""
        values = to_float32(self.read(operand, t), t.dtype)
        return values if values.ndim == 2 else values.reshape(values.shape[0], -1)

    def read_2d(self, operand: str, t: NkiTensor) -> Array:
        """The operand as stored, of shape [P, elements per partition]."""
        values = self.read(operand, t)
        return values if values.ndim == 2 else values.reshape(values.shape[0], -1)

    def write(self, operand: str, t: NkiTensor, values: Array, *, by_matmul: bool = False) -> None:
        """Round `values` to the operand's dtype and store them; shapes agree up to reshaping."""
        where = self.locate(operand, t)
        assert where is not None
        self.write_at(operand, t, where, values, by_matmul=by_matmul)

    def write_at(self, operand: str, t: NkiTensor, where: Where, values: Array, *, by_matmul: bool = False) -> None:
        """`write` at a located address; rows that are not valid are left alone."""
        storage = t.storage
        size = t.element_bytes
        stored = cast(values, t.dtype, precise=storage.precise)
        kind = t.dtype.carrier(storage.precise)
        if stored.dtype != kind:
            stored = stored.astype(kind)
        if not storage.data.flags.writeable:
            self.refuse(operand, "read-only array", f"{t.name}, an argument NumPy marks read-only", "a writable array")
        self._touch(self._writes, operand, t, where)
        if where.starts is not None:
            assert where.valid is not None
            starts = where.starts[where.valid]
            if starts.size:
                base = _row_windows(storage.array, kind, t.shape[1:], t.strides[1:], starts)
                base[starts - int(starts.min())] = stored.reshape(t.shape)[where.valid]
                storage.mark_rows(size, starts, t.shape[1:], t.strides[1:])
            return
        if where.columns is not None:
            full, steps2 = (t.shape[0], t.row_elements), (t.row_elements, 1)
            column0 = t.offset % t.row_elements
            offset = t.offset - column0
            at = where.columns + column0
            np.put_along_axis(storage.array(kind, full, steps2, offset), at, stored.reshape(t.shape), 1)
            for p in range(t.shape[0]):
                storage.mark_rows(size, offset + p * t.row_elements + at[p], (1,), (1,))
            return
        if storage.writer is not None:
            self._check_race(operand, t, where.offset, writing=True)
        out = storage.array(kind, t.shape, t.strides, where.offset)
        out[...] = stored if stored.shape == t.shape else stored.reshape(t.shape)
        storage.mark_written(size, t.shape, t.strides, where.offset)
        if storage.matmul_written is not None and not by_matmul:
            _psum_map(storage, t, where.offset)[...] = False

    def _check_defined(
        self, operand: str, t: NkiTensor, size: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> None:
        if not t.storage.is_defined(size, shape, strides, offset):
            self._refuse_undefined(operand, t.storage.defined_map(size, shape, strides, offset))

    def _refuse_undefined(self, operand: str, seen: Array) -> NoReturn:
        first = tuple(int(i) for i in np.argwhere(~seen)[0])
        self.refuse(
            operand,
            "uninitialized read",
            f"{int((~seen).sum())} of {seen.size} elements never written, first at {first}",
            "elements written before",
            UNINITIALIZED,
        )

    def _check_race(self, operand: str, t: NkiTensor, offset: int, *, writing: bool) -> None:
        assert t.storage.writer is not None
        if t.element_bytes != t.storage.info.dtype.carrier(t.storage.precise).itemsize:
            return
        owner = np.ndarray(t.shape, np.int8, t.storage.writer, offset, t.strides)
        mine = self.core.rank + 1
        if bool(((owner != 0) & (owner != mine)).any()):
            self.refuse(
                operand,
                "race between the two cores",
                f"{t.name} was written by core {1 - self.core.rank} with no core_barrier since",
                "nki.isa.core_barrier(data=...) between the cores' accesses",
                "nki.isa.core_barrier, NKI 0.6",
            )
        if writing:
            owner[...] = mine

    def _touch(self, accesses: list[Access], operand: str, t: NkiTensor, where: Where) -> None:
        info = t.storage.info
        if info.first_use < 0:
            info.first_use = self.core.position
        info.last_use = self.core.position
        if self.core.trace is not None:
            rows = None
            if where.starts is not None and where.valid is not None:
                rows = tuple(where.starts[where.valid].tolist())
            accesses.append(Access(operand, info, t.dtype, t.shape, t.strides, where.offset, rows))

    # -- record

    def record(self, engine: Engine, **attrs: Any) -> NkiInstruction:
        """Append the trace record and return the instruction's handle."""
        core = self.core
        index = core.position
        core.position += 1
        if self.name is not None:
            core.names.add(self.name)
        if core.trace is not None:
            core.trace.records.append(
                Record(
                    index,
                    core.rank,
                    engine,
                    self.instruction,
                    self.name,
                    call_site(),
                    tuple(self._writes),
                    tuple(self._reads),
                    attrs,
                )
            )
        return NkiInstruction(self.name if self.name is not None else index)


def _row_windows(
    array: Any, kind: np.dtype[Any], inner: tuple[int, ...], steps: tuple[int, ...], starts: Array
) -> Array:
    """A view whose entry i is the row that begins i elements after the first of `starts`."""
    first, last = int(starts.min()), int(starts.max())
    result: Array = array(kind, (last - first + 1, *inner), (1, *steps), first)
    return result


def _psum_map(storage: Any, t: NkiTensor, offset: int) -> Array:
    """The view of a storage's `matmul_written` map under `t`."""
    return np.ndarray(t.shape, np.bool_, storage.matmul_written, offset, t.strides)
