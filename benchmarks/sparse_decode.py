"""The benchmarks `skip_softmax_decode`, `sparse_decode` and `gated_decode`: one new token, tiles of keys left out.

Inputs are drawn by `benchmarks/sparse_inputs.py`, and `threshold_for` finds the threshold that skips the share of tiles
that a case asks for. Before any time, a result has to agree with the float64 oracle, and so has every count: tiles that
are kept, rows of K and V as the kernel counts them, and bytes of K and V as the simulator saw them leave HBM.

The bound is the time to read K and V of the tiles in use once: K of the tiles that are scored, V of those that some
query head keeps. Gates are not in it. The baseline is `flash_decode` on the same K and V in the same layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

import nkisim
from benchmarks.cases import Baseline, Benchmark, Check, Goal, Published, Result, Skipped, Timing
from benchmarks.flash_decode import DTYPES, LLAMA_70B, Array, K
from benchmarks.sparse_inputs import AttentionPattern, Drawn, draw, threshold_for
from contributed._decode_launch import Options, kernel_layout, launch
from contributed._decode_plan import FlatCache
from contributed._sparse_launch import TileLaunch, tile_launch
from contributed.flash_decode import combine_splits, flash_decode_fwd
from contributed.skip_softmax_decode import skip_softmax_decode_fwd
from contributed.sparse_decode import gated_decode_fwd, sparse_decode_fwd
from nkisim import resolve_target
from nkisim.latency import estimate
from nkisim.latency.constants import Constants
from nkisim.latency.transfers import core_rate
from reference.budget import share_of_budget
from reference.rounded_sparse import gated_decode_rounded, skip_softmax_decode_rounded, sparse_decode_rounded
from reference.skip_softmax import skip_softmax_decode as skip_softmax_oracle
from reference.sparse_decode import gated_decode as gated_oracle
from reference.sparse_decode import keys_of_tiles
from reference.sparse_decode import sparse_decode as sparse_oracle

DTYPE, D, TILE_KV = DTYPES["bfloat16"], 128, 128
PATTERN = AttentionPattern()
CHECKED_SCORES = 2**19  # kept keys of all query heads together that the rounded computation looks at in a case
LEAST_MARGIN = 1e-4  # of decisions by default thresholds; ten times the error of float32 scores


@dataclass(frozen=True)
class TileCase:
    """One decode step of one sequence.

    Args:
        name: on the command line.
        rule: that decides on tiles, as in `benchmarks.sparse_inputs`.
        share: of the (KV head, tile) pairs that are skipped, 0 to below 1; the test is on, also at 0. Gates are then
            the only test. None: all thresholds of the rule are their defaults.
        n_q_heads: query heads.
        n_kv_heads: KV heads.
        keys: of the sequence.
        layout: of K: "d-major" or "s-major".
        model: whose heads these are.
        goals: what it should reach.
        published: what others measured.
    """

    name: str
    rule: str
    share: float | None
    n_q_heads: int = 64
    n_kv_heads: int = 8
    keys: int = 32 * K
    layout: str = "d-major"
    model: str = LLAMA_70B
    goals: tuple[Goal, ...] = ()
    published: tuple[Published, ...] = ()

    @property
    def shape(self) -> str:
        """The problem in short."""
        heads = f"{self.model}: batch 1, {self.n_q_heads}/{self.n_kv_heads} heads, d {D}, {self.keys} keys"
        tests = "default thresholds" if self.share is None else f"{self.share:.0%} of tiles skipped"
        return f"{heads}, {self.layout} K, {DTYPE}, {tests}"

    @property
    def d_major(self) -> bool:
        """Whether K is."""
        return self.layout == "d-major"

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.n_q_heads // self.n_kv_heads

    @property
    def drawn(self) -> Drawn:
        """The operands; the same for all rules and layouts of a shape."""
        return _drawn(self.n_q_heads, self.n_kv_heads, self.keys)

    @property
    def threshold(self) -> float:
        """Of the rule."""
        if self.share is None:
            return min(1.0, D / self.keys)
        return threshold_for(self.rule, self.drawn, self.share, tile_kv=TILE_KV).value

    def refused(self, target: str) -> str:  # noqa: ARG002
        """Why it cannot run on a target: there is no reason."""
        return ""


@lru_cache(maxsize=2)
def _drawn(n_q_heads: int, n_kv_heads: int, keys: int) -> Drawn:
    return draw(PATTERN, 1, n_q_heads, n_kv_heads, keys, D, DTYPE)


class _Expected(NamedTuple):
    """What the oracle says of a case."""

    o: Array
    """float64 [1, n_q_heads, d]."""
    error: Array
    """|o - dense o| / |dense o| needs the dense one: float64 [1, n_q_heads, d]."""
    kept: Array
    """Tiles in the result, int64 [1, n_q_heads]."""
    k_tiles: Array
    """Tiles whose K is read, bool [1, n_kv_heads, n_tiles]."""
    v_tiles: Array
    """Tiles whose V is read, likewise."""
