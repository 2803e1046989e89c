"""nc_matmul: accumulation in PSUM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import TARGETS, out, refused, run, sb, tile
from tests.nkisim.matmul_kernels import exact, result, small


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", ["explicit", "inferred"])
def test_accumulates_over_tiles_of_the_contraction(how: str, target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 16), buffer=nl.psum)
        for i in range(3):
            accumulate = (i > 0) if how == "explicit" else None
            nisa.nc_matmul(dst, sb(a[i * 32 : i * 32 + 32]), sb(b[i * 32 : i * 32 + 32]), accumulate=accumulate)
        return out(dst)

    a, b = small(96, 8), small(96, 16, seed=1)
    assert np.array_equal(run(kernel, a, b, target=target), exact(a, b))


def test_accumulate_false_overwrites() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 16), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=np.bool_(False))
        return out(dst)

    a, b = small(32, 8), small(32, 16, seed=1)
    assert np.array_equal(run(kernel, a, b), exact(a, b))


def test_a_tile_that_was_evicted_still_accumulates() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((8, 16), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        first = out(dst)
        nisa.nc_matmul(dst, sb(a), sb(b))
        return first, out(dst)

    a, b = small(32, 8), small(32, 16, seed=1)
    first, second = run(kernel, a, b)
    assert np.array_equal(first, exact(a, b))
    assert np.array_equal(second, 2 * exact(a, b))


@pytest.mark.parametrize("target", TARGETS)
def test_overlapping_results_add_where_a_matmul_wrote(target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 12), buffer=nl.psum)
        nisa.memset(dst, 100.0)
        stationary, moving = sb(a), sb(b)
        nisa.nc_matmul(dst[:, 0:8], stationary, moving)
        nisa.nc_matmul(dst[:, 4:12], stationary, moving)
        return out(dst)

    a, b = small(16, 4), small(16, 8, seed=1)
    one = exact(a, b)
    want = np.zeros((4, 12), np.float32)
    want[:, 0:8] += one
    want[:, 4:12] += one
    assert np.array_equal(run(kernel, a, b, target=target), want)


@pytest.mark.parametrize("target", TARGETS)
def test_none_overwrites_what_only_other_instructions_wrote(target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.memset(dst, 100.0)
        nisa.nc_matmul(dst, sb(a), sb(b))
        return out(dst)

    a, b = small(16, 4), small(16, 8, seed=1)
    assert np.array_equal(run(kernel, a, b, target=target), exact(a, b))


@pytest.mark.parametrize("accumulate", [True, None])
def test_trn3_adds_to_a_result_that_was_rescaled_in_psum(accumulate: bool | None) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.tensor_scalar(dst, dst, nl.multiply, 0.5)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=accumulate)
        return out(dst)

    a, b = small(16, 4), small(16, 8, seed=1)
    assert np.array_equal(run(kernel, a, b, target="trn3"), np.float32(1.5) * exact(a, b))


def test_trn3_adds_to_an_initial_value() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.memset(dst, 100.0)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=True)
        return out(dst)

    a, b = small(16, 4), small(16, 8, seed=1)
    assert np.array_equal(run(kernel, a, b, target="trn3"), 100 + exact(a, b))


def test_bfloat16_psum_adds_in_float32_and_rounds_once() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((1, 2), nl.bfloat16, nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.nc_matmul(dst, sb(a[1:2]), sb(b[1:2]), accumulate=True)
        return out(dst)

    # 256 + 1 rounds to 256 (even), 256 + 3 to 260; then 256 + 1 again, 260 + 3 to 264 (even).
    a = np.array([[1.0], [1.0]], np.float32)
    b = np.array([[256.0, 256.0], [1.0, 3.0]], np.float32)
    assert run(kernel, a, b, target="trn3").astype(np.float32).tolist() == [[256.0, 264.0]]


def test_accumulation_is_tracked_through_views_of_another_width() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 16), nl.bfloat16, nl.psum)
        nisa.memset(dst, 0.0)
        wide = dst.view(nl.float32)
        nisa.nc_matmul(wide, sb(a), sb(b))
        nisa.nc_matmul(wide, sb(a), sb(b))
        nisa.memset(dst[:, 0:2], 0.0)
        nisa.nc_matmul(wide[:, 1:8], sb(a), sb(b[:, 1:8]))
        return out(wide)

    a, b = small(16, 4), small(16, 8, seed=1)
    want = 3 * exact(a, b)
    want[:, 0] = 0
    assert np.array_equal(run(kernel, a, b), want)


def test_accumulating_onto_uninitialized_psum_is_refused() -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), accumulate=True)

    for target in TARGETS:
        refused(
            kernel,
            small(16, 4),
            small(16, 8),
            instruction="nc_matmul",
            operand="accumulate",
            rule="uninitialized PSUM",
            received="True, 32 of 32 elements of dst never written",
            allowed="False for the first matmul",
            target=target,
        )


def test_accumulating_onto_a_partly_written_tile_is_refused() -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 12), buffer=nl.psum)
        nisa.nc_matmul(dst[:, 0:8], sb(a), sb(b))
        nisa.nc_matmul(dst[:, 4:12], sb(a), sb(b), accumulate=True)

    refused(
        kernel,
        small(16, 4),
        small(16, 8),
        instruction="nc_matmul",
        operand="accumulate",
        rule="uninitialized PSUM",
        received="True, 16 of 32 elements",
        allowed="False",
    )


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_accumulating_onto_an_initial_value_is_refused_before_trn3(target: str) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.memset(dst, 0.0)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=True)

    refused(
        kernel,
        small(16, 4),
        small(16, 8),
        instruction="nc_matmul",
        operand="accumulate",
        rule="values of another instruction",
        received="True, 32 of 32 elements",
        allowed="False to overwrite",
        target=target,
    )


@pytest.mark.parametrize("target", ["trn1", "trn2"])
@pytest.mark.parametrize("accumulate", [True, None])
def test_adding_to_a_result_that_another_instruction_changed_is_refused_before_trn3(
    accumulate: bool | None, target: str
) -> None:
    def kernel(a: Any, b: Any) -> Any:
        dst = tile((4, 8), buffer=nl.psum)
        nisa.nc_matmul(dst, sb(a), sb(b))
        nisa.tensor_scalar(dst[:, 2:4], dst[:, 2:4], nl.multiply, 0.5)
        nisa.nc_matmul(dst, sb(a), sb(b), accumulate=accumulate)

    refused(
        kernel,
        small(16, 4),
        small(16, 8),
        instruction="nc_matmul",
        operand="accumulate",
        rule="values of another instruction",
        received=f"{accumulate}, 8 of 32 elements",
        allowed="False to overwrite",
        target=target,
    )


def test_accumulate_takes_bools_and_none_only() -> None:
    def kernel(a: Any, b: Any) -> Any:
        nisa.nc_matmul(result(a, b), sb(a), sb(b), accumulate=1)

    refused(
        kernel,
        small(4, 4),
        small(4, 4),
        instruction="nc_matmul",
        operand="accumulate",
        rule="type",
        received="1",
        allowed="True or False",
    )
