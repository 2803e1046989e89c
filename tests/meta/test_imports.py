"""Which way imports point: nki_torch -> contributed -> nkisim; reference stands alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"contributed", "reference", "nkisim", "nki_torch", "benchmarks", "tests", "examples"}
# Packages of the project, and packages from outside, that each folder may import.
ALLOWED = {
    "reference": ({"reference"}, {"numpy"}),
    "nkisim": ({"nkisim"}, {"numpy", "ml_dtypes"}),
    "contributed": ({"contributed", "nkisim"}, {"numpy", "ml_dtypes"}),
    "nki_torch": ({"nki_torch", "contributed", "nkisim"}, {"numpy", "ml_dtypes", "torch", "transformers", "tqdm"}),
    "benchmarks": ({"benchmarks", "contributed", "nkisim", "reference"}, {"numpy", "ml_dtypes"}),
}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module.split(".")[0], node


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    ours, outside = ALLOWED[folder]
    for path in files(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        late = {
            id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "main" for n in ast.walk(f)
        }
        for name, node in imports(tree):
            if name in sys.stdlib_module_names or name == "__future__":
                continue
            if folder == "contributed" and name == "reference":
                # An oracle is for self-checks only: in their runner, or in a kernel file's main().
                assert path.name == "_selfcheck.py" or id(node) in late, f"{path}:{node.lineno} imports {name}"
            elif name in OURS:
                assert name in ours, f"{path}:{node.lineno} imports {name}"
            elif path.parts[-2:] in (("latency", "plot.py"), ("benchmarks", "plots.py")) and name == "matplotlib":
                continue  # imported when a plot is asked for; the extra `bench` has it
            else:
                assert name in outside, f"{path}:{node.lineno} imports {name}"


def test_only_the_backend_module_knows_the_simulator() -> None:
    """A kernel that imported nkisim itself would not run on AWS's package."""
    for path in files("contributed"):
        if path.name == "_nki.py":
            continue
        names = {name for name, _ in imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert not names & {"nkisim", "nki", "neuronxcc"}, path


def test_the_oracles_do_not_know_the_kernels() -> None:
    for path in files("reference"):
        text = path.read_text(encoding="utf-8")
        for word in ("nkisim", "contributed", "nisa", "importlib", "exec("):
            assert word not in text, f"{path}: {word}"
