"""Reductions over free dimensions, over loops and over programs, and what is built of them: softmax, rms_norm."""

from __future__ import annotations

import builtins
from math import prod as product
from typing import Any

from nkisim import isa
from nkisim.dtypes import DType, bool_, float32
from nkisim.errors import call_site
from nkisim.legacy._assign import assign
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import Part, operand, produce
from nkisim.legacy._loops import LoopIndex, num_programs
from nkisim.legacy._operators import as_op
from nkisim.legacy._state import state
from nkisim.legacy._tile import Tile
from nkisim.legacy.language._functions import exp, rsqrt, square
from nkisim.legacy.language._math import add, multiply, reciprocal, subtract
from nkisim.legacy.language._move import copy
from nkisim.operators import NamedOperator, alu
from nkisim.tensor import NkiTensor
from nkisim.view import as_int


def free_axes(what: str, x: Tile, axis: Any) -> tuple[int, ...]:
    """The reduced dimensions, ascending.

    The documentation asks for the last ones; its own example reduces others, which an access pattern can put last.
    """
    given = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    numbers = [as_int(a) for a in given]
    axes = tuple(sorted({a + x.ndim if a < 0 else a for a in numbers if a is not None}))
    if None in numbers or len(axes) != len(given) or not axes or axes[0] < 1 or axes[-1] >= x.ndim:
        refuse(
            what,
            "axis",
            "reduced dimensions",
            axis,
            f"free dimensions: of 1..{x.ndim - 1}",
            f"nki.language.{what}, SDK 2.26",
        )
    return axes


def reduce_tile(
    what: str, op: Any, x: Tile, axis: Any, dtype: Any, mask: Any, keepdims: bool, default: DType, negate: bool = False
) -> Tile:
    """`x` reduced over free dimensions by `tensor_reduce`; the result keeps at least two dimensions."""
    axes = free_axes(what, x, axis)
    kept = tuple(d for d in range(x.ndim) if d not in axes)
    last = x.transposed((*kept, *axes))
    if keepdims:
        shape = tuple(1 if d in axes else n for d, n in enumerate(x.shape))
        dims: tuple[int | None, ...] = tuple(None if d in axes else d for d in range(x.ndim))
    else:
        shape = tuple(x.shape[d] for d in kept)
        dims = kept
        if len(shape) == 1:
            shape, dims = (*shape, 1), (*dims, None)

    def issue(dst: NkiTensor, part: Part) -> None:
        data = part.read(last, (*kept, *axes))
        over = tuple(range(data.ndim - len(axes), data.ndim))
        isa.tensor_reduce(dst=dst, op=op, data=data, axis=over, negate=negate)

    return produce(what, shape, issue, dtype=dtype, default=default, mask=mask, over=x.shape, dims=dims)


def _reduce(name: str, op: str, x: Any, axis: Any, dtype: Any, mask: Any, keepdims: bool) -> Tile:
    t = operand(name, "x", x)
    return reduce_tile(name, NamedOperator(op), t, axis, dtype, mask, keepdims, t.kind)


def sum(x: Any, axis: Any, *, dtype: Any = None, mask: Any = None, keepdims: bool = False) -> Tile:
    """Sum over `axis`."""
    return _reduce("sum", "add", x, axis, dtype, mask, keepdims)


def max(x: Any, axis: Any, *, dtype: Any = None, mask: Any = None, keepdims: bool = False) -> Tile:
    """Maximum over `axis`."""
    return _reduce("max", "maximum", x, axis, dtype, mask, keepdims)


def min(x: Any, axis: Any, *, dtype: Any = None, mask: Any = None, keepdims: bool = False) -> Tile:
    """Minimum over `axis`."""
    return _reduce("min", "minimum", x, axis, dtype, mask, keepdims)


def prod(x: Any, axis: Any, *, dtype: Any = None, mask: Any = None, keepdims: bool = False) -> Tile:
    """Product over `axis`."""
    return _reduce("prod", "multiply", x, axis, dtype, mask, keepdims)


def all(x: Any, axis: Any, *, dtype: Any = bool, mask: Any = None) -> Tile:
    """Whether no element along `axis` is 0."""
    t = operand("all", "x", x)
    return reduce_tile("all", NamedOperator("logical_and"), t, axis, dtype, mask, False, bool_)


def mean(x: Any, axis: Any, *, dtype: Any = None, mask: Any = None, keepdims: bool = False) -> Tile:
    """Arithmetic mean over `axis`; float32 for integers. A mask leaves elements out of the sum, not of the count."""
    t = operand("mean", "x", x)
    count = product(t.shape[d] for d in free_axes("mean", t, axis))
    total = reduce_tile("mean", NamedOperator("add"), t, axis, float32, mask, keepdims, float32)
    kind = t.kind if t.kind.is_float else float32
    return multiply(total, 1.0 / count, dtype=kind if dtype is None else dtype)


def var(x: Any, axis: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Variance over `axis`, of the population."""
    t = operand("var", "x", x)
    axes = free_axes("var", t, axis)
    count = product(t.shape[d] for d in axes)
    total = reduce_tile("var", NamedOperator("add"), t, axis, float32, mask, True, float32)
    centred = subtract(t, multiply(total, 1.0 / count, dtype=float32), dtype=float32, mask=mask)
    squares = square(centred, dtype=float32, mask=mask)
    squares._settle()
    spread = reduce_tile("var", NamedOperator("add"), squares, axis, float32, mask, False, float32)
    kind = t.kind if t.kind.is_float else float32
    return multiply(spread, 1.0 / count, dtype=kind if dtype is None else dtype)


def softmax(x: Any, axis: Any, *, dtype: Any = None, compute_dtype: Any = None, mask: Any = None) -> Tile:
    """exp(x - max) / sum(exp(x - max)) over `axis`; `compute_dtype` is the type between instructions."""
    t = operand("softmax", "x", x)
    inner = kind_of(float32 if compute_dtype is None else compute_dtype, "softmax compute_dtype")
    # Engines take one number per partition as float32 only.
    top = reduce_tile("softmax", NamedOperator("maximum"), t, axis, float32, mask, True, float32)
    weights = exp(subtract(t, top, dtype=inner, mask=mask), dtype=inner, mask=mask)
    weights._settle()
    total = reduce_tile("softmax", NamedOperator("add"), weights, axis, float32, mask, True, float32)
    return multiply(weights, reciprocal(total), dtype=t.kind if dtype is None else dtype, mask=mask)


def rms_norm(
    x: Any,
    w: Any,
    axis: Any,
    n: Any,
    epsilon: float = 1e-6,
    *,
    dtype: Any = None,
    compute_dtype: Any = None,
    mask: Any = None,
) -> Tile:
    """`x / sqrt(sum(x * x) / n + epsilon) * w`, with the sum over `axis`; w is broadcast."""
    t, weight = operand("rms_norm", "x", x), operand("rms_norm", "w", w)
    inner = kind_of(float32 if compute_dtype is None else compute_dtype, "rms_norm compute_dtype")
    squares = square(t, dtype=inner, mask=mask)
    squares._settle()
    total = reduce_tile("rms_norm", NamedOperator("add"), squares, axis, float32, mask, True, float32)
    scale = rsqrt(add(multiply(total, 1.0 / float(n), dtype=float32), float(epsilon), dtype=float32), dtype=float32)
    normal = multiply(t, scale, dtype=inner, mask=mask)
    return multiply(normal, weight, dtype=t.kind if dtype is None else dtype, mask=mask)


def loop_reduce(x: Any, op: Any, loop_indices: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x` reduced by `op` over the trips of loops; after the last trip the tile holds the whole reduction.

    `loop_indices` are indices of running loops, as `nl.affine_range` and its kin give them.
    """
    t = operand("loop_reduce", "x", x)
    operator = as_op("loop_reduce", "op", op)
    if (found := alu(operator)) is None or not found.is_reduction:
        refuse("loop_reduce", "op", "operator", operator.nki_op, "an operator of reductions", _PAGE)
    given = tuple(loop_indices) if isinstance(loop_indices, (tuple, list)) else (loop_indices,)
    st = state("loop_reduce")
    if not given or not builtins.all(isinstance(i, LoopIndex) and i.loop in st.loops for i in given):
        refuse("loop_reduce", "loop_indices", "value", given, "indices of the running loops around", _PAGE)
    loops = [i.loop for i in given]
    outermost = builtins.min(loops, key=st.loops.index)
    others = tuple(loop.trip for loop in st.loops[st.loops.index(outermost) :] if loop not in loops)
    key = (call_site(), others)
    kind = kind_of(t.kind if dtype is None else dtype, "loop_reduce dtype")
    before: Tile | None = outermost.running.get(key)
    if before is None:
        result = copy(t, dtype=kind, mask=mask)
        # It outlives the trips of the loops that it reduces over.
        at = next(i for i, (loop, _) in enumerate([*st.scope, (outermost, 0)]) if loop is outermost)
        result.root.scope = st.scope[:at]
        result._settle()
        outermost.running[key] = result
        return result

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.tensor_tensor(dst=dst, data1=part.read(before), data2=part.read(t), op=operator)

    combined = produce("loop_reduce", t.shape, issue, default=kind, mask=mask)
    assign(before, combined, unnamed=True, reduces=True)
    return before


_PAGE = "nki.language.loop_reduce, SDK 2.26"


def all_reduce(
    x: Any,
    op: Any,
    program_axes: Any,
    *,
    dtype: Any = None,
    mask: Any = None,
    parallel_reduce: bool = True,
    asynchronous: bool = False,
) -> Tile:
    """`x` reduced by `op` over the programs along axes of the launch grid.

    Raises:
        NotImplementedError: more than one program is reduced over: here programs run one after the other.
    """
    as_op("all_reduce", "op", op)
    t = operand("all_reduce", "x", x)
    if num_programs(program_axes) > 1:
        raise NotImplementedError(
            f"all_reduce: received program_axes {program_axes!r} with {num_programs(program_axes)} programs "
            f"(parallel_reduce={parallel_reduce}, asynchronous={asynchronous}); programs of a grid run one after the "
            "other here and cannot wait for each other"
        )
    return copy(t, dtype=dtype, mask=mask)
