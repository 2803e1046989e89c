"""Thresholds of skip-softmax from a target: which share of the tiles is left out on the caller's own inputs.

A tile is left out iff the largest score of every row in it is below the row's largest score so far by more than
log(1 / lambda), and lambda is at most 1, so a tile that is left out raises no maximum: every tile has one number, the
gap of its closest row, and is left out by the thresholds above exp(gap), whatever happens to others. So one dense pass
over the inputs gives the exact share for every threshold.

The share also depends on the number of keys. As in ModelOpt lambda = factor / keys takes most of that out, the keys
being those of the call's longest sequence; calibration finds the factor, of prefill and of decode, for all layers
together: layers with sharper attention then leave out more than others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from contributed._checks import PARTITIONS, require
from nki_torch.sparsity.config import PHASES
from nki_torch.sparsity.model import put_back, sparse_layers
from nki_torch.sparsity.state import Operands, attention_layers, set_layer_state

Array = np.ndarray[Any, np.dtype[Any]]

DECODE_TOKENS = 10
PAST_THE_LAST = 1e-3  # in logs, where no tile is above the last one that is left out


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Args:
        log_factors: by phase and layer, float64 [tiles]: a tile is left out by factors whose log is above its number;
            inf where no threshold leaves it out.
        scale_factors: by phase, what was set.
    """

    log_factors: Mapping[str, Mapping[str, Array]]
    scale_factors: Mapping[str, float]

    def scale_factor(self, phase: str, target_sparsity: float) -> float:
        """The factor that leaves out a share of the tiles.

        Raises:
            ValueError: no threshold up to 1 leaves out so many.
        """
        x = np.sort(np.concatenate(list(self.log_factors[phase].values())))
        n = round(target_sparsity * x.size)
        reachable = int(np.isfinite(x).sum())
        allowed = f"0..{reachable / x.size:.3g}, what a threshold of 1 leaves out of these inputs in {phase}"
        require(n <= reachable, f"target_sparsity[{phase}]", received=target_sparsity, allowed=allowed)
        if n == 0:
            return 0.0
        above = x[n] if n < reachable else x[n - 1] + 2 * PAST_THE_LAST
        return math.exp((x[n - 1] + above) / 2)

    def sparsity(self, phase: str, layer: str | None = None) -> float:
        """Share of the tiles that is left out with what was set, of all layers or of one."""
        layers = self.log_factors[phase]
        x = np.concatenate(list(layers.values())) if layer is None else layers[layer]
        factor = self.scale_factors[phase]
        return float((x < math.log(factor)).mean()) if factor > 0 else 0.0


def calibrate(
    model: nn.Module,
    inputs: Iterable[Any],
    target_sparsity: float | Mapping[str, float],
    *,
    num_decode_tokens: Any = DECODE_TOKENS,
    progress: bool = True,
) -> Calibration:
    """Set `scale_factors` of a model's sparse layers such that a share of the tiles is left out on these inputs.

    Layers that are switched on and whose method has a threshold take part. Attention is dense meanwhile.

    Args:
        model: a transformers causal model that `sparsify` has seen.
        inputs: what the model is called with: token ids [batch, s], or dictionaries of keyword arguments.
        target_sparsity: share of the tiles in 0..1, by phase, or one for prefill and decode.
        num_decode_tokens: greedy tokens behind each input, for the decode phase.
        progress: whether a bar shows on stderr.

    Returns:
        What was found and set; `Calibration.scale_factor` gives the factors of other targets.

    Raises:
        ValueError, TypeError: an argument is out of range, there is no such layer, or no threshold reaches a target;
            the setting is as before.
    """
    targets = _targets(target_sparsity)
    whole = isinstance(num_decode_tokens, int) and not isinstance(num_decode_tokens, bool) and num_decode_tokens >= 0
    require(whole, "num_decode_tokens", received=num_decode_tokens, allowed="an int, at least 0")
    steps = num_decode_tokens if "decode" in targets else 0
    calls = [_arguments(x) for x in inputs]
    require(bool(calls), "inputs", received="none", allowed="at least one")
    taking_part = {
        name: state
        for name, state in sparse_layers(model).items()
        if state.config.enable and state.method.has_threshold
    }
    allowed = "one that sparsify has given a method with a threshold"
    require(bool(taking_part), "model", received="one without such layers", allowed=allowed)

    found: dict[str, dict[str, list[Array]]] = {phase: {name: [] for name in taking_part} for phase in PHASES}
    layers = attention_layers(model)
    bar_options = {"total": len(calls) * (1 + steps), "desc": "calibration", "disable": not progress}
    with put_back(model), torch.no_grad(), tqdm(**bar_options) as bar:
        for name, state in taking_part.items():
            set_layer_state(layers[name], replace(state, observer=_Recorder(name, found)))
        for arguments in calls:
            _run(model, arguments, steps, bar)
    tiles: dict[str, dict[str, Array]] = {}
    for phase in targets:
        seen = {name: np.concatenate(parts) for name, parts in found[phase].items() if parts}
        require(bool(seen), f"inputs for {phase}", received="no call of that phase", allowed="at least one")
        tiles[phase] = seen
    open_result = Calibration(tiles, {})
    factors = {phase: open_result.scale_factor(phase, target) for phase, target in targets.items()}
    for name, state in taking_part.items():
        config = replace(state.config, scale_factors={**state.config.scale_factors, **factors})
        set_layer_state(layers[name], state.with_config(config))
    return Calibration(tiles, factors)


@dataclass(frozen=True)
class _Recorder:
    """Observer of a layer."""

    name: str
    found: dict[str, dict[str, list[Array]]]

    def __call__(self, call: Operands) -> None:
        gaps = tile_gaps(call).double().cpu().numpy()
        logs = np.where(gaps < 0, gaps + math.log(max(call.lens_kv)), np.inf)
        self.found[call.phase][self.name].append(logs)


def tile_gaps(call: Operands) -> Tensor:
    """For every tile that is visited, of all heads and sequences: log of the largest lambda that keeps it.

    Args:
        call: operands; tiles of 128 queries (decode: one) and 128 keys.

    Returns:
        float32 [tiles], inf for tiles that every lambda keeps.
    """
    gaps = []
    n_kv_heads, d = call.k.shape[1:]
    first_q = first_k = 0
    for len_q, len_kv in zip(call.lens_q, call.lens_kv, strict=True):
        q = call.q[first_q : first_q + len_q].float().reshape(len_q, n_kv_heads, -1, d)
        k = call.k[first_k : first_k + len_kv].float()
        first_q, first_k = first_q + len_q, first_k + len_kv
        width = -(-len_kv // PARTITIONS) * PARTITIONS
        columns = torch.arange(width, device=k.device)
        for row in range(0, len_q, PARTITIONS):
            position = torch.arange(row, min(row + PARTITIONS, len_q), device=k.device)[:, None] + len_kv - len_q
            hidden = columns > position
            if call.left is not None:
                hidden |= columns < position - call.left
            for head in range(n_kv_heads):
                rows = q[row : row + PARTITIONS, head]
                scores = rows.new_full((rows.shape[1], len(rows), width), -math.inf)
                scores[..., :len_kv] = call.scale * torch.einsum("igd,jd->gij", rows, k[:, head])
                largest = scores.masked_fill_(hidden, -math.inf).unflatten(-1, (-1, PARTITIONS)).amax(dim=-1)
                reached = largest.cummax(dim=-1).values.roll(1, dims=-1)
                reached[..., :1] = -math.inf
                # A row that has seen nothing keeps its tile; one that sees nothing in it has no say.
                of_rows = torch.where(reached == -math.inf, math.inf, largest - reached)
                visited = (largest > -math.inf).any(dim=-2)
                gaps.append(of_rows.amax(dim=-2)[visited])
    return torch.cat(gaps)


def _run(model: nn.Module, arguments: dict[str, Any], steps: int, bar: Any) -> None:
    """A forward pass, and greedy steps behind it."""
    if steps == 0:
        model(**arguments)
        bar.update(1)
        return
    result = model(**arguments, use_cache=True)
    bar.update(1)
    mask = arguments.get("attention_mask")
    for _ in range(steps):
        tokens = result.logits[:, -1:].argmax(dim=-1)
        more: dict[str, Any] = {}
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            more["attention_mask"] = mask
        result = model(input_ids=tokens, past_key_values=result.past_key_values, use_cache=True, **more)
        bar.update(1)


def _arguments(x: Any) -> dict[str, Any]:
    if isinstance(x, Tensor):
        return {"input_ids": x}
    if not isinstance(x, Mapping):
        raise TypeError(f"inputs: received {type(x).__name__}, allowed token ids or keyword arguments of the model")
    return dict(x)


def _targets(value: Any) -> dict[str, float]:
    targets = dict(value) if isinstance(value, Mapping) else dict.fromkeys(PHASES, value)
    require(bool(targets), "target_sparsity", received="no phase", allowed=", ".join(PHASES))
    for phase, target in targets.items():
        require(phase in PHASES, "target_sparsity phase", received=repr(phase), allowed=", ".join(PHASES))
        if isinstance(target, bool) or not isinstance(target, (int, float)):
            raise TypeError(f"target_sparsity[{phase}]: received {target!r}, allowed a number in 0..1")
        require(0 <= target <= 1, f"target_sparsity[{phase}]", received=target, allowed="a number in 0..1")
    return targets
