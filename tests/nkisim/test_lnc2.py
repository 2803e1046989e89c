"""Launches on two cores, exchanges, dynamic control flow."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import normal, sb, tile
from tests.nkisim.lnc2_kernels import refused2, run2, shared, swap

pytestmark = pytest.mark.usefixtures("no_thread_stays")

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
