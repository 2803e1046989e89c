"""Launches: grids, arguments, results, modes, and what stands for a device."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nkisim import NkiError
from nkisim.nki import recording
from tests.nkisim.legacy.isa_kernels import BF16, nki, nl, normal
from tests.nkisim.test_install import command_line

nt = nki.typing
X = normal(8, 6)


def twice(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nl.store(out, nl.load(x) * 2.0)
    return out


@pytest.mark.parametrize("mode", ["auto", "torchxla", "jax", "baremetal", "simulation"])
def test_every_mode_simulates_and_says_so_once(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    nki._launch._said.clear()
    kernel = nki.jit(twice, mode=mode)
    for _ in range(2):
        np.testing.assert_array_equal(kernel(X), 2 * X)
    said = capsys.readouterr().err
    expected = f"nkisim: neuronxcc.nki: mode {mode!r} runs in the simulator; there is no device here\n"
    assert said == ("" if mode == "simulation" else expected)


def test_spellings() -> None:
    assert [nki.jit(twice)(X).sum(), nki.jit()(twice)(X).sum(), nki.jit(mode="simulation")(twice)(X).sum()] == [
        (2 * X).sum()
    ] * 3
    np.testing.assert_array_equal(nki.simulate_kernel(nki.jit(twice), X), 2 * X)
    np.testing.assert_array_equal(nki.simulate_kernel(twice, x=X), 2 * X)
    np.testing.assert_array_equal(nki.baremetal(twice)(X), 2 * X)
    np.testing.assert_array_equal(nki.baremetal(save_neff_name="file.neff")(twice)(X), 2 * X)
    assert nki.jit(twice).__name__ == "twice"
    with pytest.raises(ValueError, match=r"nki\.jit\.mode: received 'fast', allowed auto"):
        nki.jit(twice, mode="fast")
    with pytest.raises(ValueError, match="target: received 'trn9'"):
        nki.jit(twice, platform_target="trn9")
    with pytest.raises(TypeError, match="received int, allowed a function"):
        nki.simulate_kernel(3)
    with pytest.raises(TypeError, match="twice: missing a required argument"):
        nki.jit(twice)()


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def kernel(x: Any) -> Any:
        seen.append(nki.isa.get_nc_version().name)
        return twice(x)

    def level(x: Any) -> Any:
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        seen.append(nki.isa.get_nc_version().name)
        nl.store(out, nl.load(x))
        return out

    nki.simulate_kernel(level, X)
    nki.jit(level, mode="simulation", platform_target="trn1")(X)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")
    nki.simulate_kernel(level, X)
    assert seen == ["gen3", "gen2", "gen2"]
    # A tensor that is shared is made in the kernel itself.
    with pytest.raises(NkiError, match=r"err_shared_hbm_must_in_kernel_level.*in a function that the kernel calls"):
        nki.simulate_kernel(kernel, X)


# -- grids


@nki.jit(mode="simulation")
def where_am_i(x):
    out = nl.ndarray((2, 3, 4), dtype=nl.float32, buffer=nl.shared_hbm)
    i, j = nl.program_id(0), nl.program_id(axis=1)
    numbers = [float(i), float(j), float(nl.num_programs(0) * 10 + nl.num_programs()), float(nl.program_ndim())]
    tile = nl.ndarray((1, 4), dtype=nl.float32)
    for k, number in enumerate(numbers):
        tile[0, k] = number
    nl.store(out[i, j : j + 1], tile)
    return out


def test_a_grid_of_programs() -> None:
    got = where_am_i[2, 3](X)
    np.testing.assert_array_equal(got[..., 0], np.repeat([[0], [1]], 3, axis=1))
    np.testing.assert_array_equal(got[..., 1], [[0, 1, 2]] * 2)
    assert (got[..., 2] == 26).all()
    assert (got[..., 3] == 2).all()
    np.testing.assert_array_equal(nki.simulate_kernel(where_am_i[(2, 3)], X), got)


def cores_of(grid: Any) -> Any:
    """Which physical core ran each program of a 4 x 2 grid."""

    @nki.jit(mode="simulation")
    def kernel(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        i, j = nl.program_id(0), nl.program_id(1)
        nl.store(out[i, j], nl.load(x[i, j]) + 1.0)
        return out

    x = normal(4, 2, 1, 1)
    with recording() as found:
        np.testing.assert_allclose(kernel[grid](x), x + 1, rtol=1e-6)
    counts = [0, 0]
    for record in found["kernel"].records:
        counts[record.core] += record.instruction == "dma_copy"
    stores = sorted(
        (r.writes[0].offset, r.core) for r in found["kernel"].records if r.writes[0].storage.buffer is nl.shared_hbm
    )
    assert sum(counts) == 16
    return [core for _, core in stores]


def test_programs_on_physical_cores() -> None:
    halves, interleaved = [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]
    assert cores_of((4, 2)) == [0] * 8
    assert cores_of((nl.spmd_dim(nl.nc(2), 2), 2)) == halves
    assert cores_of((nl.nc(2) * 2, 2)) == halves
    assert cores_of((nl.spmd_dim(2, nl.nc(2)), 2)) == interleaved
    assert cores_of((2 * nl.nc(2), 2)) == interleaved
    assert cores_of((4, nl.nc(2))) == [0, 1] * 4
    assert repr(nl.nc(2) * 2) == "nc(2) * 2"


@pytest.mark.parametrize(
    ("error", "match", "launch"),
    [
        (ValueError, r"kernel\[grid\]: received 0", lambda k: k[0]),
        (ValueError, r"kernel\[grid\]: received 1.5", lambda k: k[1.5]),
        (ValueError, "allowed one nl.nc", lambda k: k[nl.nc(2), nl.nc(2)]),
        (ValueError, "nl.nc: received 3", lambda k: nl.nc(3)),
        (ValueError, "nl.spmd_dim: received 'a'", lambda k: nl.spmd_dim("a")),
        (ValueError, "allowed one nl.nc", lambda k: nl.spmd_dim(nl.nc(2), nl.nc(2))),
        (ValueError, "nl.spmd_dim: received nothing", lambda k: nl.spmd_dim()),
        (
            ValueError,
            "nl.nc: received 2, allowed 1..1 on trn1",
            lambda k: nki.jit(k, platform_target="trn1")[nl.nc(2)](X),
        ),
        (NkiError, "program_id.axis: value: received 2, allowed 0..1", lambda k: bad_axis[2, 2](X)),
        (NkiError, "allowed none: the kernel was launched without a grid", lambda k: bad_axis(X)),
        (NkiError, "num_programs.axes: value: received 5", lambda k: bad_axes[2](X)),
        (NkiError, "err_nested_kernel_with_spmd_grid", lambda k: nested(X)),
    ],
)
def test_refused_launches(error: Any, match: str, launch: Any) -> None:
    with pytest.raises(error, match=match):
        launch(nki.jit(twice))


def bad_axis(x):
    return twice(x[nl.program_id(2)])


def bad_axes(x):
    return twice(x[nl.num_programs(5)])


def nested(x):
    return nki.jit(twice)[2](x)


bad_axis, bad_axes, nested = (nki.jit(f, mode="simulation") for f in (bad_axis, bad_axes, nested))


def test_a_kernel_calls_a_kernel() -> None:
    @nki.jit
    def square(t):
        return nl.square(t)

    @nki.jit(mode="simulation")
    def outer(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, square(nl.load(x)))
        return out

    np.testing.assert_array_equal(outer(X), X * X)


# -- arguments and results


def test_arguments_of_every_kind() -> None:
    @nki.jit(mode="simulation")
    def kernel(pair, options, scale=1.0, flag=None):
        a, b = pair
        out = nl.ndarray(a.shape, dtype=nl.float32, buffer=nl.shared_hbm)
        total = nl.load(a) + nl.load(b) * scale + nl.load(options["c"])
        nl.store(out, total)
        assert flag is None
        return [out, (out,)]

    class Foreign:
        def __array__(self) -> Any:
            return X

    with pytest.raises(TypeError, match="flag: received Foreign, allowed a NumPy array or a torch tensor"):
        kernel([X, X], {"c": X}, flag=Foreign())
    first, (second,) = kernel([X, 2 * X], {"c": 3 * X}, scale=2.0)
    np.testing.assert_allclose(first, 8 * X, rtol=1e-6)
    np.testing.assert_array_equal(first, second)


def test_parameters_are_immutable_unless_they_say_otherwise() -> None:
    def add_one(x):
        nl.store(x, nl.load(x) + 1.0)
        return x

    def mutable(x: nt.mutable_tensor):
        nl.store(x, nl.load(x) + 1.0)
        return x

    def as_text(x: "nt.mutable_tensor"):  # noqa: UP037
        nl.store(x, nl.load(x) + 1.0)
        return x

    def not_returned(x: nt.mutable_tensor):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(x, nl.load(x) + 1.0)
        nl.store(out, nl.load(x))
        return out

    with pytest.raises(NkiError, match="err_cannot_update_immutable_parameter"):
        nki.simulate_kernel(add_one, X.copy())
    for kernel in (mutable, as_text):
        x = X.copy()
        np.testing.assert_array_equal(nki.simulate_kernel(kernel, x), X + 1)
        np.testing.assert_array_equal(x, X + 1)
    with pytest.raises(NkiError, match="err_mutable_parameter_not_returned"):
        nki.simulate_kernel(not_returned, X.copy())


def test_declared_shapes() -> None:
    def kernel(x: nt.tensor[8, 6]):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nl.store(out, nl.load(x))
        return out

    np.testing.assert_array_equal(nki.simulate_kernel(kernel, X), X)
    with pytest.raises(NkiError, match=r"err_annotation_shape_mismatch: shape: received \[4, 6\], allowed \[8, 6\]"):
        nki.simulate_kernel(kernel, X[:4])
    with pytest.raises(TypeError, match="x: received float, allowed a tensor as declared"):
        nki.simulate_kernel(kernel, 1.0)
    with pytest.raises(TypeError, match=r"nki\.typing\.tensor: received 'a'"):
        nt.tensor["a"]


@pytest.mark.parametrize(
    ("match", "made"),
    [
        ("err_tensor_output_not_written_to: results: received none", lambda t: None),
        ("err_tensor_output_not_written_to: a returned tensor: received never written", lambda t: hbm()),
        ("return: type: received psum", lambda t: nl.transpose(t)),
        ("return: type: received int", lambda t: 3),
    ],
)
def test_refused_results(match: str, made: Any) -> None:
    with pytest.raises(NkiError, match=match):
        nki.simulate_kernel(lambda x: made(nl.load(x)), X)


def hbm() -> Any:
    return nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.hbm)


def test_a_result_that_is_partly_written_warns_and_shows_it() -> None:
    def kernel(x):
        out = nl.ndarray((4, 6), dtype=x.dtype, buffer=nl.hbm, name="half")
        numbers = nl.ndarray((4, 6), dtype=nl.int16, buffer=nl.hbm)
        nl.store(out[0:2], nl.load(x[0:2]))
        nl.store(numbers[1:4], 7)
        return out, numbers

    with pytest.warns(UserWarning, match="were never written: NaN, or the largest integer") as caught:
        got, numbers = nki.simulate_kernel(kernel, X)
    assert [str(w.message).partition(" were")[0] for w in caught] == [
        "12 of 24 elements of half",
        "6 of 24 elements of the result",
    ]
    np.testing.assert_array_equal(got[:2], X[:2])
    assert np.isnan(got[2:]).all()
    assert (numbers[0] == 2**15 - 1).all()
    assert (numbers[1:] == 7).all()


def test_a_result_in_sbuf_warns() -> None:
    with pytest.warns(UserWarning, match="is returned from SBUF; only the simulator can do that"):
        np.testing.assert_array_equal(nki.simulate_kernel(lambda x: nl.load(x) + 1.0, X), X + 1)


def test_shared_tensors_are_made_once_and_outside_of_loops() -> None:
    @nki.jit(mode="simulation")
    def in_a_loop(x):
        for _ in nl.affine_range(2):
            out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        return out

    @nki.jit(mode="simulation")
    def of_its_own_shape(x):
        return nl.ndarray((4, 1 + nl.program_id(0)), dtype=x.dtype, buffer=nl.shared_hbm)

    with pytest.raises(NkiError, match=r"err_shared_hbm_must_in_kernel_level.*in a loop"):
        in_a_loop(X)
    with pytest.raises(NkiError, match="differs between the programs"):
        of_its_own_shape[2](X)


def test_results_of_every_type() -> None:
    for dtype in (nl.bfloat16, nl.float16, nl.int8, nl.uint32, nl.bool_, nl.float8_e4m3, nl.float8_e5m2):
        x = (np.abs(X) > 0.5).astype(dtype) if dtype is nl.bool_ else np.arange(48).reshape(8, 6).astype(dtype)

        def kernel(x):
            assert x.dtype == np.dtype(dtype)  # noqa: B023
            out = nl.empty_like(x, buffer=nl.hbm)
            nl.store(out, nl.load(x))
            return out

        got = nki.simulate_kernel(kernel, x)
        assert got.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got.astype(np.float32), x.astype(np.float32))


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(48, dtype=torch.bfloat16).reshape(8, 6)
    got = nki.jit(twice, mode="simulation")(x)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, 2 * x)


def test_all_float32() -> None:
    x = normal(8, 6).astype(BF16)

    def kernel(x):
        out = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.shared_hbm)
        nl.store(out, nl.multiply(nl.load(x), 1.001, dtype=nl.bfloat16))
        return out

    exact = x.astype(np.float32) * np.float32(1.001)
    np.testing.assert_array_equal(nki.simulate_kernel(kernel, x), exact.astype(BF16).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NKI_PRECISE_FP", "0")
        np.testing.assert_array_equal(nki.simulate_kernel(kernel, x), exact)
        patch.setenv("NKI_PRECISE_FP", "2")
        with pytest.raises(ValueError, match="NKI_PRECISE_FP: received '2'"):
            nki.simulate_kernel(kernel, x)


def test_kernels_that_write_to_parameters() -> None:
    @nki.trace
    def kernel(x, out):
        nl.store(out, nl.load(x) + 1.0)

    out = np.empty_like(X)
    assert nki.simulate_kernel(kernel, X, out) is None
    np.testing.assert_array_equal(out, X + 1)
    # The same as a mode of jit, which AWS's kernels use, with results as well, and for what kernels call.
    np.testing.assert_array_equal(nki.jit(twice, mode="trace")(X), 2 * X)
    out = np.empty_like(X)
    assert nki.jit(kernel, mode="trace")(X, out) is None
    np.testing.assert_array_equal(out, X + 1)
    with pytest.raises(NkiError, match="err_tensor_output_not_written_to: written parameters"):
        nki.simulate_kernel(nki.trace(lambda x: None), X)


# -- what stands for a device


def test_a_benchmark_is_modelled(capsys: pytest.CaptureFixture[str]) -> None:
    for decorate in (nki.benchmark(warmup=2, iters=3), nki.benchmark, functools.partial(nki.jit, mode="benchmark")):
        kernel = decorate(twice)
        np.testing.assert_array_equal(kernel(X), 2 * X)
        latency = kernel.benchmark_result.nc_latency
        assert latency.get_latency_percentile(50) == latency.get_latency_percentile(99) == latency.modelled_us
        # A load, a product and a store: a few microseconds each way.
        assert 2 < latency.modelled_us < 10
        shown = capsys.readouterr().out
        assert shown == f"twice on trn2: latency {latency.modelled_us:.2f} us, modelled by nkisim, not measured\n"
    on_grid = nki.benchmark(where_am_i)
    with pytest.raises(RuntimeError, match="benchmark_result: received no launch yet"):
        _ = on_grid.benchmark_result
    on_grid[2, 3](X)
    assert on_grid.benchmark_result.nc_latency.modelled_us > latency.modelled_us
    with pytest.raises(ValueError, match="get_latency_percentile: received 42"):
        latency.get_latency_percentile(42)
    with pytest.raises(ValueError, match=r"nki\.benchmark\.iters: received 0"):
        nki.benchmark(iters=0)


def test_what_stands_for_a_device_keeps_options_and_grid(tmp_path: Path) -> None:
    allocator = nki.compiler.sbuf.mod_alloc(base_addr=0)

    @nki.jit
    def kernel(x: Any) -> Any:
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        # Two live tensors on the same bytes: only the automatic allocator makes this kernel right.
        a, b = (nl.ndarray(x.shape, dtype=x.dtype, buffer=allocator) for _ in range(2))
        a[...] = nl.load(x)
        b[...] = nl.load(x)
        nl.store(out, a + b)
        return out

    with pytest.raises(NkiError):
        nki.benchmark(kernel)(X)
    for decorate in (nki.benchmark, nki.baremetal, nki.jit, nki.profile(working_directory=str(tmp_path))):
        marked = nki.compiler.force_auto_alloc(nki.jit(kernel.function))
        np.testing.assert_array_equal(decorate(marked)(X), 2 * X)
        np.testing.assert_array_equal(decorate(nki.jit(where_am_i)[2, 3])(X), nki.jit(where_am_i)[2, 3](X))


def test_a_benchmark_makes_up_inputs_of_which_it_knows_the_shape() -> None:
    kernel = nki.benchmark(twice)
    got = kernel(nt.tensor[[16, 4], nl.bfloat16])
    assert (got.shape, got.dtype) == ((16, 4), BF16)
    with pytest.raises(TypeError, match="x: received TensorType"):
        kernel(nt.tensor[16, 4])


def test_a_profile_is_a_modelled_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = nki.profile(working_directory=str(tmp_path / "out"), save_trace_name="some.ntff")(twice)
    np.testing.assert_array_equal(kernel(X), 2 * X)
    events = json.loads((tmp_path / "out" / "some.json").read_text())["traceEvents"]
    assert any("dma_copy" in str(e.get("name")) for e in events)
    assert "the modelled timeline, not a profile of a device" in capsys.readouterr().out
    for given in (None, "relative"):
        with pytest.raises(ValueError, match=r"nki\.profile\.working_directory: received"):
            nki.profile(twice, working_directory=given)


SCRIPT = """
import neuronxcc.nki as nki
import neuronxcc.nki.isa as nisa
import neuronxcc.nki.language as nl
import numpy as np
from neuronxcc.nki.compiler import sbuf
from neuronxcc.nki.isa.constants import oob_mode
from neuronxcc.nki.typing import tensor


@nki.jit
def add_one(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    i = nl.arange(128)[:, None]
    j = nl.arange(64)[None, :]
    for t in nl.affine_range(2):
        tile = nl.load(x[t * 128 + i, j], mask=t * 128 + i < 200)
        nl.store(out[t * 128 + i, j], nisa.tensor_scalar(tile, np.add, 1.0), mask=t * 128 + i < 200)
    return out


x = np.arange(200 * 64, dtype=np.float32).reshape(200, 64)
assert np.array_equal(add_one(x), x + 1)
print("done")
"""


def test_the_command_line_runs_and_times_an_unmodified_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = command_line("run", script)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr == "nkisim: neuronxcc.nki: mode 'auto' runs in the simulator; there is no device here\n"
    timed = command_line("trace", script)
    assert timed.returncode == 0, timed.stderr
    assert "add_one: modelled on trn2, 6 instructions" in timed.stdout


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_the_example_checks_itself(target: str) -> None:
    script = Path(__file__).parents[3] / "examples" / "legacy_softmax.py"
    done = command_line("run", "--target", target, script)
    assert (done.returncode, done.stdout) == (0, "softmax is right for (300, 200)\n"), done.stderr
