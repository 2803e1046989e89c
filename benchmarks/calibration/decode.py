"""Decode attention with the instruction mix of nki-samples' first contributed decode kernel (PR 129 and 133).

Per tile of 128 keys and KV head: 2 loads, 4 Tensor Engine instructions, 2 exp, 17 Vector Engine instructions, each
needing the one before. Written from that list; `contributed/decode_attention.py` computes the same with fewer.
"""

from __future__ import annotations

from typing import Any

from benchmarks.calibration._model import modelled, zeros
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.latency import Estimate

TILE = 128


def _tile(rows: int, columns: int, buffer: Any = nl.sbuf) -> Any:
    return nl.ndarray((rows, columns), dtype=nl.float32, buffer=buffer)


def _load(x: Any) -> Any:
    tile = _tile(*x.shape)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def _evicted(psum: Any) -> Any:
    tile = _tile(*psum.shape)
    nisa.tensor_copy(dst=tile, src=psum)
    return tile


def _matmul(stationary: Any, moving: Any) -> Any:
    psum = _tile(stationary.shape[1], moving.shape[1], nl.psum)
    nisa.nc_matmul(dst=psum, stationary=stationary, moving=moving)
    return psum


def _transposed(x: Any) -> Any:
    psum = _tile(x.shape[1], x.shape[0], nl.psum)
    nisa.nc_transpose(dst=psum, data=x)
    return _evicted(psum)


def _scalar(x: Any, op: Any, operand: Any) -> Any:
    tile = _tile(*x.shape)
    nisa.tensor_scalar(dst=tile, data=x, op0=op, operand0=operand)
    return tile


def _pair(a: Any, b: Any, op: Any) -> Any:
    tile = _tile(*a.shape)
    nisa.tensor_tensor(dst=tile, data1=a, data2=b, op=op)
    return tile


def _row(x: Any, op: Any) -> Any:
    tile = _tile(x.shape[0], 1)
    nisa.tensor_reduce(dst=tile, op=op, data=x, axis=1)
    return tile


def _exp(x: Any) -> Any:
    tile = _tile(*x.shape)
    nisa.activation(dst=tile, op=nl.exp, data=x)
    return tile


def _filled(rows: int, columns: int, value: float) -> Any:
    tile = _tile(rows, columns)
    nisa.memset(dst=tile, value=value)
    return tile


def published_mix(q, k, v):
    """o of q [d, n_q_heads] and d-major caches k, v [n_kv_heads, d, seqlen_kv]."""
    d, n_q_heads = q.shape
    n_kv_heads, _, seqlen_kv = k.shape
    group = n_q_heads // n_kv_heads
    o = nl.ndarray((n_q_heads, d), dtype=q.dtype, buffer=nl.shared_hbm)
    for head in range(n_kv_heads):
        rows = slice(head * group, (head + 1) * group)
        q_sb = _load(q[:, rows])
        m, acc, l = _filled(group, 1, -3.0e38), _filled(group, d, 0.0), _filled(group, 1, 0.0)
        for start in range(0, seqlen_kv, TILE):
            keys = slice(start, start + TILE)
            k_sb, v_sb = _load(k[head, :, keys]), _load(v[head, :, keys])
            s = _scalar(_evicted(_matmul(q_sb, k_sb)), nl.multiply, d**-0.5)
            m_new = _pair(m, _row(s, nl.maximum), nl.maximum)
            rebase = _exp(_scalar(m, nl.subtract, m_new))
            p = _exp(_scalar(s, nl.subtract, m_new))
            l_tile = _row(p, nl.add)
            l_new = _pair(_scalar(l, nl.multiply, rebase), l_tile, nl.add)
            p_t, v_t = _transposed(p), _transposed(v_sb)
            pv = _evicted(_matmul(p_t, v_t))
            acc_new = _pair(_scalar(acc, nl.multiply, rebase), pv, nl.add)
            for old, new in ((m, m_new), (l, l_new), (acc, acc_new)):
                nisa.tensor_copy(dst=old, src=new)
        inverse = _tile(group, 1)
        nisa.reciprocal(dst=inverse, data=l)
        nisa.dma_copy(dst=o[rows], src=_scalar(acc, nl.multiply, inverse))
    return o


N_Q_HEADS, N_KV_HEADS, HEAD_DIM, SEQLEN_KV = 8, 2, 128, 512


def _inputs() -> tuple[Any, Any, Any]:
    cache = zeros(N_KV_HEADS, HEAD_DIM, SEQLEN_KV)
    return zeros(HEAD_DIM, N_Q_HEADS), cache, cache


def published() -> Estimate:
    """The estimate of the benchmark that PR 133 reports: 8 query heads, 2 KV heads, 512 keys, float32, inf2."""
    return modelled(published_mix, *_inputs(), target="inf2")


def contributed() -> Estimate:
    """The same problem by this project's teaching kernel."""
    from contributed.decode_attention import decode_attention_gqa_fwd

    return modelled(decode_attention_gqa_fwd, *_inputs(), N_Q_HEADS, N_KV_HEADS, target="inf2")
