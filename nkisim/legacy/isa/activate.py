"""Scalar Engine of SDK 2.26: activation functions."""

from __future__ import annotations

from typing import Any

from nkisim import isa as nisa
from nkisim.dtypes import bfloat16, float16, float32
from nkisim.legacy import compiler
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import operand, produce
from nkisim.legacy._operators import as_op
from nkisim.legacy._tile import Tile
from nkisim.legacy.isa._arguments import column, is_number, one_pass, result_buffer, write_column
from nkisim.legacy.isa._enums import current
from nkisim.legacy.isa._enums import reduce_cmd as ReduceCmd
from nkisim.tensor import NkiTensor

_BIAS = (float32, float16, bfloat16)


def activation(
    op: Any,
    data: Any,
    *,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: Any = None,
    reduce_cmd: Any = ReduceCmd.idle,
    mask: Any = None,
    dtype: Any = None,
    **kwargs: Any,
) -> Tile:
    """op(data * scale + bias) in float32; `reduce_cmd` and `reduce_res` as in the current `activation`.

    `bias` is a [P, 1] tile of float32, float16 or bfloat16 or None, `scale` a number or a [P, 1] tile of float32.

    Raises:
        NkiError: other biases and scales, and as the current `activation`.
    """
    command = current(ReduceCmd, reduce_cmd, "activation", "reduce_cmd")
    return _activation("activation", op, data, bias, scale, reduce_op, reduce_res, command, mask, dtype, kwargs)


def activation_reduce(
    op: Any,
    data: Any,
    *,
    reduce_op: Any,
    reduce_res: Any,
    bias: Any = None,
    scale: Any = 1.0,
    mask: Any = None,
    dtype: Any = None,
    **kwargs: Any,
) -> Tile:
    """`activation` with `reduce_cmd.reset_reduce`: also writes each row's sum to `reduce_res`, [P, 1].

    Raises:
        NkiError: as `activation`.
    """
    command = nisa.reduce_cmd.reset_reduce
    return _activation("activation_reduce", op, data, bias, scale, reduce_op, reduce_res, command, mask, dtype, kwargs)


def _activation(
    what: str,
    op: Any,
    data: Any,
    bias: Any,
    scale: Any,
    reduce_op: Any,
    reduce_res: Any,
    command: nisa.reduce_cmd,
    mask: Any,
    dtype: Any,
    kwargs: dict[str, Any],
) -> Tile:
    buffer = result_buffer(what, kwargs)
    t = operand(what, "data", data)
    function = as_op(what, "op", op)
    reduction = None if reduce_op is None else as_op(what, "reduce_op", reduce_op)
    partitions = t.shape[0]
    addend = _bias(what, bias, partitions)
    factor = _scale(what, scale, partitions)
    result = column(what, "reduce_res", reduce_res, partitions)
    if command is not nisa.reduce_cmd.idle:
        one_pass(what, mask, t.shape)

    def issue(dst: NkiTensor, part: Any) -> None:
        shared = {"bias": part.column(addend), "scale": part.column(factor)}
        x, sums = part.read(t), write_column(part, result)
        if what == "activation_reduce":
            nisa.activation_reduce(dst, function, x, reduction, sums, **shared)
        else:
            nisa.activation(dst, function, x, reduce_op=reduction, reduce_res=sums, reduce_cmd=command, **shared)

    return produce(what, t.shape, issue, dtype=dtype, default=t.kind, mask=mask, buffer=buffer)


def _bias(what: str, bias: Any, partitions: int) -> Any:
    if bias is None:
        compiler.note_implicit(what, "err_bias_tensor_must_be_specified_in_allocation: no bias", "a [P, 1] bias tile")
        return None
    rule = "err_activation_bias_invalid_type: a vector of float32, float16 or bfloat16"
    if is_number(bias):
        refuse(what, "bias", rule, received=bias, allowed=f"a [{partitions}, 1] tile or None")
    t = column(what, "bias", bias, partitions)
    if t.kind not in _BIAS:
        refuse(what, "bias", rule, received=t.kind, allowed=", ".join(_BIAS))
    return t


def _scale(what: str, scale: Any, partitions: int) -> Any:
    if is_number(scale):
        return scale
    t = operand(what, "scale", scale)
    if t.shape != (partitions, 1):
        rule = "err_activation_scale_scalar_or_vector: one value, or one per partition"
        refuse(what, "scale", rule, received=list(t.shape), allowed=f"a number or [{partitions}, 1]")
    if t.kind is not float32:
        rule = "err_activation_scale_invalid_type: a number or a vector of float32"
        refuse(what, "scale", rule, received=t.kind, allowed=float32)
    return t
