"""register_alloc, register_move, register_load, register_store: values, rules, limits, trace."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import normal, refused, run, sb, tile, traced


def stored(register: Any, dtype: Any = nl.int32) -> Any:
    """Inside a kernel: a register's value in a returned HBM tensor."""
    o = nl.ndarray((1, 1), dtype, buffer=nl.shared_hbm)
    nisa.register_store(o, register)
    return o


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("value", [0, 1, -5, 2**31 - 1, -(2**31)])
def test_immediates(target, value):
    def kernel(x):
        moved = nisa.register_alloc()
        nisa.register_move(moved, value)
        copied = nisa.register_alloc(7)
        nisa.register_move(copied, moved)
        return stored(nisa.register_alloc(value)), stored(moved), stored(copied)

    for got in run(kernel, normal(1, 1), target=target):
        np.testing.assert_array_equal(got, [[value]])


def test_a_move_copies_the_value():
    def kernel(x):
        a = nisa.register_alloc(3)
        b = nisa.register_alloc(a.value)
        nisa.register_move(b, a)
        nisa.register_move(a, 4)
        return stored(a), stored(b)

    a, b = run(kernel, normal(1, 1))
    assert (a[0, 0], b[0, 0]) == (4, 3)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32])
@pytest.mark.parametrize(("shape", "on_chip"), [((1,), False), ((1, 1), False), ((1, 1), True)])
def test_load_and_store_every_type(dtype, shape, on_chip):
    extremes = [-1.5, 3.25] if dtype is np.float32 else [np.iinfo(dtype).min, np.iinfo(dtype).max]
    for value in extremes:
        x = np.full(shape, value, dtype)

        def kernel(x):
            register = nisa.register_alloc()
            nisa.register_load(register, sb(x) if on_chip else x)
            if on_chip:
                t = tile((1, 1), x.dtype)
                nisa.register_store(t, register)
                nisa.register_load(register, t)
            o = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
            nisa.register_store(o, register)
            return o

        np.testing.assert_array_equal(run(kernel, x), x)


def test_element_of_a_larger_tensor():
    x = np.arange(12, dtype=np.int32).reshape(3, 4)

    def kernel(x):
        t = sb(x)
        register = nisa.register_alloc()
        nisa.register_load(register, t[2:3, 1:2])
        nisa.register_store(t[1:2, 0:1], register)
        nisa.register_load(register, t[0, 3])
        nisa.register_store(t[0:1, 0:1], register)
        o = nl.ndarray((3, 4), nl.int32, buffer=nl.shared_hbm)
        nisa.dma_copy(o, t)
        return o

    expected = x.copy()
    expected[1, 0], expected[0, 0] = 9, 3
    np.testing.assert_array_equal(run(kernel, x), expected)


def test_negative_integers_in_twos_complement():
    def kernel(x):
        register = nisa.register_alloc(-2)
        return stored(register, nl.uint32), stored(register, nl.uint8), stored(nisa.register_alloc(200), nl.int8)

    a, b, c = run(kernel, normal(1, 1))
    assert (a[0, 0], b[0, 0], c[0, 0]) == (2**32 - 2, 254, -56)


def test_uint32_register_is_not_negative():
    def kernel(x):
        register = nisa.register_alloc()
        nisa.register_load(register, x)
        assert register.value == 0xFFFFFFFF
        return stored(register, nl.uint32), stored(register, nl.int32)

    a, b = run(kernel, np.array([[0xFFFFFFFF]], np.uint32))
    assert (a[0, 0], b[0, 0]) == (0xFFFFFFFF, -1)


# -- rules


def _alloc(value: Any) -> Any:
    def kernel(x):
        nisa.register_alloc(value)

    return kernel


def _move(dst: Any, src: Any) -> Any:
    def kernel(x):
        nisa.register_move(dst() if callable(dst) else dst, src() if callable(src) else src)

    return kernel


def _load(src: Any, dst: Any = nisa.register_alloc) -> Any:
    def kernel(x):
        nisa.register_load(dst(), src(x))

    return kernel


def _store(dst: Any, src: Any = lambda: nisa.register_alloc(1)) -> Any:
    def kernel(x):
        nisa.register_store(dst(x), src())

    return kernel


def loaded_float() -> Any:
    register = nisa.register_alloc()
    nisa.register_load(register, nl.shared_constant(np.ones((1, 1), np.float32)))
    return register


RULES = [
    (_alloc(2**32), "register_alloc", "x", "value", str(2**32), "32-bit"),
    (_alloc(-(2**31) - 1), "register_alloc", "x", "value", str(-(2**31) - 1), "32-bit"),
    (_alloc(1.5), "register_alloc", "x", "type", "float", "int"),
    (_alloc(True), "register_alloc", "x", "type", "bool", "int"),
    (_move(nisa.register_alloc, 2**40), "register_move", "src", "value", str(2**40), "32-bit"),
    (_move(nisa.register_alloc, 0.5), "register_move", "src", "type", "float", "int"),
    (_move(3, 3), "register_move", "dst", "type", "int", "VirtualRegister"),
    (
        _move(nisa.register_alloc, nisa.register_alloc),
        "register_move",
        "src",
        "uninitialized",
        "never written",
        "written",
    ),
    (_load(lambda x: x), "register_load", "src", "shape", "[2, 2]", "[1] or [1, 1]"),
    (_load(lambda x: x.reshape((1, 2, 2))[0:1, 0:1, 0:1]), "register_load", "src", "shape", "[1, 1, 1]", "[1, 1]"),
    (_load(lambda x: 4), "register_load", "src", "type", "int", "NkiTensor"),
    (_load(lambda x: tile((1, 1), buffer=nl.psum)), "register_load", "src", "buffer", "psum", "sbuf or HBM"),
    (_load(lambda x: tile((1, 1), nl.bfloat16)), "register_load", "src", "dtype", "bfloat16", "int32"),
    (_load(lambda x: tile((1, 1), nl.bool_)), "register_load", "src", "dtype", "bool_", "int32"),
    (_load(lambda x: tile((1, 1))), "register_load", "src", "uninitialized read", "1 of 1", "written"),
    (_load(lambda x: x[0:1, 0:1], lambda: 5), "register_load", "dst", "type", "int", "VirtualRegister"),
    (_store(lambda x: x), "register_store", "dst", "shape", "[2, 2]", "[1] or [1, 1]"),
    (_store(lambda x: tile((1, 1), nl.int32), lambda: 3), "register_store", "src", "type", "int", "VirtualRegister"),
    (_store(lambda x: tile((1, 1))), "register_store", "dst", "dtype", "float32 for an integer", "an integer type"),
    (
        _store(lambda x: tile((1, 1), nl.int32), loaded_float),
        "register_store",
        "dst",
        "dtype",
        "int32 for a float",
        "float32",
    ),
    (
        _store(lambda x: tile((1, 1), nl.int8), lambda: nisa.register_alloc(256)),
        "register_store",
        "src",
        "value",
        "256",
        "8 bits",
    ),
    (
        _store(lambda x: tile((1, 1), nl.uint16), lambda: nisa.register_alloc(-32769)),
        "register_store",
        "src",
        "value",
        "-32769",
        "16 bits",
    ),
    (
        _store(lambda x: tile((1, 1), nl.int32), nisa.register_alloc),
        "register_store",
        "src",
        "uninitialized read",
        "never written",
        "written before",
    ),
]


@pytest.mark.parametrize(("kernel", "instruction", "operand", "rule", "received", "allowed"), RULES)
def test_rules(kernel, instruction, operand, rule, received, allowed):
    refused(
        kernel,
        normal(2, 2),
        instruction=instruction,
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


@pytest.mark.parametrize("how", ["move", "load"])
@pytest.mark.parametrize("loop", ["fori_loop", "dynamic_range"])
@pytest.mark.filterwarnings("ignore:nl.dynamic_range:DeprecationWarning")
def test_loop_indices_refuse_writes(how, loop):
    def kernel(x):
        def body(i):
            if how == "move":
                nisa.register_move(i, 0)
            else:
                nisa.register_load(i, x)

        if loop == "fori_loop":
            nl.fori_loop(0, 2, body)
        else:
            for i in nl.dynamic_range(2):
                body(i)

    refused(
        kernel,
        np.zeros((1, 1), np.int32),
        instruction=f"register_{how}",
        operand="dst",
        rule="write to a loop's index register",
        received="the loop's index",
        allowed="register_alloc",
    )


def test_registers_have_no_value_for_python():
    def index(x):
        range(nisa.register_alloc(3))

    def number(x):
        int(nisa.register_alloc(3))

    for kernel in (index, number):
        with pytest.raises(TypeError, match="not known while the kernel is built"):
            run(kernel, normal(1, 1))


# -- the limit counts what is alive


def test_64_registers_alive():
    def kernel(x, n):
        registers = [nisa.register_alloc(i) for i in range(n)]
        o = nl.ndarray((1, n), nl.int32, buffer=nl.shared_hbm)
        for i, register in enumerate(registers):
            nisa.register_store(o[0:1, i : i + 1], register)
        return o

    np.testing.assert_array_equal(run(kernel, normal(1, 1), 64), np.arange(64).reshape(1, 64))
    error = refused(
        kernel,
        normal(1, 1),
        65,
        instruction="register_alloc",
        rule="registers alive at once",
        received="65",
        allowed="1..64",
    )
    assert error.site.line == kernel.__code__.co_firstlineno + 1


def test_a_last_read_makes_room_for_a_write():
    def kernel(x):
        registers = [nisa.register_alloc(i) for i in range(64)]
        target = nisa.register_alloc()
        nisa.register_move(target, registers.pop())
        o = nl.ndarray((1, 64), nl.int32, buffer=nl.shared_hbm)
        for i, register in enumerate([*registers, target]):
            nisa.register_store(o[0:1, i : i + 1], register)
        return o

    np.testing.assert_array_equal(run(kernel, normal(1, 1)), np.arange(64).reshape(1, 64))


def test_a_write_needs_a_register_even_if_nobody_reads():
    def kernel(x):
        registers = [nisa.register_alloc(i) for i in range(64)]
        nisa.register_alloc(5)
        for register in registers:
            nisa.register_store(tile((1, 1), nl.int32), register)

    error = refused(
        kernel,
        normal(1, 1),
        instruction="register_alloc",
        rule="registers alive at once",
        received="65",
        allowed="1..64",
    )
    assert error.site.line == kernel.__code__.co_firstlineno + 2


def test_dead_registers_do_not_count():
    def kernel(x):
        o = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)
        for i in range(300):
            nisa.register_store(o, nisa.register_alloc(i))
        unused = [nisa.register_alloc() for _ in range(100)]
        assert len(unused) == 100
        return o

    assert run(kernel, normal(1, 1))[0, 0] == 299


def test_a_loop_keeps_registers_alive():
    def kernel(x, n):
        registers = [nisa.register_alloc(i) for i in range(n)]
        o = nl.ndarray((1, n), nl.int32, buffer=nl.shared_hbm)

        def body(i):
            # One after the other, but the next trip needs them all again.
            for k, register in enumerate(registers):
                nisa.register_store(o[0:1, k : k + 1], register)
                nisa.register_store(o[0:1, 0:1], nisa.register_alloc(0))

        nl.fori_loop(0, 3, body)
        return o

    # One more for the loop's index, and one for each register of the body.
    run(kernel, normal(1, 1), 31)
    refused(
        kernel,
        normal(1, 1),
        32,
        instruction="register_alloc",
        rule="registers alive at once",
        received="65",
        allowed="1..64",
    )


def test_loops_one_after_the_other_share_a_register():
    """Also within a loop: the index of one that has ended is not kept for the next trip."""

    def kernel(x):
        o = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)

        def body(_):
            for _ in range(70):
                nl.fori_loop(0, 2, lambda i: nisa.register_store(o, i))

        nl.fori_loop(0, 3, body)
        return o

    assert run(kernel, normal(1, 1))[0, 0] == 1


def test_each_instruction_is_recorded():
    def kernel(x):
        a = nisa.register_alloc()
        b = nisa.register_alloc(5)
        nisa.register_move(a, 6)
        nisa.register_move(a, b)
        nisa.register_load(a, x)
        nisa.register_store(tile((1, 1), nl.int32), a)

    records = traced(kernel, np.zeros((1, 1), np.int32)).records
    assert [r.instruction for r in records] == [
        "register_alloc",
        "register_alloc",
        "register_move",
        "register_move",
        "register_load",
        "register_store",
    ]
    assert {r.engine for r in records} == {Engine.sync}
    assert [r.attrs.get("immediate") for r in records] == [None, 5, 6, None, None, None]
    assert [a.operand for a in records[4].reads] == ["src"]
    assert [a.operand for a in records[5].writes] == ["dst"]
    assert [r.index for r in records] == list(range(6))


def test_low_precision_floats_are_refused():
    def kernel(x):
        nisa.register_load(nisa.register_alloc(), x)

    refused(
        kernel,
        np.ones((1, 1), ml_dtypes.bfloat16),
        instruction="register_load",
        operand="src",
        rule="dtype",
        received="bfloat16",
        allowed="float32",
    )


def test_outside_a_kernel():
    with pytest.raises(RuntimeError, match=r"nki\.isa\.register_alloc: called outside a kernel"):
        nkisim.isa.register_alloc(1)
