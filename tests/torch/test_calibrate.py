"""Calibration: the share of tiles left out is the target, by the kernels' own counts; gaps against the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# ruff: noqa: E402 - what needs torch is imported where there is torch

from nki_torch.sparsity import (
    SKIP_SOFTMAX_DEFAULT,
    SPARSE_NM_DEFAULT,
    calibrate,
    collect_stats,
    disable_sparse_attention,
    layer_state,
    sparse_attention_state,
    sparse_attention_stats,
    sparsify,
)
from nki_torch.sparsity.calibrate import tile_gaps
from nki_torch.sparsity.state import Operands
from reference.flash_attention import flash_attention
from tests.torch import models

LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize("left", [None, 129])
def test_gaps_are_the_oracles_decisions(left: int | None) -> None:
    """A tile is skipped by exactly the thresholds above its gap; two sequences, the second behind a prefix.

    With 129 keys to the left row 256 is the only one of its tile to see the first tile of keys, by its last key.
    """
    lens_q, lens_kv = [300, 140], [300, 400]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(440, 4, 16, generator=generator)
    k = torch.randn(700, 2, 16, generator=generator)
    k[[0, 300]] *= 4
    gaps = tile_gaps(Operands("prefill", q, k, lens_q, lens_kv, 0.5, left)).numpy()
    bounds = [np.array([0, *np.cumsum(x)]) for x in (lens_q, lens_kv)]
    skipping = 0
    for threshold in (1.0, 0.9, 0.5, 0.2, 0.05):
        exact = flash_attention(
            *(x.numpy() for x in (q, k, k)),
            cu_seqlens_q=bounds[0],
            cu_seqlens_kv=bounds[1],
            softmax_scale=0.5,
            window_size=(left, None),
            skip_softmax_threshold=threshold,
        )
        assert exact.stats.margin.min() > 1e-5
        assert gaps.size == exact.stats.tiles_total.sum()
        assert (gaps < math.log(threshold)).sum() == exact.stats.tiles_skipped.sum()
        skipping += exact.stats.tiles_skipped.sum() > 0
    assert skipping >= 2


def inputs() -> dict[str, Any]:
    """Two prompts that begin with the token that queries look at, one behind padding."""
    ids, mask = models.ids(2, 400), torch.ones(2, 400, dtype=torch.int64)
    mask[1, :100] = 0
    ids[0, 0] = ids[1, 100] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def shares(model: Any, steps: int) -> dict[str, float]:
    """Skipped over visited tiles of all layers, counted by the kernels in a forward pass and greedy steps."""
    arguments = inputs()
    mask = arguments["attention_mask"]
    with torch.no_grad(), collect_stats(model) as stats:
        result = model(**arguments, use_cache=True)
        for _ in range(steps):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
            token = result.logits[:, -1:].argmax(dim=-1)
            result = model(token, attention_mask=mask, past_key_values=result.past_key_values)
    phases = {phase: [getattr(x, phase) for x in stats.values()] for phase in ("prefill", "decode")}
    return {
        phase: sum(x.tiles_skipped for x in counts) / max(1, sum(x.tiles_total for x in counts))
        for phase, counts in phases.items()
    }


def test_targets_are_met_on_the_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    """One layer, so that no decision changes what another layer sees: the counts are exact."""
    model = sparsify(models.with_sink(num_hidden_layers=1), SKIP_SOFTMAX_DEFAULT)
    before = layer_state(model.get_submodule(LAYERS[0]))
    found = calibrate(model, [inputs()], {"prefill": 0.25, "decode": 0.5}, num_decode_tokens=2)
    assert "3/3" in capsys.readouterr().err
    tiles = {phase: found.log_factors[phase][LAYERS[0]].size for phase in ("prefill", "decode")}
    assert tiles == {"prefill": 4 * (10 + 6), "decode": 2 * 4 * (4 + 3)}
    got = shares(model, 2)
    assert got["prefill"] == found.sparsity("prefill") == 0.25
    # Prefill left out tiles too, which moves what decode sees a little.
    assert found.sparsity("decode", LAYERS[0]) == 0.5
    assert abs(got["decode"] - 0.5) <= 2 / tiles["decode"]
    # Counts and thresholds of before are left alone.
    assert before is not None
    assert sparse_attention_stats(model)[LAYERS[0]].prefill.calls == 0
    settings = sparse_attention_state(model)["layers"][LAYERS[0]]
    assert settings["thresholds"] == {"prefill": 1e-3, "decode": 1e-4}
    assert settings["scale_factors"] == found.scale_factors
    # Another target needs no other pass: more of it, a larger factor.
    assert found.scale_factor("prefill", 0.0) == 0.0
    assert found.scale_factor("prefill", 0.3) > found.scale_factors["prefill"] > found.scale_factor("prefill", 0.1) > 0
    # A sixteenth of the tiles is the first column, which no threshold leaves out.
    with pytest.raises(ValueError, match=r"target_sparsity\[prefill\]: received 0.9, allowed 0..0.5"):
        found.scale_factor("prefill", 0.9)


def test_layers_that_take_part() -> None:
    model = sparsify(models.with_sink(), SKIP_SOFTMAX_DEFAULT)
    disable_sparse_attention(model, "*.1.*")
    found = calibrate(model, [inputs()["input_ids"]], {"prefill": 0.1}, progress=False)
    assert list(found.log_factors["prefill"]) == LAYERS[:1]
    assert list(found.log_factors) == list(found.scale_factors) == ["prefill"]
    settings = sparse_attention_state(model)["layers"]
    assert settings[LAYERS[0]]["scale_factors"] == found.scale_factors
    assert settings[LAYERS[1]]["scale_factors"] == {}


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        (1.5, {}, ValueError, r"target_sparsity\[prefill\]: received 1.5"),
        (math.nan, {}, ValueError, r"target_sparsity\[prefill\]: received nan"),
        ("half", {}, TypeError, r"target_sparsity\[prefill\]: received 'half'"),
        ({"encode": 0.1}, {}, ValueError, "target_sparsity phase: received 'encode'"),
        ({}, {}, ValueError, "target_sparsity: received no phase"),
        (0.5, {"num_decode_tokens": -1}, ValueError, "num_decode_tokens: received -1"),
        (0.5, {"inputs": []}, ValueError, "inputs: received none"),
        (0.5, {"inputs": [3]}, TypeError, "inputs: received int"),
        ({"decode": 0.5}, {"num_decode_tokens": 0}, ValueError, "inputs for decode: received no call"),
        ({"prefill": 0.9}, {}, ValueError, r"target_sparsity\[prefill\]: received 0.9, allowed 0..0,"),
    ],
)
def test_callers_mistakes(target: Any, options: Any, error: type[Exception], message: str) -> None:
    model = sparsify(models.make("llama"), SKIP_SOFTMAX_DEFAULT)
    states = [layer_state(model.get_submodule(name)) for name in LAYERS]
    arguments = {"inputs": [models.ids(1, 8)], "progress": False, **options}
    with pytest.raises(error, match=message):
        calibrate(model, target_sparsity=target, **arguments)
    for state, name in zip(states, LAYERS, strict=True):
        assert layer_state(model.get_submodule(name)) is state


@pytest.mark.parametrize("config", [None, SPARSE_NM_DEFAULT])
def test_models_without_a_threshold(config: Any) -> None:
    model = models.make("llama")
    if config is not None:
        sparsify(model, config)
    with pytest.raises(ValueError, match="model: received one without such layers"):
        calibrate(model, [models.ids(1, 8)], 0.5, progress=False)


def test_an_exception_on_the_way_restores() -> None:
    model = sparsify(models.make("llama"), SKIP_SOFTMAX_DEFAULT)
    state = layer_state(model.get_submodule(LAYERS[0]))
    with pytest.raises(IndexError):
        calibrate(model, [torch.tensor([[10**6]])], 0.0, progress=False)
    assert layer_state(model.get_submodule(LAYERS[0])) is state
