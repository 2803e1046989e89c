"""Prefill: skip-softmax, tile by tile of 128 rows and 128 keys, from left to right.

A tile is skipped if in every row its maximum is below the largest score of the tiles before it plus the logarithm of
the threshold. Rows decide each for itself, a product with ones adds up on every partition who wants the tile, and where
nobody does, a bias far below all scores makes its exponentials 0; where nobody wants a tile of two steps, they are left
out (`_prefill_pairs.py`). Thresholds are at most 1, so that no skipped tile has a larger score than the ones before it,
and the running maximum is that of all tiles.

Decisions are made for two steps at a time. Each of their units has a *group* of columns: lowest numbers, as many as
tiles, then the running maximum, then the maxima of its tiles. Maxima with neighbours at distance 1, 2, 4 .. then give
what was largest up to each column. The GpSimd Engine takes them; the others have no time for it.
"""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_state import FIRST_MAXIMA, LOWEST, SKIP_SLOTS, psum, tile

# Far above all biases: an exponential of 0.
PENALTY = 1.0e32
FLAGS = 2 * SKIP_SLOTS  # read for longer than what else decisions leave behind


class Skipping(nl.NKIObject):  # type: ignore[misc]
    """The tiles of skip-softmax.

    Args:
        limit: logarithm of the threshold over the scale, at most 0.
        floor: minus this is lower than all scores.
        skipped_hbm: float32 [n_chunks, n_tiles * kv_tiles]: 1 for a skipped tile, 0 for others.
        sizes: of the launch.
    """

    def __init__(self, limit, floor, skipped_hbm, sizes):
        pmax, bank = nl.tile_size.pmax, nl.tile_size.psum_bank_fmax
        z = sizes
        self.limit = limit
        self.lowest = -floor
        self.skipped_hbm = skipped_hbm
        self.group = 2 * z.kv_tiles + 1
        shape = (pmax, 2 * z.kv_tiles, self.group)
        self.tops = []
        self.bias = []
        self.wanted = []
        for _ in range(SKIP_SLOTS):
            self.tops.append(tile(shape, nl.float32))
            self.bias.append(tile((pmax, 2 * z.kv_tiles * z.kv_tiles), nl.float32))
            self.wanted.append(tile((pmax, 2 * z.kv_tiles * z.kv_tiles), nl.bfloat16))
        self.before = []
        for _ in range(2):
            self.before.append(tile(shape, nl.float32))
        self.count_ps = psum((pmax, bank), nl.float32)
        # Running maxima as they are; those of the state are not below `lowest`.
        self.m = tile((pmax, z.n_tiles), nl.float32)
        self.m_new = tile((pmax, z.n_tiles), nl.float32)
        self.skipped = tile((pmax, z.n_tiles, z.kv_tiles), nl.float32)
        self.ones = tile((pmax, pmax), nl.bfloat16)
        self.limit_column = tile((pmax, 1), nl.float32)
        self.lowest_column = tile((pmax, 1), nl.float32)
        self.penalty = tile((pmax, 1), nl.float32)
        self.one = tile((pmax, 1), nl.float32)
        # Numbers of a pair's tiles: for each number of units all of them; and those skipped.
        self.n_tiles = tile((1, 2 * z.kv_tiles + 1), nl.float32)
        self.n_skipped = tile((pmax, 1), nl.float32)
        # Whether a tile of a pair is not skipped, 1 or 0, in memory and where loops see it.
        self.flags = tile((1, FLAGS), nl.int32)
        self.registers = []
        for _ in range(SKIP_SLOTS):
            self.registers.append(nisa.register_alloc())
        self.leaving = tile((1, z.n_tiles * z.kv_tiles), nl.float32)

    def prepare(self):
        """Constants, and finite numbers where a step has no tile."""
        nisa.memset(dst=self.ones, value=1.0)
        nisa.memset(dst=self.limit_column, value=self.limit)
        nisa.memset(dst=self.lowest_column, value=self.lowest)
        nisa.memset(dst=self.penalty, value=PENALTY)
        nisa.memset(dst=self.one, value=1.0)
        nisa.memset(dst=self.skipped, value=0.0)
        nisa.iota(dst=self.n_tiles, pattern=[[self.skipped.shape[2], self.n_tiles.shape[1]]])
        for x in self.tops:
            nisa.memset(dst=x, value=0.0)
        for x in self.tops + self.before:
            nisa.memset(dst=x[:, :, 0 : (self.group - 1) // 2], value=LOWEST)


def begin_rows(w):
    """Running maxima of a block: below all scores; of rows that there are not 0, so that they want nothing.

    Nor is a pair of the block before wanted.
    """
    z = w.sizes
    first = w.block_now[:, FIRST_MAXIMA, :].view(nl.float32).expand_dim(2).broadcast(2, z.heads)
    m = w.skipping.m.reshape_dim(1, (z.q_tiles, z.heads))
    nisa.tensor_copy(dst=m, src=first, engine=nisa.engine.gpsimd)
    nisa.memset(dst=w.skipping.flags, value=0, engine=nisa.engine.gpsimd)


def top_of(w, unit, t):
    """Where the maximum of a unit's tile t goes."""
    s = w.skipping
    column = w.sizes.kv_tiles + 1 + t
    return s.tops[unit.pair % SKIP_SLOTS][:, unit.group, column : column + 1]


def clear(w, pair):
    """Maxima of tiles that there are not, which no row wants; before those of the pair's tiles are taken."""
    s = w.skipping
    z = w.sizes
    for unit in pair.units:
        if unit.width < z.kv_tiles:
            tops = s.tops[pair.number % SKIP_SLOTS][:, 0 : len(pair.units), z.kv_tiles + 1 :]
            nisa.memset(dst=tops, value=float("-inf"))
            return


def want(w, pair):
    """Which tiles of a pair's units rows want, and the units' new maxima."""
    s = w.skipping
    z = w.sizes
    gpsimd = nisa.engine.gpsimd
    slot, n, now = pair.number % SKIP_SLOTS, len(pair.units), pair.now
    first, end = z.kv_tiles, s.group
    tops = s.tops[slot][:, 0:n]
    nisa.tensor_copy(dst=now.fold(tops[:, :, first]), src=now.of(s.m), engine=gpsimd)
    before, turn, distance = tops, 0, 1
    while distance <= z.kv_tiles:
        longer = s.before[turn][:, 0:n]
        nisa.tensor_tensor(
            dst=longer[:, :, first:end],
            data1=before[:, :, first:end],
            data2=before[:, :, first - distance : end - distance],
            op=nl.maximum,
            engine=gpsimd,
        )
        before, turn, distance = longer, 1 - turn, 2 * distance
    for run in pair.runs:
        # Behind its last tile stands the largest of all.
        tops_of_run = before[:, run.first : run.end, first + run.width]
        nisa.tensor_copy(dst=run.now.of(s.m_new), src=run.now.fold(tops_of_run), engine=gpsimd)
    lowest = now.spread(s.lowest_column)
    nisa.tensor_tensor(dst=now.of(w.m_new), data1=now.of(s.m_new), data2=lowest, op=nl.maximum, engine=gpsimd)
    # In place: what a tile's maximum has to reach.
    limits = before[:, :, first : end - 1]
    limit = s.limit_column.expand_dim(1).broadcast(1, n).broadcast(2, z.kv_tiles)
    nisa.tensor_tensor(dst=limits, data1=limits, data2=limit, op=nl.add, engine=gpsimd)
    wanted = s.wanted[slot][:, 0 : n * z.kv_tiles].reshape_dim(1, (n, z.kv_tiles))
    nisa.tensor_tensor(dst=wanted, data1=tops[:, :, first + 1 : end], data2=limits, op=nl.greater_equal, engine=gpsimd)


def decide(w, pair):
    """Which tiles of a pair are skipped and whether all are, the biases of exponentials, and the state's factors."""
    s = w.skipping
    z = w.sizes
    gpsimd = nisa.engine.gpsimd
    slot, n, now = pair.number % SKIP_SLOTS, len(pair.units), pair.now
    columns = slice(0, n * z.kv_tiles)
    # How many rows want each tile, on every partition.
    counts = s.count_ps[:, columns]
    nisa.nc_matmul(dst=counts, stationary=s.ones, moving=s.wanted[slot][:, columns], accumulate=False)
    nisa.activation(dst=now.of(w.decay), op=nl.exp, data=now.of(w.rise), scale=w.scale)
    skipped = now.of(s.skipped)
    nisa.activation(
        dst=skipped,
        op=nl.relu,
        data=now.fold(counts.reshape_dim(1, (n, z.kv_tiles))),
        scale=-1.0,
        bias=s.one,
        reduce_op=nl.add,
        reduce_res=s.n_skipped,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    n_tiles = s.n_tiles[:, n : n + 1]
    nisa.tensor_tensor(dst=flag_of(w, pair), data1=s.n_skipped[0:1], data2=n_tiles, op=nl.less, engine=gpsimd)
    bias = now.fold(s.bias[slot][:, columns].reshape_dim(1, (n, z.kv_tiles)))
    penalty = now.spread(s.penalty).expand_dim(3).broadcast(3, z.kv_tiles)
    nisa.tensor_tensor(dst=bias, data1=skipped, data2=penalty, op=nl.multiply, engine=gpsimd)
    data = now.of(w.bias).expand_dim(3).broadcast(3, z.kv_tiles)
    nisa.tensor_tensor(dst=bias, data1=data, data2=bias, op=nl.subtract, engine=gpsimd)


def flag_of(w, pair):
    """1 if a tile of a pair is not skipped, else 0, int32 [1, 1]."""
    i = pair.number % FLAGS
    return w.skipping.flags[:, i : i + 1]


def tile_bias(w, unit, t):
    """The bias of a unit's tile t."""
    s = w.skipping
    column = unit.group * w.sizes.kv_tiles + t
    return s.bias[unit.pair % SKIP_SLOTS][:, column : column + 1]


def end_rows(w, tiles):
    """Maxima of some tiles of rows after a chunk."""
    s = w.skipping
    nisa.tensor_copy(dst=s.m[:, tiles], src=s.m_new[:, tiles], engine=nisa.engine.gpsimd)


def keep_decisions(w, row):
    """A chunk's decisions to `row` of `skipped_hbm`."""
    s = w.skipping
    nisa.tensor_copy(dst=s.leaving, src=s.skipped[0:1].reshape(s.leaving.shape), engine=nisa.engine.gpsimd)
    nisa.dma_copy(dst=row.reshape(s.leaving.shape), src=s.leaving)
