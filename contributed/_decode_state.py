"""Decode: the sizes of a launch, its tiles on the chip, and where its records hold what.

A *group* is the queries of one KV head of one sequence (rows: new tokens x heads of the group) for one KV split. Its
keys come as *granules* of `tokens` consecutive keys, one granule per partition, up to 128 granules per *item*, and as
single *edge* keys, which no whole granule covers: the remainder of a length, the sides of a window, keys that only
some of the new tokens see. `_decode_plan.py` writes which keys these are into records of 128 rows, one per partition.

Several groups are in work at a time, each in a *lane* with K and V buffers of its own. The edge keys of all lanes share
tiles.
"""

from __future__ import annotations

from contributed._nki import nisa, nl

# Below every score and every running maximum, finite so that a transpose by matmul stays exact.
MASKED = -3.0e38
# What a maximum is raised to: MASKED minus this is still so low that its exponential is 0.
LOWEST = -1.0e30
# In place of a sum of no exponentials, which is 0 where others are at least 1; Log takes 2^-64 and above.
TINY = 1.0e-18
EMPTY = 0.5  # between the two
# Granule j = 16 b + a of an item lies on partition 8 a + b: each of the sixteen DMA engines serves eight partitions, so
# that an item of few granules keeps all engines busy.
DMA_ENGINES = 16
KT_BANKS = 3  # of transposed K in flight
SCORE_BANKS = 2
SCORE_BANKS_D_MAJOR = 4  # without transposed K


class Columns(nl.NKIObject):  # type: ignore[misc]
    """Where a record holds what, on each of its 128 rows and for each lane; an item's record ends before `k_edge`.

    `k`, `v`, `k_edge`, `v_edge`: row indices of gathers, -1 for none. `mask`: 0 on partitions with a granule, MASKED on
    the others. `start`: position of the granule's first key, `rel`: those of the edge keys, relative to the newest key
    (these three are float32 bits). `visible`: for each new token, whether it sees the edge keys. `unit_in`, `unit_out`:
    rows of queries and results; `head`: the KV head; each the same on every partition. `v_edge` and `rel` stand in the
    first lane's columns for all lanes.
    """

    def __init__(self, s, granules, k_columns, k_edge_columns, n_edges):
        """`k_columns` and `k_edge_columns` are 0 where K has the rows of V."""
        self.k = 0
        self.v = k_columns
        self.mask = self.v + granules
        self.start = self.mask + 1
        self.item_width = self.start + 1
        self.k_edge = self.item_width
        self.v_edge = self.k_edge + k_edge_columns
        self.visible = self.v_edge + n_edges
        self.rel = self.visible + s * n_edges
        self.unit_in = self.rel + n_edges
        self.unit_out = self.unit_in + 1
        self.head = self.unit_out + 1
        self.width = self.head + 1


class Sizes(nl.NKIObject):  # type: ignore[misc]
    """Compile-time numbers of a launch.

    Args:
        q_shape: [batch, s, n_q_heads, d].
        n_kv_heads: KV heads.
        tokens: consecutive keys per partition of an item.
        granules: gathers per item, each of tokens / granules consecutive keys per partition.
        chunks: of d-major K, gathers per item and block of d; 0 for s-major K.
        n_windows: stretches of edge keys per group.
        window: keys of a stretch, at most 128.
        n_lanes: groups in work at a time.
    """

    def __init__(self, q_shape, n_kv_heads, tokens, granules, chunks, n_windows, window, n_lanes):
        pmax, bank = nl.tile_size.pmax, nl.tile_size.psum_bank_fmax
        self.s = q_shape[1]
        self.d = q_shape[3]
        self.n_kv_heads = n_kv_heads
        self.group = q_shape[2] // n_kv_heads
        self.rows = self.s * self.group
        self.n_lanes = n_lanes
        self.n_rows = n_lanes * self.rows
        self.n_blocks = (self.d + pmax - 1) // pmax  # of d, each of at most 128
        self.db = self.d // self.n_blocks
        self.tokens = tokens
        self.granules = granules
        self.d_major = chunks > 0
        self.chunks = chunks
        # Edge keys: a stretch of every lane after the other, in as many tiles as that takes; then the next stretches.
        # So a lane's stretches are in tiles of their own, and its sums in the same order in every lane.
        self.n_windows = n_windows
        self.window = window
        self.lanes_per_tile = pmax // window
        self.edge_tiles = (n_lanes + self.lanes_per_tile - 1) // self.lanes_per_tile
        self.n_edges = n_windows * self.edge_tiles
        # A lane's scores [rows, tokens] share a bank with other lanes', or lie in several parts of one bank each.
        self.per_bank = max(1, bank // (self.rows * tokens))
        self.n_parts = 1
        while self.rows * tokens > self.n_parts * bank or tokens % self.n_parts != 0:
            self.n_parts = self.n_parts + 1
        # Lanes with scores in PSUM. Where there are more lanes, they take turns, and logits leave PSUM at once.
        banks = SCORE_BANKS_D_MAJOR if self.d_major else SCORE_BANKS
        self.slots = min(n_lanes, banks // self.n_parts * self.per_bank)
        self.score_banks = (self.slots + self.per_bank - 1) // self.per_bank * self.n_parts
        k_edges = self.n_blocks * n_windows if self.d_major else 0
        self.at = Columns(self.s, granules, self.n_blocks * chunks, k_edges, self.n_edges)


class State(nl.NKIObject):  # type: ignore[misc]
    """The tiles of a launch.

    Args:
        sizes: numbers of the launch.
        q: [batch, s, n_q_heads, d] in HBM.
        k: s-major: [rows, d], one key per row. d-major: [elements, 1].
        v: [rows, d].
        o_hbm: [splits * batch, s, n_q_heads, d].
        lse_hbm: [splits * batch, s, n_q_heads] float32, or None.
        softmax_scale: multiplies q . k.
        v_scale: multiplies the output.
        softcap: cap of cap * tanh(score / cap), or None.
        sinks: [n_kv_heads, group] float32 in HBM, or None.
        slopes: [n_kv_heads, group] float32 in HBM, or None.
        kv_scales: [n_kv_heads, 2] float32 in HBM, factors of k and v per KV head, or None.
    """

    def __init__(self, sizes, q, k, v, o_hbm, lse_hbm, softmax_scale, v_scale, softcap, sinks, slopes, kv_scales):
        pmax, bank = nl.tile_size.pmax, nl.tile_size.psum_bank_fmax
        n_lanes, n_rows, db, n_blocks = sizes.n_lanes, sizes.n_rows, sizes.db, sizes.n_blocks
        self.sizes = sizes
        self.q = q
        self.k = k
        self.v = v
        self.o_hbm = o_hbm
        self.lse_hbm = lse_hbm
        self.softcap = softcap
        self.sinks = sinks
        self.slopes = slopes
        self.kv_scales = kv_scales
        self.gates = None  # added to scores before all else, see `_sparse_gates.py`
        self.v_scale = v_scale
        # A scale of 0 is taken into q, so that masks stay below everything; a negative one turns q's sign (exact).
        self.q_sign = 1.0 if softmax_scale > 0 else -1.0 if softmax_scale < 0 else 0.0
        self.scale = abs(softmax_scale) if softmax_scale != 0 else 1.0

        # Records: as they come, and copies for the gathers of K, those of V, and the computation.
        shape = (pmax, n_lanes, sizes.at.width)
        self.coming = tile(shape, nl.int32)
        self.of_k = tile(shape, nl.int32)
        self.of_v = tile(shape, nl.int32)
        self.now = tile(shape, nl.int32)
        shape = (pmax, n_lanes, sizes.at.item_width)
        self.item_coming = tile(shape, nl.int32)
        self.item_of_k = tile(shape, nl.int32)
        self.item_of_v = tile(shape, nl.int32)
        self.item_now = tile(shape, nl.int32)
        self.q_sb = tile((n_rows, sizes.d), q.dtype)
        self.qt_sb = tile((db, n_blocks, n_rows), q.dtype)

        # Running state: maximum, the same on every partition; output with d on partitions, and beside it the sum.
        self.m = tile((pmax, n_rows), nl.float32)
        self.acc = tile((db, n_blocks + 1, n_rows), nl.float32)

        # PSUM, eight banks: two of scores and three of transposed K, or four of scores; one each of the rest.
        self.s_ps = psum((pmax, sizes.score_banks, bank))
        self.has_hwdge = nisa.get_nc_version() != nisa.nc_version.gen2
        # Two-byte keys are transposed bit by bit from NeuronCore-v3 on; elsewhere as a product, in float32.
        self.by_bits = k.dtype == q.dtype and q.dtype != nl.float32 and nisa.get_nc_version() != nisa.nc_version.gen2
        self.per_turn = bank // pmax * (2 if self.by_bits else 1)
        kt_dtype = q.dtype if self.by_bits else nl.float32
        self.kt_ps = []
        self.kt_sb = []
        for _ in range(0 if sizes.d_major else KT_BANKS):
            bank_shape = (db, self.per_turn * pmax)
            self.kt_ps.append(nl.ndarray(bank_shape, dtype=kt_dtype, buffer=nl.psum))
            self.kt_sb.append(tile(bank_shape, q.dtype))
        self.m_ps = psum((pmax, bank // pmax, pmax))
        self.o_ps = psum((db, n_blocks + 1, n_rows))
        # In turn: queries transposed, scores of edge keys, results transposed.
        self.t_ps = psum((pmax, bank))
        self.edge_ps = self.t_ps[:, 0 : n_rows * sizes.n_edges].reshape_dim(1, (n_rows, sizes.n_edges))
        self.zero = tile((pmax, 1), nl.float32)
        nisa.memset(dst=self.zero, value=0.0)

    def prepare(self):
        """What has to be on the chip before the first trip, while its records come."""
        self.key_tiles(self.k.dtype)
        self.constants()
        self.option_tiles()
        self.value_tiles(self.v.dtype)

    def key_tiles(self, dtype, eighths=5):
        """Buffers of K. Rows that no gather fills keep what is there, which must be finite: 0 * NaN is NaN.

        Of eight parts the Vector Engine clears `eighths`, the Scalar Engine the others.
        """
        z = self.sizes
        pmax = nl.tile_size.pmax
        edges = (z.db, z.n_blocks, z.n_edges, pmax) if z.d_major else (pmax, z.n_edges, z.d)
        self.k_edge = tile(edges, dtype)
        nisa.memset(dst=self.k_edge, value=0.0, engine=nisa.engine.gpsimd)
        self.k_sb = []
        shape = (z.db, z.n_blocks, pmax * z.tokens) if z.d_major else (pmax, z.tokens, z.d)
        for _ in range(z.n_lanes):
            self.k_sb.append(cleared(shape, dtype, self.zero, eighths))

    def value_tiles(self, dtype, eighths=5):
        """Buffers of V, finite like those of K."""
        z = self.sizes
        pmax = nl.tile_size.pmax
        self.v_sb = []
        for _ in range(z.n_lanes):
            self.v_sb.append(cleared((pmax, z.tokens, z.d), dtype, self.zero, eighths))
        self.v_edge = tile((pmax, z.n_edges, z.d), dtype)
        engine = nisa.engine.vector if eighths > 0 else nisa.engine.gpsimd
        nisa.memset(dst=self.v_edge, value=0.0, engine=engine)

    def constants(self):
        """Identities and ones, and tables of functions, which load while the first keys do."""
        pmax = nl.tile_size.pmax
        self.ones = tile((pmax, pmax), nl.float32)
        nisa.memset(dst=self.ones, value=1.0)
        warm = tile((1, 1), nl.float32)
        for function in (nl.exp, nl.log):
            nisa.activation(dst=warm, op=function, data=self.ones[0:1, 0:1])
        self.identity = nl.shared_identity_matrix(pmax, dtype=self.q.dtype)
        self.identity_f32 = nl.shared_identity_matrix(pmax, dtype=nl.float32)

    def option_tiles(self):
        """Scales, and tiles that only some options need."""
        z = self.sizes
        pmax, shape = nl.tile_size.pmax, (nl.tile_size.pmax, z.n_lanes, z.rows)
        # Lanes that share a scale are worked on together.
        self.spans = [slice(0, z.n_lanes)]
        if self.kv_scales != None:
            self.spans = []
            for lane in range(z.n_lanes):
                self.spans.append(slice(lane, lane + 1))
        # Scores as the exponential meets them are q . k, or tanh(cap_scale * q . k) with the cap in its scale.
        exp_scale = self.scale if self.softcap == None else self.softcap
        self.cap_scale = [0.0 if self.softcap == None else self.scale / self.softcap] * z.n_lanes
        self.exp_scale = [exp_scale] * z.n_lanes
        self.neg_exp_scale = [-exp_scale] * z.n_lanes
        # Scores leave PSUM only where something has to be done to them before the exponential.
        self.x = None
        if z.d_major or self.softcap != None or self.slopes != None or self.gates != None:
            self.x = tile((pmax, z.n_lanes, z.n_parts, z.rows, z.tokens // z.n_parts), nl.float32)
            nisa.memset(dst=self.x, value=0.0)
        if self.slopes != None:
            self.step = tile((pmax, z.n_parts, 1, z.tokens // z.n_parts), nl.float32)
            nisa.iota(dst=self.step, pattern=[[1, z.tokens]])
            self.newer = tile((pmax, z.s, 1), nl.float32)  # new tokens after each
            nisa.iota(dst=self.newer, pattern=[[-1, z.s]], offset=z.s - 1)
            self.slope = tile(shape, nl.float32)
            self.shift = tile(shape, nl.float32)
        if self.sinks != None:
            self.sink = tile((z.n_rows, 1), nl.float32)
        if self.kv_scales != None:
            self.factors = tile((pmax, z.n_lanes, 2), nl.float32)
            self.scaled = tile((pmax, z.n_lanes, 2), nl.float32)
            self.out_factor = tile((z.n_rows, 1), nl.float32)


def cleared(shape, dtype, zero, eighths=5):
    """A new tile of zeros: `eighths` of it cleared by the Vector Engine, the others by the Scalar Engine."""
    x = tile(shape, dtype)
    if eighths == 0:
        # As wide words, which that engine takes in as few cycles.
        words = x.reshape((shape[0], shape[1] * shape[2]))
        words = words.view(nl.float32) if shape[1] * shape[2] % 2 == 0 else words
        nisa.activation(dst=words, op=nl.copy, data=zero[0 : shape[0]].broadcast(1, words.shape[1]))
        return x
    split = shape[2] if shape[2] == 1 else shape[2] * eighths // 8
    nisa.memset(dst=x[:, :, 0:split], value=0.0)
    if split < shape[2]:
        rest = x[:, :, split : shape[2]]
        data = zero[0 : shape[0]].reshape((shape[0], 1, 1)).broadcast(1, shape[1]).broadcast(2, shape[2] - split)
        nisa.activation(dst=rest, op=nl.copy, data=data)
    return x


def tile(shape, dtype):
    """A new SBUF tile."""
    return nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)


def psum(shape):
    """A new float32 PSUM tile."""
    return nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum)


def reciprocal(x):
    """1 / x in a new tile."""
    inverse = tile(x.shape, nl.float32)
    nisa.reciprocal(dst=inverse, data=x)
    return inverse
