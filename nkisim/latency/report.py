"""An estimate as text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from nkisim.latency.estimate import Estimate

PATH_LINES = 8


def summary(title: str, e: Estimate) -> str:
    """The summary table: time, bounds, engines, lines and what the path waits for; every time is modelled."""
    total = e.total_us
    lines = [
        f"{title}: modelled on {e.target}, {len(e.slots)} instructions",
        f"  total            {total:12.2f} us",
        f"  DMA bound        {e.dma_bound_us:12.2f} us   {_share(e.dma_bound_us, total)} of the total; "
        f"{e.hbm_read_bytes:,} bytes read, {e.hbm_write_bytes:,} written",
        f"  compute bound    {e.compute_bound_us:12.2f} us   {_share(e.compute_bound_us, total)} of the total",
        "  busy             " + ", ".join(f"{k} {v:.2f} us ({_share(v, total)})" for k, v in e.busy_us.items() if v),
        f"  assumed          {e.n_assumed:>12} constants: {', '.join(e.assumed) or 'none'}",
        "  most expensive lines",
    ]
    for line in e.expensive_lines:
        where = f"{Path(line.site.file).name}:{line.site.line}"
        issued = f"{line.instructions:>7} instructions"
        lines.append(f"    {line.busy_us:10.2f} us  {issued}  {where} in {line.site.function}")
    lines.append("  critical path, by instruction and line")
    held: Counter[str] = Counter()
    for step in e.critical_path:
        held[f"{step.instruction} at {Path(step.site.file).name}:{step.site.line}"] += step.held_us  # type: ignore[assignment]
    for what, us in held.most_common(PATH_LINES):
        lines.append(f"    {us:10.2f} us  {_share(us, total):>6}  {what}")
    return "\n".join(lines)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
