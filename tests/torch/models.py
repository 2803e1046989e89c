"""Small random transformers models, float32, whose greedy tokens are far from ties."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Family of classes, and what it has beside SIZES: windows shorter than the prompts of the tests, in one layer of two
# for Qwen2 and in both for Mistral.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
}


def make(name: str, attn_implementation: str = "eager", **more: Any) -> Any:
    """A model in evaluation mode; the same weights at every call."""
    family, options = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **options, **more}, attn_implementation=attn_implementation
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def with_sink(**more: Any) -> Any:
    """A Llama whose queries all look at the token 1: keys of other tokens have far smaller scores."""
    model = make("llama", attention_bias=True, **more)
    d, slow = 16, 7  # the pair of elements 7 and 15 turns slowest with the position
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 0
        embedding[1], embedding[1, 0] = 0.1 * embedding[1], 20
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight *= 0.3
                projection.weight[slow::d] = 0
                projection.bias.zero_()
            attention.k_proj.weight[slow::d, 0] = 0.7
            attention.q_proj.bias[slow::d] = 12
    return model


def ids(batch: int, length: int, seed: int = 0) -> Any:
    """Token ids [batch, length], neither padding nor the token 1."""
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
