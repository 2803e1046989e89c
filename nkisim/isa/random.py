"""Random numbers: the generators of the Vector and GpSimd Engines, and the instructions that draw from them.

Every lane (partition) of an engine has generators of its own: one XORWOW state of six uint32 words
x, y, z, w, v, d, in the order of Marsaglia's "Xorshift RNGs" (2003); four states on the Vector Engine from
NeuronCore-v4 on, one after the other in `rand_set_state`'s 24 words. An instruction uses the lanes its tile
stands on. With four states, element i of a row comes from state i % 4, and all four step together.

What AWS does not document is assumed: the Vector Engine before NeuronCore-v4, an LFSR on the chip, is a
XORWOW here; `set_rng_seed` and power-up give every lane different words, by a hash of the seed. The streams
are therefore reproducible here, but their bits differ from a chip's unless the state was set to the word.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import (
    FLOATS,
    INTEGERS,
    Array,
    bfloat16,
    float8_e4m3,
    float8_e5m2,
    float8_e8m0fnu,
    float16,
    float32,
    int32,
    tfloat32,
    uint32,
)
from nkisim.hardware import GEN3, GEN4
from nkisim.isa._call import Call, NkiInstruction
from nkisim.isa._enums import engine as EngineKind
from nkisim.machine import Core
from nkisim.memory import MemoryRegion
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

_WEYL_STEP = np.uint32(362437)
_SHIFTED_WORDS = 5  # x, y, z, w, v; the sixth word counts in Weyl steps
_RANDOM_FLOATS = (float8_e4m3, float8_e5m2, float16, bfloat16, float32, tfloat32)


def rng(dst: NkiTensor, engine: Any = EngineKind.vector, name: str | None = None) -> NkiInstruction:
    """Fill dst with random bits: the low bits of one 32-bit draw per element.

    Spec: nki.isa.rng, NKI 0.6. Engine: Vector, or GpSimd from NeuronCore-v3 on. Raises `NkiError` on types
    that are not integers, on GpSimd with PSUM.
    """
    call = Call("rng", name)
    call.tile("dst", dst, dtypes=INTEGERS)
    chosen = _engine(call, engine, (Engine.vector, Engine.gpsimd))
    if chosen is Engine.gpsimd:
        call.require(call.hardware.generation >= GEN3, "engine", "gpsimd on target", call.hardware.target, "vector")
        if dst.buffer is MemoryRegion.psum:
            call.refuse("dst", "GpSimd Engine and PSUM", "psum", "sbuf")

    bits = _draw(_lanes(call.core, chosen, dst), dst.free_size)
    unsigned = np.dtype(f"u{dst.dtype.itemsize}")
    call.write("dst", dst, bits.astype(unsigned).view(dst.dtype.numpy), bits=True)
    return call.record(chosen)


def rand2(dst: NkiTensor, min: float | NkiTensor, max: float | NkiTensor, name: str | None = None) -> NkiInstruction:
    """Fill dst with uniform float32 values from [min, max], converted to its dtype.

    min and max are numbers or [P, 1] float32 tiles. A value is min + (max - min) * u with u the top 24 bits
    of a draw over 2^24. Spec: nki.isa.rand2, NKI 0.6. Engine: Vector, from NeuronCore-v4 on. Raises
    `NkiError` unless min < max.
    """
    call = Call("rand2", name)
    call.need_generation(GEN4)
    call.tile("dst", dst, dtypes=(*_RANDOM_FLOATS, *INTEGERS))
    low = call.column("min", min, dst.shape[0])
    high = call.column("max", max, dst.shape[0])
    width = high - low
    if not bool(((width > 0) & (width < np.inf)).all()):
        received = f"min {_extremes(low)}, max {_extremes(high)}"
        call.refuse("max", "range", received, "min < max in every partition, max - min within float32")

    u = _uniform(_draw(_lanes(call.core, Engine.vector, dst), dst.free_size))
    call.write("dst", dst, low + width * u)
    return call.record(Engine.vector)


def dropout(dst: NkiTensor, data: NkiTensor, prob: float | NkiTensor, name: str | None = None) -> NkiInstruction:
    """Copy data with each element replaced by zero with probability prob; kept elements are not scaled.

    prob is a number or a [P, 1] tile of one probability per partition. Spec: nki.isa.dropout, NKI 0.6.
    Engine: Vector. Raises `NkiError` where dst's dtype is not data's, on probabilities outside [0, 1], on a
    prob tile of other than float32 with integer data.
    """
    call = Call("dropout", name)
    call.tile("dst", dst)
    call.tile("data", data)
    call.same_layout("dst", dst, "data", data)
    if dst.dtype is not data.dtype:
        call.refuse("dst", "dtype", dst.dtype, f"{data.dtype}, that of data")
    floats = tuple(d for d in FLOATS if d is not float8_e8m0fnu)
    rate = call.column("prob", prob, data.shape[0], dtypes=floats if data.dtype.is_float else (float32,))
    if not bool(((rate >= 0) & (rate <= 1)).all()):
        call.refuse("prob", "value", _extremes(rate), "probabilities, 0..1")

    x = call.read_2d("data", data)
    dropped = _uniform(_draw(_lanes(call.core, Engine.vector, dst), dst.free_size)) < rate
    call.write("dst", dst, np.where(dropped, np.zeros((), x.dtype), x), bits=True)
    return call.record(Engine.vector)


def set_rng_seed(src_seeds: NkiTensor, name: str | None = None) -> NkiInstruction:
    """Seed the Vector Engine's generators, all lanes, from one 32-bit value.

    Spec: nki.isa.set_rng_seed, NKI 0.6. Engine: Vector. Raises `NkiError` unless src_seeds is [1, 1] and 32
    bits wide.
    """
    call = Call("set_rng_seed", name)
    call.tile("src_seeds", src_seeds, dtypes=(int32, uint32, float32))
    if src_seeds.shape != (1, 1):
        call.refuse("src_seeds", "shape", list(src_seeds.shape), "[1, 1]")

    seed = int(np.ascontiguousarray(call.read("src_seeds", src_seeds)).view(np.uint32)[0, 0])
    call.core.random[Engine.vector.name] = _expand(call.core, Engine.vector, seed)
    return call.record(Engine.vector)


def rand_set_state(src_seeds: NkiTensor, engine: Any = EngineKind.gpsimd, name: str | None = None) -> NkiInstruction:
    """Set the generator state of the lanes src_seeds stands on: 6 words each on GpSimd, 24 on Vector.

    Spec: nki.isa.rand_set_state, NKI 0.6. Engine: GpSimd from NeuronCore-v3 on, Vector from NeuronCore-v4 on.
    Raises `NkiError` unless src_seeds is a 2-D uint32 tile in SBUF of that many columns.
    """
    call = Call("rand_set_state", name)
    chosen = _state_engine(call, engine)
    call.tile("src_seeds", src_seeds, (MemoryRegion.sbuf,), (uint32,))
    _check_state(call, "src_seeds", src_seeds, chosen)

    lanes = _lanes(call.core, chosen, src_seeds)
    lanes[...] = call.read("src_seeds", src_seeds).reshape(lanes.shape)
    return call.record(chosen)


def rand_get_state(dst: NkiTensor, engine: Any = EngineKind.gpsimd, name: str | None = None) -> NkiInstruction:
    """Store the generator state of the lanes dst stands on, as `rand_set_state` takes it.

    Spec: nki.isa.rand_get_state, NKI 0.6. Engine: GpSimd from NeuronCore-v3 on, Vector from NeuronCore-v4 on.
    Raises `NkiError` unless dst is a 2-D uint32 tile of 6 (GpSimd, SBUF) or 24 (Vector) columns.
    """
    call = Call("rand_get_state", name)
    chosen = _state_engine(call, engine)
    buffers = (MemoryRegion.sbuf,) if chosen is Engine.gpsimd else (MemoryRegion.sbuf, MemoryRegion.psum)
    call.tile("dst", dst, buffers, (uint32,))
    _check_state(call, "dst", dst, chosen)

    call.write("dst", dst, _lanes(call.core, chosen, dst).reshape(dst.shape))
    return call.record(chosen)


def _engine(call: Call, engine: Any, allowed: tuple[Engine, ...]) -> Engine:
    if not isinstance(engine, EngineKind):
        call.refuse("engine", "type", repr(engine), "a member of nki.isa.engine")
    if engine not in allowed:
        call.refuse("engine", "value", engine.name, " or ".join(e.name for e in allowed))
    found: Engine = engine
    return found


def _state_engine(call: Call, engine: Any) -> Engine:
    call.need_generation(GEN3)
    chosen = _engine(call, engine, (Engine.gpsimd, Engine.vector))
    if chosen is Engine.vector and call.hardware.generation < GEN4:
        call.refuse("engine", "vector on target", call.hardware.target, "gpsimd before NeuronCore-v4")
    return chosen


def _check_state(call: Call, operand: str, t: NkiTensor, engine: Engine) -> None:
    words = _states(call.core, engine) * call.hardware.xorwow_state_words
    if len(t.shape) != 2 or t.shape[1] != words:
        call.refuse(operand, f"shape on {engine.name}", list(t.shape), f"[P, {words}]")


def _extremes(values: Array) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low}" if low == high else f"{low}..{high}"


# ---------------------------------------------------------------------------------------------------
# Generators


def _states(core: Core, engine: Engine) -> int:
    """Generator states per lane."""
    return core.hardware.vector_random_states if engine is Engine.vector else core.hardware.gpsimd_random_states


def _lanes(core: Core, engine: Engine, t: NkiTensor) -> Array:
    """The states of the lanes that `t` stands on: a view, uint32 [P, states, 6]."""
    if engine.name not in core.random:
        core.random[engine.name] = _expand(core, engine, None)
    state: Array = core.random[engine.name]
    return state[t.start_partition : t.start_partition + t.shape[0]]


def _expand(core: Core, engine: Engine, seed: int | None) -> Array:
    """A state for every lane: a 64-bit mix (splitmix64) of the seed and the word's number.

    Without a seed, the state at power-up: it differs between engines and cores.
    """
    shape = (core.hardware.partitions, _states(core, engine), core.hardware.xorwow_state_words)
    key = (seed << 1) if seed is not None else (((core.rank << 8) + engine.value) << 1) + 1
    number = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    z = (number + np.uint64(key << 20)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z >> np.uint64(32)).astype(np.uint32).reshape(shape)


def _draw(state: Array, count: int) -> Array:
    """The next `count` words of every lane, uint32 [P, count]; `state` [P, states, 6] moves on in place."""
    lanes, n_states = state.shape[:2]
    steps = -(-count // n_states)
    words = np.empty((_SHIFTED_WORDS + steps, lanes, n_states), np.uint32)
    words[:_SHIFTED_WORDS] = state[..., :_SHIFTED_WORDS].transpose(2, 0, 1)
    # A new word needs the last one and the one five back: five old words are prepared at a time.
    for i in range(0, steps, _SHIFTED_WORDS):
        old = words[i : i + _SHIFTED_WORDS]
        old = old ^ (old >> np.uint32(2))
        old ^= old << np.uint32(1)
        for k in range(i, min(i + _SHIFTED_WORDS, steps)):
            last = words[k + _SHIFTED_WORDS - 1]
            words[k + _SHIFTED_WORDS] = last ^ (last << np.uint32(4)) ^ old[k - i]
    weyl = state[None, :, :, _SHIFTED_WORDS] + _WEYL_STEP * np.arange(1, steps + 1, dtype=np.uint32)[:, None, None]
    state[..., :_SHIFTED_WORDS] = words[steps:].transpose(1, 2, 0)
    state[..., _SHIFTED_WORDS] = weyl[-1]
    drawn = (words[_SHIFTED_WORDS:] + weyl).transpose(1, 0, 2)
    return drawn.reshape(lanes, steps * n_states)[:, :count]


def _uniform(bits: Array) -> Array:
    """float32 in [0, 1) from the top 24 bits."""
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
