"""Which NKI the kernels get, decided in fresh processes with and without a stand-in for AWS's package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from contributed import _nki
from contributed._nki import describe, nisa, nki, nl, run_on_device, simulate_kernel

ROOT = Path(__file__).parents[2]
FAKE = {
    "nki/__init__.py": (
        "import os\n"
        "def jit(f): return f\n"
        "def simulate(kernel):\n"
        "    return lambda *args: ('fake', os.environ.get('NEURON_PLATFORM_TARGET_OVERRIDE'), *args)\n"
    ),
    "nki/isa.py": "name = 'fake isa'\n",
    "nki/language.py": "name = 'fake language'\n",
}


def fake_package(folder: Path, version: str) -> None:
    for name, text in FAKE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    metadata = folder / f"nki-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: nki\nVersion: {version}\n", encoding="utf-8")


def python(code: str, *path: Path, backend: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NKI_", "NEURON_"))}
    env["PYTHONPATH"] = os.pathsep.join([str(p) for p in path] + [str(ROOT)])
    if backend is not None:
        env["NKI_BACKEND"] = backend
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


SHOW = "from contributed import _nki; print(_nki.BACKEND, _nki.VERSION, _nki.nki.__name__)"


def test_the_simulator_is_the_default() -> None:
    done = python(SHOW)
    assert done.stdout.split() == ["nkisim", "0.1.0", "nkisim.nki"], done.stderr
    assert python("import sys; from contributed import _nki; assert 'nki' not in sys.modules").returncode == 0


def test_a_current_vendor_package_is_taken(tmp_path: Path) -> None:
    fake_package(tmp_path, "0.6.2+abc")
    assert python(SHOW, tmp_path).stdout.split() == ["nki", "0.6.2+abc", "nki"]
    assert python(SHOW, tmp_path, backend="nki").stdout.split()[0] == "nki"
    assert python(SHOW, tmp_path, backend="nkisim").stdout.split()[0] == "nkisim"


def test_an_older_vendor_package_is_not_taken(tmp_path: Path) -> None:
    fake_package(tmp_path, "0.3.1")
    assert python(SHOW, tmp_path).stdout.split()[0] == "nkisim"
    done = python(SHOW, tmp_path, backend="nki")
    assert "NKI_BACKEND=nki: found nki 0.3.1, allowed AWS's nki 0.6 or newer" in done.stderr


def test_a_folder_called_nki_is_not_a_package(tmp_path: Path) -> None:
    (tmp_path / "nki").mkdir()
    assert python(SHOW, tmp_path).stdout.split()[0] == "nkisim"


def test_the_simulator_under_the_vendor_name_stays_the_simulator() -> None:
    done = python("import nkisim; nkisim.install(); " + SHOW)
    assert done.stdout.split()[:2] == ["nkisim", "0.1.0"], done.stderr


def test_an_unknown_backend_is_named() -> None:
    done = python(SHOW, backend="cuda")
    assert "NKI_BACKEND: received 'cuda', allowed auto, nki, neuronxcc, nkisim" in done.stderr


def test_simulate_kernel_hands_the_target_to_the_vendor(tmp_path: Path) -> None:
    fake_package(tmp_path, "0.6.0")
    code = (
        "import os; from contributed import _nki\n"
        "print(_nki.simulate_kernel(len, 1, target='trn2'), 'NEURON_PLATFORM_TARGET_OVERRIDE' in os.environ)\n"
        "print(_nki.describe())"
    )
    lines = python(code, tmp_path).stdout.splitlines()
    assert lines == ["('fake', 'trn2', 1) False", "vendor package nki 0.6.0, target chosen by nki"]


@nki.jit
def generation(x):
    out = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.shared_hbm)
    t = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=t, value=nisa.get_nc_version().value)
    nisa.dma_copy(dst=out, src=t)
    return out


@pytest.mark.parametrize(("target", "number"), [("trn1", 2), ("inf2", 2), ("trn2", 3), ("trn3", 4)])
def test_simulate_kernel_runs_on_the_target(target: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn1")
    assert simulate_kernel(generation, np.zeros(1, np.float32), target=target) == number
    assert simulate_kernel(generation, np.zeros(1, np.float32)) == 2
    assert os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] == "trn1"


def test_describe_says_simulator_version_and_target() -> None:
    assert describe("trn1") == f"simulator nkisim {_nki.VERSION}, target trn1"


def test_without_a_device_nothing_pretends_to_run_on_one() -> None:
    if _nki.has_device():
        pytest.skip("this machine has a Neuron device")
    with pytest.raises(RuntimeError, match="run_on_device: backend nkisim, allowed AWS's nki on a machine with"):
        run_on_device(generation, np.zeros(1, np.float32))
