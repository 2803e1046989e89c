"""GpSimd Engine: gathers, top-k, nonzero positions and segment bounds. It reaches SBUF only.

Each of the engine's cores owns 16 partitions. `local_gather` and `topk` see those 16 partitions as one
list, element i in partition i % 16 and column i // 16: the snake of `_to_lists` and `_from_lists`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import ALL, Array, bfloat16, float32, int32, uint16, uint32
from nkisim.hardware import GEN3, source_of
from nkisim.isa._access import UNINITIALIZED
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa.gpsimd import check_int32, is_int
from nkisim.memory import SBUF
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

EVERY = tuple(ALL.values())
NUMBERS = (float32, int32)
# What topk leaves in the partitions of its last column that hold no result.
NO_VALUE, NO_INDEX = np.float32(np.nan), np.uint32(0xFFFFFFFF)


def nc_n_gather(dst: NkiTensor, data: NkiTensor, indices: NkiTensor, name: str | None = None) -> NkiInstruction:
    """dst[p, j] = data[p, indices[p, j]], the free dimensions of data taken as one; bits are kept.

    Only the elements that are gathered have to be defined.

    Spec: nki.isa.nc_n_gather, NKI 0.6. Engine: GpSimd. Raises `NkiError` on PSUM, on dst of another
    dtype than data or another layout than indices, on indices that are not uint32 or out of bounds.
    """
    call = Call("nc_n_gather", name)
    call.tile("dst", dst, SBUF, EVERY)
    call.tile("data", data, SBUF, EVERY)
    call.tile("indices", indices, SBUF, (uint32,))
    _same_partitions(call, "dst", dst, "data", data)
    call.same_layout("dst", dst, "indices", indices)
    _same_dtype(call, dst, "data", data)

    columns = call.read_2d("indices", indices).astype(np.int64)
    _check_columns(call, "indices", columns, data.free_size, 1)
    call.write("dst", dst, _gather(call, "data", data, columns), bits=True)
    return call.record(Engine.gpsimd)


def local_gather(
    dst: NkiTensor,
    src_buffer: NkiTensor,
    index: NkiTensor,
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
    name: str | None = None,
) -> NkiInstruction:
    """dst[p] = the runs src_buffer[p, i : i + num_elem_per_idx] for the indices i of p's group of 16 partitions.

    A group's indices are the first `num_valid_indices` of its 16-partition slice of `index`, read down
    the partitions first; they count elements. Bits are kept. Only what is gathered has to be defined.

    Spec: nki.isa.local_gather, NKI 0.6. Engine: GpSimd. Raises `NkiError` on PSUM, on partition counts
    that differ or are no multiple of 16, on other dtypes than equal ones and uint16 indices, on run
    lengths, index counts and indices outside their limits, on dst that does not hold just the result.
    """
    call = Call("local_gather", name)
    call.tile("dst", dst, SBUF, EVERY)
    call.tile("src_buffer", src_buffer, SBUF, EVERY)
    call.tile("index", index, SBUF, (uint16,))
    _whole_groups(call, "src_buffer", src_buffer)
    _same_partitions(call, "src_buffer", src_buffer, "index", index)
    _same_partitions(call, "src_buffer", src_buffer, "dst", dst)
    _same_dtype(call, dst, "src_buffer", src_buffer)
    hw = call.hardware
    group = hw.gpsimd_core_partitions
    run = num_elem_per_idx
    if not is_int(run) or run not in hw.local_gather_run_lengths:
        allowed = ", ".join(str(n) for n in hw.local_gather_run_lengths)
        call.refuse("num_elem_per_idx", "value", repr(run), allowed, source_of("local_gather_run_lengths"))
    held = group * index.free_size
    count = held if num_valid_indices is None else num_valid_indices
    if not is_int(count) or not 1 <= count <= held:
        call.refuse("num_valid_indices", "value", repr(count), f"1..{held}, the indices a group holds")
    if count > hw.local_gather_max_indices:
        allowed = f"1..{hw.local_gather_max_indices}"
        call.refuse("index", "indices per GpSimd core", count, allowed, source_of("local_gather_max_indices"))
    if dst.free_size != count * run:
        allowed = f"{count * run}, {count} indices times {run} elements"
        call.refuse("dst", "elements per partition", dst.free_size, allowed)

    starts = _to_lists(call, "index", index, count).astype(np.int64)
    _check_columns(call, "index", starts, src_buffer.free_size, run)
    columns = (starts[:, :, np.newaxis] + np.arange(run)).reshape(starts.shape[0], -1)
    values = _gather(call, "src_buffer", src_buffer, np.repeat(columns, group, axis=0))
    call.write("dst", dst, values, bits=True)
    return call.record(Engine.gpsimd, num_elem_per_idx=int(run), num_valid_indices=int(count))


def topk(val_dst: NkiTensor, idx_dst: NkiTensor, src: NkiTensor, n: int, name: str | None = None) -> NkiInstruction:
    """The k largest of n bfloat16 values, and their positions, in each group of 16 partitions; k is dst's width.

    A group's 16 partitions are one list in snake order, of which the first n elements count; its k
    results are written as such a list too, into the first ceil(k / 16) columns of val_dst and idx_dst.
    They ascend here. Kernels should not rely on an order, nor on which of equal values is taken: AWS's
    own kernels sort the results. Partitions of the last column beyond result k become NaN in val_dst
    and all ones in idx_dst; columns after it are not written.

    Spec: nki.isa.topk, NKI 0.6, whose text has each partition work on its own although it lays one list
    over 16; the top-k kernels of AWS's nki-library and the page at SDK 2.33 are followed. Engine: GpSimd.
    Raises `NkiError` on PSUM, on other dtypes or shapes, on partition counts that are no multiple of 16,
    on n, k outside their limits.
    """
    call = Call("topk", name)
    call.tile("val_dst", val_dst, SBUF, (bfloat16,))
    call.tile("idx_dst", idx_dst, SBUF, (uint32,))
    call.tile("src", src, SBUF, (bfloat16,))
    _whole_groups(call, "src", src)
    _same_partitions(call, "src", src, "val_dst", val_dst)
    if val_dst.ndim != 2:
        call.refuse("val_dst", "shape", list(val_dst.shape), f"[{src.shape[0]}, k]")
    if idx_dst.shape != val_dst.shape:
        call.refuse("idx_dst", "shape", list(idx_dst.shape), f"{list(val_dst.shape)}, that of val_dst")
    hw = call.hardware
    k = val_dst.shape[1]
    if not is_int(n) or not hw.topk_n_min <= n <= hw.topk_n_max:
        call.refuse("n", "value", repr(n), f"{hw.topk_n_min}..{hw.topk_n_max}", source_of("topk_n_max"))
    if k > hw.topk_k_max:
        call.refuse("val_dst", "k, elements per partition", k, f"1..{hw.topk_k_max}", source_of("topk_k_max"))
    if k > n:
        call.refuse("val_dst", "k, elements per partition", k, f"1..{n}, the active elements")
    group = hw.gpsimd_core_partitions
    if src.free_size * group < n:
        call.refuse("src", "elements per partition", src.free_size, f">= {-(-n // group)} for {n} active elements")

    lists = _to_lists(call, "src", src, n).astype(np.float32)
    # NaN sorts as the largest value, so that it shows in the result: no document says what the engine does.
    order = np.argsort(lists, axis=1, kind="stable")[:, n - k :]
    width = -(-k // group)
    values = _from_lists(np.take_along_axis(lists, order, 1), group, NO_VALUE)
    call.write("val_dst", val_dst.slice(1, 0, width), values)
    call.write("idx_dst", idx_dst.slice(1, 0, width), _from_lists(order.astype(np.uint32), group, NO_INDEX), bits=True)
    return call.record(Engine.gpsimd, n=int(n), k=k)


def nonzero_with_count(
    dst: NkiTensor, src: NkiTensor, index_offset: int = 0, padding_val: int = -1, name: str | None = None
) -> NkiInstruction:
    """In partitions 0, 16, ...: dst = positions of src's nonzero elements + index_offset, padding, their count.

    The other partitions are neither read nor written. A GpSimd core whose row of src was never written
    leaves its row of dst undefined, which kernels that use one core of a full tile do.

    Spec: nki.isa.nonzero_with_count, NKI 0.6. Engine: GpSimd. Raises `NkiError` before NeuronCore-v3, on
    PSUM, on other dtypes, on dst that has not one element per partition more than src.
    """
    call = Call("nonzero_with_count", name)
    call.need_generation(GEN3)
    call.tile("dst", dst, SBUF, (int32,))
    call.tile("src", src, SBUF, NUMBERS)
    _same_partitions(call, "src", src, "dst", dst)
    n = src.free_size
    if dst.free_size != n + 1:
        call.refuse("dst", "elements per partition", dst.free_size, f"{n + 1}, one more than src")
    check_int32(call, "index_offset", "value", index_offset)
    check_int32(call, "padding_val", "value", padding_val)

    first = np.arange(src.shape[0]) % call.hardware.gpsimd_core_partitions == 0
    active = first & _defined(call, "src", src).any(axis=1)
    if not active.any():
        active = first
    written = _defined(call, "dst", dst).any(axis=1)
    stale = np.flatnonzero(first & ~active & written)
    if stale.size:
        # The core would replace defined elements by the positions of whatever its row of src holds.
        call.refuse(
            "src", "uninitialized read", f"partition {stale[0]} never written", "written, as dst was", UNINITIALIZED
        )
    x = call.read_needed("src", src, np.broadcast_to(active[:, np.newaxis], (src.shape[0], n)))
    rows = np.full((dst.shape[0], n + 1), padding_val, np.int32)
    for p in np.flatnonzero(active):
        found = np.flatnonzero(x[p] != 0)
        rows[p, : found.size] = (found + int(index_offset)).astype(np.int32)
        rows[p, n] = found.size
    where = call.locate("dst", dst)
    assert where is not None
    where.starts = where.offset + np.arange(dst.shape[0]) * dst.strides[0]
    where.valid = active
    call.write_at("dst", dst, where, rows, bits=True)
    return call.record(Engine.gpsimd)


def sequence_bounds(dst: NkiTensor, segment_ids: NkiTensor, name: str | None = None) -> NkiInstruction:
    """dst[0, 0] = start and dst[0, 1] = end (exclusive) of the run of equal ids each element belongs to.

    Elements with id 0 are padding: start n, end -1, n being the number of elements.

    Spec: nki.isa.sequence_bounds, NKI 0.6. Engine: GpSimd. Raises `NkiError` on PSUM, on more than one
    partition, on dst of another size than (1, 2, n), on ids that are no non-negative integers.
    """
    call = Call("sequence_bounds", name)
    call.tile("dst", dst, SBUF, NUMBERS)
    call.tile("segment_ids", segment_ids, SBUF, NUMBERS)
    for operand, t in (("dst", dst), ("segment_ids", segment_ids)):
        if t.shape[0] != 1:
            call.refuse(operand, "partitions", t.shape[0], "1")
    n = segment_ids.free_size
    if dst.free_size != 2 * n:
        call.refuse("dst", "elements per partition", dst.free_size, f"{2 * n}: start and end of {n} elements")

    ids = call.read_2d("segment_ids", segment_ids)[0]
    wrong = ids[~((ids >= 0) & (ids == np.floor(ids)))]
    if wrong.size:
        call.refuse("segment_ids", "value", wrong[0], "non-negative integers")
    number = np.arange(n)
    begins = np.ones(n, np.bool_)
    begins[1:] = ids[1:] != ids[:-1]
    ends = np.ones(n, np.bool_)
    ends[:-1] = begins[1:]
    start = np.maximum.accumulate(np.where(begins, number, 0))
    end = np.minimum.accumulate(np.where(ends, number + 1, n)[::-1])[::-1]
    bounds = np.where(ids == 0, [[n], [-1]], [start, end])
    call.write("dst", dst, bounds.astype(dst.dtype.numpy))
    return call.record(Engine.gpsimd)


def _whole_groups(call: Call, operand: str, t: NkiTensor) -> None:
    group = call.hardware.gpsimd_core_partitions
    if t.shape[0] % group:
        call.refuse(operand, "partitions", t.shape[0], f"a multiple of {group}")


def _same_partitions(call: Call, first: str, a: NkiTensor, second: str, b: NkiTensor) -> None:
    if a.shape[0] != b.shape[0]:
        call.refuse(second, "partitions", b.shape[0], f"{a.shape[0]}, those of {first}")


def _same_dtype(call: Call, dst: NkiTensor, operand: str, t: NkiTensor) -> None:
    if dst.dtype is not t.dtype:
        call.refuse("dst", "dtype", dst.dtype, f"{t.dtype}, that of {operand}")


def _check_columns(call: Call, operand: str, starts: Array, extent: int, run: int) -> None:
    """Refuse an index whose run leaves the partition; the documentation leaves such reads undefined."""
    if int(starts.max()) + run > extent:
        at = tuple(int(i) for i in np.argwhere(starts + run > extent)[0])
        call.refuse(operand, "index out of bounds", f"{int(starts[at])} at {at}", f"0..{extent - run}")


def _gather(call: Call, operand: str, t: NkiTensor, columns: Array) -> Array:
    """The elements of `t` that `columns` [P, count] names in each partition; only those must be defined."""
    needed = np.zeros((t.shape[0], t.free_size), np.bool_)
    np.put_along_axis(needed, columns, True, 1)
    return np.take_along_axis(call.read_needed(operand, t, needed), columns, 1)


def _to_lists(call: Call, operand: str, t: NkiTensor, count: int) -> Array:
    """The first `count` elements of each group's snake, shape [groups, count]; only those must be defined."""
    group = call.hardware.gpsimd_core_partitions
    place = np.arange(t.shape[0])[:, np.newaxis] % group + group * np.arange(t.free_size)
    values = call.read_needed(operand, t, place < count)
    lists: Array = values.reshape(-1, group, t.free_size).swapaxes(1, 2).reshape(-1, group * t.free_size)
    return lists[:, :count]


def _from_lists(lists: Array, group: int, rest: Any) -> Array:
    """Lists [groups, count] in snake order, shape [groups * 16, ceil(count / 16)], the tail filled with `rest`."""
    groups, count = lists.shape
    width = -(-count // group)
    full = np.full((groups, width * group), rest, lists.dtype)
    full[:, :count] = lists
    return np.asarray(full.reshape(groups, width, group).swapaxes(1, 2).reshape(-1, width))


def _defined(call: Call, operand: str, t: NkiTensor) -> Array:
    """Which elements of an operand were written, shape [P, elements per partition]."""
    where = call.locate(operand, t)
    assert where is not None
    seen = t.storage.defined_map(t.element_bytes, t.shape, t.strides, where.offset)
    return seen.reshape(t.shape[0], -1)
