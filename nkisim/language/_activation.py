"""Functions of one tile that are one instruction.

Unless the docstring names another instruction it is `activation` on the Scalar Engine, with the valid
input range of its table. The callables are also names for `op=` arguments: `op=nl.exp`.
"""

from __future__ import annotations

from typing import Any

from nkisim import isa as nisa
from nkisim.language._creation import ndarray
from nkisim.language._math import Op
from nkisim.language._wrap import dtype_of, refuse, tile
from nkisim.memory import MemoryRegion
from nkisim.operators import op_name, operator
from nkisim.tensor import NkiTensor


def _activate(op: Op, x: Any, dtype: Any) -> NkiTensor:
    what = op_name(op)
    x = tile(what, "x", x)
    dst = ndarray(x.shape, dtype_of(what, dtype, x.dtype))
    nisa.activation(dst=dst, op=op, data=x)
    return dst


@operator
def abs(x: Any, dtype: Any = None) -> NkiTensor:
    """|x|."""
    return _activate(abs, x, dtype)


@operator
def square(x: Any, dtype: Any = None) -> NkiTensor:
    """`x * x`."""
    return _activate(square, x, dtype)


@operator
def exp(x: Any, dtype: Any = None) -> NkiTensor:
    """E to the power of x."""
    return _activate(exp, x, dtype)


@operator
def log(x: Any, dtype: Any = None) -> NkiTensor:
    """Natural logarithm, for x of 2^-64 to 2^64."""
    return _activate(log, x, dtype)


@operator
def sqrt(x: Any, dtype: Any = None) -> NkiTensor:
    """Square root, for x of 2^-116 to 2^118: 0 is outside."""
    return _activate(sqrt, x, dtype)


@operator
def tanh(x: Any, dtype: Any = None) -> NkiTensor:
    """Hyperbolic tangent."""
    return _activate(tanh, x, dtype)


@operator
def arctan(x: Any, dtype: Any = None) -> NkiTensor:
    """Inverse tangent, for |x| up to pi / 2."""
    return _activate(arctan, x, dtype)


@operator
def sign(x: Any, dtype: Any = None) -> NkiTensor:
    """-1, 0 or 1."""
    return _activate(sign, x, dtype)


@operator
def sigmoid(x: Any, dtype: Any = None) -> NkiTensor:
    """1 / (1 + exp(-x))."""
    return _activate(sigmoid, x, dtype)


@operator
def relu(x: Any, dtype: Any = None) -> NkiTensor:
    """max(x, 0)."""
    return _activate(relu, x, dtype)


@operator
def gelu(x: Any, dtype: Any = None) -> NkiTensor:
    """Gaussian error linear unit."""
    return _activate(gelu, x, dtype)


@operator
def gelu_apprx_sigmoid(x: Any, dtype: Any = None) -> NkiTensor:
    """`x * sigmoid(1.702 x)`."""
    return _activate(gelu_apprx_sigmoid, x, dtype)


@operator
def gelu_apprx_tanh(x: Any, dtype: Any = None) -> NkiTensor:
    """`gelu` by its tanh approximation."""
    return _activate(gelu_apprx_tanh, x, dtype)


@operator
def gelu_dx(x: Any, dtype: Any = None) -> NkiTensor:
    """Derivative of `gelu`."""
    return _activate(gelu_dx, x, dtype)


@operator
def gelu_apprx_sigmoid_dx(x: Any, dtype: Any = None) -> NkiTensor:
    """Derivative of `gelu_apprx_sigmoid`."""
    return _activate(gelu_apprx_sigmoid_dx, x, dtype)


@operator
def silu(x: Any, dtype: Any = None) -> NkiTensor:
    """`x * sigmoid(x)`."""
    return _activate(silu, x, dtype)


@operator
def silu_dx(x: Any, dtype: Any = None) -> NkiTensor:
    """Derivative of `silu`."""
    return _activate(silu_dx, x, dtype)


@operator
def softplus(x: Any, dtype: Any = None) -> NkiTensor:
    """log(1 + exp(x))."""
    return _activate(softplus, x, dtype)


@operator
def mish(x: Any, dtype: Any = None) -> NkiTensor:
    """`x * tanh(softplus(x))`."""
    return _activate(mish, x, dtype)


@operator
def erf(x: Any, dtype: Any = None) -> NkiTensor:
    """Error function."""
    return _activate(erf, x, dtype)


@operator
def erf_dx(x: Any, dtype: Any = None) -> NkiTensor:
    """Derivative of `erf`."""
    return _activate(erf_dx, x, dtype)


@operator
def reciprocal(x: Any, dtype: Any = None) -> NkiTensor:
    """1 / x by `nki.isa.reciprocal` on the Vector Engine, which has no range limit."""
    x = tile("reciprocal", "x", x)
    dst = ndarray(x.shape, dtype_of("reciprocal", dtype, x.dtype))
    nisa.reciprocal(dst=dst, data=x)
    return dst


@operator
def rsqrt(x: Any, dtype: Any = None) -> NkiTensor:
    """1 / sqrt(x) by `tensor_scalar` on the GpSimd Engine, which does not reach PSUM."""
    x = tile("rsqrt", "x", x)
    if x.buffer is MemoryRegion.psum:
        refuse("rsqrt", "x", "buffer", "psum", "sbuf: it runs on the GpSimd Engine; nl.copy brings a tile there")
    dst = ndarray(x.shape, dtype_of("rsqrt", dtype, x.dtype))
    nisa.tensor_scalar(dst=dst, data=x, op0=rsqrt, operand0=0.0, engine=nisa.engine.gpsimd)
    return dst


@operator
def copy(x: Any, dtype: Any = None) -> NkiTensor:
    """`x` in a new SBUF tile by `tensor_copy` on the Vector Engine: bit exact where the dtype stays."""
    # The list of known issues still describes the Scalar Engine's copy of NKI 0.4; the 0.6 notes replace it.
    x = tile("copy", "x", x)
    dst = ndarray(x.shape, dtype_of("copy", dtype, x.dtype))
    nisa.tensor_copy(dst=dst, src=x, engine=nisa.engine.vector)
    return dst
