"""How long an engine is busy with an instruction, and when its result is there.

The formulas are the published ones: initiation intervals of the Tensor Engine, cycles per element of the
others, fixed start-up cycles, and performance modes with their conditions. N is the number of elements per
partition. Where the documents give none, the formula used is named as assumed. Decisions where they leave room:

- A matmul takes at least 64 cycles (architecture guide); the averages of the SDK 2.26 reference go below that
  for narrow stationary operands.
- Vector and Scalar Engine issue small instructions every 64 cycles (that reference); the guides speak of about 100
  where N is far below 128 or instructions depend on each other, which is modelled as latency of the result only.
- Halved costs of that reference (memset of zero, tensor_reduce, scalar_tensor_tensor) have no generation in
  their conditions; they are kept after NeuronCore-v2 and count as assumed there.
- Not modelled: small matmuls that run side by side in row tiles, transposes that NeuronCore-v4 runs beside a
  matmul, and the up to 60 cycles of an access to SBUF or PSUM, which the fixed latencies contain.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from nkisim.hardware import GEN3, GEN4
from nkisim.latency.constants import Constants
from nkisim.latency.hazards import is_gathered
from nkisim.memory import MemoryRegion
from nkisim.trace import Access, Engine, Record

HALF = ("bfloat16", "float16")
FLOAT8 = ("float8_e4m3", "float8_e5m2", "float8_e4m3fn")
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
    if record.instruction == "core_barrier":
        c.assume("core_barrier: one signal to the other core")
        return Cost(c.semaphore_ns, c.semaphore_ns)
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
    """N: elements per partition that the instruction streams, the most of any operand but run-time indices."""
    return max((a.free_size for a in _streams(record)), default=1)


# ---------------------------------------------------------------------------------------------------
# Tensor Engine


def _tensor(record: Record, c: Constants) -> Cost:
    stationary_columns, n = record.attrs["m"], record.attrs["n"]
    moving = _operand(record, "moving") or _operand(record, "data")
    passes = _fp32_passes(record, c)
    rate = _stride_factor(moving, c) if moving is not None else 1
    multiply = max(n * rate, c.matmul_min_cycles) * passes
    # The next stationary operand loads while this one multiplies: a stream of pairs costs the larger.
    load = ceil(stationary_columns / c.matmul_load_columns_per_cycle) * passes
    cycles = max(multiply, load, _address_cycles(record, c))
    busy = cycles / c.tensor_ghz
    return Cost(busy, busy + c.matmul_latency_ns)


def _fp32_passes(record: Record, c: Constants) -> int:
    """Passes over the array: several where an operand is float32, as in no other type."""
    operands = [_operand(record, name) for name in ("stationary", "moving", "data")]
    if not any(a is not None and a.dtype == "float32" for a in operands):
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
    "rand2": 0.25,
}
_VECTOR_PUBLISHED = {
    "tensor_scalar_reduce", "range_select", "bn_stats", "dropout", "max8", "nc_find_index8", "nc_match_replace8",
    "nc_stream_shuffle", "nc_transpose", *_VECTOR_RATE,
}  # fmt: skip
# The tiles that instructions with two inputs stream.
_PAIRS = {
    "tensor_tensor": ("data1", "data2"),
    "scalar_tensor_tensor": ("data", "operand1"),
    "tensor_copy_predicated": ("src", "predicate"),
    "select_reduce": ("on_true", "predicate"),
}


def _vector(record: Record, c: Constants) -> Cost:
    n = free_size(record)
    name = record.instruction
    if name in _PAIRS:
        work = n * _two_inputs(record, c)
    elif name in ("tensor_copy", "tensor_scalar"):
        work = n / _performance_mode(record, c)
    elif name == "memset":
        zero = record.attrs.get("value") == 0 and record.writes[0].dtype in HALF
        work = n * _halved(zero, c)
    elif name == "tensor_reduce":
        data = _operand(record, "data")
        half = record.writes[0].dtype == "bfloat16" and data is not None and data.dtype == "bfloat16"
        work = n * _halved(half and record.attrs.get("op") in ("add", "maximum"), c)
    elif name == "exponential":
        work = n / c.vector_fast_exp_lanes
    else:
        if name not in _VECTOR_PUBLISHED:
            c.assume(f"{name}: N cycles")
        work = n * _VECTOR_RATE.get(name, 1.0)
    read = 0
    # range_select is published with its result at no extra time.
    if _has_result(record) and name != "range_select":
        if name != "tensor_scalar_reduce":
            c.assume(f"{name}: time to read the accumulator")
        read = c.accumulator_read_cycles
    work *= _slowest_stride(record, c)
    return _streaming_cost(record, work, read, c.vector_latency_cycles, c.vector_ghz, c)


def _two_inputs(record: Record, c: Constants) -> float:
    """Cycles per element of an instruction that streams two tiles."""
    name = record.instruction
    if name == "select_reduce":
        c.assume("select_reduce: as tensor_tensor")
    tiles = [a for a in (_operand(record, operand) for operand in _PAIRS[name]) if a is not None]
    if sum(a.storage.buffer is MemoryRegion.psum for a in tiles) == 1 or len(tiles) < 2:
        return 1.0
    bfloat16 = all(a.dtype == "bfloat16" for a in tiles)
    if name == "tensor_tensor":
        operands = (*tiles, record.writes[0])
        if c.hardware.generation >= GEN3 and all(_is_narrow(a, c) for a in operands):
            return 1.0  # the 2x performance mode
        plain = record.attrs.get("op") in ("add", "multiply", "subtract") and all(_is_dense(record, a) for a in tiles)
        return 1.0 if bfloat16 and record.writes[0].dtype == "bfloat16" and plain else 2.0
    if name == "scalar_tensor_tensor":
        centred = (record.attrs.get("op0"), record.attrs.get("op1")) == ("subtract", "multiply")
        return 2 * _halved(bfloat16 and centred and tiles[0].free_size % 2 == 0, c)
    return 2.0


def _halved(condition: bool, c: Constants) -> float:
    """Half the cycles under a condition that the SDK 2.26 reference states for every generation."""
    if condition and c.hardware.generation >= GEN3:
        c.assume("halved costs of 16-bit types: as on NeuronCore-v2")
    return 0.5 if condition else 1.0


def _performance_mode(record: Record, c: Constants) -> int:
    """Elements per cycle of tensor_copy and tensor_scalar (automatic on NeuronCore-v3 and newer)."""
    source = _operand(record, "src") or _operand(record, "data")
    if c.hardware.generation < GEN3 or source is None:
        return 1
    operands = (record.writes[0], source)
    if not all(_is_narrow(a, c) for a in operands):
        return 1
    n_psum = sum(a.storage.buffer is MemoryRegion.psum for a in operands)
    dense = all(_is_dense(record, a) for a in operands)
    if n_psum == 0:
        return 4 if dense else 2
    return 2 if n_psum == 1 and dense else 1


def _is_narrow(a: Access, c: Constants) -> bool:
    """Whether the type runs in the performance modes."""
    if a.dtype in FLOAT8 and c.hardware.generation >= GEN4:
        # The guide of NeuronCore-v4 widens the data path for them, but does not restate the conditions.
        c.assume("performance modes of 8-bit floats")
        return True
    return a.dtype in HALF


# ---------------------------------------------------------------------------------------------------
# Scalar Engine


def _scalar(record: Record, c: Constants, loaded: set[str]) -> Cost:
    work = float(free_size(record) * _slowest_stride(record, c))
    if c.hardware.generation >= GEN4 and record.instruction in ("tensor_copy", "tensor_scalar"):
        work /= min(2, _performance_mode(record, c))
    read = c.accumulator_read_cycles if _has_result(record) else 0
    result = _streaming_cost(record, work, read, c.scalar_latency_cycles, c.scalar_ghz, c)
    function = record.attrs.get("op")
    if record.instruction.startswith("activat") and function not in TABLE_FREE and function not in loaded:
        loaded.add(str(function))
        load = c.activation_table_load_ns
        return Cost(result.busy_ns + load, result.latency_ns + load)
    return result


# ---------------------------------------------------------------------------------------------------
# GpSimd Engine and sequencers

_GPSIMD_PUBLISHED = ("iota", "affine_select", "topk", "tensor_copy")
_GATHER_GROUP = 512  # elements per partition that nc_n_gather handles at a time
_LOCAL_GATHER_STEPS = 4  # t of the published formula


def _gpsimd(record: Record, c: Constants) -> Cost:
    name = record.instruction
    n = record.writes[0].free_size if record.writes else 1
    cycles: float
    if name == "topk":
        cycles = 4 * record.attrs["n"] + record.attrs["k"]
    elif name == "tensor_copy":
        cycles = max(n, c.engine_min_cycles)
    elif name == "tensor_scalar":
        cycles = c.gpsimd_start_cycles + 4 * n  # rsqrt: a quarter of the Scalar Engine's rate
    elif name == "tensor_tensor":
        cycles = c.gpsimd_start_cycles + 2 * n
    elif name == "nc_n_gather":
        cycles = c.gpsimd_start_cycles * ceil(n / _GATHER_GROUP) + n
    elif name == "local_gather":
        cycles = c.gpsimd_start_cycles + n * _local_gather_rate(record)
    elif name == "sendrecv":
        cycles = c.gpsimd_start_cycles + record.writes[0].nbytes / c.gpsimd_dma_gbps * c.gpsimd_ghz
    else:
        cycles = c.gpsimd_start_cycles + max((a.free_size for a in _streams(record)), default=1)
    if name not in _GPSIMD_PUBLISHED:
        c.assume(f"{name} on the GpSimd Engine: start-up and cycles per element")
    busy = max(cycles, _address_cycles(record, c)) / c.gpsimd_ghz
    return Cost(busy, busy)


def _local_gather_rate(record: Record) -> float:
    """Cycles per gathered element: the published C, which is printed as a divisor.

    As a divisor it would make long runs slower than single elements, against the text beside it.
    """
    run = record.attrs["num_elem_per_idx"]
    steps = _LOCAL_GATHER_STEPS * run
    return float((28 + steps) / steps / min(4 / record.writes[0].dtype.itemsize, run))


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


def _streaming_cost(record: Record, work: float, read: int, latency_cycles: int, ghz: float, c: Constants) -> Cost:
    """The cost of `work` cycles of streaming and `read` cycles for the accumulator.

    The fixed latency is published on top of the work itself; the least cycles bound only how often instructions
    are issued.
    """
    address = _address_cycles(record, c)
    busy = max(max(work, c.engine_min_cycles) + read, address)
    return Cost(busy / ghz, max(busy, max(work + read, address) + latency_cycles) / ghz)


def _address_cycles(record: Record, c: Constants) -> int:
    """Least cycles of an instruction with a run-time address; 0 without one."""
    operands = [a for a in (*record.writes, *record.reads) if a.dynamic]
    if not operands:
        return 0
    if all(is_gathered(record, a) for a in operands):
        c.assume("tensor indirection: no extra time")
        return 0
    if record.engine not in (Engine.vector, Engine.scalar):
        c.assume("run-time addresses outside the Vector and Scalar Engine: the same cycles")
    return int(c.dynamic_address_cycles)


def _operand(record: Record, name: str) -> Access | None:
    return next((a for a in record.reads if a.operand == name), None)


def _streams(record: Record) -> list[Access]:
    """The operands but for the indices of run-time addresses."""
    return [a for a in (*record.writes, *record.reads) if not a.operand.endswith(" index")]


def _has_result(record: Record) -> bool:
    return any(a.operand == "reduce_res" for a in record.writes)


def _inner_stride(a: Access) -> int:
    """Stride of the innermost free dimension of more than one element; 1 where there is none."""
    return next((s for n, s in zip(a.shape[:0:-1], a.strides[:0:-1], strict=True) if n != 1), 1)


def _is_dense(record: Record, a: Access) -> bool:
    """Whether neighbours along the innermost free dimension are neighbours in memory."""
    return _inner_stride(a) == 1 and not is_gathered(record, a)


def _slowest_stride(record: Record, c: Constants) -> int:
    return max((_stride_factor(a, c) for a in _streams(record)), default=1)


def _stride_factor(a: Access, c: Constants) -> int:
    """2 where elements are further apart than memory serves at full rate, else 1."""
    return 2 if abs(_inner_stride(a)) * a.dtype.itemsize > c.full_rate_stride_bytes else 1
