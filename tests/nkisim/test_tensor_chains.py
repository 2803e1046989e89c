"""NkiTensor: random chains of operations against NumPy's own views."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nkisim import language as nl
from tests.nkisim.tensors import array_like, refusal, tensor, values

BUFFERS = ("sbuf", "psum", "private_hbm", "shared_hbm")


def test_the_language_guides_chain():
    t = tensor((128, 4, 16))
    u = t[0:64, :, :].permute((0, 2, 1))[:, 0, :]
    assert u.shape == (64, 4)
    np.testing.assert_array_equal(values(u), array_like(t)[:64].transpose(0, 2, 1)[:, 0])


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _no_copy_reshape(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """`a` reshaped as a view, or None."""
    b = np.lib.stride_tricks.as_strided(a, a.shape, a.strides)
    view = b.reshape(shape)
    return view if np.shares_memory(view, b) else None


class Chain:
    """A random operation applied to an NkiTensor and to NumPy's view of the same elements."""

    def __init__(self, data: st.DataObject, on_chip: bool) -> None:
        self.draw = data.draw
        self.on_chip = on_chip
        self.first = 1 if on_chip else 0

    def dim(self, a: np.ndarray, first: int | None = None) -> int:
        return self.draw(st.integers(self.first if first is None else first, a.ndim - 1))

    def bounds(self, n: int) -> tuple[int, int]:
        start = self.draw(st.integers(0, n - 1))
        return start, self.draw(st.integers(start + 1, n))

    def index(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        keys: list[Any] = []
        for d in range(self.draw(st.integers(1, a.ndim))):
            n = a.shape[d]
            start, stop = self.bounds(n)
            kind = self.draw(st.sampled_from(["int", "negative", "slice", "step", "ds", "all"]))
            if kind in ("int", "negative"):
                keys.append(start if kind == "int" else start - n)
            elif kind == "step" and not (self.on_chip and d == 0):
                keys.append(slice(start, stop, self.draw(st.integers(1, 3))))
            else:
                keys.append({"slice": slice(start, stop), "ds": nl.ds(start, stop - start)}.get(kind, slice(None)))
        plain = tuple(slice(k.start, k.start + k.size) if isinstance(k, type(nl.ds(0, 1))) else k for k in keys)
        if self.draw(st.booleans()):
            keys.append(Ellipsis)
        b = a[plain]
        if self.on_chip and isinstance(plain[0], int):
            b = b[None]
        while b.ndim < 1 + self.first:
            b = b[..., None]
        return t[tuple(keys) if len(keys) > 1 else keys[0]], b

    def slice(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        d = self.dim(a)
        start, stop = self.bounds(a.shape[d])
        step = self.draw(st.integers(1, 3))
        return t.slice(d, start, stop, step), a[(slice(None),) * d + (slice(start, stop, step),)]

    def select(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        if a.ndim <= 1 + self.first:
            return t, a
        d = self.dim(a)
        i = self.draw(st.integers(0, a.shape[d] - 1))
        return t.select(d, i), a[(slice(None),) * d + (i,)]

    def permute(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        dims = tuple(range(self.first)) + tuple(self.draw(st.permutations(range(self.first, a.ndim))))
        return t.permute(dims), a.transpose(dims)

    def expand(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        if a.ndim >= 5:
            return t, a
        d = self.draw(st.integers(self.first, a.ndim))
        return t.expand_dim(d), np.expand_dims(a, d)

    def squeeze(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        ones = [d for d in range(self.first, a.ndim) if a.shape[d] == 1]
        if not ones or a.ndim <= 1 + self.first:
            return t, a
        return t.squeeze_dim(ones[0]), a.squeeze(ones[0])

    def broadcast(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        ones = [d for d in range(self.first, a.ndim) if a.shape[d] == 1]
        if not ones:
            return t, a
        d, n = self.draw(st.sampled_from(ones)), self.draw(st.integers(1, 3))
        return t.broadcast(d, n), np.broadcast_to(a, (*a.shape[:d], n, *a.shape[d + 1 :]))

    def split(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        if a.ndim >= 5:
            return t, a
        d = self.dim(a)
        outer = self.draw(st.sampled_from(_divisors(a.shape[d])))
        inner = a.shape[d] // outer
        b = np.lib.stride_tricks.as_strided(
            a,
            (*a.shape[:d], outer, inner, *a.shape[d + 1 :]),
            (*a.strides[:d], a.strides[d] * inner, a.strides[d], *a.strides[d + 1 :]),
        )
        return t.reshape_dim(d, (outer, self.draw(st.sampled_from([-1, inner])))), b

    def flatten(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        first = self.dim(a)
        last = self.draw(st.integers(first, a.ndim - 1))
        shape = (*a.shape[:first], prod(a.shape[first : last + 1]), *a.shape[last + 1 :])
        return self._reshaped(a, shape, t, lambda: t.flatten_dims(first, last))

    def reshape(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        rest = prod(a.shape[self.first :])
        sizes = []
        for _ in range(self.draw(st.integers(0, 2))):
            sizes.append(self.draw(st.sampled_from(_divisors(rest))))
            rest //= sizes[-1]
        shape = (*a.shape[: self.first], *self.draw(st.permutations([*sizes, rest])))
        return self._reshaped(a, shape, t, lambda: t.reshape(shape))

    def _reshaped(self, a: np.ndarray, shape: tuple[int, ...], t: Any, make: Any) -> tuple[Any, np.ndarray]:
        # NumPy may join the partition dimension's stride with the others; only the free ones matter on chip.
        b = _no_copy_reshape(a, shape) if not self.on_chip else None
        if self.on_chip and _no_copy_reshape(a[0], shape[1:]) is not None:
            b = np.stack([a[p].reshape(shape[1:]) for p in range(a.shape[0])])
        if b is None:
            assert refusal(make).rule in ("layout", "[stride, count] of dimensions")
            return t, a
        return make(), b

    def rearrange(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        names = "abcde"[: a.ndim]
        order = names[: self.first] + "".join(self.draw(st.permutations(names[self.first :])))
        return t.rearrange(tuple(names), tuple(order)), a.transpose([names.index(n) for n in order])

    def pattern(self, t: Any, a: np.ndarray) -> tuple[Any, np.ndarray]:
        return t.ap(t.get_pattern()), a


OPERATIONS = (
    "index", "slice", "select", "permute", "expand", "squeeze", "broadcast", "split", "flatten", "reshape",
    "rearrange", "pattern",
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), buffer=st.sampled_from(BUFFERS))
def test_chains_of_views_are_numpys_views(data, buffer):
    on_chip = buffer in ("sbuf", "psum")
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=2, max_size=4)))
    t = tensor(shape, nl.int32, buffer)
    a: np.ndarray = array_like(t)
    chain = Chain(data, on_chip)
    for _ in range(data.draw(st.integers(1, 6))):
        t, a = getattr(chain, data.draw(st.sampled_from(OPERATIONS)))(t, a)
        assert t.shape == a.shape
        np.testing.assert_array_equal(values(t), a)
        assert t.size == a.size
        if on_chip:
            assert t.start_partition == values(t).flat[0] // t.row_elements
            assert t.ndim >= 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_reinterpreted_chains_show_the_same_bytes(data):
    t = tensor((4, 2, 16), nl.uint8)
    a = array_like(t)
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            dtype = data.draw(st.sampled_from([nl.uint8, nl.int16, nl.float32, nl.bfloat16]))
            k = max(dtype.itemsize // t.dtype.itemsize, 1)
            if a.shape[-1] % k or t.offset % k or any(stride % k for stride in t.strides[:-1]):
                error = refusal(t.view, dtype)
                assert error.rule in ("size of the last dimension", "alignment")
                continue
            t, a = t.view(dtype), np.ascontiguousarray(a).view(dtype.numpy)
        else:
            n = a.shape[-1]
            start = data.draw(st.integers(0, n - 1))
            stop = data.draw(st.integers(start + 1, n))
            t, a = t[..., start:stop], a[..., start:stop]
        assert values(t).tobytes() == np.ascontiguousarray(a).tobytes()
        assert t.dtype.numpy == a.dtype
