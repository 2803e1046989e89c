"""MX formats of NeuronCore-v4: quantization on the Vector Engine, matmul on the Tensor Engine.

An x4 element packs four values that are neighbours in the contraction, the first in its lowest byte
(float4: lowest nibble). One scale 2**(byte - 127) serves 8 partitions x 4 values. The four scales of a
partition quadrant stand in its first partitions, or 4, 8 or 12 partitions further.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import ml_dtypes
import numpy as np

from nkisim.dtypes import (
    Array,
    bfloat16,
    float4_e2m1fn_x4,
    float8_e4m3fn_x4,
    float8_e5m2_x4,
    float8_e8m0fnu,
    float16,
    float32,
    uint8,
)
from nkisim.hardware import GEN4, source_of
from nkisim.isa._access import Where
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa._indirection import is_indirect
from nkisim.isa._matmul import (
    BYTES,
    FLOAT8,
    accumulation,
    check_indirection,
    check_result,
    check_rows,
    destination,
    index_of,
    product,
    start_partitions,
    store,
    tiling,
)
from nkisim.memory import SBUF
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

MX_GUIDE = "MXFP matmul guide (NKI 0.6), scale tensor"
PACKED = 4  # values in an x4 element
ELEMENTS = {float8_e5m2_x4: np.dtype(ml_dtypes.float8_e5m2), float8_e4m3fn_x4: np.dtype(ml_dtypes.float8_e4m3fn)}
MX_TYPES = (float8_e5m2_x4, float8_e4m3fn_x4, float4_e2m1fn_x4)
SCALE_TYPES = (float8_e8m0fnu, uint8)
# The largest exponent of an element type, less one: the block scale leaves room to round up.
SCALE_EXPONENT = {float8_e5m2_x4: 15 - 1, float8_e4m3fn_x4: 8 - 1}
NIBBLES = BYTES[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float32)
SCALES = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def nc_matmul_mx(
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    stationary_scale: NkiTensor,
    moving_scale: NkiTensor,
    tile_position: Any = None,
    tile_size: Any = None,
    accumulate: Any = None,
    name: str | None = None,
) -> NkiInstruction:
    """`dst = stationary.T @ moving` or `dst +=` it: sums over partitions and packed values times their scales.

    Spec: nki.isa.nc_matmul_mx, NKI 0.6. Engine: Tensor (NeuronCore-v4). Raises `NkiError` on operands
    outside SBUF, scales in another quadrant than their data, partitions that do not fill quadrants,
    sizes over a tile, pairs of which only one is indirect.
    """
    call = Call("nc_matmul_mx", name, indirect_group="partition_quadrant")
    call.need_generation(GEN4)
    call.tile("stationary", stationary, SBUF, MX_TYPES, indirect=True)
    call.tile("moving", moving, SBUF, MX_TYPES, indirect=True)
    destination(call, dst, (float32, bfloat16))
    k, m, n = stationary.shape[0], stationary.free_size, moving.free_size
    _check_quadrants(call, "stationary", stationary)
    if moving.shape[0] != k:
        call.refuse("moving", "partitions", moving.shape[0], f"{k}, those of stationary")
    limit = call.hardware.matmul_stationary_fmax
    if m > limit or m % 2:
        call.refuse("stationary", "free size", m, f"an even size up to {limit}")
    # The architecture guide stops at 512 columns of moving; the API reference fills PSUM.
    check_result(call, dst, m, n)
    _check_scale(call, "stationary_scale", stationary_scale, "stationary", stationary, k, m)
    _check_scale(call, "moving_scale", moving_scale, "moving", moving, k, n)
    position, size = tiling(call, tile_position, tile_size, k)
    check_rows(call, stationary, moving, position, size)
    _check_pair(call, "stationary", stationary, stationary_scale)
    _check_pair(call, "moving", moving, moving_scale)
    check_indirection(call, dst, stationary, moving, position)
    where = call.locate("dst", dst)
    assert where is not None
    add = accumulation(call, dst, where, accumulate)

    a = _dequantized(call, "stationary", stationary, stationary_scale)
    b = _dequantized(call, "moving", moving, moving_scale)
    added = store(call, dst, where, product(a, b), add)
    return call.record(Engine.tensor, k=k * PACKED, m=m, n=n, accumulate=added, tile_position=position, tile_size=size)


def quantize_mx(dst: NkiTensor, src: NkiTensor, dst_scale: NkiTensor, name: str | None = None) -> NkiInstruction:
    """Four neighbours of `src` per element of `dst`, divided by the scale of their group of 32, in float8.

    The scale is 2**(floor(log2(largest magnitude)) - (E - 1)), E the type's largest exponent, and at
    least 2**-127. No document speaks of NaN and infinity: they count with exponent 128, as in the NumPy
    model that comes with the MXFP guide.

    Spec: nki.isa.quantize_mx, NKI 0.6. Engine: Vector (NeuronCore-v4). Raises `NkiError` on tiles
    outside SBUF, other types, partitions that do not fill quadrants, scales in another quadrant.
    """
    call = Call("quantize_mx", name)
    call.need_generation(GEN4)
    call.tile("src", src, SBUF, (float16, bfloat16))
    call.tile("dst", dst, SBUF, tuple(ELEMENTS))
    _check_quadrants(call, "src", src)
    if src.free_size % PACKED:
        call.refuse("src", "elements per partition", src.free_size, f"a multiple of {PACKED}")
    k, n = src.shape[0], src.free_size // PACKED
    if dst.shape[0] != k:
        call.refuse("dst", "partitions", dst.shape[0], f"{k}, those of src")
    if dst.free_size != n:
        call.refuse("dst", "elements per partition", dst.free_size, f"{n}, a quarter of src's")
    _check_scale(call, "dst_scale", dst_scale, "src", src, k, n)

    group = call.hardware.mx_group_partitions
    x = call.read_f32("src", src).reshape(k // group, group, n, PACKED)
    exponent = ((x.view(np.uint32) >> np.uint32(23)) & np.uint32(0xFF)).max(axis=(1, 3)).astype(np.int32)
    scale = np.maximum(exponent - SCALE_EXPONENT[dst.dtype], 0)
    # 1 / 2**(scale - 127), exact: its biased exponent is 254 - scale.
    factor = ((254 - scale) << 23).astype(np.uint32).view(np.float32)
    packed = (x * factor[:, np.newaxis, :, np.newaxis]).astype(ELEMENTS[dst.dtype]).view(np.uint32)
    call.write("dst", dst, packed.reshape(k, n), bits=True)
    stored = scale.astype(np.uint8).view(dst_scale.dtype.numpy)
    for q, rows in enumerate(_scale_rows(call, dst_scale, k)):
        call.write("dst_scale", rows, stored[q * rows.shape[0] : (q + 1) * rows.shape[0]], bits=True)
    return call.record(Engine.vector)


# ---------------------------------------------------------------------------------------------------
# Values


def _dequantized(call: Call, operand: str, t: NkiTensor, scale: NkiTensor) -> Array:
    """The values times their scales, float32 [4 * partitions, free size]."""
    raw = np.ascontiguousarray(call.read_2d(operand, t))
    shape = (*raw.shape, PACKED)
    if t.dtype is float4_e2m1fn_x4:
        values = NIBBLES.take((raw[..., np.newaxis] >> np.arange(0, 16, 4, dtype=np.uint16)) & np.uint16(0xF))
    else:
        values = FLOAT8[ELEMENTS[t.dtype]].take(raw.view(np.uint8)).reshape(shape)
    where = call.locate(f"{operand}_scale", scale)
    assert where is not None
    rows = []
    for q, part in enumerate(_scale_rows(call, scale, t.shape[0])):
        at = Where(part.shape, part.strides, part.offset + where.offset - scale.offset)
        if where.columns is not None:
            first = q * call.hardware.partition_quadrant
            at.columns = where.columns[first : first + part.shape[0]]
        stored = call.read_at(f"{operand}_scale", part, at)
        rows.append(stored.reshape(stored.shape[0], -1).view(np.uint8))
    factors = SCALES.take(np.repeat(np.concatenate(rows), call.hardware.mx_group_partitions, axis=0))
    values *= factors[..., np.newaxis]
    rows_first: Array = values.transpose(0, 2, 1).reshape(-1, shape[1])
    return rows_first


def _scale_rows(call: Call, scale: NkiTensor, k: int) -> list[NkiTensor]:
    """The partitions of a scale tensor that hold scales, one view per quadrant of `k` data partitions."""
    quadrant = call.hardware.partition_quadrant
    parts = []
    for first in range(0, k, quadrant):
        part = copy(scale)  # not a slice: the rows of an indirect view are no view of it
        part.shape = (quadrant // call.hardware.mx_group_partitions, *scale.shape[1:])
        part.offset = scale.offset + first * scale.strides[0]
        parts.append(part)
    return parts


# ---------------------------------------------------------------------------------------------------
# Rules


def _check_quadrants(call: Call, operand: str, t: NkiTensor) -> None:
    quadrant = call.hardware.partition_quadrant
    if t.shape[0] % quadrant:
        call.refuse(operand, "partitions", t.shape[0], f"a multiple of {quadrant} up to {call.hardware.partitions}")


def _check_scale(call: Call, operand: str, scale: Any, of: str, data: NkiTensor, k: int, n: int) -> None:
    """Refuse a scale tensor that is no [rows, n] tile in the quadrants of its data."""
    hw = call.hardware
    call.tile(operand, scale, SBUF, SCALE_TYPES, indirect=operand != "dst_scale", any_start=True)
    quadrant = hw.partition_quadrant
    step = quadrant // hw.mx_group_partitions
    rows = k - quadrant + step
    if scale.shape[0] < rows:
        # The guide lays several quadrants of scales out over as many quadrants of partitions.
        call.refuse(operand, "partitions", scale.shape[0], f"at least {rows} for the {k} of {of}", MX_GUIDE)
    if scale.free_size != n:
        call.refuse(operand, "elements per partition", scale.free_size, f"{n}, one per x4 element of {of}")
    start = scale.start_partition % quadrant
    if start % step or start > hw.mx_scale_start_max:
        allowed = ", ".join(str(s) for s in range(0, hw.mx_scale_start_max + 1, step))
        call.refuse(operand, "start partition in its quadrant", start, allowed, source_of("mx_scale_start_max"))
    quadrants = {p // quadrant for p in start_partitions(call, scale)}
    if quadrants.isdisjoint(p // quadrant for p in start_partitions(call, data)):
        call.refuse(
            operand,
            "quadrant of the scales",
            scale.start_partition // quadrant,
            f"{data.start_partition // quadrant}, that of {of}",
            MX_GUIDE,
        )


def _check_pair(call: Call, operand: str, data: NkiTensor, scale: NkiTensor) -> None:
    """Refuse data and scales that are not both plain views, or both indirect by the same index."""
    if is_indirect(data) != is_indirect(scale):
        plain = operand if is_indirect(scale) else f"{operand}_scale"
        call.refuse(plain, "tensor indirection", "an ordinary view", "both of the pair indirect, or neither")
    if is_indirect(data):
        a, b = index_of(data), index_of(scale)
        if (a.storage, a.shape, a.strides, a.offset, a.dtype) != (b.storage, b.shape, b.strides, b.offset, b.dtype):
            call.refuse(f"{operand}_scale", "index", b.name, f"{a.name}, the index of {operand}")
