"""neuronxcc.nki.compiler: where allocators put tiles, what they refuse, and what the decorators do."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest

from nkisim import NkiError
from nkisim import legacy as nki
from nkisim.nki import recording

nl, nisa, ncc = nki.language, nki.isa, nki.compiler
KIB = 1024


def launch(body, *arrays, target="trn2", decorate=lambda f: f):
    """Run `body(out, *inputs)` as a kernel whose result is `out`, [128, 64] of float32."""

    @decorate
    @nki.jit(mode="simulation", platform_target=target)
    def kernel(*inputs):
        out = nl.ndarray((128, 64), dtype=nl.float32, buffer=nl.shared_hbm)
        body(out, *inputs)
        return out

    return kernel(*arrays)


def places(body, *arrays, **kwargs):
    """(memory, partition, byte) of the tensors of a launch that are on chip, in order of their first use."""
    with recording() as found:
        launch(body, *arrays, **kwargs)
    seen = {}
    for r in found["kernel"].records:
        for access in (*r.reads, *r.writes):
            info = access.storage
            if info.buffer.name in ("sbuf", "psum"):
                seen.setdefault(info.id, (info.buffer.name, *(info.address or (None, None))))
    return list(seen.values())


def fill(tensor, out):
    """Write each tile of a tensor of 4 blocks, read it, and store the last."""
    for i in nl.sequential_range(4):
        tensor[i] = nisa.memset((128, 64), float(i), nl.float32)
        nl.store(out, tensor[i])


def blocks(buffer, dtype=nl.float32):
    return lambda out: fill(nl.ndarray((4, nl.par_dim(128), 64), dtype=dtype, buffer=buffer), out)


def one(buffer, shape=(128, 64)):
    def body(out):
        t = nl.ndarray(shape, dtype=nl.float32, buffer=buffer)
        t[...] = nisa.memset(shape, 1.0, nl.float32)
        nl.store(out[0 : shape[0], 0 : shape[1]], t)
        if shape != (128, 64):
            nl.store(out, out)

    return body


def placed(buffer, shape=(128, 64)):
    """Make and fill one tensor; nothing is returned of it."""

    def body(out):
        t = nl.ndarray(shape, dtype=nl.float32, buffer=buffer)
        t[...] = nisa.memset(shape, 1.0, nl.float32)
        u = nl.ndarray((128, 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=100 * KIB))
        u[...] = nisa.memset((128, 64), 2.0, nl.float32)
        nl.store(out, u)

    return body


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (ncc.sbuf.alloc, ["func"]),
        (ncc.psum.alloc, ["func"]),
        (ncc.sbuf.mod_alloc, ["base_addr", "base_partition=0", "num_par_tiles=()", "num_free_tiles=()"]),
        (
            ncc.psum.mod_alloc,
            [
                "base_bank",
                "base_addr=0",
                "base_partition=0",
                "num_bank_tiles=()",
                "num_par_tiles=()",
                "num_free_tiles=()",
            ],
        ),
        (ncc.sbuf.auto_alloc, []),
        (ncc.skip_middle_end_transformations, ["func=None"]),
        (ncc.enable_stack_allocator, ["func=None", "log_level=50"]),
        (ncc.force_auto_alloc, ["func=None"]),
        (ncc.allocation_scope, []),
        (ncc.multi_buffer, ["factor=2"]),
        (ncc.no_reorder, []),
    ],
)
def test_arguments_are_those_of_the_reference(function, arguments):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters] == arguments


# -- addresses


def test_modulo_allocation_reuses_tiles_round_robin():
    body = blocks(ncc.sbuf.mod_alloc(base_addr=4096, num_free_tiles=(2,)))
    assert places(body) == [("sbuf", 0, b) for b in (4096, 4096 + 256, 4096, 4096 + 256)]


def test_a_function_places_each_block():
    seen = []

    def func(index, partitions, size):
        seen.append((index, partitions, size))
        return 0, 1000 * index[0]

    assert places(blocks(ncc.sbuf.alloc(func))) == [("sbuf", 0, 1000 * i) for i in range(4)]
    assert seen == [((i,), 128, 256) for i in range(4)]


def test_functions_get_the_keywords_of_the_page():
    def place(start, idx, pdim_size, fdim_size):
        assert pdim_size == 128
        return 0, start + idx[0] * fdim_size

    body = blocks(ncc.sbuf.alloc(functools.partial(place, start=512)))
    assert places(body) == [("sbuf", 0, 512 + 256 * i) for i in range(4)]


def test_banks_of_psum():
    def body(out):
        t = nl.ndarray(
            (4, nl.par_dim(128), 64), dtype=nl.float32, buffer=ncc.psum.mod_alloc(base_bank=3, num_bank_tiles=(2,))
        )
        u = nl.ndarray((128, 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=0))
        for i in nl.sequential_range(4):
            t[i] = nisa.memset((128, 64), float(i), nl.float32)
            u[...] = nisa.tensor_copy(t[i])
        nl.store(out, u)

    found = [p for p in places(body) if p[0] == "psum"]
    assert found == [("psum", 0, bank * 2048) for bank in (3, 4, 3, 4)]


def test_tiles_of_two_block_dimensions_are_numbered_row_major():
    def body(out):
        t = nl.ndarray(
            (2, 3, nl.par_dim(128), 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=0, num_free_tiles=(2, 2))
        )
        for i in range(2):
            for j in range(3):
                t[i, j] = nisa.memset((128, 64), 1.0, nl.float32)
                nl.store(out, t[i, j])

    assert [p[2] for p in places(body)] == [256 * n for n in (0, 1, 0, 2, 3, 2)]


def test_tiles_along_the_partitions():
    def body(out):
        t = nl.ndarray(
            (4, nl.par_dim(32), 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=0, num_par_tiles=(4,))
        )
        for i in range(4):
            t[i] = nisa.memset((32, 64), float(i), nl.float32)
            nl.store(out[nl.ds(32 * i, 32), :], t[i])

    assert [p[1] for p in places(body)] == [0, 32, 64, 96]
    np.testing.assert_array_equal(launch(body), np.repeat(np.arange(4.0, dtype=np.float32), 32)[:, None].repeat(64, 1))


@pytest.mark.parametrize(
    "buffer", [ncc.sbuf.auto_alloc(), ncc.sbuf, nl.sbuf, ncc.sbuf.mod_alloc(base_addr=0, num_free_tiles=(1,))]
)
def test_automatic_allocation_and_counts_without_blocks(buffer):
    np.testing.assert_array_equal(launch(one(buffer)), np.ones((128, 64), np.float32))


# -- what memory does not have


@pytest.mark.parametrize(
    ("buffer", "shape", "match"),
    [
        (ncc.sbuf.mod_alloc(base_addr=208 * KIB), (128, 64), r"0\.\.212983 on trn2"),
        (ncc.sbuf.alloc(lambda *_: (0, -4)), (128, 64), "bytes of block"),
        (ncc.sbuf.alloc(lambda *_: (32, 0)), (64, 64), "start partition of 64 partitions.*allowed 0, 64"),
        (ncc.sbuf.alloc(lambda *_: (64, 0)), (65, 64), "start partition of 65 partitions.*allowed 0"),
        (ncc.sbuf.alloc(lambda *_: 0), (128, 64), "2 integers"),
        (ncc.sbuf.alloc(lambda *_: (0, 1.0)), (128, 64), "2 integers"),
        (ncc.psum.alloc(lambda *_: (8, 0, 0)), (128, 64), r"bank of block \(\).*allowed 0\.\.7"),
        (ncc.psum.alloc(lambda *_: (0, 32, 0)), (32, 64), r"start_partition.*allowed 0"),
        (ncc.psum.alloc(lambda *_: (0, 0, 4)), (128, 64), r"byte_addr.*allowed 0"),
        (ncc.psum.alloc(lambda *_: (0, 0)), (128, 64), "3 integers"),
        (ncc.psum.mod_alloc(base_bank=0), (128, 513), "one bank"),
    ],
)
def test_places_that_there_are_not(buffer, shape, match):
    with pytest.raises(NkiError, match=match):
        launch(placed(buffer, shape))


@pytest.mark.parametrize(("target", "last"), [("trn1", 176 * KIB), ("trn2", 212984)])
def test_the_last_byte_of_sbuf(target, last):
    launch(placed(ncc.sbuf.mod_alloc(base_addr=last - 256)), target=target)
    with pytest.raises(NkiError, match="bytes of block"):
        launch(placed(ncc.sbuf.mod_alloc(base_addr=last - 255)), target=target)


def test_counts_have_the_rank_of_the_blocks():
    with pytest.raises(NkiError, match="num_free_tiles: number of tile counts: received 2, allowed none or 1"):
        launch(blocks(ncc.sbuf.mod_alloc(base_addr=0, num_free_tiles=(2, 1))))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ncc.sbuf.mod_alloc(base_addr=-1), NkiError, "base_addr"),
        (lambda: ncc.sbuf.mod_alloc(base_addr=1.5), TypeError, "base_addr"),
        (lambda: ncc.sbuf.mod_alloc(base_addr=0, base_partition=32), NkiError, "base_partition.*allowed 0"),
        (lambda: ncc.sbuf.mod_alloc(base_addr=0, num_free_tiles=2), NkiError, "num_free_tiles"),
        (lambda: ncc.sbuf.mod_alloc(base_addr=0, num_par_tiles=(0,)), NkiError, "num_par_tiles"),
        (lambda: ncc.psum.mod_alloc(base_bank=0, base_addr=4), NkiError, "base_addr.*allowed 0"),
        (lambda: ncc.psum.mod_alloc(base_bank=0, num_free_tiles=(2,)), NkiError, r"num_free_tiles.*\(\) or ones"),
        (lambda: ncc.psum.mod_alloc(base_bank=True), TypeError, "base_bank"),
        (lambda: ncc.sbuf.alloc(0), TypeError, "allowed a function"),
        (lambda: ncc.multi_buffer(0), ValueError, "multi_buffer"),
        (lambda: ncc.multi_buffer("2"), TypeError, "multi_buffer"),
        (lambda: ncc.enable_stack_allocator(log_level="all"), TypeError, "log_level"),
        (lambda: ncc.force_auto_alloc(3), TypeError, "allowed a function or a kernel"),
    ],
)
def test_arguments_are_checked_before_any_kernel(make, error, match):
    with pytest.raises(error, match=match):
        make()


# -- tiles on the same bytes


def overlapping(first_until_the_end):
    def body(out):
        a = nl.ndarray((128, 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=0), name="a")
        b = nl.ndarray((128, 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=128), name="b")
        a[...] = nisa.memset((128, 64), 1.0, nl.float32)
        nl.store(out, a)
        b[...] = nisa.memset((128, 64), 2.0, nl.float32)
        nl.store(out, b)
        if first_until_the_end:
            nl.store(out, a)

    return body


def test_tensors_may_follow_each_other_on_the_same_bytes():
    np.testing.assert_array_equal(launch(overlapping(False)), np.full((128, 64), 2, np.float32))


def test_tensors_alive_together_may_not():
    with pytest.raises(
        NkiError, match=r"same bytes while both are in use: received b at \(0, 128\) over a at \(0, 0\)"
    ):
        launch(overlapping(True))


def test_fewer_physical_tiles_than_live_blocks():
    def body(out):
        t = nl.ndarray(
            (4, nl.par_dim(128), 64),
            dtype=nl.float32,
            buffer=ncc.sbuf.mod_alloc(base_addr=0, num_free_tiles=(2,)),
            name="t",
        )
        for i in nl.affine_range(4):
            t[i] = nisa.memset((128, 64), float(i), nl.float32)
        for i in nl.sequential_range(4):
            nl.store(out, t[i])

    with pytest.raises(NkiError, match=r"same bytes while both are in use: received t\[2\].* over t\[0\]"):
        launch(body)


# -- kernels that place their tensors


@pytest.mark.parametrize(("buffer", "columns", "n"), [(nl.psum, 512, 9), (nl.sbuf, 16 * KIB, 4)])
def test_the_compiler_spills_what_does_not_fit_unless_the_kernel_places_it(buffer, columns, n):
    def body(out):
        tiles = nl.ndarray((n, nl.par_dim(128), columns), dtype=nl.float32, buffer=buffer)
        for i in range(n):
            tiles[i] = nisa.memset((128, columns), float(i), nl.float32)
        for i in range(1, n):
            tiles[0] += tiles[i]
        nl.store(out, tiles[0, :, 0:64])

    with pytest.warns(UserWarning, match=f"capacity: received .* in {n} tensors .*HBM and back"):
        assert set(launch(body).ravel()) == {sum(range(n))}


def test_automatic_beside_direct_allocation_is_refused():
    def body(out):
        t = nl.ndarray((128, 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=0))
        u = nisa.memset((128, 64), 1.0, nl.float32)
        t[...] = nisa.tensor_copy(u)
        nl.store(out, t)

    with pytest.raises(NkiError, match="automatic beside direct allocation"):
        launch(body)


def test_force_auto_alloc_ignores_places():
    body = overlapping(True)
    got = launch(body, decorate=ncc.force_auto_alloc)
    np.testing.assert_array_equal(got, np.ones((128, 64), np.float32))
    assert places(body, decorate=ncc.force_auto_alloc) == [("sbuf", None, None)] * 2


def implicit(instruction):
    def body(out, x):
        a = nl.ndarray((128, 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=0))
        b = nl.ndarray((128, 64), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=256))
        p = nl.ndarray((64, 128), dtype=nl.float32, buffer=ncc.psum.mod_alloc(base_bank=0))
        a[...] = nl.load(x)
        instruction(a, b, p)
        nl.store(out, a)

    return body


def with_bias(a, b, _p):
    bias = nl.ndarray((128, 1), dtype=nl.float32, buffer=ncc.sbuf.mod_alloc(base_addr=512))
    bias[...] = nisa.memset((128, 1), 0.0, nl.float32)
    b[...] = nisa.activation(nl.exp, a, bias=bias)


def test_activations_in_allocated_kernels_name_their_bias():
    x = np.zeros((128, 64), np.float32)
    launch(implicit(with_bias), x)
    with pytest.raises(NkiError, match="err_bias_tensor_must_be_specified_in_allocation"):
        launch(implicit(lambda a, b, _: b.__setitem__(..., nisa.activation(nl.exp, a))), x)


def test_tensor_engine_transposes_in_allocated_kernels_are_refused():
    def transpose(a, _b, p):
        p[...] = nisa.nc_transpose(a)

    with pytest.raises(NkiError, match="err_transpose_on_tensor_engine_not_allowed_in_allocated_kernel"):
        launch(implicit(transpose), np.zeros((128, 64), np.float32))


# -- decorators and directives


@pytest.mark.parametrize("decorator", [ncc.skip_middle_end_transformations, ncc.force_auto_alloc])
@pytest.mark.parametrize("called", [False, True])
def test_decorators_keep_the_kernel(decorator, called):
    got = launch(one(nl.sbuf), decorate=decorator() if called else decorator)
    np.testing.assert_array_equal(got, np.ones((128, 64), np.float32))


def test_decorators_below_jit():
    @nki.jit(mode="simulation")
    @ncc.enable_stack_allocator(log_level=10)
    @ncc.skip_middle_end_transformations
    def kernel():
        out = nl.ndarray((8, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        nl.store(out, nisa.memset((8, 8), 3.0, nl.float32))
        return out

    assert ncc.options_of(kernel) == {"enable_stack_allocator", "skip_middle_end_transformations"}
    np.testing.assert_array_equal(kernel(), np.full((8, 8), 3, np.float32))


def test_the_stack_allocator_needs_its_companion():
    with pytest.raises(NkiError, match="skip_middle_end_transformations beside it"):
        launch(one(nl.sbuf), decorate=ncc.enable_stack_allocator)


def test_directives_and_scopes_change_nothing():
    def body(out):
        with ncc.allocation_scope(), ncc.no_reorder():
            t = nl.ndarray((128, 64), dtype=nl.float32)
            for i in nl.sequential_range(3, directives=ncc.no_reorder()):
                t[...] = nisa.memset((128, 64), float(i), nl.float32)
            for _ in nl.sequential_range(1, directives=[ncc.multi_buffer(3)]):
                nl.store(out, t)

    np.testing.assert_array_equal(launch(body), np.full((128, 64), 2, np.float32))


@pytest.mark.parametrize(("value", "expected"), [(ncc.multi_buffer(), True), ([ncc.no_reorder()], True), (3, False)])
def test_what_is_a_directive(value, expected):
    assert ncc.is_directive(value) is expected
    assert ncc.multi_buffer().factor == 2
