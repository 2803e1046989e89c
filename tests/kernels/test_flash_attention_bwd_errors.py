"""Bad input of the backward of prefill: refused by name before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from contributed import flash_attention_bwd as module
from contributed.flash_attention_bwd import flash_attention_bwd

Q, K = np.zeros((2, 5, 4, 8), np.float16), np.zeros((2, 9, 2, 8), np.float16)
LSE = np.zeros((2, 5, 4), np.float32)
CU = np.array([0, 2, 5])
ON = {"skip_softmax_threshold": 0.1}
KEPT = np.ones((4, 1, 1), bool)

CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "do list": ({"do": Q.tolist()}, TypeError, "do: received list, allowed a NumPy array"),
    "do shape": ({"do": Q[:, :4]}, ValueError, r"do shape: received \[2, 4, 4, 8\], allowed \[2, 5, 4, 8\], that of q"),
    "do heads": ({"do": Q[:, :, :2]}, ValueError, r"do shape: received \[2, 5, 2, 8\], allowed \[2, 5, 4, 8\]"),
    "do ndim": ({"do": Q[0]}, ValueError, r"do shape: received \[5, 4, 8\], allowed \[2, 5, 4, 8\]"),
    "do dtype": ({"do": Q.astype(np.float32)}, TypeError, "do dtype: received float32, allowed float16, that of q"),
    "o shape": ({"o": Q[:1]}, ValueError, r"o shape: received \[1, 5, 4, 8\], allowed \[2, 5, 4, 8\], that of q"),
    "o dtype": ({"o": Q.astype(np.float32)}, TypeError, "o dtype: received float32, allowed float16, that of q"),
    "lse shape": ({"lse": LSE[:, :4]}, ValueError, r"lse shape: received \[2, 4, 4\], allowed \[2, 5, 4\]"),
    "lse None": ({"lse": None}, TypeError, "lse: received NoneType, allowed a NumPy array"),
    "lse dtype": ({"lse": LSE.astype(np.float16)}, TypeError, "lse dtype: received float16, allowed float32"),
    "lse float64": ({"lse": LSE.astype(np.float64)}, TypeError, "lse dtype: received float64, allowed float32"),
    "k dtype": ({"k": K.astype(np.float32)}, TypeError, "k dtype: received float32, allowed float16"),
    "v shape": ({"v": K[:, :8]}, ValueError, r"v shape: received \[2, 8, 2, 8\], allowed \[2, 9, 2, 8\], that of k"),
    "heads": ({"k": K.repeat(2, 2)[:, :, :3], "v": K.repeat(2, 2)[:, :, :3]}, ValueError, "n_q_heads: received 4"),
    "one cu": ({"cu_seqlens_q": CU}, ValueError, r"q shape: received \[2, 5, 4, 8\]"),
    "causal": ({"causal": 1}, TypeError, "causal"),
    "window": ({"window_size": (-1, None)}, ValueError, r"window_size: received \(-1, None\)"),
    "scale": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: received nan"),
    "scale large": ({"softmax_scale": 1e9}, ValueError, "softmax_scale: received 1000000000.0"),
    "n": ({"sparsity_n": 5}, ValueError, "sparsity_n: received 5"),
    "m": ({"sparsity_m": 3}, ValueError, "sparsity_m: received 3"),
    "threshold": ({"skip_softmax_threshold": 1.5}, ValueError, "skip_softmax_threshold: received 1.5"),
    "no kept": (ON, ValueError, "kept: received NoneType, allowed a list of 2 bool arrays"),
    "kept array": (
        ON | {"kept": np.ones((2, 4, 1, 1), bool)},
        ValueError,
        "kept: received ndarray, allowed a list of 2",
    ),
    "one kept": (ON | {"kept": [KEPT]}, ValueError, "kept: received 1 arrays, allowed a list of 2 bool arrays"),
    "kept list": (
        ON | {"kept": [KEPT, KEPT.tolist()]},
        ValueError,
        r"kept\[1\]: received list, allowed bool \[4, 1, 1\]",
    ),
    "kept heads": (
        ON | {"kept": [KEPT, KEPT[:2]]},
        ValueError,
        r"kept\[1\]: received bool \[2, 1, 1\], allowed bool \[4",
    ),
    "kept int": (
        ON | {"kept": [KEPT.astype(int), KEPT]},
        ValueError,
        r"kept\[0\]: received int64 \[4, 1, 1\], allowed",
    ),
    "kept alone": ({"kept": [KEPT, KEPT]}, ValueError, "kept: received list, allowed None without skip_softmax_thr"),
    "kept at 0": (ON | {"skip_softmax_threshold": 0, "kept": [KEPT] * 2}, ValueError, "kept: received list, allowed"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, error, text = CASES[name]

    def nothing(*args: Any, **options: Any) -> None:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(module, "simulate_kernel", nothing)
    given: dict[str, Any] = {"do": Q, "q": Q, "k": K, "v": K, "o": Q, "lse": LSE} | changed
    arrays = [given.pop(x) for x in ("do", "q", "k", "v", "o", "lse")]
    with pytest.raises(error, match=text):
        flash_attention_bwd(*arrays, **given)


@pytest.mark.parametrize("off", [{"sparsity_n": None}, {"sparsity_n": 4}, {"skip_softmax_threshold": 0}])
def test_off_is_dense(off: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal(Q.shape).astype(np.float16), rng.standard_normal(K.shape).astype(np.float16)
    dense = flash_attention_bwd(q, q, k, k, q, LSE, target="trn2")
    assert dense[0].any()
    for x, y in zip(dense, flash_attention_bwd(q, q, k, k, q, LSE, target="trn2", **off), strict=True):
        np.testing.assert_array_equal(x, y)
