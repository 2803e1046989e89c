"""The adapter over a package called `neuronxcc`, as AWS's would be, and over a device that is not there.

The stand-in has the simulator's modules under AWS's names. It refuses kernels that no page of 2.26 shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = '''
import ast, inspect, sys, textwrap
from nkisim import legacy
from nkisim.legacy import compiler, isa, language, typing

for module in (compiler, isa, language, typing):
    sys.modules[__name__ + "." + module.__name__.split(".")[2]] = module


def checked(function):
    """A function with named parameters and annotations that are objects, in a file, without loops and conditions."""
    for p in inspect.signature(function).parameters.values():
        assert p.kind is p.POSITIONAL_OR_KEYWORD, f"{function.__name__}: {p}"
        assert p.default in (p.empty, None), f"{function.__name__}: {p}"
        assert not isinstance(p.annotation, str), f"{function.__name__}: {p}"
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert not any(isinstance(x, (ast.For, ast.While, ast.If, ast.Lambda, ast.ListComp)) for x in ast.walk(body))
    return function


def jit(function):
    return legacy.jit(checked(function))


def simulate_kernel(kernel, *args):
    print("stand-in: simulate_kernel")
    return legacy.simulate_kernel(kernel, *args)


def baremetal(function):
    print("stand-in: baremetal")
    return legacy.baremetal(checked(function))


def benchmark(**options):
    print("stand-in: benchmark", sorted(options))
    return lambda function: legacy.benchmark(**options)(checked(function))
'''
# A machine with a device: pytest and others load this module first.
DEVICE = "import glob; found = glob.glob; glob.glob = lambda p: [p] if p.startswith('/dev/neuron') else found(p)"


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    """A folder with the package and its version."""
    for path, text in {
        "neuronxcc/__init__.py": "",
        "neuronxcc/nki/__init__.py": STAND_IN,
        "neuronx_cc-2.21.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: neuronx-cc\nVersion: 2.21.1\n",
        "device/sitecustomize.py": DEVICE,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    return tmp_path


def python(*args: str, folders: tuple[Path, ...]) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NKI_", "NEURON_"))}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (*folders, ROOT)))
    done = subprocess.run([sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SELF_CHECK = """
import sys
import numpy as np
from contributed import append_kv
from contributed.decode_attention import decode_attention

q, k = np.ones((2, 8), np.float32), np.ones((3, 1, 8), np.float32)
o = decode_attention(q, k, 2 * k)
assert o.min() == o.max() == 2.0
sys.argv[1:] = ["--dtype", "bfloat16"]
sys.exit(append_kv.main())
"""


def test_kernels_run_on_an_installed_neuronxcc(vendor: Path) -> None:
    # decode_attention has results of its own, append_kv writes arguments.
    out = python("-c", SELF_CHECK, folders=(vendor,))
    assert "NKI: vendor package neuronxcc 2.21.1, target chosen by neuronxcc" in out
    assert "11 passed, 0 failed" in out
    assert out.count("stand-in: simulate_kernel") > 11
    assert "baremetal" not in out


def test_the_device_module_runs_by_baremetal_and_prints_percentiles(vendor: Path) -> None:
    chosen = "test_cases_match_their_oracle and bfloat16 and append_kv"
    args = ("-m", "pytest", "-s", "-n", "0", "-p", "no:cacheprovider", "tests/device", "-k", chosen)
    out = python(*args, folders=(vendor, vendor / "device"))
    assert "1 passed" in out
    assert "11 passed, 0 failed" in out
    assert "vendor package neuronxcc 2.21.1, target chosen by neuronxcc, on the device, latency in microseconds" in out
    assert "simulate_kernel" not in out
    percentiles = [line for line in out.splitlines() if " p0 " in line and " p100 " in line]
    assert len(percentiles) == 11
    assert out.count("stand-in: benchmark ['iters', 'warmup']") == 11
    assert out.count("stand-in: baremetal") >= 11
