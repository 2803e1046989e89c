"""Enumerations of `neuronxcc.nki.isa`: integers here, members by identity in the current API."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from nkisim import isa


class dge_mode(IntEnum):
    """How DMA descriptors are generated."""

    none = 0
    swdge = 1
    hwdge = 2
    unknown = 3


class engine(IntEnum):
    """Engines of a NeuronCore."""

    tensor = 1
    vector = 5
    scalar = 2
    gpsimd = 3
    sync = 6
    unknown = 0


class nc_version(IntEnum):
    """NeuronCore generation; SDK 2.26 has no newer one."""

    gen2 = 2
    gen3 = 3


class oob_mode(IntEnum):
    """What a run-time index outside the tensor does."""

    error = 0
    skip = 1


class reduce_cmd(IntEnum):
    """What an instruction does with its engine's accumulator registers."""

    idle = 0
    reset = 1
    reset_reduce = 3
    reduce = 2


class _Fp32:
    """Constants of float32."""

    @property
    def min(self) -> float:
        """The most negative finite float32, bits 0xff7fffff."""
        return float(np.finfo(np.float32).min)


class _DmaEngine:
    """Name of the DMA engines. No instruction of SDK 2.26 takes it."""

    def __repr__(self) -> str:
        return "nki.isa.dma_engine"


fp32 = _Fp32()
dma_engine = _DmaEngine()
tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown


def current(kind: type[IntEnum], value: Any, instruction: str, argument: str) -> Any:
    """The member of the current API's enumeration that a legacy member, or its integer, stands for.

    Raises:
        TypeError: another value.
    """
    members = _CURRENT[kind]
    # Integers find the members of equal value; True and members of other enumerations would as well.
    integer = isinstance(value, int) and not isinstance(value, (bool, IntEnum))
    if not (type(value) is kind or integer) or value not in members:
        allowed = ", ".join(f"{kind.__name__}.{name}" for name in kind.__members__)
        raise TypeError(f"{instruction}.{argument}: received {value!r}, allowed {allowed}")
    return members[value]


_CURRENT: dict[type[IntEnum], dict[int, Any]] = {
    kind: {member: counterpart[member.name] for member in kind}
    for kind, counterpart in (
        (dge_mode, isa.dge_mode),
        (engine, isa.engine),
        (nc_version, isa.nc_version),
        (oob_mode, isa.oob_mode),
        (reduce_cmd, isa.reduce_cmd),
    )
}
