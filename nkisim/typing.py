"""The `nki.typing` module: annotations of kernel parameters.

`x: nt.tensor[128, 512]` declares the shape of an argument; a call with another shape is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorType:
    """A tensor of a declared shape: `nt.tensor[128, 512]`."""

    shape: tuple[int, ...]


class _Tensor:
    """`nt.tensor`; indexed with a shape it is an annotation."""

    def __getitem__(self, shape: Any) -> TensorType:
        sizes = shape if isinstance(shape, tuple) else (shape,)
        if not sizes or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes):
            raise TypeError(f"nki.typing.tensor: received {shape!r}, allowed positive sizes: nt.tensor[128, 512]")
        return TensorType(sizes)

    def __repr__(self) -> str:
        return "nki.typing.tensor"


tensor = _Tensor()
