"""Operators and operands that the tests of Vector Engine arithmetic share."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from nkisim import isa as nisa
from nkisim import language as nl
from tests.nkisim.harness import integers, tile

BF16 = ml_dtypes.bfloat16
V, S, G, T = nisa.engine.vector, nisa.engine.scalar, nisa.engine.gpsimd, nisa.engine.tensor


def f32(condition):
    return condition.astype(np.float32)


# What each arithmetic operator computes, in NumPy on float32.
BINARY = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "maximum": lambda x, y: np.where(x > y, x, y),
    "minimum": lambda x, y: np.where(x < y, x, y),
    "equal": lambda x, y: f32(x == y),
    "not_equal": lambda x, y: f32(x != y),
    "greater": lambda x, y: f32(x > y),
    "greater_equal": lambda x, y: f32(x >= y),
    "less": lambda x, y: f32(x < y),
    "less_equal": lambda x, y: f32(x <= y),
    "logical_and": lambda x, y: f32((x != 0) & (y != 0)),
    "logical_or": lambda x, y: f32((x != 0) | (y != 0)),
    "logical_xor": lambda x, y: f32((x != 0) ^ (y != 0)),
    "abs_max": lambda x, y: np.where(np.abs(x) > np.abs(y), x, y),
    "abs_min": lambda x, y: np.where(np.abs(x) < np.abs(y), x, y),
}
GEN4 = ("abs_max", "abs_min", "square", "relu")
BITS = {
    "bitwise_and": lambda x, y: x & y,
    "bitwise_or": lambda x, y: x | y,
    "bitwise_xor": lambda x, y: x ^ y,
    "left_shift": lambda x, y: x << y,
    "right_shift": lambda x, y: x >> y,
}


def op(name):
    return getattr(nl, name)


def target_of(*names):
    return "trn3" if any(n in GEN4 for n in names) else "trn2"


def small(*shape, seed, dtype=np.float32):
    """Few different values, so that comparisons and zeros occur."""
    return integers(*shape, low=-2, high=3, seed=seed).astype(dtype)


def only(trace, instruction):
    (record,) = [r for r in trace.records if r.instruction == instruction]
    return record


def ok(shape=(4, 8), dtype=nl.float32, buffer=nl.sbuf):
    """Inside a kernel: a tile that every rule accepts."""
    return tile(shape, dtype, buffer)


def psum(shape=(4, 8)):
    return ok(shape, buffer=nl.psum)


def i32(shape=(4, 8)):
    return ok(shape, nl.int32)
