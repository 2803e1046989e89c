"""Refusals of the `neuronxcc.nki` front end, under the names that SDK 2.26 gives its errors."""

from __future__ import annotations

from typing import NoReturn

from nkisim.errors import NkiError

ERRORS = "NKI API errors, SDK 2.26"


def refuse(what: str, operand: str, rule: str, received: object, allowed: object, source: str = ERRORS) -> NoReturn:
    """Raise `NkiError`; `rule` starts with the documented name where there is one ("err_...: text")."""
    raise NkiError(what, operand, rule, received=received, allowed=allowed, source=source)
