"""Prefill, backward: a launch's tiles on the chip.

Sizes, blocks, chunks and steps are what they are in `_prefill_state.py`; chunks are smaller, as all that a step makes
of one has to be in PSUM at a time.
"""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_state import RECORD_COLUMNS, psum, tile

# Of a block: row numbers, and what rows see; with N:M selection two more, what they always keep of it.
BLOCK_RECORDS = 3
# Of masked scores on NeuronCore-v2, which has no range_select.
MASKED = -3.0e38
# Added to minus the lse of a row that sees nothing, which is at most half of it in size: all its probabilities are 0.
NOTHING = -2.0e30
# Steps between the scores of a tile and its part in dK and dV, from there to its part in dQ; and until that is added.
LAG = 2
TURN_LAG = 2
LATE = LAG + TURN_LAG + 1
SLOTS = 3
DS_SLOTS = 2
SCORE_SLOTS = 2
PARTS = 2  # chunks in work at a time, or more if they have few steps
GROUP = 2  # tiles that are finished, and whose delta is computed, beside a step
LOADED = 16  # steps until a block's rows have certainly come, if they began to load before them


class State(nl.NKIObject):  # type: ignore[misc]
    """The tiles of a launch.

    Args:
        sizes: numbers of the launch.
        n_parts: chunks in work at a time.
        gathers: whether each tile of a chunk has a first row of its own.
        do: gradient of o, as q, in HBM.
        q: [total_q, n_q_heads, d] in HBM.
        k: [total_kv, n_kv_heads, d] in HBM.
        v: as k.
        o: as q.
        lse: [total_q, n_q_heads] float32 in HBM.
        dq_hbm: as q.
        dk_sum: [total_kv, n_kv_heads, d] float32 in HBM; the launch adds to what is there.
        dv_sum: likewise.
        softmax_scale: multiplies q . k.
    """

    def __init__(self, sizes, n_parts, gathers, do, q, k, v, o, lse, dq_hbm, dk_sum, dv_sum, softmax_scale):
        pmax, bank = nl.tile_size.pmax, nl.tile_size.psum_bank_fmax
        z = sizes
        self.sizes = sizes
        self.gathers = gathers
        self.selection = None  # see `_prefill_select.py`
        self.kv_heads = k.shape[1]
        self.n_units = q.shape[1] // z.heads  # blocks of heads
        n_rows = q.shape[0] * self.n_units
        self.do = do.reshape((n_rows, z.heads * z.d))
        self.q = q.reshape((n_rows, z.heads * z.d))
        self.o = o.reshape((n_rows, z.heads * z.d))
        self.dq_hbm = dq_hbm.reshape((n_rows, z.heads * z.d))
        self.lse = lse.reshape((n_rows, z.heads))
        n_rows = k.shape[0] * k.shape[1]
        self.k = k.reshape((n_rows, z.d))
        self.v = v.reshape((n_rows, z.d))
        self.dk_sum = dk_sum.reshape((n_rows, z.d))
        self.dv_sum = dv_sum.reshape((n_rows, z.d))
        # As in the forward, whose scores these are.
        self.q_sign = 1.0 if softmax_scale > 0 else -1.0 if softmax_scale < 0 else 0.0
        self.scale = abs(softmax_scale) if softmax_scale != 0 else 1.0
        self.softmax_scale = softmax_scale
        self.is_gen2 = nisa.get_nc_version() == nisa.nc_version.gen2
        self.is_float32 = q.dtype == nl.float32

        # Records of blocks: as they come, and those of the rows that are loading, in work and in store.
        shape = (pmax, BLOCK_RECORDS + (2 if z.planes > 1 else 0), z.q_tiles)
        self.block_coming = tile(shape, nl.int32)
        self.block_loading = tile(shape, nl.int32)
        self.block_now = tile(shape, nl.int32)
        self.block_storing = tile(shape, nl.int32)
        # Records of chunks: as they come, of the keys that are loading, and of the chunks in work.
        record = (pmax, RECORD_COLUMNS + z.kv_tiles * (2 if gathers else 1))
        self.coming = tile(record, nl.int32)
        self.loading = tile(record, nl.int32)
        self.now = tiles(n_parts, record, nl.int32)

        # Rows of the next block, and of this one as they are and transposed. Where o was, dQ leaves.
        rows = (pmax, z.q_tiles, z.heads * z.d)
        self.q_next = tile(rows, q.dtype)
        self.do_next = tile(rows, q.dtype)
        self.o_sb = tile(rows, q.dtype)
        self.lse_next = tile((pmax, z.q_tiles, z.heads), nl.float32)
        self.q_sb = tile(rows, q.dtype)
        self.do_sb = tile(rows, q.dtype)
        self.qt_sb = tile((z.db, z.n_blocks, z.n_tiles, pmax), q.dtype)
        self.dot_sb = tile((z.db, z.n_blocks, z.n_tiles, pmax), q.dtype)
        self.neg_lse = tile((pmax, z.q_tiles, z.heads), nl.float32)
        self.delta_next = tile((pmax, z.n_tiles), nl.float32)
        self.delta = tile((pmax, z.n_tiles), nl.float32)
        self.dq = tile((pmax, z.n_tiles, z.d), nl.float32)

        # Keys of the next chunk; of those in work K as it is, K and V transposed, and what dK and dV add to.
        rows = (pmax, z.kv_tiles, z.d)
        self.k_next = tile(rows, q.dtype)
        self.v_next = tile(rows, q.dtype)
        self.k_sb = tiles(n_parts, rows, q.dtype)
        self.dk_sb = tile(rows, nl.float32)
        self.dv_sb = tile(rows, nl.float32)
        self.kt_sb = tile((z.db, z.n_blocks, z.keys), q.dtype)
        self.vt_sb = tile((z.db, z.n_blocks, z.keys), q.dtype)
        # Keys that rows see, counted from the first of the chunk.
        self.lo = tile((pmax, z.q_tiles), nl.float32)
        self.hi = tile((pmax, z.q_tiles), nl.float32)

        # What is added to the exponents of the coming chunk's tiles; and for the chunks in work that and minus the lse.
        if z.skips:
            self.penalty_next = tile((pmax, z.n_tiles * z.kv_tiles), nl.float32)
            self.tile_bias = tiles(n_parts, (pmax, z.n_tiles, z.kv_tiles), nl.float32)

        # Of the steps in flight: masked scores and probabilities in float32, these and dS as they are multiplied.
        self.x = tile((pmax, SLOTS, z.keys), nl.float32)
        self.p = self.x if self.is_float32 else tile((pmax, SLOTS, z.keys), q.dtype)
        self.ds = tile((pmax, DS_SLOTS, z.keys), q.dtype)
        self.dst_sb = tiles(SLOTS, (pmax, z.kv_tiles, pmax), q.dtype)
        self.products = tiles(2, (pmax, GROUP, z.d), nl.float32)

        # PSUM, eight banks: two each of scores and dP, one each of dK, dV, transposed tiles, dQ of a step. The second
        # one of dP is that of N:M selection, if there is one.
        self.s_ps = []
        self.dp_ps = []
        for i in range(SCORE_SLOTS):
            self.s_ps.append(psum((pmax, z.keys), nl.float32))
            if i == 0 or z.planes == 1:
                self.dp_ps.append(psum((pmax, z.keys), nl.float32))
        self.dk_ps = psum((pmax, z.kv_tiles, z.d), nl.float32)
        self.dv_ps = psum((pmax, z.kv_tiles, z.d), nl.float32)
        # Two-byte tiles are transposed bit by bit from NeuronCore-v3 on; on NeuronCore-v2 as a product, in float32.
        self.by_bits = not self.is_gen2
        self.per_turn = bank // pmax
        self.t_ps = []
        if self.is_gen2 or self.is_float32:
            self.t_ps.append(psum((pmax, self.per_turn, pmax), nl.float32))
        else:
            for _ in range(2):
                self.t_ps.append(psum((pmax, self.per_turn, pmax), q.dtype))
        # Rows of a block are transposed when there are no scores.
        self.row_ps = []
        for i in range(SCORE_SLOTS):
            for bank_ps in self.s_ps[i : i + 1] + self.dp_ps[i : i + 1]:
                turned = bank_ps.view(self.t_ps[0].dtype)
                self.row_ps.append(turned.reshape((pmax, turned.shape[1] // pmax, pmax)))
        self.per_row_turn = self.row_ps[0].shape[1]
        self.dq_ps = []
        for _ in range(max(1, bank // z.d)):
            self.dq_ps.append(psum((pmax, z.d), nl.float32))
        # Counts of what takes turns, and the tiles of keys of a chunk that have a part in its dK and dV.
        self.turn = 0
        self.row_turn = 0
        self.n_turned = 0
        self.n_queries = 0
        self.begun = 0
        self.n_products = 0
        self.n_deltas = 0
        self.n_finished = 0
        self.n_cleared = 0
        self.identity = nl.shared_identity_matrix(pmax, dtype=q.dtype)
        if self.is_gen2:
            self.position = tile((pmax, z.keys), nl.float32)
            if z.planes > 1:
                self.outside = tile((pmax, z.keys), nl.float32)

    def prepare(self):
        """What has to be on the chip before the first block: finite numbers in rows that no query fills."""
        warm = tile((1, 1), nl.float32)
        nisa.memset(dst=warm, value=1.0)
        nisa.activation(dst=warm, op=nl.exp, data=warm)
        # These are not needed before they have been loaded where all blocks have all rows.
        if self.sizes.ragged:
            for rows in (self.q_next, self.do_next, self.o_sb, self.lse_next):
                nisa.memset(dst=rows, value=0.0)
        if self.is_gen2:
            nisa.iota(dst=self.position, pattern=[[1, self.sizes.keys]])


def tiles(n, shape, dtype):
    """New SBUF tiles."""
    found = []
    for _ in range(n):
        found.append(tile(shape, dtype))
    return found
