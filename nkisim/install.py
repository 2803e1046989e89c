"""Opt-in: make `import nki` find the simulator, so that an unmodified NKI script runs.

Nothing here happens on import of the project; AWS's own package is never hidden.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from nkisim import collectives, isa, language, nki, typing
from nkisim.isa import _enums

# `nki.isa.constants` is where AWS's kernel library imports the enumerations from.
MODULES: dict[str, ModuleType] = {
    "nki": nki,
    "nki.isa": isa,
    "nki.isa.constants": _enums,
    "nki.language": language,
    "nki.typing": typing,
    "nki.collectives": collectives,
}


def install() -> None:
    """Register the simulator's modules as `nki`, `nki.isa`, `nki.language` and so on; again is harmless.

    Raises:
        RuntimeError: a package named nki is installed, or another one was imported already.
    """
    if is_installed():
        return
    location = _other_nki()
    if location is not None:
        raise RuntimeError(
            f"nkisim.install: a package named nki is importable from {location}, and the simulator does not hide it; "
            "use nkisim directly, or an environment without that package"
        )
    sys.modules.update(MODULES)


def uninstall() -> None:
    """Take the registered modules out of `sys.modules`; modules of others stay."""
    for name, module in MODULES.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def is_installed() -> bool:
    """Whether `import nki` finds the simulator."""
    return all(sys.modules.get(name) is module for name, module in MODULES.items())


def _other_nki() -> str | None:
    """Where a package named nki that is not the simulator comes from, or None."""
    loaded = sys.modules.get("nki")
    if loaded is not None and loaded is not nki:
        return str(getattr(loaded, "__file__", None) or "sys.modules")
    if loaded is nki:
        return None
    found = importlib.util.find_spec("nki")
    # A directory of that name without an __init__.py, as a checkout of a documentation has, is no package.
    return None if found is None else found.origin
