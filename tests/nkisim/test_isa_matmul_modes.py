"""nc_matmul: double row, transpose mode, tiles of the array, indirection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import integers, normal, out, refused, run, sb, tile
from tests.nkisim.matmul_kernels import BF16, E4M3, E4M3FN, E5M2, exact, result, small

# -- double row


@pytest.mark.parametrize(
    ("left", "right", "target"), [(E4M3, E4M3, "trn2"), (E4M3, E5M2, "trn2"), (E4M3FN, E5M2, "trn3")]
)
def test_double_row_contracts_pairs(left: Any, right: Any, target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((a.shape[2], b.shape[2]), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), perf_mode=nisa.matmul_perf_mode.double_row)
        return out(dst)

    a, b = small(48, 2, 8, dtype=left), small(48, 2, 12, seed=1, dtype=right)
    want = exact(a[:, 0], b[:, 0]) + exact(a[:, 1], b[:, 1])
    assert np.array_equal(run(kernel, a, b, target=target), want)


def test_double_row_takes_256_contraction_elements_and_full_tiles() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((128, 512), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), perf_mode=nisa.matmul_perf_mode.double_row)
        return out(dst)

    a, b = small(128, 2, 128, dtype=E4M3), small(128, 2, 512, seed=1, dtype=E4M3)
    assert np.array_equal(run(kernel, a, b), exact(a.reshape(256, 128), b.reshape(256, 512)))


def test_double_row_rules() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 4), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), perf_mode=nisa.matmul_perf_mode.double_row)

    pair = small(16, 2, 4, dtype=E4M3)
    common = {"instruction": "nc_matmul"}
    refused(
        kernel, pair, pair, operand="perf_mode", rule="target", received="trn1", allowed="v3", target="trn1", **common
    )
    bf16 = pair.astype(BF16)
    refused(
        kernel, bf16, pair, operand="stationary", rule="dtype", received="bfloat16", allowed="float8_e5m2", **common
    )
    flat = pair.reshape(16, 8)
    refused(kernel, pair, flat, operand="moving", rule="shape", received="[16, 8]", allowed="[partitions, 2", **common)
    fours = small(16, 4, 2, dtype=E4M3)
    refused(
        kernel,
        fours,
        pair,
        operand="stationary",
        rule="shape",
        received="[16, 4, 2]",
        allowed="[partitions, 2",
        **common,
    )

    def transposing(a: Any, b: Any) -> Any:
        dst = tile((4, 4), nl.float8_e4m3, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True, perf_mode=nisa.matmul_perf_mode.double_row)

    refused(
        transposing, pair, pair, operand="perf_mode", rule="transpose", received="double_row", allowed="none", **common
    )

    def named(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), perf_mode="double_row")

    refused(
        named,
        small(4, 4),
        small(4, 4),
        operand="perf_mode",
        rule="type",
        received="'double_row'",
        allowed="matmul_perf_mode",
        **common,
    )


# -- transpose mode


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_transpose_mode_moves_bits(dtype: Any, target: str) -> None:
    def kernel(a: Any, eye: Any) -> Any:
        dst = tile((a.shape[1], a.shape[0]), a.dtype, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(eye), is_transpose=True)
        return out(dst)

    a = normal(24, 40, dtype=dtype)
    a[3, 5], a[4, 6], a[5, 7] = np.nan, np.inf, -0.0
    unsigned = np.dtype(f"u{a.itemsize}")
    a.view(unsigned)[7, 8] |= unsigned.type(np.float32(np.nan).astype(dtype).view(unsigned) | 5)
    got = run(kernel, a, np.eye(24, dtype=dtype), target=target)
    assert got.dtype == a.dtype
    assert np.array_equal(got.view(unsigned), a.view(unsigned).T)


def test_is_transpose_is_a_label_on_trn1() -> None:
    def kernel(a: Any, eye: Any) -> Any:
        dst = result(a, eye)
        nisa.nc_matmul(dst, sb(a), sb(eye), is_transpose=True)
        return out(dst)

    a = normal(8, 6, dtype=BF16)
    a[2, 3] = np.nan
    got = run(kernel, a, np.eye(8, dtype=BF16), target="trn1")
    assert got.dtype == np.float32
    assert np.isnan(got[3]).all()
    rest = [0, 1, 2, 4, 5]
    assert np.array_equal(got[rest], a.astype(np.float32).T[rest])
    b = small(8, 5, dtype=BF16)
    assert np.array_equal(run(kernel, b, b, target="trn1"), exact(b, b))


def test_transpose_mode_rules() -> None:
    common = {"instruction": "nc_matmul"}

    def kernel(a: Any, b: Any) -> Any:
        dst = tile((a.shape[1], b.shape[1]), a.dtype, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True)

    eye = np.eye(8, dtype=BF16)
    a = normal(8, 6, dtype=BF16)
    twice = 2 * eye
    refused(
        kernel,
        a,
        twice,
        operand="moving",
        rule="transpose mode",
        received="another",
        allowed="the identity [8, 8]",
        **common,
    )
    part = np.ascontiguousarray(eye[:, :7])
    refused(
        kernel,
        a,
        part,
        operand="moving",
        rule="transpose mode",
        received="[8, 7]",
        allowed="the identity [8, 8]",
        **common,
    )
    bytes_ = small(8, 6, dtype=E4M3)
    refused(
        kernel,
        bytes_,
        eye,
        operand="stationary",
        rule="dtype in transpose mode",
        received="float8_e4m3",
        allowed="2 or 4 bytes",
        **common,
    )

    def widening(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), is_transpose=True)

    refused(widening, a, eye, operand="dst", rule="dtype", received="float32", allowed="bfloat16", **common)

    def accumulating(a: Any, b: Any) -> Any:
        dst = tile((6, 8), a.dtype, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True, accumulate=False)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True, accumulate=False)
        nisa.nc_matmul(dst, sb(a), sb(b), is_transpose=True)

    refused(
        accumulating,
        a,
        eye,
        operand="accumulate",
        rule="transpose mode",
        received="None where a matmul wrote before",
        allowed="False",
        **common,
    )

    def flagged(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), is_transpose=1)

    refused(flagged, a, eye, operand="is_transpose", rule="type", received="1", allowed="True or False", **common)


# -- tiles of the array


@pytest.mark.parametrize(
    ("rows", "start", "target"), [(32, 96, "trn2"), (64, 64, "trn1"), (32, 32, "trn3"), (128, 0, "trn1")]
)
def test_row_tiles(rows: int, start: int, target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 12), buffer=nl.psum)
        k = slice(start, start + rows)
        nisa.nc_matmul(dst, sb(a)[k], sb(b)[k], tile_position=(start, 0), tile_size=[rows, 128])
        return out(dst)

    a, b = small(128, 8), small(128, 12, seed=1)
    k = slice(start, start + rows)
    assert np.array_equal(run(kernel, a, b, target=target), exact(a[k], b[k]))


def test_a_tensor_without_address_stands_on_the_rows_of_the_tile() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = result(a, b)
        nisa.nc_matmul(dst, sb(a), sb(b), tile_position=(64, 0), tile_size=(32, 128))
        return out(dst)

    a, b = small(32, 8), small(32, 12, seed=1)
    assert np.array_equal(run(kernel, a, b), exact(a, b))


@pytest.mark.parametrize(
    ("options", "operand", "rule", "received", "allowed", "target"),
    [
        ({"tile_size": (64, 128)}, "tile_position", "tiling mode", "not set", "both", "trn2"),
        ({"tile_position": (0, 0)}, "tile_size", "tiling mode", "not set", "both", "trn2"),
        ({"tile_position": (0, 0), "tile_size": (32, 128)}, "tile_size", "row size", "32", "64, 128 on trn1", "trn1"),
        ({"tile_position": (0, 0), "tile_size": (96, 128)}, "tile_size", "row size", "96", "32, 64, 128", "trn2"),
        ({"tile_position": (0, 0), "tile_size": (64, 64)}, "tile_size", "column size", "64", "128", "trn2"),
        ({"tile_position": (0, 32), "tile_size": (64, 128)}, "tile_position", "start column", "32", "0", "trn2"),
        ({"tile_position": (32, 0), "tile_size": (64, 128)}, "tile_position", "start row", "32", "0, 64", "trn2"),
        ({"tile_position": (128, 0), "tile_size": (64, 128)}, "tile_position", "start row", "128", "0, 64", "trn2"),
        ({"tile_position": (-64, 0), "tile_size": (64, 128)}, "tile_position", "start row", "-64", "0, 64", "trn2"),
        ({"tile_position": (0, 0), "tile_size": (32, 128)}, "stationary", "partitions", "48", "1..32", "trn2"),
        ({"tile_position": 0, "tile_size": (64, 128)}, "tile_position", "type", "0", "two integers", "trn2"),
        ({"tile_position": (0, 0), "tile_size": (64, 128.0)}, "tile_size", "type", "(64, 128.0)", "two int", "trn2"),
    ],
)
def test_tiling_rules(
    options: dict[str, Any], operand: str, rule: str, received: str, allowed: str, target: str
) -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), **options)

    refused(
        kernel,
        small(48, 8),
        small(48, 12),
        instruction="nc_matmul",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target=target,
    )


def test_operands_feed_the_rows_of_the_tile() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 12), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a)[0:64], sb(b)[0:64], tile_position=(64, 0), tile_size=(64, 128))

    refused(
        kernel,
        small(128, 8),
        small(128, 12),
        instruction="nc_matmul",
        operand="tile_position",
        rule="rows of the tile",
        received="64..127, operands in partitions 0..63",
        allowed="64..127",
    )


def test_stationary_and_moving_stand_on_the_same_partitions() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 12), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a)[0:32], sb(b)[32:64])

    refused(
        kernel,
        small(128, 8),
        small(128, 12),
        instruction="nc_matmul",
        operand="moving",
        rule="start partition",
        received="32",
        allowed="0, that of stationary",
    )

    def placed(a: Any, b: Any) -> Any:
        moving = nl.ndarray(b.shape, b.dtype, address=(64, 0))
        nisa.dma_copy(dst=moving, src=b)
        dst = tile((8, 12), buffer=nl.psum)
        stationary = sb(a)
        nisa.nc_matmul(dst, stationary, moving)
        return out(dst)

    a, b = small(32, 8), small(32, 12, seed=1)
    # A stationary tensor of one quadrant can be put next to the placed moving tensor, one of 128 partitions cannot.
    assert np.array_equal(run(placed, a, b), exact(a, b))


def gather_index(index: np.ndarray, partitions: int, columns: int) -> np.ndarray:
    """The columns of each partition under `.indirect` on the Tensor Engine, spelled out."""
    result = np.zeros((partitions, columns), np.int64)
    for p in range(partitions):
        first = p - p % 32
        height = min(32, partitions - first)
        for i in range(columns):
            result[p, i] = index[first + i % height, i // height]
    return result


# -- indirection


def test_gathered_operands_and_a_scattered_result() -> None:
    def kernel(a: Any, b: Any, ia: Any, ib: Any, io: Any) -> Any:
        wide = tile((16, 10), nl.bfloat16, nl.psum)
        nisa.memset(wide, -1.0)
        stationary, moving = sb(a).indirect(sb(ia), 16), sb(b).indirect(sb(ib), 5)
        dst = wide.indirect(sb(io), 5)
        nisa.nc_matmul(dst, stationary, moving)
        nisa.nc_matmul(dst, stationary, moving)
        return out(wide)

    a, b = small(64, 24, dtype=BF16), small(64, 7, seed=1, dtype=BF16)
    ia = integers(64, 1, low=0, high=24)
    ib = integers(64, 1, low=0, high=7, seed=1)
    io = np.zeros((16, 1), np.int32)
    io[:5, 0] = [9, 2, 4, 0, 7]
    got = run(kernel, a, b, ia, ib, io, target="trn3").astype(np.float32)
    left = np.take_along_axis(a, gather_index(ia, 64, 16), 1)
    right = np.take_along_axis(b, gather_index(ib, 64, 5), 1)
    want = np.full((16, 10), -1.0, np.float32)
    once = exact(left, right).astype(BF16).astype(np.float32)
    want[:, [9, 2, 4, 0, 7]] = (once + exact(left, right)).astype(BF16)
    assert np.array_equal(got, want)


def test_indirection_rules() -> None:
    common = {"instruction": "nc_matmul", "target": "trn3"}
    a, wide, index = small(32, 8, dtype=BF16), small(32, 8), np.zeros((32, 1), np.int32)

    def gathering(a: Any, index: Any) -> Any:
        nisa.nc_matmul(tile((8, 4), buffer=nl.psum), sb(a), sb(a).indirect(sb(index), 4))

    refused(
        gathering, wide, index, operand="moving", rule="dtype of an", received="float32", allowed="bfloat16", **common
    )
    refused(
        gathering,
        a,
        index,
        instruction="nc_matmul",
        operand="moving",
        rule="tensor indirection",
        received="trn2",
        allowed="v4",
        target="trn2",
    )

    square = small(32, 32, dtype=BF16)

    def scattering(a: Any, b: Any, index: Any) -> Any:
        dst = tile((32, 8), buffer=nl.psum).indirect(sb(index), 8)
        nisa.nc_matmul(dst, sb(a), sb(b))

    refused(
        scattering,
        square,
        a,
        index,
        operand="dst",
        rule="dtype of an",
        received="float32",
        allowed="bfloat16",
        **common,
    )

    def tiled(a: Any, index: Any) -> Any:
        moving = sb(a).indirect(sb(index), 4)
        options = {"tile_position": (32, 0), "tile_size": (32, 128)}
        nisa.nc_matmul(tile((8, 4), buffer=nl.psum), sb(a), moving, **options)

    refused(tiled, a, index, operand="tile_position", rule="indirect", received="(32, 0)", allowed="(0, 0)", **common)

    def transposing(a: Any, index: Any) -> Any:
        nisa.nc_matmul(tile((8, 4), nl.bfloat16, nl.psum), sb(a), sb(a).indirect(sb(index), 4), is_transpose=True)

    refused(
        transposing,
        a,
        index,
        operand="moving",
        rule="indirection in transpose",
        received="indirect",
        allowed="ordinary",
        **common,
    )

    def twice(a: Any, b: Any, index: Any) -> Any:
        dst = tile((32, 8), nl.bfloat16, nl.psum).indirect(sb(index), 8)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=True)

    refused(
        twice,
        square,
        a,
        index,
        operand="dst",
        rule="columns while accumulating",
        received="twice",
        allowed="distinct",
        **common,
    )

    def undefined(a: Any, b: Any, index: Any) -> Any:
        dst = tile((32, 8), nl.bfloat16, nl.psum).indirect(sb(index), 8)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=True)

    refused(
        undefined,
        square,
        a,
        index,
        operand="accumulate",
        rule="uninitialized PSUM",
        received="256 of 256",
        allowed="False",
        **common,
    )


@pytest.mark.parametrize("operand", ["dst", "moving"])
def test_indices_stand_where_their_operand_does(operand: str) -> None:
    def kernel(a: Any, b: Any, index: Any) -> Any:
        i = nl.ndarray(index.shape, index.dtype, address=(32, 0))
        nisa.dma_copy(dst=i, src=index)
        x = nl.ndarray(a.shape, a.dtype, address=(64, 64))
        y = nl.ndarray(b.shape, b.dtype, address=(64, 256))
        nisa.dma_copy(dst=x, src=a)
        nisa.dma_copy(dst=y, src=b)
        dst = tile((32, 8), nl.bfloat16, nl.psum)
        if operand == "dst":
            nisa.nc_matmul(dst.indirect(i, 8), x, y)
        else:
            nisa.nc_matmul(dst, x, y.indirect(i, 8))

    refused(
        kernel,
        small(32, 32, dtype=BF16),
        small(32, 8, dtype=BF16),
        np.zeros((32, 1), np.int32),
        instruction="nc_matmul",
        operand=operand,
        rule="start partition of the index",
        received="32",
        allowed="64, that of " + ("stationary" if operand == "dst" else "moving"),
        target="trn3",
    )
