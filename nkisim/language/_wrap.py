"""What the wrappers of `nki.language` share: operand checks, result types, refusals."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from nkisim.dtypes import DType, as_dtype
from nkisim.errors import NkiError
from nkisim.memory import HBM
from nkisim.tensor import NkiTensor

KNOWN_ISSUES = "NKI release notes, known limitations of nki.language"


def refuse(
    what: str, operand: str, rule: str, received: object, allowed: object, source: str | None = None
) -> NoReturn:
    """Raise `NkiError` for the wrapper `nl.<what>`."""
    source = source if source is not None else f"nki.language.{what}, NKI 0.6"
    raise NkiError(what, operand, rule, received=received, allowed=allowed, source=source)


def tile(what: str, operand: str, value: Any) -> NkiTensor:
    """`value`, which must be a tensor in SBUF or PSUM."""
    if not isinstance(value, NkiTensor):
        refuse(what, operand, "type", type(value).__name__, "a tile")
    if not value.on_chip:
        refuse(what, operand, "buffer", value.buffer.name, "sbuf or psum; nl.load brings a tensor on chip")
    return value


def hbm_tensor(what: str, operand: str, value: Any) -> NkiTensor:
    """`value`, which must be a tensor in HBM."""
    if not isinstance(value, NkiTensor):
        refuse(what, operand, "type", type(value).__name__, "a tensor in HBM")
    if value.buffer not in HBM:
        refuse(what, operand, "buffer", value.buffer.name, " or ".join(b.name for b in HBM))
    return value


def is_number(value: object) -> bool:
    """Whether `value` is a compile-time number; a bool is none."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def dtype_of(what: str, dtype: Any, default: DType) -> DType:
    """The result type that a `dtype=` argument asks for."""
    return default if dtype is None else as_dtype(dtype, f"nki.language.{what} dtype")
