"""Command line: `python -m benchmarks.run <benchmark>` checks kernels against their oracles and models their times."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import flash_decode, prefill, prefill_bwd, sparse_decode
from benchmarks.calibration.report import number
from benchmarks.cases import ENGINES, Benchmark, Case, Result, blocks, replace_blocks

BENCHMARKS: tuple[Benchmark, ...] = (
    flash_decode.BENCHMARK,
    *sparse_decode.BENCHMARKS,
    *prefill.BENCHMARKS,
    prefill_bwd.BENCHMARK,
)
TARGETS = ("trn1", "inf2", "trn2", "trn3")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases; returns 1 if one computes the wrong result, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name}: {benchmark.what}")
            for case in benchmark.cases:
                print(f"  {case.name:28} {case.shape}")
        return 0
    if options.benchmark is None:
        parser.error("benchmark: received none, allowed " + ", ".join(b.name for b in BENCHMARKS))
    benchmark = next(b for b in BENCHMARKS if b.name == options.benchmark)
    if options.update is not None and options.case:
        parser.error("--update: received a selection of cases, allowed all cases")
    try:
        chosen = [benchmark.case(name) for name in options.case] if options.case else list(benchmark.cases)
    except ValueError as error:
        parser.error(str(error))
    refused = {case.name: reason for case in chosen if (reason := case.refused(options.target))}
    if refused and options.case:
        parser.error("; ".join(f"--case {name}: {reason}" for name, reason in refused.items()))
    for name, reason in refused.items():
        print(f"left out: {name}, {reason}", file=sys.stderr)
    results = run(benchmark, [case for case in chosen if case.name not in refused], options.target)
    wrong = [r for r in results if r.failed]
    for r in wrong:
        print(f"FAIL {r.case.name}: {r.check.failure}", file=sys.stderr)
    if options.json:
        document = {"benchmark": benchmark.name, "target": options.target, "times": "modelled", "left_out": refused}
        print(json.dumps(document | {"cases": [r.as_json() for r in results]}, indent=2, allow_nan=False))
    elif options.markdown or options.update is not None:
        if wrong:
            return 1
        parts = blocks(benchmark, results)
        if options.update is not None:
            replace_blocks(options.update, parts)
            print(f"wrote {options.update}")
        else:
            for name, text in parts.items():
                print(f"<!-- {name} -->\n{text}\n<!-- end {name} -->\n")
    else:
        for r in results:
            print((benchmark.text or as_text)(r))
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    names = [b.name for b in BENCHMARKS]
    parser.add_argument("benchmark", nargs="?", choices=names, metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="print benchmarks and their cases, run nothing")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="default: all cases")
    parser.add_argument("--target", choices=TARGETS, default="trn2", help="chip to model; default trn2")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print results as JSON")
    output.add_argument("--markdown", action="store_true", help="print the tables of docs/performance.md")
    output.add_argument("--update", type=Path, metavar="FILE.md", help="replace the tables in a file")
    return parser


def run(benchmark: Benchmark, cases: Sequence[Case], target: str) -> list[Result]:
    """All results; progress goes to stderr."""
    results = []
    begin = time.perf_counter()
    for i, case in enumerate(cases, 1):
        at = f"[{i}/{len(cases)}, {time.perf_counter() - begin:.0f} s]"
        print(f"{at} {case.name}", file=sys.stderr, flush=True)
        results.append(benchmark.run(case, target))
    return results


def as_text(result: Result) -> str:
    """A result for the terminal."""
    lines = [f"{result.case.name} on {result.target}: {result.case.shape}"]
    if result.timing is None:
        return "\n".join([*lines, f"  FAIL {result.check.failure}"])
    t = result.timing
    lines.append(f"  correct    {result.check}")
    lines.append(
        f"  modelled   {number(t.modelled_us)} us, DMA bound {number(t.dma_bound_us)} us, ratio {t.ratio:.3f}; "
        f"all bytes moved: {number(t.traffic_bound_us)} us"
    )
    lines += [f"  goal       {goal}: {'met' if met else 'NOT MET'}" for goal, met in result.verdicts()]
    lines.append("  busy us    " + ", ".join(f"{name} {number(t.busy_us[name])}" for name in ENGINES))
    lines.append(f"  HBM        {t.hbm_read_bytes:,} bytes read, {t.hbm_write_bytes:,} written")
    if (x := result.skipped) is not None:
        left_out = f"{x.k_tiles:,} tiles of K and {x.v_tiles:,} of V of {x.of:,} not read ({x.share:.1%} of V)"
        lines.append(f"  threshold  {x.threshold:.3g}: {left_out}, error {x.error:.2e}")
    if (base := result.baseline) is not None and base.us is None:
        lines.append(f"  baseline   {base.kernel}: {base.how}")
    elif base is not None and base.us is not None:
        how = f" ({base.how})" if base.how else ""
        lines.append(f"  baseline   {base.kernel}: {number(base.us)} us modelled{how}, speed-up {result.speed_up:.3f}x")
    lines += [
        f"  published  {number(p.us)} us measured by {p.by}: {p.what}"
        for p in result.case.published
        if p.target == result.target
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
