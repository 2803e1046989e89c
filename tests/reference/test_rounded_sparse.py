"""Gated decode in the machine's precision: where in a score's sum its gate is added."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from reference.rounded_sparse import gated_decode_rounded

LARGE = 2.0**24  # and 1 make LARGE in float32


@pytest.mark.parametrize("is_logsigmoid", [False, True])
def test_half_of_the_orders_in_float32_add_gates_last(is_logsigmoid: bool) -> None:
    """Products LARGE and 1, and a gate of -LARGE: 0 where it comes last, 1 where it comes before the 1.

    A logsigmoid's rest, too small beside LARGE, is added after its -LARGE: 0 of the function, 0.05 of the polynomial.
    """
    q, k = np.array([[[LARGE, 1.0]]], np.float32), np.ones((1, 1, 1, 2), np.float32)
    alpha, delta = np.ones((1, 1), np.float32), np.full((1, 1, 1), -LARGE, np.float32)
    off = {"softmax_threshold": 0.0, "gate_threshold": 0.0, "softmax_scale": 1.0}
    gate = {"is_logsigmoid_gate": is_logsigmoid, "fast_logsigmoid": False}
    _, lse = gated_decode_rounded(q, k, k, alpha, delta, **off, **gate)
    assert lse.shape == (32, 1, 1)
    assert not lse[16:].any()
    assert set(lse[:16, 0, 0].tolist()) == {0.0, 1.0}
    if is_logsigmoid:
        _, lse = gated_decode_rounded(q, k, k, alpha, delta, **off)
        np.testing.assert_allclose(lse[16:], -16 * 0.05674870 + 4 * 0.37664706 - 0.65169323, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_two_byte_types_have_one_way(dtype: object) -> None:
    q, k = np.ones((1, 2, 4), dtype), np.ones((1, 3, 1, 4), dtype)
    o, lse = gated_decode_rounded(q, k, k, np.ones((1, 2)), np.ones((1, 1, 3)), softmax_threshold=0.0)
    assert (o.shape, lse.shape) == ((8, 1, 2, 4), (8, 1, 2))
