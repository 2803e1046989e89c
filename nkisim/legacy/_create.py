"""Making tensors: `nl.ndarray` and the functions that fill what it makes."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from nkisim import language as current
from nkisim.dtypes import DType, float32, uint8, uint32
from nkisim.errors import call_sites
from nkisim.legacy._assign import assign, number_for
from nkisim.legacy._dtypes import kind_of
from nkisim.legacy._errors import refuse
from nkisim.legacy._index import ParDim
from nkisim.legacy._issue import flush, operand, perform, produce, promise_zeros
from nkisim.legacy._root import allocate, from_tensor
from nkisim.legacy._state import State, state
from nkisim.legacy._tile import Tile
from nkisim.memory import ON_CHIP, MemoryRegion
from nkisim.view import as_int

NDARRAY = "nki.language.ndarray, SDK 2.26"
_BY_NAME = {
    "sbuf": MemoryRegion.sbuf,
    "psum": MemoryRegion.psum,
    "hbm": MemoryRegion.private_hbm,
    "private_hbm": MemoryRegion.private_hbm,
    "shared_hbm": MemoryRegion.shared_hbm,
}


def new_tile(
    shape: tuple[int, ...],
    kind: DType,
    buffer: MemoryRegion,
    name: str = "",
    address: tuple[int, int] | None = None,
) -> Tile:
    """A new tile without block dimensions; its contents are undefined."""
    return allocate(shape, kind, buffer, name, address=None if address is None else lambda _: address).tile()


def ndarray(shape: Any, dtype: Any, *, buffer: Any = None, name: str = "") -> Tile:
    """A new tensor of undefined contents.

    Args:
        shape: block dimensions, the partition dimension (marked by `nl.par_dim` where it is not the first), free ones.
        dtype: element type.
        buffer: `nl.sbuf` (default), `nl.psum`, `nl.hbm`, `nl.shared_hbm`, or an allocator of `nki.compiler`.
        name: shown in errors and traces.

    Raises:
        NkiError: a shape or a memory that there is not; `shared_hbm` elsewhere than in the kernel itself.
    """
    st = state("ndarray")
    flush(st)
    kind = kind_of(dtype, "nki.language.ndarray dtype")
    given = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    sizes = tuple(as_int(n) for n in given)
    if not sizes or any(n is None or n < 1 for n in sizes):
        refuse("ndarray", name, "shape", shape, "positive integers known when the kernel is built", NDARRAY)
    plain = tuple(n for n in sizes if n is not None)
    region, place = _memory(name, buffer)
    marked = [d for d, n in enumerate(given) if isinstance(n, ParDim)]
    if len(marked) > 1:
        refuse("ndarray", name, "par_dim", f"dimensions {marked}", "one of them", NDARRAY)
    if region in ON_CHIP:
        return _on_chip(st, name, plain, marked[0] if marked else 0, kind, region, place)
    if region is MemoryRegion.shared_hbm:
        return _shared(st, name, plain, kind)
    root = allocate(plain, kind, region, name)
    root.block(())  # now: it may be returned without being used
    return root.tile()


def _memory(name: str, buffer: Any) -> tuple[MemoryRegion, Any]:
    """The memory, and what places blocks in it, of a `buffer=` argument."""
    if buffer is None:
        return MemoryRegion.sbuf, None
    if isinstance(buffer, str) and buffer in _BY_NAME:
        return _BY_NAME[buffer], None
    if isinstance(buffer, MemoryRegion):
        return buffer, None
    region = getattr(buffer, "region", None)
    if not isinstance(region, MemoryRegion):
        refuse("ndarray", name, "buffer", repr(buffer), "nl.sbuf, nl.psum, nl.hbm, nl.shared_hbm", NDARRAY)
    return region, buffer


def _on_chip(
    st: State, name: str, shape: tuple[int, ...], n_block: int, kind: DType, region: MemoryRegion, place: Any
) -> Tile:
    limit = st.core.hardware.partitions
    if shape[n_block] > limit:
        rule = "err_num_partition_exceed_arch_limit: partitions"
        refuse("ndarray", name, rule, f"{shape[n_block]} in {list(shape)}", f"1..{limit}")
    if len(shape) == n_block + 1:
        shape = (*shape, 1)
    inner = shape[n_block:]
    address = None if place is None else lambda index: place.place(index, inner, kind.itemsize)
    return allocate(shape, kind, region, name, n_block, address).tile()


def _shared(st: State, name: str, shape: tuple[int, ...], kind: DType) -> Tile:
    """The shared tensor that programs make at this point, the same for all programs of a core."""
    _, caller = call_sites()
    if caller is not None or any(loop.scoped for loop in st.loops):
        where = "in a loop" if caller is None else "in a function that the kernel calls"
        rule = "err_shared_hbm_must_in_kernel_level: a shared_hbm tensor made elsewhere than in the kernel itself"
        refuse("ndarray", name, rule, where, "the kernel's own statements, outside of loops")
    number = st.n_shared
    st.n_shared += 1
    if number == len(st.shared):
        root = allocate(shape, kind, MemoryRegion.shared_hbm, name, scope=())
        root.block(())
        st.shared.append(root)
    root = st.shared[number]
    if (root.shape, root.kind) != (shape, kind):
        rule = "shared_hbm tensor that differs between the programs of a grid"
        refuse("ndarray", name, rule, f"{kind}{list(shape)}", f"{root.kind}{list(root.shape)}", NDARRAY)
    return root.tile()


def full(
    shape: Any, fill_value: Any, dtype: Any, *, buffer: Any = None, name: str = "", lazy_initialization: bool = False
) -> Tile:
    """A new tensor on chip, filled with a number.

    `lazy_initialization` is no documented argument; AWS's kernels give it to `full`, `zeros` and `ones`. It says when
    the compiler may write the value, and has no effect here.
    """
    _check_lazy("full", lazy_initialization)
    t = ndarray(shape, dtype, buffer=buffer, name=name)
    if not t.on_chip:
        rule = "err_hbm_tensor_with_init_value_not_supported: buffer of a filled tensor"
        refuse("full", name, rule, t.buffer.name, "sbuf or psum; nl.store writes to a tensor of nl.ndarray")
    if buffer is not None and not isinstance(buffer, (MemoryRegion, str)) and getattr(buffer, "placed", False):
        rule = "err_tensor_creation_on_scratchpad_with_init_value_not_supported: a filled tensor that the kernel places"
        refuse("full", name, rule, repr(buffer), "nl.ndarray, and an assignment")
    value = number_for("full", t.kind, fill_value)
    for index in product(*(range(n) for n in t.shape[: t.lead])):
        assign(t[index] if index else t, value, reduces=True)
    return t


def zeros(shape: Any, dtype: Any, *, buffer: Any = None, name: str = "", lazy_initialization: bool = False) -> Tile:
    """A new tensor of zeros. In PSUM they cost nothing where a `+= nc_matmul` comes first: that overwrites them."""
    _check_lazy("zeros", lazy_initialization)
    if buffer is MemoryRegion.psum or buffer == "psum":
        t = ndarray(shape, dtype, buffer=buffer, name=name)
        for index in product(*(range(n) for n in t.shape[: t.lead])):
            promise_zeros(t.root.block(index))
        return t
    return full(shape, 0, dtype, buffer=buffer, name=name)


def ones(shape: Any, dtype: Any, *, buffer: Any = None, name: str = "", lazy_initialization: bool = False) -> Tile:
    """A new tensor of ones."""
    _check_lazy("ones", lazy_initialization)
    return full(shape, 1, dtype, buffer=buffer, name=name)


def _check_lazy(what: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"nki.language.{what}.lazy_initialization: received {value!r}, allowed a bool")


def zeros_like(a: Any, dtype: Any = None, *, buffer: Any = None, name: str = "") -> Tile:
    """A new tensor of zeros with the shape of `a`, and its element type unless `dtype` says otherwise."""
    a = _tensor("zeros_like", a)
    return zeros(_shape_of(a), a.kind if dtype is None else dtype, buffer=buffer, name=name)


def empty_like(a: Any, dtype: Any = None, *, buffer: Any = None, name: str = "") -> Tile:
    """A new tensor of undefined contents with the shape of `a`, and its element type unless `dtype` says otherwise."""
    a = _tensor("empty_like", a)
    return ndarray(_shape_of(a), a.kind if dtype is None else dtype, buffer=buffer, name=name)


def _tensor(what: str, a: Any) -> Tile:
    if not isinstance(a, Tile):
        refuse(what, "a", "type", type(a).__name__, "a tensor", f"nki.language.{what}, SDK 2.26")
    return a


def _shape_of(a: Tile) -> tuple[int, ...]:
    return tuple(ParDim(n) if a.on_chip and d == a.lead else n for d, n in enumerate(a.shape))


def rand(shape: Any, dtype: Any = np.float32) -> Tile:
    """A new SBUF tile of uniform random numbers between 0 and 1, from the Vector Engine's generator."""
    st = state("rand")
    flush(st)
    t = current.rand(tuple(shape), kind_of(dtype, "nki.language.rand dtype"))
    return from_tensor(t, "", scope=st.scope).tile()


def random_seed(seed: Any, *, mask: Any = None) -> None:
    """Seed the generator with a number or a tile of one element."""
    if isinstance(seed, Tile):
        source = operand("random_seed", "seed", seed)
    else:
        source = new_tile((1, 1), uint32, MemoryRegion.sbuf)
        assign(source, seed)
    perform(
        "random_seed", (1, 1), lambda part: current.random_seed(part.read(source, (None,) * source.ndim)), mask=mask
    )


def shared_constant(constant: Any, dtype: Any = None) -> Tile:
    """A NumPy array, or the `.npy` file of a path, as a read-only tensor in HBM."""
    st = state("shared_constant")
    flush(st)
    array = np.load(constant) if isinstance(constant, str) else constant
    if not isinstance(array, np.ndarray):
        raise TypeError(f"shared_constant.constant: received {type(constant).__name__}, allowed an array or a path")
    if dtype is not None:
        array = array.astype(kind_of(dtype, "shared_constant dtype").numpy)
    return from_tensor(current.shared_constant(array), "constant", "immutable", st.scope).tile()


def shared_identity_matrix(n: Any, dtype: Any = uint8) -> Tile:
    """The n by n identity in a new SBUF tile."""
    st = state("shared_identity_matrix")
    flush(st)
    t = current.shared_identity_matrix(n, kind_of(dtype, "shared_identity_matrix dtype"))
    return from_tensor(t, "identity", "immutable", st.scope).tile()


def constant_tile(what: str, shape: tuple[int, ...], value: Any, kind: DType = float32) -> Tile:
    """A new SBUF tile of one number, pending as an instruction's result is."""
    from nkisim import isa

    number = number_for(what, kind, value)
    return produce(what, shape, lambda dst, _: isa.memset(dst=dst, value=number), default=kind)
