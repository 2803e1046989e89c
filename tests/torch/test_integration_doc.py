"""The code of docs/integration.md runs, its script for Trainium on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

TEXT = (Path(__file__).parents[2] / "docs" / "integration.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as a reader would; those about several processes are in test_context_parallel.py."""
    examples = blocks(TEXT[: TEXT.index("## Several processes")])
    assert len(examples) == 3
    names: dict[str, Any] = {}
    for block in examples:
        exec(compile(block, "integration.md", "exec"), names)
    assert tuple(names["o"].shape) == (2, 8, 64)
    assert tuple(names["new"].shape) == (1, 24)
    assert "model.layers.1.self_attn" in capsys.readouterr().out


def test_the_script_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = blocks(TEXT[TEXT.index("<!-- script -->") :])
    monkeypatch.setattr("sys.argv", ["on_trainium.py", "cpu"])
    exec(compile(script, "on_trainium.py", "exec"), {"__name__": "__main__"})
    assert "all right" in capsys.readouterr().out
