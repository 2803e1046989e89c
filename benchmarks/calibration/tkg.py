"""AWS's attention_tkg as far as its public source describes it: K stationary, all sequences of a core in step.

Written from the description of its data flow. Kept: one indirect transpose of K and one indirect copy of V per
128 pages (or one plain transpose and copy per sequence for a flat cache), scores [128 keys, tiles, sequences,
heads] copied to SBUF under a mask, one max for all sequences with its transposes, subtract and exp per tile of keys,
row sums and P @ V by matmuls, tiles of 8192 keys with a running state, batches cut where the scores would not fit.
Left out, as they do not scale with the cache: the new token's K and V (the tail of the cache here), the layout of
the page table, sinks. The masks are made here in two instructions per sequence. Sequences are shared between the
two cores of an LNC2 launch without exchange, so one core is simulated; the host's launch is not modelled.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.calibration._model import extrapolated, modelled, zeros
from nkisim import isa as nisa
from nkisim import language as nl

P = 128
KEY_TILE_MAX = 8192  # keys whose scores are kept at once
SCORE_BYTES_MAX = 16 * 2**20  # 8 bytes per score of a batch
NEGATIVE = -3.0e38


def _tile(shape: tuple[int, ...], dtype: Any = nl.float32, buffer: Any = nl.sbuf) -> Any:
    return nl.ndarray(shape, dtype=dtype, buffer=buffer)


def _gather(cache: Any, table: Any, *, transposed: bool) -> Any:
    """The pages of a cache view that `table` [128, 1] names."""
    _, page, d = cache.shape
    rows = cache.reshape((cache.shape[0], 1, page, d)) if transposed else cache.reshape((cache.shape[0], page * d))
    pattern = [[page * d, P], [1, 1], [d, page], [1, d]] if transposed else [[page * d, P], [1, page * d]]
    return rows.ap(pattern, vector_offset=table, indirect_dim=0)


class _Batch:
    """Sequences that are worked on together, and their cache."""

    def __init__(self, q: Any, k: Any, v: Any, table: Any, sequences: range, seqlen_kv: int) -> None:
        self.d, total = q.shape
        self.k, self.v, self.table = k, v, table
        self.sequences, self.seqlen_kv = sequences, seqlen_kv
        self.group = total // (k.shape[0] // self.rows_per_sequence)
        self.columns = len(sequences) * self.group
        self.q = _tile((self.d, self.columns), nl.bfloat16)
        nisa.dma_copy(dst=self.q, src=q[:, sequences.start * self.group : sequences.stop * self.group])

    @property
    def rows_per_sequence(self) -> int:
        """Pages of a sequence, or 1 for a flat cache."""
        return self.seqlen_kv // self.page

    @property
    def page(self) -> int:
        """Keys of a page."""
        return int(self.k.shape[1])

    def positions(self, start: int, n: int) -> Any:
        """Which key of the sequence each of [128, n / 128] is: a partition holds neighbours."""
        run = n // P if self.table is None else self.page
        position = _tile((P, n // P))
        pattern = [[run * P, n // (run * P)], [1, run]]
        nisa.iota(dst=position.reshape((P, n // (run * P), run)), pattern=pattern, offset=start, channel_multiplier=run)
        return position

    def k_tile(self, k_sb: Any, t: int) -> Any:
        """The 128 keys of tile t, in the order of `positions`."""
        return k_sb[:, t * P : (t + 1) * P] if self.table is not None else k_sb[:, t :: k_sb.shape[1] // P]

    def load_k(self, i: int, start: int, n: int) -> Any:
        """K of a sequence as [d, n]."""
        k_sb = _tile((self.d, n), nl.bfloat16)
        if self.table is None:
            nisa.dma_transpose(dst=k_sb, src=self.k[self.sequences[i], start : start + n])
            return k_sb
        page = self.page
        for fold in range(n // (page * P)):
            at = fold * page * P
            dst = k_sb[:, at : at + page * P].reshape_dim(1, (page, P)).expand_dim(1)
            pages = self._pages(i, start // (page * P) + fold)
            nisa.dma_transpose(dst=dst, src=_gather(self.k, pages, transposed=True), axes=(3, 1, 2, 0))
        return k_sb

    def load_v(self, i: int, start: int, n: int) -> Any:
        """V of a sequence as [128, n / 128 * d]."""
        v_sb = _tile((P, n // P * self.d), nl.bfloat16)
        if self.table is None:
            rows = self.v[self.sequences[i], start : start + n].reshape((P, n // P * self.d))
            nisa.dma_copy(dst=v_sb, src=rows)
            return v_sb
        page = self.page
        for fold in range(n // (page * P)):
            at = fold * page * self.d
            pages = self._pages(i, start // (page * P) + fold)
            nisa.dma_copy(dst=v_sb[:, at : at + page * self.d], src=_gather(self.v, pages, transposed=False))
        return v_sb

    def _pages(self, i: int, fold: int) -> Any:
        column = self.sequences[i] * (self.rows_per_sequence // P) + fold
        return self.table[:, column : column + 1]


def _scores(b: _Batch, start: int, n: int, position: Any, lengths: Any) -> Any:
    """Masked scores [128, tiles, sequences, heads]."""
    tiles, n_seq = n // P, len(b.sequences)
    scores = _tile((P, tiles, n_seq, b.group))
    nisa.memset(dst=scores, value=NEGATIVE)
    per_bank = 512 // b.group
    for i in range(n_seq):
        k_sb = b.load_k(i, start, n)
        visible = _tile((P, tiles), nl.uint8)
        nisa.tensor_scalar(dst=visible, data=position, op0=nl.less, operand0=lengths[:, i : i + 1])
        mask = _tile((P, tiles, b.group), nl.uint8)
        nisa.tensor_copy(dst=mask, src=visible.expand_dim(2).broadcast(2, b.group))
        for first in range(0, tiles, min(per_bank, 32)):
            count = min(per_bank, 32, tiles - first)
            psum = _tile((P, count, b.group), buffer=nl.psum)
            for t in range(count):
                moving = b.q[:, i * b.group : (i + 1) * b.group]
                nisa.nc_matmul(dst=psum[:, t, :], stationary=b.k_tile(k_sb, first + t), moving=moving)
            part = slice(first, first + count)
            nisa.tensor_copy_predicated(dst=scores[:, part, i, :], src=psum, predicate=mask[:, part])
    return scores


def _blocks(columns: int) -> list[slice]:
    return [slice(at, min(at + P, columns)) for at in range(0, columns, P)]


def _to_rows(columns: Any) -> Any:
    """[128, n <= 128] as PSUM [n, 128]."""
    psum = _tile((columns.shape[1], P), buffer=nl.psum)
    nisa.nc_transpose(dst=psum, data=columns)
    return psum


def _to_all_partitions(column: Any) -> Any:
    """[n, 1] as [128, n]: a transpose of its broadcast."""
    n = column.shape[0]
    wide = _tile((n, P))
    nisa.tensor_copy(dst=wide, src=column.broadcast(1, P))
    psum = _tile((P, n), buffer=nl.psum)
    nisa.nc_transpose(dst=psum, data=wide)
    result = _tile((P, n))
    nisa.tensor_copy(dst=result, src=psum)
    return result


def _spread(columns: list[Any], total: int) -> Any:
    """One value per row of score columns, on all partitions."""
    wide = _tile((P, total))
    for at, column in zip(_blocks(total), columns, strict=True):
        nisa.tensor_copy(dst=wide[:, at], src=_to_all_partitions(column))
    return wide


def _maxima(scores: Any, columns: int) -> list[Any]:
    """Maximum over keys of each column, on as many partitions as there are columns in a block."""
    tiles = scores.shape[1]
    lanes = _tile((P, columns))
    nisa.tensor_reduce(dst=lanes, op=nl.maximum, data=scores.reshape((P, tiles, columns)).permute((0, 2, 1)), axis=2)
    found = []
    for at in _blocks(columns):
        rows = _to_rows(lanes[:, at])
        column = _tile((rows.shape[0], 1))
        nisa.tensor_reduce(dst=column, op=nl.maximum, data=rows, axis=1)
        found.append(column)
    return found


def _probabilities(scores: Any, maximum: Any, columns: int) -> Any:
    """exp(scores - maximum) in bfloat16, tile by tile."""
    tiles = scores.shape[1]
    flat = scores.reshape((P, tiles, columns))
    p = _tile((P, tiles, columns), nl.bfloat16)
    for t in range(tiles):
        nisa.tensor_tensor(dst=flat[:, t], data1=flat[:, t], data2=maximum, op=nl.subtract)
        nisa.activation(dst=p[:, t], op=nl.exp, data=flat[:, t])
    return p


def _sums(p: Any, columns: int, ones: Any) -> list[Any]:
    """Sum over keys of each column."""
    found = []
    for at in _blocks(columns):
        rows, tiles = at.stop - at.start, p.shape[1]
        psum = _tile((rows, tiles), buffer=nl.psum)
        for t in range(tiles):
            nisa.nc_matmul(dst=psum[:, t : t + 1], stationary=p[:, t, at], moving=ones)
        column = _tile((rows, 1))
        nisa.tensor_reduce(dst=column, op=nl.add, data=psum, axis=1)
        found.append(column)
    return found


def _values(b: _Batch, p: Any, start: int, n: int) -> Any:
    """Unnormalised output [d, columns] of a tile of keys."""
    result = _tile((b.d, b.columns))
    for i in range(len(b.sequences)):
        v_sb, at = b.load_v(i, start, n), slice(i * b.group, (i + 1) * b.group)
        psum = _tile((b.d, b.group), buffer=nl.psum)
        for t in range(n // P):
            v_t = v_sb[:, t * b.d : (t + 1) * b.d]
            nisa.nc_matmul(dst=psum, stationary=v_t, moving=p[:, t, at], accumulate=t > 0)
        nisa.tensor_copy(dst=result[:, at], src=psum)
    return result


def _combine(old: list[Any], new: list[Any], op: Any) -> list[Any]:
    found = []
    for a, c in zip(old, new, strict=True):
        column = _tile(a.shape)
        nisa.tensor_tensor(dst=column, data1=a, data2=c, op=op)
        found.append(column)
    return found


def attention_tkg(q, k, v, table, lengths, n_batch, seqlen_kv):
    """o [d, sequences * heads] of q in the same layout; caches [pages, page, d], or [sequences, keys, d] flat."""
    d, total = q.shape
    o = nl.ndarray((d, total), dtype=q.dtype, buffer=nl.shared_hbm)
    n_seq = lengths.shape[1]
    ones, table_sb = _tile((P, 1), nl.bfloat16), None
    nisa.memset(dst=ones, value=1.0)
    if table is not None:
        table_sb = _tile(table.shape, nl.uint32)
        nisa.dma_copy(dst=table_sb, src=table)
    lengths_sb = _tile(lengths.shape)
    nisa.dma_copy(dst=lengths_sb, src=lengths)
    for at in range(0, n_seq, n_batch):
        b = _Batch(q, k, v, table_sb, range(at, at + n_batch), seqlen_kv)
        m: list[Any] = []
        l: list[Any] = []
        acc: Any = None
        for start in range(0, seqlen_kv, KEY_TILE_MAX):
            n = min(KEY_TILE_MAX, seqlen_kv - start)
            position = b.positions(start, n)
            scores = _scores(b, start, n, position, lengths_sb[:, at : at + n_batch])
            before, m = m, _maxima(scores, b.columns)
            if before:
                m = _combine(before, m, nl.maximum)
            p = _probabilities(scores, _spread(m, b.columns), b.columns)
            sums = _sums(p, b.columns, ones)
            part = _values(b, p, start, n)
            if acc is None:
                l, acc = sums, part
                continue
            factors = _combine(before, m, nl.subtract)
            for f in factors:
                nisa.activation(dst=f, op=nl.exp, data=f)
            l = _combine(_combine(l, factors, nl.multiply), sums, nl.add)
            wide = _spread(factors, b.columns)[0:d]
            nisa.tensor_tensor(dst=acc, data1=acc, data2=wide, op=nl.multiply)
            nisa.tensor_tensor(dst=acc, data1=acc, data2=part, op=nl.add)
        for column in l:
            nisa.reciprocal(dst=column, data=column)
        out = _tile((d, b.columns), q.dtype)
        nisa.tensor_tensor(dst=out, data1=acc, data2=_spread(l, b.columns)[0:d], op=nl.multiply)
        nisa.dma_copy(dst=o[:, at * b.group : (at + n_batch) * b.group], src=out)
    return o


def attention_tkg_us(seqlen_kv: int, *, paged: bool = True, n_pairs: int = 128, group: int = 10, d: int = 128) -> float:
    """Time of `n_pairs` pairs of sequence and KV head in bfloat16 on the two cores of a trn2 LNC2 launch."""
    bfloat16, per_core = ml_dtypes.bfloat16, n_pairs // 2
    n_batch = per_core
    while 8 * n_batch * group * min(seqlen_kv, KEY_TILE_MAX) > SCORE_BYTES_MAX:
        n_batch //= 2
    # Pages of 128 keys are cut so that 128 of them fit into a tile.
    page = gcd(P, seqlen_kv // P, min(seqlen_kv, KEY_TILE_MAX) // P) if paged else seqlen_kv
    folds = seqlen_kv // (page * P)

    def run(batches: int) -> float:
        n_seq = batches * n_batch
        cache = zeros(n_seq * (seqlen_kv // page), page, d, dtype=bfloat16)
        table = np.arange(n_seq * folds * P, dtype=np.uint32).reshape(n_seq * folds, P).T if paged else None
        lengths = np.full((P, n_seq), seqlen_kv, np.float32)
        q = zeros(d, n_seq * group, dtype=bfloat16)
        args = (q, cache, cache.copy(), table, lengths, n_batch, seqlen_kv)
        return modelled(attention_tkg, *args, target="trn2").total_us

    return extrapolated(run, 1, 2, per_core // n_batch)
