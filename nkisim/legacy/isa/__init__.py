"""The `neuronxcc.nki.isa` module of SDK 2.26, over the simulator's instructions.

Every function has the signature of the 2.26 reference. Tiles are returned by value and `mask=` leaves elements out;
what an instruction checks, computes and costs is that of `nkisim.isa`. docs/porting.md sets both APIs side by side.
"""

from __future__ import annotations

from typing import Any, NoReturn

from nkisim.hardware import GEN3
from nkisim.legacy._errors import refuse
from nkisim.legacy.isa import _enums as constants
from nkisim.legacy.isa._enums import (
    dge_mode,
    dma_engine,
    engine,
    fp32,
    gpsimd_engine,
    nc_version,
    oob_mode,
    reduce_cmd,
    scalar_engine,
    tensor_engine,
    unknown_engine,
    vector_engine,
)
from nkisim.legacy.isa.activate import activation, activation_reduce
from nkisim.legacy.isa.copies import (
    memset,
    nc_stream_shuffle,
    tensor_copy,
    tensor_copy_dynamic_dst,
    tensor_copy_dynamic_src,
    tensor_copy_predicated,
)
from nkisim.legacy.isa.dma import dma_copy, dma_transpose
from nkisim.legacy.isa.gpsimd import affine_select, iota, local_gather, sequence_bounds, tensor_partition_reduce
from nkisim.legacy.isa.matmul import nc_matmul, nc_transpose
from nkisim.legacy.isa.vector_elementwise import (
    dropout,
    reciprocal,
    scalar_tensor_tensor,
    tensor_scalar,
    tensor_tensor,
)
from nkisim.legacy.isa.vector_reduce import (
    bn_aggr,
    bn_stats,
    tensor_reduce,
    tensor_scalar_reduce,
    tensor_tensor_scan,
)
from nkisim.legacy.isa.vector_select import max8, nc_find_index8, nc_match_replace8, range_select, select_reduce
from nkisim.machine import current_core


def get_nc_version() -> nc_version:
    """The NeuronCore generation of the running kernel's target.

    Raises:
        NkiError: a target that SDK 2.26 does not know.
    """
    hardware = current_core("nki.isa.get_nc_version").hardware
    if hardware.generation > GEN3:
        refuse("get_nc_version", "", "target", received=hardware.target, allowed="trn1, inf2 or trn2 in SDK 2.26")
    return nc_version(hardware.generation)


def builtin_custom_op(
    function_name: Any,
    lib_file_name: Any,
    ulib_to_ucode_version: Any,
    ulib_to_isa_version: Any,
    srcs: Any,
    dsts: Any,
    **kwargs: Any,
) -> NoReturn:
    """Run a function of a library for the GpSimd Engine: not simulated.

    Raises:
        NotImplementedError: always; the library's code is not there.
    """
    raise NotImplementedError(f"nki.isa.builtin_custom_op: {function_name!r} of {lib_file_name!r} is a device library")


__all__ = [
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "bn_stats",
    "builtin_custom_op",
    "constants",
    "dge_mode",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "dropout",
    "engine",
    "fp32",
    "get_nc_version",
    "gpsimd_engine",
    "iota",
    "local_gather",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_matmul",
    "nc_stream_shuffle",
    "nc_transpose",
    "nc_version",
    "oob_mode",
    "range_select",
    "reciprocal",
    "reduce_cmd",
    "scalar_engine",
    "scalar_tensor_tensor",
    "select_reduce",
    "sequence_bounds",
    "tensor_copy",
    "tensor_copy_dynamic_dst",
    "tensor_copy_dynamic_src",
    "tensor_copy_predicated",
    "tensor_engine",
    "tensor_partition_reduce",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
    "unknown_engine",
    "vector_engine",
]
