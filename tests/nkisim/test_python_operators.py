"""Python operators on registers and tensors: refused, with the alternative named."""

from __future__ import annotations

import operator
import re
from typing import Any

import numpy as np
import pytest

from nkisim import isa as nisa
from nkisim import language as nl
from nkisim import view
from nkisim.errors import NkiError
from tests.nkisim.harness import refused, run, tile

X = np.ones((2, 3), np.float32)

BINARY = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "**": operator.pow, "@": operator.matmul, "<<": operator.lshift, ">>": operator.rshift,
    "&": operator.and_, "|": operator.or_, "^": operator.xor,
}  # fmt: skip
ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
UNARY = {"-": operator.neg, "+": operator.pos, "~": operator.invert, "abs()": abs, "round()": round}


def cases() -> list[Any]:
    """Symbol in the message, and a function of the refusing object."""
    found = []
    for symbol, function in {**BINARY, **ORDER}.items():
        for number in (128, 2.5, np.float32(2)):
            found.append((symbol, lambda v, f=function, n=number: f(v, n)))
            found.append((MIRRORED.get(symbol, symbol), lambda v, f=function, n=number: f(n, v)))
        found.append((symbol, lambda v, f=function: f(v, v)))
    return found + list(UNARY.items())


@pytest.mark.parametrize(("symbol", "function"), cases())
def test_operators(symbol, function):
    def on_register(x):
        nl.fori_loop(0, 2, lambda i: function(i))

    def on_tensor(x):
        function(tile((2, 3)))

    alternative = "nl.while_loop" if symbol in ORDER else r"step=128.*scalar_offset"
    with pytest.raises(TypeError, match=rf"VirtualRegister {re.escape(symbol)}: .*not known.*{alternative}"):
        run(on_register, X)
    with pytest.raises(NkiError) as caught:
        run(on_tensor, X)
    assert caught.value.instruction == f"NkiTensor.operator {symbol}"
    assert "not known while the kernel is built" in caught.value.rule
    assert caught.value.allowed == view._INSTEAD.get(symbol, "an nki.isa instruction or a function of nki.language")


def test_augmented_assignment():
    def kernel(x):
        t = tile((2, 3))
        t += 1.0

    refused(kernel, X, instruction="NkiTensor.operator +", rule="Python operator", received="t", allowed="nl.add(x, y)")


@pytest.mark.parametrize("other", [0, 1.5, True, np.float32(0)])
def test_equality_with_a_number(other):
    def kernel(x):
        return x == other

    def mirrored(x):
        return other != x

    for function in (kernel, mirrored):
        refused(
            function, X, instruction="NkiTensor.operator ==", rule="Python operator", received="x", allowed="nl.equal"
        )


def test_equality_with_a_register():
    def kernel(x):
        return x == nisa.register_alloc(0)

    refused(kernel, X, instruction="NkiTensor.operator ==", rule="Python operator", received="x", allowed="nl.equal")


def test_tensors_stay_usable_in_containers():
    def kernel(x):
        a, b = tile((2, 3)), tile((2, 3))
        assert a in [b, a]
        assert a not in (b, None)
        assert a == a
        assert a != b
        assert a != None  # noqa: E711 the lint asks kernels to write it so
        assert {a: 1}[a] == 1

    run(kernel, X)


def test_alternatives_exist():
    named = " ".join(view._INSTEAD.values())
    assert all(hasattr(nl, name) for name in re.findall(r"nl\.(\w+)", named))
    assert all(hasattr(nisa, name) for name in re.findall(r"nki\.isa\.(\w+)", named))
