"""neuronxcc.nki.isa: copies, constants, shuffles and DMA."""

from __future__ import annotations

import numpy as np
import pytest

from nkisim import NkiError
from tests.nkisim.legacy.isa_kernels import (
    BF16,
    full,
    instructions,
    integers,
    nisa,
    nki,
    nl,
    normal,
    refused,
    run,
    traced,
)

# -- on chip


@pytest.mark.parametrize("engine", ["vector", "scalar", "gpsimd", "unknown"])
def test_tensor_copy_on_each_engine(engine):
    x = normal(32, 20)
    got = run(lambda a: nisa.tensor_copy(a, dtype=nl.bfloat16, engine=nisa.engine[engine]), x)
    np.testing.assert_array_equal(got, x.astype(BF16))


def test_the_scalar_engine_of_trn1_copies_through_float32():
    x = np.array([[2**24 + 1, 5]], np.int32)

    def body(a):
        return nisa.tensor_copy(a, engine=nisa.scalar_engine)

    np.testing.assert_array_equal(run(body, x, target="trn1"), [[2**24, 5]])
    np.testing.assert_array_equal(run(body, x, target="trn2"), x)
    assert instructions(traced(body, x, target="trn1")) == ["activation"]


def test_a_copy_lands_in_psum_if_assigned_there():
    x = normal(32, 20)

    def body(a):
        p = nl.ndarray((32, 20), dtype=nl.float32, buffer=nl.psum)
        p[...] = nisa.tensor_copy(a)
        return nisa.tensor_copy(p)

    np.testing.assert_array_equal(run(body, x), x)
    assert instructions(traced(body, x)) == ["tensor_copy", "tensor_copy"]


def test_the_result_memory_may_be_named():
    x = normal(32, 20)

    def body(a):
        return nisa.tensor_copy(nisa.tensor_copy(a, buffer=nl.psum))

    np.testing.assert_array_equal(run(body, x), x)
    assert [w.storage.buffer.name for r in traced(body, x).records for w in r.writes][1] == "psum"
    with pytest.raises(TypeError, match=r"nc_matmul\.buffer: .* allowed psum"):
        run(lambda a: nisa.nc_matmul(a, a, buffer=nl.sbuf), normal(8, 8))


def test_gpsimd_copies_no_psum():
    def body(a):
        return nisa.tensor_copy(nisa.nc_matmul(a, a), engine=nisa.gpsimd_engine)

    refused("GpSimd Engine and PSUM", body, normal(8, 8))


def test_a_copy_from_a_run_time_offset():
    x, offsets = normal(64, 100), np.array([[70, 3, 41]], np.int32)

    def body(a, o):
        y = nl.ndarray((64, 3, 10), dtype=nl.float32)
        i_p, i_f = nl.mgrid[0:64, 0:10]
        for k in nl.affine_range(3):
            y[i_p, k, i_f] = nisa.tensor_copy_dynamic_src(a[i_p, o[0, k] + i_f])
        return y

    expected = np.stack([x[:, s : s + 10] for s in offsets[0]], axis=1)
    np.testing.assert_array_equal(run(body, x, offsets), expected)
    with pytest.raises(NkiError, match="bound"):
        run(body, x, np.array([[91, 0, 0]], np.int32))


def test_a_copy_to_a_run_time_offset():
    x, offsets = normal(64, 10), np.array([[70, 3]], np.int32)

    def body(a, o):
        y = full((64, 100), 0.0)
        i_p, i_f = nl.mgrid[0:64, 0:10]
        for k in nl.static_range(2):
            nisa.tensor_copy_dynamic_dst(dst=y[i_p, o[0, k] + i_f], src=a)
        return y

    expected = np.zeros((64, 100), np.float32)
    for s in offsets[0]:
        expected[:, s : s + 10] = x
    np.testing.assert_array_equal(run(body, x, offsets), expected)


@pytest.mark.parametrize("kind", [np.uint8, np.uint32, np.bool_])
@pytest.mark.parametrize("reverse", [False, True])
def test_tensor_copy_predicated(kind, reverse):
    x, y, p = normal(32, 20), normal(32, 20, seed=1), integers(32, 20, high=2).astype(kind)

    def body(a, b, pred):
        nisa.tensor_copy_predicated(src=a, dst=b, predicate=pred, reverse_pred=reverse)
        return b

    np.testing.assert_array_equal(run(body, x, y, p), np.where((p != 0) ^ reverse, x, y))


def test_tensor_copy_predicated_of_a_number_under_a_mask():
    y, p = integers(32, 20), integers(32, 20, high=2, dtype=np.uint8)

    def body(b, pred):
        i_p, i_f = nl.mgrid[0:32, 0:20]
        nisa.tensor_copy_predicated(src=7.0, dst=b[i_p, i_f], predicate=pred[i_p, i_f], mask=i_f < 9)
        return b

    expected = np.where((p != 0) & (np.arange(20) < 9), 7, y)
    np.testing.assert_array_equal(run(body, y, p), expected)


def test_a_predicate_of_signed_integers_is_refused():
    def body(a, pred):
        nisa.tensor_copy_predicated(src=a, dst=a, predicate=pred)
        return a

    refused("predicate", body, normal(8, 8), integers(8, 8))


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [(0.2, np.float32, np.float32(0.2)), (3.0, np.int32, 3), (-1, BF16, BF16.type(-1)), (True, np.bool_, True)],
)
def test_memset(value, dtype, expected):
    got = run(lambda: nisa.memset((30, 2, 3), value, dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.full((30, 2, 3), expected, dtype))


def test_memset_counts_the_first_dimension_as_partitions():
    got = run(lambda: nisa.memset(shape=(4, nl.par_dim(8)), value=1.0, dtype=nl.float32))
    np.testing.assert_array_equal(got, np.ones((4, 8), np.float32))


@pytest.mark.parametrize(
    ("shape", "value", "match"),
    [((129, 4), 0, "err_num_partition_exceed"), ((8,), 0, "two or more"), ((8, 4), 0.5, "integer literal")],
)
def test_rules_of_memset(shape, value, match):
    refused(match, lambda: nisa.memset(shape, value, np.int32))


def test_nc_stream_shuffle_in_each_quadrant():
    x, y = normal(64, 20), normal(64, 20, seed=1)
    order = [(i - 1) % 32 for i in range(31)] + [255]

    def body(a, b):
        nisa.nc_stream_shuffle(a, b, order)
        return b

    expected = y.copy()
    for q in (0, 32):
        expected[q : q + 31] = x[[q + i for i in order[:31]]]
    np.testing.assert_array_equal(run(body, x, y), expected)


def test_nc_stream_shuffle_broadcasts_a_partition_under_a_mask():
    x, y = normal(1, 20), normal(32, 20, seed=1)

    def body(a, b):
        i_p, i_f = nl.mgrid[0:32, 0:20]
        nisa.nc_stream_shuffle(src=a[0:1, 0:20], dst=b[i_p, i_f], shuffle_mask=[0] * 32, mask=i_f < 15)
        return b

    expected = y.copy()
    expected[:, :15] = x[0, :15]
    np.testing.assert_array_equal(run(body, x, y), expected)


def test_nc_stream_shuffle_under_a_mask_that_leaves_out_the_first_partitions():
    def body(a):
        i_p, i_f = nl.mgrid[0:64, 0:8]
        nisa.nc_stream_shuffle(a, a[i_p, i_f], list(range(32)), mask=i_p >= 32)
        return a

    with pytest.raises(NotImplementedError, match="leaves out the first partitions"):
        run(body, normal(64, 8))


def test_nc_stream_shuffle_has_32_numbers():
    def body(a):
        nisa.nc_stream_shuffle(a, a, list(range(31)))
        return a

    refused("a list of 32 integers", body, normal(32, 8))


# -- DMA


def dma(body, *arrays, target="trn2"):
    """`body` on HBM tensors, the first of which it may write and which is returned as a copy."""

    @nki.jit(mode="simulation", platform_target=target)
    def kernel(first, *rest):
        out = nl.ndarray(first.shape, dtype=first.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=first)
        body(out, *rest)
        return out

    return kernel(*arrays)


def rows(n, step):
    """Inside a kernel: row numbers 0, step, 2 * step, ... as [n, 1]."""
    return nisa.iota(step * nl.arange(n)[:, None], dtype=np.int32)


def test_dma_copy_scatters_rows():
    x, y = normal(64, 30), normal(32, 30, seed=1)

    def body(out, source):
        nisa.dma_copy(dst=out[rows(32, 2), nl.arange(30)[None, :]], src=nl.load(source))

    expected = x.copy()
    expected[::2] = y
    np.testing.assert_array_equal(dma(body, x, y), expected)


def test_dma_copy_scatters_rows_under_a_mask():
    x, y = normal(64, 30), normal(32, 30, seed=1)

    def body(out, source):
        i_p, i_f = nl.arange(32)[:, None], nl.arange(30)[None, :]
        tile = nl.load(source)
        nisa.dma_copy(dst=out[rows(32, 2), i_f], src=tile[i_p, i_f], mask=(i_p < 10) & (i_f < 7))

    expected = x.copy()
    expected[0:20:2, :7] = y[:10, :7]
    np.testing.assert_array_equal(dma(body, x, y), expected)


def test_dma_copy_adds_whole_tensors():
    x, y = normal(64, 30), normal(64, 30, seed=1)

    def body(out, source):
        nisa.dma_copy(dst=out, src=source, dst_rmw_op=nl.add)

    np.testing.assert_array_equal(dma(body, x, y), x + y)


def test_dma_copy_adds_rows():
    x, y = normal(64, 30), normal(32, 30, seed=1)

    def body(out, source):
        target = out[rows(32, 2), nl.arange(30)[None, :]]
        nisa.dma_copy(dst=target, src=nl.load(source), dst_rmw_op=np.add)

    expected = x.copy()
    expected[::2] += y
    np.testing.assert_array_equal(dma(body, x, y), expected)


def test_dma_copy_skips_rows_outside():
    x, y = normal(64, 30), normal(32, 30, seed=1)

    def body(out, source):
        target = out[rows(32, 3), nl.arange(30)[None, :]]
        nisa.dma_copy(dst=target, src=nl.load(source), oob_mode=nisa.oob_mode.skip)

    expected = x.copy()
    expected[::3] = y[:22]
    np.testing.assert_array_equal(dma(body, x, y), expected)


def test_dma_copy_refuses_rows_outside():
    def body(out, source):
        nisa.dma_copy(dst=out[rows(32, 3), nl.arange(30)[None, :]], src=nl.load(source))

    with pytest.raises(NkiError, match="bound"):
        dma(body, normal(64, 30), normal(32, 30))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"dst_rmw_op": np.multiply}, NotImplementedError, "only np.add exists"),
        ({"dst_rmw_op": np.add, "oob_mode": nisa.oob_mode.skip}, NkiError, "mode with dst_rmw_op"),
        ({"dst_rmw_op": np.add, "dge_mode": nisa.dge_mode.swdge}, NotImplementedError, "dma_compute"),
    ],
)
def test_rules_of_addition_by_dma(kwargs, error, match):
    def body(out, source):
        nisa.dma_copy(dst=out, src=nl.load(source), **kwargs)

    with pytest.raises(error, match=match):
        dma(body, normal(32, 30), normal(32, 30))


def test_hardware_descriptors_need_trn2():
    def body(out, source):
        nisa.dma_copy(dst=out, src=source, dge_mode=nisa.dge_mode.hwdge)

    x, y = normal(32, 30), normal(32, 30, seed=1)
    np.testing.assert_array_equal(dma(body, x, y), y)
    with pytest.raises(NkiError, match="hwdge on target"):
        dma(body, x, y, target="trn1")


@pytest.mark.parametrize(
    ("shape", "order"), [((32, 50), (1, 0)), ((16, 3, 20), (2, 1, 0)), ((16, 2, 3, 20), (3, 1, 2, 0))]
)
def test_dma_transpose(shape, order):
    x = normal(*shape).astype(BF16)
    np.testing.assert_array_equal(run(lambda a: nisa.dma_transpose(a), x), x.transpose(order))
    np.testing.assert_array_equal(run(lambda a: nisa.dma_transpose(a, axes=order), x), x.transpose(order))


def test_dma_transpose_to_another_type_is_a_second_instruction():
    x = normal(32, 50).astype(BF16)
    got = run(lambda a: nisa.dma_transpose(a, dtype=nl.float32), x)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x.T.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "kwargs", "match"),
    [((4, 4), {"axes": (0, 1)}, "axes of 2 dimensions"), ((2, 2, 2, 2, 2), {}, "2, 3 or 4")],
)
def test_rules_of_dma_transpose(shape, kwargs, match):
    refused(match, lambda a: nisa.dma_transpose(a, **kwargs), normal(*shape).astype(BF16))
