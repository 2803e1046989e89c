"""The timeline as a picture. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nkisim.latency.estimate import NS_PER_US, Estimate
from nkisim.latency.perfetto import lanes, row_order


def timeline(estimates: Mapping[str, Estimate], path: str | Path) -> None:
    """Draw one panel per kernel and core, a row per engine and queue, coloured by instruction.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot: needs matplotlib; install the extra: pip install -e '.[bench]'") from error

    panels = [(t, e, c) for t, e in estimates.items() for c in sorted({s.record.core for s in e.slots})]
    figure = Figure(figsize=(14, 1.0 + 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    instructions = sorted({s.record.instruction for _, e, _ in panels for s in e.slots if s.busy_ns > 0})
    palette = mpl.colormaps["tab20"]
    colour = {name: palette(i % palette.N) for i, name in enumerate(instructions)}
    for ax, (title, e, core) in zip(axes, panels, strict=True):
        placed = lanes([s for s in e.slots if s.record.core == core])
        rows = sorted({name for name, _ in placed}, key=row_order, reverse=True)
        for name in instructions:
            for row in rows:
                spans = [
                    (s.begin_ns / NS_PER_US, s.shown_ns / NS_PER_US)
                    for r, s in placed
                    if r == row and s.record.instruction == name
                ]
                if spans:
                    ax.broken_barh(spans, (rows.index(row) - 0.4, 0.8), color=colour[name], linewidth=0.6)
        ax.set_yticks(range(len(rows)), rows)
        ax.set_xlim(0, e.total_us)
        ax.set_xlabel("modelled time, us")
        times = f"{e.total_us:.1f} us modelled, DMA bound {e.dma_bound_us:.1f} us"
        ax.set_title(f"{title}, {e.target}, core {core}: {times}")
    handles = [mpl.patches.Patch(color=colour[n], label=n) for n in instructions]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
