"""How many instructions a kernel issues for given arguments, counted in the simulator."""

from __future__ import annotations

from typing import Any

from nkisim.nki import simulate
from nkisim.trace import Trace

_MARKS = ("loop_begin", "loop_end", "loop_iteration", "no_reorder_begin", "no_reorder_end")


def count_instructions(kernel: Any, *args: Any, target: str | None = None) -> int:
    """Instructions of the program that one core gets, for loops whose trips depend on shapes.

    The body of a dynamic loop counts once: the device holds one copy of it. Of two cores the larger program counts.

    Args:
        kernel: an `@nki.jit` kernel, `kernel[2]`, or a plain function.
        args: its arguments, as for `nki.simulate`.
        target: trn1, inf2, trn2 or trn3; default as for `nki.simulate`.
    """
    trace = Trace()
    simulate(kernel, target=target, trace=trace)(*args)
    counts: dict[int, int] = {}
    trips: dict[int, list[int]] = {}
    for record in trace.records:
        open_loops = trips.setdefault(record.core, [])
        if record.instruction == "loop_begin":
            open_loops.append(0)
        elif record.instruction == "loop_end":
            open_loops.pop()
        elif record.instruction == "loop_iteration":
            open_loops[-1] += 1
        elif record.instruction not in _MARKS and all(n == 1 for n in open_loops):
            counts[record.core] = counts.get(record.core, 0) + 1
    return max(counts.values(), default=0)
