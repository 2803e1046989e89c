"""What the prefill operators do: lengths read on the host, rows packed, a launch for them, the kernels on tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contributed._checks import PARTITIONS, require
from contributed._decode_checks import MAX_INDEX
from contributed._decode_launch import nl_type
from contributed._prefill_bwd_launch import backward_launch
from contributed._prefill_checks import ROWS_MAX
from contributed._prefill_launch import launch
from contributed._prefill_plan import Span, Sparsity, Window
from contributed.flash_attention_bwd import prefill_bwd
from contributed.flash_attention_fwd import prefill_fwd
from contributed.flash_decode import combine_splits
from nki_torch import _check as check
from nki_torch._decode_impl import nothing, padded
from nki_torch._device import kept_launch, n_cores, one_core, run

Array = np.ndarray[Any, np.dtype[Any]]


class Rows(NamedTuple):
    """Rows of a tensor that sequences own, and where they are among those that a kernel gets.

    Args:
        lengths: of the sequences.
        starts: first row of each, of a kernel's operand.
        numbers: rows of the tensor that make the operand; None: all, as they are.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    numbers: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The operand."""
        return x.contiguous() if self.numbers is None else x.index_select(0, self.numbers)

    def into(self, rows: Tensor, like: Tensor, empty: float = 0.0) -> Tensor:
        """A tensor of `like`'s rows that has `rows` where they belong, and `empty` elsewhere."""
        if self.numbers is None:
            return rows
        whole = rows.new_full((like.shape[0], *rows.shape[1:]), empty)
        return whole.index_copy_(0, self.numbers, rows)

    def added(self, rows: Tensor, like: Tensor) -> Tensor:
        """As `into`, the sum of rows that several sequences own."""
        if self.numbers is None:
            return rows
        whole = torch.zeros((like.shape[0], *rows.shape[1:]), dtype=torch.float32, device=rows.device)
        return whole.index_add_(0, self.numbers, rows.float()).to(rows.dtype)

    def every(self) -> Array:
        """Numbers of all owned rows, one sequence after the other."""
        parts = [np.arange(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        return np.concatenate(parts).astype(np.int64)

    def apart(self) -> bool:
        """Whether no row is of two sequences."""
        rows = self.every()
        return np.unique(rows).size == rows.size

    def packed(self, device: torch.device) -> Rows:
        """An operand of the owned rows alone, one sequence after the other."""
        starts = np.cumsum([0, *self.lengths])[:-1]
        return Rows(self.lengths, tuple(int(n) for n in starts), torch.from_numpy(self.every()).to(device))


class Call(NamedTuple):
    """Rows of queries and keys of a call."""

    queries: Rows
    keys: Rows

    @property
    def spans(self) -> tuple[Span, ...]:
        """The sequences."""
        q, k = self
        numbers = zip(q.starts, q.lengths, k.starts, k.lengths, strict=True)
        return tuple(Span(*of_sequence) for of_sequence in numbers)


class Rules(NamedTuple):
    """What changes scores. Thresholds and N:M are off with None and 0."""

    scale: float
    left: int | None
    right: int | None
    sparsity_n: int
    sparsity_m: int
    dense_sink_tokens: int
    dense_recent_tokens: int
    threshold: float | None

    @property
    def window(self) -> Window:
        """What queries see."""
        return Window(self.left, self.right)

    @property
    def sparsity(self) -> Sparsity | None:
        """The selection."""
        if self.sparsity_n in (0, self.sparsity_m):
            return None
        return Sparsity(self.sparsity_n, self.sparsity_m, self.dense_sink_tokens, self.dense_recent_tokens)


def owned(names: tuple[str, str], starts: Tensor, lengths: Tensor, longest: int, x: Tensor) -> Rows:
    """The rows of `x` that sequences begin at `starts` and are `lengths` long."""
    first, used = check.read(starts), check.lengths(names[1], lengths, min(longest, ROWS_MAX - 1))
    for b, (start, n) in enumerate(zip(first, used, strict=True)):
        allowed = f"0..{x.shape[0] - n}: {n} rows of {x.shape[0]}"
        require(n == 0 or 0 <= start <= x.shape[0] - n, f"{names[0]}[{b}]", received=int(start), allowed=allowed)
    return Rows(used, tuple(int(start) if n else 0 for start, n in zip(first, used, strict=True)))


def queries(names: tuple[str, str], starts: Tensor, lengths: Tensor, longest: int, q: Tensor) -> Rows:
    """`owned` rows of queries: of one sequence each, and a kernel's operand has no others."""
    rows = owned(names, starts, lengths, longest, q)
    received = check.read(starts).tolist()
    require(rows.apart(), names[0], received=received, allowed=f"sequences apart, of lengths {list(rows.lengths)}")
    return rows if sum(rows.lengths) == q.shape[0] else rows.packed(q.device)


def pages(names: tuple[str, str], table: Tensor, lengths: Tensor, longest: int, cache: Tensor) -> tuple[Rows, Tensor]:
    """The pages of [n_blocks, page_size, ...] that sequences use, and their rows in these, one after the other.

    There are a power of two of pages, so that a program serves many steps.
    """
    n_blocks, size = cache.shape[:2]
    blocks = check.read(table)
    used = check.lengths(names[1], lengths, min(longest, blocks.shape[1] * size, ROWS_MAX - 1))
    numbers: list[int] = []
    starts = []
    for b, n in enumerate(used):
        entries = blocks[b, : -(-n // size)]
        good = bool(((entries >= 0) & (entries < n_blocks)).all())
        allowed = f"pages 0..{n_blocks - 1} for keys 0..{n - 1} of sequence {b}"
        require(good, f"{names[0]}[{b}]", received=entries.tolist(), allowed=allowed)
        starts.append(len(numbers) * size)
        numbers.extend(entries.tolist())
    index = padded(np.array(numbers, np.int64))
    return Rows(used, tuple(starts)), torch.from_numpy(index).to(cache.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    rules: Rules,
    kept_shape: tuple[int, ...],
    with_lse: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o as q, lse [total_q, n_q_heads] or [0], bool kept tiles of `kept_shape` or [0], int64 counts [2] or [0].

    The kernel's decisions are read on the host, where they are wanted.
    """
    n_q_heads = q.shape[1]
    q3, k3, v3 = call.queries.of(q), call.keys.of(k), call.keys.of(v)
    skips = rules.threshold is not None
    kept = torch.zeros(kept_shape if skips and with_lse else (0,), dtype=torch.bool)
    counts = torch.zeros(2 if skips and with_stats else 0, dtype=torch.int64)
    if q3.shape[0] == 0:
        lse = torch.full(q.shape[:2] if with_lse else (0,), -torch.inf, device=q.device)
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse, kept.to(q.device), counts.to(q.device)
    for name, x in (("q", q3), ("k", k3)):
        require(x.numel() <= MAX_INDEX, f"{name} size", received=x.numel(), allowed=f"at most {MAX_INDEX}")
    if skips:
        one_core(q.device, "prefill_fwd with skip_softmax_threshold")
    cores = n_cores(q.device)
    spans = call.spans

    def make() -> Any:
        return launch(
            prefill_fwd,
            combine_splits,
            spans,
            rules.window,
            q_shape=tuple(q3.shape),
            n_kv_heads=k3.shape[1],
            itemsize=q3.element_size(),
            scale=rules.scale,
            sparsity=rules.sparsity,
            threshold=rules.threshold,
            with_lse=with_lse,
            n_cores=cores,
        )

    options = {**rules._asdict(), "lse": with_lse, "n_cores": cores}
    held = kept_launch("prefill_fwd", (q3, k3, v3), make, options=options, data=spans)
    made = held.launch
    g = made.geometry
    k3, v3 = (with_rows(x, made.plan.rows_kv) for x in (k3, v3))
    kernel = made.kernel[2] if g.n_cores == 2 else made.kernel
    results = list(run(kernel, made.arguments(q3, k3, v3), q.device, held))
    decisions = results.pop() if skips else None
    if decisions is not None and (with_lse or with_stats):
        stats = made.stats(decisions.cpu().numpy(), n_q_heads)
        if with_lse:
            for b, tiles in enumerate(stats.kept):
                kept[b, :, : tiles.shape[1], : tiles.shape[2]] = torch.from_numpy(tiles)
        if with_stats:
            counts = torch.tensor([int(stats.tiles_total.sum()), int(stats.tiles_skipped.sum())])
    if g.n_splits > 1:
        rows = (results[0].reshape(g.n_splits, -1, q.shape[2]), results[1].reshape(g.n_splits, -1))
        results = list(run(made.combine, (*rows, nl_type(q), None), q.device))
    o = call.queries.into(results[0].reshape(q3.shape), q)
    lse = call.queries.into(results[1].reshape(q3.shape[:2]), q, -torch.inf) if with_lse else nothing(q)
    return o, lse, kept.to(q.device), counts.to(q.device)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kept: Tensor,
    call: Call,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv as q, k and v."""
    one_core(q.device, "prefill_bwd")
    if not call.keys.apart():
        # The kernel adds a sequence's keys to what there is of them, and loads that ahead of time.
        call = call._replace(keys=call.keys.packed(k.device))
    do3, q3, o3, lse2 = (call.queries.of(x) for x in (do, q, o, lse))
    k3, v3 = (call.keys.of(x) for x in (k, v))
    if q3.shape[0] == 0:
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        return dq, dk, dv
    decisions, spans = None, call.spans
    if rules.threshold is not None:
        tiles = kept.cpu().numpy()
        decisions = tuple(
            np.ascontiguousarray(tiles[b, :, : -(-span.len_q // PARTITIONS), : -(-span.len_kv // PARTITIONS)])
            for b, span in enumerate(spans)
        )

    def make() -> Any:
        return backward_launch(
            prefill_bwd,
            spans,
            rules.window,
            n_q_heads=q3.shape[1],
            n_kv_heads=k3.shape[1],
            d=q3.shape[2],
            itemsize=q3.element_size(),
            scale=rules.scale,
            sparsity=rules.sparsity,
            kept=decisions,
        )

    data = (spans, None if decisions is None else tuple(x.tobytes() for x in decisions))
    held = kept_launch("prefill_bwd", (q3, k3, v3), make, options=rules._asdict(), data=data)
    made, n_keys = held.launch, k3.shape[0]
    k3, v3 = (with_rows(x, made.plan.rows_kv) for x in (k3, v3))
    dq, dk, dv = run(made.kernel, made.arguments(do3, q3, k3, v3, o3, lse2), q.device, held)
    return call.queries.into(dq, q), call.keys.added(dk[:n_keys], k), call.keys.added(dv[:n_keys], v)


def with_rows(x: Tensor, n: int) -> Tensor:
    """As many rows as chunks reach; those behind the last key are not looked at."""
    missing = n - x.shape[0]
    return x if missing <= 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
