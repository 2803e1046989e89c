"""A dynamic loop's body is built once: trips that differ, and what may differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim import nki
from tests.nkisim.harness import normal, out, ps, refused, run, sb, tile

pytestmark = pytest.mark.filterwarnings(
    "ignore:nl.dynamic_range:DeprecationWarning", "ignore:while register:DeprecationWarning"
)
X = normal(4, 12)
RULE = "body of a dynamic loop, which is built once, differs between trips: trip 2 of "


def repeat(kind: str, trips: int, body: Any) -> None:
    """Inside a kernel: `trips` trips of a dynamic loop of any kind."""
    if kind == "fori_loop":
        nl.fori_loop(0, trips, lambda i: body())
    elif kind == "dynamic_range":
        for _ in nl.dynamic_range(trips):
            body()
    else:
        count = nl.ndarray((1, 1), nl.int32, buffer=nl.private_hbm)
        nisa.dma_copy(count, nl.shared_constant(np.array([[trips]], np.int32)))
        register = nisa.register_alloc()
        nisa.register_load(register, count)

        def step(r: Any) -> Any:
            body()
            nisa.dma_compute(count, [count, nl.shared_constant(np.array([[-1]], np.int32))], nl.add)
            nisa.register_load(r, count)
            return r

        if kind == "while_loop":
            nl.while_loop(register, step)
        else:
            while register:
                step(register)


KINDS = ["fori_loop", "dynamic_range", "while_loop", "while"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_immediate_that_changes(kind):
    def kernel(x):
        t, n = sb(x), [0]

        def body():
            n[0] += 1
            nisa.tensor_scalar(t, t, nl.add, float(n[0]))

        repeat(kind, 3, body)

    error = refused(
        kernel,
        X,
        instruction="tensor_scalar",
        operand="operand0",
        rule=RULE + kind,
        received="2.0",
        allowed="1.0 as on the first trip",
    )
    assert error.site.function == "body"
    assert error.source == "NKI dynamic loops guide, NKI 0.6"


@pytest.mark.parametrize("kind", KINDS)
def test_trips_that_are_equal(kind):
    def kernel(x):
        t = sb(x)

        def body():
            one = tile(x.shape)
            nisa.memset(one, 1.0)
            nisa.tensor_tensor(t, t, one, nl.add)
            nisa.tensor_scalar(t, t, nl.add, float("nan") if x.shape[0] == 5 else 0.5)

        repeat(kind, 3, body)
        return out(t)

    expected = X.copy()
    for _ in range(3):
        expected = (expected + np.float32(1)) + np.float32(0.5)
    np.testing.assert_array_equal(run(kernel, X), expected)
    assert np.isnan(run(kernel, normal(5, 2))).all()


def changing(what: str, x: Any) -> Any:
    """Inside a kernel: a body whose n-th trip differs from the others in one respect."""
    t, u = sb(x), sb(x)
    r, s = nisa.register_alloc(0), nisa.register_alloc(0)

    def body(n: int) -> None:
        if what == "storage":
            nisa.memset((t, u)[n % 2], 0.0)
        elif what == "offset":
            nisa.memset(t[:, n : n + 2], 0.0)
        elif what == "shape":
            nisa.memset(t[:, : n + 1], 0.0)
        elif what == "strides":
            nisa.memset(t[:, 0 : 2 + n : n + 1], 0.0)
        elif what == "dtype":
            nisa.memset(t.view((nl.float32, nl.int32, nl.uint32)[n]), 0)
        elif what == "operator":
            nisa.tensor_tensor(t, t, u, (nl.add, nl.multiply, nl.subtract)[n])
        elif what == "zero":
            nisa.memset(t, (0.0, -0.0, 0.0)[n])
        elif what == "index register":
            nisa.tensor_copy(t[:, 0:1], u.select(1, (r, s)[n % 2]))
        elif what == "register":
            nisa.register_move((r, s)[n % 2], 1)
        elif what == "move":
            nisa.register_move(r, n)
        elif what == "constant":
            nisa.dma_copy(t[0:1, 0:1], nl.shared_constant(np.full((1, 1), n, np.float32)))
        elif what == "declaration":
            nl.ndarray((4, n + 1), nl.float32, buffer=nl.sbuf)
        elif what == "order of declarations":
            a, b = tile((4, 2)), tile((4, 2))
            nisa.memset((a, b)[n % 2], 0.0)
        elif what == "bound":
            nl.fori_loop(0, n + 1, lambda i: None)

    return body


DIFFERENCES = [
    ("storage", "memset", "dst", "another tensor", "the same tensor"),
    ("offset", "memset", "dst", "offset 1", "offset 0"),
    ("shape", "memset", "dst", "shape (4, 2)", "shape (4, 1)"),
    ("strides", "memset", "dst", "strides (12, 2)", "strides (12, 1)"),
    ("dtype", "memset", "dst", "dtype int32", "dtype float32"),
    ("operator", "tensor_tensor", "op", "multiply", "add"),
    ("zero", "memset", "value", "-0.0", "0.0"),
    ("index register", "tensor_copy", "src", "another run-time index", "the same register"),
    ("register", "register_move", "dst", "another register", "the same register"),
    ("move", "register_move", "src", "1", "0"),
    ("constant", "ndarray", "constant", "other values", "the same values"),
    ("declaration", "ndarray", "shape", "(4, 2)", "(4, 1)"),
    ("order of declarations", "memset", "dst", "another tensor", "the same tensor"),
    ("bound", "fori_loop", "upper", "2", "1"),
]


@pytest.mark.parametrize(("what", "instruction", "operand", "received", "allowed"), DIFFERENCES)
def test_what_counts(what, instruction, operand, received, allowed):
    with pytest.raises(nkisim.NkiError) as caught:
        run(_changing_kernel(what), X)
    error = caught.value
    assert (error.instruction, error.operand) == (instruction, operand), str(error)
    assert error.rule == RULE + "fori_loop"
    assert received in str(error.received), str(error)
    assert f"{allowed}" in str(error.allowed), str(error)
    assert error.site.file == __file__


def _changing_kernel(what: str) -> Any:
    def kernel(x):
        body, n = changing(what, x), [0]

        def trip(i):
            body(n[0])
            n[0] += 1

        nl.fori_loop(0, 2, trip)

    return kernel


def test_another_instruction():
    def kernel(x):
        t, n = sb(x), [0]

        def body(i):
            n[0] += 1
            if n[0] == 2:
                nisa.memset(t, 1.0)
            else:
                nisa.tensor_copy(t, t)

        nl.fori_loop(0, 2, body)

    refused(kernel, X, instruction="memset", rule=RULE + "fori_loop", received="memset at", allowed="tensor_copy at")


@pytest.mark.parametrize("second", [0, 2])
def test_more_or_fewer_instructions(second):
    def kernel(x):
        t, n = sb(x), [0]

        def body(i):
            for _ in range(1 if n[0] == 0 else second):
                nisa.memset(t, 0.0)
            n[0] += 1

        nl.fori_loop(0, 2, body)

    received, allowed = ("not issued", "issued") if second == 0 else ("memset at", "the end of the body")
    refused(kernel, X, instruction="memset", rule=RULE + "fori_loop", received=received, allowed=allowed)


def test_run_time_parts_and_names_do_not_count():
    x = np.arange(24, dtype=np.float32).reshape(6, 4)

    def kernel(x, index):
        o = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        n = [0]

        def body(i):
            n[0] += 1
            rows = nl.ndarray((1, 1), nl.int32, name=f"rows{n[0]}")
            nisa.dma_copy(rows, index.select(0, i))
            t = tile((1, 4))
            nisa.dma_copy(t, x.vector_select(0, rows), name=f"gather{n[0]}")
            nisa.dma_copy(o.select(0, i), t)

        nl.fori_loop(0, 6, body)
        return o

    index = np.array([3, 1, 0, 5, 4, 2], np.int32).reshape(6, 1, 1)
    np.testing.assert_array_equal(run(kernel, x, index), x[index.reshape(-1)])


@pytest.mark.parametrize("index", ["register", "tile"])
def test_what_is_known_at_run_time_only_is_checked_on_every_trip(index):
    """Three rows of which the last was never written: trips 1 and 2 are right, and 3 and 4 are not."""

    def kernel(x, rows, first):
        scratch = nl.ndarray((3, 12), x.dtype, buffer=nl.private_hbm)
        nisa.dma_copy(scratch[0:2], x[0:2])

        def body(i):
            t = tile((1, 12))
            if index == "register":
                nisa.dma_copy(t, scratch.select(0, i))
            else:
                row = nl.ndarray((1, 1), nl.int32)
                nisa.dma_copy(row, rows.select(0, i))
                nisa.dma_copy(t, scratch.vector_select(0, row))

        nl.fori_loop(first, 4, body)

    rows = np.arange(4, dtype=np.int32).reshape(4, 1, 1)
    facts = {"instruction": "dma_copy", "operand": "src"}
    for first in (0, 2):
        unwritten = {"rule": "uninitialized read", "received": "12 of 12", "allowed": "elements written before"}
        refused(kernel, X, rows, first, **facts, **unwritten)
    refused(kernel, X, rows, 3, **facts, rule="index out of bounds", received="3", allowed="0..2")


def test_inner_loops():
    """The body of an inner loop is one body on all trips of the outer one, also if the first has no trips."""

    def kernel(x, limits, differ):
        t, n = sb(x), [0]
        bound = nisa.register_alloc()

        def outer(i):
            nisa.register_load(bound, limits.select(0, i))

            def inner(j):
                n[0] += 1
                own = tile(x.shape)
                nisa.memset(own, 1.0)
                nisa.tensor_tensor(t, t, own, nl.add)
                if differ:
                    nisa.tensor_scalar(t, t, nl.add, float(n[0] > 1))

            nl.fori_loop(0, bound, inner)
            late = tile(x.shape)
            nisa.tensor_copy(late, t)
            nisa.tensor_copy(t, late)

        nl.fori_loop(0, 3, outer)
        return out(t)

    limits = np.array([0, 1, 2], np.int32).reshape(3, 1, 1)
    np.testing.assert_array_equal(run(kernel, np.zeros_like(X), limits, False), np.full_like(X, 3))
    with pytest.raises(nkisim.NkiError, match=r"trip 1 of fori_loop in trip 3 of fori_loop: received 1.0, allowed 0.0"):
        run(kernel, X, limits, True)


def test_two_cores():
    def kernel(x):
        o = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        half = x.shape[0] // 2
        first = nl.program_id() * half

        def body(i):
            scale = nl.ndarray((1, 1), nl.float32)
            nisa.dma_copy(scale, nl.shared_constant(np.full((1, 1), 2, np.float32)))
            t = tile((1, x.shape[1]))
            nisa.dma_copy(t, x[first : first + half].select(0, i))
            nisa.tensor_scalar(t, t, nl.multiply, scale)
            nisa.dma_copy(o[first : first + half].select(0, i), t)

        nl.fori_loop(0, half, body)
        return o

    np.testing.assert_array_equal(nkisim.simulate(nki.jit(kernel)[2], target="trn2")(X), 2 * X)


# -- accumulation


@pytest.mark.parametrize("accumulate", [None, True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_inferred_accumulation(accumulate, inside):
    x = normal(8, 8)

    def kernel(x):
        t, p, r = sb(x), tile((8, 8), buffer=nl.psum), tile((8, 8))
        nisa.nc_matmul(p, t, t, accumulate=False)

        def body(i):
            q = tile((8, 8), buffer=nl.psum) if inside else p
            if inside:
                nisa.nc_matmul(q, t, t)
            nisa.nc_matmul(q, t, t, accumulate=accumulate)
            nisa.tensor_copy(r, q)

        nl.fori_loop(0, 3, body)
        return out(r)

    if accumulate is None and not inside:
        refused(
            kernel,
            x,
            instruction="nc_matmul",
            operand="accumulate",
            rule="accumulation inferred in a dynamic loop",
            received="declared outside the fori_loop",
            allowed="True or False",
        )
        return
    times = 1 if accumulate is False else 2 if inside else 4
    np.testing.assert_allclose(run(kernel, x), times * (x.T.astype(np.float64) @ x), rtol=1e-5, atol=1e-5)


def test_accumulation_that_starts_on_the_first_trip():
    def kernel(x):
        t, p, n = sb(x), ps(x), [0]

        def body(i):
            nisa.nc_matmul(p, t, t, accumulate=n[0] > 0)
            n[0] += 1

        nl.fori_loop(0, 2, body)

    refused(
        kernel,
        normal(4, 4),
        instruction="nc_matmul",
        operand="accumulate",
        rule=RULE,
        received="True",
        allowed="False as on the first trip",
    )
