"""What hangs on an attention layer that is sparse: its method, its counts, an observer. Models keep nothing else of it.

Whoever computes attention for a layer (`nki_torch.hf` does) asks `layer_state` for it; None means dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from contributed._checks import require
from nki_torch.sparsity.config import PHASES, SparseAttentionAttributeConfig
from nki_torch.sparsity.methods import SparseAttentionMethod, SparseOptions, get_sparse_method

NAME = "nki"  # `attn_implementation` of transformers models on the kernels
_ATTRIBUTE = "_nki_sparse_attention"


@dataclass
class Counts:
    """Calls of a layer in a phase, and tiles of all its query heads and sequences."""

    calls: int = 0
    tiles_total: int = 0
    tiles_skipped: int = 0

    @property
    def sparsity(self) -> float:
        """Share of the tiles that were left out, 0 where there were none."""
        return self.tiles_skipped / self.tiles_total if self.tiles_total else 0.0


@dataclass
class LayerStats:
    """Counts of a layer since it got them."""

    prefill: Counts = field(default_factory=Counts)
    decode: Counts = field(default_factory=Counts)


class Operands(NamedTuple):
    """A layer's call as an observer sees it: sequences one after the other, queries the last rows of their keys."""

    phase: str
    q: Tensor
    """[total_q, n_q_heads, d]"""
    k: Tensor
    """[total_kv, n_kv_heads, d]"""
    lens_q: Sequence[int]
    lens_kv: Sequence[int]
    scale: float
    left: int | None
    """Keys visible to the left of a query's own, None for all."""


Observer = Callable[[Operands], None]


@dataclass(frozen=True)
class LayerState:
    """A sparse layer. Changes make a new one, so that who keeps the old one can put it back.

    Args:
        config: its settings.
        method: what they ask of the kernels.
        stats: where calls are counted, None if they are not.
        observer: gets the operands of every call; the call is dense then.
    """

    config: SparseAttentionAttributeConfig
    method: SparseAttentionMethod
    stats: LayerStats | None
    observer: Observer | None = None

    @classmethod
    def of(cls, config: SparseAttentionAttributeConfig) -> LayerState:
        """The state that settings describe.

        Raises:
            ValueError: the method is not in the registry.
        """
        method = get_sparse_method(config.method)(config)
        return cls(config, method, LayerStats() if config.collect_stats else None)

    def with_config(self, config: SparseAttentionAttributeConfig) -> LayerState:
        """Other settings, the same counts."""
        return replace(self, config=config, method=get_sparse_method(config.method)(config))

    @property
    def counts(self) -> bool:
        """Whether calls are to be counted."""
        return self.stats is not None and self.config.enable and self.observer is None

    def count(self, phase: str, total: int, skipped: int) -> None:
        """A call's tiles and those left out."""
        assert self.stats is not None
        counts: Counts = getattr(self.stats, phase)
        counts.calls, counts.tiles_total = counts.calls + 1, counts.tiles_total + total
        counts.tiles_skipped += skipped

    def options(self, phase: str, seqlen_kv: int) -> SparseOptions:
        """Options of a call; dense if the layer is switched off or observed."""
        assert phase in PHASES, phase
        if not self.config.enable or self.observer is not None:
            return SparseOptions()
        return self.method.options(phase, seqlen_kv)


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Attention layers by name: modules whose class is called ...Attention and that know their `layer_idx`.

    Of transformers models those whose layers ask the attention interface.

    Raises:
        TypeError: no module.
        ValueError: none of its modules is such a layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: received {type(model).__name__}, allowed a torch module")
    modules = dict(model.named_modules())
    owners = {name: module for name, module in modules.items() if hasattr(module, "_can_set_attn_implementation")}
    found = {
        name: module
        for name, module in modules.items()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx") and _asks(name, owners)
    }
    allowed = "one with attention layers (`layer_idx`) that ask transformers' AttentionInterface"
    require(bool(found), "model", received=type(model).__name__, allowed=allowed)
    return found


def _asks(name: str, owners: dict[str, nn.Module]) -> bool:
    """Whether the layer's model leaves attention to an interface; True without a transformers model around it."""
    around = [owner for owner in owners if not owner or name.startswith(f"{owner}.")]
    if not around:
        return True
    model: Any = owners[max(around, key=len)]
    asks: bool = model._can_set_attn_implementation()
    return asks


def layer_state(layer: nn.Module) -> LayerState | None:
    """The state of an attention layer, None if it has none."""
    state: LayerState | None = layer.__dict__.get(_ATTRIBUTE)
    return state


def set_layer_state(layer: nn.Module, state: LayerState | None) -> None:
    """Give an attention layer a state, or take it away."""
    if state is None:
        layer.__dict__.pop(_ATTRIBUTE, None)
    else:
        layer.__dict__[_ATTRIBUTE] = state
