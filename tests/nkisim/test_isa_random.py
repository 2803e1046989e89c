"""Random instructions: the generator word for word, distributions, determinism, state, and every rule."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced

bf16 = ml_dtypes.bfloat16
f32 = np.float32
MASK = 0xFFFFFFFF
VECTOR, GPSIMD = nisa.engine.vector, nisa.engine.gpsimd


def xorwow(state: Any, count: int) -> tuple[list[int], list[int]]:
    """Marsaglia's generator in plain integers: `count` words, and the state after them."""
    x, y, z, w, v, d = (int(s) for s in state)
    words = []
    for _ in range(count):
        t = x ^ (x >> 2)
        x, y, z, w = y, z, w, v
        v = (v ^ (v << 4) ^ t ^ (t << 1)) & MASK
        d = (d + 362437) & MASK
        words.append((d + v) & MASK)
    return words, [x, y, z, w, v, d]


MARSAGLIA = [123456789, 362436069, 521288629, 88675123, 5783321, 6615241]


def seeds(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 2**32, shape, dtype=np.uint32)


def stated(count: int, dtype: Any = nl.uint32, engine: Any = GPSIMD) -> Any:
    """A kernel that sets the state, draws `count` elements and returns them and the state after."""

    def kernel(s):
        nisa.rand_set_state(sb(s), engine)
        dst, state = tile((s.shape[0], count), dtype), tile(s.shape, nl.uint32)
        nisa.rng(dst, engine)
        nisa.rand_get_state(state, engine)
        return out(dst), out(state)

    return kernel


def test_reference_is_marsaglias():
    # The first outputs of the generator as published, from its published starting state.
    assert xorwow(MARSAGLIA, 3)[0] == [246875399, 3690007200, 1264581005]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 11, 100])
def test_gpsimd_draws_are_xorwow(count):
    s = seeds(7, 6)
    s[0] = MARSAGLIA
    words, state = run(stated(count), s)
    for p in range(7):
        want, after = xorwow(s[p], count)
        assert words[p].tolist() == want
        assert state[p].tolist() == after


@pytest.mark.parametrize("count", [1, 4, 5, 8, 23])
def test_vector_draws_interleave_four_states_on_trn3(count):
    s = seeds(3, 24, seed=1)
    words, state = run(stated(count, engine=VECTOR), s, target="trn3")
    steps = -(-count // 4)
    for p in range(3):
        streams = [xorwow(s[p, 6 * k : 6 * k + 6], steps) for k in range(4)]
        assert words[p].tolist() == [streams[i % 4][0][i // 4] for i in range(count)]
        assert state[p].tolist() == [word for _, after in streams for word in after]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_rng_keeps_the_low_bits(dtype):
    s = seeds(4, 6, seed=2)
    got, _ = run(stated(50, dtype), s)
    words = np.array([xorwow(row, 50)[0] for row in s], np.uint32)
    np.testing.assert_array_equal(got, words.astype(f"u{np.dtype(dtype).itemsize}").view(dtype))


def test_state_round_trip_continues_the_stream():
    s = seeds(5, 6, seed=3)

    def kernel(s):
        nisa.rand_set_state(sb(s))
        state = tile((5, 6), nl.uint32)
        first, second, again = (tile((5, 2, 10), nl.uint32) for _ in range(3))
        nisa.rng(first, GPSIMD)
        nisa.rand_get_state(state)
        nisa.rng(second, GPSIMD)
        nisa.rand_set_state(state)
        nisa.rng(again, GPSIMD)
        return out(first), out(second), out(again)

    first, second, again = run(kernel, s)
    np.testing.assert_array_equal(second, again)
    words = [xorwow(row, 40)[0] for row in s]
    np.testing.assert_array_equal(np.concatenate((first, second), axis=1).reshape(5, 40), words)


def test_lanes_are_partitions():
    s = seeds(128, 6, seed=4)

    def kernel(s):
        nisa.rand_set_state(sb(s))
        upper = tile((128, 3), nl.uint32)
        nisa.memset(upper, 0)
        nisa.rng(upper[64:96], GPSIMD)
        nisa.rand_set_state(sb(s)[32:64])
        after = tile((128, 6), nl.uint32)
        nisa.rand_get_state(after)
        return out(upper), out(after)

    drawn, after = run(kernel, s)
    np.testing.assert_array_equal(drawn[64:96], [xorwow(row, 3)[0] for row in s[64:96]])
    assert not drawn[:64].any()
    want = s.copy()
    want[64:96] = [xorwow(row, 3)[1] for row in s[64:96]]
    np.testing.assert_array_equal(after, want)


def test_vector_and_gpsimd_generators_are_separate():
    s = seeds(4, 6, seed=5)

    def kernel(s, seed):
        nisa.set_rng_seed(sb(seed))
        nisa.rand_set_state(sb(s))
        a, b, c, state = (tile((4, 6), nl.uint32) for _ in range(4))
        nisa.rng(a)
        nisa.rand_get_state(state)
        nisa.rng(b, GPSIMD)
        nisa.set_rng_seed(sb(seed))
        nisa.rng(c, VECTOR)
        return out(a), out(state), out(b), out(c)

    a, state, b, c = run(kernel, s, np.array([[11]], np.int32))
    np.testing.assert_array_equal(state, s)
    np.testing.assert_array_equal(a, c)
    assert not np.array_equal(a, b)


def seeded(seed: Any, count: int = 64) -> Any:
    def kernel(seed):
        nisa.set_rng_seed(sb(seed))
        dst = tile((128, count), nl.uint32)
        nisa.rng(dst)
        return out(dst)

    return kernel, np.asarray(seed).reshape(1, 1)


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_same_seed_same_numbers_and_lanes_differ(target):
    kernel, one = seeded(np.int32(1))
    a, b = run(kernel, one, target=target), run(kernel, one, target=target)
    np.testing.assert_array_equal(a, b)
    other = run(kernel, np.array([[2]], np.int32), target=target)
    assert (a != other).mean() > 0.99
    assert len({row.tobytes() for row in a}) == 128
    # The value's bits are the seed, whatever 32-bit type they come in.
    for bits in (np.array([[1]], np.uint32), np.array([[1]], np.uint32).view(f32)):
        np.testing.assert_array_equal(run(kernel, bits, target=target), a)


def test_seed_in_psum():
    kernel, one = seeded(np.int32(9), 4)

    def from_psum(seed):
        nisa.set_rng_seed(ps(seed))
        dst = tile((128, 4), nl.uint32, nl.psum)
        nisa.rng(dst)
        return out(dst)

    np.testing.assert_array_equal(run(from_psum, one), run(kernel, one))


def test_unseeded_generators_start_alike_in_every_run():
    def kernel(x):
        a, b = tile((16, 8), nl.uint32), tile((16, 8), nl.uint32)
        nisa.rng(a)
        nisa.rng(b, GPSIMD)
        return out(a), out(b)

    x = np.zeros((1, 1), f32)
    a, b = run(kernel, x)
    again = run(kernel, x)
    np.testing.assert_array_equal(a, again[0])
    np.testing.assert_array_equal(b, again[1])
    assert (a != b).all()


def test_two_cores_draw_different_numbers():
    import nkisim

    def kernel(x):
        o = nl.ndarray((2, 4, 8), nl.uint32, buffer=nl.shared_hbm)
        dst = tile((4, 8), nl.uint32)
        nisa.rng(dst)
        nisa.dma_copy(dst=o[nl.program_id(0)], src=dst)
        return o

    got = nkisim.simulate(nkisim.jit(kernel)[2], target="trn2")(np.zeros((1, 1), f32))
    assert (got[0] != got[1]).all()


@pytest.mark.parametrize("engine", [VECTOR, GPSIMD])
def test_bits_are_uniform_and_independent(engine):
    def kernel(x):
        dst = tile((128, 512), nl.uint32)
        nisa.rng(dst, engine)
        return out(dst)

    words = run(kernel, np.zeros((1, 1), f32))
    n = words.size
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    # Each of the 32 bits is one half of the time set: 5 standard deviations.
    assert np.abs(bits.mean(axis=(0, 1)) - 0.5).max() < 5 * 0.5 / np.sqrt(n)
    counts = np.bincount((words >> np.uint32(24)).ravel(), minlength=256)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert 255 - 5 * np.sqrt(510) < chi2 < 255 + 5 * np.sqrt(510)
    u = words / 2**32 - 0.5
    for lagged in ((u[:, 1:] * u[:, :-1]), (u[1:] * u[:-1])):
        assert abs(lagged.mean() * 12) < 5 / np.sqrt(lagged.size)


# ---------------------------------------------------------------------------------------------------
# rand2


def uniform(low: Any, high: Any, dtype: Any = nl.float32, shape: tuple[int, ...] = (128, 512)) -> Any:
    def kernel(x):
        dst = tile(shape, dtype)
        nisa.rand2(dst, low, high)
        return out(dst)

    return kernel


NONE = np.zeros((1, 1), f32)


def test_rand2_is_uniform():
    y = run(uniform(-1.0, 3.0), NONE, target="trn3").astype(np.float64)
    n = y.size
    assert y.min() >= -1.0
    assert y.max() <= 3.0
    assert y.min() < -0.999
    assert y.max() > 2.999
    assert abs(y.mean() - 1.0) < 5 * np.sqrt(16 / 12 / n)
    assert abs(y.var() - 16 / 12) < 0.02
    ranks = (np.sort(y.ravel()) + 1.0) / 4.0
    assert np.abs(ranks - (np.arange(n) + 0.5) / n).max() < 2.0 / np.sqrt(n)


def test_rand2_words():
    # Exactly the top 24 bits of the four states' words.
    s = seeds(2, 24, seed=7)

    def kernel(s):
        nisa.rand_set_state(sb(s), VECTOR)
        dst = tile((2, 9), buffer=nl.psum)
        nisa.rand2(dst, 0, 1)
        return out(dst)

    got = run(kernel, s, target="trn3")
    for p in range(2):
        streams = [xorwow(s[p, 6 * k : 6 * k + 6], 3)[0] for k in range(4)]
        assert got[p].tolist() == [(streams[i % 4][i // 4] >> 8) / 2**24 for i in range(9)]


def test_rand2_columns_and_integers():
    low, high = np.array([[0.0], [-5.0]], f32), np.array([[1.0], [300.0]], f32)

    def kernel(low, high):
        a, b, c = tile((2, 4000)), tile((2, 4000), nl.uint8), tile((2, 4000), nl.bfloat16)
        lower, upper = sb(low), ps(high)
        for dst in (a, b, c):
            nisa.rand2(dst, lower, upper)
        return out(a), out(b), out(c)

    a, b, c = run(kernel, low, high, target="trn3")
    assert np.all((a >= low) & (a <= high))
    assert a[1].max() > 290
    assert set(b[0]) == {0, 1}
    assert b[1].max() == 255  # saturated
    assert b[1].min() == 0
    assert np.all((c.astype(f32) >= low) & (c.astype(f32) <= high))


def test_rand2_stays_below_its_maximum():
    y = run(uniform(1.0, np.nextafter(f32(1), f32(2)), shape=(4, 300)), NONE, target="trn3")
    assert set(y.ravel().tolist()) <= {1.0, float(np.nextafter(f32(1), f32(2)))}


@pytest.mark.parametrize(
    ("low", "high", "dtype", "target", "operand", "rule", "received", "allowed"),
    [
        (0.0, 1.0, "float32", "trn2", "", "target", "trn2", "NeuronCore-v4"),
        (1.0, 1.0, "float32", "trn3", "max", "range", "min 1.0, max 1.0", "min < max"),
        (2.0, 1.0, "float32", "trn3", "max", "range", "min 2.0, max 1.0", "min < max"),
        (float("nan"), 1.0, "float32", "trn3", "max", "range", "min nan", "min < max"),
        (0.0, 1.0, "bool_", "trn3", "dst", "dtype", "bool_", "float8_e4m3, float8_e5m2"),
        (0.0, 1.0, "float8_e4m3fn", "trn3", "dst", "dtype", "float8_e4m3fn", "bfloat16"),
        (-3e38, 3e38, "float32", "trn3", "max", "range", "max 3", "within float32"),
        (None, 1.0, "float32", "trn3", "min", "type", "NoneType", "a number"),
        (0.0, "1", "float32", "trn3", "max", "type", "str", "a number"),
    ],
)
def test_rand2_refusals(low, high, dtype, target, operand, rule, received, allowed):
    def kernel(x):
        nisa.rand2(tile((2, 4), getattr(nl, dtype)), low, high)

    refused(
        kernel,
        NONE,
        instruction="rand2",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target=target,
    )


# ---------------------------------------------------------------------------------------------------
# dropout


def dropped(prob: Any, place: Any = sb) -> Any:
    def kernel(x, p):
        dst = tile(x.shape, x.dtype)
        nisa.dropout(dst, place(x), sb(p) if prob is None else prob)
        return out(dst)

    return kernel


@pytest.mark.parametrize("dtype", [f32, bf16, np.float16, np.int32, np.uint8, np.bool_, ml_dtypes.float8_e5m2])
def test_dropout_keeps_bits_at_zero_and_clears_all_at_one(dtype):
    # Integers above 2^24 must not pass through float32.
    x = integers(4, 40, low=0, high=2**31 - 1 if dtype is np.int32 else 250, seed=1).astype(dtype)
    got = run(dropped(0.0), x, NONE)
    assert got.tobytes() == x.tobytes()
    assert not run(dropped(1.0), x, NONE).any()
    half = run(dropped(0.5), x, NONE)
    assert np.all((half == x) | (half == 0))


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_dropout_rate(target):
    x = np.ones((128, 400), f32)
    got = run(dropped(0.3, ps), x, NONE, target=target)
    assert set(np.unique(got)) == {0.0, 1.0}
    n = x.size
    assert abs((got == 0).mean() - 0.3) < 5 * np.sqrt(0.21 / n)
    assert (got[0] != got[1]).any()


@pytest.mark.parametrize(("data", "prob"), [(f32, f32), (bf16, bf16), (np.float16, f32), (np.int16, f32)])
def test_dropout_probability_per_partition(data, prob):
    x = np.ones((4, 4000), data)
    p = np.array([[0.0], [0.25], [0.75], [1.0]], prob)
    rate = (run(dropped(None), x, p) == 0).mean(axis=1)
    assert rate[0] == 0.0
    assert rate[3] == 1.0
    assert abs(rate[1] - 0.25) < 0.04
    assert abs(rate[2] - 0.75) < 0.04


def test_dropout_is_seeded_and_works_in_place():
    x = normal(8, 30)

    def kernel(x, seed):
        a, b = sb(x), tile((8, 30))
        nisa.set_rng_seed(sb(seed))
        nisa.dropout(b, a, 0.5)
        nisa.set_rng_seed(sb(seed))
        nisa.dropout(a, a, 0.5)
        return out(a), out(b)

    a, b = run(kernel, x, np.array([[3]], np.int32))
    np.testing.assert_array_equal(a, b)
    assert (a == 0).any()
    assert (a == x).any()


def test_a_draw_of_zero_is_kept_at_probability_zero():
    # A state of zeros whose counter is one step before zero draws the word 0.
    s = np.zeros((1, 24), np.uint32)
    s[0, 5::6] = 2**32 - 362437

    def kernel(s):
        nisa.rand_set_state(sb(s), VECTOR)
        words, kept = tile((1, 4), nl.uint32), tile((1, 4))
        nisa.rng(words)
        nisa.rand_set_state(sb(s), VECTOR)
        nisa.memset(kept, 1.0)
        nisa.dropout(kept, kept, 0.0)
        return out(words), out(kept)

    words, kept = run(kernel, s, target="trn3")
    assert words.tolist() == [[0, 0, 0, 0]]
    assert kept.tolist() == [[1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("data", "dst", "prob", "operand", "rule", "received", "allowed"),
    [
        ("float32", ((2, 4), "bfloat16"), 0.5, "dst", "dtype", "bfloat16", "float32"),
        ("float32", ((2, 3), "float32"), 0.5, "data", "elements per partition", "4", "3"),
        ("float32", ((1, 4), "float32"), 0.5, "data", "partitions", "2", "1"),
        ("float32", ((2, 4), "float32"), 1.5, "prob", "value", "1.5", "0..1"),
        ("float32", ((2, 4), "float32"), -0.1, "prob", "value", "-0.1", "0..1"),
        ("float32", ((2, 4), "float32"), float("nan"), "prob", "value", "nan", "0..1"),
        ("float32", ((2, 4), "float32"), None, "prob", "type", "NoneType", "a number"),
        ("float32", ((2, 4), "float32"), ((2, 1), "int32"), "prob", "dtype", "int32", "float16"),
        ("float32", ((2, 4), "float32"), ((2, 4), "float32"), "prob", "shape", "[2, 4]", "[2, 1]"),
        ("int32", ((2, 4), "int32"), ((2, 1), "bfloat16"), "prob", "dtype", "bfloat16", "float32"),
    ],
)
def test_dropout_refusals(data, dst, prob, operand, rule, received, allowed):
    def kernel(x):
        rate = prob
        if isinstance(prob, tuple):
            rate = tile(prob[0], getattr(nl, prob[1]))
            nisa.memset(rate, 0)
        nisa.dropout(tile(dst[0], getattr(nl, dst[1])), sb(x, getattr(nl, data)), rate)

    refused(
        kernel,
        np.ones((2, 4), f32),
        instruction="dropout",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


# ---------------------------------------------------------------------------------------------------
# Records and the remaining rules


def test_records():
    def kernel(s, seed):
        a, b, c = tile((4, 8), nl.uint32), tile((4, 8)), tile((4, 24), nl.uint32, nl.psum)
        nisa.set_rng_seed(sb(seed))
        nisa.rng(a)
        nisa.rng(a, GPSIMD)
        nisa.rand2(b, 0.0, 1.0)
        nisa.dropout(b, b, 0.5)
        nisa.rand_set_state(sb(s[:, 0:6]))
        nisa.rand_set_state(sb(s), VECTOR)
        nisa.rand_get_state(a[:, 0:6])
        nisa.rand_get_state(c, VECTOR)

    trace = traced(kernel, seeds(4, 24), np.array([[1]], np.int32), target="trn3")
    got = [(r.instruction, r.engine) for r in trace.records if r.instruction != "dma_copy"]
    assert got == [
        ("set_rng_seed", Engine.vector),
        ("rng", Engine.vector),
        ("rng", Engine.gpsimd),
        ("rand2", Engine.vector),
        ("dropout", Engine.vector),
        ("rand_set_state", Engine.gpsimd),
        ("rand_set_state", Engine.vector),
        ("rand_get_state", Engine.gpsimd),
        ("rand_get_state", Engine.vector),
    ]


def test_rng_refusals():
    def engine(x):
        nisa.rng(tile((2, 4), nl.uint32), nisa.engine.unknown)

    def not_an_engine(x):
        nisa.rng(tile((2, 4), nl.uint32), "vector")

    def gpsimd(x):
        nisa.rng(tile((2, 4), nl.uint32), GPSIMD)

    def psum(x):
        nisa.rng(tile((2, 4), nl.uint32, nl.psum), GPSIMD)

    def floats(x):
        nisa.rng(tile((2, 4)))

    for kernel, operand, rule, received, allowed, target in (
        (engine, "engine", "value", "unknown", "vector or gpsimd", "trn2"),
        (not_an_engine, "engine", "type", "'vector'", "member of nki.isa.engine", "trn2"),
        (gpsimd, "engine", "gpsimd on target", "trn1", "vector", "trn1"),
        (psum, "dst", "PSUM", "psum", "sbuf", "trn2"),
        (floats, "dst", "dtype", "float32", "int8, int16", "trn2"),
    ):
        refused(
            kernel,
            NONE,
            instruction="rng",
            operand=operand,
            rule=rule,
            received=received,
            allowed=allowed,
            target=target,
        )


@pytest.mark.parametrize(
    ("shape", "dtype", "operand", "rule", "received", "allowed"),
    [
        ((1, 2), np.int32, "src_seeds", "shape", "[1, 2]", "[1, 1]"),
        ((2, 1), np.int32, "src_seeds", "shape", "[2, 1]", "[1, 1]"),
        ((1, 1), np.int16, "src_seeds", "dtype", "int16", "int32, uint32, float32"),
    ],
)
def test_seed_refusals(shape, dtype, operand, rule, received, allowed):
    def kernel(x):
        nisa.set_rng_seed(sb(x))

    refused(
        kernel,
        np.ones(shape, dtype),
        instruction="set_rng_seed",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


@pytest.mark.parametrize("instruction", ["rand_set_state", "rand_get_state"])
@pytest.mark.parametrize(
    ("shape", "dtype", "buffer", "engine", "target", "operand", "rule", "received", "allowed"),
    [
        ((4, 6), "uint32", "sbuf", "gpsimd", "trn1", "", "target", "trn1", "NeuronCore-v3"),
        ((4, 24), "uint32", "sbuf", "vector", "trn2", "engine", "vector on target", "trn2", "gpsimd"),
        ((4, 6), "uint32", "sbuf", "unknown", "trn3", "engine", "value", "unknown", "gpsimd or vector"),
        ((4, 24), "uint32", "sbuf", "gpsimd", "trn3", "tile", "shape on gpsimd", "[4, 24]", "[P, 6]"),
        ((4, 6), "uint32", "sbuf", "vector", "trn3", "tile", "shape on vector", "[4, 6]", "[P, 24]"),
        ((4, 6, 4), "uint32", "sbuf", "vector", "trn3", "tile", "shape on vector", "[4, 6, 4]", "[P, 24]"),
        ((4, 6), "int32", "sbuf", "gpsimd", "trn2", "tile", "dtype", "int32", "uint32"),
        ((4, 6), "uint32", "psum", "gpsimd", "trn2", "tile", "buffer", "psum", "sbuf"),
    ],
)
def test_state_refusals(instruction, shape, dtype, buffer, engine, target, operand, rule, received, allowed):
    def kernel(x):
        t = tile(shape, getattr(nl, dtype), getattr(nl, buffer))
        nisa.memset(t, 1)
        getattr(nisa, instruction)(t, getattr(nisa.engine, engine))

    if operand == "tile":
        operand = "src_seeds" if instruction == "rand_set_state" else "dst"
    refused(
        kernel,
        NONE,
        instruction=instruction,
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target=target,
    )


def test_state_from_psum_is_refused_on_the_vector_engine_too():
    def kernel(x):
        t = tile((4, 24), nl.uint32, nl.psum)
        nisa.memset(t, 1)
        nisa.rand_set_state(t, VECTOR)

    refused(
        kernel,
        NONE,
        instruction="rand_set_state",
        operand="src_seeds",
        rule="buffer",
        received="psum",
        allowed="sbuf",
        target="trn3",
    )
