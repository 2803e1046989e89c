"""What each engine has to do per tile of scores in prefill attention, for several data flows, and what follows.

Costs are those of `nkisim.latency.costs` on NeuronCore-v3 and later, two-byte types: the Tensor Engine streams a column
per cycle, the Vector and the Scalar Engine an element per cycle and partition, copies from PSUM by the Vector Engine
run at twice that rate, and two float32 inputs from SBUF at half of it. Waits, drains and loads are not in a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import line, table
from contributed._checks import PARTITIONS
from nkisim import resolve_target
from nkisim.latency.constants import Constants
from nkisim.latency.transfers import core_rate

ENGINES = ("tensor", "vector", "scalar", "dma")
TILE = 512  # keys of a tile in tables, with 128 rows
CHUNK_TILES = 8  # of 128 keys, between two rescalings of the output
SELECTION_CHUNK_TILES = 4
BACKWARD_CHUNK_TILES = 4  # between two additions to dQ


@dataclass(frozen=True)
class Work:
    """Of one core, in units of each engine: columns, elements per partition, bytes.

    Args:
        tensor: cycles of the Tensor Engine.
        vector: cycles of the Vector Engine.
        scalar: cycles of the Scalar Engine.
        dma: bytes at the full rate.
    """

    tensor: float = 0.0
    vector: float = 0.0
    scalar: float = 0.0
    dma: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tensor + other.tensor, self.vector + other.vector, self.scalar + other.scalar, self.dma + other.dma
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.tensor * times, self.vector * times, self.scalar * times, self.dma * times)

    def ns(self, target: str) -> dict[str, float]:
        """Time of each engine."""
        c = Constants(resolve_target(target))
        return {
            "tensor": self.tensor / c.tensor_ghz,
            "vector": self.vector / c.vector_ghz,
            "scalar": self.scalar / c.scalar_ghz,
            "dma": self.dma / core_rate(c),
        }

    def bound_ns(self, target: str) -> float:
        """Time of the engine that is busy the longest."""
        return max(self.ns(target).values())


def useful(d: int) -> Work:
    """QK and PV of a tile of 128 rows and 128 keys."""
    return products(d) + weighing(d)


def products(d: int) -> Work:
    """QK of a tile."""
    return Work(tensor=-(-d // PARTITIONS) * PARTITIONS)


def weighing(d: int) -> Work:
    """PV of a tile, with P^T stationary."""
    return Work(tensor=d)


def always(d: int) -> Work:
    """What a tile costs before it may be skipped: its scores, and their maximum in each row."""
    return products(d) + Work(vector=PARTITIONS)


def kept(d: int, chunk_tiles: int = CHUNK_TILES) -> Work:
    """What a tile costs that is kept, in the data flow that is built."""
    return exponentials(chunk_tiles) + transposes() + weighing(d) + rescaling(d, chunk_tiles)


def exponentials(chunk_tiles: int = CHUNK_TILES) -> Work:
    """Exponentials of a tile, whose sums are read once per chunk."""
    read = Constants(resolve_target("trn2")).accumulator_read_cycles
    return Work(scalar=PARTITIONS + read / chunk_tiles)


def transposes() -> Work:
    """Transposes of P; the Vector and the Scalar Engine copy one half each out of PSUM."""
    return Work(tensor=PARTITIONS, vector=PARTITIONS / 2 / 2, scalar=PARTITIONS / 2)


def rescaling(d: int, chunk_tiles: int = CHUNK_TILES) -> Work:
    """Of the output to a new maximum, once per chunk."""
    return Work(vector=d / chunk_tiles)


def selection(m: int) -> Work:
    """N:M selection of a tile by the Tensor and the Scalar Engine, where all rows see all keys.

    Every one of the (m - 1) / 2 comparisons per score is a difference of two products with Q, a sign, and two additions
    to ranks; where ties keep both (m = 8), two signs. A minimum with the rank is one pass of the Vector Engine.
    """
    pairs = (m - 1) / 2 * PARTITIONS
    return Work(tensor=2 * pairs + 2 * pairs, scalar=pairs * (2 if m == 8 else 1), vector=PARTITIONS)


def selection_by_vector(m: int) -> Work:
    """The same with comparisons on the Vector Engine, whose two float32 inputs come from SBUF, at half rate."""
    pairs = (m - 1) / 2 * PARTITIONS
    return Work(tensor=2 * pairs, vector=2 * pairs * (2 if m == 8 else 1) + PARTITIONS)


def backward_useful(d: int) -> Work:
    """The five products of a tile: QK, do V^T, P^T do, ds^T Q, ds K."""
    return products(d) * 2 + weighing(d) * 3


def backward(d: int) -> Work:
    """Gradients of a tile that is kept, in the data flow that is built; one that is not has no part in them.

    The Tensor Engine transposes ds for dQ, and the Scalar Engine copies it out of PSUM, beside the exponentials; the
    Vector Engine makes ds of what is in PSUM, and adds to dQ.
    """
    return backward_useful(d) + Work(
        tensor=PARTITIONS, vector=PARTITIONS + d / BACKWARD_CHUNK_TILES, scalar=2 * PARTITIONS
    )


def backward_selection(m: int) -> Work:
    """N:M selection of a tile replayed: scores are copied out of PSUM, where there is no room for differences."""
    return Work(vector=PARTITIONS) + selection_by_vector(m)


def flows(d: int = 128) -> tuple[tuple[str, Work, str], ...]:
    """Data flows by what they do: name, work of a tile of 128 rows and 128 keys, and whether they are exact."""
    # S^T with keys on partitions: sums come from a column of ones beside V, maxima must be there before.
    transposed = products(d) + Work(tensor=d + 1, scalar=PARTITIONS)
    shift = Work(tensor=PARTITIONS)  # a product of ones with -m, added to S^T in PSUM
    maxima = Work(vector=PARTITIONS)
    # A transpose in SBUF has half the rate of a copy; P has two bytes per element.
    by_dma = Work(dma=2 * PARTITIONS * PARTITIONS * 2)
    selected = kept(d, SELECTION_CHUNK_TILES)
    return (
        ("A: queries on partitions, P transposed by TensorE (**built**)", always(d) + kept(d), "yes"),
        (
            "A with P transposed by DMA",
            always(d) + exponentials() + weighing(d) + rescaling(d) + by_dma,
            "yes",
        ),
        ("B: keys on partitions, no maximum", transposed, "no"),
        ("B after a pass over QK for the maximum over keys", transposed + products(d) + maxima + shift, "yes"),
        ("C: S for the row maximum, S^T for P", transposed + products(d) + maxima + shift + rescaling(d), "yes"),
        ("A with 2:4, differences and ranks by TensorE (**built**)", always(d) + selected + selection(4), "yes"),
        ("A with 2:4, comparisons by VectorE", always(d) + selected + selection_by_vector(4), "yes"),
        ("A with 4:8, differences and ranks by TensorE (**built**)", always(d) + selected + selection(8), "yes"),
        ("A with 4:8, comparisons by VectorE", always(d) + selected + selection_by_vector(8), "yes"),
        ("A with a tile skipped", always(d), "yes"),
    )


def flows_table(target: str, d: int = 128) -> str:
    """Times of the engines per tile of 128 rows and 512 keys, and what follows."""
    lines = []
    for name, work, exact in flows(d):
        tile = work * (TILE // PARTITIONS)
        ns = tile.ns(target)
        bound = tile.bound_ns(target)
        # A skipped tile has QK only.
        in_use = Work(tensor=min(work.tensor, useful(d).tensor)) * (TILE // PARTITIONS)
        share = in_use.ns(target)["tensor"]
        busiest = max(ENGINES, key=lambda engine: ns[engine])
        times = [f"{ns[engine]:.0f}" for engine in ENGINES]
        lines.append(line(name, *times, f"**{bound:.0f}** ({busiest})", f"{share / bound:.0%}", exact))
    columns = ("data flow", *(f"{engine} ns" for engine in ENGINES), "bound ns", "useful TensorE", "exact")
    return table(columns, lines)
