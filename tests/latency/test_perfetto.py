"""The Chrome trace: valid JSON, a row per engine and queue, no overlaps in a row, shapes and lines on slices."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from contributed.decode_attention import decode_attention_gqa_fwd
from nkisim import isa as nisa
from nkisim import language as nl
from nkisim.latency import Estimate, estimate, perfetto
from nkisim.latency.report import summary
from tests.latency.kernels import estimated, new, tile


def decode() -> Estimate:
    q, cache = np.zeros((64, 4), ml_dtypes.bfloat16), np.zeros((2, 64, 300), ml_dtypes.bfloat16)
    trace = nkisim.Trace()
    nkisim.simulate(decode_attention_gqa_fwd, target="trn2", trace=trace)(q, cache, cache.copy(), 4, 2)
    return estimate(trace)


def every_queue() -> Estimate:
    def kernel(x: Any) -> None:
        t = tile((128, 64))
        at = tile((64, 1), nl.int32, value=0)
        nisa.nc_matmul(dst=new((64, 64), buffer=nl.psum), stationary=t, moving=t, name="product")
        nisa.activation(dst=new((128, 64)), op=nl.exp, data=t)
        nisa.iota(dst=new((128, 64), nl.int32), pattern=[[1, 64]])
        nisa.register_load(nisa.register_alloc(), at[0:1, 0:1])
        for mode in (nisa.dge_mode.none, nisa.dge_mode.hwdge):
            for _ in range(3):
                nisa.dma_copy(dst=new((64, 64)), src=x, dge_mode=mode)
        nisa.dma_copy(dst=new((64, 64)), src=x, dge_mode=nisa.dge_mode.hwdge, engine=nisa.engine.scalar)
        nisa.dma_copy(dst=new((64, 64)), src=x.ap([[64, 64], [1, 64]], vector_offset=at, indirect_dim=0))
        y = nl.ndarray((128, 64), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=y, src=t)

    return estimated(kernel, np.zeros((64, 64), np.float32))


def two_cores() -> Estimate:
    def kernel() -> None:
        tile((128, 64))

    return estimated(kernel, cores=2)


def rows(events: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Slices by the names of process and thread."""
    named = {(e["pid"], e.get("tid"), e["name"]): e["args"].get("name") for e in events if e["ph"] == "M"}
    found = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            process = named[e["pid"], None, "process_name"]
            found[process, named[e["pid"], e["tid"], "thread_name"]].append(e)
    return found


def test_a_file_that_loads(tmp_path: Any) -> None:
    path = tmp_path / "trace.json"
    perfetto.write({"decode": decode(), "other": every_queue()}, path)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["displayTimeUnit"] == "ns"
    assert {process for process, _ in rows(document["traceEvents"])} == {
        "decode (modelled, trn2, core 0)",
        "other (modelled, trn2, core 0)",
    }


def test_a_row_per_engine_and_queue() -> None:
    names = [name for _, name in rows(perfetto.events({"k": every_queue()}))]
    assert {name.rstrip(" 0123456789") for name in names} == {
        "tensor", "vector", "scalar", "gpsimd", "sync", "dma load", "dma store", "dma sync", "dma scalar", "dma gpsimd",
    }  # fmt: skip
    assert {"dma load 0", "dma store 0", "dma sync 0", "dma scalar 0", "dma gpsimd 0"} <= set(names)
    assert len(set(names)) == len(names)


def test_transfers_of_a_queue_that_overlap_get_rows_of_their_own() -> None:
    def kernel(x: Any) -> None:
        t = new((128, 8192))
        for start in (0, 32):
            nisa.dma_copy(dst=t[start : start + 32], src=x[start : start + 32])
        nisa.dma_copy(dst=t[64:128], src=x[64:128], dge_mode=nisa.dge_mode.hwdge)

    e = estimated(kernel, np.zeros((128, 8192), np.float32))
    names = sorted(name for _, name in rows(perfetto.events({"k": e})))
    assert names == ["dma load 0", "dma load 1", "dma sync 0"]


def test_engines_come_first() -> None:
    events = perfetto.events({"k": every_queue()})
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    shown = [names[t] for t in sorted(names, key=order.__getitem__)]
    assert shown[:5] == ["tensor", "vector", "scalar", "gpsimd", "sync"]
    assert shown[5:] == sorted(shown[5:])


@pytest.mark.parametrize("make", [decode, every_queue, two_cores])
def test_slices_of_a_row_never_overlap(make: Any) -> None:
    for slices in rows(perfetto.events({"k": make()})).values():
        at = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices)
        assert all(end <= begin + 1e-6 for (_, end), (begin, _) in pairwise(at))


@pytest.mark.parametrize("make", [decode, every_queue])
def test_every_instruction_that_takes_time_is_a_slice_with_shapes_and_line(make: Any) -> None:
    e = make()
    slices = [s for row in rows(perfetto.events({"k": e})).values() for s in row]
    assert len(slices) == sum(s.busy_ns > 0 for s in e.slots) > 0
    for s in slices:
        assert s["dur"] > 0
        assert s["args"]["writes"] or s["args"]["reads"]
        for operand in (*s["args"]["writes"], *s["args"]["reads"]):
            assert "[" in operand
            assert " in " in operand
        file, line = s["args"]["line"].rsplit(":", 1)
        assert file.endswith(".py")
        assert int(line) > 0
    assert max(s["ts"] + s["dur"] for s in slices) <= e.total_us + 1e-9


def test_a_slice_in_full() -> None:
    slices = rows(perfetto.events({"k": every_queue()}))["k (modelled, trn2, core 0)", "tensor"]
    (product,) = slices
    args = product["args"]
    assert product["name"] == "product"
    assert args["instruction"] == "nc_matmul"
    assert args["waited for"] == "data"
    assert [w.split(": ")[0] for w in args["writes"]] == ["dst"]
    assert "float32[64, 64] in psum" in args["writes"][0]
    assert [r.split(": ")[0] for r in args["reads"]] == ["stationary", "moving"]
    assert args["n"] == "64"


def test_each_core_is_a_process() -> None:
    found = rows(perfetto.events({"k": two_cores()}))
    assert [process for process, _ in found] == ["k (modelled, trn2, core 0)", "k (modelled, trn2, core 1)"]


def test_a_transfer_that_waited_for_dma_engines_is_drawn_from_its_turn() -> None:
    def kernel(x: Any) -> None:
        for i in range(2):
            nisa.dma_copy(dst=new((128, 4096)), src=x[i])

    e = estimated(kernel, np.zeros((2, 128, 4096), np.float32))
    found = rows(perfetto.events({"k": e}))["k (modelled, trn2, core 0)", "dma load 0"]
    assert [s["args"]["waited for"] for s in found] == ["start", "DMA engines"]
    assert found[1]["ts"] * 1000 == pytest.approx(e.slots[1].turn_ns)


def test_summary_has_every_number() -> None:
    e = decode()
    text = summary("decode", e)
    assert text.startswith(f"decode: modelled on trn2, {len(e.slots)} instructions\n")
    for number in (e.total_us, e.dma_bound_us, e.compute_bound_us, e.busy_us["0 vector"], e.busy_us["0 dma"]):
        assert f"{number:.2f} us" in text
    assert f"{e.hbm_read_bytes:,} bytes read, {e.hbm_write_bytes:,} written" in text
    assert f"{e.n_assumed:>12} constants: {', '.join(e.assumed)}" in text
    assert text.count("decode_attention.py:") >= 10
    assert f"{e.utilisation['0 vector']:.1%}" in text


def test_summary_of_nothing_assumed() -> None:
    def kernel() -> None:
        nisa.memset(dst=new((128, 960)), value=1)

    e = estimated(kernel, target="trn1")
    assert "0 constants: none" in summary("k", e)
    assert "0 vector 0.86 us (90.6%)" in summary("k", e)
