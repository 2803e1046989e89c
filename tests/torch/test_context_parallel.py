"""Decode over caches on several processes against one process and the oracle."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from nki_torch import flash_dense_attn_varlen_with_kvcache_func  # noqa: E402
from nki_torch.cache import FlatKVCache  # noqa: E402
from nki_torch.context_parallel import (  # noqa: E402
    combine,
    combine_ranks,
    context_parallel_decode,
    local_seqlens,
    locate,
    shard,
)
from reference.budget import share_of_budget  # noqa: E402
from reference.flash_decode import flash_decode as oracle  # noqa: E402
from reference.rounded import flash_decode_rounded  # noqa: E402

HEADS, KV_HEADS, D = 4, 2, 32
NOT_IN_USE = 3  # rows of NaN behind a rank's share


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    dtype: str = "float32"
    block_size: int | None = None
    softmax_scale: float | None = None

    def inputs(self) -> tuple[Any, Any, Any]:
        """q, and whole caches, as tensors."""
        rng = np.random.default_rng(7)
        shapes = (len(self.lengths), HEADS, D), *[(len(self.lengths), max(self.lengths), KV_HEADS, D)] * 2
        return tuple(torch.from_numpy(rng.standard_normal(x)).to(getattr(torch, self.dtype)) for x in shapes)

    def caches(self, rank: int, n_ranks: int) -> tuple[Any, Any]:
        """A rank's share of the keys and values of every sequence, with NaN behind it."""
        _, k, v = self.inputs()
        block = self.block_size or -(-max(self.lengths) // n_ranks)
        most = [j for j in range(max(self.lengths)) if j // block % n_ranks == rank]
        rows = block if self.block_size is None else len(most) + NOT_IN_USE
        found = []
        for x in (k, v):
            local = torch.full((len(self.lengths), rows, KV_HEADS, D), float("nan"), dtype=x.dtype)
            for b, length in enumerate(self.lengths):
                mine = [j for j in most if j < length]
                local[b, : len(mine)] = x[b, mine]
            found.append(local)
        return found[0], found[1]


CASES = (
    Case("ragged", (0, 1, 100, 577)),
    Case("bfloat16", (300, 33), "bfloat16"),
    Case("float16-blocks", (270, 100, 17), "float16", block_size=16, softmax_scale=0.3),
    Case("single-keys", (5, 2, 0), block_size=1),
    Case("few", (2,), block_size=130),
    Case("nothing", (0, 0), block_size=4),
)


def worker(rank: int, n_ranks: int, folder: str) -> None:
    """One process: all cases; then, of four, the first case in pairs."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {case.name: run(case, rank, n_ranks) for case in CASES}
    if n_ranks == 4:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        results["pairs"] = run(CASES[0], rank % 2, 2, pairs[rank // 2])
        results["not-in-group"] = message(CASES[0], rank % 2, 2, pairs[1 - rank // 2])
    results["from-caches"] = from_caches(CASES[0], rank, n_ranks)
    results["too-long"] = message(Case("too-long", (7,)), rank, n_ranks, lengths=(4 * n_ranks + 1,), rows=4)
    results["disagree"] = message(Case("disagree", (8,)), rank, n_ranks, lengths=(8 - (rank > 0),), rows=8)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(case: Case, rank: int, n_ranks: int, group: Any = None) -> Any:
    k, v = case.caches(rank, n_ranks)
    return context_parallel_decode(
        case.inputs()[0],
        k,
        v,
        torch.tensor(case.lengths),
        block_size=case.block_size,
        softmax_scale=case.softmax_scale,
        return_lse=True,
        group=group,
    )


def from_caches(case: Case, rank: int, n_ranks: int) -> Any:
    """Each rank decodes from a cache of its own, K d-major."""
    q, k, v = case.inputs()
    block = -(-max(case.lengths) // n_ranks)
    share = local_seqlens(torch.tensor(case.lengths), rank, n_ranks, block).tolist()
    cache = FlatKVCache(len(share), KV_HEADS, D, block)
    rows = [min(rank * block + j, k.shape[1] - 1) for j in range(block)]
    cache.append(k[:, rows], v[:, rows])
    cache.truncate([block - n for n in share])
    return combine_ranks(*cache.decode(q, return_lse=True))


def message(
    case: Case,
    rank: int,
    n_ranks: int,
    group: Any = None,
    lengths: tuple[int, ...] | None = None,
    rows: int | None = None,
) -> str:
    """What a bad call says."""
    q = case.inputs()[0]
    k = torch.zeros(q.shape[0], rows, KV_HEADS, D) if rows else case.caches(rank, n_ranks)[0]
    try:
        context_parallel_decode(q, k, k, torch.tensor(lengths or case.lengths), group=group)
    except ValueError as error:
        return str(error)
    return "nothing"


@cache
def results_of(n_ranks: int) -> list[dict[str, Any]]:
    """What every rank found."""
    with TemporaryDirectory() as folder:
        return in_processes(n_ranks, Path(folder))


def in_processes(n_ranks: int, folder: Path) -> list[dict[str, Any]]:
    # Processes that are forked from a server with torch in it start in no time, and have none of this one's threads.
    mp.get_context("forkserver").set_forkserver_preload(["torch", "torch._dynamo", "ml_dtypes"])
    mp.start_processes(worker, args=(n_ranks, str(folder)), nprocs=n_ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(n_ranks)]


@pytest.fixture(params=[2, 4], ids="{}-processes".format)
def processes(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return results_of(request.param)


def as_numpy(x: Any) -> Any:
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def check(case: Case, o: Any, lse: Any) -> None:
    q, k, v = map(as_numpy, case.inputs())
    options = {"seqlens_kv": np.array(case.lengths), "softmax_scale": case.softmax_scale}
    exact = oracle(q, k, v, **options)
    low_o, low_lse = flash_decode_rounded(q, k, v, **options)
    for got, right, low in ((o, exact.o, low_o), (lse, exact.lse, low_lse)):
        result = as_numpy(got)
        assert share_of_budget(result, right, low, result.dtype)[1] <= 1.0


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_several_processes_are_as_one(case: Case, processes: list[dict[str, Any]]) -> None:
    q, k, v = case.inputs()
    # One process has the sequences one after the other, without anything between them.
    packed = [torch.cat([x[b, :n] for b, n in enumerate(case.lengths)]) for x in (k, v)]
    begins = torch.tensor((0, *case.lengths)).cumsum(0)
    one = flash_dense_attn_varlen_with_kvcache_func(
        q, *packed, begins, max(case.lengths), case.softmax_scale, return_lse=True
    )
    check(case, *one)
    for results in processes:
        o, lse = results[case.name]
        assert o.dtype == q.dtype
        assert lse.dtype == torch.float32
        check(case, o, lse)
        torch.testing.assert_close((o, lse), processes[0][case.name], rtol=0.0, atol=0.0)


def test_each_rank_decodes_its_own_cache(processes: list[dict[str, Any]]) -> None:
    for results in processes:
        check(CASES[0], *results["from-caches"])


def test_groups_of_some_ranks() -> None:
    for results in results_of(4):
        check(CASES[0], *results["pairs"])
        assert "group: received one without this rank" in results["not-in-group"]


def test_bad_lengths_are_refused(processes: list[dict[str, Any]]) -> None:
    n = len(processes)
    for results in processes:
        assert f"seqlens_k[0]: received {4 * n + 1}, allowed 0..{4 * n}" in results["too-long"]
    # The first rank brings 8 keys where the others have been told that there are 7.
    for results in processes[1:]:
        assert "seqlens_k: received [7], allowed what all ranks hold together, [8]" in results["disagree"]


def test_no_process_group() -> None:
    q, k, v = CASES[0].inputs()
    with pytest.raises(ValueError, match="group: received none"):
        context_parallel_decode(q, k, v, torch.tensor(CASES[0].lengths))


def test_combine_weighs_by_lse() -> None:
    o = torch.tensor([[[1.0, -1.0]], [[3.0, 1.0]]])
    joined, lse = combine(o, torch.tensor([[1.0], [3.0]]).log())
    torch.testing.assert_close(joined, torch.tensor([[2.5, 0.5]]))
    torch.testing.assert_close(lse, torch.tensor([4.0]).log())


def test_combine_of_empty_and_of_distant_parts() -> None:
    infinite = float("inf")
    o = torch.tensor([[[0.0], [0.0], [5.0]], [[7.0], [0.0], [6.0]]])
    joined, lse = combine(o, torch.tensor([[-infinite, -infinite, 1e4], [-3.0, -infinite, -1e4]]))
    assert joined.flatten().tolist() == [7.0, 0.0, 5.0]
    assert lse.tolist() == [-3.0, -infinite, 1e4]


@pytest.mark.parametrize(("n_ranks", "block_size"), [(1, 3), (2, 1), (3, 4), (4, 1000)])
def test_keys_are_dealt_block_by_block(n_ranks: int, block_size: int) -> None:
    n = 29
    expected: list[list[int]] = [[] for _ in range(n_ranks)]
    for j in range(n):
        expected[j // block_size % n_ranks].append(j)
    ranks, rows = locate(torch.arange(n), n_ranks, block_size)
    for rank, positions in enumerate(expected):
        for length in (0, 1, min(block_size, n), n):
            share = local_seqlens(torch.tensor([length]), rank, n_ranks, block_size)
            assert share.tolist() == [sum(j < length for j in positions)]
        x = torch.arange(n).reshape(1, n, 1)
        assert shard(x, rank, n_ranks, block_size).flatten().tolist() == positions
        for row, j in enumerate(positions):
            assert (int(ranks[j]), int(rows[j])) == (rank, row)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: local_seqlens(torch.tensor([-1]), 0, 2, 4), ValueError, "seqlens: received -1, allowed at least 0"),
        (lambda: local_seqlens(torch.tensor([1.0]), 0, 2, 4), TypeError, "seqlens dtype: received float32"),
        (lambda: local_seqlens(torch.tensor([1]), 2, 2, 4), ValueError, r"rank: received 2, allowed 0\.\.1"),
        (lambda: locate(torch.tensor([1]), 0, 4), ValueError, "n_ranks: received 0"),
        (lambda: locate(torch.tensor([1]), 2, 0), ValueError, "block_size: received 0"),
        (lambda: shard(torch.zeros(1, 5), -1, 2, 4), ValueError, "rank: received -1"),
    ],
    ids=["negative", "float", "rank", "no-ranks", "no-block", "shard"],
)
def test_bad_sharding_is_refused(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
