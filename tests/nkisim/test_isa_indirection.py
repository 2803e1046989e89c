"""Gathers and scatters through `.indirect` views in the instructions of the Vector, Scalar and GpSimd Engines."""

from __future__ import annotations

import numpy as np
import pytest

from nkisim import NkiError
from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import integers, normal, out, refused, run, sb, tile

V, S, G = nisa.engine.vector, nisa.engine.scalar, nisa.engine.gpsimd


def snake(index, count, group=16):
    """Column numbers of an .indirect view: element i of a partition group uses index[i % rows, i // rows]."""
    columns = np.empty((index.shape[0], count), np.int64)
    for p0 in range(0, index.shape[0], group):
        block = index[p0 : p0 + group]
        flat = [block[i % len(block), i // len(block)] for i in range(count)]
        columns[p0 : p0 + group] = flat
    return columns


@pytest.mark.parametrize("engine", ["vector", "scalar"])
def test_copy_gathers_and_scatters_columns(engine):
    x = np.arange(32 * 40, dtype=np.float32).reshape(32, 40)
    index = np.random.default_rng(5).permutation(32).astype(np.uint32).reshape(16, 2)
    index = np.concatenate([index, index + 8])

    def kernel(x, index):
        at = sb(index)
        gathered, scattered = tile((32, 32)), tile((32, 40))
        nisa.tensor_copy(gathered, sb(x).indirect(at, num_elem=32), engine=getattr(nisa.engine, engine))
        nisa.memset(scattered, -1.0)
        nisa.tensor_copy(scattered.indirect(at, num_elem=32), gathered, engine=getattr(nisa.engine, engine))
        return out(gathered), out(scattered)

    gathered, scattered = run(kernel, x, index, target="trn3")
    columns = snake(index, 32)
    np.testing.assert_array_equal(gathered, np.take_along_axis(x, columns, 1))
    expected = np.full((32, 40), -1.0, np.float32)
    np.put_along_axis(expected, columns, np.take_along_axis(x, columns, 1), 1)
    np.testing.assert_array_equal(scattered, expected)


def gathering(dst_buffer=nl.sbuf, **kwargs):
    """A kernel that copies through an .indirect view: out of the source, or into `dst_buffer` if that is PSUM."""

    def kernel():
        index, t = tile((16, 1), nl.uint32), tile((16, 16))
        nisa.memset(index, 1)
        nisa.memset(t, 0.0)
        if dst_buffer is nl.psum:
            nisa.tensor_copy(tile((16, 8), buffer=nl.psum).indirect(index), t, **kwargs)
        else:
            nisa.tensor_copy(tile((16, 16)), t.indirect(index), **kwargs)

    return kernel


@pytest.mark.parametrize(
    ("kernel", "target", "operand", "rule", "received", "allowed"),
    [
        (gathering(), "trn2", "src", "indirection", "trn2", "v4"),
        (gathering(engine=G), "trn3", "engine", "indirection", "gpsimd", "vector or scalar"),
        (gathering(nl.psum, engine=S), "trn3", "dst", "scatter on the Scalar Engine", "psum", "sbuf"),
    ],
)
def test_copy_refuses_indirection_where_it_is_not(kernel, target, operand, rule, received, allowed):
    refused(
        kernel, target=target, instruction="tensor_copy", operand=operand, rule=rule, received=received, allowed=allowed
    )


def test_copy_scatters_into_psum_on_the_vector_engine():
    run(gathering(nl.psum, engine=V), target="trn3")


def placed(start, shape, dtype=nl.float32, value=0, buffer=nl.sbuf, column=0):
    """Inside a kernel: a tile at a partition and byte address."""
    t = nl.ndarray(shape, dtype, buffer=buffer, address=(start, column))
    nisa.memset(t, value)
    return t


def gather_from(index_start, src_start):
    """A kernel that gathers with index and source at these partitions."""

    def kernel():
        index, src = placed(index_start, (16, 1), nl.uint32, 1), placed(src_start, (16, 8), column=64)
        nisa.tensor_copy(placed(0, (16, 16), column=256), src.indirect(index))

    return kernel


def scatter_from(index_start, buffer=nl.sbuf, gather_start=None):
    """A kernel that scatters from a source at partition 0, gathered if `gather_start` is given."""

    def kernel():
        index, src = placed(index_start, (16, 1), nl.uint32, 1), placed(0, (16, 16), column=2048, buffer=buffer)
        if gather_start is not None:
            src = src.indirect(placed(gather_start, (16, 1), nl.uint32, 1, column=8))
        nisa.tensor_copy(placed(0, (16, 8), column=512).indirect(index), src)

    return kernel


def index_off_the_quadrants():
    index, src = tile((32, 1), nl.uint32), tile((16, 8))
    nisa.memset(index, 1)
    nisa.memset(src, 0.0)
    nisa.tensor_copy(tile((16, 16)), src.indirect(index[16:32]))


@pytest.mark.parametrize(
    ("kernel", "operand", "received", "allowed"),
    [
        (index_off_the_quadrants, "src", "16", "multiple of 32"),
        (gather_from(32, 0), "src", "32", "0, that of src"),
        (scatter_from(64), "dst", "64", "0, that of src"),
        (scatter_from(64, nl.psum, 0), "dst", "64", "0, that of src's index"),
    ],
)
def test_copy_refuses_indices_on_other_partitions(kernel, operand, received, allowed):
    refused(
        kernel,
        target="trn3",
        instruction="tensor_copy",
        operand=operand,
        rule="start partition of the index",
        received=received,
        allowed=allowed,
    )


def test_copy_takes_indices_on_the_partitions_of_their_source():
    for kernel in (gather_from(32, 32), scatter_from(0), scatter_from(64, nl.psum), scatter_from(0, nl.psum, 0)):
        run(kernel, target="trn3")


def test_predicated_copy_scatters_and_gathers_the_predicate():
    x, p = normal(16, 8), integers(16, 12, low=0, high=2, seed=3, dtype=np.uint8)
    index = np.zeros((16, 1), np.uint32)
    index[:8, 0] = [3, 0, 7, 1, 9, 2, 11, 4]

    def kernel(x, p, index):
        at, dst = sb(index), tile((16, 12))
        nisa.memset(dst, 0.0)
        nisa.tensor_copy_predicated(dst.indirect(at, num_elem=8), sb(x), sb(p).indirect(at, num_elem=8))
        return out(dst)

    columns = snake(index, 8)
    expected = np.zeros((16, 12), np.float32)
    np.put_along_axis(expected, columns, np.where(np.take_along_axis(p, columns, 1) != 0, x, 0), 1)
    np.testing.assert_array_equal(run(kernel, x, p, index, target="trn3"), expected)


@pytest.mark.parametrize("columns", [slice(2, 3), slice(1, 3)])
def test_predicated_scatter_leaves_undefined_elements_undefined(columns):
    def kernel():
        index, dst, p = tile((16, 1), nl.uint32), tile((16, 4)), tile((16, 1), nl.uint8)
        nisa.memset(index, 2)
        nisa.memset(p, 1)
        nisa.tensor_copy_predicated(dst.indirect(index, num_elem=1), 5.0, p)
        return out(dst[:, columns])

    if columns.start == 2:
        np.testing.assert_array_equal(run(kernel, target="trn3"), np.full((16, 1), 5.0, np.float32))
    else:
        with pytest.raises(NkiError, match="16 of 32 elements never written"):
            run(kernel, target="trn3")


@pytest.mark.parametrize(
    ("instruction", "arguments", "compute"),
    [
        ("tensor_tensor", lambda dst, src, y: (dst, src, y, nl.subtract), lambda x, y: x - y),
        ("tensor_scalar", lambda dst, src, y: (dst, src, nl.multiply, 2.0), lambda x, y: 2 * x),
        ("exponential", lambda dst, src, y: (dst, src), lambda x, y: np.exp(x)),
    ],
)
def test_arithmetic_gathers_and_scatters_columns(instruction, arguments, compute):
    x, y = normal(16, 40), normal(16, 12, seed=1)
    index = np.random.default_rng(6).permutation(40)[:16].astype(np.uint32).reshape(16, 1)

    def kernel(x, y, index):
        at, gathered, scattered = sb(index), tile((16, 12)), tile((16, 40))
        nisa.memset(scattered, 7.0)
        call = getattr(nisa, instruction)
        call(*arguments(gathered, sb(x).indirect(at, num_elem=12), sb(y)))
        call(*arguments(scattered.indirect(at, num_elem=12), sb(y), sb(y)))
        return out(gathered), out(scattered)

    gathered, scattered = run(kernel, x, y, index, target="trn3")
    columns = snake(index, 12)
    np.testing.assert_array_equal(gathered, compute(np.take_along_axis(x, columns, 1), y))
    expected = np.full((16, 40), 7.0, np.float32)
    np.put_along_axis(expected, columns, compute(y, y), 1)
    np.testing.assert_array_equal(scattered, expected)


def misusing(instruction, *arguments, dtype=nl.float32):
    """A kernel that calls an instruction; "t" is a tile, "p" a uint8 one, "indirect" a gathering one."""

    def kernel():
        index, t, p = tile((16, 1), nl.uint32), tile((16, 16), dtype), tile((16, 16), nl.uint8)
        gathered = tile((16, 16), dtype)
        nisa.memset(index, 0)
        nisa.memset(t, 0)
        nisa.memset(gathered, 0)
        nisa.memset(p, 1)
        tiles = {"t": t, "p": p, "indirect": gathered.indirect(index)}
        getattr(nisa, instruction)(*[tiles[a] if isinstance(a, str) else a for a in arguments])

    return kernel


@pytest.mark.parametrize(
    ("instruction", "operand", "arguments"),
    [
        ("memset", "dst", ("indirect", 0.0)),
        ("tensor_copy_predicated", "src", ("t", "indirect", "p")),
        ("nc_stream_shuffle", "src", ("t", "indirect", [0] * 32)),
        ("tensor_tensor", "data2", ("t", "t", "indirect", nl.add)),
        ("tensor_scalar", "operand0", ("t", "t", nl.add, "indirect")),
        ("scalar_tensor_tensor", "data", ("t", "indirect", nl.add, 1, nl.add, "t")),
        ("scalar_tensor_tensor", "dst", ("indirect", "t", nl.add, 1, nl.add, "t")),
        ("reciprocal", "data", ("t", "indirect")),
        ("exponential", "max_value", ("t", "t", "indirect")),
    ],
)
def test_indirection_is_refused_where_it_is_not_documented(instruction, operand, arguments):
    refused(
        misusing(instruction, *arguments),
        target="trn3",
        instruction=instruction,
        operand=operand,
        rule="tensor indirection",
        received=".indirect()",
        allowed="ordinary",
    )


def test_tensor_scalar_refuses_indirection_of_32_bit_integer_arithmetic():
    refused(
        misusing("tensor_scalar", "t", "indirect", nl.add, 1, dtype=nl.int32),
        target="trn3",
        instruction="tensor_scalar",
        operand="data",
        rule="tensor indirection",
        received="int32 to int32",
        allowed="no 32-bit integer pair",
    )
    run(misusing("tensor_scalar", "t", "indirect", nl.bitwise_or, 1, dtype=nl.int32), target="trn3")


@pytest.mark.parametrize("instruction", ["tensor_scalar", "tensor_tensor", "exponential", "tensor_copy_predicated"])
def test_every_gathering_instruction_checks_the_partitions_of_the_index(instruction):
    rest = {"tensor_scalar": (nl.add, 1), "tensor_tensor": ("t", nl.add), "exponential": ()}

    def kernel():
        index, t, p = tile((32, 1), nl.uint32), tile((16, 16)), tile((16, 16), nl.uint8)
        nisa.memset(index, 0)
        nisa.memset(t, 0.0)
        nisa.memset(p, 0)
        if instruction == "tensor_copy_predicated":
            nisa.tensor_copy_predicated(tile((16, 16)), t, p.indirect(index[16:32]))
        else:
            more = [t if a == "t" else a for a in rest[instruction]]
            getattr(nisa, instruction)(tile((16, 16)), t.indirect(index[16:32]), *more)

    refused(
        kernel,
        target="trn3",
        instruction=instruction,
        operand={"tensor_scalar": "data", "tensor_tensor": "data1", "exponential": "src"}.get(instruction, "predicate"),
        rule="start partition of the index",
        received="16",
        allowed="multiple of 32",
    )
