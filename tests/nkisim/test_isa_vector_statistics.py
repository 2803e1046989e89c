"""bn_stats and bn_aggr."""

from __future__ import annotations

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import normal, out, ps, refused, run, sb, tile, traced
from tests.nkisim.reduce_kernels import bf16, f32, only


def stats(x):
    dst = tile((x.shape[0], 6))
    nisa.bn_stats(dst, sb(x))
    return out(dst)


@pytest.mark.parametrize("dtype", [f32, bf16, np.int16])
@pytest.mark.parametrize("count", [1, 2, 7, 512])
def test_bn_stats(count, dtype):
    x = (normal(5, count, seed=count) * 10).astype(dtype)
    got = run(stats, x)
    wide = x.astype(np.float64)
    for parity in (0, 1):
        half = wide[:, parity::2]
        n = half.shape[1]
        mean = half.mean(axis=1) if n else np.zeros(5)
        scatter = ((half - mean[:, None]) ** 2).sum(axis=1)
        assert got[:, 3 * parity].tolist() == [n] * 5
        np.testing.assert_allclose(got[:, 3 * parity + 1], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got[:, 3 * parity + 2], scatter, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("place", [sb, ps])
def test_bn_aggr_merges_unequal_tiles(place):
    x = normal(6, 700, seed=4) * 3 + 50

    def kernel(x):
        data, many, dst = place(x), tile((6, 2, 6)), tile((6, 2))
        nisa.bn_stats(many[:, 0, :], data[:, 0:512])
        nisa.bn_stats(many[:, 1, :], data[:, 512:700])
        nisa.bn_aggr(dst, many)
        return out(dst)

    got = run(kernel, x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(got[:, 0], wide.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], wide.var(axis=1), rtol=1e-5)


def test_bn_aggr_by_hand_and_rounded():
    # Two elements of mean 1 (variance * count 2), six of mean 5 (0): mean 4, variance (2 + 2*9 + 6*1) / 8.
    x = np.array([[2, 1, 2, 6, 5, 0]], f32)

    def kernel(x):
        dst, narrow = tile((1, 2)), tile((1, 2), nl.bfloat16)
        data = sb(x)
        nisa.bn_aggr(dst, data)
        nisa.bn_aggr(narrow, data)
        return out(dst), out(narrow)

    dst, narrow = run(kernel, x)
    assert dst.tolist() == [[4.0, 3.25]]
    assert narrow.astype(f32).tolist() == [[4.0, 3.25]]


def test_bn_records():
    def kernel(x):
        six, two = tile((4, 6)), tile((4, 2))
        nisa.bn_stats(six, sb(x))
        nisa.bn_aggr(two, six)

    trace = traced(kernel, normal(4, 6))
    assert only(trace, "bn_stats").attrs == {}
    assert only(trace, "bn_aggr").attrs == {}


@pytest.mark.parametrize(
    ("instruction", "shape", "dst", "operand", "rule", "received", "allowed"),
    [
        ("bn_stats", (2, 513), (2, 6), "data", "elements per partition", "513", "512"),
        ("bn_stats", (2, 8), (2, 5), "dst", "elements per partition", "5", "6"),
        ("bn_stats", (2, 8), (1, 6), "dst", "partitions", "1", "2"),
        ("bn_aggr", (2, 8), (2, 2), "data", "elements per partition", "8", "multiple of 3"),
        ("bn_aggr", (2, 9), (2, 3), "dst", "elements per partition", "3", "2"),
        ("bn_aggr", (2, 9), (3, 2), "dst", "partitions", "3", "2"),
    ],
)
def test_bn_refusals(instruction, shape, dst, operand, rule, received, allowed):
    def kernel(x):
        getattr(nisa, instruction)(tile(dst), sb(x))

    refused(
        kernel,
        np.ones(shape, f32),
        instruction=instruction,
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )
