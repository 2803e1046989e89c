"""Enumerations of `nki.isa`."""

from __future__ import annotations

from enum import Enum

from nkisim.trace import Engine

engine = Engine


class reduce_cmd(Enum):
    """What an instruction does with its engine's accumulator registers."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


class dge_mode(Enum):
    """How DMA descriptors are generated."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class oob_mode(Enum):
    """What a run-time index outside the tensor does."""

    error = 0
    skip = 1


class matmul_perf_mode(Enum):
    """Performance mode of `nc_matmul`."""

    none = "none"
    double_row = "double_row"


class nc_version(Enum):
    """NeuronCore generation."""

    gen2 = 2
    gen3 = 3
    gen4 = 4


class dma_engine(Enum):
    """Who moves the data of `sendrecv`."""

    dma = 1
    gpsimd_dma = 2
