"""The `neuronxcc.nki.typing` module: annotations of parameters and variables, and inputs known by shape only.

`x: nt.tensor[128, 512]` declares a shape, `x: nt.mutable_tensor` a parameter that the kernel may write (and has to
return). `nt.tensor[[128, 512], nl.float32]` stands for an argument of a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from nkisim.dtypes import DType
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._scalar import scalar
from nkisim.view import as_int

__all__ = ["mutable_tensor", "scalar", "tensor"]


@dataclass(frozen=True)
class TensorType:
    """A declared tensor; parts that are None are not declared."""

    shape: tuple[int, ...] | None = None
    kind: DType | None = None
    mutable: bool = False

    def __getitem__(self, key: Any) -> TensorType:
        """`tensor[128, 512]`, `tensor[(128, 512)]` or `tensor[[128, 512], dtype]`."""
        parts = key if isinstance(key, tuple) else (key,)
        kind = None
        if len(parts) == 2 and isinstance(parts[0], (list, tuple)):
            kind = kind_of(parts[1], "nki.typing.tensor dtype")
            parts = tuple(parts[0])
        elif len(parts) == 1 and isinstance(parts[0], (list, tuple)):
            parts = tuple(parts[0])
        sizes = tuple(as_int(n) for n in parts)
        if not sizes or any(n is None or n < 1 for n in sizes):
            raise TypeError(
                f"nki.typing.tensor: received {key!r}, allowed positive sizes, or a list of them and a dtype"
            )
        return TensorType(tuple(n for n in sizes if n is not None), kind, self.mutable)

    def __call__(self, *_args: Any) -> NoReturn:
        """Not callable."""
        raise TypeError("nki.typing.tensor: an annotation, not callable")


tensor = TensorType()
mutable_tensor = TensorType(mutable=True)
