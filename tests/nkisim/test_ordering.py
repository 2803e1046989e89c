"""Scheduling edges that no schedule meets."""

from __future__ import annotations

from typing import Any

import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim import nki
from nkisim.isa._call import NkiInstruction
from tests.nkisim.harness import normal, refused, run, sb, tile

X = normal(4, 6)


def four(x: Any) -> None:
    """v1, s1, v2, s2: two instructions of the Vector and two of the Scalar Engine; two DMAs; one name twice."""
    t = sb(x)
    nisa.dma_copy(tile(x.shape), x, name="d1")
    nisa.tensor_copy(tile(x.shape), t, engine=nisa.vector_engine, name="v1")
    nisa.activation(tile(x.shape), nl.exp, t, name="s1")
    nisa.tensor_copy(tile(x.shape), t, engine=nisa.vector_engine, name="v2")
    nisa.activation(tile(x.shape), nl.exp, t, name="s2")
    nisa.dma_copy(tile(x.shape), x, name="d2")
    for _ in range(2):
        nisa.memset(tile(x.shape), 0.0, name="twice")


IMPOSSIBLE = [
    ([("v1", "v1")], "edge from an instruction to itself", "'v1'"),
    ([("v1", "s1"), ("s1", "v1")], "circle of scheduling edges", " before "),
    ([("d1", "d2"), ("d2", "d1")], "circle of scheduling edges", " before "),
    ([("v1", "d2"), ("d2", "s1"), ("s1", "v1")], "circle of scheduling edges", " before "),
    ([("v2", "twice")], "edge to a name of several instructions", "'twice'"),
    ([("twice", "v2")], "edge to a name of several instructions", "'twice'"),
]


@pytest.mark.parametrize(("edges", "rule", "received"), IMPOSSIBLE)
def test_schedules_that_cannot_be_met(edges, rule, received):
    with pytest.raises(nkisim.NkiError) as caught:
        nki.jit(four).with_schedule(edges)(X)
    assert caught.value.instruction == "with_schedule"
    assert rule in caught.value.rule
    assert received in caught.value.received


@pytest.mark.parametrize(
    "edges",
    # The compiler may reorder instructions of one engine, so edges against program order are fine.
    [
        [("v2", "v1")],
        [("v1", "v2")],
        [("v1", "s2"), ("s1", "v2")],
        [("v1", "s1")],
        [("v1", "s2")],
        [("s1", "v2"), ("d1", "d2")],
        [("v1", "s1"), ("s2", "v2")],
    ],
)
def test_schedules_that_can_be_met(edges):
    nki.jit(four).with_schedule(edges)(X)


def pair(x: Any) -> tuple[Any, Any, Any]:
    t = sb(x)
    return (
        nisa.tensor_copy(tile(x.shape), t, engine=nisa.vector_engine),
        nisa.activation(tile(x.shape), nl.exp, t),
        nisa.tensor_copy(tile(x.shape), t, engine=nisa.vector_engine),
    )


@pytest.mark.parametrize(
    ("first", "second", "rule", "allowed"),
    [
        ((0, 0), None, "itself", "another instruction"),
        ((0, 2), None, None, None),
        ((0, 1), (1, 0), "circle", "some order"),
        ((0, 1), (1, 2), None, None),
        ((2, 0), (2, 1), None, None),
        ((1, 2), (0, 1), None, None),
    ],
)
def test_depends_on(first, second, rule, allowed):
    def kernel(x):
        made = pair(x)
        made[first[0]].depends_on(made[first[1]])
        if second is not None:
            made[second[0]].depends_on(made[second[1]])

    if rule is None:
        run(kernel, X)
        return
    refused(kernel, X, instruction="depends_on", operand="producers", rule=rule, received="'", allowed=allowed)


def test_an_instruction_made_by_hand():
    def kernel(x):
        pair(x)[0].depends_on(NkiInstruction("mine"))

    refused(
        kernel,
        X,
        instruction="depends_on",
        operand="producers",
        rule="not issued",
        received="'mine'",
        allowed="as nki.isa returned them",
    )


def test_a_name_in_a_loop_is_one_instruction():
    def kernel(x):
        t = sb(x)

        def body(i):
            nisa.tensor_copy(tile(x.shape), t, name="a")
            nisa.activation(tile(x.shape), nl.exp, t, name="b")

        nl.fori_loop(0, 3, body)

    nki.jit(kernel).with_schedule([("b", "a")])(X)
    with pytest.raises(nkisim.NkiError, match="circle"):
        nki.jit(kernel).with_schedule([("b", "a"), ("a", "b")])(X)
