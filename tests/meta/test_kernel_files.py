"""Rules for every kernel file: sections of its docstring, no hardware literals, a self-check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "contributed"
KERNELS = sorted(p for p in FOLDER.glob("*.py") if not p.name.startswith("_"))
SECTIONS = ("Math", "Layouts", "Limits", "Engines", "Numerics", "Memory", "Oracle", "Status")
HARDWARE = {128, 256, 512, 1024, 2048, 4096, 8192, 16384}

by_file = pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)


def test_there_are_kernels() -> None:
    assert KERNELS


@by_file
def test_docstring_has_every_section(path: Path) -> None:
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    for section in SECTIONS:
        assert any(line.startswith(section + " ") for line in lines), section


@by_file
def test_functions_hold_no_hardware_number(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Constant) and type(node.value) is int:
                assert node.value not in HARDWARE, f"{path}:{node.lineno} {node.value}: take it from nl.tile_size"


@by_file
def test_runs_as_a_check(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "raise SystemExit(main())" in text
    assert "CASES" in text


@by_file
def test_has_a_test_file(path: Path) -> None:
    assert (Path(__file__).parents[1] / "kernels" / f"test_{path.stem}.py").exists()
