"""Instructions of NKI 0.6 by those of `neuronxcc.nki`: `dst[...] = nisa.op(...)`, `psum[...] += nisa.nc_matmul(...)`.

Operands of an instruction get the same shape, with as few free dimensions as all of their views allow. Arguments that
only place an instruction on a DMA queue are left to the compiler.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import numpy as np

from contributed._neuronxcc_dma import dma_copy
from contributed._neuronxcc_launch import on_chip, program, repeat_first
from contributed._neuronxcc_tensors import (
    DTYPES,
    Dims,
    Register,
    Tensor,
    arange,
    column,
    known,
    merged,
    note_copy,
    note_unknown,
    place,
    refined,
    tile,
)
from contributed._neuronxcc_vendor import nisa, nl

engine = nisa.engine
reduce_cmd = nisa.reduce_cmd
oob_mode = nisa.oob_mode
dge_mode = nisa.dge_mode
nc_version = nisa.nc_version

# Of kernels, of index expressions, and of `range_select`, whose page names NumPy's.
COMPARISONS = (
    (nl.equal, operator.eq, np.equal),
    (nl.greater, operator.gt, np.greater),
    (nl.greater_equal, operator.ge, np.greater_equal),
    (nl.less, operator.lt, np.less),
    (nl.less_equal, operator.le, np.less_equal),
)


def get_nc_version() -> Any:
    """The NeuronCore that the program is built for."""
    return program().version


def _written(dst: Tensor) -> bool:
    """Note that a view is written; whether there is an instruction to issue."""
    program().writes(dst)
    note_unknown(dst)
    return not program().dry


def _free(*views: Any) -> list[Dims]:
    """Free dimensions of views on chip, the same counts in all."""
    partitions = {t.shape[0] for t in views}
    assert len(partitions) == 1, f"partitions: received {partitions}, allowed one number"
    return refined(*(t.dims()[1:] for t in views))


def tensor_copy(dst: Tensor, src: Tensor, engine: Any = engine.unknown) -> None:
    """dst = src."""
    program().writes(dst)
    note_copy(dst, src)
    if program().dry:
        return
    to, data = _free(dst, src)
    tensor, index = place(dst, to)
    tensor[index] = nisa.tensor_copy(tile(src, data), dtype=dst.dtype.vendor, engine=engine)


def memset(dst: Tensor, value: Any, engine: Any = engine.unknown) -> None:
    """dst = a number."""
    program().writes(dst)
    note_unknown(dst, value if isinstance(value, int) else None)
    if program().dry:
        return
    dims = merged(dst.dims()[1:])
    shape = (dst.shape[0], *([n for _, n in dims] or [1]))
    tensor, index = place(dst, dims)
    tensor[index] = nisa.memset(shape, value, dst.dtype.vendor, engine=engine)


def tensor_tensor(dst: Tensor, data1: Tensor, data2: Tensor, op: Any, engine: Any = engine.unknown) -> None:
    """dst = data1 op data2."""
    if not _written(dst):
        return
    to, a, b = _free(dst, data1, data2)
    tensor, index = place(dst, to)
    tensor[index] = nisa.tensor_tensor(tile(data1, a), tile(data2, b), op, dtype=dst.dtype.vendor, engine=engine)


def tensor_scalar(
    dst: Tensor,
    data: Tensor,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Any = engine.unknown,
) -> None:
    """dst = (data op0 operand0) op1 operand1, operands a number or a column."""
    if not _written(dst):
        return
    to, a = _free(dst, data)
    tensor, index = place(dst, to)
    tensor[index] = nisa.tensor_scalar(
        tile(data, a),
        op0,
        column(operand0),
        reverse0,
        op1,
        column(operand1),
        reverse1,
        dtype=dst.dtype.vendor,
        engine=engine,
    )


def scalar_tensor_tensor(
    dst: Tensor,
    data: Tensor,
    op0: Any,
    operand0: Any,
    op1: Any,
    operand1: Tensor,
    reverse0: bool = False,
    reverse1: bool = False,
) -> None:
    """dst = (data op0 operand0) op1 operand1, operand0 a number or a column, operand1 a tile."""
    if not _written(dst):
        return
    to, a, b = _free(dst, data, operand1)
    tensor, index = place(dst, to)
    tensor[index] = nisa.scalar_tensor_tensor(
        data=tile(data, a),
        op0=op0,
        operand0=column(operand0),
        op1=op1,
        operand1=tile(operand1, b),
        reverse0=reverse0,
        reverse1=reverse1,
        dtype=dst.dtype.vendor,
    )


def tensor_reduce(dst: Tensor, op: Any, data: Tensor, axis: Any, negate: bool = False) -> None:
    """dst = the reduction of data over its last dimensions, `axis`."""
    if not _written(dst):
        return
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    assert axes == tuple(range(data.ndim - len(axes), data.ndim)), f"axis: received {axis}, allowed the last ones"
    kept, to = refined(data.dims()[1 : data.ndim - len(axes)], dst.dims()[1:])
    kept, to = kept or [(1, 1)], to or [(1, 1)]
    reduced = merged(data.dims()[data.ndim - len(axes) :]) or [(1, 1)]
    if len(kept) == 1 and kept[0][1] == 1 and len(reduced) == 1:
        kept = []  # [P, n] to [P, 1]
    dims = [*kept, *reduced]
    tensor, index = place(dst, to)
    tensor[index] = nisa.tensor_reduce(
        op,
        tile(data, dims),
        axis=list(range(1 + len(kept), 1 + len(dims))),
        dtype=dst.dtype.vendor,
        negate=negate,
        keepdims=not kept,
    )


def activation(
    dst: Tensor,
    op: Any,
    data: Tensor,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: Tensor | None = None,
    reduce_cmd: Any = reduce_cmd.idle,
) -> None:
    """dst = op(data * scale + bias), and the sums of rows."""
    if reduce_res is not None:
        _written(reduce_res)
    if not _written(dst):
        return
    to, a = _free(dst, data)
    tensor, index = place(dst, to)
    tensor[index] = nisa.activation(
        op,
        tile(data, a),
        bias=column(bias),
        scale=column(scale),
        reduce_op=reduce_op,
        reduce_res=column(reduce_res),
        reduce_cmd=reduce_cmd,
        dtype=dst.dtype.vendor,
    )


def reciprocal(dst: Tensor, data: Tensor) -> None:
    """dst = 1 / data."""
    if not _written(dst):
        return
    to, a = _free(dst, data)
    tensor, index = place(dst, to)
    tensor[index] = nisa.reciprocal(tile(data, a), dtype=dst.dtype.vendor)


def tensor_tensor_scan(
    dst: Tensor,
    data0: Tensor,
    data1: Tensor,
    initial: Any,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
) -> None:
    """dst[i] = (data0[i] op0 dst[i - 1]) op1 data1[i]."""
    if not _written(dst):
        return
    to, a, b = _free(dst, data0, data1)
    tensor, index = place(dst, to)
    tensor[index] = nisa.tensor_tensor_scan(
        tile(data0, a), tile(data1, b), column(initial), op0, op1, reverse0, reverse1, dtype=dst.dtype.vendor
    )


def range_select(
    dst: Tensor,
    on_true_tile: Tensor,
    comp_op0: Any,
    comp_op1: Any,
    bound0: Tensor,
    bound1: Tensor,
    reduce_cmd: Any = reduce_cmd.reset_reduce,
    reduce_res: Tensor | None = None,
    reduce_op: Any = nl.maximum,
    range_start: int = 0,
) -> None:
    """dst = on_true_tile where column number op0 bound0 and op1 bound1, else the lowest number; and its maximum."""
    assert reduce_op is nl.maximum, f"reduce_op: received {reduce_op}, allowed nl.maximum"
    if reduce_res is not None:
        _written(reduce_res)
    if not _written(dst):
        return
    to, a = _free(dst, on_true_tile)
    tensor, index = place(dst, to)
    tensor[index] = nisa.range_select(
        on_true_tile=tile(on_true_tile, a),
        comp_op0=next(numpy for op, _, numpy in COMPARISONS if op is comp_op0),
        comp_op1=next(numpy for op, _, numpy in COMPARISONS if op is comp_op1),
        bound0=column(bound0),
        bound1=column(bound1),
        reduce_cmd=reduce_cmd,
        reduce_res=column(reduce_res),
        range_start=range_start,
        dtype=dst.dtype.vendor,
    )


def tensor_copy_predicated(dst: Tensor, src: Any, predicate: Tensor, reverse_pred: bool = False) -> None:
    """dst = src where the predicate is not 0."""
    if not _written(dst):
        return
    views = [dst, predicate, *([src] if isinstance(src, Tensor) else [])]
    to, where, *data = _free(*views)
    tensor, index = place(dst, to)
    nisa.tensor_copy_predicated(
        src=tile(src, data[0]) if data else src,
        dst=tensor[index],
        predicate=tile(predicate, where),
        reverse_pred=reverse_pred,
    )


def affine_select(
    dst: Tensor,
    pattern: Any,
    channel_multiplier: int,
    on_true_tile: Tensor,
    on_false_value: float,
    cmp_op: Any = nl.equal,
    offset: int = 0,
) -> None:
    """dst = on_true_tile where (offset + partition * channel_multiplier + pattern) cmp_op 0."""
    if not _written(dst):
        return
    to, a, steps = _free_with(pattern, dst, on_true_tile)
    compare = next(python for op, python, _ in COMPARISONS if op is cmp_op)
    condition = compare(_affine(dst.shape[0], steps, offset, channel_multiplier), 0)
    tensor, index = place(dst, to)
    tensor[index] = nisa.affine_select(condition, tile(on_true_tile, a), on_false_value, dtype=dst.dtype.vendor)


def iota(dst: Tensor, pattern: Any, offset: int = 0, channel_multiplier: int = 0) -> None:
    """dst = offset + partition * channel_multiplier + pattern."""
    if not _written(dst):
        return
    to, steps = _free_with(pattern, dst)
    tensor, index = place(dst, to)
    if channel_multiplier:
        assert all(step or n == 1 for step, n in steps), f"a pattern that repeats: {pattern}"
        tensor[index] = nisa.iota(_affine(dst.shape[0], steps, offset, channel_multiplier), dst.dtype.vendor)
        return
    shape = (dst.shape[0], *[n for _, n in steps])
    width = prod(shape[1:])
    numbers = on_chip((shape[0], width), dst.dtype, "sbuf")
    first = numbers[0:1, 0:width].reshape((1, *shape[1:]))
    # One element of what does not change, which is then repeated.
    once = [(step, n if step else 1) for step, n in steps]
    first[...] = nisa.tensor_copy(nisa.iota(_affine(1, once, offset, 0), dst.dtype.vendor).broadcast_to(first.shape))
    repeat_first(numbers, shape[0], width)
    tensor[index] = nisa.tensor_copy(numbers.reshape(shape))


def _free_with(pattern: Any, *views: Tensor) -> list[Dims]:
    """Free dimensions of views, and after them those of a pattern `[[step, count], ...]`, the same counts in all."""
    out = refined(*(t.dims()[1:] for t in views), [(step, n) for step, n in pattern])
    return out if out[0] else [[(1, 1)] for _ in out]


def _affine(partitions: int, steps: Dims, offset: int, multiplier: int) -> Any:
    rank = 1 + len(steps)
    value = offset + multiplier * arange(partitions, 0, rank)
    for axis, (step, n) in enumerate(steps, 1):
        value = value + step * arange(n, axis, rank)
    return value


def nc_matmul(
    dst: Tensor,
    stationary: Tensor,
    moving: Tensor,
    is_transpose: bool = False,
    accumulate: bool | None = None,
) -> None:
    """dst = stationary.T @ moving, or += that. A transpose takes the identity as `moving`."""
    if accumulate is None:
        assert not dst.storage.multiplied, "accumulate: received None for a tile with a product, allowed True or False"
        accumulate = False
    dst.storage.multiplied = True
    assert moving.storage.identity or not is_transpose, "a transpose by something else than the identity"
    if not _written(dst):
        return
    to, columns = refined(dst.dims()[1:], moving.dims()[1:])
    left = tile(stationary, merged(stationary.dims()[1:]))
    for a, b in _by_column(dst, to, moving, columns):
        tensor, index = place(*a)
        if is_transpose:
            assert not accumulate, "a transpose that is added"
            tensor[index] = nisa.nc_transpose(left, engine=engine.tensor)
        elif accumulate:
            tensor[index] += nisa.nc_matmul(left, tile(*b))
        else:
            tensor[index] = nisa.nc_matmul(left, tile(*b))


def _by_column(dst: Tensor, to: Dims, moving: Tensor, columns: Dims) -> Any:
    """Views of dst and `moving` with one free dimension each, which one product has."""
    if len(to) <= 1:
        return [((dst, to), (moving, columns))]
    parts = []
    (step, n), (by, _) = to[0], columns[0]
    for i in range(n):
        a = Tensor(dst.storage, dst.dtype, dst.shape, dst.strides, dst.offset + i * step)
        b = Tensor(moving.storage, moving.dtype, moving.shape, moving.strides, moving.offset + i * by)
        parts += _by_column(a, to[1:], b, columns[1:])
    return parts


# -- registers


def register_alloc() -> Register:
    """A register."""
    return Register()


def register_load(dst: Register, src: Tensor) -> None:
    """A register's value, from a tensor of one element."""
    dst.value, dst.most, dst.tile = known(src), None, None
    if dst.value is None:
        dst.tile = program().ndarray((1, 1), DTYPES["int32"], "sbuf")
        copy = tensor_copy if src.on_chip else dma_copy
        copy(dst.tile, src.reshape((1, 1)))
