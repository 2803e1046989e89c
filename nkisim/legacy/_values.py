"""Arguments and results of a launch: arrays in, tensors inside, arrays out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nkisim.dtypes import Array, bool_
from nkisim.frameworks import is_torch, to_torch
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import garbage
from nkisim.legacy._root import from_tensor
from nkisim.legacy._source import as_compiled
from nkisim.legacy._tile import Tile
from nkisim.legacy.typing import TensorType
from nkisim.machine import Launch
from nkisim.memory import HBM, MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.values import Arguments

OUTPUT = "err_tensor_output_not_written_to"


@dataclass
class Returned:
    """A kernel's result, which the launch does not look into."""

    value: Any


class Bound:
    """A call's arguments as tensors, and its results as arrays."""

    def __init__(
        self,
        launch: Launch,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        by_reference: bool,
    ) -> None:
        self._arguments = Arguments(launch)
        self._by_reference = by_reference
        self._mutable: list[Tile] = []
        self._function = function
        signature = inspect.signature(function)
        try:
            self._call = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{getattr(function, '__name__', 'kernel')}: {error}") from None
        for name, value in self._call.arguments.items():
            declared = _declared(function, signature.parameters[name])
            wrapped = self._wrap(value, name, by_reference or (declared is not None and declared.mutable))
            if declared is not None:
                _check_declared(name, wrapped, declared)
            self._call.arguments[name] = wrapped

    def call(self) -> Any:
        """The kernel's own call."""
        function = as_compiled(self._function)

        # Errors find the kernel's frame as the one that a function of this name calls.
        def _call_kernel() -> Any:
            return function(*self._call.args, **self._call.kwargs)

        return _call_kernel()

    def _wrap(self, value: Any, what: str, mutable: bool) -> Any:
        if isinstance(value, TensorType):
            value = _made_up(value, what)
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(self._wrap(v, f"{what}[{i}]", mutable) for i, v in enumerate(value))
        if isinstance(value, dict):
            return {k: self._wrap(v, f"{what}[{k!r}]", mutable) for k, v in value.items()}
        if not is_torch(value) and (isinstance(value, (np.generic, type)) or not hasattr(value, "__array__")):
            return value
        t = self._arguments.wrap(value, what)
        assert isinstance(t, NkiTensor)
        tile = from_tensor(t, what, "mutable" if mutable else "immutable").tile()
        if mutable:
            self._mutable.append(tile)
        return tile

    def results(self, returned: Returned) -> Any:
        """What the kernel returned, as arrays: copies, so that they do not change with the caller's inputs.

        Raises:
            NkiError: nothing, something that is no tensor in HBM, or not every parameter that was written.
        """
        seen: list[Tile] = []
        values = self._result(returned.value, seen)
        if self._by_reference:
            if not seen and not any(_storage(t).was_written for t in self._mutable):
                refuse("return", "", f"{OUTPUT}: written parameters", "none", "at least one, or a result")
            return values
        if not seen:
            refuse("return", "", f"{OUTPUT}: results", "none", "at least one tensor in HBM")
        for t in self._mutable:
            if _storage(t).was_written and not any(_storage(t) is _storage(s) for s in seen):
                rule = "err_mutable_parameter_not_returned: a parameter that was written"
                refuse("return", t.name, rule, "a result without it", "all written parameters in the result")
        return values

    def _result(self, value: Any, seen: list[Tile]) -> Any:
        if isinstance(value, (list, tuple)):
            items = [self._result(v, seen) for v in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if value is None:
            return None
        if not isinstance(value, Tile) or value.buffer is MemoryRegion.psum:
            got = value.buffer.name if isinstance(value, Tile) else type(value).__name__
            refuse("return", "", "type", got, "tensors in HBM, in tuples or lists", "NKI programming model (SDK 2.26)")
        if value.buffer not in HBM:
            warnings.warn(f"{value!r} is returned from SBUF; only the simulator can do that", stacklevel=2)
        seen.append(value)
        array = _array(value)
        return to_torch(array) if self._arguments.torch_seen else array

    def copy_back(self) -> None:
        """Bring what the kernel wrote into copied arguments back to the caller's arrays."""
        self._arguments.copy_back()


def _storage(t: Tile) -> Any:
    return t.root.block(()).tensor.storage


def _array(value: Tile) -> Array:
    spot = value.spot("return", value.name)
    storage, t = spot.block.tensor.storage, spot.block.tensor
    size = t.element_bytes
    name = value.name or "the result"
    array = np.array(storage.array(t.carrier, spot.shape, spot.strides, spot.offset))
    seen = storage.defined_map(size, spot.shape, spot.strides, spot.offset)
    if not seen.any():
        refuse("return", value.name, f"{OUTPUT}: a returned tensor", "never written", "a write to it")
    if not seen.all():
        array[~seen] = garbage(array.dtype)
        left = f"{int((~seen).sum())} of {seen.size} elements"
        warnings.warn(f"{left} of {name} were never written: NaN, or the largest integer, stands there", stacklevel=2)
    if array.dtype != value.kind.numpy:
        array = array.astype(value.kind.numpy)
    return array.astype(np.bool_) if value.kind is bool_ else array


def _made_up(declared: TensorType, what: str) -> Array:
    """Values for an argument of which a benchmark gives shape and type only."""
    if declared.shape is None or declared.kind is None:
        raise TypeError(f"{what}: received {declared}, allowed an array or nt.tensor[[sizes], dtype]")
    rng = np.random.default_rng(0)
    if declared.kind.is_float:
        return rng.standard_normal(declared.shape, np.float32).astype(declared.kind.numpy)
    return np.zeros(declared.shape, declared.kind.numpy)


def _declared(function: Callable[..., Any], parameter: inspect.Parameter) -> TensorType | None:
    """The `nki.typing` annotation of a parameter, also where it is written as a string."""
    annotation = parameter.annotation
    while isinstance(annotation, str) and "tensor" in annotation:
        try:
            annotation = eval(annotation, getattr(function, "__globals__", {}))
        except (NameError, AttributeError):
            return None  # names that only a type checker sees
    return annotation if isinstance(annotation, TensorType) else None


def _check_declared(name: str, value: Any, declared: TensorType) -> None:
    if value is None or declared.shape is None:
        return
    if not isinstance(value, Tile):
        raise TypeError(f"{name}: received {type(value).__name__}, allowed a tensor as declared")
    if value.shape != declared.shape:
        rule = "err_annotation_shape_mismatch: shape"
        refuse("argument", name, rule, list(value.shape), list(declared.shape))
