"""Kernels of one instruction or two, for figures read off instruction profiles."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.calibration._model import duration_ns, modelled, slots, zeros
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim import resolve_target
from nkisim.latency import Estimate, Slot
from nkisim.trace import Engine

bfloat16 = ml_dtypes.bfloat16


def _loaded(x: Any) -> Any:
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def _exp_twice(x):
    data = _loaded(x)
    for _ in range(2):
        nisa.activation(dst=nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf), op=nl.exp, data=data)


def exp_ns(n: int, target: str) -> float:
    """One exp over n bfloat16 per partition whose table is loaded."""
    e = modelled(_exp_twice, zeros(128, n, dtype=bfloat16), target=target)
    return duration_ns(slots(e, "activation")[1])


def table_load_ns(target: str) -> float:
    """What the first exp takes longer than the second."""
    first, second = slots(modelled(_exp_twice, zeros(128, 128, dtype=bfloat16), target=target), "activation")
    return first.busy_ns - second.busy_ns


def _chain_of_ones(x):
    data = _loaded(x)
    for _ in range(4):
        result = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
        nisa.activation(dst=result, op=nl.copy, data=data, scale=2.0)
        data = result


def dependent_scalar_gap_ns(target: str) -> float:
    """Start to start of one-element Scalar Engine instructions that need each other's result."""
    chain = slots(modelled(_chain_of_ones, zeros(128, 1), target=target), "activation")
    return chain[3].start_ns - chain[2].start_ns


def _product(x):
    a, b = _loaded(x), _loaded(x)
    nisa.tensor_tensor(dst=nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf), data1=a, data2=b, op=nl.multiply)


def tensor_tensor_ns(partitions: int, n: int, target: str) -> float:
    """tensor_tensor of two float32 SBUF tiles."""
    return duration_ns(slots(modelled(_product, zeros(partitions, n), target=target), "tensor_tensor")[0])


def _matmuls(stationary, moving):
    s, m = _loaded(stationary), _loaded(moving)
    for _ in range(4):
        dst = nl.ndarray((stationary.shape[1], moving.shape[1]), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=dst, stationary=s, moving=m)


def _matmul_slots(columns: int, n: int, dtype: Any, target: str) -> Any:
    e = modelled(_matmuls, zeros(128, columns, dtype=dtype), zeros(128, n, dtype=dtype), target=target)
    return slots(e, "nc_matmul")


def matmul_ns(columns: int, n: int, dtype: Any, target: str) -> float:
    """One matmul from its first moving column to its result."""
    return duration_ns(_matmul_slots(columns, n, dtype, target)[0])


def matmul_interval_ns(n: int, dtype: Any, target: str) -> float:
    """Start to start in a stream of matmuls."""
    stream = _matmul_slots(128, n, dtype, target)
    return float(stream[3].start_ns - stream[2].start_ns)


def matmul_drain_ns(n: int, dtype: Any, target: str) -> float:
    """How much longer a matmul lasts than it keeps the engine from the next one."""
    slot = _matmul_slots(128, n, dtype, target)[0]
    return duration_ns(slot) - float(slot.busy_ns)


def _exp_of_a_load(x, dge_mode):
    y = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    data = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=data, src=x, dge_mode=dge_mode)
    result = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.activation(dst=result, op=nl.exp, data=data)
    nisa.dma_copy(dst=y, src=result, dge_mode=dge_mode)
    return y


def exp_kernel(partitions: int, n: int, target: str = "trn2", dtype: Any = bfloat16) -> Estimate:
    """The estimate of the DMA overview's example: load, exp, store of a tile.

    As its profiles show, the transfers of [4, 4096] have static descriptors (queue qSyncIO0), those of [128, 128]
    software-generated ones (queue qGpSimdDynamic).
    """
    mode = nisa.dge_mode.swdge if (partitions, n) == (128, 128) else nisa.dge_mode.none
    return modelled(_exp_of_a_load, zeros(partitions, n, dtype=dtype), mode, target=target)


def _transfer(e: Estimate, *, store: bool) -> Slot:
    return slots(e, "dma_copy", Engine.dma)[1 if store else 0]


def transfer_engine_ns(partitions: int, n: int, target: str, dtype: Any = bfloat16, *, store: bool = False) -> float:
    """How long each DMA engine that takes part moves bytes of one transfer."""
    hw = resolve_target(target)
    engines = -(-partitions // (hw.partitions // hw.dma_engines))
    return _transfer(exp_kernel(partitions, n, target, dtype), store=store).moving_ns / engines


def transfer_pending_ns(partitions: int, n: int, *, store: bool = False) -> float:
    """From the trigger of one transfer to its last byte."""
    return _transfer(exp_kernel(partitions, n), store=store).busy_ns


def first_byte_ns(partitions: int, n: int) -> float:
    """From the trigger of a load to its first byte."""
    load = _transfer(exp_kernel(partitions, n), store=False)
    engines = -(-partitions // 8)
    return load.busy_ns - load.moving_ns / engines


def _loads(x):
    for i in range(x.shape[0]):
        _loaded(x[i])


def throughput_share(run_bytes: int, target: str, best_bytes: int = 32768, n_loads: int = 12) -> float:
    """Rate of many loads of [128, run_bytes] relative to loads of [128, best_bytes]."""

    def rate(nbytes: int) -> float:
        e = modelled(_loads, zeros(n_loads, 128, nbytes, dtype=np.uint8), target=target)
        ends = [s.end_ns for s in slots(e, "dma_copy", Engine.dma)]
        return 128 * nbytes * (n_loads // 2) / (ends[-1] - ends[-1 - n_loads // 2])

    return rate(run_bytes) / rate(best_bytes)


def _loads_by_turns(x, n_loads):
    for i in range(n_loads):
        tile = nl.ndarray((128, 128 if i % 2 else 512), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=x[:, 0 : tile.shape[1]], dge_mode=nisa.dge_mode.swdge)


def issue_interval_ns(n_loads: int = 25) -> float:
    """Mean end to end of loads of [128, 128] and [128, 512] float32 with software-generated descriptors, on trn2."""
    e = modelled(_loads_by_turns, zeros(128, 8192), n_loads, target="trn2")
    ends = [s.end_ns for s in slots(e, "dma_copy", Engine.dma)]
    return (ends[-1] - ends[n_loads // 2]) / (n_loads - 1 - n_loads // 2)


def wait_after_load_ns() -> float:
    """From a load's last byte to the start of the Scalar Engine's instruction that waits for it, on trn2."""
    e = exp_kernel(4, 4096)
    load = _transfer(e, store=False)
    return slots(e, "activation")[0].start_ns - load.start_ns - load.busy_ns


def engine_to_trigger_ns() -> float:
    """From a Scalar Engine result to the trigger of the static store that needs it, on trn2."""
    e = exp_kernel(4, 4096)
    return _transfer(e, store=True).start_ns - slots(e, "activation")[0].end_ns
