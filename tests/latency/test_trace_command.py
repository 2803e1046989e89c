"""`python -m nkisim trace`: the teaching kernels, options on both sides of the script, scripts that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nkisim.latency import Estimate, plot
from tests.latency.kernels import estimated, tile

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import numpy as np
import nki
import nki.isa as nisa
import nki.language as nl

@nki.jit
def double(x):
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    t = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=t, src=x)
    for _ in range(x.shape[1] // 64):
        nisa.tensor_tensor(dst=t, data1=t, data2=t, op=nl.add)
    nisa.dma_copy(dst=y, src=t)
    return y

@nki.jit
def other(x):
    t = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=t, src=x)

print("arguments", sys.argv[1:])
for n in (64, 128, 64):
    nki.simulate(double)(np.zeros((16, n), np.float32))
"""


def command(*arguments: Any, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # One thread, as tests/conftest.py has it for this process.
    blas = {"OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "nkisim", "trace", *map(str, arguments)],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(cwd), **blas},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def with_end(script: Path, end: str) -> Path:
    script.write_text(SCRIPT + end, encoding="utf-8")
    return script


def test_the_teaching_kernels(tmp_path: Any) -> None:
    # As the README has it: the script first, and an option that is the script's own.
    out = tmp_path / "trace.json"
    done = command("contributed/decode_attention.py", "-o", out, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "0 failed" in done.stdout
    for kernel in ("decode_attention_fwd", "decode_attention_gqa_fwd"):
        assert f"{kernel}: modelled on trn2" in done.stdout
    assert "decode_attention.py:" in done.stdout
    assert f"wrote {out}" in done.stdout
    events = json.loads(out.read_text(encoding="utf-8"))["traceEvents"]
    assert {e["args"]["name"].split(" ")[0] for e in events if e["name"] == "process_name"} == {
        "decode_attention_fwd",
        "decode_attention_gqa_fwd",
    }
    lines = {e["args"]["line"] for e in events if e["ph"] == "X"}
    assert all(Path(line.rsplit(":", 1)[0]).name == "decode_attention.py" for line in lines)


def test_the_largest_launch_of_a_kernel_is_shown(script: Any) -> None:
    done = command(script)
    assert done.returncode == 0, done.stderr
    assert "double: modelled on trn2, 4 instructions" in done.stdout
    assert done.stdout.count("modelled on") == 1


def test_target(script: Any) -> None:
    assert "double: modelled on trn1" in command("--target", "trn1", script).stdout
    assert "double: modelled on trn3" in command(script, "--target", "trn3").stdout


def test_arguments_that_are_no_options_of_trace_are_the_scripts(script: Any) -> None:
    assert "arguments ['--size', '3', 'x']" in command(script, "--size", "3", "x").stdout
    assert "arguments ['-o', 'x', '--target', 'trn9']" in command(script, "--", "-o", "x", "--target", "trn9").stdout
    assert "arguments ['--plo', 'x']" in command(script, "--plo", "x").stdout


def test_one_kernel_of_several(script: Any) -> None:
    path = with_end(script, "nki.simulate(other)(np.zeros((16, 8), np.float32))\n")
    both = command(path).stdout
    assert "double: modelled" in both
    assert "other: modelled" in both
    one = command(path, "--kernel", "other").stdout
    assert "other: modelled" in one
    assert "double: modelled" not in one


def test_a_kernel_that_was_not_launched(script: Any, tmp_path: Any) -> None:
    out = tmp_path / "trace.json"
    done = command(script, "--kernel", "other", "-o", out)
    assert done.returncode == 1
    assert "trace: no launch of other; launched: double" in done.stdout
    assert not out.exists()


def test_no_kernel_at_all(tmp_path: Any) -> None:
    path = tmp_path / "nothing.py"
    path.write_text("print('nothing')\n", encoding="utf-8")
    done = command(path)
    assert done.returncode == 1
    assert "trace: no launch of any kernel; launched: none" in done.stdout


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.exit('no')", 1)])
def test_the_scripts_verdict_stands_and_its_launches_are_shown(script: Any, end: Any, code: Any) -> None:
    done = command(with_end(script, end))
    assert done.returncode == code
    assert "double: modelled on trn2" in done.stdout


def test_an_error_in_the_script_is_the_scripts(script: Any) -> None:
    done = command(with_end(script, "raise ValueError('of the script')\n"))
    assert done.returncode == 1
    assert "ValueError: of the script" in done.stderr
    assert "modelled" not in done.stdout


def test_a_script_that_is_not_there(tmp_path: Any) -> None:
    done = command(tmp_path / "none.py")
    assert done.returncode == 2
    assert "which is no file" in done.stderr


def _small() -> Estimate:
    def kernel() -> None:
        tile((128, 64))

    return estimated(kernel)


def test_plot(script: Any, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "timeline.png"
    done = command(script, "--plot", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}" in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 5000


def test_plot_draws_every_row_and_panel(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "two.png"
    plot.timeline({"a": _small(), "b": _small()}, out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"--plot: needs matplotlib; install the extra"):
        plot.timeline({"a": _small()}, tmp_path / "x.png")
