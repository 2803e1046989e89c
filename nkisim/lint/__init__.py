"""A static checker for what the NKI compiler rejects though Python, and so a simulator, accepts it.

`lint_paths` reads sources and executes nothing of them; `count_instructions` runs a kernel in the simulator, for
kernels whose loops depend on shapes.
"""

from __future__ import annotations

from nkisim.lint.check import Finding, Report, lint, lint_paths
from nkisim.lint.cli import main
from nkisim.lint.count import count_instructions
from nkisim.lint.rules import DEFAULT_MAX_INSTRUCTIONS, RULES, Rule

__all__ = [
    "DEFAULT_MAX_INSTRUCTIONS",
    "RULES",
    "Finding",
    "Report",
    "Rule",
    "count_instructions",
    "lint",
    "lint_paths",
    "main",
]
