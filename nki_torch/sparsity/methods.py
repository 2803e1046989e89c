"""The registry of sparse attention methods: what a method asks of the kernels in a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from contributed._checks import require
from nki_torch import _check as check
from nki_torch.sparsity.config import SparseAttentionAttributeConfig


@dataclass(frozen=True)
class SparseOptions:
    """Options of the kernels; what they are there. The default is dense.

    Raises:
        ValueError, TypeError: an option is outside the limits of `nki_torch.attention`.
    """

    sparsity_n: int = 0
    sparsity_m: int = 4
    dense_sink_tokens: int = 0
    dense_recent_tokens: int = 64
    skip_softmax_threshold: float = 0.0

    def __post_init__(self) -> None:
        check.sparsity(self.sparsity_n, self.sparsity_m, self.dense_sink_tokens, self.dense_recent_tokens)
        check.number("skip_softmax_threshold", self.skip_softmax_threshold, "a number in 0..1")
        check.threshold("skip_softmax_threshold", self.skip_softmax_threshold)


class SparseAttentionMethod(ABC):
    """A rule about what is left out.

    Args:
        config: settings of the layer.
    """

    has_threshold = False
    """Whether calibration can set thresholds for it."""

    def __init__(self, config: SparseAttentionAttributeConfig) -> None:
        self.config = config

    @abstractmethod
    def options(self, phase: str, seqlen_kv: int) -> SparseOptions:
        """Options of a call.

        Args:
            phase: `prefill`, more than one new token per sequence, or `decode`.
            seqlen_kv: keys of the longest sequence.
        """


_methods: dict[str, type[SparseAttentionMethod]] = {}
Method = TypeVar("Method", bound=type[SparseAttentionMethod])


def register_sparse_method(name: str) -> Callable[[Method], Method]:
    """Decorator: a subclass of `SparseAttentionMethod` under a name that settings can have.

    Raises:
        ValueError: the name is taken.
        TypeError: the name is no string, or the class no such subclass.
    """
    if not isinstance(name, str):
        raise TypeError(f"method name: received {name!r}, allowed a string")

    def register(method: Method) -> Method:
        given: Any = method
        if not (isinstance(given, type) and issubclass(given, SparseAttentionMethod)):
            raise TypeError(f"method: received {given!r}, allowed a subclass of SparseAttentionMethod")
        taken = _methods.get(name, method) is not method
        require(not taken, "method name", received=repr(name), allowed="a new one")
        _methods[name] = method
        return method

    return register


def get_sparse_method(name: str) -> type[SparseAttentionMethod]:
    """The method of a name.

    Raises:
        ValueError: there is none.
    """
    require(name in _methods, "method", received=repr(name), allowed=", ".join(sparse_methods()))
    return _methods[name]


def sparse_methods() -> tuple[str, ...]:
    """Names of the registry, in order."""
    return tuple(sorted(_methods))


@register_sparse_method("flash_skip_softmax")
class FlashSkipSoftmax(SparseAttentionMethod):
    """Tiles of keys far below the largest score so far, in prefill and decode."""

    has_threshold = True

    def options(self, phase: str, seqlen_kv: int) -> SparseOptions:
        """The threshold of the phase."""
        return SparseOptions(skip_softmax_threshold=self.config.threshold(phase, seqlen_kv))


@register_sparse_method("sparse_softmax")
class SparseSoftmax(SparseAttentionMethod):
    """All but the N largest of every M scores, in prefill."""

    def options(self, phase: str, seqlen_kv: int) -> SparseOptions:  # noqa: ARG002
        """N:M in prefill."""
        if phase == "decode":
            return SparseOptions()
        c = self.config
        return SparseOptions(c.sparsity_n, c.sparsity_m, c.dense_sink_tokens, c.dense_recent_tokens)


@register_sparse_method("sparse_skip_softmax")
class SparseSkipSoftmax(SparseAttentionMethod):
    """Both: N:M first, then the test of tiles on the scores that are left."""

    has_threshold = True

    def options(self, phase: str, seqlen_kv: int) -> SparseOptions:
        """N:M in prefill, and the threshold of the phase."""
        threshold = self.config.threshold(phase, seqlen_kv)
        if phase == "decode":
            return SparseOptions(skip_softmax_threshold=threshold)
        c = self.config
        return SparseOptions(c.sparsity_n, c.sparsity_m, c.dense_sink_tokens, c.dense_recent_tokens, threshold)
