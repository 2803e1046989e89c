"""KV caches in the layout that the decode kernels read: nothing is transposed or copied when a token is decoded.

`FlatKVCache` holds K [batch, n_kv_heads, d, room], d before the keys (s-major on request), and V [batch, n_kv_heads,
room, d]. `PagedKVCache` holds pages of both, [n_blocks, n_kv_heads, block_size, d], and a block table: the paged kernel
takes K s-major and transposes tiles of it on the Tensor Engine, so pages are stored as it takes them. Sequences have
lengths of their own in both. `nki_torch.hf.NkiCache` makes a transformers cache of them.

    cache = FlatKVCache(batch=2, n_kv_heads=8, head_dim=128, max_seqlen=4096, dtype=torch.bfloat16)
    cache.append(k, v)                      # [batch, s, n_kv_heads, d], after each sequence's last key
    o = cache.decode(q)                     # [batch, n_q_heads, d], the newest token of each sequence

Where all sequences are equally long new keys are one block of a flat cache, and a copy writes them; elsewhere the
kernels of `contributed/append_kv.py` scatter them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contributed import _decode_checks as checks
from contributed._checks import PARTITIONS, require
from contributed._decode_plan import d_major_keys
from contributed._sparse_checks import TILE_KV
from contributed.paged_decode import BLOCK_MAX
from nki_torch import _check as check
from nki_torch.decode import Result, Window, attach_counts, decode_cache
from nki_torch.kvcache import append_cache

Array = np.ndarray[Any, np.dtype[Any]]


class Packed(NamedTuple):
    """Keys and values of all sequences, one after the other."""

    k: Tensor
    """[total, n_kv_heads, d]"""
    v: Tensor
    """[total, n_kv_heads, d]"""
    cu_seqlens: list[int]
    """[batch + 1]: sequence b owns rows cu[b]:cu[b + 1]."""


class KVCache(ABC):
    """Sequences of keys and values of lengths of their own, appended to in place.

    Args:
        batch: sequences.
        n_kv_heads: KV heads.
        head_dim: 1..128, or even to 256.
        max_seqlen: keys that a sequence may have.
        dtype: float32, bfloat16 or float16.
        device: of keys and values.

    Raises:
        ValueError, TypeError: an argument is out of range.
    """

    k: Tensor
    v: Tensor

    def __init__(
        self, batch: int, n_kv_heads: int, head_dim: int, max_seqlen: int, dtype: torch.dtype, device: Any
    ) -> None:
        for name, value in (("batch", batch), ("n_kv_heads", n_kv_heads), ("max_seqlen", max_seqlen)):
            checks.count(name, value, checks.SEQLEN_MAX)
        checks.count("head_dim", head_dim, checks.D_MAX)
        allowed = f"1..{PARTITIONS}, or even to {checks.D_MAX}"
        require(head_dim <= PARTITIONS or head_dim % 2 == 0, "head_dim", received=head_dim, allowed=allowed)
        if dtype not in check.FLOATS:
            raise TypeError(f"dtype: received {dtype!r}, allowed {check.names(check.FLOATS)}")
        self.n_kv_heads, self.head_dim, self.max_seqlen = n_kv_heads, head_dim, max_seqlen
        self.dtype, self.device = dtype, torch.device(device)
        self._lengths = [0] * batch

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return tuple(self._lengths)

    def append(self, k: Tensor, v: Tensor, *, active: Sequence[bool] | None = None) -> None:
        """Write new tokens behind each sequence's last key.

        Args:
            k: [batch, s, n_kv_heads, d] in the cache's dtype and on its device, s at least 1.
            v: as k.
            active: [batch], the sequences that get their tokens; None means all.

        Raises:
            ValueError, TypeError: an argument is outside the limits above, or a sequence has no room; nothing changed.
            RuntimeError: k or v requires grad where gradients are recorded.
        """
        shape = [self.batch, "s", self.n_kv_heads, self.head_dim]
        for name, x in (("k", k), ("v", v)):
            self._require_tensor(name, x, shape)
            fits = x.ndim == 4 and [x.shape[0], *x.shape[2:]] == [self.batch, self.n_kv_heads, self.head_dim]
            require(fits and x.shape[1] >= 1, f"{name} shape", received=list(x.shape), allowed=shape)
        require(v.shape == k.shape, "v shape", received=list(v.shape), allowed=f"{list(k.shape)}, that of k")
        writes = [True] * self.batch if active is None else [bool(x) for x in active]
        require(len(writes) == self.batch, "active", received=writes, allowed=f"{self.batch}, one per sequence")
        s = k.shape[1]
        for b, length in enumerate(self._lengths):
            allowed = f"at most {self.max_seqlen - length}: {length} of {self.max_seqlen} keys are there"
            require(not writes[b] or length + s <= self.max_seqlen, f"new keys of {b}", received=s, allowed=allowed)
        check.no_gradient("append", k=k, v=v)
        self._write(k, v, writes)
        self._lengths = [n + s * w for n, w in zip(self._lengths, writes, strict=True)]

    def decode(
        self,
        query: Tensor,
        *,
        softmax_scale: float | None = None,
        window_size: Window = (None, None),
        softcap: float | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        skip_softmax_threshold: float | None = None,
        n_splits: int | None = None,
        return_lse: bool = False,
        measure_sparsity: bool = False,
    ) -> Result:
        """Attention of the newest tokens, whose keys are in the cache already: `nki_torch.decode.decode_cache`.

        Args:
            query: [batch, n_q_heads, d], or [batch, s, n_q_heads, d], the last s tokens.
            softmax_scale: as the other options, as in `decode_cache`; None means d ** -0.5.
            window_size: (left, right), keys visible around a token's own.
            softcap: cap of the scores.
            sinks: [n_q_heads].
            alibi_slopes: [n_q_heads].
            skip_softmax_threshold: leaves out tiles, for one new token; of pages a copy is made.
            n_splits: KV splits, None to choose.
            return_lse: whether (o, lse) is returned.
            measure_sparsity: whether o has the attributes `_sparsity_total` and `_sparsity_skipped`: tiles of 128 keys,
                of all query heads, also where nothing is skipped.

        Returns:
            o as query; with `return_lse` also lse, float32. A sequence without keys: o = 0, lse = -inf.

        Raises:
            ValueError, TypeError: an argument is outside the limits of `decode_cache`; nothing has run.
            RuntimeError: query requires grad where gradients are recorded.
        """
        layout = [self.batch, "n_q_heads", self.head_dim]
        self._require_tensor("query", query, layout)
        fits = query.ndim in (3, 4) and (query.shape[0], query.shape[-1]) == (self.batch, self.head_dim)
        require(fits, "query shape", received=list(query.shape), allowed=layout)
        k, v, where = self._stored(bool(skip_softmax_threshold))
        result = decode_cache(
            query,
            k,
            v,
            torch.tensor(self._lengths, dtype=torch.int32),
            **where,
            softmax_scale=softmax_scale,
            window_size=window_size,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            skip_softmax_threshold=skip_softmax_threshold,
            n_splits=n_splits,
            max_seqlen=self.max_seqlen,
            return_lse=return_lse,
            measure_sparsity=measure_sparsity,
        )
        if measure_sparsity and not skip_softmax_threshold:
            tiles = tiles_of(self._lengths, window_size[0]) * query.shape[-2]
            attach_counts(result[0] if isinstance(result, tuple) else result, torch.tensor([tiles, 0]))
        return result

    def drop(self, keep: Any) -> None:
        """Take padding out of the newest tokens; what stays moves together.

        Args:
            keep: bool [batch, s], which of each sequence's last s keys stay.

        Raises:
            ValueError, TypeError: keep is no such tensor, or s is more than a sequence has.
        """
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            raise TypeError(f"keep: received {getattr(keep, 'dtype', type(keep).__name__)}, allowed a bool tensor")
        fits = keep.ndim == 2 and keep.shape[0] == self.batch and keep.shape[1] <= min(self._lengths)
        allowed = f"[{self.batch}, up to {min(self._lengths)}]"
        require(fits, "keep shape", received=list(keep.shape), allowed=allowed)
        for b, row in enumerate(keep.cpu().numpy()):
            stay, first = np.flatnonzero(row), self._lengths[b] - row.size
            if stay.size < row.size:
                self._move(b, first + stay, first)
                self._shorten(b, first + stay.size)

    def truncate(self, tokens: Sequence[int]) -> None:
        """Forget the newest tokens.

        Args:
            tokens: [batch], how many of each sequence.

        Raises:
            ValueError: more than a sequence has, or less than 0.
        """
        good = len(tokens) == self.batch and all(0 <= n <= m for n, m in zip(tokens, self._lengths, strict=True))
        require(good, "tokens", received=list(tokens), allowed=f"0..{self._lengths}")
        for b, n in enumerate(tokens):
            self._shorten(b, self._lengths[b] - n)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        for b in range(self.batch):
            self._shorten(b, 0)

    @abstractmethod
    def reserve(self, max_seqlen: int) -> None:
        """Make room for `max_seqlen` keys per sequence; what is there is copied once. Never shrinks."""

    def select(self, sequences: Sequence[int]) -> None:
        """Sequence i becomes what sequence `sequences[i]` is; any number of them.

        Raises:
            ValueError: no such sequence, or none at all.
        """
        good = len(sequences) > 0 and all(0 <= b < self.batch for b in sequences)
        require(good, "sequences", received=list(sequences), allowed=f"one or more of 0..{self.batch - 1}")
        self._select(list(sequences))

    @abstractmethod
    def _select(self, sequences: list[int]) -> None:
        """`select`, of sequences that there are."""

    @abstractmethod
    def packed(self) -> Packed:
        """Copies of all keys and values, [total, n_kv_heads, d]."""

    @abstractmethod
    def _write(self, k: Tensor, v: Tensor, active: list[bool]) -> None:
        """Write [batch, s, n_kv_heads, d] behind the lengths."""

    @abstractmethod
    def _move(self, sequence: int, positions: Array, first: int) -> None:
        """Keys at ascending positions go to `first` and on, none of them to the right."""

    @abstractmethod
    def _stored(self, one_run: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """K, V and arguments of `decode_cache` that say how they lie; `one_run`: without pages."""

    def _shorten(self, sequence: int, length: int) -> None:
        self._lengths[sequence] = length

    def _require_tensor(self, name: str, x: Any, shape: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: received {type(x).__name__}, allowed a tensor {shape}")
        if x.dtype != self.dtype:
            raise TypeError(f"{name} dtype: received {x.dtype}, allowed {self.dtype}, that of the cache")
        require(x.device == self.device, f"{name} device", received=x.device, allowed=f"{self.device}, the cache's")

    def _positions(self, active: list[bool]) -> Tensor:
        """Where new tokens go, -1 for sequences that get none."""
        return torch.tensor([n if w else -1 for n, w in zip(self._lengths, active, strict=True)], dtype=torch.int32)


class FlatKVCache(KVCache):
    """K [batch, n_kv_heads, d, room] and V [batch, n_kv_heads, room, d], room at least `max_seqlen`.

    Args:
        batch: as the next ones, see `KVCache`.
        n_kv_heads: KV heads.
        head_dim: d.
        max_seqlen: keys that a sequence may have.
        dtype: of keys and values.
        device: of keys and values.
        k_d_major: False stores K as V: a scatter of new keys is then one run of bytes each, and the kernel transposes.
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        max_seqlen: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        k_d_major: bool = True,
    ) -> None:
        super().__init__(batch, n_kv_heads, head_dim, max_seqlen, dtype, device)
        checks.flag("k_d_major", k_d_major)
        self.k_d_major = k_d_major
        self._allocate(max_seqlen)

    def _allocate(self, max_seqlen: int) -> None:
        room = d_major_keys(max_seqlen) if self.k_d_major else max_seqlen
        size = self.batch * self.n_kv_heads * self.head_dim * room
        require(size <= checks.MAX_INDEX, "elements of K", received=size, allowed=f"at most {checks.MAX_INDEX}")
        rows = (room, self.head_dim)
        self.v = torch.zeros((self.batch, self.n_kv_heads, *rows), dtype=self.dtype, device=self.device)
        k_shape = rows[::-1] if self.k_d_major else rows
        self.k = torch.zeros((self.batch, self.n_kv_heads, *k_shape), dtype=self.dtype, device=self.device)
        self.max_seqlen = max_seqlen

    @property
    def keys(self) -> Tensor:
        """K as [batch, n_kv_heads, longest, d], a view; rows behind a sequence's length hold anything."""
        return self._s_major_k[:, :, : max(self._lengths)]

    @property
    def values(self) -> Tensor:
        """V likewise."""
        return self.v[:, :, : max(self._lengths)]

    @property
    def _s_major_k(self) -> Tensor:
        return self.k.transpose(2, 3) if self.k_d_major else self.k

    def reserve(self, max_seqlen: int) -> None:
        """Make room for `max_seqlen` keys per sequence; what is there is copied once. Never shrinks."""
        if max_seqlen <= self.max_seqlen:
            return
        keys, values, used = self.keys, self.values, max(self._lengths)
        self._allocate(max_seqlen)
        self._s_major_k[:, :, :used], self.v[:, :, :used] = keys, values

    def _select(self, sequences: list[int]) -> None:
        index = torch.as_tensor(sequences, device=self.device)
        self.k, self.v = self.k[index], self.v[index]
        self._lengths = [self._lengths[b] for b in sequences]

    def packed(self) -> Packed:
        """Copies of all keys and values, [total, n_kv_heads, d]."""
        used = [slice(n) for n in self._lengths]
        k, v = (torch.cat([x[b, :, n].transpose(0, 1) for b, n in enumerate(used)]) for x in (self._s_major_k, self.v))
        return Packed(k, v, _ends(self._lengths))

    def _write(self, k: Tensor, v: Tensor, active: list[bool]) -> None:
        s, first = k.shape[1], self._lengths[0]
        if all(active) and all(n == first for n in self._lengths):
            for x, new in ((self._s_major_k, k), (self.v, v)):
                x[:, :, first : first + s] = new.transpose(1, 2)
        else:
            append_cache(self.k, self.v, k, v, self._positions(active), k_d_major=self.k_d_major)

    def _move(self, sequence: int, positions: Array, first: int) -> None:
        source = torch.as_tensor(positions, device=self.device)
        for x in (self._s_major_k, self.v):
            x[sequence, :, first : first + positions.size] = x[sequence, :, source]

    def _stored(self, one_run: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:  # noqa: ARG002
        return self.k, self.v, {"k_d_major": self.k_d_major}


class PagedKVCache(KVCache):
    """Pages of keys and values, [n_blocks, n_kv_heads, block_size, d], taken as sequences grow.

    Args:
        batch: as the next ones, see `KVCache`.
        n_kv_heads: KV heads.
        head_dim: d.
        max_seqlen: keys that a sequence may have.
        n_blocks: pages of all sequences together; None means as many as all sequences can fill.
        block_size: keys of a page, 1..256, best a power of two from 16 on.
        dtype: of keys and values.
        device: of keys and values.
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        head_dim: int,
        max_seqlen: int,
        *,
        n_blocks: int | None = None,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> None:
        super().__init__(batch, n_kv_heads, head_dim, max_seqlen, dtype, device)
        checks.count("block_size", block_size, BLOCK_MAX)
        self.block_size = block_size
        pages = self._blocks(max_seqlen) * batch if n_blocks is None else n_blocks
        checks.count("n_blocks", pages, checks.MAX_INDEX // (n_kv_heads * block_size))
        shape = (pages, n_kv_heads, block_size, head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        self._tables: list[list[int]] = [[] for _ in range(batch)]
        self._free = list(range(pages))[::-1]

    @property
    def block_table(self) -> Tensor:
        """int32 [batch, max_blocks], -1 where a sequence has no page."""
        return torch.from_numpy(self._table())

    @property
    def free_blocks(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def release(self, sequence: int) -> None:
        """Empty a sequence; others may have its pages."""
        require(0 <= sequence < self.batch, "sequence", received=sequence, allowed=f"0..{self.batch - 1}")
        self._shorten(sequence, 0)

    def reserve(self, max_seqlen: int) -> None:
        """Make room for `max_seqlen` keys per sequence; what is there is copied once. Never shrinks."""
        if max_seqlen <= self.max_seqlen:
            return
        more = (self._blocks(max_seqlen) - self._blocks(self.max_seqlen)) * self.batch
        self._add_pages(more)
        self.max_seqlen = max_seqlen

    def _select(self, sequences: list[int]) -> None:
        # Every one gets pages of its own.
        old = [list(self._tables[b]) for b in sequences]
        index = torch.as_tensor([page for table in old for page in table], dtype=torch.long, device=self.device)
        k, v = self.k[index], self.v[index]
        lengths = [self._lengths[b] for b in sequences]
        self.reset()
        self._lengths, self._tables = lengths, [[] for _ in lengths]
        self._add_pages(max(0, self._blocks(self.max_seqlen) * len(lengths) - self.k.shape[0]))
        for table, pages in zip(self._tables, old, strict=True):
            table.extend(self._free.pop() for _ in pages)
        index = torch.as_tensor([page for table in self._tables for page in table], dtype=torch.long)
        index = index.to(self.device)
        self.k[index], self.v[index] = k, v

    def packed(self) -> Packed:
        """Copies of all keys and values, [total, n_kv_heads, d]."""
        pages, rows = (
            torch.cat([torch.as_tensor(x, device=self.device) for x in parts])
            for parts in zip(*(self._places(b, np.arange(n)) for b, n in enumerate(self._lengths)), strict=True)
        )
        return Packed(self.k[pages, :, rows], self.v[pages, :, rows], _ends(self._lengths))

    def _write(self, k: Tensor, v: Tensor, active: list[bool]) -> None:
        s = k.shape[1]
        wanted = [
            self._blocks(n + s) - len(table) if w else 0
            for n, w, table in zip(self._lengths, active, self._tables, strict=True)
        ]
        allowed = f"at most {len(self._free)}, the free ones of {self.k.shape[0]}"
        require(sum(wanted) <= len(self._free), "new pages", received=sum(wanted), allowed=allowed)
        for table, n in zip(self._tables, wanted, strict=True):
            table.extend(self._free.pop() for _ in range(n))
        append_cache(self.k, self.v, k, v, self._positions(active), block_table=self.block_table)

    def _move(self, sequence: int, positions: Array, first: int) -> None:
        source, target = (
            tuple(torch.as_tensor(x, device=self.device) for x in self._places(sequence, at))
            for at in (positions, first + np.arange(positions.size))
        )
        for x in (self.k, self.v):
            x[target[0], :, target[1]] = x[source[0], :, source[1]]

    def _shorten(self, sequence: int, length: int) -> None:
        super()._shorten(sequence, length)
        table = self._tables[sequence]
        while len(table) > self._blocks(length):
            self._free.append(table.pop())

    def _stored(self, one_run: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
        if not one_run:
            return self.k, self.v, {"block_table": self.block_table}
        table = self.block_table.clamp(min=0).to(self.device)
        shape = (self.batch, self.n_kv_heads, -1, self.head_dim)
        k, v = (x[table].transpose(1, 2).reshape(shape) for x in (self.k, self.v))
        room = min(k.shape[2], self.max_seqlen)
        return k[:, :, :room], v[:, :, :room], {}

    def _add_pages(self, n: int) -> None:
        if n <= 0:
            return
        first = self.k.shape[0]
        new = torch.zeros((n, *self.k.shape[1:]), dtype=self.dtype, device=self.device)
        self.k, self.v = torch.cat([self.k, new]), torch.cat([self.v, new])
        self._free[:0] = range(first + n - 1, first - 1, -1)

    def _blocks(self, keys: int) -> int:
        return -(-keys // self.block_size)

    def _places(self, sequence: int, positions: Array) -> tuple[Array, Array]:
        """Page of each position, and row in it."""
        table = np.array(self._tables[sequence], np.int64)
        return table[positions // self.block_size], positions % self.block_size

    def _table(self) -> Array:
        table = np.full((self.batch, max(1, *map(len, self._tables))), -1, np.int32)
        for b, pages in enumerate(self._tables):
            table[b, : len(pages)] = pages
        return table


def tiles_of(lengths: Sequence[int], left: int | None = None) -> int:
    """Tiles of keys that the newest token of each sequence sees."""
    firsts = [0 if left is None else max(0, n - 1 - left) for n in lengths]
    return sum(-(-n // TILE_KV) - first // TILE_KV for n, first in zip(lengths, firsts, strict=True))


def _ends(lengths: Sequence[int]) -> list[int]:
    """[0, lengths[0], lengths[0] + lengths[1], ..]."""
    return [0, *np.cumsum(lengths).tolist()]
