"""Operators that `op=` arguments name: element-wise ALU operators and Scalar Engine activations.

An operator is named by the `nki.language` callable of the same name; `alu` and `activation` look it up.
Arithmetic operators see float32 and return float32; bit operators see the stored integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import pi
from typing import Any, NoReturn, TypeVar

import numpy as np

from nkisim.dtypes import Array

Function = Callable[..., Array]

ALU_TABLE = "Supported math operators for NKI ISA (NKI 0.6)"
ACTIVATION_TABLE = "Supported activation functions for NKI ISA (NKI 0.6)"
TRUE, FALSE = np.float32(1), np.float32(0)


@dataclass(frozen=True)
class AluOp:
    """One ALU operator.

    kind is "bitvec", "arithmetic", "compare", "other" or "unary" as in the documentation's table;
    `identity` is the value a reduction starts from, None where the operator is no reduction.
    """

    name: str
    kind: str
    function: Function
    identity: float | int | None = None
    reduce: Function | None = None

    @property
    def is_bitvec(self) -> bool:
        """Whether it works on bit patterns of integers."""
        return self.kind == "bitvec"

    @property
    def is_reduction(self) -> bool:
        """Whether `tensor_reduce` takes it."""
        return self.reduce is not None


def _compare(f: Callable[[Array, Array], Array]) -> Function:
    return lambda x, y: f(x, y).astype(np.float32)


def _logical(f: Callable[[Array, Array], Array]) -> Function:
    return lambda x, y: f(x != 0, y != 0).astype(np.float32)


def _logical_reduce(ufunc: Any) -> Function:
    return lambda x, axis: ufunc.reduce(x != 0, axis=axis).astype(np.float32)


def _ufunc_reduce(ufunc: Any) -> Function:
    return lambda x, axis: ufunc.reduce(x, axis=axis)


def _subtract_reduce(x: Array, axis: Any) -> Array:
    """0 - x0 - x1 - ...: a register that starts at 0 and subtracts each element."""
    total: Array = np.add.reduce(x, axis=axis)
    return -total


def _abs_max(x: Array, y: Array) -> Array:
    return np.where(np.abs(x) > np.abs(y), x, y)


def _abs_min(x: Array, y: Array) -> Array:
    return np.where(np.abs(x) < np.abs(y), x, y)


def _shift_left(x: Array, y: Array) -> Array:
    return np.left_shift(x, y).astype(x.dtype)


def _shift_right(x: Array, y: Array) -> Array:
    """Logical shift: zeros come in from the left whatever the sign."""
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    bits: Array = np.right_shift(x.view(unsigned), np.asarray(y).astype(unsigned))
    return bits.view(x.dtype)


def _power(x: Array, y: Array) -> Array:
    return np.power(x.astype(np.float32), y)


# fmt: off
ALU: dict[str, AluOp] = {
    op.name: op
    for op in (
        AluOp("invert", "bitvec", np.invert),
        AluOp("bitwise_and", "bitvec", np.bitwise_and, -1, _ufunc_reduce(np.bitwise_and)),
        AluOp("bitwise_or", "bitvec", np.bitwise_or, 0, _ufunc_reduce(np.bitwise_or)),
        AluOp("bitwise_xor", "bitvec", np.bitwise_xor, 0, _ufunc_reduce(np.bitwise_xor)),
        AluOp("left_shift", "bitvec", _shift_left),
        AluOp("right_shift", "bitvec", _shift_right),
        AluOp("add", "arithmetic", np.add, 0.0, _ufunc_reduce(np.add)),
        AluOp("multiply", "arithmetic", np.multiply, 1.0, _ufunc_reduce(np.multiply)),
        AluOp("subtract", "arithmetic", np.subtract, 0.0, _subtract_reduce),
        AluOp("maximum", "arithmetic", np.maximum, -np.inf, _ufunc_reduce(np.maximum)),
        AluOp("minimum", "arithmetic", np.minimum, np.inf, _ufunc_reduce(np.minimum)),
        AluOp("logical_and", "arithmetic", _logical(np.logical_and), 1.0, _logical_reduce(np.logical_and)),
        AluOp("logical_or", "arithmetic", _logical(np.logical_or), 0.0, _logical_reduce(np.logical_or)),
        AluOp("logical_xor", "arithmetic", _logical(np.logical_xor), 0.0, _logical_reduce(np.logical_xor)),
        AluOp("equal", "compare", _compare(np.equal)),
        AluOp("not_equal", "compare", _compare(np.not_equal)),
        AluOp("greater", "compare", _compare(np.greater)),
        AluOp("greater_equal", "compare", _compare(np.greater_equal)),
        AluOp("less", "compare", _compare(np.less)),
        AluOp("less_equal", "compare", _compare(np.less_equal)),
        AluOp("power", "other", _power),
        AluOp("abs_max", "other", _abs_max),
        AluOp("abs_min", "other", _abs_min),
        AluOp("abs", "unary", np.abs),
        AluOp("square", "unary", np.square),
        AluOp("relu", "unary", lambda x: np.maximum(x, FALSE)),
        AluOp("rsqrt", "unary", lambda x: TRUE / np.sqrt(x)),
        AluOp("reciprocal", "unary", lambda x: TRUE / x),
        AluOp("bypass", "other", lambda x, _y=None: x),
        AluOp("average", "other", np.add),
    )
}
# fmt: on


@dataclass(frozen=True)
class Activation:
    """One Scalar Engine function; outside `valid` the hardware's result is invalid and ours is NaN."""

    name: str
    function: Function
    valid: tuple[float, float] | None = None
    magnitude: bool = False  # `valid` bounds |x|

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Apply to float32; the simulator evaluates the exact function, not the engine's polynomial.

        `out`, which may be `x`, is memory that the result may be put into.
        """
        outside = None
        if self.valid is not None:
            seen = np.abs(x) if self.magnitude else x
            outside = ~((seen >= self.valid[0]) & (seen <= self.valid[1]))
        in_place = out is not None and isinstance(self.function, np.ufunc)
        y: Array = self.function(x, out=out) if in_place else self.function(x)
        if outside is not None and outside.any():
            y = np.where(outside, np.float32(np.nan), y)
        return y if y.dtype == np.float32 else y.astype(np.float32)


# Beyond this magnitude these functions equal their limits in float32; clipping there avoids inf * 0.
_FAR = np.float32(1e4)


def _sigmoid(x: Array) -> Array:
    # Where exp overflows the quotient is 0, as it should be.
    return TRUE / (TRUE + np.exp(-x))


def _softplus(x: Array) -> Array:
    return np.logaddexp(np.float32(0), x)


def _erf64(x: Array) -> Array:
    """Error function by its Maclaurin series below 3 and its continued fraction above, in float64."""
    z = np.abs(x)
    small = np.minimum(z, 3.0)
    term = small.copy()
    total = small.copy()
    for n in range(1, 60):
        term = -term * small * small / n
        total += term / (2 * n + 1)
    series = 2.0 / np.sqrt(pi) * total
    big = np.maximum(z, 3.0)
    fraction = big.copy()
    for n in range(40, 0, -1):
        fraction = big + (n / 2.0) / fraction
    tail = 1.0 - np.exp(-big * big) / (np.sqrt(pi) * fraction)
    return np.asarray(np.copysign(np.where(z < 3.0, series, tail), x))


def _erf(x: Array) -> Array:
    y: Array = _erf64(x.astype(np.float64)).astype(np.float32)
    return y


def _erf_dx(x: Array) -> Array:
    density: Array = np.exp(-x * x)
    return np.float32(2.0 / np.sqrt(pi)) * density


_SQRT_2_OVER_PI = np.float32(np.sqrt(2.0 / pi))


def _normal_cdf(x: Array) -> Array:
    return np.asarray(0.5 * (1.0 + _erf64(x * np.sqrt(0.5))))


def _gelu(x: Array) -> Array:
    # float64 inside: left of 0 the sum 1 + erf cancels.
    wide = np.maximum(x, -_FAR).astype(np.float64)
    return (wide * _normal_cdf(wide)).astype(np.float32)


def _gelu_dx(x: Array) -> Array:
    wide = np.clip(x, -_FAR, _FAR).astype(np.float64)
    density = np.exp(-0.5 * wide * wide) / np.sqrt(2.0 * pi)
    y: Array = (_normal_cdf(wide) + wide * density).astype(np.float32)
    return y


def _gelu_tanh(x: Array) -> Array:
    # 0.5 (1 + tanh(u)) is sigmoid(2 u), which does not cancel.
    x = np.maximum(x, -_FAR)
    return x * _sigmoid(np.float32(2.0) * _SQRT_2_OVER_PI * (x + np.float32(0.044715) * x * x * x))


def _gelu_sigmoid(x: Array) -> Array:
    x = np.maximum(x, -_FAR)
    return x * _sigmoid(np.float32(1.702) * x)


def _gelu_sigmoid_dx(x: Array) -> Array:
    x = np.clip(x, -_FAR, _FAR)
    s = _sigmoid(np.float32(1.702) * x)
    return s + np.float32(1.702) * x * s * (TRUE - s)


def _silu(x: Array) -> Array:
    x = np.maximum(x, -_FAR)
    return x * _sigmoid(x)


def _silu_dx(x: Array) -> Array:
    x = np.clip(x, -_FAR, _FAR)
    s = _sigmoid(x)
    return s + x * s * (TRUE - s)


def _mish(x: Array) -> Array:
    x = np.maximum(x, -_FAR)
    return x * np.tanh(_softplus(x))


def prelu(x: Array, slope: Array) -> Array:
    """The Scalar Engine function with a parameter: x where x >= 0, slope * x elsewhere."""
    return np.where(x >= 0, x, x * slope)


# The engine evaluates its cubic for sin without range reduction: sin(9.0) is about 27.65. The cubic
# through the table's figure that matches sin at 0 and pi is assumed: sin(pi - r) near the end of range.
_SIN_CUBIC_AT = np.float32(pi)


def _sin(x: Array) -> Array:
    inside = np.abs(x) <= _SIN_CUBIC_AT
    r = np.abs(x) - _SIN_CUBIC_AT
    # Taylor cubic of sin at +-pi: -(r - r^3 / 6), odd in x.
    outside = np.sign(x) * (r * r * r / np.float32(6.0) - r)
    return np.where(inside, np.sin(x), outside)


# fmt: off
ACTIVATIONS: dict[str, Activation] = {
    f.name: f
    for f in (
        Activation("copy", lambda x: x), Activation("square", np.square), Activation("sigmoid", _sigmoid),
        Activation("relu", lambda x: np.maximum(x, FALSE)), Activation("gelu", _gelu), Activation("gelu_dx", _gelu_dx),
        Activation("gelu_apprx_tanh", _gelu_tanh), Activation("gelu_apprx_sigmoid", _gelu_sigmoid),
        Activation("gelu_apprx_sigmoid_dx", _gelu_sigmoid_dx), Activation("silu", _silu),
        Activation("silu_dx", _silu_dx), Activation("tanh", np.tanh), Activation("softplus", _softplus),
        Activation("mish", _mish), Activation("erf", _erf), Activation("erf_dx", _erf_dx), Activation("exp", np.exp),
        Activation("log", np.log, (2.0**-64, 2.0**64)), Activation("sin", _sin),
        Activation("arctan", np.arctan, (-pi / 2, pi / 2)), Activation("sqrt", np.sqrt, (2.0**-116, 2.0**118)),
        Activation("rsqrt", lambda x: TRUE / np.sqrt(x), (2.0**-87, 2.0**97)),
        Activation("reciprocal", lambda x: TRUE / x, (2.0**-42, 2.0**42), magnitude=True),
        Activation("sign", np.sign), Activation("abs", np.abs),
    )
}
# fmt: on

_LANGUAGE = __name__.rpartition(".")[0] + ".language"
_F = TypeVar("_F", bound=Callable[..., Any])


def operator(function: _F) -> _F:
    """Mark an `nki.language` callable as usable in `op=` under its own name."""
    function.nki_op = function.__name__  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class NamedOperator:
    """An operator that exists for `op=` only: `nl.bypass`, `nl.prelu`, `nl.average`."""

    nki_op: str

    def __repr__(self) -> str:
        return f"nl.{self.nki_op}"

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Not callable."""
        raise TypeError(f"nl.{self.nki_op} is an operator name for op= arguments and cannot be called")


def op_name(op: Any) -> str:
    """The operator's name; for an `nki.language` function that is no operator `nl.<name>`, else the repr."""
    name = getattr(op, "nki_op", None)
    if isinstance(name, str):
        return name
    module = getattr(op, "__module__", None)
    if callable(op) and isinstance(module, str) and module.startswith(_LANGUAGE):
        return f"nl.{getattr(op, '__name__', type(op).__name__)}"
    return repr(op)


def listed(names: Iterable[str]) -> str:
    """The `nki.language` names of operators, for messages."""
    return ", ".join(f"nl.{name}" for name in names)


def alu(op: Any) -> AluOp | None:
    """The ALU operator that `op` names, or None."""
    return ALU.get(op_name(op))


def activation(op: Any) -> Activation | None:
    """The activation function that `op` names, or None."""
    return ACTIVATIONS.get(op_name(op))
