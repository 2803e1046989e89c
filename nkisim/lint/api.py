"""What NKI 0.6 offers: its names, the signatures of its functions, and what each generation lacks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from nkisim import isa, language, nki, typing
from nkisim.hardware import GEN3, GEN4

_INSTRUCTIONS = """
    activate2 activation activation_reduce affine_select bn_aggr bn_stats core_barrier dma_compute dma_copy
    dma_transpose dropout exponential iota local_gather max8 memset nc_find_index8 nc_match_replace8 nc_matmul
    nc_matmul_mx nc_n_gather nc_stream_shuffle nc_transpose nonzero_with_count quantize_mx rand2 rand_get_state
    rand_set_state range_select reciprocal register_alloc register_load register_move register_store rng
    scalar_tensor_tensor select_reduce sendrecv sequence_bounds set_rng_seed tensor_copy tensor_copy_predicated
    tensor_partition_reduce tensor_reduce tensor_scalar tensor_scalar_cumulative tensor_scalar_reduce tensor_tensor
    tensor_tensor_scan topk
"""
_OTHERS = """
    NkiInstruction NkiValidationError VirtualRegister dge_mode dma_engine engine get_nc_sub_version get_nc_version
    gpsimd_engine matmul_perf_mode nc_version oob_mode reduce_cmd scalar_engine tensor_engine unknown_engine
    vector_engine
"""
INSTRUCTIONS = frozenset(_INSTRUCTIONS.split())
NAMES: dict[str, frozenset[str]] = {
    "nki": frozenset({"jit", "simulate", "isa", "language", "typing", "collectives", "compiler"}),
    "nki.isa": INSTRUCTIONS | frozenset(_OTHERS.split()),
    "nki.language": frozenset(language.__all__),
    "nki.typing": frozenset({"tensor"}),
}
REMOVED = frozenset({"nki.benchmark", "nki.profile", "nki.baremetal", "nki.simulate_kernel"})
# Libraries whose functions are no NKI code; the standard library counts as well.
LIBRARIES = frozenset(sys.stdlib_module_names) | {"jax", "jaxlib", "ml_dtypes", "numpy", "scipy", "torch"}
_MODULES = {"nki": nki, "nki.isa": isa, "nki.language": language, "nki.typing": typing}

# Functions of nki.language that issue nothing and return no tensor, or a view of their argument's kind.
_PLAIN = """
    affine_range ds dynamic_range fori_loop is_hbm is_on_chip is_psum is_sbuf no_reorder num_programs program_id
    program_ndim sequential_range static_range while_loop
"""
PLAIN = frozenset(_PLAIN.split())
# Functions of nki.language that return a tensor without an instruction.
ALLOCATES = frozenset({"ndarray", "expand_dims", "broadcast_to", "shared_constant"})
CREATES = frozenset({"ndarray", "zeros", "ones", "full", "rand"})
# Functions of nki.language that no engine computes: they run in a simulator and do not compile.
NOT_ON_DEVICE = {
    "divide": "multiply by nl.reciprocal",
    "fmod": "no engine has it",
    "mod": "no engine has it",
}

_TENSOR = """
    ap broadcast buffer dtype expand_dim flatten_dims get_pattern indirect is_contiguous is_indirect name ndim offset
    permute rearrange reinterpret_cast reshape reshape_dim select shape size slice squeeze_dim strides vector_select
    view
"""
TENSOR_ATTRIBUTES = frozenset(_TENSOR.split())


@dataclass(frozen=True)
class Needs:
    """An argument that needs a generation: any value that is not None, or only the member `member`."""

    parameter: str
    generation: int
    member: str | None = None


# Where the reference says "available only on" or "supported arch versions".
FIRST_GENERATION = {
    "nki.isa.activate2": GEN4,
    "nki.isa.core_barrier": GEN3,
    "nki.isa.exponential": GEN4,
    "nki.isa.nc_matmul_mx": GEN4,
    "nki.isa.nonzero_with_count": GEN3,
    "nki.isa.quantize_mx": GEN4,
    "nki.isa.rand2": GEN4,
    "nki.isa.rand_get_state": GEN3,
    "nki.isa.rand_set_state": GEN3,
    "nki.isa.range_select": GEN3,
    "nki.isa.sendrecv": GEN3,
    "nki.language.abs_max": GEN4,
    "nki.language.abs_min": GEN4,
}
TENSOR_METHODS = {"indirect": GEN4}
FIRST_ARGUMENT = {
    "nki.isa.dma_copy": (Needs("priority", GEN4), Needs("dge_mode", GEN3, "hwdge")),
    "nki.isa.dma_transpose": (Needs("priority", GEN4), Needs("dge_mode", GEN3, "hwdge")),
    "nki.isa.nc_matmul": (Needs("perf_mode", GEN3, "double_row"),),
    "nki.isa.rng": (Needs("engine", GEN3, "gpsimd"),),
    "nki.isa.rand_get_state": (Needs("engine", GEN4, "vector"),),
    "nki.isa.rand_set_state": (Needs("engine", GEN4, "vector"),),
}


def exists(dotted: str) -> bool:
    """Whether a full name under `nki` is documented; what this package does not know counts as existing."""
    parts = dotted.split(".")
    for n in range(1, len(parts)):
        module, name = ".".join(parts[:n]), parts[n]
        if module in NAMES:
            if name not in NAMES[module]:
                return False
            continue
        owner = find(module)
        if (isinstance(owner, type) and issubclass(owner, Enum)) or owner is language.tile_size:
            return hasattr(owner, name)
    return True


def find(dotted: str) -> Any:
    """The object that stands for a documented name here, or None."""
    module, _, name = dotted.rpartition(".")
    if module in _MODULES:
        return getattr(_MODULES[module], name, None)
    return None


@cache
def signature(dotted: str) -> inspect.Signature | None:
    """The documented signature of a function, or None if it is no function or not known here."""
    found: Callable[..., Any] | None = find(dotted)
    return inspect.signature(found) if inspect.isfunction(found) else None


@cache
def method_signature(name: str) -> inspect.Signature | None:
    """The documented signature of a method of NkiTensor, `self` included."""
    found: Any = getattr(language.NkiTensor, name, None)
    return inspect.signature(found) if inspect.isfunction(found) else None
