"""Steps of a prefill chunk: every tile of keys that a tile of rows sees is in one of them, once, and they are few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from contributed._nki import nisa, nl
from contributed._prefill_loads import Results
from contributed._prefill_pairs import END_LAG, Chunk, leaves
from contributed._prefill_state import Sizes
from contributed._prefill_steps import follows_closely
from contributed._prefill_units import Step, Tiles, as_tiles, pairs_of, steps_of
from nkisim import simulate

LAG = 3  # of the forward from NeuronCore-v3 on
HEADS = (1, 2, 3, 4, 8)


def inside(look: Callable[[], None]) -> None:
    """Call `look` where a kernel is being built."""

    def kernel(x: Any) -> Any:
        look()
        return x

    simulate(kernel, target="trn2")(np.zeros((1, 1), np.float32))


def sizes(
    heads: int,
    q_tiles: int,
    kv_tiles: int,
    overhang: int = 1,
    *,
    left_tiles: int | None = None,
    edge_tiles: int = 0,
    sparsity_m: int = 0,
    skips: bool = False,
) -> Sizes:
    """Sizes of a launch, to be made inside a kernel."""
    whole = (overhang, False, True, False, False, sparsity_m, 0, skips)
    return Sizes(64, heads, q_tiles, kv_tiles, *whole, left_tiles, 0, edge_tiles, 0, 0, q_tiles)


def numbers(tiles: Tiles) -> list[int]:
    """The tiles that an instruction takes, in its order."""
    return [tiles.first + i * tiles.stride + j for i in range(tiles.count) for j in range(tiles.length)]


def visible(z: Sizes, place: int) -> set[tuple[int, int]]:
    """(tile, tile of keys of the chunk), as a block's first row tile stands on its own tile of keys."""
    seen = set()
    first = place * z.kv_tiles if place >= 0 else (place + z.n_edge) * z.kv_tiles - z.left_tiles
    for tile in range(z.n_tiles):
        row_tile = tile // z.heads
        for t in range(z.kv_tiles):
            position = first + t
            near = z.left_tiles is None or position >= row_tile - z.left_tiles
            of_edge = place >= 0 or position < z.edge_tiles - z.left_tiles
            if near and of_edge and position < row_tile + z.overhang:
                seen.add((tile, t))
    return seen


def check_steps(z: Sizes, steps: Sequence[Step], seen: set[tuple[int, int]]) -> None:
    """Everything that the kernel counts on."""
    units = [unit for step in steps for unit in step.units]
    parts = [(unit.tile, unit.begin + t) for unit in units for t in range(unit.width)]
    assert len(parts) == len(set(parts))
    assert set(parts) == seen
    assert [unit.number for unit in units] == list(range(len(units)))
    assert [step.index for step in steps] == list(range(len(steps)))
    assert [(step.first, step.last) for step in steps] == [(i == 0, i == len(steps) - 1) for i in range(len(steps))]
    tiles = {unit.tile for unit in units}
    assert set(range(steps[-1].every.start, steps[-1].every.stop)) == tiles
    # Tiles that end come before those that go on.
    assert [unit.is_last for unit in units] == sorted([unit.is_last for unit in units], reverse=True)
    settled: set[int] = set()
    ended: list[int] = []
    for step in steps:
        at = 0
        for unit in step.units:
            assert (unit.at, unit.end) == (at, at + unit.width)
            at = unit.end
        assert step.width() == at <= z.kv_tiles
        assert numbers(step.now) == sorted(unit.tile for unit in step.units)
        of_step = [i for some in step.settled for i in numbers(some)]
        assert not settled & set(of_step)
        settled |= set(of_step)
        for some in step.ended:
            # Factors are there before sums are multiplied by them.
            assert set(numbers(some)) <= settled
            ended += numbers(some)
    assert settled == tiles
    assert sorted(ended) == sorted(tiles)


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skips"])
@pytest.mark.parametrize("overhang", [1, 2, 3])
@pytest.mark.parametrize("kv_tiles", [1, 3, 5, 8])
@pytest.mark.parametrize("heads", HEADS)
def test_steps_of_the_diagonal(heads: int, kv_tiles: int, overhang: int, skips: bool) -> None:
    def look() -> None:
        for q_tiles in (1, 2, 5, 8, 16):
            z = sizes(heads, q_tiles, kv_tiles, overhang, skips=skips)
            for place in range(z.n_diagonal):
                check_steps(z, steps_of(z, 0, place), visible(z, place))
                in_turn = steps_of(z, 0, place, True)
                check_steps(z, in_turn, visible(z, place))
                tiles = [unit.tile for step in in_turn for unit in step.units]
                assert tiles == sorted(tiles)
            whole = {(tile, t) for tile in range(z.n_tiles) for t in range(kv_tiles)}
            tiles = [unit.tile for step in steps_of(z, 0, None) for unit in step.units]
            assert tiles == list(range(z.n_tiles))
            # Of the loop no tile is the last one.
            units = [unit for step in steps_of(z, 0, None) for unit in step.units]
            assert {(unit.tile, unit.begin + t) for unit in units for t in range(unit.width)} == whole

    inside(look)


@pytest.mark.parametrize("left_tiles", [0, 1, 3, 8, 11])
@pytest.mark.parametrize("heads", HEADS)
def test_steps_of_a_window(heads: int, left_tiles: int) -> None:
    def look() -> None:
        for q_tiles, kv_tiles in ((4, 4), (8, 8), (16, 8), (9, 5)):
            edge_tiles = left_tiles - max(0, left_tiles - q_tiles + 1) // kv_tiles * kv_tiles
            z = sizes(heads, q_tiles, kv_tiles, left_tiles=left_tiles, edge_tiles=edge_tiles)
            for place in range(-z.n_edge, z.n_diagonal):
                if visible(z, place):
                    check_steps(z, steps_of(z, 0, place), visible(z, place))

    inside(look)


@pytest.mark.parametrize(
    ("heads", "q_tiles", "kv_tiles", "n_steps"),
    # Tiles of the triangle over tiles of a step: none has a hole.
    [(8, 8, 8, 36), (4, 8, 8, 18), (2, 8, 8, 9), (8, 4, 4, 20), (2, 4, 4, 5), (4, 7, 7, 16)],
)
def test_steps_are_full(heads: int, q_tiles: int, kv_tiles: int, n_steps: int) -> None:
    def look() -> None:
        steps = steps_of(sizes(heads, q_tiles, kv_tiles), 0, 0)
        assert len(steps) == n_steps
        assert all(step.width() == kv_tiles for step in steps)

    inside(look)


@pytest.mark.parametrize("kv_tiles", [3, 4, 7, 8])
@pytest.mark.parametrize("heads", HEADS)
def test_no_more_steps_than_in_turn(heads: int, kv_tiles: int) -> None:
    def look() -> None:
        for q_tiles in range(1, 2 * kv_tiles + 1):
            for overhang in (1, 2):
                z = sizes(heads, q_tiles, kv_tiles, overhang)
                for place in range(z.n_diagonal):
                    assert len(steps_of(z, 0, place)) <= len(steps_of(z, 0, place, True))

    inside(look)


def test_selection_has_steps_in_turn() -> None:
    def look() -> None:
        z = sizes(2, 8, 4, sparsity_m=4)
        for place in range(z.n_diagonal):
            of_steps, in_turn = (
                [[unit.tile for unit in step.units] for step in steps]
                for steps in (steps_of(z, 0, place), steps_of(z, 0, place, True))
            )
            assert of_steps == in_turn

    inside(look)


@pytest.mark.parametrize(("heads", "q_tiles"), [(1, 32), (1, 64), (2, 32), (4, 16), (8, 16)])
def test_chunks_of_a_block_follow_closely(heads: int, q_tiles: int) -> None:
    def look() -> None:
        z = sizes(heads, q_tiles, 8)
        before = steps_of(z, 0, None)
        for place in range(z.n_diagonal):
            after = steps_of(z, 0, place)
            assert follows_closely(LAG, before, after)
            before = after

    inside(look)


def test_a_chunk_that_follows_too_closely() -> None:
    def look() -> None:
        z = sizes(1, 16, 8)
        steps = steps_of(z, 0, None)
        assert follows_closely(LAG, steps, steps)
        assert not follows_closely(LAG, steps, list(reversed(steps)))
        # The tile that comes last in the one is the fourth of the other, or the fifth.
        assert not follows_closely(LAG, steps, [*steps[:3], steps[-1]])
        assert follows_closely(LAG, steps, [*steps[:4], steps[-1]])
        assert not follows_closely(LAG, steps[:5], steps[5:])

    inside(look)


@pytest.mark.parametrize("sparsity_m", [0, 4])
@pytest.mark.parametrize("heads", HEADS)
def test_pairs_of_steps(heads: int, sparsity_m: int) -> None:
    def look() -> None:
        kv_tiles = 4 if sparsity_m else 8
        for q_tiles in (1, 3, 8, 16):
            z = sizes(heads, q_tiles, kv_tiles, sparsity_m=sparsity_m, skips=True)
            for place in (None, *range(z.n_diagonal)):
                chunk = Chunk(z, place, 7)
                steps = [step for pair in chunk.pairs for step in pair.steps]
                assert [step.index for step in steps] == list(range(len(steps)))
                for i, pair in enumerate(chunk.pairs):
                    assert pair.number == 7 + i
                    tiles = sorted(unit.tile for step in pair.steps for unit in step.units)
                    assert numbers(pair.now) == tiles == [unit.tile for unit in pair.units]
                    assert [(unit.pair, unit.group) for unit in pair.units] == [(7 + i, j) for j in range(len(tiles))]
                    for run in pair.runs:
                        assert numbers(run.now) == tiles[run.first : run.end]
                        assert {unit.width for unit in pair.units[run.first : run.end]} == {run.width}
                    assert [tile for run in pair.runs for tile in numbers(run.now)] == tiles
                    assert pair.finals == [unit.tile for unit in pair.units if unit.is_last]
                late = chunk.pairs if place is None else chunk.pairs[-END_LAG:]
                shrunk = sorted(i for some in chunk.shrunk for i in numbers(some))
                assert shrunk == sorted(unit.tile for pair in late for unit in pair.units)

    inside(look)


def test_no_more_pairs_than_of_steps_in_turn() -> None:
    """Of three heads row tiles that share steps are paired worse than others."""

    def look() -> None:
        for heads in HEADS:
            for q_tiles in (8, 16):
                z = sizes(heads, q_tiles, 8, skips=True)
                for place in range(z.n_diagonal):
                    in_turn = [step.units for step in steps_of(z, 0, place, True)]
                    assert len(Chunk(z, place, 0).pairs) <= len(pairs_of(z, in_turn))

    inside(look)


def test_chunks_leave_pairs_of_other_tiles() -> None:
    def look() -> None:
        z = sizes(8, 8, 8, skips=True)
        inner, diagonal = Chunk(z, None, 0).pairs, Chunk(z, 0, 0).pairs
        assert leaves(inner, inner)
        assert leaves(inner, diagonal)
        assert not leaves(inner, [*inner[-1:], *inner])
        assert not leaves(inner[: END_LAG - 1], inner)
        assert not leaves(inner, inner[: END_LAG - 1])
        # The last pair but one has the tiles of the first one.
        edge = sizes(1, 18, 7, left_tiles=8, edge_tiles=8, skips=True)
        assert not leaves(Chunk(edge, 0, 0).pairs, Chunk(edge, 1, 0).pairs)

    inside(look)


@pytest.mark.parametrize(
    "tiles",
    [
        (0,),
        (5, 6, 7),
        (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        (0, 8),
        (1, 13),
        (0, 1, 8, 9),
        (2, 3, 14, 15),
        (0, 4, 8, 12),
        (1, 2, 5, 6, 9, 10),
    ],
)
def test_tiles_of_an_instruction(tiles: tuple[int, ...]) -> None:
    """What is taken from [128, tiles, ...] is these tiles' in their order, and `fold` has them in the same form."""

    def kernel(x: Any) -> Any:
        z = sizes(4, 4, 4)
        units = [step.units[0] for step in steps_of(z, 0, None)]
        now = as_tiles(z, [units[i] for i in tiles])
        x_sb = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=x_sb, src=x)
        some = nl.ndarray((2, len(tiles), 3), dtype=x.dtype, buffer=nl.sbuf)
        sums = nl.ndarray((2, len(tiles)), dtype=x.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=now.fold(some), src=now.of(x_sb))
        column = now.spread(x_sb[:, 15, 2:3])
        nisa.tensor_tensor(dst=now.fold(sums), data1=now.of(x_sb[:, :, 0]), data2=column, op=nl.add)
        outs = []
        for tile in (some, sums):
            outs.append(nl.ndarray(tile.shape, dtype=x.dtype, buffer=nl.shared_hbm))
            nisa.dma_copy(dst=outs[-1], src=tile)
        return tuple(outs)

    x = np.arange(2 * 16 * 3, dtype=np.float32).reshape(2, 16, 3)
    some, sums = simulate(kernel, target="trn2")(x)
    np.testing.assert_array_equal(some, x[:, tiles])
    np.testing.assert_array_equal(sums, x[:, tiles, 0] + x[:, 15, 2:])


@pytest.mark.parametrize("tiles", [(0, 2), (0, 1, 3), (0, 1, 4), (3, 4, 7, 8), (0, 4, 12), (0, 1, 4, 5, 8)])
def test_tiles_that_no_instruction_takes(tiles: tuple[int, ...]) -> None:
    def look() -> None:
        z = sizes(4, 4, 4)
        units = [step.units[0] for step in steps_of(z, 0, None)]
        assert as_tiles(z, [units[i] for i in tiles]) is None

    inside(look)


@pytest.mark.parametrize(("heads", "q_tiles"), [(8, 4), (4, 8), (1, 5), (3, 7)])
def test_parts_of_results(heads: int, q_tiles: int) -> None:
    """Outputs are ready by parts, whatever the order of their tiles; the rest of a block is what is not finished."""
    z_results: list[Results] = []
    inside(lambda: z_results.extend(Results(sizes(heads, q_tiles, 4)) for _ in range(3)))
    none, some, part = z_results
    n_tiles = heads * q_tiles
    parts = [slice(first, min(first + none.part, n_tiles)) for first in range(0, n_tiles, none.part)]
    assert none.end() == parts
    for tile in reversed(range(n_tiles)):
        some.complete(tile)
        done = [p.start for p in parts if p.start >= tile]
        assert some.ready == done[::-1]
    some.n_parts, some.n_finished = 1, 2
    rest = parts[::-1][1:]
    expected = [slice(rest[0].start + 2, rest[0].stop), *rest[1:]] if rest else []
    assert some.end() == expected
    # Of a part that is begun what is left comes first, then parts that are complete now.
    last = parts[-1]
    for tile in range(last.start, last.stop):
        part.complete(tile)
    part.n_finished = 1
    begun = [slice(last.start + 1, last.stop)] if last.stop - last.start > 1 else []
    assert [x for x in part.end() if x.start < x.stop] == [*begun, *parts[:-1]]
