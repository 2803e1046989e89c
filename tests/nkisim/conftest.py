"""Fixtures of the simulator's tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """No thread of a core outlives its launch."""
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("nkisim-core")]
