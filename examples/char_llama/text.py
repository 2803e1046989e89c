"""The text: documentation that every CPython carries, taken from the Python that runs.

Some topics of `help()` are held out. What they say, and so what a loss is, differs a little between versions of Python.
Topics contain each other: paragraphs of the held-out ones are taken out of all other texts, and what training has seen
all the same is taken out of the held-out text.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import torch
from torch import Tensor

from examples.char_llama.model import BEGIN, encode

HELD_OUT = ("execmodel", "formatstrings", "types")  # topics
ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})


def topics() -> dict[str, str]:
    """The topics of `help()` by name.

    Raises:
        ImportError: this Python was built without them.
    """
    from pydoc_data.topics import topics as found

    return {name: text.translate(ASCII) for name, text in sorted(found.items())}


def docstrings() -> list[str]:
    """The docstrings of each module of the standard library, one text per module; packages are left out."""
    found = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        parts = [text.translate(ASCII) for node in nodes if (text := ast.get_docstring(node))]
        if parts:
            found.append("\n\n".join(parts))
    return found


def training_texts(others: list[str]) -> list[str]:
    """The topics that are not held out, then `others`, all without paragraphs of those that are."""
    by_name = topics()
    held_out = {paragraph for name in HELD_OUT for paragraph in by_name[name].split("\n\n")}
    texts = [text for name, text in by_name.items() if name not in HELD_OUT] + others
    return [_without(text, held_out) for text in texts]


def training_tokens() -> Tensor:
    """All texts without what is held out, int64, each behind the token that begins one."""
    texts = training_texts(docstrings())
    return torch.cat([part for text in texts for part in (torch.tensor([BEGIN]), encode(text))])


def held_out_tokens(n: int, context: int) -> Tensor:
    """n windows of held-out topics, [n, context + 1]: the token that begins a text, then a topic's next characters.

    Raises:
        ValueError: there are fewer of them.
    """
    by_name, windows, seen = topics(), list[Tensor](), "\n\n".join(training_texts([]))
    for name in HELD_OUT:
        repeated = {paragraph for paragraph in by_name[name].split("\n\n") if paragraph in seen}
        parts = encode(_without(by_name[name], repeated)).split(context)
        windows += [torch.cat((torch.tensor([BEGIN]), part)) for part in parts if len(part) == context]
    if not 1 <= n <= len(windows):
        raise ValueError(f"n: received {n}, allowed 1..{len(windows)}")
    # From all topics alike.
    return torch.stack([windows[i * len(windows) // n] for i in range(n)])


def _without(text: str, paragraphs: set[str]) -> str:
    return "\n\n".join(x for x in text.split("\n\n") if x not in paragraphs)
