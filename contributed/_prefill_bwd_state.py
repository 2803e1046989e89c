"""Prefill, backward: the tiles of a launch on the chip. Blocks, chunks and steps are those of `_prefill_state.py`."""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_state import RECORD_COLUMNS, psum, tile

# Minus lse of a row that sees nothing is below this; its probabilities are exponentials of it.
NOTHING = -1.0e30
# Steps between the scores of a tile and its part in dK and dV, and from there to its part in dQ.
LAG = 2
TURN_LAG = 1
SLOTS = LAG + 1
SCORE_SLOTS = 2
PARTS = 2  # chunks in work at a time
DIGESTED = 2  # tiles of which delta is computed at a time


class State(nl.NKIObject):  # type: ignore[misc]
    """The tiles of a launch.

    Args:
        sizes: numbers of the launch, `_prefill_state.Sizes`.
        do: gradient of o, as q, in HBM.
        q: [total_q, n_q_heads, d] in HBM.
        k: [total_kv, n_kv_heads, d] in HBM.
        v: as k.
        o: as q.
        lse: [total_q, n_q_heads] float32 in HBM.
        dq_hbm: as q.
        dk_sum: [total_kv, n_kv_heads, d] float32 in HBM, of which the launch adds parts to what is there.
        dv_sum: likewise.
        softmax_scale: multiplies q . k.
    """

    def __init__(self, sizes, do, q, k, v, o, lse, dq_hbm, dk_sum, dv_sum, softmax_scale):
        pmax, bank = nl.tile_size.pmax, nl.tile_size.psum_bank_fmax
        z = sizes
        self.sizes = sizes
        self.kv_heads = k.shape[1]
        self.n_units = q.shape[1] // z.heads  # blocks of heads
        rows = q.shape[0] * self.n_units
        self.do = do.reshape((rows, z.heads * z.d))
        self.q = q.reshape((rows, z.heads * z.d))
        self.o = o.reshape((rows, z.heads * z.d))
        self.dq_hbm = dq_hbm.reshape((rows, z.heads * z.d))
        self.lse = lse.reshape((rows, z.heads))
        rows = k.shape[0] * k.shape[1]
        self.k = k.reshape((rows, z.d))
        self.v = v.reshape((rows, z.d))
        self.dk_sum = dk_sum.reshape((rows, z.d))
        self.dv_sum = dv_sum.reshape((rows, z.d))
        # As in the forward, whose scores these have to equal.
        self.q_sign = 1.0 if softmax_scale > 0 else -1.0 if softmax_scale < 0 else 0.0
        self.scale = abs(softmax_scale) if softmax_scale != 0 else 1.0
        self.softmax_scale = softmax_scale
        self.is_gen2 = nisa.get_nc_version() == nisa.nc_version.gen2

        # Records of blocks: as they come, of the rows that are loading, of the block in work and of the one in store.
        shape = (pmax, 3, z.q_tiles)
        self.block_coming = tile(shape, nl.int32)
        self.block_loading = tile(shape, nl.int32)
        self.block_now = tile(shape, nl.int32)
        self.block_storing = tile(shape, nl.int32)
        # Records of chunks, likewise.
        shape = (pmax, RECORD_COLUMNS + z.kv_tiles)
        self.coming = tile(shape, nl.int32)
        self.loading = tile(shape, nl.int32)
        self.now = [tile(shape, nl.int32) for_part in ()]
