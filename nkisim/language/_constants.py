"""Sizes of the hardware, and operators that are names only."""

from __future__ import annotations

import os

from nkisim.dtypes import float32
from nkisim.hardware import GEN3, Hardware, resolve_target
from nkisim.machine import running_core
from nkisim.objects import NKIObject
from nkisim.operators import NamedOperator

PE_TRANSPOSE_VARIABLE = "NKI_DMA_TRANSPOSE_AS_PE_TRANSPOSE"

bypass = NamedOperator("bypass")
prelu = NamedOperator("prelu")
average = NamedOperator("average")


class _TileSize(NKIObject):
    """Tile limits of the running kernel's target; outside a kernel, of the target a kernel would get."""

    @property
    def _hardware(self) -> Hardware:
        core = running_core()
        return core.hardware if core is not None else resolve_target()

    @property
    def pmax(self) -> int:
        """Partitions."""
        return self._hardware.partitions

    @property
    def psum_bank_fmax(self) -> int:
        """float32 elements of one PSUM bank in a partition."""
        return self.psum_bank_fmax_bytes // float32.itemsize

    @property
    def psum_fmax(self) -> int:
        """`psum_bank_fmax` under its deprecated name."""
        return self.psum_bank_fmax

    @property
    def psum_bank_fmax_bytes(self) -> int:
        """Bytes of one PSUM bank in a partition."""
        return self._hardware.psum_bank_bytes

    @property
    def psum_num_banks(self) -> int:
        """PSUM banks in a partition, less the one that DMA transposes take when they run on the Tensor Engine."""
        hw = self._hardware
        reserved = hw.generation >= GEN3 and os.environ.get(PE_TRANSPOSE_VARIABLE, "").lower() == "true"
        return hw.psum_banks - 1 if reserved else hw.psum_banks

    @property
    def gemm_stationary_fmax(self) -> int:
        """Free elements of a stationary matmul operand."""
        return self._hardware.matmul_stationary_fmax

    @property
    def gemm_moving_fmax(self) -> int:
        """Free elements of a moving matmul operand whose float32 product fills one PSUM bank."""
        return self._hardware.gemm_moving_fmax

    @property
    def bn_stats_fmax(self) -> int:
        """Elements per partition of `nki.isa.bn_stats`."""
        return self._hardware.bn_stats_fmax

    @property
    def psum_min_align(self) -> int:
        """Alignment in bytes of an address in PSUM."""
        return self._hardware.psum_min_align_bytes

    @property
    def sbuf_min_align(self) -> int:
        """Alignment in bytes of an address in SBUF."""
        return self._hardware.sbuf_min_align_bytes

    @property
    def sbuf_size_bytes(self) -> int:
        """Bytes of SBUF, all partitions together."""
        return self._hardware.partitions * self._hardware.sbuf_partition_bytes

    @property
    def sbuf_fmax_bytes(self) -> int:
        """Bytes of a partition of SBUF that a kernel may use."""
        return self._hardware.sbuf_usable_partition_bytes

    @property
    def sbuf_fmax(self) -> int:
        """`sbuf_fmax_bytes` in float32 elements."""
        return self.sbuf_fmax_bytes // float32.itemsize

    @property
    def total_available_sbuf_size(self) -> int:
        """`sbuf_fmax_bytes` under its deprecated name."""
        return self.sbuf_fmax_bytes


tile_size = _TileSize()
