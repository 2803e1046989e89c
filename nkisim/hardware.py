"""Every limit and cost of the machine, per generation, with its unit and source.

The simulator's other files take them from here; what an operator or a dtype is stands with it.

Sources are sections of the AWS Neuron documentation at SDK 2.32 unless another release is named:
A2, A3 and A4 are the NKI architecture guides of Trainium1/Inferentia2, Trainium2 and Trainium3; ISA is
the `nki.isa` API reference. A number that no document states is marked `assumed` for the
generations it is assumed on, and the reason stands in its source.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

A2 = "A2: Trainium/Inferentia2 architecture guide"
A3 = "A3: Trainium2 architecture guide"
A4 = "A4: Trainium3 architecture guide"
ISA = "nki.isa API reference, NKI 0.6"
TILE_SIZE = "nki.language.tile_size, NKI 0.6"

GEN2, GEN3, GEN4 = 2, 3, 4

# Throughput against contiguous bytes per partition on 128 partitions, relative to 32 KiB, read as rate of an engine.
DMA_EFFICIENCY = (
    (32, 0.016), (64, 0.028), (128, 0.052), (256, 0.104), (512, 0.208), (1024, 0.424),
    (2048, 0.813), (4096, 0.967), (8192, 0.983), (16384, 0.990), (32768, 1.0),
)  # fmt: skip
# Its other reading: a transfer takes time of its queue, and runs of so many bytes move at full rate.
DMA_FULL_RATE = ((256, 1.0),)


def _fact(gen2: Any, gen3: Any, gen4: Any, unit: str, source: str, *, assumed: tuple[int, ...] = ()) -> Any:
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

    # Memory
    partitions: int = _fact(128, 128, 128, "partitions", A2)
    partition_quadrant: int = _fact(32, 32, 32, "partitions", A2 + ", start partitions")
    sbuf_partition_bytes: int = _fact(
        192 * 1024, 224 * 1024, 256 * 1024, "bytes per partition", "A2, A3, A4: 24, 28 and 32 MiB over 128 partitions"
    )
    sbuf_usable_partition_bytes: int = _fact(
        176 * 1024,
        224 * 1024 - 16384 - 8,
        256 * 1024 - 16384 - 8,
        "bytes per partition",
        "gen2: direct allocation guide, SDK 2.26 (16 KiB kept by the compiler); gen3: nki-library "
        "mlp_cte_constants.py, 16,392 bytes kept; gen4: the same reserve assumed",
        assumed=(GEN4,),
    )
    psum_banks: int = _fact(8, 8, 8, "banks", A2)
    psum_bank_bytes: int = _fact(2048, 2048, 2048, "bytes per partition", A2)
    psum_min_align_bytes: int = _fact(4, 4, 4, "bytes", TILE_SIZE + ": value not printed", assumed=(GEN2, GEN3, GEN4))
    sbuf_min_align_bytes: int = _fact(1, 1, 1, "bytes", TILE_SIZE + ": value not printed", assumed=(GEN2, GEN3, GEN4))
    view_max_dims: int = _fact(5, 5, 5, "dimensions", "NKI language guide, tensor values")
    sbuf_access_max_elements: int = _fact(
        65536, 65536, 65536, "elements per partition", A2 + ", Vector and Scalar Engine free sizes"
    )
    psum_access_max_elements: int = _fact(
        4096, 4096, 4096, "elements per partition", A2 + ", Vector and Scalar Engine free sizes"
    )
    access_count_max: int = _fact(
        65535, 65535, 65535, "elements of one free dimension (uint16)", A2 + ", tensor access patterns"
    )
    access_stride_min: int = _fact(-32768, -32768, -32768, "elements (int16)", A2 + ", tensor access patterns")
    access_stride_max: int = _fact(32767, 32767, 32767, "elements (int16)", A2 + ", tensor access patterns")

    # Tensor Engine
    matmul_contraction_max: int = _fact(128, 128, 128, "partitions", ISA + ", nc_matmul")
    matmul_stationary_fmax: int = _fact(128, 128, 128, "elements", ISA + ", nc_matmul")
    matmul_moving_fmax: int = _fact(512, 512, 4096, "elements, float32 destination", ISA + ", nc_matmul")
    matmul_moving_fmax_bfloat16: int = _fact(
        0, 0, 8192, "elements, bfloat16 destination (0: not supported)", ISA + ", nc_matmul"
    )
    gemm_moving_fmax: int = _fact(
        512,
        512,
        512,
        "elements",
        TILE_SIZE + ": a constant of all targets, unlike the wider matmul limit of gen4",
        assumed=(GEN4,),
    )
    matmul_row_tile_min: int = _fact(64, 32, 32, "rows", ISA + ", nc_matmul")
    mx_group_partitions: int = _fact(0, 0, 8, "partitions per MX scale", ISA + ", nc_matmul_mx")
    mx_scale_start_max: int = _fact(
        0, 0, 12, "partitions into a quadrant, in steps of 4", "MXFP matmul guide, NKI 0.6, packing scale values"
    )
    vector_transpose_max: int = _fact(32, 32, 32, "partitions and elements", ISA + ", nc_transpose")

    # Vector Engine and GpSimd Engine
    bn_stats_fmax: int = _fact(512, 512, 512, "elements", ISA + ", bn_stats")
    max8_min_elements: int = _fact(8, 8, 8, "elements per partition", ISA + ", max8")
    max8_max_elements: int = _fact(16384, 16384, 16384, "elements per partition", ISA + ", max8")
    max8_max_dims: int = _fact(3, 3, 3, "dimensions", ISA + ", max8 and nc_find_index8")
    find_index8_min_elements: int = _fact(8, 8, 8, "elements per partition", ISA + ", nc_find_index8")
    find_index8_max_elements: int = _fact(16384, 16384, 16384, "elements per partition", ISA + ", nc_find_index8")
    match_replace8_max_elements: int = _fact(
        16384, 16384, 16384, "elements per partition", "nki.isa API reference, SDK 2.26, nc_match_replace8"
    )
    xorwow_state_words: int = _fact(6, 6, 6, "uint32 words per state", ISA + ", rand_set_state")
    vector_random_states: int = _fact(
        1,
        1,
        4,
        "generator states per lane",
        A4 + ", XORWOW-based PRNG; before gen4 an LFSR of unknown form",
        assumed=(GEN2, GEN3),
    )
    gpsimd_random_states: int = _fact(0, 1, 1, "generator states per lane (0: no generator)", ISA + ", rand_set_state")
    exponential_max_dims: int = _fact(0, 0, 4, "dimensions (0: no such instruction)", ISA + ", exponential")
    local_gather_max_indices: int = _fact(4096, 4096, 4096, "indices per GpSimd core", ISA + ", local_gather")
    gpsimd_core_partitions: int = _fact(16, 16, 16, "partitions", A2)
    affine_pattern_max_dims: int = _fact(4, 4, 4, "dimensions", ISA + ", iota and affine_select")
    local_gather_run_lengths: tuple[int, ...] = _fact(
        (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), "elements per index", ISA + ", local_gather"
    )
    topk_n_min: int = _fact(8, 8, 8, "elements", ISA + ", topk")
    topk_n_max: int = _fact(65535, 65535, 65535, "elements", ISA + ", topk")
    topk_k_max: int = _fact(32767, 32767, 32767, "elements", ISA + ", topk")
    range_select_index_max: int = _fact(2**24 - 1, 2**24 - 1, 2**24 - 1, "index", ISA + ", range_select")

    # Sequencers and DMA
    registers_per_engine: int = _fact(64, 64, 64, "32-bit registers", ISA + ", register_alloc")
    dma_compute_max_sources: int = _fact(16, 16, 16, "tensors", ISA + ", dma_compute")
    dma_priorities: int = _fact(0, 0, 4, "levels", ISA + ", dma_copy priority")
    dma_transpose_row_group: int = _fact(
        0, 16, 16, "source rows moved together (0: no such mode)", ISA + ", dma_transpose"
    )
    cores_per_launch_max: int = _fact(
        1,
        2,
        2,
        "physical cores per logical core",
        "Logical NeuronCore guide; sendrecv and core_barrier need NeuronCore-v3",
    )
    sendrecv_gpsimd_bytes_32bit: int = _fact(0, 1024, 1024, "bytes per partition", ISA + ", sendrecv")
    sendrecv_gpsimd_bytes_16bit: int = _fact(0, 512, 512, "bytes per partition", ISA + ", sendrecv")
    sendrecv_gpsimd_bytes_8bit: int = _fact(0, 256, 256, "bytes per partition", ISA + ", sendrecv")

    # Timing: clocks and instruction costs. "cycles" are the executing engine's.
    tensor_ghz: float = _fact(2.8, 2.4, 2.4, "GHz", "A2, A3, A4: Tensor Engine frequency")
    vector_ghz: float = _fact(1.12, 0.96, 1.2, "GHz", "A2, A3, A4: Vector Engine frequency")
    scalar_ghz: float = _fact(1.4, 1.2, 1.2, "GHz", "A2, A3, A4: Scalar Engine frequency")
    gpsimd_ghz: float = _fact(1.4, 1.2, 1.2, "GHz", "A2, A3, A4: GpSimd Engine frequency")
    matmul_min_cycles: int = _fact(64, 64, 64, "cycles", A2 + ", matmul initiation interval", assumed=(GEN3, GEN4))
    matmul_fp32_passes: int = _fact(
        4,
        4,
        4,
        "times the bf16 cycles",
        "A2; nki.isa API reference, SDK 2.26, nc_matmul; 864 ns per 512 columns in the trn2 matmul tutorial",
        assumed=(GEN4,),
    )
    matmul_load_columns_per_cycle: int = _fact(
        4, 4, 4, "stationary columns per cycle", A2 + ", fast stationary load", assumed=(GEN3, GEN4)
    )
    matmul_latency_ns: float = _fact(
        157.0,
        165.0,
        165.0,
        "ns from last column in to result usable",
        "gen2: 188-219 ns for 128 columns in the SDK 2.32 performance guide's profile; gen3: 592 ns instruction "
        "with 428 ns issue interval in the trn2 matmul tutorial's profile",
        assumed=(GEN4,),
    )
    engine_min_cycles: int = _fact(
        64,
        64,
        64,
        "cycles",
        "nki.isa API reference, SDK 2.26: MIN_II of Vector and Scalar Engine",
        assumed=(GEN3, GEN4),
    )
    vector_latency_cycles: int = _fact(
        100,
        144,
        144,
        "cycles added to the work before a dependent instruction",
        "gen2: A2, static overhead of dependent or small instructions; gen3: fixed cost in nki-library "
        "rotational_topk_utils.py",
        assumed=(GEN4,),
    )
    scalar_latency_cycles: int = _fact(
        263,
        353,
        353,
        "cycles added to the work before a dependent instruction",
        "gen2: 189 ns between dependent one-element instructions in the performance guide's profile; "
        "gen3: 294 ns beside N cycles in the DMA overview's profile",
        assumed=(GEN4,),
    )
    accumulator_read_cycles: int = _fact(
        64, 64, 64, "cycles to read out accumulator registers", A2 + ", ActReadAccumulator", assumed=(GEN3, GEN4)
    )
    gpsimd_start_cycles: int = _fact(
        150, 150, 150, "cycles", "nki.isa API reference, SDK 2.26: GPSIMD_START", assumed=(GEN3, GEN4)
    )
    dynamic_address_cycles: int = _fact(
        600,
        600,
        600,
        "cycles of an instruction with a run-time address",
        "nki.isa API reference, SDK 2.26: MIN_II_DYNAMIC",
        assumed=(GEN3, GEN4),
    )
    full_rate_stride_bytes: int = _fact(
        16,
        16,
        16,
        "bytes between elements up to which SBUF and PSUM run at full rate",
        A2 + ", memory access bandwidth",
        assumed=(GEN3, GEN4),
    )
    activation_table_load_ns: float = _fact(
        368.0,
        1280.0,
        1280.0,
        "ns at the first use of a function set",
        "gen2: performance guide's profile; gen3: DMA overview's profile",
        assumed=(GEN4,),
    )
    vector_fast_exp_lanes: int = _fact(1, 1, 4, "elements per cycle of `exponential`", A4)
    semaphore_ns: float = _fact(
        33.0, 33.0, 33.0, "ns from one engine to another", "DMA overview's profile, trn2", assumed=(GEN2, GEN4)
    )

    # Timing of DMA and HBM
    dma_engines: int = _fact(16, 16, 16, "engines per core", "A2, A3, A4")
    dma_engine_gbps: float = _fact(
        17.0,
        23.0,
        33.0,
        "GB/s per engine",
        "DMA bandwidth guide; the DMA overview states 27.2, 27.2 and 38.4 as theoretical",
    )
    dma_payload_efficiency: tuple[tuple[int, float], ...] = _fact(
        DMA_EFFICIENCY,
        DMA_FULL_RATE,
        DMA_FULL_RATE,
        "(bytes in a contiguous run, share of a DMA engine's peak rate)",
        "gen2: DMA overview's throughput figure, of trn2; gen3 and gen4: 8 runs of 256 B in 97 ns in the DMA "
        "overview's profile, trn2, and less than 256 B overhead-bound in the DMA bandwidth guide",
        assumed=(GEN2, GEN4),
    )
    dma_static_queue_ns: float = _fact(
        0.0,
        856.0,
        856.0,
        "ns of its queue per static transfer",
        "gen2: contained in dma_payload_efficiency; gen3 and gen4: DMA overview's throughput figure, trn2, 128 x 512 B "
        "at 20.8 % of 368 GB/s, and as long for 128 x 128 B, which does not say whether descriptors were static",
        assumed=(GEN3, GEN4),
    )
    dma_swdge_ns: float = _fact(
        0.0,
        604.0,
        604.0,
        "ns of the GpSimd Engine per transfer without gathered or scattered rows",
        "gen2: contained in dma_payload_efficiency; gen3 and gen4: 39.89 ms over 66,048 transfers in the trn2 matmul "
        "tutorial's profile",
        assumed=(GEN4,),
    )
    dma_static_latency_ns: float = _fact(
        1300.0,
        1003.0,
        1300.0,
        "ns from trigger to first data",
        "gen2 and gen4: DMA bandwidth guide; gen3: DMA overview's profile, static descriptors",
    )
    dma_dynamic_latency_ns: float = _fact(
        1300.0,
        1111.0,
        1300.0,
        "ns from trigger to data on the last engine",
        "gen3: DMA overview's profile of a software queue: 1,208 ns pending, of which an engine moves data for 97",
        assumed=(GEN2, GEN4),
    )
    dma_done_ns: float = _fact(
        300.0,
        300.0,
        300.0,
        "ns from last byte to a waiting engine",
        "DMA overview's profile, trn2",
        assumed=(GEN2, GEN4),
    )
    dma_trigger_ns: float = _fact(
        70.0,
        70.0,
        70.0,
        "ns of the triggering engine per static transfer",
        "DMA overview's profile, trn2: SyncE triggers of 68 and 84 ns",
        assumed=(GEN2, GEN4),
    )
    dma_hwdge_ns: float = _fact(
        0.0,
        600.0,
        600.0,
        "ns of the descriptor engine per transfer",
        A3 + ", descriptor generation engine",
        assumed=(GEN4,),
    )
    dma_swdge_row_ns: float = _fact(
        10.0,
        10.0,
        10.0,
        "ns of the GpSimd Engine per gathered or scattered row",
        "not published",
        assumed=(GEN2, GEN3, GEN4),
    )
    dma_transpose_efficiency: float = _fact(
        0.25,
        0.9,
        0.9,
        "share of the copy rate, HBM to SBUF",
        "A3: up to 90 %; gen2: called slow by the performance guide, no figure",
        assumed=(GEN2, GEN4),
    )
    dma_transpose_on_chip_efficiency: float = _fact(
        0.25, 0.5, 0.5, "share of the copy rate, SBUF to SBUF", "A3: up to 50 %", assumed=(GEN2, GEN4)
    )
    dma_compute_efficiency: float = _fact(
        0.5,
        0.5,
        0.5,
        "share of the copy rate with addition",
        A4 + ", about half before NeuronCore-v4; its full rate has no API",
    )
    gpsimd_dma_gbps: float = _fact(
        0.0,
        153.0,
        153.0,
        "GB/s each way (0: no such DMA)",
        A3 + ", integrated DMA engines of GpSimd",
        assumed=(GEN4,),
    )
    hbm_chip_gbps: float = _fact(
        820.0, 3000.0, 4700.0, "GB/s per chip", "A2, A3, A4; the hardware pages say 820 GiB/s, 2900 and 4900"
    )
    cores_per_chip: int = _fact(2, 8, 8, "physical cores", "A2, A3, A4")
    loop_iteration_ns: float = _fact(
        500.0, 500.0, 500.0, "ns per trip of a device loop", "not published", assumed=(GEN2, GEN3, GEN4)
    )

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


def source_of(name: str, generation: int | None = None) -> str:
    """Where the number called `name` comes from, as shown in error messages; of one generation where that is given."""
    for f in fields(Hardware):
        if f.name == name:
            source = str(f.metadata["source"])
            return source if generation is None else _source_for(source, generation)
    raise KeyError(name)


def _source_for(source: str, generation: int) -> str:
    """The parts of a source, separated by semicolons, that are not labelled with other generations."""
    parts = []
    for part in source.split("; "):
        label = re.findall(r"gen(\d)", part.partition(":")[0])
        if not label or str(generation) in label:
            parts.append(part)
    return "; ".join(parts)
