"""What holds for every input of flash_decode: equalities between calls, most of them bit for bit.

A product's bits depend on its width where BLAS computes it, but on the machine each column is by itself: its terms add
up partition by partition. Tests in which a sequence changes its place run with products summed in that order.

The size of items follows `max_seqlen_kv` and sums depend on it, so that bits are compared for one and the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import nkisim.isa.matmul as tensor_engine
from contributed import _decode_launch
from contributed._nki import simulate_kernel
from contributed.flash_decode import combine_splits, flash_decode
from reference.budget import check_budget
from reference.flash_decode import flash_decode as oracle
from reference.rounded import flash_decode_rounded

Array = np.ndarray[Any, np.dtype[Any]]
BF16 = np.dtype(ml_dtypes.bfloat16)
# As in test_decode_attention.py: in float32 a share is luck, in two bytes an undocumented rounding is near 1.
CEILING = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5}


@dataclass(frozen=True)
class Call:
    """A call of flash_decode whose numbers follow from its shapes."""

    lengths: tuple[int, ...] = (300, 37, 0)
    n_kv_heads: int = 2
    group: int = 2
    d: int = 64  # an item has at least 1 KiB of keys per partition, of a small d very many
    s: int | None = None
    dtype: Any = BF16
    left: int | None = None
    extras: tuple[str, ...] = ()
    unused: int = 3
    k_d_major: bool = False
    target: str = "trn2"

    def inputs(self) -> tuple[Array, Array, Array, dict[str, Any]]:
        """q, k, v and the options that the oracle has too."""
        rng = np.random.default_rng(len(self.lengths) + self.d)
        batch, heads, n_q_heads = len(self.lengths), self.n_kv_heads, self.n_kv_heads * self.group
        token = (n_q_heads, self.d)
        q = rng.standard_normal((batch, *token) if self.s is None else (batch, self.s, *token)).astype(self.dtype)
        shape = (batch, max(self.lengths) + self.unused, heads, self.d)
        k, v = (rng.standard_normal(shape).astype(self.dtype) for _ in "kv")
        every = {
            "softcap": 2.0,
            "sinks": rng.standard_normal(n_q_heads).astype(np.float32),
            "alibi_slopes": (0.5 ** np.arange(1, n_q_heads + 1)).astype(np.float32),
            "k_scale": np.linspace(0.5, 1.5, heads).astype(np.float32),
            "v_scale": np.linspace(2.0, 0.5, heads).astype(np.float32),
        }
        options: dict[str, Any] = {name: every[name] for name in self.extras}
        options |= {"seqlens_kv": np.array(self.lengths), "window_size": (self.left, 0)}
        return q, k, v, options

    def run(self, q: Array, k: Array, v: Array, options: dict[str, Any], **more: Any) -> tuple[Array, Array]:
        how = {"k_d_major": self.k_d_major, "target": self.target, "return_lse": True, "max_seqlen_kv": 512} | more
        o, lse = flash_decode(q, k, v, **how, **options)
        return o, lse


@st.composite
def calls(draw: st.DrawFn, *, any_layout: bool = True) -> Call:
    length = st.one_of(st.integers(0, 400), st.sampled_from([0, 1, 127, 128, 129, 256]))
    lengths = draw(st.lists(length, min_size=1, max_size=4))
    return Call(
        tuple(lengths),
        n_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 5, 8])),
        d=draw(st.sampled_from([24, 64, 64, 130])),
        s=draw(st.sampled_from([None, None, 1, 3])),
        dtype=draw(st.sampled_from([BF16, np.dtype(np.float16), np.dtype(np.float32)])),
        left=draw(st.one_of(st.none(), st.integers(0, 300))),
        extras=tuple(draw(st.lists(st.sampled_from(["softcap", "sinks", "alibi_slopes"]), unique=True, max_size=2))),
        k_d_major=any_layout and draw(st.booleans()),
        target=draw(st.sampled_from(["trn1", "trn2", "trn3"])),
    )


# No shrinking: examples are small, and a shrunk one says no more.
few = settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def bits(x: Array) -> Array:
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_same_bits(got: tuple[Array, Array], expected: tuple[Array, Array]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(bits(np.ascontiguousarray(x)), bits(np.ascontiguousarray(y)))


def check(got: tuple[Array, Array], q: Array, k: Array, v: Array, options: dict[str, Any]) -> None:
    """Within the budget of the oracle."""
    exact, low = oracle(q, k, v, **options), flash_decode_rounded(q, k, v, **options)
    assert check_budget("o", got[0], exact.o, low[0], q.dtype) <= CEILING[q.dtype.name]
    check_budget("lse", got[1], exact.lse, low[1], np.float32)


def in_order(stationary: Array, moving: Array) -> Array:
    """stationary^T moving, each element the sum of its terms partition by partition."""
    with np.errstate(all="ignore"):
        # The first axis is added up row by row.
        return np.asarray(np.add.reduce(stationary[:, :, None] * moving[:, None, :], axis=0))


@contextmanager
def columns_by_themselves() -> Iterator[None]:
    """Products in the machine's order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_engine, "product", in_order)
        yield


# -- splits


@few
@given(calls(), st.integers(2, 9))
@example(Call((400, 129), d=16, left=150, extras=("sinks", "softcap")), 3)
def test_any_number_of_splits(call: Call, n_splits: int) -> None:
    q, k, v, options = call.inputs()
    for n in (1, n_splits):
        check(call.run(q, k, v, options, n_splits=n), q, k, v, options)


@few
@given(calls(), st.permutations(range(4)))
def test_any_order_of_splits(call: Call, order: list[int]) -> None:
    q, k, v, options = call.inputs()
    parts: list[tuple[Any, ...]] = []

    def in_another_order(kernel: Any, *args: Any, target: str | None = None) -> Any:
        if kernel is not combine_splits:
            return simulate_kernel(kernel, *args, target=target)
        o, lse, *rest = args
        parts.append(args)
        return simulate_kernel(kernel, o[order].copy(), lse[order].copy(), *rest, target=target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_decode_launch, "simulate_kernel", in_another_order)
        got = call.run(q, k, v, options, n_splits=4)
    assert len(parts) == 1
    assert len(parts[0][0]) == 4
    check(got, q, k, v, options)


# -- batches


@few
@given(calls(), st.integers(0, 99))
@example(Call((5, 300, 64, 7), d=16, n_kv_heads=1, left=40), 0)
@example(Call((33, 300, 64), d=16, n_kv_heads=3, group=1, k_d_major=True, left=100), 0)
@example(Call((417, 412, 490, 467, 469, 440), d=16, n_kv_heads=1, group=1, s=20, k_d_major=True, left=400), 0)
def test_a_result_does_not_depend_on_the_batch(call: Call, seed: int) -> None:
    """Alone, in another order and beside sequences of other lengths: the same bits."""
    q, k, v, options = call.inputs()
    batch = len(call.lengths)
    with columns_by_themselves():
        whole = call.run(q, k, v, options)
        order = np.random.default_rng(seed).permutation(batch)
        moved = call.run(q[order], k[order], v[order], options | {"seqlens_kv": np.array(call.lengths)[order]})
        assert_same_bits(moved, (whole[0][order], whole[1][order]))
        for b in range(batch):
            one = slice(b, b + 1)
            alone = call.run(q[one], k[one], v[one], options | {"seqlens_kv": np.array(call.lengths)[one]})
            assert_same_bits(alone, (whole[0][one], whole[1][one]))
        # Every other sequence half as long, with numbers of its own.
        changed = np.array([n if b == 0 else n // 2 for b, n in enumerate(call.lengths)])
        q2, k2, v2 = (np.concatenate([x[:1], -x[1:]]) for x in (q, k, v))
        among = call.run(q2, k2, v2, options | {"seqlens_kv": changed})
        assert_same_bits((among[0][:1], among[1][:1]), (whole[0][:1], whole[1][:1]))


BAD = [np.nan, np.inf, -np.inf]


@few
@given(calls(), st.sampled_from(BAD), st.sampled_from([1, 3]))
def test_rows_that_no_query_sees_may_hold_anything(call: Call, bad: float, n_splits: int) -> None:
    q, k, v, options = call.inputs()
    clean = call.run(q, k, v, options, n_splits=n_splits)
    for b, n in enumerate(call.lengths):
        for x in (k, v):
            x[b, n:] = bad
            if call.left is not None:
                x[b, : max(0, n - (call.s or 1) - call.left)] = bad
    assert_same_bits(call.run(q, k, v, options, n_splits=n_splits), clean)


@pytest.mark.parametrize("k_d_major", [False, True])
def test_another_sequence_may_hold_any_finite_number(k_d_major: bool) -> None:
    """Huge numbers among the keys and values that one sequence uses stay with it; NaN there is outside the limits."""
    # Items and edges of all sizes; in the second call several trips, which find what the trips before left.
    for group in (1, 30):
        call = Call((300, 70, 5, 390), n_kv_heads=2, group=group, k_d_major=k_d_major)
        q, k, v, options = call.inputs()
        clean = call.run(q, k, v, options)
        for b, n in enumerate(call.lengths):
            huge_k, huge_v = k.copy(), v.copy()
            huge_k[b, :n] *= 1e4
            huge_v[b, :n] *= 1e30
            got = call.run(q, huge_k, huge_v, options)
            others = np.arange(len(call.lengths)) != b
            assert_same_bits((got[0][others], got[1][others]), (clean[0][others], clean[1][others]))


# -- layouts


@few
@given(calls(any_layout=False))
def test_packed_equals_batched(call: Call) -> None:
    q, k, v, options = call.inputs()
    lengths = options.pop("seqlens_kv")
    cu = np.concatenate([[0], np.cumsum(call.lengths)]).astype(np.int32)
    packed = (np.concatenate([x[b, :n] for b, n in enumerate(call.lengths)]) for x in (k, v))
    with columns_by_themselves():
        batched = call.run(q, k, v, options | {"seqlens_kv": lengths})
        assert_same_bits(call.run(q, *packed, options, cu_seqlens_kv=cu), batched)


@few
@given(calls(any_layout=False), st.integers(0, 9))
def test_packed_rows_between_sequences_are_not_used(call: Call, gap: int) -> None:
    """`seqlens_kv` beside `cu_seqlens_kv`: the first rows of each sequence's own."""
    q, k, v, options = call.inputs()
    rows = k.shape[1] + gap
    cu = np.arange(len(call.lengths) + 1) * rows
    space = [(0, 0), (0, gap), (0, 0), (0, 0)]
    packed = (np.pad(x, space, constant_values=np.nan).reshape(-1, *x.shape[2:]) for x in (k, v))
    with columns_by_themselves():
        batched = call.run(q, k, v, options)
        assert_same_bits(call.run(q, *packed, options, cu_seqlens_kv=cu), batched)


@few
@given(calls(), st.integers(0, 300))
def test_lengths_equal_sliced_caches(call: Call, length: int) -> None:
    call = replace(call, lengths=(length,) * len(call.lengths), unused=40)
    q, k, v, options = call.inputs()
    with columns_by_themselves():
        whole = call.run(q, k, v, options)
        del options["seqlens_kv"]
        assert_same_bits(call.run(q, k[:, :length].copy(), v[:, :length].copy(), options), whole)


@few
@given(calls())
def test_both_layouts_of_k(call: Call) -> None:
    q, k, v, options = call.inputs()
    for k_d_major in (False, True):
        check(call.run(q, k, v, options, k_d_major=k_d_major), q, k, v, options)


@few
@given(calls(), st.integers(0, 99))
@example(Call((300, 64, 1, 129), d=16, n_kv_heads=3, group=1, left=100), 0)
def test_kv_heads_in_another_order(call: Call, seed: int) -> None:
    """KV heads with their query heads, sinks, slopes and scales: the results move with them."""
    call = replace(call, extras=(*call.extras, "k_scale", "v_scale"))
    q, k, v, options = call.inputs()
    heads = call.n_kv_heads
    order = np.random.default_rng(seed).permutation(heads)
    rows = np.arange(heads * call.group).reshape(heads, call.group)[order].reshape(-1)
    moved = dict(options)
    for name in call.extras:
        if name != "softcap":
            moved[name] = options[name][order if name in ("k_scale", "v_scale") else rows]
    with columns_by_themselves():
        o, lse = call.run(q, k, v, options)
        got = call.run(q[..., rows, :], k[:, :, order], v[:, :, order], moved)
    assert_same_bits(got, (o[..., rows, :], lse[..., rows]))


@few
@given(calls())
def test_repeated_kv_heads(call: Call) -> None:
    """Grouped queries are ordinary ones over keys and values repeated for each query head."""
    q, k, v, options = call.inputs()
    repeated = (q, np.repeat(k, call.group, axis=2), np.repeat(v, call.group, axis=2))
    check(call.run(q, k, v, options), *repeated, options)
    check(call.run(*repeated, options), *repeated, options)


@few
@given(calls(), st.integers(-6, 6))
def test_a_power_of_two_moves_between_queries_and_scale(call: Call, power: int) -> None:
    q, k, v, options = call.inputs()
    scale = 0.3
    plain = call.run(q, k, v, options, softmax_scale=scale)
    scaled = (q.astype(np.float32) * 2.0**power).astype(q.dtype)
    np.testing.assert_array_equal(scaled.astype(np.float64) * 2.0**-power, q.astype(np.float64))
    assert_same_bits(call.run(scaled, k, v, options, softmax_scale=scale * 2.0**-power), plain)


# -- runs


@few
@given(calls(), st.sampled_from([1, 2]))
@example(Call((300, 37, 129), d=16, n_kv_heads=3, left=100), 1)
def test_two_cores_equal_one(call: Call, n_splits: int) -> None:
    call = replace(call, target="trn3" if call.target == "trn3" else "trn2")
    q, k, v, options = call.inputs()
    with columns_by_themselves():
        one = call.run(q, k, v, options, n_splits=n_splits)
        assert_same_bits(call.run(q, k, v, options, n_splits=n_splits, n_cores=2), one)


@few
@given(calls(), st.sampled_from([1, 3]))
def test_two_runs_are_equal_and_leave_their_inputs(call: Call, n_splits: int) -> None:
    q, k, v, options = call.inputs()
    before = [x.copy() for x in (q, k, v, options["seqlens_kv"])]
    first = call.run(q, k, v, options, n_splits=n_splits)
    assert_same_bits(call.run(q, k, v, options, n_splits=n_splits), first)
    for x, y in zip((q, k, v, options["seqlens_kv"]), before, strict=True):
        np.testing.assert_array_equal(x, y)
