"""Destinations that name an address twice, that overlap an input, or that are constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.isa._aliasing import Place, disturbs, repeats
from tests.nkisim.harness import TARGETS, normal, out, ps, refused, run, sb, tile
from tests.nkisim.tensors import tensor as make

AT_ONE_ADDRESS = "several elements at one address"


# -- one address several times


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ([[12, 2], [1, 12]], False),
        ([[12, 2], [-1, 12]], False),
        ([[12, 2], [1, 4], [4, 3]], False),  # transposed
        ([[12, 2], [2, 3], [3, 2]], False),  # 0 2 4 and 3 5 7: interleaved, not nested
        ([[12, 2], [2, 4], [3, 2]], False),  # 0 2 4 6 and 3 5 7 9
        ([[12, 2], [1, 4], [2, 2]], True),  # 2 and 3 twice
        ([[12, 2], [2, 3], [4, 2]], True),  # 4 twice
        ([[12, 2], [0, 4]], True),
        ([[12, 2], [0, 1], [1, 4]], False),
    ],
)
def test_repeats(pattern: list[list[int]], expected: bool) -> None:
    t = make((2, 12)).ap(pattern, offset=11 if pattern[1][0] < 0 else 0)
    assert repeats(t) is expected


def twice() -> Any:
    """A destination whose elements of a partition are one."""
    return tile((4, 8)).ap([[8, 4], [0, 8]])


@pytest.mark.parametrize(
    ("instruction", "kernel"),
    [
        ("tensor_copy", lambda x: nisa.tensor_copy(twice(), sb(x))),
        ("memset", lambda x: nisa.memset(twice(), 0.0)),
        ("iota", lambda x: nisa.iota(twice(), [[1, 8]])),
        ("tensor_tensor", lambda x: nisa.tensor_tensor(twice(), sb(x), sb(x), nl.add)),
        ("activation", lambda x: nisa.activation(twice(), nl.exp, sb(x))),
        ("dma_copy", lambda x: nisa.dma_copy(twice(), sb(x))),
        ("tensor_copy_predicated", lambda x: nisa.tensor_copy_predicated(twice(), 1.0, nl.ones((4, 8), nl.uint8))),
        ("nc_n_gather", lambda x: nisa.nc_n_gather(twice(), sb(x), nl.zeros((4, 8), nl.uint32))),
    ],
)
def test_every_instruction_refuses_an_address_twice(instruction: str, kernel: Any) -> None:
    error = refused(
        kernel,
        normal(4, 8),
        instruction=instruction,
        operand="dst",
        rule=AT_ONE_ADDRESS,
        received="[4, 8] with strides [8, 0]",
        allowed="distinct",
    )
    assert "access patterns" in error.source


def test_a_matmul_refuses_an_address_twice() -> None:
    def kernel(x: Any) -> None:
        t = sb(x)
        nisa.nc_matmul(tile((8, 8), buffer=nl.psum).ap([[8, 8], [0, 8]]), t, t)

    refused(
        kernel,
        normal(4, 8),
        instruction="nc_matmul",
        operand="dst",
        rule=AT_ONE_ADDRESS,
        received="[8, 8] with strides [8, 0]",
        allowed="distinct",
    )


# -- overlap of source and destination


def ones(n: int) -> Any:
    """A tile of [4, n]."""
    return nl.ones((4, n), nl.float32)


SHIFTS = {
    "tensor_copy": lambda x: nisa.tensor_copy((t := sb(x))[:, 1:16], t[:, 0:15]),
    "tensor_copy left": lambda x: nisa.tensor_copy((t := sb(x))[:, 0:15], t[:, 1:16]),
    "tensor_tensor": lambda x: nisa.tensor_tensor((t := sb(x))[:, 1:], t[:, :15], ones(15), nl.add),
    "tensor_scalar": lambda x: nisa.tensor_scalar((t := sb(x))[:, 1:], t[:, :15], nl.add, 1.0),
    "activation": lambda x: nisa.activation((t := sb(x))[:, 1:], nl.exp, t[:, :15]),
    "dma_copy": lambda x: nisa.dma_copy((t := sb(x))[:, 0:8], t[:, 1:9]),
    "dma_copy partitions": lambda x: nisa.dma_copy((t := sb(x))[1:4, 0:1], t[0:3, 0:1]),
    "tensor_copy widths": lambda x: nisa.tensor_copy((t := sb(x))[0:1, 0:8], t.view(nl.int16)[0:1, 0:8]),
    "max8": lambda x: nisa.max8((t := sb(x))[:, 0:8], t),
    "tensor_copy reversed": lambda x: nisa.tensor_copy((t := sb(x)), t.ap([[16, 4], [-1, 16]], offset=15)),
    "tensor_copy bytes": lambda x: nisa.tensor_copy((t := sb(x))[:, 0:4].view(nl.uint8), t.view(nl.uint8)[:, 1:17]),
    "tensor_tensor broadcast": lambda x: nisa.tensor_tensor((t := sb(x)), ones(16), t.ap([[16, 4], [0, 16]]), nl.add),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_within_a_tile_is_refused(name: str) -> None:
    refused(
        SHIFTS[name],
        normal(4, 16),
        instruction=name.split(" ")[0],
        operand="dst",
        rule="still being read",
        received=" of t",
        allowed="the same view as",
    )


def test_a_shift_within_hbm_is_refused() -> None:
    def kernel() -> None:
        o = tile((8, 4), buffer=nl.shared_hbm)
        nisa.dma_copy(o, nl.ones((8, 4), nl.float32))
        nisa.dma_copy(o[1:8], o[0:7])

    error = refused(
        kernel,
        instruction="dma_copy",
        operand="dst",
        rule="overlap with src, which is still being read",
        received="[[4, 7], [1, 4]] at 4 and [[4, 7], [1, 4]] at 0",
        allowed="no common element",
    )
    assert "in place" in error.source


def test_a_row_gather_over_its_own_rows_is_refused() -> None:
    def kernel(index: Any) -> None:
        o = tile((8, 4), buffer=nl.shared_hbm)
        nisa.dma_copy(o, nl.ones((8, 4), nl.float32))
        nisa.dma_copy(o[0:3], o.vector_select(0, sb(index)))

    def overlap(*rows: int) -> None:
        run(kernel, np.array(rows, np.int32).reshape(3, 1))

    overlap(3, 7, 5)
    with pytest.raises(Exception, match="overlap with src"):
        overlap(3, 2, 5)


@pytest.mark.parametrize("target", ["trn3"])
def test_a_column_gather_over_its_own_columns_is_refused(target: str) -> None:
    def kernel(x: Any, index: Any) -> Any:
        t = sb(x)
        nisa.tensor_copy(t[:, 0:4], t.indirect(sb(index), 4))
        return out(t)

    x = normal(16, 8)
    index = np.full((16, 1), 5, np.uint32)
    expected = x.copy()
    expected[:, 0:4] = x[:, 5:6]
    np.testing.assert_array_equal(run(kernel, x, index, target=target), expected)
    index[2] = 3
    refused(
        kernel,
        x,
        index,
        instruction="tensor_copy",
        operand="dst",
        rule="overlap with src",
        received="at 0",
        allowed="the same view",
        target=target,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_what_stays_legal(target: str) -> None:
    x = np.arange(32, dtype=np.float32).reshape(2, 16)

    def kernel(x: Any) -> Any:
        t = sb(x)
        nisa.tensor_copy(t[:, 0::2], t[:, 1::2])  # interleaved
        nisa.tensor_scalar(t.reshape((2, 4, 4)), t, nl.add, 1.0)  # in place under another shape
        nisa.tensor_scalar(t, t, nl.multiply, t[:, 3:4])  # a column is read before the elements stream
        nisa.tensor_reduce(t[:, 5:6], nl.add, t, axis=1)  # and a result written after them
        nisa.tensor_copy(t[:, 8:12], t[:, 4:8])
        nisa.dma_copy(t[1:2, :], t[0:1, :])
        return out(t)

    y = x.copy()
    y[:, 0::2] = x[:, 1::2]
    y += 1
    y *= y[:, 3:4].copy()
    y[:, 5] = y.sum(1)
    y[:, 8:12] = y[:, 4:8]
    y[1] = y[0]
    np.testing.assert_array_equal(run(kernel, x, target=target), y)


def test_shuffle_and_register_sums_in_place() -> None:
    x = normal(32, 6)

    def kernel(x: Any) -> Any:
        t, p = sb(x), ps(x)
        nisa.nc_stream_shuffle(t, t, [1, 0, *range(2, 32)])
        nisa.activation_reduce(p, nl.copy, p, nl.add, p[:, 0:1])
        return out(t), out(p)

    shuffled, summed = run(kernel, x)
    np.testing.assert_array_equal(shuffled, x[[1, 0, *range(2, 32)]])
    np.testing.assert_allclose(summed[:, 0], x.sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(summed[:, 1:], x[:, 1:])


def test_disturbs_is_exact() -> None:
    """Against sets of byte addresses, over views of one tile at random."""
    rng = np.random.default_rng(0)
    t = make((4, 24))
    seen = {True: 0, False: 0}
    for _ in range(400):
        views = []
        for _ in range(2):
            narrow = rng.integers(2)
            base = t.view(nl.int16) if narrow else t
            n = int(rng.integers(2, 5))
            step = int(rng.integers(1, 4))
            start = int(rng.integers(0, base.shape[1] - (n - 1) * step))
            row = int(rng.integers(0, 3))
            views.append(base[row : row + int(rng.integers(1, 3)), start : start + (n - 1) * step + 1 : step])
        a, b = views
        if a.shape == b.shape and a.strides == b.strides and a.offset == b.offset and a.dtype is b.dtype:
            continue
        expected = bool(addresses(a) & addresses(b))
        assert disturbs(Place("dst", a, a.offset), Place("src", b, b.offset)) is expected
        seen[expected] += 1
    assert min(seen.values()) > 50


def addresses(t: Any) -> set[int]:
    """The byte addresses of a view."""
    found = set()
    for at in np.ndindex(t.shape):
        element = t.offset + sum(i * s for i, s in zip(at, t.strides, strict=True))
        found.update(range(element * t.element_bytes, (element + 1) * t.element_bytes))
    return found


# -- constants


def test_constants_are_read_only() -> None:
    def identity() -> None:
        nisa.memset(nl.shared_identity_matrix(8, dtype=nl.float32), 0.0)

    def constant() -> None:
        nisa.dma_copy(nl.shared_constant(np.ones((2, 2), np.float32)), nl.zeros((2, 2), nl.float32))

    for kernel, instruction, name in ((identity, "memset", "identity"), (constant, "dma_copy", "constant")):
        refused(
            kernel,
            instruction=instruction,
            operand="dst",
            rule="read-only tensor",
            received=f"{name}, a constant",
            allowed="kernel's own",
        )


def test_an_identity_in_the_users_tile_stays_writable() -> None:
    def kernel() -> Any:
        t = nl.shared_identity_matrix(4, dtype=nl.float32, dst=tile((4, 4)))
        nisa.tensor_scalar(t, t, nl.add, 1.0)
        return out(t)

    np.testing.assert_array_equal(run(kernel), np.eye(4, dtype=np.float32) + 1)
