"""NkiTensor: attributes, `[]`, `slice`, `select`, `vector_select`, and registers as indices."""

from __future__ import annotations

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.objects import VirtualRegister
from nkisim.tensor import NkiTensor
from tests.nkisim.harness import out, run, sb, tile
from tests.nkisim.tensors import array_like, assert_refused, refusal, tensor, values

# -- attributes


def test_a_fresh_tensor_is_as_the_language_guide_shows_it():
    def kernel():
        t = nl.ndarray((128, 64), dtype=nl.float32, buffer=nl.sbuf)
        assert t.shape == (128, 64)
        assert t.strides == (64, 1)
        assert t.offset == 0
        assert t.dtype == nl.float32 == "float32"
        assert t.buffer == nl.sbuf
        assert t.ndim == 2
        assert t.size == 128 * 64
        assert t.is_contiguous()
        assert not t.is_indirect()
        assert nl.ndarray((2, 2), nl.int8, name="weights").name == "weights"

    run(kernel)


def test_repr_names_what_a_message_needs():
    assert repr(tensor((4, 2), nl.bfloat16)) == "NkiTensor(t: bfloat16[4, 2] in sbuf)"


def test_a_tensor_has_no_value_while_the_kernel_is_built():
    t = tensor((4, 2))
    assert_refused(lambda: bool(t), "__bool__", "", "Python control flow", "t: float32[4, 2]", "compile-time")
    with pytest.raises(TypeError, match="not iterable"):
        iter(t)
    with pytest.raises(TypeError):
        len(t)
    with pytest.raises(NotImplementedError, match="__setitem__"):
        t[0] = 1.0


def test_tensors_compare_by_identity():
    t = tensor((4, 2))
    assert t == t
    assert t != t[...]
    assert len({t, t, t[...]}) == 2


def test_placeholder_without_storage():
    t = NkiTensor((128, 4), "float32", None, nl.sbuf, "x")
    assert (t.shape, t.strides, t.name, t.storage) == ((128, 4), (4, 1), "x", None)
    assert t[:, 1:3].shape == (128, 2)


def test_rebinding_a_storage_handle():
    t = tensor((4, 6), nl.float32)
    again = NkiTensor((4, 3, 2), nl.int32, t.storage, nl.sbuf)
    np.testing.assert_array_equal(values(again), values(t).view(np.int32).reshape(4, 3, 2))
    for shape, dtype, buffer in (
        ((4, 7), nl.float32, nl.sbuf),
        ((2, 12), nl.float32, nl.sbuf),
        ((4, 6), nl.float32, nl.psum),
    ):
        error = refusal(NkiTensor, shape, dtype, t.storage, buffer)
        assert (error.instruction, error.operand) == ("NkiTensor", "storage")
        assert "[4, 6] in sbuf" in str(error.allowed)
    h = tensor((4, 6), nl.float32, "private_hbm")
    assert NkiTensor((24,), nl.float32, h.storage, nl.hbm).shape == (24,)


def test_views_share_storage():
    t = tensor((4, 8))
    u, v = t.reshape((4, 2, 4)), t[:, 2:4]
    values(u)[...] = -1.0
    assert (values(v) == -1.0).all()


def test_writing_through_one_view_is_seen_through_another():
    def kernel(x):
        t = sb(x)
        u = t.reshape((4, 2, 4))
        nisa.memset(u[:, 1, :], 7.0)
        return out(t[:, 2:6])

    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    expected = x.copy()
    expected[:, 4:] = 7.0
    np.testing.assert_array_equal(run(kernel, x), expected[:, 2:6])


# -- indexing


ON_CHIP_KEYS = [
    ((0, 0, 10), (1, 1)),
    ((slice(None), 0), (64, 64)),
    ((slice(None), 0, 10), (64, 1)),
    ((slice(0, 64), 0, slice(0, 64)), (64, 64)),
    ((slice(None), 0, slice(None)), (64, 64)),
    ((slice(None), slice(None), slice(None, None, 2)), (64, 64, 32)),
    (Ellipsis, (64, 64, 64)),
    ((slice(None), Ellipsis), (64, 64, 64)),
    ((0, Ellipsis, slice(None)), (1, 64, 64)),
    ((0, Ellipsis), (1, 64, 64)),
    ((Ellipsis, 5), (64, 64)),
    ((3, slice(2, 9), 4), (1, 7)),
    ((-1, -2, slice(-3, -1)), (1, 2)),
    (63, (1, 64, 64)),
    ((slice(8, 16), slice(1, None, 3)), (8, 21, 64)),
    ((slice(None), slice(None), 7), (64, 64)),
    ((slice(None), slice(4, 5), 7), (64, 1)),
    ((slice(32, 33), 0, 0), (1, 1)),
    ((), (64, 64, 64)),
    ((0, 0, 10, Ellipsis), (1, 1)),
    ((Ellipsis, 3, 4, 5), (1, 1)),
    ((slice(None), Ellipsis, slice(2, 4), 7), (64, 2)),
]


@pytest.mark.parametrize("buffer", ["sbuf", "psum"])
@pytest.mark.parametrize(("key", "shape"), ON_CHIP_KEYS)
def test_indexing_on_chip(key, shape, buffer):
    t = tensor((64, 64, 64), buffer=buffer)
    u = t[key]
    assert u.shape == shape
    np.testing.assert_array_equal(values(u), array_like(t)[key].reshape(shape))


HBM_KEYS = [
    ((0, slice(None), slice(None)), (5, 6)),
    ((0, 1), (6,)),
    ((0, 1, 2), (1,)),
    ((-1, -1, -1), (1,)),
    (2, (5, 6)),
    ((Ellipsis, 0), (4, 5)),
    ((slice(None, None, 2), slice(None, None, 3), slice(1, None, 2)), (2, 2, 3)),
    ((slice(0, 1), 2), (1, 6)),
]


@pytest.mark.parametrize("buffer", ["private_hbm", "shared_hbm"])
@pytest.mark.parametrize(("key", "shape"), HBM_KEYS)
def test_indexing_in_hbm(key, shape, buffer):
    t = tensor((4, 5, 6), buffer=buffer)
    u = t[key]
    assert u.shape == shape
    np.testing.assert_array_equal(values(u), array_like(t)[key].reshape(shape))


def test_indexing_of_one_dimension_in_hbm_keeps_it():
    t = tensor((5,), buffer="private_hbm")
    assert t[3].shape == (1,)
    assert values(t[3])[0] == 3.0


def test_numpy_integers_are_integers():
    t = tensor((4, 6))
    np.testing.assert_array_equal(values(t[np.int64(1) : np.int32(3), np.uint8(2)]), array_like(t)[1:3, 2:3])
    assert t.slice(np.int64(1), np.int64(0), np.int64(4)).shape == (4, 4)
    assert t.reshape((np.int64(4), 2, np.int64(3))).shape == (4, 2, 3)
    assert values(t[:, np.int64(-1)])[0, 0] == 5.0


def test_ds_with_integers_is_a_slice():
    t = tensor((64, 8))
    np.testing.assert_array_equal(values(t[nl.ds(32, 8), nl.ds(2, 3)]), array_like(t)[32:40, 2:5])
    assert t[nl.ds(0, 1), :].shape == (1, 8)


def test_ds_on_the_partition_dimension_keeps_it():
    t = tensor((64, 8))
    u = t[nl.ds(3, 1)]
    assert (u.shape, u.offset, u.start_partition) == ((1, 8), 24, 3)


INDEX_ERRORS = [
    (lambda t: t[4], "index of dimension 0", "4", "-4..3"),
    (lambda t: t[-5], "index of dimension 0", "-5", "-4..3"),
    (lambda t: t[:, 6], "index of dimension 1", "6", "-6..5"),
    (lambda t: t[0, 0, 0], "number of indices", "3", "at most 2"),
    (lambda t: t[..., ...], "number of indices", "2", "one Ellipsis"),
    (lambda t: t[..., 0, 0, 0], "number of indices", "4", "one Ellipsis"),
    (lambda t: t[0:5], "slice of dimension 0", "slice(0, 5, None)", "start < stop <= 4"),
    (lambda t: t[:, 3:3], "slice of dimension 1", "slice(3, 3, None)", "start < stop <= 6"),
    (lambda t: t[:, 4:2], "slice of dimension 1", "slice(4, 2, None)", "start < stop <= 6"),
    (lambda t: t[:, -7:2], "slice of dimension 1", "slice(-7, 2, None)", "start < stop <= 6"),
    (lambda t: t[:, ::-1], "step of dimension 1", "-1", ">= 1"),
    (lambda t: t[:, ::0], "step of dimension 1", "0", ">= 1"),
    (lambda t: t[:, 0.0], "index of dimension 1", "0.0", "int, slice"),
    (lambda t: t[:, True], "index of dimension 1", "True", "int, slice"),
    (lambda t: t[:, None], "index of dimension 1", "None", "int, slice"),
    (lambda t: t[:, [0, 1]], "index of dimension 1", "[0, 1]", "int, slice"),
    (lambda t: t[:, np.array([1])], "index of dimension 1", "array([1])", "int, slice"),
    (lambda t: t[:, 0:2.5], "slice of dimension 1", "slice(0, 2.5, None)", "ints"),
    (lambda t: t[:, VirtualRegister(1) : 3], "slice of dimension 1", "VirtualRegister", "nl.ds takes a register"),
    (lambda t: t[:, nl.ds(3, 4)], "index of dimension 1", "DynamicSlice(start=3, size=4)", "0..2"),
    (lambda t: t[:, nl.ds(-1, 2)], "index of dimension 1", "start=-1", "0..4"),
    (lambda t: t[:, nl.ds(0, 7)], "size of nl.ds in dimension 1", "7", "1..6"),
    (lambda t: t[:, nl.ds(0, 0)], "size of nl.ds in dimension 1", "0", "1..6"),
    (lambda t: t[:, nl.ds(0, "a")], "size of nl.ds in dimension 1", "a", "1..6"),
    (lambda t: t[VirtualRegister(1)], "dynamic index on the partition dimension", "0", "a free dimension"),
    (lambda t: t[nl.ds(VirtualRegister(1), 2)], "dynamic index on the partition", "0", "a free dimension"),
    (lambda t: t[::2], "step of the partition dimension", "2", "1"),
]


@pytest.mark.parametrize(("make", "rule", "received", "allowed"), INDEX_ERRORS)
def test_indexing_rules(make, rule, received, allowed):
    assert_refused(lambda: make(tensor((4, 6))), "__getitem__", "key", rule, received, allowed)


def test_a_partition_step_over_one_element_is_no_striding():
    assert tensor((4, 6))[0:1:3].shape == (1, 6)
    assert tensor((4, 6))[1:4:3].shape == (1, 6)
    assert tensor((4, 6), buffer="private_hbm")[::2].shape == (2, 6)


# -- slice and select


def test_slice():
    t = tensor((8, 64))
    np.testing.assert_array_equal(values(t.slice(1, 8, 24, 1)), array_like(t)[:, 8:24])
    u = t.slice(1, 0, 64, 2)
    assert (u.shape, u.strides) == ((8, 32), (64, 2))
    u = t.slice(dim=0, start=2, end=4)
    assert (u.shape, u.offset, u.start_partition) == ((2, 64), 128, 2)


def test_slice_uses_the_guides_chain():
    t = tensor((128, 256))
    t_a = t.slice(dim=0, start=0, end=128).slice(dim=1, start=0, end=256, step=2)
    t_b = t_a.slice(dim=0, start=0, end=64).slice(dim=1, start=0, end=64)
    assert t_b.shape == (64, 64)
    assert t_b.storage is t.storage
    np.testing.assert_array_equal(values(t_b), array_like(t)[:64, :128:2])


SLICE_ERRORS = [
    (lambda t: t.slice(2, 0, 1), "dim", "value", "2", "0..1"),
    (lambda t: t.slice(-1, 0, 1), "dim", "value", "-1", "0..1"),
    (lambda t: t.slice(1, -1, 2), "end", "bounds of dimension 1", "-1:2", "0 <= start < end <= 6"),
    (lambda t: t.slice(1, 2, 2), "end", "bounds of dimension 1", "2:2", "0 <= start < end <= 6"),
    (lambda t: t.slice(1, 0, 7), "end", "bounds of dimension 1", "0:7", "0 <= start < end <= 6"),
    (lambda t: t.slice(1, 0.0, 2), "end", "bounds of dimension 1", "0.0:2", "0 <= start"),
    (lambda t: t.slice(1, 0, 2, 0), "step", "value", "0", ">= 1"),
    (lambda t: t.slice(0, 0, 4, 2), "key", "step of the partition dimension", "2", "1"),
]


@pytest.mark.parametrize(("make", "operand", "rule", "received", "allowed"), SLICE_ERRORS)
def test_slice_rules(make, operand, rule, received, allowed):
    assert_refused(lambda: make(tensor((4, 6))), "slice", operand, rule, received, allowed)


def test_static_select():
    t = tensor((8, 4, 6))
    u = t.select(1, 3)
    assert u.shape == (8, 6)
    np.testing.assert_array_equal(values(u), array_like(t)[:, 3])
    assert t.select(0, 2).shape == (1, 4, 6)
    assert tensor((8, 6)).select(1, 0).shape == (8, 1)
    h = tensor((8, 4), buffer="private_hbm")
    assert h.select(0, 7).shape == (4,)
    assert h.select(0, 7).select(0, 1).shape == (1,)


@pytest.mark.parametrize("index", [4, -1])
def test_static_select_is_bounded(index):
    make = lambda: tensor((8, 4)).select(1, index)  # noqa: E731
    assert_refused(make, "select", "index", "index of dimension 1", str(index), "0..3")


def test_dynamic_select():
    t = tensor((4, 5, 6), buffer="private_hbm")
    index = tensor((1, 1), nl.int32)
    for key in (index, VirtualRegister(2)):
        u = t.select(1, key)
        assert u.is_indirect()
        assert (u.shape, u.strides, u.offset) == ((4, 6), (30, 1), 0)
        assert (u.dynamic.kind, u.dynamic.index, u.dynamic.stride, u.dynamic.extent) == ("scalar", key, 6, 5)
    assert t[:, VirtualRegister(2)].dynamic.stride == 6
    u = t[:, nl.ds(VirtualRegister(2), 2), 1:]
    assert (u.shape, u.strides, u.offset) == ((4, 2, 5), (30, 6, 1), 1)
    assert (u.dynamic.stride, u.dynamic.extent) == (6, 4)
    s = tensor((4, 6))
    assert s.select(1, index).shape == (4, 1)


SELECT_ERRORS = [
    (lambda t, i: t.select(0, i), "key", "dynamic index on the partition dimension", "0", "a free dimension"),
    (lambda t, i: t.select(1, i).select(1, i), "key", "second dynamic index", "scalar", "one dynamic selection"),
    (lambda t, i: t.select(1, "a"), "key", "index of dimension 1", "'a'", "int, slice"),
    (lambda t, i: t.select(1, tensor((1, 2), nl.int32)), "index", "index", "int32[1, 2]", "1x1 SBUF tensor"),
    (lambda t, i: t.select(1, tensor((1, 1))), "index", "index", "float32[1, 1]", "integer 1x1"),
    (lambda t, i: t.select(1, tensor((1, 1), nl.int32, "psum")), "index", "index", "in psum", "SBUF"),
    (lambda t, i: t.expand_dim(1).broadcast(1, 4).select(1, i), "key", "broadcast dimension", "1", "base tensor"),
]


@pytest.mark.parametrize(("make", "operand", "rule", "received", "allowed"), SELECT_ERRORS)
def test_dynamic_select_rules(make, operand, rule, received, allowed):
    t, index = tensor((4, 5, 6)), tensor((1, 1), nl.int32)
    assert_refused(lambda: make(t, index), "select", operand, rule, received, allowed)


def test_one_key_holds_one_register():
    t = tensor((4, 5, 6), buffer="private_hbm")
    i = VirtualRegister(1)
    assert_refused(lambda: t[i, i], "__getitem__", "key", "second dynamic index", "scalar", "one dynamic selection")


def test_vector_select():
    t = tensor((64, 5, 8), buffer="private_hbm")
    index = tensor((16, 1), nl.int32)
    u = t[:, 1:3].vector_select(0, index)
    assert u.is_indirect()
    assert (u.shape, u.strides, u.offset) == ((16, 2, 8), (0, 8, 1), 8)
    assert (u.dynamic.kind, u.dynamic.index, u.dynamic.stride, u.dynamic.extent) == ("vector", index, 40, 64)
    assert t[4:20].vector_select(0, index).dynamic.extent == 16


VECTOR_ERRORS = [
    (lambda t, i: t.vector_select(1, i), "dim", "value", "1", "0"),
    (lambda t, i: tensor((4, 6)).vector_select(0, i), "", "buffer", "sbuf", "HBM"),
    (lambda t, i: t.vector_select(0, i).vector_select(0, i), "", "indirect view", "vector", "one dynamic selection"),
    (lambda t, i: t.select(1, VirtualRegister(0)).vector_select(0, i), "", "indirect view", "scalar", "one dynamic"),
    (lambda t, i: t.vector_select(0, 3), "vector_offset", "index", "3", "shape (P, 1)"),
    (lambda t, i: t.vector_select(0, tensor((4, 2), nl.int32)), "vector_offset", "index", "[4, 2]", "shape (P, 1)"),
    (lambda t, i: t.vector_select(0, tensor((4, 1), nl.int16)), "vector_offset", "index", "int16", "int32 or uint32"),
    (lambda t, i: t.vector_select(0, tensor((4, 1), nl.int32, "psum")), "vector_offset", "index", "psum", "an SBUF"),
    (lambda t, i: t.permute((1, 0, 2)).vector_select(0, i), "dim", "strides", "(8, 40, 1)", "not permuted"),
    (lambda t, i: t.expand_dim(0).broadcast(0, 4).vector_select(0, i), "dim", "strides", "(0, ", "not broadcast"),
]


@pytest.mark.parametrize(("make", "operand", "rule", "received", "allowed"), VECTOR_ERRORS)
def test_vector_select_rules(make, operand, rule, received, allowed):
    t, index = tensor((64, 5, 8), buffer="private_hbm"), tensor((16, 1), nl.int32)
    assert_refused(lambda: make(t, index), "vector_select", operand, rule, received, allowed)


AFTER_VECTOR_SELECT_ERRORS = [
    ("__getitem__", lambda u: u[0], "key", "indirect dimension"),
    ("__getitem__", lambda u: u[2:], "key", "indirect dimension"),
    ("__getitem__", lambda u: u[::2], "key", "indirect dimension"),
    ("slice", lambda u: u.slice(0, 0, 4), "key", "indirect dimension"),
    ("select", lambda u: u.select(0, 0), "key", "indirect dimension"),
    ("permute", lambda u: u.permute((1, 0, 2)), "dims", "indirect dimension"),
    ("expand_dim", lambda u: u.expand_dim(0), "dim", "indirect dimension"),
    ("reshape_dim", lambda u: u.reshape_dim(0, (4, 4)), "dim", "indirect dimension"),
    ("flatten_dims", lambda u: u.flatten_dims(0, 1), "start_dim", "indirect dimension"),
    ("reshape", lambda u: u.reshape((80, 8)), "shape", "indirect dimension"),
    ("rearrange", lambda u: u.rearrange(("a", "b", "c"), ("b", "a", "c")), "dst_pattern", "indirect dimension"),
    ("view", lambda u: u.view(nl.int32), "", "indirect view"),
    ("ap", lambda u: u.ap([[1, 4]]), "", "indirect view"),
]


@pytest.mark.parametrize(("method", "make", "operand", "rule"), AFTER_VECTOR_SELECT_ERRORS)
def test_the_gathered_dimension_is_protected(method, make, operand, rule):
    u = tensor((64, 5, 8), buffer="private_hbm").vector_select(0, tensor((16, 1), nl.int32))
    assert_refused(lambda: make(u), method, operand, rule, "", "")


def test_one_gathered_row_keeps_its_dimension():
    u = tensor((64, 5), buffer="private_hbm").vector_select(0, tensor((1, 1), nl.int32))
    assert_refused(lambda: u.squeeze_dim(0), "squeeze_dim", "dim", "indirect dimension", "0", "unchanged")
    assert_refused(lambda: u.broadcast(0, 4), "broadcast", "dim", "indirect dimension", "0", "unchanged")


def test_other_dimensions_of_a_gather_stay_free():
    u = tensor((64, 5, 8), buffer="private_hbm").vector_select(0, tensor((16, 1), nl.int32))
    assert u[:, 1:3, ::2].shape == (16, 2, 4)
    assert u[0:16, 2].shape == (16, 8)
    assert u.permute((0, 2, 1)).strides == (0, 1, 8)
    assert u.reshape((16, 40)).strides == (0, 1)
    assert u.reshape_dim(2, (2, 4)).flatten_dims(1, 2).shape == (16, 10, 4)
    assert all(v.dynamic is u.dynamic for v in (u[:, 1], u.permute((0, 2, 1)), u.reshape((16, 40))))


# -- partitions


@pytest.mark.parametrize("dtype", [nl.uint8, nl.bfloat16, nl.float32])
def test_start_partition(dtype):
    t = tensor((128, 12), nl.uint8).view(dtype)
    assert t.start_partition == 0
    assert t[32:64].start_partition == 32
    assert t[96:, 2:].start_partition == 96
    placed = tensor((32, 12), nl.uint8, address=(64, 256)).view(dtype)
    assert placed.start_partition == 64
    assert placed[8:].start_partition == 72


def test_row_elements_follow_the_dtype():
    t = tensor((4, 12))
    assert (t.row_elements, t.view(nl.uint8).row_elements, t[1:2, 3:4].row_elements) == (12, 48, 12)
    assert (t.storage_elements, t.view(nl.bfloat16).storage_elements) == (48, 96)


# -- registers


def test_registers_are_no_integers():
    r = VirtualRegister(3)
    for use in (int, range, lambda x: [0, 1][x]):
        with pytest.raises(TypeError, match="not known while the kernel is built"):
            use(r)
    for use in (lambda x: x == 3, lambda x: x != 3, lambda x: x in (0, 1), lambda x: x < 4, lambda x: x + 1):
        with pytest.raises(TypeError):
            use(r)
    assert len({r, VirtualRegister(3)}) == 2


def test_a_view_is_an_operand():
    def kernel(x):
        t = sb(x)
        part = tile((2, 3))
        nisa.tensor_copy(part, t[0:2, 1:4])
        return out(part)

    x = np.arange(20, dtype=np.float32).reshape(4, 5)
    np.testing.assert_array_equal(run(kernel, x), x[0:2, 1:4])
