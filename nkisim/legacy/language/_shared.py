"""What the functions of the legacy `nki.language` share."""

from __future__ import annotations

import numpy as np

from nkisim import isa
from nkisim.legacy._issue import produce
from nkisim.legacy._tile import Tile
from nkisim.memory import MemoryRegion


def is_number(x: object) -> bool:
    """Whether `x` is a number of Python or NumPy."""
    return isinstance(x, (bool, int, float, np.bool_, np.integer, np.floating))


def on_all_partitions(t: Tile, shape: tuple[int, ...]) -> Tile:
    """`t`, of the rank of `shape` and copied to its partitions where it has one and `shape` more."""
    from nkisim.legacy.language._move import broadcast_to

    if t.ndim < len(shape):
        # NumPy's rule puts the missing dimensions in front; the partition dimension can only stay where it is.
        t = t.broadcast_to((1,) * (len(shape) - t.ndim) + t.shape)
    if t.shape[0] == shape[0]:
        return t
    return broadcast_to(t, shape=(shape[0], *t.shape[1:]))


def out_of_psum(a: Tile, b: Tile) -> Tile:
    """`b`, in SBUF where both are in PSUM: no engine reads two tiles from there."""
    if a.buffer is not MemoryRegion.psum or b.buffer is not MemoryRegion.psum:
        return b
    copied = produce("copy", b.shape, lambda dst, part: isa.tensor_copy(dst=dst, src=part.read(b)), default=b.kind)
    copied._settle()
    return copied
