"""What each attention layer leaves out: typed settings, checked when they are built.

The dictionaries have the shape of ModelOpt's: a pattern of module names and a layer's settings, later patterns before
earlier ones, `default` for every layer that no pattern names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from contributed._checks import PARTITIONS, require
from contributed._prefill_checks import ROWS_MAX

PHASES = ("prefill", "decode")
DEFAULT = "default"
MOST_N = {4: 3, 8: 7}  # of each M; N = M would be dense


def _number(name: str, value: Any, allowed: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: received {value!r}, allowed {allowed}")
    require(math.isfinite(value) and least <= value <= most, name, received=value, allowed=allowed)
    return float(value)


def _phases(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: received {type(value).__name__}, allowed a dict by phase")
    for phase in value:
        require(phase in PHASES, f"{name} phase", received=repr(phase), allowed=", ".join(PHASES))
    return dict(value)


@dataclass(frozen=True)
class SparseAttentionAttributeConfig:
    """Settings of a layer.

    Args:
        method: a name of the registry: `flash_skip_softmax`, `sparse_softmax`, `sparse_skip_softmax` or one's own.
        enable: whether the layer is sparse.
        thresholds: lambda of skip-softmax by phase, `prefill` (more than one new token) and `decode`, each in [0, 1];
            0, and a phase that is not there, leave nothing out. A list of one number is taken as that number.
        scale_factors: by phase, what lambda times the longest sequence's keys is, at least 0: lambda = min(1, factor /
            keys). Calibration sets it. Where it is there, the threshold of that phase is not used.
        sparsity_n: scores that stay of every `sparsity_m`, in prefill; 0 keeps all.
        sparsity_m: 4 (with N to 3) or 8 (with N to 7).
        dense_sink_tokens: first keys that N:M leaves alone, less than 2 ** 24.
        dense_recent_tokens: keys up to a query's own that N:M leaves alone, less than 2 ** 24.
        br: queries of a tile; 128, as in the kernels.
        bc: keys of a tile; 128.
        collect_stats: whether visited and skipped tiles are counted.

    Raises:
        ValueError, TypeError: a number is out of range, not finite, or no number.
    """

    method: str = "flash_skip_softmax"
    enable: bool = True
    thresholds: Mapping[str, float] = field(default_factory=lambda: {"prefill": 1e-3, "decode": 1e-4})
    scale_factors: Mapping[str, float] = field(default_factory=dict)
    sparsity_n: int = 2
    sparsity_m: int = 4
    dense_sink_tokens: int = 0
    dense_recent_tokens: int = 64
    br: int = PARTITIONS
    bc: int = PARTITIONS
    collect_stats: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise TypeError(f"method: received {self.method!r}, allowed the name of a method")
        for name in ("enable", "collect_stats"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: received {getattr(self, name)!r}, allowed True or False")
        thresholds = _phases("thresholds", self.thresholds)
        for phase, value in thresholds.items():
            if isinstance(value, (list, tuple)):
                require(len(value) == 1, f"thresholds[{phase}]", received=value, allowed="one number")
                value = value[0]
            thresholds[phase] = _number(f"thresholds[{phase}]", value, "a number in 0..1", 0, 1)
        factors = _phases("scale_factors", self.scale_factors)
        for phase, value in factors.items():
            factors[phase] = _number(f"scale_factors[{phase}]", value, "a finite number, at least 0", 0, math.inf)
        # Copies: what the caller does to its dictionaries later changes no layer.
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "scale_factors", factors)
        for name in ("sparsity_n", "sparsity_m", "dense_sink_tokens", "dense_recent_tokens", "br", "bc"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: received {value!r}, allowed an int")
            require(0 <= value < ROWS_MAX, name, received=value, allowed=f"0..{ROWS_MAX - 1}")
        require(self.sparsity_m in MOST_N, "sparsity_m", received=self.sparsity_m, allowed="4 or 8")
        most = MOST_N[self.sparsity_m]
        allowed = f"0..{most} with sparsity_m={self.sparsity_m}"
        require(self.sparsity_n <= most, "sparsity_n", received=self.sparsity_n, allowed=allowed)
        for name in ("br", "bc"):
            require(getattr(self, name) == PARTITIONS, name, received=getattr(self, name), allowed=PARTITIONS)

    def threshold(self, phase: str, seqlen_kv: int) -> float:
        """Lambda of a call whose longest sequence has `seqlen_kv` keys; 0 leaves nothing out."""
        if phase in self.scale_factors:
            return min(1.0, self.scale_factors[phase] / max(1, seqlen_kv))
        return self.thresholds.get(phase, 0.0)

    @classmethod
    def from_dict(cls, values: Any) -> SparseAttentionAttributeConfig:
        """Settings from a dictionary, such as one of a JSON file.

        Raises:
            ValueError, TypeError: an unknown name, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"settings: received {type(values).__name__}, allowed a dict")
        names = [x.name for x in fields(cls)]
        unknown = [name for name in values if name not in names]
        require(not unknown, "settings", received=unknown, allowed=", ".join(names))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes, of types that JSON has."""
        return asdict(self)


@dataclass(frozen=True)
class SparseAttentionConfig:
    """Settings by pattern of module names.

    Args:
        sparse_cfg: pattern (`fnmatch`) to settings, or a dictionary of them; of several patterns that fit the last
            wins, as a whole. `default` holds for every other layer; without it those stay as they are.

    Raises:
        ValueError, TypeError: not such a dictionary, or settings out of range.
    """

    sparse_cfg: Mapping[str, SparseAttentionAttributeConfig]

    def __post_init__(self) -> None:
        given: Any = self.sparse_cfg
        if not isinstance(given, Mapping):
            raise TypeError(f"sparse_cfg: received {type(given).__name__}, allowed a dict by pattern")
        typed = {}
        for pattern, value in given.items():
            if not isinstance(pattern, str):
                raise TypeError(f"pattern: received {pattern!r}, allowed a string")
            typed[pattern] = (
                value
                if isinstance(value, SparseAttentionAttributeConfig)
                else SparseAttentionAttributeConfig.from_dict(value)
            )
        object.__setattr__(self, "sparse_cfg", typed)

    @classmethod
    def of(cls, config: Any) -> SparseAttentionConfig:
        """A config from one, or from a dictionary with the single key `sparse_cfg`."""
        if isinstance(config, cls):
            return config
        if not isinstance(config, Mapping):
            raise TypeError(f"config: received {type(config).__name__}, allowed a dict or SparseAttentionConfig")
        require(list(config) == ["sparse_cfg"], "config", received=list(config), allowed="['sparse_cfg']")
        return cls(config["sparse_cfg"])


SKIP_SOFTMAX_DEFAULT: dict[str, Any] = {
    "sparse_cfg": {
        "*attn*": {
            "method": "flash_skip_softmax",
            "thresholds": {"prefill": 1e-3, "decode": 1e-4},
            "collect_stats": True,
        },
        DEFAULT: {"enable": False},
    }
}
"""Tiles of keys whose scores are a thousandth (decode: a ten-thousandth) of the largest so far are left out."""

SPARSE_NM_DEFAULT: dict[str, Any] = {
    "sparse_cfg": {
        "*attn*": {
            "method": "sparse_softmax",
            "sparsity_n": 2,
            "sparsity_m": 4,
            "dense_sink_tokens": 0,
            "dense_recent_tokens": 64,
        },
        DEFAULT: {"enable": False},
    }
}
"""Two scores of every four stay in prefill, beside the 64 keys up to a query's own."""
