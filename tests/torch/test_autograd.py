"""Gradients of `attention`: against torch's own of float64 attention, and the oracle's with N:M and skipped tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from contributed._checks import FLOATS
from contributed._prefill_cases import PrefillCase
from reference.budget import check_budget
from reference.flash_attention_bwd import flash_attention_bwd
from reference.rounded_attention import flash_attention_bwd_rounded
from tests.kernels.prefill import reference

torch = pytest.importorskip("torch", reason="torch is not installed")

import nki_torch  # noqa: E402
from tests.torch.tensors import arrays, attention64, equal, numbers, random, tensors  # noqa: E402

# Two-byte gradients of the kernel are below half of their budget, as `tests/kernels` has it.
CEILING = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5}
SPANS = ((0, 0, 37, 37), (40, 37, 130, 150))  # first row of q and of k, lengths


@pytest.mark.parametrize(
    ("dtype", "causal"), [("float32", True), ("float32", False), ("bfloat16", True), ("float16", False)]
)
def test_torchs_own(dtype: str, causal: bool) -> None:
    """Three rows of q belong to nobody; k's gradient is the sum over the group."""
    q, k, v, do = random(1, dtype, (170, 4, 64), (187, 2, 64), (187, 2, 64), (170, 4, 64))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    starts, starts_k, lengths, lengths_k = (numbers(*x) for x in zip(*SPANS, strict=True))
    o = nki_torch.attention(*leaves, starts, lengths, 130, causal, None, starts_k, lengths_k, 150)
    got = torch.autograd.grad(o, leaves, do)

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    parts = [
        (attention64(exact[0][a : a + n], exact[1][b : b + m], exact[2][b : b + m], causal=causal)[0], do[a : a + n])
        for a, b, n, m in SPANS
    ]
    expected = torch.autograd.grad([x for x, _ in parts], exact, [x.double() for _, x in parts])
    owned = np.r_[0:37, 40:170]
    packed = arrays(do[owned], q[owned], k, v)
    cu = {"cu_seqlens_q": np.array([0, 37, 167]), "cu_seqlens_kv": np.array([0, 37, 187])}
    low = flash_attention_bwd_rounded(*packed, causal=causal, **cu)
    for name, x, y, z in zip(("dq", "dk", "dv"), got, expected, low, strict=True):
        result, oracle = arrays(x)[0], y.numpy()
        if name == "dq":
            assert not result[37:40].any()
            result, oracle = result[owned], oracle[owned]
        assert check_budget(name, result, oracle, z, result.dtype) <= CEILING[dtype]


CASES = [
    PrefillCase("2-of-4", 2, 1, 64, ((130, 130), (1, 200)), sparsity_n=2, sink=5, recent=40, unused=2, grid=True),
    PrefillCase("skip-4-of-8", 2, 1, 64, ((130, 400),), True, None, None, 4, 8, 0, 20, 0.5, grid=True, locality=3.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda x: x.name)
def test_selection_and_skipped_tiles(case: PrefillCase) -> None:
    """As the oracle's with the tiles that the forward kept; the dense gradient is another."""
    kind = FLOATS["bfloat16"]
    r = reference(case, kind)
    do = np.random.default_rng(9).standard_normal(r.q.shape).astype(kind)
    options = dict(r.options)
    if case.threshold is not None:
        options["kept"] = r.exact.stats.kept
        assert r.exact.stats.tiles_skipped.sum() > 0
    exact = flash_attention_bwd(do, r.q, r.k, r.v, **options)
    low = flash_attention_bwd_rounded(do, r.q, r.k, r.v, **options)
    leaves = [x.requires_grad_() for x in tensors(r.q, r.k, r.v)]
    o = _leaves(leaves, r.options)
    got = torch.autograd.grad(o, leaves, tensors(do)[0])
    for name, x, y, z in zip(("dq", "dk", "dv"), arrays(*got), exact, low, strict=True):
        assert check_budget(name, x, y, z, kind) <= 0.5
    dense = torch.autograd.grad(nki_torch.attention(*leaves, *_sequences(r.options)), leaves, tensors(do)[0])
    assert not torch.equal(dense[0], got[0])


def _leaves(leaves: list[Any], options: dict[str, Any]) -> Any:
    """`attention` with the NumPy wrapper's arguments."""
    names = ("sparsity_n", "sparsity_m", "dense_sink_tokens", "dense_recent_tokens", "skip_softmax_threshold")
    return nki_torch.attention(*leaves, *_sequences(options), **{x: options[x] for x in names if x in options})


def _sequences(options: dict[str, Any]) -> tuple[Any, ...]:
    cu, cu_k = (torch.from_numpy(np.asarray(options[f"cu_seqlens_{x}"], np.int64)) for x in ("q", "kv"))
    lengths, lengths_k = cu.diff(), cu_k.diff()
    longest = int(lengths.max()), int(lengths_k.max())
    return cu[:-1], lengths, longest[0], True, None, cu_k[:-1], lengths_k, longest[1]


def test_rows_between_sequences_and_their_order() -> None:
    """NaN in rows of nobody reaches no gradient, and theirs is 0; sequences may come in any order."""
    q, k, v, do = random(6, "bfloat16", (150, 4, 32), (420, 2, 32), (420, 2, 32), (150, 4, 32))
    spans = ((50, 290, 100, 130), (0, 10, 50, 170))
    free = np.ones(420, bool)
    for _, b, _, m in spans:
        free[b : b + m] = False
    k[free] = v[free] = torch.nan
    starts, starts_k, lengths, lengths_k = (numbers(*x) for x in zip(*spans, strict=True))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = nki_torch.attention(*leaves, starts, lengths, 100, True, None, starts_k, lengths_k, 170)
    got = torch.autograd.grad(o, leaves, do)
    assert not got[1][free].any()
    assert not got[2][free].any()
    for a, b, n, m in spans:
        alone = [x.clone().requires_grad_() for x in (q[a : a + n], k[b : b + m], v[b : b + m])]
        of_one = nki_torch.attention(*alone, numbers(0), numbers(n), n, True, None, numbers(0), numbers(m), m)
        expected = torch.autograd.grad(of_one, alone, do[a : a + n])
        assert equal([x[r : r + c] for x, r, c in zip(got, (a, b, b), (n, m, m), strict=True)], expected)


def test_rows_of_several_sequences_get_the_sum() -> None:
    """Keys that two sequences share: as over two copies of them, added up."""
    q, k, v, do = random(2, "float32", (20, 2, 32), (15, 1, 32), (15, 1, 32), (20, 2, 32))
    starts, lengths, same, n = numbers(0, 10), numbers(10, 10), numbers(0, 0), numbers(15, 15)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = nki_torch.attention(*leaves, starts, lengths, 10, True, None, same, n, 15)
    got = torch.autograd.grad(o, leaves, do)
    copies = [x.clone().requires_grad_() for x in (q, torch.cat([k, k]), torch.cat([v, v]))]
    o = nki_torch.attention(*copies, starts, lengths, 10, True, None, numbers(0, 15), n, 15)
    expected = torch.autograd.grad(o, copies, do)
    assert torch.equal(got[0], expected[0])
    for x, y in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(x, y[:15] + y[15:], rtol=0, atol=0)


def test_scaled_dot_product_attention() -> None:
    """Through its slices and joins: queries past the last key see all keys."""
    q, k, v, do = random(3, "float32", (1, 4, 9, 32), (1, 2, 5, 32), (1, 2, 5, 32), (1, 4, 9, 32))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = nki_torch.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    got = torch.autograd.grad(o, leaves, do)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o64 = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    for x, y in zip(got, torch.autograd.grad(o64, exact, do.double()), strict=True):
        # A few dozen float32 operations on numbers of order 1.
        torch.testing.assert_close(x.double(), y, rtol=0, atol=32 * 2**-23)


def test_only_what_is_asked_for() -> None:
    q, k, v = random(4, "float32", (6, 2, 32), (6, 1, 32), (6, 1, 32))
    o = nki_torch.attention(q, k, v.requires_grad_(), numbers(0), numbers(6), 6)
    o.sum().backward()
    assert q.grad is None
    assert v.grad is not None
    # Every row of weights adds up to 1.
    torch.testing.assert_close(v.grad.sum((0, 1)), torch.full((32,), 12.0), rtol=0, atol=1e-5)
    assert not nki_torch.attention(q, k, v.detach(), numbers(0), numbers(6), 6).requires_grad


def test_no_second_derivative() -> None:
    q, k, v = (x.requires_grad_() for x in random(5, "float32", (6, 2, 32), (6, 1, 32), (6, 1, 32)))
    o = nki_torch.attention(q, k, v, numbers(0), numbers(6), 6)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"nki_torch\.prefill_backward.*no autograd formula"):
        dq.sum().backward()
