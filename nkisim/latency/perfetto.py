"""An estimate as a Chrome trace: a row per engine and queue, to be opened in ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nkisim.latency.estimate import NS_PER_US, Estimate
from nkisim.latency.schedule import Slot
from nkisim.trace import Access, Engine

ROWS = ("tensor", "vector", "scalar", "gpsimd", "sync")


def events(estimates: Mapping[str, Estimate]) -> list[dict[str, Any]]:
    """Trace events of several kernels; each kernel and core is a process, each engine and queue a thread."""
    found: list[dict[str, Any]] = []
    process = 0
    for title, e in estimates.items():
        for core in sorted({s.record.core for s in e.slots}):
            process += 1
            label = f"{title} (modelled, {e.target}, core {core})"
            found.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": label}})
            found.extend(_core_events([s for s in e.slots if s.record.core == core], process))
    return found


def write(estimates: Mapping[str, Estimate], path: str | Path) -> None:
    """Write `events` as a JSON file."""
    document = {"displayTimeUnit": "ns", "traceEvents": events(estimates)}
    Path(path).write_text(json.dumps(document), encoding="utf-8")


def lanes(slots: list[Slot]) -> list[tuple[str, Slot]]:
    """Every slot with the name of its row; transfers of a queue that overlap get rows of their own."""
    placed: list[tuple[str, Slot]] = []
    until: dict[str, list[float]] = {}
    for s in sorted(slots, key=lambda s: s.begin_ns):
        if s.busy_ns <= 0.0:
            continue
        if s.record.engine is not Engine.dma:
            placed.append((s.queue, s))
            continue
        ends = until.setdefault(s.queue, [])
        for i, end in enumerate(ends):
            if end <= s.begin_ns:
                ends[i] = s.begin_ns + s.shown_ns
                placed.append((f"{s.queue} {i}", s))
                break
        else:
            placed.append((f"{s.queue} {len(ends)}", s))
            ends.append(s.begin_ns + s.shown_ns)
    return placed


def row_order(name: str) -> tuple[int, str]:
    """Engines first, then queues by name."""
    return (ROWS.index(name), "") if name in ROWS else (len(ROWS), name)


def _core_events(slots: list[Slot], process: int) -> list[dict[str, Any]]:
    placed = lanes(slots)
    names = sorted({name for name, _ in placed}, key=row_order)
    thread = {name: i for i, name in enumerate(names)}
    found: list[dict[str, Any]] = []
    for name, i in thread.items():
        found.append({"ph": "M", "pid": process, "tid": i, "name": "thread_name", "args": {"name": name}})
        found.append({"ph": "M", "pid": process, "tid": i, "name": "thread_sort_index", "args": {"sort_index": i}})
    for name, s in placed:
        r = s.record
        found.append(
            {
                "ph": "X",
                "pid": process,
                "tid": thread[name],
                "ts": s.begin_ns / NS_PER_US,
                "dur": s.shown_ns / NS_PER_US,
                "name": r.name or r.instruction,
                "args": {
                    "instruction": r.instruction,
                    "line": f"{r.site.file}:{r.site.line}",
                    "writes": [_shown(a) for a in r.writes],
                    "reads": [_shown(a) for a in r.reads],
                    "waited for": s.why if s.turn_of is None else "DMA engines",
                    **{k: str(v) for k, v in r.attrs.items()},
                },
            }
        )
    return found


def _shown(a: Access) -> str:
    return f"{a.operand}: {a.storage.name} {a.dtype}{list(a.shape)} in {a.storage.buffer.name}"
