"""Loops, launch coordinates and scheduling hints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from nkisim.body import Facts
from nkisim.errors import NkiError
from nkisim.facts import static_facts
from nkisim.machine import Core, current_core
from nkisim.objects import VirtualRegister
from nkisim.sequencer import LOOPS


def _refuse(instruction: str, operand: str, rule: str, received: object, allowed: object) -> NoReturn:
    raise NkiError(instruction, operand, rule, received=received, allowed=allowed, source=LOOPS)


def affine_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """`range`: a loop unrolled when the kernel is built (deprecated alias)."""
    return _static_range("affine_range", start, stop, step)


def sequential_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """`range`: a loop unrolled when the kernel is built (deprecated alias)."""
    return _static_range("sequential_range", start, stop, step)


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """`range`: a loop unrolled when the kernel is built (deprecated alias)."""
    return _static_range("static_range", start, stop, step)


def _static_range(what: str, start: int, stop: int | None, step: int) -> range:
    for label, value in (("start", start), ("stop", stop), ("step", step)):
        if isinstance(value, VirtualRegister):
            _refuse(what, label, "type", "a register", "a compile-time integer; nl.fori_loop takes registers")
    return range(0, start, step) if stop is None else range(start, stop, step)


def _bound(what: str, operand: str, value: Any) -> int:
    if isinstance(value, VirtualRegister):
        number = value.value
        if not isinstance(number, int) or not -(2**31) <= number < 2**31:
            _refuse(what, operand, "loop bound in a register", number, "an integer in -2**31..2**31-1")
        return number
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    _refuse(what, operand, "type", type(value).__name__, "an int or a VirtualRegister")


def _check_step(what: str, step: Any) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        _refuse(what, "step", "value", step, "a positive compile-time integer")


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[VirtualRegister]:
    """A loop that runs on the device (deprecated); bounds may be registers, the index is a frozen register.

    Raises `NkiError` inside another dynamic loop where a bound register is carried by that loop.
    """
    warnings.warn("nl.dynamic_range is deprecated in NKI 0.6; use nl.fori_loop", DeprecationWarning, stacklevel=2)
    core = current_core("nki.language.dynamic_range")
    _check_step("dynamic_range", step)
    first = 0 if stop is None else _bound("dynamic_range", "start", start)
    last = _bound("dynamic_range", "stop", start if stop is None else stop)
    # The compiler loses such registers ("Could not find register", known issue since NKI 0.4). The structured
    # loops of NKI 0.6 are lowered anew and nothing is known against nesting them, so they may nest.
    for operand, bound in (("start", start), ("stop", stop)):
        if isinstance(bound, VirtualRegister) and bound.carried & set(core.sequencer.scope):
            _refuse(
                "dynamic_range",
                operand,
                "nested loop bound by a loop-carried register",
                "a register that the outer loop writes",
                "a register allocated in the outer loop's body, or nl.fori_loop",
            )
    facts = static_facts(core.sequencer, {"start": start, "stop": stop, "step": step})
    return _iterate(core, facts, range(first, last, step))


def _iterate(core: Core, facts: Facts, trips: range) -> Iterator[VirtualRegister]:
    loop = core.enter_loop("dynamic_range", "for", facts, lower=trips.start, upper=trips.stop, step=trips.step)
    for i in trips:
        core.next_trip(loop, "for")
        yield VirtualRegister(i, frozen=True)
    core.leave_loop(loop, "for")


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[VirtualRegister], Any], step: int = 1) -> None:
    """Run `body_fun(i)` on the device for i from `lower` to `upper`; state lives in SBUF and HBM.

    The index register is frozen: the migration guide forbids to write it, the API reference says that a
    write has no effect.
    """
    core = current_core("nki.language.fori_loop")
    _check_step("fori_loop", step)
    first, last = _bound("fori_loop", "lower", lower), _bound("fori_loop", "upper", upper)
    facts = static_facts(core.sequencer, {"lower": lower, "upper": upper, "step": step})
    loop = core.enter_loop("fori_loop", "for", facts, lower=first, upper=last, step=step)
    for i in range(first, last, step):
        core.next_trip(loop, "for")
        result = body_fun(VirtualRegister(i, frozen=True))
        if result is not None:
            _refuse("fori_loop", "body_fun", "return value", type(result).__name__, "None")
    core.leave_loop(loop, "for")


def while_loop(init: VirtualRegister, body_fun: Callable[[VirtualRegister], VirtualRegister]) -> None:
    """Run `r = body_fun(r)` on the device while `r` is not zero, testing before each trip."""
    core = current_core("nki.language.while_loop")
    if not isinstance(init, VirtualRegister):
        _refuse("while_loop", "init", "type", type(init).__name__, "a VirtualRegister")
    value = init.value
    loop = core.enter_loop("while_loop", "while", static_facts(core.sequencer, {"init": init}))
    while value != 0:
        core.next_trip(loop, "while")
        # The condition is passed by value: what the body writes counts only if the body returns it.
        result = body_fun(VirtualRegister(value))
        if not isinstance(result, VirtualRegister):
            _refuse("while_loop", "body_fun", "return value", type(result).__name__, "a VirtualRegister")
        value = result.value
    core.leave_loop(loop, "while")


@contextmanager
def no_reorder() -> Iterator[None]:
    """`with nl.no_reorder():` keeps program order; the simulator always does, and the trace says so."""
    core = current_core("nki.language.no_reorder")
    core.mark("no_reorder_begin")
    core.no_reorder_depth += 1
    try:
        yield
    finally:
        core.no_reorder_depth -= 1
        core.mark("no_reorder_end")


def program_id(axis: int = 0) -> int:
    """This core's rank in the launch; the only axis is 0."""
    core = current_core("nki.language.program_id")
    _check_axis("program_id", axis)
    return core.rank


def num_programs(axes: Any = 0) -> int:
    """How many cores run the kernel."""
    core = current_core("nki.language.num_programs")
    if axes is not None:
        for axis in axes if isinstance(axes, (tuple, list)) else (axes,):
            _check_axis("num_programs", axis)
    return core.launch.n_cores


def program_ndim() -> int:
    """Dimensions of the launch grid: 1 on two cores, 0 on one (no grid)."""
    return 1 if current_core("nki.language.program_ndim").launch.n_cores > 1 else 0


def _check_axis(what: str, axis: Any) -> None:
    if axis != 0 or isinstance(axis, bool):
        _refuse(what, "axis", "value", axis, "0: launches have one axis, the logical core's physical cores")
