"""Decode attention, the teaching pair: one query token against a d-major KV cache.

Math      o[h] = softmax(softmax_scale * q[h] @ k[h // group].T) @ v[h // group]
Layouts   HBM in, d on the partition axis. `decode_attention_fwd`: q [d, 1], k and v [d, seqlen_kv], o [1, d].
          `decode_attention_gqa_fwd`: q [d, n_q_heads], k and v [n_kv_heads, d, seqlen_kv], o [n_q_heads, d].
Limits    d <= 128; n_q_heads a multiple of n_kv_heads; group <= 128; any seqlen_kv >= 1; q, k, v of one dtype:
          float32, bfloat16 or float16.
Engines   tensor: QK, PV, transposes against an identity; vector: max, sums, rescaling; scalar: exp;
          DMA: one K and one V tile per step and KV head.
Numerics  scores, max, sum and accumulator in float32; probabilities rounded to the input dtype before PV.
          A matmul against an identity transposes on every generation and lands in float32 PSUM, which is
          the only PSUM type Trainium1 and Inferentia2 have.
Memory    `decode_attention_fwd` keeps 4 bytes per partition for every 128 keys; `decode_attention_gqa_fwd` needs
          the same SBUF and PSUM for every seqlen_kv.
Oracle    reference/decode.py
Status    simulator: all CASES on trn1, trn2 and trn3. Hardware: not run.
Ladder    `decode_attention_fwd`: one head, all scores in one SBUF tile, keys on partitions, two passes over the
          cache. `decode_attention_gqa_fwd`: tiled online softmax, each K and V tile loaded once per group.

Run `python contributed/decode_attention.py` to check both against the oracle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from contributed._cases import DecodeCase
from contributed._checks import PARTITIONS, require, require_array, require_same_dtype, require_scale
from contributed._nki import nisa, nki, nl, simulate_kernel

# Finite, so that a transpose by matmul stays exact, and so low that exp(MASKED - max) is 0.
MASKED = -3.0e38

CASES = (
    DecodeCase("one-key", n_q_heads=1, n_kv_heads=1, head_dim=64, seqlen_kv=1),
    DecodeCase("one-tile", n_q_heads=1, n_kv_heads=1, head_dim=128, seqlen_kv=128),
    DecodeCase("off-the-edge", n_q_heads=1, n_kv_heads=1, head_dim=80, seqlen_kv=389),
    DecodeCase("one-head-4k", n_q_heads=1, n_kv_heads=1, head_dim=128, seqlen_kv=4096),
    DecodeCase("one-head-large", n_q_heads=1, n_kv_heads=1, head_dim=64, seqlen_kv=300, logits=1e4),
    DecodeCase("one-head-negative", n_q_heads=1, n_kv_heads=1, head_dim=64, seqlen_kv=300, logits=-1e5),
    DecodeCase("one-head-needles", n_q_heads=1, n_kv_heads=1, head_dim=128, seqlen_kv=300, needles=(0, 127, 128, 299)),
    DecodeCase("gqa-one-key", n_q_heads=8, n_kv_heads=2, head_dim=96, seqlen_kv=1),
    DecodeCase("gqa-off-the-edge", n_q_heads=6, n_kv_heads=2, head_dim=96, seqlen_kv=257),
    DecodeCase("gqa-large-logits", n_q_heads=8, n_kv_heads=2, head_dim=64, seqlen_kv=300, logits=1e4),
    DecodeCase("gqa-negative-logits", n_q_heads=8, n_kv_heads=2, head_dim=64, seqlen_kv=300, logits=-1e5),
    DecodeCase("gqa-needles", n_q_heads=8, n_kv_heads=2, head_dim=128, seqlen_kv=385, needles=(0, 127, 128, 384)),
    DecodeCase("gqa-4k", n_q_heads=8, n_kv_heads=2, head_dim=128, seqlen_kv=4096),
    DecodeCase("llama-3-8b-1k", n_q_heads=32, n_kv_heads=8, head_dim=128, seqlen_kv=1024),
    DecodeCase("qwen3-0.6b-512", n_q_heads=16, n_kv_heads=8, head_dim=128, seqlen_kv=512),
    DecodeCase("phi-3-mini-500", n_q_heads=32, n_kv_heads=32, head_dim=96, seqlen_kv=500),
    DecodeCase("multi-query-128", n_q_heads=128, n_kv_heads=1, head_dim=64, seqlen_kv=200),
)


@nki.jit
def decode_attention_fwd(q, k, v, softmax_scale=None):
    """o = softmax(softmax_scale * q.T @ k) @ v.T for one head.

    Args:
        q: [d, 1] in HBM.
        k: [d, seqlen_kv] in HBM.
        v: [d, seqlen_kv] in HBM.
        softmax_scale: multiplies q . k; None means d ** -0.5.

    Returns:
        o [1, d] in HBM, in q's dtype.
    """
    d, seqlen_kv = k.shape
    assert q.shape == (d, 1), f"q: received {q.shape}, allowed {(d, 1)}"
    assert v.shape == (d, seqlen_kv), f"v: received {v.shape}, allowed {(d, seqlen_kv)}"
    scale = d**-0.5 if softmax_scale == None else softmax_scale
    tile_kv = nl.tile_size.pmax
    n_tiles = (seqlen_kv + tile_kv - 1) // tile_kv

    o_hbm = nl.ndarray((1, d), dtype=q.dtype, buffer=nl.shared_hbm)
    identity = _identity(q.dtype)
    identity_f32 = _identity(nl.float32)
    q_sb = _load(q)

    # Scores, keys on partitions: column t holds keys t * tile_kv .. of the cache.
    s_sb = nl.ndarray((tile_kv, n_tiles), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=s_sb, value=MASKED)
    for i_tile in range(n_tiles):
        start, n = _tile(i_tile, tile_kv, seqlen_kv)
        k_sb = _load(k[:, start : start + n])
        s_ps = nl.ndarray((n, 1), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=s_ps, stationary=k_sb, moving=q_sb)
        nisa.tensor_scalar(dst=s_sb[0:n, i_tile : i_tile + 1], data=s_ps, op0=nl.multiply, operand0=scale)

    # Maximum: along the tiles, then across partitions through a transpose, then back to every partition.
    lane_max = nl.ndarray((tile_kv, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=lane_max, op=nl.maximum, data=s_sb, axis=1)
    row_ps = _transpose(lane_max, identity_f32)  # [1, tile_kv]
    neg_max = nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=neg_max, op=nl.maximum, data=row_ps, axis=1, negate=True)
    ones_row = _filled((1, tile_kv), 1.0)
    neg_max_ps = nl.ndarray((tile_kv, 1), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=neg_max_ps, stationary=ones_row, moving=neg_max)
    neg_max_all = nl.ndarray((tile_kv, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=neg_max_all, src=neg_max_ps)

    # All probabilities in one instruction; masked keys become exactly 0.
    p_sb = nl.ndarray((tile_kv, n_tiles), dtype=q.dtype, buffer=nl.sbuf)
    lane_sum = nl.ndarray((tile_kv, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(
        dst=p_sb,
        op=nl.exp,
        data=s_sb,
        bias=neg_max_all,
        reduce_op=nl.add,
        reduce_res=lane_sum,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    sum_ps = nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=sum_ps, stationary=lane_sum, moving=_filled((tile_kv, 1), 1.0))

    # o = p @ v.T, accumulated in PSUM over the tiles.
    o_ps = nl.ndarray((1, d), dtype=nl.float32, buffer=nl.psum)
    for i_tile in range(n_tiles):
        start, n = _tile(i_tile, tile_kv, seqlen_kv)
        vt_sb = _to_sbuf(_transpose(_load(v[:, start : start + n]), identity), q.dtype)  # [n, d]
        nisa.nc_matmul(dst=o_ps, stationary=p_sb[0:n, i_tile : i_tile + 1], moving=vt_sb, accumulate=(i_tile > 0))
    _store_normalised(o_hbm, o_ps, sum_ps)
    return o_hbm


@nki.jit
def decode_attention_gqa_fwd(q, k, v, n_q_heads, n_kv_heads, softmax_scale=None):
    """o[h] = softmax(softmax_scale * q[:, h] @ k[h // group]) @ v[h // group].T with group = n_q_heads / n_kv_heads.

    Args:
        q: [d, n_q_heads] in HBM.
        k: [n_kv_heads, d, seqlen_kv] in HBM.
        v: [n_kv_heads, d, seqlen_kv] in HBM.
        n_q_heads: number of query heads.
        n_kv_heads: number of KV heads.
        softmax_scale: multiplies q . k; None means d ** -0.5.

    Returns:
        o [n_q_heads, d] in HBM, in q's dtype.
    """
    d, seqlen_kv = k.shape[1], k.shape[2]
    assert q.shape == (d, n_q_heads), f"q: received {q.shape}, allowed {(d, n_q_heads)}"
    assert k.shape[0] == n_kv_heads, f"k heads: received {k.shape[0]}, allowed {n_kv_heads}"
    assert v.shape == k.shape, f"v: received {v.shape}, allowed {k.shape}"
    assert n_q_heads % n_kv_heads == 0, f"n_q_heads: received {n_q_heads}, allowed multiples of {n_kv_heads}"
    group = n_q_heads // n_kv_heads
    scale = d**-0.5 if softmax_scale == None else softmax_scale
    tile_kv = nl.tile_size.pmax
    n_tiles = (seqlen_kv + tile_kv - 1) // tile_kv

    o_hbm = nl.ndarray((n_q_heads, d), dtype=q.dtype, buffer=nl.shared_hbm)
    identity = _identity(q.dtype)
    for i_kv in range(n_kv_heads):
        heads = slice(i_kv * group, (i_kv + 1) * group)
        q_sb = _load(q[:, heads])
        m = _filled((group, 1), MASKED)  # running maximum
        l = _filled((group, 1), 0.0)  # running sum of exp(s - m)
        acc = _filled((group, d), 0.0)  # running exp(s - m) @ v.T
        for i_tile in range(n_tiles):
            start, n = _tile(i_tile, tile_kv, seqlen_kv)
            k_sb = _load(k[i_kv, :, start : start + n])
            v_sb = _load(v[i_kv, :, start : start + n])

            s_ps = nl.ndarray((group, n), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_matmul(dst=s_ps, stationary=q_sb, moving=k_sb)
            s_sb = nl.ndarray((group, n), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=s_sb, data=s_ps, op0=nl.multiply, operand0=scale)

            tile_max = nl.ndarray((group, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_reduce(dst=tile_max, op=nl.maximum, data=s_sb, axis=1)
            m_new = nl.ndarray((group, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_tensor(dst=m_new, data1=m, data2=tile_max, op=nl.maximum)
            neg_m = nl.ndarray((group, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=neg_m, data=m_new, op0=nl.multiply, operand0=-1.0)
            correction = nl.ndarray((group, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=correction, op=nl.exp, data=m, bias=neg_m)

            p_sb = nl.ndarray((group, n), dtype=q.dtype, buffer=nl.sbuf)
            tile_sum = nl.ndarray((group, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.activation(
                dst=p_sb,
                op=nl.exp,
                data=s_sb,
                bias=neg_m,
                reduce_op=nl.add,
                reduce_res=tile_sum,
                reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )
            nisa.scalar_tensor_tensor(
                dst=l, data=l, op0=nl.multiply, operand0=correction, op1=nl.add, operand1=tile_sum
            )

            pt_sb = _to_sbuf(_transpose(p_sb, identity), q.dtype)  # [n, group]
            vt_sb = _to_sbuf(_transpose(v_sb, identity), q.dtype)  # [n, d]
            pv_ps = nl.ndarray((group, d), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_matmul(dst=pv_ps, stationary=pt_sb, moving=vt_sb)
            nisa.scalar_tensor_tensor(
                dst=acc, data=acc, op0=nl.multiply, operand0=correction, op1=nl.add, operand1=pv_ps
            )
            m = m_new
        _store_normalised(o_hbm[heads, :], acc, l)
    return o_hbm


def _tile(i_tile, tile_kv, seqlen_kv):
    """First key of a tile, and how many keys it has."""
    start = i_tile * tile_kv
    return start, min(tile_kv, seqlen_kv - start)


def _load(x_hbm):
    """An HBM tensor in a new SBUF tile of the same shape."""
    x_sb = nl.ndarray(x_hbm.shape, dtype=x_hbm.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=x_sb, src=x_hbm)
    return x_sb


def _filled(shape, value):
    """A new float32 SBUF tile that holds `value` everywhere."""
    x_sb = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=x_sb, value=value)
    return x_sb


def _identity(dtype):
    """The identity matrix that `_transpose` moves; float32 needs a float32 one, other types their own."""
    return nl.shared_identity_matrix(nl.tile_size.pmax, dtype=dtype)


def _transpose(x_sb, identity):
    """x_sb [p, f] as a float32 PSUM tile [f, p]: a matmul against the identity."""
    p, f = x_sb.shape
    x_ps = nl.ndarray((f, p), dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=x_ps, stationary=x_sb, moving=identity[0:p, 0:p])
    return x_ps


def _to_sbuf(x_ps, dtype):
    """A PSUM tile in a new SBUF tile of `dtype`."""
    x_sb = nl.ndarray(x_ps.shape, dtype=dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=x_sb, src=x_ps)
    return x_sb


def _store_normalised(o_hbm, acc, l):
    """o = acc / l, for acc [rows, d] and l [rows, 1] in SBUF or PSUM."""
    rows, d = acc.shape
    inv_l = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inv_l, data=l)
    o_sb = nl.ndarray((rows, d), dtype=o_hbm.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=o_sb, data=acc, op0=nl.multiply, operand0=inv_l)
    nisa.dma_copy(dst=o_hbm, src=o_sb)


def check_args(q: Any, k: Any, v: Any, softmax_scale: float | None) -> None:
    """Every limit of `decode_attention`, before any work."""
    require_array("q", q, ndim=2, layout="[n_q_heads, d]")
    require_array("k", k, ndim=3, layout="[seqlen_kv, n_kv_heads, d]")
    require_array("v", v, ndim=3, layout="[seqlen_kv, n_kv_heads, d]")
    require_same_dtype(q=q, k=k, v=v)
    require_scale(softmax_scale)
    (n_q_heads, d), (seqlen_kv, n_kv_heads, _) = q.shape, k.shape
    require(1 <= d <= PARTITIONS, "head_dim", received=d, allowed=f"1..{PARTITIONS}")
    require(k.shape[2] == d, "k head_dim", received=k.shape[2], allowed=f"{d}, that of q")
    require(v.shape == k.shape, "v shape", received=list(v.shape), allowed=f"{list(k.shape)}, that of k")
    require(seqlen_kv >= 1, "seqlen_kv", received=seqlen_kv, allowed=">= 1")
    require(n_kv_heads >= 1, "n_kv_heads", received=n_kv_heads, allowed=">= 1")
    require(
        n_q_heads >= 1 and n_q_heads % n_kv_heads == 0,
        "n_q_heads",
        received=n_q_heads,
        allowed=f"multiples of n_kv_heads={n_kv_heads}",
    )
    group = n_q_heads // n_kv_heads
    require(group <= PARTITIONS, "group (n_q_heads / n_kv_heads)", received=group, allowed=f"1..{PARTITIONS}")


def decode_attention(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    *,
    softmax_scale: float | None = None,
    target: str | None = None,
) -> np.ndarray[Any, Any]:
    """Decode attention in math layout, on the CPU.

    Args:
        q: [n_q_heads, d], float32, bfloat16 or float16.
        k: [seqlen_kv, n_kv_heads, d], q's dtype.
        v: [seqlen_kv, n_kv_heads, d], q's dtype.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        target: generation to simulate; default as in `contributed._nki.simulate_kernel`.

    Returns:
        o [n_q_heads, d] in q's dtype.

    Raises:
        ValueError, TypeError: an argument is outside the limits above; nothing has run.
    """
    check_args(q, k, v, softmax_scale)
    n_q_heads, n_kv_heads = q.shape[0], k.shape[1]
    k_dmajor, v_dmajor = (np.ascontiguousarray(x.transpose(1, 2, 0)) for x in (k, v))
    q_dmajor = np.ascontiguousarray(q.T)
    scale = None if softmax_scale is None else float(softmax_scale)
    if n_q_heads == 1:
        o = simulate_kernel(decode_attention_fwd, q_dmajor, k_dmajor[0], v_dmajor[0], scale, target=target)
    else:
        o = simulate_kernel(
            decode_attention_gqa_fwd, q_dmajor, k_dmajor, v_dmajor, n_q_heads, n_kv_heads, scale, target=target
        )
    return np.asarray(o)


def main() -> int:
    """Check every case against the oracle; non-zero if one fails."""
    from contributed._selfcheck import self_check
    from reference.decode import gqa_decode_attention
    from reference.rounded import gqa_decode_attention_rounded

    return self_check(__doc__ or "", decode_attention, gqa_decode_attention, gqa_decode_attention_rounded, CASES)


if __name__ == "__main__":
    raise SystemExit(main())
