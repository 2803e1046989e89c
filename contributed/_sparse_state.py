"""Sparse decode: what a launch that leaves out tiles of keys holds beside the `State` of a dense one.

A *tile* is `tile_kv` consecutive keys, on as many neighbouring granules as they fill: a tile that is left out is a set
of partitions whose exponentials are 0 and whose rows of V stay in HBM. Rows of queries stand on partitions where tiles
are compared (`[n_rows, n_tiles]`), and keys where they are used.
"""

from __future__ import annotations

from contributed._decode_loads import unit_rows
from contributed._decode_scores import lane_rows
from contributed._decode_softmax import exponentials, weigh
from contributed._decode_state import DMA_ENGINES, LOWEST, tile
from contributed._nki import nisa, nl

# What is taken off scaled scores to make their exponentials 0, and the most of it in units of scores: twice as much
# is still a finite float32.
PENALTY, PENALTY_MAX = 1.0e20, 3.0e37
NEVER = -1.0e37  # a limit that no score is below
# Parts of `State.m_ps`: a row's largest scores by granule, those that decide, and, on every partition, what is
# subtracted from scores and the maximum.
OWN, SHARED, LEVEL, MAXIMUM = 0, 1, 2, 3


class Skipping(nl.NKIObject):  # type: ignore[misc]
    """Tiles and numbers of the decisions.

    Args:
        w: the launch's `State`.
        tile_kv: keys of a tile.
        n_first: stretches of edge keys that are visited before the items; the others are visited after them.
        right_to_left: order of the tiles of an item.
        by_group: whether the rows of a group decide together, by their largest score; else each row for itself.
        judged: whether scores decide on tiles; if not, all tiles of the items stay.
        limits: [batch, 1, n_q_heads] float32 in HBM: log(threshold) in units of q . k, at most 0.
        kept_hbm: [splits * batch, 1, n_q_heads] float32, tiles that a row keeps, or None.
        read_hbm: [splits * batch, 2, n_kv_heads] float32, rows of K and of V that were read, or None.
        listed: whether items come as rows alone, as the device lists them.
    """

    def __init__(self, w, tile_kv, n_first, right_to_left, by_group, judged, limits, kept_hbm, read_hbm, listed):
        z = w.sizes
        pmax, n_rows, n_lanes = nl.tile_size.pmax, z.n_rows, z.n_lanes
        self.n_first = n_first
        self.right_to_left = right_to_left
        self.by_group = by_group
        self.judged = judged
        self.limits = limits
        self.kept_hbm = kept_hbm
        self.read_hbm = read_hbm
        self.listed = listed
        self.penalty = min(PENALTY / w.scale, PENALTY_MAX)
        # Granule 16 b + a is on partition 8 a + b (see DMA_ENGINES): a tile is `inner` of a by `outer` of b.
        per_tile = tile_kv // z.tokens
        self.inner = min(per_tile, DMA_ENGINES)
        self.outer = per_tile // self.inner
        self.n_low = DMA_ENGINES // self.inner
        self.n_high = pmax // DMA_ENGINES // self.outer
        self.n_tiles = self.n_low * self.n_high
        # Edge tiles of the first and of the last side.
        self.first_edges = slice(0, n_first * z.edge_tiles)
        self.last_edges = slice(n_first * z.edge_tiles, z.n_edges)

        self.limit_coming = tile((n_rows, 1), nl.float32)
        self.limit = tile((n_rows, 1), nl.float32)
        self.best = tile((n_rows, 1), nl.float32)  # largest score that decided so far
        self.maximum = tile((n_rows, 1), nl.float32)  # largest score of the tiles that a row keeps
        self.side_maximum = tile((n_rows, 1), nl.float32)  # that of the first side
        self.top = tile((pmax, n_lanes, z.rows), nl.float32)
        # What decides of an item's tiles, and two places to take turns in.
        self.running = tile((n_rows, 3, 2 * self.n_tiles), nl.float32)
        self.rows_of_v = tile((pmax, n_lanes), nl.int32)  # where no decision is waited for
        self.v_index = tile((pmax, n_lanes), nl.int32)
        self.v_edge_index = tile((pmax, z.n_edges), nl.int32)
        # Scores of the sides, and those of the next trip's.
        self.edges = tile((pmax, n_lanes, z.rows, z.n_edges), nl.float32)
        self.edges_coming = tile((pmax, n_lanes, z.rows, z.n_edges), nl.float32)
        self.p_edge = tile((pmax, 1, n_rows, z.n_edges), w.q.dtype)
        self.edge_total = tile((pmax, n_rows), nl.float32)
        # Of the item whose values are on their way: probabilities, their sums, what the state before it is worth.
        self.p = []
        for _ in range(n_lanes):
            self.p.append(tile((pmax, z.n_parts, z.rows, z.tokens // z.n_parts), w.q.dtype))
        self.total = tile((pmax, n_rows), nl.float32)
        self.bias = tile((pmax, n_lanes, z.rows), nl.float32)
        self.decay = tile((z.db, 1, n_rows), nl.float32)
        if listed:
            self.coming = tile((pmax, n_lanes), nl.int32)
            nisa.memset(dst=w.item_of_v, value=0)
        self.last_open = None  # whether gates leave the last sides' tiles open
        if listed and self.last_edges.start < self.last_edges.stop:
            self.last_open = tile((pmax, n_lanes), nl.float32)
        if kept_hbm != None:
            self.kept = tile((n_rows, 1), nl.float32)
            self.read = tile((pmax, 2, n_lanes), nl.float32)

    def fetch(self, w):
        """Limits and alphas of the trip whose records are coming."""
        z = w.sizes
        if w.gates != None:
            w.gates.fetch(w)
        for lane in range(z.n_lanes):
            unit = w.coming[0:1, lane, z.at.unit_in : z.at.unit_in + 1]
            dst = self.limit_coming[lane * z.rows : (lane + 1) * z.rows, :]
            nisa.dma_copy(dst=dst, src=unit_rows(w, self.limits, 1, unit))

    def reset(self, w):
        """The state before the first tile."""
        nisa.tensor_copy(dst=self.limit, src=self.limit_coming)
        for x in (self.best, self.maximum, w.m):
            nisa.memset(dst=x, value=LOWEST)
        nisa.memset(dst=w.acc, value=0.0)
        if self.kept_hbm != None:
            nisa.memset(dst=self.kept, value=0.0)
            nisa.memset(dst=self.read, value=0.0)

    def ask_for_item(self, w, src):
        """A further item's record, or rows."""
        nisa.dma_copy(dst=self.coming if self.listed else w.item_coming, src=src)

    def take_item(self, w, engine):
        """The record, or rows, that have come."""
        if self.listed:
            nisa.tensor_copy(dst=w.item_of_v[:, :, w.sizes.at.v], src=self.coming, engine=engine)
        else:
            nisa.tensor_copy(dst=w.item_of_v, src=w.item_coming, engine=engine)

    def take_rows_of_v(self, rows):
        """Rows of values [128, n_lanes] that are asked for among the keys of the next item."""
        nisa.tensor_copy(dst=self.rows_of_v, src=rows, engine=nisa.engine.gpsimd)

    def exponentials(self, w, lane):
        """Those of an item that is decided."""
        exponentials(w, lane, self.p[lane], self.bias, self.total)

    def weigh(self, w, lane):
        """Their products with the values that have come."""
        weigh(w, w.v_sb[lane], self.p[lane], lane_rows(w, lane), False)

    def by_tile(self, x):
        """[n, 128] of an item's partitions as [n, n_high, n_low, outer, inner]: tiles, and the granules of each."""
        shape = (self.n_low, self.inner, self.n_high, self.outer)
        return x.reshape_dim(1, shape).permute((0, 3, 1, 4, 2))
