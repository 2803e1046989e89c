"""Options of the test run: where kernels run."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

# Two workers whose BLAS threads wait for each other are many times slower than one thread each; it has to
# be said before NumPy and PyTorch are loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from contributed._nki import BACKEND, has_device


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Thousands of tests live as long as the run: the garbage collector need not look through them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        # Traces are many objects and no cycles; Python's own 700 has them looked through every millisecond.
        gc.set_threshold(10_000, 5, 5)
        gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--simulation-only", action="store_true", help="leave out tests that need a Neuron device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--simulation-only"):
        left_out = [item for item in items if item.get_closest_marker("device")]
        items[:] = [item for item in items if not item.get_closest_marker("device")]
        config.hook.pytest_deselected(items=left_out)
    elif not has_device():
        skip = pytest.mark.skip(reason=f"needs a Neuron device and AWS's nki or neuronxcc; backend here: {BACKEND}")
        for item in items:
            if item.get_closest_marker("device"):
                item.add_marker(skip)
