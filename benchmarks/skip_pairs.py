"""How many pairs of steps of the prefill kernel keep a tile with skip-softmax: `python -m benchmarks.skip_pairs`.

Of the cases of `flash_attention_fwd_skip` up to 16k, from the decisions alone; no kernel runs. The kernel leaves out
whole pairs, so that the bound of its work is that of the tiles of all others.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

import nkisim
from benchmarks.prefill import SKIP, PrefillCase, expected
from contributed._prefill_pairs import Chunk
from contributed._prefill_state import Sizes

LONGEST = 16 * 1024  # queries of a case; longer ones take minutes


class Pairs(NamedTuple):
    """Pairs and steps, in all and with a tile that is kept, and the bound with those pairs taken in full."""

    pairs: int
    kept_pairs: int
    steps: int
    kept_steps: int
    bound_us: float


def pairs_with_a_tile(case: PrefillCase, target: str = "trn2") -> Pairs:
    """Count a causal case whose sequence is whole blocks."""
    wanted = expected(case)
    (length, n_keys), *others = case.lengths
    g = case.launch(wanted.threshold).geometry
    whole = length == n_keys and not others and length % (g.q_tiles * 128) == 0
    assert whole, f"lengths: received {case.lengths}, allowed one sequence of whole blocks of {g.q_tiles * 128}"
    assert g.heads == case.n_q_heads, f"heads: received {case.n_q_heads}, allowed those of a block, {g.heads}"
    counts = np.zeros(4, int)
    skipped = 0

    def kernel(x: Any) -> Any:
        nonlocal skipped
        plain = (False, True, False, False, 0, 0, True)
        sizes = Sizes(case.d, g.heads, g.q_tiles, g.kv_tiles, g.overhang, *plain, None, 0, 0, 0, 0, g.q_tiles)
        inner, diagonal = Chunk(sizes, None, 0), [Chunk(sizes, i, 0) for i in range(sizes.n_diagonal)]
        for block in range(0, length // 128, g.q_tiles):
            chunks = [(first, inner) for first in range(0, block, g.kv_tiles)]
            chunks += [(block + i * g.kv_tiles, chunk) for i, chunk in enumerate(diagonal)]
            for first, chunk in chunks:
                for pair in chunk.pairs:
                    steps = [
                        [
                            wanted.kept[unit.tile % g.heads, block + unit.tile // g.heads, first + unit.begin + t]
                            for unit in step.units
                            for t in range(unit.width)
                        ]
                        for step in pair.steps
                    ]
                    some = [any(step) for step in steps]
                    counts[:] += (1, any(some), len(some), sum(some))
                    skipped += 0 if any(some) else sum(len(step) for step in steps)
        return x

    nkisim.simulate(kernel, target=target)(np.zeros((1, 1), np.float32))
    pairs, kept_pairs, steps, kept_steps = map(int, counts)
    return Pairs(pairs, kept_pairs, steps, kept_steps, case.bound_us(target, skipped))


def main() -> int:
    """Print a line for each case."""
    for case in SKIP:
        if case.lengths[0][0] <= LONGEST:
            found = pairs_with_a_tile(case)
            pairs, steps = found.kept_pairs / found.pairs, found.kept_steps / found.steps
            print(
                f"{case.name:12}  {pairs:6.1%} of pairs and {steps:6.1%} of steps keep a tile; "
                f"bound with these pairs in full {found.bound_us:,.0f} us",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
