"""The kernels of `contributed` in PyTorch: functions for tensors, with autograd, `torch.compile` and export."""

from nki_torch._device import launch_cache_clear, launch_cache_info
from nki_torch.decode import (
    decode_cache,
    flash_dense_attn_varlen_with_kvcache_func,
    flash_dense_attn_with_kvcache_func,
    flash_gated_attn_varlen_with_kvcache_func,
    flash_gated_attn_with_kvcache_func,
    flash_sparse_attn_varlen_with_kvcache_func,
    flash_sparse_attn_with_kvcache_func,
)
from nki_torch.kvcache import append_cache, flash_attn_with_kvcache
from nki_torch.prefill import attention, scaled_dot_product_attention

__all__ = [
    "append_cache",
    "attention",
    "decode_cache",
    "flash_attn_with_kvcache",
    "flash_dense_attn_varlen_with_kvcache_func",
    "flash_dense_attn_with_kvcache_func",
    "flash_gated_attn_varlen_with_kvcache_func",
    "flash_gated_attn_with_kvcache_func",
    "flash_sparse_attn_varlen_with_kvcache_func",
    "flash_sparse_attn_with_kvcache_func",
    "launch_cache_clear",
    "launch_cache_info",
    "scaled_dot_product_attention",
]
