"""What the tests of reductions, scans and statistics share."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from nkisim import isa as nisa
from nkisim.trace import Engine

bf16 = ml_dtypes.bfloat16


f32 = np.float32


CMD = nisa.reduce_cmd


def only(trace: Any, instruction: str) -> Any:
    """The one record of an instruction."""
    records = [r for r in trace.records if r.instruction == instruction]
    assert len(records) == 1
    assert records[0].engine is Engine.vector
    return records[0]
