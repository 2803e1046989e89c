"""Every published figure that is used, and those that are not with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from benchmarks.calibration import decode, instructions, mamba, matmul, tkg
from benchmarks.calibration._model import busy_us, last_byte_us, moving_us
from benchmarks.calibration._row import Row
from nkisim.latency import Estimate

DMA = "AWS, DMA overview, profile figure, SDK 2.32"
DMA_DATED = "AWS, DMA overview, throughput figure, SDK 2.32"
GUIDE = "AWS, NKI performance guide, profile figure, SDK 2.32"
MATMUL_TRN1 = "AWS, matrix multiplication tutorial, P99, SDK 2.26"
MATMUL_TRN2 = "AWS, kernel optimization tutorial, profile figures, SDK 2.32"
MAMBA = "AWS, fused Mamba tutorial, SDK 2.26"
MAMBA_FIGURE = "AWS, fused Mamba tutorial, profile figure, SDK 2.26"
PR133 = "nki-samples PR 133, decode_attention_benchmark.py (contributor, 'about 67'), SDK 2.32"
XPU_PERF = "whn09/xpu-perf, probe_attention_tkg.py (third party), wall clock, nki 0.6 (SDK 2.32)"

bfloat16 = ml_dtypes.bfloat16


def _total_ms(e: Estimate) -> float:
    return e.total_us / 1000


def _dma_ms(e: Estimate) -> float:
    return moving_us(e) / 1000


def _vector_ms(e: Estimate) -> float:
    return busy_us(e, "vector") / 1000


START = (
    "The published time spans the whole execution: the profile shows 13 us before the first load and 4 us after the "
    "last store."
)

INSTRUCTIONS = (
    Row(
        "exp-128", "exp of [128, 128] bfloat16, Scalar Engine", "trn2", 401.0, "ns", DMA,
        partial(instructions.exp_ns, 128, "trn2"), defines="scalar_latency_cycles",
    ),
    Row(
        "exp-4096", "exp of [128, 4096] bfloat16, Scalar Engine", "trn2", 3709.0, "ns", DMA,
        partial(instructions.exp_ns, 4096, "trn2"), defines="scalar_latency_cycles",
    ),
    Row(
        "table-trn2", "loading a table of activation functions", "trn2", 1280.0, "ns", DMA,
        partial(instructions.table_load_ns, "trn2"), defines="activation_table_load_ns",
    ),
    Row(
        "table-trn1", "loading a table of activation functions", "trn1", 368.0, "ns", GUIDE,
        partial(instructions.table_load_ns, "trn1"), defines="activation_table_load_ns",
    ),
    Row(
        "scalar-dependent", "start to start of dependent [128, 1] float32 Scalar Engine instructions", "trn1", 189.0,
        "ns", GUIDE, partial(instructions.dependent_scalar_gap_ns, "trn1"), defines="scalar_latency_cycles",
    ),
    Row(
        "tensor-tensor-128", "tensor_tensor of [128, 8192] float32", "trn1", 14987.0, "ns", GUIDE,
        partial(instructions.tensor_tensor_ns, 128, 8192, "trn1"),
    ),
    Row(
        "tensor-tensor-64", "tensor_tensor of [64, 8192] float32", "trn1", 14968.0, "ns", GUIDE,
        partial(instructions.tensor_tensor_ns, 64, 8192, "trn1"),
    ),
    Row(
        "matmul-128", "matmul of 1 bfloat16 column with 128, first column to result", "trn1", 203.5, "ns",
        GUIDE + ": middle of 188 and 219", partial(instructions.matmul_ns, 1, 128, bfloat16, "trn1"),
        defines="matmul_latency_ns",
    ),
    Row(
        "matmul-fp32-issue", "start to start of float32 matmuls, 512 columns", "trn2", 864.0, "ns",
        MATMUL_TRN2 + ": 28.30 ms over 32,768 calls", partial(instructions.matmul_interval_ns, 512, np.float32, "trn2"),
        defines="matmul_fp32_passes",
    ),
    Row(
        "matmul-fp32-drain", "float32 matmul instruction, length less issue interval", "trn2", 164.0, "ns",
        MATMUL_TRN2 + ": 592 less 428", partial(instructions.matmul_drain_ns, 512, np.float32, "trn2"),
        defines="matmul_latency_ns",
    ),
)  # fmt: skip

STORES = (
    "Stores reach their first byte sooner than loads, and their engines start closer together (0.25 instead of 0.47 us "
    "from first to last). The model has one latency, that of loads."
)
LAW = (
    "A check of the law alone: the time per transfer is that of `dma-share-512`, and the bytes are to move beside it "
    "and not after it. The constant that the point stands in is trn1's."
)
TRANSFERS = (
    Row(
        "dma-first-byte", "static load of [4, 4096] bfloat16: trigger to first byte", "trn2", 1003.0 + 70.0, "ns",
        DMA + ": 1,003 after the trigger's 70", partial(instructions.first_byte_ns, 4, 4096),
        defines="dma_static_latency_ns",
    ),
    Row(
        "dma-done", "last byte of a load to the start of the waiting Scalar Engine", "trn2", 304.5, "ns",
        DMA + ": middle of 294 and 315", instructions.wait_after_load_ns, defines="dma_done_ns",
    ),
    Row(
        "semaphore", "end of a Scalar Engine instruction to the static trigger that waits for it", "trn2", 33.0, "ns",
        DMA, instructions.engine_to_trigger_ns, defines="semaphore_ns",
    ),
    Row(
        "dma-32k-load", "load [4, 4096] bfloat16: 32 KiB on one DMA engine", "trn2", 1416.0, "ns", DMA,
        partial(instructions.transfer_engine_ns, 4, 4096, "trn2"),
    ),
    Row(
        "dma-32k-store", "store [4, 4096] bfloat16: 32 KiB on one DMA engine", "trn2", 1221.0, "ns", DMA,
        partial(instructions.transfer_engine_ns, 4, 4096, "trn2", store=True),
    ),
    Row(
        "dma-32k-trn1", "[128, 1024] float32: 32 KiB on each DMA engine", "trn1", 1810.0, "ns", GUIDE,
        partial(instructions.transfer_engine_ns, 128, 1024, "trn1", np.float32),
    ),
    Row(
        "dma-2k-load", "load [128, 128] bfloat16: 2 KiB in runs of 256 B on each DMA engine", "trn2", 97.0, "ns", DMA,
        partial(instructions.transfer_engine_ns, 128, 128, "trn2"), defines="dma_payload_efficiency",
    ),
    Row(
        "dma-2k-store", "store [128, 128] bfloat16: 2 KiB in runs of 256 B on each DMA engine", "trn2", 86.0, "ns", DMA,
        partial(instructions.transfer_engine_ns, 128, 128, "trn2", store=True),
    ),
    Row(
        "dma-2k-load-pending", "load [128, 128] bfloat16: trigger to last byte", "trn2", 1208.0, "ns", DMA,
        partial(instructions.transfer_pending_ns, 128, 128), defines="dma_dynamic_latency_ns",
    ),
    Row(
        "dma-2k-store-pending", "store [128, 128] bfloat16: trigger to last byte", "trn2", 862.0, "ns", DMA,
        partial(instructions.transfer_pending_ns, 128, 128, store=True), missing=STORES,
    ),
    Row(
        "dma-interval", "generated loads of [128, 128] and [128, 512] float32 by turns: interval", "trn2", 604.0, "ns",
        MATMUL_TRN2 + ": 39.89 ms over 66,048 transfers, as its triggers on the GpSimd Engine show",
        instructions.issue_interval_ns, defines="dma_swdge_ns",
    ),
    Row(
        "dma-share-512", "rate of loads of [128, 512 B], relative to [128, 32 KiB]", "trn2", 0.208, "share", DMA_DATED,
        partial(instructions.throughput_share, 512, "trn2"), defines="dma_static_queue_ns, dma_payload_efficiency",
    ),
    Row(
        "dma-share-2048", "rate of loads of [128, 2 KiB], relative to [128, 32 KiB]", "trn2", 0.813, "share", DMA_DATED,
        partial(instructions.throughput_share, 2048, "trn2"), LAW,
    ),
    Row(
        "exp-kernel-4", "static load, exp, store of [4, 4096] bfloat16: first trigger to last byte", "trn2", 9930.0,
        "ns", DMA, lambda: last_byte_us(instructions.exp_kernel(4, 4096)) * 1000,
        defines="dma_static_latency_ns, dma_done_ns, activation_table_load_ns, scalar_latency_cycles, semaphore_ns",
    ),
    Row(
        "exp-kernel-128", "software-generated load, exp, store of [128, 128] bfloat16: first trigger to last byte",
        "trn2", 4980.0, "ns", DMA, lambda: last_byte_us(instructions.exp_kernel(128, 128)) * 1000,
        defines="dma_dynamic_latency_ns, dma_done_ns, activation_table_load_ns, scalar_latency_cycles",
    ),
)  # fmt: skip

TILES = "Extrapolated from 1 and 2 units of 512 result tiles."
ROWS = "Extrapolated from 1 and 2 of 32 rows of result tiles."
BLOCKS = "Extrapolated from 1 and 2 of 16 rows of blocks."
COLUMNS = "Extrapolated from 1 and 2 of 8 columns of blocks."
GENERATED = (
    "Software descriptors, as the tiled version's profile shows the triggers on the GpSimd Engine. A store's trigger "
    "holds up those behind it until its data are there, as the model keeps program order. "
)
RELOADED = (
    GENERATED + "rhs is loaded again for the second row of a block: both columns overflow SBUF, and the profile shows "
    "those bytes moved. "
) + BLOCKS
HALVED = (
    GENERATED
    + "Blocks of 8 instead of 16 rows, as 16 overflow SBUF in float32. The Tensor Engine never waits, so that the time "
    "is that of `matmul-fp32-issue`. "
) + COLUMNS
TRN1_RATE = (
    "The published times of the three DMA-bound versions imply 103 to 105 GB/s whether runs have 256 B or 1 KiB; the "
    "figure that the model reads gives 0.10 and 0.42 of 272 GB/s. One time per transfer, as on trn2, fits no better: "
    "the same times are 0.78, 1.22 and 1.17 us per transfer. How the compiler of SDK 2.26 cut these loads is not "
    "published."
)


def _matmul_row(
    key: str,
    what: str,
    target: str,
    measured: float,
    version: str,
    how: str,
    pick: Callable[[Estimate], float] = _total_ms,
    missing: str = "",
    note: str = "",
    defines: str = "",
) -> Row:
    dtype, name, source = (
        (bfloat16, "bfloat16", MATMUL_TRN1) if target == "trn1" else (np.float32, "float32", MATMUL_TRN2)
    )
    model = partial(matmul.matmul, getattr(matmul, version), dtype, target, pick)
    what = f"[4096, 8192] @ [8192, 8192] {name}, {what}"
    fast = version == "tiled"
    return Row(key, what, target, measured, "ms", source + note, model, how, defines, missing=missing, fast=fast)


MATMULS = (
    _matmul_row("matmul-trn1-tiled", "tiles loaded per product", "trn1", 51.80, "tiled", TILES, missing=TRN1_RATE),
    _matmul_row("matmul-trn1-hoisted", "loads hoisted", "trn1", 42.96, "hoisted", ROWS, missing=TRN1_RATE),
    _matmul_row("matmul-trn1-blocked", "free dimensions blocked", "trn1", 22.07, "blocked", BLOCKS, missing=TRN1_RATE),
    _matmul_row("matmul-trn1-blocked-all", "all dimensions blocked", "trn1", 6.97, "blocked_all", COLUMNS),
    _matmul_row(
        "matmul-trn2-tiled", "tiles loaded per product", "trn2", 39.89, "tiled", GENERATED + TILES,
        defines="dma_swdge_ns",
    ),
    _matmul_row("matmul-trn2-hoisted", "loads hoisted", "trn2", 28.20, "hoisted", GENERATED + ROWS),
    _matmul_row("matmul-trn2-blocked", "free dimensions blocked", "trn2", 28.41, "blocked", RELOADED),
    _matmul_row("matmul-trn2-blocked-all", "all dimensions blocked", "trn2", 28.30, "blocked_all", HALVED),
    _matmul_row(
        "matmul-trn2-tiled-dma", "tiles loaded per product: mean time a DMA engine moves bytes", "trn2", 32.47, "tiled",
        GENERATED + TILES, _dma_ms, "", ": packet time 519.58 ms over 16",
    ),
    _matmul_row(
        "matmul-trn2-hoisted-dma", "loads hoisted: mean time a DMA engine moves bytes", "trn2", 25.13, "hoisted",
        GENERATED + ROWS, _dma_ms, "", ": packet time 402.07 ms over 16",
    ),
    _matmul_row(
        "matmul-trn2-blocked-all-vector", "all dimensions blocked: time the Vector Engine works", "trn2", 2.99,
        "blocked_all", HALVED, _vector_ms, "", ": 10.55 % of 28.30 ms",
    ),
)  # fmt: skip

LOWERED = (
    "As the profile shows it lowered: delta * u outside the loop over states, B and C read from PSUM. Extrapolated "
    "from 1 and 2 channel tiles."
)
RELOADS = "Delta and u are loaded for every state, as written. "
MAMBAS = (
    Row(
        "mamba-v1", "Mamba v1, 256 channels, 16 states, 512 steps, float32", "trn1", 172.93, "us", MAMBA,
        lambda: mamba.mamba(mamba.v1, 256, 512).total_us, RELOADS + START,
    ),
    Row(
        "mamba-v1-kernel", "the same, first load to last byte of the result", "trn1", 155.8, "us", MAMBA_FIGURE,
        lambda: last_byte_us(mamba.mamba(mamba.v1, 256, 512)),
    ),
    Row(
        "mamba-v1-vector", "the same, time the Vector Engine works", "trn1", 148.99, "us", MAMBA_FIGURE,
        lambda: busy_us(mamba.mamba(mamba.v1, 256, 512), "vector"),
    ),
    Row(
        "mamba-v1-4096", "Mamba v1, 4096 channels, 512 steps", "trn1", 2.34, "ms", MAMBA,
        lambda: mamba.mamba(mamba.v1, 4096, 512).total_us / 1000, "In full.", fast=False,
    ),
    Row(
        "mamba-v2-4096", "Mamba v2, 4096 channels, 512 steps", "trn1", 1.61, "ms", MAMBA,
        partial(mamba.mamba_ms, mamba.v2, 4096, 512), LOWERED,
    ),
    Row(
        "mamba-v2-written", "Mamba v2 as its source is written: five products or sums of SBUF tiles per state", "trn1",
        1.61, "ms", MAMBA, partial(mamba.mamba_ms, mamba.v2_as_written, 4096, 512),
        "The profile's Vector Engine works 3.07 us per state and channel tile; five times 2 N cycles are 4.57 us.",
        comparable=False,
    ),
    Row(
        "mamba-v3-2048", "Mamba v3, 4096 channels, 2048 steps", "trn1", 6.6, "ms", MAMBA,
        partial(mamba.mamba_ms, mamba.v2, 4096, 2048), LOWERED, fast=False,
    ),
    Row(
        "mamba-v3-8192", "Mamba v3, 4096 channels, 8192 steps", "trn1", 27.8, "ms", MAMBA,
        partial(mamba.mamba_ms, mamba.v2, 4096, 8192), LOWERED, fast=False,
    ),
)  # fmt: skip

GATHER = (
    "Cost per sequence and KV head that does not depend on its length: a fit of the published times gives about 10 us, "
    "the model next to nothing. Software descriptors of gathers and of gathered transposes are not published (the "
    "model assumes 10 ns per page), nor is the host's launch, which these wall-clock times may contain."
)
FLAT = (
    "Direct DMA transposes: A3's 'up to 90 %' of the copy rate is taken; the published times leave about 10 GB/s for "
    "the transposed K, 3 to 4 %."
)
ONE_CORE = (
    "One of the two cores; extrapolated from 1 and 2 batches. Structure as far as it is public, see "
    "`benchmarks/calibration/tkg.py`."
)


def _tkg_row(keys: int, measured: float, n_pairs: int = 128, *, paged: bool = True) -> Row:
    layout = "paged cache" if paged else "flat cache"
    key = f"tkg-{keys}" + ("" if n_pairs == 128 else f"-b{n_pairs // 8}") + ("" if paged else "-flat")
    what = f"attention_tkg, batch {n_pairs // 8}, 8 KV heads, 80 query heads, d 128, {keys} keys, bfloat16, {layout}"
    model = partial(tkg.attention_tkg_us, keys, paged=paged, n_pairs=n_pairs)
    missing = GATHER if paged else FLAT
    return Row(key, what, "trn2", measured, "us", XPU_PERF, model, ONE_CORE, missing=missing, fast=False)


DECODES = (
    Row(
        "decode-pr", "decode attention, 8 query and 2 KV heads, d 128, 512 keys, float32, 25 instructions per tile",
        "inf2", 67.0, "us", PR133, lambda: decode.published().total_us,
        "Rewritten with the published mix of instructions.",
        missing="Perhaps execution start and end (17 us in AWS's trn1 profile); time between dependent instructions of "
        "different engines, of which only trn2's 33 ns is published. The chain has about 19 links per tile.",
    ),
    Row(
        "decode-contributed", "the same problem by contributed/decode_attention.py, 17 instructions per tile", "inf2",
        67.0, "us", PR133, lambda: decode.contributed().total_us, "Another kernel: for scale only.", comparable=False,
    ),
    _tkg_row(4096, 1836.5),
    _tkg_row(8192, 2311.2),
    _tkg_row(10240, 2414.9),
    _tkg_row(16384, 3372.2),
    _tkg_row(4096, 5236.1, 512),
    _tkg_row(10240, 8814.1, 512),
    _tkg_row(4096, 7693.0, paged=False),
    _tkg_row(10240, 14490.3, paged=False),
)  # fmt: skip

ALL: tuple[Row, ...] = (*INSTRUCTIONS, *TRANSFERS, *MATMULS, *MAMBAS, *DECODES)

# Published, but not used: what, value, reason.
NOT_USED = (
    (
        "LDWEIGHTS of one column, trn1",
        "67 ns",
        "the model has no stationary load of its own: it hides behind the product",
    ),
    (
        "bytes and DMA time of the last two float32 matmuls, trn2",
        "8.66 GB, 1.82 GB",
        "they contain the compiler's spills, which a kernel cannot express",
    ),
    ("Mamba v2 from 1024 steps on, trn1", "4.4 to 52.2 ms", "spills, as the tutorial explains"),
    ("Mamba in PyTorch, trn1", "151.83 ms", "not a kernel of NKI"),
    (
        "LayerNorm v1 and v2, trn1",
        "2,311 and 1,969 us",
        "the stated shape [300, 1000] is some hundred times too small for such times; the script's default is "
        "[4096, 8192]",
    ),
    (
        "utilisation of the decode kernel, inf2",
        "vector 41.5 %, DMA 5.5 %",
        "the compiler's static estimate, at 2048 keys, not a measurement",
    ),
    ("the decode kernel's share of HBM, inf2", "4.7 % at best", "the configuration that reached it is not named"),
    (
        "latency parameters of nki-samples' tests: SD attention, rmsnorm_qkv, flash attention, double row, vision",
        "14 to 117,000",
        "chip and unit are not stated; the asserts were removed",
    ),
    (
        "RMSNorm with quantisation, trn2 LNC2",
        "458.2 to 13,214.4 us",
        "targets of a design document, not measurements",
    ),
    ("MLP profile total, trn2", "1.87 ms", "shapes are not stated"),
    (
        "attention_tkg with 4 new tokens or 64 query heads, trn2",
        "2,920 and 1,701 us",
        "other code paths of the kernel",
    ),
    ("the compiler's scaled_dot_product_attention, trn2", "833 to 15,847 us", "not a kernel of NKI"),
    (
        "attention_cte, 12 heads, 4,680 by 6,240, trn2 (Self-Forcing PR 93)",
        "3.85 ms",
        "the number of cores is not stated",
    ),
)
