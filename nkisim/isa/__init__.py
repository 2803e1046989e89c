"""The `nki.isa` module: one function per instruction, grouped by the engine that runs it."""

from __future__ import annotations

from nkisim.errors import NkiError as NkiValidationError
from nkisim.isa._call import NkiInstruction
from nkisim.isa._enums import dge_mode, dma_engine, engine, matmul_perf_mode, nc_version, oob_mode, reduce_cmd
from nkisim.isa.activate import activate2, activation, activation_reduce
from nkisim.isa.cores import core_barrier, sendrecv
from nkisim.isa.dma import dma_compute, dma_copy
from nkisim.isa.dma_transpose import dma_transpose
from nkisim.isa.gpsimd import affine_select, iota, tensor_partition_reduce
from nkisim.isa.gpsimd_select import local_gather, nc_n_gather, nonzero_with_count, sequence_bounds, topk
from nkisim.isa.matmul import nc_matmul, nc_transpose
from nkisim.isa.mx import nc_matmul_mx, quantize_mx
from nkisim.isa.random import dropout, rand2, rand_get_state, rand_set_state, rng, set_rng_seed
from nkisim.isa.registers import register_alloc, register_load, register_move, register_store
from nkisim.isa.vector_copy import memset, nc_stream_shuffle, tensor_copy, tensor_copy_predicated
from nkisim.isa.vector_elementwise import (
    exponential,
    reciprocal,
    scalar_tensor_tensor,
    tensor_scalar,
    tensor_tensor,
)
from nkisim.isa.vector_reduce import (
    bn_aggr,
    bn_stats,
    tensor_reduce,
    tensor_scalar_cumulative,
    tensor_scalar_reduce,
    tensor_tensor_scan,
)
from nkisim.isa.vector_select import max8, nc_find_index8, nc_match_replace8, range_select, select_reduce
from nkisim.machine import current_core
from nkisim.objects import VirtualRegister

tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown


def get_nc_version() -> nc_version:
    """The NeuronCore generation of the running kernel's target."""
    return nc_version(current_core("nki.isa.get_nc_version").hardware.generation)


def get_nc_sub_version() -> int:
    """The silicon revision: 0, the first."""
    current_core("nki.isa.get_nc_sub_version")
    return 0


__all__ = [
    "NkiInstruction",
    "NkiValidationError",
    "VirtualRegister",
    "activate2",
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "bn_stats",
    "core_barrier",
    "dge_mode",
    "dma_compute",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "dropout",
    "engine",
    "exponential",
    "get_nc_sub_version",
    "get_nc_version",
    "gpsimd_engine",
    "iota",
    "local_gather",
    "matmul_perf_mode",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_matmul",
    "nc_matmul_mx",
    "nc_n_gather",
    "nc_stream_shuffle",
    "nc_transpose",
    "nc_version",
    "nonzero_with_count",
    "oob_mode",
    "quantize_mx",
    "rand2",
    "rand_get_state",
    "rand_set_state",
    "range_select",
    "reciprocal",
    "reduce_cmd",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "rng",
    "scalar_engine",
    "scalar_tensor_tensor",
    "select_reduce",
    "sendrecv",
    "sequence_bounds",
    "set_rng_seed",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_engine",
    "tensor_partition_reduce",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_cumulative",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
    "topk",
    "unknown_engine",
    "vector_engine",
]
