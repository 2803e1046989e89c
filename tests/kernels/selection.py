"""A few cases of every kernel file's self-check, and what their kernels return: to compare backends.

`python -m tests.kernels.selection FILE` runs them with the backend of the environment and writes the results.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from contributed import _nki, _selfcheck
from contributed._checks import FLOATS

# File, target, and names of cases.
SELECTED = (
    ("decode_attention", "trn1", ("off-the-edge", "gqa-off-the-edge")),
    ("flash_decode", "trn1", ("large-logits", "gemma-2-9b-d-major")),
    ("flash_decode", "trn2", ("alibi-verify", "splits", "packed-unused", "float8-by-head", "two-cores")),
    ("paged_decode", "trn2", ("nxdi-32-new-4",)),
    ("append_kv", "trn2", ("off-the-edge", "d-major-one-row", "paged-several-tokens")),
    ("flash_attention_fwd", "trn1", ("7-of-8-d-256",)),
    ("flash_attention_fwd", "trn2", ("more-queries-than-keys", "skip-encoder", "large-block")),
    ("flash_attention_bwd", "trn2", ("negative-scale", "7-of-8-d-256")),
    ("skip_softmax_decode", "trn2", ("tile-edges", "window-d-major")),
    ("sparse_decode", "trn2", ("two-cores", "splits", "gated-tile-edges", "gates-alone")),
    ("sparse_decode", "trn1", ("gated-several-items",)),
)


def run(check: bool) -> dict[str, np.ndarray[Any, Any]]:
    """Every selected case in bfloat16: results of each launch, by file, target, and number of launch and result.

    Args:
        check: whether the results are compared with the oracles.

    Raises:
        AssertionError: a case is not within its error budget, or is not there.
    """
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, target, cases in SELECTED:
        module = importlib.import_module(f"contributed.{name}")
        chosen = [case for case in module.CASES if case.name in cases]
        assert len(chosen) == len(cases), f"{name}: {cases}"
        launches: list[Any] = []
        with ExitStack() as stack:
            stack.enter_context(patch.object(module, "CASES", chosen))
            stack.enter_context(patch.object(sys, "argv", [name, "--target", target, "--dtype", "bfloat16"]))
            recorded = _recorded(launches)
            for user in list(sys.modules.values()):
                if user.__name__.startswith("contributed.") and hasattr(user, "simulate_kernel") and user is not _nki:
                    stack.enter_context(patch.object(user, "simulate_kernel", recorded))
            if not check:
                for runner in ("budget_check", "exact_check", "self_check"):
                    stack.enter_context(patch.object(_selfcheck, runner, partial(_unchecked, runner, target)))
            assert module.main() == 0, name
        assert launches, name
        for i, results in enumerate(launches):
            for j, x in enumerate(results):
                # As numbers that a file can hold; exact.
                found[f"{name}-{target}-{i}-{j}"] = x.astype(np.float32)
    return found


def _unchecked(runner: str, target: str, _: str, kernel: Any, *rest: Any, **__: Any) -> int:
    """What a self-check runs, without the oracle."""
    cases = rest[{"budget_check": 1, "exact_check": 0, "self_check": 2}[runner]]
    for case in cases:
        if runner == "self_check":
            kernel(*case.inputs(FLOATS["bfloat16"]), target=target)
        else:
            kernel(case, "bfloat16", target)
    return 0


def _recorded(launches: list[Any]) -> Any:
    simulate_kernel = _nki.simulate_kernel

    def call(*args: Any, **how: Any) -> Any:
        returned = simulate_kernel(*args, **how)
        results = returned if isinstance(returned, tuple) else (returned,)
        launches.append([np.array(x) for x in results])
        return returned

    return call


if __name__ == "__main__":
    np.savez(Path(sys.argv[1]), **run(check=True))
