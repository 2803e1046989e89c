"""Which NKI the kernels get, decided in fresh processes with and without a stand-in for AWS's package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from contributed import _nki
from contributed._nki import describe, nisa, nki, nl, run_on_device, simulate_kernel

ROOT = Path(__file__).parents[2]
# A package that has the simulator's modules, as AWS's neuronxcc would have its own.
FAKE_NEURONXCC = {
    "neuronxcc/__init__.py": "",
    "neuronxcc/nki/__init__.py": (
        "import sys\n"
        "from nkisim import legacy\n"
        "from nkisim.legacy import isa, language, typing\n"
        "sys.modules.update({__name__ + '.' + n.__name__.split('.')[2]: n for n in (isa, language, typing)})\n"
        "jit = legacy.jit\n"
        "def simulate_kernel(kernel, *args):\n"
        "    print('fake simulate_kernel')\n"
        "    return legacy.simulate_kernel(kernel, *args)\n"
    ),
}
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


def fake_package(folder: Path, version: str, name: str = "nki", files: dict[str, str] = FAKE) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


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


def test_without_it_the_adapter_takes_the_simulated_neuronxcc() -> None:
    code = "from contributed import _nki; print(_nki.nki.__name__, _nki.has_device()); print(_nki.describe())"
    done = python(code, backend="neuronxcc")
    assert done.stdout.splitlines() == [
        "contributed._neuronxcc False",
        "simulator nkisim 0.1.0, neuronxcc.nki front end, target trn2",
    ], done.stderr


def test_an_installed_neuronxcc_is_taken_before_the_simulator(tmp_path: Path) -> None:
    fake_package(tmp_path, "2.21.1+abc", "neuronx-cc", FAKE_NEURONXCC)
    code = (
        "import numpy as np; from contributed import _nki; from contributed.decode_attention import decode_attention\n"
        "q, k = np.ones((2, 8), np.float32), np.ones((3, 1, 8), np.float32)\n"
        "o = decode_attention(q, k, 2 * k)\n"
        "print(_nki.describe(), o.min(), o.max())"
    )
    line = "vendor package neuronxcc 2.21.1+abc, target chosen by neuronxcc 2.0 2.0"
    for backend in (None, "neuronxcc"):
        done = python(code, tmp_path, backend=backend)
        assert done.stdout.splitlines()[-1:] == [line], done.stderr
        assert "fake simulate_kernel" in done.stdout
    assert python(SHOW, tmp_path, backend="nkisim").stdout.split()[0] == "nkisim"


def test_a_current_nki_is_taken_before_neuronxcc(tmp_path: Path) -> None:
    fake_package(tmp_path, "2.21.1", "neuronx-cc", FAKE_NEURONXCC)
    fake_package(tmp_path, "0.6.0")
    assert python(SHOW, tmp_path).stdout.split()[0] == "nki"


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


GENERATIONS = [("trn1", 2), ("inf2", 2), ("trn2", 3), ("trn3", 4)]


@pytest.mark.parametrize(("target", "number"), GENERATIONS)
def test_simulate_kernel_runs_on_the_target(target: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn1")
    assert simulate_kernel(generation, np.zeros(1, np.float32), target=target) == number
    assert simulate_kernel(generation, np.zeros(1, np.float32)) == 2
    assert os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] == "trn1"


def test_describe_says_simulator_version_and_target() -> None:
    front_end = ", neuronxcc.nki front end" if _nki.BACKEND == "neuronxcc" else ""
    assert describe("trn1") == f"simulator nkisim {_nki.VERSION}{front_end}, target trn1"


def test_without_a_device_nothing_pretends_to_run_on_one() -> None:
    if _nki.has_device():
        pytest.skip("this machine has a Neuron device")
    allowed = f"run_on_device: backend {_nki.BACKEND}, allowed AWS's nki or neuronxcc on a machine with"
    with pytest.raises(RuntimeError, match=allowed):
        run_on_device(generation, np.zeros(1, np.float32))


def test_a_device_runs_what_would_be_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nki, "has_device", lambda: True)
    monkeypatch.setattr(_nki, "_adapter", SimpleNamespace(run_on_device=lambda kernel, *args: kernel(*args)))
    with _nki.on_device() as launches:
        assert simulate_kernel(divmod, 7, 2, target="trn1") == (3, 1)
    assert launches == [(divmod, (7, 2))]


@pytest.mark.skipif(_nki.BACKEND == "neuronxcc", reason="benchmark of neuronxcc.nki times itself")
def test_latency_is_of_the_calls_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nki, "has_device", lambda: True)
    clock = iter(float(t) for t in [0, 9, 10, 12, 20, 24])
    monkeypatch.setattr(_nki.time, "perf_counter", lambda: next(clock))
    called: list[int] = []
    percentiles = _nki.latency(called.append, 5, warmup=1, iters=2)
    assert called == [5, 5, 5]
    # Two and four seconds; the first call's nine do not count.
    assert (percentiles[0], percentiles[50], percentiles[100]) == (2e6, 3e6, 4e6)
