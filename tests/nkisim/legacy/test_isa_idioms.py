"""The idioms of docs/porting.md: what stands in its two columns computes the same."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import nkisim
from nkisim import isa, language
from nkisim import legacy as nki
from tests.nkisim.legacy.isa_kernels import BF16, normal

nl, nisa = nki.language, nki.isa
A = normal(200, 96)  # rows in HBM; 200 is no multiple of 128
ROWS = np.random.default_rng(0).permutation(200)[:128].astype(np.int32)[:, None]
OFFSETS = np.array([[40, 3]], np.int32)


class Pair(SimpleNamespace):
    """One idiom: kernels of the same arguments in both APIs, their arrays, and the expected result."""


def result_old(a):
    out = nl.ndarray((128, 96), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    x = nl.load(a[0:128, :])
    y = nisa.activation(nl.exp, x, dtype=nl.bfloat16)
    nl.store(out, y)
    return out


def result_new(a):
    out = language.ndarray((128, 96), language.bfloat16, buffer=language.shared_hbm)
    x = language.ndarray((128, 96), a.dtype)
    isa.dma_copy(x, a[0:128, :])
    y = language.ndarray(x.shape, language.bfloat16)
    isa.activation(y, language.exp, x)
    isa.dma_copy(out, y)
    return out


def ragged_old(a):
    n, width = a.shape
    out = nl.ndarray((n, width), dtype=a.dtype, buffer=nl.shared_hbm)
    i_p, i_f = nl.arange(128)[:, None], nl.arange(width)[None, :]
    for i in nl.affine_range(2):
        mask = i * 128 + i_p < n
        x = nl.load(a[i * 128 + i_p, i_f], mask=mask)
        y = nisa.tensor_scalar(x[i_p, i_f], np.multiply, 2.0, mask=mask)
        nl.store(out[i * 128 + i_p, i_f], y, mask=mask)
    return out


def ragged_new(a):
    n, width = a.shape
    out = language.ndarray((n, width), a.dtype, buffer=language.shared_hbm)
    for i in range(2):
        p = min(128, n - i * 128)
        x = language.ndarray((128, width), a.dtype)
        isa.dma_copy(x[0:p, :], a[i * 128 : i * 128 + p, :])
        isa.tensor_scalar(x[0:p, :], x[0:p, :], language.multiply, 2.0)
        isa.dma_copy(out[i * 128 : i * 128 + p, :], x[0:p, :])
    return out


def matmul_old(a):
    out = nl.ndarray((96, 96), dtype=nl.float32, buffer=nl.shared_hbm)
    acc = nl.zeros((96, 96), nl.float32, buffer=nl.psum)
    for k in nl.affine_range(2):
        x = nl.load(a[nl.ds(k * 100, 100), :])
        acc[...] += nisa.nc_matmul(x, x)
    nl.store(out, nisa.tensor_copy(acc))
    return out


def matmul_new(a):
    out = language.ndarray((96, 96), language.float32, buffer=language.shared_hbm)
    acc = language.ndarray((96, 96), language.float32, buffer=language.psum)
    for k in range(2):
        x = language.ndarray((100, 96), a.dtype)
        isa.dma_copy(x, a[k * 100 : k * 100 + 100, :])
        isa.nc_matmul(acc, x, x, accumulate=k > 0)
    y = language.ndarray((96, 96), language.float32)
    isa.tensor_copy(y, acc)
    isa.dma_copy(out, y)
    return out


def transpose_old(a):
    out = nl.ndarray((96, 100), dtype=a.dtype, buffer=nl.shared_hbm)
    x = nl.load(a[0:100, :])
    t = nisa.nc_transpose(x)
    nl.store(out, nisa.tensor_copy(t))
    return out


def transpose_new(a):
    out = language.ndarray((96, 100), a.dtype, buffer=language.shared_hbm)
    x = language.ndarray((100, 96), a.dtype)
    isa.dma_copy(x, a[0:100, :])
    t = language.ndarray((96, 100), x.dtype, buffer=language.psum)
    isa.nc_transpose(t, x)
    y = language.ndarray((96, 100), x.dtype)
    isa.tensor_copy(y, t)
    isa.dma_copy(out, y)
    return out


def strided_old(a):
    out = nl.ndarray((128, 48), dtype=a.dtype, buffer=nl.shared_hbm)
    x = nl.load(a[0:128, :])
    i_p, i_f = nl.arange(128)[:, None], nl.arange(48)[None, :]
    y = nl.ndarray((128, 48), dtype=a.dtype)
    y[:, 0:48] = nisa.tensor_copy(x[i_p, 2 * i_f + 1])
    nl.store(out, y)
    return out


def strided_new(a):
    out = language.ndarray((128, 48), a.dtype, buffer=language.shared_hbm)
    x = language.ndarray((128, 96), a.dtype)
    isa.dma_copy(x, a[0:128, :])
    y = language.ndarray((128, 48), a.dtype)
    isa.tensor_copy(y[:, 0:48], x.ap([[96, 128], [2, 48]], offset=1))
    isa.dma_copy(out, y)
    return out


def gather_old(a, rows):
    out = nl.ndarray((128, 96), dtype=a.dtype, buffer=nl.shared_hbm)
    i_p, i_f = nl.arange(128)[:, None], nl.arange(96)[None, :]
    idx = nl.load(rows)
    nl.store(out, nl.load(a[idx[i_p, 0], i_f]))
    return out


def gather_new(a, rows):
    out = language.ndarray((128, 96), a.dtype, buffer=language.shared_hbm)
    idx = language.ndarray((128, 1), rows.dtype)
    isa.dma_copy(idx, rows)
    x = language.ndarray((128, 96), a.dtype)
    isa.dma_copy(x, a.vector_select(0, idx))
    isa.dma_copy(out, x)
    return out


def dynamic_old(a, offsets):
    out = nl.ndarray((128, 2, 20), dtype=a.dtype, buffer=nl.shared_hbm)
    x, off = nl.load(a[0:128, :]), nl.load(offsets)
    i_p, i_f = nl.mgrid[0:128, 0:20]
    y = nl.ndarray((128, 2, 20), dtype=a.dtype)
    for k in nl.affine_range(2):
        y[i_p, k, i_f] = nisa.tensor_copy_dynamic_src(x[i_p, off[0, k] + i_f])
    nl.store(out, y)
    return out


def dynamic_new(a, offsets):
    out = language.ndarray((128, 2, 20), a.dtype, buffer=language.shared_hbm)
    x, off = language.ndarray((128, 96), a.dtype), language.ndarray((1, 2), offsets.dtype)
    isa.dma_copy(x, a[0:128, :])
    isa.dma_copy(off, offsets)
    y = language.ndarray((128, 2, 20), a.dtype)
    for k in range(2):
        window = x.ap([[96, 128], [1, 20]], scalar_offset=off[0:1, k : k + 1], indirect_dim=1)
        isa.tensor_copy(y[:, k, :], window)
    isa.dma_copy(out, y)
    return out


def blocks_old(a):
    out = nl.ndarray((128, 96), dtype=nl.float32, buffer=nl.shared_hbm)
    t = nl.ndarray((2, nl.par_dim(128), 96), dtype=a.dtype)
    for i in nl.affine_range(2):
        t[i] = nl.load(a[nl.ds(i * 72, 128), :])
    nl.store(out, nisa.tensor_tensor(t[0], t[1], np.add))
    return out


def blocks_new(a):
    out = language.ndarray((128, 96), language.float32, buffer=language.shared_hbm)
    t = language.ndarray((128, 2, 96), a.dtype)
    for i in range(2):
        isa.dma_copy(t[:, i, :], a[i * 72 : i * 72 + 128, :])
    y = language.ndarray((128, 96), a.dtype)
    isa.tensor_tensor(y, t[:, 0, :], t[:, 1, :], language.add)
    isa.dma_copy(out, y)
    return out


def patterns_old():
    out = nl.ndarray((64, 40), dtype=nl.float32, buffer=nl.shared_hbm)
    i_p, i_f = nl.arange(64)[:, None], nl.arange(40)[None, :]
    t = nisa.iota(5 + 2 * i_p + i_f, dtype=nl.float32)
    nl.store(out, nisa.affine_select(pred=(i_f < i_p), on_true_tile=t, on_false_value=-1.0))
    return out


def patterns_new():
    out = language.ndarray((64, 40), language.float32, buffer=language.shared_hbm)
    t = language.ndarray((64, 40), language.float32)
    isa.iota(t, [[1, 40]], offset=5, channel_multiplier=2)
    y = language.ndarray((64, 40), language.float32)
    isa.affine_select(y, [[1, 40]], -1, t, -1.0, cmp_op=language.less)
    isa.dma_copy(out, y)
    return out


def pattern_result():
    p, f = np.mgrid[0:64, 0:40]
    return np.where(f < p, 5 + 2 * p + f, -1).astype(np.float32)


PAIRS = {
    "result": Pair(old=result_old, new=result_new, args=(A,), expected=np.exp(A[:128]).astype(BF16)),
    "ragged": Pair(old=ragged_old, new=ragged_new, args=(A,), expected=A * 2),
    "matmul": Pair(old=matmul_old, new=matmul_new, args=(A,), expected=A.astype(np.float64).T @ A),
    "transpose": Pair(old=transpose_old, new=transpose_new, args=(A,), expected=A[:100].T),
    "strided": Pair(old=strided_old, new=strided_new, args=(A,), expected=A[:128, 1::2]),
    "gather": Pair(old=gather_old, new=gather_new, args=(A, ROWS), expected=A[ROWS[:, 0]]),
    "dynamic": Pair(
        old=dynamic_old,
        new=dynamic_new,
        args=(A, OFFSETS),
        expected=np.stack([A[:128, s : s + 20] for s in OFFSETS[0]], axis=1),
    ),
    "blocks": Pair(old=blocks_old, new=blocks_new, args=(A,), expected=A[:128] + A[72:]),
    "patterns": Pair(old=patterns_old, new=patterns_new, args=(), expected=pattern_result()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_both_columns_compute_the_same(name):
    pair = PAIRS[name]
    old = nki.jit(pair.old, mode="simulation", platform_target="trn2")(*pair.args)
    new = nkisim.simulate(pair.new, target="trn2")(*pair.args)
    np.testing.assert_array_equal(old, new)
    np.testing.assert_allclose(
        old.astype(np.float64),
        np.asarray(pair.expected, np.float64),
        rtol=1e-5 if name == "matmul" else 1e-7,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", PAIRS)
def test_both_columns_are_the_same_instructions(name):
    pair = PAIRS[name]
    with nkisim.nki.recording() as found:
        nki.jit(pair.old, mode="simulation", platform_target="trn2")(*pair.args)
        nkisim.simulate(pair.new, target="trn2")(*pair.args)
    old, new = ([(r.instruction, r.engine) for r in found[f.__name__].records] for f in (pair.old, pair.new))
    assert old == new
