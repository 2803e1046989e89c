"""Errors of the simulator, and where in the kernel they happened."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARY = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_INSTALLED = ("site-packages", "dist-packages")
_is_kernel: dict[str, bool] = {}
_new = tuple.__new__


class Site(NamedTuple):
    """A line of the user's kernel: `file`, `line` and the function it is in."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


_Sites = tuple[Site, "Site | None"]
# Set while an instruction executes that an earlier line of the kernel issued.
_issued_at: ContextVar[_Sites | None] = ContextVar("nkisim_issued_at", default=None)


@contextmanager
def issued_at(sites: _Sites) -> Iterator[None]:
    """In the block `call_site` and `call_sites` answer with `sites`, which `call_sites` gave before."""
    token = _issued_at.set(sites)
    try:
        yield
    finally:
        _issued_at.reset(token)


def call_site() -> Site:
    """The innermost line on the call stack that is neither the simulator's nor the standard library's."""
    issued = _issued_at.get()
    if issued is not None:
        return issued[0]
    frame: FrameType | None = sys._getframe(1)
    known = _is_kernel.get
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        kernel = known(file)
        if kernel or (kernel is None and _classify(file)):
            # A call of Site itself would take twice as long, and every instruction makes one.
            return _new(Site, (file, frame.f_lineno, code.co_name))
        frame = frame.f_back
    return Site("<unknown>", 0, "<unknown>")


def call_sites() -> tuple[Site, Site | None]:
    """`call_site`, and the line of the kernel itself that led there; None where that is the same function."""
    issued = _issued_at.get()
    if issued is not None:
        return issued
    frame: FrameType | None = sys._getframe(1)
    inner = outer = None
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        if _is_kernel[file] if file in _is_kernel else _classify(file):
            outer = frame
            if inner is None:
                inner = frame
        elif code.co_name == "_call_kernel" and file.startswith(_PACKAGE):
            if inner is None or outer is None:
                break
            return _site(inner), None if outer is inner else _site(outer)
        frame = frame.f_back
    return (Site("<unknown>", 0, "<unknown>") if inner is None else _site(inner)), None


def _site(frame: FrameType) -> Site:
    return Site(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def _classify(file: str) -> bool:
    path = os.path.abspath(file)
    # A context manager of ours is entered through contextlib, which is not where the kernel is.
    library = path.startswith(_LIBRARY) and not path.startswith(tuple(_LIBRARY + name for name in _INSTALLED))
    _is_kernel[file] = kernel = not path.startswith(_PACKAGE) and not library
    return kernel


class NkiError(Exception):
    """The kernel asks for something that the hardware or the NKI compiler refuses.

    The text names the instruction, the operand, the rule, what was received, what is allowed, the
    source of the rule and the kernel's own file and line; the same facts are attributes. `caller` is the line of
    the kernel that led to `site` where that is in another function, else None.
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
        caller: Site | None = None,
    ) -> None:
        self.instruction = instruction
        self.operand = operand
        self.rule = rule
        self.received = received
        self.allowed = allowed
        self.source = source
        self.site, self.caller = (site, caller) if site is not None else call_sites()
        where = f"{instruction}.{operand}" if operand else instruction
        place = f"{self.site}, called from {self.caller}" if self.caller is not None else f"{self.site}"
        super().__init__(f"{where}: {rule}: received {received}, allowed {allowed} [{source}] at {place}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way back passes the text only, and would fail in another process.
        facts = {name: getattr(self, name) for name in ("received", "allowed", "source", "site", "caller")}
        return functools.partial(NkiError, self.instruction, self.operand, self.rule, **facts), ()
