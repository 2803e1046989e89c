"""Append to a KV cache: new tokens' keys and values written in place, into flat, packed and paged caches.

Math      k[b, positions[b] + i] = k_new[b, i], the same for v, i < s. Paged: position t of sequence b is row
          t % block_size of page block_table[b, t // block_size]. Into float8 from a wider type: x / scale of the KV
          head, limited to -240 .. 240. Sequences at position -1 are left out.
Layouts   HBM. Caches are tables of rows of d elements: flat [batch, n_kv_heads, seqlen_kv, d], packed
          [1, n_kv_heads, total, d], paged [n_blocks, n_kv_heads, block_size, d]. New tokens [batch, s, n_kv_heads, d].
          `append_rows` serves all three: it takes the row number of every (token, KV head), -1 for none. That is the
          slot mapping of serving stacks with the heads counted in (`row_indices` makes it), and it is data: one
          compiled kernel serves every step. `append_rows_k_d_major`: K flat or packed with d before the keys.
Limits    caches float32, bfloat16, float16 or float8_e4m3, K and V alike; new tokens of that type, or of a wider one
          into float8. Fewer than 2^31 rows; elements, for d-major K. No row twice: the order of two scatters to one
          place is not documented. d of V may differ from that of K.
Engines   DMA: per 128 rows one load each of row numbers, new K and new V, one scatter each of K and V (d-major K: one
          more load, of column numbers). GpSimd: descriptors of the scatters, most of the modelled time. Vector: scaling
          into float8, 4 instructions per 128 rows, and a load of factors. Two cores write half of the rows each.
Numerics  equal types: bits. Into float8: float32(x) * float32(1 / scale), limited, rounded once. Without the limit,
          values above 240 would be stored as infinity. NaN stays NaN in the simulator; what the engine's minimum
          makes of it is not documented.
Memory    SBUF for 128 new rows of K and V at a time, twice where loads overlap; no PSUM.
Oracle    reference/append.py
Status    simulator: all CASES on trn1, trn2 and trn3. Hardware: not run.
Cost      64 sequences, 8 KV heads, d=128, bfloat16 on trn2, modelled: 15.1 us, on two cores 9.4 us. A row is one run of
          256 bytes. Of d-major K it is 128 runs of 2 bytes, modelled 54.8 us; what writes of 2 bytes cost the HBM is
          not published, nor that two engines may write neighbouring ones (tokens of one sequence, s > 1) at a time.
          Keep a cache that is appended to s-major or paged. A long prompt in a flat cache needs no scatter: its rows
          are consecutive.

Run `python contributed/append_kv.py` to check both kernels against the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from contributed._checks import FLOATS, require
from contributed._nki import nisa, nki, nl, simulate_kernel

Array = np.ndarray[Any, np.dtype[Any]]

CACHE_FLOATS: dict[str, np.dtype[Any]] = {**FLOATS, "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3)}
FLOAT8 = CACHE_FLOATS["float8_e4m3"]
FLOAT8_MAX = 240.0
MAX_INDEX = 2**31 - 1  # row numbers are int32


@dataclass(frozen=True)
class AppendCase:
    """One shape of an append, and how its inputs are drawn.

    Args:
        name: id in tables and tests; a model's name where the shape is that model's.
        seqlen_kv: rows per sequence; of a paged cache, of its block table.
        s: new tokens per sequence.
        inactive: slots at position -1.
        block_size: rows per page; None is a flat cache.
        k_d_major: K with d before the keys.
    """

    name: str
    batch: int
    n_kv_heads: int
    head_dim: int
    seqlen_kv: int
    s: int = 1
    inactive: tuple[int, ...] = ()
    block_size: int | None = None
    k_d_major: bool = False

    @property
    def shape(self) -> str:
        """The shape as the tables show it."""
        kind = "d-major" if self.k_d_major else "flat" if self.block_size is None else f"page{self.block_size}"
        return f"b{self.batch} s{self.s} kv{self.n_kv_heads} d{self.head_dim} {kind}"

    def inputs(self, dtype: Any, seed: int = 0) -> tuple[Array, ...]:
        """Arguments of `append_kv` or `append_kv_paged`: any bits in caches and new tokens, NaN included.

        The first slot ends on the last row and the last slot begins on row 0; a paged cache has spare pages and its
        table ends in -1.
        """
        rng = np.random.default_rng(seed)
        row = (self.n_kv_heads, self.head_dim)
        new_shape = (self.batch, self.s, *row)
        positions = rng.integers(0, self.seqlen_kv - self.s + 1, self.batch).astype(np.int32)
        positions[0], positions[-1] = self.seqlen_kv - self.s, 0
        positions[list(self.inactive)] = -1
        k_new, v_new = random_bits(rng, new_shape, dtype), random_bits(rng, new_shape, dtype)
        if self.block_size is None:
            shape = (self.batch, self.seqlen_kv, *row)
            return random_bits(rng, shape, dtype), random_bits(rng, shape, dtype), k_new, v_new, positions
        per_sequence = -(-self.seqlen_kv // self.block_size)
        n_blocks = self.batch * per_sequence + 2
        shape = (n_blocks, self.n_kv_heads, self.block_size, self.head_dim)
        table = np.full((self.batch, per_sequence + 1), -1, np.int32)
        table[:, :-1] = rng.permutation(n_blocks)[:-2].reshape(self.batch, per_sequence)
        return random_bits(rng, shape, dtype), random_bits(rng, shape, dtype), k_new, v_new, table, positions


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of random bits: every value of the type, NaN and infinities included."""
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape).copy()


CASES = (
    AppendCase("one-row", batch=1, n_kv_heads=1, head_dim=64, seqlen_kv=1),
    AppendCase("off-the-edge", batch=3, n_kv_heads=3, head_dim=80, seqlen_kv=37, s=15, inactive=(1,)),
    AppendCase("all-inactive", batch=2, n_kv_heads=2, head_dim=64, seqlen_kv=9, inactive=(0, 1)),
    AppendCase("several-tiles", batch=2, n_kv_heads=5, head_dim=512, seqlen_kv=60, s=55),
    AppendCase("llama-3-8b", batch=16, n_kv_heads=8, head_dim=128, seqlen_kv=64, inactive=(3, 7)),
    AppendCase("gemma-3-4b", batch=4, n_kv_heads=4, head_dim=256, seqlen_kv=48, s=4),
    AppendCase("d-major-one-row", batch=1, n_kv_heads=1, head_dim=64, seqlen_kv=1, k_d_major=True),
    AppendCase("d-major-phi-3", batch=5, n_kv_heads=32, head_dim=96, seqlen_kv=24, inactive=(2,), k_d_major=True),
    AppendCase("paged-one-row", batch=1, n_kv_heads=1, head_dim=64, seqlen_kv=16, block_size=16),
    AppendCase("paged-llama-3-8b", batch=16, n_kv_heads=8, head_dim=128, seqlen_kv=60, inactive=(3,), block_size=16),
    AppendCase("paged-several-tokens", batch=3, n_kv_heads=2, head_dim=112, seqlen_kv=70, s=37, block_size=32),
)


@nki.jit
def append_rows(k, v, k_new, v_new, rows, factors=None):
    """Write row r of the new keys and values to row rows[r] of the caches, in place.

    Args:
        k: cache [blocks, n_kv_heads, rows, d] in HBM; written.
        v: cache [blocks, n_kv_heads, rows, d of v] in HBM; written.
        k_new: [batch, s, n_kv_heads, d] in HBM.
        v_new: [batch, s, n_kv_heads, d of v] in HBM.
        rows: int32 [batch * s * n_kv_heads] in HBM, numbers of rows of the cache, counted over its first three
            dimensions; -1 and every other number outside the cache is skipped.
        factors: float32 [batch * s * n_kv_heads, 2] in HBM: what each row of k_new and of v_new is multiplied by on
            its way into a float8 cache; None copies.

    Returns:
        k and v.
    """
    assert k_new.shape[3] == k.shape[3], f"k_new d: received {k_new.shape[3]}, allowed {k.shape[3]}, that of k"
    _append(_table(k, k.shape[3]), 1, _table(v, v.shape[3]), k_new, v_new, rows, None, factors)
    return k, v


@nki.jit
def append_rows_k_d_major(k, v, k_new, v_new, columns, rows, factors=None):
    """`append_rows` to a K cache with d before the keys.

    Args:
        k: cache [blocks, n_kv_heads, d, rows] in HBM; written.
        v: as in `append_rows`; written.
        k_new: as in `append_rows`.
        v_new: as in `append_rows`.
        columns: int32 [batch * s * n_kv_heads] in HBM, number of the first element of each key in the whole of k;
            -1 is skipped.
        rows: as in `append_rows`, for v.
        factors: as in `append_rows`.

    Returns:
        k and v.
    """
    assert k_new.shape[3] == k.shape[2], f"k_new d: received {k_new.shape[3]}, allowed {k.shape[2]}, that of k"
    _append(_table(k, 1), k.shape[3], _table(v, v.shape[3]), k_new, v_new, columns, rows, factors)
    return k, v


def _table(cache, width):
    """A cache as a table of rows of `width` elements."""
    blocks, heads, a, b = cache.shape
    rows = blocks * heads * a * b // width
    assert rows <= MAX_INDEX, f"rows: received {rows}, allowed at most {MAX_INDEX}, the largest int32"
    return cache.reshape((rows, width))


def _append(k_cache, k_step, v_cache, k_new, v_new, k_index, v_index, factors):
    """Both caches, this core's share of the rows.

    k_step is the distance of a key's elements in k_cache; k_index says in which row of it each key begins, and
    v_index where values do, None for the same rows.
    """
    batch, s, n_kv_heads, d = k_new.shape
    d_v = v_new.shape[3]
    n_rows = batch * s * n_kv_heads
    v_shape = (batch, s, n_kv_heads, v_cache.shape[1])
    assert v_new.shape == v_shape, f"v_new: received {v_new.shape}, allowed {v_shape}"
    assert k_index.shape == (n_rows,), f"index of K: received {k_index.shape}, allowed {(n_rows,)}"
    if factors == None:
        assert k_new.dtype == k_cache.dtype, (
            f"k_new dtype: received {k_new.dtype}, allowed {k_cache.dtype}, the cache's"
        )
    else:
        assert k_cache.dtype == nl.float8_e4m3, f"k dtype with factors: received {k_cache.dtype}, allowed float8_e4m3"
    k_rows, v_rows = k_new.reshape((n_rows, d)), v_new.reshape((n_rows, d_v))

    tile = nl.tile_size.pmax
    cores, core = nl.num_programs(), nl.program_id(0)
    end = n_rows * (core + 1) // cores
    for start in range(n_rows * core // cores, end, tile):
        rows = slice(start, min(start + tile, end))
        k_at = _load(k_index.reshape((n_rows, 1))[rows, :])
        v_at = k_at if v_index == None else _load(v_index.reshape((n_rows, 1))[rows, :])
        k_sb = _load(k_rows[rows, :])
        v_sb = _load(v_rows[rows, :])
        if factors != None:
            factors_sb = _load(factors[rows, :])
            k_sb = _to_float8(k_sb, factors_sb[:, 0:1], k_cache.dtype)
            v_sb = _to_float8(v_sb, factors_sb[:, 1:2], v_cache.dtype)
        _scatter(k_cache, k_at, k_step, k_sb)
        _scatter(v_cache, v_at, 1, v_sb)


def _load(x_hbm):
    """An HBM tensor in a new SBUF tile of the same shape."""
    x_sb = nl.ndarray(x_hbm.shape, dtype=x_hbm.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=x_sb, src=x_hbm)
    return x_sb


def _scatter(cache, at_sb, step, x_sb):
    """Row p of x_sb [p, d] to elements `step` apart from the beginning of row at_sb[p] of `cache` on."""
    p, d = x_sb.shape
    nisa.dma_copy(
        dst=cache.ap([[cache.shape[1], p], [step, d]], vector_offset=at_sb, indirect_dim=0),
        src=x_sb,
        oob_mode=nisa.oob_mode.skip,
    )


def _to_float8(x_sb, factor_sb, dtype):
    """x_sb [p, d] times factor_sb [p, 1], limited to what float8 holds, in a new SBUF tile of `dtype`."""
    scaled = nl.ndarray(x_sb.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=scaled, data=x_sb, op0=nl.multiply, operand0=factor_sb, op1=nl.minimum, operand1=FLOAT8_MAX)
    limited = nl.ndarray(x_sb.shape, dtype=dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=limited, data=scaled, op0=nl.maximum, operand0=-FLOAT8_MAX)
    return limited


def row_indices(blocks: Array, within: Array, n_kv_heads: int, size: int) -> Array:
    """The kernels' index: where each (token, KV head) goes.

    Flat caches: blocks are sequences, `within` positions, `size` is seqlen_kv. Paged: pages, rows in them and
    block_size; from a slot mapping `slots // block_size` and `slots % block_size`. Columns of d-major K: as flat,
    with size d * seqlen_kv.

    Args:
        blocks: integers, one per token in the order of k_new; -1 leaves the token out.
        within: integers of the same shape.
        n_kv_heads: KV heads.
        size: distance of the first elements of two heads, in rows (d-major: elements).

    Returns:
        int32 [tokens * n_kv_heads]: (blocks * n_kv_heads + head) * size + within, -1 where left out.
    """
    token = np.asarray(blocks, np.int64).reshape(-1, 1)
    index = (token * n_kv_heads + np.arange(n_kv_heads)) * size + np.asarray(within, np.int64).reshape(-1, 1)
    return np.where(token < 0, -1, index).reshape(-1).astype(np.int32)


def append_kv(
    k: Array,
    v: Array,
    k_new: Array,
    v_new: Array,
    positions: Array,
    *,
    cu_seqlens_kv: Array | None = None,
    k_d_major: bool = False,
    k_scale: float | Array | None = None,
    v_scale: float | Array | None = None,
    target: str | None = None,
) -> None:
    """Write new tokens into a flat or packed cache, on the CPU; k and v are changed in place.

    Args:
        k: [batch, seqlen_kv, n_kv_heads, d], or packed [total, n_kv_heads, d]; float32, bfloat16, float16 or
            float8_e4m3. Only the rows of the new tokens change.
        v: as k, d may differ.
        k_new: [batch, s, n_kv_heads, d] in k's dtype; for a float8_e4m3 cache also in one of the others.
        v_new: as k_new, for v, in k_new's dtype.
        positions: integers [batch], row of the sequence's first new token; -1: an inactive slot, nothing is written.
        cu_seqlens_kv: integers [batch + 1], where the sequences of a packed cache begin and end; positions count from
            there.
        k_d_major: run the kernel on K with d before the keys; the result is the same.
        k_scale: what stored keys have to be multiplied by to give the true ones, a number or [n_kv_heads]; None is 1.
            Only where new tokens are cast.
        v_scale: the same for values.
        target: generation to simulate; default as in `contributed._nki.simulate_kernel`.

    Raises:
        ValueError, TypeError: an argument is outside the limits above; nothing has run or changed.
    """
    packed = cu_seqlens_kv is not None
    layout = "[total, n_kv_heads, d]" if packed else "[batch, seqlen_kv, n_kv_heads, d]"
    n_kv_heads = _check_caches("", k, v, k_new, v_new, layout, heads_axis=1 if packed else 2)
    batch, s = k_new.shape[:2]
    first = _integers("positions", positions, (batch,))
    blocks = np.arange(batch)
    if cu_seqlens_kv is None:
        require(k.shape[0] == batch, "k batch", received=k.shape[0], allowed=f"{batch}, that of k_new")
        begins, lengths = np.zeros(batch, np.int64), np.full(batch, k.shape[1])
    else:
        cu = _integers("cu_seqlens_kv", cu_seqlens_kv, (batch + 1,))
        ascends = cu[0] >= 0 and cu[-1] <= len(k) and bool((np.diff(cu) >= 0).all())
        require(ascends, "cu_seqlens_kv", received=cu.tolist(), allowed=f"ascending from 0 to {len(k)}")
        begins, lengths, blocks = cu[:-1], np.diff(cu), np.zeros(batch, np.int64)
    for b in range(batch):
        fits = first[b] == -1 or 0 <= first[b] <= lengths[b] - s
        allowed = f"-1, or 0..{lengths[b] - s}: {s} new tokens in {lengths[b]} rows"
        require(bool(fits), f"positions[{b}]", received=first[b], allowed=allowed)
    factors = _factors(k, k_new, k_scale, v_scale, n_kv_heads)

    rows = 1 if packed else batch, n_kv_heads, k.shape[0 if packed else 1]
    within = (begins + first)[:, None] + np.arange(s)
    owner = np.repeat(np.where(first < 0, -1, blocks), s)
    k_hbm, v_hbm = (np.array((x[None] if packed else x).transpose(0, 2, 1, 3), order="C") for x in (k, v))
    index = row_indices(owner, within, n_kv_heads, rows[2])
    new = np.array(k_new, order="C"), np.array(v_new, order="C")
    if k_d_major:
        require(k.size <= MAX_INDEX, "k size", received=k.size, allowed=f"at most {MAX_INDEX} with k_d_major")
        k_hbm = np.ascontiguousarray(k_hbm.swapaxes(2, 3))
        columns = row_indices(owner, within, n_kv_heads, rows[2] * k.shape[-1])
        simulate_kernel(append_rows_k_d_major, k_hbm, v_hbm, *new, columns, index, factors, target=target)
        k_hbm = k_hbm.swapaxes(2, 3)
    else:
        simulate_kernel(append_rows, k_hbm, v_hbm, *new, index, factors, target=target)
    for x, x_hbm in ((k, k_hbm), (v, v_hbm)):
        x[...] = x_hbm.transpose(0, 2, 1, 3).reshape(x.shape)


def append_kv_paged(
    k_pages: Array,
    v_pages: Array,
    k_new: Array,
    v_new: Array,
    block_table: Array,
    positions: Array,
    *,
    k_scale: float | Array | None = None,
    v_scale: float | Array | None = None,
    target: str | None = None,
) -> None:
    """`append_kv` to a paged cache; k_pages and v_pages are changed in place.

    Args:
        k_pages: [n_blocks, n_kv_heads, block_size, d], dtypes as in `append_kv`.
        v_pages: as k_pages, d may differ.
        k_new: as in `append_kv`.
        v_new: as in `append_kv`.
        block_table: integers [batch, max_blocks]; -1 is no page, which no new token may need.
        positions: as in `append_kv`.
        k_scale: as in `append_kv`.
        v_scale: as in `append_kv`.
        target: as in `append_kv`.

    Raises:
        ValueError, TypeError: an argument is outside the limits above, or two tokens go to the same row; nothing has
            run or changed.
    """
    layout = "[n_blocks, n_kv_heads, block_size, d]"
    n_kv_heads = _check_caches("_pages", k_pages, v_pages, k_new, v_new, layout, heads_axis=1)
    batch, s = k_new.shape[:2]
    n_blocks, _, block_size, _ = k_pages.shape
    first = _integers("positions", positions, (batch,))
    max_blocks = np.shape(block_table)[-1] if np.ndim(block_table) == 2 else 1
    table = _integers("block_table", block_table, (batch, max_blocks))
    ids = bool(((table >= -1) & (table < n_blocks)).all())
    require(ids, "block_table", received=table.tolist(), allowed=f"pages 0..{n_blocks - 1}, -1 for none")
    owner = np.full((batch, s), -1, np.int64)
    within = np.zeros((batch, s), np.int64)
    for b in np.flatnonzero(first != -1):
        last = max_blocks * block_size - s
        allowed = f"-1, or 0..{last}: {s} new tokens in {max_blocks} blocks of {block_size}"
        require(bool(0 <= first[b] <= last), f"positions[{b}]", received=first[b], allowed=allowed)
        tokens = first[b] + np.arange(s)
        owner[b], within[b] = table[b, tokens // block_size], tokens % block_size
        allowed = f"a page for each of rows {tokens[0]}..{tokens[-1]}"
        require(bool((owner[b] >= 0).all()), f"block_table[{b}]", received=table[b].tolist(), allowed=allowed)
    written = (owner * block_size + within)[owner >= 0]
    unique = np.unique(written).size == written.size
    require(unique, "block_table", received=table.tolist(), allowed="no row of a page for two of the new tokens")
    factors = _factors(k_pages, k_new, k_scale, v_scale, n_kv_heads)

    index = row_indices(owner, within, n_kv_heads, block_size)
    new = np.array(k_new, order="C"), np.array(v_new, order="C")
    simulate_kernel(append_rows, k_pages, v_pages, *new, index, factors, target=target)


def _check_caches(suffix: str, k: Any, v: Any, k_new: Any, v_new: Any, layout: str, heads_axis: int) -> int:
    """Arrays, types and shapes that all caches share; returns the number of KV heads."""
    new_layout = "[batch, s, n_kv_heads, d]"
    k_name, v_name = f"k{suffix}", f"v{suffix}"
    for name, x, expected in (
        (k_name, k, layout),
        (v_name, v, layout),
        ("k_new", k_new, new_layout),
        ("v_new", v_new, new_layout),
    ):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}: received {type(x).__name__}, allowed a NumPy array {expected}")
        require(x.ndim == expected.count(",") + 1, f"{name} shape", received=list(x.shape), allowed=expected)
        if x.dtype not in CACHE_FLOATS.values():
            raise TypeError(f"{name} dtype: received {x.dtype}, allowed {', '.join(CACHE_FLOATS)}")
        require(x.size > 0, f"{name} shape", received=list(x.shape), allowed=f"{expected}, each at least 1")
    for name, x in ((k_name, k), (v_name, v)):
        require(x.flags.writeable, name, received="a read-only array", allowed="one that can be changed in place")
        require(x.size // x.shape[-1] <= MAX_INDEX, f"{name} rows", received=x.shape, allowed=f"at most {MAX_INDEX}")
    require(not np.shares_memory(k, v), v_name, received=f"memory of {k_name}", allowed="memory of its own")
    if v.dtype != k.dtype:
        raise TypeError(f"{v_name} dtype: received {v.dtype}, allowed {k.dtype}, that of {k_name}")
    new_dtypes = (k.dtype, *FLOATS.values()) if k.dtype == FLOAT8 else (k.dtype,)
    if k_new.dtype not in new_dtypes:
        raise TypeError(f"k_new dtype: received {k_new.dtype}, allowed {', '.join(map(str, new_dtypes))}")
    if v_new.dtype != k_new.dtype:
        raise TypeError(f"v_new dtype: received {v_new.dtype}, allowed {k_new.dtype}, that of k_new")
    n_kv_heads = int(k.shape[heads_axis])
    shape = [*k.shape[:-1], "d"]
    require(v.shape[:-1] == k.shape[:-1], f"{v_name} shape", received=list(v.shape), allowed=f"{shape}, as {k_name}")
    for name, x, cache in (("k_new", k_new, k), ("v_new", v_new, v)):
        allowed = f"[{k_new.shape[0]}, {k_new.shape[1]}, {n_kv_heads}, {cache.shape[-1]}]"
        fits = x.shape == (*k_new.shape[:2], n_kv_heads, cache.shape[-1])
        require(fits, f"{name} shape", received=list(x.shape), allowed=allowed)
    return n_kv_heads


def _integers(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """An argument that has to be a NumPy array of integers, as int64."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or not np.can_cast(value.dtype, np.int64):
        received = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name}: received {received}, allowed a NumPy array of integers {list(shape)}")
    require(value.shape == shape, f"{name} shape", received=list(value.shape), allowed=list(shape))
    return value.astype(np.int64)


def _factors(k: Array, k_new: Array, k_scale: Any, v_scale: Any, n_kv_heads: int) -> Array | None:
    """What each row of new tokens is multiplied by, float32 [rows, 2]; None where types are equal."""
    if k_new.dtype == k.dtype:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            require(scale is None, name, received=scale, allowed=f"None where new tokens come in {k.dtype} already")
        return None
    factors = np.empty((n_kv_heads, 2), np.float32)
    for i, (name, scale) in enumerate((("k_scale", k_scale), ("v_scale", v_scale))):
        value = np.asarray(1.0 if scale is None else scale)
        if value.dtype.kind not in "fiu":
            raise TypeError(f"{name}: received {scale!r}, allowed a number or [n_kv_heads], or None")
        allowed = f"() or ({n_kv_heads},)"
        require(value.shape in ((), (n_kv_heads,)), f"{name} shape", received=value.shape, allowed=allowed)
        with np.errstate(all="ignore"):
            factors[:, i] = 1.0 / value.astype(np.float64)
        usable = bool((np.isfinite(factors[:, i]) & (factors[:, i] > 0)).all())
        require(usable, name, received=scale, allowed="positive numbers whose reciprocals float32 holds")
    return np.tile(factors, (k_new.shape[0] * k_new.shape[1], 1))


def main() -> int:
    """Check every case against the oracle, bit for bit; non-zero if one differs."""
    from contributed._selfcheck import exact_check
    from reference import append as oracle

    def differences(case: AppendCase, dtype: str, target: str | None) -> int:
        args = case.inputs(CACHE_FLOATS[dtype])
        if case.block_size is None:
            expected = oracle.append_kv(*args)
            append_kv(*args, k_d_major=case.k_d_major, target=target)
        else:
            expected = oracle.append_kv_paged(*args)
            append_kv_paged(*args, target=target)
        bits = f"u{CACHE_FLOATS[dtype].itemsize}"
        return sum(int((x.view(bits) != y.view(bits)).sum()) for x, y in zip(args[:2], expected, strict=True))

    return exact_check(__doc__ or "", differences, CASES, tuple(CACHE_FLOATS))


if __name__ == "__main__":
    raise SystemExit(main())
