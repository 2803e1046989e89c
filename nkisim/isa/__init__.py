"""The `nki.isa` module: one function per instruction, grouped by the engine that runs it."""

from __future__ import annotations

from nkisim.errors import NkiError as NkiValidationError
from nkisim.isa._call import NkiInstruction
from nkisim.isa._enums import dge_mode, dma_engine, engine, matmul_perf_mode, nc_version, oob_mode, reduce_cmd
from nkisim.isa.dma import dma_copy
from nkisim.isa.vector_elementwise import tensor_tensor
from nkisim.machine import current_core
from nkisim.tensor import VirtualRegister

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
