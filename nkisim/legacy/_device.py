"""What stands for a device: `nki.benchmark` and `nki.profile`, by the latency model."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from typing import Any

from nkisim.latency import estimate, perfetto
from nkisim.latency.report import summary
from nkisim.legacy._launch import Kernel, decorated
from nkisim.trace import Trace

PERCENTILES = (0, 1, 10, 25, 50, 90, 99, 100)


class Latency:
    """Modelled latency of one launch. The model has no spread, so all percentiles are the same."""

    def __init__(self, total_us: float) -> None:
        self.modelled_us = total_us

    def get_latency_percentile(self, percentile: int) -> float:
        """The modelled latency in microseconds.

        Raises:
            ValueError: a percentile that `nki.benchmark` does not report.
        """
        if percentile not in PERCENTILES:
            raise ValueError(
                f"get_latency_percentile: received {percentile!r}, allowed {', '.join(map(str, PERCENTILES))}"
            )
        return self.modelled_us


@dataclass(frozen=True)
class BenchmarkResult:
    """`kernel.benchmark_result` of a benchmark: `nc_latency` is modelled, not measured."""

    nc_latency: Latency


class BenchmarkedKernel(Kernel):
    """A kernel of `nki.benchmark`: every call models its latency, prints it and keeps it in `benchmark_result`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Shared with the copies that `kernel[grid]` makes.
        self._results: list[BenchmarkResult] = []

    @property
    def benchmark_result(self) -> BenchmarkResult:
        """The modelled latency of the last launch.

        Raises:
            RuntimeError: there was none.
        """
        if not self._results:
            raise RuntimeError("benchmark_result: received no launch yet, allowed after a call of the kernel")
        return self._results[-1]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Simulate the kernel and model its time."""
        trace = Trace()
        values = self._simulated(args, kwargs, trace)
        total_us = estimate(trace).total_us
        self._results.append(BenchmarkResult(Latency(total_us)))
        name = getattr(self.function, "__name__", "kernel")
        sys.stdout.write(f"{name} on {trace.target}: latency {total_us:.2f} us, modelled by nkisim, not measured\n")
        return values


def benchmark(kernel: Any = None, **kwargs: Any) -> Any:
    """A kernel whose latency a device would measure; here the latency model gives it.

    Raises:
        ValueError: `warmup` or `iters` below 0 and 1.
    """
    for name, least in (("warmup", 0), ("iters", 1)):
        value = kwargs.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"nki.benchmark.{name}: received {value!r}, allowed an integer >= {least}")
    target = kwargs.pop("platform_target", None)
    made = functools.partial(decorated, BenchmarkedKernel, "benchmark", target, kwargs)
    return made if kernel is None else made(kernel)


class ProfiledKernel(Kernel):
    """A kernel of `nki.profile`: every call writes its modelled timeline as a Chrome trace."""

    directory = ""
    file_name = ""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Simulate the kernel and write the modelled timeline."""
        trace = Trace()
        values = self._simulated(args, kwargs, trace)
        name = getattr(self.function, "__name__", "kernel")
        result = estimate(trace)
        os.makedirs(self.directory, exist_ok=True)
        path = os.path.join(self.directory, self.file_name)
        perfetto.write({name: result}, path)
        sys.stdout.write(f"{summary(name, result)}\n")
        sys.stdout.write(
            f"wrote {path}: the modelled timeline, not a profile of a device; open it in ui.perfetto.dev\n"
        )
        return values


def profile(func: Any = None, **kwargs: Any) -> Any:
    """A kernel that a device would profile; here its modelled timeline is written into `working_directory`.

    Raises:
        ValueError: no `working_directory`, or one that is no absolute path.
    """
    given = kwargs.pop("working_directory", None)
    if not isinstance(given, (str, os.PathLike)) or not os.path.isabs(given):
        raise ValueError(f"nki.profile.working_directory: received {given!r}, allowed an absolute path")
    directory = os.fspath(given)
    stem = os.path.splitext(str(kwargs.pop("save_trace_name", "profile.ntff")))[0]
    target = kwargs.pop("platform_target", None)

    def made(kernel: Any) -> Kernel:
        found = decorated(ProfiledKernel, "profile", target, kwargs, kernel)
        assert isinstance(found, ProfiledKernel)
        found.directory, found.file_name = directory, f"{stem}.json"
        return found

    return made if func is None else made(func)
