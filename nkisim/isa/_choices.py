"""Checks of arguments that are no operands: the engine to run on, flags, and operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.isa._call import Call
from nkisim.memory import MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine


def choose_engine(call: Call, engine: Any, allowed: tuple[Engine, ...], *operands: Any, what: str = "engine") -> Engine:
    """The engine that the instruction runs on: `engine`, or the first of `allowed` where that is `unknown`.

    Refuses engines that are not in `allowed`, and GpSimd with one of `operands` in PSUM; `what` names the
    rule in the error, such as "engine of power". Operands that are no tensors do not count.
    """
    if not isinstance(engine, Engine):
        call.refuse("engine", "type", repr(engine), "a member of nki.isa.engine")
    chosen = allowed[0] if engine is Engine.unknown else engine
    if chosen not in allowed:
        call.refuse("engine", what, engine.name, ", ".join(e.name for e in (*allowed, Engine.unknown)))
    if chosen is Engine.gpsimd and any_in_psum(*operands):
        received = "gpsimd with an operand in psum" if engine is chosen else f"an operand in psum ({what}: gpsimd)"
        call.refuse("engine", "GpSimd Engine and PSUM", received, "operands in sbuf")
    return chosen


def any_in_psum(*operands: Any) -> bool:
    """Whether one of the operands is a tensor in PSUM."""
    return any(isinstance(t, NkiTensor) and t.buffer is MemoryRegion.psum for t in operands)


def check_flag(call: Call, operand: str, value: Any) -> bool:
    """The flag, which must be a bool."""
    if value is False or value is True:
        return value
    if not isinstance(value, np.bool_):
        call.refuse(operand, "type", repr(value), "True or False")
    return bool(value)
