"""Errors of the simulator, and where in the kernel they happened."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import CodeType, FrameType

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_is_ours: dict[CodeType, bool] = {}


@dataclass(frozen=True)
class Site:
    """A line of the user's kernel: `file`, `line` and the function it is in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def call_site() -> Site:
    """The innermost line on the call stack that is not part of the simulator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        ours = _is_ours.get(code)
        if ours is None:
            ours = _is_ours[code] = os.path.abspath(code.co_filename).startswith(_PACKAGE)
        if not ours:
            return Site(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back
    return Site("<unknown>", 0, "<unknown>")


class NkiError(Exception):
    """The kernel asks for something that the hardware or the NKI compiler refuses.

    The text names the instruction, the operand, the rule, what was received, what is allowed, the
    source of the rule and the kernel's own file and line; the same facts are attributes.
    """

    def __init__(
        self,
        instruction: str,
        operand: str,
        rule: str,
        *,
        received: object,
        allowed: object,
        source: str,
        site: Site | None = None,
    ) -> None:
        self.instruction = instruction
        self.operand = operand
        self.rule = rule
        self.received = received
        self.allowed = allowed
        self.source = source
        self.site = site if site is not None else call_site()
        where = f"{instruction}.{operand}" if operand else instruction
        super().__init__(f"{where}: {rule}: received {received}, allowed {allowed} [{source}] at {self.site}")
