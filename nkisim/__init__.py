"""nkisim: a strict CPU implementation of AWS's Neuron Kernel Interface (NKI), in NumPy."""

from __future__ import annotations

from nkisim import isa, language, nki
from nkisim.errors import NkiError
from nkisim.hardware import TARGETS, Hardware, resolve_target
from nkisim.install import install, uninstall
from nkisim.nki import jit, simulate
from nkisim.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "TARGETS",
    "Hardware",
    "NkiError",
    "Trace",
    "install",
    "isa",
    "jit",
    "language",
    "nki",
    "resolve_target",
    "simulate",
    "uninstall",
]
