"""`neuronxcc.nki.compiler`: placing of on-chip tensors, and decorators for the compiler.

The simulator honours the placing (capacity, start partitions, banks, tiles on the same bytes while both are in use)
and `force_auto_alloc`. The other decorators and directives steer a compiler that does not run here: they are checked,
kept with the kernel, and have no effect on results.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from nkisim.errors import NkiError, Site, call_site
from nkisim.hardware import Hardware, source_of
from nkisim.machine import Core, current_core
from nkisim.memory import MemoryRegion

GUIDE = "NKI direct allocation guide, SDK 2.26"
SBUF_PAGE = "nki.compiler.sbuf, SDK 2.26"
PSUM_PAGE = "nki.compiler.psum, SDK 2.26"
ERRORS = "NKI errors, SDK 2.26"

_OPTIONS = "nki_compiler_options"

Place = Callable[[tuple[int, ...], int, int], Any]


@dataclass(frozen=True)
class Allocation:
    """Where the tiles of one tensor go; the value of `buffer=` that `alloc` and `mod_alloc` make.

    Args:
        region: SBUF or PSUM.
        function: `(block index, partitions, bytes per partition)` to `(start partition, byte)` in SBUF and
            `(bank, start partition, byte)` in PSUM.
        tiles: names and values of a modulo allocation's tile counts, whose lengths are the tensor's block rank.
    """

    region: MemoryRegion
    function: Place
    tiles: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def placed(self) -> bool:
        """Whether the running kernel places its tensors: not under `force_auto_alloc`."""
        return "force_auto_alloc" not in _state().options

    def place(self, index: tuple[int, ...], shape: Sequence[int], itemsize: int) -> tuple[int, int] | None:
        """Where the tile of the block `index` goes: (start partition, byte in the partition), None for anywhere.

        Args:
            index: block index, () for a tensor without block dimensions.
            shape: of one block, partitions first.
            itemsize: bytes per element.

        Raises:
            NkiError: a place that the memory does not have, or tile counts of another rank than the tensor's blocks.
        """
        if not self.placed:
            return None
        hardware = current_core("nki.compiler allocation").hardware
        state = _state()
        if state.direct is None:
            state.direct = call_site()
        rank = len(index)
        for name, counts in self.tiles:
            # AWS's kernels give one count for tensors without block dimensions; the page's formula ignores it there.
            if rank and counts and len(counts) != rank:
                _refuse(self.region, name, "number of tile counts", len(counts), f"none or {rank}, the block rank")
        return self._address(hardware, tuple(index), shape[0], prod(shape[1:]) * itemsize)

    def _address(self, hardware: Hardware, index: tuple[int, ...], partitions: int, size: int) -> tuple[int, int]:
        # What the kernel's own function returns may be anything.
        place = self.function(index, partitions, size)
        length = 2 if self.region is MemoryRegion.sbuf else 3
        if (
            not isinstance(place, tuple)
            or len(place) != length
            or not all(isinstance(n, int) and not isinstance(n, bool) for n in place)
        ):
            names = "(start_partition, byte_addr)" if length == 2 else "(bank_id, start_partition, byte_addr)"
            _refuse(self.region, "func", f"place of block {index}", repr(place), f"{length} integers {names}")
        if self.region is MemoryRegion.sbuf:
            return _sbuf_address(hardware, index, (place[0], place[1]), partitions, size)
        return _psum_address(hardware, index, (place[0], place[1], place[2]), size)


def _sbuf_address(
    hardware: Hardware, index: tuple[int, ...], place: tuple[int, int], partitions: int, size: int
) -> tuple[int, int]:
    partition, byte = place
    limit, quadrant = hardware.partitions, hardware.partition_quadrant
    step = limit if partitions > 2 * quadrant else 2 * quadrant if partitions > quadrant else quadrant
    if partition not in range(0, limit, step):
        allowed = ", ".join(str(p) for p in range(0, limit, step))
        rule = f"start partition of {partitions} partitions, block {index}"
        _refuse(MemoryRegion.sbuf, "start_partition", rule, partition, allowed)
    usable = hardware.sbuf_usable_partition_bytes
    if byte < 0 or byte + size > usable:
        _refuse(
            MemoryRegion.sbuf,
            "byte_addr",
            f"bytes of block {index}",
            f"{byte}..{byte + size - 1}",
            f"0..{usable - 1} on {hardware.target}",
            source_of("sbuf_usable_partition_bytes", hardware.generation),
        )
    return partition, byte


def _psum_address(
    hardware: Hardware, index: tuple[int, ...], place: tuple[int, int, int], size: int
) -> tuple[int, int]:
    bank, partition, byte = place
    if not 0 <= bank < hardware.psum_banks:
        _refuse(MemoryRegion.psum, "bank_id", f"bank of block {index}", bank, f"0..{hardware.psum_banks - 1}")
    for operand, value in (("start_partition", partition), ("byte_addr", byte)):
        if value != 0:
            _refuse(MemoryRegion.psum, operand, f"place of block {index}", value, "0")
    if size > hardware.psum_bank_bytes:
        _refuse(
            MemoryRegion.psum, "func", "bytes per partition of a tile", size, f"1..{hardware.psum_bank_bytes}, one bank"
        )
    return 0, bank * hardware.psum_bank_bytes


class _Memory:
    """A memory as a `buffer=`: `auto_alloc()`."""

    region: MemoryRegion

    def place(self, _index: tuple[int, ...], _shape: Sequence[int], _itemsize: int) -> None:
        """Anywhere: the compiler chooses."""

    def auto_alloc(self) -> MemoryRegion:
        """The compiler chooses: the same as `buffer=nl.sbuf` or `buffer=nl.psum`."""
        return self.region


class _Sbuf(_Memory):
    """`nki.compiler.sbuf`: tiles in SBUF."""

    region = MemoryRegion.sbuf

    def alloc(self, func: Any) -> Allocation:
        """Each tile at `func(block index, partitions, bytes per partition)` = (start partition, byte)."""
        return Allocation(self.region, _function(self.region, func))

    def mod_alloc(
        self, *, base_addr: int, base_partition: int = 0, num_par_tiles: Any = (), num_free_tiles: Any = ()
    ) -> Allocation:
        """Tile `index` at the physical tile `index % counts`, bytes from `base_addr` on.

        Args:
            base_addr: first byte in each partition.
            base_partition: first partition; 0 in SDK 2.26.
            num_par_tiles: physical tiles along the partitions per block dimension, or ().
            num_free_tiles: physical tiles along the free dimension per block dimension, or ().
        """
        _check_integer(self.region, "base_addr", base_addr)
        if _check_integer(self.region, "base_partition", base_partition) != 0:
            _refuse(self.region, "base_partition", "value", base_partition, "0")
        par = _counts(self.region, "num_par_tiles", num_par_tiles)
        free = _counts(self.region, "num_free_tiles", num_free_tiles)

        def place(index: tuple[int, ...], partitions: int, size: int) -> tuple[int, ...]:
            return base_partition + _modulo(index, par) * partitions, base_addr + _modulo(index, free) * size

        return Allocation(self.region, place, (("num_par_tiles", par), ("num_free_tiles", free)))


class _Psum(_Memory):
    """`nki.compiler.psum`: tiles in PSUM banks."""

    region = MemoryRegion.psum

    def alloc(self, func: Any) -> Allocation:
        """Each tile at `func(block index, partitions, bytes per partition)` = (bank, start partition, byte).

        Start partition and byte are 0 in SDK 2.26, and a tile is at most one bank.
        """
        return Allocation(self.region, _function(self.region, func))

    def mod_alloc(
        self,
        *,
        base_bank: int,
        base_addr: int = 0,
        base_partition: int = 0,
        num_bank_tiles: Any = (),
        num_par_tiles: Any = (),
        num_free_tiles: Any = (),
    ) -> Allocation:
        """Tile `index` in bank `base_bank + index % num_bank_tiles`.

        Args:
            base_bank: first bank.
            base_addr: first byte in a bank; 0 in SDK 2.26.
            base_partition: first partition; 0 in SDK 2.26.
            num_bank_tiles: banks per block dimension, or ().
            num_par_tiles: () or ones in SDK 2.26.
            num_free_tiles: () or ones in SDK 2.26.
        """
        _check_integer(self.region, "base_bank", base_bank)
        for operand, value in (("base_addr", base_addr), ("base_partition", base_partition)):
            if _check_integer(self.region, operand, value) != 0:
                _refuse(self.region, operand, "value", value, "0")
        banks = _counts(self.region, "num_bank_tiles", num_bank_tiles)
        ones = []
        for operand, value in (("num_par_tiles", num_par_tiles), ("num_free_tiles", num_free_tiles)):
            counts = _counts(self.region, operand, value)
            if set(counts) - {1}:
                _refuse(self.region, operand, "value", value, "() or ones")
            ones.append((operand, counts))

        def place(index: tuple[int, ...], _partitions: int, _size: int) -> tuple[int, ...]:
            return base_bank + _modulo(index, banks), 0, 0

        return Allocation(self.region, place, (("num_bank_tiles", banks), *ones))


sbuf = _Sbuf()
psum = _Psum()


def _modulo(index: tuple[int, ...], counts: tuple[int, ...]) -> int:
    """The number of the physical tile, row-major over `counts`, of the logical tile `index`; () means one tile."""
    number = 0
    for i, n in zip(index, counts, strict=False):
        number = number * n + i % n
    return number


def _function(region: MemoryRegion, func: Any) -> Place:
    """The kernel's function, called with the keywords of the page where it takes them, else by position."""
    if not callable(func):
        raise TypeError(f"nki.compiler.{region.value}.alloc.func: received {func!r}, allowed a function")
    try:
        inspect.signature(func).bind(idx=(), pdim_size=0, fdim_size=0)
    except TypeError:
        by_position: Place = func
        return by_position
    return lambda index, partitions, size: func(idx=index, pdim_size=partitions, fdim_size=size)


def _check_integer(region: MemoryRegion, operand: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"nki.compiler.{region.value}.mod_alloc.{operand}: received {value!r}, allowed an int")
    if value < 0:
        _refuse(region, operand, "value", value, ">= 0")
    return value


def _counts(region: MemoryRegion, operand: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value
    ):
        _refuse(region, operand, "value", repr(value), "a tuple of integers >= 1")
    return tuple(value)


def _refuse(
    region: MemoryRegion, operand: str, rule: str, received: object, allowed: object, source: str = ""
) -> NoReturn:
    page = SBUF_PAGE if region is MemoryRegion.sbuf else PSUM_PAGE
    raise NkiError(
        f"nki.compiler.{region.value}", operand, rule, received=received, allowed=allowed, source=source or page
    )


# ---------------------------------------------------------------------------------------------------
# Decorators and directives


def skip_middle_end_transformations(func: Any = None) -> Any:
    """Mark a kernel: the compiler's middle end leaves it alone. No effect in the simulator."""
    return _decorate("skip_middle_end_transformations", func)


def enable_stack_allocator(func: Any = None, log_level: int = 50) -> Any:
    """Mark a kernel: on-chip tensors go on a stack. No effect in the simulator.

    `skip_middle_end_transformations` must stand beside it.

    Args:
        func: kernel, where used without arguments.
        log_level: of the allocator.
    """
    if isinstance(log_level, bool) or not isinstance(log_level, int):
        raise TypeError(f"enable_stack_allocator.log_level: received {log_level!r}, allowed an int")
    return _decorate("enable_stack_allocator", func)


def force_auto_alloc(func: Any = None) -> Any:
    """Mark a kernel: `alloc` and `mod_alloc` in it count as `auto_alloc`."""
    return _decorate("force_auto_alloc", func)


def _decorate(option: str, func: Any) -> Any:
    def mark(kernel: Any) -> Any:
        if not callable(kernel):
            raise TypeError(f"{option}: received {kernel!r}, allowed a function or a kernel")
        setattr(kernel, _OPTIONS, options_of(kernel) | {option})
        return kernel

    return mark if func is None else mark(func)


def options_of(kernel: Any) -> frozenset[str]:
    """Names of the compiler decorators on a kernel object or on the function in it."""
    found: frozenset[str] = getattr(kernel, _OPTIONS, frozenset()) | getattr(
        inspect.unwrap(kernel), _OPTIONS, frozenset()
    )
    return found


def keep_options(kernel: Any, other: Any) -> None:
    """Give `other`, a kernel made of `kernel`, the compiler decorators of that."""
    setattr(other, _OPTIONS, options_of(kernel))


class Directive:
    """A value for the `directives=` of a loop iterator; it has no effect in the simulator."""


@dataclass(frozen=True)
class MultiBuffer(Directive):
    """Ask for `factor` buffers of each tensor declared in the loop."""

    factor: int


@dataclass(frozen=True)
class OrderGuard(Directive, AbstractContextManager["OrderGuard"]):
    """Ask the compiler to keep the order of operations; program order is the simulator's anyway."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the block."""


@dataclass(frozen=True)
class AllocationScope(AbstractContextManager["AllocationScope"]):
    """A block whose tensors the stack allocator frees at its end; the simulator counts real uses instead."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the block."""


def multi_buffer(factor: int = 2) -> MultiBuffer:
    """A directive for loops: `factor` buffers per tensor."""
    if isinstance(factor, bool) or not isinstance(factor, int):
        raise TypeError(f"multi_buffer.factor: received {factor!r}, allowed an int")
    if factor < 1:
        raise ValueError(f"multi_buffer.factor: received {factor}, allowed >= 1")
    return MultiBuffer(factor)


def no_reorder() -> OrderGuard:
    """A directive for loops, and a block for `with`: operations keep their order."""
    return OrderGuard()


def allocation_scope() -> AllocationScope:
    """A block for `with`, at whose end the stack allocator frees the block's tensors."""
    return AllocationScope()


def is_directive(value: Any) -> bool:
    """Whether a loop iterator's `directives=` takes the value."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(v, Directive) for v in values)


# ---------------------------------------------------------------------------------------------------
# A launch


@dataclass
class _State:
    """What a kernel asked of the allocators so far."""

    options: frozenset[str] = frozenset()
    # The first tensor that the kernel placed.
    direct: Site | None = None
    # The first call that makes a tensor of its own, which an allocated kernel may not: instruction, rule, advice, line.
    implicit: tuple[str, str, str, Site] | None = None


_states: WeakKeyDictionary[Core, _State] = WeakKeyDictionary()


def _state() -> _State:
    core = current_core("nki.compiler")
    found = _states.get(core)
    if found is None:
        found = _states[core] = _State()
    return found


def begin(core: Core, kernel: Any) -> None:
    """A launch of `kernel` begins on `core`.

    Raises:
        NkiError: `enable_stack_allocator` without `skip_middle_end_transformations`.
    """
    options = options_of(kernel)
    if "enable_stack_allocator" in options and "skip_middle_end_transformations" not in options:
        raise NkiError(
            "nki.compiler",
            "enable_stack_allocator",
            "decorators",
            received="enable_stack_allocator alone",
            allowed="skip_middle_end_transformations beside it",
            source="nki.compiler.enable_stack_allocator, SDK 2.26",
        )
    _states[core] = _State(options)


def note_implicit(instruction: str, rule: str, allowed: str) -> None:
    """Remember a call that makes a tensor of its own; `finish` refuses it in a kernel that places its tensors."""
    state = _state()
    if state.implicit is None:
        state.implicit = (instruction, rule, allowed, call_site())


def finish(core: Core) -> None:
    """Apply the rules of kernels that place tensors themselves, at the end of the launch on `core`.

    Raises:
        NkiError: an on-chip tensor in use that the kernel did not place; an instruction with a tensor of its own.
    """
    state = _states.get(core, _State())
    placed = state.direct
    if placed is None:
        # The compiler places the tensors, and spills.
        core.spills = True
        return
    for info in core.storages:
        if info.address is None and info.first_use >= 0:
            raise NkiError(
                "ndarray",
                info.name,
                "automatic beside direct allocation",
                received=f"a tensor in {info.buffer.value} without a place; placed ones from line {placed.line}",
                allowed="alloc or mod_alloc for every on-chip tensor of the kernel, or for none",
                source=GUIDE,
                site=info.site,
                caller=info.caller,
            )
    if state.implicit is not None:
        instruction, rule, allowed, site = state.implicit
        raise NkiError(
            instruction,
            "",
            f"{rule} in a kernel with direct allocation",
            received=f"a placed tensor from line {placed.line}",
            allowed=allowed,
            source=ERRORS,
            site=site,
        )
