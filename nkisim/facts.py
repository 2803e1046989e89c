"""The arguments of an instruction as far as they are fixed when the kernel is built."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import Enum
from types import FunctionType
from typing import Any

import numpy as np

from nkisim.body import Facts, RegisterFacts, TensorFacts
from nkisim.objects import VirtualRegister
from nkisim.operators import NamedOperator
from nkisim.sequencer import Sequencer
from nkisim.tensor import NkiTensor

# Types whose values are what they are: most arguments.
_PLAIN = frozenset((type(None), int, bool, str, FunctionType))


def static_facts(sequencer: Sequencer, arguments: Mapping[str, Any]) -> Facts:
    """`arguments` in a form that compares equal on two trips exactly if one instruction can have both.

    Names count for nothing on the device. Registers and tensors stand for themselves, not for their values.
    """
    return tuple([(name, _fact(sequencer, value)) for name, value in arguments.items() if name != "name"])


def _fact(sequencer: Sequencer, value: Any) -> Hashable:
    # What comes most often stands first: this runs for every argument of every instruction in a loop.
    kind = type(value)
    if kind in _PLAIN:
        return value  # type: ignore[no-any-return]
    if kind is NkiTensor:
        return _tensor(sequencer, value)
    if isinstance(value, (tuple, list)):
        return tuple([_fact(sequencer, v) for v in value])
    if isinstance(value, (Enum, int, str, NamedOperator)):
        return value
    fact: Hashable = kind.__qualname__
    if isinstance(value, (float, np.generic)):
        fact = repr(value)  # NaN is the same number on every trip, and 0.0 is not -0.0
    elif callable(value):
        fact = value
    elif isinstance(value, VirtualRegister):
        fact = RegisterFacts(value.place)
    elif isinstance(value, np.ndarray):
        fact = value.dtype.str, value.shape, value.tobytes()
    elif isinstance(value, dict):
        fact = tuple([(k, _fact(sequencer, v)) for k, v in value.items()])
    return fact


def _tensor(sequencer: Sequencer, t: NkiTensor) -> TensorFacts:
    dynamic = t.dynamic
    run_time: Hashable = None
    if dynamic is not None:
        run_time = (dynamic.kind, dynamic.stride, dynamic.extent, _fact(sequencer, dynamic.index))
    return TensorFacts(sequencer.place_of(t.storage.info), t.offset, t.shape, t.strides, t.dtype, run_time)
