"""Every kernel file on a Neuron device: its cases against their oracles, then latency percentiles of its launches.

`python -m pytest tests/device` on a Neuron machine; NKI_BACKEND=nki or neuronxcc chooses one of two packages.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from contributed._nki import describe, from_vendor, has_device, latency, on_device, run_on_device, simulate_kernel

FOLDER = Path(__file__).parents[2] / "contributed"
KERNELS = sorted(path.stem for path in FOLDER.glob("*.py") if not path.name.startswith("_"))


@pytest.mark.device
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", KERNELS)
def test_cases_match_their_oracle(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"contributed.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--dtype", dtype])
    with on_device() as launches:
        assert module.main() == 0
    assert launches
    lines = [f"{describe()}, on the device, latency in microseconds"]
    for kernel, args in launches:
        shapes = " ".join(str(list(x.shape)) for x in args[:3] if hasattr(x, "shape"))
        columns = " ".join(f"p{p} {us:.1f}" for p, us in latency(kernel, *args).items())
        lines.append(f"  {kernel.__name__} {shapes}: {columns}")
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))


def test_there_are_kernels() -> None:
    assert "flash_decode" in KERNELS


@pytest.mark.parametrize(
    "what", [latency, run_on_device, lambda _: on_device().__enter__()], ids=["latency", "run_on_device", "on_device"]
)
def test_nothing_pretends_to_be_a_device(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contributed._nki.has_device", lambda: False)
    with pytest.raises(RuntimeError, match="allowed AWS's nki or neuronxcc on a machine with a Neuron"):
        what(len)


@pytest.mark.skipif(from_vendor(), reason="a vendor package is installed")
def test_the_simulator_on_a_machine_with_a_device_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contributed._nki.glob.glob", lambda _: ["/dev/neuron0"])
    assert not has_device()


def test_a_context_on_the_device_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contributed._nki.has_device", lambda: True)
    monkeypatch.setattr("contributed._nki.run_on_device", lambda kernel, *args: kernel(*args))
    with on_device() as outer:
        with on_device() as inner:
            assert simulate_kernel(abs, -1) == 1
        assert simulate_kernel(abs, -2) == 2
    assert inner == [(abs, (-1,))]
    assert outer == [(abs, (-2,))]
