"""Launching kernels: grids, arguments and results, `jit` and the decorators that would need a device.

Programs of a grid run one after the other, on two physical cores where `nl.nc(2)` says so. Nothing here runs on a
device: what would, is simulated, and says so once on standard error.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from nkisim.hardware import TARGET_VARIABLE, resolve_target
from nkisim.legacy import compiler
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import flush
from nkisim.legacy._source import as_compiled
from nkisim.legacy._state import State, _state, running_state
from nkisim.legacy._values import Bound, Returned
from nkisim.legacy.language._constants import GridDim
from nkisim.machine import Launch, current_core
from nkisim.nki import PRECISE_VARIABLE, note_launch
from nkisim.trace import Trace

TRACE = "trace"  # of `nki.trace`: outputs may be parameters; AWS's kernels give it to `nki.jit` as well
MODES = ("auto", "torchxla", "jax", "baremetal", "benchmark", "simulation", TRACE)
DEFAULT_TARGET = "trn2"  # SDK 2.26 has no newer one

_said: set[str] = set()


def say_once(text: str) -> None:
    """Write a line about what the simulator does instead of a device, once per process."""
    if text not in _said:
        _said.add(text)
        sys.stderr.write(f"nkisim: {text}\n")


class Kernel:
    """A kernel function with its launch options. Calling it simulates it: there is no device here."""

    def __init__(
        self,
        function: Callable[..., Any],
        mode: str = "auto",
        grid: tuple[GridDim, ...] = (),
        target: str | None = None,
        trace: Trace | None = None,
        precise: bool | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.mode = mode
        self.grid = grid
        self.target = target
        self.trace = trace
        self.precise = precise

    def __getitem__(self, grid: Any) -> Kernel:
        """The kernel on a launch grid of integers, `nl.nc(n)` and `nl.spmd_dim(...)`, one per dimension."""
        dims = []
        for size in grid if isinstance(grid, (tuple, list)) else (grid,):
            if not isinstance(size, GridDim):
                if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
                    raise ValueError(f"kernel[grid]: received {size!r}, allowed positive integers, nl.nc, nl.spmd_dim")
                size = GridDim((int(size),))
            dims.append(size)
        if sum(d.spread is not None for d in dims) > 1:
            raise ValueError(f"kernel[grid]: received {dims}, allowed one nl.nc")
        return self._replaced(tuple(dims))

    def _replaced(self, grid: tuple[GridDim, ...]) -> Kernel:
        found = copy.copy(self)
        found.grid = grid
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Simulate the kernel on NumPy arrays or torch tensors; inside another kernel, call its function.

        Raises:
            NkiError: the kernel does what the hardware or the compiler refuses.
            TypeError, ValueError: the call itself is wrong.
        """
        if running_state() is not None:
            if self.grid:
                rule = "err_nested_kernel_with_spmd_grid: a kernel with a launch grid called in a kernel"
                refuse("jit", getattr(self.function, "__name__", ""), rule, list(self.grid), "a call without a grid")
            return as_compiled(self.function)(*args, **kwargs)
        if self.mode != "simulation":
            say_once(f"neuronxcc.nki: mode {self.mode!r} runs in the simulator; there is no device here")
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Simulate the kernel."""
        return self._simulated(args, kwargs, self.trace)

    def _simulated(self, args: tuple[Any, ...], kwargs: dict[str, Any], trace: Trace | None) -> Any:
        hardware = resolve_target(self.target or os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET)
        n_cores = next((d.sizes[d.spread] for d in self.grid if d.spread is not None), 1)
        if n_cores > hardware.cores_per_launch_max:
            raise ValueError(
                f"nl.nc: received {n_cores}, allowed 1..{hardware.cores_per_launch_max} on {hardware.target}"
            )
        with note_launch(getattr(self.function, "__name__", "kernel"), trace) as trace:
            if trace is not None:
                trace.target = hardware.target
            launch = Launch(hardware, self._is_precise(), n_cores, trace)
            bound = Bound(launch, self.function, args, kwargs, self.mode == TRACE)
            returned = launch.run(lambda: self._programs(bound, n_cores))
            values = bound.results(returned[0])
            bound.copy_back()
        return values

    def _is_precise(self) -> bool:
        if self.precise is not None:
            return self.precise
        value = os.environ.get(PRECISE_VARIABLE, "1")
        if value not in ("0", "1"):
            raise ValueError(f"{PRECISE_VARIABLE}: received {value!r}, allowed 0 or 1")
        return value == "1"

    def _programs(self, bound: Bound, n_cores: int) -> Any:
        """Run the core's programs of the grid; the result of the last one."""
        core = current_core("nki.jit")
        sizes = tuple(prod(d.sizes) for d in self.grid)
        st = State(core, sizes)
        token = _state.set(st)
        try:
            compiler.begin(core, self)
            result = None
            for program in np.ndindex(*sizes):
                if n_cores > 1 and _core_of(self.grid, program) != core.rank:
                    continue
                st.program, st.n_shared, st.loops = program, 0, []
                result = bound.call()
                flush(st)
            compiler.finish(core)
            return Returned(result)
        finally:
            _state.reset(token)


def _core_of(grid: tuple[GridDim, ...], program: tuple[int, ...]) -> int:
    """The physical core of a program: its index along the factor that is spread."""
    for d, i in zip(grid, program, strict=True):
        if d.spread is not None:
            return int(i) // prod(d.sizes[d.spread + 1 :]) % d.sizes[d.spread]
    return 0


# -- decorators


def _function_of(kernel: Any, what: str) -> Callable[..., Any]:
    if isinstance(kernel, Kernel):
        return kernel.function
    if not callable(kernel):
        raise TypeError(f"{what}: received {type(kernel).__name__}, allowed a function")
    found: Callable[..., Any] = kernel
    return found


def jit(func: Any = None, mode: str = "auto", **kwargs: Any) -> Any:
    """Mark a function as a kernel: `@nki.jit`, `@nki.jit(mode=...)` or `nki.jit(f, mode=...)`.

    `platform_target` names the target; options that only a compiler or a device has are named on standard error.

    Raises:
        ValueError, TypeError: an unknown mode or target.
    """
    if mode not in MODES:
        raise ValueError(f"nki.jit.mode: received {mode!r}, allowed {', '.join(MODES)}")
    target = kwargs.pop("platform_target", None)
    if target is not None:
        resolve_target(target)
    kind = Kernel
    if mode == "benchmark":
        from nkisim.legacy._device import BenchmarkedKernel

        kind = BenchmarkedKernel
    made = functools.partial(decorated, kind, mode, target, kwargs)
    return made if func is None else made(func)


def decorated(kind: type[Kernel], mode: str, target: str | None, ignored: dict[str, Any], kernel: Any) -> Kernel:
    """The kernel of a decorator, which names the options that have no effect here."""
    if ignored:
        say_once(f"nki.{mode}: {', '.join(sorted(ignored))} have no effect: nothing is compiled and no device runs")
    made = kind(_function_of(kernel, f"nki.{mode}"), mode, target=target)
    if isinstance(kernel, Kernel):
        made.grid = kernel.grid
        made.target = kernel.target if target is None else target
        compiler.keep_options(kernel, made)
    return made


def trace(func: Any) -> Kernel:
    """Mark a function as a kernel that writes to its parameters, as kernels did before `nki.jit`."""
    return Kernel(_function_of(func, "nki.trace"), TRACE)


def simulate_kernel(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a kernel, or `kernel[grid]`, on NumPy arrays.

    Raises:
        NkiError: the kernel does what the hardware or the compiler refuses.
        TypeError, ValueError: the call itself is wrong.
    """
    base = kernel if isinstance(kernel, Kernel) else Kernel(_function_of(kernel, "nki.simulate_kernel"))
    return base.run(args, kwargs)


def baremetal(kernel: Any = None, **kwargs: Any) -> Any:
    """A kernel that a device would run without a framework; here it is simulated."""
    made = functools.partial(decorated, Kernel, "baremetal", kwargs.pop("platform_target", None), kwargs)
    return made if kernel is None else made(kernel)
