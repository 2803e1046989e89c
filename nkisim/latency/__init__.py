"""The latency model: modelled time of a trace, from published costs. Nothing here is measured."""

from __future__ import annotations

from nkisim.latency.estimate import Estimate, Line, Step, estimate
from nkisim.latency.schedule import Slot

__all__ = ["Estimate", "Line", "Slot", "Step", "estimate"]
