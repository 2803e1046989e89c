"""NkiTensor: operations on the shape, and their rules."""

from __future__ import annotations

import numpy as np
import pytest

from nkisim import language as nl
from tests.nkisim.harness import run
from tests.nkisim.tensors import array_like, assert_refused, tensor, values


def test_permute():
    t = tensor((8, 4, 6))
    u = t.permute((0, 2, 1))
    assert (u.shape, u.strides) == ((8, 6, 4), (24, 1, 6))
    assert not u.is_contiguous()
    np.testing.assert_array_equal(values(u), array_like(t).transpose(0, 2, 1))
    h = tensor((2, 3, 4), buffer="private_hbm")
    np.testing.assert_array_equal(values(h.permute([2, 0, 1])), array_like(h).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("dims", "rule", "allowed"),
    [
        ((0, 1), "order", "permutation of 0..2"),
        ((0, 1, 1), "order", "permutation of 0..2"),
        ((0, 1, 3), "order", "permutation of 0..2"),
        ((0, -1, 1), "order", "permutation of 0..2"),
        ((1, 0, 2), "partition dimension", "dimension 0 unchanged on chip"),
    ],
)
def test_permute_rules(dims, rule, allowed):
    assert_refused(lambda: tensor((8, 4, 6)).permute(dims), "permute", "dims", rule, str(dims), allowed)


def test_broadcast():
    t = tensor((8, 1, 6))
    u = t.broadcast(1, 5)
    assert (u.shape, u.strides) == ((8, 5, 6), (6, 0, 1))
    np.testing.assert_array_equal(values(u), np.broadcast_to(array_like(t), (8, 5, 6)))
    h = tensor((1, 6), buffer="private_hbm")
    assert h.broadcast(0, 3).get_pattern() == [[0, 3], [1, 6]]


@pytest.mark.parametrize(
    ("shape", "args", "operand", "rule", "received", "allowed"),
    [
        ((8, 2), (1, 4), "dim", "size of dimension 1", "2", "1"),
        ((1, 2), (0, 4), "dim", "partition dimension", "0", "unchanged"),
        ((8, 1), (1, 0), "size", "value", "0", ">= 1"),
        ((8, 1), (1, 2.0), "size", "value", "2.0", "an int"),
        ((8, 1), (2, 2), "dim", "value", "2", "0..1"),
    ],
)
def test_broadcast_rules(shape, args, operand, rule, received, allowed):
    assert_refused(lambda: tensor(shape).broadcast(*args), "broadcast", operand, rule, received, allowed)


def test_expand_and_squeeze():
    t = tensor((8, 6))
    u = t.expand_dim(1)
    assert (u.shape, u.strides) == ((8, 1, 6), (6, 6, 1))
    assert u.is_contiguous()
    assert t.expand_dim(2).shape == (8, 6, 1)
    assert t.expand_dim(2).strides == (6, 1, 1)
    assert u.squeeze_dim(1).get_pattern() == t.get_pattern()
    h = tensor((1, 6), buffer="private_hbm")
    assert h.expand_dim(0).shape == (1, 1, 6)
    assert h.squeeze_dim(0).shape == (6,)


DIM_ERRORS = [
    ("expand_dim", lambda t: t.expand_dim(0), "dim", "partition dimension", "0", "unchanged"),
    ("expand_dim", lambda t: t.expand_dim(4), "dim", "value", "4", "0..3"),
    ("expand_dim", lambda t: t.expand_dim(-1), "dim", "value", "-1", "0..3"),
    ("expand_dim", lambda t: t.reshape((1, 1, 1, 2, 4)).expand_dim(1), "", "number of dimensions", "6", "2..5"),
    ("squeeze_dim", lambda t: t.squeeze_dim(0), "dim", "partition dimension", "0", "unchanged"),
    ("squeeze_dim", lambda t: t.squeeze_dim(2), "dim", "size of dimension 2", "8", "1"),
    ("squeeze_dim", lambda t: t[:, 0, 0:1].squeeze_dim(1), "", "number of dimensions", "1: (1,)", "2..5"),
    ("squeeze_dim", lambda t: t.squeeze_dim(3), "dim", "value", "3", "0..2"),
    ("reshape_dim", lambda t: t.reshape_dim(0, (1, 1)), "dim", "partition dimension", "0", "unchanged"),
    ("reshape_dim", lambda t: t.reshape_dim(2, (3, 2)), "shape", "number of elements", "6 in (3, 2)", "8"),
    ("reshape_dim", lambda t: t.reshape_dim(2, (3, -1)), "shape", "number of elements", "6 in (3, -1)", "8"),
    ("reshape_dim", lambda t: t.reshape_dim(2, (-1, -1)), "shape", "value", "(-1, -1)", "at most one -1"),
    ("reshape_dim", lambda t: t.reshape_dim(2, (0, 8)), "shape", "size", "0", "a positive int"),
    ("reshape_dim", lambda t: t.reshape_dim(2, (2.0, 4)), "shape", "size", "2.0", "a positive int"),
    ("reshape_dim", lambda t: t.reshape_dim(2, ()), "shape", "value", "()", "a tuple"),
    ("reshape_dim", lambda t: t.reshape_dim(2, 8), "shape", "value", "8", "a tuple"),
    ("reshape_dim", lambda t: t.reshape_dim(2, (2, 2, 2, 1)), "", "number of dimensions", "6", "2..5"),
    ("flatten_dims", lambda t: t.flatten_dims(0, 1), "start_dim", "partition dimension", "0", "unchanged"),
    ("flatten_dims", lambda t: t.flatten_dims(0, 0), "start_dim", "partition dimension", "0", "unchanged"),
    ("flatten_dims", lambda t: t.flatten_dims(2, 1), "end_dim", "order", "2..1", "start_dim <= end_dim"),
    ("flatten_dims", lambda t: t.flatten_dims(1, 3), "end_dim", "value", "3", "0..2"),
    ("reshape", lambda t: t.reshape((8,)), "shape", "partition dimension", "(8,)", "unchanged"),
    ("reshape", lambda t: t.reshape((1, 9)), "shape", "number of elements", "9 in (1, 9)", "8"),
    ("reshape", lambda t: t[:, :, 0].reshape((1,)), "", "number of dimensions", "1: (1,)", "2..5"),
    ("reshape", lambda t: t.reshape((1, 1, 1, 1, 1, 8)), "", "number of dimensions", "6", "2..5"),
]


@pytest.mark.parametrize(("method", "make", "operand", "rule", "received", "allowed"), DIM_ERRORS)
def test_shape_rules(method, make, operand, rule, received, allowed):
    assert_refused(lambda: make(tensor((1, 1, 8))), method, operand, rule, received, allowed)


def test_reshape_dim():
    t = tensor((8, 24))
    u = t.reshape_dim(1, (4, 6))
    assert (u.shape, u.strides) == ((8, 4, 6), (24, 6, 1))
    assert t.reshape_dim(1, (4, -1)).get_pattern() == u.get_pattern()
    assert t.reshape_dim(0, (8,)).shape == (8, 24)
    assert t.reshape_dim(0, (-1,)).shape == (8, 24)
    v = t[:, ::2].reshape_dim(1, (3, 4))
    np.testing.assert_array_equal(values(v), array_like(t)[:, ::2].reshape(8, 3, 4))
    h = tensor((6, 4), buffer="private_hbm").reshape_dim(0, (2, 3))
    assert (h.shape, h.strides) == ((2, 3, 4), (12, 4, 1))


def test_flatten_dims():
    t = tensor((8, 2, 3, 4))
    assert t.flatten_dims(1, 2).shape == (8, 6, 4)
    assert t.flatten_dims(1, 3).strides == (24, 1)
    assert t.flatten_dims(2, 2).get_pattern() == t.get_pattern()
    assert tensor((2, 3), buffer="private_hbm").flatten_dims(0, 1).shape == (6,)
    assert t[:, :, 0:1].flatten_dims(1, 2).get_pattern() == [[24, 8], [12, 2], [1, 4]]
    assert t.permute((0, 1, 3, 2)).flatten_dims(1, 1).shape == (8, 2, 4, 3)


@pytest.mark.parametrize(
    ("make", "received"),
    [
        (lambda t: t.permute((0, 2, 1, 3)).flatten_dims(1, 2), "[[4, 3], [12, 2]]"),
        (lambda t: t[:, :, 0:2].flatten_dims(1, 2), "[[12, 2], [4, 2]]"),
        (lambda t: t[:, :, 0:1].broadcast(2, 2).flatten_dims(1, 3), "[[12, 2], [0, 2], [1, 4]]"),
    ],
)
def test_flatten_dims_needs_contiguous_dimensions(make, received):
    t = tensor((8, 2, 3, 4))
    assert_refused(lambda: make(t), "flatten_dims", "end_dim", "[stride, count]", received, "contiguous")


def test_flatten_dims_of_one_step():
    # Every second element of a contiguous run is still one dimension.
    t = tensor((8, 2, 3, 4))
    u = t[:, :, :, ::2].flatten_dims(1, 3)
    assert u.get_pattern() == [[24, 8], [2, 12]]
    np.testing.assert_array_equal(values(u), array_like(t)[..., ::2].reshape(8, 12))


def test_reshape():
    t = tensor((8, 4, 6))
    for shape in ((8, 24), (8, 2, 12), (8, -1), (8, 1, 4, 6, 1), (8, 2, 2, 3, 2)):
        u = t.reshape(shape)
        np.testing.assert_array_equal(values(u), array_like(t).reshape(shape))
        assert u.is_contiguous()
    h = tensor((8, 4, 6), buffer="private_hbm")
    np.testing.assert_array_equal(values(h.reshape((24, 8))), array_like(h).reshape(24, 8))
    assert h.reshape((192,)).shape == (192,)
    assert tensor((4, 1)).reshape((4, 1, 1)).strides == (1, 1, 1)


def test_reshape_of_the_free_dimensions_ignores_the_partition_stride():
    t = tensor((8, 24))[2:4, 0:12]
    np.testing.assert_array_equal(values(t.reshape((2, 3, 4))), array_like(tensor((8, 24)))[2:4, 0:12].reshape(2, 3, 4))


def test_reshape_needs_a_layout_without_copies():
    t = tensor((8, 4, 6))
    for view in (t.permute((0, 2, 1)), t[:, :, 0:5]):
        shape = (8, view.free_size)
        assert_refused(lambda v=view, s=shape: v.reshape(s), "reshape", "shape", "layout", str(shape), "no copy")


def test_rearrange():
    t = tensor((8, 24))
    u = t.rearrange(("b", ("h", "w")), ("b", "w", "h"), {"h": 4})
    assert u.shape == (8, 6, 4)
    np.testing.assert_array_equal(values(u), array_like(t).reshape(8, 4, 6).transpose(0, 2, 1))
    v = tensor((8, 2, 3, 4)).rearrange(("p", "a", "b", "c"), ("p", "c", ("a", "b")))
    assert (v.shape, v.strides) == ((8, 4, 6), (24, 1, 4))
    h = tensor((6, 20), buffer="private_hbm")
    w = h.rearrange((("a", "b"), ("c", "d")), ("c", "b", "d", "a"), {"a": 2, "d": 5})
    np.testing.assert_array_equal(values(w), array_like(h).reshape(2, 3, 4, 5).transpose(2, 1, 3, 0))


def test_rearrange_counts_dimensions_of_the_result_only():
    t = tensor((8, 64))
    u = t.rearrange(
        ("p", ("a", "b", "c", "d", "e", "f")), ("p", ("a", "b", "c"), ("d", "e", "f")), dict.fromkeys("abcdef", 2)
    )
    assert u.shape == (8, 8, 8)


REARRANGE_ERRORS = [
    ((("p",), ("p",)), None, "src_pattern", "names", "('p',)", "2 names"),
    ((("p", ()), ("p",)), None, "src_pattern", "names", "('p', ())", "2 names"),
    ((("p", ("p", "a")), ("p", "a")), None, "src_pattern", "names", "('p', ('p', 'a'))", "each name once"),
    ((("p", "a"), ("p",)), None, "dst_pattern", "names", "('p',)", "each of ['p', 'a'] once"),
    ((("p", "a"), ("p", "a", "b")), None, "dst_pattern", "names", "'b'", "each of"),
    ((("p", "a"), ("p", "a", ())), None, "dst_pattern", "names", "()", "each of"),
    ((("p", ("a", "b")), ("p", "a", "b")), None, "fixed_sizes", "sizes not given", "['a', 'b']", "all but one"),
    ((("p", ("a", "b")), ("p", "a", "b")), {"a": 5}, "fixed_sizes", "sizes of ('a', 'b')", "(5, 4)", "product of 24"),
    ((("p", ("a", "b")), ("p", "a", "b")), {"c": 2}, "fixed_sizes", "entry", "'c': 2", "one of"),
    ((("p", ("a", "b")), ("p", "a", "b")), {"a": 0}, "fixed_sizes", "entry", "'a': 0", "a size >= 1"),
    ((("p", "a"), ("p", "a")), {"a": 12}, "fixed_sizes", "sizes of ('a',)", "(12,)", "a product of 24"),
    ((("p", "a"), ("a", "p")), None, "dst_pattern", "partition dimension", "('a', 'p')", "unchanged"),
    (((("p", "q"), "a"), ("p", "q", "a")), {"q": 2}, "dst_pattern", "partition dimension", "", "unchanged"),
    (
        (("p", ("a", "b")), ("p", ("b", "a"))),
        {"a": 4},
        "dst_pattern",
        "[stride, count] of ('b', 'a')",
        "[[1, 6], [6, 4]]",
        "contiguous",
    ),
]


@pytest.mark.parametrize(("patterns", "sizes", "operand", "rule", "received", "allowed"), REARRANGE_ERRORS)
def test_rearrange_rules(patterns, sizes, operand, rule, received, allowed):
    make = lambda: tensor((8, 24)).rearrange(*patterns, sizes)  # noqa: E731
    assert_refused(make, "rearrange", operand, rule, received, allowed)


def test_rank_limit_is_for_new_dimensions():
    h = tensor((2, 1, 2, 1, 2, 1, 2), buffer="private_hbm")
    assert h[0].shape == (1, 2, 1, 2, 1, 2)
    assert h[:, :, 0:1].ndim == 7
    assert_refused(lambda: h[0].expand_dim(0), "expand_dim", "", "number of dimensions", "7", "1..5")


def test_shapes_that_the_documents_print():
    def kernel():
        t = nl.ndarray((128, 64, 32), dtype=nl.float32, buffer=nl.sbuf)
        h = nl.ndarray((4, 128, 32), dtype=nl.float32, buffer=nl.shared_hbm)
        assert t[0, :, :].shape == (1, 64, 32)
        assert t[:, :, 0].shape == (128, 64)
        assert h[0, :, :].shape == (128, 32)
        t = nl.ndarray((128, 4, 16), dtype=nl.float32, buffer=nl.sbuf)
        assert t[0:64, :, :].permute((0, 2, 1))[:, 0, :].shape == (64, 4)
        t = nl.ndarray((128, 128), nl.float16, nl.sbuf)
        assert t.reshape((128, 2, 64)).shape == (128, 2, 64)
        assert t.reshape((128, 32, 4)).storage is t.storage
        t = nl.ndarray((128, 8, 64), dtype=nl.float32)
        assert t.select(1, 3).shape == (128, 64)
        index = nl.ndarray((1, 1), dtype=nl.int32)
        assert nl.ndarray((4, 128, 8), nl.float32, buffer=nl.shared_hbm).select(0, index).shape == (128, 8)
        rows = nl.ndarray((128, 1), dtype=nl.int32)
        h = nl.ndarray((64, 128, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        assert h.vector_select(0, rows).shape == (128, 128, 8)
        t = nl.ndarray((128, 2, 3, 4), dtype=nl.float32)
        assert t.flatten_dims(1, 2).shape == (128, 6, 4)
        t = nl.ndarray((128, 24), dtype=nl.float32)
        assert t.rearrange(("b", ("h", "w")), ("b", "w", "h"), {"h": 4}).shape == (128, 6, 4)
        t = nl.ndarray((128, 64), dtype=nl.float32)
        assert t.slice(1, 0, 64, 2).shape == (128, 32)
        assert t.view(nl.uint8).shape == (128, 256)
        assert t[..., 0].shape == (128, 1)

    run(kernel)
