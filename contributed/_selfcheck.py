"""What `python contributed/<kernel>.py` does: run the cases, compare with the oracle, print one row each."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from contributed._cases import DecodeCase
from contributed._checks import FLOATS
from contributed._nki import BACKEND, BACKEND_VARIABLE, BACKENDS, choose, describe
from reference.budget import share_of_budget

Array = np.ndarray[Any, np.dtype[Any]]
TARGETS = ("trn1", "inf2", "trn2", "trn3")
SIMULATED = ("trn1", "trn2", "trn3")  # inf2 has trn1's cores
# A two-byte kernel above this share is correct but likely rounds where it does not say so: the budget's unit is
# the error of the documented roundings. In float32 the share is luck of summation order.
SUSPICIOUS = 0.5


def self_check(
    description: str,
    kernel: Callable[..., Any],
    oracle: Callable[..., Any],
    rounded: Callable[..., Any],
    cases: Sequence[DecodeCase],
    argv: Sequence[str] | None = None,
) -> int:
    """Run `kernel` on every case, dtype and target asked for; 0 if all are within their error budget.

    Args:
        description: the kernel file's docstring, for --help.
        kernel: `(q, k, v, target=) -> o` in math layout.
        oracle: `(q, k, v)` to a tuple that begins with the float64 o.
        rounded: `(q, k, v)` to a tuple that begins with o in the machine's precision.
        cases: what to run.
        argv: command line; default the process's.
    """
    args = _parse(description, argv)
    if args.backend not in ("auto", BACKEND):
        try:
            choose(args.backend)
        except (ImportError, NotImplementedError) as error:
            print(error, file=sys.stderr)
            return 2
        # The backend is bound on import, so the choice takes a new process.
        os.environ[BACKEND_VARIABLE] = args.backend
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    chosen = (args.target,) if args.target else _default_targets()
    references: dict[tuple[str, str], tuple[Any, Array, Array]] = {}
    failures = 0
    started = time.perf_counter()
    for target in chosen:
        print(f"NKI: {describe(target)}")
        print(f"  {'case':<20} {'shape':<20} {'dtype':<9} {'max diff':>10} {'budget used':>12}  result")
        for case in cases:
            for name in args.dtype or FLOATS:
                if (case.name, name) not in references:
                    inputs = case.inputs(FLOATS[name])
                    references[case.name, name] = (inputs, oracle(*inputs)[0], rounded(*inputs)[0])
                failures += not _run_case(case, name, kernel, references[case.name, name], target)
    n = len(cases) * len(args.dtype or FLOATS) * len(chosen)
    print(f"{n - failures} passed, {failures} failed in {time.perf_counter() - started:.1f} s (simulated on the CPU)")
    return 1 if failures else 0


def _default_targets() -> tuple[str | None, ...]:
    """All generations in the simulator; with a vendor package the target it chooses."""
    named = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    if named:
        return (named,)
    return SIMULATED if BACKEND == "nkisim" else (None,)


def _parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="which NKI runs the kernels")
    parser.add_argument("--target", choices=TARGETS, help="generation to simulate (default: all three)")
    parser.add_argument("--dtype", choices=tuple(FLOATS), action="append", help="only this type; may be repeated")
    return parser.parse_args(argv)


def _run_case(
    case: DecodeCase,
    dtype: str,
    kernel: Callable[..., Any],
    reference: tuple[Any, Array, Array],
    target: str | None,
) -> bool:
    inputs, exact, low_precision = reference
    got = kernel(*inputs, target=target)
    difference, share = share_of_budget(got, exact, low_precision, FLOATS[dtype])
    right_type = got.dtype == FLOATS[dtype]
    passed = share <= 1.0 and right_type
    result = "pass" if passed else "FAIL" if right_type else f"FAIL (result in {got.dtype})"
    if passed and share > SUSPICIOUS and dtype != "float32":
        result = "pass (over half of the budget)"
    print(f"  {case.name:<20} {case.shape:<20} {dtype:<9} {difference:>10.3e} {share:>11.1%}  {result}", flush=True)
    return passed
