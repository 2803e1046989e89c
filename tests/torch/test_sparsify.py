"""Sparse attention of models: settings, methods, patterns, blocks that restore, counts, saving; against the oracle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# ruff: noqa: E402 - what needs torch is imported where there is torch

from torch import nn

from nki_torch.hf import NkiCache, nki_attention
from nki_torch.sparsity import (
    SKIP_SOFTMAX_DEFAULT,
    SPARSE_NM_DEFAULT,
    Counts,
    LayerState,
    SparseAttentionAttributeConfig,
    SparseAttentionConfig,
    SparseAttentionMethod,
    SparseOptions,
    collect_stats,
    dense_attention,
    disable_sparse_attention,
    enable_sparse_attention,
    get_sparse_method,
    is_attn_sparsified,
    layer_state,
    load_sparse_attention,
    methods,
    register_sparse_method,
    reset_sparse_attention_stats,
    restore_sparse_attention_state,
    save_sparse_attention,
    sparse_attention,
    sparse_attention_state,
    sparse_attention_stats,
    sparse_attention_summary,
    sparse_methods,
    sparsify,
)
from nki_torch.sparsity.state import set_layer_state
from nkisim.frameworks import to_numpy
from reference import budget
from reference.flash_attention import flash_attention
from reference.rounded_attention import flash_attention_rounded
from reference.skip_softmax import skip_softmax_decode
from tests.torch import models

LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def only(**settings: Any) -> dict[str, Any]:
    """The same settings for all layers."""
    return {"sparse_cfg": {"default": settings}}


# Settings.


@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan, math.inf, -math.inf, True, "0.1", None])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_thresholds_are_numbers_in_0_to_1(phase: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"thresholds\[{phase}\]: received"):
        SparseAttentionAttributeConfig(thresholds={phase: value})
    with pytest.raises((ValueError, TypeError), match=rf"thresholds\[{phase}\]: received"):
        SparseAttentionConfig({"*": {"thresholds": {phase: [value]}}})


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 4), (-1, 4), (8, 8), (1, 3), (2, 16), (1, 0), (1.0, 4), (True, 4)])
def test_only_supported_n_of_m(n: Any, m: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"sparsity_[nm]: received"):
        SparseAttentionAttributeConfig(method="sparse_softmax", sparsity_n=n, sparsity_m=m)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": {"encode": 0.1}}, "thresholds phase: received 'encode'"),
        ({"thresholds": {"decode": [0.1, 0.2]}}, r"thresholds\[decode\]: received \[0.1, 0.2\], allowed one number"),
        ({"thresholds": 0.1}, "thresholds: received float"),
        ({"scale_factors": {"decode": -1.0}}, r"scale_factors\[decode\]: received -1.0"),
        ({"scale_factors": {"decode": math.inf}}, r"scale_factors\[decode\]: received inf"),
        ({"dense_sink_tokens": -1}, "dense_sink_tokens: received -1"),
        ({"dense_recent_tokens": 2**24}, "dense_recent_tokens: received 16777216, allowed 0..16777215"),
        ({"dense_recent_tokens": 1.5}, "dense_recent_tokens: received 1.5"),
        ({"bc": 64}, "bc: received 64, allowed 128"),
        ({"enable": 1}, "enable: received 1"),
        ({"method": None}, "method: received None"),
        ({"treshold": 0.1}, r"settings: received \['treshold'\]"),
        ([], "settings: received list"),
    ],
)
def test_settings_out_of_range(settings: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SparseAttentionAttributeConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"config: received \[\]"),
        ({"sparse_cfg": {}, "more": 1}, "config: received"),
        ({"sparse_cfg": []}, "sparse_cfg: received list"),
        ({"sparse_cfg": {1: {}}}, "pattern: received 1"),
        (1, "config: received int"),
        ({"sparse_cfg": {"*no_such*": {}}}, r"pattern: received '\*no_such\*'.*model.layers.0.self_attn"),
        (only(method="no-such"), "method: received 'no-such', allowed flash_skip_softmax"),
    ],
)
def test_a_wrong_config_changes_nothing(config: Any, message: str) -> None:
    model = models.make("llama")
    with pytest.raises((ValueError, TypeError), match=message):
        sparsify(model, config)
    assert not is_attn_sparsified(model)
    assert model.config._attn_implementation == "eager"


def test_settings_are_values() -> None:
    thresholds = {"decode": 0.5}
    config = SparseAttentionAttributeConfig(thresholds=thresholds, scale_factors={"prefill": 30.0})
    thresholds["decode"] = 0.9
    assert config.threshold("decode", 10) == 0.5
    assert config.threshold("prefill", 60) == 0.5
    assert config.threshold("prefill", 10) == 1.0
    assert SparseAttentionAttributeConfig(thresholds={}).threshold("prefill", 10) == 0.0
    assert SparseAttentionAttributeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.enable = False  # type: ignore[misc]


def test_defaults_by_name() -> None:
    model = sparsify(models.make("llama"), SKIP_SOFTMAX_DEFAULT)
    state = layer_state(model.model.layers[1].self_attn)
    assert state is not None
    assert state.options("prefill", 999) == SparseOptions(skip_softmax_threshold=1e-3)
    assert state.options("decode", 999) == SparseOptions(skip_softmax_threshold=1e-4)
    assert state.counts
    sparsify(model, SPARSE_NM_DEFAULT)
    state = layer_state(model.model.layers[1].self_attn)
    assert state is not None
    assert state.options("prefill", 999) == SparseOptions(2, 4, 0, 64)
    assert state.options("decode", 999) == SparseOptions()
    both = {**SPARSE_NM_DEFAULT["sparse_cfg"]["*attn*"], "method": "sparse_skip_softmax"}
    state = LayerState.of(SparseAttentionAttributeConfig.from_dict(both))
    assert state.options("prefill", 999) == SparseOptions(2, 4, 0, 64, 1e-3)
    assert state.options("decode", 999) == SparseOptions(skip_softmax_threshold=1e-4)


# Methods.


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))
    assert sparse_methods() == ("flash_skip_softmax", "sparse_skip_softmax", "sparse_softmax")

    @register_sparse_method("first-layers-only")
    class Own(SparseAttentionMethod):
        def options(self, phase: str, seqlen_kv: int) -> SparseOptions:
            return SparseOptions(skip_softmax_threshold=1.0 / seqlen_kv)

    assert get_sparse_method("first-layers-only") is Own
    assert register_sparse_method("first-layers-only")(Own) is Own
    with pytest.raises(ValueError, match="method name: received 'sparse_softmax'"):
        register_sparse_method("sparse_softmax")(Own)
    with pytest.raises(TypeError, match="method name: received 3"):
        register_sparse_method(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="method: received <class 'int'>, allowed a subclass"):
        register_sparse_method("another")(int)  # type: ignore[type-var]
    model = sparsify(models.make("llama"), only(method="first-layers-only"))
    state = layer_state(model.model.layers[0].self_attn)
    assert state is not None
    assert state.options("decode", 8).skip_softmax_threshold == 0.125


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity_n": 5},
        {"sparsity_m": 3},
        {"dense_sink_tokens": -1},
        {"skip_softmax_threshold": 1.5},
        {"skip_softmax_threshold": math.nan},
        {"skip_softmax_threshold": None},
    ],
    ids=str,
)
def test_options_of_own_methods_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(options))}: received"):
        SparseOptions(**options)


QKV = tuple(torch.randn(2, heads, 300, 16, generator=torch.Generator().manual_seed(1)) for heads in (4, 2, 2))


def attend(config: SparseAttentionAttributeConfig, q: Any, k: Any, v: Any) -> tuple[Any, LayerState]:
    layer, state = nn.Module(), LayerState.of(config)
    set_layer_state(layer, state)
    return nki_attention(layer, q, k, v, None, scaling=0.5)[0], state


@pytest.mark.parametrize("method", ["flash_skip_softmax", "sparse_softmax", "sparse_skip_softmax"])
def test_prefill_is_what_the_settings_say(method: str) -> None:
    """Every option reaches the kernel: against the oracle with the same ones, and its counts.

    Scores are exact in float32, so that the selection is the oracle's. Keys 0 and 200 are above all others, by more
    than the threshold and less than would hide the others.
    """
    q, k, v = ((4 * x).round() / 4 for x in QKV)
    q[..., 0], k[..., 0] = 4, 0
    k[:, :, [0, 200], 0] = 8
    threshold, n = 0.3 if "skip" in method else None, 3 if "sparse" in method else 0
    config = SparseAttentionAttributeConfig(
        method=method,
        thresholds={"prefill": 0.3},
        sparsity_n=3,
        sparsity_m=8,
        dense_sink_tokens=2,
        dense_recent_tokens=9,
        collect_stats=True,
    )
    o, state = attend(config, q, k, v)
    arrays = [np.ascontiguousarray(to_numpy(x.transpose(1, 2))) for x in (q, k, v)]
    options = {"softmax_scale": 0.5, "skip_softmax_threshold": threshold}
    options |= {"sparsity_n": n, "sparsity_m": 8, "dense_sink_tokens": 2, "dense_recent_tokens": 9}
    exact = flash_attention(*arrays, **options)
    assert min(exact.stats.margin.min(), exact.stats.selection_margin.min()) > 1e-5
    budget.check_budget("o", to_numpy(o), exact.o, flash_attention_rounded(*arrays, **options)[0], np.float32)
    skipped = int(exact.stats.tiles_skipped.sum())
    assert state.stats is not None
    assert state.stats.prefill == Counts(1, 2 * 4 * 6, skipped)
    assert skipped == (2 * 4 if threshold else 0)  # the last tile of keys, of the last tile of queries


def test_decode_is_what_the_settings_say() -> None:
    q, k, v = (x.clone() for x in QKV)
    q = q[:, :, -1:]
    k[:, :, 0] = 4 * q.reshape(2, 2, 2, 16).mean(dim=2)
    config = SparseAttentionAttributeConfig(thresholds={"decode": 0.3}, collect_stats=True)
    o, state = attend(config, q, k, v)
    arrays = [np.ascontiguousarray(to_numpy(x.transpose(1, 2))) for x in (q, k, v)]
    exact = skip_softmax_decode(arrays[0][:, 0], *arrays[1:], softmax_scale=0.5, skip_softmax_threshold=0.3)
    assert exact.stats.margin.min() > 1e-3
    np.testing.assert_allclose(to_numpy(o)[:, 0], exact.o, rtol=1e-4, atol=1e-5)
    assert state.stats is not None
    assert state.stats.decode == Counts(1, 2 * 4 * 3, int(exact.stats.tiles_skipped.sum()))
    assert 0 < state.stats.decode.sparsity < 1


# Patterns and blocks.


def test_patterns_the_last_one_wins() -> None:
    config = {
        "sparse_cfg": {
            "*attn*": {"thresholds": {"decode": 0.5}},
            "*layers.1.*": {"method": "sparse_softmax"},
            "default": {"enable": False},
        }
    }
    model = sparsify(models.make("llama"), config)
    settings = sparse_attention_state(model)["layers"]
    assert [settings[name]["method"] for name in LAYERS] == ["flash_skip_softmax", "sparse_softmax"]
    assert settings[LAYERS[0]]["thresholds"] == {"decode": 0.5}
    assert settings[LAYERS[1]]["thresholds"] == {"prefill": 1e-3, "decode": 1e-4}
    sparsify(model, {"sparse_cfg": {"*layers.0.*": {"enable": False}}})
    assert sparse_attention_state(model)["layers"][LAYERS[1]] == settings[LAYERS[1]]
    assert not sparse_attention_state(model)["layers"][LAYERS[0]]["enable"]


def test_switching_layers() -> None:
    model = sparsify(models.make("llama"), only(thresholds={"prefill": 0.5}))
    states = [layer_state(model.get_submodule(name)) for name in LAYERS]

    def threshold(i: int) -> float:
        state = layer_state(model.get_submodule(LAYERS[i]))
        assert state is not None
        return state.options("prefill", 1).skip_softmax_threshold

    disable_sparse_attention(model, "*.0.*")
    assert (threshold(0), threshold(1)) == (0.0, 0.5)
    with dense_attention(model):
        assert (threshold(0), threshold(1)) == (0.0, 0.0)
        enable_sparse_attention(model, "*.0.*")
        assert (threshold(0), threshold(1)) == (0.5, 0.0)
    assert (threshold(0), threshold(1)) == (0.0, 0.5)
    assert layer_state(model.get_submodule(LAYERS[1])) is states[1]
    with pytest.raises(ValueError, match="pattern: received 'nothing'"):
        disable_sparse_attention(model, "nothing")
    with pytest.raises(ValueError, match="there is none"):
        enable_sparse_attention(models.make("llama"))


def snapshot(model: Any) -> Any:
    return [layer_state(model.get_submodule(name)) for name in LAYERS], model.config._attn_implementation


def test_blocks_restore_what_they_found() -> None:
    """Nested, and after an exception: the very states of before, counts included, and the attention of before."""
    model = models.make("llama")
    begin = snapshot(model)
    assert begin == ([None, None], "eager")
    with sparse_attention(model, SKIP_SOFTMAX_DEFAULT):
        outer = snapshot(model)
        assert outer[1] == "nki"
        model(models.ids(1, 6))
        with sparse_attention(model, {"sparse_cfg": {"*.1.*": {"method": "sparse_softmax"}}}), collect_stats(model):
            inner = snapshot(model)
            assert inner[0][0] is not outer[0][0]
            model(models.ids(1, 6))
        restored = snapshot(model)
        assert restored[0][0] is outer[0][0]
        assert restored[0][1] is outer[0][1]
        assert sparse_attention_stats(model)[LAYERS[0]].prefill.calls == 1
        with pytest.raises(ZeroDivisionError), dense_attention(model):
            raise ZeroDivisionError
        assert snapshot(model)[0][0] is outer[0][0]
    assert snapshot(model) == begin
    with pytest.raises(KeyError), sparse_attention(model, SKIP_SOFTMAX_DEFAULT):
        raise KeyError
    assert snapshot(model) == begin
    with pytest.raises(ValueError, match="model: received one without sparse layers"), collect_stats(model):
        pytest.fail("entered")


# Counts.


def test_counts_by_layer() -> None:
    """Tiles of 128 x 128 at and below the diagonal in prefill, of 128 keys in decode; times 4 heads, 2 sequences."""
    model = sparsify(models.with_sink(), SKIP_SOFTMAX_DEFAULT)
    ids = models.ids(2, 200)
    ids[:, 0] = 1
    for cache in (NkiCache(model.config), None):
        with collect_stats(model) as stats:
            result = model(ids, past_key_values=cache, use_cache=True)
            model(ids[:, :1], past_key_values=result.past_key_values)
        assert list(stats) == LAYERS
        for counts in stats.values():
            assert (counts.prefill.calls, counts.prefill.tiles_total) == (1, 2 * 4 * 3)
            assert (counts.decode.calls, counts.decode.tiles_total) == (1, 2 * 4 * 2)
        assert stats[LAYERS[0]].prefill.tiles_skipped > 0
    assert sparse_attention_stats(model)[LAYERS[0]].prefill == Counts()
    with dense_attention(model, "*.0.*"):
        model(ids[:, :5])
    counted = sparse_attention_stats(model)
    assert [counted[name].prefill.calls for name in LAYERS] == [0, 1]
    assert "self_attn: on, flash_skip_softmax, prefill 0 of 8 tiles skipped" in sparse_attention_summary(model)
    reset_sparse_attention_stats(model)
    assert sparse_attention_stats(model)[LAYERS[1]].prefill == Counts()
    assert sparse_attention_summary(models.make("llama")) == "no sparse attention layers"
    assert "dense" not in sparse_attention_summary(model)
    model.set_attn_implementation("eager")
    assert "flash_skip_softmax, but dense: attn_implementation is eager" in sparse_attention_summary(model)


def test_threshold_0_gives_the_dense_tokens() -> None:
    model = models.make("llama")
    inputs = {"input_ids": models.ids(1, 5), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs)
    sparsify(model, only(thresholds={"prefill": 0.0, "decode": 0}, collect_stats=True))
    assert torch.equal(model.generate(**inputs, past_key_values=NkiCache(model.config)), expected)
    for counts in sparse_attention_stats(model).values():
        assert (counts.prefill, counts.decode) == (Counts(1, 4, 0), Counts(3, 12, 0))


# Saving.


def test_save_and_load(tmp_path: Path) -> None:
    """Beside a saved model, as `save_pretrained` and `from_pretrained` do it, and as a file of any name."""
    model = sparsify(models.make("llama"), SKIP_SOFTMAX_DEFAULT)
    sparsify(model, {"sparse_cfg": {"*.1.*": {"scale_factors": {"prefill": 12.5}}}})
    disable_sparse_attention(model, "*.0.*")
    model.save_pretrained(tmp_path)
    assert save_sparse_attention(model, tmp_path) == tmp_path / "sparse_attention_config.json"
    save_sparse_attention(model, tmp_path / "own.json")
    for path in (tmp_path, tmp_path / "own.json"):
        other = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        assert load_sparse_attention(other, path) is other
        assert sparse_attention_state(other) == sparse_attention_state(model)
        assert other.config._attn_implementation == "nki"
    state = layer_state(other.model.layers[1].self_attn)
    assert state is not None
    assert state.options("prefill", 25).skip_softmax_threshold == 0.5
    restore_sparse_attention_state(other, {"format": 1, "layers": {}})
    assert not is_attn_sparsified(other)
    with pytest.raises(FileNotFoundError):
        load_sparse_attention(other, tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "state: received"),
        ({"format": 2, "layers": {}}, "state: received"),
        ({"format": 1, "layers": []}, "state: received"),
        ({"format": 1, "layers": {"model.layers.7.self_attn": {}}}, "layers: received"),
        ({"format": 1, "layers": {LAYERS[0]: {"thresholds": {"decode": 2}}}}, r"thresholds\[decode\]: received 2"),
    ],
)
def test_a_wrong_state_changes_nothing(state: Any, message: str) -> None:
    model = sparsify(models.make("llama"), SPARSE_NM_DEFAULT)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        restore_sparse_attention_state(model, state)
    assert snapshot(model)[0][0] is before[0][0]


def test_models_without_attention_layers() -> None:
    with pytest.raises(ValueError, match="model: received Linear"):
        sparsify(nn.Linear(2, 2), SKIP_SOFTMAX_DEFAULT)
    with pytest.raises(TypeError, match="model: received str"):
        is_attn_sparsified("model")  # type: ignore[arg-type]
