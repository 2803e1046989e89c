"""The selective scan of AWS's fused Mamba tutorial, in its three versions.

Written from the tutorial's steps: exp(delta * A) on the Scalar Engine; (delta * u) * B, the scan, the product
with C and the sum over states on the Vector Engine. B and C have one row for all channels, which a matmul
with ones brings to all partitions. What the compiler made of the tutorial's source is read off its profiles:

- v1: 181 Vector Engine instructions, 149 us, for 32 pairs of state and channel tile: five products or sums of two
  SBUF tiles each and half of the 32 copies of B and C out of PSUM; the Scalar Engine makes the other half.
- v2: 3.07 us of the Vector Engine per pair, too little for five: delta * u has left the loop over states, and B and
  C are read from PSUM.
- v3: v2 in pieces of 512 steps, the last state of each handed to the next.
"""

from __future__ import annotations

from typing import Any

from benchmarks.calibration._model import extrapolated, modelled, zeros
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.latency import Estimate

P = 128
PIECE = 512  # steps; the free size of one matmul
STATES = 16


def _tile(shape: tuple[int, ...], buffer: Any = nl.sbuf) -> Any:
    return nl.ndarray(shape, dtype=nl.float32, buffer=buffer)


def _load(x: Any) -> Any:
    tile = _tile(x.shape)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def _multiplied(a: Any, b: Any) -> Any:
    tile = _tile(a.shape)
    nisa.tensor_tensor(dst=tile, data1=a, data2=b, op=nl.multiply)
    return tile


def _filled(shape: tuple[int, ...], value: float) -> Any:
    tile = _tile(shape)
    nisa.memset(dst=tile, value=value)
    return tile


def _to_all_partitions(ones: Any, row: Any) -> Any:
    result = _tile((P, row.shape[1]), nl.psum)
    nisa.nc_matmul(dst=result, stationary=ones, moving=row)
    return result


def _decay(delta: Any, a: Any) -> Any:
    tile = _tile(delta.shape)
    nisa.activation(dst=tile, op=nl.exp, data=delta, scale=a)
    return tile


def _scan(decay: Any, drive: Any, initial: Any) -> Any:
    tile = _tile(drive.shape)
    nisa.tensor_tensor_scan(dst=tile, data0=decay, data1=drive, initial=initial, op0=nl.multiply, op1=nl.add)
    return tile


def _add(total: Any, part: Any) -> None:
    nisa.tensor_tensor(dst=total, data1=total, data2=part, op=nl.add)


def _channels(i: int) -> slice:
    return slice(i * P, (i + 1) * P)


def v1(delta, u, a, b, c):
    """States outside, channel tiles inside; delta and u are loaded again for every state."""
    y = nl.ndarray(delta.shape, dtype=delta.dtype, buffer=nl.shared_hbm)
    n_tiles, ones = delta.shape[0] // P, _filled((1, P), 1.0)
    totals = [_filled((P, delta.shape[1]), 0.0) for _ in range(n_tiles)]
    for state in range(a.shape[1]):
        b_all, c_all = _tile((P, delta.shape[1])), _tile((P, delta.shape[1]))
        nisa.tensor_copy(dst=b_all, src=_to_all_partitions(ones, _load(b[state : state + 1])))
        nisa.activation(dst=c_all, op=nl.copy, data=_to_all_partitions(ones, _load(c[state : state + 1])))
        for i in range(n_tiles):
            delta_i, u_i = _load(delta[_channels(i)]), _load(u[_channels(i)])
            decay = _decay(delta_i, _load(a[_channels(i), state : state + 1]))
            drive = _multiplied(_multiplied(delta_i, u_i), b_all)
            _add(totals[i], _multiplied(_scan(decay, drive, 0.0), c_all))
    for i in range(n_tiles):
        nisa.dma_copy(dst=y[_channels(i)], src=totals[i])
    return y


def v2(delta, u, a, b, c):
    """Channel tiles outside; v3 is the same over pieces of a longer sequence."""
    y = nl.ndarray(delta.shape, dtype=delta.dtype, buffer=nl.shared_hbm)
    steps, ones = delta.shape[1], _filled((1, P), 1.0)
    for i in range(delta.shape[0] // P):
        total = _filled((P, steps), 0.0)
        delta_i, u_i = _load(delta[_channels(i)]), _load(u[_channels(i)])
        pieces = [slice(t, t + PIECE) for t in range(0, steps, PIECE)]
        driven = [_multiplied(delta_i[:, t], u_i[:, t]) for t in pieces]
        for state in range(a.shape[1]):
            a_i, initial = _load(a[_channels(i), state : state + 1]), 0.0
            for t, delta_u in zip(pieces, driven, strict=True):
                decay = _decay(delta_i[:, t], a_i)
                drive = _multiplied(delta_u, _to_all_partitions(ones, _load(b[state : state + 1, t])))
                states = _scan(decay, drive, initial)
                if len(pieces) > 1:
                    initial = _tile((P, 1))
                    nisa.tensor_copy(dst=initial, src=states[:, PIECE - 1 : PIECE])
                c_all = _to_all_partitions(ones, _load(c[state : state + 1, t]))
                _add(total[:, t], _multiplied(states, c_all))
        nisa.dma_copy(dst=y[_channels(i)], src=total)
    return y


def v2_as_written(delta, u, a, b, c):
    """v2 with every product in the loop and B and C in SBUF, as in v1."""
    y = nl.ndarray(delta.shape, dtype=delta.dtype, buffer=nl.shared_hbm)
    steps, ones = delta.shape[1], _filled((1, P), 1.0)
    for i in range(delta.shape[0] // P):
        total = _filled((P, steps), 0.0)
        delta_i, u_i = _load(delta[_channels(i)]), _load(u[_channels(i)])
        for state in range(a.shape[1]):
            b_all, c_all = _tile((P, steps)), _tile((P, steps))
            nisa.activation(dst=b_all, op=nl.copy, data=_to_all_partitions(ones, _load(b[state : state + 1])))
            nisa.activation(dst=c_all, op=nl.copy, data=_to_all_partitions(ones, _load(c[state : state + 1])))
            decay = _decay(delta_i, _load(a[_channels(i), state : state + 1]))
            drive = _multiplied(_multiplied(delta_i, u_i), b_all)
            _add(total, _multiplied(_scan(decay, drive, 0.0), c_all))
        nisa.dma_copy(dst=y[_channels(i)], src=total)
    return y


def mamba(version: Any, channels: int, steps: int) -> Estimate:
    """The estimate of one batch row in float32 on trn1."""
    rows, states = zeros(channels, steps), zeros(STATES, steps)
    return modelled(version, rows, rows, zeros(channels, STATES), states, states, target="trn1")


def mamba_ms(version: Any, channels: int, steps: int) -> float:
    """Time of the whole, from one and two channel tiles."""
    return extrapolated(lambda n: mamba(version, n * P, steps).total_us / 1000, 1, 2, channels // P)
