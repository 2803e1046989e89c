"""How long an engine is busy with an instruction, and when its result is there.

The formulas are the published ones: initiation intervals of the Tensor Engine, cycles per element of the
others, fixed start-up cycles, and the Vector Engine's performance modes with their conditions. N is the
number of elements per partition. Where the documents give none, the formula used is named as assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from nkisim.hardware import GEN3
from nkisim.latency.constants import Constants
from nkisim.memory import MemoryRegion
from nkisim.trace import Access, Engine, Record

HALF = ("bfloat16", "float16")
# Activation functions that every function set evaluates: no table is loaded for them.
TABLE_FREE = ("copy", "square", "relu", "abs", "sign", "prelu")


@dataclass(frozen=True)
class Cost:
    """`busy_ns`: until the engine can start its next instruction; `latency_ns`: until the result can be used."""

    busy_ns: float
    latency_ns: float


def cost(record: Record, c: Constants, loaded: set[str]) -> Cost:
    """The cost of a record that runs on a compute engine or a sequencer.

    Args:
        record: not a DMA transfer (`transfers.py`).
        c: the target's numbers.
        loaded: activation functions whose tables the core has loaded; updated.
    """
    if record.engine is Engine.tensor:
        return _tensor(record, c)
    if record.engine is Engine.vector:
        return _vector(record, c)
    if record.engine is Engine.scalar:
        return _scalar(record, c, loaded)
    if record.engine is Engine.gpsimd:
        return _gpsimd(record, c)
    return _sequencer(record, c)


def free_size(record: Record) -> int:
    """N: elements per partition that the instruction streams, the most of any operand."""
    return max((a.free_size for a in (*record.writes, *record.reads)), default=1)


# ---------------------------------------------------------------------------------------------------
# Tensor Engine


def _tensor(record: Record, c: Constants) -> Cost:
    stationary_columns, n = record.attrs["m"], record.attrs["n"]
    moving = _operand(record, "moving") or _operand(record, "data")
    passes = 1
    if moving is not None and moving.dtype in ("float32", "tfloat32"):
        passes = _fp32_passes(record, moving, c)
    rate = _stride_factor(moving, c) if moving is not None else 1
    multiply = max(n * rate, c.matmul_min_cycles) * passes
    # The next stationary operand loads while this one multiplies: a stream of pairs costs the larger.
    load = ceil(stationary_columns / c.matmul_load_columns_per_cycle) * passes
    busy = max(multiply, load) / c.tensor_ghz
    return Cost(busy, busy + c.matmul_latency_ns)


def _fp32_passes(record: Record, moving: Access, c: Constants) -> int:
    if moving.dtype == "tfloat32":
        return 1
    passes: int = c.matmul_fp32_passes
    if record.attrs.get("is_transpose") and c.hardware.generation >= GEN3:
        return passes // 2
    if record.attrs.get("is_moving_onezero") or record.attrs.get("is_stationary_onezero"):
        return passes // 2
    return passes


# ---------------------------------------------------------------------------------------------------
# Vector Engine

# Cycles per streamed element of instructions whose cost does not depend on operands.
_VECTOR_RATE: dict[str, float] = {
    "reciprocal": 8.0,
    "tensor_tensor_scan": 2.0,
    "bn_aggr": 13.0 / 3.0,
    "quantize_mx": 0.25,
}
_VECTOR_PUBLISHED = {
    "tensor_copy", "tensor_scalar", "tensor_reduce", "tensor_scalar_reduce", "range_select", "bn_stats", "dropout",
    "max8", "nc_find_index8", "nc_match_replace8", "nc_stream_shuffle", "nc_transpose", "memset",
}  # fmt: skip


def _vector(record: Record, c: Constants) -> Cost:
    n = free_size(record)
    name = record.instruction
    if name in ("tensor_tensor", "scalar_tensor_tensor", "tensor_copy_predicated", "select_reduce"):
        work = n * _two_inputs(record, c)
    elif name in ("tensor_copy", "tensor_scalar"):
        work = n / _performance_mode(record, c)
    elif name == "memset":
        zero = record.attrs.get("value") == 0 and record.writes[0].dtype in HALF
        work = n / 2 if zero else n
    elif name == "tensor_reduce":
        work = n * _reduce_rate(record, c)
    elif name == "exponential":
        work = n / c.vector_fast_exp_lanes
    else:
        if name not in _VECTOR_PUBLISHED and name not in _VECTOR_RATE:
            c.assume(f"{name}: N cycles")
        work = n * _VECTOR_RATE.get(name, 1.0)
    work *= max((_stride_factor(a, c) for a in (*record.writes, *record.reads)), default=1)
    cycles = max(work, c.engine_min_cycles)
    if _has_result(record, "reduce_res"):
        cycles += c.accumulator_read_cycles
    return _engine_cost(record, cycles, c.vector_latency_cycles, c.vector_ghz, c)


def _two_inputs(record: Record, c: Constants) -> float:
    """Cycles per element of an instruction that streams two tiles."""
    tiles = [a for a in record.reads if a.free_size > 1 or record.writes[0].free_size == 1][:2]
    n_psum = sum(a.storage.buffer is MemoryRegion.psum for a in tiles)
    if n_psum == 1:
        return 1.0
    half = all(a.dtype in HALF for a in (*tiles, *record.writes[:1]))
    if record.instruction == "tensor_tensor" and half and n_psum == 0:
        if c.hardware.generation >= GEN3:
            return 1.0  # the 2x performance mode
        if record.attrs.get("op") in ("add", "multiply", "subtract") and all(_contiguous(a) for a in tiles):
            return 1.0
    if record.instruction == "select_reduce":
        c.assume("select_reduce: 2 N cycles from SBUF")
    return 2.0


def _performance_mode(record: Record, c: Constants) -> int:
    """Elements per cycle of tensor_copy and tensor_scalar (automatic on NeuronCore-v3 and newer)."""
    if c.hardware.generation < GEN3:
        return 1
    operands = (record.writes[0], record.reads[0])
    if not all(a.dtype in HALF for a in operands):
        return 1
    n_psum = sum(a.storage.buffer is MemoryRegion.psum for a in operands)
    contiguous = all(_contiguous(a) for a in operands)
    if n_psum == 0:
        return 4 if contiguous else 2
    return 2 if n_psum == 1 and contiguous else 1


def _reduce_rate(record: Record, c: Constants) -> float:
    half = all(a.dtype == "bfloat16" for a in (record.writes[0], record.reads[0]))
    fast = c.hardware.generation < GEN3 and half and record.attrs.get("op") in ("add", "maximum")
    return 0.5 if fast else 1.0


# ---------------------------------------------------------------------------------------------------
# Scalar Engine


def _scalar(record: Record, c: Constants, loaded: set[str]) -> Cost:
    n = free_size(record)
    work = n * max((_stride_factor(a, c) for a in (*record.writes, *record.reads)), default=1)
    cycles = max(work, c.engine_min_cycles)
    if _has_result(record, "reduce_res"):
        cycles += c.accumulator_read_cycles
    result = _engine_cost(record, cycles, c.scalar_latency_cycles, c.scalar_ghz, c)
    function = record.attrs.get("op")
    if record.instruction.startswith("activat") and function not in TABLE_FREE and function not in loaded:
        loaded.add(str(function))
        load = c.activation_table_load_ns
        return Cost(result.busy_ns + load, result.latency_ns + load)
    return result


# ---------------------------------------------------------------------------------------------------
# GpSimd Engine and sequencers

_GPSIMD_PUBLISHED = {"iota", "affine_select", "topk"}


def _gpsimd(record: Record, c: Constants) -> Cost:
    n = free_size(record)
    name = record.instruction
    if name == "topk":
        cycles = 4 * record.attrs["n"] + record.attrs["k"]
    elif name == "tensor_scalar":
        cycles = c.gpsimd_start_cycles + 4 * n  # rsqrt: a quarter of the Scalar Engine's rate
    elif name in ("sendrecv", "core_barrier"):
        cycles = c.gpsimd_start_cycles
    else:
        cycles = c.gpsimd_start_cycles + n * (2 if name == "tensor_tensor" else 1)
    if name not in _GPSIMD_PUBLISHED:
        c.assume(f"{name} on the GpSimd Engine: start-up and cycles per element")
    busy = cycles / c.gpsimd_ghz
    return Cost(busy, busy)


def _sequencer(record: Record, c: Constants) -> Cost:
    if record.instruction == "loop_iteration":
        return Cost(c.loop_iteration_ns, c.loop_iteration_ns)
    if record.instruction in ("register_load", "register_store"):
        c.assume(f"{record.instruction}: the cost of a run-time address")
        ns = c.dynamic_address_cycles / c.scalar_ghz
        return Cost(ns, ns)
    return Cost(0.0, 0.0)


# ---------------------------------------------------------------------------------------------------
# Shared


def _engine_cost(record: Record, cycles: float, latency_cycles: int, ghz: float, c: Constants) -> Cost:
    if any(a.dynamic for a in (*record.writes, *record.reads)):
        cycles = max(cycles, c.dynamic_address_cycles)
    return Cost(cycles / ghz, (cycles + latency_cycles) / ghz)


def _operand(record: Record, name: str) -> Access | None:
    return next((a for a in record.reads if a.operand == name), None)


def _has_result(record: Record, name: str) -> bool:
    return any(a.operand == name for a in record.writes)


def _contiguous(a: Access) -> bool:
    inner = [(n, s) for n, s in zip(a.shape[1:], a.strides[1:], strict=True) if n != 1]
    return not inner or inner[-1][1] == 1


def _stride_factor(a: Access, c: Constants) -> int:
    """2 where elements are further apart than memory serves at full rate, else 1."""
    inner = [(n, s) for n, s in zip(a.shape[1:], a.strides[1:], strict=True) if n != 1]
    if not inner:
        return 1
    return 2 if abs(inner[-1][1]) * a.dtype.itemsize > c.full_rate_stride_bytes else 1
