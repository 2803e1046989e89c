"""Prefill: the sizes of a launch, and its tiles on the chip.

A *block* is up to `q_tiles` tiles of 128 query rows of one sequence, for `heads` query heads of one KV head. A *chunk*
is `kv_tiles` tiles of 128 keys of that head. Chunks come one after the other: where a window has a left edge, the ones
that it crosses, then those of a device loop, then, where a diagonal bounds what rows see, the ones that it crosses. A
*unit* is one tile of rows of one head with the keys of a chunk that it sees, a *step* the units whose scores have room
beside each other, in the loop one. `_prefill_plan.py` lists blocks and chunks.
"""

from __future__ import annotations

from contributed._nki import nisa, nl

# In place of a sum of no exponentials, which is 0 where others are at least 1; Log takes 2^-64 and above.
TINY = 1.0e-18
EMPTY = 0.5  # between the two
# Masked scores of NeuronCore-v2, which has no range_select; twice this is beyond float32.
MASKED = -3.0e38
# Running maxima begin at minus this: far above masked scores, far below all others, also times the scale.
FLOOR = 1.0e37
FLOOR_MAX = 1.0e30
# Steps between the scores of a tile and its product with V, in which maximum and exponentials are taken.
EXP_LAG = 2
SKIP_SLOTS = 4  # pairs of steps in work with decisions about tiles
SCORE_SLOTS = 2
TURNS = 2  # banks of transposed tiles
TURN_LAG = 2
PT_SLOTS = TURN_LAG + 2
PART_TILES = 8  # about as many are loaded, finished and stored together
FINISHED = 2  # finished beside a step
RECORD_COLUMNS = 3  # of a chunk, before its guards
# Rows of a block's record: row numbers of queries, what rows see (first, end), what they always keep of it (first,
# end), where their maxima begin for skip-softmax, and row numbers of results, of which each split has its own.
RECENT = 3
FIRST_MAXIMA = 5
RESULTS = 6
BLOCK_RECORDS = 7
LOWEST = -3.0e38


class Sizes(nl.NKIObject):  # type: ignore[misc]
    """Compile-time numbers of a launch.

    Args:
        d: head dim.
        heads: query heads of a block.
        q_tiles: tiles of 128 rows per head and block.
        kv_tiles: tiles of 128 keys per chunk.
        overhang: tiles that a row tile sees from that of its own number on, on the diagonal: 1 if positions of first
            rows are multiples of 128 and no key after a row's own is seen, else more; 0 if there is no diagonal.
        masked: whether chunks of the loop have keys that a row may not see.
        plain: whether a tile of rows sees all keys of the tiles that neither edge nor diagonal cross.
        guarded: whether chunks have rows that belong to no key of their sequence.
        ragged: whether a block may have fewer rows.
        sparsity_m: keys of a group for N:M selection, 0 without.
        recent: keys up to a row's position that it always keeps.
        skips: whether tiles are skipped.
        left_tiles: tiles before its own that a row tile sees, where the left edge of a window is part of the program;
            None if it is not.
        left_offset: keys of the first of these that a row tile's first row does not see, the most there are.
        edge_tiles: tiles of keys of the chunks on the left edge of a block.
        start: tiles of keys before their own that blocks have with an edge at the beginning of a sequence.
        start_tiles: as `edge_tiles`, of these.
        sure_tiles: row tiles, from the first on, that every block has in full.
    """

    def __init__(
        self,
        d,
        heads,
        q_tiles,
        kv_tiles,
        overhang,
        masked,
        plain,
        guarded,
        ragged,
        sparsity_m,
        recent,
        skips,
        left_tiles,
        left_offset,
        edge_tiles,
        start,
        start_tiles,
        sure_tiles,
    ):
        pmax = nl.tile_size.pmax
        self.d = d
        self.n_blocks = (d + pmax - 1) // pmax  # of d, each of at most 128
        self.db = d // self.n_blocks
        self.heads = heads
        self.q_tiles = q_tiles
        self.n_tiles = heads * q_tiles
        self.kv_tiles = kv_tiles
        self.keys = kv_tiles * pmax
        self.overhang = overhang
        self.n_diagonal = 0
        if overhang > 0:
            self.n_diagonal = (q_tiles - 1 + overhang + kv_tiles - 1) // kv_tiles
        # Chunks on the left edge of a window, and tiles of keys that the edge of a row tile crosses.
        self.left_tiles = left_tiles
        self.left_offset = left_offset
        self.edge_tiles = edge_tiles
        self.n_edge = (edge_tiles + kv_tiles - 1) // kv_tiles
        self.start = start
        self.start_tiles = start_tiles
        self.n_start = (start_tiles + kv_tiles - 1) // kv_tiles
        self.crossed = 0
        if left_tiles != None:
            self.crossed = (left_offset + 2 * (pmax - 1)) // pmax
        self.sure_tiles = sure_tiles
        self.masked = masked
        self.plain = plain
        self.guarded = guarded
        self.ragged = ragged
        # Keys of a tile stand in this many planes, see `_prefill_select.py`; 1 is in the order of their numbers.
        self.skips = skips
        self.recent_tiles = (recent + pmax - 1) // pmax
        self.planes = sparsity_m if sparsity_m > 0 else 1
        # Steps from the scores of a tile to its exponentials, and to its product with V; and how many are in work.
        self.exp_lag = EXP_LAG
        if nisa.get_nc_version() == nisa.nc_version.gen2 and self.planes == 1 and not skips:
            self.exp_lag = 1  # exponentials are taken of scores in PSUM, where there are two slots
        self.lag = self.exp_lag + 1
        self.x_slots = 2 * SKIP_SLOTS if skips else self.exp_lag + 2
        self.p_slots = SKIP_SLOTS if skips else 3

    def before_own(self, row_tile, place):
        """Tiles of keys from a chunk's first one up to that of a row tile's own number.

        The chunk is one on the diagonal, below 0 one on the left edge, and below these one on that of blocks at the
        beginning of a sequence.
        """
        if place < -self.n_edge:
            return self.start + row_tile - (place + self.n_edge + self.n_start) * self.kv_tiles
        if place < 0:
            return self.left_tiles + row_tile - (place + self.n_edge) * self.kv_tiles
        return row_tile - place * self.kv_tiles

    def first_tile(self, row_tile, place):
        """First tile of keys that a tile of rows sees, counted from the first of a chunk, also before it; as above."""
        if self.left_tiles == None:
            return 0
        return self.before_own(row_tile, place) - self.left_tiles

    def first_seen(self, row_tile, place):
        """The first of the chunk's tiles of keys that it sees."""
        return max(0, self.first_tile(row_tile, place))

    def end_seen(self, row_tile, place):
        """The one after the last of these."""
        if place < -self.n_edge:
            tiles = self.start_tiles - (place + self.n_edge + self.n_start) * self.kv_tiles
        elif place < 0:
            tiles = self.edge_tiles - (place + self.n_edge) * self.kv_tiles
        else:
            tiles = self.before_own(row_tile, place) + self.overhang
        return max(0, min(self.kv_tiles, tiles))

    def first_plain(self, row_tile, place):
        """First tile of keys of which all rows of a tile see all; as above, or with None in the loop."""
        if place == None or not self.plain:
            return 0
        return max(0, self.first_tile(row_tile, place) + self.crossed)

    def end_plain(self, row_tile, place):
        """The one after the last of these."""
        if place == None:
            return 0 if self.masked else self.kv_tiles
        end = self.end_seen(row_tile, place)
        if place >= 0:
            end = max(0, min(end, self.before_own(row_tile, place)))
        return end if self.plain else 0

    def first_recent(self, row_tile, place):
        """First of a chunk's tiles with keys that rows may have to keep; as above."""
        if place == None:
            first = 0 if self.masked else row_tile - self.recent_tiles + self.kv_tiles
        else:
            first = self.before_own(row_tile, place) - self.recent_tiles if self.plain else 0
        return max(0, min(self.kv_tiles, first))

    def knows(self, place):
        """Whether it is the same in all blocks which keys of a chunk rows see, and which ones are their own positions.

        As above; positions of first rows are then multiples of 128.
        """
        return place != None and self.overhang == 1 and self.plain


class State(nl.NKIObject):  # type: ignore[misc]
    """The tiles of a launch.

    Args:
        sizes: numbers of the launch.
        q: [total_q, n_q_heads, d] in HBM.
        k: [total_kv, n_kv_heads, d] in HBM.
        v: as k.
        o_hbm: as q.
        lse_hbm: [total_q, n_q_heads] float32 in HBM, or None.
        softmax_scale: multiplies q . k.
    """

    def __init__(self, sizes, q, k, v, o_hbm, lse_hbm, softmax_scale):
        pmax, bank = nl.tile_size.pmax, nl.tile_size.psum_bank_fmax
        z = sizes
        self.sizes = sizes
        self.selection = None  # see `_prefill_select.py`
        self.skipping = None  # see `_prefill_skip.py`
        self.kv_heads = k.shape[1]
        self.n_units = q.shape[1] // z.heads  # blocks of heads
        self.q = q.reshape((q.shape[0] * self.n_units, z.heads * z.d))
        self.k = k.reshape((k.shape[0] * k.shape[1], z.d))
        self.v = v.reshape((v.shape[0] * v.shape[1], z.d))
        self.o_hbm = o_hbm.reshape((o_hbm.shape[0] * self.n_units, z.heads * z.d))
        self.lse_hbm = lse_hbm
        if lse_hbm != None:
            self.lse_hbm = lse_hbm.reshape((lse_hbm.shape[0] * self.n_units, z.heads))
        # A scale of 0 is taken into q, so that masks stay below everything; a negative one turns q's sign (exact).
        self.q_sign = 1.0 if softmax_scale > 0 else -1.0 if softmax_scale < 0 else 0.0
        self.scale = abs(softmax_scale) if softmax_scale != 0 else 1.0
        self.floor = min(FLOOR, FLOOR_MAX / self.scale)
        self.is_gen2 = nisa.get_nc_version() == nisa.nc_version.gen2

        # Records of blocks: as they come, and those of the queries that are loading and of the block in work.
        shape = (pmax, BLOCK_RECORDS, z.q_tiles)
        self.block_coming = tile(shape, nl.int32)
        self.block_loading = tile(shape, nl.int32)
        self.block_now = tile(shape, nl.int32)
        self.block_storing = tile(shape, nl.int32)
        # Records of chunks, likewise.
        width = RECORD_COLUMNS + z.kv_tiles
        self.coming = tile((pmax, width), nl.int32)
        self.loading = tile((pmax, width), nl.int32)
        self.now = tile((pmax, width), nl.int32)

        self.q_sb = tile((pmax, z.q_tiles, z.heads * z.d), q.dtype)
        self.qt_sb = tile((z.db, z.n_blocks, z.n_tiles, pmax), q.dtype)
        self.k_next = tile((pmax, z.kv_tiles, z.d), q.dtype)
        self.v_next = tile((pmax, z.kv_tiles, z.d), q.dtype)
        self.kt_sb = tile((z.db, z.n_blocks, z.keys), q.dtype)
        self.v_sb = tile((pmax, z.kv_tiles, z.d), q.dtype)

        # Keys that rows see, counted from the first of the chunk.
        self.lo = tile((pmax, z.q_tiles), nl.float32)
        self.hi = tile((pmax, z.q_tiles), nl.float32)
        # Running state: maximum of q . k, sum, output.
        columns = (pmax, z.n_tiles)
        self.m = tile(columns, nl.float32)
        self.l = tile(columns, nl.float32)
        self.o = tile((pmax, z.n_tiles, z.d), nl.float32)
        self.o_sb = tile((pmax, z.q_tiles, z.heads * z.d), o_hbm.dtype)
        self.lse_sb = tile((pmax, z.q_tiles, z.heads), nl.float32)
        # The sums at the end, and their inverse.
        self.sums = tile(columns, nl.float32)
        self.inverse = tile(columns, nl.float32)

        # Of a chunk: its maxima, the new running ones, these times minus the scale, how far (below 0) these are from
        # the old ones, the factors of the state that follow, the sums.
        self.top = tile(columns, nl.float32)
        self.m_new = tile(columns, nl.float32)
        self.bias = tile(columns, nl.float32)
        self.rise = tile(columns, nl.float32)
        self.decay = tile(columns, nl.float32)
        self.total = tile(columns, nl.float32)
        # Scores and probabilities of the steps in flight.
        self.x = tile((pmax, z.x_slots, z.keys), nl.float32)
        self.p = tile((pmax, z.p_slots, z.keys), q.dtype)
        self.neg_scale = tile((pmax, 1), nl.float32)

        # PSUM, eight banks: four of scores, two of transposed tiles, two of products with V.
        score_banks = (z.keys + bank - 1) // bank
        self.s_ps = []
        for _ in range(1 if z.planes > 1 else SCORE_SLOTS):
            self.s_ps.append(psum((pmax, score_banks * bank), nl.float32))
        self.o_ps = []
        # N:M selection takes four, and leaves one of scores and one of products; skip-softmax takes one.
        for _ in range((1 if z.planes > 1 or z.skips else 2) * (bank // z.d)):
            self.o_ps.append(psum((pmax, z.d), nl.float32))
        # Two-byte tiles are transposed bit by bit from NeuronCore-v3 on; on NeuronCore-v2 as a product, in float32.
        self.by_bits = not self.is_gen2
        turn_dtype = nl.float32 if self.is_gen2 else q.dtype
        self.per_turn = bank // pmax
        # Whole banks: queries are transposed in these and in those of scores, when there are none.
        shape = (pmax, self.per_turn if turn_dtype == nl.float32 else 2 * self.per_turn, pmax)
        self.t_ps = []
        for _ in range(TURNS):
            self.t_ps.append(psum(shape, turn_dtype))
        self.row_ps = []
        for s_ps in self.s_ps:
            for i in range(score_banks):
                self.row_ps.append(s_ps[:, i * bank : (i + 1) * bank].view(turn_dtype).reshape(shape))
        self.row_ps.extend(self.t_ps)
        self.pt_sb = []
        for _ in range(PT_SLOTS):
            self.pt_sb.append(tile((pmax, self.per_turn, pmax), q.dtype))
        self.turn = 0
        self.n_weighed = 0
        self.identity = nl.shared_identity_matrix(pmax, dtype=q.dtype)
        if self.is_gen2:
            self.position = tile((pmax, z.keys), nl.float32)
            self.outside = tile((pmax, z.keys), nl.float32)

    def prepare(self):
        """What has to be on the chip before the first block: finite numbers where no query comes, outputs of 0."""
        z = self.sizes
        warm = tile((1, 1), nl.float32)
        nisa.memset(dst=warm, value=1.0)
        for function in (nl.exp, nl.log):
            nisa.activation(dst=warm, op=function, data=warm)
        nisa.memset(dst=self.neg_scale, value=-self.scale)
        if z.ragged:
            nisa.memset(dst=self.q_sb, value=0.0)
        if z.n_tiles > 1:
            nisa.memset(dst=self.o[:, 0 : z.n_tiles // 2, :], value=0.0)
        if z.skips:
            # A block begins with what the one before it has left, times 0.
            nisa.memset(dst=self.total, value=0.0)
            nisa.memset(dst=self.decay, value=1.0)
        if self.is_gen2:
            nisa.iota(dst=self.position, pattern=[[1, z.keys]])

    def prepare_rest(self):
        """The same, behind the loads that the GpSimd Engine begins."""
        rest = self.o[:, self.sizes.n_tiles // 2 :, :]
        nisa.memset(dst=rest, value=0.0, engine=nisa.engine.gpsimd)


def tile(shape, dtype):
    """A new SBUF tile."""
    return nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)


def psum(shape, dtype):
    """A new PSUM tile."""
    return nl.ndarray(shape, dtype=dtype, buffer=nl.psum)
