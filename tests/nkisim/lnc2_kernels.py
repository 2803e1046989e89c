"""Kernels and checks that the tests of two cores share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl

PATIENCE_S = 20.0


def run2(kernel: Callable[..., Any], *arrays: Any, target: str = "trn2", trace: Any = None) -> Any:
    """The kernel's result on two cores; fails instead of hanging."""
    result: list[Any] = []
    error: list[BaseException] = []

    def work() -> None:
        try:
            result.append(nkisim.simulate(nkisim.jit(kernel)[2], target=target, trace=trace)(*arrays))
        except BaseException as e:  # noqa: BLE001 raised again below
            error.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the launch hangs"
    if error:
        raise error[0]
    return result[0]


def refused2(
    kernel: Callable[..., Any],
    *arrays: Any,
    instruction: str,
    operand: str = "",
    rule: str,
    received: str,
    allowed: str,
    target: str = "trn2",
) -> nkisim.NkiError:
    with pytest.raises(nkisim.NkiError) as caught:
        run2(kernel, *arrays, target=target)
    error = caught.value
    assert (error.instruction, error.operand) == (instruction, operand), str(error)
    assert rule in error.rule, str(error)
    assert received in str(error.received), str(error)
    assert allowed in str(error.allowed), str(error)
    assert error.source
    assert error.site.file in (kernel.__code__.co_filename, __file__)  # or `swap` above
    return error


def shared(shape: Any, dtype: Any = nl.float32) -> Any:
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def swap(src: Any, dst: Any, pipe_id: int = 0, **arguments: Any) -> Any:
    other = 1 - nl.program_id()
    return nisa.sendrecv(src, dst, other, other, pipe_id, **arguments)
