"""Sparse decode: which tiles of an item stay, and the maxima that its exponentials are taken against.

`w` is the launch's `State`, `z` its `Sizes`, `x` its `Skipping`. The largest scores of granules are turned, so that
rows of queries stand on partitions; what follows from them is turned back to where the keys are.
"""

from __future__ import annotations

from contributed._decode_state import LOWEST, tile
from contributed._nki import nisa, nl
from contributed._sparse_counts import count_item, count_tiles
from contributed._sparse_state import LEVEL, MAXIMUM, OWN, SHARED


def compare(w, x):
    """Largest scores by granule with rows on partitions: of each row, and of its group if that decides."""
    z = w.sizes
    pmax, n_rows = nl.tile_size.pmax, z.n_rows
    mask = w.item_now[:, :, z.at.mask : z.at.mask + 1].view(nl.float32).broadcast(2, z.rows)
    there = tile((pmax, z.n_lanes, z.rows), nl.float32)
    nisa.tensor_tensor(dst=there, data1=x.top, data2=mask, op=nl.add)
    turn(w, OWN, there.reshape((pmax, n_rows)))
    if x.judged and x.by_group:
        turn(w, SHARED, of_group(w, there))


def decide(w, x):
    """Which tiles of an item stay: their rows of V into `v_index`, and `bias` far below 0 where a row leaves them out.

    Returns 1.0 for the tiles that are left out, [n_rows, n_tiles].
    """
    z = w.sizes
    pmax, n_rows, n = nl.tile_size.pmax, z.n_rows, x.n_tiles
    judged = x.running[:, 0, 0:n]
    nisa.tensor_reduce(
        dst=judged.reshape_dim(1, (x.n_high, x.n_low)),
        op=nl.maximum,
        data=x.by_tile(w.m_ps[0:n_rows, SHARED if x.by_group else OWN, :]),
        axis=(3, 4),
    )
    left_out = tile((n_rows, n), nl.float32)
    nisa.scalar_tensor_tensor(
        dst=left_out, data=best_before(w, x), op0=nl.add, operand0=x.limit, op1=nl.greater, operand1=judged
    )
    level = tile((n_rows, pmax), nl.float32)
    spread = left_out.reshape((n_rows, x.n_high, x.n_low, 1, 1)).broadcast(3, x.outer).broadcast(4, x.inner)
    nisa.tensor_scalar(dst=x.by_tile(level), data=spread, op0=nl.multiply, operand0=x.penalty)
    turn_back(w, LEVEL, level)
    if not x.by_group:
        # What a row leaves out is below its maximum.
        nisa.tensor_copy(dst=x.maximum, src=x.best)
        everywhere(w, MAXIMUM, x.best)
    mask = w.item_now[:, :, z.at.mask : z.at.mask + 1].view(nl.float32).broadcast(2, z.rows)
    lower_bias(w, x, LEVEL, mask)
    highest, stays = tile((pmax, z.n_lanes), nl.float32), tile((pmax, z.n_lanes), nl.float32)
    nisa.tensor_reduce(dst=highest, op=nl.maximum, data=x.bias, axis=2)
    nisa.tensor_scalar(dst=stays, data=highest, op0=nl.greater, operand0=-0.5 * x.penalty * w.scale)
    nisa.memset(dst=x.v_index, value=-1)
    nisa.tensor_copy_predicated(dst=x.v_index, src=w.item_now[:, :, z.at.v], predicate=stays.view(nl.uint32))
    if x.kept_hbm != None:
        count_tiles(x, left_out)
        count_item(w, x, stays)
    return left_out


def best_before(w, x):
    """The largest of the tiles before each in the order of the visit, [n_rows, n_tiles], of those in `x.running`.

    `x.best` is brought on.
    """
    n = x.n_tiles
    if not x.right_to_left:
        judged, runs = x.running[:, 0, 0:n], x.running[:, 1]
        nisa.tensor_copy(dst=runs[:, 0:1], src=x.best)
        nisa.tensor_tensor_scan(
            dst=runs[:, 1 : n + 1], data0=judged, data1=judged, initial=x.best, op0=nl.maximum, op1=nl.maximum
        )
        nisa.tensor_copy(dst=x.best, src=runs[:, n : n + 1])
        return runs[:, 0:n]
    # Largest of 2, 4, 8 ... neighbours on the right, past the end of which stands the best so far.
    past = x.best.reshape((w.sizes.n_rows, 1, 1)).broadcast(1, 3).broadcast(2, n)
    nisa.tensor_copy(dst=x.running[:, :, n : 2 * n], src=past)
    source, dst = 0, 1
    reach = 1
    while reach < n:
        nisa.tensor_tensor(
            dst=x.running[:, dst, 0:n],
            data1=x.running[:, source, 0:n],
            data2=x.running[:, source, reach : reach + n],
            op=nl.maximum,
        )
        source, dst = dst, 3 - dst
        reach = 2 * reach
    nisa.tensor_tensor(dst=x.best, data1=x.best, data2=x.running[:, source, 0:1], op=nl.maximum)
    return x.running[:, source, 1 : n + 1]


def rise(w, x, left_out):
    """The maxima of what stays: the rest of the exponentials' bias, which is then mask[p] - scale * maximum[row].

    `left_out` is None where no score decides.
    """
    n_rows, n = w.sizes.n_rows, x.n_tiles
    if not x.judged:
        rise_to_all(w, x)
        return
    if x.by_group:
        # A row's own maximum may be in a tile that its group leaves out.
        own, staying, largest = (
            tile((n_rows, n), nl.float32),
            tile((n_rows, n), nl.float32),
            tile((n_rows, 1), nl.float32),
        )
        nisa.tensor_reduce(
            dst=own.reshape_dim(1, (x.n_high, x.n_low)),
            op=nl.maximum,
            data=x.by_tile(w.m_ps[0:n_rows, OWN, :]),
            axis=(3, 4),
        )
        nisa.scalar_tensor_tensor(
            dst=staying, data=left_out, op0=nl.multiply, operand0=-x.penalty, op1=nl.add, operand1=own
        )
        nisa.tensor_reduce(dst=largest, op=nl.maximum, data=staying, axis=1)
        nisa.tensor_tensor(dst=x.maximum, data1=x.maximum, data2=largest, op=nl.maximum)
        everywhere(w, MAXIMUM, x.maximum)
    lower_bias(w, x, MAXIMUM, x.bias)


def rise_to_all(w, x):
    """As `rise`, where all tiles of an item stay."""
    z = w.sizes
    largest = tile((z.n_rows, 1), nl.float32)
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=w.m_ps[0 : z.n_rows, OWN, :], axis=1)
    nisa.tensor_tensor(dst=x.maximum, data1=x.maximum, data2=largest, op=nl.maximum)
    everywhere(w, MAXIMUM, x.maximum)
    mask = w.item_now[:, :, z.at.mask : z.at.mask + 1].view(nl.float32).broadcast(2, z.rows)
    lower_bias(w, x, MAXIMUM, mask)
    if x.kept_hbm != None:
        there = tile((nl.tile_size.pmax, z.n_lanes), nl.float32)
        nisa.tensor_scalar(dst=there, data=w.item_now[:, :, z.at.v], op0=nl.greater_equal, operand0=0.0)
        count_item(w, x, there)
        absent = tile((z.n_rows, x.n_tiles), nl.float32)
        nisa.tensor_reduce(
            dst=absent.reshape_dim(1, (x.n_high, x.n_low)),
            op=nl.maximum,
            data=x.by_tile(w.m_ps[0 : z.n_rows, OWN, :]),
            axis=(3, 4),
        )
        nisa.tensor_scalar(dst=absent, data=absent, op0=nl.less_equal, operand0=LOWEST)
        count_tiles(x, absent)


def fade(w, decay):
    """What the state is worth under the new maximum, [db, 1, rows]."""
    z = w.sizes
    gap = tile((z.db, z.n_rows), nl.float32)
    top_ps = w.m_ps[:, MAXIMUM, 0 : z.n_rows]
    nisa.tensor_tensor(dst=gap, data1=w.m[0 : z.db], data2=top_ps[0 : z.db], op=nl.subtract)
    nisa.tensor_copy(dst=w.m, src=top_ps)
    nisa.activation(dst=decay[:, 0, :], op=nl.exp, data=gap, scale=w.exp_scale[0])


def everywhere(w, part, column):
    """A column [n_rows, 1] on every partition, in a part of m_ps."""
    pmax = nl.tile_size.pmax
    wide = tile((w.sizes.n_rows, pmax), nl.float32)
    nisa.tensor_copy(dst=wide, src=column.broadcast(1, pmax))
    turn_back(w, part, wide)


def lower_bias(w, x, part, data):
    """bias = data - scale * a part of m_ps."""
    z = w.sizes
    level_ps = w.m_ps[:, part, 0 : z.n_rows].reshape_dim(1, (z.n_lanes, z.rows))
    nisa.scalar_tensor_tensor(
        dst=x.bias, data=level_ps, op0=nl.multiply, operand0=w.neg_exp_scale[0], op1=nl.add, operand1=data
    )


def of_group(w, top):
    """[128, lanes, rows] as [128, n_rows] with the largest of each lane in all its rows."""
    z = w.sizes
    pmax = nl.tile_size.pmax
    largest = tile((pmax, z.n_lanes, 1), nl.float32)
    nisa.tensor_reduce(dst=largest[:, :, 0], op=nl.maximum, data=top, axis=2)
    shared = tile((pmax, z.n_lanes, z.rows), nl.float32)
    nisa.tensor_copy(dst=shared, src=largest.broadcast(2, z.rows))
    return shared.reshape((pmax, z.n_rows))


def turn(w, part, data):
    """[128, n_rows] to [n_rows, 128] in a part of m_ps."""
    dst = w.m_ps[0 : w.sizes.n_rows, part, :]
    nisa.nc_matmul(dst=dst, stationary=data, moving=w.identity_f32, is_transpose=True, accumulate=False)


def turn_back(w, part, data):
    """[n_rows, 128] to [128, n_rows] in a part of m_ps."""
    n_rows = w.sizes.n_rows
    square = w.identity_f32[0:n_rows, 0:n_rows]
    dst = w.m_ps[:, part, 0:n_rows]
    nisa.nc_matmul(dst=dst, stationary=data, moving=square, is_transpose=True, accumulate=False)
