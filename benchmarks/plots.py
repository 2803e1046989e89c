"""Command line: `python -m benchmarks.plots FILE.svg` draws time and error of sparse decode over the threshold.

Every point is a case of `benchmarks/sparse_decode.py` with all its checks; times are modelled. Needs matplotlib (extra
`bench`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.cases import Result
from benchmarks.flash_decode import K
from benchmarks.run import TARGETS
from benchmarks.sparse_decode import Problem, TileCase, run_case

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97)
LAYOUTS = {"skip_softmax": "d-major", "sparse": "d-major", "gate": "s-major"}  # the faster one, and the only one
NAMES = {"skip_softmax": "skip_softmax_decode", "sparse": "sparse_decode", "gate": "gated_decode"}
COLOURS = {"skip_softmax": "tab:blue", "sparse": "tab:orange", "gate": "tab:green"}
KEYS, GROUP = 32 * K, 8  # query heads per KV head
# The same file for the same points.
STYLE: dict[Any, Any] = {"svg.hashsalt": "sparse decode", "svg.fonttype": "none"}


@dataclass(frozen=True)
class Point:
    """What a threshold costs and gains.

    Args:
        threshold: of the rule.
        share: of the (KV head, tile) pairs whose V is not read.
        time: modelled, over that of `flash_decode`.
        bound: the time to read what is in use, over the same.
        error: largest |o - dense o| / |dense o| of a query head.
    """

    threshold: float
    share: float
    time: float
    bound: float
    error: float

    @classmethod
    def of(cls, result: Result) -> Point:
        """A correct result as a point."""
        timing, baseline, skipped = result.timing, result.baseline, result.skipped
        assert timing is not None, "a correct result"
        assert baseline is not None, "a case with a baseline"
        assert baseline.us is not None, "a time of flash_decode"
        assert skipped is not None, "a case that leaves out tiles"
        times = timing.modelled_us / baseline.us, timing.dma_bound_us / baseline.us
        return cls(skipped.threshold, skipped.share, *times, skipped.error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep and draw; returns 1 if a point computes the wrong result, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.svg", help="where to draw")
    parser.add_argument("--target", choices=TARGETS, default="trn2", help="chip to model; default trn2")
    parser.add_argument("--kv-heads", type=int, default=2, metavar="N", help="of 8 query heads each; default 2, quick")
    options = parser.parse_args(arguments)
    if options.kv_heads < 1:
        parser.error(f"--kv-heads: received {options.kv_heads}, allowed at least 1")
    if options.file.suffix != ".svg":
        parser.error(f"FILE.svg: received {options.file}, allowed a name that ends in .svg")
    if find_spec("matplotlib") is None:
        parser.error("needs matplotlib; install the extra: pip install -e '.[bench]'")
    points: dict[str, list[Point]] = {}
    begin = time.perf_counter()
    for rule, layout in LAYOUTS.items():
        points[rule] = []
        print(f"{NAMES[rule]}, {layout} K: threshold, share skipped, time and bound over flash_decode's, error")
        for share in SHARES:
            print(f"[{time.perf_counter() - begin:.0f} s] {NAMES[rule]} {share:.0%}", file=sys.stderr, flush=True)
            result = run_case(_case(rule, share, options.kv_heads), options.target)
            if result.failed:
                print(f"FAIL {result.case.name}: {result.check.failure}", file=sys.stderr)
                return 1
            p = Point.of(result)
            points[rule].append(p)
            print(f"  {p.threshold:9.3g} {p.share:7.1%} {p.time:7.3f} {p.bound:7.3f} {p.error:9.2e}", flush=True)
    heads = f"{GROUP * options.kv_heads}/{options.kv_heads} heads"
    draw(points, f"{heads}, {KEYS} keys, {options.target}", options.file)
    print(f"wrote {options.file}")
    return 0


def _case(rule: str, share: float, n_kv_heads: int) -> TileCase:
    problem = Problem(rule, share, GROUP * n_kv_heads, n_kv_heads, KEYS)
    return TileCase(f"{NAMES[rule]}-{share:.0%}", problem, LAYOUTS[rule])


def draw(points: dict[str, list[Point]], shape: str, path: Path) -> None:
    """Two rows, time and error; two columns, over the threshold and over the share that it skips.

    Args:
        points: by rule.
        shape: of the problem, for the title.
        path: an SVG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns: dict[str, Callable[[Point], float]] = {
        "threshold": lambda p: p.threshold,
        "tiles whose V is not read": lambda p: p.share,
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 7), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        for column, (label, x) in enumerate(columns.items()):
            above, below = axes[0, column], axes[1, column]
            for rule, found in points.items():
                along, colour = [x(p) for p in found], COLOURS[rule]
                above.plot(along, [p.time for p in found], "o-", color=colour, label=NAMES[rule])
                above.plot(along, [p.bound for p in found], "--", color=colour, label=f"{NAMES[rule]}, DMA bound")
                below.plot(along, [p.error for p in found], "o-", color=colour)
            above.axhline(1.0, color="grey", linewidth=0.8)
            above.set_ylim(bottom=0.0)
            below.set_yscale("log")
            below.set_xlabel(label)
        axes[1, 0].set_xscale("log")
        for ax in axes.flat:
            ax.grid(alpha=0.3)
            ax.minorticks_off()
        axes[1, 1].xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        axes[0, 0].set_ylabel("modelled time over flash_decode's")
        axes[1, 0].set_ylabel("|o - dense o| / |dense o|, worst head")
        figure.suptitle(f"Sparse decode, {shape}: modelled time and error")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
