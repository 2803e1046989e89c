"""Where tensors of the `neuronxcc.nki` API live: roots, of blocks with a storage each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from nkisim.dtypes import Array, DType
from nkisim.errors import Site, call_sites, issued_at
from nkisim.language._creation import ndarray
from nkisim.layout import span
from nkisim.legacy._state import Scope, running_state
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.tensor import NkiTensor

if TYPE_CHECKING:
    from nkisim.legacy._tile import Tile


class Block:
    """One block of a root: a storage, and what of it no instruction has written."""

    __slots__ = ("left_out", "tensor", "zeros")

    def __init__(self, tensor: NkiTensor) -> None:
        self.tensor = tensor
        # PSUM of nl.zeros that nobody has read: [partitions, elements], None where there is none. The first
        # `+= nc_matmul` overwrites it, as the compiler would have it.
        self.zeros: Array | None = None
        # Whether a mask left out some of a sum: a later product may still begin it, a reader finds garbage there.
        self.left_out = False


class Spot(NamedTuple):
    """A rectangle of a tile in memory: a strided view of a block."""

    block: Block
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Root:
    """What `nl.ndarray` makes, a kernel argument, or another shape or element type of one.

    Args:
        name: shown in errors.
        shape: block dimensions, partition dimension, free dimensions; in HBM just dimensions.
        kind: element type.
        region: memory.
        n_block: number of block dimensions.
        new_block: makes the storage of a block.
        access: "own", "mutable" or "immutable" (parameters).
        scope: the loops around it.
    """

    __slots__ = (
        "__weakref__", "access", "blocks", "dims", "kind", "n_block", "name", "new_block", "on_chip", "region", "scope",
        "shape",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: DType,
        region: MemoryRegion,
        n_block: int,
        new_block: Callable[[tuple[int, ...]], Block],
        access: str = "own",
        scope: Scope = (),
    ) -> None:
        self.name = name
        self.shape = shape
        self.kind = kind
        self.region = region
        self.n_block = n_block
        self.new_block = new_block
        self.access = access
        self.scope = scope
        self.blocks: dict[tuple[int, ...], Block] = {}
        self.on_chip = region in ON_CHIP
        # Of the tile of all of it: each dimension is a function of the same one of the tile.
        self.dims = _same(len(shape))

    def block(self, index: tuple[int, ...]) -> Block:
        """A block, allocated at its first use."""
        found = self.blocks.get(index)
        if found is None:
            found = self.blocks[index] = self.new_block(index)
        return found

    def tile(self) -> Tile:
        """The tile of all of it."""
        from nkisim.legacy._tile import Tile

        return Tile(self, self.shape, self.dims, self.n_block)


@functools.cache
def _same(rank: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((0, tuple(1 if e == d else 0 for e in range(rank))) for d in range(rank))


def allocate(
    shape: tuple[int, ...],
    kind: DType,
    region: MemoryRegion,
    name: str = "",
    n_block: int = 0,
    address: Callable[[tuple[int, ...]], tuple[int, int] | None] | None = None,
    sites: tuple[Site, Site | None] | None = None,
    scope: Scope | None = None,
) -> Root:
    """A new root whose blocks get their storage at their first use; `address` places a block by its index."""
    sites = call_sites() if sites is None else sites
    inner = shape[n_block:]

    def new_block(index: tuple[int, ...]) -> Block:
        label = f"{name}[{', '.join(map(str, index))}]" if name and index else name
        place = None if address is None else address(index)
        with issued_at(sites):
            return Block(ndarray(inner, kind, region, label, place))

    return Root(name, shape, kind, region, n_block, new_block, "own", _scope() if scope is None else scope)


def _scope() -> Scope:
    running = running_state()
    return () if running is None else running.scope


def from_tensor(t: NkiTensor, name: str, access: str = "own", scope: Scope = ()) -> Root:
    """A root of one block over a tensor view of the simulator."""
    root = Root(name, t.shape, t.dtype, t.buffer, 0, lambda _: Block(t), access, scope)
    root.block(())
    return root


def columns(spot: Spot) -> tuple[int, int, int, int]:
    """First and last partition and first and last element in a partition of a spot on chip."""
    t = spot.block.tensor
    row = t.row_elements
    low, high = span(spot.shape[1:], spot.strides[1:])
    first = spot.offset // row
    return first, first + spot.shape[0] - 1, spot.offset % row + low, spot.offset % row + high
