"""The self-check: what it prints, and that it cannot pass by accident."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contributed._cases import DecodeCase
from contributed._selfcheck import self_check
from reference.decode import gqa_decode_attention
from reference.rounded import gqa_decode_attention_rounded

ROOT = Path(__file__).parents[2]
CASE = DecodeCase("tiny", n_q_heads=4, n_kv_heads=2, head_dim=16, seqlen_kv=9)
ARGS = ["--target", "trn2", "--dtype", "float32"]


def exact(q: Any, k: Any, v: Any, *, target: str | None) -> Any:
    return gqa_decode_attention(q, k, v).o.astype(q.dtype)


def check(kernel: Any, argv: list[str] = ARGS) -> int:
    return self_check("text", kernel, gqa_decode_attention, gqa_decode_attention_rounded, [CASE], argv)


def test_a_right_kernel_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(exact) == 0
    text = capsys.readouterr().out
    assert "NKI: simulator nkisim" in text
    assert "target trn2" in text
    assert "tiny" in text
    assert "q4/kv2 d16 s9" in text
    assert "float32" in text
    assert "pass" in text
    assert "1 passed, 0 failed" in text


@pytest.mark.parametrize("fault", [1e-3, np.nan, np.inf])
def test_one_wrong_element_fails(fault: float, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(q: Any, k: Any, v: Any, *, target: str | None) -> Any:
        o = exact(q, k, v, target=target)
        o[2, 3] += np.float32(fault)
        return o

    assert check(wrong) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_result_of_another_type_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def wide(q: Any, k: Any, v: Any, *, target: str | None) -> Any:
        return exact(q, k, v, target=target).astype(np.float64)

    assert check(wide) == 1
    assert "FAIL (result in float64)" in capsys.readouterr().out


def test_all_types_and_generations_run_by_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE", raising=False)
    assert check(exact, []) == 0
    text = capsys.readouterr().out
    assert "9 passed, 0 failed" in text
    for word in ("trn1", "trn2", "trn3", "bfloat16", "float16", "float32"):
        assert word in text


def test_the_environment_names_a_target(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")
    assert check(exact, []) == 0
    assert "3 passed" in capsys.readouterr().out


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "contributed/decode_attention.py", *args]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_teaching_kernels_check_themselves() -> None:
    done = run("--target", "trn1", "--dtype", "bfloat16", "--backend", "nkisim")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "target trn1" in done.stdout
    assert "17 passed, 0 failed" in done.stdout


def test_a_backend_that_is_not_there_is_named() -> None:
    done = run("--backend", "nki")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "NKI_BACKEND=nki: found no nki package, allowed AWS's nki 0.6 or newer" in done.stderr
    done = run("--backend", "neuronxcc")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "no adapter for neuronxcc.nki" in done.stderr
