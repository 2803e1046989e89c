"""Constants of the legacy `nki.language`: limits of tiles and of element types."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from nkisim.language import tile_size
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._index import Grid, mgrid

__all__ = ["bfp16", "finfo", "fp32", "gemm_grid", "gemm_stationary_grid", "nc", "spmd_dim", "tile_size"]


class _Least:
    """An element type's least value."""

    def __init__(self, least: float) -> None:
        self.min = least


fp32 = _Least(float(np.finfo(np.float32).min))  # bit pattern 0xff7fffff
bfp16 = _Least(float("-inf"))  # bit pattern 0xff80


def finfo(dtype: Any) -> Any:
    """Limits of a float type, as `np.finfo` has them."""
    limits: Any = ml_dtypes.finfo
    return limits(kind_of(dtype, "nki.language.finfo dtype").numpy)


class GridDim:
    """A dimension of a launch grid, of one or more factors of which one may be spread over physical cores.

    Args:
        sizes: the factors, outermost first.
        spread: number of the factor that is physical cores, or None.
    """

    def __init__(self, sizes: tuple[int, ...], spread: int | None = None) -> None:
        self.sizes = sizes
        self.spread = spread

    def __mul__(self, other: Any) -> GridDim:
        return spmd_dim(self, other)

    def __rmul__(self, other: Any) -> GridDim:
        return spmd_dim(other, self)

    def __repr__(self) -> str:
        return " * ".join(f"nc({n})" if i == self.spread else str(n) for i, n in enumerate(self.sizes))


def nc(size: Any) -> GridDim:
    """A dimension of a launch grid whose programs run on `size` physical cores."""
    if not isinstance(size, int) or isinstance(size, bool) or size not in (1, 2):
        raise ValueError(f"nl.nc: received {size!r}, allowed 1 or 2 physical cores")
    return GridDim((size,), 0)


def spmd_dim(*dims: Any) -> GridDim:
    """A dimension of a launch grid as a product, e.g. `nl.spmd_dim(4, nl.nc(2))`: 8 programs, odd ones on core 1."""
    sizes: list[int] = []
    spread = None
    for d in dims:
        part: GridDim = d if isinstance(d, GridDim) else GridDim((d,))
        numbers: tuple[Any, ...] = part.sizes
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in numbers):
            raise ValueError(f"nl.spmd_dim: received {d!r}, allowed positive integers and nl.nc(n)")
        if part.spread is not None:
            if spread is not None:
                raise ValueError(f"nl.spmd_dim: received {dims!r}, allowed one nl.nc")
            spread = len(sizes) + part.spread
        sizes.extend(part.sizes)
    if not sizes:
        raise ValueError("nl.spmd_dim: received nothing, allowed positive integers and nl.nc(n)")
    return GridDim(tuple(sizes), spread)


def gemm_grid() -> Grid:
    """Index expressions of the largest moving tile and result of a matmul, as `nl.mgrid` gives them."""
    return mgrid[0 : tile_size.pmax, 0 : tile_size.gemm_moving_fmax]


def gemm_stationary_grid() -> Grid:
    """Index expressions of the largest stationary tile of a matmul, as `nl.mgrid` gives them."""
    return mgrid[0 : tile_size.pmax, 0 : tile_size.gemm_stationary_fmax]
