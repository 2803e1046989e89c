"""Gated decode: gates added to scores.

`w` is the launch's `State`, `z` its `Sizes`, `gates` its `Gates`. Which tiles the gates leave open: `_sparse_open.py`.
"""

from __future__ import annotations

from contributed._decode_loads import flat_rows, gather
from contributed._decode_scores import AHEAD, turns_of
from contributed._decode_state import tile
from contributed._nki import nisa, nl

# logsigmoid(y) = min(y, 0) + SQUARE z^2 + LINEAR z + CONSTANT with z = min(|y|, CUT). In u = max(CUT - |y|, 0) =
# CUT - z that is min(y, 0) - (ROOT (u - LOWEST_AT))^2 + LEFT_OUT.
CUT, SQUARE, LINEAR, CONSTANT = 4.0, -0.05674870, 0.37664706, -0.65169323
ROOT = (-SQUARE) ** 0.5
LOWEST_AT = CUT + LINEAR / (2.0 * SQUARE)
LEFT_OUT = SQUARE * (CUT * CUT - LOWEST_AT * LOWEST_AT) + LINEAR * CUT + CONSTANT


class Gating(nl.NKIObject):  # type: ignore[misc]
    """What gates are made of and tested on; all in HBM but the last three.

    Args:
        alpha: [batch, 1, n_q_heads] float32.
        delta: an element for each row of K.
        limits: [batch, 1, n_kv_heads] float32: log(threshold) in units of q . k.
        units, rows, kinds, first_side, in_use, floor, start, chunks, bounds, backwards, ahead, natural, n_tiles: arrays
            of a `GatePlan`.
        n_steps: items that there is room for.
        is_logsigmoid: whether a gate is the logsigmoid of alpha * delta, else the product.
        fast: whether that is the polynomial.
    """

    def __init__(
        self,
        alpha,
        delta,
        limits,
        units,
        rows,
        kinds,
        first_side,
        in_use,
        floor,
        start,
        chunks,
        bounds,
        backwards,
        ahead,
        natural,
        n_tiles,
        n_steps,
        is_logsigmoid,
        fast,
    ):
        self.alpha = alpha
        self.delta = flat_rows(delta, 1)
        self.limits = flat_rows(limits, 1)
        self.units = units
        self.rows = rows
        self.kinds = kinds
        self.first_side = first_side
        self.in_use = in_use
        self.floor = floor
        self.start = start
        self.chunks = chunks
        self.bounds = bounds
        self.backwards = backwards
        self.ahead = ahead
        self.natural = natural
        self.n_tiles = n_tiles
        self.n_steps = n_steps
        self.is_logsigmoid = is_logsigmoid
        self.fast = fast


class Gates(nl.NKIObject):  # type: ignore[misc]
    """Gates of the keys in work.

    A gate is a line with a bend at 0, minus a curve: min(y, 0) - curve(|y|), or y alone. The Tensor Engine adds the
    line, as a product of alphas with the positive and the negative parts of deltas; the Scalar Engine makes the curve.

    Args:
        w: the launch's `State`.
        gating: its `Gating`.
    """

    def __init__(self, w, gating):
        z = w.sizes
        pmax, dtype = nl.tile_size.pmax, gating.delta.dtype
        self.gating = gating
        self.by_unit = gating.alpha.reshape((gating.alpha.shape[0] * z.n_kv_heads, z.group))
        self.alpha_coming = tile((pmax, z.n_lanes, z.rows), nl.float32)
        self.alpha = tile((pmax, z.n_lanes, z.rows), nl.float32)
        self.size = tile((pmax, z.n_lanes, z.rows), nl.float32)  # -|alpha| or |alpha|, as the curve takes it
        self.edge_delta = tile((pmax, z.n_edges), dtype)
        nisa.memset(dst=self.edge_delta, value=0.0)
        # Keys of a partition whose lines are added at once: both parts of their deltas have to be on partitions.
        keys = z.tokens // z.n_parts
        self.run = keys
        while 2 * self.run > pmax:
            self.run = self.run // 2
        # Of the parts (part, key) on partitions, factors [rows, run]: nonzero for the key itself.
        self.lines = tile((2 * self.run, z.n_lanes, z.rows, self.run), nl.float32)
        self.own_key = tile((2 * self.run, self.run), nl.float32)
        self.sign = tile((pmax, 1), nl.float32)
        self.cut = tile((pmax, 1), nl.float32)
        self.shift = tile((pmax, 1), nl.float32)
        # Both parts of deltas, of a lane and the one after it, and the same turned, until a lane's scores are complete
        # (`score_items`); lanes take turns.
        n_runs, n_turns = z.tokens // self.run, turns_of(w, z.tokens)
        n_turned = 2
        while (n_turned - 1) * n_turns + n_turns // 2 < 2 * AHEAD:
            n_turned = n_turned + 1
        self.both = []
        self.parts = []
        for _ in range(min(2, z.n_lanes)):
            self.both.append(tile((pmax, n_runs, 2, self.run), nl.float32))
        for _ in range(min(n_turned, z.n_lanes)):
            self.parts.append(tile((2 * self.run, n_runs, pmax), nl.float32))
        self.delta = []
        for _ in range(z.n_lanes):
            delta = tile((pmax, z.tokens), dtype)
            nisa.memset(dst=delta, value=0.0)
            self.delta.append(delta)

    def constants(self, w):
        """What does not depend on alphas."""
        run = self.run
        nisa.tensor_tensor(
            dst=self.own_key,
            data1=w.identity_f32[0 : 2 * run, 0:run],
            data2=w.identity_f32[0 : 2 * run, run : 2 * run],
            op=nl.add,
        )
        # 1 for the positive, -1 for the negative parts of deltas.
        nisa.tensor_reduce(dst=self.sign, op=nl.add, data=w.identity_f32[:, 0:run], axis=1)
        nisa.tensor_scalar(dst=self.sign, data=self.sign, op0=nl.multiply, operand0=2.0, op1=nl.add, operand1=-1.0)
        nisa.memset(dst=self.cut, value=CUT)
        nisa.memset(dst=self.shift, value=-ROOT * LOWEST_AT)
        self.one = w.ones[:, 0:1]

    def load_item(self, lane, index):
        """Deltas of a lane's item."""
        gather(self.delta[lane], self.gating.delta, index)

    def fetch(self, w):
        """Alphas of the trip whose records are coming."""
        z = w.sizes
        for lane in range(z.n_lanes):
            unit = w.coming[0:1, lane, z.at.unit_in : z.at.unit_in + 1]
            alpha = self.by_unit.ap([[0, nl.tile_size.pmax], [1, z.group]], scalar_offset=unit)
            nisa.dma_copy(dst=self.alpha_coming[:, lane, :], src=alpha)

    def take_alphas(self, w):
        """They are those of the items and sides from now on."""
        z, n = w.sizes, 2 * self.run
        nisa.tensor_copy(dst=self.alpha, src=self.alpha_coming)
        factor = tile((n, z.n_lanes, z.rows), nl.float32)
        if self.gating.is_logsigmoid:
            # min(alpha delta, 0) = min(alpha, 0) max(delta, 0) + min(-alpha, 0) max(-delta, 0)
            nisa.tensor_scalar(
                dst=factor,
                data=self.alpha[0:n],
                op0=nl.multiply,
                operand0=self.sign[0:n],
                op1=nl.minimum,
                operand1=0.0,
            )
            nisa.activation(dst=self.size, op=nl.abs, data=self.alpha)
            if self.gating.fast:
                nisa.tensor_scalar(dst=self.size, data=self.size, op0=nl.multiply, operand0=-1.0)
        else:
            nisa.tensor_scalar(dst=factor, data=self.alpha[0:n], op0=nl.multiply, operand0=self.sign[0:n])
        for lane in range(z.n_lanes):
            for row in range(z.rows):
                of_row = factor[:, lane, row : row + 1]
                nisa.activation(dst=self.lines[:, lane, row, :], op=nl.copy, data=self.own_key, scale=of_row)

    def load_edges(self, w, record):
        """Deltas of the keys of a trip's sides."""
        at = w.sizes.at
        for e in range(w.sizes.n_edges):
            index = record[:, 0, at.v_edge + e : at.v_edge + e + 1]
            gather(self.edge_delta[:, e : e + 1], self.gating.delta, index)

    def begin_item(self, w, lane):
        """What the Scalar Engine does for a lane's item: both parts of its deltas, and its curves where logits will be.

        Its scores need not be there, but the exponentials of the item before it have to be taken.
        """
        delta, both, curve = self.delta[lane], self.both[lane % 2], w.x[:, lane]
        by_run = delta.reshape_dim(1, (both.shape[1], both.shape[3]))
        nisa.activation(dst=both[:, :, 0], op=nl.relu, data=by_run)
        nisa.activation(dst=both[:, :, 1], op=nl.relu, data=by_run, scale=-1.0)
        self.bend(lane, curve, delta.reshape_dim(1, (curve.shape[1], curve.shape[3])))

    def turn_parts(self, w, lane):
        """Those parts with keys on partitions."""
        pmax, n = nl.tile_size.pmax, 2 * self.run
        both, parts = self.both[lane % 2], self.parts[lane % len(self.parts)]
        for i in range(both.shape[1]):
            parts_ps, data = w.t_ps[0:n, 0:pmax], both[:, i].reshape((pmax, n))
            nisa.nc_matmul(dst=parts_ps, stationary=data, moving=w.identity_f32, is_transpose=True, accumulate=False)
            nisa.tensor_copy(dst=parts[:, i], src=parts_ps)

    def add_to_item(self, w, lane, dst, scores):
        """dst = scores + gates, [128, parts, rows, keys]; scores are in PSUM and get the lines, dst has the curves."""
        keys, run = scores.shape[3], self.run
        for i in range(w.sizes.tokens // run):
            part, first = i * run // keys, i * run % keys
            nisa.nc_matmul(
                dst=scores[:, part, :, first : first + run],
                stationary=self.parts[lane % len(self.parts)][:, i],
                moving=self.lines[:, lane],
                accumulate=True,
            )
        if self.gating.is_logsigmoid:
            nisa.tensor_tensor(dst=dst, data1=scores, data2=dst, op=nl.subtract)
        else:
            nisa.tensor_copy(dst=dst, src=scores)

    def add_to_edges(self, lane, dst, src):
        """The same for edge keys, [128, 1, rows, n_edges], of which there are few."""
        line, curve = tile(dst.shape, nl.float32), tile(dst.shape, nl.float32)
        delta = self.edge_delta.reshape((dst.shape[0], 1, dst.shape[3]))
        for row in range(dst.shape[2]):
            nisa.activation(dst=line[:, :, row, :], op=nl.copy, data=delta, scale=self.alpha[:, lane, row : row + 1])
        if not self.gating.is_logsigmoid:
            nisa.tensor_tensor(dst=dst, data1=line, data2=src, op=nl.add)
            return
        nisa.scalar_tensor_tensor(dst=dst, data=line, op0=nl.minimum, operand0=0.0, op1=nl.add, operand1=src)
        self.bend(lane, curve, delta)
        nisa.tensor_tensor(dst=dst, data1=dst, data2=curve, op=nl.subtract)

    def bend(self, lane, dst, delta):
        """dst [128, parts, rows, keys] = curves, without the polynomial's constant (`add_constant`).

        Row by row on the Scalar Engine, which takes a factor for each partition.
        """
        if not self.gating.is_logsigmoid:
            return
        size = tile(delta.shape, nl.float32)
        nisa.activation(dst=size, op=nl.abs, data=delta)
        for row in range(dst.shape[2]):
            factor, of_row = self.size[:, lane, row : row + 1], dst[:, :, row, :]
            if self.gating.fast:
                nisa.activation(dst=of_row, op=nl.relu, data=size, scale=factor, bias=self.cut)
            else:
                nisa.activation(dst=of_row, op=nl.copy, data=size, scale=factor)
        if self.gating.fast:
            nisa.activation(dst=dst, op=nl.square, data=dst, scale=ROOT, bias=self.shift)
        else:
            nisa.activation(dst=dst, op=nl.exp, data=dst, scale=-1.0)
            nisa.activation(dst=dst, op=nl.log, data=dst, bias=self.one)

    def add_constant(self, w):
        """What `bend` leaves out of the polynomial, into the maxima, where it reaches the lse.

        Nothing else depends on it: it is the same for all keys.
        """
        if self.gating.is_logsigmoid and self.gating.fast:
            nisa.tensor_scalar(dst=w.m, data=w.m, op0=nl.add, operand0=LEFT_OUT)
