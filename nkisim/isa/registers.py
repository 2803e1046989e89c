"""Registers of the engines' sequencers: 32-bit scalars for loop bounds, conditions and addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from nkisim.dtypes import INTEGERS, DType, float32
from nkisim.isa._call import Call
from nkisim.memory import DMA_ABLE
from nkisim.objects import VirtualRegister
from nkisim.sequencer import LOOPS
from nkisim.tensor import NkiTensor
from nkisim.trace import Engine

REGISTER_TYPES: tuple[DType, ...] = (*INTEGERS, float32)


def register_alloc(x: int | None = None) -> VirtualRegister:
    """A new register that holds `x`, or nothing until it is written.

    There is no limit on allocations: the compiler gives a register back after its last use. More
    than 64 alive at once are refused when the kernel ends.

    Spec: nki.isa.register_alloc, NKI 0.6. Engine: sequencers. Raises `NkiError` on anything but a 32-bit
    integer or None.
    """
    call = Call("register_alloc")
    if x is not None:
        _check_immediate(call, "x", x, "an int or None")
    register = VirtualRegister(x)
    call.record(Engine.sync, immediate=x)
    return register


def register_move(dst: VirtualRegister, src: int | VirtualRegister) -> None:
    """Copy a compile-time integer or another register to dst.

    Spec: nki.isa.register_move, NKI 0.6. Engine: sequencers. Raises `NkiError` on the index register of a
    loop as dst, on integers of more than 32 bits.
    """
    call = Call("register_move")
    _check_writable(call, dst)
    if isinstance(src, VirtualRegister):
        dst.value = _value(call, "src", src)
    else:
        _check_immediate(call, "src", src, "an int or a VirtualRegister")
        dst.value = src
    call.record(Engine.sync, immediate=None if isinstance(src, VirtualRegister) else src)


def register_load(dst: VirtualRegister, src: NkiTensor) -> None:
    """Read the one element of an SBUF or HBM tensor into dst.

    Spec: nki.isa.register_load, NKI 0.6. Engine: sequencers. Raises `NkiError` on the index register of a
    loop as dst, on tensors of other than one element, on types that a register does not hold.
    """
    call = Call("register_load")
    _check_writable(call, dst)
    _check_element(call, "src", src)
    dst.value = call.read("src", src).reshape(-1)[0].item()
    call.record(Engine.sync)


def register_store(dst: NkiTensor, src: VirtualRegister) -> None:
    """Write src to the one element of an SBUF or HBM tensor; negative integers in two's complement.

    Spec: nki.isa.register_store, NKI 0.6. Engine: sequencers. Raises `NkiError` on tensors of other than one
    element, on a value that dst's type does not hold.
    """
    call = Call("register_store")
    _check_element(call, "dst", dst)
    if not isinstance(src, VirtualRegister):
        call.refuse("src", "type", type(src).__name__, "VirtualRegister")
    value = _value(call, "src", src)
    if isinstance(value, float) != (dst.dtype is float32):
        holds = "a float" if isinstance(value, float) else "an integer"
        allowed = "float32" if isinstance(value, float) else "an integer type"
        call.refuse("dst", "dtype", f"{dst.dtype} for {holds}", allowed)
    if isinstance(value, int):
        bits = 8 * dst.dtype.itemsize
        if not -(2 ** (bits - 1)) <= value < 2**bits:
            call.refuse("src", "value", value, f"what {bits} bits hold: no document says how more are cut")
        value %= 2**bits
        stored = np.array([value], f"u{dst.dtype.itemsize}").view(dst.dtype.numpy)
    else:
        stored = np.array([value], np.float32)
    call.write("dst", dst, stored, bits=True)
    call.record(Engine.sync)


def _check_immediate(call: Call, operand: str, value: Any, allowed: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        call.refuse(operand, "type", type(value).__name__, allowed)
    if not -(2**31) <= value < 2**32:
        call.refuse(operand, "value", value, "a 32-bit integer, signed or unsigned")


def _check_writable(call: Call, dst: Any) -> None:
    if not isinstance(dst, VirtualRegister):
        call.refuse("dst", "type", type(dst).__name__, "VirtualRegister")
    if dst.frozen:
        call.refuse("dst", "write to a loop's index register", "the loop's index", "a register_alloc register", LOOPS)


def _value(call: Call, operand: str, register: VirtualRegister) -> int | float:
    if not register.defined:
        allowed = "a register written before"
        call.refuse(operand, "uninitialized read", "a register that was never written", allowed)
    return register.value


def _check_element(call: Call, operand: str, t: Any) -> None:
    if not isinstance(t, NkiTensor):
        call.refuse(operand, "type", type(t).__name__, "NkiTensor")
    if t.buffer not in DMA_ABLE:
        call.refuse(operand, "buffer", t.buffer.name, "sbuf or HBM")
    if t.size != 1 or len(t.shape) > 2:
        call.refuse(operand, "shape", list(t.shape), "[1] or [1, 1]")
    if t.dtype not in REGISTER_TYPES:
        call.refuse(operand, "dtype", t.dtype, ", ".join(REGISTER_TYPES))
