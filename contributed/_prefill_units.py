"""Prefill: what the steps of a chunk consist of, and how their columns of the state are taken together."""

from __future__ import annotations

from contributed._nki import nl


class Unit(nl.NKIObject):  # type: ignore[misc]
    """A tile of rows of one head with the keys of a chunk that it sees.

    Args:
        tile: number of the row tile and head.
        begin: first of the chunk's tiles of keys.
        width: tiles of keys.
        first_plain: first of the unit's tiles of which all rows see all keys.
        plain: the one after the last of these.
        recent: first tile with keys that rows always keep, or `width`.
    """

    def __init__(self, tile, begin, width, first_plain, plain, recent):
        self.tile = tile
        self.begin = begin
        self.width = width
        self.first_plain = 0
        self.plain = 0
        if first_plain < min(plain, width):
            self.first_plain = max(0, first_plain)
            self.plain = min(plain, width)
        self.recent = max(0, min(recent, width))
        # If that is known beforehand: the tile of the rows' own positions, also beyond `width`, and the first tile that
        # they see, also before the unit's.
        self.knows = False
        self.own = 0
        self.left = 0
        self.is_last = False  # of its tile
        self.number = 0  # in its chunk
        self.at = 0  # tiles of the units before it in its step
        self.end = 0
        self.pair = 0  # of steps, and its group of columns there, see `_prefill_pairs.py`
        self.group = 0


class Step(nl.NKIObject):  # type: ignore[misc]
    """Units whose scores share a slot of PSUM.

    Args:
        part: number of the chunk among those of a stream.
        masked: whether there are keys that a row does not see.
        units: one after the other.
        now: their `Tiles`.
    """

    def __init__(self, part, masked, units, now):
        self.part = part
        self.masked = masked
        self.units = units
        self.now = now
        self.number = 0  # of those that follow each other without a loop between them, by which they take turns
        self.index = 0  # in its chunk
        self.first = False  # of its chunk
        self.last = False
        # Of this step and the one before it, or of none: tiles whose factors of the state are taken now.
        self.settled: list[Tiles] = []
        # Tiles whose sums are added up now: of these the ones that see no later keys, at the last step all others.
        self.ended: list[Tiles] = []
        self.every = slice(0, 0)  # of a last step: all tiles that see keys of the chunk

    def width(self):
        """Tiles of keys of all units."""
        return self.units[len(self.units) - 1].end


class Tiles(nl.NKIObject):  # type: ignore[misc]
    """Tiles whose columns of the state one instruction takes: numbers in a row, or some heads of row tiles.

    Args:
        heads: of a block.
        first: number of the first one.
        length: of a run of consecutive numbers.
        stride: from one run to the next, a number of row tiles.
        count: runs.
    """

    def __init__(self, heads, first, length, stride, count):
        self.heads = heads
        self.first = first
        self.length = length
        self.stride = stride
        self.count = count

    def of(self, x):
        """Theirs of `x` [128, tiles of the block, ...], [128, count, length, ...]."""
        if self.count == 1:
            return x[:, self.first : self.first + self.length].expand_dim(1)
        row, head, by = self.first // self.heads, self.first % self.heads, self.stride // self.heads
        rows = x.reshape_dim(1, (x.shape[1] // self.heads, self.heads))
        return rows[:, row : row + (self.count - 1) * by + 1 : by, head : head + self.length]

    def fold(self, x):
        """`x` [128, these tiles, ...] in the same form."""
        return x.reshape_dim(1, (self.count, self.length))

    def spread(self, x):
        """`x` [128, 1] for each of them."""
        return x.expand_dim(1).broadcast(1, self.count).broadcast(2, self.length)


def in_order(units):
    """Units by the numbers of their tiles."""
    ordered: list[Unit] = []
    for unit in units:
        i = len(ordered)
        while i > 0 and ordered[i - 1].tile > unit.tile:
            i = i - 1
        after = ordered[i : len(ordered)]
        ordered = ordered[0:i]
        ordered.append(unit)
        ordered.extend(after)
    return ordered


def as_tiles(z, units):
    """The `Tiles` of units that are in order, None if one instruction cannot take them."""
    n, first = len(units), units[0].tile
    length = 1
    while length < n and units[length].tile == first + length:
        length = length + 1
    stride = z.heads if length == n else units[length].tile - first
    for i in range(n):
        if units[i].tile != first + i // length * stride + i % length:
            return None
    if n % length > 0 or (length < n and (stride % z.heads > 0 or first % z.heads + length > z.heads)):
        return None
    return Tiles(z.heads, first, length, stride, n // length)


def together(z, some, others):
    """`Tiles` of some units and others, or None as above."""
    units: list[Unit] = []
    units.extend(some)
    units.extend(others)
    return as_tiles(z, in_order(units))


def all_tiles(z, groups):
    """`Tiles` of groups of units, as few as it takes; each group is `Tiles` by itself."""
    found: list[Tiles] = []
    units: list[Unit] = []
    for group in groups:
        more = in_order(units + group)
        if len(units) > 0 and as_tiles(z, more) == None:
            found.append(as_tiles(z, units))
            more = group
        units = more
    if len(units) > 0:
        found.append(as_tiles(z, units))
    return found


def units_of(z, place):
    """Units of a chunk in the order of their tiles; `place` as in `steps_of`."""
    units: list[Unit] = []
    for i in range(z.n_tiles):
        row_tile = i // z.heads
        begin, width = 0, z.kv_tiles
        if place != None:
            begin = z.first_seen(row_tile, place)
            width = z.end_seen(row_tile, place) - begin
        if width > 0:
            first_plain, plain = z.first_plain(row_tile, place), z.end_plain(row_tile, place)
            recent = z.first_recent(row_tile, place) - begin
            unit = Unit(i, begin, width, first_plain - begin, plain - begin, recent)
            if z.knows(place):
                unit.knows = True
                unit.own = z.before_own(row_tile, place) - begin
                unit.left = z.first_tile(row_tile, place) - begin
            unit.is_last = place != None and place >= 0 and z.end_seen(row_tile, place + 1) == 0
            units.append(unit)
    return units


def where_last(units, is_last):
    """Of some units those that are the last ones of their tiles, or those that are not."""
    found: list[Unit] = []
    for unit in units:
        if unit.is_last == is_last:
            found.append(unit)
    return found


def by_row_tile(z, units):
    """For each row tile its units: one of each head, or none."""
    rows: list[list[Unit]] = []
    for _ in range(z.q_tiles):
        rows.append([])
    for unit in units:
        rows[unit.tile // z.heads].append(unit)
    return rows


def one_by_one(z, units):
    """Units of steps: in their order, as many as have room and are `Tiles`."""
    steps: list[list[Unit]] = []
    width = z.kv_tiles  # as if a step were full, so that the first unit begins one
    for unit in units:
        if width + unit.width > z.kv_tiles or together(z, steps[len(steps) - 1], [unit]) == None:
            steps.append([])
            width = 0
        steps[len(steps) - 1].append(unit)
        width = width + unit.width
    return steps


def two_by_two(z, units):
    """Units of steps: two row tiles that see few and many keys fill them together, least keys first."""
    rows = by_row_tile(z, units)
    partner = partners(z, rows)
    steps: list[list[Unit]] = []
    for width in range(1, z.kv_tiles + 1):
        for row in range(z.q_tiles):
            here, there = rows[row], rows[partner[row]]
            if len(here) > 0 and row <= partner[row] and max(here[0].width, there[0].width) == width:
                steps.extend(by_heads(z, [here] if row == partner[row] else [here, there]))
    return steps


def partners(z, rows):
    """For each row tile the one that it shares steps with, or itself; `rows` as `by_row_tile` returns them."""
    partner: list[int] = []
    for row in range(z.q_tiles):
        partner.append(row)
    for row in range(z.q_tiles):
        best, widest = row, 0
        if len(rows[row]) > 0 and partner[row] == row:
            for other in range(row + 1, z.q_tiles):
                if len(rows[other]) > 0 and partner[other] == other:
                    width = rows[other][0].width
                    if rows[row][0].width + width <= z.kv_tiles and width > widest:
                        best, widest = other, width
            partner[row] = best
            partner[best] = row
    return partner


def by_heads(z, rows):
    """Units of the steps of some row tiles: all of them of as many heads as have room."""
    width = 0
    for row in rows:
        width = width + row[0].width
    n = z.kv_tiles // width
    steps: list[list[Unit]] = []
    for first in range(0, z.heads, n):
        steps.append([])
        for row in rows:
            steps[len(steps) - 1].extend(row[first : first + n])
    return steps


def arranged(z, units):
    """Units of steps, one by one or two by two, whichever are fewer; with skip-softmax, of which there are fewer pairs.

    With N:M selection one by one: a tile costs the same in whatever step it is, and steps that grow follow each other
    more closely.
    """
    steps, by_twos = one_by_one(z, units), two_by_two(z, units)
    n, n_by_twos = len(steps), len(by_twos)
    if z.skips:
        n, n_by_twos = len(pairs_of(z, steps)), len(pairs_of(z, by_twos))
    return by_twos if z.planes == 1 and n_by_twos < n else steps


def pairs_of(z, steps):
    """Units of steps, two by two where they are `Tiles` together."""
    pairs: list[list[list[Unit]]] = []
    for i in range(len(steps)):
        last = pairs[len(pairs) - 1] if len(pairs) > 0 else []
        if len(last) == 1 and together(z, last[0], steps[i]) != None:
            last.append(steps[i])
        else:
            pairs.append([steps[i]])
    return pairs


def ordered_for(z, units, place):
    """Units that see the chunk at a place as well: in its order, so that it can follow closely; then the others.

    Where they are as wide as a step, as without a left edge, their steps have that order.
    """
    rows = by_row_tile(z, units)
    ordered: list[Unit] = []
    if place > 0:
        for step in arranged(z, where_last(units_of(z, place), True)):
            for unit in step:
                ordered.extend(rows[unit.tile // z.heads])
                rows[unit.tile // z.heads] = []
    for row in rows:
        ordered.extend(row)
    return ordered


def steps_of(z, part, place, sequential=False):
    """Steps of a chunk; row tiles that end in it come first.

    Args:
        z: sizes.
        part: number of the chunk among those of a stream.
        place: its number on the diagonal, below 0 on the left edge, None in the loop.
        sequential: whether tiles have to come in the order of their numbers.
    """
    every = units_of(z, place)
    if place == None or sequential:
        groups = one_by_one(z, every)
    else:
        groups = arranged(z, where_last(every, True))
        groups.extend(arranged(z, ordered_for(z, where_last(every, False), place + 1)))
    steps: list[Step] = []
    number = 0
    for units in groups:
        at = 0
        for unit in units:
            unit.number = number
            unit.at = at
            unit.end = at + unit.width
            number, at = number + 1, unit.end
        steps.append(Step(part, z.masked or place != None, units, as_tiles(z, in_order(units))))
    end_steps(z, steps)
    return steps


def end_steps(z, steps):
    """What is done with the maxima of a chunk's steps, for two of them at a time."""
    last = steps[len(steps) - 1]
    steps[0].first = True
    last.last = True
    open_units: list[Unit] = []
    first, end = z.n_tiles, 0
    for i in range(len(steps)):
        steps[i].index = i
        for unit in steps[i].units:
            first, end = min(first, unit.tile), max(end, unit.tile + 1)
        if i % 2 == 1 or i + 1 == len(steps):
            groups, ended = [], []
            for step in steps[i // 2 * 2 : i + 1]:
                n = n_last(step.units)
                groups.append(in_order(step.units))
                if n > 0:
                    ended.append(in_order(step.units[0:n]))
                open_units.extend(step.units[n : len(step.units)])
            steps[i].settled = all_tiles(z, groups)
            steps[i].ended = all_tiles(z, ended)
    last.every = slice(first, end)
    if len(open_units) > 0:
        last.ended = last.ended + all_tiles(z, [in_order(open_units)])


def n_last(units):
    """How many of some units are the last of their tiles; these come first."""
    n = 0
    while n < len(units) and units[n].is_last:
        n = n + 1
    return n
