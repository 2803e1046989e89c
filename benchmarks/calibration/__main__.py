"""Command line: `python -m benchmarks.calibration` compares the latency model with published measurements."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.calibration import report
from benchmarks.calibration._row import Result, Row
from benchmarks.calibration.rows import ALL


def main(arguments: Sequence[str] | None = None) -> int:
    """Model every chosen row, print or write the tables; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.update is not None and (options.row or options.fast):
        parser.error("--update: received a selection of rows, allowed all rows")
    rows = [row for row in ALL if not options.row or row.key in options.row]
    if options.fast:
        rows = [row for row in rows if row.fast]
    results = run(rows)
    if options.update is not None:
        options.update.write_text(report.updated(options.update.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"wrote {options.update}")
    elif options.markdown:
        for name, text in report.blocks(results).items():
            print(f"<!-- {name} -->\n{text}\n<!-- end {name} -->\n")
    else:
        for r in results:
            kind = "" if r.row.is_check else f"  ({r.row.defines or 'another kernel'})"
            print(
                f"{r.row.key:32} {r.row.target:5} measured {report.number(r.row.measured):>8} {r.row.unit:5} "
                f"modelled {report.number(r.modelled):>8} {r.row.unit:5} ratio {r.ratio:5.2f}{kind}"
            )
        print(report.summary(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    keys = [row.key for row in ALL]
    parser.add_argument("row", nargs="*", choices=[[], *keys], metavar="ROW", help="default: all rows")
    parser.add_argument("--fast", action="store_true", help="only rows that take a second or two")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--markdown", action="store_true", help="print the tables of docs/latency-model.md")
    output.add_argument("--update", type=Path, metavar="FILE.md", help="replace the tables in a file")
    return parser


def run(rows: Sequence[Row]) -> list[Result]:
    """All results; progress goes to stderr."""
    results = []
    begin = time.perf_counter()
    for i, row in enumerate(rows, 1):
        print(f"[{i}/{len(rows)}, {time.perf_counter() - begin:.0f} s] {row.key}", file=sys.stderr, flush=True)
        results.append(Result(row, row.model()))
    return results


if __name__ == "__main__":
    sys.exit(main())
