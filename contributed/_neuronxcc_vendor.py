"""The `neuronxcc.nki` that the adapter talks to: AWS's where it is installed, the simulator's front end elsewhere.

No other module of the adapter knows which of both it is.
"""

from __future__ import annotations

import importlib
from typing import Any

from contributed._packages import installed

_package = "neuronxcc.nki" if installed("neuronxcc") else "nkisim.legacy"
nki: Any = importlib.import_module(_package)
nisa: Any = importlib.import_module(f"{_package}.isa")
nl: Any = importlib.import_module(f"{_package}.language")
nt: Any = importlib.import_module(f"{_package}.typing")
