"""What is read in a kernel's text: `and` in masks, annotated variables; and that the kernel stays itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import NkiError
from nkisim.legacy._source import as_compiled
from tests.nkisim.legacy.isa_kernels import nki, nl, normal

nt = nki.typing
X = normal(16, 8)
SCALE = 2.0


def test_masks_joined_by_and() -> None:
    limit = 5

    @nki.jit(mode="simulation")
    def kernel(x, columns=6, *, start=1.0):
        """A docstring that is not indented
        as code."""
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, start)
        p, f = nl.arange(16)[:, None], nl.arange(8)[None, :]
        nl.store(out[p, f], nl.load(x) * SCALE, mask=p >= limit and f < columns and f > 1)
        return out

    expected = np.ones((16, 8), np.float32)
    expected[5:, 2:6] = 2 * X[5:, 2:6]
    np.testing.assert_array_equal(kernel(X), expected)
    np.testing.assert_array_equal(nki.simulate_kernel(kernel, X, 6), expected)
    expected[expected == 1] = 3
    np.testing.assert_array_equal(kernel(X, start=3.0), expected)


def test_masks_joined_by_or_are_refused() -> None:
    @nki.jit(mode="simulation")
    def kernel(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        p, f = nl.arange(16)[:, None], nl.arange(8)[None, :]
        nl.store(out[p, f], nl.load(x), mask=(p >= 4 or f < 2) and f > 1)
        return out

    with pytest.raises(NkiError, match="err_control_flow_condition_depending_on_arange: a mask in Python control flow"):
        kernel(X)


def declared(x, columns):
    first: nt.tensor[16, 8] = nl.load(x)
    count: int = 3
    later: nt.tensor[16, columns]
    later = first[:, 0:count]
    second: nt.tensor[16, columns] = nl.copy(later)  # THE LINE
    out = nl.ndarray(second.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nl.store(out, second)
    return out


def test_annotated_variables_have_their_shape() -> None:
    np.testing.assert_array_equal(nki.simulate_kernel(declared, X, 3), X[:, :3])
    with pytest.raises(NkiError, match=r"second: err_annotation_shape_mismatch.*\[16, 3\], allowed \[16, 4\]") as error:
        nki.simulate_kernel(declared, X, 4)
    with open(__file__, encoding="utf-8") as source:
        assert "# THE LINE" in source.read().splitlines()[error.value.site.line - 1]


def test_functions_that_need_no_change_stay_the_same() -> None:
    def plain(x: Any, mask: Any = None) -> Any:
        both = x and mask
        return both

    assert as_compiled(plain) is plain
    assert as_compiled(len) is len
    made: dict[str, Any] = {}
    exec("def no_text(x):\n    y: tensor[3] = x\n    return y", made)
    assert as_compiled(made["no_text"]) is made["no_text"]
    sums = [lambda t: t + 1.0, lambda t: t + 2.0]
    assert [as_compiled(f) for f in sums] == sums
    changed = as_compiled(declared)
    assert changed is not declared
    assert (changed.__name__, changed.__globals__) == ("declared", declared.__globals__)
