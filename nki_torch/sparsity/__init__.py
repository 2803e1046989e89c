"""Sparse attention of whole models, with ModelOpt's names: settings by layer, counts, calibration, saving (extra `hf`).

    sparsify(model, SKIP_SOFTMAX_DEFAULT)
    calibrate(model, inputs, target_sparsity=0.5)
    model.generate(...)
    print(sparse_attention_summary(model))
    save_sparse_attention(model, directory)

`sparse_attention`, `dense_attention` and `collect_stats` do as much for a block of code and put back what they found.
"""

from nki_torch.sparsity.calibrate import Calibration, calibrate
from nki_torch.sparsity.config import (
    SKIP_SOFTMAX_DEFAULT,
    SPARSE_NM_DEFAULT,
    SparseAttentionAttributeConfig,
    SparseAttentionConfig,
)
from nki_torch.sparsity.methods import (
    SparseAttentionMethod,
    SparseOptions,
    get_sparse_method,
    register_sparse_method,
    sparse_methods,
)
from nki_torch.sparsity.model import (
    collect_stats,
    dense_attention,
    disable_sparse_attention,
    enable_sparse_attention,
    is_attn_sparsified,
    load_sparse_attention,
    reset_sparse_attention_stats,
    restore_sparse_attention_state,
    save_sparse_attention,
    sparse_attention,
    sparse_attention_state,
    sparse_attention_stats,
    sparse_attention_summary,
    sparse_layers,
    sparsify,
)
from nki_torch.sparsity.state import Counts, LayerState, LayerStats, layer_state

__all__ = [
    "SKIP_SOFTMAX_DEFAULT",
    "SPARSE_NM_DEFAULT",
    "Calibration",
    "Counts",
    "LayerState",
    "LayerStats",
    "SparseAttentionAttributeConfig",
    "SparseAttentionConfig",
    "SparseAttentionMethod",
    "SparseOptions",
    "calibrate",
    "collect_stats",
    "dense_attention",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "get_sparse_method",
    "is_attn_sparsified",
    "layer_state",
    "load_sparse_attention",
    "register_sparse_method",
    "reset_sparse_attention_stats",
    "restore_sparse_attention_state",
    "save_sparse_attention",
    "sparse_attention",
    "sparse_attention_state",
    "sparse_attention_stats",
    "sparse_attention_summary",
    "sparse_layers",
    "sparse_methods",
    "sparsify",
]
