"""Opt-in: make `import nki` and `import neuronxcc.nki` find the simulator, so that an unmodified NKI script runs.

Nothing here happens on import of the project; AWS's own packages are never hidden.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from nkisim import collectives, isa, language, legacy, nki, typing
from nkisim.isa import _enums


def _neuronxcc() -> ModuleType:
    """The package `neuronxcc`, of which the simulator has `nki` only."""
    package = ModuleType("neuronxcc", "AWS's compiler package; the simulator has its `nki` only.")
    package.__path__ = []
    package.nki = legacy  # type: ignore[attr-defined]
    return package


# `nki.isa.constants` is where AWS's kernel library imports the enumerations from.
MODULES: dict[str, ModuleType] = {
    "nki": nki,
    "nki.isa": isa,
    "nki.isa.constants": _enums,
    "nki.language": language,
    "nki.typing": typing,
    "nki.collectives": collectives,
    "neuronxcc": _neuronxcc(),
    "neuronxcc.nki": legacy,
    "neuronxcc.nki.isa": legacy.isa,
    "neuronxcc.nki.isa.constants": legacy.isa.constants,
    "neuronxcc.nki.language": legacy.language,
    "neuronxcc.nki.typing": legacy.typing,
    "neuronxcc.nki.compiler": legacy.compiler,
}
PACKAGES = ("nki", "neuronxcc")


def install(*packages: str) -> None:
    """Register the simulator's modules as `nki`, `neuronxcc.nki` and their submodules; again is harmless.

    Args:
        packages: `nki` or `neuronxcc`, both without an argument.

    Raises:
        RuntimeError: a package of that name is installed, or another one was imported already.
        ValueError: the simulator has no such package.
    """
    unknown = set(packages) - set(PACKAGES)
    if unknown:
        raise ValueError(f"nkisim.install: received {', '.join(sorted(unknown))}, allowed {' and '.join(PACKAGES)}")
    wanted = packages or PACKAGES
    for package in wanted:
        location = _other(package)
        if location is not None:
            others = [f"nkisim.install({p!r})" for p in wanted if p != package]
            instead = f"{others[0]} alone, or" if others else "use nkisim directly, or"
            raise RuntimeError(
                f"nkisim.install: a package named {package} is importable from {location}, and the simulator does not "
                f"hide it; {instead} an environment without that package"
            )
    sys.modules.update({name: module for name, module in MODULES.items() if name.partition(".")[0] in wanted})


def uninstall() -> None:
    """Take the registered modules out of `sys.modules`; modules of others stay."""
    for name, module in MODULES.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


def is_installed() -> bool:
    """Whether `import nki` and `import neuronxcc.nki` find the simulator."""
    return all(sys.modules.get(name) is module for name, module in MODULES.items())


def _other(package: str) -> str | None:
    """Where a package of that name that is not the simulator comes from, or None."""
    loaded = sys.modules.get(package)
    if loaded is MODULES[package]:
        return None
    if loaded is not None:
        return str(getattr(loaded, "__file__", None) or "sys.modules")
    found = importlib.util.find_spec(package)
    # A directory of that name without an __init__.py, as a checkout of a documentation has, is no package.
    return None if found is None else found.origin
