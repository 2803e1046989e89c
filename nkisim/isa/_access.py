"""How an instruction reaches its operands' memory: run-time addresses, reads and writes."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from nkisim.dtypes import Array, cast, to_float32
from nkisim.errors import NkiError
from nkisim.hardware import A2, Hardware
from nkisim.isa import _races
from nkisim.isa._aliasing import Place, disturbs, repeats
from nkisim.layout import span
from nkisim.machine import Core, current_core, running_core
from nkisim.objects import VirtualRegister
from nkisim.tensor import NkiTensor
from nkisim.trace import Access

UNINITIALIZED = "NKI language guide: the contents of a new tensor are undefined"
ACCESS_PATTERN = A2 + ", tensor access patterns"
IN_PLACE = "documents name no order of overlapping reads and writes; in place: nki.isa.nc_stream_shuffle, NKI 0.6"
INDIRECTION = "nki.language.NkiTensor.indirect, NKI 0.6"


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


class OperandAccess:
    """Reads and writes of one instruction on the running core, with the errors they may end in.

    Args:
        instruction: name as in `nki.isa`; errors start with it.
        indirect_group: the hardware's number of partitions that share `.indirect` indices.
    """

    repeated: bool  # see `Call`

    __slots__ = ("_indirect_group", "_inputs", "_reads", "_writes", "core", "hardware", "instruction", "source")

    def __init__(self, instruction: str, indirect_group: str) -> None:
        self.instruction = instruction
        self.source = ""  # of the rules that name none; empty: the instruction's page
        self.core: Core = running_core() or current_core(f"nki.isa.{instruction}")
        self.hardware: Hardware = self.core.hardware
        self._indirect_group = indirect_group
        # What was read, as the fields of a `Place`.
        self._inputs: list[tuple[str, NkiTensor, int, Where | None]] = []
        self._reads: list[Access] = []
        self._writes: list[Access] = []

    def refuse(self, operand: str, rule: str, received: object, allowed: object, source: str | None = None) -> NoReturn:
        """Raise `NkiError` for this instruction."""
        source = source or self.source or f"nki.isa.{self.instruction}, NKI 0.6"
        raise NkiError(self.instruction, operand, rule, received=received, allowed=allowed, source=source)

    # -- addresses

    def locate(
        self, operand: str, t: NkiTensor, skip_out_of_bounds: bool = False, by_column: bool = False
    ) -> Where | None:
        """The operand's address with run-time indices resolved; None if a skipped scalar index is outside.

        Rows of a vector index that are outside are left out of `valid` when skipping. With `by_column`
        the index tensor may have several columns, which are read one after the other.
        """
        dynamic = t.dynamic
        if dynamic is None:
            return Where(t.shape, t.strides, t.offset)
        if dynamic.kind == "scalar":
            value = self._index_value(operand, dynamic.index)
            where = Where(t.shape, t.strides, t.offset + value * dynamic.stride)
            inside = value < dynamic.extent if dynamic.extent is not None else self._inside(t, value * dynamic.stride)
            # A negative index is outside even where a static offset would bring the address back inside.
            if inside and value >= 0:
                return where
            if skip_out_of_bounds:
                return None
            limit = f"0..{dynamic.extent - 1}" if dynamic.extent is not None else f"addresses inside {t.name}"
            self.refuse(operand, "run-time index out of bounds", value, limit)
        if dynamic.kind == "vector":
            return self._locate_rows(operand, t, skip_out_of_bounds, by_column)
        return self._locate_columns(operand, t)

    def _index_value(self, operand: str, index: Any) -> int:
        if isinstance(index, VirtualRegister):
            if not isinstance(index.value, int):
                self.refuse(operand, "register as an index", f"the float {index.value}", "an integer register")
            return index.value
        return int(self.read(f"{operand} index", index).reshape(-1)[0])

    def _inside(self, t: NkiTensor, moved: int) -> bool:
        """Whether the view stays in its storage, on chip in its partitions, when it moves by that many elements."""
        first = 1 if t.on_chip else 0
        low, high = span(t.shape[first:], t.strides[first:])
        start, end = (t.offset % t.row_elements, t.row_elements) if t.on_chip else (t.offset, t.storage_elements)
        return start + moved + low >= 0 and start + moved + high < end

    def _locate_rows(self, operand: str, t: NkiTensor, skip: bool, by_column: bool) -> Where:
        dynamic = t.dynamic
        assert dynamic is not None
        if not by_column and dynamic.index.shape != (t.shape[0], 1):
            received = list(dynamic.index.shape)
            self.refuse(operand, "shape of vector_offset", received, f"[{t.shape[0]}, 1], one index per row")
        index = self.read(f"{operand} index", dynamic.index).T.reshape(-1)[: t.shape[0]].astype(np.int64)
        where = Where(t.shape, t.strides, t.offset)
        where.starts = t.offset + index * dynamic.stride
        low, high = span(t.shape[1:], t.strides[1:])
        total = t.storage_elements
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
            )
        return where

    def _locate_columns(self, operand: str, t: NkiTensor) -> Where:
        dynamic = t.dynamic
        assert dynamic is not None
        index = self.read(f"{operand} index", dynamic.index)
        partitions, count = t.shape
        group: int = getattr(self.hardware, self._indirect_group)
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
        if t.dynamic is None:
            return self._read_range(operand, t, t.offset)
        where = self.locate(operand, t)
        assert where is not None
        return self.read_at(operand, t, where)

    def read_at(self, operand: str, t: NkiTensor, where: Where) -> Array:
        """`read` at a located address; rows that are not valid read as zero bytes."""
        storage = t.storage
        kind = t.carrier
        size = kind.itemsize
        if where.starts is None and where.columns is None:
            return self._read_range(operand, t, where.offset)
        self._inputs.append((operand, t, where.offset, where))
        self._touch(self._reads, operand, t, where)
        if where.starts is not None:
            assert where.valid is not None
            starts = where.starts[where.valid]
            inner, steps = t.shape[1:], t.strides[1:]
            out = np.zeros(t.shape, kind)
            if starts.size:
                defined = storage.rows_defined(size, starts, inner, steps)
                if not defined.all():
                    seen = np.ones(t.shape, np.bool_)
                    seen[where.valid] = defined
                    self._refuse_undefined(operand, t, seen)
                if storage.users is not None:
                    self._check_race(operand, t, where, writing=False)
                base = _row_windows(storage.array, kind, inner, steps, starts)
                out[where.valid] = base[starts - int(starts.min())]
            return out
        assert where.columns is not None
        full, steps2 = (t.shape[0], t.row_elements), (t.row_elements, 1)
        column0 = t.offset % t.row_elements
        offset = t.offset - column0
        at = where.columns + column0
        if not storage.is_defined(size, full, steps2, offset):
            seen = np.take_along_axis(storage.defined_map(size, full, steps2, offset), at, 1)
            if not seen.all():
                self._refuse_undefined(operand, t, seen)
        return np.take_along_axis(storage.array(kind, full, steps2, offset), at, 1)

    def _read_range(self, operand: str, t: NkiTensor, offset: int) -> Array:
        """`read` of a strided range of memory."""
        storage, kind, shape, strides = t.storage, t.carrier, t.shape, t.strides
        self._inputs.append((operand, t, offset, None))
        self._touch_range(self._reads, operand, t, offset)
        if not storage.is_defined(kind.itemsize, shape, strides, offset):
            self._refuse_undefined(operand, t, storage.defined_map(kind.itemsize, shape, strides, offset))
        if storage.users is not None:
            self._check_race(operand, t, Where(shape, strides, offset), writing=False)
        return storage.array(kind, shape, strides, offset)

    def read_f32(self, operand: str, t: NkiTensor) -> Array:
        """The operand as float32 of shape [P, elements per partition]."""
        values = to_float32(self.read(operand, t), t.dtype)
        return values if values.ndim == 2 else values.reshape(values.shape[0], -1)

    def read_2d(self, operand: str, t: NkiTensor) -> Array:
        """The operand as stored, of shape [P, elements per partition]."""
        values = self.read(operand, t)
        return values if values.ndim == 2 else values.reshape(values.shape[0], -1)

    def read_needed(self, operand: str, t: NkiTensor, needed: Array) -> Array:
        """`read_2d` of an on-chip operand of which only the elements in the mask `needed` must have been written."""
        where = self.locate(operand, t)
        assert where is not None
        storage = t.storage
        size = t.element_bytes
        self._inputs.append((operand, t, where.offset, None))
        self._touch(self._reads, operand, t, where)
        if not storage.is_defined(size, t.shape, t.strides, where.offset):
            seen = storage.defined_map(size, t.shape, t.strides, where.offset).reshape(needed.shape) | ~needed
            if not seen.all():
                self._refuse_undefined(operand, t, seen)
        values = storage.array(t.carrier, t.shape, t.strides, where.offset)
        return values.reshape(values.shape[0], -1)

    def write(self, operand: str, t: NkiTensor, values: Array, *, by_matmul: bool = False, bits: bool = False) -> None:
        """Round `values` to the operand's dtype and store them; shapes agree up to reshaping.

        With `bits`, `values` are elements as stored in the operand's dtype, kept to the bit.
        """
        if t.dynamic is None:
            self._write_range(operand, t, t.offset, self._stored(operand, t, values, bits), by_matmul)
            return
        where = self.locate(operand, t)
        assert where is not None
        self.write_at(operand, t, where, values, by_matmul=by_matmul, bits=bits)

    def write_at(
        self,
        operand: str,
        t: NkiTensor,
        where: Where,
        values: Array,
        *,
        by_matmul: bool = False,
        bits: bool = False,
    ) -> None:
        """`write` at a located address; rows that are not valid are left alone."""
        storage = t.storage
        kind = t.carrier
        size = kind.itemsize
        stored = self._stored(operand, t, values, bits)
        if where.starts is None and where.columns is None:
            self._write_range(operand, t, where.offset, stored, by_matmul)
            return
        # Rows that a skipped index leaves out of a plain view are checked with it.
        self._check_destination(operand, t, where.offset, where if t.dynamic is not None else None)
        self._touch(self._writes, operand, t, where)
        if where.starts is not None:
            assert where.valid is not None
            starts = where.starts[where.valid]
            if starts.size:
                if storage.users is not None:
                    self._check_race(operand, t, where, writing=True)
                base = _row_windows(storage.array, kind, t.shape[1:], t.strides[1:], starts)
                base[starts - int(starts.min())] = stored.reshape(t.shape)[where.valid]
                storage.mark_rows(size, starts, t.shape[1:], t.strides[1:])
            return
        assert where.columns is not None
        full, steps2 = (t.shape[0], t.row_elements), (t.row_elements, 1)
        column0 = t.offset % t.row_elements
        offset = t.offset - column0
        at = where.columns + column0
        np.put_along_axis(storage.array(kind, full, steps2, offset), at, stored.reshape(t.shape), 1)
        mask = np.zeros(full, np.bool_)
        np.put_along_axis(mask, at, True, 1)
        storage.mark_where(size, full, steps2, offset, mask)
        if storage.matmul_written is not None and not by_matmul:
            storage.mark_overwritten(size, full, steps2, offset, mask)

    def _stored(self, operand: str, t: NkiTensor, values: Array, bits: bool) -> Array:
        """`values` as they will stand in memory, which has to be writable."""
        if not t.storage.data.flags.writeable:
            if not t.storage.info.is_argument:
                self.refuse(operand, "read-only tensor", f"{t.name}, a constant", "a tensor of the kernel's own")
            self.refuse(operand, "read-only array", f"{t.name}, an argument NumPy marks read-only", "a writable array")
        return values if bits else cast(values, t.dtype, precise=t.storage.precise)

    def _check_destination(self, operand: str, t: NkiTensor, offset: int, where: Where | None = None) -> None:
        """Refuse elements at one address, and a partial overlap with what the instruction reads."""
        if not self.repeated and (t.dynamic is not None or (t.shape, t.strides) not in self.core.distinct):
            if repeats(t):
                received = f"{list(t.shape)} with strides {list(t.strides)}"
                self.refuse(operand, "several elements at one address", received, "distinct addresses", ACCESS_PATTERN)
            if t.dynamic is None:
                self.core.distinct.add((t.shape, t.strides))
        for source in self._inputs:
            read, s, begin, _ = source
            if s.storage is t.storage and disturbs(Place(operand, t, offset, where), Place(*source)):
                self.refuse(
                    operand,
                    f"overlap with {read}, which is still being read",
                    f"{t.get_pattern()} at {offset} and {s.get_pattern()} at {begin} of {t.name}",
                    f"the same view as {read}, or no common element",
                    IN_PLACE,
                )

    def _write_range(self, operand: str, t: NkiTensor, offset: int, stored: Array, by_matmul: bool) -> None:
        """`write` to a strided range of memory."""
        storage, kind, shape, strides = t.storage, t.carrier, t.shape, t.strides
        self._check_destination(operand, t, offset)
        self._touch_range(self._writes, operand, t, offset)
        if storage.users is not None:
            self._check_race(operand, t, Where(shape, strides, offset), writing=True)
        storage.array(kind, shape, strides, offset)[...] = stored if stored.shape == shape else stored.reshape(shape)
        storage.mark_written(kind.itemsize, shape, strides, offset)
        if storage.matmul_written is not None and not by_matmul:
            storage.mark_overwritten(kind.itemsize, shape, strides, offset)

    def write_where(
        self, operand: str, t: NkiTensor, values: Array, mask: Array, *, bits: bool = False, where: Where | None = None
    ) -> None:
        """`write` the elements of an operand that `mask` selects; the others keep what they hold.

        `values` and `mask` have shape [P, elements per partition] or broadcast to it.
        """
        where = where if where is not None else self.locate(operand, t)
        assert where is not None
        storage = t.storage
        kind = t.carrier
        size = kind.itemsize
        stored = self._stored(operand, t, values, bits)
        layout = (t.shape[0], t.free_size)
        stored = np.broadcast_to(stored, layout).reshape(t.shape)
        mask = np.broadcast_to(mask, layout).reshape(t.shape)
        self._check_destination(operand, t, where.offset, where if where.columns is not None else None)
        self._touch(self._writes, operand, t, where)
        if where.columns is not None:
            # The mask and the values move to the columns that the indices name.
            shape: tuple[int, ...] = (t.shape[0], t.row_elements)
            strides: tuple[int, ...] = (t.row_elements, 1)
            column0 = t.offset % t.row_elements
            offset = t.offset - column0
            rows, i = np.nonzero(mask)
            at = (rows, where.columns[rows, i] + column0)
            storage.array(kind, shape, strides, offset)[at] = stored[rows, i]
            mask = np.zeros(shape, np.bool_)
            mask[at] = True
        else:
            shape, strides, offset = t.shape, t.strides, where.offset
            if storage.users is not None:
                self._check_race(operand, t, where, writing=True, mask=mask)
            np.copyto(storage.array(kind, shape, strides, offset), stored, where=mask)
        storage.mark_where(size, shape, strides, offset, mask)
        if storage.matmul_written is not None:
            storage.mark_overwritten(size, shape, strides, offset, mask)

    def _refuse_undefined(self, operand: str, t: NkiTensor, seen: Array) -> NoReturn:
        allowed = "elements written before"
        if t.storage.users is not None:
            allowed += "; what the other core writes, after a core_barrier on both cores"
        first = tuple(int(i) for i in np.argwhere(~seen)[0])
        self.refuse(
            operand,
            "uninitialized read",
            f"{int((~seen).sum())} of {seen.size} elements never written, first at {first}",
            allowed,
            UNINITIALIZED,
        )

    def _check_race(
        self, operand: str, t: NkiTensor, where: Where, *, writing: bool, mask: Array | None = None
    ) -> None:
        size = t.element_bytes
        users = t.storage.users
        assert users is not None
        rows: Any = ... if mask is None else mask
        if where.starts is None:
            entries = users.under(size, t.shape, t.strides, where.offset)
        else:
            starts = where.starts[where.valid]
            first, last = int(starts.min()), int(starts.max())
            entries = users.under(size, (last - first + 1, *t.shape[1:]), (1, *t.strides[1:]), first)
            rows = starts - first
        before = _races.note_access(entries, rows, self.core.rank, writing)
        if before is not None:
            self.refuse(
                operand,
                "race between the two cores",
                f"{t.name} was {before} by core {1 - self.core.rank} with no core_barrier since",
                "nki.isa.core_barrier(data=...) between the cores' accesses",
                "nki.isa.core_barrier, NKI 0.6",
            )

    def _touch(self, accesses: list[Access], operand: str, t: NkiTensor, where: Where) -> None:
        rows = None
        if self.core.trace is not None and where.starts is not None:
            rows = tuple(where.starts[where.valid].tolist())
        self._touch_range(accesses, operand, t, where.offset, rows)

    def _touch_range(
        self, accesses: list[Access], operand: str, t: NkiTensor, offset: int, rows: tuple[int, ...] | None = None
    ) -> None:
        """Note the use of a storage: for its lifetime, and for the trace."""
        info = t.storage.info
        if info.scope_end is not None:
            self.refuse(
                operand,
                "tensor declared in a dynamic loop's body used outside of that trip",
                f"{t.name}, declared at {info.site}",
                "a tensor declared before the loop",
                "NKI migration guide, rules for loops (NKI 0.6)",
            )
        core = self.core
        if info.first_use < 0:
            info.first_use = core.position
        info.last_use = core.position
        if core.trace is not None:
            accesses.append(Access(operand, info, t.dtype, t.shape, t.strides, offset, rows, t.dynamic is not None))


def _row_windows(
    array: Any, kind: np.dtype[Any], inner: tuple[int, ...], steps: tuple[int, ...], starts: Array
) -> Array:
    """A view whose entry i is the row that begins i elements after the first of `starts`."""
    first, last = int(starts.min()), int(starts.max())
    result: Array = array(kind, (last - first + 1, *inner), (1, *steps), first)
    return result
