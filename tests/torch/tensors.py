"""Tensors and arrays of the same bits, and attention in float64 that torch differentiates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from nkisim.frameworks import to_numpy, to_torch

DTYPES = ["float32", "bfloat16", "float16"]


def by_case(cases: Sequence[Any]) -> Any:
    """Every case in two of the three types, that of the next case among them."""
    runs = [(case, DTYPES[(i + j) % 3]) for i, case in enumerate(cases) for j in range(2)]
    return pytest.mark.parametrize(("case", "dtype"), [pytest.param(x, y, id=f"{x.name}-{y}") for x, y in runs])


def tensors(*arrays: Any) -> tuple[Any, ...]:
    """Of arrays, float types that NumPy lacks included."""
    return tuple(to_torch(np.asarray(x)) for x in arrays)


def arrays(*values: Any) -> tuple[Any, ...]:
    """Of tensors."""
    return tuple(to_numpy(x) for x in values)


def numbers(*values: int) -> Any:
    """Lengths, offsets or a row of a table."""
    return torch.tensor(values, dtype=torch.int32)


def random(seed: int, dtype: str, *shapes: tuple[int, ...]) -> tuple[Any, ...]:
    """Standard normal tensors."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes)


def equal(got: Iterable[Any], expected: Iterable[Any]) -> bool:
    """Whether all tensors have the same types, shapes and values, NaN and the sign of zero aside."""
    pairs = list(zip(got, expected, strict=True))
    return bool(pairs) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def attention64(
    q: Any, k: Any, v: Any, *, causal: bool, left: int | None = None, right: int | None = None
) -> tuple[Any, Any]:
    """o [len_q, heads, d] and lse [heads, len_q] of one sequence, in float64, from [len, heads, d]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    n, m = q.shape[0], k.shape[0]
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    position = torch.arange(n)[:, None] + m - n
    key = torch.arange(m)[None]
    hidden = torch.zeros(n, m, dtype=torch.bool)
    if causal:
        hidden |= key > position
    if left is not None:
        hidden |= key < position - left
    if right is not None:
        hidden |= key > position + right
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(hidden, 0.0, (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp())
    return torch.einsum("hij,jhd->ihd", weights, v), lse
