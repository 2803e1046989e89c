"""Programs that the adapter for `neuronxcc.nki` builds: loops, addresses, arguments, and what it refuses."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import _neuronxcc as nki
from contributed import _neuronxcc_isa as nisa
from contributed import _neuronxcc_language as nl
from contributed._neuronxcc_launch import build
from contributed._neuronxcc_vendor import nki as vendor
from nkisim.errors import NkiError


def run(function: Any, *args: Any, cores: int = 1) -> Any:
    return nki.simulate(nki.jit(function)[cores])(*args)


def device_numbers(x: Any) -> Any:
    """Integers in SBUF that the host does not know."""
    known = nl.ndarray(x.shape, dtype=nl.int32)
    nisa.dma_copy(dst=known, src=x)
    unknown = nl.ndarray(x.shape, dtype=nl.int32)
    nisa.tensor_scalar(dst=unknown, data=known, op0=nl.add, operand0=0)
    return unknown


def register(x: Any) -> Any:
    r = nisa.register_alloc()
    nisa.register_load(r, x)
    return r


def filled(shape: Any, value: float) -> Any:
    t = nl.ndarray(shape, dtype=nl.float32)
    nisa.memset(dst=t, value=value)
    return t


def stored(t: Any) -> Any:
    out = nl.ndarray(t.shape, dtype=t.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=t)
    return out


# -- loops


@pytest.mark.parametrize("bounds", [(0, 0), (0, 3), (2, 5), (4, 2)])
def test_a_loop_whose_bounds_the_host_knows(bounds: tuple[int, int]) -> None:
    def kernel(x):
        total = filled((4, 2), 0.0)
        tile = nl.ndarray((1, 2), dtype=nl.int32)
        nisa.dma_copy(dst=tile, src=x)

        def body(j):
            nisa.tensor_scalar(dst=total, data=total, op0=nl.add, operand0=float(10**j))

        nl.fori_loop(register(x[0, 0:1]), register(tile[:, 1:2]), body)
        return stored(total)

    expected = sum(10.0**j for j in range(*bounds))
    np.testing.assert_array_equal(run(kernel, np.array([bounds], np.int32)), np.full((4, 2), expected))


@pytest.mark.parametrize("end", range(-1, 5))
def test_a_loop_whose_end_the_device_knows_makes_that_many_trips(end: int) -> None:
    def kernel(x):
        n, bound = filled((128, 3), 0.0), register(device_numbers(x)[:, 0:1])
        sums = nl.ndarray((2, 3), dtype=nl.float32, buffer=nl.psum)
        ones = filled((128, 2), 1.0)
        nisa.memset(dst=sums, value=5.0)
        last = nl.ndarray((128, 1), dtype=nl.bfloat16)

        def body(j):
            # A tensor in SBUF, one in PSUM that a product is added to, a new one, and one that was never written.
            step = filled((128, 3), float(10**j))
            nisa.tensor_tensor(dst=n, data1=n, data2=step, op=nl.add)
            nisa.nc_matmul(dst=sums, stationary=ones, moving=step, accumulate=True)
            nisa.memset(dst=last, value=float(j))

        nl.fori_loop(1, nki.at_most(bound, 3), body)
        both = nl.ndarray((2, 3), dtype=nl.float32)
        nisa.tensor_copy(dst=both, src=sums)
        return stored(n), stored(both), stored(last)

    trips = [j for j in range(1, end) if j < 4]
    n, sums, last = run(kernel, np.array([[end]], np.int32))
    np.testing.assert_array_equal(n, np.full((128, 3), sum(10.0**j for j in trips)))
    np.testing.assert_array_equal(sums, np.full((2, 3), 5.0 + 128 * sum(10.0**j for j in trips)))
    if trips:
        np.testing.assert_array_equal(last.astype(np.float32), np.full((128, 1), trips[-1]))


@pytest.mark.parametrize("start", range(4))
def test_a_loop_whose_start_the_device_knows(start: int) -> None:
    def kernel(x):
        n = filled((5, 1), 0.0)

        def body(j):
            nisa.tensor_scalar(dst=n, data=n, op0=nl.add, operand0=float(10**j))

        nl.fori_loop(nki.at_most(register(device_numbers(x)), 2), 3, body)
        return stored(n)

    expected = sum(10.0**j for j in range(max(start, 1), 3))
    np.testing.assert_array_equal(run(kernel, np.array([[start]], np.int32)), np.full((5, 1), expected))


@pytest.mark.parametrize("inner", [0, 1, 2])
@pytest.mark.parametrize("outer", [0, 1, 2])
def test_loops_within_loops(outer: int, inner: int) -> None:
    def kernel(x):
        numbers = device_numbers(x)
        a, b = filled((3, 2), 0.0), filled((3, 2), 0.0)

        def of_outer(_):
            nisa.tensor_scalar(dst=a, data=a, op0=nl.add, operand0=1.0)
            nl.fori_loop(0, nki.at_most(register(numbers[:, 1:2]), 2), of_inner)
            nisa.tensor_tensor(dst=a, data1=a, data2=b, op=nl.add)

        def of_inner(_):
            nisa.tensor_scalar(dst=b, data=b, op0=nl.add, operand0=1.0)

        nl.fori_loop(0, nki.at_most(register(numbers[:, 0:1]), 2), of_outer)
        return stored(a), stored(b)

    a = b = 0
    for _ in range(outer):
        a, b = a + 1 + b + inner, b + inner
    got = run(kernel, np.array([[outer, inner]], np.int32))
    np.testing.assert_array_equal(got[0], np.full((3, 2), a))
    np.testing.assert_array_equal(got[1], np.full((3, 2), b))


@pytest.mark.parametrize("there", [0, 1])
def test_stores_of_a_trip_that_is_not_made_leave_memory_alone(there: int) -> None:
    def kernel(x, rows):
        numbers = device_numbers(x)
        scratch = nl.ndarray((3, 8, 4), dtype=nl.float32, buffer=nl.private_hbm)
        for i in range(3):
            nisa.dma_copy(dst=scratch[i], src=filled((8, 4), float(i)))
        index = nl.ndarray((2, 1), dtype=nl.int32)
        nisa.dma_copy(dst=index, src=rows)
        unknown = device_numbers(rows)

        def body(_):
            nisa.dma_copy(dst=scratch[0, 2:6], src=filled((4, 4), 7.0))
            # Rows that the host knows, rows that it does not, and from one place in HBM to another.
            for i, chosen in ((1, index), (2, unknown)):
                dst = scratch[i].ap([[4, 2], [1, 4]], vector_offset=chosen)
                nisa.dma_copy(dst=dst, src=filled((2, 4), 8.0), oob_mode=nisa.oob_mode.skip)
            nisa.dma_copy(dst=scratch[1, 6:8], src=scratch[0, 4:6])

        nl.fori_loop(0, nki.at_most(register(numbers), 1), body)
        out = nl.ndarray((3, 8, 4), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=scratch)
        return out

    expected = np.repeat(np.arange(3.0, dtype=np.float32), 32).reshape(3, 8, 4)
    if there:
        expected[0, 2:6] = 7.0
        expected[1:, 3] = 8.0
        expected[1, 6:8] = 7.0
    got = run(kernel, np.array([[there]], np.int32), np.array([[3], [-1]], np.int32))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("trips", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_stores_in_loops_within_loops_are_made_if_all_trips_are(trips: tuple[int, int, int]) -> None:
    def kernel(x):
        numbers, rows = device_numbers(x), device_numbers(x)
        out = stored(filled((2, 3), 0.0))

        def of_outer(_):
            nl.fori_loop(0, nki.at_most(register(numbers[:, 1:2]), 1), of_middle)

        def of_middle(_):
            nl.fori_loop(0, nki.at_most(register(numbers[:, 2:3]), 1), of_inner)

        def of_inner(_):
            nisa.dma_copy(dst=out[0:1], src=filled((1, 3), 1.0))
            row = out.ap([[3, 1], [1, 3]], vector_offset=rows[:, 3:4])
            nisa.dma_copy(dst=row, src=filled((1, 3), 2.0), oob_mode=nisa.oob_mode.skip)

        nl.fori_loop(0, nki.at_most(register(numbers[:, 0:1]), 1), of_outer)
        return out

    got = run(kernel, np.array([[*trips, 1]], np.int32))
    np.testing.assert_array_equal(got, min(trips) * np.repeat([[1.0], [2.0]], 3, axis=1))


def test_the_host_knows_after_a_loop_what_every_way_through_it_wrote() -> None:
    def kernel(x, control):
        numbers = device_numbers(x)
        copy = nl.ndarray((1, 2), dtype=nl.int32, buffer=nl.private_hbm)

        def write(_):
            nisa.dma_copy(dst=copy, src=control)

        nl.fori_loop(0, nki.at_most(register(numbers[:, 0:1]), 1), write)
        nl.fori_loop(nki.at_most(register(numbers[:, 0:1]), 1), 1, write)
        n = filled((2, 2), 0.0)

        def body(_):
            nisa.tensor_scalar(dst=n, data=n, op0=nl.add, operand0=1.0)

        # Without `at_most`: both ways gave the same bounds.
        nl.fori_loop(register(copy[0, 0:1]), register(copy[0, 1:2]), body)
        return stored(n)

    for there in (0, 1):
        got = run(kernel, np.array([[there]], np.int32), np.array([[2, 5]], np.int32))
        np.testing.assert_array_equal(got, np.full((2, 2), 3.0))


@pytest.mark.parametrize("there", [0, 1])
def test_the_host_does_not_know_what_two_ways_through_a_loop_wrote(there: int) -> None:
    def kernel(x, control, say):
        numbers = device_numbers(x)
        end = nl.ndarray((1, 1), dtype=nl.int32)
        nisa.dma_copy(dst=end, src=control[:, 0:1])

        def write(_):
            nisa.dma_copy(dst=end, src=control[:, 1:2])

        nl.fori_loop(0, nki.at_most(register(numbers), 1), write)
        n = filled((2, 2), 0.0)

        def body(_):
            nisa.tensor_scalar(dst=n, data=n, op0=nl.add, operand0=1.0)

        nl.fori_loop(0, nki.at_most(register(end), 4) if say else register(end), body)
        return stored(n)

    args = np.array([[there]], np.int32), np.array([[1, 3]], np.int32)
    np.testing.assert_array_equal(run(kernel, *args, True), np.full((2, 2), 3.0 if there else 1.0))
    assert "say `at_most` of it" in refused(kernel, *args, False)


# -- addresses


@pytest.mark.parametrize("known", [True, False])
def test_a_number_moves_a_pattern(known: bool) -> None:
    def kernel(x, at):
        number = at if known else device_numbers(at)
        if known:
            number = nl.ndarray((1, 1), dtype=nl.int32)
            nisa.dma_copy(dst=number, src=at)
        t = nl.ndarray((4, 3, 2), dtype=nl.float32)
        # Rows of 6, from row `at` + 1 on: a partition takes every second, in it three pairs.
        src = x.ap([[12, 4], [2, 3], [1, 2]], offset=6, scalar_offset=number)
        nisa.dma_copy(dst=t, src=src)
        out = nl.ndarray((12, 6), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=x)
        nisa.dma_copy(dst=out.select(0, register(at[0, 0:1]) if known else number), src=filled((1, 6), 0.5))
        return stored(t), out

    x = np.arange(72, dtype=np.float32).reshape(12, 6)
    for at in (0, 3):
        t, out = run(kernel, x, np.array([[at]], np.int32))
        np.testing.assert_array_equal(t, x[at + 1 : at + 9 : 2].reshape(4, 3, 2))
        expected = x.copy()
        expected[at] = 0.5
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, -1, 0, 2], [4, 99, -1, 1], [2, 2, 1, 1], [-1, -1, -1, -1]])
def test_rows_that_numbers_name(rows: list[int], known: bool) -> None:
    def kernel(x, index):
        chosen = device_numbers(index)
        if known:
            chosen = nl.ndarray((7, 1), dtype=nl.int32)
            nisa.dma_copy(dst=chosen, src=index)
        chosen = chosen[3:7]  # a partition at which engines do not begin
        t = filled((4, 2, 5), -1.0)
        # Two rows of five each, which need not begin at an even one.
        nisa.dma_copy(dst=t, src=x.ap([[5, 4], [1, 10]], vector_offset=chosen), oob_mode=nisa.oob_mode.skip)
        part = filled((4, 5), -1.0)
        # Of a part of the tensor its own rows alone.
        nisa.dma_copy(dst=part, src=x[1:4].ap([[5, 4], [1, 5]], vector_offset=chosen), oob_mode=nisa.oob_mode.skip)
        wide = filled((4, 10), -1.0)
        pairs = x.reshape((3, 10)).ap([[10, 4], [1, 10]], vector_offset=chosen)
        nisa.dma_copy(dst=wide, src=pairs, oob_mode=nisa.oob_mode.skip)
        return stored(t), stored(part), stored(wide)

    x = np.arange(30, dtype=np.float32).reshape(6, 5)
    expected = [np.full((4, n), -1.0, np.float32) for n in (10, 5, 10)]
    for p, row in enumerate(rows):
        for out, source, n_rows, width in zip(expected, (x, x[1:], x), (6, 3, 3), (5, 5, 10), strict=True):
            if 0 <= row < n_rows:
                out[p] = source.reshape(-1)[width * row :][: out.shape[1]]
    got = run(kernel, x, np.array([0, 0, 0, *rows], np.int32).reshape(7, 1))
    for out, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(out.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("known", [True, False])
def test_a_row_that_is_not_there_is_an_error_unless_skipped(known: bool) -> None:
    def kernel(x, index):
        chosen = nl.ndarray((2, 1), dtype=nl.int32)
        nisa.dma_copy(dst=chosen, src=index)
        t = filled((2, 5), -1.0)
        rows = chosen if known else device_numbers(index)
        nisa.dma_copy(dst=t, src=x.ap([[5, 2], [1, 5]], vector_offset=rows))
        return stored(t)

    x = np.arange(30, dtype=np.float32).reshape(6, 5)
    np.testing.assert_array_equal(run(kernel, x, np.array([[5], [1]], np.int32)), x[[5, 1]])
    with pytest.raises((AssertionError, NkiError), match=r"6"):
        run(kernel, x, np.array([[6], [1]], np.int32))


@pytest.mark.parametrize("there", [0, 1])
def test_a_load_of_a_trip_that_is_not_made_may_name_any_row(there: int) -> None:
    def kernel(x, index, count):
        rows, t = device_numbers(index), filled((2, 5), -1.0)

        def body(_):
            nisa.dma_copy(dst=t, src=x.ap([[5, 2], [1, 5]], vector_offset=rows))

        nl.fori_loop(0, nki.at_most(register(device_numbers(count)), 1), body)
        return stored(t)

    x = np.arange(30, dtype=np.float32).reshape(6, 5)
    rows = [3, 5] if there else [-7, 1000]
    got = run(kernel, x, np.array(rows, np.int32).reshape(2, 1), np.array([[there]], np.int32))
    np.testing.assert_array_equal(got, x[rows] if there else np.full((2, 5), -1.0))


def test_row_numbers_are_added_and_multiplied_as_integers() -> None:
    def kernel(x, number, index):
        pairs = x[0 : x.shape[0] - 1].reshape((x.shape[0] // 2, 2))
        one, rows = nl.ndarray((1, 2), dtype=nl.uint8), nl.ndarray((2, 2), dtype=nl.uint8)
        nisa.dma_copy(dst=one, src=pairs.select(0, device_numbers(number)).expand_dim(0))
        nisa.memset(dst=rows, value=9)
        where = pairs.ap([[2, 2], [1, 2]], vector_offset=device_numbers(index))
        nisa.dma_copy(dst=rows, src=where, oob_mode=nisa.oob_mode.skip)
        return stored(one), stored(rows)

    # The last pair ends past what float32 counts, and twice the last number is 0 in 32 bits.
    x = np.zeros(2**24 + 7, np.uint8)
    x[:2], x[-3:-1] = (3, 4), (1, 2)
    last = x.size // 2 - 1
    one, rows = run(kernel, x, np.array([[last]], np.int32), np.array([[0], [-(2**31)]], np.int32))
    np.testing.assert_array_equal(one, [[1, 2]])
    np.testing.assert_array_equal(rows, [[3, 4], [9, 9]])


def test_a_store_to_one_place_from_several_partitions_is_refused() -> None:
    def kernel(x):
        out = stored(filled((4, 2), 0.0))
        nisa.dma_copy(dst=out.ap([[0, 4], [1, 2]]), src=filled((4, 2), 1.0))
        return out

    with pytest.raises(AssertionError, match="a store to one place from several"):
        run(kernel, np.zeros(1, np.float32))


def test_a_load_repeats_what_its_pattern_repeats() -> None:
    def kernel(x):
        t = nl.ndarray((4, 3, 2), dtype=nl.float32)
        nisa.dma_copy(dst=t, src=x.ap([[0, 4], [0, 3], [1, 2]], offset=1))
        return stored(t)

    got = run(kernel, np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(got, np.broadcast_to(np.array([1.0, 2.0], np.float32), (4, 3, 2)))


def test_a_pattern_over_several_dimensions_on_the_partitions() -> None:
    def kernel(x):
        t = nl.ndarray((6, 4), dtype=nl.float32)
        nisa.dma_copy(dst=t, src=x[:, 1:3, :])
        return stored(t)

    x = np.arange(48, dtype=np.float32).reshape(3, 4, 4)
    np.testing.assert_array_equal(run(kernel, x), x[:, 1:3].reshape(6, 4))


# -- instructions that take more than one


def test_a_reduction_over_the_last_of_three_and_over_all_dimensions() -> None:
    def kernel(x):
        t = nl.ndarray((3, 4, 5), dtype=nl.float32)
        nisa.dma_copy(dst=t, src=x)
        last, every, turned = (nl.ndarray(shape, dtype=nl.float32) for shape in ((3, 4), (3, 1), (3, 5)))
        nisa.tensor_reduce(dst=last, op=nl.add, data=t, axis=2)
        nisa.tensor_reduce(dst=every, op=nl.maximum, data=t[:, 1:3, 0:4], axis=(1, 2), negate=True)
        nisa.tensor_reduce(dst=turned, op=nl.add, data=t.permute((0, 2, 1)), axis=2)
        return stored(last), stored(every), stored(turned)

    x = np.random.default_rng(0).integers(-9, 9, (3, 4, 5)).astype(np.float32)
    last, every, turned = run(kernel, x)
    np.testing.assert_array_equal(last, x.sum(axis=2))
    np.testing.assert_array_equal(every[:, 0], -x[:, 1:3, 0:4].max(axis=(1, 2)))
    np.testing.assert_array_equal(turned, x.sum(axis=1))


def test_numbers_of_places() -> None:
    def kernel():
        a, b, c = (nl.ndarray((3, 2, 4), dtype=nl.float32) for _ in range(3))
        nisa.iota(dst=a, pattern=[[10, 2], [1, 4]], offset=100, channel_multiplier=1000)
        nisa.iota(dst=b, pattern=[[0, 2], [-1, 4]], offset=5)
        nisa.affine_select(
            dst=c,
            pattern=[[4, 2], [1, 4]],
            channel_multiplier=-2,
            on_true_tile=a,
            on_false_value=-1.0,
            cmp_op=nl.greater_equal,
        )
        return stored(a), stored(b), stored(c)

    a, b, c = run(kernel)
    p, i, j = np.indices((3, 2, 4))
    np.testing.assert_array_equal(a, 100 + 1000 * p + 10 * i + j)
    np.testing.assert_array_equal(b, 5 - j)
    np.testing.assert_array_equal(c, np.where(4 * i + j - 2 * p >= 0, 100 + 1000 * p + 10 * i + j, -1))


def test_a_range_of_columns_that_are_counted_from_a_start() -> None:
    def kernel(x, bounds):
        t, b = nl.ndarray((3, 8), dtype=nl.float32), nl.ndarray((3, 2), dtype=nl.float32)
        nisa.dma_copy(dst=t, src=x)
        nisa.dma_copy(dst=b, src=bounds)
        chosen, top = nl.ndarray((3, 8), dtype=nl.float32), nl.ndarray((3, 1), dtype=nl.float32)
        nisa.range_select(
            dst=chosen,
            on_true_tile=t,
            comp_op0=nl.greater_equal,
            comp_op1=nl.less,
            bound0=b[:, 0:1],
            bound1=b[:, 1:2],
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
            reduce_res=top,
            range_start=100,
        )
        return stored(chosen), stored(top)

    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    bounds = np.array([[100, 103], [0, 102], [105, 200]], np.float32)
    chosen, top = run(kernel, x, bounds)
    column = 100 + np.arange(8)
    expected = np.where((column >= bounds[:, :1]) & (column < bounds[:, 1:]), x, np.finfo(np.float32).min)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_array_equal(top[:, 0], [2, 9, 23])


def test_a_product_with_strided_columns() -> None:
    def kernel(x, y):
        a, b = nl.ndarray((4, 6), dtype=nl.float32), nl.ndarray((4, 12), dtype=nl.float32)
        nisa.dma_copy(dst=a, src=x)
        nisa.dma_copy(dst=b, src=y)
        ps = nl.ndarray((6, 4, 3), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=ps.permute((0, 2, 1)), stationary=a, moving=b, accumulate=False)
        nisa.nc_matmul(dst=ps.permute((0, 2, 1)), stationary=a, moving=b, accumulate=True)
        out = nl.ndarray((6, 4, 3), dtype=nl.float32)
        nisa.tensor_copy(dst=out, src=ps)
        return stored(out)

    rng = np.random.default_rng(1)
    x, y = (rng.integers(-5, 5, shape).astype(np.float32) for shape in ((4, 6), (4, 12)))
    np.testing.assert_array_equal(run(kernel, x, y), 2 * (x.T @ y).reshape(6, 3, 4).transpose(0, 2, 1))


def test_operands_in_reverse() -> None:
    def kernel(x):
        t, a, b = (nl.ndarray((2, 3), dtype=nl.float32) for _ in range(3))
        nisa.dma_copy(dst=t, src=x)
        ops = {"op0": nl.subtract, "operand0": 10.0, "op1": nl.subtract}
        nisa.tensor_scalar(dst=a, data=t, reverse0=True, operand1=3.0, reverse1=True, **ops)
        nisa.scalar_tensor_tensor(dst=b, data=t, reverse0=True, operand1=t, reverse1=True, **ops)
        return stored(a), stored(b)

    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    a, b = run(kernel, x)
    np.testing.assert_array_equal(a, 3 - (10 - x))
    np.testing.assert_array_equal(b, x - (10 - x))


def test_a_second_product_says_whether_it_is_added() -> None:
    def kernel(x):
        a = nl.ndarray((4, 4), dtype=nl.float32)
        nisa.dma_copy(dst=a, src=x)
        ps = nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=ps, stationary=a, moving=a)
        nisa.nc_matmul(dst=ps, stationary=a, moving=a)
        return stored(a)

    with pytest.raises(AssertionError, match="accumulate: received None for a tile with a product"):
        run(kernel, np.eye(4, dtype=np.float32))


# -- launches


def test_cores_run_one_after_the_other_into_the_same_results() -> None:
    def kernel(x):
        out = nl.ndarray((2, 3, 4), dtype=nl.float32, buffer=nl.shared_hbm)
        assert nl.num_programs() == 2
        nisa.dma_copy(dst=out[nl.program_id(0)], src=filled((3, 4), 1.0 + nl.program_id(0)))
        return out

    got = run(kernel, np.zeros(1, np.float32), cores=2)
    np.testing.assert_array_equal(got, np.repeat([1.0, 2.0], 12).reshape(2, 3, 4))


def test_written_arguments_change_in_place() -> None:
    def kernel(x, k, v):
        for cache, value in ((k, 3.0), (v, 4.0)):
            nisa.dma_copy(dst=cache[1:3], src=filled((2, 5), value))
        return k, v

    x, k, v = np.zeros(3, np.float32), np.ones((4, 5), np.float32), np.ones((4, 5), np.float32)
    got = run(kernel, x, k, v)
    assert got[0] is k
    assert got[1] is v
    np.testing.assert_array_equal(k[:, 0], [1, 3, 3, 1])
    np.testing.assert_array_equal(v[:, 0], [1, 4, 4, 1])


def test_a_kernel_sees_the_target_of_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(x):
        return stored(filled((1, 1), float(nisa.get_nc_version().value)))

    for target, number in (("trn1", 2), ("trn2", 3), ("inf2", 2)):
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", target)
        assert run(kernel, np.zeros(1, np.float32)) == number


def doubled(x):
    t = nl.ndarray(x.shape, dtype=x.dtype)
    nisa.dma_copy(dst=t, src=x)
    nisa.tensor_tensor(dst=t, data1=t, data2=t, op=nl.add)
    return stored(t)


def in_float32(function: Any, arrays: list[Any]) -> Any:
    """What AWS's simulator does with narrow floats."""
    results = vendor.simulate_kernel(vendor.jit(function), *arrays)
    return [np.asarray(x).astype(np.float32) for x in results]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3])
def test_results_have_the_type_that_the_kernel_gave_them(dtype: Any) -> None:
    def written(k, v):
        for argument in (k, v):
            nisa.dma_copy(dst=argument[0:1], src=k[1:2])
        return k, v

    x = np.arange(4).reshape(2, 2).astype(dtype)
    for run_by in (in_float32, nki._simulated):
        got = build(nki.jit(doubled), (x,), run_by)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(np.float32), [[0, 2], [4, 6]])
        k, v = x.copy(), x.copy()
        assert build(nki.jit(written), (k, v), run_by)[1] is v
        np.testing.assert_array_equal(v.astype(np.float32), [[2, 3], [2, 3]])


def test_a_device_runs_by_baremetal_and_is_timed_by_benchmark() -> None:
    # The simulated neuronxcc stands in for both, and says so.
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(nki.run_on_device(nki.jit(doubled), x), 2 * x)
    percentiles = nki.benchmark(nki.jit(doubled), (x,), (50, 99), warmup=1, iters=2)
    assert percentiles.keys() == {50, 99}
    assert 0 < percentiles[50] <= percentiles[99]


# -- what is refused


def refused(function: Any, *args: Any) -> str:
    with pytest.raises(NotImplementedError) as caught:
        run(function, *args)
    return str(caught.value)


def test_a_loop_without_a_bound_is_refused() -> None:
    def no_most(x):
        nl.fori_loop(0, register(device_numbers(x)), lambda _: None)

    def no_start(x):
        numbers = device_numbers(x)
        nl.fori_loop(register(numbers), nki.at_most(register(numbers), 3), lambda _: None)

    def loaded_again(x):
        bound = nki.at_most(register(device_numbers(x)), 3)
        nisa.register_load(bound, device_numbers(x))
        nl.fori_loop(0, bound, lambda _: None)

    one = np.zeros((1, 1), np.int32)
    assert "say `at_most` of it" in refused(loaded_again, one)
    assert "a loop with a bound that only the device knows; say `at_most` of it" in refused(no_most, one)
    assert "a loop of which the device alone knows both bounds" in refused(no_start, one)


def test_what_a_kernel_returns_is_limited() -> None:
    def five(x):
        return tuple(stored(filled((1, 1), 0.0)) for _ in range(5))

    def result_and_argument(x):
        nisa.dma_copy(dst=x, src=filled((1, 1), 0.0))
        return stored(filled((1, 1), 0.0)), x

    one = np.zeros((1, 1), np.float32)
    assert "a kernel with 5 results that writes 0 of its arguments; allowed 1 to 4 results" in refused(five, one)
    assert "a kernel with 1 results that writes 1 of its arguments" in refused(result_and_argument, one)


def test_a_written_argument_that_is_not_returned_is_refused() -> None:
    def kernel(x, y):
        for argument in (x, y):
            nisa.dma_copy(dst=argument, src=filled((1, 1), 0.0))
        return x

    one = np.zeros((1, 1), np.float32)
    with pytest.raises(AssertionError, match="a kernel returns the arguments that it writes"):
        run(kernel, one, one.copy())


def test_arrays_of_other_packages_are_refused() -> None:
    class Tensor:
        shape = (1, 1)

    with pytest.raises(TypeError, match="doubled: received a Tensor, allowed NumPy arrays"):
        run(doubled, Tensor())


def test_what_is_no_kernel_array_number_of_cores_or_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((1, 1), np.float32)
    with pytest.raises(TypeError, match=r"kernel: received <built-in function len>, allowed a function under @nki.jit"):
        nki.simulate(len)(x)
    with pytest.raises(TypeError, match="doubled: received an array of float64, allowed float32, bfloat16"):
        run(doubled, x.astype(np.float64))
    for cores in (0, 3):
        with pytest.raises(ValueError, match=rf"doubled\[cores\]: received {cores}, allowed 1 or 2"):
            run(doubled, x, cores=cores)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    with pytest.raises(ValueError, match="target: received trn3, allowed trn1, inf2, trn2 with neuronxcc"):
        run(doubled, x)


def test_more_arrays_than_a_function_has_parameters_are_refused() -> None:
    def kernel(*arrays):
        return doubled(arrays[-1])

    arrays = [np.full((2, 3), float(i), np.float32) for i in range(25)]
    np.testing.assert_array_equal(run(kernel, *arrays[:24]), np.full((2, 3), 46.0))
    with pytest.raises(NotImplementedError, match="a kernel with 25 arrays, allowed 24"):
        run(kernel, *arrays)


def test_copies_on_chip_by_dma_are_refused() -> None:
    def kernel(x):
        nisa.dma_copy(dst=filled((2, 2), 0.0), src=filled((2, 2), 0.0))
        return stored(filled((1, 1), 0.0))

    assert "DMA from SBUF to SBUF" in refused(kernel, np.zeros(1, np.float32))


def test_names_that_the_adapter_does_not_have_are_named() -> None:
    with pytest.raises(AttributeError, match=r"nl\.softmax: not in the adapter for neuronxcc\.nki"):
        _ = nl.softmax


def test_kernels_and_instructions_do_not_run_by_themselves() -> None:
    with pytest.raises(TypeError, match=r"stored: call it with contributed\._nki\.simulate_kernel or run_on_device"):
        nki.jit(stored)(np.zeros(1))
    with pytest.raises(RuntimeError, match="an instruction outside of a kernel"):
        filled((1, 1), 0.0)
