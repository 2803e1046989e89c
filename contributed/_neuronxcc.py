"""NKI 0.6 on top of `neuronxcc.nki`, for Neuron SDKs that have nothing newer: this is the kernels' `nki`.

The adapter uses what the documentation of SDK 2.26 shows; docs/backends.md lists what it counts on beyond that.
`_neuronxcc_language.py` is the kernels' `nl`, `_neuronxcc_isa.py` with `_neuronxcc_dma.py` their `nisa`;
`_neuronxcc_tensors.py` has the views, `_neuronxcc_launch.py` builds programs, in a function of `_neuronxcc_entry.py`.
One is built for the values of its control arrays: a new plan is a new program.

Not there: two cores at a time (`kernel[2]` runs one program after the other), and what raises NotImplementedError.
"""

from __future__ import annotations

from typing import Any

from contributed._neuronxcc_launch import Kernel, build, prepare
from contributed._neuronxcc_tensors import Register
from contributed._neuronxcc_vendor import nki as vendor

jit = Kernel


def at_most(end: Any, most: int) -> Any:
    """A bound of a loop of at most `most` trips: where only the device knows it, as many are made."""
    if isinstance(end, Register):
        end.most = most
    return end


def simulate(kernel: Kernel) -> Any:
    """A callable that runs a kernel by `neuronxcc.nki.simulate_kernel`, arrays in, arrays out."""
    return lambda *args: build(kernel, args, _simulated)


def run_on_device(kernel: Kernel, *args: Any) -> Any:
    """Compile a kernel and run it on the Neuron device, by `neuronxcc.nki.baremetal`."""
    return build(kernel, args, _on_device)


def _simulated(function: Any, arrays: list[Any]) -> Any:
    return vendor.simulate_kernel(vendor.jit(function), *arrays)


def _on_device(function: Any, arrays: list[Any]) -> Any:
    return vendor.baremetal(function)(*arrays)


def benchmark(
    kernel: Kernel, args: tuple[Any, ...], percentiles: tuple[int, ...], warmup: int, iters: int
) -> dict[int, float]:
    """Latency of a kernel on the Neuron device by `neuronxcc.nki.benchmark`: percentiles in microseconds."""
    function, arrays = prepare(kernel, args, _on_device)
    timed = vendor.benchmark(warmup=warmup, iters=iters)(function)
    timed(*arrays)  # does not run on the arguments: what it returns means nothing
    latency = timed.benchmark_result.nc_latency
    return {p: float(latency.get_latency_percentile(p)) for p in percentiles}
