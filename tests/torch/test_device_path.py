"""The path of tensors on a Neuron device, with a stand-in for AWS's package: the simulator's kernels on torch tensors.

There the kernels get torch tensors, not arrays, and tables that were moved to the device; what a kernel writes comes
back as its result. The expected bits are those of the NumPy wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from contributed.append_kv import append_kv, append_kv_paged
from contributed.flash_attention_bwd import flash_attention_bwd
from contributed.flash_attention_fwd import flash_attention_fwd
from contributed.flash_decode import flash_decode
from contributed.paged_decode import paged_decode
from contributed.skip_softmax_decode import skip_softmax_decode
from contributed.sparse_decode import gated_decode, sparse_decode

torch = pytest.importorskip("torch", reason="torch is not installed")

import nki_torch  # noqa: E402
from nki_torch import _append_impl, _decode_impl, _device, append_cache, decode_cache  # noqa: E402
from nkisim.nki import Kernel  # noqa: E402
from tests.torch.tensors import arrays, equal, numbers, random, tensors  # noqa: E402


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """CPU tensors are taken for a device's. Collects the cores and the arguments of every launch of a kernel.

    Of a device's tensors only lengths, tables and counts may be read on the host.
    """
    found = []
    call, to_host = Kernel.__call__, torch.Tensor.numpy

    def spy(kernel: Kernel, *args: Any) -> Any:
        # The simulator reads its operands on the host; a device does not, and nothing that it writes is the caller's.
        found.append((kernel.n_cores, args))
        args = tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)
        with monkeypatch.context() as inside:
            inside.setattr(torch.Tensor, "numpy", to_host)
            return call(kernel, *args)

    def checked(tensor: Any, *args: Any) -> Any:
        assert not tensor.is_floating_point() or tensor.numel() < 100, "an operand is read on the host"
        return to_host(tensor, *args)

    def refused(*_: Any) -> Any:
        raise AssertionError("simulated")

    nki_torch.launch_cache_clear()
    monkeypatch.setattr(_device, "BACKEND", "nki")
    monkeypatch.setattr(_device, "simulate_kernel", refused)
    for module in (_device, _append_impl, _decode_impl):
        monkeypatch.setattr(module, "is_simulated", lambda device: False)
    monkeypatch.setattr(Kernel, "__call__", spy)
    monkeypatch.setattr(torch.Tensor, "numpy", checked)
    yield found
    nki_torch.launch_cache_clear()


def decode_operands() -> tuple[Any, ...]:
    return random(1, "bfloat16", (2, 4, 64), (2, 200, 2, 64), (2, 200, 2, 64))


def test_dense(launches: list[Any]) -> None:
    q, k, v = decode_operands()
    expected = arrays(q, k, v)
    got = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, return_lse=True)
    assert all(isinstance(x, torch.Tensor) for _, args in launches for x in args if hasattr(x, "shape"))
    assert [n_cores for n_cores, _ in launches] == [1]
    assert equal(got, tensors(*flash_decode(*expected, return_lse=True)))


def test_tables_move_once(launches: list[Any]) -> None:
    """The second layer of a step gets the tables that are on the device already."""
    q, k, v = decode_operands()
    for _ in range(2):
        nki_torch.flash_dense_attn_with_kvcache_func(q, k, v)
    first, second = (args for _, args in launches)
    assert [x is y for x, y in zip(first[3:6], second[3:6], strict=True)] == [True] * 3


def test_two_cores(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the runtime is configured for; kernels of one core are refused there."""
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "2")
    q, k, v = decode_operands()
    got = nki_torch.flash_sparse_attn_with_kvcache_func(q, k, v, None, 0.5, tile_kv=32)
    assert [n_cores for n_cores, _ in launches] == [2]
    expected = sparse_decode(*arrays(q, k, v), softmax_threshold=0.5, tile_kv=32, n_cores=2)
    assert equal([got], tensors(expected))
    alpha, delta = random(2, "bfloat16", (2, 4), (2, 2, 200))
    with pytest.raises(NotImplementedError, match="gated_decode: received NEURON_LOGICAL_NC_CONFIG=2, allowed 1"):
        nki_torch.flash_gated_attn_with_kvcache_func(q, k, v, alpha, delta)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "3")
    with pytest.raises(ValueError, match="NEURON_LOGICAL_NC_CONFIG: received 3, allowed 1 or 2"):
        nki_torch.flash_dense_attn_with_kvcache_func(q, k, v)


def test_gated_in_splits(launches: list[Any]) -> None:
    q, k, v = decode_operands()
    alpha, delta = random(2, "bfloat16", (2, 4), (2, 2, 200))
    how: dict[str, Any] = {"softmax_threshold": 0.3, "gate_threshold": 0.4, "tile_kv": 32, "n_splits": 2}
    got = nki_torch.flash_gated_attn_with_kvcache_func(q, k, v, alpha, delta, **how, return_lse=True)
    assert len(launches) == 2, "the kernel, and the one that joins splits"
    assert equal(got, tensors(*gated_decode(*arrays(q, k, v, alpha, delta), **how, return_lse=True)))


def test_append_and_decode(launches: list[Any]) -> None:
    q, k, v = decode_operands()
    (new,) = random(3, "bfloat16", (2, 3, 2, 64))
    expected = arrays(k.clone(), v.clone())
    append_kv(*expected, *arrays(new, new), np.array([190, -1]))
    k_d_major = torch.zeros(2, 2, 64, 256, dtype=k.dtype)
    k_d_major[..., :200] = k.permute(0, 2, 3, 1)
    s_major = torch.zeros(2, 2, 256, 64, dtype=v.dtype)
    s_major[:, :, :200] = v.transpose(1, 2)
    append_cache(k_d_major, s_major, new, new, numbers(190, -1), k_d_major=True)
    assert torch.equal(k_d_major[..., :200].permute(0, 3, 1, 2), tensors(expected[0])[0])
    lengths, whole = numbers(193, 200), {"seqlens_kv": np.array([193, 200]), "k_d_major": True, "return_lse": True}
    got = decode_cache(q, k_d_major, s_major, lengths, k_d_major=True, return_lse=True, max_seqlen=200)
    assert equal(got, tensors(*flash_decode(*arrays(q), *expected, max_seqlen_kv=200, **whole)))
    how: dict[str, Any] = {"skip_softmax_threshold": 0.9, "return_lse": True, "k_d_major": True}
    o, lse = decode_cache(q, k_d_major, s_major, lengths, measure_sparsity=True, max_seqlen=200, **how)
    whole |= {"max_seqlen_kv": 200, "return_stats": True, "skip_softmax_threshold": 0.9}
    *results, stats = skip_softmax_decode(*arrays(q), *expected, **whole)
    assert equal((o, lse), tensors(*results))
    assert o._sparsity_skipped == stats.tiles_skipped.sum()


def test_pages(launches: list[Any]) -> None:
    """FlashAttention's layout; of the pages only those in use are moved about."""
    q, _, _ = decode_operands()
    k, v, new = random(4, "bfloat16", (6, 16, 2, 64), (6, 16, 2, 64), (2, 1, 2, 64))
    table = torch.tensor([[5, 0, -1], [2, 4, -1]], dtype=torch.int32)
    in_pages = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in arrays(k, v)]
    append_kv_paged(*in_pages, *arrays(new, new), table.numpy(), np.array([20, 7]))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    got = nki_torch.flash_attn_with_kvcache(
        q[:, None], k, v, new, new, cache_seqlens=numbers(20, 7), block_table=table, alibi_slopes=slopes
    )
    expected = paged_decode(*arrays(q), *in_pages, table.numpy(), np.array([21, 8]), alibi_slopes=slopes.numpy())
    assert torch.equal(got[:, 0], tensors(expected)[0])
    assert torch.equal(k.transpose(1, 2), tensors(in_pages[0])[0])


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_prefill_and_its_gradients(launches: list[Any], threshold: float | None) -> None:
    """Rows of nobody at both ends and between; keys beyond the last chunk's."""
    operands = random(5, "bfloat16", (151, 4, 64), (153, 2, 64), (153, 2, 64))
    do = random(6, "bfloat16", (151, 4, 64))[0]
    leaves = [x.clone().requires_grad_() for x in operands]
    how: dict[str, Any] = {"sparsity_n": 2, "dense_recent_tokens": 9, "skip_softmax_threshold": threshold}
    o = nki_torch.attention(*leaves, numbers(1, 91), numbers(90, 60), 90, **how)
    gradients = torch.autograd.grad(o, leaves, do)
    host = arrays(*operands)
    how |= {"cu_seqlens_q": np.array([1, 91, 151]), "cu_seqlens_kv": np.array([1, 91, 151])}
    expected, lse, stats = flash_attention_fwd(*host, return_lse=True, return_stats=True, **how)
    assert equal([o.detach()], tensors(expected))
    kept = None if threshold is None else stats.kept
    of_host = flash_attention_bwd(arrays(do)[0], *host, expected, lse, kept=kept, **how)
    assert equal(gradients, tensors(*of_host))


def test_a_device_without_awss_package() -> None:
    with pytest.raises(RuntimeError, match="device xla: backend of contributed is nkisim, allowed AWS's nki"):
        _device.run(None, (), torch.device("xla"))
