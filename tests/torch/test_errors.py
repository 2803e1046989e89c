"""Callers' mistakes: refused with name, received and allowed, before any kernel runs or anything is written."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import nki_torch  # noqa: E402
from nki_torch import _device  # noqa: E402
from tests.torch.tensors import numbers  # noqa: E402


@pytest.fixture(autouse=True)
def _no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(_device, "simulate_kernel", refuse)


def zeros(*shape: int, dtype: str = "float32") -> Any:
    return torch.zeros(shape, dtype=getattr(torch, dtype))


def refused(error: type[Exception], message: str, function: Any, given: dict[str, Any]) -> None:
    before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error) as info:
        function(**given)
    assert message in str(info.value)
    assert all(
        torch.equal(given[name].nan_to_num(), x.nan_to_num()) for name, x in before.items() if x.device.type == "cpu"
    )


def decode(**changed: Any) -> dict[str, Any]:
    return {"query": zeros(2, 4, 32), "key": zeros(2, 9, 2, 32), "value": zeros(2, 9, 2, 32)} | changed


FLAT = [
    (TypeError, "query: received list, allowed a tensor [batch, n_q_heads, d]", {"query": [1.0]}),
    (ValueError, "query shape: received [2, 1, 4, 32], allowed [batch, n_q_heads, d]", {"query": zeros(2, 1, 4, 32)}),
    (TypeError, "query dtype: received float64, allowed float32, bfloat16, float16",
     {"query": zeros(2, 4, 32, dtype="float64")}),
    (TypeError, "key dtype: received bfloat16, allowed float32, that of query",
     {"key": zeros(2, 9, 2, 32, dtype="bfloat16")}),
    (ValueError, "value device: received meta, allowed cpu, that of query", {"value": zeros(2, 9, 2, 32).to("meta")}),
    (ValueError, "query head dim: received 258, allowed 1..128, or even to 256", {"query": zeros(2, 4, 258)}),
    (ValueError, "query head dim: received 0, allowed 1..128, or even to 256",
     {"query": zeros(2, 4, 0), "key": zeros(2, 9, 2, 0), "value": zeros(2, 9, 2, 0)}),
    (ValueError, "query shape: received [0, 4, 32], allowed batch at least 1", {"query": zeros(0, 4, 32)}),
    (ValueError, "key shape: received [2, 9, 2, 16], allowed [2, any, any, 32]", {"key": zeros(2, 9, 2, 16)}),
    (ValueError, "value shape: received [2, 8, 2, 32], allowed [2, 9, 2, 32], that of key",
     {"value": zeros(2, 8, 2, 32)}),
    (ValueError, "query heads: received 4, allowed multiples of the 3 KV heads",
     {"key": zeros(2, 9, 3, 32), "value": zeros(2, 9, 3, 32)}),
    (ValueError, "query heads per KV head: received 130, allowed 1..128",
     {"query": zeros(2, 130, 32), "key": zeros(2, 9, 1, 32), "value": zeros(2, 9, 1, 32)}),
    (TypeError, "softmax_scale: received '1', allowed None", {"softmax_scale": "1"}),
    (ValueError, "softmax_scale: received nan, allowed None", {"softmax_scale": float("nan")}),
    (ValueError, "window_size: received (-1, 0), allowed (left, right), each at least 0 or None",
     {"window_size": (-1, 0)}),
    (ValueError, "window_size: received 5, allowed (left, right)", {"window_size": 5}),
    (TypeError, "return_lse: received 1, allowed True or False", {"return_lse": 1}),
    (TypeError, "out: received list, allowed a tensor or None", {"out": []}),
    (ValueError, "out shape: received [2, 32, 4], allowed [2, 4, 32]", {"out": zeros(2, 32, 4)}),
    (TypeError, "lse dtype: received float16, allowed float32", {"lse": zeros(2, 4, dtype="float16")}),
    (ValueError, "out: received a tensor that requires grad, allowed one that does not",
     {"out": zeros(2, 4, 32).requires_grad_()}),
    (ValueError, "out: received an expanded tensor with strides [0, 32, 1], allowed one whose elements lie apart",
     {"out": zeros(1, 4, 32).expand(2, -1, -1)}),
    (ValueError, "lse: received an expanded tensor with strides [1, 0]", {"lse": zeros(2, 1).expand(-1, 4)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), FLAT, ids=[str(i) for i in range(len(FLAT))])
def test_dense(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    refused(error, message, nki_torch.flash_dense_attn_with_kvcache_func, decode(**changed))


def packed(**changed: Any) -> dict[str, Any]:
    operands = decode(key=zeros(18, 2, 32), value=zeros(18, 2, 32))
    return operands | {"cu_seqlens_k": numbers(0, 9, 18), "max_seqlen_k": 9} | changed


VARLEN = [
    (TypeError, "cu_seqlens_k dtype: received float32, allowed int32, int64", {"cu_seqlens_k": zeros(3)}),
    (ValueError, "cu_seqlens_k shape: received [2], allowed [3], [batch + 1]", {"cu_seqlens_k": numbers(0, 9)}),
    (ValueError, "cu_seqlens_k: received [0, 9, 8], allowed at least 2 numbers, ascending within 0..18",
     {"cu_seqlens_k": numbers(0, 9, 8)}),
    (ValueError, "cu_seqlens_k: received [0, 9, 19]", {"cu_seqlens_k": numbers(0, 9, 19)}),
    (ValueError, "seqused_k[1]: received 10, allowed 0..9", {"seqused_k": numbers(0, 10)}),
    (ValueError, "seqused_k[0]: received -1, allowed 0..9", {"seqused_k": numbers(-1, 0)}),
    (ValueError, "max_seqlen_k: received 8, allowed 9, the longest of the sequences", {"max_seqlen_k": 8}),
    (TypeError, "max_seqlen_k: received 9.0, allowed an int, at least 0", {"max_seqlen_k": 9.0}),
    (TypeError, "max_seqlen_k: received tensor(9), allowed an int", {"max_seqlen_k": torch.tensor(9)}),
    (ValueError, "max_seqlen_k: received -1, allowed an int, at least 0", {"max_seqlen_k": -1}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), VARLEN, ids=[str(i) for i in range(len(VARLEN))])
def test_packed(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    refused(error, message, nki_torch.flash_dense_attn_varlen_with_kvcache_func, packed(**changed))


RULES = [
    (ValueError, "softmax_threshold: received 1.5, allowed None, 0 or a number up to 1", {"softmax_threshold": 1.5}),
    (ValueError, "softmax_threshold: received nan", {"softmax_threshold": float("nan")}),
    (TypeError, "gate_threshold: received True", {"gate_threshold": True}),
    (ValueError, "softmax_scale: received 0, allowed None, or 1e-30", {"softmax_scale": 0}),
    (ValueError, "tile_kv: received 100, allowed a power of two", {"tile_kv": 100}),
    (ValueError, "n_splits: received 65, allowed 1..64", {"n_splits": 65}),
    (ValueError, "alpha shape: received [2, 2], allowed [2, 4]", {"alpha": zeros(2, 2)}),
    (ValueError, "alpha: received [[nan, 0.0, 0.0, 0.0]",
     {"alpha": zeros(2, 4).index_fill(1, torch.tensor(0), torch.nan)}),
    (ValueError, "delta shape: received [2, 9, 2], allowed [2, 2, 9]", {"delta": zeros(2, 9, 2)}),
    (TypeError, "is_logsigmoid_gate: received None, allowed True or False", {"is_logsigmoid_gate": None}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), RULES, ids=[str(i) for i in range(len(RULES))])
def test_gated(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given = {"alpha": zeros(2, 4), "delta": zeros(2, 2, 9)} | changed
    refused(error, message, nki_torch.flash_gated_attn_with_kvcache_func, decode(**given))


def prefill(**changed: Any) -> dict[str, Any]:
    given = {"q": zeros(20, 4, 32), "k": zeros(20, 2, 32), "v": zeros(20, 2, 32)}
    return given | {"b_start_loc": numbers(0, 12), "b_seq_len": numbers(12, 8), "max_input_len": 12} | changed


PAGES = {"k_cache": zeros(3, 16, 2, 32), "v_cache": zeros(3, 16, 2, 32), "block_table": torch.tensor([[0, 1], [2, 3]])}
PREFILL = [
    (ValueError, "b_seq_len shape: received [1], allowed [2], [batch]", {"b_seq_len": numbers(20)}),
    (ValueError, "b_seq_len[0]: received 12, allowed 0..11", {"max_input_len": 11}),
    (ValueError, "b_start_loc[1]: received 13, allowed 0..12: 8 rows of 20", {"b_start_loc": numbers(0, 13)}),
    (ValueError, "b_start_loc: received [0, 11], allowed sequences apart, of lengths [12, 8]",
     {"b_start_loc": numbers(0, 11)}),
    (ValueError, "b_start_loc_k[0]: received -1, allowed 0..8", {"b_start_loc_k": numbers(-1, 0)}),
    (ValueError, "b_seq_len_k[1]: received 21, allowed 0..20",
     {"b_start_loc_k": numbers(0, 0), "b_seq_len_k": numbers(12, 21)}),
    (ValueError, "sparsity_m: received 16, allowed 4 or 8", {"sparsity_m": 16}),
    (ValueError, "sparsity_n: received 5, allowed 0..4", {"sparsity_n": 5}),
    (ValueError, "dense_recent_tokens: received -1, allowed an int, at least 0", {"dense_recent_tokens": -1}),
    (ValueError, "skip_softmax_threshold: received -0.1", {"skip_softmax_threshold": -0.1}),
    (TypeError, "is_causal: received 1, allowed True or False", {"is_causal": 1}),
    (ValueError, "v_cache: received None, allowed a tensor where others", {"k_cache": PAGES["k_cache"]}),
    (ValueError, "k_cache shape: received [3, 16, 2, 32], allowed [3, 8, 2, 32], with page_size",
     PAGES | {"page_size": 8}),
    (ValueError, "block_table[0]: received [0, 4], allowed pages 0..2 for keys 0..19 of sequence 0",
     PAGES | {"b_seq_len_k": numbers(20, 16), "block_table": torch.tensor([[0, 4], [2, 3]])}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), PREFILL, ids=[str(i) for i in range(len(PREFILL))])
def test_attention(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    refused(error, message, nki_torch.attention, prefill(**changed))


def cached(**changed: Any) -> dict[str, Any]:
    given = {"q": zeros(2, 1, 4, 32), "k_cache": zeros(2, 9, 2, 32), "v_cache": zeros(2, 9, 2, 32)}
    return given | changed


NEW = {"k": zeros(2, 2, 2, 32) + 1, "v": zeros(2, 2, 2, 32) + 1}
MANY = {"q": zeros(2, 70, 4, 32)}
KVCACHE = [
    (NotImplementedError, "flash_attn_with_kvcache.rotary_cos: received a tensor, allowed None",
     {"rotary_cos": zeros(1)}),
    (NotImplementedError, "flash_attn_with_kvcache.cache_batch_idx: received a tensor",
     {"cache_batch_idx": numbers(0)}),
    (NotImplementedError, "flash_attn_with_kvcache.cache_leftpad: received a tensor", {"cache_leftpad": numbers(0)}),
    (NotImplementedError, "alibi_slopes: received slopes of each sequence", {"alibi_slopes": zeros(2, 4)}),
    (NotImplementedError, "softcap: received 5.0, allowed 0 for more than 128 rows", MANY | {"softcap": 5.0}),
    (NotImplementedError, "num_splits: received 2, allowed 0 or 1 for", MANY | {"num_splits": 2}),
    (ValueError, "softcap: received -1, allowed None or", {"softcap": -1}),
    (ValueError, "alibi_slopes: received [2.0, 2.0, 2.0, 2.0], allowed finite numbers in -1.0..1.0",
     {"alibi_slopes": zeros(4) + 2}),
    (ValueError, "cache_seqlens: received 10, allowed 0..9", {"cache_seqlens": 10}),
    (ValueError, "cache_seqlens[1]: received 10, allowed 0..9", {"cache_seqlens": numbers(3, 10)}),
    (ValueError, "cache_seqlens[1]: received 10, allowed 0..9",
     {"cache_seqlens": numbers(3, 10), "block_table": torch.tensor([[0], [1]])}),
    (ValueError, "cache_seqlens: received None, allowed an int or a tensor with k and v", NEW),
    (ValueError, "cache_seqlens[1]: received 8, allowed 0..7: 2 new tokens in 9 rows",
     NEW | {"cache_seqlens": numbers(3, 8)}),
    (ValueError, "cache_seqlens[0]: received -1, allowed 0..7", NEW | {"cache_seqlens": numbers(-1, 0)}),
    (ValueError, "k_cache: received an expanded tensor with strides [0, 64, 32, 1]",
     NEW | {"k_cache": zeros(1, 9, 2, 32).expand(2, -1, -1, -1), "cache_seqlens": 0}),
    (TypeError, "v: received NoneType, allowed a tensor [batch, seqlen_new", {"k": NEW["k"], "cache_seqlens": 3}),
    (ValueError, "block_table[1]: received [-1], allowed pages 0..1 for keys 0..3",
     {"cache_seqlens": 4, "block_table": torch.tensor([[0], [-1]])}),
    (ValueError, "window_size: received (-2, 0), allowed (left, right), each at least 0 or -1",
     {"window_size": (-2, 0)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), KVCACHE, ids=[str(i) for i in range(len(KVCACHE))])
def test_flash_attention(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    refused(error, message, nki_torch.flash_attn_with_kvcache, cached(**changed))


def test_two_tokens_for_one_row() -> None:
    given = cached(**NEW, cache_seqlens=numbers(3, 3), block_table=torch.tensor([[1], [1]]))
    message = "block_table: received [[1], [1]], allowed no row of a page for two of the new tokens"
    refused(ValueError, message, nki_torch.flash_attn_with_kvcache, given)


def kernels_layout(**changed: Any) -> dict[str, Any]:
    given = {"query": zeros(2, 4, 32), "k_cache": zeros(2, 2, 32, 128), "v_cache": zeros(2, 2, 128, 32)}
    return given | {"cache_seqlens": numbers(3, 128), "k_d_major": True} | changed


LAYOUT = [
    (ValueError, "k_cache shape: received [2, 2, 128, 32], allowed [2, 2, 32, 128]", {"k_cache": zeros(2, 2, 128, 32)}),
    (ValueError, "keys of k_cache: received 100, allowed multiples of 128 with k_d_major",
     {"k_cache": zeros(2, 2, 32, 100), "v_cache": zeros(2, 2, 100, 32)}),
    (ValueError, "cache_seqlens[1]: received 129, allowed 0..128", {"cache_seqlens": numbers(3, 129)}),
    (ValueError, "max_seqlen: received 127, allowed 128, the longest", {"max_seqlen": 127}),
    (ValueError, "k_d_major: received True, allowed False with block_table", {"block_table": torch.tensor([[0], [1]])}),
    (ValueError, "softcap: received 5.0, allowed None with skip_softmax_threshold",
     {"softcap": 5.0, "skip_softmax_threshold": 0.5}),
    (ValueError, "skip_softmax_threshold: received 0.5, allowed None or 0 for 3 new tokens",
     {"query": zeros(2, 3, 4, 32), "skip_softmax_threshold": 0.5}),
    (ValueError, "new tokens times query heads per KV head: received 140, allowed 1..128",
     {"query": zeros(2, 70, 4, 32)}),
    (ValueError, "sinks: received [inf, inf, inf, inf], allowed finite numbers", {"sinks": zeros(4) + torch.inf}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), LAYOUT, ids=[str(i) for i in range(len(LAYOUT))])
def test_kernels_layout(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    refused(error, message, nki_torch.decode_cache, kernels_layout(**changed))


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, "positions[0]: received -2, allowed -1, or 0..7: 2 new tokens in 9 rows",
         {"positions": numbers(-2, 0)}),
        (ValueError, "v shape: received [2, 1, 2, 32], allowed [2, 2, 2, 32], that of k", {"v": zeros(2, 1, 2, 32)}),
        (TypeError, "k_cache dtype: received float16, allowed float32, that of k",
         {"k_cache": zeros(2, 2, 9, 32, dtype="float16")}),
        (ValueError, "v_cache: received an expanded tensor with strides [288, 0, 32, 1]",
         {"v_cache": zeros(2, 1, 9, 32).expand(-1, 2, -1, -1)}),
    ],
)  # fmt: skip
def test_append(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given = NEW | {"k_cache": zeros(2, 2, 9, 32), "v_cache": zeros(2, 2, 9, 32), "positions": numbers(0, 0)} | changed
    refused(error, message, nki_torch.append_cache, given)


MASKED = {"attn_mask": torch.ones(3, 3, dtype=torch.bool)}
SDPA = [
    (NotImplementedError, "scaled_dot_product_attention.attn_mask: received a mask, allowed None", MASKED),
    (NotImplementedError, "scaled_dot_product_attention.dropout_p: received 0.1, allowed 0", {"dropout_p": 0.1}),
    (ValueError, "heads of key: received 2, allowed 4, as query has, without enable_gqa", {"enable_gqa": False}),
    (ValueError, "value shape: received [1, 2, 3, 16], allowed [1, 2, 3, 32]", {"value": zeros(1, 2, 3, 16)}),
    (ValueError, "scale: received inf", {"scale": float("inf")}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), SDPA, ids=[str(i) for i in range(len(SDPA))])
def test_scaled_dot_product_attention(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given = {"query": zeros(1, 4, 3, 32), "key": zeros(1, 2, 3, 32), "value": zeros(1, 2, 3, 32), "enable_gqa": True}
    refused(error, message, nki_torch.scaled_dot_product_attention, given | changed)
