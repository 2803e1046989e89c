"""Two cores on one tensor: core_barrier and races."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import normal, sb, tile
from tests.nkisim.lnc2_kernels import refused2, run2, shared, swap

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def test_reading_what_the_other_core_has_yet_to_write_names_the_barrier() -> None:
    def kernel(x: Any) -> Any:
        o = shared((2, 4))
        core = nl.program_id(0)
        nisa.dma_copy(o[core : core + 1], x[core : core + 1])
        t = tile((2, 4))
        nisa.dma_copy(t, o)
        return o

    refused2(
        kernel,
        normal(2, 4),
        instruction="dma_copy",
        operand="src",
        rule="uninitialized read",
        received="4 of 8",
        allowed="what the other core writes, after a core_barrier",
    )


def test_barrier_orders_writes_before_reads():
    x = normal(2, 4)

    def kernel(x):
        middle, o = shared((2, 4)), shared((2, 4))
        i = nl.program_id()
        nisa.dma_copy(middle[i : i + 1], sb(x[i : i + 1]))
        nisa.core_barrier(middle, (0, 1))
        nisa.dma_copy(o[1 - i : 2 - i], middle[1 - i : 2 - i])
        return o

    np.testing.assert_array_equal(run2(kernel, x), x)


def _race(first: Any, second: Any, barrier: bool) -> Any:
    """Core 1 does `first` and core 0 `second` to a shared tensor that holds x."""

    def kernel(x):
        o = shared(x.shape)
        if nl.program_id() == 0:
            nisa.dma_copy(o, x)
        nisa.core_barrier(o, (0, 1))  # core 1 comes last and goes on first
        if nl.program_id() == 1:
            first(o, x)
        if barrier:
            nisa.core_barrier(o, (0, 1))
        if nl.program_id() == 0:
            second(o, x)

    return kernel


def write(o: Any, x: Any) -> None:
    nisa.dma_copy(o[1:3], x[1:3])


def read(o: Any, x: Any) -> None:
    nisa.dma_copy(tile((2, 4)), o[2:4])


def write_elsewhere(o: Any, x: Any) -> None:
    nisa.dma_copy(o[3:4], x[3:4])


def write_rows(o: Any, x: Any) -> None:
    rows = sb(nl.shared_constant(np.array([[4], [2]], np.int32)))
    nisa.dma_copy(o.vector_select(0, rows), x[0:2])


def read_rows(o: Any, x: Any) -> None:
    rows = sb(nl.shared_constant(np.array([[0], [2]], np.int32)))
    nisa.dma_copy(tile((2, 4)), o.vector_select(0, rows))


def read_bytes(o: Any, x: Any) -> None:
    nisa.dma_copy(tile((1, 1), nl.uint8), o.view(nl.uint8)[2:3, 5:6])


def write_bytes(o: Any, x: Any) -> None:
    nisa.dma_copy(o.view(nl.uint8)[2:3, 5:6], x.view(nl.uint8)[2:3, 5:6])


def read_wide(o: Any, x: Any) -> None:
    nisa.dma_copy(tile((1, 4)), o[2:3])


def skip_rows(o: Any, x: Any) -> None:
    rows = sb(nl.shared_constant(np.array([[4], [9]], np.int32)))
    nisa.dma_copy(o[1:3], x.vector_select(0, rows), oob_mode=nisa.oob_mode.skip)


def skip_elements(o: Any, x: Any) -> None:
    rows = sb(nl.shared_constant(np.array([[4], [9]], np.int32)))
    nisa.dma_copy(o[1:3].reshape((1, 8)), x.vector_select(0, rows), oob_mode=nisa.oob_mode.skip)


def write_and_read(o: Any, x: Any) -> None:
    write(o, x)
    nisa.dma_copy(tile((2, 4)), o[1:3])


def nothing(o: Any, x: Any) -> None:
    pass


RACES = [
    (write, read, "written by core 1"),
    (write, write, "written by core 1"),
    (read, write, "read by core 1"),
    (write_rows, read, "written by core 1"),
    (read_rows, write, "read by core 1"),
    (write, read_rows, "written by core 1"),
    (write, write_rows, "written by core 1"),
    (write, read_bytes, "written by core 1"),
    (read_bytes, write, "read by core 1"),
    (write_bytes, read_wide, "written by core 1"),
    (skip_rows, write, "written by core 1"),
    (skip_elements, write, "written by core 1"),
    (write_and_read, read, "written by core 1"),
]


@pytest.mark.parametrize(("first", "second", "received"), RACES)
def test_races_are_refused(first, second, received):
    error = refused2(
        _race(first, second, barrier=False),
        normal(6, 4),
        instruction="dma_copy",
        operand="src" if "read" in second.__name__ else "dst",
        rule="race between the two cores",
        received=received,
        allowed="core_barrier",
    )
    assert error.site.function == second.__name__

    run2(_race(first, second, barrier=True), normal(6, 4))


@pytest.mark.parametrize(
    ("first", "second"),
    [(read, read), (write, write_elsewhere), (read_rows, read_bytes), (write_elsewhere, read_bytes), (write, nothing)],
)
def test_accesses_that_do_not_meet(first, second):
    run2(_race(first, second, barrier=False), normal(6, 4))


@pytest.mark.parametrize("skipping", [skip_rows, skip_elements])
def test_skipped_rows_do_not_race(skipping):
    def second(o: Any, x: Any) -> None:
        nisa.dma_copy(o[2:3], x[2:3])  # the row that is left out

    def kernel(x):
        o = shared(x.shape)
        nisa.core_barrier(o, (0, 1))
        (skipping, second)[nl.program_id()](o, x)

    run2(kernel, normal(6, 4))


def test_a_core_does_not_race_with_itself():
    def kernel(x):
        o = shared(x.shape)
        if nl.program_id() == 1:
            write(o, x)
            nisa.dma_copy(tile((2, 4)), o[1:3])
            write(o, x)

    run2(kernel, normal(6, 4))


def test_arguments_can_race():
    def kernel(x):
        nisa.dma_copy(x, nl.shared_constant(np.zeros((2, 3), np.float32)))

    refused2(
        kernel,
        normal(2, 3),
        instruction="dma_copy",
        operand="dst",
        rule="race",
        received="written by core 0",
        allowed="core_barrier",
    )


def test_a_barrier_orders_its_data_only():
    def other_tensor(x):
        a, b = shared((6, 4)), shared((6, 4))
        if nl.program_id() == 0:
            nisa.dma_copy(a, x)
        nisa.core_barrier(b, (0, 1))
        nisa.dma_copy(tile((1, 4)), a[0:1])

    def other_part(x):
        a = shared((6, 4))
        if nl.program_id() == 0:
            nisa.dma_copy(a, x)
        nisa.core_barrier(a[0:3], (0, 1))
        nisa.dma_copy(tile((1, 4)), a[2:3])
        nisa.dma_copy(tile((1, 4)), a[3:4])

    def exchange(x):
        a = shared((6, 4))
        if nl.program_id() == 0:
            nisa.dma_copy(a, x)
        swap(sb(x), tile((6, 4)))
        nisa.dma_copy(tile((1, 4)), a[0:1])

    for kernel in (other_tensor, other_part, exchange):
        refused2(
            kernel,
            normal(6, 4),
            instruction="dma_copy",
            operand="src",
            rule="race",
            received="written by core 0",
            allowed="core_barrier",
        )


def test_a_barrier_orders_the_parts_of_both_cores():
    def kernel(x):
        o = shared(x.shape)
        i = 3 * nl.program_id()
        nisa.dma_copy(o[i : i + 3], x[i : i + 3])
        nisa.core_barrier(o[i : i + 3], (0, 1))
        nisa.dma_copy(tile(x.shape), o)

    run2(kernel, normal(6, 4))


def test_a_barrier_does_not_forget_what_follows_it():
    def kernel(x):
        o = shared(x.shape)
        if nl.program_id() == 0:
            nisa.dma_copy(o, x)
        nisa.core_barrier(o, (0, 1))
        if nl.program_id() == 1:  # core 1 comes last to a barrier and goes on first
            write(o, x)
        swap(sb(x), tile(x.shape))
        if nl.program_id() == 0:
            read(o, x)

    refused2(
        kernel,
        normal(6, 4),
        instruction="dma_copy",
        operand="src",
        rule="race",
        received="written by core 1",
        allowed="core_barrier",
    )


def _barrier(data: Any = None, cores: Any = (0, 1), **arguments: Any) -> Any:
    def kernel(x):
        nisa.core_barrier(shared((1, 1)) if data is None else data(x), cores, **arguments)

    return kernel


BARRIERS = [
    (_barrier(cores=(0,)), "cores", "value", "(0,)", "(0, 1)"),
    (_barrier(cores=0), "cores", "value", "0", "(0, 1)"),
    (_barrier(cores=(1, 0)), "cores", "value", "(1, 0)", "(0, 1)"),
    (_barrier(lambda x: tile((1, 1))), "data", "buffer", "sbuf", "shared_hbm"),
    (_barrier(lambda x: nl.ndarray((1, 1), nl.int32, buffer=nl.hbm)), "data", "buffer", "private_hbm", "shared_hbm"),
    (_barrier(lambda x: 3), "data", "type", "int", "NkiTensor"),
    (_barrier(lambda x: x.select(0, nisa.register_alloc(0))), "data", "indirect view", "scalar", "without run-time"),
    (_barrier(engine=nisa.engine.dma), "engine", "value", "dma", "instructions of its own"),
    (_barrier(engine="gpsimd"), "engine", "type", "gpsimd", "a member"),
]


@pytest.mark.parametrize(("kernel", "operand", "rule", "received", "allowed"), BARRIERS)
def test_barrier_rules(kernel, operand, rule, received, allowed):
    refused2(
        kernel,
        normal(2, 2),
        instruction="core_barrier",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )
