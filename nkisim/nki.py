"""The `nki` module: `jit` and `simulate`.

A kernel is an ordinary Python function; simulating it runs the function with HBM tensors for its array
arguments while every `nki.isa` call executes on NumPy, eagerly and in program order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from nkisim import dtypes
from nkisim.dtypes import Array
from nkisim.errors import NkiError, call_site
from nkisim.frameworks import is_torch, to_numpy, to_torch
from nkisim.hardware import GEN4, resolve_target
from nkisim.machine import Core, Launch, current_core, running_core
from nkisim.memory import MemoryRegion, Storage, StorageInfo
from nkisim.tensor import NKIObject, NkiTensor
from nkisim.trace import Trace

PRECISE_VARIABLE = "NKI_PRECISE_FP"
JIT = "nki.jit, NKI 0.6"
MIGRATION = "NKI migration guide, NKI 0.6"


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
            flat.extend((edge[0], p) for p in producers)
        return Kernel(self.function, self.n_cores, tuple(flat), self._target, self._precise, self._trace)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Simulate the kernel on NumPy arrays or torch tensors."""
        if running_core() is not None:
            raise NkiError(
                "jit",
                self.function.__name__,
                "@nki.jit function called inside a kernel",
                received="a jit-decorated callee",
                allowed="a plain function",
                source=MIGRATION,
            )
        hardware = resolve_target(self._target)
        if self.n_cores > hardware.cores_per_launch_max:
            raise ValueError(
                f"kernel[lnc]: received {self.n_cores}, allowed 1..{hardware.cores_per_launch_max} on {hardware.target}"
            )
        precise = self._precise if self._precise is not None else os.environ.get(PRECISE_VARIABLE, "1") != "0"
        if self._trace is not None:
            self._trace.target = hardware.target
        launch = Launch(hardware, precise, self.n_cores, self._trace)
        arguments = _Arguments(launch)
        call_args = [arguments.wrap(a, f"argument {i}") for i, a in enumerate(args)]
        call_kwargs = {k: arguments.wrap(v, k) for k, v in kwargs.items()}

        def body() -> Any:
            result = self.function(*call_args, **call_kwargs)
            self._check_schedule(current_core("simulate"))
            return result

        results = launch.run(body)
        arguments.copy_back()
        return _unwrap(results[0], arguments.torch_seen)

    def _check_schedule(self, core: Core) -> None:
        for consumer, producer in self.schedule:
            for name in (consumer, producer):
                if name not in core.names:
                    raise NkiError(
                        "with_schedule",
                        "",
                        "edge to an instruction that was not issued",
                        received=repr(name),
                        allowed=", ".join(sorted(core.names)) or "no instruction has a name=",
                        source="NKI scheduling guide, NKI 0.6",
                    )
            if core.trace is not None:
                core.trace.edges.append((consumer, producer))


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
    base = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    resolve_target(target)
    return Kernel(base.function, base.n_cores, base.schedule, target, precise, trace)


class _Arguments:
    """Array arguments as HBM tensors, and the way back for those that had to be copied."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._copies: list[tuple[Storage, Callable[[Array], Any]]] = []
        self.torch_seen = False

    def wrap(self, value: Any, what: str) -> Any:
        """`value` with every array in it replaced by a tensor."""
        if is_torch(value):
            self.torch_seen = True
            array = to_numpy(value)
            shares = array.size > 0 and array.__array_interface__["data"][0] == value.data_ptr()
            return self._tensor(array, what, None if shares else lambda a: value.copy_(to_torch(a)))
        if isinstance(value, np.ndarray):
            return self._tensor(value, what)
        if isinstance(value, tuple):
            items = [self.wrap(v, f"{what}[{i}]") for i, v in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            raise TypeError(f"{what}: received a list, allowed a tuple [{MIGRATION}]")
        if isinstance(value, dict):
            return {k: self.wrap(v, f"{what}[{k!r}]") for k, v in value.items()}
        if isinstance(value, NKIObject) and not isinstance(value, NkiTensor):
            clone = object.__new__(type(value))
            clone.__dict__.update({k: self.wrap(v, f"{what}.{k}") for k, v in value.__dict__.items()})
            return clone
        return value

    def _tensor(self, array: Array, what: str, write_back: Callable[[Array], Any] | None = None) -> NkiTensor:
        launch = self._launch
        dtype = dtypes.as_dtype(array.dtype, what)
        if array.size == 0:
            raise ValueError(f"{what}: received shape {array.shape}, allowed at least one element")
        if dtype == "float8_e4m3fn" and launch.hardware.generation < GEN4:
            # Same bits up to 240; above, the older type has infinity and NaN (NKI 2.28 release notes).
            dtype = dtypes.float8_e4m3
        buffer = MemoryRegion.shared_hbm if launch.n_cores > 1 else MemoryRegion.private_hbm
        stored = np.ascontiguousarray(array)
        if not launch.precise and dtype.is_low_precision:
            stored = stored.astype(np.float32)
        data = stored.reshape(-1).view(np.uint8)
        info = StorageInfo(launch.next_id(), what, buffer, array.shape or (1,), dtype, call_site(), is_argument=True)
        storage = Storage(info, launch.precise, data)
        if launch.n_cores > 1:
            storage.writer = np.zeros(array.size, np.int8)
        if write_back is not None:
            self._copies.append((storage, write_back))
        elif not np.shares_memory(data, array):
            data.flags.writeable = array.flags.writeable
            self._copies.append((storage, functools.partial(np.copyto, array)))
        return NkiTensor(info.shape, dtype, storage, buffer, what)

    def copy_back(self) -> None:
        """Bring what the kernel wrote into copied arguments back to the caller's arrays."""
        for storage, write_back in self._copies:
            if storage.was_written:
                write_back(_values(storage, storage.info))


def _values(storage: Storage, info: StorageInfo) -> Array:
    """All elements of an argument's storage in their own dtype."""
    values = storage.data.view(info.dtype.carrier(storage.precise)).reshape(info.shape)
    return values if values.dtype == info.dtype.numpy else values.astype(info.dtype.numpy)


def _unwrap(result: Any, as_torch: bool) -> Any:
    """Kernel results as arrays: copies, so that they do not change with the caller's inputs."""
    if isinstance(result, NkiTensor):
        return _output(result, as_torch)
    if isinstance(result, (tuple, list)):
        return type(result)(_unwrap(r, as_torch) for r in result)
    if isinstance(result, dict):
        return {k: _unwrap(v, as_torch) for k, v in result.items()}
    return result


def _output(t: NkiTensor, as_torch: bool) -> Any:
    if t.buffer is not MemoryRegion.shared_hbm and not t.storage.info.is_argument:
        raise NkiError(
            "return",
            t.name,
            "buffer of a returned tensor",
            received=t.buffer.name,
            allowed="shared_hbm",
            source=MIGRATION,
            site=t.storage.info.site,
        )
    size = t.element_bytes
    if not t.storage.is_defined(size, t.shape, t.strides, t.offset):
        seen = t.storage.defined_map(size, t.shape, t.strides, t.offset)
        first = tuple(int(i) for i in np.argwhere(~seen)[0])
        raise NkiError(
            "return",
            t.name,
            "returned tensor is not fully written",
            received=f"{int((~seen).sum())} of {seen.size} elements never written, first at {first}",
            allowed="every element written",
            source="NKI errors: output tensor not written to (SDK 2.26)",
            site=t.storage.info.site,
        )
    stored = t.storage.array(t.dtype.carrier(t.storage.precise), t.shape, t.strides, t.offset)
    array = np.array(stored)
    if array.dtype != t.dtype.numpy:
        array = array.astype(t.dtype.numpy)
    if t.dtype is dtypes.bool_:
        array = array.astype(np.bool_)
    return to_torch(array) if as_torch else array
