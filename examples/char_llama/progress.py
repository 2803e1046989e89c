"""A line on stderr that says how far a long run is."""

from __future__ import annotations

import sys
import time


class Progress:
    """A bar for `total` steps; on a terminal in one line, elsewhere a line for every tenth.

    Args:
        what: its name.
        total: steps, at least 1.
    """

    WIDTH = 30

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.begin, self.tenths = what, total, time.perf_counter(), -1

    def at(self, done: int, note: str = "") -> None:
        """Say that so many steps are done."""
        spent = time.perf_counter() - self.begin
        left = f", {spent / done * (self.total - done):.0f} s left" if done else ""
        bar = ("#" * (self.WIDTH * done // self.total)).ljust(self.WIDTH, ".")
        line = f"{self.what} [{bar}] {done}/{self.total}, {spent:.0f} s{left} {note}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="\n" if done == self.total else "", file=sys.stderr, flush=True)
        elif 10 * done // self.total > self.tenths:
            self.tenths = 10 * done // self.total
            print(line, file=sys.stderr, flush=True)
