"""install() and the command line."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import nkisim
from nkisim import collectives, install, uninstall
from nkisim.install import MODULES, PACKAGES, is_installed

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os
import sys

import nki
import nki.isa as nisa
import nki.language as nl
import nki.typing as nt
import numpy as np
from nki.collectives import ReplicaGroup
from nki.isa.constants import dge_mode, oob_mode

import beside


@nki.jit
def add_kernel(a: nt.tensor[4, 8], b):
    t = nl.load(a)
    u = nl.ndarray(b.shape, dtype=b.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=u, src=b, oob_mode=oob_mode.error)
    c = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    nl.store(c, value=nl.add(t, u))
    print("target", nisa.get_nc_version().name)
    return c


if __name__ == "__main__":
    a = np.arange(32, dtype=np.float32).reshape(4, 8)
    assert np.array_equal(add_kernel(a, a), 2 * a)
    assert np.array_equal(nki.simulate(add_kernel)(a, a), 2 * a)
    print("arguments", sys.argv[1:], os.path.basename(sys.argv[0]))
    print("precise", os.environ.get("NKI_PRECISE_FP"), beside.NAME)
    if "fail" in sys.argv:
        add_kernel(a, a.T)
    if "quit" in sys.argv:
        sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    (folder / "beside.py").write_text("NAME = 'found'\n")
    path = folder / "script.py"
    path.write_text(SCRIPT)
    return path


def command_line(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NKI_", "NEURON_"))}
    paths = [str(ROOT), kept.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "nkisim", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        env={**kept, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **environment},
        check=False,
    )


def test_an_unmodified_script_runs(script: Path, tmp_path: Path) -> None:
    done = command_line("run", script, "one", "--two", "3", cwd=tmp_path)
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "target gen4",
        "target gen4",
        "arguments ['one', '--two', '3'] script.py",
        "precise None found",
    ]


def test_options_of_the_run(script: Path) -> None:
    done = command_line("run", "--target", "trn1", "--all-float32", script, "--target", "x")
    assert done.returncode == 0, done.stderr
    assert "target gen2" in done.stdout
    assert "arguments ['--target', 'x']" in done.stdout
    assert "precise 0 found" in done.stdout
    assert "target gen3" in command_line("run", script, NEURON_PLATFORM_TARGET_OVERRIDE="trn2").stdout


def test_exit_codes(script: Path, tmp_path: Path) -> None:
    assert command_line("run", script, "quit").returncode == 7
    failed = command_line("run", script, "fail")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "script.py" in failed.stderr
    assert "NkiError: " in failed.stderr
    missing = command_line("run", tmp_path / "missing.py")
    assert missing.returncode == 2
    assert "missing.py, which is no file" in missing.stderr
    assert command_line().returncode == 2
    wrong = command_line("run", "--target", "trn9", script)
    assert wrong.returncode == 2
    assert "invalid choice: 'trn9'" in wrong.stderr


def test_version() -> None:
    done = command_line("--version")
    assert (done.returncode, done.stdout) == (0, f"nkisim {nkisim.__version__} (NKI 0.6.0)\n")


def test_the_run_does_not_hide_a_real_package(script: Path) -> None:
    real = script.parent / "nki"
    real.mkdir()
    (real / "__init__.py").write_text("REAL = True\n")
    done = command_line("run", script)
    assert done.returncode == 1
    assert f"a package named nki is importable from {real / '__init__.py'}" in done.stderr
    assert "RuntimeError" in done.stderr


# ---------------------------------------------------------------------------------------------------
# In this process


@pytest.fixture
def clean() -> Iterator[None]:
    if any(importlib.util.find_spec(package) is not None for package in PACKAGES):
        pytest.skip("a package named nki or neuronxcc is installed")
    yield
    uninstall()


@pytest.mark.usefixtures("clean")
def test_install_is_opt_in_and_can_be_taken_back() -> None:
    assert not is_installed()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nki")
    install()
    install()
    assert is_installed()
    assert importlib.import_module("nki") is nkisim.nki
    assert importlib.import_module("nki.isa") is nkisim.isa
    assert importlib.import_module("nki.language") is nkisim.language
    assert importlib.import_module("nki.collectives") is collectives
    with pytest.raises(ModuleNotFoundError, match=r"nki\.nothing"):
        importlib.import_module("nki.nothing")
    assert importlib.import_module("neuronxcc.nki") is nkisim.legacy
    assert importlib.import_module("neuronxcc.nki.language") is nkisim.legacy.language
    assert importlib.import_module("neuronxcc").nki is nkisim.legacy
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("neuronxcc.nothing")
    uninstall()
    uninstall()
    assert not set(MODULES) & set(sys.modules)


@pytest.mark.usefixtures("clean")
def test_install_refuses_a_package_that_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("nki")
    other.__file__ = "/somewhere/nki/__init__.py"
    monkeypatch.setitem(sys.modules, "nki", other)
    with pytest.raises(RuntimeError, match=r"importable from /somewhere/nki/__init__\.py"):
        install()
    uninstall()
    assert sys.modules["nki"] is other


@pytest.mark.usefixtures("clean")
def test_install_refuses_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nki").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    install()  # a directory without __init__.py is no package
    uninstall()
    (tmp_path / "nki" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="does not hide it"):
        install()
    assert "nki.isa" not in sys.modules


@pytest.mark.usefixtures("clean")
def test_install_of_one_package_leaves_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neuronxcc").mkdir()
    (tmp_path / "neuronxcc" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"named neuronxcc is importable.*nkisim\.install\('nki'\) alone"):
        install()
    assert "nki" not in sys.modules
    install("nki")
    assert importlib.import_module("nki") is nkisim.nki
    assert "neuronxcc.nki" not in sys.modules
    with pytest.raises(ValueError, match="received nothing, allowed nki and neuronxcc"):
        install("nothing")


@pytest.mark.usefixtures("clean")
def test_install_completes_a_half_installed_state() -> None:
    install()
    del sys.modules["nki.typing"]
    assert not is_installed()
    install()
    assert is_installed()


def test_collectives_are_names_only() -> None:
    group = collectives.ReplicaGroup([[0, 1]])
    assert group.replica_groups == [[0, 1]]
    names = """
        all_reduce all_gather all_gather_v reduce_scatter all_to_all all_to_all_v collective_permute
        collective_permute_implicit collective_permute_implicit_reduce
        collective_permute_implicit_current_processing_rank_id rank_id
    """
    for name in names.split():
        function = getattr(collectives, name)
        assert function.__name__ == name
        with pytest.raises(NotImplementedError, match=rf"nki\.collectives\.{name}:"):
            function([], [], replica_group=group)
