"""Loop iterators, the rules of scopes and of parallel trips, loop_reduce."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import NkiError
from nkisim.legacy import typing as nt
from tests.nkisim.legacy.isa_kernels import nki, nl, normal, refused, run

X = normal(16, 8)


def test_iterators_count_as_range() -> None:
    seen: list[Any] = []

    def body(t: Any) -> Any:
        for make in (nl.affine_range, nl.sequential_range, nl.static_range):
            seen.append([list(make(4)), list(make(2, 5)), list(make(9, 1, -3)), list(make(0))])
        for i in nl.affine_range(2, directives=nki.compiler.multi_buffer(2)):
            seen.append(t[i : i + 1].shape)
        return t

    run(body, X)
    assert seen[:3] == [[[0, 1, 2, 3], [2, 3, 4], [9, 6, 3], []]] * 3
    assert seen[3:] == [(1, 8), (1, 8)]
    refused("affine_range: arguments", lambda t: list(nl.affine_range(2.5)), X)
    refused("sequential_range.directives", lambda t: list(nl.sequential_range(2, directives="fast")), X)
    with pytest.raises(NkiError, match="err_nki_api_outside_of_nki_kernel"):
        nl.affine_range(2)


def after_the_loop(t: Any) -> Any:
    for _ in nl.affine_range(2):
        tmp = nl.exp(t)
    return nl.copy(tmp)


def in_a_later_trip(t: Any) -> Any:
    total = nl.zeros((16, 8), dtype=nl.float32)
    for i in nl.sequential_range(2):
        if i == 0:
            first = nl.exp(t)
        total[...] = nl.add(first, 1.0)
    return total


def shadowed(t: Any) -> Any:
    data = nl.zeros((16, 8), dtype=nl.float32)
    for _ in nl.sequential_range(3):
        data = data + t
    return data


def view_of_it(t: Any) -> Any:
    for _ in nl.affine_range(1):
        tmp = nl.ndarray((16, 8), dtype=nl.float32)
        part = tmp[0:16]
    part[...] = 1.0
    return t


@pytest.mark.parametrize("body", [after_the_loop, in_a_later_trip, shadowed, view_of_it])
def test_tiles_of_a_trip_end_with_it(body: Any) -> None:
    refused("err_local_variable_used_out_of_scope.*test_loops.py", body, X)


def test_tiles_of_unrolled_loops_stay() -> None:
    def body(t: Any) -> Any:
        for _ in nl.static_range(3):
            t = t + 1.0
        for _ in range(2):
            t = t * 2.0
        return t

    np.testing.assert_allclose(run(body, X), (X + 3) * 4, rtol=1e-6)


def test_a_loop_that_is_left_early_ends_its_scope() -> None:
    def body(t: Any) -> Any:
        out = nl.zeros((16, 8), dtype=nl.float32)
        for i in nl.sequential_range(5):
            for _ in nl.sequential_range(5):
                tmp = nl.exp(t)
                out[...] = tmp
                break
            if i == 1:
                break
        for _ in nl.affine_range(1):
            out += t
        return out

    np.testing.assert_allclose(run(body, X), np.exp(X) + X, rtol=1e-6)


def same_place(t: Any, kind: str, write: Any) -> Any:
    out = nl.zeros((16, 8), dtype=nl.float32)
    for _ in getattr(nl, kind)(3):
        write(out, t)
    return out


def test_trips_of_an_affine_range_write_places_of_their_own() -> None:
    def write(out: Any, t: Any) -> None:
        out[:, 0:4] = nl.copy(t[:, 0:4])

    rule = r"err_unexpected_output_dependencies.*trips 0 and 1 of the loop at .*test_loops\.py"
    refused(rule, lambda t: same_place(t, "affine_range", write), X)
    expected = np.where(np.arange(8) < 4, X, 0)
    np.testing.assert_array_equal(run(lambda t: same_place(t, "sequential_range", write), X), expected)
    np.testing.assert_array_equal(run(lambda t: same_place(t, "static_range", write), X), expected)


def test_stores_of_parallel_trips() -> None:
    @nki.jit(mode="simulation")
    def kernel(x: Any, n: int) -> Any:
        out = nl.ndarray((16, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        for i in nl.affine_range(2):
            for j in nl.sequential_range(2):
                nl.store(
                    out[8 * i * n : 8 * i * n + 8, 4 * j : 4 * j + 4], nl.load(x[8 * i : 8 * i + 8, 4 * j : 4 * j + 4])
                )
        return out

    np.testing.assert_array_equal(kernel(X, 1), X)
    with pytest.raises(NkiError, match="err_unexpected_output_dependencies"):
        kernel(X, 0)


def test_sums_and_inner_tiles_of_parallel_trips() -> None:
    def body(t: Any) -> Any:
        total = nl.zeros((16, 8), dtype=nl.float32)
        for i in nl.affine_range(4):
            own = nl.ndarray((16, 8), dtype=nl.float32)
            for _ in nl.sequential_range(2):
                own[...] = t * float(i)
            total += own
        return total

    np.testing.assert_allclose(run(body, X), X * 6, rtol=1e-6)


def test_a_parallel_loop_around_a_serial_one_is_the_one_that_is_refused() -> None:
    def body(t: Any) -> Any:
        out = nl.zeros((16, 8), dtype=nl.float32)
        for _ in nl.affine_range(2):
            for j in nl.sequential_range(2):
                out[:, 4 * j : 4 * j + 4] = nl.copy(t[:, 0:4])
        return out

    refused("err_unexpected_output_dependencies", body, X)


@pytest.mark.parametrize(("op", "reduce"), [(np.add, np.sum), (np.max, np.max), (nl.minimum, np.min)])
def test_loop_reduce_is_the_reduction_over_its_loops(op: Any, reduce: Any) -> None:
    x = normal(3, 2, 4, 16, 8)

    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        out = nl.ndarray((2, 16, 8), dtype=x.dtype, buffer=nl.shared_hbm)
        partial = nl.ndarray((2, nl.par_dim(16), 8), dtype=nl.float32)
        for i in nl.sequential_range(3):
            for j in nl.sequential_range(2):
                for k in nl.affine_range(4):
                    b = nl.loop_reduce(nl.load(x[i, j, k]), op=op, loop_indices=[i, k], dtype=nl.float32)
                partial[j] = b
        for j in nl.affine_range(2):
            nl.store(out[j], partial[j])
        return out

    np.testing.assert_allclose(kernel(x), reduce(x, axis=(0, 2)), rtol=1e-5, atol=1e-6)


def test_loop_reduce_over_one_loop_is_used_after_it() -> None:
    def body(t: Any) -> Any:
        for i in nl.affine_range(4):
            b = nl.loop_reduce(t * float(i), op=np.add, loop_indices=i)
        return b + 1.0

    np.testing.assert_allclose(run(body, X), X * 6 + 1, rtol=1e-6)


def test_a_running_reduction_is_assigned_in_every_trip() -> None:
    def body(t: Any) -> Any:
        total = nl.ndarray(t.shape, dtype=t.dtype)
        for i in nl.affine_range(3):
            total[...] = nl.loop_reduce(t * float(i), op=np.add, loop_indices=(i,))
        return total

    def not_reduced(t: Any) -> Any:
        total = nl.ndarray(t.shape, dtype=t.dtype)
        for i in nl.affine_range(3):
            total[...] = t * float(i)
        return total

    np.testing.assert_allclose(run(body, X), X * 3, rtol=1e-6)
    refused("err_unexpected_output_dependencies", not_reduced, X)


def test_what_loop_reduce_refuses() -> None:
    def other_index(t: Any) -> Any:
        for _ in nl.affine_range(2):
            t = nl.loop_reduce(t, op=np.add, loop_indices=[0])
        return t

    def no_reduction(t: Any) -> Any:
        for i in nl.affine_range(2):
            t = nl.loop_reduce(t, op=np.exp, loop_indices=[i])
        return t

    refused("loop_indices: value", other_index, X)
    refused("loop_reduce.op: operator: received exp", no_reduction, X)


def test_all_reduce_of_one_program() -> None:
    @nki.jit(mode="simulation")
    def kernel(x: Any) -> Any:
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.all_reduce(nl.load(x), op=np.add, program_axes=0))
        return out

    np.testing.assert_array_equal(kernel[1](X), X)
    with pytest.raises(NotImplementedError, match="all_reduce: received program_axes 0 with 2 programs"):
        kernel[2](X)


# -- loops on a tensor's value


def doubled_until(limit: Any, begin: Any = True) -> Any:
    """A body that doubles a [1, 1] tile, at least once, until it is no less than `limit`."""

    def body(t: Any) -> Any:
        cond = nt.scalar(begin)
        while cond:
            t = t * 2.0
            cond = nt.scalar(t) < limit
        return t

    return body


@pytest.mark.parametrize(("start", "limit", "expected"), [(3.0, 10.0, 12.0), (3.0, 24.0, 24.0), (50.0, 10.0, 100.0)])
def test_a_loop_tests_a_tensor_at_its_end(start: float, limit: float, expected: float) -> None:
    x = np.full((1, 1), start, np.float32)
    assert run(doubled_until(limit), x).item() == expected
    assert run(doubled_until(limit, False), x).item() == start
    assert run(lambda t: doubled_until(100.0)(doubled_until(10.0)(t)), np.full((1, 1), 3.0, np.float32)).item() == 192.0


def test_comparisons_of_scalars() -> None:
    seen: list[Any] = []

    def body(t: Any) -> Any:
        a, b = nt.scalar(t), nt.scalar(nl.copy(t) + 1.0)
        seen.extend(c.value for c in (a < b, a <= b, a > b, a >= b, a == 2, a != 2.0, nt.scalar(np.int32(4)) > a))
        return t

    run(body, np.full((1, 1), 2.0, np.float32))
    assert seen == [True, True, False, False, True, False, True]


def condition_first(t: Any) -> Any:
    while nt.scalar(t) < 10.0:
        t = t * 2.0
    return t


def twice_at_one_line(t: Any) -> Any:
    cond = nt.scalar(True)
    for _ in range(2):
        while cond:
            t = t * 2.0
            cond = nt.scalar(t) < 10.0
        # The second run of the loop begins with this.
        cond = nt.scalar(t) < 100.0
    return t


def branch(t: Any) -> Any:
    return t * 2.0 if nt.scalar(t) < 10.0 else t


@pytest.mark.parametrize(
    ("match", "body"),
    [
        ("err_while_loop_requires_unconditional_entry", condition_first),
        ("err_while_loop_requires_unconditional_entry", twice_at_one_line),
        ("err_while_loop_requires_unconditional_entry", branch),
        ("err_unsupported_expression_in_mask: type: received Scalar", lambda t: nl.exp(t, mask=nt.scalar(t) > 2)),
        ("err_dynamic_control_flow_not_supported", lambda t: t[0 : int(nt.scalar(t))]),
        ("affine_range: arguments", lambda t: [t for _ in nl.affine_range(nt.scalar(t))]),
        ("scalar: type compared with: received str", lambda t: nt.scalar(t) < "2"),
        (r"scalar\.x: type: received str", lambda t: nt.scalar("2")),
        (r"scalar\.x: err_unsupported_memory: memory: received psum", lambda t: nt.scalar(nl.transpose(t))),
        ("register_load.src", lambda t: nt.scalar(nl.copy(t.broadcast_to((1, 2))))),
    ],
)
def test_scalars_refused(match: str, body: Any) -> None:
    refused(match, body, np.full((1, 1), 3.0, np.float32))


def test_scalars_are_of_kernels() -> None:
    with pytest.raises(NkiError, match="err_nki_api_outside_of_nki_kernel"):
        nt.scalar(True)
