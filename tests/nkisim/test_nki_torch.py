"""Kernels on torch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nkisim import language as nl
from nkisim import nki
from tests.nkisim.harness import out, sb

torch = pytest.importorskip("torch", reason="torch is not installed")

TYPES = ["float32", "float16", "bfloat16", "int32", "int16", "int8", "uint8", "bool"]


def values(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@nki.jit
def same(x: Any) -> Any:
    return out(sb(x))


def negate_in_place(x: Any) -> None:
    nl.store(x, nl.negative(nl.load(x)))


@pytest.mark.parametrize("name", TYPES)
def test_tensors_in_and_out(name: str) -> None:
    x = torch.arange(24).reshape(4, 6).to(getattr(torch, name))
    got = same(x)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == x.dtype
    assert torch.equal(got, x)


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(name: str, target: str) -> None:
    x = torch.tensor([[0.5, -96.0, 1.0]]).to(getattr(torch, name))
    got = nki.simulate(same, target=target)(x)
    assert got.dtype == x.dtype
    assert torch.equal(got.float(), x.float())
    nki.simulate(negate_in_place, target=target)(x)
    assert torch.equal(x.float(), -got.float())


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_tensors_are_updated_in_place(name: str) -> None:
    dtype = getattr(torch, name)
    plain = values(4, 6).to(dtype)
    wide = values(4, 12).to(dtype)
    leaf = values(4, 6).to(dtype).requires_grad_()
    other = values(6, 4).to(dtype).T.requires_grad_()
    for x in (plain, wide[:, ::2], leaf, other):
        expected = -x.detach().clone()
        nki.simulate(negate_in_place)(x)
        assert torch.equal(x.detach(), expected)


def test_all_float32_mode_updates_in_place_too() -> None:
    x = values(4, 6).to(torch.bfloat16)
    expected = -x.clone()
    nki.simulate(negate_in_place, precise=False)(x)
    assert torch.equal(x, expected)
    assert torch.equal(nki.simulate(same, precise=False)(x), x)


def test_mixed_with_arrays_the_results_are_tensors() -> None:
    def kernel(x: Any, y: Any) -> Any:
        return (out(sb(x)), {"y": out(sb(y))})

    y = np.ones((2, 3), np.float32)
    first, second = nki.simulate(kernel)(values(2, 3), y)
    assert isinstance(first, torch.Tensor)
    assert torch.equal(second["y"], torch.ones(2, 3))
    for result in nki.simulate(kernel)(y, y)[:1]:
        assert isinstance(result, np.ndarray)


def test_types_of_torch_name_types_of_nki() -> None:
    def kernel(x: Any, dtype: Any) -> Any:
        assert dtype is nl.bfloat16
        return out(nl.copy(sb(x), dtype=dtype))

    x = values(2, 3)
    assert torch.equal(nki.simulate(kernel)(x, torch.bfloat16), x.to(torch.bfloat16))


def test_tensors_that_no_kernel_takes() -> None:
    with pytest.raises(TypeError, match=r"x: received dtype\('int64'\)"):
        same(torch.arange(3))
    with pytest.raises(TypeError, match="dtype: received 'complex64'"):
        nki.simulate(lambda x, dtype: None)(values(2, 2), torch.complex64)
    with pytest.raises(ValueError, match="at least one element"):
        same(torch.zeros(0, 2))


def test_scalar_tensor_becomes_one_element() -> None:
    def kernel(x: Any) -> Any:
        assert x.shape == (1,)
        nl.store(x, nl.full((1, 1), 3.0, nl.float32))

    x = torch.tensor(2.0)
    nki.simulate(kernel)(x)
    assert x.item() == 3
