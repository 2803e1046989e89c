"""Arguments and results of a kernel call: arrays in, HBM tensors inside, arrays out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from nkisim import dtypes
from nkisim.dtypes import Array
from nkisim.errors import NkiError, call_site
from nkisim.frameworks import is_torch, is_torch_dtype, to_numpy, to_torch, torch_dtype
from nkisim.hardware import GEN4
from nkisim.machine import Launch
from nkisim.memory import MemoryRegion, Storage, StorageInfo
from nkisim.objects import NKIObject
from nkisim.tensor import NkiTensor
from nkisim.typing import TensorType

MIGRATION = "NKI migration guide, NKI 0.6"
OUTPUT = "NKI errors, SDK 2.26: output tensor not written to"


class Arguments:
    """A call's arguments with every array replaced by a tensor, and the way back for arrays that had to be copied."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._copies: list[tuple[Storage, Callable[[Array], Any]]] = []
        self.torch_seen = False

    def bind(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
        """The call `function(*args, **kwargs)` on tensors, to be made on each core.

        Raises:
            TypeError: the function does not take these arguments, or no kernel takes a value among them.
            NkiError: an array's shape is not the one its parameter declares.
        """
        signature = inspect.signature(function)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{getattr(function, '__name__', 'kernel')}: {error}") from None
        for name, value in bound.arguments.items():
            bound.arguments[name] = self.wrap(value, name)
        for name, declared in _declared_types(function, signature).items():
            if name in bound.arguments:
                _check_declared(name, bound.arguments[name], declared)

        # Errors find the kernel's own frame as the one that this function calls.
        def _call_kernel() -> Any:
            return function(*bound.args, **bound.kwargs)

        return _call_kernel

    def wrap(self, value: Any, what: str) -> Any:
        """`value` with every array in it replaced by a tensor; `what` names it in messages."""
        if is_torch(value):
            self.torch_seen = True
            array = to_numpy(value)
            shares = array.size > 0 and array.__array_interface__["data"][0] == value.data_ptr()
            # Detached: a leaf that requires gradients refuses to be written in place.
            return self._tensor(array, what, None if shares else lambda a: value.detach().copy_(to_torch(a)))
        if isinstance(value, np.ndarray):
            return self._tensor(value, what)
        if isinstance(value, NkiTensor):
            raise TypeError(f"{what}: received an NkiTensor, allowed a NumPy array or a torch tensor")
        if is_torch_dtype(value):
            return torch_dtype(value, what)
        if isinstance(value, tuple):
            items = [self.wrap(v, f"{what}[{i}]") for i, v in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            raise TypeError(f"{what}: received a list, allowed a tuple [{MIGRATION}]")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"{what}: received a dict with the key {key!r}, allowed string keys [{MIGRATION}]")
            return {k: self.wrap(v, f"{what}[{k!r}]") for k, v in value.items()}
        if isinstance(value, NKIObject):
            clone = object.__new__(type(value))
            clone.__dict__.update({k: self.wrap(v, f"{what}.{k}") for k, v in value.__dict__.items()})
            return clone
        if hasattr(value, "__array__") and not isinstance(value, (np.generic, type)):
            raise TypeError(f"{what}: received {type(value).__name__}, allowed a NumPy array or a torch tensor")
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
            stored = stored.view(dtype.numpy).astype(np.float32)
        data = stored.reshape(-1).view(np.uint8)
        info = StorageInfo(launch.next_id(), what, buffer, array.shape or (1,), dtype, call_site(), is_argument=True)
        storage = Storage(info, launch.precise, data)
        if launch.n_cores > 1:
            storage.users = storage.new_map()
        if write_back is not None:
            self._copies.append((storage, write_back))
        elif not np.shares_memory(data, array):
            data.flags.writeable = array.flags.writeable
            self._copies.append((storage, lambda values: _assign(array, values)))
        return NkiTensor(info.shape, dtype, storage, buffer, what)

    def copy_back(self) -> None:
        """Bring what the kernel wrote into copied arguments back to the caller's arrays."""
        for storage, write_back in self._copies:
            if storage.was_written:
                info = storage.info
                values = storage.data.view(info.dtype.carrier(storage.precise)).reshape(info.shape)
                write_back(values.astype(info.dtype.numpy, copy=False))


def _assign(array: Array, values: Array) -> None:
    """Write `values` into the caller's array; one of bits where the types differ in name only."""
    array[...] = values.reshape(array.shape).view(array.dtype)


def _declared_types(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, TensorType]:
    """The `nki.typing.tensor[...]` annotations of the parameters, those written as strings included."""
    found = {}
    for name, parameter in signature.parameters.items():
        annotation = parameter.annotation
        # A quoted annotation in a module with postponed annotations is a string twice.
        while isinstance(annotation, str) and "tensor[" in annotation:
            try:
                annotation = eval(annotation, getattr(function, "__globals__", {}))
            except (NameError, AttributeError):
                break  # names that only a type checker sees
        if isinstance(annotation, TensorType):
            found[name] = annotation
    return found


def _check_declared(name: str, value: Any, declared: TensorType) -> None:
    if value is None:
        return
    if not isinstance(value, NkiTensor):
        raise TypeError(f"{name}: received {type(value).__name__}, allowed a tensor as declared")
    if value.shape != declared.shape:
        raise NkiError(
            "argument",
            name,
            "shape declared by the parameter's annotation",
            received=list(value.shape),
            allowed=list(declared.shape),
            source="nki.typing, " + MIGRATION,
        )


def results(value: Any, as_torch: bool) -> Any:
    """A kernel's result as arrays: copies, so that they do not change with the caller's inputs.

    Raises:
        NkiError: a result that is no tensor, is neither in shared HBM nor an argument, or is not written everywhere.
    """
    if isinstance(value, NkiTensor):
        return _output(value, as_torch)
    if isinstance(value, (tuple, list)):
        items = [results(v, as_torch) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: results(v, as_torch) for k, v in value.items()}
    if value is not None:
        raise NkiError(
            "return",
            "",
            "type",
            received=type(value).__name__,
            allowed="tensors, or None, in tuples, lists or dicts of them",
            source=MIGRATION,
        )
    return None


def _output(t: NkiTensor, as_torch: bool) -> Any:
    storage = t.storage
    site = storage.info.site

    def refuse(rule: str, received: object, allowed: object, source: str) -> None:
        raise NkiError("return", t.name, rule, received=received, allowed=allowed, source=source, site=site)

    if t.buffer is not MemoryRegion.shared_hbm and not storage.info.is_argument:
        refuse("buffer of a returned tensor", t.buffer.name, "shared_hbm, or an argument", MIGRATION)
    if t.dynamic is not None:
        refuse("returned tensor", "a view with a run-time index", "a tensor at a fixed address", MIGRATION)
    size = t.element_bytes
    if not storage.is_defined(size, t.shape, t.strides, t.offset):
        seen = storage.defined_map(size, t.shape, t.strides, t.offset)
        first = tuple(int(i) for i in np.argwhere(~seen)[0])
        unwritten = f"{int((~seen).sum())} of {seen.size} elements never written, first at {first}"
        refuse("returned tensor is not fully written", unwritten, "every element written", OUTPUT)
    array = np.array(storage.array(t.dtype.carrier(storage.precise), t.shape, t.strides, t.offset))
    if array.dtype != t.dtype.numpy:
        array = array.astype(t.dtype.numpy)
    if t.dtype is dtypes.bool_:
        array = array.astype(np.bool_)
    return to_torch(array) if as_torch else array
