"""What is alive at once: SBUF bytes, PSUM banks, placed tensors, and where the error points."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nkisim
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.capacity import MemoryUse, Peak, check_capacity
from nkisim.dtypes import as_dtype
from nkisim.errors import NkiError, Site
from nkisim.hardware import TRN1, TRN2
from nkisim.memory import MemoryRegion, StorageInfo
from tests.nkisim.harness import refused, run

KIB = 1024
USABLE = {"trn1": 176 * KIB, "trn2": 224 * KIB - 16_392, "trn3": 256 * KIB - 16_392}


def line() -> int:
    """Line of the caller."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def sbuf(n: int, address: Any = None, partitions: int = 1) -> Any:
    return nl.ndarray((partitions, n), nl.uint8, address=address)


def psum(n: int, address: Any = None) -> Any:
    return nl.ndarray((1, n), nl.uint8, buffer=nl.psum, address=address)


def use(*tensors: Any) -> None:
    for t in tensors:
        nisa.memset(t[:, 0:1], 0)


def memory_of(kernel: Any, target: str = "trn2") -> MemoryUse:
    trace = nkisim.Trace()
    nkisim.simulate(kernel, target=target, trace=trace)()
    return trace.memory[0]


def stored(
    name: str, size: int, first: int, last: int, buffer: str = "sbuf", address: Any = None, partitions: int = 1
) -> StorageInfo:
    """A storage of `size` bytes per partition that is used from `first` to `last`."""
    region = MemoryRegion[buffer]
    site = Site(f"{name}.py", first, "kernel")
    return StorageInfo(0, name, region, (partitions, size), as_dtype("uint8"), site, address, first, last)


# -- SBUF


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_sbuf_holds_its_usable_bytes(target):
    def kernel():
        a, b = sbuf(USABLE[target] - 100), sbuf(100)
        use(a, b, a)

    assert memory_of(kernel, target).sbuf.amount == USABLE[target]


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_sbuf_over_by_a_byte(target):
    lines = []

    def kernel():
        a = sbuf(USABLE[target] - 100)
        lines.append(line() + 1)
        b = nl.ndarray((1, 101), nl.uint8, name="straw")
        use(a, b, a)

    error = refused(
        kernel,
        instruction="ndarray",
        operand="straw",
        rule="SBUF capacity",
        received=f"{USABLE[target] + 1} bytes per partition alive at once in 2 tensors",
        allowed=f"{USABLE[target]} bytes per partition on {target}",
        target=target,
    )
    assert error.site.line == lines[0]
    assert f"largest: 1 x {USABLE[target] - 100} B uint8[1, {USABLE[target] - 100}] from line" in error.received


def test_a_tensor_dies_with_its_last_use():
    def kernel():
        for _ in range(5):
            t = sbuf(150_000)
            use(t, t)

    peak = memory_of(kernel).sbuf
    assert (peak.amount, peak.position, len(peak.alive)) == (150_000, 0, 1)


def test_a_tensor_lives_from_its_first_use_not_its_allocation():
    def kernel():
        late, early = sbuf(150_000), sbuf(150_000)
        use(early, early)
        use(late)

    assert memory_of(kernel).sbuf.amount == 150_000


def test_one_instruction_keeps_its_operands_alive_together():
    def kernel():
        a, b = sbuf(120_000), nl.ndarray((1, 120_000), nl.uint8)
        nisa.memset(a[:, 0:8], 0)
        nisa.tensor_copy(b[:, 0:8], a[:, 0:8])

    refused(
        kernel,
        instruction="ndarray",
        operand="t2",
        rule="SBUF capacity",
        received="240000 bytes",
        allowed="212984",
    )


def test_unused_tensors_take_no_room():
    def kernel():
        sbuf(200_000)
        t = sbuf(200_000)
        use(t)

    assert memory_of(kernel).sbuf.amount == 200_000


def test_the_error_points_at_the_first_overflow():
    lines = []

    def kernel():
        a = sbuf(150_000)
        lines.append(line() + 1)
        b = nl.ndarray((1, 100_000), nl.uint8)
        use(a, b)
        c = sbuf(150_000)
        use(c, b, a)

    error = refused(
        kernel, instruction="ndarray", operand="t2", rule="SBUF capacity", received="250000", allowed="212984"
    )
    assert error.site.line == lines[0]


def test_bytes_follow_the_dtype_and_the_free_dimensions():
    def kernel():
        t = nl.ndarray((128, 3, 5), nl.bfloat16)
        u = nl.ndarray((2, 7), nl.float32, name="u")
        nisa.memset(t, 0.0)
        nisa.memset(u, 0.0)
        nisa.memset(t, 0.0)

    peak = memory_of(kernel).sbuf
    assert peak.amount == 30 + 28
    assert [s.name for s in peak.alive] == ["t1", "u"]


def test_float32_mode_counts_the_machines_bytes():
    def kernel():
        t = nl.ndarray((1, 100_000), nl.bfloat16)
        nisa.memset(t[:, 0:8], 0.0)

    run(kernel, precise=False)


def test_views_keep_their_storage_alive():
    def kernel():
        a = sbuf(120_000)
        part = a[:, 0:8]
        nisa.memset(part, 0)
        b = nl.ndarray((1, 120_000), nl.uint8)
        use(b)
        nisa.memset(part, 0)

    refused(kernel, instruction="ndarray", operand="t2", rule="SBUF capacity", received="240000", allowed="212984")


def test_tensors_on_other_partitions_do_not_add_up():
    def kernel():
        low, high = sbuf(150_000, (0, 0), 64), sbuf(150_000, (64, 0), 64)
        use(low, high, low)

    assert memory_of(kernel).sbuf.amount == 150_000


def test_the_fullest_partition_counts():
    bottom = stored("bottom", 1000, 0, 9, partitions=32)
    placed = stored("placed", 500, 1, 8, address=(64, 0), partitions=64)
    more = stored("more", 700, 2, 7, address=(96, 600), partitions=32)
    peak = check_capacity([bottom, placed, more], TRN2).sbuf
    assert (peak.amount, peak.position, [s.name for s in peak.alive]) == (1200, 2, ["placed", "more"])
    assert check_capacity([bottom], TRN2).sbuf.amount == 1000


def test_a_compiler_that_spills_warns_of_the_most_alive_at_once():
    storages = [stored(str(i), 100_000, i, 9) for i in range(4)]
    with pytest.raises(NkiError, match="received 300000 bytes per partition alive at once in 3 tensors"):
        check_capacity(storages, TRN2)
    with pytest.warns(UserWarning, match=r"received 400000 bytes per partition .* 4 tensors .*not modelled"):
        assert check_capacity(storages, TRN2, spills=True).sbuf.amount == 400_000


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 60_000), st.integers(0, 20), st.integers(0, 20), st.sampled_from([0, 32, 64])),
        max_size=12,
    )
)
def test_sbuf_peak_against_a_walk_over_time(tensors):
    storages = [
        stored(f"s{i}", size, min(a, b), max(a, b), address=(start, 0) if start else None, partitions=64)
        for i, (size, a, b, start) in enumerate(tensors)
    ]
    totals = {
        (now, p): sum(
            s.bytes_per_partition
            for s in storages
            if s.first_use <= now <= s.last_use and s.start_partition <= p < s.start_partition + 64
        )
        for now in range(21)
        for p in (0, 32, 64)
    }
    placed = [s for s in storages if s.address]
    clash = any(
        abs(a.start_partition - b.start_partition) < 64 and a.first_use <= b.last_use and b.first_use <= a.last_use
        for i, a in enumerate(placed)
        for b in placed[:i]
    )
    if max(totals.values()) > TRN1.sbuf_usable_partition_bytes:
        with pytest.raises(NkiError) as caught:
            check_capacity(storages, TRN1)
        assert caught.value.rule == "SBUF capacity"
    elif clash:
        with pytest.raises(NkiError) as caught:
            check_capacity(storages, TRN1)
        assert caught.value.operand == "address"
    else:
        assert check_capacity(storages, TRN1).sbuf.amount == max(totals.values())


# -- PSUM


@pytest.mark.parametrize(
    ("sizes", "banks"),
    [
        ([2048], 1),
        ([2047], 1),
        ([2049], 2),
        ([4096], 2),
        ([4097], 3),
        ([2048] * 8, 8),
        ([512] * 4, 1),
        ([512] * 5, 2),
        ([512] * 32, 8),
        ([1024, 1024, 512], 2),
        ([512, 2048, 512, 2048, 1024], 3),
        ([1500, 1500, 548, 548], 2),
        ([1025] * 8, 8),
        ([4096, 1024, 1024], 3),
        ([3000, 1000], 3),
        ([16384], 8),
        ([], 0),
    ],
)
def test_psum_banks(sizes, banks):
    def kernel():
        tensors = [psum(n) for n in sizes]
        use(*tensors)
        use(*tensors)

    assert memory_of(kernel).psum.amount == banks


@pytest.mark.parametrize("sizes", [[2048] * 9, [512] * 33, [1025] * 9, [4097, 4097, 4096, 512], [16384, 1]])
def test_psum_over(sizes):
    lines = []

    def kernel():
        tensors = [psum(n) for n in sizes[:-1]]
        lines.append(line() + 1)
        tensors.append(nl.ndarray((1, sizes[-1]), nl.uint8, nl.psum))
        use(*tensors)
        use(*tensors)

    error = refused(
        kernel,
        instruction="ndarray",
        operand=f"t{len(sizes)}",
        rule="PSUM capacity",
        received=f"9 banks alive at once in {len(sizes)} tensors",
        allowed="8 banks on trn2",
    )
    assert error.site.line == lines[0]


def test_psum_banks_come_free():
    def kernel():
        for _ in range(20):
            a, b = psum(8192), psum(8192)
            use(a, b, a)

    assert memory_of(kernel).psum.amount == 8


def test_placed_psum_tensors_hold_their_banks():
    def kernel():
        small = [psum(512, (0, 2048 * bank)) for bank in range(7)]
        use(*small)
        big = nl.ndarray((1, 4096), nl.uint8, nl.psum)
        use(big, *small)

    refused(kernel, instruction="ndarray", operand="t8", rule="PSUM capacity", received="9 banks", allowed="8 banks")


def test_small_tensors_share_the_bank_of_a_placed_one():
    def kernel():
        placed = psum(512, (0, 3 * 2048))
        rest = [psum(512) for _ in range(3)]
        use(placed, *rest, placed)

    assert memory_of(kernel).psum.amount == 1


def test_a_placed_tensor_over_several_banks():
    storages = [stored("wide", 3000, 0, 2, "psum", (0, 2048)), stored("small", 1000, 1, 3, "psum")]
    assert check_capacity(storages, TRN2).psum.amount == 2
    storages.append(stored("other", 200, 2, 3, "psum"))
    assert check_capacity(storages, TRN2).psum.amount == 3


def test_the_listing_counts_equal_tensors():
    storages = [stored(f"s{i}", 2048, 0, 1, "psum") for i in range(8)] + [stored("odd", 3000, 1, 1, "psum")]
    with pytest.raises(NkiError) as caught:
        check_capacity(storages, TRN2)
    assert "largest: 8 x 2048 B uint8[1, 2048] from line 0; 1 x 3000 B uint8[1, 3000] from line 1" in str(caught.value)


# -- placed tensors


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((0, 0), 64, 100), ((0, 99), 64, 100)),
        (((0, 100), 64, 100), ((0, 1), 64, 100)),
        (((0, 0), 64, 100), ((32, 50), 64, 10)),
        (((64, 0), 64, 100), ((0, 0), 65, 100)),
    ],
)
def test_placed_tensors_may_not_overlap(first, second):
    lines = []

    def kernel(x):
        a = sbuf(first[2], first[0], first[1])
        lines.append(line() + 1)
        b = nl.ndarray(second[1:], nl.uint8, address=second[0])
        for t in (a, b, a):
            nisa.dma_copy(t[0:1, 0:1], x)

    error = refused(
        kernel,
        np.zeros((1, 1), np.uint8),
        instruction="ndarray",
        operand="address",
        rule="two tensors placed on the same bytes while both are in use",
        received=f"t3 at {second[0]} over t2 at {first[0]} from line ",
        allowed="do not overlap",
    )
    assert error.site.line == lines[0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((0, 0), 64, 100), ((0, 100), 64, 100)),
        (((0, 0), 64, 100), ((64, 0), 64, 100)),
        (((32, 64), 32, 64), ((32, 0), 32, 64)),
    ],
)
def test_placed_tensors_beside_each_other(first, second):
    a = stored("a", first[2], 0, 9, address=first[0], partitions=first[1])
    b = stored("b", second[2], 1, 8, address=second[0], partitions=second[1])
    check_capacity([a, b], TRN2)


def test_an_address_is_used_again_after_its_last_use():
    def kernel():
        for i in range(6):
            t = sbuf(1000, (0, i % 2 * 1000))
            use(t, t)

    assert memory_of(kernel).sbuf.amount == 1000


def test_sbuf_and_psum_addresses_are_apart():
    storages = [stored("a", 100, 0, 5, "sbuf", (0, 0)), stored("b", 100, 1, 4, "psum", (0, 0))]
    use_ = check_capacity(storages, TRN2)
    assert (use_.sbuf.amount, use_.psum.amount) == (100, 1)


def test_reading_an_overwritten_tensor_is_an_overlap():
    # Used in between and again afterwards: the last use of `old` is after the first of `new`.
    storages = [stored("old", 64, 0, 9, address=(0, 0)), stored("new", 64, 5, 6, address=(0, 32))]
    with pytest.raises(NkiError) as caught:
        check_capacity(storages, TRN2)
    assert caught.value.site.file == "new.py"
    assert "new at (0, 32) over old at (0, 0) from line 0" in str(caught.value.received)
    check_capacity([stored("old", 64, 0, 4, address=(0, 0)), stored("new", 64, 5, 6, address=(0, 32))], TRN2)


def test_every_pair_is_compared():
    # The middle one ends before the last begins; the first is still there.
    storages = [
        stored("a", 64, 0, 9, address=(0, 0)),
        stored("b", 64, 1, 2, address=(0, 100)),
        stored("c", 64, 5, 6, address=(0, 40)),
    ]
    with pytest.raises(NkiError, match="c at"):
        check_capacity(storages, TRN2)


# -- results


def test_nothing_used():
    assert check_capacity([], TRN2) == MemoryUse(Peak(0, -1, ()), Peak(0, -1, ()))
    assert check_capacity([stored("a", 1, -1, -1)], TRN2) == MemoryUse()


def test_trace_holds_both_memories():
    def kernel():
        a, b = sbuf(300), psum(600)
        use(a)
        use(b, a)

    use_ = memory_of(kernel)
    assert (use_.sbuf.amount, use_.psum.amount) == (300, 1)
    assert (use_.sbuf.position, use_.psum.position) == (0, 1)
    assert use_.psum.alive[0].buffer is MemoryRegion.psum


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_the_error_names_the_source_of_the_target_only(target: str) -> None:
    def kernel() -> None:
        nl.ndarray((1, 64 * KIB), nl.float32)

    error = refused(
        kernel, instruction="ndarray", rule="bytes per partition", received="262144", allowed=target, target=target
    )
    own = {"trn1": "gen2", "trn2": "gen3", "trn3": "gen4"}[target]
    assert [g for g in ("gen2", "gen3", "gen4") if g in error.source] == [own]
