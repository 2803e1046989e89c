"""What a kernel did, instruction by instruction: frozen records that the latency model reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nkisim.capacity import MemoryUse
from nkisim.dtypes import DType
from nkisim.errors import Site
from nkisim.memory import StorageInfo


class Engine(Enum):
    """Who executes an instruction. Members are documented as `nki.isa.engine`."""

    tensor = 1
    vector = 5
    scalar = 2
    gpsimd = 3
    dma = 4
    sync = 6
    unknown = 0

    __hash__ = object.__hash__


# Both fill their dictionary at once: a frozen class of its own sets one attribute after the other, in twice the time.
@dataclass(frozen=True, init=False)
class Access:
    """One operand as it was touched: a strided range of a storage, or rows of it.

    `offset` and `strides` count elements of `dtype`. `rows` are the start offsets of an indirect
    access along dimension 0 (rows that were skipped are absent), else None. `dynamic`: part of the address
    was known at run time only.
    """

    operand: str
    storage: StorageInfo
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    rows: tuple[int, ...] | None = None
    dynamic: bool = False

    def __init__(
        self,
        operand: str,
        storage: StorageInfo,
        dtype: DType,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        rows: tuple[int, ...] | None = None,
        dynamic: bool = False,
    ) -> None:
        self.__dict__.update(
            operand=operand,
            storage=storage,
            dtype=dtype,
            shape=shape,
            strides=strides,
            offset=offset,
            rows=rows,
            dynamic=dynamic,
        )

    @property
    def n_elements(self) -> int:
        """Elements moved, partitions included; of an indirect access those of its rows."""
        return self.free_size * (self.shape[0] if self.rows is None else len(self.rows))

    @property
    def free_size(self) -> int:
        """Elements per partition."""
        n = 1
        for size in self.shape[1:]:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        """Bytes moved."""
        return self.n_elements * self.dtype.itemsize


@dataclass(frozen=True, init=False)
class Record:
    """One executed instruction. `attrs` holds what its cost depends on besides the operands."""

    index: int
    core: int
    engine: Engine
    instruction: str
    name: str | None
    site: Site
    writes: tuple[Access, ...]
    reads: tuple[Access, ...]
    attrs: dict[str, Any]

    def __init__(
        self,
        index: int,
        core: int,
        engine: Engine,
        instruction: str,
        name: str | None,
        site: Site,
        writes: tuple[Access, ...],
        reads: tuple[Access, ...],
        attrs: dict[str, Any],
    ) -> None:
        self.__dict__.update(
            index=index,
            core=core,
            engine=engine,
            instruction=instruction,
            name=name,
            site=site,
            writes=writes,
            reads=reads,
            attrs=attrs,
        )


@dataclass
class Trace:
    """Records of one run in program order per core, and the memory each core used."""

    target: str = ""
    records: list[Record] = field(default_factory=list)
    memory: dict[int, MemoryUse] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)

    def count(self, instruction: str | None = None, engine: Engine | None = None, core: int | None = None) -> int:
        """How many records match."""
        return sum(
            (instruction is None or r.instruction == instruction)
            and (engine is None or r.engine is engine)
            and (core is None or r.core == core)
            for r in self.records
        )

    def counts(self) -> dict[str, int]:
        """Executed instructions by name, most frequent first."""
        return dict(Counter(r.instruction for r in self.records).most_common())
