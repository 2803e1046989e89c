"""dma_compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.trace import Engine
from tests.nkisim.dma_kernels import hbm
from tests.nkisim.harness import normal, out, refused, run, sb, tile, traced


def test_sum_of_sources():
    xs = [normal(4, 6, seed=i) for i in range(3)]

    def kernel(a, b, c):
        o = hbm((24,))
        nisa.dma_compute(o, [a, sb(b), c.reshape((2, 12))], nl.add, scales=[1.0, 1.0, 1])
        return o

    expected = (xs[0] + xs[1] + xs[2]).reshape(-1)
    np.testing.assert_array_equal(run(kernel, *xs), expected)
    record = traced(kernel, *xs).records[-1]
    assert record.engine is Engine.dma
    assert record.attrs == {"dge": "none", "op": "add", "mode": "sum", "rows_skipped": 0, "skipped": False}
    assert [a.operand for a in record.reads] == ["srcs[0]", "srcs[1]", "srcs[2]"]


def test_sum_rounds_once_and_in_float32():
    a = np.array([[256.0, 1.0, 2.0**24]], np.float32)
    b = np.array([[1.0, 2.0**-8, 1.0]], np.float32)

    def kernel(a, b):
        o = hbm((1, 3), nl.bfloat16)
        nisa.dma_compute(o, (a, b, b), nl.add)
        f = hbm((1, 3))
        nisa.dma_compute(f, (a, b, b), nl.add)
        i = hbm((1, 3), nl.int32)
        nisa.dma_compute(i, (a,), nl.add)
        return o, f, i

    o, f, i = run(kernel, a, b)
    # Rounding to bfloat16 after each source would leave 256 and 1.
    np.testing.assert_array_equal(o.astype(np.float32), [[258.0, 1.0078125, 2.0**24]])
    np.testing.assert_array_equal(f, [[258.0, 1.0078125, 2.0**24]])
    np.testing.assert_array_equal(i, [[256, 1, 2**24]])


def test_sum_in_place():
    x = normal(3, 4)

    def kernel(x):
        t = sb(x)
        nisa.dma_compute(t, [t, t, x], nl.add)
        return out(t)

    np.testing.assert_array_equal(run(kernel, x), x + x + x)


def test_scatter_add():
    x, base, index = normal(4, 5), normal(9, 5, seed=1), np.array([[8], [2], [0], [5]], np.uint32)

    def kernel(x, base, index):
        o = hbm((9, 5))
        nisa.dma_copy(o, base)
        rows = o.ap([[5, 4], [1, 5]], vector_offset=sb(index), indirect_dim=0)
        nisa.dma_compute(rows, [sb(x), rows], nl.add)
        return o

    expected = base.copy()
    expected[index[:, 0]] += x
    np.testing.assert_array_equal(run(kernel, x, base, index), expected)
    record = traced(kernel, x, base, index).records[-1]
    assert (record.attrs["dge"], record.attrs["mode"]) == ("swdge", "scatter")
    assert record.writes[0].rows == (40, 10, 0, 25)


def test_gather_add_and_skip():
    x, table, index = normal(4, 5), normal(9, 5, seed=1), np.array([[8], [-1], [9], [5]], np.int32)

    def gather(x, table, index):
        t = sb(x)
        nisa.dma_compute(t, [table.vector_select(0, sb(index)), t], nl.add, oob_mode=nisa.oob_mode.skip)
        return out(t)

    expected = x.copy()
    expected[0] += table[8]
    expected[3] += table[5]
    np.testing.assert_array_equal(run(gather, x, table, index), expected)
    record = next(r for r in traced(gather, x, table, index).records if r.instruction == "dma_compute")
    assert (record.attrs["mode"], record.attrs["rows_skipped"]) == ("gather", 2)

    def scatter(x, table, index):
        rows = table.vector_select(0, sb(index))
        nisa.dma_compute(rows, [rows, sb(x)], nl.add, oob_mode=nisa.oob_mode.skip)

    expected = table.copy()
    expected[8] += x[0]
    expected[5] += x[3]
    run(scatter, x, table, index)
    np.testing.assert_array_equal(table, expected)


def test_indexed_sums_refuse_indices_outside():
    def kernel(x, table, index):
        t = sb(x)
        nisa.dma_compute(t, [table.vector_select(0, sb(index)), t], nl.add)

    refused(
        kernel,
        normal(2, 3),
        normal(4, 3),
        np.array([[1], [4]], np.int32),
        instruction="dma_compute",
        operand="srcs[0]",
        rule="run-time row index out of bounds in partition 1",
        received="4",
        allowed="0..3",
    )


@pytest.mark.parametrize("mode", ["scatter", "gather"])
def test_repeated_indices_are_refused(mode):
    def kernel(x, table, index):
        t, rows = sb(x), table.vector_select(0, sb(index))
        dst, srcs = (rows, [rows, t]) if mode == "scatter" else (t, [rows, t])
        nisa.dma_compute(dst, srcs, nl.add, oob_mode=nisa.oob_mode.skip)

    index = np.array([[1], [3], [3], [-1], [-1]], np.int32)
    refused(
        kernel,
        normal(5, 3),
        normal(4, 3),
        index,
        instruction="dma_compute",
        operand="srcs[0]",
        rule="repeated index",
        received="3",
        allowed="differ",
    )
    index[2] = 0  # indices outside may repeat: they move nothing
    traced(kernel, normal(5, 3), normal(4, 3), index)


def _sum(**changes: Any) -> Any:
    def kernel(x, index):
        t = sb(x)
        arguments = {"dst": t, "srcs": [x, t], "reduce_op": nl.add}
        for key, value in changes.items():
            arguments[key] = value(x, t, sb(index)) if callable(value) and key != "reduce_op" else value
        nisa.dma_compute(**arguments)

    return kernel


SUM_RULES = [
    ({"reduce_op": nl.multiply}, "reduce_op", "operator", "multiply", "nl.add"),
    ({"srcs": lambda x, t, i: []}, "srcs", "number of sources", "0", "1..16"),
    ({"srcs": lambda x, t, i: [x] * 17}, "srcs", "number of sources", "17", "1..16"),
    ({"srcs": lambda x, t, i: x}, "srcs", "type", "NkiTensor", "a list"),
    ({"srcs": lambda x, t, i: [x, 1.0]}, "srcs[1]", "type", "float", "NkiTensor"),
    ({"srcs": lambda x, t, i: [x, x[:, 0:2]]}, "srcs[1]", "number of elements", "6 [3, 2]", "12"),
    ({"scales": [1.0]}, "scales", "number of scales", "[1.0]", "2 scales"),
    ({"scales": [1.0, 0.5]}, "scales", "value", "0.5", "1.0"),
    ({"scales": [1.0, True]}, "scales", "value", "True", "1.0"),
    ({"unique_indices": 1}, "unique_indices", "type", "1", "True or False"),
    ({"oob_mode": nisa.oob_mode.skip}, "oob_mode", "mode without vector_offset", "skip", "error"),
    ({"oob_mode": None}, "oob_mode", "type", "None", "a member"),
    ({"dst": lambda x, t, i: tile((3, 4), buffer=nl.psum)}, "dst", "buffer", "psum", "sbuf or HBM"),
    ({"dst": lambda x, t, i: tile((3, 4), nl.float8_e4m3fn_x4)}, "dst", "dtype", "float8_e4m3fn_x4", "one number"),
    ({"srcs": lambda x, t, i: [x.vector_select(0, i)]}, "srcs", "number of sources with vector_offset", "1", "2"),
    (
        {"srcs": lambda x, t, i: [x.vector_select(0, i)] * 2},
        "srcs",
        "sources with vector_offset",
        "2",
        "1 of the 2",
    ),
    (
        {"srcs": lambda x, t, i: [x.vector_select(0, i), t], "unique_indices": False},
        "unique_indices",
        "value with vector_offset",
        "False",
        "True",
    ),
    (
        {"srcs": lambda x, t, i: [x.vector_select(0, i), x]},
        "srcs[1]",
        "source that is read and written",
        "float32",
        "the same view",
    ),
    (
        {"dst": lambda x, t, i: x.vector_select(0, i), "srcs": lambda x, t, i: [t, x[0:3].vector_select(0, i)]},
        "srcs[1]",
        "source that is read and written",
        "float32",
        "the same view and indices",
    ),
    (
        {"dst": lambda x, t, i: x, "srcs": lambda x, t, i: [x.vector_select(0, i), x]},
        "dst",
        "buffer beside an indexed tensor",
        "private_hbm",
        "sbuf",
    ),
    (
        {"srcs": lambda x, t, i: [x[nl.ds(nisa.register_alloc(0), 3), :], t]},
        "srcs[0]",
        "run-time address",
        "scalar_offset",
        "compile-time",
    ),
]


@pytest.mark.parametrize(
    ("changes", "operand", "rule", "received", "allowed"),
    SUM_RULES,
    ids=lambda v: "+".join(v) if isinstance(v, dict) else str(v)[:40],
)
def test_dma_compute_rules(changes, operand, rule, received, allowed):
    refused(
        _sum(**changes),
        normal(3, 4),
        np.array([[2], [0], [1]], np.int32),
        instruction="dma_compute",
        operand=operand,
        rule=rule,
        received=received,
        allowed=allowed,
    )
