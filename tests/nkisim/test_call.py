"""`Call`: the operand checks that all instructions share, each with a kernel that breaks it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nkisim
from nkisim import language as nl
from nkisim.dtypes import ALL, float32, int32
from nkisim.hardware import A2
from nkisim.isa._call import COMPUTABLE, Call, NkiInstruction
from nkisim.trace import Engine
from tests.nkisim.harness import TARGETS, integers, normal, out, ps, refused, run, sb, tile, traced
from tests.nkisim.tensors import tensor

SBUF = (nl.sbuf,)


def probe(t: Any, **limits: Any) -> Any:
    """An instruction with one operand x, which it only checks."""
    call = Call("probe")
    assert call.tile("x", t, **limits) is t
    return call.record(Engine.vector)


def passes(make: Any, target: str = "trn2", **limits: Any) -> None:
    def kernel():
        probe(make(), **limits)

    run(kernel, target=target)


def breaks(make: Any, rule: str, received: str, allowed: str, target: str = "trn2", **limits: Any) -> nkisim.NkiError:
    def kernel():
        probe(make(), **limits)

    with pytest.raises(nkisim.NkiError) as caught:
        run(kernel, target=target)
    error = caught.value
    assert (error.instruction, error.operand, error.site.function) == ("probe", "x", "probe"), str(error)
    assert rule in error.rule, str(error)
    assert received in str(error.received), str(error)
    assert allowed in str(error.allowed), str(error)
    assert error.source
    return error


# -- the call itself


def test_outside_a_kernel():
    with pytest.raises(RuntimeError, match=r"nki\.isa\.probe: called outside a kernel"):
        Call("probe")


def test_name_is_a_string():
    def kernel():
        Call("probe", 3)

    with pytest.raises(TypeError, match=r"probe\.name: received 3, allowed a string or None"):
        run(kernel)


def test_refuse_names_the_instructions_own_page():
    def kernel():
        Call("probe").refuse("x", "rule", 1, 2)

    error = refused(kernel, instruction="probe", operand="x", rule="rule", received="1", allowed="2")
    assert error.source == "nki.isa.probe, NKI 0.6"
    assert error.site.function == "kernel"


def test_refuse_with_another_source():
    def kernel():
        Call("probe").refuse("x", "rule", 1, 2, "the guide")

    assert (
        refused(kernel, instruction="probe", operand="x", rule="rule", received="1", allowed="2").source == "the guide"
    )


def test_require():
    def kernel(ok):
        Call("probe").require(ok, "x", "rule", 1, 2)

    run(kernel, True)

    def bad():
        Call("probe").require(False, "x", "rule", 1, 2)

    refused(bad, instruction="probe", operand="x", rule="rule", received="1", allowed="2")


def test_need_generation():
    def kernel():
        Call("probe").need_generation(3)

    run(kernel, target="trn2")
    run(kernel, target="trn3")
    refused(
        kernel,
        instruction="probe",
        rule="target",
        received="trn1",
        allowed="NeuronCore-v3 or newer",
        target="trn1",
    )


# -- what an operand is


@pytest.mark.parametrize("value", [None, 3, np.zeros((2, 2), np.float32), "t"])
def test_operand_is_a_tensor(value):
    breaks(lambda: value, "type", type(value).__name__, "NkiTensor")


def test_operand_buffers():
    for buffer in (nl.sbuf, nl.psum):
        passes(lambda b=buffer: tile((2, 2), buffer=b))
    breaks(lambda: tile((2, 2), buffer=nl.hbm), "buffer", "private_hbm", "sbuf or psum")
    breaks(lambda: tile((2, 2), buffer=nl.shared_hbm), "buffer", "shared_hbm", "sbuf or psum")
    breaks(lambda: tile((2, 2), buffer=nl.psum), "buffer", "psum", "sbuf", buffers=SBUF)
    passes(lambda: tile((2, 2), buffer=nl.hbm), buffers=(nl.hbm,))


def test_operand_dtypes():
    assert set(COMPUTABLE) == {name for name, d in ALL.items() if d.kind != "packed" and name != "float8_e8m0fnu"}
    for d in ALL.values():
        if d in COMPUTABLE:
            passes(lambda d=d: tile((2, 2), d), "trn3")
        else:
            breaks(lambda d=d: tile((2, 2), d), "dtype", d, "bool_, int8", "trn3")
    breaks(lambda: tile((2, 2)), "dtype", "float32", "int32", dtypes=(int32,))
    passes(lambda: tile((2, 2), nl.float8_e8m0fnu), "trn3", dtypes=(nl.float8_e8m0fnu,))


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_ocp_float8_is_new_on_trn3(target):
    breaks(lambda: tile((2, 2), nl.float8_e4m3fn), "dtype", f"float8_e4m3fn on {target}", "float8_e4m3", target)
    passes(lambda: tile((2, 2), nl.float8_e4m3), target)
    passes(lambda: tile((2, 2), nl.float8_e4m3fn), "trn3")


# -- partitions


def test_partitions():
    passes(lambda: tile((128, 2)))
    # No operation makes such a view, so this one is put together by hand.
    error = breaks(lambda: tensor((129, 2)), "partitions", "129", "1..128")
    assert error.source == A2


LEGAL_STARTS = {1: (0, 32, 64, 96), 32: (0, 32, 64, 96), 33: (0, 64), 64: (0, 64), 65: (0,), 128: (0,)}


@pytest.mark.parametrize("buffer", ["sbuf", "psum"])
@pytest.mark.parametrize("n", sorted(LEGAL_STARTS))
def test_start_partitions(n, buffer):
    allowed = ", ".join(str(s) for s in LEGAL_STARTS[n])
    for start in {0, 1, 16, 31, 32, 33, 48, 63, 64, 65, 95, 96, 127}:
        if start + n > 128:
            continue
        view = lambda s=start: tile((128, 4), buffer=getattr(nl, buffer))[s : s + n, 1:3]  # noqa: E731
        if start in LEGAL_STARTS[n]:
            passes(view)
        else:
            error = breaks(view, f"start partition of {n} partitions", str(start), allowed)
            assert error.received == start
            assert error.allowed == allowed


@pytest.mark.parametrize("n", sorted(LEGAL_STARTS))
def test_start_partitions_of_placed_tensors(n):
    for start in (0, 8, 32, 64, 96):
        if start + n > 128:
            continue
        view = lambda s=start: nl.ndarray((n, 4), nl.float32, address=(s, 0))  # noqa: E731
        if start in LEGAL_STARTS[n]:
            passes(view)
        else:
            breaks(view, f"start partition of {n} partitions", str(start), str(LEGAL_STARTS[n][-1]))


def test_start_partition_adds_up():
    def view():
        return nl.ndarray((64, 4), nl.bfloat16, address=(32, 0))[32:64].view(nl.uint8)[0:32, 1:]

    passes(view)
    breaks(lambda: view()[16:32], "start partition of 16 partitions", "80", "0, 32, 64, 96")


def test_a_start_partition_rule_of_ones_own():
    passes(lambda: tile((128, 4))[3:7], any_start=True)


# -- the access pattern


def test_strides_are_16_bits():
    passes(lambda: tile((1, 3, 32767), nl.uint8)[:, :, 0:2])
    breaks(
        lambda: tile((1, 3, 32768), nl.uint8)[:, :, 0:2],
        "free stride (int16)",
        "32768",
        "-32768..32767 elements",
    )
    passes(lambda: tile((1, 40000), nl.uint8).ap([[40000, 1], [-32768, 2]], 32768))
    breaks(
        lambda: tile((1, 40000), nl.uint8).ap([[40000, 1], [-32769, 2]], 32769),
        "free stride (int16)",
        "-32769",
        "-32768..32767",
    )


def test_strides_count_elements_of_the_views_dtype():
    passes(lambda: tile((1, 3, 32768), nl.uint8).view(nl.bfloat16)[:, :, 0:2])
    breaks(lambda: tile((1, 2, 16384), nl.float32).view(nl.uint8)[:, :, 0:2], "free stride (int16)", "65536", "32767")


def test_strides_of_single_elements_do_not_count():
    passes(lambda: tile((2, 2, 40000), nl.uint8)[:, 1:2, 0:8])


def test_the_partition_stride_has_no_such_limit():
    passes(lambda: tile((4, 40000), nl.uint8)[:, 0:8])


def test_counts_are_16_bits():
    passes(lambda: tile((1, 65535), nl.uint8))
    breaks(lambda: tile((1, 65536), nl.uint8), "free dimension (uint16)", "65536", "1..65535 elements")
    passes(lambda: tile((1, 4, 16384), nl.uint8))


def test_free_sizes():
    passes(lambda: tile((1, 4, 16384), nl.uint8))
    breaks(lambda: tile((1, 5, 16384), nl.uint8), "elements per partition", "81920", "1..65536")
    passes(lambda: tile((1, 4096), nl.uint8, nl.psum))
    breaks(lambda: tile((1, 4097), nl.uint8, nl.psum), "elements per partition", "4097", "1..4096")
    breaks(lambda: tile((1, 4, 1025), nl.uint8, nl.psum), "elements per partition", "4100", "1..4096")
    passes(lambda: tile((1, 8192), nl.uint8, nl.psum), free_max=8192)
    breaks(lambda: tile((1, 513)), "elements per partition", "513", "1..512", free_max=512)


def test_legal_tiles_before_change_nothing():
    """Patterns found legal are remembered, with all that they were legal by."""

    def after(legal: Any, make: Any) -> Any:
        def second() -> Any:
            probe(legal())
            return make()

        return second

    def flat() -> Any:
        return tile((1, 3, 32768), nl.uint8)[:, :, 0:2]

    breaks(after(lambda: tile((1, 3, 2), nl.uint8), flat), "free stride (int16)", "32768", "32767")
    breaks(after(lambda: tile((4, 8))[0:1], lambda: tile((4, 8))[1:2]), "start partition of 1", "1", "0, 32")

    def wide() -> Any:
        return tile((1, 5, 16384), nl.uint8)

    rule, received = "elements per partition", "4100"
    breaks(after(lambda: wide()[:, 0:4], wide), rule, "81920", "1..65536")
    breaks(
        after(lambda: tile((1, 4, 1025), nl.uint8), lambda: tile((1, 4, 1025), nl.uint8, nl.psum)),
        rule,
        received,
        "4096",
    )
    breaks(after(lambda: tile((1, 513)), lambda: tile((1, 513))), rule, "513", "1..512", free_max=512)


def test_broadcast_elements_count():
    breaks(lambda: tile((1, 1, 64)).broadcast(1, 1025), "elements per partition", "65600", "1..65536")


def test_dimensions():
    passes(lambda: tile((2, 2, 2, 2, 2)))
    breaks(lambda: nl.ndarray((2, 1, 1, 1, 1, 2), nl.float32), "dimensions", "6", "at most 5")


def test_hbm_operands_have_no_access_pattern_rules():
    passes(lambda: tile((300, 70000), nl.uint8, nl.hbm)[3:], buffers=(nl.hbm,))


# -- tensor indirection


def test_indirect_views_where_the_instruction_takes_them():
    def view():
        return tile((16, 8)).indirect(tile((16, 1), nl.uint16))

    passes(view, "trn3", indirect=True)
    breaks(view, "tensor indirection", ".indirect() view", "an ordinary view", "trn3")
    breaks(view, "tensor indirection", "trn2", "NeuronCore-v4", "trn2", indirect=True)


# -- two operands


def layouts(a: tuple[int, ...], b: tuple[int, ...]) -> Any:
    def kernel():
        call = Call("probe")
        call.same_layout("a", tile(a), "b", tile(b))

    return kernel


@pytest.mark.parametrize(("a", "b"), [((4, 6), (4, 6)), ((4, 6), (4, 2, 3)), ((4, 1, 6), (4, 6, 1)), ((4, 1), (4, 1))])
def test_same_layout(a, b):
    run(layouts(a, b))


@pytest.mark.parametrize(
    ("a", "b", "rule", "received", "allowed"),
    [
        ((4, 6), (5, 6), "partitions", "5", "4, those of a"),
        ((4, 6), (4, 5), "elements per partition", "5", "6, those of a"),
        ((4, 6), (4, 2, 4), "elements per partition", "8", "6, those of a"),
        ((4, 6), (6, 4), "partitions", "6", "4, those of a"),
    ],
)
def test_other_layouts(a, b, rule, received, allowed):
    refused(layouts(a, b), instruction="probe", operand="b", rule=rule, received=received, allowed=allowed)


# -- numbers or columns


def column(make: Any, partitions: int = 4, **limits: Any) -> Any:
    got = []

    def kernel(x):
        got.append(np.array(Call("probe").column("operand0", make(x), partitions, **limits)))

    return kernel, got


@pytest.mark.parametrize("value", [3, 2.5, np.float32(0.1), np.int64(7), np.float64(1e-3)])
def test_column_of_a_number(value):
    kernel, got = column(lambda x: value)
    run(kernel, normal(1, 1))
    assert got[0].dtype == np.float32
    assert got[0] == np.float32(value)


def test_column_of_a_huge_number_is_infinite():
    kernel, got = column(lambda x: 1e300)
    run(kernel, normal(1, 1))
    assert got[0] == np.inf


@pytest.mark.parametrize("bring", [sb, ps])
def test_column_of_a_tensor(bring):
    kernel, got = column(lambda x: bring(x))
    x = normal(4, 1)
    run(kernel, x)
    np.testing.assert_array_equal(got[0], x)
    kernel, got = column(lambda x: bring(x).reshape((4, 1, 1)))
    run(kernel, x)
    np.testing.assert_array_equal(got[0], x)


def test_column_of_another_dtype():
    kernel, got = column(lambda x: sb(x), dtypes=(nl.bfloat16,))
    x = normal(4, 1, dtype=ml_dtypes.bfloat16)
    run(kernel, x)
    np.testing.assert_array_equal(got[0], x.astype(np.float32))
    assert got[0].dtype == np.float32


@pytest.mark.parametrize(
    ("make", "rule", "received", "allowed"),
    [
        (lambda x: True, "type", "bool", "a number or a [P, 1] tensor"),
        (lambda x: None, "type", "NoneType", "a number"),
        (lambda x: "3", "type", "str", "a number"),
        (lambda x: 1j, "type", "complex", "a number"),
        (lambda x: np.ones(3), "type", "ndarray", "a number"),
        (lambda x: tile((4, 1), nl.bfloat16), "dtype", "bfloat16", "float32"),
        (lambda x: tile((4, 1), buffer=nl.hbm), "buffer", "private_hbm", "sbuf or psum"),
        (lambda x: tile((4, 2)), "shape", "[4, 2]", "[4, 1]"),
        (lambda x: tile((3, 1)), "shape", "[3, 1]", "[4, 1]"),
        (lambda x: tile((4, 1)), "uninitialized read", "4 of 4", "written before"),
    ],
)
def test_column_rules(make, rule, received, allowed):
    def kernel():
        Call("probe").column("operand0", make(None), 4)

    refused(kernel, instruction="probe", operand="operand0", rule=rule, received=received, allowed=allowed)


# -- reading and writing


def test_reads():
    def kernel(x):
        t = sb(x)
        call = Call("probe")
        stored = call.read("x", t[:, ::2])
        assert stored.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(stored, x_np[:, ::2])
        wide = call.read_f32("x", t.reshape((4, 2, 3)))
        assert (wide.dtype, wide.shape) == (np.float32, (4, 6))
        flat = call.read_2d("x", t.reshape((4, 2, 3)))
        assert (flat.dtype, flat.shape) == (ml_dtypes.bfloat16, (4, 6))
        np.testing.assert_array_equal(wide, x_np.astype(np.float32))
        np.testing.assert_array_equal(flat, x_np)

    x_np = normal(4, 6, dtype=ml_dtypes.bfloat16)
    run(kernel, x_np)


def test_writes_round_once_and_reshape():
    def kernel():
        t, bits = tile((4, 2, 3), nl.bfloat16), tile((4, 6), nl.bfloat16)
        call = Call("probe")
        call.write("x", t, values)
        call.write("y", bits, values.astype(ml_dtypes.bfloat16), bits=True)
        return out(t), out(bits)

    values = normal(4, 6)
    a, b = run(kernel)
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(a, expected.reshape(4, 2, 3))
    np.testing.assert_array_equal(b, expected)


def test_writes_in_float32_mode_keep_float32():
    def kernel():
        t, wide = tile((4, 6), nl.bfloat16), tile((4, 6))
        call = Call("probe")
        call.write("x", t, values)
        call.write("y", wide, call.read("x", t))
        return out(wide)

    values = normal(4, 6)
    np.testing.assert_array_equal(run(kernel, precise=False), values)


def test_write_into_an_array_that_numpy_protects():
    def kernel(x):
        Call("probe").write("x", x, np.zeros((2, 2), np.float32))

    x = normal(2, 2)
    x.flags.writeable = False
    refused(
        kernel,
        x,
        instruction="probe",
        operand="x",
        rule="read-only array",
        received="marks read-only",
        allowed="a writable array",
    )


def test_undefined_operand():
    def kernel():
        t = tile((4, 6))
        call = Call("probe")
        call.write("x", t[:, 0:4], np.zeros((4, 4)))
        call.read("x", t)

    refused(
        kernel,
        instruction="probe",
        operand="x",
        rule="uninitialized read",
        received="8 of 24 elements never written, first at (0, 4)",
        allowed="elements written before",
    )


# -- the record


def two_operands(x: Any) -> Any:
    a, b = sb(x), tile(x.shape, nl.bfloat16)
    call = Call("probe", "first")
    call.write("dst", b[:, 1:3], call.read("src", a[:, 0:2]))
    return call.record(Engine.gpsimd, op="add")


def test_record():
    def kernel(x):
        two_operands(x)

    trace = traced(kernel, normal(4, 6))
    record = trace.records[-1]
    assert (record.instruction, record.engine, record.name, record.core) == ("probe", Engine.gpsimd, "first", 0)
    assert record.index == 1
    assert record.attrs == {"op": "add"}
    assert (record.site.file, record.site.function) == (__file__, "two_operands")
    (read,), (write,) = record.reads, record.writes
    assert (read.operand, read.dtype, read.shape, read.strides, read.offset) == ("src", float32, (4, 2), (6, 1), 0)
    assert (write.operand, write.dtype, write.shape, write.strides, write.offset) == (
        "dst", nl.bfloat16, (4, 2), (6, 1), 1,
    )  # fmt: skip
    assert (read.n_elements, read.free_size, read.nbytes, read.rows) == (8, 2, 32, None)
    assert write.nbytes == 16
    assert read.storage.first_use == 0
    assert (write.storage.first_use, write.storage.last_use) == (1, 1)
    assert trace.count("probe") == trace.count(engine=Engine.gpsimd) == trace.count("probe", core=0) == 1
    assert trace.count("probe", core=1) == 0
    assert trace.counts() == {"dma_copy": 1, "probe": 1}


def test_handles_number_the_program():
    handles = []

    def kernel(x):
        handles.append(two_operands(x))
        handles.append(probe(tile((2, 2))))

    run(kernel, normal(4, 6))
    assert all(isinstance(h, NkiInstruction) for h in handles)
    assert [h.handle for h in handles] == ["first", 2]


def test_depends_on():
    def kernel():
        first, second = probe(tile((2, 2))), probe(tile((2, 2)))
        assert second.depends_on(first) is second

    assert traced(kernel).edges == [("1", "0")]

    def bad():
        probe(tile((2, 2))).depends_on("first")

    with pytest.raises(TypeError, match="depends_on: received 'first', allowed NkiInstruction"):
        run(bad)


def test_a_refused_instruction_is_not_recorded():
    trace = nkisim.Trace()

    def kernel():
        probe(tile((1, 65536), nl.uint8))

    with pytest.raises(nkisim.NkiError):
        nkisim.simulate(kernel, trace=trace)()
    assert trace.records == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_call_knows_its_machine(target):
    def kernel():
        assert Call("probe").hardware.target == target

    run(kernel, target=target)


def test_numpy_does_not_warn_inside_a_kernel():
    def kernel(x):
        t = tile((4, 1), nl.float16)
        call = Call("probe")
        call.write("x", t, np.full((4, 1), 1e30, np.float32))
        call.write("x", t, np.sqrt(np.full((4, 1), -1.0, np.float32)))
        return out(t)

    assert np.isnan(run(kernel, integers(1, 1, low=0, high=2))).all()
