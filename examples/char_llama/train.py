"""Command line: `python -m examples.char_llama.train` trains the model on a CPU and writes the checkpoint.

The same seed, Python and PyTorch on the same kind of machine give the same file.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.char_llama.model import BEGIN, CharLlama, Config, save
from examples.char_llama.progress import Progress
from examples.char_llama.text import held_out_tokens, training_tokens

CHECKPOINT = Path(__file__).parent / "char-llama.pt"
WARM_UP = 50  # steps in which the learning rate rises
RATE = 3e-3
VALIDATION = 8  # windows


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save."""
    parser = argparse.ArgumentParser(prog="python -m examples.char_llama.train", description=__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="default 1500")
    parser.add_argument("--batch", type=int, default=8, help="windows per step; default 8")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply in bfloat16, faster on processors that have it",
    )
    parser.add_argument("--output", type=Path, default=CHECKPOINT, metavar="FILE.pt", help="default: the repository's")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: received {getattr(options, name)}, allowed at least 1")
    torch.manual_seed(options.seed)
    model = CharLlama(Config())
    tokens = training_tokens()
    n = sum(weight.numel() for weight in model.parameters())
    print(f"{n:,} parameters, {len(tokens):,} characters, held out: {VALIDATION} windows")
    begin = time.perf_counter()
    trained = train(model, tokens, options.steps, options.batch, options.seed, options.bfloat16)
    loss = validation_loss(model)
    seconds = time.perf_counter() - begin
    print(f"trained in {seconds:.0f} s; loss {trained:.3f} at the end of training, {loss:.3f} held out (nats)")
    about = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "seed": options.seed,
        "steps": options.steps,
        "batch": options.batch,
        "bfloat16": options.bfloat16,
    }
    save(model, options.output, about)
    print(f"wrote {options.output}, {options.output.stat().st_size:,} bytes")
    return 0


def train(model: CharLlama, tokens: Tensor, steps: int, batch: int, seed: int, bfloat16: bool) -> float:
    """Adam on random windows, each behind the token that begins a text; returns the loss of the last step in nats."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    context, progress, loss = model.config.context, Progress("training", steps), torch.zeros(())
    model.train()
    for step in range(steps):
        first = torch.randint(len(tokens) - context, (batch,), generator=generator).tolist()
        windows = torch.stack([tokens[i : i + context] for i in first])
        begin = torch.full((batch, 1), BEGIN)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(torch.cat((begin, windows[:, :-1]), 1))
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress.at(step + 1, f"loss {loss.item():.3f}")
    model.eval()
    return loss.item()


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up in `WARM_UP` steps, then half a cosine down to a twentieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


@torch.no_grad()
def validation_loss(model: CharLlama) -> float:
    """Mean loss of the held-out windows in nats per character."""
    windows = held_out_tokens(VALIDATION, model.config.context)
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


if __name__ == "__main__":
    sys.exit(main())
