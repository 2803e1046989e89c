"""The kernels' tests on other backends: NKI_BACKEND=neuronxcc runs them on the adapter for `neuronxcc.nki`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import pytest

from contributed import _nki
from tests.kernels import flash, prefill, sparse

# What tests take from the simulator to look into a run of the current front end.
LOOKS = ("simulate", "recording", "estimate")


def _looks_inside(*_: Any, **__: Any) -> NoReturn:
    pytest.skip("looks into nkisim's run of a kernel of the current front end")


@pytest.fixture(autouse=True)
def _neuronxcc(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skips what is not of the adapter: trn3, traces of the current front end, and tests of the tests."""
    if _nki.BACKEND != "neuronxcc":
        yield
        return
    if "mutated" in request.node.name:
        pytest.skip("changed kernels are tested once, on nkisim")
    chosen = _nki._target

    def target(name: str | None) -> AbstractContextManager[None]:
        if (name or os.environ.get(_nki.TARGET_VARIABLE)) == "trn3":
            pytest.skip("neuronxcc.nki of SDK 2.26 knows no trn3")
        return chosen(name)

    monkeypatch.setattr(_nki, "_target", target)
    for module in (request.module, flash, prefill, sparse):
        for name in LOOKS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _looks_inside)
    yield
