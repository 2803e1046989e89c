"""NkiTensor: `view`, `ap` and `indirect`, and their rules."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from nkisim import language as nl
from nkisim.objects import VirtualRegister
from tests.nkisim.tensors import array_like, assert_refused, tensor, values

# -- reinterpretation


def test_view_scales_the_last_dimension():
    t = tensor((8, 64))
    assert t.view(nl.uint8).shape == (8, 256)
    assert t.view(nl.int32).shape == (8, 64)
    assert tensor((8, 256), nl.uint8).view(nl.float32).shape == (8, 64)
    for dtype, numpy in ((nl.uint8, np.uint8), (nl.int16, np.int16), (nl.bfloat16, ml_dtypes.bfloat16)):
        u = t[2:4, 8:16].view(dtype)
        np.testing.assert_array_equal(values(u), array_like(t)[2:4, 8:16].copy().view(numpy))
        assert values(u).dtype == numpy
        np.testing.assert_array_equal(values(u.view(nl.float32)), array_like(t)[2:4, 8:16])
    assert t.view(nl.float8_e4m3fn_x4).shape == (8, 64)
    assert t.view(nl.float4_e2m1fn_x4).shape == (8, 128)


def test_reinterpret_cast_is_view():
    t = tensor((8, 64))
    assert t.reinterpret_cast(nl.uint8).get_pattern() == t.view(nl.uint8).get_pattern()


def test_view_of_equal_size_needs_no_contiguity():
    # The language guide asks for contiguity of the reshaped dimensions only, and none is reshaped.
    t = tensor((8, 64))
    np.testing.assert_array_equal(values(t[:, ::3].view(nl.uint32)), array_like(t).view(np.uint32)[:, ::3])


def test_view_of_a_column_with_a_stride():
    t = tensor((8, 64))
    u = t[:, 5::64].view(nl.uint16)
    np.testing.assert_array_equal(values(u), array_like(t)[:, 5:6].copy().view(np.uint16))


VIEW_ERRORS = [
    (lambda: tensor((8, 64))[:, ::2].view(nl.uint8), "dtype", "stride of the last dimension", "2", "1, contiguous"),
    (lambda: tensor((8, 4, 2)).permute((0, 2, 1)).view(nl.uint8), "dtype", "stride of the last", "2", "1"),
    (lambda: tensor((8, 1)).broadcast(1, 4).view(nl.uint8), "dtype", "stride of the last", "0", "1"),
    (lambda: tensor((8, 6), nl.uint8).view(nl.float32), "dtype", "size of the last dimension", "6", "multiple of 4"),
    (lambda: tensor((8, 8), nl.uint8)[:, 2:6].view(nl.float32), "dtype", "alignment", "offset 2", "multiples of 4"),
    (lambda: tensor((8, 6), nl.uint8)[:, 0:4].view(nl.float32), "dtype", "alignment", "(6, 1)", "multiples of 4"),
    (lambda: tensor((8, 6), nl.uint8)[0:1, 0:4].view(nl.float32), "dtype", "bytes per partition", "6", "multiple of 4"),
]


@pytest.mark.parametrize(("make", "operand", "rule", "received", "allowed"), VIEW_ERRORS)
def test_view_rules(make, operand, rule, received, allowed):
    assert_refused(make, "view", operand, rule, received, allowed)


def test_view_of_an_unknown_type():
    with pytest.raises(TypeError, match=r"NkiTensor\.view dtype: received 'float64'"):
        tensor((8, 4)).view("float64")


def test_float32_mode_has_no_bits_of_small_floats():
    t = tensor((8, 4), nl.bfloat16, precise=False)
    assert t.carrier == np.float32
    assert t.row_elements == 4
    for make in (lambda: t.view(nl.uint16), lambda: t.ap([[4, 8], [1, 4]], dtype=nl.int16)):
        with pytest.raises(NotImplementedError, match="all-float32 mode stores bfloat16"):
            make()
    assert t.view(nl.bfloat16).shape == (8, 4)
    assert tensor((8, 4), precise=False).view(nl.uint8).shape == (8, 16)
    with pytest.raises(NotImplementedError, match="float16"):
        tensor((8, 4), precise=False).view(nl.float16)


# -- access patterns


def test_get_pattern_and_ap_agree():
    t = tensor((128, 64))
    u = t.slice(dim=1, start=8, end=24)
    assert u.get_pattern() == [[64, 128], [1, 16]]
    assert u.offset == 8
    v = t.ap(pattern=[[64, 128], [1, 16]], offset=8)
    assert v.get_pattern() == u.get_pattern()
    assert v.offset == u.offset
    pattern = t.get_pattern()
    pattern[0][1] = 64
    assert t.ap(pattern=pattern).shape == (64, 64)


def test_ap_reads_what_its_loop_nest_reads():
    t = tensor((16, 16))
    u = t.ap(pattern=[[16, 16], [1, 8]], offset=8)
    np.testing.assert_array_equal(values(u), array_like(t)[:, 8:16])
    t = tensor((8, 24))
    u = t.ap([(24, 4), (8, 2), (0, 3), (2, 3)], 24 + 1)
    w, z, y, x = np.ix_(range(4), range(2), range(3), range(3))
    np.testing.assert_array_equal(values(u), 25 + w * 24 + z * 8 + y * 0 + x * 2)
    t = tensor((128, 1024), nl.float16)
    assert t.ap(pattern=[(1024, 128), (2, 512)]).shape == (128, 512)


def test_ap_offset_adds_to_the_views_own():
    t = tensor((8, 16))
    u = t[2:4, 4:8]
    assert u.ap([[16, 2], [1, 4]]).offset == 36
    assert u.ap([[16, 2], [1, 4]], offset=0).offset == 36
    assert u.ap([[16, 2], [1, 4]], offset=3).offset == 39
    assert u.ap([[16, 2], [1, 4]], offset=-4).offset == 32


def test_an_outer_ap_overrides_the_inner_pattern():
    t = tensor((128, 256))
    inner = t.ap(pattern=[[256, 128], [2, 128]])
    outer = inner.ap(pattern=[[256, 128], [1, 64]])
    assert outer.get_pattern() == t.ap(pattern=[[256, 128], [1, 64]]).get_pattern()
    np.testing.assert_array_equal(values(outer), array_like(t)[:, :64])


def test_ap_with_a_negative_stride():
    t = tensor((8, 16))
    np.testing.assert_array_equal(values(t.ap([[16, 8], [-1, 16]], 15)), array_like(t)[:, ::-1])


def test_ap_reinterprets():
    t = tensor((128, 256), nl.int32)
    u = t.ap(pattern=[[512, 128], [1, 512]], offset=0, dtype=nl.bfloat16)
    assert u.shape == (128, 512)
    np.testing.assert_array_equal(values(u).view(np.uint16), array_like(t).view(np.uint16))
    v = t[:, 4:].ap([[512, 128], [1, 2]], offset=1, dtype=nl.bfloat16)
    assert v.offset == 9
    assert t.ap([[1024, 128], [1, 4]], dtype=nl.uint8).dtype == nl.uint8


def test_ap_in_hbm_takes_any_pattern():
    t = tensor((4, 6), buffer="private_hbm")
    np.testing.assert_array_equal(values(t.ap([[2, 3], [6, 4]], 1)), 1 + 2 * np.arange(3)[:, None] + 6 * np.arange(4))
    assert t.ap([[1, 24]]).shape == (24,)


AP_ERRORS = [
    (lambda t: t.ap([[64, 8], [1, 32]], 0), "pattern", "partition stride", "64", "32, the elements per partition"),
    (lambda t: t.ap([[1, 16], [1, 32]]), "pattern", "partition stride", "1", "32"),
    (lambda t: t.ap([[32, 16], [1, 33]]), "pattern", "addresses", "0..512", "0..511"),
    (lambda t: t.ap([[32, 8], [1, 33]]), "pattern", "columns", "0..32", "0..31 in a partition"),
    (lambda t: t.ap([[32, 8], [1, 16]], 20), "pattern", "columns", "20..35", "0..31"),
    (lambda t: t.ap([[32, 8], [-1, 2]], 32), "pattern", "columns", "-1..0", "0..31"),
    (lambda t: t.ap([[32, 1], [1, 1]], 512), "pattern", "addresses", "512..512", "0..511"),
    (lambda t: t.ap([[32, 1], [1, 1]], -1), "pattern", "addresses", "-1..-1", "0..511"),
    (lambda t: t.ap([32, 16], [1, 32]), "pattern", "[stride, count] pair", "32", "two ints"),
    (lambda t: t.ap([[32, 16, 1]]), "pattern", "[stride, count] pair", "[32, 16, 1]", "two ints"),
    (lambda t: t.ap([[32, 16], [1, 0]]), "pattern", "[stride, count] pair", "[1, 0]", "count >= 1"),
    (lambda t: t.ap([[32, 16], [1.0, 2]]), "pattern", "[stride, count] pair", "[1.0, 2]", "two ints"),
    (lambda t: t.ap([]), "pattern", "type", "[]", "a list of"),
    (lambda t: t.ap(7), "pattern", "type", "7", "a list of"),
    (lambda t: t.ap([[32, 16]]), "", "number of dimensions", "1: (16,)", "2..5"),
    (lambda t: t.ap([[32, 16], *[[1, 1]] * 5]), "", "number of dimensions", "6", "2..5"),
    (lambda t: t.ap([[32, 16], [1, 2]], VirtualRegister(1)), "offset", "type", "VirtualRegister", "scalar_offset"),
    (lambda t: t.ap([[32, 16], [1, 2]], 1.0), "offset", "type", "1.0", "an int"),
    (lambda t: t.ap([[32, 16], [1, 2]], indirect_dim=2), "indirect_dim", "value", "2", "0..1"),
    (
        lambda t: t[:, 1:].view(nl.uint8)[:, 1:].ap([[32, 16], [1, 2]], dtype=nl.float32),
        "dtype",
        "offset",
        "5",
        "whole",
    ),
    (
        lambda t: t.ap([[32, 16], [1, 2]], scalar_offset=VirtualRegister(0), vector_offset=tensor((16, 1), nl.int32)),
        "scalar_offset",
        "scalar_offset and vector_offset",
        "both",
        "at most one",
    ),
    (lambda t: t.ap([[32, 16], [1, 2]], scalar_offset=3), "scalar_offset", "index", "3", "a register"),
    (lambda t: t.ap([[32, 16], [1, 2]], scalar_offset=VirtualRegister(0)), "indirect_dim", "partition", "0", "a free"),
    (
        lambda t: t.ap([[32, 16], [1, 2]], vector_offset=tensor((16, 1), nl.int32)),
        "vector_offset",
        "buffer",
        "sbuf",
        "HBM",
    ),
    (
        lambda t: tensor((4, 8), nl.uint8, "private_hbm").ap(
            [[1, 2]], dtype=nl.int32, scalar_offset=VirtualRegister(0), indirect_dim=1
        ),
        "dtype",
        "bytes per index of dimension 1",
        "1",
        "a whole number of int32",
    ),
]


@pytest.mark.parametrize(("make", "operand", "rule", "received", "allowed"), AP_ERRORS)
def test_ap_rules(make, operand, rule, received, allowed):
    assert_refused(lambda: make(tensor((16, 32))), "ap", operand, rule, received, allowed)


def test_ap_with_a_type_that_does_not_divide_a_partition():
    make = lambda: tensor((4, 3), nl.bfloat16).ap([[1, 1], [1, 1]], dtype=nl.float32)  # noqa: E731
    assert_refused(make, "ap", "dtype", "bytes per partition of the tensor", "6", "a multiple of 4")


def test_scalar_offset_scales_by_the_base_tensors_dimension():
    t = tensor((512, 512), buffer="private_hbm")
    index = tensor((1, 1), nl.int32)
    u = t.ap([[512, 128], [1, 256]], 3, scalar_offset=index, indirect_dim=0)
    assert (u.shape, u.offset) == ((128, 256), 3)
    assert (u.dynamic.kind, u.dynamic.stride, u.dynamic.extent) == ("scalar", 512, None)
    assert t.ap([[512, 4], [1, 2]], scalar_offset=index, indirect_dim=1).dynamic.stride == 1
    half = t.ap([[1024, 4], [1, 2]], dtype=nl.bfloat16, scalar_offset=index)
    assert half.dynamic.stride == 1024  # one row still, in bfloat16 elements
    s = tensor((16, 32)).ap([[64, 16], [1, 16]], dtype=nl.bfloat16, scalar_offset=index, indirect_dim=1)
    assert s.dynamic.stride == 2


def test_vector_offset():
    t = tensor((128, 512), buffer="private_hbm")
    index = tensor((64, 1), nl.int32)
    u = t.ap([[512, 64], [1, 256]], 7, vector_offset=index)
    assert (u.shape, u.strides, u.offset) == ((64, 256), (0, 1), 7)
    assert (u.dynamic.kind, u.dynamic.stride, u.dynamic.extent) == ("vector", 512, 128)
    make = lambda: t.ap([[512, 65], [1, 256]], vector_offset=index)  # noqa: E731
    assert_refused(make, "ap", "vector_offset", "number of elements", "64", "at least 65")
    make = lambda: t.ap([[512, 64], [1, 256]], vector_offset=index, indirect_dim=1)  # noqa: E731
    assert_refused(make, "ap", "indirect_dim", "value under vector_offset", "1", "0")


# -- tensor indirection


def test_indirect():
    t, index = tensor((16, 40)), tensor((16, 2), nl.uint16)
    u = t[:, 8:24].indirect(index)
    assert u.is_indirect()
    assert (u.shape, u.offset) == ((16, 32), 8)
    assert (u.dynamic.kind, u.dynamic.index, u.dynamic.extent) == ("columns", index, 16)
    assert t.indirect(index, 5).shape == (16, 5)
    assert t.reshape((16, 5, 8)).indirect(index).dynamic.extent == 40


INDIRECT_ERRORS = [
    (lambda t, i: t.indirect(3), "index", "type", "3", "2-D SBUF tensor"),
    (lambda t, i: t.indirect(tensor((16, 2), nl.uint16, "psum")), "index", "type", "psum", "2-D SBUF tensor"),
    (lambda t, i: t.indirect(tensor((16, 2, 2), nl.uint16)), "index", "type", "[16, 2, 2]", "2-D SBUF tensor"),
    (lambda t, i: t.indirect(tensor((16, 2))), "index", "dtype", "float32", "an integer type"),
    (lambda t, i: t[0:8].indirect(i), "index", "partitions", "16", "8"),
    (lambda t, i: tensor((16, 8), buffer="private_hbm").indirect(i), "", "buffer", "private_hbm", "sbuf or psum"),
    (lambda t, i: t[:, ::2].indirect(i), "", "free dimensions", "[[2, 20]]", "contiguous"),
    (lambda t, i: t.indirect(i, 0), "num_elem", "value", "0", "1..32"),
    (lambda t, i: t.indirect(i, 33), "num_elem", "value", "33", "1..32"),
    (lambda t, i: t.select(1, VirtualRegister(0)).indirect(i), "", "indirect view", "scalar", "one dynamic"),
    (lambda t, i: t.indirect(i).indirect(i), "", "indirect view", "columns", "one dynamic"),
]


@pytest.mark.parametrize(("make", "operand", "rule", "received", "allowed"), INDIRECT_ERRORS)
def test_indirect_rules(make, operand, rule, received, allowed):
    t, index = tensor((16, 40)), tensor((16, 2), nl.uint16)
    assert_refused(lambda: make(t, index), "indirect", operand, rule, received, allowed)


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("__getitem__", lambda u: u[:, 4:8]),
        ("__getitem__", lambda u: u[...]),
        ("permute", lambda u: u.permute((0, 1))),
        ("reshape", lambda u: u.reshape((16, 4, 8))),
        ("expand_dim", lambda u: u.expand_dim(1)),
    ],
)
def test_an_indirect_view_is_final(method, make):
    u = tensor((16, 40)).indirect(tensor((16, 2), nl.uint16))
    assert_refused(lambda: make(u), method, "", "view of an .indirect() view", "[16, 32]", "operand only")
