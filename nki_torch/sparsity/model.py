"""Sparse attention of whole models: switch it on by patterns, for good or for a block of code; look at it; keep it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from contributed._checks import require
from nki_torch.sparsity.config import DEFAULT, SparseAttentionAttributeConfig, SparseAttentionConfig
from nki_torch.sparsity.state import NAME, LayerState, LayerStats, attention_layers, layer_state, set_layer_state

FILE = "sparse_attention_config.json"
FORMAT = 1

Config = SparseAttentionConfig | Mapping[str, Any]
States = dict[str, LayerState | None]


def sparsify(model: nn.Module, config: Config) -> nn.Module:
    """Make attention layers sparse, in place; transformers models get `attn_implementation="nki"`.

    Args:
        model: a transformers model, or a module whose attention layers ask `layer_state`.
        config: such as `SKIP_SOFTMAX_DEFAULT` or `SPARSE_NM_DEFAULT`; a `SparseAttentionConfig` or its dictionary.

    Returns:
        model.

    Raises:
        ValueError, TypeError: a setting is out of range, a method is not in the registry, a pattern fits no attention
            layer; the model is as before.
    """
    states = _states(model, SparseAttentionConfig.of(config))
    _set(model, states)
    return model


@contextmanager
def sparse_attention(model: nn.Module, config: Config) -> Iterator[nn.Module]:
    """`sparsify` for a block: layers, counts and `attn_implementation` are afterwards what they were before."""
    states = _states(model, SparseAttentionConfig.of(config))
    with put_back(model):
        _set(model, states)
        yield model


@contextmanager
def dense_attention(model: nn.Module, pattern: str = "*") -> Iterator[nn.Module]:
    """Layers that fit `pattern` are dense for a block."""
    with put_back(model):
        disable_sparse_attention(model, pattern)
        yield model


@contextmanager
def collect_stats(model: nn.Module) -> Iterator[dict[str, LayerStats]]:
    """Count the tiles of a block: yields counts by layer, of their own, that grow in the block.

    Raises:
        ValueError: no layer of the model is sparse.
    """
    with put_back(model):
        fresh = {name: replace(state, stats=LayerStats()) for name, state in sparse_layers(model).items()}
        require(bool(fresh), "model", received="one without sparse layers", allowed="one that sparsify has seen")
        _set(model, dict(fresh))
        yield {name: state.stats for name, state in fresh.items() if state.stats is not None}


def enable_sparse_attention(model: nn.Module, pattern: str = "*") -> None:
    """Switch sparse layers on whose names fit `pattern`."""
    _switch(model, pattern, True)


def disable_sparse_attention(model: nn.Module, pattern: str = "*") -> None:
    """Switch sparse layers off whose names fit `pattern`; their settings stay."""
    _switch(model, pattern, False)


def is_attn_sparsified(model: nn.Module) -> bool:
    """Whether a layer has a sparse attention setting, switched on or off."""
    return bool(sparse_layers(model))


def sparse_layers(model: nn.Module) -> dict[str, LayerState]:
    """The layers that have a setting, by name."""
    states = {name: layer_state(layer) for name, layer in attention_layers(model).items()}
    return {name: state for name, state in states.items() if state is not None}


def sparse_attention_stats(model: nn.Module) -> dict[str, LayerStats]:
    """Counts of the layers that count, by name."""
    return {name: state.stats for name, state in sparse_layers(model).items() if state.stats is not None}


def reset_sparse_attention_stats(model: nn.Module) -> None:
    """Begin counting anew."""
    counted = {name: state for name, state in sparse_layers(model).items() if state.stats is not None}
    _set(model, {name: replace(state, stats=LayerStats()) for name, state in counted.items()})


def sparse_attention_summary(model: nn.Module) -> str:
    """A line per sparse layer: name, on or off, method, and what was left out if it is counted.

    A layer that is on and dense all the same, for the model's `attn_implementation` was changed since, is told.
    """
    lines, layers = [], attention_layers(model)
    for name, state in sparse_layers(model).items():
        line = f"{name}: {'on' if state.config.enable else 'off'}, {state.config.method}"
        for config in _configs([layers[name]]):
            if state.config.enable and config._attn_implementation != NAME:
                line += f", but dense: attn_implementation is {config._attn_implementation}"
        if state.stats is not None:
            for phase, counts in vars(state.stats).items():
                line += f", {phase} {counts.tiles_skipped} of {counts.tiles_total} tiles skipped"
        lines.append(line)
    return "\n".join(lines) or "no sparse attention layers"


def sparse_attention_state(model: nn.Module) -> dict[str, Any]:
    """The setting of every sparse layer, calibrated factors included, of types that JSON has."""
    layers = {name: state.config.to_dict() for name, state in sparse_layers(model).items()}
    return {"format": FORMAT, "layers": layers}


def restore_sparse_attention_state(model: nn.Module, state: Any) -> nn.Module:
    """Give a model the setting of `sparse_attention_state`; other layers lose theirs.

    Raises:
        ValueError, TypeError: another format, layers that the model does not have, settings out of range; the model is
            as before.
    """
    good = isinstance(state, Mapping) and set(state) == {"format", "layers"} and state["format"] == FORMAT
    good = good and isinstance(state["layers"], Mapping)
    allowed = f"{{'format': {FORMAT}, 'layers': ..}}"
    require(good, "state", received=list(state) if isinstance(state, Mapping) else type(state), allowed=allowed)
    layers = attention_layers(model)
    unknown = [name for name in state["layers"] if name not in layers]
    require(not unknown, "layers", received=unknown, allowed=", ".join(layers))
    states: States = dict.fromkeys(layers)
    for name, values in state["layers"].items():
        states[name] = LayerState.of(SparseAttentionAttributeConfig.from_dict(values))
    _set(model, states)
    return model


def save_sparse_attention(model: nn.Module, path: str | Path) -> Path:
    """Write the setting as JSON: a file, or `sparse_attention_config.json` in a directory, beside a saved model."""
    file = _file(path)
    file.write_text(json.dumps(sparse_attention_state(model), indent=2) + "\n", encoding="utf-8")
    return file


def load_sparse_attention(model: nn.Module, path: str | Path) -> nn.Module:
    """Give a model the setting that `save_sparse_attention` wrote; a directory or a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError, TypeError: as `restore_sparse_attention_state`.
    """
    return restore_sparse_attention_state(model, json.loads(_file(path).read_text(encoding="utf-8")))


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Layers and `attn_implementation` as they are now, after the block and after exceptions in it."""
    layers = attention_layers(model)
    states = {name: layer_state(layer) for name, layer in layers.items()}
    implementations = [(config, config._attn_implementation) for config in _configs(layers.values())]
    try:
        yield
    finally:
        for name, state in states.items():
            set_layer_state(layers[name], state)
        for config, implementation in implementations:
            config._attn_implementation = implementation


def _file(path: str | Path) -> Path:
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _states(model: nn.Module, config: SparseAttentionConfig) -> States:
    """What a config says about each layer that it says something about."""
    layers = attention_layers(model)
    chosen: dict[str, SparseAttentionAttributeConfig] = {}
    default = config.sparse_cfg.get(DEFAULT)
    if default is not None:
        chosen = dict.fromkeys(layers, default)
    for pattern, settings in config.sparse_cfg.items():
        if pattern == DEFAULT:
            continue
        fits = [name for name in layers if fnmatchcase(name, pattern)]
        require(bool(fits), "pattern", received=repr(pattern), allowed=f"one that fits a layer of {', '.join(layers)}")
        chosen.update(dict.fromkeys(fits, settings))
    return {name: LayerState.of(settings) for name, settings in chosen.items()}


def _switch(model: nn.Module, pattern: str, on: bool) -> None:
    layers = sparse_layers(model)
    fits = {name: state for name, state in layers.items() if fnmatchcase(name, pattern)}
    allowed = f"one that fits a sparse layer: {', '.join(layers) or 'there is none'}"
    require(bool(fits), "pattern", received=repr(pattern), allowed=allowed)
    _set(model, {n: s.with_config(replace(s.config, enable=on)) for n, s in fits.items()})


def _configs(layers: Iterable[nn.Module]) -> list[Any]:
    """transformers configs of layers, each once."""
    configs = [getattr(layer, "config", None) for layer in layers]
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


def _set(model: nn.Module, states: Mapping[str, LayerState | None]) -> None:
    """Give layers their states; those of transformers that are on get the kernels."""
    layers = attention_layers(model)
    for name, state in states.items():
        set_layer_state(layers[name], state)
    configs = _configs(layers[name] for name, state in states.items() if state is not None and state.config.enable)
    if configs:
        from nki_torch.hf import register

        register()
        for config in configs:
            config._attn_implementation = NAME
