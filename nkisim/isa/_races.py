"""Races between the two cores of a launch on shared HBM.

Each shared storage maps its elements to four bits: which cores wrote it (bits 0 and 1) and which read
it (bits 2 and 3) since the last `core_barrier` on it. An access that meets the other core's bits, one of
the two being a write, is unordered on the device, whatever order the simulator runs the cores in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import Array
from nkisim.memory import Storage

_WRITE, _READ = 1, 4


def note_access(entries: Array, rows: Any, rank: int, writing: bool) -> str | None:
    """Remember an access to `entries[rows]`; returns what the other core did there if that is a race."""
    seen = entries[rows]
    other = 1 - rank
    if (seen & np.uint8(_WRITE << other)).any():
        return "written"
    if writing and (seen & np.uint8(_READ << other)).any():
        return "read"
    entries[rows] = seen | np.uint8((_WRITE if writing else _READ) << rank)
    return None


def forget_accesses(
    storage: Storage, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    """Both cores have met: what they did to the view before is ordered."""
    assert storage.users is not None
    storage.users.under(itemsize, shape, strides, offset)[...] = 0
