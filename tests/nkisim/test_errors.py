"""NkiError: its text, its facts, and the line of the kernel it points at."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.errors import NkiError, Site, call_site
from tests.nkisim.harness import run, tile


def here() -> int:
    """Line of the caller."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def error(**changes: Any) -> NkiError:
    facts = {"received": 3, "allowed": "1..2", "source": "the guide", "site": Site("k.py", 7, "kernel"), **changes}
    return NkiError("tensor_copy", "dst", "partitions", **facts)


def test_text():
    text = "tensor_copy.dst: partitions: received 3, allowed 1..2 [the guide] at k.py:7 in kernel"
    assert str(error()) == text
    without = NkiError(
        "nc_matmul", "", "target", received="trn1", allowed="trn2", source="ISA", site=Site("k.py", 1, "f")
    )
    assert str(without) == "nc_matmul: target: received trn1, allowed trn2 [ISA] at k.py:1 in f"


def test_facts():
    e = error()
    assert (e.instruction, e.operand, e.rule, e.received, e.allowed, e.source) == (
        "tensor_copy", "dst", "partitions", 3, "1..2", "the guide",
    )  # fmt: skip
    assert e.site == ("k.py", 7, "kernel")
    assert (e.site.file, e.site.line, e.site.function) == ("k.py", 7, "kernel")


def test_the_public_names_are_one_class():
    assert nkisim.NkiError is NkiError
    assert nisa.NkiValidationError is NkiError


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_keep_the_facts(way):
    again = way(error())
    assert type(again) is NkiError
    assert str(again) == str(error())
    assert vars(again) == vars(error())


def test_site_is_the_callers_line_without_being_told():
    e, line = error(site=None), here()
    assert (e.site.file, e.site.function) == (__file__, "error")
    site, line = call_site(), here()
    assert site == (__file__, line, "test_site_is_the_callers_line_without_being_told")


def test_site_is_the_innermost_line_of_the_kernel():
    lines = []

    def helper(t):
        lines.append(here() + 1)
        nisa.tensor_copy(t, tile((3, 2)))

    def kernel():
        helper(tile((2, 2)))

    with pytest.raises(NkiError) as caught:
        run(kernel)
    assert caught.value.site == (__file__, lines[0], "helper")


def test_site_skips_the_standard_library():
    lines = []

    def kernel():
        lines.append(here() + 1)
        functools.reduce(lambda _, t: nisa.tensor_copy(t, tile((3, 2))), [None, tile((2, 2))])

    with pytest.raises(NkiError) as caught:
        run(kernel)
    assert caught.value.site.file == __file__
    assert caught.value.site.line == lines[0]


def test_site_of_a_context_manager_is_the_with_statement():
    lines = []

    def kernel():
        lines.append(here() + 1)
        with nl.no_reorder():
            pass

    trace = nkisim.Trace()
    nkisim.simulate(kernel, trace=trace)()
    begin = next(r for r in trace.records if r.instruction == "no_reorder_begin")
    assert begin.site == (__file__, lines[0], "kernel")


def test_site_inside_a_user_context_manager():
    @contextlib.contextmanager
    def region(t):
        yield nisa.memset(t, 0.0)

    def kernel():
        with region(tile((2, 2))):
            nisa.tensor_copy(tile((2, 2)), tile((3, 2)))

    with pytest.raises(NkiError) as caught:
        run(kernel)
    assert caught.value.site.function == "kernel"


def test_source_without_a_kernel_frame():
    namespace: dict[str, Any] = {}
    exec(compile("def f(site):\n    return site()", nkisim.__file__, "exec"), namespace)
    site = namespace["f"](call_site)
    assert site.function == "test_source_without_a_kernel_frame"


def test_every_error_of_a_run_carries_a_site():
    def kernel(x):
        return x[5]

    with pytest.raises(NkiError) as caught:
        run(kernel, np.zeros((2, 2), np.float32))
    assert caught.value.site.function == "kernel"
    assert f"{__file__}:{caught.value.site.line}" in str(caught.value)


# -- helpers


def _load(x: Any) -> Any:
    return x[5]


def test_the_kernel_is_named_beside_its_helper():
    def kernel(x):
        def body(i):
            _load(x)

        lines.append(here() + 1)
        nl.fori_loop(0, 1, body)

    lines: list[int] = []
    with pytest.raises(NkiError) as caught:
        run(kernel, np.zeros((2, 2), np.float32))
    e = caught.value
    assert (e.site.file, e.site.function) == (__file__, "_load")
    assert e.caller == (__file__, lines[0], "kernel")
    assert str(e).endswith(f"at {e.site}, called from {__file__}:{lines[0]} in kernel")
    assert vars(pickle.loads(pickle.dumps(e))) == vars(e)


def test_an_error_in_the_kernel_itself_has_no_caller():
    def kernel(x):
        return x[5]

    for lnc in (1, 2):
        with pytest.raises(NkiError) as caught:
            nkisim.simulate(nkisim.nki.jit(kernel)[lnc], target="trn2")(np.zeros((2, 2), np.float32))
        assert caught.value.caller is None
        assert "called from" not in str(caught.value)


def test_the_kernel_is_named_on_two_cores():
    def kernel(x):
        _load(x)

    with pytest.raises(NkiError, match=r"in _load, called from .* in kernel"):
        nkisim.simulate(nkisim.nki.jit(kernel)[2], target="trn2")(np.zeros((2, 2), np.float32))


def _fill(shape: tuple[int, ...]) -> Any:
    t = nl.ndarray(shape, nl.float32)
    nisa.memset(t, 0.0)
    return t


def test_capacity_errors_name_the_kernel():
    lines = []

    def kernel():
        lines.append(here() + 1)
        tiles = [_fill((128, 12 * 1024)) for _ in range(8)]
        for t in tiles:
            nisa.tensor_copy(t[:, 0:1], t[:, 1:2])

    with pytest.raises(NkiError, match="SBUF capacity") as caught:
        run(kernel)
    assert caught.value.site.function == "_fill"
    assert caught.value.caller is not None
    assert caught.value.caller.line == lines[0]
