"""Reductions over the last free dimensions, and what is built of them: softmax and rms_norm.

Sums and statistics are float32 between instructions and are rounded once, on the write of the result.
"""

from __future__ import annotations

import builtins
from math import prod as product
from typing import Any

from nkisim import isa as nisa
from nkisim.dtypes import DType, float32
from nkisim.language._activation import exp, reciprocal, rsqrt, square
from nkisim.language._creation import ndarray
from nkisim.language._math import Op, add, logical_and, maximum, minimum, multiply, subtract
from nkisim.language._wrap import dtype_of, is_number, refuse, tile
from nkisim.tensor import NkiTensor

Axes = tuple[int, ...]


def _axes(what: str, x: NkiTensor, axis: Any) -> Axes:
    """The reduced dimensions, ascending: free ones that end at the last."""
    given = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not builtins.all(isinstance(a, int) and not isinstance(a, bool) for a in given):
        refuse(what, "axis", "type", repr(axis), "an int or a tuple of ints")
    axes = tuple(sorted(a + x.ndim if a < 0 else a for a in given))
    if not axes or axes[0] < 1 or axes != tuple(range(axes[0], x.ndim)):
        legal = ", ".join(str(list(range(first, x.ndim))) for first in range(x.ndim - 1, 0, -1))
        refuse(what, "axis", "reduced dimensions", axis, f"{legal}: free dimensions that end at the last")
    return axes


def _kept(x: NkiTensor, axes: Axes) -> tuple[int, ...]:
    """The result's shape with the reduced dimensions at 1."""
    return tuple(1 if d in axes else n for d, n in enumerate(x.shape))


def _reduced(x: NkiTensor, axes: Axes, keepdims: bool) -> tuple[int, ...]:
    """The result's shape; a tile keeps at least two dimensions, as it does when indexed."""
    if keepdims:
        return _kept(x, axes)
    shape = tuple(n for d, n in enumerate(x.shape) if d not in axes)
    return shape if len(shape) > 1 else (*shape, 1)


def _reduce(what: str, op: Op, x: Any, axis: Any, dtype: Any, keepdims: bool) -> NkiTensor:
    x = tile(what, "x", x)
    axes = _axes(what, x, axis)
    dst = ndarray(_reduced(x, axes, keepdims), dtype_of(what, dtype, x.dtype))
    nisa.tensor_reduce(dst=dst, op=op, data=x, axis=axes, keepdims=keepdims)
    return dst


def _statistic(op: Op, x: NkiTensor, axes: Axes, negate: bool = False) -> NkiTensor:
    """A reduction in float32 with the reduced dimensions kept."""
    dst = ndarray(_kept(x, axes), float32)
    nisa.tensor_reduce(dst=dst, op=op, data=x, axis=axes, negate=negate, keepdims=True)
    return dst


def _with_statistic(op: Op, x: NkiTensor, s: NkiTensor, axes: Axes, dtype: DType) -> NkiTensor:
    """`x op s` with s repeated over the reduced dimensions."""
    dst = ndarray(x.shape, dtype)
    if s.free_size == 1:
        nisa.tensor_scalar(dst=dst, data=x, op0=op, operand0=s)
        return dst
    repeated = s
    for d in axes:
        repeated = repeated.broadcast(d, x.shape[d])
    nisa.tensor_tensor(dst=dst, data1=x, data2=repeated, op=op)
    return dst


def sum(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Sum over `axis`."""
    return _reduce("sum", add, x, axis, dtype, keepdims)


def max(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Maximum over `axis`."""
    return _reduce("max", maximum, x, axis, dtype, keepdims)


def min(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Minimum over `axis`."""
    return _reduce("min", minimum, x, axis, dtype, keepdims)


def prod(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Product over `axis`."""
    return _reduce("prod", multiply, x, axis, dtype, keepdims)


def all(x: Any, axis: Any, dtype: Any = None) -> NkiTensor:
    """1 where no element along `axis` is 0, else 0."""
    return _reduce("all", logical_and, x, axis, dtype, False)


def mean(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    """Arithmetic mean over `axis`."""
    x = tile("mean", "x", x)
    axes = _axes("mean", x, axis)
    total = _statistic(add, x, axes)
    dst = ndarray(_reduced(x, axes, keepdims), dtype_of("mean", dtype, x.dtype))
    nisa.tensor_scalar(dst=dst, data=total, op0=multiply, operand0=1.0 / _count(x, axes))
    return dst


def var(x: Any, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:  # noqa: ARG001
    """Variance over `axis`, of the population; the reduced dimensions stay at 1 whatever `keepdims` says."""
    x = tile("var", "x", x)
    axes = _axes("var", x, axis)
    count = _count(x, axes)
    total = _statistic(add, x, axes)
    centre = ndarray(total.shape, float32)
    nisa.tensor_scalar(dst=centre, data=total, op0=multiply, operand0=1.0 / count)
    squares = _squares(_with_statistic(subtract, x, centre, axes, float32), float32)
    dst = ndarray(total.shape, dtype_of("var", dtype, x.dtype))
    nisa.tensor_scalar(dst=dst, data=_statistic(add, squares, axes), op0=multiply, operand0=1.0 / count)
    return dst


def _count(x: NkiTensor, axes: Axes) -> int:
    return product(x.shape[d] for d in axes)


def _squares(x: NkiTensor, dtype: DType) -> NkiTensor:
    dst = ndarray(x.shape, dtype)
    nisa.activation(dst=dst, op=square, data=x)
    return dst


def softmax(x: Any, axis: Any = -1, dtype: Any = None) -> NkiTensor:
    """exp(x - max) / sum(exp(x - max)) over `axis`."""
    x = tile("softmax", "x", x)
    axes = _axes("softmax", x, axis)
    kind = dtype_of("softmax", dtype, x.dtype)
    weights = ndarray(x.shape, float32)
    if len(axes) == x.ndim - 1:
        # One activation subtracts, exponentiates and sums where each partition is one row.
        total = ndarray(_kept(x, axes), float32)
        nisa.activation(
            dst=weights,
            op=exp,
            data=x,
            bias=_statistic(maximum, x, axes, negate=True).reshape((x.shape[0], 1)),
            reduce_op=add,
            reduce_res=total.reshape((x.shape[0], 1)),
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )
    else:
        shifted = _with_statistic(subtract, x, _statistic(maximum, x, axes), axes, float32)
        nisa.activation(dst=weights, op=exp, data=shifted)
        total = _statistic(add, weights, axes)
    return _with_statistic(multiply, weights, reciprocal(total), axes, kind)


def rms_norm(
    x: Any, w: Any, axis: Any, n: Any, epsilon: float = 1e-6, dtype: Any = None, compute_dtype: Any = None
) -> NkiTensor:
    """`x / sqrt(sum(x * x) / n + epsilon) * w`, with the sum over `axis`.

    `w` has the shape of `x`. `compute_dtype` is the type of the squares and of x / rms; the statistics
    stay float32, as the engines' per-partition operands must be.
    """
    x, w = tile("rms_norm", "x", x), tile("rms_norm", "w", w)
    axes = _axes("rms_norm", x, axis)
    if w.shape != x.shape:
        refuse("rms_norm", "w", "shape", list(w.shape), f"{list(x.shape)}, that of x: tiles are not broadcast")
    if not is_number(n) or n <= 0:
        refuse("rms_norm", "n", "value", n, "a positive number")
    if not is_number(epsilon):
        refuse("rms_norm", "epsilon", "type", type(epsilon).__name__, "a number")
    kind = dtype_of("rms_norm", dtype, x.dtype)
    inner = dtype_of("rms_norm compute", compute_dtype, float32)
    total = _statistic(add, _squares(x, inner), axes)
    shifted = ndarray(total.shape, float32)
    nisa.tensor_scalar(dst=shifted, data=total, op0=multiply, operand0=1.0 / float(n), op1=add, operand1=float(epsilon))
    normal = _with_statistic(multiply, x, rsqrt(shifted), axes, inner)
    dst = ndarray(x.shape, kind)
    nisa.tensor_tensor(dst=dst, data1=normal, data2=w, op=multiply)
    return dst
