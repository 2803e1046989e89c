"""The NKI that the kernels talk to: AWS's where it is installed, this project's simulator elsewhere.

Kernels import `nki`, `nisa` and `nl` from here and nothing else of NKI. `NKI_BACKEND` chooses:

    auto       AWS's `nki` from version 0.6 on if it is installed, else the simulator (default)
    nki        AWS's `nki`
    nkisim     this project's simulator
    neuronxcc  AWS's older `neuronxcc.nki`: no adapter exists in this version
"""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BACKEND_VARIABLE = "NKI_BACKEND"
BACKENDS = ("auto", "nki", "neuronxcc", "nkisim")
TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"
FIRST_NKI = (0, 6)


def choose(wish: str) -> tuple[str, str]:
    """Backend and version that a value of `NKI_BACKEND` means here.

    Raises:
        ValueError: no such backend.
        ImportError: AWS's nki was asked for and is not there, or is too old.
        NotImplementedError: neuronxcc was asked for.
    """
    if wish not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}: received {wish!r}, allowed {', '.join(BACKENDS)}")
    if wish == "neuronxcc":
        raise NotImplementedError(
            f"{BACKEND_VARIABLE}=neuronxcc: the kernels have no adapter for neuronxcc.nki in this version; "
            "use nki (Neuron SDK 2.32 or newer) or nkisim"
        )
    found = _vendor_version() if wish in ("auto", "nki") else None
    if found is not None and _release(found) >= FIRST_NKI:
        return "nki", found
    if wish == "nki":
        raise ImportError(
            f"{BACKEND_VARIABLE}=nki: found {'no nki package' if found is None else f'nki {found}'}, "
            f"allowed AWS's nki {'.'.join(map(str, FIRST_NKI))} or newer"
        )
    return "nkisim", importlib.import_module("nkisim").__version__


def _vendor_version() -> str | None:
    """Version of an installed `nki` that is not the simulator under that name."""
    try:
        spec = importlib.util.find_spec("nki")
    except ValueError:  # nkisim.install() registers modules without a spec
        return None
    if spec is None or spec.origin is None or "nkisim" in spec.origin:
        return None
    try:
        return importlib.metadata.version("nki")
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


BACKEND, VERSION = choose(os.environ.get(BACKEND_VARIABLE, "auto"))
_package = BACKEND if BACKEND == "nki" else "nkisim.nki"
nki: Any = importlib.import_module(_package)
nisa: Any = importlib.import_module("nki.isa" if BACKEND == "nki" else "nkisim.isa")
nl: Any = importlib.import_module("nki.language" if BACKEND == "nki" else "nkisim.language")


def describe(target: str | None = None) -> str:
    """One line that says which NKI runs: vendor package or simulator, version, target."""
    kind = "vendor package nki" if BACKEND == "nki" else "simulator nkisim"
    return f"{kind} {VERSION}, target {target or default_target()}"


def default_target() -> str:
    """The target that is simulated where none is named."""
    named = os.environ.get(TARGET_VARIABLE)
    if named:
        return named
    return "chosen by nki" if BACKEND == "nki" else str(importlib.import_module("nkisim").resolve_target().target)


def simulate_kernel(kernel: Any, *args: Any, target: str | None = None) -> Any:
    """Run a kernel on the CPU: arrays in, arrays out.

    Args:
        kernel: an `@nki.jit` kernel, or `kernel[2]` for two physical cores.
        args: NumPy arrays (or torch tensors) and compile-time values.
        target: trn1, inf2, trn2 or trn3; default $NEURON_PLATFORM_TARGET_OVERRIDE, else the backend's own.
    """
    with _target(target):
        return nki.simulate(kernel)(*args)


def has_device() -> bool:
    """Whether a vendor package and a Neuron device are both present."""
    return BACKEND == "nki" and bool(glob.glob("/dev/neuron*"))


def run_on_device(kernel: Any, *args: Any) -> Any:
    """Compile and run a kernel on the Neuron device.

    Raises:
        RuntimeError: there is no device, or only the simulator.
    """
    if not has_device():
        raise RuntimeError(f"run_on_device: backend {BACKEND}, allowed AWS's nki on a machine with a Neuron device")
    return kernel(*args)


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
