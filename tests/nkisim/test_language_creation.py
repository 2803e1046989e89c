"""nl: new tensors: filled, random, identity, placed; sizes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import TARGETS, normal, out, ps, refused, run, sb, traced

BF16 = ml_dtypes.bfloat16
X = normal(6, 10, seed=21)

# ---------------------------------------------------------------------------------------------------
# Filled tensors


@pytest.mark.parametrize("buffer", ["sbuf", "psum"])
def test_fill_on_chip(buffer: str) -> None:
    where = getattr(nl, buffer)

    def kernel() -> Any:
        tiles = (
            nl.zeros((3, 4, 2), nl.float32, where),
            nl.ones((3, 4), nl.bfloat16, buffer=where),
            nl.full((3, 4), -2.5, nl.float16, buffer=where),
            nl.ones((3, 4), nl.int32, buffer=where, name="counter"),
            nl.full((2, 2), 7, nl.uint8, where),
        )
        assert all(t.buffer is where for t in tiles)
        assert tiles[3].name == "counter"
        return tuple(out(t) for t in tiles)

    zeros, ones, full, ints, bytes_ = run(kernel)
    np.testing.assert_array_equal(zeros, np.zeros((3, 4, 2), np.float32))
    np.testing.assert_array_equal(ones, np.ones((3, 4), BF16))
    np.testing.assert_array_equal(full, np.full((3, 4), -2.5, np.float16))
    np.testing.assert_array_equal(ints, np.ones((3, 4), np.int32))
    np.testing.assert_array_equal(bytes_, np.full((2, 2), 7, np.uint8))


@pytest.mark.parametrize("shape", [(1,), (5,), (127, 3), (128, 2049), (2, 3, 4, 5), (300, 1001)])
def test_fill_hbm(shape: tuple[int, ...]) -> None:
    def kernel() -> Any:
        return nl.full(shape, 1.5, nl.float32, buffer=nl.shared_hbm)

    np.testing.assert_array_equal(run(kernel), np.full(shape, 1.5, np.float32))


def test_fill_value_of_the_wrong_class() -> None:
    def kernel() -> Any:
        return nl.full((2, 2), 1.5, nl.int32)

    with pytest.raises(nkisim.NkiError, match="memset"):
        run(kernel)


def test_like() -> None:
    seen: list[Any] = []

    def kernel(x: Any) -> Any:
        t = ps(x)
        zeros = nl.zeros_like(t)
        empty = nl.empty_like(t)
        typed = nl.zeros_like(t, dtype=nl.int32, buffer=nl.psum)
        other = nl.empty_like(x, buffer=nl.shared_hbm, dtype=nl.bfloat16, name="other")
        seen.extend((r.shape, str(r.dtype), r.buffer) for r in (zeros, empty, typed, other))
        assert other.name == "other"
        return out(zeros), out(typed)

    zeros, typed = run(kernel, X)
    np.testing.assert_array_equal(zeros, X * 0)
    np.testing.assert_array_equal(typed, np.zeros(X.shape, np.int32))
    assert seen == [
        ((6, 10), "float32", nl.sbuf),
        ((6, 10), "float32", nl.psum),
        ((6, 10), "int32", nl.psum),
        ((6, 10), "bfloat16", nl.shared_hbm),
    ]


@pytest.mark.parametrize("name", ["zeros_like", "empty_like"])
def test_like_takes_tensors(name: str) -> None:
    def kernel() -> Any:
        return getattr(nl, name)((2, 2))

    refused(kernel, instruction=name, operand="x", rule="type", received="tuple", allowed="a tensor")


def test_empty_like_is_undefined() -> None:
    def kernel(x: Any) -> Any:
        return nl.add(nl.empty_like(sb(x)), 1.0)

    refused(
        kernel, X, instruction="tensor_scalar", operand="data", rule="uninitialized", received="60", allowed="written"
    )


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "bfloat16", "float8_e5m2", "bool_"])
def test_identity(dtype: str) -> None:
    def kernel() -> Any:
        return out(nl.shared_identity_matrix(5, dtype=getattr(nl, dtype)))

    np.testing.assert_array_equal(run(kernel).astype(np.float32), np.eye(5, dtype=np.float32))


def test_identity_into_a_tile() -> None:
    def kernel() -> Any:
        default = nl.shared_identity_matrix(3)
        assert default.dtype == nl.uint8
        wide = nl.full((3, 6), 9.0, nl.float32)
        part = wide[:, 2:5]
        assert nl.shared_identity_matrix(n=3, dtype=nl.bfloat16, dst=part) is part
        return out(wide)

    expected = np.full((3, 6), 9, np.float32)
    expected[:, 2:5] = np.eye(3)
    np.testing.assert_array_equal(run(kernel), expected)


def test_identity_refusals() -> None:
    def zero() -> Any:
        return nl.shared_identity_matrix(0)

    def packed() -> Any:
        return nl.shared_identity_matrix(4, dtype=nl.float8_e4m3fn_x4)

    def shape() -> Any:
        return nl.shared_identity_matrix(4, dst=nl.ndarray((4, 5), nl.uint8))

    def too_large() -> Any:
        return nl.shared_identity_matrix(129)

    what = "shared_identity_matrix"
    refused(zero, instruction=what, operand="n", rule="value", received="0", allowed="positive")
    refused(packed, instruction=what, operand="dtype", rule="value", received="x4", allowed="one number")
    refused(shape, instruction=what, operand="dst", rule="tile", received="[4, 5]", allowed="(4, 4)")
    refused(too_large, instruction="ndarray", operand="identity", rule="partition", received="129", allowed="1..128")


@pytest.mark.parametrize("target", TARGETS)
def test_rand_is_uniform_and_seeded(target: str) -> None:
    def kernel() -> Any:
        nl.random_seed(nl.full((1, 1), 42, nl.int32))
        a = nl.rand((64, 200), nl.float32)
        b = nl.rand((64, 200), nl.float32)
        nl.random_seed(nl.full((1, 1), 42, nl.int32))
        c = nl.rand((64, 200), nl.float32)
        nl.random_seed(nl.full((1, 1), 43, nl.int32))
        d = nl.rand((64, 200), nl.float32)
        return tuple(out(t) for t in (a, b, c, d))

    a, b, c, d = run(kernel, target=target)
    for sample in (a, b, d):
        assert 0 <= sample.min() < 0.01
        assert 0.99 < sample.max() <= 1
        assert abs(sample.mean() - 0.5) < 0.02
        assert abs(sample.var() - 1 / 12) < 0.01
        assert np.unique(sample).size > 0.99 * sample.size
    np.testing.assert_array_equal(a, c)
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, d)
    trace = traced(kernel, target=target)
    assert trace.count("rand2" if target == "trn3" else "rng", engine=Engine.vector) == 4


@pytest.mark.parametrize("target", ["trn2", "trn3"])
def test_rand_in_other_buffers_and_types(target: str) -> None:
    def kernel() -> Any:
        return (
            out(nl.rand((4, 30), nl.bfloat16, buffer=nl.psum)),
            nl.rand((200, 17), nl.float32, buffer=nl.shared_hbm, name="r"),
        )

    half, flat = run(kernel, target=target)
    assert half.dtype == BF16
    for sample in (half.astype(np.float32), flat):
        assert 0 <= sample.min() < sample.max() <= 1
    assert np.unique(flat).size > 3300


def test_random_seed_takes_a_tile() -> None:
    def kernel() -> Any:
        nl.random_seed(42)

    with pytest.raises(nkisim.NkiError, match=r"set_rng_seed\.src_seeds: type: received int"):
        run(kernel)


# ---------------------------------------------------------------------------------------------------
# Placement


def test_placed_tensors() -> None:
    def kernel(x: Any) -> Any:
        t = nl.ndarray((4, 8), nl.float32, address=(32, 12))
        p = nl.ndarray((4, 1024), nl.float32, buffer=nl.psum, address=(0, 2 * 2048))
        assert (t.start_partition, p.start_partition) == (32, 0)
        nisa.dma_copy(dst=t, src=x)
        return out(t)

    np.testing.assert_array_equal(run(kernel, X[:4, :8]), X[:4, :8])


@pytest.mark.parametrize(
    ("shape", "buffer", "address", "rule"),
    [
        ((4, 8), "sbuf", (0,), "address"),
        ((4, 8), "sbuf", 3, "address"),
        ((4, 8), "sbuf", (0, -4), "address"),
        ((4, 8), "sbuf", (0, 1.5), "address"),
        ((4, 8), "sbuf", (True, 0), "address"),
        ((4, 8), "sbuf", (125, 0), "address partitions"),
        ((4, 8), "sbuf", (0, 224 * 1024 - 16392 - 31), "address bytes"),
        ((4, 8), "psum", (0, 16384 - 16), "address bytes"),
        ((4, 8), "psum", (0, 64), "address of a PSUM tensor"),
        ((4, 513), "psum", (0, 2048 + 4), "address of a PSUM tensor"),
        ((4, 8), "shared_hbm", (0, 0), "address"),
    ],
)
def test_addresses_that_no_memory_has(shape: Any, buffer: str, address: Any, rule: str) -> None:
    def kernel() -> Any:
        return nl.ndarray(shape, nl.float32, buffer=getattr(nl, buffer), address=address)

    with pytest.raises(nkisim.NkiError, match=rf"^ndarray: {rule}: received"):
        run(kernel)


# ---------------------------------------------------------------------------------------------------
# Sizes

SIZES = {
    "trn1": (128, 512, 2048, 8, 24 * 2**20, 176 * 1024),
    "trn2": (128, 512, 2048, 8, 28 * 2**20, 224 * 1024 - 16392),
    "trn3": (128, 512, 2048, 8, 32 * 2**20, 256 * 1024 - 16392),
}


@pytest.mark.parametrize("target", TARGETS)
def test_tile_size_is_that_of_the_target(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes() -> tuple[int, ...]:
        t = nl.tile_size
        assert (t.psum_fmax, t.sbuf_fmax * 4, t.total_available_sbuf_size) == (
            t.psum_bank_fmax,
            t.sbuf_fmax_bytes,
            t.sbuf_fmax_bytes,
        )
        assert (t.gemm_stationary_fmax, t.gemm_moving_fmax, t.bn_stats_fmax) == (128, 512, 512)
        assert (t.psum_min_align, t.sbuf_min_align) == (4, 1)
        return (
            t.pmax,
            t.psum_bank_fmax,
            t.psum_bank_fmax_bytes,
            t.psum_num_banks,
            t.sbuf_size_bytes,
            t.sbuf_fmax_bytes,
        )

    seen = []
    run(lambda: seen.append(sizes()), target=target)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", target)
    assert [*seen, sizes()] == [SIZES[target]] * 2


@pytest.mark.parametrize(("target", "banks"), [("trn1", 8), ("trn2", 7), ("trn3", 7)])
def test_a_bank_is_reserved_for_dma_transposes_on_the_tensor_engine(
    target: str, banks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NKI_DMA_TRANSPOSE_AS_PE_TRANSPOSE", "true")
    seen = []
    run(lambda: seen.append(nl.tile_size.psum_num_banks), target=target)
    assert seen == [banks]


def test_outside_a_kernel_tile_size_is_that_of_the_default_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE", raising=False)
    assert nl.tile_size.sbuf_size_bytes == SIZES["trn3"][4]
