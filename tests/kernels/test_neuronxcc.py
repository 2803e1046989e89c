"""The kernels on the adapter for `neuronxcc.nki`, over the simulated one: against oracles and the other front end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from contributed._nki import BACKEND
from tests.kernels import selection

ROOT = Path(__file__).parents[2]


def on_neuronxcc(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"NKI_BACKEND": "neuronxcc", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(BACKEND != "nkisim", reason="compares nkisim with the adapter")
def test_both_front_ends_are_within_budget_and_give_the_same_bits(tmp_path: Path) -> None:
    # That process compares its results with the oracles.
    done = on_neuronxcc("-m", "tests.kernels.selection", str(tmp_path / "results.npz"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neuronxcc.nki front end" in done.stdout
    with np.load(tmp_path / "results.npz") as file:
        got = dict(file)
    expected = selection.run(check=False)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
