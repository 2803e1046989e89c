"""neuronxcc.nki.isa: names, arguments and defaults of SDK 2.26, and its enumerations."""

from __future__ import annotations

import inspect
from enum import IntEnum

import numpy as np
import pytest

import nkisim
from nkisim import legacy as nki
from nkisim.legacy import isa as nisa
from nkisim.legacy import language as nl

# As the reference of SDK 2.26 prints them, in its order.
SIGNATURES = """
activation(op, data, *, bias=None, scale=1.0, reduce_op=None, reduce_res=None, reduce_cmd=reduce_cmd.idle, mask=None, dtype=None, **kwargs)
activation_reduce(op, data, *, reduce_op, reduce_res, bias=None, scale=1.0, mask=None, dtype=None, **kwargs)
affine_select(pred, on_true_tile, on_false_value, *, mask=None, dtype=None, **kwargs)
bn_aggr(data, *, mask=None, dtype=None, **kwargs)
bn_stats(data, *, mask=None, dtype=None, **kwargs)
builtin_custom_op(function_name, lib_file_name, ulib_to_ucode_version, ulib_to_isa_version, srcs, dsts, **kwargs)
dma_copy(*, dst, src, mask=None, dst_rmw_op=None, oob_mode=oob_mode.error, dge_mode=dge_mode.unknown)
dma_transpose(src, *, axes=None, mask=None, dtype=None, **kwargs)
dropout(data, prob, *, mask=None, dtype=None, **kwargs)
get_nc_version()
iota(expr, dtype, *, mask=None, **kwargs)
local_gather(src_buffer, index, num_elem_per_idx=1, num_valid_indices=None, *, mask=None)
max8(*, src, mask=None, dtype=None, **kwargs)
memset(shape, value, dtype, *, mask=None, engine=engine.unknown, **kwargs)
nc_find_index8(*, data, vals, mask=None, dtype=None, **kwargs)
nc_match_replace8(*, data, vals, imm, dst_idx=None, mask=None, dtype=None, **kwargs)
nc_matmul(stationary, moving, *, is_stationary_onezero=False, is_moving_onezero=False, is_transpose=False, tile_position=(), tile_size=(), mask=None, **kwargs)
nc_stream_shuffle(src, dst, shuffle_mask, *, dtype=None, mask=None, **kwargs)
nc_transpose(data, *, mask=None, dtype=None, engine=engine.unknown, **kwargs)
range_select(*, on_true_tile, comp_op0, comp_op1, bound0, bound1, reduce_cmd=reduce_cmd.idle, reduce_res=None, reduce_op=amax, range_start=0, on_false_value=-3.4028234663852886e+38, mask=None, dtype=None, **kwargs)
reciprocal(data, *, dtype=None, mask=None, **kwargs)
scalar_tensor_tensor(*, data, op0, operand0, op1, operand1, reverse0=False, reverse1=False, dtype=None, mask=None, **kwargs)
select_reduce(*, dst, predicate, on_true, on_false, reduce_res=None, reduce_cmd=reduce_cmd.idle, reduce_op=amax, reverse_pred=False, mask=None, dtype=None, **kwargs)
sequence_bounds(*, segment_ids, dtype=None)
tensor_copy(src, *, mask=None, dtype=None, engine=engine.unknown, **kwargs)
tensor_copy_dynamic_dst(*, dst, src, mask=None, dtype=None, engine=engine.unknown, **kwargs)
tensor_copy_dynamic_src(src, *, mask=None, dtype=None, engine=engine.unknown, **kwargs)
tensor_copy_predicated(*, src, dst, predicate, reverse_pred=False, mask=None, dtype=None, **kwargs)
tensor_partition_reduce(op, data, *, mask=None, dtype=None, **kwargs)
tensor_reduce(op, data, axis, *, mask=None, dtype=None, negate=False, keepdims=False, **kwargs)
tensor_scalar(data, op0, operand0, reverse0=False, op1=None, operand1=None, reverse1=False, *, dtype=None, mask=None, engine=engine.unknown, **kwargs)
tensor_scalar_reduce(*, data, op0, operand0, reduce_op, reduce_res, reverse0=False, dtype=None, mask=None, **kwargs)
tensor_tensor(data1, data2, op, *, dtype=None, mask=None, engine=engine.unknown, **kwargs)
tensor_tensor_scan(data0, data1, initial, op0, op1, reverse0=False, reverse1=False, *, dtype=None, mask=None, **kwargs)
""".strip().splitlines()  # noqa: E501


def printed(function):
    """A signature without annotations, as a reference prints it."""
    parts = []
    star = False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        name = f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name
        if p.default is p.empty:
            parts.append(name)
        elif isinstance(p.default, IntEnum):
            parts.append(f"{name}={type(p.default).__name__}.{p.default.name}")
        else:
            parts.append(f"{name}={getattr(p.default, '__name__', None) or repr(p.default)}")
    return f"{function.__name__}({', '.join(parts)})"


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda s: s.partition("(")[0])
def test_signatures_are_those_of_the_reference(signature):
    assert printed(getattr(nisa, signature.partition("(")[0])) == signature


def test_there_are_no_other_functions():
    functions = {name for name in nisa.__all__ if inspect.isfunction(getattr(nisa, name))}
    assert functions == {s.partition("(")[0] for s in SIGNATURES}


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("dge_mode", {"none": 0, "swdge": 1, "hwdge": 2, "unknown": 3}),
        ("engine", {"tensor": 1, "vector": 5, "scalar": 2, "gpsimd": 3, "sync": 6, "unknown": 0}),
        ("nc_version", {"gen2": 2, "gen3": 3}),
        ("oob_mode", {"error": 0, "skip": 1}),
        ("reduce_cmd", {"idle": 0, "reset": 1, "reset_reduce": 3, "reduce": 2}),
    ],
)
def test_enumerations(name, members):
    kind = getattr(nisa, name)
    assert issubclass(kind, IntEnum)
    assert {m.name: int(m) for m in kind} == members


def test_constants():
    assert repr(nisa.dma_engine) == "nki.isa.dma_engine"
    assert nisa.constants.engine is nisa.engine
    assert nisa.fp32.min == np.float32(-3.4028235e38)
    assert nisa.vector_engine is nisa.engine.vector
    assert nisa.scalar_engine is nisa.engine.scalar
    assert nisa.tensor_engine is nisa.engine.tensor
    assert nisa.gpsimd_engine is nisa.engine.gpsimd
    assert nisa.unknown_engine is nisa.engine.unknown


@pytest.mark.parametrize(("target", "generation"), [("trn1", 2), ("inf2", 2), ("trn2", 3)])
def test_get_nc_version(target, generation):
    seen = []

    @nki.jit(mode="simulation", platform_target=target)
    def kernel():
        seen.append(nisa.get_nc_version())
        out = nl.ndarray((1, 1), dtype=nl.float32, buffer=nl.shared_hbm)
        nl.store(out, nisa.memset((1, 1), 0.0, nl.float32))
        return out

    kernel()
    assert seen == [nisa.nc_version(generation)]


def test_2_26_has_no_newer_generation():
    with pytest.raises(nkisim.NkiError, match="target: received trn3, allowed trn1, inf2 or trn2"):
        nkisim.simulate(lambda: nisa.get_nc_version(), target="trn3")()


def test_custom_operators_are_not_simulated():
    with pytest.raises(NotImplementedError, match=r"builtin_custom_op: 'f' of 'lib\.so'"):
        nisa.builtin_custom_op("f", "lib.so", {}, {}, [], [])


@pytest.mark.parametrize("value", [7, True, 1.0, "vector", nisa.reduce_cmd.idle, None])
def test_enumerations_take_their_members_and_integers_only(value):
    from nkisim.legacy.isa._enums import current

    with pytest.raises(TypeError, match=r"f\.engine: received .*, allowed engine\.tensor"):
        current(nisa.engine, value, "f", "engine")


@pytest.mark.parametrize(("value", "expected"), [(5, "vector"), (nisa.engine.gpsimd, "gpsimd"), (0, "unknown")])
def test_enumerations_map_by_name(value, expected):
    from nkisim.legacy.isa._enums import current

    assert current(nisa.engine, value, "f", "engine") is nkisim.isa.engine[expected]
