"""What the repository's texts promise: commands, links, no traces of a machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = sorted(p for p in ROOT.glob("**/*.md") if ".venv" not in p.parts and "node_modules" not in p.parts)
SKIP = {".git", ".venv", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__", "build"}


def test_ci_runs_the_readme_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)
    tests = [c.strip() for c in commands if "pytest" in c]
    assert len(tests) >= 1
    assert tests[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path}: {target}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_folders_named_in_code_style_exist(path: Path) -> None:
    for name in re.findall(
        r"`((?:contributed|nkisim|reference|tests|benchmarks|docs|examples)/[\w./-]+)`", path.read_text("utf-8")
    ):
        assert (ROOT / name.rstrip("/")).exists(), f"{path}: {name}"


def test_no_trace_of_a_machine() -> None:
    words = re.compile("|".join(["/" + "work/", "/" + "tmp/", "/" + "root/", "/" + "home/"]))
    for path in sorted(ROOT.rglob("*")):
        if not path.is_file() or SKIP & set(path.relative_to(ROOT).parts) or path.name.startswith(".coverage"):
            continue
        if path.suffix in {".npz", ".png", ".pyc"} or any(part.endswith(".egg-info") for part in path.parts):
            continue
        found = words.search(path.read_text(encoding="utf-8", errors="replace"))
        assert found is None, f"{path}: {found.group(0) if found else ''}"


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_readme_example_runs(block: str) -> None:
    for package in ("torch", "transformers"):
        if package in block:
            pytest.importorskip(package, reason=f"{package} is not installed")
    exec(compile(block, "README.md", "exec"), {})


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 4


def test_the_readme_states_the_calibration_of_the_model() -> None:
    table = (ROOT / "docs" / "latency-model.md").read_text(encoding="utf-8")
    found = re.search(r"^(\d+) of (\d+) rows that check the model are within 25%", table, re.MULTILINE)
    assert found is not None
    assert f"{found.group(1)} of the {found.group(2)} that check it" in (ROOT / "README.md").read_text(encoding="utf-8")
