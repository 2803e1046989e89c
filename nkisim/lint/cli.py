"""`python -m nkisim lint PATH...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nkisim.hardware import TARGETS
from nkisim.lint.check import Report, lint
from nkisim.lint.rules import DEFAULT_MAX_INSTRUCTIONS, ERROR, RULES, WARNING


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("paths", nargs="*", metavar="PATH", help="Python files, or folders of them")
    parser.add_argument("--target", choices=sorted(TARGETS), help="also report what this target does not have")
    parser.add_argument(
        "--max-instructions",
        type=int,
        metavar="N",
        help=f"budget of one kernel after unrolling; more is an error (default: {DEFAULT_MAX_INSTRUCTIONS}, a warning)",
    )
    parser.add_argument("--strict", action="store_true", help="warnings fail as well")
    parser.add_argument("--rules", action="store_true", help="print the rules as a Markdown table and stop")


def run(options: argparse.Namespace) -> int:
    """Run the command on parsed options; 0 without errors, 1 with errors, 2 if a file cannot be read."""
    out = sys.stdout.write
    if options.rules:
        out(rules_table())
        return 0
    report = lint(options.paths, options.target, options.max_instructions)
    for finding in report.findings:
        out(f"{finding}\n")
    for problem in report.unreadable:
        sys.stderr.write(f"{problem}\n")
    out(f"{summary(report)}\n")
    if report.unreadable:
        return 2
    return 1 if report.count(ERROR) or (options.strict and report.findings) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command by itself."""
    parser = argparse.ArgumentParser(
        prog="python -m nkisim lint", description="Report what the NKI compiler rejects though Python accepts it."
    )
    add_arguments(parser)
    options = parser.parse_args(argv)
    if not options.paths and not options.rules:
        parser.error("PATH: received none")
    return run(options)


def summary(report: Report) -> str:
    """One line about a run."""
    return (
        f"{report.count(ERROR)} errors, {report.count(WARNING)} warnings: {report.n_kernels} kernels, "
        f"{report.n_functions} functions with their helpers, {report.n_files} files"
    )


def rules_table() -> str:
    """All rules, as docs/lint.md has them."""
    lines = ["| id | severity | reports | documentation | KLR front end |", "|-|-|-|-|-|"]
    for rule in RULES.values():
        cells = (f"`{rule.id}`", rule.severity, rule.what, rule.docs, rule.klr)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
