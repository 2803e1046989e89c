"""Tensor Engine: matrix multiplication into PSUM, and the transposes of the Tensor and Vector Engines."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from nkisim.dtypes import (
    ALL,
    Array,
    bfloat16,
    float8_e4m3,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    tfloat32,
)
from nkisim.hardware import A3, GEN3, source_of
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa._choices import check_flag
from nkisim.isa._enums import engine as EngineKind
from nkisim.isa._enums import matmul_perf_mode as PerfMode
from nkisim.isa._indirection import is_indirect
from nkisim.isa._matmul import (
    accumulation,
    check_bank,
    check_indirection,
    check_result,
    check_rows,
    destination,
    operand_f32,
    product,
    result_dtypes,
    store,
    tiling,
)
from nkisim.memory import PSUM, SBUF, MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

TRANSPOSE_MODE = A3 + ", built-in transpose support"
FLOAT8 = (float8_e4m3, float8_e5m2, float8_e4m3fn)
MATMUL_INPUTS = (*FLOAT8, bfloat16, float16, tfloat32, float32)
GATHERED = (float16, bfloat16, *FLOAT8)  # types that the Tensor Engine can address indirectly
WIDE = (float32, tfloat32)
EVERY = tuple(ALL.values())


def nc_matmul(
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    is_stationary_onezero: Any = False,
    is_moving_onezero: Any = False,
    is_transpose: Any = False,
    accumulate: Any = None,
    tile_position: Any = (),
    tile_size: Any = (),
    perf_mode: Any = PerfMode.none,
    name: str | None = None,
) -> NkiInstruction:
    """`dst = stationary.T @ moving` or `dst +=` it: float32 sums over the partitions of both operands.

    With `is_transpose` (NeuronCore-v3 or newer) `moving` is the identity and `dst` the transpose of
    `stationary`, bit by bit; before, it only labels an ordinary product. `accumulate=None` overwrites
    what no matmul has written and adds to the rest.

    Spec: nki.isa.nc_matmul, NKI 0.6. Engine: Tensor. Raises `NkiError` on operands outside SBUF or a
    `dst` outside one PSUM bank (NeuronCore-v4: outside PSUM), on mixed dtypes, sizes over a tile, an
    array tile that the operands' partitions do not feed, accumulation that the target cannot do.
    """
    call = Call("nc_matmul", name, indirect_group="partition_quadrant")
    call.tile("stationary", stationary, SBUF, MATMUL_INPUTS, indirect=True)
    call.tile("moving", moving, SBUF, MATMUL_INPUTS, indirect=True)
    transposes = check_flag(call, "is_transpose", is_transpose) and call.hardware.generation >= GEN3
    destination(call, dst, (stationary.dtype,) if transposes else result_dtypes(call))
    if not isinstance(perf_mode, PerfMode):
        call.refuse("perf_mode", "type", repr(perf_mode), "a member of nki.isa.matmul_perf_mode")
    pairs = 2 if perf_mode is PerfMode.double_row else 1
    k, m, n = stationary.shape[0], stationary.free_size // pairs, moving.free_size // pairs
    if not call.repeated:
        _check_dtypes(call, stationary, moving)
        if pairs == 2:
            _check_double_row(call, stationary, moving, transposes)
        _check_stationary(call, stationary, moving, m)
        check_result(call, dst, m, n)
    position, size = tiling(call, tile_position, tile_size, k)
    if not call.repeated:
        check_rows(call, stationary, moving, position, size)
        if dst.dynamic is not None or stationary.dynamic is not None or moving.dynamic is not None:
            _check_gathered(call, dst, stationary, moving)
            check_indirection(call, dst, stationary, moving, position)
    hints = {
        "is_stationary_onezero": check_flag(call, "is_stationary_onezero", is_stationary_onezero),
        "is_moving_onezero": check_flag(call, "is_moving_onezero", is_moving_onezero),
    }
    where = call.locate("dst", dst)
    assert where is not None
    check_bank(call, dst, where)
    add = accumulation(call, dst, where, accumulate)

    if transposes:
        _check_transpose_mode(call, stationary, moving, add is not False, accumulate)
        y = call.read_2d("stationary", stationary).T
        if hints["is_stationary_onezero"]:
            _check_onezero(call, "stationary", stationary, y)
    else:
        # In a double row the pair is the slow free dimension: rows (partition, pair) are the contraction.
        a, b = operand_f32(call, "stationary", stationary), operand_f32(call, "moving", moving)
        for operand, t, values in (("stationary", stationary, a), ("moving", moving, b)):
            if hints[f"is_{operand}_onezero"]:
                _check_onezero(call, operand, t, values)
        y = product(a.reshape(k * pairs, m), b.reshape(k * pairs, n))
    added = store(call, dst, where, y, add, bits=transposes)
    return call.record(
        Engine.tensor,
        k=k * pairs,
        m=m,
        n=n,
        accumulate=added,
        perf_mode=perf_mode,
        is_transpose=bool(is_transpose),
        tile_position=position,
        tile_size=size,
        **hints,
    )


def _check_transpose_mode(
    call: Call, stationary: NkiTensor, moving: NkiTensor, adds: bool, accumulate: bool | None
) -> None:
    _check_wide_enough(call, "stationary", stationary)
    if is_indirect(moving):
        call.refuse("moving", "tensor indirection in transpose mode", ".indirect() view", "an ordinary view")
    if adds:
        # PSUM adds to float32 and bfloat16 sums; that it adds to moved bits is documented nowhere.
        received = "True" if accumulate else "None where a matmul wrote before"
        call.refuse("accumulate", "accumulation in transpose mode", received, "False", TRANSPOSE_MODE)
    k = stationary.shape[0]
    if not _is_identity(call.read_2d("moving", moving)):
        received = f"another matrix {list(moving.shape)}"
        call.refuse("moving", "moving tile in transpose mode", received, f"the identity [{k}, {k}]")


def _check_wide_enough(call: Call, operand: str, t: NkiTensor) -> None:
    """Refuse one-byte types: transpose mode makes 16-bit elements of them, which no equal-dtype tile holds."""
    if t.dtype.itemsize == 1:
        call.refuse(operand, "dtype in transpose mode", t.dtype, "types of 2 or 4 bytes", TRANSPOSE_MODE)


def _check_onezero(call: Call, operand: str, t: NkiTensor, values: Array) -> None:
    """Refuse a wrong hint: it makes float32 faster by leaving out passes, and says nothing of other types."""
    if t.dtype is not float32:
        return
    wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        received = f"{wrong.size} other values, the first {wrong[0]}"
        call.refuse(f"is_{operand}_onezero", f"values of {operand} under the hint", received, "0 and 1 only")


def _is_identity(values: Array) -> bool:
    """Whether the values are those of the identity; compared as bits first, as almost all that come are it."""
    n, kind = values.shape[0], values.dtype
    return values.tobytes() == _identity_bits(n, kind) or np.array_equal(values, _identity(n, kind))


@cache
def _identity(n: int, kind: np.dtype[Any]) -> Array:
    return np.eye(n, dtype=kind)


@cache
def _identity_bits(n: int, kind: np.dtype[Any]) -> bytes:
    return _identity(n, kind).tobytes()


def _check_dtypes(call: Call, stationary: NkiTensor, moving: NkiTensor) -> None:
    a, b = stationary.dtype, moving.dtype
    if a is b:
        return
    if (a in WIDE) != (b in WIDE):
        call.refuse("moving", "dtype", f"{b} with a {a} stationary", "float32 and tfloat32 only with each other")
    if {a, b} == {float8_e4m3, float8_e4m3fn}:
        call.refuse("moving", "dtype", f"{b} with a {a} stationary", "one of float8_e4m3 and float8_e4m3fn")


def _check_double_row(call: Call, stationary: NkiTensor, moving: NkiTensor, transposes: bool) -> None:
    if call.hardware.generation < GEN3:
        call.refuse("perf_mode", "double_row on target", call.hardware.target, "NeuronCore-v3 or newer")
    if transposes:
        call.refuse("perf_mode", "double_row in transpose mode", "double_row", "none", A3 + ", Double FP8")
    for operand, t in (("stationary", stationary), ("moving", moving)):
        if t.dtype not in FLOAT8:
            call.refuse(operand, "dtype in double_row mode", t.dtype, ", ".join(FLOAT8))
        if t.ndim < 3 or t.shape[1] != 2:
            call.refuse(operand, "shape in double_row mode", list(t.shape), "[partitions, 2, ...]")


def _check_stationary(call: Call, stationary: NkiTensor, moving: NkiTensor, m: int) -> None:
    limit = call.hardware.matmul_stationary_fmax
    if m > limit:
        call.refuse("stationary", "free size", m, f"1..{limit}", source_of("matmul_stationary_fmax"))
    if moving.shape[0] != stationary.shape[0]:
        call.refuse("moving", "partitions", moving.shape[0], f"{stationary.shape[0]}, those of stationary")


def _check_gathered(call: Call, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor) -> None:
    for operand, t in (("dst", dst), ("stationary", stationary), ("moving", moving)):
        if is_indirect(t) and t.dtype not in GATHERED:
            call.refuse(operand, "dtype of an .indirect() operand", t.dtype, ", ".join(GATHERED))


def nc_transpose(
    dst: NkiTensor, data: NkiTensor, engine: Any = EngineKind.unknown, name: str | None = None
) -> NkiInstruction:
    """dst[f, p] = data[p, f], the free dimensions flattened; bit by bit.

    On the Tensor Engine before NeuronCore-v3 it is a product with the identity, in which NaN and
    infinity spread along their row of `dst`.

    Spec: nki.isa.nc_transpose, NKI 0.6. Engine: Tensor, up to [128, 128] from SBUF to PSUM, or Vector,
    up to [32, 32] between any on-chip memories. `engine.unknown` takes the Tensor Engine where the
    buffers allow it. Raises `NkiError` on unequal dtypes and on tiles over those limits.
    """
    call = Call("nc_transpose", name)
    if engine not in (EngineKind.unknown, EngineKind.tensor, EngineKind.vector):
        received = engine.name if isinstance(engine, EngineKind) else repr(engine)
        call.refuse("engine", "value", received, "tensor, vector or unknown")
    call.tile("data", data, dtypes=EVERY)
    call.tile("dst", dst, dtypes=EVERY)
    chosen = engine
    if engine is EngineKind.unknown:
        # The page says by shape, the release notes of NKI 0.4 by destination buffer.
        reachable = dst.buffer is MemoryRegion.psum and data.buffer is MemoryRegion.sbuf
        chosen = Engine.tensor if reachable else Engine.vector
    # On NeuronCore-v2 too, where nc_matmul writes float32 only: this page makes no exception.
    if dst.dtype is not data.dtype:
        call.refuse("dst", "dtype", dst.dtype, f"{data.dtype}, that of data")
    p, f = data.shape[0], data.free_size
    _check_transpose(call, dst, data, chosen, p, f)
    if chosen is Engine.vector:
        call.write("dst", dst, call.read_2d("data", data).T, bits=True)
        return call.record(chosen)

    where = call.locate("dst", dst)
    assert where is not None
    check_bank(call, dst, where)
    if call.hardware.generation >= GEN3:
        store(call, dst, where, call.read_2d("data", data).T, False, bits=True)
    else:
        store(call, dst, where, product(operand_f32(call, "data", data), _identity(p, float32.numpy)), False)
    return call.record(chosen, k=p, m=f, n=p, accumulate=False, is_transpose=True)


def _check_transpose(call: Call, dst: NkiTensor, data: NkiTensor, engine: Engine, p: int, f: int) -> None:
    if engine is Engine.tensor:
        # "Any valid dtype", but a product with the identity needs one that the array multiplies.
        call.tile("data", data, SBUF, EVERY if call.hardware.generation >= GEN3 else MATMUL_INPUTS)
        call.tile("dst", dst, PSUM, EVERY)
        fact = "matmul_stationary_fmax"
        if call.hardware.generation >= GEN3:
            _check_wide_enough(call, "data", data)
    else:
        fact = "vector_transpose_max"
    limit = getattr(call.hardware, fact)
    if p > limit or f > limit:
        received = f"[{p}, {f}] on the {engine.name} engine"
        call.refuse("data", "tile size", received, f"up to [{limit}, {limit}]", source_of(fact))
    if dst.shape[0] != f:
        call.refuse("dst", "partitions", dst.shape[0], f"{f}, the elements per partition of data")
    if dst.free_size != p:
        call.refuse("dst", "elements per partition", dst.free_size, f"{p}, the partitions of data")
