"""Every number of the machine, per generation, with its unit and source. No other file holds one.

Sources are sections of the AWS Neuron documentation at SDK 2.32 unless another release is named:
A2, A3 and A4 are the NKI architecture guides of Trainium1/Inferentia2, Trainium2 and Trainium3; ISA is
the `nki.isa` API reference. A number that no document states is marked `assumed` for the
generations it is assumed on, and the reason stands in its source.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

A2 = "A2: Trainium/Inferentia2 architecture guide"
A3 = "A3: Trainium2 architecture guide"
A4 = "A4: Trainium3 architecture guide"
ISA = "nki.isa API reference, NKI 0.6"
TILE_SIZE = "nki.language.tile_size, NKI 0.6"

GEN2, GEN3, GEN4 = 2, 3, 4


def _fact(gen2: Any, gen3: Any, gen4: Any, *, unit: str, source: str, assumed: tuple[int, ...] = ()) -> Any:
    """A dataclass field that carries one value per generation, its unit and its source."""
    return field(
        metadata={
            "values": {GEN2: gen2, GEN3: gen3, GEN4: gen4},
            "unit": unit,
            "source": source,
            "assumed": assumed,
        }
    )


@dataclass(frozen=True)
class Hardware:
    """Limits of one NeuronCore and its chip."""

    target: str
    generation: int

    # fmt: off
    # Memory
    partitions: int = _fact(128, 128, 128, unit="partitions", source=A2)
    partition_quadrant: int = _fact(32, 32, 32, unit="partitions", source=A2 + ", start partitions")
    sbuf_partition_bytes: int = _fact(192 * 1024, 224 * 1024, 256 * 1024, unit="bytes per partition", source="A2, A3, A4: 24, 28 and 32 MiB over 128 partitions")
    sbuf_usable_partition_bytes: int = _fact(176 * 1024, 224 * 1024 - 16384 - 8, 256 * 1024 - 16384 - 8, unit="bytes per partition", source="gen2: direct allocation guide, SDK 2.26 (16 KiB kept by the compiler); gen3: nki-library mlp_cte_constants.py, 16,392 bytes kept; gen4: the same reserve assumed", assumed=(GEN4,))
    psum_banks: int = _fact(8, 8, 8, unit="banks", source=A2)
    psum_bank_bytes: int = _fact(2048, 2048, 2048, unit="bytes per partition", source=A2)
    psum_min_align_bytes: int = _fact(4, 4, 4, unit="bytes", source=TILE_SIZE + ": value not printed", assumed=(GEN2, GEN3, GEN4))
    sbuf_min_align_bytes: int = _fact(1, 1, 1, unit="bytes", source=TILE_SIZE + ": value not printed", assumed=(GEN2, GEN3, GEN4))
    view_max_dims: int = _fact(5, 5, 5, unit="dimensions", source="NKI language guide, tensor values")
    sbuf_access_max_elements: int = _fact(65536, 65536, 65536, unit="elements per partition", source=A2 + ", Vector and Scalar Engine free sizes")
    psum_access_max_elements: int = _fact(4096, 4096, 4096, unit="elements per partition", source=A2 + ", Vector and Scalar Engine free sizes")

    # Tensor Engine
    matmul_contraction_max: int = _fact(128, 128, 128, unit="partitions", source=ISA + ", nc_matmul")
    matmul_stationary_fmax: int = _fact(128, 128, 128, unit="elements", source=ISA + ", nc_matmul")
    matmul_moving_fmax: int = _fact(512, 512, 4096, unit="elements, float32 destination", source=ISA + ", nc_matmul")
    matmul_moving_fmax_bfloat16: int = _fact(0, 0, 8192, unit="elements, bfloat16 destination (0: not supported)", source=ISA + ", nc_matmul")
    vector_transpose_max: int = _fact(32, 32, 32, unit="partitions and elements", source=ISA + ", nc_transpose")

    # Vector Engine and GpSimd Engine
    bn_stats_fmax: int = _fact(512, 512, 512, unit="elements", source=ISA + ", bn_stats")
    max8_min_elements: int = _fact(8, 8, 8, unit="elements per partition", source=ISA + ", max8")
    max8_max_elements: int = _fact(16384, 16384, 16384, unit="elements per partition", source=ISA + ", max8")
    local_gather_max_indices: int = _fact(4096, 4096, 4096, unit="indices per GpSimd core", source=ISA + ", local_gather")
    gpsimd_core_partitions: int = _fact(16, 16, 16, unit="partitions", source=A2)
    topk_n_min: int = _fact(8, 8, 8, unit="elements", source=ISA + ", topk")
    topk_n_max: int = _fact(65535, 65535, 65535, unit="elements", source=ISA + ", topk")
    topk_k_max: int = _fact(32767, 32767, 32767, unit="elements", source=ISA + ", topk")
    range_select_index_max: int = _fact(2**24 - 1, 2**24 - 1, 2**24 - 1, unit="index", source=ISA + ", range_select")

    # Sequencers and DMA
    registers_per_engine: int = _fact(64, 64, 64, unit="32-bit registers", source=ISA + ", register_alloc")
    dma_compute_max_sources: int = _fact(16, 16, 16, unit="tensors", source=ISA + ", dma_compute")
    dma_priorities: int = _fact(0, 0, 4, unit="levels", source=ISA + ", dma_copy priority")
    cores_per_launch_max: int = _fact(1, 2, 2, unit="physical cores per logical core", source="Logical NeuronCore guide; sendrecv and core_barrier need NeuronCore-v3")
    sendrecv_gpsimd_bytes_32bit: int = _fact(0, 1024, 1024, unit="bytes per partition", source=ISA + ", sendrecv")
    sendrecv_gpsimd_bytes_16bit: int = _fact(0, 512, 512, unit="bytes per partition", source=ISA + ", sendrecv")
    sendrecv_gpsimd_bytes_8bit: int = _fact(0, 256, 256, unit="bytes per partition", source=ISA + ", sendrecv")
    # fmt: on

    @property
    def psum_partition_bytes(self) -> int:
        """PSUM bytes per partition, all banks together."""
        return self.psum_banks * self.psum_bank_bytes


def _build(target: str, generation: int) -> Hardware:
    values = {f.name: f.metadata["values"][generation] for f in fields(Hardware) if "values" in f.metadata}
    return Hardware(target=target, generation=generation, **values)


TRN1 = _build("trn1", GEN2)
INF2 = _build("inf2", GEN2)
TRN2 = _build("trn2", GEN3)
TRN3 = _build("trn3", GEN4)

TARGETS: dict[str, Hardware] = {
    "trn1": TRN1,
    "inf2": INF2,
    "gen2": TRN1,
    "trn2": TRN2,
    "gen3": TRN2,
    "trn3": TRN3,
    "gen4": TRN3,
}
TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"
DEFAULT_TARGET = "trn3"  # nki.simulate's documented choice where no chip is present


def resolve_target(target: str | None = None) -> Hardware:
    """The record for `target`, else for $NEURON_PLATFORM_TARGET_OVERRIDE, else for trn3.

    Raises:
        ValueError: the name is not one of trn1, inf2, gen2, trn2, gen3, trn3, gen4.
    """
    name = target if target is not None else os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET
    if name not in TARGETS:
        raise ValueError(f"target: received {name!r}, allowed {', '.join(TARGETS)}")
    return TARGETS[name]


def source_of(name: str) -> str:
    """Where the number called `name` comes from, as shown in error messages."""
    for f in fields(Hardware):
        if f.name == name:
            return str(f.metadata["source"])
    raise KeyError(name)
