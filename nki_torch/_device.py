"""Kernel launches on torch tensors: simulated where the tensors are on the CPU, AWS's `nki.jit` on a Neuron device.

A launch (geometry, plan, options) is made on the host from shapes, lengths and tables, by `contributed`, and kept for
the calls that need the same one: all layers of a model in a step do. The program that AWS's compiler makes of it, and
which it keeps itself, depends on shapes, types and options only; lengths and tables are data.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contributed._checks import require
from contributed._nki import BACKEND, default_target, simulate_kernel
from nkisim.frameworks import to_numpy, to_torch

Array = np.ndarray[Any, np.dtype[Any]]

CORES_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"  # of the runtime, which refuses launches on another number
MOST_LAUNCHES = 32


class LaunchKey(NamedTuple):
    """What a launch was made for. `data` are lengths and tables, which another step has others of."""

    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    options: tuple[tuple[str, Any], ...]
    target: str
    device: str
    data: tuple[Any, ...]


class LaunchCacheInfo(NamedTuple):
    """State of the cache, `launches` from the one unused for longest to the latest."""

    hits: int
    misses: int
    maxsize: int
    launches: tuple[LaunchKey, ...]


class Kept:
    """A launch of `contributed`, and its tables on the device."""

    def __init__(self, launch: Any) -> None:
        self.launch = launch
        plan = launch.plan
        parts = [*(plan if isinstance(plan, tuple) else vars(plan).values()), *(getattr(launch, "gates", None) or ())]
        self._tables = {id(x): x for x in parts if isinstance(x, np.ndarray)}
        self._on_device: dict[int, Tensor] = {}

    def tensor(self, x: Array, device: torch.device) -> Tensor:
        """An array on the device; tables of the launch are moved there once."""
        if id(x) in self._on_device:
            return self._on_device[id(x)]
        moved = _moved(x, device)
        if id(x) in self._tables:
            self._on_device[id(x)] = moved
        return moved


class _Launches:
    """The launches that were used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[LaunchKey, Kept] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, key: LaunchKey, make: Callable[[], Any]) -> Kept:
        with self._lock:
            if key in self._kept:
                self._hits += 1
                self._kept.move_to_end(key)
                return self._kept[key]
            self._misses += 1
        kept = Kept(make())
        with self._lock:
            self._kept[key] = kept
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return kept

    def info(self) -> LaunchCacheInfo:
        with self._lock:
            return LaunchCacheInfo(self._hits, self._misses, self._most, tuple(self._kept))

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._hits = self._misses = 0


_launches = _Launches(MOST_LAUNCHES)


def launch_cache_info() -> LaunchCacheInfo:
    """Hits, misses, size and content of the cache of launches."""
    return _launches.info()


def launch_cache_clear() -> None:
    """Forget all launches."""
    _launches.clear()


def kept_launch(
    kernel: str,
    tensors: Iterable[Tensor],
    make: Callable[[], Any],
    *,
    options: dict[str, Any],
    data: tuple[Any, ...],
) -> Kept:
    """The launch for these shapes, options, lengths and tables, made by `make` if it is not there."""
    operands = list(tensors)
    first = operands[0]
    key = LaunchKey(
        kernel,
        tuple(tuple(x.shape) for x in operands),
        str(first.dtype).removeprefix("torch."),
        tuple(options.items()),
        default_target(),
        str(first.device),
        data,
    )
    return _launches.get(key, make)


def is_simulated(device: torch.device) -> bool:
    """Whether kernels on this device's tensors run on the CPU."""
    return device.type == "cpu"


def n_cores(device: torch.device) -> int:
    """Physical cores of a launch: 1 in the simulator, on a device as its runtime is configured."""
    if is_simulated(device):
        return 1
    value = os.environ.get(CORES_VARIABLE, "1")
    require(value in ("1", "2"), CORES_VARIABLE, received=value, allowed="1 or 2")
    return int(value)


def one_core(device: torch.device, kernel: str) -> None:
    """Refuse a runtime of two cores per launch for kernels that run on one."""
    if n_cores(device) != 1:
        raise NotImplementedError(f"{kernel}: received {CORES_VARIABLE}=2, allowed 1: the kernel runs on one core")


def _moved(x: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)


def run(kernel: Any, arguments: Iterable[Any], device: torch.device, kept: Kept | None = None) -> tuple[Tensor, ...]:
    """A kernel's results as tensors on `device`, where its tensors are; arrays among the arguments are moved there.

    Tensors that the kernel writes are written in place on the CPU; on a device the results have what was written.

    Raises:
        RuntimeError: a device without AWS's nki.
    """
    values: list[Any] = []
    if is_simulated(device):
        values.extend(to_numpy(x) if isinstance(x, Tensor) else x for x in arguments)
        result = simulate_kernel(kernel, *values)
        return tuple(to_torch(x) for x in (result if isinstance(result, tuple) else (result,)))
    if BACKEND != "nki":
        raise RuntimeError(f"device {device}: backend of contributed is {BACKEND}, allowed AWS's nki, 0.6 or newer")
    for x in arguments:
        if isinstance(x, np.ndarray):
            values.append(_moved(x, device) if kept is None else kept.tensor(x, device))
        else:
            values.append(x)
    result = kernel(*values)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
