"""Decode over a KV cache that lies on several `torch.distributed` ranks.

Every rank has the same queries and its share of the keys. It attends to that share, gets a normalised o_i and its
log-sum-exp lse_i, and all ranks exchange both, d + 2 numbers per query head and rank, however long the cache is:

    m = max_i lse_i, w_i = exp(lse_i - m), o = sum_i w_i o_i / sum_i w_i, lse = m + log(sum_i w_i)

A rank without keys has o_i = 0, lse_i = -inf and so no weight; without keys on any rank o = 0, lse = -inf.

Key j of a sequence lies on rank (j // block_size) % n_ranks, behind its keys of earlier blocks. With blocks as long as
a rank's cache the ranks hold one stretch each, and a sequence that grows fills one after the other; with short blocks
all ranks have equal shares at any length. The sum over keys has no order, so both give the same result.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from contributed._checks import require
from nki_torch import _check, flash_dense_attn_varlen_with_kvcache_func


def context_parallel_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_k: Tensor,
    *,
    block_size: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense decode attention to keys of all ranks of a group; every rank gets the result.

    All ranks must call it with the same queries, lengths and block size. On a CPU the lengths are checked across ranks.

    Args:
        query: [batch, n_q_heads, d], one new token per sequence, the same on all ranks.
        key: [batch, rows, n_kv_heads, d], this rank's keys; rows beyond its share may hold anything.
        value: as key.
        seqlens_k: integers [batch], keys of each sequence on all ranks together.
        block_size: consecutive keys on one rank; None means `rows`, which must then be the same on all ranks.
        softmax_scale: multiplies q . k; None means d ** -0.5.
        return_lse: whether (o, lse) is returned.
        group: the ranks; None means all.

    Returns:
        o [batch, n_q_heads, d] in query's dtype; with `return_lse` also lse [batch, n_q_heads], float32, natural
        logarithm. Partial results have query's dtype, weights and sums are float32.

    Raises:
        ValueError, TypeError, RuntimeError: an argument is outside the limits above, or those of
            `nki_torch.flash_dense_attn_varlen_with_kvcache_func`. The rank that sees it raises it before the exchange;
            other ranks wait for it until the group's timeout.
    """
    rank, n_ranks = _ranks(group)
    _check.floats("query", query, "[batch, n_q_heads, d]")
    _check.floats("key", key, "[batch, rows, n_kv_heads, d]")
    batch, rows = key.shape[:2]
    _check.shape("query", query, (batch, None, None), "key's batch")
    _check.integers("seqlens_k", seqlens_k, (batch,), "[batch]")
    _check.flag("return_lse", return_lse)
    if block_size is not None:
        _check.whole("block_size", block_size, 1)
    if block_size is None:  # all ranks see alike that keys do not fit, and none waits
        _check.lengths("seqlens_k", seqlens_k, n_ranks * rows)
    block = max(1, rows) if block_size is None else block_size
    share = local_seqlens(seqlens_k, rank, n_ranks, block)
    _check.lengths(f"seqlens_k on rank {rank} of {n_ranks}", share, rows)
    # A flat cache is a packed one whose sequences have equally many rows, of which each uses its own number.
    o, lse = flash_dense_attn_varlen_with_kvcache_func(
        query,
        key.flatten(0, 1),
        value.flatten(0, 1),
        torch.arange(batch + 1, dtype=torch.int32) * rows,
        rows,
        softmax_scale,
        seqused_k=share,
        return_lse=True,
    )
    # One exchange: o, lse and the number of keys, which float32 holds exactly below 2 ** 24.
    counts = share.to(lse.device, torch.float32)[:, None, None].expand(*lse.shape, 1)
    parts = _of_all_ranks(torch.cat((o.float(), lse[..., None], counts), -1), group)
    d = o.shape[-1]
    if parts.device.type == "cpu":
        found = parts[:, :, 0, d + 1].double().sum(0).to(seqlens_k.dtype)
        if not torch.equal(found, seqlens_k.cpu()):
            raise ValueError(
                f"seqlens_k: received {seqlens_k.tolist()}, allowed what all ranks hold together, {found.tolist()}"
            )
    joined, joined_lse = combine(parts[..., :d], parts[..., d])
    joined = joined.to(query.dtype)
    return (joined, joined_lse) if return_lse else joined


def combine_ranks(o: Tensor, lse: Tensor, *, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Join what each rank of a group found over its keys by itself, such as by a cache's `decode(return_lse=True)`.

    Args:
        o: [batch, n_q_heads, d], of the same shape on all ranks.
        lse: [batch, n_q_heads], natural logarithm; -inf where the rank has no keys.
        group: the ranks; None means all.

    Returns:
        o in its dtype and lse, float32, the same on every rank.

    Raises:
        ValueError: there is no process group, or this rank is not in it; shapes do not fit together.
    """
    _ranks(group)
    _check.shape("lse", lse, tuple(o.shape[:-1]), "that of o without d")
    parts = _of_all_ranks(torch.cat((o.float(), lse[..., None].float()), -1), group)
    joined, joined_lse = combine(parts[..., :-1], parts[..., -1])
    return joined.to(o.dtype), joined_lse


def combine(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join partial results in float32.

    Args:
        o: [n_parts, ..., d].
        lse: [n_parts, ...], natural logarithm; -inf for a part without keys.

    Returns:
        o [..., d] and lse [...], float32.
    """
    o, lse = o.float(), lse.float()
    top = lse.amax(0)
    # Without keys at all every weight is exp(-inf - 0) = 0.
    weights = torch.exp(lse - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(0)
    sums = (weights[..., None] * o).sum(0)
    return torch.where(total[..., None] > 0.0, sums / total[..., None], 0.0), top + torch.log(total)


def local_seqlens(seqlens: Tensor, rank: int, n_ranks: int, block_size: int) -> Tensor:
    """Keys of each sequence that lie on a rank.

    Args:
        seqlens: integers [n], keys on all ranks together.
        rank: 0..n_ranks - 1.
        n_ranks: at least 1.
        block_size: consecutive keys on one rank, at least 1.

    Returns:
        Integers [n] of seqlens' dtype.

    Raises:
        ValueError, TypeError: an argument is outside the limits above.
    """
    _check_sharding(n_ranks, block_size)
    require(0 <= rank < n_ranks, "rank", received=rank, allowed=f"0..{n_ranks - 1}")
    _check_positions("seqlens", seqlens)
    rounds = seqlens // (block_size * n_ranks)
    rest = seqlens % (block_size * n_ranks) - rank * block_size
    return rounds * block_size + rest.clamp(0, block_size)


def locate(positions: Tensor, n_ranks: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Where keys lie, for the rank that has to store a new one.

    Args:
        positions: integers [n], positions of keys in their sequence.
        n_ranks: at least 1.
        block_size: consecutive keys on one rank, at least 1.

    Returns:
        Rank and row on it of each, [n], of positions' dtype.

    Raises:
        ValueError, TypeError: an argument is outside the limits above.
    """
    _check_sharding(n_ranks, block_size)
    _check_positions("positions", positions)
    blocks = positions // block_size
    return blocks % n_ranks, blocks // n_ranks * block_size + positions % block_size


def shard(x: Tensor, rank: int, n_ranks: int, block_size: int, dim: int = 1) -> Tensor:
    """The part of a cache that lies on a rank, by `locate`.

    Args:
        x: keys or values of whole sequences.
        rank: 0..n_ranks - 1.
        n_ranks: at least 1.
        block_size: consecutive keys on one rank, at least 1.
        dim: of x along which keys lie.

    Returns:
        A copy of x with fewer rows along `dim`.

    Raises:
        ValueError, TypeError: an argument is outside the limits above.
    """
    positions = torch.arange(x.shape[dim], device=x.device)
    require(0 <= rank < n_ranks, "rank", received=rank, allowed=f"0..{n_ranks - 1}")
    owners, _ = locate(positions, n_ranks, block_size)
    return x.index_select(dim, positions[owners == rank])


def _ranks(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank in a group, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: received none, allowed a process group: call torch.distributed.init_process_group")
    rank = dist.get_rank(group)
    require(rank >= 0, "group", received="one without this rank", allowed="one that it is in")
    return rank, dist.get_world_size(group)


def _of_all_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[n_ranks, *x.shape]."""
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x, group)
    return torch.stack(gathered)


def _check_sharding(n_ranks: int, block_size: int) -> None:
    _check.whole("n_ranks", n_ranks, 1)
    _check.whole("block_size", block_size, 1)


def _check_positions(name: str, x: Tensor) -> None:
    _check.integers(name, x, (None,), "[n]")
    least = int(x.min()) if x.numel() else 0
    require(least >= 0, name, received=least, allowed="at least 0")
