"""nc_transpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import TARGETS, integers, normal, out, ps, refused, run, sb, tile
from tests.nkisim.matmul_kernels import BF16, E5M2, small


def transpose(a: Any, buffer: Any = nl.psum, engine: Any = nisa.engine.unknown) -> Any:
    """Inside a kernel: one nc_transpose of an HBM tensor into a new tile."""
    dst = tile((a.shape[1], a.shape[0]), a.dtype, buffer)
    nisa.nc_transpose(dst=dst, data=sb(a), engine=engine)
    return dst


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.int32, np.uint16])
def test_tensor_engine_transposes_bits(dtype: Any, target: str) -> None:
    def kernel(a: Any) -> Any:
        return out(transpose(a))

    bits = integers(128, 96, low=0, high=2**16, dtype=np.uint32)
    a = bits.astype(np.uint16).view(dtype) if np.dtype(dtype).itemsize == 2 else (bits * 65521).view(dtype)
    unsigned = np.dtype(f"u{a.itemsize}")
    got = run(kernel, a, target=target)
    assert got.dtype == a.dtype
    assert np.array_equal(got.view(unsigned), a.view(unsigned).T)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16, E5M2])
def test_tensor_engine_multiplies_by_the_identity_on_trn1(dtype: Any) -> None:
    def kernel(a: Any) -> Any:
        return out(transpose(a))

    a = small(24, 16, dtype=dtype)
    a[3, 5], a[7, 9] = np.nan, np.inf
    got = run(kernel, a, target="trn1").astype(np.float32)
    want = a.astype(np.float32).T
    want[5] = np.nan
    want[9] = np.nan
    want[9, 7] = np.inf
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32, np.uint8, E5M2])
@pytest.mark.parametrize(("source", "to"), [("sbuf", "sbuf"), ("psum", "sbuf"), ("sbuf", "psum"), ("psum", "psum")])
def test_vector_engine_transposes_bits_between_any_memories(dtype: Any, source: str, to: str, target: str) -> None:
    def kernel(a: Any) -> Any:
        data = ps(a) if source == "psum" else sb(a)
        dst = tile((a.shape[1], a.shape[0]), a.dtype, getattr(nl, to))
        nisa.nc_transpose(dst, data, nisa.engine.vector)
        return out(dst)

    a = integers(24, 32, low=0, high=256).astype(np.uint8)
    a = a.view(dtype) if np.dtype(dtype).itemsize == 1 else a.astype(np.float32).astype(dtype)
    if np.dtype(dtype) in (np.float32, BF16):
        a[1, 2] = np.nan
    got = run(kernel, a, target=target)
    unsigned = np.dtype(f"u{a.itemsize}")
    assert np.array_equal(got.view(unsigned), a.view(unsigned).T)


def test_packed_types_move_as_one_element() -> None:
    def kernel(a: Any) -> Any:
        data = sb(a).view(nl.float8_e4m3fn_x4)
        dst = tile((4, 8), nl.float8_e4m3fn_x4)
        nisa.nc_transpose(dst, data)
        return out(dst.view(nl.uint32))

    a = integers(8, 4, low=0, high=2**31, dtype=np.uint32)
    assert np.array_equal(run(kernel, a, target="trn3"), a.T)


def test_transposes_of_views() -> None:
    def kernel(a: Any) -> Any:
        dst = tile((12, 2, 8), buffer=nl.psum)
        nisa.memset(dst, -1.0)
        nisa.nc_transpose(dst[:, 1].reshape((12, 2, 4)), sb(a)[:, ::2])
        return out(dst)

    a = normal(8, 6, 4)
    got = run(kernel, a)
    assert np.array_equal(got[:, 1], a[:, ::2].reshape(8, 12).T)
    assert (got[:, 0] == -1).all()


def test_a_transpose_overwrites_and_counts_as_a_matmul() -> None:
    def kernel(a: Any, eye: Any) -> Any:
        dst = tile((8, 8), buffer=nl.psum)
        nisa.nc_transpose(dst, sb(a))
        nisa.nc_transpose(dst, sb(a))
        once = out(dst)
        nisa.nc_matmul(dst, sb(a), sb(eye))
        return once, out(dst)

    a = small(8, 8)
    for target in TARGETS:
        once, added = run(kernel, a, np.eye(8, dtype=np.float32), target=target)
        assert np.array_equal(once, a.T)
        assert np.array_equal(added, 2 * a.T)


def test_a_vector_engine_transpose_is_no_matmul() -> None:
    def kernel(a: Any) -> Any:
        dst = tile((8, 8), buffer=nl.psum)
        nisa.nc_transpose(dst, sb(a), engine=nisa.engine.vector)
        nisa.nc_matmul(dst, sb(a), sb(a), accumulate=True)

    refused(
        kernel,
        small(8, 8),
        instruction="nc_matmul",
        operand="accumulate",
        rule="values of another instruction",
        received="64 of 64",
        allowed="False",
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "buffer", "engine", "operand", "rule", "received", "allowed", "target"),
    [
        ((16, 129), np.float32, "psum", "tensor", "data", "tile size", "[16, 129]", "[128, 128]", "trn2"),
        ((33, 8), np.float32, "sbuf", "unknown", "data", "tile size", "[33, 8]", "[32, 32]", "trn2"),
        ((8, 33), np.float32, "psum", "vector", "data", "tile size", "[8, 33]", "[32, 32]", "trn2"),
        ((8, 8), np.float32, "sbuf", "tensor", "dst", "buffer", "sbuf", "psum", "trn2"),
        ((8, 8), np.uint8, "psum", "tensor", "data", "dtype in transpose", "uint8", "2 or 4 bytes", "trn2"),
        ((8, 8), E5M2, "psum", "unknown", "data", "dtype in transpose", "float8_e5m2", "2 or 4", "trn3"),
        ((8, 8), np.int32, "psum", "tensor", "data", "dtype", "int32", "bfloat16", "trn1"),
        ((8, 8), np.float32, "psum", "scalar", "engine", "value", "scalar", "tensor, vector", "trn2"),
    ],
)
def test_transpose_rules(
    shape: Any, dtype: Any, buffer: str, engine: str, operand: str, rule: str, received: str, allowed: str, target: str
) -> None:
    def kernel(a: Any) -> Any:
        dst = tile((min(a.shape[1], 128), a.shape[0]), a.dtype, getattr(nl, buffer))
        nisa.nc_transpose(dst, sb(a), nisa.engine[engine])

    refused(
        kernel,
        np.zeros(shape, dtype),
        instruction="nc_transpose",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target=target,
    )


@pytest.mark.parametrize(
    ("dst", "dtype", "operand", "rule", "received", "allowed"),
    [
        ((6, 8), nl.bfloat16, "dst", "dtype", "bfloat16", "float32, that of data"),
        ((7, 8), nl.float32, "dst", "partitions", "7", "6, the elements"),
        ((6, 9), nl.float32, "dst", "elements per partition", "9", "8, the partitions"),
    ],
)
@pytest.mark.parametrize("buffer", ["sbuf", "psum"])
def test_transpose_destination_rules(
    buffer: str, dst: Any, dtype: Any, operand: str, rule: str, received: str, allowed: str
) -> None:
    def kernel(a: Any) -> Any:
        nisa.nc_transpose(tile(dst, dtype, getattr(nl, buffer)), sb(a))

    refused(
        kernel,
        np.zeros((8, 6), np.float32),
        instruction="nc_transpose",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )


def test_tensor_engine_reads_sbuf_only_and_writes_one_bank() -> None:
    def from_psum(a: Any) -> Any:
        nisa.nc_transpose(tile((6, 8), buffer=nl.psum), ps(a), nisa.engine.tensor)

    def across(a: Any) -> Any:
        dst = tile((6, 1024), buffer=nl.psum)
        nisa.nc_transpose(dst[:, 508:516], sb(a))

    a = normal(8, 6)
    common = {"instruction": "nc_transpose"}
    refused(from_psum, a, operand="data", rule="buffer", received="psum", allowed="sbuf", **common)
    refused(across, a, operand="dst", rule="PSUM bank", received="2032..2063", allowed="2048", **common)
