"""Prefill: N:M selection, the best N scores of every M consecutive keys.

Keys are loaded with their number within a group outermost: column `i * 128 / M + g` of a tile of 128 keys is key `i` of
group `g`, so that all keys with the same number, a *plane*, are next to each other. Planes are compared pairwise, at
distance 1, 2, .. M - 1: the Tensor Engine takes differences of scores, the Scalar Engine their signs, or the Vector
Engine compares. The Tensor Engine adds up, for each key, who beats whom, by products with plus and minus a multiple of
the identity; and a minimum with the sum lets a score through or replaces it by a number below all scores. The largest
score of a group always stays: maxima are those of all scores.

Differences know nothing of what is masked. Where all rows see all keys they need not; and where the tile on the
diagonal is that of the rows' own positions, which keys a row sees, and which of the last ones it always keeps, is the
same in all blocks: such masks are products with multiples of the identity as well. Elsewhere the Vector Engine
compares.

Ties: for M = 4 the lower index wins; for M = 8 all that equal the N-th largest stay.
"""

from __future__ import annotations

from contributed._nki import nisa, nl
from contributed._prefill_state import MASKED, RECENT, psum, tile

# Factor of comparisons: far above all scores, and its sixteenfold is far from the end of float32.
LARGE = 2.0**120
# Differences of scores are larger than this or 0: a tie counts as won.
TIE = 1.0e-30
KEEP = 16.0  # times LARGE: outweighs all comparisons of a key
SLOTS = 2
DIFFERENCE_BANKS = 3


def some_planes(x, m, first, end):
    """The planes first..end of [p, tiles * 128], as [p, tiles, (end - first) * groups]."""
    groups = nl.tile_size.pmax // m
    return x.reshape_dim(1, (x.shape[1] // nl.tile_size.pmax, m * groups))[:, :, first * groups : end * groups]


class Selection(nl.NKIObject):  # type: ignore[misc]
    """The tiles of N:M selection.

    Args:
        n: scores that stay of a group.
        m: 4 or 8.
        sink: keys at the beginning that always stay.
        recent: keys up to a row's position that always stay.
        sizes: of the launch.
        dtype: of q; None to have all scores compared on the Vector Engine.
    """

    def __init__(self, n, m, sink, recent, sizes, dtype):
        pmax, bank = nl.tile_size.pmax, nl.tile_size.psum_bank_fmax
        z = sizes
        self.n = n
        self.m = m
        self.sink = sink
        self.recent = recent
        self.tiles = z.kv_tiles
        self.sink_tiles = min(z.kv_tiles, (sink + pmax - 1) // pmax)
        # Comparisons of a key with later ones, at distance 1, then 2 and so on: whether it wins; where ties keep both,
        # also whether it wins without a tie.
        self.both = m == 8
        self.first = []
        n_pairs = 0
        for distance in range(m):
            self.first.append(n_pairs)
            if distance > 0:
                n_pairs = n_pairs + (m - distance) * z.keys // m
        self.wins = []
        self.clear_wins = []
        for _ in range(SLOTS):
            self.wins.append(tile((pmax, n_pairs), nl.bfloat16))
            if self.both:
                self.clear_wins.append(tile((pmax, n_pairs), nl.bfloat16))
        self.plus = tile((pmax, pmax), nl.bfloat16)
        self.minus = tile((pmax, pmax), nl.bfloat16)
        self.rank_ps = psum((pmax, z.keys), nl.float32)
        # Differences of scores, where the Tensor Engine can form them: with one product per score.
        self.by_tensor = z.n_blocks == 1 and dtype != None
        self.difference_ps = []
        self.neg_qt = None
        if self.by_tensor:
            self.neg_qt = tile((z.db, z.n_tiles, pmax), dtype)
            for _ in range(DIFFERENCE_BANKS - (1 if z.skips else 0)):
                self.difference_ps.append(psum((pmax, bank), nl.float32))
        # Distances whose differences share a bank.
        self.turns: list[list[int]] = []
        width = bank
        for distance in range(1, m):
            more = (m - distance) * z.keys // m
            if width + more > bank:
                self.turns.append([])
                width = 0
            self.turns[len(self.turns) - 1].append(distance)
            width = width + more
        # Of rows whose own positions are a tile of keys: which of these are later, 1 or 0; of a tile's comparisons, as
        # in `wins`, those in which the other key is later and the one is not; and of the tiles before it, and it, the
        # keys that always stay, `KEEP` or 0. Not with skip-softmax, which takes maxima tile by tile.
        self.known = self.by_tensor and not z.skips and z.recent_tiles <= z.kv_tiles
        self.before_own = z.recent_tiles
        self.later = None
        self.behind_later = None
        self.stays = None
        if self.known:
            self.later = tile((pmax, pmax), nl.bfloat16)
            self.behind_later = tile((pmax, n_pairs // z.kv_tiles), nl.bfloat16)
            self.stays = tile((pmax, (self.before_own + 1) * pmax), nl.bfloat16)
        # Bounds of what rows see and always keep, in groups from the chunk's first one, for each plane.
        shape = (pmax, z.q_tiles, m)
        self.lo = tile(shape, nl.float32)
        self.hi = tile(shape, nl.float32)
        self.recent_lo = tile(shape, nl.float32)
        self.recent_hi = tile(shape, nl.float32)
        self.sink_hi = tile((pmax, 1, m), nl.float32)
        self.sink_column = tile((pmax, 1), nl.float32)
        self.number = tile(shape, nl.float32)
        self.tie = tile((pmax, 1), nl.float32)
        self.no_tie = tile((pmax, 1), nl.float32)
        self.per_group = tile((pmax, 1), nl.float32)
        self.before = tile((pmax, 1), nl.float32)
        self.beyond = tile((pmax, 1), nl.float32)
        self.relative = tile((pmax, z.q_tiles), nl.float32)
        self.kept_recent = tile((pmax, SLOTS, z.keys), nl.float32)
        self.kept_sink = tile((pmax, SLOTS, z.keys), nl.float32)

    def prepare(self):
        """Constants."""
        identity = nl.shared_identity_matrix(nl.tile_size.pmax, dtype=nl.bfloat16)
        nisa.tensor_scalar(dst=self.plus, data=identity, op0=nl.multiply, operand0=LARGE)
        nisa.tensor_scalar(dst=self.minus, data=identity, op0=nl.multiply, operand0=-LARGE)
        nisa.memset(dst=self.tie, value=TIE)
        nisa.memset(dst=self.no_tie, value=-TIE)
        nisa.iota(dst=self.number, pattern=[[0, self.number.shape[1]], [1, self.m]])
        nisa.memset(dst=self.per_group, value=1.0 / self.m)
        nisa.memset(dst=self.sink_column, value=float(self.sink))
        nisa.memset(dst=self.before, value=-1.0)
        nisa.memset(dst=self.beyond, value=float(self.kept_recent.shape[2]))
        if self.known:
            prepare_own(self)

    def knows(self, unit):
        """Whether the program knows which keys rows see, and which of the last ones they always keep."""
        return self.known and unit.own >= 0

    def crosses(self, unit):
        """Whether it does, and the diagonal is in the unit's last tile."""
        return self.knows(unit) and unit.own < unit.width


def prepare_own(s):
    """What each row sees and keeps of the tile of its own position, and of those before it."""
    pmax, m, n = nl.tile_size.pmax, s.m, s.before_own
    # How far keys are behind rows, and the tiles before.
    ahead = tile((pmax, (n + 1) * pmax), nl.float32)
    pattern = [[pmax, n + 1], [1, m], [m, pmax // m]]
    nisa.iota(dst=ahead.reshape_dim(1, (n + 1, m, pmax // m)), pattern=pattern, channel_multiplier=-1)
    here = float(n * pmax)
    nisa.tensor_scalar(dst=s.later, data=ahead[:, n * pmax :], op0=nl.greater, operand0=here)
    nisa.tensor_scalar(
        dst=s.stays, data=ahead, op0=nl.greater, operand0=here - s.recent, op1=nl.multiply, operand1=KEEP
    )
    for distance in range(1, m):
        one, other = some_planes(s.later, m, 0, m - distance), some_planes(s.later, m, distance, m)
        dst = of_own(s, distance).reshape_dim(1, (1, -1))
        nisa.tensor_tensor(dst=dst, data1=other, data2=one, op=nl.subtract)


def of_own(s, distance):
    """Comparisons at a distance of `behind_later`."""
    n = (s.m - distance) * nl.tile_size.pmax // s.m
    first = s.first[distance] // s.tiles
    return s.behind_later[:, first : first + n]


def begin_chunk_planes(w, base, record):
    """Bounds of each plane for a chunk whose first key has the position `base`; `record`: of the block."""
    s = w.selection
    q_tiles = w.sizes.q_tiles
    gpsimd = nisa.engine.gpsimd
    plane_bounds(s, s.lo, w.lo)
    plane_bounds(s, s.hi, w.hi)
    if s.recent > 0:
        for i in range(2):
            bound = record[:, RECENT + i, :].view(nl.float32)
            nisa.tensor_tensor(
                dst=s.relative, data1=bound, data2=base.broadcast(1, q_tiles), op=nl.subtract, engine=gpsimd
            )
            plane_bounds(s, s.recent_lo if i == 0 else s.recent_hi, s.relative)
    if s.sink > 0:
        relative = s.relative[:, 0:1]
        nisa.tensor_tensor(dst=relative, data1=s.sink_column, data2=base, op=nl.subtract, engine=gpsimd)
        plane_bounds(s, s.sink_hi, relative)


def plane_bounds(s, dst, bound):
    """dst [128, n, m] = for each plane, the first group whose key is not below `bound` [128, n], as a real number."""
    gpsimd = nisa.engine.gpsimd
    n = dst.shape[1]
    nisa.tensor_tensor(
        dst=dst, data1=bound.expand_dim(2).broadcast(2, s.m), data2=s.number[:, 0:n], op=nl.subtract, engine=gpsimd
    )
    ratio = s.per_group.expand_dim(2).broadcast(1, n).broadcast(2, s.m)
    nisa.tensor_tensor(dst=dst, data1=dst, data2=ratio, op=nl.multiply, engine=gpsimd)


def visible_planes(w, unit, x, s_ps, row_tile, top):
    """Scores with those masked that a row does not see, and their maximum into `top`, if that is not None."""
    s = w.selection
    plain = unit.plain * nl.tile_size.pmax
    edge = unit.plain < unit.width
    if s.knows(unit):
        # What rows do not see is masked in PSUM.
        select(w, x, s_ps, s.before, s.beyond, top, True, True)
        edge = False
    elif plain > 0:
        # Seen by all rows; bounds are on either side of it, whatever the order of the columns.
        lo, hi = w.lo[:, row_tile : row_tile + 1], w.hi[:, row_tile : row_tile + 1]
        select(w, x[:, 0:plain], s_ps[:, 0:plain], lo, hi, top, True, not edge)
    if edge:
        for i in range(s.m):
            lo, hi = s.lo[:, row_tile, i : i + 1], s.hi[:, row_tile, i : i + 1]
            dst, src = plane(s, x, unit.plain, unit.width, i), plane(s, s_ps, unit.plain, unit.width, i)
            select(w, dst, src, lo, hi, top, plain == 0 and i == 0, i == s.m - 1, unit.begin + unit.plain)
    if w.is_gen2 and top != None:
        nisa.tensor_reduce(dst=top, op=nl.maximum, data=x, axis=1)


def mask_later(s, unit, s_ps):
    """Scores in PSUM of keys later than rows, where the program knows them, become less than all others."""
    if s.crosses(unit):
        pmax = nl.tile_size.pmax
        own = unit.at + unit.own
        add(s_ps[:, own * pmax : (own + 1) * pmax], s.minus, s.later, True)


def select_planes(w, x, s_ps, row_tile, top, t):
    """Tile t of a unit: scores with those masked that a row does not see, and their maximum."""
    s = w.selection
    for i in range(s.m):
        lo, hi = s.lo[:, row_tile, i : i + 1], s.hi[:, row_tile, i : i + 1]
        select(w, plane(s, x, 0, 1, i), plane(s, s_ps, 0, 1, i), lo, hi, top, i == 0, i == s.m - 1, t)


def plane(s, x, first, end, i):
    """Plane i of the tiles first..end of [p, columns]."""
    pmax = nl.tile_size.pmax
    return some_planes(x[:, first * pmax : end * pmax], s.m, i, i + 1)


def keep_always(w, u, unit, x):
    """Scores that stay whatever the others are, before others are masked."""
    s = w.selection
    row_tile = unit.tile // w.sizes.heads
    if s.recent > 0 and unit.recent < unit.width and not s.knows(unit):
        first, end = unit.at + unit.recent, unit.end
        for i in range(s.m):
            lo, hi = s.recent_lo[:, row_tile, i : i + 1], s.recent_hi[:, row_tile, i : i + 1]
            dst = plane(s, s.kept_recent[:, u % SLOTS], first, end, i)
            select(w, dst, plane(s, x, first, end, i), lo, hi, None, True, False, unit.begin + unit.recent)
    if sink_tiles(s, unit) > 0:
        first, end = unit.at, unit.at + sink_tiles(s, unit)
        for i in range(s.m):
            dst = plane(s, s.kept_sink[:, u % SLOTS], first, end, i)
            select(
                w, dst, plane(s, x, first, end, i), s.before, s.sink_hi[:, 0, i : i + 1], None, True, False, unit.begin
            )


def sink_tiles(s, unit):
    """How many of a unit's tiles may have keys at the beginning that always stay."""
    return max(0, min(s.sink_tiles - unit.begin, unit.width))


class Part(nl.NKIObject):  # type: ignore[misc]
    """Tiles of a step whose comparisons are made in one way: `by_tensor`, or on the Vector Engine.

    The Tensor Engine takes the difference of two scores, each rounded to float32 as it is summed up in PSUM, and the
    Scalar Engine its sign.
    """

    def __init__(self, first, end, by_tensor):
        self.first = first
        self.end = end
        self.by_tensor = by_tensor

    def at(self, s, distance):
        """Where the comparisons at a distance are among all of the step."""
        n = (s.m - distance) * nl.tile_size.pmax // s.m
        return slice(s.first[distance] + self.first * n, s.first[distance] + self.end * n)

    def comparisons(self, s, x, distance):
        """Those of `x` at a distance, [128, tiles, (m - distance) * groups]."""
        return x[:, self.at(s, distance)].reshape_dim(1, (self.end - self.first, -1))

    def columns(self):
        """Its columns of a step's scores."""
        return slice(self.first * nl.tile_size.pmax, self.end * nl.tile_size.pmax)


def parts_of(s, unit):
    """A unit's parts."""
    if s.knows(unit):
        return [Part(unit.at, unit.end, True)]
    if not s.by_tensor or unit.plain == 0:
        return [Part(unit.at, unit.end, False)]
    middle = unit.at + unit.plain
    if unit.plain == unit.width:
        return [Part(unit.at, middle, True)]
    return [Part(unit.at, middle, True), Part(middle, unit.end, False)]


def compare(w, u, units, x, early):
    """Whether the keys of a step's units beat later ones of their group: 1 if so, else 0, or -1 by_tensor.

    Early are the first distances; the others are due when these have left PSUM.
    """
    s = w.selection
    some = min(DIFFERENCE_BANKS, len(s.turns))
    first, end = 0 if early else some, some if early else len(s.turns)
    for unit in units:
        if early:
            keep_always(w, u, unit, x)
        for part in parts_of(s, unit):
            for i in range(first, end):
                if part.by_tensor:
                    compare_by_tensor(w, u, unit, part, i)
                else:
                    compare_by_vector(s, u, part, i, x[:, part.columns()])


def compare_by_vector(s, u, part, i, scores):
    """Comparisons of a turn of distances."""
    m = s.m
    for distance in s.turns[i]:
        ahead, behind = some_planes(scores, m, 0, m - distance), some_planes(scores, m, distance, m)
        wins = part.comparisons(s, s.wins[u % SLOTS], distance)
        nisa.tensor_tensor(dst=wins, data1=ahead, data2=behind, op=nl.greater_equal)
        if s.both:
            clear = part.comparisons(s, s.clear_wins[u % SLOTS], distance)
            nisa.tensor_tensor(dst=clear, data1=ahead, data2=behind, op=nl.greater)


def compare_by_tensor(w, u, unit, part, i):
    """The same, of differences that the Tensor Engine takes."""
    s = w.selection
    m = s.m
    d_ps = s.difference_ps[i % len(s.difference_ps)]
    n_tiles = part.end - part.first
    kt = w.kt_sb[:, 0, 0 : n_tiles * nl.tile_size.pmax]
    at = 0
    for distance in s.turns[i]:
        ahead, behind = some_planes(kt, m, 0, m - distance), some_planes(kt, m, distance, m)
        width = ahead.shape[1] * ahead.shape[2]
        dst = d_ps[:, at : at + width].reshape_dim(1, (ahead.shape[1], ahead.shape[2]))
        nisa.nc_matmul(dst=dst, stationary=w.qt_sb[:, 0, unit.tile, :], moving=ahead, accumulate=False)
        nisa.nc_matmul(dst=dst, stationary=s.neg_qt[:, unit.tile, :], moving=behind, accumulate=True)
        if s.crosses(unit):
            # A key that is seen beats one that is not.
            add(dst[:, unit.own, :], s.plus, of_own(s, distance), True)
        at = at + width
    if n_tiles == w.sizes.kv_tiles:
        # The distances are next to each other in SBUF as well.
        columns = slice(part.at(s, s.turns[i][0]).start, part.at(s, s.turns[i][len(s.turns[i]) - 1]).stop)
        signs(s, u, d_ps[:, 0:at], columns)
        return
    at = 0
    for distance in s.turns[i]:
        columns = part.at(s, distance)
        width = columns.stop - columns.start
        signs(s, u, d_ps[:, at : at + width], columns)
        at = at + width


def signs(s, u, d_ps, columns):
    """Comparisons of differences."""
    nisa.activation(dst=s.wins[u % SLOTS][:, columns], op=nl.sign, data=d_ps, bias=s.tie)
    if s.both:
        clear = s.clear_wins[u % SLOTS][:, columns]
        nisa.activation(dst=clear, op=nl.sign, data=d_ps, bias=s.no_tie)


def choose(w, u, units, x):
    """Scores of a step that do not stay become less than all others."""
    s = w.selection
    for unit in units:
        for part in parts_of(s, unit):
            add_up(s, u, part)
            if s.recent > 0 and unit.recent < unit.width and s.knows(unit):
                add_recent(s, unit)
            mask_beaten(s, part, x)
        if s.recent > 0 and unit.recent < unit.width and not s.knows(unit):
            keep(x, s.kept_recent[:, u % SLOTS], unit.at + unit.recent, unit.end)
        if sink_tiles(s, unit) > 0:
            keep(x, s.kept_sink[:, u % SLOTS], unit.at, unit.at + sink_tiles(s, unit))


def add_up(s, u, part):
    """rank_ps = the later keys that a key beats, less the earlier ones that beat it, times LARGE."""
    m = s.m
    rank = s.rank_ps[:, part.columns()]
    for distance in range(1, m):
        wins = part.comparisons(s, s.wins[u % SLOTS], distance)
        lost = part.comparisons(s, s.clear_wins[u % SLOTS], distance) if s.both else wins
        add(some_planes(rank, m, 0, m - distance), s.plus, wins, distance > 1)
        if distance > 1:
            add(some_planes(rank, m, distance, m), s.minus, lost, True)
            continue
        # The last plane has no later one, so this is the first that is written to it.
        n = (m - 2) * nl.tile_size.pmax // m
        add(some_planes(rank, m, 1, m - 1), s.minus, lost[:, :, 0:n], True)
        add(some_planes(rank, m, m - 1, m), s.minus, lost[:, :, n : lost.shape[2]], False)


def add_recent(s, unit):
    """Ranks of keys that always stay, where the program knows them, become higher than all others."""
    pmax = nl.tile_size.pmax
    # The last tile of `stays` belongs to the rows' own.
    first, n = s.before_own - unit.own + unit.recent, unit.width - unit.recent
    ranks = s.rank_ps[:, (unit.at + unit.recent) * pmax : unit.end * pmax]
    add(ranks, s.plus, s.stays[:, first * pmax : (first + n) * pmax], True)


def mask_beaten(s, part, x):
    """Scores of keys that too many beat become less than all others."""
    m = s.m
    ranks, scores = s.rank_ps[:, part.columns()], x[:, part.columns()]
    if part.by_tensor:
        # A defeat is -1: all others, less twice those that beat it.
        mask_below(scores, ranks, m - 2 * s.n)
        return
    for i in range(m):
        # The later keys, less all that beat it.
        mask_below(some_planes(scores, m, i, i + 1), some_planes(ranks, m, i, i + 1), m - 1 - i - s.n + 0.5)


def mask_below(scores, ranks, least):
    """Scores whose rank is not above the least one become less than all others."""
    offset = -LARGE * least
    nisa.scalar_tensor_tensor(dst=scores, data=ranks, op0=nl.add, operand0=offset, op1=nl.minimum, operand1=scores)


def keep(x, kept, first, end):
    """The larger of both, on some tiles."""
    pmax = nl.tile_size.pmax
    at = slice(first * pmax, end * pmax)
    nisa.tensor_tensor(dst=x[:, at], data1=x[:, at], data2=kept[:, at], op=nl.maximum)


def add(dst, stationary, moving, accumulate):
    """dst = moving times a multiple of the identity, or += that."""
    nisa.nc_matmul(dst=dst, stationary=stationary, moving=moving, accumulate=accumulate)


def select(w, dst, src, lo, hi, top, first, last, tiles_before=0):
    """dst = the columns lo <= column < hi of src, the others masked.

    Args:
        w: the launch's `State`.
        dst: [128, columns] or [128, tiles, groups], whose columns are counted from `tiles_before` tiles on.
        src: as dst.
        lo: [128, 1].
        hi: [128, 1].
        top: maximum of this and the calls before it since `first`, written by the `last`; or None.
        first: whether a maximum begins.
        last: whether it ends.
        tiles_before: of 128 columns, or of as many groups as one of dst.
    """
    width = dst.shape[1] if len(dst.shape) == 2 else dst.shape[1] * dst.shape[2]
    before = tiles_before * (nl.tile_size.pmax if len(dst.shape) == 2 else dst.shape[2])
    if nisa.get_nc_version() != nisa.nc_version.gen2:
        nisa.range_select(
            dst=dst,
            on_true_tile=src,
            comp_op0=nl.greater_equal,
            comp_op1=nl.less,
            bound0=lo,
            bound1=hi,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if first else nisa.reduce_cmd.reduce,
            reduce_op=nl.maximum,
            reduce_res=top if last and top != None else None,
            range_start=before,
        )
        return
    outside, position = w.outside[:, 0:width], w.position[:, before : before + width]
    if len(dst.shape) == 3:
        outside = outside.reshape_dim(1, (dst.shape[1], dst.shape[2]))
        position = position.reshape_dim(1, (dst.shape[1], dst.shape[2]))
    nisa.tensor_scalar(dst=outside, data=position, op0=nl.less, operand0=lo)
    nisa.scalar_tensor_tensor(
        dst=outside, data=position, op0=nl.greater_equal, operand0=hi, op1=nl.maximum, operand1=outside
    )
    nisa.scalar_tensor_tensor(dst=dst, data=outside, op0=nl.multiply, operand0=MASKED, op1=nl.add, operand1=src)
