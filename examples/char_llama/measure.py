"""Command line: `python -m examples.char_llama.measure` measures what sparse attention costs a trained model.

Every attention runs through the kernels, on the simulator: prefill over held-out text; decode of the last characters of
such text, one by one; and prompts that are continued greedily. Nothing here is about time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import line, replace_blocks, table
from examples.char_llama.model import Attention, Caches, CharLlama, decode, generate, load
from examples.char_llama.progress import Progress
from examples.char_llama.text import held_out_tokens
from examples.char_llama.train import CHECKPOINT
from nki_torch import attention, decode_cache

DECODED = 64  # characters at the end of a window that are decoded one by one
PROMPT, NEW = 512, 32  # characters
BATCH = 4  # windows at a time, and prompts
THRESHOLDS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
PREFILL, DECODE = "prefill", "decode"
RECENT = 64  # keys up to its own that a query always keeps under N:M, the kernels' default


@dataclass(frozen=True)
class Setting:
    """Options of `nki_torch.attention`, and how they are shown.

    Args:
        name: in tables.
        sparsity_n: scores that stay of `sparsity_m`; 0 for all.
        sparsity_m: 4 or 8.
        threshold: of skip-softmax.
        dtype: of queries, keys and values.
    """

    name: str
    sparsity_n: int = 0
    sparsity_m: int = 4
    threshold: float | None = None
    dtype: torch.dtype = torch.float32


DENSE = Setting("dense")
SETTINGS = (
    DENSE,
    Setting("dense, bfloat16", dtype=torch.bfloat16),
    Setting("2:4", 2, 4),
    Setting("4:8", 4, 8),
    Setting("1:4", 1, 4),
    *[Setting(f"skip-softmax {threshold:g}", threshold=threshold) for threshold in THRESHOLDS],
)


@dataclass
class Kernels:
    """Attention through the kernels, as `model.Attention`, that counts what it leaves out.

    Args:
        setting: what to leave out.
    """

    setting: Setting
    counts: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    """By phase and layer: tiles, or scores under N:M, that dense attention visits, and those of them left out."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `model.Attention`."""
        x, dtype = self.setting, q.dtype
        q, k, v = (y.to(x.dtype) for y in (q, k, v))
        (batch, n), n_keys = q.shape[:2], k.shape[1]
        lengths = torch.full((batch,), n_keys, dtype=torch.int32)
        measured = x.threshold is not None
        if n == 1:  # N:M leaves single queries dense
            k, v = (y.transpose(1, 2).contiguous() for y in (k, v))
            o = decode_cache(q[:, 0], k, v, lengths, skip_softmax_threshold=x.threshold, measure_sparsity=measured)
            if measured:
                self._count(DECODE, layer, o._sparsity_total, o._sparsity_skipped)
            return o.unflatten(0, (batch, 1)).to(dtype)
        o = attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            _starts(batch, n),
            torch.full((batch,), n, dtype=torch.int32),
            n,
            b_start_loc_k=_starts(batch, n_keys),
            b_seq_len_k=lengths,
            max_input_len_k=n_keys,
            sparsity_n=x.sparsity_n,
            sparsity_m=x.sparsity_m,
            dense_recent_tokens=RECENT,
            skip_softmax_threshold=x.threshold,
            measure_sparsity=measured,
        )
        if measured:
            self._count(PREFILL, layer, o._sparsity_total, o._sparsity_skipped)
        elif x.sparsity_n:
            self._count(PREFILL, layer, *scores_left_out(q, k, x.sparsity_n, x.sparsity_m))
        return o.unflatten(0, (batch, n)).to(dtype)

    def _count(self, phase: str, layer: int, total: int, skipped: int) -> None:
        before = self.counts.get((phase, layer), (0, 0))
        self.counts[phase, layer] = before[0] + total, before[1] + skipped

    def shares(self, phase: str, layers: int) -> tuple[float, ...]:
        """Of what dense attention visits in a phase, what was left out: in all layers, then in each."""
        found = [self.counts.get((phase, layer), (0, 0)) for layer in range(layers)]
        found.insert(0, (sum(x[0] for x in found), sum(x[1] for x in found)))
        return tuple(skipped / total if total else 0.0 for total, skipped in found)


def _starts(batch: int, n: int) -> Tensor:
    return torch.arange(batch, dtype=torch.int32) * n


def scores_left_out(q: Tensor, k: Tensor, n: int, m: int) -> tuple[int, int]:
    """Visible scores of a causal prefill, and those that N:M removes, by PyTorch and not by the kernels."""
    rows, keys = q.shape[1], k.shape[1]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("bihd,bjhd->bhij", q.float(), k.float())
    distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
    s = F.pad(s.masked_fill(distance < 0, -torch.inf), (0, -keys % m), value=-torch.inf)
    groups = s.unflatten(-1, (-1, m))
    stays = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.topk(n).indices, True).flatten(-2)[..., :keys]
    return int((distance >= 0).sum()) * s.shape[0] * s.shape[1], int((~stays & (distance >= RECENT)).sum())


@dataclass(frozen=True)
class Outcome:
    """What a setting does to the model.

    Args:
        setting: the setting.
        loss: by phase, mean over its characters, in nats.
        shares: by phase, what is left out of all layers, then of each.
        continued: what follows the prompts, [prompts, characters].
    """

    setting: Setting
    loss: dict[str, float]
    shares: dict[str, tuple[float, ...]]
    continued: Tensor

    def same(self, dense: Outcome) -> float:
        """Characters that a continuation has in common with the dense one before they part, mean over the prompts."""
        return (self.continued == dense.continued).cumprod(1).sum(1).float().mean().item()

    def over(self, dense: Outcome, phase: str) -> float:
        """Loss over that of dense attention."""
        return self.loss[phase] - dense.loss[phase]


@torch.no_grad()
def loss_of(model: CharLlama, windows: Tensor, attention: Attention | None = None) -> float:
    """Mean loss of windows [n, context + 1] in nats per character, all at once."""
    return _loss(model(windows[:, :-1], attention), windows[:, 1:])


@torch.no_grad()
def decode_loss(model: CharLlama, windows: Tensor, before: Caches, attention: Attention) -> float:
    """The same of what follows the tokens that are in caches, of which the last one is not, one token at a time."""
    caches, first = before.copy(), before.length
    logits = [model(windows[:, i : i + 1], attention, caches) for i in range(first, windows.shape[1] - 1)]
    return _loss(torch.cat(logits, 1), windows[:, first + 1 :])


def _loss(logits: Tensor, following: Tensor) -> float:
    return F.cross_entropy(logits.flatten(0, 1), following.flatten()).item()


def measure(
    model: CharLlama, windows: Tensor, settings: Sequence[Setting] = SETTINGS, decoded: int = DECODED, new: int = NEW
) -> list[Outcome]:
    """All settings.

    Args:
        model: the model.
        windows: [n, context + 1]. All are prefilled. BATCH of them end in characters that are decoded, behind a dense
            prefill of those before, and begin with the prompts.
        settings: the first one is dense.
        decoded: characters of a window.
        new: characters after a prompt.
    """
    batches = windows.split(BATCH)
    chosen = windows[:: max(1, len(windows) // BATCH)][:BATCH]
    progress = Progress("measuring", len(settings) * (len(batches) + 2))
    done, outcomes, before = 0, [], Caches()
    with torch.no_grad():
        model(chosen[:, : -1 - decoded], Kernels(DENSE), before)
    for setting in settings:
        kernels, losses, loss = Kernels(setting), [], {}
        for batch in batches:
            losses.append(loss_of(model, batch, kernels) * len(batch))
            progress.at(done := done + 1, setting.name)
        loss[PREFILL] = sum(losses) / len(windows)
        loss[DECODE] = decode_loss(model, chosen, before, kernels)
        progress.at(done := done + 1, setting.name)
        shares = {phase: kernels.shares(phase, model.config.layers) for phase in (PREFILL, DECODE)}
        continued = generate(model, chosen[:, :PROMPT], new, Kernels(setting))
        progress.at(done := done + 1, setting.name)
        outcomes.append(Outcome(setting, loss, shares, continued))
    return outcomes


COLUMNS = (
    "attention",
    *("prefill loss", "over dense", "left out"),
    *("decode loss", "over dense", "left out"),
    "same characters",
)


def tables(outcomes: Sequence[Outcome], eager_loss: float, n_windows: int, context: int) -> dict[str, str]:
    """The generated parts of README.md: losses, and what was left out of each layer in decode."""
    dense, sparse = outcomes[0], [x for x in outcomes if x.setting.threshold is not None]
    eager = f"{eager_loss:.5f}", f"{eager_loss - dense.loss[PREFILL]:+.5f}"
    lines = [line("PyTorch's, no kernel", *eager, *[""] * (len(COLUMNS) - 3))]
    for x in outcomes:
        cells = []
        for phase in (PREFILL, DECODE):
            left_out = f"{x.shares[phase][0]:.1%}" if x in sparse or (phase == PREFILL and x.setting.sparsity_n) else ""
            cells += [f"{x.loss[phase]:.5f}", f"{x.over(dense, phase):+.5f}", left_out]
        lines.append(line(x.setting.name, *cells, f"{x.same(dense):.1f} of {dense.continued.shape[1]}"))
    text = (
        f"Loss in nats per character. Prefill: {n_windows} windows of {context} characters. Decode: the last {DECODED} "
        f"of {BATCH} of them. Prompts: {BATCH} of {PROMPT} characters."
    )
    layers = [f"layer {i}" for i in range(len(dense.shares[DECODE]) - 1)]
    by_layer = [line(x.setting.name, *[f"{share:.1%}" for share in x.shares[DECODE][1:]]) for x in sparse]
    return {
        "quality": table(COLUMNS, lines) + "\n\n" + text,
        "layers": table(("attention", *layers), by_layer),
    }


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Loss increase over the share that is left out, as SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.hashsalt": "char llama", "svg.fonttype": "none"}
    dense, sparse = outcomes[0], [x for x in outcomes if x.setting.threshold is not None]
    kinds = (
        ("skip-softmax in decode: tiles", DECODE, sparse),
        ("skip-softmax in prefill: tiles", PREFILL, sparse),
        ("N:M in prefill: scores", PREFILL, [x for x in outcomes if x.setting.sparsity_n]),
    )
    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 5), layout="constrained")
        ax = figure.subplots()
        for label, phase, found in kinds:
            points = [(x.shares[phase][0], x.over(dense, phase), x.setting.name) for x in found]
            # Different N:M are no curve.
            ax.plot([p[0] for p in points], [p[1] for p in points], "o-" if found is sparse else "o", label=label)
            for i, (share, increase, name) in enumerate(points):
                if share >= 0.005:  # those without effect lie on each other
                    text, at = name.removeprefix("skip-softmax "), (5, 5) if i % 2 else (5, -12)
                    ax.annotate(text, (share, increase), textcoords="offset points", xytext=at, fontsize="small")
        ax.set_xlabel("left out of what dense attention visits")
        ax.set_ylabel("loss over dense, nats per character")
        ax.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        ax.grid(alpha=0.3)
        ax.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then print or update the table and draw."""
    parser = argparse.ArgumentParser(prog="python -m examples.char_llama.measure", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, metavar="FILE.pt", help="default: the repository's"
    )
    parser.add_argument("--windows", type=int, default=8, help="of held-out text; default 8")
    parser.add_argument("--text", action="store_true", help="print how each setting continues the prompts")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the table")
    parser.add_argument("--update", type=Path, metavar="FILE.md", help="replace the table in a file")
    options = parser.parse_args(arguments)
    if options.windows < BATCH:
        parser.error(f"--windows: received {options.windows}, allowed at least {BATCH}")
    if options.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib; install the extra: pip install -e '.[bench]'")
    model, about = load(options.checkpoint)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    windows = held_out_tokens(options.windows, model.config.context)
    outcomes = measure(model, windows)
    parts = tables(outcomes, loss_of(model, windows), len(windows), model.config.context)
    if options.update is None:
        print("\n\n".join(parts.values()))
    else:
        replace_blocks(options.update, parts)
        print(f"wrote {options.update}")
    if options.plot is not None:
        draw(outcomes, options.plot)
        print(f"wrote {options.plot}")
    if options.text:
        for x in outcomes:
            for i, tokens in enumerate(x.continued):
                print(f"--- {x.setting.name}, prompt {i + 1}\n{decode(tokens)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
