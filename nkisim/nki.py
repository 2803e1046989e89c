"""The `nki` module: `jit` and `simulate`.

A kernel is an ordinary Python function; simulating it runs the function with HBM tensors for its array
arguments while every `nki.isa` call executes on NumPy, eagerly and in program order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from nkisim import collectives, isa, language, typing
from nkisim.errors import NkiError
from nkisim.hardware import resolve_target
from nkisim.machine import Core, Launch, current_core, running_core
from nkisim.trace import Trace
from nkisim.values import MIGRATION, Arguments, results

__all__ = ["Kernel", "collectives", "isa", "jit", "language", "simulate", "typing"]

# The release of NKI whose API this is; scripts may ask for it.
__version__ = "0.6.0"

PRECISE_VARIABLE = "NKI_PRECISE_FP"
SCHEDULING = "NKI scheduling guide, NKI 0.6"

_recorder: ContextVar[dict[str, Trace] | None] = ContextVar("nkisim_recorder", default=None)


class Kernel:
    """A kernel function with its launch options. Calling it simulates it: there is no device here."""

    def __init__(
        self,
        function: Callable[..., Any],
        n_cores: int = 1,
        schedule: tuple[tuple[str, Any], ...] = (),
        target: str | None = None,
        precise: bool | None = None,
        trace: Trace | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.n_cores = n_cores
        self.schedule = schedule
        self._target = target
        self._precise = precise
        self._trace = trace

    def __getitem__(self, lnc: Any) -> Kernel:
        """The kernel on `lnc` physical cores: 1, or 2 from NeuronCore-v3 on."""
        if lnc not in (1, 2) or isinstance(lnc, bool):
            raise ValueError(f"kernel[lnc]: received {lnc!r}, allowed 1 or 2")
        return Kernel(self.function, int(lnc), self.schedule, self._target, self._precise, self._trace)

    def with_schedule(self, edges: Any) -> Kernel:
        """The kernel with order edges `(consumer, producer)` or `(consumer, [producers])` by instruction name."""
        flat: list[tuple[str, Any]] = []
        for edge in edges:
            if not (isinstance(edge, (tuple, list)) and len(edge) == 2 and isinstance(edge[0], str)):
                raise TypeError(f"with_schedule: received {edge!r}, allowed (consumer, producer or list of producers)")
            producers = edge[1] if isinstance(edge[1], (tuple, list)) else (edge[1],)
            if not all(isinstance(p, str) for p in producers):
                raise TypeError(f"with_schedule: received {edge!r}, allowed names of instructions")
            flat.extend((edge[0], p) for p in producers)
        return Kernel(self.function, self.n_cores, tuple(flat), self._target, self._precise, self._trace)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Simulate the kernel on NumPy arrays or torch tensors.

        Raises:
            NkiError: the kernel does what the hardware or the compiler refuses.
            TypeError, ValueError: the call itself is wrong.
        """
        if running_core() is not None:
            raise NkiError(
                "jit",
                getattr(self.function, "__name__", ""),
                "kernel called inside a kernel",
                received="a function with nki.jit or nki.simulate",
                allowed="a plain function",
                source=MIGRATION,
            )
        hardware = resolve_target(self._target)
        if self.n_cores > hardware.cores_per_launch_max:
            raise ValueError(
                f"kernel[lnc]: received {self.n_cores}, allowed 1..{hardware.cores_per_launch_max} on {hardware.target}"
            )
        with note_launch(getattr(self.function, "__name__", "kernel"), self._trace) as trace:
            if trace is not None:
                trace.target = hardware.target
            launch = Launch(hardware, self._is_precise(), self.n_cores, trace)
            arguments = Arguments(launch)
            call = arguments.bind(self.function, args, kwargs)

            def body() -> Any:
                result = call()
                self._check_schedule(current_core("simulate"))
                return result

            returned = launch.run(body)
            # The launch has made sure that all cores return the same tensors.
            values = results(returned[0], arguments.torch_seen)
            arguments.copy_back()
        return values

    def _is_precise(self) -> bool:
        if self._precise is not None:
            return self._precise
        value = os.environ.get(PRECISE_VARIABLE, "1")
        if value not in ("0", "1"):
            raise ValueError(f"{PRECISE_VARIABLE}: received {value!r}, allowed 0 or 1")
        return value == "1"

    def _check_schedule(self, core: Core) -> None:
        def refuse(rule: str, received: str, allowed: str) -> None:
            raise NkiError("with_schedule", "", rule, received=received, allowed=allowed, source=SCHEDULING)

        names = core.ordering.names
        for consumer, producer in self.schedule:
            for name in (consumer, producer):
                if name not in names:
                    issued = ", ".join(sorted(names)) or "names: no instruction has one"
                    refuse("edge to an instruction that was not issued", repr(name), issued)
                if name in core.ordering.ambiguous:
                    refuse("edge to a name of several instructions", repr(name), "a name that one instruction has")
            if names[consumer].scope != names[producer].scope:
                refuse(
                    "edge across a dynamic loop's boundary",
                    f"{consumer!r} after {producer!r}",
                    "both instructions in the same dynamic loops",
                )
            core.ordering.add(names[consumer], names[producer], "with_schedule", SCHEDULING)
            if core.trace is not None:
                core.trace.edges.append((consumer, producer))


@contextmanager
def recording() -> Iterator[dict[str, Trace]]:
    """Collect, by kernel name, the trace with the most instructions of all launches in the block."""
    found: dict[str, Trace] = {}
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


@contextmanager
def note_launch(name: str, trace: Trace | None) -> Iterator[Trace | None]:
    """The trace that a launch in the block fills, and that `recording` collects if the launch succeeds.

    It is `trace`, or a new one under `recording`, or None.
    """
    recorder = _recorder.get()
    filled = Trace() if trace is None and recorder is not None else trace
    yield filled
    if recorder is None or filled is None:
        return
    if name not in recorder or len(recorder[name].records) < len(filled.records):
        recorder[name] = filled


def jit(fn: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """Mark a function as a kernel; use as `@nki.jit` or `@nki.jit(mode=...)`.

    Raises:
        TypeError: `platform_target`, which NKI refuses since 0.3, or an unknown keyword. `mode` is
            accepted and has no effect, as documented.
    """
    if "platform_target" in kwargs:
        raise TypeError("nki.jit.platform_target: not accepted since NKI 0.3; set NEURON_PLATFORM_TARGET_OVERRIDE")
    unknown = set(kwargs) - {"mode"}
    if unknown:
        raise TypeError(f"nki.jit: received {sorted(unknown)}, allowed mode")
    if fn is None:
        return Kernel
    if not callable(fn):
        raise TypeError(f"nki.jit: received {type(fn).__name__}, allowed a function")
    return Kernel(fn)


def simulate(
    kernel: Any,
    *,
    target: str | None = None,
    precise: bool | None = None,
    trace: Trace | None = None,
) -> Callable[..., Any]:
    """A callable that runs `kernel` on the CPU; arrays in, arrays out, inputs updated in place if written.

    Args:
        kernel: an `@nki.jit` kernel, `kernel[2]`, or a plain function.
        target: trn1, inf2, trn2 or trn3; default $NEURON_PLATFORM_TARGET_OVERRIDE, else trn3.
        precise: store low-precision floats in their own type (default), or every float as float32;
            default $NKI_PRECISE_FP, else True.
        trace: filled with one record per executed instruction.

    Raises:
        NkiError: the kernel does what the hardware or the compiler refuses.
        TypeError, ValueError: the call itself is wrong.
    """
    if not callable(kernel):
        raise TypeError(f"nki.simulate: received {type(kernel).__name__}, allowed a kernel or a function")
    base = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    resolve_target(target)
    return Kernel(base.function, base.n_cores, base.schedule, target, precise, trace)
