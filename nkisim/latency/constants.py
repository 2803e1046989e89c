"""The hardware's numbers as a cost formula sees them: every one that is used is remembered."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nkisim.hardware import Hardware

_ASSUMED = {f.name: f.metadata["assumed"] for f in fields(Hardware) if "assumed" in f.metadata}


class Constants:
    """Attributes of a `Hardware`, with a list of the assumed ones that took part in an estimate."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.assumed: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.hardware, name)
        if self.hardware.generation in _ASSUMED.get(name, ()):
            self.assumed.add(name)
        return value

    def assume(self, what: str) -> None:
        """A formula that no document gives was used."""
        self.assumed.add(what)
