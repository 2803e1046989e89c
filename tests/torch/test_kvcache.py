"""Caches written in place and read: FlashAttention's function, and the functions on the kernels' own layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from contributed.append_kv import append_kv
from contributed.flash_decode import flash_decode
from contributed.skip_softmax_decode import skip_softmax_decode
from reference.budget import check_budget
from reference.flash_decode import flash_decode as oracle
from reference.rounded import flash_decode_rounded
from reference.rounded_attention import flash_attention_rounded
from tests.kernels.flash import CEILING

torch = pytest.importorskip("torch", reason="torch is not installed")

import nki_torch  # noqa: E402
from nki_torch import append_cache, decode_cache, flash_attn_with_kvcache  # noqa: E402
from tests.torch.tensors import DTYPES, arrays, attention64, equal, numbers, random, tensors  # noqa: E402

LENGTHS, ROOM, PAGE = (87, 0), 160, 20


def paged(*caches: Any) -> tuple[Any, ...]:
    """Flat caches [batch, keys, heads, d] dealt onto pages, whose table, and two pages of NaN that nothing is on."""
    batch, keys = caches[0].shape[:2]
    per_sequence = keys // PAGE
    order = torch.randperm(batch * per_sequence + 2, generator=torch.Generator().manual_seed(3))
    table = order[2:].reshape(batch, per_sequence).to(torch.int32)
    found = []
    for x in caches:
        pages = x.new_full((len(order), PAGE, *x.shape[2:]), torch.nan)
        pages[table.long()] = x.unflatten(1, (per_sequence, PAGE))
        found.append(pages)
    return *found, table


# New tokens, causal, window: decode of one token and of several, and rows that prefill takes.
CALLS = {
    "one-token": (1, False, (-1, -1)),
    "verify-window": (4, True, (30, -1)),
    "no-later-keys": (4, False, (-1, 0)),
    "bidirectional": (4, False, (-1, 2)),
    "many-rows": (70, True, (-1, -1)),
}


@pytest.mark.parametrize("form", ["flat", "pages"])
@pytest.mark.parametrize("name", CALLS)
def test_flash_attention(name: str, form: str) -> None:
    """Against float64 attention over what the cache has to hold then; rows beyond hold NaN."""
    s, causal, window = CALLS[name]
    dtype = DTYPES[list(CALLS).index(name) % 3]
    q, k_new, v_new = random(1, dtype, (2, s, 4, 64), (2, s, 2, 64), (2, s, 2, 64))
    caches = random(2, dtype, (2, ROOM, 2, 64), (2, ROOM, 2, 64))
    whole = [x.clone() for x in caches]
    for b, n in enumerate(LENGTHS):
        for x, new, cache in zip(whole, (k_new, v_new), caches, strict=True):
            x[b, n : n + s] = new[b]
            x[b, n + s :] = cache[b, n:] = torch.nan
    k, v, *rest = paged(*caches) if form == "pages" else caches
    pages = rest[0] if rest else None
    table = None if pages is None else pages.clone()
    if table is not None and window[0] >= 0:
        table[0, : (LENGTHS[0] - window[0]) // PAGE] = -1  # pages that no window reaches any more
    o, lse = flash_attn_with_kvcache(
        q,
        k,
        v,
        k_new,
        v_new,
        cache_seqlens=numbers(*LENGTHS),
        block_table=table,
        causal=causal,
        window_size=window,
        return_softmax_lse=True,
    )
    for got, expected in zip((k, v), whole, strict=True):
        flat = got if pages is None else got[pages.long()].flatten(1, 2)
        np.testing.assert_array_equal(flat.float(), expected.float())
    assert lse.shape == (2, 4, s)
    left, right = (None if side < 0 else side for side in window)
    for b, n in enumerate(LENGTHS):
        operands = (q[b], whole[0][b, : n + s], whole[1][b, : n + s])
        exact, exact_lse = attention64(*operands, causal=causal, left=left, right=right)
        rows = [np.ascontiguousarray(x)[None] for x in arrays(*operands)]
        low = flash_attention_rounded(*rows, causal=causal, window_size=(left, right))
        kind = low[0].dtype
        assert check_budget("o", arrays(o[b])[0], exact.numpy(), low[0][:, 0], kind) <= CEILING[dtype]
        check_budget("lse", lse[b].numpy(), exact_lse.numpy(), low[1][:, 0].swapaxes(1, 2), np.float32)


def test_flash_attention_options() -> None:
    """Soft cap, slopes, scale and splits, over a cache that is left as it is."""
    q, k, v = random(4, "bfloat16", (2, 2, 4, 64), (2, 40, 2, 64), (2, 40, 2, 64))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    before = k.clone()
    o, lse = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=33, softmax_scale=0.3, causal=True, softcap=5.0, alibi_slopes=slopes, num_splits=2,
        return_softmax_lse=True,
    )  # fmt: skip
    options = {"softmax_scale": 0.3, "softcap": 5.0, "alibi_slopes": slopes.numpy()}
    lengths = {"seqlens_kv": np.array([33, 33])}
    exact = oracle(*arrays(q, k, v), **lengths, **options)
    low = flash_decode_rounded(*arrays(q, k, v), **lengths, **options)
    assert check_budget("o", arrays(o)[0], exact.o, low[0], arrays(o)[0].dtype) <= 0.5
    check_budget("lse", lse.transpose(1, 2).numpy(), exact.lse, low[1], np.float32)
    assert torch.equal(k, before)
    whole = flash_attn_with_kvcache(q, k, v, causal=True)
    assert torch.equal(whole, flash_attn_with_kvcache(q, k, v, cache_seqlens=40, causal=True))


@pytest.mark.parametrize("layout", ["s-major", "d-major", "pages"])
def test_append_and_decode_in_the_kernels_layout(layout: str) -> None:
    """Written exactly; results as of a flat cache in the usual layout."""
    q, k_new, v_new = random(5, "bfloat16", (2, 4, 64), (2, 3, 2, 64), (2, 3, 2, 64))
    k, v = random(6, "bfloat16", (2, 256, 2, 64), (2, 256, 2, 64))
    positions = numbers(100, -1)
    expected = arrays(k.clone(), v.clone())
    append_kv(*expected, *arrays(k_new, v_new), positions.numpy())
    d_major = layout == "d-major"
    stored = [x.transpose(1, 2).contiguous() for x in (k, v)]
    given: dict[str, Any] = {"k_d_major": d_major}
    if d_major:
        stored[0] = stored[0].transpose(2, 3).contiguous()
    if layout == "pages":
        table = torch.tensor([[3, 1], [0, 2]])
        stored = [x.unflatten(2, (2, 128)).transpose(1, 2).flatten(0, 1)[[2, 1, 3, 0]].contiguous() for x in stored]
        given["block_table"] = table
    append_cache(*stored, k_new, v_new, positions, **given)
    lengths = numbers(103, 256)
    o, lse = decode_cache(q, *stored, lengths, **given, return_lse=True)
    whole = flash_decode(
        *arrays(q), *expected, seqlens_kv=lengths.numpy(), k_d_major=d_major, return_lse=True, max_seqlen_kv=256
    )
    assert equal((o, lse), tensors(*whole))
    if layout == "pages":
        stored = [x[table].transpose(2, 3).flatten(1, 2).transpose(1, 2) for x in stored]
    if d_major:
        stored[0] = stored[0].transpose(2, 3)
    for x, y in zip(stored, expected, strict=True):
        assert torch.equal(x.transpose(1, 2), tensors(y)[0])


def test_append_into_a_view() -> None:
    """A slice of a larger allocation; the rest of it stays."""
    (new,) = random(7, "bfloat16", (2, 1, 2, 16))
    store = torch.zeros(2, 2, 8, 32, dtype=torch.bfloat16)
    k, v = store[..., :16], torch.zeros(2, 2, 8, 16, dtype=torch.bfloat16)
    append_cache(k, v, new, new, numbers(3, 7))
    assert torch.equal(store[0, :, 3, :16], new[0, 0])
    assert torch.equal(v[1, :, 7], new[1, 0])
    assert int((store != 0).sum()) == int((new != 0).sum())


def test_skip_softmax() -> None:
    q, k, v = random(8, "bfloat16", (2, 4, 64), (2, 640, 2, 64), (2, 640, 2, 64))
    stored = k.permute(0, 2, 3, 1).contiguous(), v.transpose(1, 2).contiguous()
    lengths = numbers(640, 300)
    how: dict[str, Any] = {"k_d_major": True, "skip_softmax_threshold": 0.9, "return_lse": True}
    o, lse = decode_cache(q, *stored, lengths, measure_sparsity=True, **how)
    *expected, stats = skip_softmax_decode(*arrays(q, k, v), seqlens_kv=lengths.numpy(), return_stats=True, **how)
    assert equal((o, lse), tensors(*expected))
    # Five and three tiles of 128 keys, for each of four query heads.
    assert (o._sparsity_total, o._sparsity_skipped) == (32, stats.tiles_skipped.sum())
    assert 0 < o._sparsity_skipped < 32
    plain, _ = decode_cache(q, *stored, lengths, **how)
    assert not hasattr(plain, "_sparsity_total")


def test_options_of_the_kernels_layout() -> None:
    """Sinks and slopes in the cache's type, several tokens, a window and splits."""
    q, k, v, sinks = random(9, "float16", (2, 3, 4, 32), (2, 150, 2, 32), (2, 150, 2, 32), (4,))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    stored = [x.transpose(1, 2).contiguous() for x in (k, v)]
    options: dict[str, Any] = {"window_size": (90, 0), "softcap": 3.0, "softmax_scale": 0.2}
    how = {"sinks": sinks, "alibi_slopes": slopes.half(), "n_splits": 2, "return_lse": True}
    got = decode_cache(q, *stored, numbers(150, 4), **how, **options)
    options |= {"sinks": arrays(sinks)[0].astype(np.float32), "alibi_slopes": slopes.numpy()}
    exact = oracle(*arrays(q, k, v), seqlens_kv=np.array([150, 4]), **options)
    low = flash_decode_rounded(*arrays(q, k, v), seqlens_kv=np.array([150, 4]), **options)
    assert check_budget("o", arrays(got[0])[0], exact.o, low[0], np.float16) <= 0.5
    check_budget("lse", got[1].numpy(), exact.lse, low[1], np.float32)


def test_a_step_of_layers_makes_one_launch() -> None:
    nki_torch.launch_cache_clear()
    q, k, v = random(10, "float32", (2, 2, 32), (2, 50, 1, 32), (2, 50, 1, 32))
    for _ in range(3):
        nki_torch.flash_dense_attn_with_kvcache_func(q, k, v)
    info = nki_torch.launch_cache_info()
    assert (info.hits, info.misses, len(info.launches)) == (2, 1, 1)
    (launch,) = info.launches
    assert (launch.kernel, launch.dtype, launch.shapes[0]) == ("flash_decode", "float32", (2, 1, 2, 32))
    nki_torch.flash_dense_attn_with_kvcache_func(q.bfloat16(), k.bfloat16(), v.bfloat16())
    nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, window_size=(3, 0))
    assert nki_torch.launch_cache_info().misses == 3
    nki_torch.launch_cache_clear()
    assert nki_torch.launch_cache_info()[:2] == (0, 0)
    assert not nki_torch.launch_cache_info().launches


def test_the_cache_of_launches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch that is unused for longest goes first."""
    monkeypatch.setattr(nki_torch._device._launches, "_most", 2)
    nki_torch.launch_cache_clear()
    q, k, v = random(11, "float32", (1, 1, 16), (1, 9, 1, 16), (1, 9, 1, 16))
    for left in (1, 2, 1, 3):
        nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, window_size=(left, 0))
    kept = [dict(x.options)["left"] for x in nki_torch.launch_cache_info().launches]
    assert kept == [1, 3]


def test_scales_do_not_share_a_launch() -> None:
    """What a kept launch is made for does not leak into other calls of its shape."""
    q, k, v = random(12, "float32", (1, 2, 16), (1, 9, 1, 16), (1, 9, 1, 16))
    results = [nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, scale) for scale in (0.1, 1.0, 0.1)]
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_the_target_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another generation: another launch, and the bits of that one."""
    q, k, v = random(13, "bfloat16", (1, 2, 64), (1, 200, 1, 64), (1, 200, 1, 64))
    nki_torch.launch_cache_clear()
    for target in ("trn1", "trn3"):
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", target)
        got = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v)
        assert equal([got], tensors(flash_decode(*arrays(q, k, v), target=target)))
    assert [x.target for x in nki_torch.launch_cache_info().launches] == ["trn1", "trn3"]
