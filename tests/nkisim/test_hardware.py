"""The table of hardware numbers, and that no other file of the simulator holds one."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import nkisim
from nkisim import hardware
from nkisim.hardware import GEN2, GEN3, GEN4, TARGETS, TRN1, TRN2, TRN3, Hardware, resolve_target, source_of

FACTS = [f for f in dataclasses.fields(Hardware) if f.name not in ("target", "generation")]
PACKAGE = Path(nkisim.__file__).parent

# What is not in any document; a number that joins this list needs its reason in the table.
ASSUMED = {
    "sbuf_usable_partition_bytes": (GEN4,),
    "psum_min_align_bytes": (GEN2, GEN3, GEN4),
    "sbuf_min_align_bytes": (GEN2, GEN3, GEN4),
}


@pytest.mark.parametrize("fact", FACTS, ids=lambda f: f.name)
def test_every_number_has_values_unit_and_source(fact):
    assert set(fact.metadata["values"]) == {GEN2, GEN3, GEN4}
    assert fact.metadata["unit"]
    assert len(fact.metadata["source"]) >= 2
    assert source_of(fact.name) == fact.metadata["source"]
    assert set(fact.metadata["assumed"]) <= {GEN2, GEN3, GEN4}


@pytest.mark.parametrize("fact", FACTS, ids=lambda f: f.name)
def test_records_hold_the_tables_values(fact):
    for record, generation in ((TRN1, GEN2), (TRN2, GEN3), (TRN3, GEN4)):
        assert record.generation == generation
        assert getattr(record, fact.name) == fact.metadata["values"][generation]
    kinds = {type(value) for value in fact.metadata["values"].values()}
    assert len(kinds) == 1 or kinds == {int, float}


def test_memory_numbers():
    kib = 1024
    for hw, sbuf, usable in (
        (TRN1, 192 * kib, 176 * kib),
        (TRN2, 224 * kib, 212_984),
        (TRN3, 256 * kib, 256 * kib - 16_392),
    ):
        assert (hw.partitions, hw.partition_quadrant) == (128, 32)
        assert hw.sbuf_partition_bytes == sbuf
        assert hw.sbuf_usable_partition_bytes == usable
        assert (hw.psum_banks, hw.psum_bank_bytes, hw.psum_partition_bytes) == (8, 2048, 16 * kib)
        assert hw.partitions * sbuf == {192: 24, 224: 28, 256: 32}[sbuf // kib] * kib * kib


def test_access_pattern_numbers():
    for hw in (TRN1, TRN2, TRN3):
        assert hw.view_max_dims == 5
        assert (hw.access_stride_min, hw.access_stride_max, hw.access_count_max) == (-(2**15), 2**15 - 1, 2**16 - 1)
        assert (hw.sbuf_access_max_elements, hw.psum_access_max_elements) == (64 * 1024, 4 * 1024)


@pytest.mark.parametrize(("nbytes", "share"), [(128, 0.052), (256, 0.104), (512, 0.208), (1024, 0.424)])
def test_a_static_transfers_queue_time_is_the_level_part_of_the_published_throughput(nbytes, share):
    each = 128 * nbytes / (share * 368)
    assert TRN2.dma_static_queue_ns == pytest.approx(each, rel=0.02)
    assert TRN2.dma_swdge_ns == pytest.approx(39.89e6 / 66048, rel=1e-3)
    assert TRN1.dma_static_queue_ns == TRN1.dma_swdge_ns == 0


def test_memory_assumptions_are_listed():
    memory = [f for f in FACTS if f.name.startswith(("sbuf_", "psum_", "partition", "access_", "view_"))]
    assert {f.name: f.metadata["assumed"] for f in memory if f.metadata["assumed"]} == ASSUMED
    for f in memory:
        if f.metadata["assumed"]:
            assert "assumed" in f.metadata["source"] or "not printed" in f.metadata["source"]


def test_source_of_an_unknown_number():
    with pytest.raises(KeyError, match="psum_colour"):
        source_of("psum_colour")
    with pytest.raises(KeyError):
        source_of("target")


def test_targets():
    assert {name: (hw.generation, hw.target) for name, hw in TARGETS.items()} == {
        "trn1": (2, "trn1"), "inf2": (2, "inf2"), "gen2": (2, "trn1"), "trn2": (3, "trn2"), "gen3": (3, "trn2"),
        "trn3": (4, "trn3"), "gen4": (4, "trn3"),
    }  # fmt: skip


def test_resolve_target(monkeypatch):
    monkeypatch.delenv(hardware.TARGET_VARIABLE, raising=False)
    assert resolve_target() is TRN3
    assert resolve_target("inf2").target == "inf2"
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "gen2")
    assert resolve_target() is TRN1
    assert resolve_target("trn2") is TRN2
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "")
    assert resolve_target() is TRN3
    with pytest.raises(ValueError, match="target: received 'trn9', allowed trn1, inf2, gen2, trn2, gen3, trn3, gen4"):
        resolve_target("trn9")


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TRN2.partitions = 64


# -- no other file holds a hardware number

LIMITS = {128, 512, 2048, 4096, 8192, 16384, 32767, 32768, 65535, 65536, 176 * 1024, 192 * 1024, 224 * 1024, 256 * 1024}
# Numbers that are a choice of ours and only look like a limit.
CHOICES = {("_fill.py", 2048)}  # elements of the tile that HBM tensors are filled from
MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.name != "hardware.py" and path.parent.name in ("nkisim", "isa", "language")
)


def _numbers(path: Path) -> list[tuple[int, int]]:
    """Integer literals of a module that equal a hardware limit, with their lines."""
    tree = ast.parse(path.read_text())
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and type(node.value) is int
        and node.value in LIMITS
        and (path.name, node.value) not in CHOICES
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_limits_stand_in_the_table_only(path):
    assert not _numbers(path), f"{path.name}: numbers of the hardware belong into hardware.py"


def test_the_search_for_limits_finds_them(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""128 in a docstring."""\nx = "512"\nlimit = 2048  # 4096\n')
    assert _numbers(module) == [(3, 2048)]


def test_the_part_of_a_source_for_one_generation():
    latency = source_of("dma_static_latency_ns", GEN4)
    assert "gen2 and gen4" in latency
    assert "gen3" not in latency
    assert "gen3" in source_of("dma_static_latency_ns", GEN3)
    assert source_of("dma_compute_efficiency", GEN2) == source_of("dma_compute_efficiency")
