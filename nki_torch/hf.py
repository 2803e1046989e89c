"""transformers models on the kernels: `attn_implementation="nki"`, and a KV cache in the kernels' layout.

    register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="nki")
    model.generate(**inputs, past_key_values=NkiCache(model.config))

Prefill and decode run on any transformers cache; `NkiCache` spares decode every copy. Masks are lengths: what a model
asks for (causal or a sliding window, and padding on the left, on the right or in between) reaches attention as one row
per sequence, and padding is taken out before a kernel sees it. No mask of queries by keys is made. What rows cannot
express is refused by name, and so is everything that changes attention and that the kernels do not compute.

A model gets the logits of eager attention up to rounding, except in rows of padding, which have o = 0 and which no
other row sees. (`generate` reads one behind a prompt that is padded on the right, and warns of such prompts.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from contributed._checks import require
from contributed._prefill_launch import visited_tiles
from contributed._prefill_plan import Span, Window
from nki_torch import _check as check
from nki_torch import _ops as ops
from nki_torch.cache import FlatKVCache, KVCache, PagedKVCache, tiles_of
from nki_torch.decode import decode_cache
from nki_torch.sparsity.methods import SparseOptions
from nki_torch.sparsity.state import NAME, LayerState, Operands, layer_state

MIN_ROOM = 128  # keys of a cache that grows, at first
_HANDED_OUT = "_nki_layer"  # attribute of keys: the layer that handed them out
FULL, SLIDING = "full_attention", "sliding_attention"
# Arguments of attention functions that change the result, and their values that do not.
NEUTRAL = {"dropout": (0, 0.0), "output_attentions": (False,)}
REFUSED = ("softcap", "s_aux", "position_bias", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k")
NAMES = ",".join(["attention_mask"] * 5)  # whose lengths the operators see


def register() -> None:
    """Make `attn_implementation="nki"` known to transformers; again does nothing."""
    AttentionInterface.register(NAME, nki_attention)
    AttentionMaskInterface.register(NAME, nki_mask)


class _Visible(NamedTuple):
    """What a mask of this module says."""

    left: int | None
    """Keys visible before a query's own, None for all."""
    valid: Tensor | None
    """bool [batch, keys], False for padding; None if there is none."""


def nki_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: Any = None,
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """The mask that `nki_attention` takes, for transformers' mask interface.

    Args:
        batch_size: sequences.
        q_length: new tokens.
        kv_length: keys that the cache will hand out, of a static cache more than there are.
        q_offset: position of the first new token, padding counted.
        kv_offset: position of the first key.
        mask_function: rule of the model: causal, or causal with a window.
        attention_mask: bool [batch, positions], False for padding.
        local_size: window of the model, the query's own key among its keys.
        device: of the mask.
        config: of the model.

    Returns:
        int32 [batch, 1, 1, 1 + keys]: keys visible before a query's own (-1 for all), then 1 for a key and 0 for
        padding. None for causal attention without padding.

    Raises:
        NotImplementedError: another rule, or a model whose layers do not ask the attention interface.
        ValueError: attention_mask has other rows, or does not reach all keys.
    """
    _require_interface(config)
    left = -1
    if not _same(mask_function, causal_mask_function):
        windowed = local_size is not None and _same(mask_function, sliding_window_causal_mask_function(local_size))
        if not windowed:
            raise NotImplementedError(f"mask_function: received {_describe(mask_function)}, allowed causal or sliding")
        assert local_size is not None
        left = local_size - 1
    n_keys = int(q_offset) + q_length - kv_offset
    valid = None
    if attention_mask is not None:
        end, shape = kv_offset + n_keys, list(attention_mask.shape)
        fits = len(shape) == 2 and shape[0] == batch_size and shape[1] >= end
        require(fits, "attention_mask shape", received=shape, allowed=f"{batch_size} rows of {end} columns")
        valid = attention_mask[:, kv_offset:end]
        if bool(valid.all()):
            valid = None
    if valid is None and left < 0 and n_keys == kv_length:
        return None
    # Four dimensions tell transformers that a mask is made: `generate` makes those of static caches ahead.
    mask = torch.ones((batch_size, 1, 1, 1 + n_keys), dtype=torch.int32, device=device)
    mask[..., 0] = left
    if valid is not None:
        mask[:, 0, 0, 1:] = valid
    return mask


def _require_interface(config: Any) -> None:
    """Refuse models that compute attention themselves: they would take None for no mask at all."""
    mapping: Any = MODEL_MAPPING
    models = mapping.get(type(config), ())
    for model in models if isinstance(models, (list, tuple)) else (models,):
        if not model._can_set_attn_implementation():
            raise NotImplementedError(f"model: received {model.__name__}, allowed one that asks AttentionInterface")


def nki_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer, for transformers' attention interface.

    Args:
        module: the layer; what `nki_torch.sparsity` set for it is applied.
        query: [batch, n_q_heads, s, d].
        key: [batch, n_kv_heads, keys, d], or what an `NkiCache` handed out.
        value: as key.
        attention_mask: of `nki_mask`, or None: causal.
        scaling: multiplies q . k; None means d ** -0.5.
        is_causal: whether attention is causal; None means what the layer says.
        kwargs: what else models pass; `sliding_window` is not looked at, for the mask has the window.

    Returns:
        o [batch, s, n_q_heads, d] in query's dtype, and None: there are no weights.

    Raises:
        NotImplementedError: an option or a mask that the kernels do not compute.
        ValueError, TypeError: tensors that the kernels do not take.
    """
    _refuse(module, attention_mask, is_causal, kwargs)
    batch, _, s, _ = query.shape
    handed = _handed_out(key)
    seen = _visible(attention_mask)
    if handed is not None:
        handed.take_out_padding(seen.valid)
        keys = handed.columns
    else:
        keys = key.shape[2] if attention_mask is None else attention_mask.shape[3] - 1
        key, value = key[:, :, :keys], value[:, :, :keys]
    _require_mask(seen, batch, keys)
    state = layer_state(module)
    records = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if s == 1 and not records and (state is None or state.observer is None):
        return _decode(query, key, value, seen, handed, scaling, state)[:, None], None
    return _prefill(query, key, value, seen, handed, scaling, state), None


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: _Visible,
    handed: NkiLayer | None,
    scaling: float | None,
    state: LayerState | None,
) -> Tensor:
    """One new token per sequence: [batch, n_q_heads, d]."""
    if handed is not None:
        lengths = handed.cache.lengths
    elif seen.valid is None:
        lengths = (key.shape[2],) * key.shape[0]
    else:
        lengths = tuple(seen.valid.sum(dim=1).tolist())
        key, value = (_to_the_left(x, seen.valid) for x in (key, value))
    threshold = 0.0
    if state is not None:
        threshold = state.options("decode", max(lengths)).skip_softmax_threshold
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "window_size": (seen.left, None),
        "skip_softmax_threshold": threshold,
        "measure_sparsity": state is not None and state.counts and threshold > 0,
    }
    if handed is not None:
        o = handed.cache.decode(query[:, :, 0], **options)
    else:
        o = decode_cache(query[:, :, 0], key, value, torch.tensor(lengths, dtype=torch.int32), **options)
    assert isinstance(o, Tensor)
    if state is not None and state.counts:
        if threshold > 0:
            state.count("decode", o._sparsity_total, o._sparsity_skipped)  # type: ignore[attr-defined]
        else:
            state.count("decode", tiles_of(lengths, seen.left) * query.shape[1], 0)
    return o


class _Rows(NamedTuple):
    """Operands of prefill: rows of any sequences, and where each sequence has its own; int64 [batch] on the host."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts_q: Tensor
    lengths_q: Tensor
    starts_k: Tensor
    lengths_k: Tensor


def _rows(query: Tensor, key: Tensor, value: Tensor, seen: _Visible, handed: NkiLayer | None) -> _Rows:
    """New tokens and all keys of each sequence, without padding."""
    batch, n_q_heads, s, d = query.shape
    q = query.transpose(1, 2).reshape(-1, n_q_heads, d)
    new = None if seen.valid is None else seen.valid[:, -s:]
    first_q, lengths_q = _runs(new, batch, s)
    starts_q = first_q + torch.arange(batch) * s
    if handed is not None and handed.columns > s:
        k, v, ends = handed.cache.packed()
        return _Rows(q, k, v, starts_q, lengths_q, torch.tensor(ends[:-1]), torch.tensor(handed.cache.lengths))
    if seen.valid is not None and bool(_gaps(seen.valid).any()):
        key, value = (_to_the_left(x, seen.valid) for x in (key, value))
        first_k, lengths_k = torch.zeros(batch, dtype=torch.int64), seen.valid.sum(dim=1).cpu()
    else:
        first_k, lengths_k = _runs(seen.valid, batch, key.shape[2])
    starts_k = first_k + torch.arange(batch) * key.shape[2]
    k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (key, value))
    return _Rows(q, k, v, starts_q, lengths_q, starts_k, lengths_k)


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: _Visible,
    handed: NkiLayer | None,
    scaling: float | None,
    state: LayerState | None,
) -> Tensor:
    """New tokens behind any number of keys: [batch, s, n_q_heads, d], 0 in rows of padding."""
    batch, n_q_heads, s, d = query.shape
    x = _rows(query, key, value, seen, handed)
    layout = "[rows, heads, d]"
    check.operands(("query", x.q, layout), ("key", x.k, layout), ("value", x.v, layout))
    check.shape("key", x.k, (None, None, d))
    check.shape("value", x.v, tuple(x.k.shape), "that of key")
    check.heads(n_q_heads, x.k.shape[1])
    scale = check.scale("scaling", scaling)
    scale = float(d) ** -0.5 if scale is None else scale
    lens_q, lens_kv = x.lengths_q.tolist(), x.lengths_k.tolist()
    phase, options = "decode" if s == 1 else "prefill", SparseOptions()
    if state is not None:
        if state.observer is not None:
            q, k = _packed(x.q, x.starts_q, lens_q), _packed(x.k, x.starts_k, lens_kv)
            state.observer(Operands(phase, q, k, lens_q, lens_kv, scale, seen.left))
        options = state.options(phase, max(lens_kv))
    o, _, _, counts = ops.prefill(
        x.q,
        x.k,
        x.v,
        x.starts_q,
        x.lengths_q,
        max(lens_q),
        x.starts_k,
        x.lengths_k,
        max(lens_kv),
        None,
        NAMES,
        scale,
        seen.left,
        0,
        options.sparsity_n,
        options.sparsity_m,
        options.dense_sink_tokens,
        options.dense_recent_tokens,
        options.skip_softmax_threshold or None,
        torch.is_grad_enabled() and any(t.requires_grad for t in (x.q, x.k, x.v)),
        state is not None and state.counts,
    )
    if state is not None and state.counts:
        if options.skip_softmax_threshold > 0:
            state.count(phase, *counts.tolist())
        else:
            spans = tuple(Span(0, n, 0, m) for n, m in zip(lens_q, lens_kv, strict=True))
            visited = visited_tiles(spans, Window(seen.left, 0), n_q_heads)
            state.count(phase, sum(int(tiles.sum()) for tiles in visited), 0)
    result: Tensor = o.reshape(batch, s, n_q_heads, d)
    return result


def _packed(x: Tensor, starts: Tensor, lengths: list[int]) -> Tensor:
    """The rows of sequences one after the other."""
    return torch.cat([x[first : first + n] for first, n in zip(starts.tolist(), lengths, strict=True)])


def _visible(mask: Tensor | None) -> _Visible:
    """What a mask says; it comes from `nki_mask`."""
    if mask is None:
        return _Visible(None, None)
    rows = mask[:, 0, 0]
    left, valid = int(rows[0, 0]), rows[:, 1:].bool()
    return _Visible(None if left < 0 else left, None if bool(valid.all()) else valid)


def _gaps(valid: Tensor) -> Tensor:
    """bool [batch]: sequences whose keys are not one run."""
    begins = valid.clone()
    begins[:, 1:] &= ~valid[:, :-1]
    return begins.sum(dim=1) > 1


def _runs(valid: Tensor | None, batch: int, width: int) -> tuple[Tensor, Tensor]:
    """First valid column of each row, and how many there are: int64 [batch] on the host."""
    if valid is None:
        return torch.zeros(batch, dtype=torch.int64), torch.full((batch,), width, dtype=torch.int64)
    if bool(_gaps(valid).any()):
        raise NotImplementedError("attention_mask: received gaps among new tokens, allowed padding at their ends")
    valid = valid.cpu()
    return valid.int().argmax(dim=1), valid.sum(dim=1)


def _to_the_left(x: Tensor, valid: Tensor) -> Tensor:
    """Keys or values [batch, heads, keys, d] without padding, every sequence from row 0 on."""
    longest = int(valid.sum(dim=1).max())
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _refuse(module: nn.Module, mask: Any, is_causal: bool | None, others: dict[str, Any]) -> None:
    """What would change attention and is not computed."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise NotImplementedError("is_causal: received False, allowed True")
    rows = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.int32
    if mask is not None and not rows:
        received = f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(f"attention_mask: received {received}, allowed [batch, positions] for the model")
    for name, allowed in NEUTRAL.items():
        value = others.get(name)
        if value is not None and value not in allowed:
            raise NotImplementedError(f"{name}: received {value}, allowed {allowed[0]}")
    for name in REFUSED:
        if others.get(name) is not None:
            raise NotImplementedError(f"{name}: received a value, allowed None")


def _require_mask(seen: _Visible, batch: int, keys: int) -> None:
    if seen.valid is None:
        return
    fits = tuple(seen.valid.shape) == (batch, keys)
    require(fits, "attention_mask shape", received=list(seen.valid.shape), allowed=[batch, keys])
    if seen.left is not None and bool(_gaps(seen.valid).any()):
        raise NotImplementedError("attention_mask: received gaps with a sliding window, allowed padding at the ends")


def _same(f: Any, g: Any) -> bool:
    """Whether two mask functions are one rule: the same code around the same values."""
    if isinstance(f, FunctionType) and isinstance(g, FunctionType):
        return f is g or (f.__code__ is g.__code__ and _same(f.__closure__, g.__closure__))
    if isinstance(f, CellType) and isinstance(g, CellType):
        return _same(f.cell_contents, g.cell_contents)
    if isinstance(f, tuple) and isinstance(g, tuple):
        return len(f) == len(g) and all(map(_same, f, g))
    return type(f) is type(g) and isinstance(f, (int, type(None))) and f == g


def _describe(f: Any) -> str:
    return str(getattr(f, "__qualname__", f))


class NkiLayer(CacheLayerMixin):
    """The cache of a layer: `FlatKVCache` or `PagedKVCache`, made when the first keys come.

    Until padding was taken out of it by `nki_attention`, a flat layer hands out all keys, as views, to whatever
    attention asks; afterwards, and of pages, only `nki_attention` can use what it hands out.

    Args:
        make: the cache for (batch, n_kv_heads, d, keys, dtype, device).
        max_cache_len: keys that there is room for; None grows by doubling.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(
        self, make: Callable[[int, int, int, int, torch.dtype, torch.device], KVCache], max_cache_len: int | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._make, self._max_cache_len = make, max_cache_len
        self._cache: KVCache | None = None
        self.columns = 0
        """Positions so far, padding counted."""
        # Bool [batch, positions] of the calls that padding was taken out of; later positions are all there.
        self._kept: Tensor | None = None

    @property
    def cache(self) -> KVCache:
        """Keys and values, without padding."""
        assert self._cache is not None, "a layer before its first keys"
        return self._cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the cache for keys of this shape."""
        batch, heads, s, d = key_states.shape
        same = value_states.shape == key_states.shape
        require(same, "value shape", received=list(value_states.shape), allowed=f"{list(key_states.shape)}, as key")
        room = self._max_cache_len or max(MIN_ROOM, 2 * s)
        self._cache = self._make(batch, heads, d, room, key_states.dtype, key_states.device)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, n_kv_heads, s, d] in place; all keys and values, for attention.

        Raises:
            ValueError: more keys than `max_cache_len`.
            RuntimeError: keys behind others require grad.
        """
        if self._cache is None:
            self.lazy_initialization(key_states, value_states)
        first, s = self.columns == 0, key_states.shape[2]
        if not first:
            check.no_gradient("a cache that holds keys", key=key_states, value=value_states)
        most = max(self.cache.lengths) + s
        if self._max_cache_len is None and most > self.cache.max_seqlen:
            self.cache.reserve(2 * most)
        self.cache.append(key_states.detach().transpose(1, 2), value_states.detach().transpose(1, 2))
        self.columns += s
        keys, values = key_states[:], value_states[:]
        if not first:
            # Whoever would misread rows without their padding meets tensors without keys.
            none = self.cache.k.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
            keys = values = none
            if isinstance(self.cache, FlatKVCache) and min(self.cache.lengths) == self.columns:
                keys, values = self.cache.keys, self.cache.values
        setattr(keys, _HANDED_OUT, self)
        return keys, values

    def take_out_padding(self, valid: Tensor | None) -> None:
        """Drop padding among the newest keys.

        Args:
            valid: bool [batch, columns], False for padding, or None.

        Raises:
            ValueError: it is not as long as the cache, or hides other keys than earlier calls hid.
        """
        if valid is None:
            valid = torch.ones((self.cache.batch, self.columns), dtype=torch.bool)
        shape = [self.cache.batch, self.columns]
        require(list(valid.shape) == shape, "attention_mask shape", received=list(valid.shape), allowed=shape)
        valid = valid.cpu()
        old = 0 if self._kept is None else self._kept.shape[1]
        same = self._kept is None or torch.equal(valid[:, :old], self._kept)
        require(same, "attention_mask", received="other padding", allowed="that of earlier calls with this cache")
        if old < self.columns:
            self.cache.drop(valid[:, old:])
            self._kept = valid

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys after the next `query_length`, padding counted, and the first one's position."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Positions so far, padding counted."""
        return self.columns

    def get_max_length(self) -> int:
        """Keys that there is room for, -1 without a limit."""
        return self._max_cache_len or -1

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        if self._cache is not None:
            self._cache.reset()
        self.columns, self._kept = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest positions.

        Args:
            tokens_to_remove: minus their number, as transformers passes it.

        Raises:
            ValueError: a positive number, or more positions than there are.
        """
        if not self.is_initialized:
            return  # as in transformers: a layer that shares another's keys
        n = -tokens_to_remove
        require(0 <= n <= self.columns, "tokens_to_remove", received=tokens_to_remove, allowed=f"-{self.columns}..0")
        if n == 0:
            return
        left = self.columns - n
        if self._kept is None:
            self.cache.truncate([n] * self.cache.batch)
        else:
            later = self.columns - max(left, self._kept.shape[1])
            self.cache.truncate([int(x) + later for x in self._kept[:, left:].sum(dim=1)])
            self._kept = self._kept[:, :left]
        self.columns = left

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` is."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        if self._cache is not None:
            self.batch_select_indices(torch.arange(self._cache.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of `indices`, in their order."""
        if self._cache is not None:
            chosen = [int(i) for i in indices]
            self._cache.select(chosen)
            self._kept = None if self._kept is None else self._kept[chosen]

    def offload(self) -> None:
        """Not possible.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("offloading: received True, allowed False for NkiCache")


class NkiCache(Cache):
    """A transformers cache in the kernels' layout: decode with `attn_implementation="nki"` reads it as it lies.

    Padding is taken out when a prompt is attended to, so that each sequence has its own length. Layers with a sliding
    window hold all their keys and read those of the window.

    Args:
        config: of the model.
        max_cache_len: positions that there is room for; None grows by doubling.
        paged: pages instead of one stretch per sequence.
        block_size: keys of a page, with `paged`.
        k_d_major: whether K has d before the keys, without `paged`; see `FlatKVCache`.

    Raises:
        ValueError, TypeError: an argument is out of range.
        NotImplementedError: a layer that is neither full nor sliding-window attention.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_cache_len: int | None = None,
        paged: bool = False,
        block_size: int = 16,
        k_d_major: bool = True,
    ) -> None:
        decoder = config.get_text_config(decoder=True)
        n_layers = decoder.num_hidden_layers
        for kind in getattr(decoder, "layer_types", None) or ():
            if kind not in (FULL, SLIDING):
                raise NotImplementedError(f"layer type: received {kind}, allowed {FULL}, {SLIDING}")
        if max_cache_len is not None:
            check.whole("max_cache_len", max_cache_len, 1)
        check.whole("block_size", block_size, 1)
        for name, value in (("paged", paged), ("k_d_major", k_d_major)):
            check.flag(name, value)
        # No closure, so that a cache can be pickled.
        make = partial(_paged, block_size) if paged else partial(_flat, k_d_major)
        super().__init__(layers=[NkiLayer(make, max_cache_len) for _ in range(n_layers)])


def _flat(
    k_d_major: bool, batch: int, heads: int, d: int, room: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    return FlatKVCache(batch, heads, d, room, dtype=dtype, device=device, k_d_major=k_d_major)


def _paged(
    block_size: int, batch: int, heads: int, d: int, room: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    return PagedKVCache(batch, heads, d, room, block_size=block_size, dtype=dtype, device=device)


def _handed_out(key: Tensor) -> NkiLayer | None:
    """The layer that handed keys out, None if it was another cache's."""
    layer: NkiLayer | None = getattr(key, _HANDED_OUT, None)
    return layer
