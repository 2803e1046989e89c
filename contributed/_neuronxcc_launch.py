"""A program of the adapter while it is built: its tensors, and the loops whose ends only the device knows.

A program is built twice. The first time no instruction is issued: that tells which results the kernel has and which of
its arguments it writes, as neuronxcc wants results created, and such arguments named, by the kernel itself.

neuronxcc has no loop whose end the device decides. Where the host knows the bounds, as it does those of plans, the loop
is written out. Where it does not, every trip up to the most there may be is made, and what a trip wrote that should not
have been made is put back: each tensor on chip is copied before the first write of a trip, and copied back under a
predicate after it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any

import numpy as np

from contributed._neuronxcc_entry import entry
from contributed._neuronxcc_tensors import (
    DTYPES,
    Dtype,
    Register,
    Shadow,
    Storage,
    Tensor,
    arange,
    forget_indices,
    new_tensor,
    tile,
)
from contributed._neuronxcc_vendor import nisa, nl
from contributed._packages import UNKNOWN_TO_LEGACY

Run = Callable[[Any, list[Any]], Any]
TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"
CLEARED = 4096  # elements of a partition that one store clears


@dataclass
class Trip:
    """A trip that may not be made.

    Args:
        live: uint32 [partitions, 1] of neuronxcc, 1 if it and those around it are made.
        copies: of what it has written.
        shadows: what the host knew of it.
    """

    live: Any
    copies: dict[Storage, Any] = field(default_factory=dict)
    shadows: dict[Storage, Shadow] = field(default_factory=dict)


class Program:
    """What is known while a kernel's program is built.

    Args:
        dry: whether no instruction is issued.
        version: of the NeuronCore.
        cores: programs of the launch, which run one after the other.
        cleared: whether tensors begin as zeros, for trips that are not made may read them.
    """

    def __init__(self, dry: bool, version: Any, cores: int, cleared: bool) -> None:
        self.dry = dry
        self.version = version
        self.cores = cores
        self.core = 0
        self.cleared = cleared
        self.results: list[Storage] = []
        self.n_results = 0  # that this core has asked for
        self.given: tuple[Any, ...] = ()  # results of neuronxcc
        self.returned: tuple[Tensor, ...] = ()
        self.written: set[int] = set()  # arguments
        self.device_loops = False
        self.trips: list[Trip] = []
        self.numbers: dict[tuple[int, int], Any] = {}  # tiles of constants
        self._copies: dict[tuple[Storage, int], Any] = {}

    # -- tensors

    def ndarray(self, shape: tuple[int, ...], dtype: Dtype, buffer: str) -> Tensor:
        """A new tensor; of several cores all have the same results."""
        if buffer == "shared_hbm":
            number, self.n_results = self.n_results, self.n_results + 1
            if number == len(self.results):
                self.results.append(Storage(buffer, dtype, tuple(shape)))
                if not self.dry:
                    self.results[number].put(self.given[number])
            return new_tensor(self.results[number])
        storage = Storage(buffer, dtype, tuple(shape))
        storage.scope = len(self.trips)
        if self.dry:
            return new_tensor(storage)
        if storage.on_chip:
            storage.put(on_chip((shape[0], storage.row_bytes // dtype.itemsize), dtype, buffer))
        else:
            storage.put(nl.ndarray(tuple(shape), dtype=dtype.vendor, buffer=getattr(nl, buffer)))
        if self.cleared:
            storage.clear = partial(clear, storage)
        return new_tensor(storage)

    def writes(self, t: Tensor) -> None:
        """Before an instruction writes to a view."""
        storage = t.storage
        if storage.argument is not None:
            self.written.add(storage.argument)
        kept = None
        for depth, trip in enumerate(self.trips, 1):
            if depth > storage.scope and storage not in trip.copies:
                if storage.shadow is not None:
                    trip.shadows[storage] = storage.shadow.copy()
                # What goes to HBM is chosen when it goes there.
                if storage.on_chip and kept is None and not self.dry:
                    kept = self._copy(storage, depth)
                trip.copies[storage] = kept

    def _copy(self, storage: Storage, depth: int) -> Any:
        """What a storage holds, in SBUF."""
        flat = (storage.shape[0], storage.row_bytes // storage.dtype.itemsize)
        if (storage, depth) not in self._copies:
            self._copies[storage, depth] = on_chip(flat, storage.dtype, "sbuf")
        copy = self._copies[storage, depth]
        copy[...] = nisa.tensor_copy(storage.of(storage.dtype)[0 : flat[0], 0 : flat[1]])
        return copy

    # -- loops

    def fori_loop(self, start: Any, end: Any, body: Callable[[Any], None], step: int) -> None:
        """body(i) for i from `start` to before `end`."""
        first, last = bound(start), bound(end)
        if first is not None and last is not None:
            for i in range(first, last, step):
                body(i)
            return
        if first is None and last is None:
            raise NotImplementedError("neuronxcc: a loop of which the device alone knows both bounds")
        unknown = end if last is None else start
        if unknown.most is None:
            raise NotImplementedError("neuronxcc: a loop with a bound that only the device knows; say `at_most` of it")
        self.device_loops = True
        if first is None:
            if step != 1:
                raise NotImplementedError("neuronxcc: a loop by steps from where only the device knows")
            assert last is not None
            trips, op = range(last - unknown.most, last), nl.less_equal
        else:
            trips, op = range(first, first + step * unknown.most, step), nl.greater
        for i in trips:
            self._trip(None if self.dry else self._live(unknown, op, i), i, body)

    def _trip(self, live: Any, i: int, body: Callable[[Any], None]) -> None:
        """A trip that is made if `live` says so."""
        trip = Trip(live)
        self.trips.append(trip)
        body(i)
        self.trips.pop()
        for storage, copy in trip.copies.items():
            if copy is not None:
                p, n = storage.shape[0], storage.row_bytes // storage.dtype.itemsize
                nisa.tensor_copy_predicated(
                    dst=storage.vendor[0:p, 0:n],
                    src=copy[0:p, 0:n],
                    predicate=live[0:p, 0:1].broadcast_to((p, n)),
                    reverse_pred=True,
                )
        for storage, before in trip.shadows.items():
            assert storage.shadow is not None
            storage.shadow.or_as(before)

    def _live(self, number: Register, op: Any, i: int) -> Any:
        """Whether `number op i`, and the trips around this one are made; on every partition."""
        assert number.tile is not None
        pmax = nl.tile_size.pmax
        live = on_chip((pmax, 1), DTYPES["uint32"], "sbuf")
        live[0:1, 0:1] = nisa.tensor_scalar(tile(number.tile, [(1, 1)]), op0=op, operand0=i, dtype=nl.uint32)
        repeat_first(live, pmax, 1)
        if self.trips:
            around = self.trips[-1].live
            live[...] = nisa.tensor_tensor(live[0:pmax, 0:1], around[0:pmax, 0:1], nl.multiply, dtype=nl.uint32)
        return live


def bound(x: Any) -> int | None:
    """A loop's bound, if the host knows it."""
    return x.value if isinstance(x, Register) else int(x)


def on_chip(shape: tuple[int, int], dtype: Dtype, buffer: str) -> Any:
    """A tensor of neuronxcc, [partitions, elements]."""
    return nl.ndarray((nl.par_dim(shape[0]), shape[1]), dtype=dtype.vendor, buffer=getattr(nl, buffer))


def repeat_first(t: Any, partitions: int, width: int) -> None:
    """Every partition of a tensor [partitions, width] of neuronxcc gets what the first has, twice as many each time.

    By DMA, which begins at any partition. A tile's `broadcast_to` would take a bank of PSUM, which may be full.
    """
    done = 1
    while done < partitions:
        n = min(done, partitions - done)
        nisa.dma_copy(dst=t[done : done + n, 0:width], src=t[0:n, 0:width])
        done += n


def clear(storage: Storage) -> None:
    """Zeros in a tensor; in HBM a few partitions at a time."""
    if storage.on_chip:
        flat = (storage.shape[0], storage.row_bytes // storage.dtype.itemsize)
        storage.vendor[...] = nisa.memset(flat, 0, storage.dtype.vendor)
        return
    elements = storage.of(storage.dtype)
    rows = gcd(storage.size, nl.tile_size.pmax)
    width = storage.size // rows
    for first in range(0, width, CLEARED):
        n = min(CLEARED, width - first)
        place = elements[first + width * arange(rows, 0, 2) + arange(n, 1, 2)]
        nl.store(place, nisa.memset((rows, n), 0, storage.dtype.vendor))


_running: ContextVar[Program | None] = ContextVar("program", default=None)


def program() -> Program:
    """The program that is being built.

    Raises:
        RuntimeError: there is none: an instruction outside of a kernel.
    """
    running = _running.get()
    if running is None:
        raise RuntimeError("neuronxcc: an instruction outside of a kernel")
    return running


class Kernel:
    """A kernel of NKI 0.6: `kernel` for one core, `kernel[2]` for two, of which one runs after the other."""

    def __init__(self, function: Callable[..., Any], cores: int = 1) -> None:
        self.function = function
        self.cores = cores
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__

    def __getitem__(self, cores: int) -> Kernel:
        """The kernel on one or two cores.

        Raises:
            ValueError: another number.
        """
        if cores not in (1, 2):
            raise ValueError(f"{self.__name__}[cores]: received {cores}, allowed 1 or 2")
        return Kernel(self.function, cores)

    def __call__(self, *_: Any) -> Any:
        """Kernels run by `simulate_kernel` and `run_on_device`."""
        raise TypeError(f"{self.__name__}: call it with contributed._nki.simulate_kernel or run_on_device")


def build(kernel: Kernel, args: tuple[Any, ...], run: Run) -> Any:
    """Build a kernel's program for some arguments and run it.

    Args:
        kernel: the kernel.
        args: NumPy arrays, and values that are known when it is built.
        run: `(function of neuronxcc, arrays)` to the function's results; one of the module's functions, not made anew.

    Returns:
        What the kernel returns, as arrays; arguments that it writes are changed in place.

    Raises:
        TypeError: not a kernel, or an array that neuronxcc does not take.
        ValueError: a target that SDK 2.26 does not have.
    """
    first = _dry(kernel, args, run)
    function, arrays = _entry_of(kernel, args, first)
    results = run(function, arrays)
    values = []
    for t, x in zip(first.returned, results if isinstance(results, (tuple, list)) else (results,), strict=True):
        # AWS's simulator has narrow floats as float32.
        value = np.asarray(x).astype(t.storage.dtype.name, copy=False)
        if t.storage.argument is not None:
            argument = args[t.storage.argument]
            np.copyto(argument, value)
            value = argument
        values.append(value)
    return values[0] if len(values) == 1 else tuple(values)


def prepare(kernel: Kernel, args: tuple[Any, ...], run: Run) -> tuple[Any, list[Any]]:
    """The function of neuronxcc that `build` would run, and its arrays."""
    return _entry_of(kernel, args, _dry(kernel, args, run))


_versions: dict[Any, Any] = {}


def nc_version(run: Run) -> Any:
    """The NeuronCore that neuronxcc builds for, which it tells kernels alone."""
    key = run, os.environ.get(TARGET_VARIABLE)
    if key not in _versions:

        def ask(x):
            _versions[key] = nisa.get_nc_version()
            y = nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.shared_hbm)
            nl.store(y, nl.load(x))
            return y

        run(ask, [np.zeros((1, 1), np.float32)])
    return _versions[key]


def _dry(kernel: Kernel, args: tuple[Any, ...], run: Run) -> Program:
    _check(kernel, args)
    first = Program(True, nc_version(run), kernel.cores, False)
    _build(kernel, args, first, {})
    return first


def _check(kernel: Kernel, args: tuple[Any, ...]) -> None:
    """Refuses what neuronxcc cannot get, before it gets anything."""
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel: received {kernel!r}, allowed a function under @nki.jit")
    target = os.environ.get(TARGET_VARIABLE)
    if target in UNKNOWN_TO_LEGACY:
        raise ValueError(f"target: received {target}, allowed trn1, inf2, trn2 with neuronxcc")
    for x in args:
        if isinstance(x, np.ndarray) and x.dtype.name not in DTYPES:
            raise TypeError(f"{kernel.__name__}: received an array of {x.dtype}, allowed {', '.join(DTYPES)}")
        if hasattr(x, "shape") and not isinstance(x, (np.ndarray, np.generic)):
            raise TypeError(f"{kernel.__name__}: received a {type(x).__name__}, allowed NumPy arrays")


def _entry_of(kernel: Kernel, args: tuple[Any, ...], first: Program) -> tuple[Any, list[Any]]:
    arrays = [i for i, x in enumerate(args) if isinstance(x, np.ndarray)]
    order = [*sorted(first.written), *(i for i in arrays if i not in first.written)]

    def body(tensors: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
        second = Program(False, first.version, kernel.cores, first.device_loops)
        second.given = given
        _build(kernel, args, second, dict(zip(order, tensors, strict=False)))
        return tuple(t.storage.vendor for t in second.returned)

    shapes = [(storage.shape, storage.dtype.vendor) for storage in first.results]
    return entry(body, shapes, len(order), len(first.written)), [args[i] for i in order]


def _build(kernel: Kernel, args: tuple[Any, ...], build: Program, tensors: dict[int, Any]) -> None:
    """Call the kernel's function once per core."""
    values = list(args)
    for i, x in enumerate(args):
        if isinstance(x, np.ndarray):
            whole = x if x.dtype.name in ("int32", "uint32") else None
            storage = Storage("hbm", DTYPES[x.dtype.name], x.shape, i, whole)
            storage.put(tensors.get(i))
            values[i] = new_tensor(storage)
    token = _running.set(build)
    forget_indices()
    try:
        for core in range(kernel.cores):
            build.core, build.n_results = core, 0
            returned = kernel.function(*values)
    finally:
        _running.reset(token)
        forget_indices()
    build.returned = returned if isinstance(returned, tuple) else (returned,)
    given_back = {t.storage.argument for t in build.returned}
    assert build.written <= given_back, "a kernel returns the arguments that it writes"
