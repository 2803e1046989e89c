"""The self-check: what it prints, and that it cannot pass by accident."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contributed._cases import DecodeCase
from contributed._nki import BACKEND
from contributed._selfcheck import exact_check, self_check
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
    # neuronxcc.nki of SDK 2.26 knows no trn3.
    targets = ("trn1", "trn2") if BACKEND == "neuronxcc" else ("trn1", "trn2", "trn3")
    assert f"{3 * len(targets)} passed, 0 failed" in text
    for word in (*targets, "bfloat16", "float16", "float32"):
        assert word in text


def test_the_environment_names_a_target(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")
    assert check(exact, []) == 0
    assert "3 passed" in capsys.readouterr().out


def test_an_exact_check_counts_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, str, str | None]] = []

    def differences(case: DecodeCase, dtype: str, target: str | None) -> int:
        seen.append((case.name, dtype, target))
        return 3 if dtype == "float8_e4m3" else 0

    dtypes = ("bfloat16", "float8_e4m3")
    assert exact_check("text", differences, [CASE], dtypes, ["--target", "trn1"]) == 1
    assert seen == [("tiny", "bfloat16", "trn1"), ("tiny", "float8_e4m3", "trn1")]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  tiny")]
    assert [row[-3:] for row in rows] == [["bfloat16", "0", "pass"], ["float8_e4m3", "3", "FAIL"]]
    assert exact_check("text", differences, [CASE], dtypes, ["--dtype", "bfloat16", "--target", "trn2"]) == 0
    with pytest.raises(SystemExit):
        exact_check("text", differences, [CASE], dtypes, ["--dtype", "float32"])


def run(*args: str, script: str = "decode_attention", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"contributed/{script}.py", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_teaching_kernels_check_themselves() -> None:
    done = run("--target", "trn1", "--dtype", "bfloat16", "--backend", "nkisim")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "target trn1" in done.stdout
    assert "17 passed, 0 failed" in done.stdout


def test_the_append_kernels_check_themselves() -> None:
    done = run("--target", "trn1", "--dtype", "float8_e4m3", "--backend", "nkisim", script="append_kv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "target trn1" in done.stdout
    assert "11 passed, 0 failed" in done.stdout


def test_a_backend_that_is_not_there_is_named() -> None:
    done = run("--backend", "nki")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "NKI_BACKEND=nki: found no nki package, allowed AWS's nki 0.6 or newer" in done.stderr


def test_the_adapter_for_neuronxcc_can_be_asked_for() -> None:
    done = run("--dtype", "float32", "--backend", "neuronxcc", script="append_kv")
    assert done.returncode == 0, done.stdout + done.stderr
    targets = [line.split("target ")[1] for line in done.stdout.splitlines() if "neuronxcc.nki front end" in line]
    assert targets == ["trn1", "trn2"]
    assert "22 passed, 0 failed" in done.stdout
    done = run("--target", "trn3", "--backend", "neuronxcc", script="append_kv")
    assert done.returncode == 2
    assert done.stderr == "--target: received trn3, allowed trn1, inf2, trn2 with neuronxcc\n"


@pytest.mark.parametrize("target", ["trn3", "gen4"])
def test_neuronxcc_refuses_a_target_of_the_environment_as_one_of_the_command_line(target: str) -> None:
    variables = {"NKI_BACKEND": "neuronxcc", "NEURON_PLATFORM_TARGET_OVERRIDE": target}
    done = run(script="flash_decode", **variables)
    assert done.returncode == 2
    assert done.stderr == f"--target: received {target}, allowed trn1, inf2, trn2 with neuronxcc\n"
    assert done.stdout == ""
