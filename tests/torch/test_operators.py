"""Operators as torch wants them (`opcheck`), and graphs: traced whole, compiled, exported."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402

import nki_torch  # noqa: E402
from nki_torch import _ops as ops  # noqa: E402
from tests.torch.tensors import equal, numbers, random  # noqa: E402

SEQUENCES = (numbers(0, 20), numbers(20, 20), 20, numbers(0, 20), numbers(20, 20), 20)
RULES = (0.2, None, 0, 2, 4, 0, 3, 0.5)  # scale, window, N:M, threshold


def small() -> tuple[Any, ...]:
    return random(1, "float32", (2, 1, 2, 32), (2, 40, 1, 32), (2, 40, 1, 32))


def decode_arguments(name: str) -> tuple[Any, ...]:
    q, k, v = small()
    lengths = numbers(40, 7)
    if name == "dense_decode":
        return (q, k, v, lengths, None, None, "bshd", "a,b,c", None, None, 5, None, None, None, None, True)
    if name == "dense_decode without lse":
        return (q, k, v, None, None, None, "bshd", "a,b,c", None, None, None, None, None, None, None, False)
    if name == "sparse_decode":
        rule = ("sparse_decode", "bshd", "a,b,c", None, None, 0.5, None, 16, 1, True, True)
        return (q, k, v, lengths, None, *rule)
    if name == "gated_decode":
        alpha, delta = random(2, "float32", (2, 2), (2, 1, 40))
        rule = ("bshd", "a,b,c", None, None, 0.5, 0.5, True, None, 16, 1, True)
        return (q, k, v, alpha, delta, lengths, None, *rule)
    assert name == "append"
    return (k, v, k[:, :3].clone(), v[:, :3].clone(), numbers(7, -1), None, "bshd", "a", True)


def prefill_operands() -> tuple[Any, ...]:
    return random(3, "float32", (40, 2, 32), (40, 1, 32), (40, 1, 32))


@pytest.mark.parametrize(
    "name", ["dense_decode", "dense_decode without lse", "sparse_decode", "gated_decode", "append"]
)
def test_decode_operators(name: str) -> None:
    # Of a result that is left out only the fake one is another.
    checks = {"test_utils": ("test_schema", "test_faketensor")} if name.endswith("without lse") else {}
    torch.library.opcheck(getattr(ops, name.split()[0]), decode_arguments(name), **checks)


def test_prefill_operator_with_gradients() -> None:
    operands = [x.requires_grad_() for x in prefill_operands()]
    torch.library.opcheck(ops.prefill, (*operands, *SEQUENCES, None, "a,b,c,d,e", *RULES, True))


def test_what_is_not_wanted_is_empty() -> None:
    """In fake results as in real ones, with the last argument and without."""
    operands = prefill_operands()
    wants = {(True,): ([40, 2], [2, 2, 1, 1], [2]), (False,): ([0], [0], [2]), (False, False): ([0], [0], [0])}
    for flags, shapes in wants.items():
        for where in ("cpu", "meta"):
            moved = [x.to(where) for x in operands]
            _, *results = ops.prefill(*moved, *SEQUENCES, None, "a,b,c,d,e", *RULES, *flags)
            assert tuple(list(x.shape) for x in results) == shapes, (flags, where)


def test_backward_operator() -> None:
    operands = prefill_operands()
    o, lse, kept, _ = ops.prefill(*operands, *SEQUENCES, None, "a,b,c,d,e", *RULES, True)
    arguments = (torch.ones_like(o), *operands, o, lse, kept, *SEQUENCES, "a,b,c,d,e", *RULES)
    torch.library.opcheck(ops.prefill_backward, arguments)


def test_no_gradient_without_the_forwards_lse() -> None:
    q, k, v = (x.requires_grad_() for x in prefill_operands())
    o, *rest = ops.prefill(q, k, v, *SEQUENCES, None, "a,b,c,d,e", *RULES, False)
    assert o.requires_grad
    assert not any(x.requires_grad for x in rest), "there is no gradient of lse"
    with pytest.raises(NotImplementedError, match="without the forward's lse"):
        o.sum().backward()


def decode_step(q: Any, k: Any, v: Any, k_new: Any, v_new: Any, lengths: Any, out: Any) -> tuple[Any, ...]:
    """One of each decode function; the caches and `out` are written."""
    first = nki_torch.flash_attn_with_kvcache(2 * q, k, v, k_new, v_new, cache_seqlens=lengths, causal=True)
    dense, lse = nki_torch.flash_dense_attn_with_kvcache_func(first[:, 0], k, v, return_lse=True, out=out)
    sparse = nki_torch.flash_sparse_attn_with_kvcache_func(dense, k, v, softmax_threshold=0.5, window_size=(20, 0))
    return sparse + out, lse, k.sum()


def training_step(q: Any, k: Any, v: Any, starts: Any, lengths: Any) -> Any:
    o = nki_torch.attention(
        q, k, v, starts, lengths, 20, sparsity_n=2, dense_recent_tokens=0, skip_softmax_threshold=0.5
    )
    batched = [x[None].transpose(1, 2) for x in (o, k, v)]
    return nki_torch.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True).square().sum()


def test_compiled_decode() -> None:
    q, k, v, k_new, v_new = random(4, "float32", (2, 3, 4, 32), *[(2, 40, 2, 32)] * 2, *[(2, 3, 2, 32)] * 2)
    lengths = numbers(5, 9)
    runs = []
    for function in (decode_step, torch.compile(decode_step, fullgraph=True, backend="aot_eager")):
        caches, out = (k.clone(), v.clone()), torch.empty(2, 4, 32)
        runs.append([*function(q, *caches, k_new, v_new, lengths, out), *caches, out])
    assert equal(*runs)
    assert not torch.equal(runs[0][3], k)


def test_compiled_training() -> None:
    runs = []
    for function in (training_step, torch.compile(training_step, fullgraph=True, backend="aot_eager")):
        operands = [x.requires_grad_() for x in prefill_operands()]
        loss = function(*operands, *SEQUENCES[:2])
        runs.append([loss, *torch.autograd.grad(loss, operands)])
    assert equal(*runs)


def step_of_any_length(q: Any, k: Any, v: Any, alpha: Any, delta: Any) -> tuple[Any, ...]:
    return (
        nki_torch.flash_sparse_attn_with_kvcache_func(q, k, v),
        nki_torch.flash_gated_attn_with_kvcache_func(q, k, v, alpha, delta),
        nki_torch.flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=k.shape[1] - 1),
        nki_torch.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True),
    )


def test_a_growing_cache_is_compiled_twice() -> None:
    """For the first length, and for all others: no check and no default ties a graph to a length.

    On the meta device: what operators compute for other lengths is `test_exported_for_any_length`'s.
    """
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(step_of_any_length, fullgraph=True, backend=backend)
    for n in (40, 41, 60):
        shapes = ((2, 4, 32), (2, n, 2, 32), (2, n, 2, 32), (2, 4), (2, 2, n))
        results = compiled(*(torch.empty(shape, device="meta") for shape in shapes))
        assert [list(x.shape) for x in results] == [[2, 4, 32], [2, 4, 32], [2, 1, 4, 32], [2, 4, 1, 32]]
    assert backend.frame_count == 2


class Attend(torch.nn.Module):
    def forward(self, q: Any, k: Any, v: Any) -> Any:
        return nki_torch.flash_dense_attn_with_kvcache_func(q, k, v)


def test_exported_for_any_length() -> None:
    q, k, v = random(5, "bfloat16", (2, 4, 32), (2, 40, 2, 32), (2, 40, 2, 32))
    keys = torch.export.Dim("keys", min=2)
    program = torch.export.export(Attend(), (q, k, v), dynamic_shapes=(None, {1: keys}, {1: keys}))
    calls = [str(node.target) for node in program.graph.nodes if "nki_torch" in str(node.target)]
    assert calls == ["nki_torch.dense_decode.default"]
    for n in (40, 33):
        assert torch.equal(program.module()(q, k[:, :n], v[:, :n]), Attend()(q, k[:, :n], v[:, :n]))


def test_counts_are_not_for_graphs() -> None:
    def counted(q: Any, k: Any, v: Any) -> Any:
        return nki_torch.attention(q, k, v, *SEQUENCES[:2], 20, skip_softmax_threshold=0.5, measure_sparsity=True)

    with pytest.raises(Exception, match="measure_sparsity: received True in a graph"):
        torch.compile(counted, fullgraph=True, backend="eager")(*prefill_operands())


def test_shapes_alone() -> None:
    """On the meta device, where nothing runs."""
    q, k, v = (x.to("meta") for x in random(6, "bfloat16", (2, 4, 32), (2, 40, 2, 32), (2, 40, 2, 32)))
    o, lse = nki_torch.flash_dense_attn_with_kvcache_func(q, k, v, return_lse=True)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 4), torch.float32)
    assert o.device.type == lse.device.type == "meta"


def test_other_devices_are_refused() -> None:
    with FakeTensorMode():
        q, k = (torch.empty(shape, device="cuda") for shape in ((2, 4, 32), (2, 40, 2, 32)))
        with pytest.raises(ValueError, match="query device: received cuda:0, allowed cpu, xla, neuron, privateuseone"):
            nki_torch.flash_dense_attn_with_kvcache_func(q, k, k)
