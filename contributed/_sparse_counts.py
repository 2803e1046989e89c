"""Sparse decode: what is counted of tiles kept and of rows read, where the caller wants it.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`.
"""

from __future__ import annotations

from contributed._decode_loads import unit_rows
from contributed._decode_softmax import store
from contributed._decode_state import tile
from contributed._nki import nisa, nl


def count_tiles(x, left_out):
    """Tiles that each row keeps; one that has no key counts as left out."""
    n = left_out.shape[1]
    out = tile((left_out.shape[0], 1), nl.float32)
    nisa.tensor_reduce(dst=out, op=nl.add, data=left_out, axis=1)
    nisa.tensor_scalar(dst=out, data=out, op0=nl.multiply, operand0=-1.0, op1=nl.add, operand1=float(n))
    nisa.tensor_tensor(dst=x.kept, data1=x.kept, data2=out, op=nl.add)


def count_rows(w, x, part, index, windows):
    """Rows of K (part 0) or V (1) that the indices [128, windows * lanes] of edge keys ask for."""
    n_lanes = w.sizes.n_lanes
    asked = tile((nl.tile_size.pmax, windows, n_lanes), nl.float32)
    by_window = index.reshape_dim(1, (windows, n_lanes))
    nisa.tensor_scalar(dst=asked, data=by_window, op0=nl.greater_equal, operand0=0.0)
    of_lane = tile((nl.tile_size.pmax, n_lanes), nl.float32)
    nisa.tensor_reduce(dst=of_lane, op=nl.add, data=asked.permute((0, 2, 1)), axis=2)
    nisa.tensor_tensor(dst=x.read[:, part], data1=x.read[:, part], data2=of_lane, op=nl.add)


def count_item(w, x, stays):
    """Rows of K that an item has, and of V that stay of it."""
    z = w.sizes
    there = tile((nl.tile_size.pmax, z.n_lanes), nl.float32)
    nisa.tensor_scalar(dst=there, data=w.item_now[:, :, z.at.v], op0=nl.greater_equal, operand0=0.0)
    count_granules(w, x, 0, there)
    count_granules(w, x, 1, stays)


def count_granules(w, x, part, asked):
    """Rows of K (part 0) or V (1) of the granules that are asked for, 1.0 in [128, lanes]."""
    read, tokens = x.read[:, part], float(w.sizes.tokens)
    nisa.scalar_tensor_tensor(dst=read, data=asked, op0=nl.multiply, operand0=tokens, op1=nl.add, operand1=read)


def report(w, x):
    """Stores what was counted."""
    z = w.sizes
    if x.kept_hbm == None:
        return
    n_lanes, rows = z.n_lanes, z.rows
    units = tile((1, n_lanes), nl.int32)
    nisa.tensor_copy(dst=units, src=w.now[0:1, :, z.at.unit_out])
    read_ps = w.t_ps[0:1, 0 : 2 * n_lanes]
    nisa.nc_matmul(dst=read_ps, stationary=w.ones[:, 0:1], moving=x.read, accumulate=False)
    read = tile((1, 2, n_lanes), nl.float32)
    nisa.tensor_copy(dst=read, src=read_ps.reshape_dim(1, (2, n_lanes)))
    n_units = x.read_hbm.shape[1] * z.n_kv_heads
    by_unit = x.read_hbm.reshape((2 * n_units, 1))
    for lane in range(n_lanes):
        unit = units[:, lane : lane + 1]
        store(w, lane, unit_rows(w, x.kept_hbm, 1, unit), x.kept[lane * rows : (lane + 1) * rows])
        # K's and V's numbers of a unit lie n_units apart.
        store(w, lane, by_unit.ap([[1, 1], [n_units, 2]], scalar_offset=unit), read[:, :, lane])
