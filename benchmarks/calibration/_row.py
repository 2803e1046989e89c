"""What a calibration row holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

WITHIN = 0.25


@dataclass(frozen=True)
class Row:
    """One published figure and how the model's counterpart is computed.

    Args:
        key: name on the command line.
        what: quantity, shapes and dtype.
        target: chip.
        measured: published value in `unit`. Nothing here was measured by this project.
        unit: ns, us, ms or share.
        source: who published it, where, which release of the SDK.
        model: computes the modelled value in `unit`.
        how: how the row is expressed: kernel, reductions, what the compiler was seen to do.
        defines: constants of `nkisim/hardware.py`, separated by commas, that this very figure or its parts are the
            source of. Such a row shows that they are used as they were read, not that the model is right.
        comparable: False where the modelled kernel is another one than the measured.
        missing: where the ratio is off by more than a quarter, what the model lacks, as far as it is known.
        fast: a second or two at most.
    """

    key: str
    what: str
    target: str
    measured: float
    unit: str
    source: str
    model: Callable[[], float]
    how: str = ""
    defines: str = ""
    comparable: bool = True
    missing: str = ""
    fast: bool = True

    @property
    def is_check(self) -> bool:
        """Whether the ratio says something about the model."""
        return self.comparable and not self.defines


@dataclass(frozen=True)
class Result:
    """A row with its modelled value."""

    row: Row
    modelled: float

    @property
    def ratio(self) -> float:
        """Modelled over measured."""
        return self.modelled / self.row.measured

    @property
    def within(self) -> bool:
        """Whether the ratio is off by no more than a quarter."""
        return abs(self.ratio - 1.0) <= WITHIN
