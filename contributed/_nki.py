"""The NKI that the kernels talk to: AWS's where it is installed, this project's simulator elsewhere.

Kernels import `nki`, `nisa` and `nl` from here and nothing else of NKI. `NKI_BACKEND` chooses:

    auto       AWS's `nki` from version 0.6 on if it is installed, else AWS's `neuronxcc`, else the simulator (default)
    nki        AWS's `nki`
    neuronxcc  an adapter over `neuronxcc.nki` of older Neuron SDKs; where that is not installed, over the simulator's
    nkisim     this project's simulator

docs/backends.md says what differs.
"""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from contributed._packages import installed

BACKEND_VARIABLE = "NKI_BACKEND"
BACKENDS = ("auto", "nki", "neuronxcc", "nkisim")
TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"
FIRST_NKI = (0, 6)
LEGACY_TARGET = "trn2"  # of the simulated neuronxcc.nki
PERCENTILES = (0, 1, 10, 25, 50, 90, 99, 100)  # that neuronxcc.nki has


def choose(wish: str) -> tuple[str, str]:
    """Backend and version that a value of `NKI_BACKEND` means here.

    Raises:
        ValueError: no such backend.
        ImportError: AWS's nki was asked for and is not there, or is too old.
    """
    if wish not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}: received {wish!r}, allowed {', '.join(BACKENDS)}")
    found = _version("nki") if wish in ("auto", "nki") and installed("nki") else None
    if found is not None and _release(found) >= FIRST_NKI:
        return "nki", found
    if wish == "nki":
        raise ImportError(
            f"{BACKEND_VARIABLE}=nki: found {'no nki package' if found is None else f'nki {found}'}, "
            f"allowed AWS's nki {'.'.join(map(str, FIRST_NKI))} or newer"
        )
    vendor = installed("neuronxcc")
    if wish == "neuronxcc" or (wish == "auto" and vendor):
        return "neuronxcc", (_version("neuronx-cc") or "of unknown version") if vendor else _simulator_version()
    return "nkisim", _simulator_version()


def _simulator_version() -> str:
    return str(importlib.import_module("nkisim").__version__)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


BACKEND, VERSION = choose(os.environ.get(BACKEND_VARIABLE, "auto"))


def from_vendor() -> bool:
    """Whether a package of AWS's runs the kernels."""
    return BACKEND == "nki" or (BACKEND == "neuronxcc" and installed("neuronxcc"))


# Three expressions that the linter can follow.
_package = "nki" if BACKEND == "nki" else "contributed._neuronxcc" if BACKEND == "neuronxcc" else "nkisim.nki"
_isa = "nki.isa" if BACKEND == "nki" else "contributed._neuronxcc_isa" if BACKEND == "neuronxcc" else "nkisim.isa"
_own_language = "contributed._neuronxcc_language" if BACKEND == "neuronxcc" else "nkisim.language"
_language = "nki.language" if BACKEND == "nki" else _own_language
nki: Any = importlib.import_module(_package)
nisa: Any = importlib.import_module(_isa)
nl: Any = importlib.import_module(_language)
_adapter: Any = nki if BACKEND == "neuronxcc" else None


def at_most(bound, most):
    """A bound of an `nl.fori_loop` that only the device knows, of a loop that has at most `most` trips.

    neuronxcc has no such loops: its programs make all of these trips, to no effect where they are out of bounds.
    """
    return _adapter.at_most(bound, most) if BACKEND == "neuronxcc" else bound


def describe(target: str | None = None) -> str:
    """One line that says which NKI runs: vendor package or simulator, version, target."""
    kind = f"vendor package {BACKEND}" if from_vendor() else "simulator nkisim"
    front_end = ", neuronxcc.nki front end" if BACKEND == "neuronxcc" and not from_vendor() else ""
    return f"{kind} {VERSION}{front_end}, target {target or default_target()}"


def default_target() -> str:
    """The target that is simulated where none is named."""
    named = os.environ.get(TARGET_VARIABLE)
    if named:
        return named
    if from_vendor():
        return f"chosen by {BACKEND}"
    return LEGACY_TARGET if BACKEND == "neuronxcc" else str(importlib.import_module("nkisim").resolve_target().target)


def simulate_kernel(kernel: Any, *args: Any, target: str | None = None) -> Any:
    """Run a kernel on the CPU: arrays in, arrays out.

    Args:
        kernel: an `@nki.jit` kernel, or `kernel[2]` for two physical cores.
        args: NumPy arrays (but for neuronxcc torch tensors, too) and compile-time values.
        target: trn1, inf2, trn2 or trn3; default $NEURON_PLATFORM_TARGET_OVERRIDE, else the backend's own.
    """
    if _launches is not None:
        _launches.append((kernel, args))
        return run_on_device(kernel, *args)
    with _target(target):
        return nki.simulate(kernel)(*args)


def has_device() -> bool:
    """Whether a vendor package and a Neuron device are both present."""
    return from_vendor() and bool(glob.glob("/dev/neuron*"))


def run_on_device(kernel: Any, *args: Any) -> Any:
    """Compile and run a kernel on the Neuron device.

    Raises:
        RuntimeError: there is no device, or only the simulator.
    """
    _require_device("run_on_device")
    return _adapter.run_on_device(kernel, *args) if BACKEND == "neuronxcc" else kernel(*args)


def latency(kernel: Any, *args: Any, warmup: int = 10, iters: int = 100) -> dict[int, float]:
    """Latency of a kernel on the Neuron device, percentiles in microseconds.

    neuronxcc: of the device and the transfers to and from it, by `nki.benchmark`. nki, which has no such function: of
    the call, by the host's clock.

    Raises:
        RuntimeError: there is no device, or only the simulator.
    """
    _require_device("latency")
    if BACKEND == "neuronxcc":
        found: dict[int, float] = _adapter.benchmark(kernel, args, PERCENTILES, warmup, iters)
        return found
    times = []
    for _ in range(warmup + iters):
        started = time.perf_counter()
        kernel(*args)
        times.append(time.perf_counter() - started)
    values = np.percentile(np.array(times[warmup:]) * 1e6, PERCENTILES)
    return {p: float(value) for p, value in zip(PERCENTILES, values, strict=True)}


@contextmanager
def on_device() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Kernels that are simulated in this context run on the Neuron device instead; collects kernels and arguments.

    Raises:
        RuntimeError: there is no device, or only the simulator.
    """
    global _launches
    _require_device("on_device")
    launches: list[tuple[Any, tuple[Any, ...]]] = []
    before, _launches = _launches, launches
    try:
        yield launches
    finally:
        _launches = before


_launches: list[tuple[Any, tuple[Any, ...]]] | None = None


def _require_device(what: str) -> None:
    if not has_device():
        allowed = "AWS's nki or neuronxcc on a machine with a Neuron device"
        raise RuntimeError(f"{what}: backend {BACKEND}, allowed {allowed}")


@contextmanager
def _target(target: str | None) -> Iterator[None]:
    if target is None:
        yield
        return
    before = os.environ.get(TARGET_VARIABLE)
    os.environ[TARGET_VARIABLE] = target
    try:
        yield
    finally:
        if before is None:
            del os.environ[TARGET_VARIABLE]
        else:
            os.environ[TARGET_VARIABLE] = before
