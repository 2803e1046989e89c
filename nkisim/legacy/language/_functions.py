"""Functions of one tile: those of the Scalar Engine, and rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim import isa
from nkisim import language as current
from nkisim.legacy import compiler
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._issue import Part, operand, produce
from nkisim.legacy._root import from_tensor
from nkisim.legacy._state import state
from nkisim.legacy._tile import Tile
from nkisim.operators import NamedOperator
from nkisim.tensor import NkiTensor


def _activate(name: str, x: Any, dtype: Any, mask: Any) -> Tile:
    t = operand(name, "x", x)
    compiler.note_implicit(
        f"nl.{name}",
        "err_bias_tensor_must_be_specified_in_allocation: no bias",
        "nisa.activation with a [P, 1] bias tile",
    )
    op = NamedOperator(name)

    def issue(dst: NkiTensor, part: Part) -> None:
        isa.activation(dst=dst, op=op, data=part.read(t))

    return produce(name, t.shape, issue, dtype=dtype, default=t.kind, mask=mask)


def abs(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """|x|."""
    return _activate("abs", x, dtype, mask)


def arctan(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Inverse tangent, for |x| up to pi / 2."""
    return _activate("arctan", x, dtype, mask)


def erf(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Error function."""
    return _activate("erf", x, dtype, mask)


def erf_dx(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Derivative of `erf`."""
    return _activate("erf_dx", x, dtype, mask)


def exp(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """E to the power of x."""
    return _activate("exp", x, dtype, mask)


def gelu(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Gaussian error linear unit."""
    return _activate("gelu", x, dtype, mask)


def gelu_apprx_sigmoid(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`gelu` by x * sigmoid(1.702 x)."""
    return _activate("gelu_apprx_sigmoid", x, dtype, mask)


def gelu_apprx_tanh(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`gelu` by its tanh approximation."""
    return _activate("gelu_apprx_tanh", x, dtype, mask)


def gelu_dx(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Derivative of `gelu`."""
    return _activate("gelu_dx", x, dtype, mask)


def log(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Natural logarithm, for x of 2^-64 to 2^64."""
    return _activate("log", x, dtype, mask)


def mish(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x * tanh(softplus(x))`."""
    return _activate("mish", x, dtype, mask)


def relu(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """max(x, 0)."""
    return _activate("relu", x, dtype, mask)


def rsqrt(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """1 / sqrt(x), for x of 2^-87 to 2^97."""
    return _activate("rsqrt", x, dtype, mask)


def sigmoid(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """1 / (1 + exp(-x))."""
    return _activate("sigmoid", x, dtype, mask)


def sign(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """-1, 0 or 1."""
    return _activate("sign", x, dtype, mask)


def silu(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x * sigmoid(x)`."""
    return _activate("silu", x, dtype, mask)


def silu_dx(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Derivative of `silu`."""
    return _activate("silu_dx", x, dtype, mask)


def softplus(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """log(1 + exp(x))."""
    return _activate("softplus", x, dtype, mask)


def sqrt(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Square root, for x of 2^-116 to 2^118: 0 is outside."""
    return _activate("sqrt", x, dtype, mask)


def square(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x * x`."""
    return _activate("square", x, dtype, mask)


def tanh(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Hyperbolic tangent."""
    return _activate("tanh", x, dtype, mask)


def _compose(name: str, x: Any, dtype: Any, mask: Any) -> Tile:
    """A function of several instructions, as the current `nki.language` composes it."""
    t = operand(name, "x", x)
    kind = kind_of(t.kind if dtype is None else dtype, f"{name} dtype")
    function = getattr(current, name)
    scope = state(name).scope

    def issue(dst: NkiTensor, part: Part) -> None:
        value = function(part.read(t), dtype=kind)
        isa.tensor_copy(dst=dst, src=value)

    if mask is not None:
        return produce(name, t.shape, issue, dtype=dtype, default=kind, mask=mask)
    return from_tensor(function(t.tensor(name, "x"), dtype=kind), "", scope=scope).tile()


def sin(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Sine; the engine's own, for |x| up to pi, after a reduction to that range."""
    return _compose("sin", x, dtype, mask)


def cos(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Cosine, as a sine."""
    return _compose("cos", x, dtype, mask)


def tan(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """Tangent, as the quotient of sine and cosine."""
    return _compose("tan", x, dtype, mask)


def ceil(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """The smallest whole number >= x."""
    return _compose("ceil", x, dtype, mask)


def floor(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """The largest whole number <= x."""
    return _compose("floor", x, dtype, mask)


def trunc(x: Any, *, dtype: Any = None, mask: Any = None) -> Tile:
    """`x` without its fraction."""
    return _compose("trunc", x, dtype, mask)


def static_cast(input_data: Any, dtype: Any) -> Any:
    """A copy with another element type, of a tile or, also outside kernels, of a NumPy array."""
    from nkisim.legacy.language._move import copy

    if isinstance(input_data, np.ndarray):
        return input_data.astype(kind_of(dtype, "nki.language.static_cast dtype").numpy)
    return copy(input_data, dtype=dtype)
