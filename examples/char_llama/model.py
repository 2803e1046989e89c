"""The model: a Llama over characters in plain PyTorch, whose attention is an argument.

Blocks of RMSNorm, attention with rotary positions and grouped query heads, RMSNorm, SwiGLU; the embedding is also the
last matrix. Token 0 begins a text, token 1 is a newline or any character that is not printable ASCII, the others are
the printable ASCII characters in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BEGIN, NEWLINE = 0, 1
PRINTABLE = "".join(map(chr, range(ord(" "), ord("~") + 1)))
FIRST_PRINTABLE = 2
VOCABULARY = FIRST_PRINTABLE + len(PRINTABLE)
OTHERS = re.compile(f"[^{PRINTABLE[0]}-{PRINTABLE[-1]}]")

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer by its number: q [batch, n, heads, d], k and v [batch, n_keys, kv_heads, d] -> as q.

The queries are the last n of the keys, and see none after themselves.
"""


@dataclass(frozen=True)
class Config:
    """Sizes of the model.

    Args:
        layers: number of blocks.
        width: elements of the residual stream.
        heads: query heads.
        kv_heads: heads of keys and values.
        head_dim: elements of a head, even.
        hidden: inner width of the feed-forward part.
        context: longest text in tokens.
        theta: base of the rotary frequencies.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 384
    context: int = 1024
    theta: float = 10000.0


class Caches:
    """Keys and values of the tokens so far, by layer."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens in every layer."""
        return self._of[0][0].shape[1] if self._of else 0

    def copy(self) -> Caches:
        """Caches of the same tokens, to go on differently."""
        other = Caches()
        other._of = dict(self._of)
        return other

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, [batch, n_keys, kv_heads, d], after new ones joined."""
        if layer in self._of:
            before = self._of[layer]
            k, v = torch.cat((before[0], k), 1), torch.cat((before[1], v), 1)
        self._of[layer] = k, v
        return k, v


class CharLlama(nn.Module):
    """Tokens to logits of the next token.

    Args:
        config: its sizes.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(_Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        pairs = torch.arange(0, config.head_dim, 2) / config.head_dim
        angles = torch.outer(torch.arange(config.context), config.theta**-pairs)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("joined.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5 if last else 0.02)

    def forward(self, tokens: Tensor, attention: Attention | None = None, caches: Caches | None = None) -> Tensor:
        """Logits [batch, n, VOCABULARY] of what follows each of `tokens` [batch, n].

        Args:
            tokens: integers below VOCABULARY.
            attention: of all layers; None is PyTorch's.
            caches: of the tokens before, which get these as well; None means there are none before.

        Raises:
            ValueError: more tokens than the context.
        """
        first = caches.length if caches is not None else 0
        end = first + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(f"tokens: received {end} in all, allowed {self.config.context}")
        rotation = self.cosines[first:end, None], self.sines[first:end, None]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation, attention or eager, caches)
        return F.linear(self.norm(x), self.embedding.weight)


class _Block(nn.Module):
    def __init__(self, config: Config, number: int) -> None:
        super().__init__()
        self.number = number
        self.shapes = (config.heads, config.head_dim), (config.kv_heads, config.head_dim)
        (heads, d), (kv_heads, _) = self.shapes
        self.norm_attention = nn.RMSNorm(config.width, eps=1e-6)
        self.q = nn.Linear(config.width, heads * d, bias=False)
        self.k = nn.Linear(config.width, kv_heads * d, bias=False)
        self.v = nn.Linear(config.width, kv_heads * d, bias=False)
        self.joined = nn.Linear(heads * d, config.width, bias=False)
        self.norm_forward = nn.RMSNorm(config.width, eps=1e-6)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention, caches: Caches | None
    ) -> Tensor:
        y = self.norm_attention(x)
        q = _rotate(self.q(y).unflatten(-1, self.shapes[0]), *rotation)
        k = _rotate(self.k(y).unflatten(-1, self.shapes[1]), *rotation)
        v = self.v(y).unflatten(-1, self.shapes[1])
        if caches is not None:
            k, v = caches.append(self.number, k, v)
        x = x + self.joined(attention(self.number, q, k, v).flatten(-2))
        y = self.norm_forward(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cosines - b * sines, a * sines + b * cosines), -1)


def eager(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001 - every layer is alike
    """PyTorch's own attention, as `Attention`."""
    n, n_keys = q.shape[1], k.shape[1]
    mask = None
    if 1 < n < n_keys:
        mask = torch.ones(n, n_keys, dtype=torch.bool).tril(n_keys - n)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, is_causal=n == n_keys, enable_gqa=True
    )
    return o.transpose(1, 2)


def encode(text: str) -> Tensor:
    """Tokens of a text, int64 [n], without the one that begins it."""
    codes = bytearray(OTHERS.sub("\n", text), "ascii")
    if not codes:
        return torch.zeros(0, dtype=torch.int64)
    printable = torch.frombuffer(codes, dtype=torch.uint8).long() + (FIRST_PRINTABLE - ord(PRINTABLE[0]))
    return printable.clamp(min=NEWLINE)


def decode(tokens: Tensor) -> str:
    """The text of tokens [n]; the token that begins a text is nothing."""
    return "".join("\n" if t == NEWLINE else PRINTABLE[t - FIRST_PRINTABLE] for t in tokens.tolist() if t != BEGIN)


@torch.no_grad()
def generate(model: CharLlama, prompts: Tensor, n: int, attention: Attention | None = None) -> Tensor:
    """The n most likely tokens one after the other, [batch, n], that follow `prompts` [batch, n_prompt]."""
    caches = Caches()
    found = [model(prompts, attention, caches)[:, -1].argmax(-1)]
    while len(found) < n:
        found.append(model(found[-1][:, None], attention, caches)[:, -1].argmax(-1))
    return torch.stack(found, 1)


def save(model: CharLlama, path: Path, about: dict[str, Any]) -> None:
    """Weights as float16, sizes, and what `about` says of the training: numbers and strings."""
    weights = {name: weight.detach().half() for name, weight in model.state_dict().items()}
    torch.save({"config": asdict(model.config), "about": about, "weights": weights}, path)


def load(path: Path) -> tuple[CharLlama, dict[str, Any]]:
    """The model in float32, and what was said about its training; nothing in the file is executed."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = CharLlama(Config(**stored["config"]))
    model.load_state_dict({name: weight.float() for name, weight in stored["weights"].items()})
    return model.eval(), stored["about"]
