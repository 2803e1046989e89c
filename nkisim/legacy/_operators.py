"""Operators that `op=` arguments take: functions of `nl`, and NumPy's of the same name."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.legacy._errors import refuse
from nkisim.operators import ACTIVATIONS, ALU, NamedOperator, op_name

# Reductions go by the name of what they reduce with.
_REDUCTIONS = {"max": "maximum", "min": "minimum", "sum": "add", "prod": "multiply", "all": "logical_and"}
_NUMPY = {"absolute": "abs", "amax": "maximum", "amin": "minimum", "arctan": "arctan", "bitwise_invert": "invert"}
_ELSEWHERE = ("prelu",)


def as_op(what: str, operand: str, op: Any) -> NamedOperator:
    """The operator that a kernel means by a function of `nl` or of NumPy.

    Raises:
        NkiError: no engine has an operator of that name.
    """
    if isinstance(op, NamedOperator):
        return op
    name = getattr(op, "nki_op", None)
    if not isinstance(name, str):
        name = getattr(op, "__name__", None)
        if isinstance(op, np.ufunc) or (callable(op) and getattr(op, "__module__", "").startswith("numpy")):
            name = _NUMPY.get(str(name), name)
        elif not (callable(op) and getattr(op, "__module__", "").startswith("nkisim.legacy.language")):
            name = None
    name = _REDUCTIONS.get(str(name), name)
    if not isinstance(name, str) or not (name in ALU or name in ACTIVATIONS or name in _ELSEWHERE):
        refuse(what, operand, "operator", op_name(op), "a function of nl that an engine has", f"nki {what}, SDK 2.26")
    return NamedOperator(name)
