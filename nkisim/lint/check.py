"""Runs the rules over files and collects what they report."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nkisim.hardware import resolve_target
from nkisim.lint import api, syntax
from nkisim.lint import reach as reaching
from nkisim.lint.program import Class, External, Function, Program, Scope, SourceFile
from nkisim.lint.rules import DEFAULT_MAX_INSTRUCTIONS, ERROR, RULES
from nkisim.lint.walker import Walker


@dataclass(frozen=True, order=True)
class Finding:
    """One place that breaks one rule. `column` counts from 1."""

    path: str
    line: int
    column: int
    rule: str
    severity: str
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {self.rule} {self.severity} {self.message} [{self.source}]"


@dataclass
class Report:
    """What a run found; `unreadable` names files that could not be read or parsed, and why."""

    findings: list[Finding] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    n_kernels: int = 0
    n_functions: int = 0
    n_files: int = 0

    def count(self, severity: str) -> int:
        """Findings of one severity."""
        return sum(f.severity == severity for f in self.findings)


def lint_paths(
    paths: Iterable[str | os.PathLike[str]],
    target: str | None = None,
    max_instructions: int | None = None,
) -> list[Finding]:
    """Findings in the kernels of files and folders and in every helper they reach, in order of place.

    Args:
        paths: Python files, or folders that are searched for them.
        target: trn1, inf2, trn2 or trn3: also report what that target lacks. None: of no target in particular.
        max_instructions: budget of instructions of one kernel after unrolling; more is an error. None: the
            default budget, and more is a warning.

    Raises:
        OSError: a file cannot be read or is not Python.
        ValueError: `target` is no target.
    """
    report = lint(paths, target, max_instructions)
    if report.unreadable:
        raise OSError("; ".join(report.unreadable))
    return report.findings


def lint(
    paths: Iterable[str | os.PathLike[str]],
    target: str | None = None,
    max_instructions: int | None = None,
) -> Report:
    """As `lint_paths`, with counts, and with unreadable files reported instead of raised."""
    return _Run(target, max_instructions).run(paths)


class _Run:
    def __init__(self, target: str | None, max_instructions: int | None) -> None:
        self.program = Program()
        self.hardware = None if target is None else resolve_target(target)
        self.max_instructions = max_instructions
        self._found: dict[tuple[str, int, int, str], Finding] = {}

    def run(self, paths: Iterable[str | os.PathLike[str]]) -> Report:
        """All rules on all files."""
        report = Report()
        files: list[SourceFile] = []
        for path in paths:
            found = list(_python_files(Path(path)))
            if not found:
                report.unreadable.append(f"{path}: no Python file")
            files.extend(file for file in map(self.program.load, found) if file is not None)
        reached = reaching.reach(self.program, files)
        for file in files:
            self._check_outside(file)
        kernels = set(reached.kernels)
        for function in reached.functions:
            syntax.check_function(self.program, function, function in kernels, self.report)
        for cls in reached.classes:
            syntax.check_class(self.program, cls, self.report)
        walker = Walker(self.program, self.report, self.hardware)
        for kernel in reached.kernels:
            self._check_size(kernel, walker.walk(kernel, kernel=True))
        for function in reached.functions:
            # A function that is only passed on, or stands in a branch that is not taken.
            if not walker.followed(function) and function.outer is None:
                walker.walk(function, kernel=False)
        report.findings = sorted(self._found.values())
        report.unreadable.extend(self.program.errors)
        report.n_kernels, report.n_functions = len(reached.kernels), len(reached.functions)
        report.n_files = len({f.file.path for f in reached.functions} | {f.path for f in files})
        return report

    def report(self, owner: Function | Class, node: ast.AST, rule: str, detail: str = "") -> None:
        """Record a finding; one rule reports one place once."""
        self._add(owner.file, node, rule, detail)

    def _add(self, file: SourceFile, node: ast.AST, rule: str, detail: str = "", severity: str | None = None) -> None:
        entry = RULES[rule]
        line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1
        message = f"{entry.what}: {detail}" if detail else entry.what
        finding = Finding(file.shown, line, column, rule, severity or entry.severity, message, entry.source)
        self._found.setdefault((file.shown, line, column, rule), finding)

    def _check_size(self, kernel: Function, count: int) -> None:
        budget = DEFAULT_MAX_INSTRUCTIONS if self.max_instructions is None else self.max_instructions
        if count > budget:
            severity = None if self.max_instructions is None else ERROR
            detail = f"{kernel.name} issues at least {count}, allowed {budget}"
            self._add(kernel.file, kernel.node, "size-unrolled", detail, severity)

    def _check_outside(self, file: SourceFile) -> None:
        """Uses of NKI outside kernels: removed entry points, arguments of jit, lists passed to kernels."""
        for function in file.functions:
            for decorator in function.node.decorator_list:
                name = decorator.func if isinstance(decorator, ast.Call) else decorator
                found = self.program.resolve(name, function.scope.parent or file.scope)
                if isinstance(found, External) and found.dotted.startswith("neuronxcc."):
                    self._add(file, name, "api-removed", found.dotted)
        for call, scope in file.calls:
            found = self.program.resolve(call.func, scope)
            if isinstance(found, External) and found.dotted in api.REMOVED:
                self._add(file, call.func, "api-removed", found.dotted)
            if found == reaching.JIT:
                for keyword in call.keywords:
                    if keyword.arg == "platform_target":
                        self._add(file, keyword.value, "api-jit")
            if self._launches(call, scope):
                for value in (*call.args, *[k.value for k in call.keywords]):
                    if isinstance(value, (ast.List, ast.ListComp)):
                        self._add(file, value, "py-list-argument", ast.unparse(value))

    def _launches(self, call: ast.Call, scope: Scope) -> bool:
        """Whether a call runs a kernel: `kernel(...)`, `kernel[2](...)` or `nki.simulate(kernel)(...)`."""
        function = call.func
        if isinstance(function, ast.Call) and function.args:
            made_by = self.program.resolve(function.func, scope)
            return made_by == reaching.JIT or made_by == reaching.SIMULATE
        if isinstance(function, ast.Subscript):
            function = function.value
        found = self.program.resolve(function, scope)
        return isinstance(found, Function) and reaching.is_kernel(self.program, found)


def _python_files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*.py") if not any(part.startswith(".") for part in p.relative_to(path).parts))
