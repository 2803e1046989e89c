"""KV caches in kernel layout: what is appended, dropped and moved, and attention over it, against float64 oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402 - what needs torch is imported where there is torch

from torch import Tensor

from nki_torch import cache as module
from nki_torch.cache import FlatKVCache, KVCache, PagedKVCache
from nkisim.frameworks import to_numpy
from reference import budget
from reference.flash_decode import flash_decode as oracle
from reference.rounded import flash_decode_rounded
from reference.rounded_sparse import skip_softmax_decode_rounded
from reference.skip_softmax import skip_softmax_decode as skip_oracle

HEADS, GROUP, D = 2, 2, 16
MAKERS: dict[str, Callable[..., KVCache]] = {
    "d-major": FlatKVCache,
    "s-major": lambda *args, **more: FlatKVCache(*args, k_d_major=False, **more),
    "pages-16": PagedKVCache,
    "pages-5": lambda *args, **more: PagedKVCache(*args, block_size=5, **more),
}
by_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def draw(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Ragged:
    """The same appends on Python lists of rows: what a cache has to hold."""

    def __init__(self, batch: int) -> None:
        self.k: list[list[Tensor]] = [[] for _ in range(batch)]
        self.v: list[list[Tensor]] = [[] for _ in range(batch)]

    def append(self, k: Tensor, v: Tensor, active: list[bool]) -> None:
        for rows, new in ((self.k, k), (self.v, v)):
            for b in np.flatnonzero(active):
                rows[b].extend(new[b])

    def drop(self, keep: Tensor) -> None:
        s = keep.shape[1]
        for rows in (self.k, self.v):
            for b, of_sequence in enumerate(rows):
                of_sequence[-s:] = [row for row, stays in zip(of_sequence[-s:], keep[b], strict=True) if stays]

    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.k))

    def packed(self) -> tuple[Tensor, Tensor]:
        k, v = (torch.stack([row for rows in x for row in rows]) for x in (self.k, self.v))
        return k, v


def filled(cache: KVCache, dtype: Any = torch.float32) -> Ragged:
    """Three sequences of 14, 9 and 11 keys, after padding at both ends and inside, and an inactive slot."""
    k, v = draw(3, 14, HEADS, D, dtype=dtype), draw(3, 14, HEADS, D, seed=1, dtype=dtype)
    expected = Ragged(3)
    keep = torch.ones(3, 10, dtype=torch.bool)
    keep[1, :4], keep[2, 8:], keep[2, 1] = False, False, False
    steps = [(slice(0, 10), [True] * 3), (slice(10, 13), [True] * 3), (slice(13, 14), [True, False, True])]
    for i, (rows, active) in enumerate(steps):
        cache.append(k[:, rows], v[:, rows], active=active)
        expected.append(k[:, rows], v[:, rows], active)
        if i == 0:
            cache.drop(keep)
            expected.drop(keep)
    assert expected.lengths() == (14, 9, 11)
    return expected


def check_holds(cache: KVCache, expected: Ragged) -> None:
    assert cache.lengths == expected.lengths()
    k, v, ends = cache.packed()
    assert torch.equal(k, expected.packed()[0])
    assert torch.equal(v, expected.packed()[1])
    assert ends == [0, *np.cumsum(expected.lengths()).tolist()]


def check_decode(cache: KVCache, expected: Ragged, **options: Any) -> None:
    q = draw(cache.batch, HEADS * GROUP, D, seed=2, dtype=cache.dtype)
    o, lse = cache.decode(q, return_lse=True, **options)
    packed = [to_numpy(x) for x in (q, *expected.packed())]
    options["cu_seqlens_kv"] = np.array([0, *np.cumsum(expected.lengths())])
    exact, low = oracle(*packed, **options), flash_decode_rounded(*packed, **options)
    budget.check_budget("o", to_numpy(o), exact.o, low[0], packed[0].dtype)
    budget.check_budget("lse", to_numpy(lse)[..., None], exact.lse[..., None], low[1][..., None], np.float32)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_appends_and_padding_that_is_taken_out(make: Any, dtype: Any) -> None:
    cache = make(3, HEADS, D, 40, dtype=dtype)
    expected = filled(cache, dtype)
    check_holds(cache, expected)
    check_decode(cache, expected)


@by_kind
def test_window_and_scale_of_several_new_tokens(make: Any) -> None:
    cache = make(3, HEADS, D, 40)
    expected = filled(cache)
    check_decode(cache, expected, window_size=(5, None), softmax_scale=0.7)
    q = draw(3, 3, HEADS * GROUP, D, seed=3)
    o = cache.decode(q)
    packed = [to_numpy(x) for x in (q, *expected.packed())]
    cu = np.array([0, *np.cumsum(expected.lengths())])
    low, _ = flash_decode_rounded(*packed, cu_seqlens_kv=cu)
    budget.check_budget("o", to_numpy(o), oracle(*packed, cu_seqlens_kv=cu).o, low, np.float32)


@by_kind
def test_skip_softmax_and_its_counts(make: Any) -> None:
    """A first key that takes nearly all weight: later tiles are left out by every head."""
    lengths = (300, 140)
    k, v = draw(2, 300, HEADS, D), draw(2, 300, HEADS, D, seed=1)
    q = draw(2, HEADS * GROUP, D, seed=2)
    k[:, 0] = 3 * q.reshape(2, HEADS, GROUP, D).mean(dim=2)
    cache = make(2, HEADS, D, 300)
    cache.append(k, v)
    cache.truncate([0, 160])
    packed = [to_numpy(x) for x in (q, *(torch.cat([x[0], x[1, :140]]) for x in (k, v)))]
    options = {"skip_softmax_threshold": 0.02, "cu_seqlens_kv": np.array([0, *np.cumsum(lengths)])}
    exact = skip_oracle(*packed, **options)
    assert exact.stats.margin.min() > 1e-3
    o = cache.decode(q, skip_softmax_threshold=0.02, measure_sparsity=True)
    low, _ = skip_softmax_decode_rounded(*packed, **options)
    budget.check_budget("o", to_numpy(o), exact.o, low, np.float32)
    assert (o._sparsity_total, o._sparsity_skipped) == (20, exact.stats.tiles_skipped.sum())
    assert 0 < o._sparsity_skipped < 20
    dense = cache.decode(q, measure_sparsity=True)
    assert (dense._sparsity_total, dense._sparsity_skipped) == (20, 0)
    windowed = cache.decode(q, window_size=(100, None), measure_sparsity=True)
    assert (windowed._sparsity_total, windowed._sparsity_skipped) == (16, 0)


@by_kind
def test_rows_out_of_use_are_neither_read_nor_written(make: Any) -> None:
    cache = make(3, HEADS, D, 40)
    for x in (cache.k, cache.v):
        x.fill_(torch.nan)
    expected = filled(cache)
    check_decode(cache, expected)
    held = HEADS * D * 14 * 3  # 10 + 3 + 1 keys of each sequence were written; of them some are padding by now
    for x in (cache.k, cache.v):
        assert HEADS * D * 34 <= int(x.isfinite().sum()) <= held


@pytest.mark.parametrize(("k_d_major", "shape"), [(True, (2, HEADS, D, 128)), (False, (2, HEADS, 40, D))])
def test_decode_reads_what_append_wrote_in_place(
    monkeypatch: pytest.MonkeyPatch, k_d_major: bool, shape: tuple[int, ...]
) -> None:
    """K lies d-major, its memory is that of the beginning, and it is what the decode operator gets."""
    cache = FlatKVCache(2, HEADS, D, 40, k_d_major=k_d_major)
    k, v = draw(2, 7, HEADS, D), draw(2, 7, HEADS, D, seed=1)
    begin = cache.k.data_ptr(), cache.v.data_ptr()
    cache.append(k[:, :5], v[:, :5])
    cache.drop(torch.tensor([[True] * 5, [False, True, True, True, True]]))
    cache.append(k[:, 5:], v[:, 5:])
    assert tuple(cache.k.shape) == shape
    assert torch.equal(cache.k[0, 1, :, 6] if k_d_major else cache.k[0, 1, 6], k[0, 6, 1])
    assert torch.equal(cache.k[1, 0, :, 5] if k_d_major else cache.k[1, 0, 5], k[1, 6, 0])
    seen = []
    original = module.decode_cache

    def spy(query: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        seen.append((k.data_ptr(), v.data_ptr(), k.is_contiguous(), options["k_d_major"]))
        return original(query, k, v, *args, **options)

    monkeypatch.setattr(module, "decode_cache", spy)
    cache.decode(draw(2, HEADS, D, seed=2))
    assert seen == [(*begin, True, k_d_major)]


@by_kind
def test_truncate_select_reserve_reset(make: Any) -> None:
    cache = make(3, HEADS, D, 20)
    expected = filled(cache)
    cache.truncate([2, 0, 5])
    for rows in (expected.k, expected.v):
        rows[0], rows[2] = rows[0][:-2], rows[2][:-5]
    cache.select([2, 0, 0, 1])
    expected.k, expected.v = ([list(rows[b]) for b in (2, 0, 0, 1)] for rows in (expected.k, expected.v))
    cache.reserve(300)
    check_holds(cache, expected)
    k, v = draw(4, 1, HEADS, D, seed=5), draw(4, 1, HEADS, D, seed=6)
    cache.append(k, v)  # copies of a sequence grow apart
    expected.append(k, v, [True] * 4)
    check_holds(cache, expected)
    check_decode(cache, expected)
    cache.reset()
    assert cache.lengths == (0, 0, 0, 0)
    o, lse = cache.decode(draw(4, HEADS, D), return_lse=True)
    assert bool((o == 0).all())
    assert bool((lse == -torch.inf).all())


@by_kind
def test_an_inactive_slot_among_equals(make: Any) -> None:
    cache, expected = make(2, HEADS, D, 20), Ragged(2)
    k, v = draw(2, 3, HEADS, D), draw(2, 3, HEADS, D, seed=1)
    for active in ([True, True], [False, True]):
        cache.append(k, v, active=active)
        expected.append(k, v, active)
    check_holds(cache, expected)
    assert int(cache.v.count_nonzero()) == HEADS * D * (3 + 6)  # no row of the inactive one was written


def test_pages_are_taken_and_given_back() -> None:
    cache = PagedKVCache(2, HEADS, D, 40, n_blocks=4, block_size=8)
    k, v = draw(2, 17, HEADS, D), draw(2, 17, HEADS, D, seed=1)
    with pytest.raises(ValueError, match=r"new pages: received 6, allowed at most 4"):
        cache.append(k, v)
    assert (cache.lengths, cache.free_blocks) == ((0, 0), 4)
    cache.append(k, v, active=[True, False])
    assert (cache.lengths, cache.free_blocks) == ((17, 0), 1)
    table = cache.block_table
    assert table.shape == (2, 3)
    assert table[1].tolist() == [-1, -1, -1]
    assert len(set(table[0].tolist())) == 3
    cache.release(0)
    assert (cache.lengths, cache.free_blocks) == ((0, 0), 4)
    cache.append(k[:, :8], v[:, :8])
    assert cache.free_blocks == 2
    expected = Ragged(2)
    expected.append(k[:, :8], v[:, :8], [True, True])
    check_holds(cache, expected)


GOOD = draw(2, 3, HEADS, D)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.append(GOOD.numpy(), GOOD), TypeError, "k: received ndarray"),
        (lambda c: c.append(GOOD, GOOD.double()), TypeError, "v dtype: received torch.float64"),
        (lambda c: c.append(GOOD.to("meta"), GOOD), ValueError, "k device: received meta"),
        (lambda c: c.append(GOOD[:1], GOOD), ValueError, "k shape: received"),
        (lambda c: c.append(GOOD, GOOD[:, :2]), ValueError, "v shape: received"),
        (lambda c: c.append(GOOD, GOOD, active=[True]), ValueError, "active: received"),
        (
            lambda c: c.append(GOOD.repeat(1, 4, 1, 1), GOOD.repeat(1, 4, 1, 1)),
            ValueError,
            "new keys of 0: received 12",
        ),
        (lambda c: c.append(GOOD.clone().requires_grad_(), GOOD), RuntimeError, "k requires grad"),
        (lambda c: c.drop(torch.ones(2, 4, dtype=torch.bool)), ValueError, "keep shape: received"),
        (lambda c: c.drop([[True]]), TypeError, "keep: received list"),
        (lambda c: c.select([0, 2]), ValueError, r"sequences: received \[0, 2\], allowed one or more of 0..1"),
        (lambda c: c.truncate([4, 0]), ValueError, r"tokens: received \[4, 0\]"),
        (lambda c: c.decode(draw(3, HEADS, D)), ValueError, "query"),
        (lambda c: c.decode(draw(2, HEADS, D).double()), TypeError, "query dtype"),
        (lambda c: c.decode(draw(2, HEADS, D), skip_softmax_threshold=1.5), ValueError, "skip_softmax_threshold"),
        (lambda c: c.decode(draw(2, HEADS, D).requires_grad_()), RuntimeError, "query requires grad"),
    ],
)
@pytest.mark.parametrize("make", [FlatKVCache, PagedKVCache])
def test_callers_mistakes(make: Any, call: Any, error: type[Exception], message: str) -> None:
    cache = make(2, HEADS, D, 14)
    cache.append(GOOD, GOOD)
    before = cache.packed()
    with pytest.raises(error, match=message):
        call(cache)
    assert cache.lengths == (3, 3)
    assert torch.equal(cache.packed().k, before.k)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 2, 16, 8), {}, ValueError, "batch: received 0"),
        ((1, 2, 129, 8), {}, ValueError, "head_dim: received 129"),
        ((1, 2, 258, 8), {}, ValueError, "head_dim: received 258"),
        ((1, 2, 16, True), {}, ValueError, "max_seqlen: received True"),
        ((1, 2, 16, 8), {"dtype": torch.float64}, TypeError, "dtype: received torch.float64"),
        ((1, 2, 16, 8), {"dtype": "float32"}, TypeError, "dtype: received 'float32', allowed float32, bfloat16"),
    ],
)
@pytest.mark.parametrize("make", [FlatKVCache, PagedKVCache])
def test_sizes_that_no_kernel_takes(
    make: Any, arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(*arguments, **options)


def test_size_limits_of_one_kind() -> None:
    with pytest.raises(ValueError, match="elements of K"):
        FlatKVCache(2**7, 2**6, 128, 2**13)
    with pytest.raises(ValueError, match="block_size: received 257"):
        PagedKVCache(1, 1, 16, 8, block_size=257)
    with pytest.raises(TypeError, match="k_d_major"):
        FlatKVCache(1, 1, 16, 8, k_d_major=1)  # type: ignore[arg-type]
