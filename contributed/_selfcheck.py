"""What `python contributed/<kernel>.py` does: run the cases, compare with the oracle, print one row each."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from contributed._cases import DecodeCase
from contributed._checks import FLOATS
from contributed._nki import BACKEND, BACKEND_VARIABLE, BACKENDS, TARGET_VARIABLE, choose, describe, from_vendor
from contributed._packages import UNKNOWN_TO_LEGACY
from reference.budget import share_of_budget

Array = np.ndarray[Any, np.dtype[Any]]
TARGETS = ("trn1", "inf2", "trn2", "trn3")
SIMULATED = ("trn1", "trn2", "trn3")  # inf2 has trn1's cores
SIMULATED_LEGACY = ("trn1", "trn2")  # see UNKNOWN_TO_LEGACY
# A two-byte kernel above this share is correct but likely rounds where it does not say so: the budget's unit is
# the error of the documented roundings. In float32 the share is luck of summation order.
SUSPICIOUS = 0.5


class Case(Protocol):
    """What the table shows of a case."""

    @property
    def name(self) -> str:
        """Id of the case."""

    @property
    def shape(self) -> str:
        """Its shape in short."""


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

    def results(case: DecodeCase, dtype: str, target: str | None) -> tuple[Array]:
        return (kernel(*case.inputs(FLOATS[dtype]), target=target),)

    def references(case: DecodeCase, dtype: str) -> tuple[tuple[Array, Array]]:
        inputs = case.inputs(FLOATS[dtype])
        return ((oracle(*inputs)[0], rounded(*inputs)[0]),)

    return budget_check(description, results, references, cases, argv, ("o",))


def budget_check(
    description: str,
    results: Callable[[Any, str, str | None], Sequence[Array]],
    references: Callable[[Any, str], Sequence[tuple[Array, Array]]],
    cases: Sequence[Case],
    argv: Sequence[str] | None = None,
    names: Sequence[str] = ("o", "lse"),
) -> int:
    """Run every case, dtype and target asked for; 0 if all results are within their error budgets.

    Args:
        description: the kernel file's docstring, for --help.
        results: `(case, dtype, target)` to o in the case's dtype, and after it float32 results.
        references: `(case, dtype)` to a pair for each result: the float64 oracle's, and in the machine's precision.
        cases: what to run.
        argv: command line; default the process's.
        names: of the results.
    """
    known: dict[tuple[str, str], Sequence[tuple[Array, Array]]] = {}

    def run(case: Case, dtype: str, target: str | None) -> tuple[bool, str]:
        if (case.name, dtype) not in known:
            known[case.name, dtype] = references(case, dtype)
        return _compare(names, dtype, results(case, dtype, target), known[case.name, dtype])

    header = " ".join(f"{name + ' diff' if len(names) > 1 else 'max diff':>10} {'budget used':>12}" for name in names)
    return _run_all(description, cases, FLOATS, header, run, argv)


def exact_check(
    description: str,
    differences: Callable[[Any, str, str | None], int],
    cases: Sequence[Case],
    dtypes: Sequence[str],
    argv: Sequence[str] | None = None,
) -> int:
    """Run every case, dtype and target asked for; 0 if all are equal to their oracle bit for bit.

    Args:
        description: the kernel file's docstring, for --help.
        differences: `(case, dtype, target)` to the number of elements that differ from the oracle.
        cases: what to run.
        dtypes: names of the types there are.
        argv: command line; default the process's.
    """

    def run(case: Case, dtype: str, target: str | None) -> tuple[bool, str]:
        n = differences(case, dtype, target)
        return n == 0, f"{n:>10}  {'FAIL' if n else 'pass'}"

    return _run_all(description, cases, dtypes, f"{'differ':>10}", run, argv)


def _run_all(
    description: str,
    cases: Sequence[Any],
    dtypes: Iterable[str],
    header: str,
    run: Callable[[Any, str, str | None], tuple[bool, str]],
    argv: Sequence[str] | None,
) -> int:
    """One row per case, dtype and target: whether it passed, and the rest of the row, are what `run` returns."""
    args = _parse(description, dtypes, argv)
    if args.backend not in ("auto", BACKEND):
        try:
            choose(args.backend)
        except ImportError as error:
            print(error, file=sys.stderr)
            return 2
        # The backend is bound on import, so the choice takes a new process.
        os.environ[BACKEND_VARIABLE] = args.backend
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    chosen = (args.target,) if args.target else _default_targets()
    if BACKEND == "neuronxcc" and chosen[0] in UNKNOWN_TO_LEGACY:
        print(f"--target: received {chosen[0]}, allowed trn1, inf2, trn2 with neuronxcc", file=sys.stderr)
        return 2
    names = tuple(args.dtype or dtypes)
    width, shape_width = max(9, *map(len, names)), max(20, *(len(case.shape) for case in cases))
    failures = 0
    started = time.perf_counter()
    for target in chosen:
        print(f"NKI: {describe(target)}")
        print(f"  {'case':<20} {'shape':<{shape_width}} {'dtype':<{width}} {header}  result")
        for case in cases:
            for name in names:
                passed, row = run(case, name, target)
                failures += not passed
                print(f"  {case.name:<20} {case.shape:<{shape_width}} {name:<{width}} {row}", flush=True)
    n = len(cases) * len(names) * len(chosen)
    print(f"{n - failures} passed, {failures} failed in {time.perf_counter() - started:.1f} s (simulated on the CPU)")
    return 1 if failures else 0


def _default_targets() -> tuple[str | None, ...]:
    """All generations in the simulator; with a vendor package the target it chooses."""
    named = os.environ.get(TARGET_VARIABLE)
    if named:
        return (named,)
    if from_vendor():
        return (None,)
    return SIMULATED if BACKEND == "nkisim" else SIMULATED_LEGACY


def _parse(description: str, dtypes: Iterable[str], argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="which NKI runs the kernels")
    default = f"${TARGET_VARIABLE}, else the backend's own"
    parser.add_argument("--target", choices=TARGETS, help=f"generation to simulate (default: {default})")
    parser.add_argument("--dtype", choices=tuple(dtypes), action="append", help="only this type; may be repeated")
    return parser.parse_args(argv)


def _compare(
    names: Sequence[str], dtype: str, got: Sequence[Array], references: Sequence[tuple[Array, Array]]
) -> tuple[bool, str]:
    """Whether every result is in its type and within its budget, and the rest of the row."""
    columns, faults, close = [], [], False
    for i, (name, x, (exact, low_precision)) in enumerate(zip(names, got, references, strict=True)):
        kind = FLOATS[dtype if i == 0 else "float32"]
        difference, share = share_of_budget(x, exact, low_precision, kind)
        columns.append(f"{difference:>10.3e} {share:>12.1%}")
        if x.dtype != kind:
            faults.append(f"FAIL ({'result' if len(names) == 1 else name} in {x.dtype})")
        elif not share <= 1.0:
            faults.append("FAIL" if len(names) == 1 else f"FAIL ({name})")
        close |= share > SUSPICIOUS and kind != FLOATS["float32"]
    result = " ".join(faults) or ("pass (over half of the budget)" if close else "pass")
    return not faults, f"{' '.join(columns)}  {result}"
