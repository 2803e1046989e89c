"""nki.jit and nki.simulate: targets, schedules, two cores."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim import nki
from nkisim.nki import Kernel
from tests.nkisim.harness import normal, out, refused, sb

BF16 = ml_dtypes.bfloat16
TARGET = "NEURON_PLATFORM_TARGET_OVERRIDE"
X = normal(4, 6, seed=31)


@nki.jit
def double(x: Any) -> Any:
    """2 x."""
    return out(nl.add(sb(x), sb(x)))


def negate_in_place(x: Any) -> None:
    """x = -x."""
    nl.store(x, nl.negative(nl.load(x)))


# ---------------------------------------------------------------------------------------------------
# jit


def test_jit_keeps_the_function_and_simulates_it() -> None:
    assert isinstance(double, Kernel)
    assert (double.__name__, double.__doc__) == ("double", "2 x.")
    np.testing.assert_array_equal(double(X), 2 * X)
    np.testing.assert_array_equal(nki.simulate(double)(X), 2 * X)
    np.testing.assert_array_equal(nkisim.simulate(double)(x=X), 2 * X)


def test_jit_with_parentheses() -> None:
    @nki.jit()
    def first(x: Any) -> Any:
        return out(sb(x))

    @nki.jit(mode="torchxla")
    def second(x: Any) -> Any:
        return out(sb(x))

    np.testing.assert_array_equal(first(X), X)
    np.testing.assert_array_equal(second(X), X)


def test_jit_refuses_what_nki_refuses() -> None:
    with pytest.raises(TypeError, match=r"platform_target: not accepted since NKI 0\.3"):
        nki.jit(platform_target="trn2")
    with pytest.raises(TypeError, match=r"received \['grid'\], allowed mode"):
        nki.jit(grid=2)
    with pytest.raises(TypeError, match=r"nki\.jit: received int, allowed a function"):
        nki.jit(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"nki\.simulate: received int"):
        nki.simulate(3)


def test_a_kernel_inside_a_kernel_is_refused() -> None:
    def outer(x: Any) -> Any:
        return double(x)

    def simulated(x: Any) -> Any:
        return nki.simulate(negate_in_place)(x)

    refused(outer, X, instruction="jit", operand="double", rule="inside a kernel", received="jit", allowed="plain")
    refused(
        simulated, X, instruction="jit", operand="negate_in_place", rule="inside", received="simulate", allowed="plain"
    )


def test_plain_functions_may_be_called_inside() -> None:
    def helper(t: Any) -> Any:
        return nl.add(t, 1.0)

    def kernel(x: Any) -> Any:
        return out(helper(helper(sb(x))))

    np.testing.assert_array_equal(nki.simulate(kernel)(X), (X + 1) + 1)


# ---------------------------------------------------------------------------------------------------
# Targets


@pytest.mark.parametrize(("name", "generation"), [("trn1", 2), ("inf2", 2), ("gen3", 3), ("trn2", 3), ("gen4", 4)])
def test_target_by_argument_and_environment(name: str, generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def kernel() -> None:
        seen.append(nisa.get_nc_version().value)

    nki.simulate(kernel, target=name)()
    monkeypatch.setenv(TARGET, name)
    nki.simulate(kernel)()
    nki.jit(kernel)()
    monkeypatch.setenv(TARGET, "trn1")
    nki.simulate(kernel, target=name)()
    assert seen == [generation] * 4


def test_default_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TARGET, raising=False)
    trace = nkisim.Trace()
    nki.simulate(double, trace=trace)(X)
    assert trace.target == "trn3"


def test_unknown_target(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"target: received 'trn9', allowed trn1, inf2"):
        nki.simulate(double, target="trn9")
    monkeypatch.setenv(TARGET, "nonsense")
    with pytest.raises(ValueError, match="received 'nonsense'"):
        double(X)


def test_simulator_variable_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NKI_SIMULATOR", "1")
    np.testing.assert_array_equal(double(X), 2 * X)


# ---------------------------------------------------------------------------------------------------
# Two cores


def halves(x: Any) -> Any:
    """Each core doubles its half of the columns."""
    o = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    n = x.shape[1] // nl.num_programs()
    part = slice(nl.program_id() * n, (nl.program_id() + 1) * n)
    nl.store(o[:, part], nl.multiply(nl.load(x[:, part]), 2.0))
    return o


def test_two_cores() -> None:
    kernel = nki.jit(halves)
    np.testing.assert_array_equal(kernel(X), 2 * X)
    trace = nkisim.Trace()
    np.testing.assert_array_equal(nki.simulate(kernel[2], target="trn2", trace=trace)(X), 2 * X)
    assert {r.core for r in trace.records} == {0, 1}
    assert sorted(trace.memory) == [0, 1]
    np.testing.assert_array_equal(nki.simulate(kernel[2], target="trn3")(X), 2 * X)
    np.testing.assert_array_equal(nki.simulate(kernel[1], target="trn1")(X), 2 * X)


def test_launch_sizes() -> None:
    with pytest.raises(ValueError, match=r"kernel\[lnc\]: received 2, allowed 1..1 on trn1"):
        nki.simulate(double[2], target="trn1")(X)
    for lnc in (0, 3, True, (2,), "2", 1.5):
        with pytest.raises(ValueError, match=r"kernel\[lnc\]: received"):
            double[lnc]


def test_arguments_of_two_cores_are_shared() -> None:
    def kernel(x: Any) -> None:
        assert x.buffer is nl.shared_hbm
        row = x[nl.program_id() : nl.program_id() + 1]
        nl.store(row, nl.add(nl.load(row), 10.0))

    x = np.zeros((2, 3), np.float32)
    nki.simulate(nki.jit(kernel)[2], target="trn2")(x)
    np.testing.assert_array_equal(x, np.full((2, 3), 10.0))


# ---------------------------------------------------------------------------------------------------
# Schedules and traces


def scheduled(x: Any) -> Any:
    t = sb(x)
    a, b = nl.ndarray(t.shape, t.dtype), nl.ndarray(t.shape, t.dtype)
    nisa.tensor_copy(dst=a, src=t, name="first")
    nisa.tensor_copy(dst=b, src=t, name="second")
    nisa.memset(nl.ndarray((1, 1), t.dtype), 0.0, name="third")
    return out(nl.add(a, b))


def test_schedule_edges_are_in_the_trace() -> None:
    trace = nkisim.Trace()
    kernel = nki.jit(scheduled).with_schedule([("second", ["first"]), ("third", ["first", "second"])])
    np.testing.assert_array_equal(nki.simulate(kernel, trace=trace)(X), 2 * X)
    assert trace.edges == [("second", "first"), ("third", "first"), ("third", "second")]


def test_schedule_of_instructions_that_were_not_issued() -> None:
    kernel = nki.jit(scheduled).with_schedule([("second", "fourth")])
    with pytest.raises(nkisim.NkiError, match=r"not issued: received 'fourth', allowed first, second, third"):
        kernel(X)
    with pytest.raises(nkisim.NkiError, match="no instruction has one"):
        nki.jit(lambda x: None).with_schedule([("a", "b")])(X)


def test_schedule_across_a_dynamic_loop() -> None:
    def kernel(x: Any) -> Any:
        t = nl.ndarray(x.shape, x.dtype)
        nisa.dma_copy(dst=t, src=x, name="load")

        def body(i: Any) -> None:
            nisa.tensor_copy(dst=t, src=t, name="inside")

        nl.fori_loop(0, 2, body)
        return out(t)

    edges = nki.jit(kernel).with_schedule([("inside", "load")])
    with pytest.raises(nkisim.NkiError, match="edge across a dynamic loop's boundary: received 'inside' after 'load'"):
        edges(X)


@pytest.mark.parametrize("edge", [("a",), "ab", ("a", "b", "c"), (1, "b"), ("a", 2), ("a", ["b", 3])])
def test_schedules_that_are_no_edges(edge: Any) -> None:
    with pytest.raises(TypeError, match="with_schedule: received"):
        double.with_schedule([edge])


def test_options_of_a_launch_are_kept_together() -> None:
    kernel = double.with_schedule([("a", "b")])[2]
    assert (kernel.n_cores, kernel.schedule, kernel.__name__) == (2, (("a", "b"),), "double")
    assert double.n_cores == 1


def test_errors_of_the_kernel_pass_through() -> None:
    def kernel(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        nki.simulate(kernel)(X)
    np.testing.assert_array_equal(double(X), 2 * X)  # nothing is left of the failed run
