"""Two cores that wait for ever, and errors of one of them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import normal, sb, tile
from tests.nkisim.lnc2_kernels import PATIENCE_S, refused2, run2, shared, swap

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def line_of(kernel: Any, offset: int) -> str:
    return f"{__file__}:{kernel.__code__.co_firstlineno + offset}"


def test_a_core_that_has_ended():
    def kernel(x):
        o = shared((1, 1))
        if nl.program_id() == 0:
            nisa.core_barrier(o, (0, 1))

    error = refused2(
        kernel,
        normal(1, 1),
        instruction="core_barrier",
        rule="deadlock between the two cores",
        received="core 1 has ended",
        allowed="the same exchanges",
    )
    assert str(error.site).startswith(line_of(kernel, 3))

    def second(x):
        o = shared((1, 1))
        if nl.program_id() == 1:
            nisa.core_barrier(o, (0, 1))

    refused2(
        second,
        normal(1, 1),
        instruction="core_barrier",
        rule="deadlock",
        received="core 0 has ended",
        allowed="the same exchanges",
    )


def test_one_exchange_too_few():
    def kernel(x):
        t = sb(x)
        for _ in range(3 - nl.program_id()):
            swap(t, t)

    refused2(
        kernel,
        normal(1, 1),
        instruction="sendrecv",
        rule="deadlock",
        received="core 1 has ended",
        allowed="the same exchanges",
    )


DIFFERENT = {
    "kinds": "core 0 waits in core_barrier(data=",
    "pipes": "core 0 waits in sendrecv(pipe_id=0)",
    "data": "core 0 waits in core_barrier(data=",
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_cores_that_wait_for_different_things(what):
    def kernel(x):
        a, b, t = shared((1, 1)), shared((1, 1)), sb(x)
        first = nl.program_id() == 0
        if what == "pipes":
            nisa.sendrecv(t, t, 1 - nl.program_id(), 1 - nl.program_id(), 0 if first else 1)
        elif first:
            nisa.core_barrier(a, (0, 1))
        elif what == "kinds":
            nisa.sendrecv(t, t, 0, 0, 0)
        else:
            nisa.core_barrier(b, (0, 1))

    error = refused2(
        kernel,
        normal(1, 1),
        instruction="core_barrier" if what == "data" else "sendrecv",
        rule="deadlock",
        received=DIFFERENT[what],
        allowed="the same exchanges",
    )
    # Both cores' lines are named.
    assert str(error.received).count(__file__) == 2
    assert "core 1 waits in" in str(error.received)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_on_one_core_stops_the_other(rank, error):
    ended = []

    def kernel(x):
        t = sb(x)
        if nl.program_id() == rank:
            swap(t, t)
            raise error("from the kernel")
        try:
            while True:
                swap(t, t)
        finally:
            ended.append(nl.program_id())

    with pytest.raises(error, match="from the kernel"):
        run2(kernel, normal(1, 1))
    assert ended == [1 - rank]


def test_a_kernel_cannot_hold_on_to_a_failed_launch():
    def kernel(x):
        t = sb(x)
        if nl.program_id() == 1:
            raise ValueError("from the kernel")
        while True:
            try:
                swap(t, t)
            except Exception:  # noqa: BLE001 what a careless kernel does
                continue

    with pytest.raises(ValueError, match="from the kernel"):
        run2(kernel, normal(1, 1))


def test_errors_at_the_end_of_a_core():
    def kernel(x):
        def body(i):
            for _ in range(5):
                nisa.dma_copy(tile((1, 12 * 1024))[:, 0:1], x)

        if nl.program_id() == 1:
            for _ in range(5):
                nl.fori_loop(0, 1, body)

    with pytest.raises(nkisim.NkiError, match="SBUF capacity"):
        run2(kernel, normal(1, 1))


def test_launches_after_a_failed_one():
    def bad(x):
        if nl.program_id() == 0:
            nisa.core_barrier(shared((1, 1)), (0, 1))

    def good(x):
        o = shared(x.shape)
        i = nl.program_id()
        nisa.dma_copy(o[i], x[i])
        return o

    x = normal(2, 3)
    for _ in range(3):
        with pytest.raises(nkisim.NkiError, match="deadlock"):
            run2(bad, x)
        np.testing.assert_array_equal(run2(good, x), x)


def test_concurrent_launches_do_not_see_each_other():
    def kernel(x):
        o = shared(x.shape)
        i = nl.program_id()
        t, r = sb(x[i]), tile(x.shape[1:])
        for _ in range(10):
            swap(t, r)
            swap(r, t)
        nisa.dma_copy(o[i], t)
        return o

    inputs = [normal(2, 2, 3, seed=i) for i in range(6)]
    results: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: run2(kernel, inputs[i])}), daemon=True) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    for i, x in enumerate(inputs):
        np.testing.assert_array_equal(results[i], x)
