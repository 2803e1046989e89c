"""Which of AWS's packages are installed, and what they do not know."""

from __future__ import annotations

import importlib.util

UNKNOWN_TO_LEGACY = ("trn3", "gen4")  # targets that neuronxcc.nki of SDK 2.26 does not have; two names of one


def installed(package: str) -> bool:
    """Whether a package of AWS's is importable; the simulator under its name does not count."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # nkisim.install() registers modules without a spec
        return False
    return spec is not None and spec.origin is not None and "nkisim" not in spec.origin
