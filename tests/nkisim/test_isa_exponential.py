"""exponential, and the accumulator registers of the Vector and Scalar Engines."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nkisim import NkiError
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.isa._accumulate import SCALAR_COMMANDS, accumulate, check_command, start_values, store_registers
from nkisim.isa._call import Call
from nkisim.machine import current_core
from nkisim.operators import ALU
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16
IDLE, RESET, REDUCE = nisa.reduce_cmd.idle, nisa.reduce_cmd.reset, nisa.reduce_cmd.reduce
RESET_REDUCE, LOAD_REDUCE = nisa.reduce_cmd.reset_reduce, nisa.reduce_cmd.load_reduce


def exp(x, maximum=0.0):
    return np.exp(x.astype(np.float64) - maximum)


def on_trn3(kernel, *arrays):
    return run(kernel, *arrays, target="trn3")


@pytest.mark.parametrize("buffer", [sb, ps])
@pytest.mark.parametrize("column", [False, True])
def test_exponential_subtracts_the_maximum_in_float32(buffer, column):
    x, m = normal(16, 12, dtype=BF16), normal(16, 1, seed=1)

    def kernel(x, m):
        wide, narrow = tile((16, 12), buffer=nl.psum), tile((16, 3, 2, 2), nl.bfloat16)
        t, maximum = buffer(x), buffer(m) if column else 1.5
        nisa.exponential(wide, t, maximum)
        nisa.exponential(narrow, t, max_value=maximum)
        return out(wide), out(narrow)

    wide, narrow = on_trn3(kernel, x, m)
    expected = exp(x.astype(np.float32) - (m if column else np.float32(1.5)))
    np.testing.assert_allclose(wide, expected, rtol=2e-7)
    np.testing.assert_array_equal(narrow, wide.astype(BF16).reshape(16, 3, 2, 2))


def test_exponential_without_arguments_and_of_integers():
    x = integers(4, 8, low=0, high=10, dtype=np.uint32)

    def kernel(x):
        real, whole = tile(x.shape), tile(x.shape, nl.uint16)
        nisa.exponential(real, sb(x))
        nisa.exponential(whole, sb(x))
        return out(real), out(whole)

    real, whole = on_trn3(kernel, x)
    np.testing.assert_allclose(real, exp(x), rtol=2e-7)
    np.testing.assert_array_equal(whole, np.rint(exp(x)).astype(np.uint16))


def test_exponential_overflows_to_infinity_and_keeps_nan():
    x = np.array([[100.0, -200.0, np.inf, -np.inf, np.nan]], np.float32)

    def kernel(x):
        t = sb(x)
        nisa.exponential(t, t)
        return out(t)

    np.testing.assert_array_equal(on_trn3(kernel, x), np.array([[np.inf, 0, np.inf, 0, np.nan]], np.float32))


def test_row_sums_are_of_the_unrounded_results():
    x = normal(8, 32)

    def kernel(x):
        dst, total, half = tile(x.shape, nl.float8_e5m2), tile((8, 1)), tile((8, 1), nl.bfloat16)
        nisa.exponential(dst, sb(x), 0.0, total, RESET_REDUCE)
        nisa.exponential(dst, sb(x), 0.0, half, RESET_REDUCE)
        return out(total), out(half)

    total, half = on_trn3(kernel, x)
    np.testing.assert_allclose(total, exp(x).sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(half, total.astype(BF16))


@pytest.mark.parametrize("start", ["reset", "load number", "load column", "load default"])
def test_chain_over_several_tiles(start):
    x, c = normal(8, 48), normal(8, 1, seed=1)

    def kernel(x, c):
        t, total, dst = sb(x), tile((8, 1)), tile((8, 16))
        first = {
            "reset": {"reduce_cmd": RESET_REDUCE},
            "load number": {"reduce_cmd": LOAD_REDUCE, "reduce_init": 2.5},
            "load column": {"reduce_cmd": LOAD_REDUCE, "reduce_init": sb(c)},
            "load default": {"reduce_cmd": LOAD_REDUCE},
        }[start]
        nisa.exponential(dst, t[:, 0:16], **first)
        nisa.exponential(dst, t[:, 16:32], reduce_cmd=REDUCE)
        nisa.exponential(dst, t[:, 32:48], reduce_cmd=REDUCE, reduce_res=total)
        return out(total)

    initial = {"load number": 2.5, "load column": c}.get(start, 0.0)
    np.testing.assert_allclose(on_trn3(kernel, x, c), initial + exp(x).sum(1, keepdims=True), rtol=2e-6)


def test_registers_belong_to_the_partitions_of_dst():
    x = normal(128, 8)

    def kernel(x):
        t, dst, total = sb(x), tile((128, 8)), tile((128, 1))
        nisa.exponential(dst[0:64], t[0:64], reduce_cmd=RESET_REDUCE)
        nisa.exponential(dst[64:128], t[0:64], 1.0, reduce_cmd=RESET_REDUCE)
        nisa.exponential(dst, t, reduce_cmd=REDUCE, reduce_res=total)
        return out(total)

    before = np.concatenate([exp(x[:64]), exp(x[:64], 1.0)])
    np.testing.assert_allclose(on_trn3(kernel, x), (before + exp(x)).sum(1, keepdims=True), rtol=2e-6)


@pytest.mark.parametrize("lanes", [slice(0, 64), slice(32, 64), slice(64, 96)])
def test_reduce_on_lanes_that_were_not_reset_is_refused(lanes):
    def kernel(x):
        t, dst = sb(x), tile((128, 8))
        nisa.exponential(dst[0:32], t[0:32], reduce_cmd=RESET_REDUCE)
        nisa.exponential(dst[lanes], t[lanes], reduce_cmd=REDUCE)

    refused(
        kernel,
        normal(128, 8),
        target="trn3",
        instruction="exponential",
        operand="reduce_cmd",
        rule="undefined accumulator registers",
        received="reduce on lanes",
        allowed="reset_reduce",
    )


def test_refused_instructions_write_nothing():
    def kernel(x, seen):
        t = sb(x)
        try:
            nisa.exponential(t, t, reduce_cmd=REDUCE)
        except NkiError:
            seen.append(True)
        return out(t)

    x, seen = normal(4, 8), []
    np.testing.assert_array_equal(on_trn3(lambda x: kernel(x, seen), x), x)
    assert seen == [True]


def test_idle_leaves_the_vector_registers_undefined():
    def kernel(x):
        t, dst = sb(x), tile((4, 8))
        nisa.exponential(dst, t, reduce_cmd=RESET_REDUCE)
        nisa.exponential(dst, t)
        nisa.exponential(dst, t, reduce_cmd=REDUCE)

    refused(
        kernel,
        normal(4, 8),
        target="trn3",
        instruction="exponential",
        operand="reduce_cmd",
        rule="undefined accumulator registers",
        received="clobbered by idle",
        allowed="no idle instruction",
    )


def test_exponential_is_recorded_once():
    def kernel(x):
        t = sb(x)
        nisa.exponential(t, t, t[:, 0:1], tile((4, 1)), RESET_REDUCE, name="softmax")

    (record,) = [r for r in traced(kernel, normal(4, 8), target="trn3").records if r.instruction == "exponential"]
    assert (record.engine, record.name, record.attrs) == (Engine.vector, "softmax", {"reduce_cmd": "reset_reduce"})
    assert sorted(a.operand for a in record.reads) == ["max_value", "src"]
    assert [a.operand for a in record.writes] == ["dst", "reduce_res"]


def ok(shape=(4, 8), dtype=nl.float32, buffer=nl.sbuf):
    """Inside a kernel: a tile that every rule accepts."""
    return tile(shape, dtype, buffer)


EXP = nisa.exponential


@pytest.mark.parametrize(
    ("kernel", "operand", "rule", "received", "allowed"),
    [
        (lambda: EXP(ok(), ok((5, 8))), "src", "partitions", "5", "4"),
        (lambda: EXP(ok(), ok((4, 9))), "src", "elements per partition", "9", "8"),
        (lambda: EXP(ok((4, 1, 2, 2, 2)), ok()), "dst", "dimensions", "5", "at most 4"),
        (lambda: EXP(ok(), ok((4, 1, 2, 2, 2))), "src", "dimensions", "5", "at most 4"),
        (lambda: EXP(ok(dtype=nl.uint32), ok()), "dst", "dtype", "uint32", "tfloat32"),
        (lambda: EXP(ok(), ok(dtype=nl.tfloat32)), "src", "dtype", "tfloat32", "uint32"),
        (lambda: EXP(ok(), ok(dtype=nl.float8_e4m3fn)), "src", "dtype", "float8_e4m3fn", "float8_e4m3, "),
        (lambda: EXP(ok(), ok(dtype=nl.bool_)), "src", "dtype", "bool_", "uint32"),
        (lambda: EXP(ok(buffer=nl.shared_hbm), ok()), "dst", "buffer", "hbm", "sbuf or psum"),
        (lambda: EXP(ok(), ok(), None), "max_value", "type", "NoneType", "number"),
        (lambda: EXP(ok(), ok(), ok()), "max_value", "shape", "[4, 8]", "[4, 1]"),
        (lambda: EXP(ok(), ok(), ok((4, 1), nl.bfloat16)), "max_value", "dtype", "bfloat16", "float32"),
        (lambda: EXP(ok(), ok(), reduce_cmd="reduce"), "reduce_cmd", "type", "'reduce'", "nki.isa.reduce_cmd"),
        (lambda: EXP(ok(), ok(), reduce_cmd=RESET), "reduce_cmd", "value", "reset", "idle, reset_reduce, reduce, load"),
        (lambda: EXP(ok(), ok(), reduce_res=ok((4, 1))), "reduce_res", "idle", "a tile", "None"),
        (lambda: EXP(ok(), ok(), 0.0, ok(), RESET_REDUCE), "reduce_res", "shape", "[4, 8]", "[4, 1]"),
        (lambda: EXP(ok(), ok(), 0.0, ok((4, 1), nl.int32), RESET_REDUCE), "reduce_res", "dtype", "int32", "float32"),
        (lambda: EXP(ok(), ok(), 0.0, 1.0, RESET_REDUCE), "reduce_res", "type", "float", "NkiTensor"),
        (lambda: EXP(ok(), ok(), reduce_init=1.0), "reduce_init", "under idle", "1.0", "0.0"),
        (lambda: EXP(ok(), ok(), reduce_cmd=REDUCE, reduce_init=2.0), "reduce_init", "under reduce", "2.0", "0.0"),
        (lambda: EXP(ok(), ok(), reduce_init=None), "reduce_init", "under idle", "None", "0.0"),
        (lambda: EXP(ok(), ok(), reduce_init=ok((4, 1))), "reduce_init", "under idle", "NkiTensor", "0.0"),
        (
            lambda: EXP(ok(), ok(), reduce_cmd=LOAD_REDUCE, reduce_init=None),
            "reduce_init",
            "type",
            "NoneType",
            "number",
        ),
        (lambda: EXP(ok(), ok()), "src", "uninitialized read", "32 of 32", "written"),
    ],
)
def test_exponential_refuses(kernel, operand, rule, received, allowed):
    refused(
        kernel,
        target="trn3",
        instruction="exponential",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_exponential_is_new_in_v4(target):
    refused(
        lambda: EXP(ok(), ok()),
        target=target,
        instruction="exponential",
        rule="target",
        received=target,
        allowed="NeuronCore-v4",
    )


# ---------------------------------------------------------------------------------------------------
# The registers by themselves


def accumulating(body):
    """Run `body(call, step)` inside a kernel; `step(engine, command, values, ...)` accumulates on lanes 32..35."""

    def kernel():
        call, dst = Call("probe"), tile((64, 4))[32:36]

        def step(engine, command, values=None, op="add", **kwargs):
            data = None if values is None else np.asarray(values, np.float32)
            return accumulate(call, engine, command, dst, data, ALU[op], **kwargs)

        body(call, step)

    run(kernel)


ROWS = np.arange(12, dtype=np.float32).reshape(4, 3) + 1


@pytest.mark.parametrize(
    ("op", "once", "twice"),
    [
        ("add", ROWS.sum(1), 2 * ROWS.sum(1)),
        ("multiply", ROWS.prod(1), ROWS.prod(1) ** 2),
        ("maximum", ROWS.max(1), ROWS.max(1)),
        ("minimum", ROWS.min(1), ROWS.min(1)),
    ],
)
@pytest.mark.parametrize("engine", [Engine.vector, Engine.scalar])
def test_reset_stores_the_identity_of_the_reduction(op, once, twice, engine):
    def body(call, step):
        for _ in range(2):
            np.testing.assert_array_equal(step(engine, RESET_REDUCE, ROWS, op), once.reshape(4, 1))
        np.testing.assert_array_equal(step(engine, REDUCE, ROWS, op), twice.reshape(4, 1))

    accumulating(body)


def test_reset_alone_ignores_the_values():
    def body(call, step):
        np.testing.assert_array_equal(step(Engine.scalar, RESET, ROWS), np.zeros((4, 1)))
        np.testing.assert_array_equal(step(Engine.scalar, REDUCE, ROWS), ROWS.sum(1, keepdims=True))

    accumulating(body)


def test_the_engines_have_registers_of_their_own():
    def body(call, step):
        step(Engine.scalar, RESET_REDUCE, ROWS)
        step(Engine.vector, RESET_REDUCE, 2 * ROWS)
        np.testing.assert_array_equal(step(Engine.scalar, REDUCE, ROWS), 2 * ROWS.sum(1, keepdims=True))
        np.testing.assert_array_equal(step(Engine.vector, REDUCE, ROWS), 3 * ROWS.sum(1, keepdims=True))
        core = current_core("probe")
        assert core.accumulators.vector.values.shape == core.accumulators.scalar.values.shape == (128,)
        np.testing.assert_array_equal(core.accumulators.scalar.values[32:36], 2 * ROWS.sum(1))

    accumulating(body)


def test_idle_keeps_the_scalar_registers_and_loses_the_vector_ones():
    def body(call, step):
        for engine in (Engine.scalar, Engine.vector):
            assert step(engine, IDLE) is None
            step(engine, RESET_REDUCE, ROWS)
        np.testing.assert_array_equal(step(Engine.scalar, IDLE), ROWS.sum(1, keepdims=True))
        np.testing.assert_array_equal(step(Engine.scalar, REDUCE, ROWS), 2 * ROWS.sum(1, keepdims=True))
        assert step(Engine.vector, IDLE) is None
        with pytest.raises(NkiError, match="undefined accumulator registers"):
            step(Engine.vector, REDUCE, ROWS)

    accumulating(body)


def test_reading_out_registers_that_were_never_reset_is_refused():
    def body(call, step):
        with pytest.raises(
            NkiError, match=r"probe.reduce_res: undefined accumulator registers: received reduce_cmd is idle"
        ):
            step(Engine.scalar, IDLE, result=tile((4, 1)))

    accumulating(body)


def test_running_results_start_from_the_registers():
    def kernel():
        call, dst = Call("probe"), tile((4, 4))
        start = start_values(call, Engine.vector, LOAD_REDUCE, dst, ALU["add"], np.float32([[1], [2], [3], [4]]))
        np.testing.assert_array_equal(start, np.float32([[1], [2], [3], [4]]))
        store_registers(call, Engine.vector, dst, 2 * start)
        again = start_values(call, Engine.vector, REDUCE, dst, ALU["add"])
        np.testing.assert_array_equal(again, 2 * start)
        again += 1
        np.testing.assert_array_equal(start_values(call, Engine.vector, REDUCE, dst, ALU["add"]), 2 * start)

    run(kernel)


def test_commands_of_the_scalar_engine():
    def kernel():
        call = Call("probe")
        for command in SCALAR_COMMANDS:
            check_command(call, command, SCALAR_COMMANDS)
        with pytest.raises(NkiError, match=r"probe.reduce_cmd: value: received load_reduce"):
            check_command(call, LOAD_REDUCE, SCALAR_COMMANDS)

    run(kernel)
