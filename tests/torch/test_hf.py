"""transformers models on the kernels: the tokens of eager attention, its logits and gradients, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# ruff: noqa: E402 - what needs torch is imported where there is torch

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from nki_torch import hf
from nki_torch.cache import FlatKVCache, PagedKVCache
from nki_torch.hf import NkiCache, nki_attention, nki_mask, register
from nki_torch.sparsity import SPARSE_NM_DEFAULT, sparsify
from tests.torch import models

NEW = 3  # tokens
PROMPT = 9  # longer than the windows


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()
    register()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompt(padding: str) -> dict[str, Tensor]:
    ids = models.ids(2, PROMPT)
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :4] = 0
    elif padding == "right":
        mask[1, -4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def tokens(model: Any, inputs: dict[str, Tensor], cache: Any = None, **options: Any) -> Tensor:
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, past_key_values=cache, **options)
    return out[:, inputs["input_ids"].shape[1] :]


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "flat": NkiCache,
    "flat-room": lambda config: NkiCache(config, max_cache_len=PROMPT + NEW),
    "s-major": lambda config: NkiCache(config, k_d_major=False),
    "paged": lambda config: NkiCache(config, paged=True, block_size=8),
    "static": lambda config: StaticCache(config=config, max_cache_len=24),
}


@pytest.mark.parametrize(
    ("name", "padding", "caches"),
    [
        ("llama", "none", ("flat",)),
        ("llama", "left", ("flat", "static")),
        ("qwen2-window", "left", ("dynamic", "flat-room")),
        ("qwen3", "left", ("flat", "s-major")),
        ("mistral-window", "none", ("flat",)),
        ("mistral-window", "left", ("flat", "paged")),
    ],
)
def test_same_tokens_as_eager_attention(name: str, padding: str, caches: tuple[str, ...]) -> None:
    model, inputs = models.make(name), prompt(padding)
    expected = tokens(model, inputs)
    if "window" in name:
        # The test sees windows: without them the tokens are others.
        wide = models.make(name, sliding_window=500)
        assert not torch.equal(expected, tokens(wide, inputs))
    model.set_attn_implementation("nki")
    for cache in caches:
        assert torch.equal(tokens(model, inputs, CACHES[cache](model.config)), expected), cache


def logits(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model(**inputs, **options).logits[inputs["attention_mask"].bool()]


def exact_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The same in float64, of one sequence after the other and without padding."""
    double = copy.deepcopy(model).double()
    double.set_attn_implementation("eager")
    rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return torch.cat([double(input_ids=ids[seen][None]).logits[0] for ids, seen in rows])


@pytest.mark.parametrize(
    ("name", "padding"), [("llama", "none"), *((name, side) for name in models.MODELS for side in ("left", "right"))]
)
def test_logits_of_prompts(name: str, padding: str) -> None:
    """Every token's logits, as close to those of float64 as eager float32's are."""
    model, inputs = models.make(name), prompt(padding)
    eager, exact = logits(model, inputs), exact_logits(model, inputs)
    model.set_attn_implementation("nki")
    bound = 2 * (eager - exact).abs().max()
    assert 0 < bound < 1e-3
    assert (logits(model, inputs) - exact).abs().max() <= bound


def test_bfloat16() -> None:
    model, inputs = models.make("llama").bfloat16(), prompt("left")
    eager, exact = logits(model, inputs), exact_logits(model, inputs)
    model.set_attn_implementation("nki")
    assert (logits(model, inputs) - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_gradients() -> None:
    inputs, gradients = prompt("right"), []
    for implementation, dtype in (("eager", torch.float64), ("eager", torch.float32), ("nki", torch.float32)):
        model = models.make("mistral-window", implementation).to(dtype).train()
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        with torch.enable_grad():
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients.append([p.grad.double() for p in model.parameters()])
    # A single token, which decode without a gradient would take.
    model.zero_grad()
    with torch.enable_grad():
        model(input_ids=models.ids(1, 1), labels=models.ids(1, 1), use_cache=False).logits.sum().backward()
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().sum() > 0
    for exact, eager, got in zip(*gradients, strict=True):
        assert (got - exact).abs().max() <= 3 * (eager - exact).abs().max()


def test_several_calls_with_one_cache() -> None:
    """A prompt in two pieces, several tokens at once, and one that is taken back, with padding before all of it."""
    model, inputs = models.make("mistral-window"), prompt("left")
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.int64)], dim=1)
    ids = torch.cat([inputs["input_ids"], models.ids(2, 4, seed=1)], dim=1)
    expected = model(input_ids=ids, attention_mask=mask).logits
    model.set_attn_implementation("nki")
    for make in (CACHES["flat"], CACHES["paged"], CACHES["dynamic"]):
        cache = make(model.config)
        model(input_ids=ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        if make is not CACHES["dynamic"]:
            model(input_ids=ids[:, 6:9], attention_mask=mask[:, :9], past_key_values=cache)
            cache.crop(-2)
            assert cache.get_seq_length() == 7
            assert cache.layers[1].cache.lengths == (7, 3)
            got = model(input_ids=ids[:, 7:], attention_mask=mask, past_key_values=cache).logits
        else:
            got = model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(got[:, -4:], expected[:, -4:], rtol=1e-4, atol=1e-4)


def test_padding_between_a_prompt_and_what_follows() -> None:
    model, inputs = models.make("llama"), prompt("right")
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    step = {"input_ids": models.ids(2, 1, seed=1), "attention_mask": mask}
    step["position_ids"] = mask.sum(dim=1, keepdim=True) - 1
    results = []
    for implementation, caches in (("eager", ["dynamic"]), ("nki", ["dynamic", "flat", "paged"])):
        model.set_attn_implementation(implementation)
        for make in caches:
            cache = CACHES[make](model.config)
            model(**inputs, past_key_values=cache)
            results.append(model(**step, past_key_values=cache).logits)
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-4, atol=1e-4)


def test_beams() -> None:
    model, inputs = models.make("llama"), prompt("left")
    expected = tokens(model, inputs, num_beams=2)
    model.set_attn_implementation("nki")
    assert torch.equal(tokens(model, inputs, NkiCache(model.config), num_beams=2), expected)


def test_static_cache() -> None:
    model, inputs = models.make("llama"), prompt("left")
    expected = model(**inputs, past_key_values=CACHES["static"](model.config)).logits
    model.set_attn_implementation("nki")
    cache = CACHES["static"](model.config)
    seen = inputs["attention_mask"].bool()
    got = model(**inputs, past_key_values=cache).logits
    torch.testing.assert_close(got[seen], expected[seen], rtol=1e-4, atol=1e-4)
    inputs = {"input_ids": models.ids(2, 1, seed=3), "attention_mask": torch.cat([seen, seen[:, -1:]], dim=1).long()}
    model.set_attn_implementation("eager")
    reference = copy.deepcopy(cache)
    expected = model(**inputs, past_key_values=reference).logits
    model.set_attn_implementation("nki")
    torch.testing.assert_close(model(**inputs, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_cache_under_another_attention() -> None:
    """Keys are handed out as other caches do, until padding was taken out; then nobody misreads them."""
    model, inputs = models.make("llama"), prompt("left")
    expected = tokens(model, inputs)
    assert torch.equal(tokens(model, inputs, NkiCache(model.config)), expected)
    model.set_attn_implementation("nki")
    cache = NkiCache(model.config)
    model(**inputs, past_key_values=cache)
    model.set_attn_implementation("eager")
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    with pytest.raises(RuntimeError):
        model(input_ids=models.ids(2, 1), attention_mask=mask, past_key_values=cache)


def test_cache_follows_the_transformers_interface() -> None:
    config = models.make("llama").config
    cache = NkiCache(config)
    cache.crop(-3)  # of layers without keys nothing is taken
    assert (len(cache), cache.get_seq_length(), cache.get_max_length(), cache.is_initialized) == (2, 0, -1, False)
    assert cache.get_mask_sizes(7, 0) == (7, 0)
    k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    for layer in range(2):
        got = cache.update(k, v, layer)
        assert torch.equal(got[0], k)
        assert torch.equal(got[1], v)
    keys, values = cache.update(k, v, 0)
    assert torch.equal(keys, torch.cat([k, k], dim=2))
    assert torch.equal(values, torch.cat([v, v], dim=2))
    layer = cache.layers[0]
    assert isinstance(layer.cache, FlatKVCache)
    assert keys.data_ptr() == layer.cache.k.data_ptr()  # a view of what is stored
    assert cache.get_mask_sizes(1, 0) == (7, 0)
    cache.batch_repeat_interleave(2)
    assert layer.cache.batch == 4
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(layer.cache.keys[0], torch.cat([k, k], dim=2)[1])
    cache.reset()
    assert (cache.get_seq_length(), layer.cache.lengths) == (0, (0, 0))
    paged = NkiCache(config, paged=True, max_cache_len=4)
    paged.update(k, v, 0)
    assert isinstance(paged.layers[0].cache, PagedKVCache)
    assert paged.get_max_length() == 4
    with pytest.raises(ValueError, match="new keys of 0: received 3, allowed at most 1"):
        paged.update(k, v, 0)
    cache.update(k, v, 1)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="key requires grad"):
        cache.update(k.requires_grad_(), v, 1)


def test_padding_is_known_after_crops_and_selections() -> None:
    layer = NkiCache(models.make("llama").config).layers[0]
    k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    layer.update(k, v)
    layer.take_out_padding(torch.tensor([[True, True, True], [False, True, True]]))
    layer.crop(-1)
    assert layer.cache.lengths == (2, 1)
    layer.update(k[:, :, :2], v[:, :, :2])
    layer.take_out_padding(torch.tensor([[True, True, False, True], [False, True, True, True]]))
    layer.batch_select_indices(torch.tensor([1, 0]))
    layer.take_out_padding(torch.tensor([[False, True, True, True], [True, True, False, True]]))
    assert layer.cache.lengths == (3, 3)
    expected = [torch.stack([x[1, :, 1], x[1, :, 0], x[1, :, 1]], dim=1) for x in (k, v)]
    assert torch.equal(layer.cache.keys[0], expected[0])
    assert torch.equal(layer.cache.values[0], expected[1])
    layer.update(k[:, :, :1], v[:, :, :1])
    layer.crop(-2)  # one position whose padding is known, and one behind
    assert (layer.columns, layer.cache.lengths) == (3, (2, 2))


@pytest.mark.parametrize("kind", ["flat", "paged"])
def test_a_copy_of_a_cache_is_its_own(kind: str) -> None:
    """As prompt caching makes them: copied, or written to disk, and continued by another text."""
    model, ids = models.make("llama", "nki"), models.ids(1, 6)
    cache = CACHES[kind](model.config)
    model(input_ids=ids[:, :5], past_key_values=cache)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    model(input_ids=ids[:, :1], past_key_values=cache)
    expected = model(input_ids=ids, use_cache=False).logits[:, -1]
    for other in copies:
        got = model(input_ids=ids[:, 5:], past_key_values=other).logits[:, -1]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert (other.get_seq_length(), cache.get_seq_length()) == (6, 6)


def test_registered_by_name() -> None:
    assert AttentionInterface()["nki"] is nki_attention
    assert AttentionMaskInterface()["nki"] is nki_mask


def test_masks_are_rows() -> None:
    """No mask of queries by keys; none at all where nothing is hidden but the future."""
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": 5, "q_offset": 2}
    assert nki_mask(**sizes) is None
    assert nki_mask(**sizes, attention_mask=torch.ones(2, 5, dtype=torch.bool)) is None
    valid = torch.tensor([[False, True, True, True, True], [True] * 5])
    mask = nki_mask(**sizes, attention_mask=valid)
    assert mask.shape == (2, 1, 1, 6)  # of four dimensions, as masks that transformers does not make again
    assert mask[:, 0, 0].tolist() == [[-1, 0, 1, 1, 1, 1], [-1, 1, 1, 1, 1, 1]]
    window = {"mask_function": sliding_window_causal_mask_function(4), "local_size": 4}
    assert nki_mask(**sizes, **window)[:, 0, 0].tolist() == [[3, 1, 1, 1, 1, 1]] * 2
    # A static cache has more keys than there are; a sliding cache begins behind the first position.
    assert nki_mask(2, 3, 8, 2)[:, 0, 0].tolist() == [[-1, 1, 1, 1, 1, 1]] * 2
    shifted = nki_mask(1, 1, 3, 4, 2, attention_mask=torch.tensor([[False, False, False, True, True]]))
    assert shifted.tolist() == [[[[-1, 0, 1, 1]]]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_function": bidirectional_mask_function}, NotImplementedError, "received bidirectional_mask_function"),
        (
            {"mask_function": chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)), "local_size": 4},
            NotImplementedError,
            "mask_function: received and_masks",
        ),
        (
            {"mask_function": sliding_window_causal_mask_function(4), "local_size": 5},
            NotImplementedError,
            "mask_function: received and_masks",
        ),
        (
            {"mask_function": lambda b, h, q, k: causal_mask_function(b, h, q, k)},
            NotImplementedError,
            "mask_function: received .*lambda",
        ),
        (
            {"attention_mask": torch.ones(1, 2, dtype=torch.bool)},
            ValueError,
            r"attention_mask shape: received \[1, 2\]",
        ),
        (
            {"attention_mask": torch.ones(2, 3, dtype=torch.bool)},
            ValueError,
            r"attention_mask shape: received \[2, 3\], allowed 1 rows of 3 columns",
        ),
    ],
)
def test_masks_that_rows_do_not_express(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nki_mask(1, 3, 3, **options)


QKV = tuple(torch.randn(2, heads, 4, 16, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2))


def test_models_that_ask_no_interface() -> None:
    """Such a model reads None, no mask at all for it, as attention to the future."""
    model = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2, attn_implementation="nki")
    )
    with pytest.raises(NotImplementedError, match="model: received BloomModel, allowed one that asks Attention"):
        model(input_ids=models.ids(1, 5))
    with pytest.raises(ValueError, match="model: received BloomForCausalLM, allowed one with attention layers"):
        sparsify(model, SPARSE_NM_DEFAULT)


def test_sequences_packed_by_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(NotImplementedError, match="mask_function: received and_masks"):
        models.make("llama", "nki")(input_ids=models.ids(1, 5), position_ids=positions, use_cache=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout: received 0.1, allowed 0"),
        ({"output_attentions": True}, "output_attentions: received True"),
        ({"softcap": 30.0}, "softcap: received"),
        ({"s_aux": torch.zeros(4)}, "s_aux: received"),
        ({"position_bias": torch.zeros(1)}, "position_bias: received"),
        ({"is_causal": False}, "is_causal: received False"),
    ],
)
def test_options_that_kernels_do_not_compute(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        nki_attention(torch.nn.Module(), *QKV, None, **options)


def rows(*numbers: int) -> Tensor:
    """A mask of two equal sequences, as `nki_mask` makes it."""
    return torch.tensor([[[numbers]]] * 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 1, 4, 4), NotImplementedError, r"attention_mask: received \[2, 1, 4, 4\] torch.float32"),
        (torch.ones(2, 4, dtype=torch.bool), NotImplementedError, "attention_mask: received"),
        (SimpleNamespace(), NotImplementedError, "attention_mask: received SimpleNamespace"),
        (torch.ones(2, 5, dtype=torch.int32), NotImplementedError, r"attention_mask: received \[2, 5\] torch.int32"),
        (rows(-1, 1, 0, 1, 1), NotImplementedError, "gaps among new tokens"),
        (rows(2, 1, 0, 1, 1), NotImplementedError, "gaps with a sliding window"),
    ],
)
def test_masks_of_others(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nki_attention(torch.nn.Module(), *QKV, mask)


def test_padding_that_changes_between_calls() -> None:
    model, inputs = models.make("llama", "nki"), prompt("left")
    cache = NkiCache(model.config)
    model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask: received other padding"):
        model(input_ids=models.ids(2, 1), attention_mask=torch.ones(2, PROMPT + 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_cache_len": 0}, ValueError, "max_cache_len: received 0"),
        ({"paged": 1}, TypeError, "paged: received 1"),
        ({"block_size": 0}, ValueError, "block_size: received 0"),
    ],
)
def test_caches_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NkiCache(models.make("llama").config, **options)


def test_layers_that_are_not_attention() -> None:
    config = models.make("qwen2-window").config
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(NotImplementedError, match="layer type: received chunked_attention"):
        NkiCache(config)
    assert hf.NAME == "nki"
