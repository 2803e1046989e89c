"""Dynamic and static loops, no_reorder, program ids, and what a loop's body may do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import normal, refused, run, sb, tile, traced

pytestmark = pytest.mark.filterwarnings(
    "ignore:nl.dynamic_range:DeprecationWarning", "ignore:while register:DeprecationWarning"
)


def number(value: int) -> Any:
    return np.array([[value]], np.int32)


def loaded(x: Any) -> Any:
    """Inside a kernel: a register with the one element of a tensor."""
    register = nisa.register_alloc()
    nisa.register_load(register, x)
    return register


def zeros(*shape: int, dtype: Any = nl.float32) -> Any:
    t = tile(shape, dtype)
    nisa.memset(t, 0)
    return t


def save(t: Any) -> Any:
    o = nl.ndarray(t.shape, t.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(o, t)
    return o


def count_down(t: Any) -> None:
    """Inside a kernel: t -= 1, through HBM constants so that only this file's instructions are needed."""
    one = nl.shared_constant(np.array([[-1]], np.int32))
    nisa.dma_compute(t, [t, one], nl.add)


# -- static loops


@pytest.mark.parametrize("name", ["affine_range", "sequential_range", "static_range"])
def test_static_ranges_are_range(name):
    make = getattr(nl, name)
    assert make(4) == range(4)
    assert make(2, 9) == range(2, 9)
    assert make(2, 9, 3) == range(2, 9, 3)
    assert make(9, 2, -3) == range(9, 2, -3)

    def kernel(x):
        make(nisa.register_alloc(4))

    refused(
        kernel,
        normal(1, 1),
        instruction=name,
        operand="start",
        rule="type",
        received="a register",
        allowed="a compile-time integer",
    )


# -- counted loops


@pytest.mark.parametrize(("lower", "upper", "step"), [(0, 5, 1), (2, 7, 2), (3, 3, 1), (5, 2, 1), (-2, 4, 3)])
@pytest.mark.parametrize("how", ["int", "register"])
@pytest.mark.parametrize("loop", ["fori_loop", "dynamic_range"])
def test_counted_loops(lower, upper, step, how, loop):
    seen = []

    def kernel(low, high):
        seen.clear()
        a, b = (lower, upper) if how == "int" else (loaded(low), loaded(high))
        if loop == "fori_loop":
            nl.fori_loop(a, b, lambda i: seen.append(i.value), step)
        else:
            for i in nl.dynamic_range(a, b, step):
                seen.append(i.value)

    run(kernel, number(lower), number(upper))
    assert seen == list(range(lower, upper, step))


def test_dynamic_range_with_one_argument():
    seen = []

    def kernel(n):
        for i in nl.dynamic_range(loaded(n)):
            seen.append(i.value)

    run(kernel, number(3))
    assert seen == [0, 1, 2]


def test_index_addresses_rows():
    x = normal(6, 4, 5)

    def kernel(x, n):
        o = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(o, nl.shared_constant(np.zeros(x.shape, np.float32)))
        total = zeros(4, 5)

        def body(i):
            t = tile((4, 5))
            nisa.dma_copy(t, x.select(0, i))
            nisa.dma_compute(total, [total, t], nl.add)
            nisa.dma_copy(o.ap([[5, 4], [1, 5]], scalar_offset=i, indirect_dim=0), total)

        nl.fori_loop(0, loaded(n), body)
        return o

    expected = np.zeros_like(x)
    running = np.zeros((4, 5), np.float32)
    for i in range(4):
        running = running + x[i]
        expected[i] = running
    np.testing.assert_array_equal(run(kernel, x, number(4)), expected)


def test_dynamic_range_is_deprecated():
    def kernel(n):
        for _ in nl.dynamic_range(1):
            pass

    with pytest.warns(DeprecationWarning, match="use nl.fori_loop") as caught:
        run(kernel, number(1))
    assert caught[0].filename == __file__


BOUNDS = [
    (lambda x: nl.fori_loop(0, 2.0, print), "fori_loop", "upper", "type", "float", "an int or a VirtualRegister"),
    (lambda x: nl.fori_loop(x, 2, print), "fori_loop", "lower", "type", "NkiTensor", "VirtualRegister"),
    (lambda x: nl.fori_loop(0, True, print), "fori_loop", "upper", "type", "bool", "an int"),
    (lambda x: nl.fori_loop(0, 2, print, 0), "fori_loop", "step", "value", "0", "positive"),
    (lambda x: nl.fori_loop(0, 2, print, -1), "fori_loop", "step", "value", "-1", "positive"),
    (lambda x: nl.fori_loop(0, 2, lambda i: i), "fori_loop", "body_fun", "return value", "VirtualRegister", "None"),
    (
        lambda x: nl.fori_loop(0, 2, print, nisa.register_alloc(1)),
        "fori_loop",
        "step",
        "value",
        "VirtualRegister(1)",
        "compile-time",
    ),
    (lambda x: nl.dynamic_range(0, 2, 0), "dynamic_range", "step", "value", "0", "positive"),
    (lambda x: nl.dynamic_range(1.5), "dynamic_range", "stop", "type", "float", "an int"),
    (lambda x: nl.fori_loop(0, loaded(x), print), "fori_loop", "upper", "loop bound", "4294967295", "2**31-1"),
    (
        lambda x: nl.fori_loop(0, nisa.register_alloc(), print),
        "VirtualRegister",
        "",
        "uninitialized",
        "never",
        "before",
    ),
    (lambda x: nl.while_loop(1, print), "while_loop", "init", "type", "int", "VirtualRegister"),
    (
        lambda x: nl.while_loop(nisa.register_alloc(1), lambda r: None),
        "while_loop",
        "body_fun",
        "return value",
        "NoneType",
        "a VirtualRegister",
    ),
]


@pytest.mark.parametrize(("kernel", "instruction", "operand", "rule", "received", "allowed"), BOUNDS)
def test_loop_rules(kernel, instruction, operand, rule, received, allowed):
    refused(
        kernel,
        np.array([[0xFFFFFFFF]], np.uint32),
        instruction=instruction,
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_float_bound_is_refused():
    def kernel(x):
        nl.fori_loop(0, loaded(x), lambda i: None)

    refused(
        kernel,
        np.ones((1, 1), np.float32),
        instruction="fori_loop",
        operand="upper",
        rule="loop bound in a register",
        received="1.0",
        allowed="an integer",
    )


# -- loops with a condition


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("loop", ["while_loop", "while"])
def test_loops_with_a_condition(n, loop):
    trips = []

    def kernel(n):
        trips.clear()
        count = sb(n)

        def body(r):
            trips.append(r.value)
            count_down(count)
            nisa.register_load(r, count)
            return r

        register = loaded(count)
        if loop == "while_loop":
            nl.while_loop(register, body)
        else:
            while register:
                register = body(register)
        return save(count)

    assert run(kernel, number(n))[0, 0] == 0
    assert trips == list(range(n, 0, -1))


def test_condition_is_passed_by_value():
    def kernel(n):
        condition = nisa.register_alloc(2)
        other = nisa.register_alloc(0)

        def body(r):
            nisa.register_move(r, 5)
            return other

        nl.while_loop(condition, body)
        o = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)
        nisa.register_store(o, condition)
        return o

    assert run(kernel, number(0))[0, 0] == 2


def test_negative_condition_goes_on():
    trips = []

    def kernel(n):
        trips.clear()
        count = sb(n)

        def body(r):
            trips.append(r.value)
            nisa.dma_compute(count, [count, nl.shared_constant(np.array([[1]], np.int32))], nl.add)
            nisa.register_load(r, count)
            return r

        nl.while_loop(loaded(count), body)

    run(kernel, number(-2))
    assert trips == [-2, -1]


def test_while_register_is_deprecated():
    def kernel(n):
        register = loaded(n)
        while register:
            nisa.register_move(register, 0)

    with pytest.warns(DeprecationWarning, match="use nl.while_loop") as caught:
        run(kernel, number(1))
    assert caught[0].filename == __file__
    assert len(caught) == 1


# -- loops left early


def test_break_is_refused():
    def counted(n):
        for _ in nl.dynamic_range(3):
            break

    trips = []

    def nested(n):
        for i in nl.dynamic_range(3):
            for _ in nl.dynamic_range(2):
                trips.append(i.value)
                break

    def conditional(n):
        register = loaded(n)
        while register:
            break

    def tested(n):
        if loaded(n):
            nisa.register_alloc(1)

    for kernel, name in (
        (counted, "dynamic_range"),
        (nested, "dynamic_range"),
        (conditional, "while"),
        (tested, "while"),
    ):
        error = refused(
            kernel,
            number(2),
            instruction=name,
            rule="dynamic loop left before its end",
            received="a break",
            allowed="bound or condition",
        )
        # The loop that was left, not the one around it, and before that goes on.
        assert error.site.line == kernel.__code__.co_firstlineno + (1 if kernel in (counted, tested) else 2)
    assert trips == [0]


def test_body_error_keeps_its_place():
    def kernel(n):
        def body(i):
            nisa.dma_copy(tile((1, 2), nl.int32), n)

        nl.fori_loop(0, 3, body)

    error = refused(
        kernel,
        number(1),
        instruction="dma_copy",
        operand="src",
        rule="number of elements",
        received="1 [1, 1]",
        allowed="2 [1, 2]",
    )
    assert error.site.function == "body"


# -- nesting


def test_structured_loops_nest():
    seen = []

    def kernel(n, m):
        seen.clear()
        inner = nisa.register_alloc()

        def body(i):
            nisa.register_load(inner, m)
            nl.fori_loop(0, inner, lambda j: seen.append((i.value, j.value)))

        nl.fori_loop(0, loaded(n), body)

    run(kernel, number(2), number(3))
    assert seen == [(i, j) for i in range(2) for j in range(3)]
    begins = [r.attrs["depth"] for r in traced(kernel, number(2), number(3)).records if r.instruction == "loop_begin"]
    assert begins == [1, 2, 2]


def test_dynamic_range_inside_a_loop():
    seen = []

    def local(n, m):
        for i in nl.dynamic_range(loaded(n)):
            for j in nl.dynamic_range(loaded(m)):
                seen.append((i.value, j.value))

    run(local, number(2), number(2))
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]

    def carried(n, m):
        bound = nisa.register_alloc()
        for _ in nl.dynamic_range(loaded(n)):
            nisa.register_load(bound, m)
            for _ in nl.dynamic_range(0, bound):
                pass

    refused(
        carried,
        number(2),
        number(2),
        instruction="dynamic_range",
        operand="stop",
        rule="nested loop bound by a loop-carried register",
        received="the outer loop writes",
        allowed="nl.fori_loop",
    )

    def after(n, m):
        bound = nisa.register_alloc()
        for _ in nl.dynamic_range(loaded(n)):
            nisa.register_load(bound, m)
        for _ in nl.dynamic_range(bound):
            pass

    run(after, number(2), number(2))


# -- tensors of the body


@pytest.mark.parametrize("where", ["after", "next trip"])
@pytest.mark.parametrize("buffer", ["sbuf", "hbm"])
def test_tensors_of_the_body_end_with_the_trip(where, buffer):
    def kernel(x):
        made = [x]

        def body(i):
            nisa.dma_copy(tile(x.shape), made[-1] if where == "next trip" else x)
            t = nl.ndarray(x.shape, x.dtype, buffer=getattr(nl, buffer))
            nisa.dma_copy(t, x)
            made.append(t)

        nl.fori_loop(0, 2, body)
        nisa.dma_copy(tile(x.shape), made[1])

    error = refused(
        kernel,
        normal(2, 3),
        instruction="dma_copy",
        operand="src",
        rule="tensor declared in a dynamic loop's body",
        received="declared at",
        allowed="before the loop",
    )
    assert error.site.function == ("kernel" if where == "after" else "body")


def peak(kernel: Any, *arrays: Any) -> int:
    return traced(kernel, *arrays).memory[0].sbuf.amount


def test_body_memory_is_held_for_the_whole_loop():
    x = normal(4, 100)

    def unrolled(x, trips):
        for _ in range(trips):
            a, b = tile((4, 100)), tile((4, 100))
            nisa.dma_copy(a, x)
            nisa.dma_copy(b, x)

    def looped(x, trips):
        def body(i):
            a, b = tile((4, 100)), tile((4, 100))
            nisa.dma_copy(a, x)
            nisa.dma_copy(b, x)

        nl.fori_loop(0, trips, body)

    # One after the other they share 400 bytes; a loop has both at once, and once for all trips.
    assert peak(unrolled, x, 3) == 400
    assert peak(looped, x, 1) == 800
    assert peak(looped, x, 5) == 800


def test_a_loop_holds_what_it_touches():
    x = normal(4, 100)

    def kernel(x, loops):
        early, late = tile((4, 100)), tile((4, 100))
        nisa.dma_copy(early, x)
        nisa.dma_copy(late, x)

        def body(i):
            nisa.dma_copy(tile((4, 100)), early)
            nisa.dma_copy(tile((4, 100)), late)

        if loops:
            nl.fori_loop(0, 2, body)
        else:
            for _ in range(2):
                body(0)

    assert peak(kernel, x, False) == 1200
    assert peak(kernel, x, True) == 1600


def test_memory_of_a_loop_can_be_too_much():
    def kernel(x):
        def body(i):
            for _ in range(5):
                t = nl.ndarray((1, 12 * 1024), nl.float32, name="big")
                nisa.dma_copy(t[:, 0:1], x)

        nl.fori_loop(0, 2, body)

    refused(
        kernel,
        normal(1, 1),
        instruction="ndarray",
        operand="big",
        rule="SBUF capacity",
        received=str(5 * 48 * 1024),
        allowed="bytes per partition",
    )


# -- no_reorder and scheduling edges


def test_no_reorder_is_marked():
    def kernel(x):
        with nl.no_reorder():
            for _ in nl.static_range(2):
                nisa.dma_copy(tile(x.shape), x)

    names = [r.instruction for r in traced(kernel, normal(1, 1)).records]
    assert names == ["no_reorder_begin", "dma_copy", "dma_copy", "no_reorder_end"]


@pytest.mark.parametrize("loop", ["fori_loop", "while_loop", "dynamic_range", "while"])
def test_dynamic_loops_inside_no_reorder_are_refused(loop):
    def kernel(x):
        def inner():
            if loop == "fori_loop":
                nl.fori_loop(0, 1, lambda i: None)
            elif loop == "while_loop":
                nl.while_loop(nisa.register_alloc(1), lambda r: r)
            elif loop == "dynamic_range":
                for _ in nl.dynamic_range(1):
                    pass
            else:
                register = nisa.register_alloc(1)
                while register:
                    pass

        with nl.no_reorder():
            inner()

    refused(
        kernel,
        normal(1, 1),
        instruction=loop,
        rule="dynamic loop inside no_reorder",
        received="a loop in the block",
        allowed="the block inside the loop's body",
    )


def test_no_reorder_inside_a_body():
    def kernel(x):
        def body(i):
            with nl.no_reorder():
                nisa.dma_copy(tile(x.shape), x)

        nl.fori_loop(0, 2, body)

    assert traced(kernel, normal(1, 1)).count("no_reorder_begin") == 2


def test_no_reorder_ends_with_an_error():
    def kernel(x):
        try:
            with nl.no_reorder():
                raise ValueError("from the block")
        except ValueError:
            nl.fori_loop(0, 1, lambda i: None)

    run(kernel, normal(1, 1))


def test_edges_do_not_leave_a_loop():
    def into(x):
        outer = nisa.dma_copy(tile(x.shape), x, name="outer")
        nl.fori_loop(0, 2, lambda i: _chain(x, outer))

    def _chain(x, producer):
        nisa.dma_copy(tile(x.shape), x, name="inner").depends_on(producer)

    assert traced(into, normal(1, 1)).edges == [("inner", "outer")] * 2

    def out_of(x):
        inner = []
        nl.fori_loop(0, 2, lambda i: inner.append(nisa.dma_copy(tile(x.shape), x)))
        nisa.dma_copy(tile(x.shape), x).depends_on(inner[0])

    refused(
        out_of,
        normal(1, 1),
        instruction="depends_on",
        operand="producers",
        rule="edge out of a dynamic loop",
        received="a producer in the loop",
        allowed="the consumer's loop or in one around it",
    )


# -- trace


def test_loops_are_marked():
    def kernel(n):
        nl.fori_loop(1, loaded(n), lambda i: None, 2)
        nl.while_loop(nisa.register_alloc(0), lambda r: r)

    records = [r for r in traced(kernel, number(4)).records if r.instruction.startswith("loop")]
    assert {r.engine for r in records} == {Engine.sync}
    assert [(r.instruction, r.attrs) for r in records] == [
        ("loop_begin", {"kind": "for", "construct": "fori_loop", "depth": 1, "lower": 1, "upper": 4, "step": 2}),
        ("loop_iteration", {"kind": "for"}),
        ("loop_iteration", {"kind": "for"}),
        ("loop_end", {"kind": "for", "trips": 2}),
        ("loop_begin", {"kind": "while", "construct": "while_loop", "depth": 1}),
        ("loop_end", {"kind": "while", "trips": 0}),
    ]
    assert all(r.site.function == "kernel" for r in records)


def test_while_register_is_marked():
    def kernel(n):
        count = sb(n)
        register = loaded(count)
        while register:
            count_down(count)
            nisa.register_load(register, count)

    records = [r for r in traced(kernel, number(2)).records if r.instruction.startswith("loop")]
    assert [r.instruction for r in records] == ["loop_begin", "loop_iteration", "loop_iteration", "loop_end"]
    assert records[-1].attrs == {"kind": "while", "trips": 2}


def test_one_register_can_drive_two_loops():
    def kernel(n):
        for _ in range(2):
            register = loaded(n)
            while register:
                nisa.register_move(register, 0)

    assert traced(kernel, number(1)).count("loop_end") == 2


# -- launch coordinates


def test_program_ids_on_one_core():
    seen = []

    def kernel(x):
        seen.append((nl.program_id(0), nl.program_id(), nl.num_programs(), nl.num_programs(0), nl.program_ndim()))
        seen.append((nl.num_programs(axes=(0,)), nl.num_programs(None)))

    run(kernel, normal(1, 1))
    assert seen == [(0, 0, 1, 1, 0), (1, 1)]


@pytest.mark.parametrize("axis", [1, -1, None, True])
def test_launches_have_one_axis(axis):
    def kernel(x):
        nl.program_id(axis)

    refused(
        kernel, normal(1, 1), instruction="program_id", operand="axis", rule="value", received=str(axis), allowed="0"
    )


@pytest.mark.parametrize("name", ["program_id", "num_programs", "program_ndim"])
def test_outside_a_kernel(name):
    with pytest.raises(RuntimeError, match=f"{name}: called outside a kernel"):
        getattr(nl, name)()
