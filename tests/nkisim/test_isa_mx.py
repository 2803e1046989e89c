"""quantize_mx and nc_matmul_mx: packing, scales and their places, limits, records."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.harness import integers, normal, out, ps, refused, run, sb, tile, traced

BF16 = ml_dtypes.bfloat16
E4M3, E5M2, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn
PACKED = {E4M3: nl.float8_e4m3fn_x4, E5M2: nl.float8_e5m2_x4, E2M1: nl.float4_e2m1fn_x4}


def codes(*shape: int, dtype: Any, seed: int = 0) -> np.ndarray:
    """Random finite values of a small float type, [partitions, columns, 4]."""
    n = 16 if dtype is E2M1 else 256
    every = np.arange(n, dtype=np.uint8).view(dtype)
    finite = every[np.isfinite(every.astype(np.float32))]
    return np.random.default_rng(seed).choice(finite, (*shape, 4))


def pack(values: np.ndarray) -> np.ndarray:
    """[P, N, 4] small floats as the integers that carry an x4 tensor, spelled out bit by bit."""
    raw = values.view(np.uint8).astype(np.uint32)
    width = 4 if values.dtype == E2M1 else 8
    total = raw[..., 0] | raw[..., 1] << width | raw[..., 2] << 2 * width | raw[..., 3] << 3 * width
    return total.astype(np.uint16 if width == 4 else np.uint32)


def scale_bytes(groups: int, n: int, seed: int = 0) -> np.ndarray:
    return integers(groups, n, low=120, high=134, seed=seed, dtype=np.uint8)


def spread(scales: np.ndarray, partitions: int, start: int = 0, fill: int = 0) -> np.ndarray:
    """Scales [groups, n] over the quadrants of [partitions, n], four rows each from `start`."""
    tall = np.full((partitions, scales.shape[1]), fill, np.uint8)
    for g in range(scales.shape[0]):
        tall[g // 4 * 32 + start + g % 4] = scales[g]
    return tall


def dequantized(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[P, N, 4] values times 2**(scale - 127) of their group, float64."""
    factors = 2.0 ** (np.repeat(scales, 8, axis=0).astype(np.float64) - 127)
    return values.astype(np.float64) * factors[:, :, np.newaxis]


def expected(a: np.ndarray, sa: np.ndarray, b: np.ndarray, sb_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the sum of the magnitudes."""
    x, y = dequantized(a, sa), dequantized(b, sb_)
    return np.einsum("kmi,kni->mn", x, y), np.einsum("kmi,kni->mn", np.abs(x), np.abs(y))


def multiply(kinds: Any, **options: Any) -> Any:
    """A kernel: one nc_matmul_mx of packed tensors that HBM holds as integers."""

    def kernel(a: Any, scale_a: Any, b: Any, scale_b: Any) -> Any:
        dst = tile((a.shape[1], b.shape[1]), options.get("dtype", nl.float32), nl.psum)
        nisa.nc_matmul_mx(
            dst,
            sb(a).view(PACKED[kinds[0]]),
            sb(b).view(PACKED[kinds[1]]),
            sb(scale_a).view(options.get("scale_type", nl.uint8)),
            sb(scale_b),
            options.get("tile_position"),
            options.get("tile_size"),
        )
        return out(dst)

    return kernel


# ---------------------------------------------------------------------------------------------------
# nc_matmul_mx


@pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E5M2, E5M2), (E2M1, E2M1), (E2M1, E5M2), (E4M3, E2M1)])
@pytest.mark.parametrize("partitions", [32, 64, 96, 128])
def test_product_of_scaled_values(partitions: int, kinds: Any) -> None:
    a, b = codes(partitions, 6, dtype=kinds[0]), codes(partitions, 10, dtype=kinds[1], seed=1)
    sa, sm = scale_bytes(partitions // 8, 6), scale_bytes(partitions // 8, 10, seed=1)
    args = pack(a), spread(sa, partitions), pack(b), spread(sm, partitions)
    got = run(multiply(kinds), *args, target="trn3")
    want, bound = expected(a, sa, b, sm)
    assert got.dtype == np.float32
    assert (np.abs(got - want) <= bound * 2.0**-20).all()


def test_one_value_at_a_time_lands_where_packing_puts_it() -> None:
    # Value i of partition p meets value i of partition p only, under the scales of group p // 8.
    a = np.zeros((64, 2, 4), E4M3)
    a[41, 1, 2] = 3.0
    b = np.zeros((64, 3, 4), E4M3)
    b[41, 0, 2], b[41, 1, 1], b[40, 2, 2] = 0.5, 8.0, 8.0
    sa, sm = np.full((8, 2), 127, np.uint8), np.full((8, 3), 127, np.uint8)
    sa[5, 1], sm[5, 0] = 130, 125
    got = run(multiply((E4M3, E4M3)), pack(a), spread(sa, 64), pack(b), spread(sm, 64), target="trn3")
    want = np.zeros((2, 3), np.float32)
    want[1, 0] = 3.0 * 8 * 0.5 / 4
    assert np.array_equal(got, want)


def test_e8m0_scales_and_compact_scales_of_one_quadrant() -> None:
    a, b = codes(32, 4, dtype=E5M2), codes(32, 4, dtype=E5M2, seed=1)
    sa, sm = scale_bytes(4, 4), scale_bytes(4, 4, seed=1)
    compact = run(multiply((E5M2, E5M2), scale_type=nl.float8_e8m0fnu), pack(a), sa, pack(b), sm, target="trn3")
    oversize = run(multiply((E5M2, E5M2)), pack(a), spread(sa, 32, 0, 9), pack(b), spread(sm, 32), target="trn3")
    want, bound = expected(a, sa, b, sm)
    assert (np.abs(compact - want) <= bound * 2.0**-20).all()
    assert np.array_equal(compact, oversize)


def test_scale_255_is_nan_and_0_is_the_smallest() -> None:
    one = np.ones((32, 2, 4), E4M3)
    sa, sm = np.full((4, 2), 127, np.uint8), np.full((4, 2), 127, np.uint8)
    sa[0, 0], sm[:, 1] = 255, 0
    got = run(multiply((E4M3, E4M3)), pack(one), sa, pack(one), sm, target="trn3")
    assert np.isnan(got[0]).all()
    assert got[1].tolist() == [128.0, 128 * 2.0**-127]


def test_bfloat16_result_and_accumulation() -> None:
    def kernel(a: Any, scale_a: Any, b: Any, scale_b: Any) -> Any:
        x, y = sb(a).view(nl.float8_e4m3fn_x4), sb(b).view(nl.float8_e4m3fn_x4)
        s, t = sb(scale_a), sb(scale_b)
        dst = tile((2, 2), nl.bfloat16, nl.psum)
        wide = tile((2, 2), buffer=nl.psum)
        for i in range(3):
            nisa.nc_matmul_mx(dst, x, y, s, t, accumulate=i > 0)
            nisa.nc_matmul_mx(wide, x, y, s, t)
        nisa.nc_matmul_mx(wide, x, y, s, t, accumulate=False)
        return out(dst), out(wide)

    a = np.zeros((32, 2, 4), E4M3)
    a[0, :, 0], a[1, :, 1] = 16, 1
    ones = np.full((4, 2), 127, np.uint8)
    dst, wide = run(kernel, pack(a), ones, pack(a), ones, target="trn3")
    # 257 -> 256; 256 + 257 = 513 -> 512; 512 + 257 = 769 -> 768 in bfloat16 (ties to even, steps of 2 and 4).
    assert dst.astype(np.float32).tolist() == [[768.0] * 2] * 2
    assert wide.tolist() == [[257.0] * 2] * 2


def test_row_tiles_and_scales_in_the_same_quadrant() -> None:
    def kernel(a: Any, scale_a: Any, b: Any, scale_b: Any) -> Any:
        x, y = sb(a).view(nl.float8_e4m3fn_x4), sb(b).view(nl.float8_e4m3fn_x4)
        s, t = sb(scale_a), sb(scale_b)
        dst = tile((4, 4), buffer=nl.psum)
        for row in range(0, 128, 32):
            q = slice(row, row + 32)
            nisa.nc_matmul_mx(dst, x[q], y[q], s[q], t[row : row + 4], (row, 0), (32, 128))
        return out(dst)

    a, b = codes(128, 4, dtype=E4M3), codes(128, 4, dtype=E4M3, seed=1)
    sa, sm = scale_bytes(16, 4), scale_bytes(16, 4, seed=1)
    got = run(kernel, pack(a), spread(sa, 128), pack(b), spread(sm, 128), target="trn3")
    want, bound = expected(a, sa, b, sm)
    assert (np.abs(got - want) <= bound * 2.0**-20).all()


@pytest.mark.parametrize("start", [4, 8, 12])
def test_packed_scales_start_inside_the_quadrants(start: int) -> None:
    def kernel(a: Any, scale_a: Any, b: Any, scale_b: Any) -> Any:
        # Only the rows that hold scales are ever written.
        scales = tile((64, 6), nl.uint8)
        for q in (0, 32):
            nisa.dma_copy(dst=scales[q : q + 4, 0:4], src=scale_a[q : q + 4])
            nisa.dma_copy(dst=scales[q + start : q + start + 4], src=scale_b[q : q + 4])
        dst = tile((4, 6), buffer=nl.psum)
        x, y = sb(a).view(nl.float8_e4m3fn_x4), sb(b).view(nl.float8_e4m3fn_x4)
        nisa.nc_matmul_mx(dst, x, y, scales[:, 0:4], scales[start:])
        return out(dst)

    a, b = codes(64, 4, dtype=E4M3), codes(64, 6, dtype=E4M3, seed=1)
    sa, sm = scale_bytes(8, 4), scale_bytes(8, 6, seed=1)
    got = run(kernel, pack(a), spread(sa, 64), pack(b), spread(sm, 64), target="trn3")
    want, bound = expected(a, sa, b, sm)
    assert (np.abs(got - want) <= bound * 2.0**-20).all()


def test_views_flatten_their_free_dimensions() -> None:
    def kernel(a: Any, scale_a: Any, b: Any, scale_b: Any) -> Any:
        x, y = sb(a).view(nl.float8_e5m2_x4), sb(b).view(nl.float8_e5m2_x4)
        dst = tile((4, 2, 3), buffer=nl.psum)
        nisa.nc_matmul_mx(dst, x[:, ::2], y.reshape((32, 2, 3)), sb(scale_a)[:, ::2], sb(scale_b).reshape((32, 3, 2)))
        return out(dst)

    a, b = codes(32, 8, dtype=E5M2), codes(32, 6, dtype=E5M2, seed=1)
    sa, sm = scale_bytes(4, 8), scale_bytes(4, 6, seed=1)
    got = run(kernel, pack(a), spread(sa, 32), pack(b), spread(sm, 32), target="trn3")
    want, bound = expected(a[:, ::2], sa[:, ::2], b, sm)
    assert (np.abs(got.reshape(4, 6) - want) <= bound * 2.0**-20).all()


def test_gathered_pairs() -> None:
    def kernel(a: Any, scale_a: Any, b: Any, scale_b: Any, index: Any) -> Any:
        i = sb(index)
        x, y = sb(a).view(nl.float8_e4m3fn_x4), sb(b).view(nl.float8_e4m3fn_x4)
        scales = tile((64, 6), nl.uint8)
        for q in (0, 32):
            nisa.dma_copy(dst=scales[q : q + 4], src=scale_b[q : q + 4])
        dst = tile((4, 3), buffer=nl.psum)
        nisa.nc_matmul_mx(dst, x, y.indirect(i, 3), sb(scale_a), scales.indirect(i, 3))
        return out(dst)

    a, b = codes(64, 4, dtype=E4M3), codes(64, 6, dtype=E4M3, seed=1)
    sa, sm = scale_bytes(8, 4), scale_bytes(8, 6, seed=1)
    # Rows 0..31 gather columns 5, 1, 2 and rows 32..63 columns 3, 3, 0.
    index = np.zeros((64, 1), np.int32)
    index[0:3, 0], index[32:35, 0] = [5, 1, 2], [3, 3, 0]
    got = run(kernel, pack(a), spread(sa, 64), pack(b), spread(sm, 64), index, target="trn3")
    picked = np.concatenate([b[:32][:, [5, 1, 2]], b[32:][:, [3, 3, 0]]])
    scales = np.concatenate([sm[:4][:, [5, 1, 2]], sm[4:][:, [3, 3, 0]]])
    want, bound = expected(a, sa, picked, scales)
    assert (np.abs(got - want) <= bound * 2.0**-20).all()


def test_psum_is_filled_by_one_result() -> None:
    a, b = codes(32, 2, dtype=E2M1), codes(32, 4096, dtype=E2M1, seed=1)
    sa, sm = scale_bytes(4, 2), scale_bytes(4, 4096, seed=1)
    got = run(multiply((E2M1, E2M1)), pack(a), sa, pack(b), sm, target="trn3")
    want, bound = expected(a, sa, b, sm)
    assert (np.abs(got - want) <= bound * 2.0**-20).all()


RULES = [
    # stationary, moving, stationary_scale, moving_scale, dst, then what is refused
    ((48, 4), (48, 4), (48, 4), (48, 4), (4, 4), "stationary", "partitions", "48", "a multiple of 32"),
    ((32, 4), (64, 4), (32, 4), (64, 4), (4, 4), "moving", "partitions", "64", "32, those of stationary"),
    ((32, 5), (32, 4), (32, 5), (32, 4), (5, 4), "stationary", "free size", "5", "an even size up to 128"),
    ((32, 130), (32, 4), (32, 130), (32, 4), (128, 4), "stationary", "free size", "130", "an even size up to 128"),
    ((32, 4), (32, 4098), (32, 4), (32, 4098), (4, 4096), "moving", "free size", "4098", "1..4096"),
    ((32, 4), (32, 6), (32, 4), (32, 6), (6, 6), "dst", "partitions", "6", "4, the free size of stationary"),
    ((32, 4), (32, 6), (32, 4), (32, 6), (4, 4), "dst", "elements", "4", "6, the free size of moving"),
    ((64, 4), (64, 4), (8, 4), (64, 4), (4, 4), "stationary_scale", "partitions", "8", "at least 36"),
    ((128, 4), (128, 4), (128, 4), (99, 4), (4, 4), "moving_scale", "partitions", "99", "at least 100"),
    ((32, 4), (32, 4), (32, 6), (32, 4), (4, 4), "stationary_scale", "elements", "6", "4, one per x4 element"),
]


@pytest.mark.parametrize(("a", "b", "sa", "sm", "dst", "operand", "rule", "received", "allowed"), RULES)
def test_shape_rules(
    a: Any, b: Any, sa: Any, sm: Any, dst: Any, operand: str, rule: str, received: str, allowed: str
) -> None:
    def kernel() -> Any:
        x, y = tile(a, nl.float8_e4m3fn_x4), tile(b, nl.float8_e4m3fn_x4)
        nisa.nc_matmul_mx(tile(dst, buffer=nl.psum), x, y, tile(sa, nl.uint8), tile(sm, nl.uint8))

    refused(
        kernel,
        instruction="nc_matmul_mx",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target="trn3",
    )


X4 = nl.float8_e4m3fn_x4


@pytest.mark.parametrize(
    ("types", "buffers", "operand", "rule", "received", "allowed"),
    [
        ((nl.float32, nl.float8_e4m3fn, X4, nl.uint8, nl.uint8), "psum", "stationary", "dtype", "float8_e4m3fn", "x4"),
        ((nl.float32, X4, nl.bfloat16, nl.uint8, nl.uint8), "psum", "moving", "dtype", "bfloat16", "x4"),
        ((nl.float16, X4, X4, nl.uint8, nl.uint8), "psum", "dst", "dtype", "float16", "float32, bfloat16"),
        ((nl.float32, X4, X4, nl.int8, nl.uint8), "psum", "stationary_scale", "dtype", "int8", "float8_e8m0fnu, uint8"),
        ((nl.float32, X4, X4, nl.uint8, nl.float32), "psum", "moving_scale", "dtype", "float32", "uint8"),
        ((nl.float32, X4, X4, nl.uint8, nl.uint8), "sbuf", "dst", "buffer", "sbuf", "psum"),
    ],
)
def test_types_and_memories(types: Any, buffers: str, operand: str, rule: str, received: str, allowed: str) -> None:
    def kernel() -> Any:
        dst, a, b, sa, sm = types
        nisa.nc_matmul_mx(
            tile((4, 4), dst, getattr(nl, buffers)),
            tile((32, 4), a),
            tile((32, 4), b),
            tile((4, 4), sa),
            tile((4, 4), sm),
        )

    refused(
        kernel,
        instruction="nc_matmul_mx",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target="trn3",
    )


def test_operands_come_from_sbuf() -> None:
    def kernel(which: str) -> Any:
        def body() -> Any:
            kinds = {"stationary": X4, "moving": X4, "stationary_scale": nl.uint8, "moving_scale": nl.uint8}
            tiles = {k: tile((32, 4), t, nl.psum if k == which else nl.sbuf) for k, t in kinds.items()}
            nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), **tiles)

        return body

    for which in ("stationary", "moving", "stationary_scale", "moving_scale"):
        refused(
            kernel(which),
            instruction="nc_matmul_mx",
            operand=which,
            rule="buffer",
            received="psum",
            allowed="sbuf",
            target="trn3",
        )


def test_both_instructions_need_trn3() -> None:
    def multiplying() -> Any:
        nisa.nc_matmul_mx(None, None, None, None, None)

    def quantizing() -> Any:
        nisa.quantize_mx(None, None, None)

    for target in ("trn1", "trn2"):
        refused(multiplying, instruction="nc_matmul_mx", rule="target", received=target, allowed="v4", target=target)
        refused(quantizing, instruction="quantize_mx", rule="target", received=target, allowed="v4", target=target)


def test_places_of_scales() -> None:
    common = {"instruction": "nc_matmul_mx", "target": "trn3"}

    def odd_start() -> Any:
        a = tile((32, 4), X4)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a, tile((32, 4), nl.uint8), tile((32, 4), nl.uint8)[2:])

    refused(
        odd_start,
        operand="moving_scale",
        rule="start partition in its quadrant",
        received="2",
        allowed="0, 4, 8, 12",
        **common,
    )

    def late_start() -> Any:
        a = tile((32, 4), X4)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a, tile((32, 4), nl.uint8)[16:], tile((32, 4), nl.uint8))

    refused(
        late_start,
        operand="stationary_scale",
        rule="start partition in its quadrant",
        received="16",
        allowed="0, 4, 8, 12",
        **common,
    )

    def other_quadrant() -> Any:
        a, scales = tile((128, 4), X4)[32:64], tile((128, 4), nl.uint8)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a, scales[32:36], scales[0:4])

    refused(
        other_quadrant, operand="moving_scale", rule="quadrant", received="0", allowed="1, that of moving", **common
    )

    def placed_elsewhere() -> Any:
        a = nl.ndarray((32, 4), X4, address=(64, 0))
        scales = nl.ndarray((4, 4), nl.uint8, address=(32, 512))
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a, scales, scales)

    refused(
        placed_elsewhere,
        operand="stationary_scale",
        rule="quadrant",
        received="1",
        allowed="2, that of stationary",
        **common,
    )


def test_unwritten_scales_are_refused() -> None:
    def kernel(a: Any, scale: Any) -> Any:
        scales = tile((64, 2), nl.uint8)
        nisa.dma_copy(dst=scales[0:4], src=scale)
        x = sb(a).view(X4)
        nisa.nc_matmul_mx(tile((2, 2), buffer=nl.psum), x, x, scales, scales)

    refused(
        kernel,
        pack(codes(64, 2, dtype=E4M3)),
        scale_bytes(4, 2),
        instruction="nc_matmul_mx",
        operand="stationary_scale",
        rule="uninitialized read",
        received="8 of 8",
        allowed="written before",
        target="trn3",
    )


def test_tiling_and_rows() -> None:
    common = {"instruction": "nc_matmul_mx", "target": "trn3"}

    def columns() -> Any:
        a, s = tile((32, 4), X4), tile((4, 4), nl.uint8)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a, s, s, tile_position=(0, 0), tile_size=(32, 64))

    refused(columns, operand="tile_size", rule="column size", received="64", allowed="128", **common)

    def alone() -> Any:
        a, s = tile((32, 4), X4), tile((4, 4), nl.uint8)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a, s, s, tile_position=(0, 0))

    refused(alone, operand="tile_size", rule="tiling mode", received="not set", allowed="both", **common)

    def other_rows() -> Any:
        a, s = tile((128, 4), X4)[32:64], tile((128, 4), nl.uint8)[32:64]
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a, s, s, (0, 0), (32, 128))

    refused(
        other_rows,
        operand="tile_position",
        rule="rows",
        received="operands in partitions 32..63",
        allowed="0..31",
        **common,
    )

    def apart() -> Any:
        a, s = tile((128, 4), X4), tile((128, 4), nl.uint8)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a[0:32], a[32:64], s[0:32], s[32:64])

    refused(apart, operand="moving", rule="start partition", received="32", allowed="0, that of stationary", **common)


def test_pairs_agree_on_indirection() -> None:
    common = {"instruction": "nc_matmul_mx", "target": "trn3"}
    index = np.zeros((32, 1), np.int32)

    def half(index: Any) -> Any:
        a, s = tile((32, 4), X4), tile((32, 4), nl.uint8)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a.indirect(sb(index), 4), s, s)

    refused(half, index, operand="moving_scale", rule="indirection", received="ordinary", allowed="both", **common)

    def other_half(index: Any) -> Any:
        a, s = tile((32, 4), X4), tile((32, 4), nl.uint8)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a, s.indirect(sb(index), 4), s)

    refused(other_half, index, operand="stationary", rule="indirection", received="ordinary", allowed="both", **common)

    def two_indices(index: Any) -> Any:
        a, s = tile((32, 4), X4), tile((32, 4), nl.uint8)
        i, j = sb(index), sb(index)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, a.indirect(i, 4), s, s.indirect(j, 4))

    refused(two_indices, index, operand="moving_scale", rule="index", received="t", allowed="index of moving", **common)

    def tiled(index: Any) -> Any:
        a, s, i = tile((32, 4), X4), tile((32, 4), nl.uint8), sb(index)
        moving, scale = a.indirect(i, 4), s.indirect(i, 4)
        nisa.nc_matmul_mx(tile((4, 4), buffer=nl.psum), a, moving, s, scale, (32, 0), (32, 128))

    refused(tiled, index, operand="tile_position", rule="indirect", received="(32, 0)", allowed="(0, 0)", **common)


# ---------------------------------------------------------------------------------------------------
# quantize_mx


def quantize(dtype: Any, scale_type: Any = nl.uint8) -> Any:
    """A kernel: the packed values and the scales of an HBM tensor, as integers."""

    def kernel(x: Any) -> Any:
        dst = tile((x.shape[0], x.shape[1] // 4), PACKED[dtype])
        scales = tile((x.shape[0], x.shape[1] // 4), scale_type)
        nisa.memset(scales.view(nl.uint8), 77)
        nisa.quantize_mx(dst, sb(x), scales)
        return out(dst.view(nl.uint32)), out(scales.view(nl.uint8))

    return kernel


def quantized(x: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The documented formula group by group, in float64."""
    exponent = {E4M3: 8, E5M2: 15}[dtype]
    partitions, n = x.shape[0], x.shape[1] // 4
    values = np.zeros((partitions, n, 4), dtype)
    scales = np.zeros((partitions // 8, n), np.uint8)
    for g in range(partitions // 8):
        for j in range(n):
            group = x[g * 8 : g * 8 + 8, j * 4 : j * 4 + 4].astype(np.float64)
            largest = np.abs(group).max()
            power = np.floor(np.log2(largest)) - (exponent - 1) if largest else -127.0
            power = max(power, -127.0)
            scales[g, j] = power + 127
            values[g * 8 : g * 8 + 8, j] = (group / 2.0**power).astype(dtype)
    return pack(values), scales


@pytest.mark.parametrize("scale_type", [nl.uint8, nl.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("source", [BF16, np.float16])
@pytest.mark.parametrize("partitions", [32, 128])
def test_quantization(partitions: int, source: Any, dtype: Any, scale_type: Any) -> None:
    spread_out = 2.0 ** integers(partitions, 24, low=-12, high=8, seed=1)
    x = (normal(partitions, 24) * spread_out).astype(source)
    x[0:8, 0:4] = 0
    packed, scales = quantized(x, dtype)
    got, placed = run(quantize(dtype, scale_type), x, target="trn3")
    assert np.array_equal(got, packed)
    assert np.array_equal(placed, spread(scales, partitions, fill=77))


def test_scales_by_hand() -> None:
    x = np.zeros((32, 16), BF16)
    x[0, 0], x[9, 5], x[16, 8], x[24, 12] = -1.0, 448.0, 2.0**-126, 1.9921875
    got, scales = run(quantize(E4M3), x, target="trn3")
    # floor(log2) - 7 + 127; a zero group and one too small both take the least scale, 2**-127.
    assert [scales[0, 0], scales[1, 1], scales[2, 2], scales[3, 3], scales[0, 1]] == [120, 128, 0, 120, 0]
    values = got.view(np.uint8).view(E4M3).reshape(32, 4, 4).astype(np.float32)
    assert values[0, 0, 0] == -128.0
    assert values[9, 1, 1] == 448.0 / 2
    assert values[16, 2, 0] == 2.0
    # 255 / 2**7 lies between 240 and 256 and rounds up, without saturation.
    assert values[24, 3, 0] == 256.0


def test_no_finite_value_saturates() -> None:
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(BF16)
    finite = every[np.isfinite(every.astype(np.float32))][: 2 * 32640].reshape(32, -1)[:, :2040]
    for dtype in (E4M3, E5M2):
        got, _ = run(quantize(dtype), np.ascontiguousarray(finite), target="trn3")
        assert np.isfinite(got.view(np.uint8).view(dtype).astype(np.float32)).all()


def test_infinity_and_nan_stay_in_their_elements() -> None:
    x = np.ones((32, 8), BF16)
    x[0, 0], x[8, 4] = np.inf, np.nan
    got, scales = run(quantize(E5M2), x, target="trn3")
    values = got.view(np.uint8).view(E5M2).reshape(32, 2, 4).astype(np.float32)
    assert values[0, 0, 0] == np.inf
    assert np.isnan(values[8, 1, 0])
    assert np.isfinite(values).sum() == values.size - 2
    assert scales[0, 0] == scales[1, 1] == 255 - 14


def test_quantized_tiles_feed_the_matmul() -> None:
    def kernel(a: Any, b: Any) -> Any:
        scales = tile((64, 12), nl.uint8)
        x, y = tile((64, 8), X4), tile((64, 12), X4)
        nisa.quantize_mx(x, sb(a).reshape((64, 2, 16)), scales[0:, 0:8])
        nisa.quantize_mx(y.reshape((64, 3, 4)), sb(b), scales[4:])
        dst = tile((8, 12), buffer=nl.psum)
        nisa.nc_matmul_mx(dst, x, y, scales[0:, 0:8], scales[4:])
        return out(dst)

    a, b = normal(64, 32, dtype=BF16), normal(64, 48, seed=1, dtype=BF16)
    got = run(kernel, a, b, target="trn3")
    want = np.einsum("kmi,kni->mn", a.astype(np.float64).reshape(64, 8, 4), b.astype(np.float64).reshape(64, 12, 4))
    # Three mantissa bits: relative error up to 2**-4 per factor, random over 256 products.
    assert np.abs(got - want).max() < 3.0
    assert np.abs(got - want).mean() < 0.7


def test_the_all_float32_mode_quantizes_as_well() -> None:
    x = normal(32, 8, dtype=BF16)
    packed, scales = quantized(x, E4M3)
    got, placed = run(quantize(E4M3), x, target="trn3", precise=False)
    assert np.array_equal(got, packed)
    assert np.array_equal(placed, spread(scales, 32, fill=77))


@pytest.mark.parametrize(
    ("src", "dst", "scale", "types", "operand", "rule", "received", "allowed"),
    [
        ((48, 8), (48, 2), (48, 2), None, "src", "partitions", "48", "a multiple of 32"),
        ((32, 10), (32, 2), (32, 2), None, "src", "elements per partition", "10", "a multiple of 4"),
        ((32, 8), (64, 2), (32, 2), None, "dst", "partitions", "64", "32, those of src"),
        ((32, 8), (32, 8), (32, 2), None, "dst", "elements per partition", "8", "2, a quarter"),
        ((64, 8), (64, 2), (8, 2), None, "dst_scale", "partitions", "8", "at least 36"),
        ((32, 8), (32, 2), (3, 2), None, "dst_scale", "partitions", "3", "at least 4"),
        ((32, 8), (32, 2), (32, 8), None, "dst_scale", "elements per partition", "8", "2, one per"),
        ((32, 8), (32, 2), (32, 2), (nl.float32, X4, nl.uint8), "src", "dtype", "float32", "float16, bfloat16"),
        (
            (32, 8),
            (32, 2),
            (32, 2),
            (nl.bfloat16, nl.float4_e2m1fn_x4, nl.uint8),
            "dst",
            "dtype",
            "float4",
            "float8_e5m2_x4",
        ),
        ((32, 8), (32, 2), (32, 2), (nl.bfloat16, X4, nl.float32), "dst_scale", "dtype", "float32", "uint8"),
    ],
)
def test_quantization_rules(
    src: Any, dst: Any, scale: Any, types: Any, operand: str, rule: str, received: str, allowed: str
) -> None:
    def kernel() -> Any:
        a, b, c = types or (nl.bfloat16, X4, nl.uint8)
        nisa.quantize_mx(tile(dst, b), tile(src, a), tile(scale, c))

    refused(
        kernel,
        instruction="quantize_mx",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
        target="trn3",
    )


def test_quantization_stays_in_sbuf() -> None:
    common = {"instruction": "quantize_mx", "target": "trn3", "rule": "buffer", "received": "psum", "allowed": "sbuf"}

    def from_psum(x: Any) -> Any:
        nisa.quantize_mx(tile((32, 2), X4), ps(x), tile((4, 2), nl.uint8))

    def to_psum(x: Any) -> Any:
        nisa.quantize_mx(tile((32, 2), X4, nl.psum), sb(x), tile((4, 2), nl.uint8))

    def scales_to_psum(x: Any) -> Any:
        nisa.quantize_mx(tile((32, 2), X4), sb(x), tile((4, 2), nl.uint8, nl.psum))

    x = normal(32, 8, dtype=BF16)
    refused(from_psum, x, operand="src", **common)
    refused(to_psum, x, operand="dst", **common)
    refused(scales_to_psum, x, operand="dst_scale", **common)

    def elsewhere(x: Any) -> Any:
        scales = tile((128, 2), nl.uint8)
        nisa.quantize_mx(tile((32, 2), X4), sb(x)[32:64], scales[0:4])

    refused(
        elsewhere,
        normal(128, 8, dtype=BF16),
        instruction="quantize_mx",
        operand="dst_scale",
        rule="quadrant",
        received="0",
        allowed="1, that of src",
        target="trn3",
    )


# ---------------------------------------------------------------------------------------------------
# Records


def test_records() -> None:
    def kernel(x: Any) -> Any:
        q, s = tile((64, 2), X4), tile((64, 2), nl.uint8)
        nisa.quantize_mx(q, sb(x), s, name="quantize")
        nisa.nc_matmul_mx(tile((2, 2), buffer=nl.psum), q, q, s, s, name="multiply")

    trace = traced(kernel, normal(64, 8, dtype=BF16), target="trn3")
    first, second = [r for r in trace.records if r.engine is not Engine.dma]
    assert (first.instruction, first.engine, first.name, first.attrs) == ("quantize_mx", Engine.vector, "quantize", {})
    assert [a.operand for a in first.writes] == ["dst", "dst_scale", "dst_scale"]
    assert [(a.operand, a.shape) for a in first.reads] == [("src", (64, 8))]
    assert (second.instruction, second.engine, second.name) == ("nc_matmul_mx", Engine.tensor, "multiply")
    assert second.attrs == {
        "k": 256,
        "m": 2,
        "n": 2,
        "accumulate": False,
        "tile_position": (0, 0),
        "tile_size": (128, 128),
    }
    assert {a.operand for a in second.reads} == {"stationary", "moving", "stationary_scale", "moving_scale"}
    scales = [a for a in second.reads if a.operand == "moving_scale"]
    assert [(a.shape, a.offset) for a in scales] == [((4, 2), 0), ((4, 2), 64)]
    assert [a.operand for a in second.writes] == ["dst"]
