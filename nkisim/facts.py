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

# Types whose values are what they are: most arguments. `_fact` adds those of the same kinds that it meets.
_new = tuple.__new__
_PLAIN: set[type] = {type(None), int, bool, str, FunctionType}


def static_facts(sequencer: Sequencer, arguments: Mapping[str, Any]) -> Facts:
    """`arguments` in a form that compares equal on two trips exactly if one instruction can have both.

    Names count for nothing on the device. Registers and tensors stand for themselves, not for their values.
    """
    facts: list[Hashable] = []
    for name, value in arguments.items():
        if name != "name":
            kind = type(value)
            facts += name, value if kind in _PLAIN else _fact(sequencer, value)
    return tuple(facts)


def have_facts(sequencer: Sequencer, arguments: Mapping[str, Any], facts: Facts) -> bool:
    """Whether `static_facts` of `arguments` would be equal to `facts`, found without making them.

    This runs for every argument of every instruction on every trip through a loop.
    """
    left = iter(facts)
    for name, value in arguments.items():
        if name == "name":
            continue
        if name != next(left, None):
            return False
        fact = next(left)
        if type(value) is NkiTensor:
            if type(fact) is not TensorFacts or not _is_tensor(sequencer, value, fact):
                return False
        elif value is not fact and (value if type(value) in _PLAIN else _fact(sequencer, value)) != fact:
            return False
    return next(left, None) is None


def _is_tensor(sequencer: Sequencer, t: NkiTensor, fact: TensorFacts) -> bool:
    tensor, offset, shape, strides, dtype, run_time = fact
    return (
        offset == t.offset
        and shape == t.shape
        and strides == t.strides
        and dtype == t.dtype
        and tensor == sequencer.place_of(t.storage.info)
        and (t.dynamic is run_time if t.dynamic is None or run_time is None else run_time == _run_time(sequencer, t))
    )


def _fact(sequencer: Sequencer, value: Any) -> Hashable:
    # What comes most often stands first.
    kind = type(value)
    if kind in _PLAIN:
        return value  # type: ignore[no-any-return]
    if kind is NkiTensor:
        return _tensor(sequencer, value)
    if isinstance(value, (tuple, list)):
        return tuple([_fact(sequencer, v) for v in value]) if value else ()
    if isinstance(value, (Enum, int, str, NamedOperator)):
        _PLAIN.add(kind)
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
    place = sequencer.place_of(t.storage.info)
    run_time = None if t.dynamic is None else _run_time(sequencer, t)
    # A call of TensorFacts itself would take twice as long.
    return _new(TensorFacts, (place, t.offset, t.shape, t.strides, t.dtype, run_time))


def _run_time(sequencer: Sequencer, t: NkiTensor) -> Hashable:
    dynamic = t.dynamic
    if dynamic is None:
        return None
    return (dynamic.kind, dynamic.stride, dynamic.extent, _fact(sequencer, dynamic.index))
