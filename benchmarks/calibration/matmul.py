"""lhsT.T @ rhs in the four versions of AWS's matrix multiplication tutorials.

Written from their description: the same tiles, the same order of loads, products and stores. PSUM results
leave through the Vector Engine. Sizes are those of the tutorials, [4096, 8192] @ [8192, 8192]; as every version
repeats one unit of work, few units are simulated and the rest is extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.calibration._model import extrapolated, modelled, zeros
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.latency import Estimate

M, K, N = 4096, 8192, 8192
P = 128  # partitions, and columns of the stationary tile
F = 512  # columns of the moving tile


def _load(x: Any, dge_mode: Any) -> Any:
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x, dge_mode=dge_mode)
    return tile


def _at(i: int, size: int) -> slice:
    return slice(i * size, (i + 1) * size)


def _product(tiles: Any) -> Any:
    """The PSUM sum of pairs (stationary, moving)."""
    result = nl.ndarray((P, F), dtype=nl.float32, buffer=nl.psum)
    for i, (stationary, moving) in enumerate(tiles):
        nisa.nc_matmul(dst=result, stationary=stationary, moving=moving, accumulate=i > 0)
    return result


def _store(out: Any, psum: Any, dge_mode: Any) -> None:
    tile = nl.ndarray(psum.shape, dtype=out.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=tile, src=psum)
    nisa.dma_copy(dst=out, src=tile, dge_mode=dge_mode)


def _output(lhsT: Any, rhs: Any) -> Any:
    return nl.ndarray((lhsT.shape[1], rhs.shape[1]), dtype=lhsT.dtype, buffer=nl.shared_hbm)


def tiled(lhsT, rhs, dge_mode=nisa.dge_mode.unknown):
    """Both tiles of every product are loaded for it."""
    out = _output(lhsT, rhs)
    for m in range(lhsT.shape[1] // P):
        for n in range(rhs.shape[1] // F):
            pairs = (
                (_load(lhsT[_at(k, P), _at(m, P)], dge_mode), _load(rhs[_at(k, P), _at(n, F)], dge_mode))
                for k in range(lhsT.shape[0] // P)
            )
            _store(out[_at(m, P), _at(n, F)], _product(pairs), dge_mode)
    return out


def hoisted(lhsT, rhs, dge_mode=nisa.dge_mode.unknown):
    """A row of lhs tiles stays for all columns of rhs."""
    out = _output(lhsT, rhs)
    n_k = lhsT.shape[0] // P
    for m in range(lhsT.shape[1] // P):
        left = [_load(lhsT[_at(k, P), _at(m, P)], dge_mode) for k in range(n_k)]
        for n in range(rhs.shape[1] // F):
            right = [_load(rhs[_at(k, P), _at(n, F)], dge_mode) for k in range(n_k)]
            _store(out[_at(m, P), _at(n, F)], _product(zip(left, right, strict=True)), dge_mode)
    return out


def blocked(lhsT, rhs, dge_mode=nisa.dge_mode.unknown):
    """Two rows of lhs tiles and two columns of rhs tiles give four results.

    Where both columns of rhs and both rows of lhs overflow SBUF, as in float32, the tiles of rhs are loaded
    again for the second row: the profile of that version shows the same bytes moved as `hoisted`.
    """
    out = _output(lhsT, rhs)
    n_k = lhsT.shape[0] // P
    fits = lhsT.dtype != nl.float32
    for m in range(lhsT.shape[1] // (2 * P)):
        left = [[_load(lhsT[_at(k, P), _at(2 * m + b, P)], dge_mode) for k in range(n_k)] for b in range(2)]
        for n in range(rhs.shape[1] // (2 * F)):
            columns: list[Any] = []
            if fits:
                columns = [[_load(rhs[_at(k, P), _at(2 * n + b, F)], dge_mode) for k in range(n_k)] for b in range(2)]
            for bm in range(2):
                for bn in range(2):
                    right = columns[bn] if fits else []
                    if not fits:
                        right = [_load(rhs[_at(k, P), _at(2 * n + bn, F)], dge_mode) for k in range(n_k)]
                    result = _product(zip(left[bm], right, strict=True))
                    _store(out[_at(2 * m + bm, P), _at(2 * n + bn, F)], result, dge_mode)
    return out


def blocked_all(lhsT, rhs, dge_mode=nisa.dge_mode.unknown):
    """All three dimensions in blocks; partial sums over K are added up in SBUF.

    The tutorials' blocks are 16 x 2 x 8 tiles. In float32 they overflow SBUF (228 KiB per partition), so half as
    many rows are taken there; loads of lhs then are half as long and twice as many.
    """
    out = _output(lhsT, rhs)
    tiles_m, tiles_n, tiles_k = (8 if lhsT.dtype == nl.float32 else 16), 2, 8
    blocks_m = lhsT.shape[1] // (P * tiles_m)
    for n in range(rhs.shape[1] // (F * tiles_n)):
        sums = [[[_zero(lhsT.dtype) for _ in range(tiles_n)] for _ in range(tiles_m)] for _ in range(blocks_m)]
        for k in range(lhsT.shape[0] // (P * tiles_k)):
            right = [_load(rhs[_at(tiles_k * k + b, P), _at(n, F * tiles_n)], dge_mode) for b in range(tiles_k)]
            for m in range(blocks_m):
                left = [_load(lhsT[_at(tiles_k * k + b, P), _at(m, P * tiles_m)], dge_mode) for b in range(tiles_k)]
                for bn in range(tiles_n):
                    for bm in range(tiles_m):
                        part = _product((left[b][:, _at(bm, P)], right[b][:, _at(bn, F)]) for b in range(tiles_k))
                        total = sums[m][bm][bn]
                        nisa.tensor_tensor(dst=total, data1=total, data2=part, op=nl.add)
        for m in range(blocks_m):
            for bm in range(tiles_m):
                packed = nl.ndarray((P, F * tiles_n), dtype=out.dtype, buffer=nl.sbuf)
                for bn in range(tiles_n):
                    nisa.tensor_copy(dst=packed[:, _at(bn, F)], src=sums[m][bm][bn])
                nisa.dma_copy(dst=out[_at(tiles_m * m + bm, P), _at(n, F * tiles_n)], src=packed, dge_mode=dge_mode)
    return out


def _zero(dtype: Any) -> Any:
    tile = nl.ndarray((P, F), dtype=dtype, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=0.0)
    return tile


# Per version: units of work of the whole problem, and lhsT's and rhs's columns of a run of `units` of them.
_UNITS: dict[Callable[..., Any], tuple[int, Callable[[int], tuple[int, int]]]] = {
    tiled: ((M // P) * (N // F), lambda units: (P, units * F)),
    hoisted: (M // P, lambda units: (units * P, N)),
    blocked: (M // (2 * P), lambda units: (units * 2 * P, N)),
    blocked_all: (N // (2 * F), lambda units: (M, units * 2 * F)),
}


# The trn2 profile has its 66,048 triggers on the GpSimd Engine; nothing is published of trn1's.
_DESCRIPTORS = {"trn1": nisa.dge_mode.unknown, "trn2": nisa.dge_mode.swdge}


def matmul(
    version: Callable[..., Any], dtype: Any, target: str, pick: Callable[[Estimate], float], few: int = 1, more: int = 2
) -> float:
    """`pick` of the whole problem's estimate."""
    all_, columns = _UNITS[version]

    def run(units: int) -> float:
        m, n = columns(units)
        args = zeros(K, m, dtype=dtype), zeros(K, n, dtype=dtype), _DESCRIPTORS[target]
        return pick(modelled(version, *args, target=target))

    return extrapolated(run, few, more, all_)
