"""Checks of a caller's tensors, by shape, type and device: before any work, with name, received and allowed.

What they look at is known of fake tensors too, so that they run while a graph is traced. Values of lengths and tables
are looked at on the host, in `read`, when the operator runs.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from contributed._checks import PARTITIONS
from contributed._decode_checks import D_MAX, SCALE_MAX, SCALE_MIN
from contributed._prefill_checks import GROUPS, ROWS_MAX

Array = np.ndarray[Any, np.dtype[Any]]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# AWS's devices, and "meta", where only shapes are.
DEVICES = ("cpu", "xla", "neuron", "privateuseone", "meta")
INTEGERS = (torch.int32, torch.int64)
MOST_ROWS = PARTITIONS  # of a group in decode: new tokens times query heads per KV head


def refuse(name: str, received: object, allowed: object) -> NoReturn:
    """Raise `ValueError`. It is called behind an `if`: while a graph is traced, sizes cannot be written down."""
    raise ValueError(f"{name}: received {received}, allowed {allowed}")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """For messages."""
    return ", ".join(str(x).removeprefix("torch.") for x in dtypes)


def tensor(name: str, x: Any, layout: str) -> None:
    """A tensor of as many dimensions as `layout` names."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: received {type(x).__name__}, allowed a tensor {layout}")
    if x.ndim != layout.count(",") + 1:
        refuse(f"{name} shape", list(x.shape), layout)


def floats(name: str, x: Any, layout: str) -> None:
    """A tensor in a type that kernels take."""
    tensor(name, x, layout)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} dtype: received {names((x.dtype,))}, allowed {names(FLOATS)}")


def operands(q: tuple[str, Any, str], *caches: tuple[str, Any, str]) -> None:
    """Queries, keys and values, each (name, tensor, layout): one type, one device, a head dim that kernels take."""
    name, x, layout = q
    floats(name, x, layout)
    if x.device.type not in DEVICES:
        refuse(f"{name} device", x.device, ", ".join(DEVICES))
    d = x.shape[-1]
    fits = 1 <= d <= PARTITIONS or (PARTITIONS < d <= D_MAX and d % 2 == 0)
    if not fits:
        refuse(f"{name} head dim", d, f"1..{PARTITIONS}, or even to {D_MAX}")
    for cache, y, cache_layout in caches:
        floats(cache, y, cache_layout)
        like(cache, y, name, x)


def like(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """The type and the device of another tensor."""
    if x.dtype != y.dtype:
        raise TypeError(f"{name} dtype: received {names((x.dtype,))}, allowed {names((y.dtype,))}, that of {other}")
    if x.device != y.device:
        refuse(f"{name} device", x.device, f"{y.device}, that of {other}")


def shape(name: str, x: Tensor, expected: tuple[Any, ...], why: str = "") -> None:
    """A shape; None stands for any size."""
    good = x.ndim == len(expected) and all(n is None or m == n for m, n in zip(x.shape, expected, strict=True))
    if not good:
        sizes = ", ".join("any" if n is None else str(n) for n in expected)
        refuse(f"{name} shape", list(x.shape), f"[{sizes}]" + (f", {why}" if why else ""))


def heads(n_q_heads: Any, n_kv_heads: Any, names_of: tuple[str, str] = ("query heads", "KV heads")) -> None:
    """Query heads in groups per KV head."""
    if n_kv_heads < 1:
        refuse(names_of[1], n_kv_heads, "at least 1")
    if n_q_heads < 1 or n_q_heads % n_kv_heads != 0:
        refuse(names_of[0], n_q_heads, f"multiples of the {n_kv_heads} {names_of[1]}, at least 1")


def integers(name: str, x: Any, expected: tuple[Any, ...], layout: str) -> None:
    """A tensor of integers."""
    tensor(name, x, layout)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} dtype: received {names((x.dtype,))}, allowed {names(INTEGERS)}")
    shape(name, x, expected, layout)


def whole(name: str, x: Any, least: int = 0) -> None:
    """An int, or a size that is not known yet."""
    allowed = f"an int, at least {least}"
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: received {x!r}, allowed {allowed}")
    if x < least:
        refuse(name, x, allowed)


def flag(name: str, x: Any) -> None:
    """True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name}: received {x!r}, allowed True or False")


def number(name: str, x: Any, allowed: str) -> None:
    """A real number."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: received {x!r}, allowed {allowed}")


def scale(name: str, x: Any, *, positive: bool = False) -> float | None:
    """What multiplies q . k; None means d ** -0.5."""
    if x is None:
        return None
    allowed = f"None, {'' if positive else '0, '}or {SCALE_MIN}..{SCALE_MAX}{'' if positive else ' in size'}"
    number(name, x, allowed)
    size = x if positive else abs(x)
    good = math.isfinite(x) and (SCALE_MIN <= size <= SCALE_MAX or (size == 0 and not positive))
    if not good:
        refuse(name, x, allowed)
    return float(x)


def threshold(name: str, x: Any) -> float | None:
    """Of a test that leaves out tiles: None, 0 (off), or a number up to 1."""
    if x is None:
        return None
    allowed = "None, 0 or a number up to 1"
    number(name, x, allowed)
    if not (0 <= x <= 1):
        refuse(name, x, allowed)
    return float(x)


def sparsity(n: Any, m: Any, sink: Any, recent: Any) -> None:
    """N:M sparse softmax; N = 0 and N = M keep all scores."""
    whole("sparsity_m", m)
    if m not in GROUPS:
        refuse("sparsity_m", m, " or ".join(map(str, GROUPS)))
    whole("sparsity_n", n)
    if n != 0 and n not in GROUPS[m]:
        refuse("sparsity_n", n, f"0..{m}")
    for name, x in (("dense_sink_tokens", sink), ("dense_recent_tokens", recent)):
        whole(name, x)
        if x >= ROWS_MAX:
            refuse(name, x, f"0..{ROWS_MAX - 1}")


def window(window_size: Any, unlimited: int | None = None) -> tuple[int | None, int | None]:
    """(left, right) with None for no limit; `unlimited` is another value for it."""
    allowed = f"(left, right), each at least 0 or {unlimited}"
    good = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not good:
        refuse("window_size", window_size, allowed)
    sides: list[int | None] = []
    for side in window_size:
        none = side is None or (unlimited is not None and side == unlimited)
        good = none or (isinstance(side, int) and not isinstance(side, bool) and side >= 0)
        if not good:
            refuse("window_size", window_size, allowed)
        sides.append(None if none else int(side))
    return sides[0], sides[1]


def results(q: Tensor, out: Any, lse: Any, lse_shape: tuple[Any, ...]) -> None:
    """Preallocated results fit, and are memory of their own that gradients do not flow through."""
    for name, x, expected, dtype in (("out", out, tuple(q.shape), q.dtype), ("lse", lse, lse_shape, torch.float32)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: received {type(x).__name__}, allowed a tensor or None")
        shape(name, x, expected)
        if x.dtype != dtype:
            raise TypeError(f"{name} dtype: received {names((x.dtype,))}, allowed {names((dtype,))}")
        if x.device != q.device:
            refuse(f"{name} device", x.device, q.device)
        if x.requires_grad:
            refuse(name, "a tensor that requires grad", "one that does not")
        written(name, x)


def written(name: str, x: Tensor) -> None:
    """A tensor that is written in place: no element of it, as of an expanded one, lies where another does."""
    if any(stride == 0 and n > 1 for n, stride in zip(x.shape, x.stride(), strict=True)):
        refuse(name, f"an expanded tensor with strides {list(x.stride())}", "one whose elements lie apart")


def no_gradient(function: str, **tensors: Tensor | None) -> None:
    """Decode has no backward: a graph that would need one is refused where it is built."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                raise RuntimeError(
                    f"{name} requires grad, and {function} has no backward; call it under torch.no_grad(), or use "
                    "nki_torch.attention"
                )


def unsupported(function: str, name: str, received: object, allowed: str) -> None:
    """Refuse an option of the public function that no kernel has."""
    raise NotImplementedError(f"{function}.{name}: received {received}, allowed {allowed}")


def read(x: Tensor) -> Array:
    """Integers on the host, as int64; a tensor on a device is waited for."""
    array: Array = x.detach().cpu().numpy().astype(np.int64)
    return array


def lengths(name: str, x: Tensor, most: Any) -> tuple[int, ...]:
    """Lengths on the host, each within 0..most, a number or one per sequence."""
    values = read(x)
    limits = np.broadcast_to(np.asarray(most), values.shape)
    for b, (n, limit) in enumerate(zip(values, limits, strict=True)):
        if not (0 <= n <= limit):
            refuse(f"{name}[{b}]", int(n), f"0..{int(limit)}")
    return tuple(int(n) for n in values)


def ascending(name: str, x: Tensor, total: int) -> tuple[int, ...]:
    """Where packed sequences begin, and the end of the last."""
    values = read(x)
    good = values.size >= 2 and values[0] >= 0 and bool((np.diff(values) >= 0).all()) and values[-1] <= total
    if not good:
        refuse(name, values.tolist(), f"at least 2 numbers, ascending within 0..{total}")
    return tuple(int(n) for n in values)
