"""Kernels on two cores: exchange, barriers, races, deadlocks, and that nothing ever hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import normal, sb, tile

PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("nkisim-core")]


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
    assert error.site.file == __file__
    return error


def shared(shape: Any, dtype: Any = nl.float32) -> Any:
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def swap(src: Any, dst: Any, pipe_id: int = 0, **arguments: Any) -> Any:
    other = 1 - nl.program_id()
    return nisa.sendrecv(src, dst, other, other, pipe_id, **arguments)


# -- launches


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_each_core_does_its_half(target):
    x = normal(2, 8, 4)

    def kernel(x):
        assert (nl.num_programs(), nl.program_ndim()) == (2, 1)
        o = shared(x.shape)
        i = nl.program_id(0)
        nisa.dma_copy(o[i], sb(x[i]))
        return o

    np.testing.assert_array_equal(run2(kernel, x, target=target), x)


def test_private_tensors_are_private():
    def kernel(x):
        mine = nl.ndarray((1, 2), nl.float32, buffer=nl.hbm)
        o = shared((2, 2))
        i = nl.program_id()
        nisa.dma_copy(mine, x[i : i + 1])
        t = tile((1, 2))
        swap(sb(mine), t)  # the other core writes its own `mine` in the meantime
        nisa.dma_copy(o[i : i + 1], mine)
        return o

    x = normal(2, 2)
    np.testing.assert_array_equal(run2(kernel, x), x)


def test_arguments_are_shared_and_updated():
    x = np.zeros((2, 3), np.float32)

    def kernel(x, y):
        i = nl.program_id()
        nisa.dma_copy(x[i : i + 1], y[i : i + 1])

    y = normal(2, 3)
    run2(kernel, x, y)
    np.testing.assert_array_equal(x, y)


def test_one_generation_has_one_core():
    with pytest.raises(ValueError, match=r"kernel\[lnc\]: received 2, allowed 1\.\.1 on trn1"):
        run2(lambda x: None, normal(1, 1), target="trn1")


def test_runs_are_deterministic():
    x = normal(2, 4, 8)

    def kernel(x):
        o = shared((2, 4, 8))
        i = nl.program_id()
        t, r = sb(x[i]), tile((4, 8))
        for pipe in range(3):
            swap(t, r, pipe)
            nisa.dma_compute(t, [t, r], nl.add)
        nisa.dma_copy(o[i], t)
        nisa.core_barrier(o, (0, 1))
        return o

    orders, values = set(), []
    for _ in range(5):
        trace = nkisim.Trace()
        values.append(run2(kernel, x, trace=trace))
        orders.add(tuple((r.core, r.index, r.instruction) for r in trace.records))
    assert len(orders) == 1
    a, b = x
    for _ in range(3):
        a, b = a + b, b + a
    for value in values:
        np.testing.assert_array_equal(value, np.stack([a, b]))


def test_trace_holds_both_cores():
    def kernel(x):
        i = nl.program_id()
        t = tile((1, 100 * (i + 1)))
        nisa.dma_copy(t[:, 0:3], x)

    trace = nkisim.Trace()
    run2(kernel, normal(1, 3), trace=trace)
    assert [(r.core, r.index, r.instruction) for r in trace.records] == [(0, 0, "dma_copy"), (1, 0, "dma_copy")]
    assert (trace.memory[0].sbuf.amount, trace.memory[1].sbuf.amount) == (400, 800)


def test_shared_tensors_differ():
    def shapes(x):
        shared((2, 2 + nl.program_id()))

    def lines(x):
        if nl.program_id() == 0:
            nl.ndarray((2, 2), nl.float32, buffer=nl.shared_hbm)
        else:
            nl.ndarray((2, 2), nl.float32, buffer=nl.shared_hbm)

    def constants(x):
        nl.shared_constant(np.full((2, 2), nl.program_id(), np.float32))

    for kernel, operand, received in (
        (shapes, "", "float32[2, 3] on core 1"),
        (lines, "", "float32[2, 2] on core 1"),
        (constants, "constant", "float32[2, 2] on core 1"),
    ):
        refused2(
            kernel,
            normal(1, 1),
            instruction="ndarray",
            operand=operand,
            rule="shared_hbm tensor number 1 differs between the cores",
            received=received,
            allowed="float32[2, 2] as on core 0",
        )


def test_constants_are_shared():
    def kernel(x):
        c = nl.shared_constant(np.arange(6, dtype=np.float32).reshape(2, 3))
        nisa.core_barrier(c, (0, 1))
        o = shared((2, 3))
        i = nl.program_id()
        nisa.dma_copy(o[i : i + 1], c[i : i + 1])
        return o, c

    o, c = run2(kernel, normal(1, 1))
    np.testing.assert_array_equal(o, np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(c, o)


def test_results_differ():
    def kernel(x):
        a, b = shared((1, 1)), shared((1, 1))
        mine = (a, b)[nl.program_id()]
        nisa.dma_copy(mine, x)
        return mine

    refused2(
        kernel,
        normal(1, 1),
        instruction="return",
        rule="the cores return different tensors",
        received="on core 1",
        allowed="the same shared_hbm tensors",
    )


# -- sendrecv


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, ml_dtypes.bfloat16])
@pytest.mark.parametrize("engine", ["dma", "gpsimd_dma"])
def test_sendrecv_swaps(target, dtype, engine):
    x = np.random.default_rng(0).integers(0, 255, (2, 5, 3, 4)).astype(dtype)

    def kernel(x):
        o = shared(x.shape, x.dtype)
        i = nl.program_id()
        wide = tile((40, 3, 8), x.dtype)
        swap(sb(x[i]), wide[33:38, :, ::2], 7, dma_engine=nisa.dma_engine[engine])
        nisa.dma_copy(o[i], wide[33:38, :, ::2])
        return o

    np.testing.assert_array_equal(run2(kernel, x, target=target), x[::-1])


def test_sendrecv_in_place():
    def kernel(x):
        o = shared(x.shape)
        i = nl.program_id()
        t = sb(x[i])
        swap(t, t)
        nisa.dma_copy(o[i], t)
        return o

    x = normal(2, 3, 4)
    np.testing.assert_array_equal(run2(kernel, x), x[::-1])


def test_sent_values_are_those_at_the_call():
    x = normal(2, 1, 4)

    def kernel(x):
        o = shared(x.shape)
        i = nl.program_id()
        t, r = sb(x[i]), tile((1, 4))
        swap(t, r)
        nisa.dma_copy(t, r)  # changes what was sent, after it was sent
        nisa.dma_copy(o[i], r)
        return o

    np.testing.assert_array_equal(run2(kernel, x), x[::-1])


def _sendrecv(**changes: Any) -> Any:
    def kernel(x):
        other = 1 - nl.program_id()
        given = {"src": sb(x), "dst": tile(x.shape), "send_to_rank": other, "recv_from_rank": other, "pipe_id": 0}
        given.update({k: v(x) if callable(v) else v for k, v in changes.items()})
        nisa.sendrecv(**given)

    return kernel


SENDRECV = [
    ({"src": lambda x: x}, "src", "buffer", "shared_hbm", "sbuf"),
    ({"dst": lambda x: tile(x.shape, buffer=nl.psum)}, "dst", "buffer", "psum", "sbuf"),
    ({"dst": lambda x: tile((2, 5))}, "dst", "shape", "[2, 5]", "[2, 4]"),
    ({"dst": lambda x: tile(x.shape, nl.bfloat16)}, "dst", "dtype", "bfloat16", "float32"),
    ({"dst": lambda x: tile((2, 1)).broadcast(1, 4)}, "dst", "several elements", "[2, 4]", "distinct"),
    ({"src": lambda x: tile(x.shape)}, "src", "uninitialized read", "8 of 8", "written"),
    ({"send_to_rank": 0}, "send_to_rank", "rank", "0", "1, the other core"),
    ({"recv_from_rank": 2}, "recv_from_rank", "rank", "2", "1, the other core"),
    ({"recv_from_rank": True}, "recv_from_rank", "rank", "True", "1, the other core"),
    ({"pipe_id": -1}, "pipe_id", "value", "-1", ">= 0"),
    ({"pipe_id": None}, "pipe_id", "value", "None", "an integer"),
    ({"dma_engine": "dma"}, "dma_engine", "type", "dma", "a member"),
]


@pytest.mark.parametrize(("changes", "operand", "rule", "received", "allowed"), SENDRECV)
def test_sendrecv_rules(changes, operand, rule, received, allowed):
    refused2(
        _sendrecv(**changes),
        normal(2, 4),
        instruction="sendrecv",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1024), (np.float16, 512), (np.uint8, 256)])
def test_gpsimd_dma_limits(dtype, limit):
    n = limit // np.dtype(dtype).itemsize

    def kernel(x):
        swap(sb(x), tile(x.shape, x.dtype), dma_engine=nisa.dma_engine.gpsimd_dma)

    run2(kernel, np.zeros((2, n), dtype))
    refused2(
        kernel,
        np.zeros((2, n + 1), dtype),
        instruction="sendrecv",
        operand="src",
        rule="bytes per partition",
        received=str(limit + np.dtype(dtype).itemsize),
        allowed=f"1..{limit}",
    )


def test_tiles_of_the_cores_agree():
    def kernel(x):
        n = 3 + nl.program_id()
        swap(sb(x[:, 0:n]), tile((2, n)))

    refused2(
        kernel,
        normal(2, 4),
        instruction="sendrecv",
        operand="dst",
        rule="tile sent by core 0",
        received="float32[2, 3]",
        allowed="float32[2, 4]",
    )


@pytest.mark.parametrize("name", ["sendrecv", "core_barrier"])
def test_one_core_has_nobody_to_meet(name):
    def kernel(x):
        if name == "sendrecv":
            nisa.sendrecv(sb(x), tile(x.shape), 1, 1, 0)
        else:
            nisa.core_barrier(shared((1, 1)), (0, 1))

    for target, rule, received, allowed in (
        ("trn2", "cores of the launch", "1", "2: kernel[2]"),
        ("trn1", "target", "trn1", "NeuronCore-v3"),
    ):
        with pytest.raises(nkisim.NkiError) as caught:
            nkisim.simulate(kernel, target=target)(normal(1, 1))
        error = caught.value
        assert (error.instruction, error.rule, str(error.received)) == (name, rule, received)
        assert allowed in str(error.allowed)


def test_exchanges_are_recorded():
    def kernel(x):
        t = tile(x.shape)
        swap(sb(x), t, 3, name="halves")
        swap(sb(x), t, dma_engine=nisa.dma_engine.gpsimd_dma)
        o = shared((1, 1))
        nisa.core_barrier(o, (0, 1), name="meet")
        nisa.core_barrier(o, [0, 1], engine=nisa.engine.unknown)
        nisa.core_barrier(o, (0, 1), nisa.engine.vector)

    trace = nkisim.Trace()
    run2(kernel, normal(2, 4), trace=trace)
    for core in (0, 1):
        records = [r for r in trace.records if r.core == core and r.instruction != "dma_copy"]
        assert [r.instruction for r in records] == ["sendrecv"] * 2 + ["core_barrier"] * 3
        assert [r.engine for r in records] == [
            Engine.dma,
            Engine.gpsimd,
            Engine.gpsimd,
            Engine.gpsimd,
            Engine.vector,
        ]
        assert [r.name for r in records] == ["halves", None, "meet", None, None]
        assert records[0].attrs == {
            "pipe_id": 3,
            "send_to_rank": 1 - core,
            "recv_from_rank": 1 - core,
            "dma_engine": "dma",
        }
        assert records[2].attrs["cores"] == (0, 1)
        assert records[2].attrs["data"] == records[4].attrs["data"]
        assert [a.operand for a in records[0].writes] == ["dst"]


# -- core_barrier and races


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


# -- deadlocks and errors


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
            swap(t, t, 0 if first else 1)
        elif first:
            nisa.core_barrier(a, (0, 1))
        elif what == "kinds":
            swap(t, t)
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


# -- dynamic control flow


def test_dynamic_loops_with_exchanges():
    def kernel(x, n):
        o = shared(x.shape)
        i = nl.program_id()
        t = sb(x[i])
        register = nisa.register_alloc()
        nisa.register_load(register, n)
        nl.fori_loop(0, register, lambda k: [swap(t, t)].clear())
        nisa.dma_copy(o[i], t)
        return o

    x = normal(2, 2, 3)
    np.testing.assert_array_equal(run2(kernel, x, np.array([[3]], np.int32)), x[::-1])


def test_trip_counts_that_differ():
    def trips(x):
        nl.fori_loop(0, 2 + nl.program_id(), lambda i: None)

    error = refused2(
        trips,
        normal(1, 1),
        instruction="fori_loop",
        rule="dynamic control flow differs between the cores",
        received="core 0: 2 trips; core 1: 3 trips",
        allowed="the same number of trips",
    )
    assert error.site.function == "trips"

    def extra(x):
        nl.fori_loop(0, 2, lambda i: None)
        if nl.program_id() == 1:
            nl.while_loop(nisa.register_alloc(0), lambda r: r)

    refused2(
        extra,
        normal(1, 1),
        instruction="while_loop",
        rule="dynamic control flow differs",
        received="only core 1",
        allowed="the same loops",
    )
