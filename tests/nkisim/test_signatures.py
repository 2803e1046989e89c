"""Every documented name of nki.isa and nki.language exists, with the documented parameters and defaults."""

from __future__ import annotations

import inspect
from enum import Enum
from typing import Any

import numpy as np
import pytest

from nkisim import isa, language, nki

# Parameters and defaults of NKI 0.6, transcribed from its API reference; an enumeration's member is
# written with its type, an operator and a buffer by name.
FP32_MIN = float(np.finfo(np.float32).min)

ISA = {
    "activate2": (
        "dst, op, data, imm0, imm1, op0, op1, relu_param=0.0, reverse0=False, reverse1=False, reduce_op=None, "
        "reduce_res=None, reduce_cmd=reduce_cmd.idle, name=None"
    ),
    "activation": (
        "dst, op, data, bias=None, scale=1.0, reduce_op=None, reduce_res=None, reduce_cmd=reduce_cmd.idle, name=None"
    ),
    "activation_reduce": "dst, op, data, reduce_op, reduce_res, bias=None, scale=1.0, name=None",
    "affine_select": (
        "dst, pattern, channel_multiplier, on_true_tile, on_false_value, cmp_op=equal, offset=0, name=None"
    ),
    "bn_aggr": "dst, data, name=None",
    "bn_stats": "dst, data, name=None",
    "core_barrier": "data, cores, engine=engine.gpsimd, name=None",
    "dma_compute": "dst, srcs, reduce_op, scales=None, unique_indices=True, oob_mode=oob_mode.error, name=None",
    "dma_copy": (
        "dst, src, priority=None, oob_mode=oob_mode.error, dge_mode=dge_mode.unknown, engine=engine.unknown, name=None"
    ),
    "dma_transpose": (
        "dst, src, axes=None, priority=None, dge_mode=dge_mode.unknown, oob_mode=oob_mode.error, name=None"
    ),
    "dropout": "dst, data, prob, name=None",
    "exponential": "dst, src, max_value=0.0, reduce_res=None, reduce_cmd=reduce_cmd.idle, reduce_init=0.0, name=None",
    "get_nc_sub_version": "",
    "get_nc_version": "",
    "iota": "dst, pattern, offset=0, channel_multiplier=0, name=None",
    "local_gather": "dst, src_buffer, index, num_elem_per_idx=1, num_valid_indices=None, name=None",
    "max8": "dst, src, name=None",
    "memset": "dst, value, engine=engine.unknown, name=None",
    "nc_find_index8": "dst, data, vals, name=None",
    "nc_match_replace8": "dst, data, vals, imm, dst_idx=None, name=None",
    "nc_matmul": (
        "dst, stationary, moving, is_stationary_onezero=False, is_moving_onezero=False, is_transpose=False, "
        "accumulate=None, tile_position=(), tile_size=(), perf_mode=matmul_perf_mode.none, name=None"
    ),
    "nc_matmul_mx": (
        "dst, stationary, moving, stationary_scale, moving_scale, tile_position=None, tile_size=None, "
        "accumulate=None, name=None"
    ),
    "nc_n_gather": "dst, data, indices, name=None",
    "nc_stream_shuffle": "dst, src, shuffle_mask, name=None",
    "nc_transpose": "dst, data, engine=engine.unknown, name=None",
    "nonzero_with_count": "dst, src, index_offset=0, padding_val=-1, name=None",
    "quantize_mx": "dst, src, dst_scale, name=None",
    "rand2": "dst, min, max, name=None",
    "rand_get_state": "dst, engine=engine.gpsimd, name=None",
    "rand_set_state": "src_seeds, engine=engine.gpsimd, name=None",
    "range_select": (
        "dst, on_true_tile, comp_op0, comp_op1, bound0, bound1, reduce_cmd=reduce_cmd.reset_reduce, "
        "reduce_res=None, reduce_op=maximum, range_start=0, on_false_value=FP32_MIN, name=None"
    ),
    "reciprocal": "dst, data, name=None",
    "register_alloc": "x=None",
    "register_load": "dst, src",
    "register_move": "dst, src",
    "register_store": "dst, src",
    "rng": "dst, engine=engine.vector, name=None",
    "scalar_tensor_tensor": "dst, data, op0, operand0, op1, operand1, reverse0=False, reverse1=False, name=None",
    "select_reduce": (
        "dst, predicate, on_true, on_false, reduce_res=None, reduce_cmd=reduce_cmd.idle, reduce_op=maximum, "
        "reverse_pred=False, name=None"
    ),
    "sendrecv": "src, dst, send_to_rank, recv_from_rank, pipe_id, dma_engine=dma_engine.dma, name=None",
    "sequence_bounds": "dst, segment_ids, name=None",
    "set_rng_seed": "src_seeds, name=None",
    "tensor_copy": "dst, src, engine=engine.unknown, name=None",
    "tensor_copy_predicated": "dst, src, predicate, reverse_pred=False, name=None",
    "tensor_partition_reduce": "dst, op, data, name=None",
    "tensor_reduce": "dst, op, data, axis, negate=False, keepdims=False, name=None",
    "tensor_scalar": (
        "dst, data, op0, operand0, reverse0=False, op1=None, operand1=None, reverse1=False, "
        "engine=engine.unknown, name=None"
    ),
    "tensor_scalar_cumulative": "dst, src, op0, op1, imm0, imm1=None, reduce_cmd=reduce_cmd.reset_reduce, name=None",
    "tensor_scalar_reduce": (
        "dst, data, op0, operand0, reduce_op, reduce_res=None, reverse0=False, "
        "reduce_cmd=reduce_cmd.reset_reduce, reduce_init=None, reduce_res_negate=False, name=None"
    ),
    "tensor_tensor": "dst, data1, data2, op, engine=engine.unknown, name=None",
    "tensor_tensor_scan": "dst, data0, data1, initial, op0, op1, reverse0=False, reverse1=False, name=None",
    "topk": "val_dst, idx_dst, src, n, name=None",
}

# Parameters of nki.language functions, and the functions that have them.
LANGUAGE = {
    "buffer": "is_hbm is_on_chip is_psum is_sbuf",
    "x, y, dtype=None": """
        abs_max abs_min add bitwise_and bitwise_or bitwise_xor divide equal fmod greater greater_equal
        left_shift less less_equal logical_and logical_or logical_xor maximum minimum mod multiply not_equal
        power right_shift subtract
    """,
    "x, dtype=None": """
        abs arctan ceil copy cos erf erf_dx exp floor gelu gelu_apprx_sigmoid gelu_apprx_sigmoid_dx
        gelu_apprx_tanh gelu_dx invert log logical_not mish negative reciprocal relu rsqrt sigmoid sign silu
        silu_dx sin softplus sqrt square tan tanh transpose trunc
    """,
    "x, axis, dtype=None, keepdims=False": "max mean min prod sum var",
    "x, axis, dtype=None": "all",
    "x, axis=-1, dtype=None": "softmax",
    "x, w, axis, n, epsilon=1e-06, dtype=None, compute_dtype=None": "rms_norm",
    "condition, x, y, dtype=None": "where",
    "x, rate, dtype=None": "dropout",
    "shape, dtype, buffer=sbuf, name=''": "ones rand zeros",
    "shape, fill_value, dtype, buffer=sbuf, name=''": "full",
    "x, dtype=None, buffer=None, name=''": "empty_like zeros_like",
    "seed": "random_seed",
    "x, axis": "expand_dims",
    "x, shape, dtype=None": "broadcast_to",
    "x, y, transpose_x=False": "matmul",
    "": "no_reorder program_ndim",
    "src, dtype=None": "load load_transpose2d",
    "data, indices, axis=0, dtype=None": "gather_flattened",
    "start, size": "ds",
    "start, stop=None, step=1": "affine_range dynamic_range sequential_range static_range",
    "lower, upper, body_fun, step=1": "fori_loop",
    "init, body_fun": "while_loop",
    "shape, dtype, buffer=sbuf, name='', address=None": "ndarray",
    "dst, value": "store",
    "axis=0": "program_id",
    "axes=0": "num_programs",
    "constant": "shared_constant",
    "n, dtype=uint8, dst=None": "shared_identity_matrix",
    "print_prefix, tensor": "device_print",
}

METHODS = {
    "NkiInstruction.__init__": "handle",
    "NkiInstruction.depends_on": "*producers",
    "VirtualRegister.__init__": "state=None, frozen=False",
    "NKIObject.__init__": "**kwargs",
    "NkiTensor.__init__": "shape, dtype, storage, buffer=sbuf, name=''",
    "NkiTensor.is_contiguous": "",
    "NkiTensor.get_pattern": "",
    "NkiTensor.is_indirect": "",
    "NkiTensor.__getitem__": "key",
    "NkiTensor.permute": "dims",
    "NkiTensor.broadcast": "dim, size",
    "NkiTensor.expand_dim": "dim",
    "NkiTensor.squeeze_dim": "dim",
    "NkiTensor.reshape_dim": "dim, shape",
    "NkiTensor.flatten_dims": "start_dim, end_dim",
    "NkiTensor.reshape": "shape",
    "NkiTensor.rearrange": "src_pattern, dst_pattern, fixed_sizes=None",
    "NkiTensor.__setitem__": "key, value",
    "NkiTensor.slice": "dim, start, end, step=1",
    "NkiTensor.select": "dim, index",
    "NkiTensor.vector_select": "dim, vector_offset",
    "NkiTensor.ap": "pattern, offset=None, scalar_offset=None, vector_offset=None, indirect_dim=0, dtype=None",
    "NkiTensor.view": "dtype",
    "NkiTensor.indirect": "index, num_elem=None",
}

ENUMS = {
    "engine": {"tensor": 1, "vector": 5, "scalar": 2, "gpsimd": 3, "dma": 4, "sync": 6, "unknown": 0},
    "reduce_cmd": {"idle": 0, "reset": 1, "reduce": 2, "reset_reduce": 3, "load_reduce": 4},
    "dge_mode": {"unknown": 0, "swdge": 1, "hwdge": 2, "none": 3},
    "oob_mode": {"error": 0, "skip": 1},
    "matmul_perf_mode": {"none": "none", "double_row": "double_row"},
    "nc_version": {"gen2": 2, "gen3": 3, "gen4": 4},
    "dma_engine": {"dma": 1, "gpsimd_dma": 2},
    "MemoryRegion": {"sbuf": "sbuf", "psum": "psum", "private_hbm": "private_hbm", "shared_hbm": "shared_hbm"},
}

OPERATORS = "bypass prelu average"
BUFFERS = "sbuf psum hbm private_hbm shared_hbm"
DTYPES = """
    bool_ int8 int16 int32 uint8 uint16 uint32 float16 float32 bfloat16 tfloat32 float8_e4m3 float8_e4m3fn float8_e5m2
    float8_e8m0fnu float8_e5m2_x4 float8_e4m3fn_x4 float4_e2m1fn_x4
"""
TILE_SIZE = """
    pmax psum_fmax psum_bank_fmax psum_bank_fmax_bytes psum_num_banks gemm_stationary_fmax gemm_moving_fmax
    bn_stats_fmax psum_min_align sbuf_min_align sbuf_size_bytes sbuf_fmax sbuf_fmax_bytes total_available_sbuf_size
"""
ENGINES = {
    "tensor_engine": "tensor",
    "vector_engine": "vector",
    "scalar_engine": "scalar",
    "gpsimd_engine": "gpsimd",
    "unknown_engine": "unknown",
}
TENSOR_ATTRIBUTES = "shape strides offset name dtype buffer ndim size reinterpret_cast"

FUNCTIONS = [(isa, name, parameters) for name, parameters in ISA.items()] + [
    (language, name, parameters) for parameters, names in LANGUAGE.items() for name in names.split()
]


def written(default: Any) -> str:
    """A default as the tables write it."""
    if isinstance(default, language.MemoryRegion):
        return default.name
    if isinstance(default, Enum):
        documented = next(name for name in ENUMS if getattr(isa, name, None) is type(default))
        return f"{documented}.{default.name}"
    if isinstance(default, language.DType):
        return str(default)
    if default == FP32_MIN and isinstance(default, (float, np.floating)):
        return "FP32_MIN"
    return str(getattr(default, "nki_op", repr(default)))


def parameters_of(function: Any) -> str:
    """The parameters as the tables write them."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    texts = []
    for p in inspect.signature(function).parameters.values():
        if p.name == "self":
            continue
        assert p.kind in marks or p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD, f"{p.name} is {p.kind}"
        default = "" if p.default is inspect.Parameter.empty else f"={written(p.default)}"
        texts.append(f"{marks.get(p.kind, '')}{p.name}{default}")
    return ", ".join(texts)


@pytest.mark.parametrize(
    ("module", "name", "parameters"), FUNCTIONS, ids=[f"{m.__name__}.{n}" for m, n, _ in FUNCTIONS]
)
def test_function_has_the_documented_parameters(module: Any, name: str, parameters: str) -> None:
    assert hasattr(module, name), f"{name} is documented and absent"
    assert parameters_of(getattr(module, name)) == parameters


@pytest.mark.parametrize("name", METHODS)
def test_method_has_the_documented_parameters(name: str) -> None:
    owner, method = name.split(".")
    cls = getattr(language, owner, None) or getattr(isa, owner)
    assert parameters_of(getattr(cls, method)) == METHODS[name]


@pytest.mark.parametrize("name", ENUMS)
def test_enumeration_has_the_documented_members(name: str) -> None:
    cls = getattr(isa, name, None) or getattr(language, name)
    assert {member.name: member.value for member in cls} == ENUMS[name]


def test_constants() -> None:
    for name in OPERATORS.split():
        assert getattr(language, name).nki_op == name
    for name in BUFFERS.split():
        assert isinstance(getattr(language, name), language.MemoryRegion)
    assert language.hbm is language.private_hbm
    for name in DTYPES.split():
        assert getattr(language, name) == name  # element types are strings
    for name in TILE_SIZE.split():
        assert isinstance(getattr(language.tile_size, name), int)
    for name, member in ENGINES.items():
        assert getattr(isa, name) is isa.engine[member]
    assert issubclass(isa.NkiValidationError, Exception)
    assert issubclass(language.NkiTensor, language.NKIObject)


def test_tensor_has_the_documented_attributes() -> None:
    seen = {}

    def kernel() -> None:
        t = language.ndarray((4, 3), language.float32)
        seen.update({name: hasattr(t, name) for name in TENSOR_ATTRIBUTES.split()})

    nki.simulate(kernel)()
    assert seen == dict.fromkeys(TENSOR_ATTRIBUTES.split(), True)


def test_jit_and_simulate() -> None:
    assert parameters_of(nki.jit) == "fn=None, **kwargs"
    first = next(iter(inspect.signature(nki.simulate).parameters.values()))
    assert (first.name, first.default) == ("kernel", inspect.Parameter.empty)


def test_language_has_no_name_that_is_not_documented() -> None:
    documented = {name for names in LANGUAGE.values() for name in names.split()}
    documented |= {*OPERATORS.split(), *BUFFERS.split(), *DTYPES.split(), "tile_size"}
    documented |= {"DType", "MemoryRegion", "NKIObject", "NkiTensor"}
    assert set(language.__all__) == documented


def test_operator_arguments_take_the_functions_themselves() -> None:
    """Every operator that the tables name is found through the callable of `nki.language`."""
    from nkisim.operators import ACTIVATIONS, ALU, activation, alu

    for name in ALU:
        assert alu(getattr(language, name)) is ALU[name]
    for name in ACTIVATIONS:
        assert activation(getattr(language, name)) is ACTIVATIONS[name]
    for name in ("divide", "mod", "fmod", "logical_not", "cos", "tan", "ceil", "floor", "trunc", "negative"):
        assert not hasattr(getattr(language, name), "nki_op"), f"{name} is no operator of an engine"
