"""Loops, launch coordinates and scheduling hints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from nkisim.errors import NkiError, call_site
from nkisim.machine import Core, current_core
from nkisim.tensor import VirtualRegister
from nkisim.trace import Engine, Record

LOOPS = "NKI dynamic loops guide, NKI 0.6"


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
        return int(value.value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    _refuse(what, operand, "type", type(value).__name__, "an int or a VirtualRegister")


def _enter_loop(what: str, step: Any) -> Core:
    core = current_core(f"nki.language.{what}")
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        _refuse(what, "step", "value", step, "a positive compile-time integer")
    if core.no_reorder_depth:
        _refuse(what, "", "dynamic loop inside no_reorder", "a loop in the block", "the block inside the loop's body")
    return core


def _mark(core: Core, instruction: str, **attrs: Any) -> None:
    """A loop's control flow in the trace: the engines' sequencers test and branch."""
    if core.trace is not None:
        core.trace.records.append(
            Record(core.position, core.rank, Engine.sync, instruction, None, call_site(), (), (), attrs)
        )
    core.position += 1


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[VirtualRegister]:
    """A loop that runs on the device (deprecated); bounds may be registers, the index is a frozen register."""
    warnings.warn("nl.dynamic_range is deprecated in NKI 0.6; use nl.fori_loop", DeprecationWarning, stacklevel=2)
    core = _enter_loop("dynamic_range", step)
    first = 0 if stop is None else _bound("dynamic_range", "start", start)
    last = _bound("dynamic_range", "stop", start if stop is None else stop)

    def iterate() -> Iterator[VirtualRegister]:
        _mark(core, "loop_begin", kind="for")
        for i in range(first, last, step):
            _mark(core, "loop_iteration", kind="for")
            yield VirtualRegister(i, frozen=True)
        _mark(core, "loop_end", kind="for")

    return iterate()


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[VirtualRegister], Any], step: int = 1) -> None:
    """Run `body_fun(i)` on the device for i from `lower` to `upper`; state lives in SBUF and HBM."""
    core = _enter_loop("fori_loop", step)
    first, last = _bound("fori_loop", "lower", lower), _bound("fori_loop", "upper", upper)
    _mark(core, "loop_begin", kind="for")
    for i in range(first, last, step):
        _mark(core, "loop_iteration", kind="for")
        result = body_fun(VirtualRegister(i))
        if result is not None:
            _refuse("fori_loop", "body_fun", "return value", type(result).__name__, "None")
    _mark(core, "loop_end", kind="for")


def while_loop(init: VirtualRegister, body_fun: Callable[[VirtualRegister], VirtualRegister]) -> None:
    """Run `r = body_fun(r)` on the device while `r` is not zero, testing before each trip."""
    core = _enter_loop("while_loop", 1)
    if not isinstance(init, VirtualRegister):
        _refuse("while_loop", "init", "type", type(init).__name__, "a VirtualRegister")
    register = VirtualRegister(init.value)
    _mark(core, "loop_begin", kind="while")
    while register.value != 0:
        _mark(core, "loop_iteration", kind="while")
        result = body_fun(register)
        if not isinstance(result, VirtualRegister):
            _refuse("while_loop", "body_fun", "return value", type(result).__name__, "a VirtualRegister")
        register = VirtualRegister(result.value)
    _mark(core, "loop_end", kind="while")


@contextmanager
def no_reorder() -> Iterator[None]:
    """`with nl.no_reorder():` keeps program order; the simulator always does, and the trace says so."""
    core = current_core("nki.language.no_reorder")
    _mark(core, "no_reorder_begin")
    core.no_reorder_depth += 1
    try:
        yield
    finally:
        core.no_reorder_depth -= 1
        _mark(core, "no_reorder_end")


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
