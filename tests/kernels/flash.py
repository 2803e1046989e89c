"""Runs of the batched decode kernels against their oracle, and traces of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from contributed import _decode_launch
from contributed._cases import FlashCase
from contributed.flash_decode import flash_decode
from nkisim import Trace, simulate
from nkisim.trace import Record
from reference.budget import check_budget
from reference.flash_decode import flash_decode as oracle
from reference.rounded import flash_decode_rounded

TARGETS = ["trn1", "trn2", "trn3"]
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16)]
# In two-byte types the budget's unit is the rounding the kernels document; one more of the same size would
# show as a share near 1. In float32, lse included, there is nothing wider to compare with, and the share is luck.
CEILING = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5}

DTYPE_IDS = ["f32", "bf16", "f16"]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
by_target = pytest.mark.parametrize("target", TARGETS)
by_layout = pytest.mark.parametrize("d_major", [False, True], ids=["s-major", "d-major"])


def by_case_dtype_and_target(cases: Sequence[Any]) -> Any:
    """Every case in every dtype and on every target, but one target for each dtype: three runs of nine.

    Which dtype goes with which target changes from case to case, so that every three cases see all nine pairs. The
    self-check of a kernel's file runs them all for each case.
    """
    runs = [
        pytest.param(case, dtype, TARGETS[(i + j) % 3], id=f"{case.name}-{DTYPE_IDS[j]}-{TARGETS[(i + j) % 3]}")
        for i, case in enumerate(cases)
        for j, dtype in enumerate(DTYPES)
    ]
    return pytest.mark.parametrize(("case", "dtype", "target"), runs)


def of_any_launch(case: FlashCase) -> FlashCase:
    """What inputs and results depend on."""
    return replace(case, name="", d_major=False, n_splits=None, n_cores=1)


@lru_cache(maxsize=4)
def inputs(case: FlashCase, dtype: Any, seed: int) -> Any:
    """`case.inputs`, for launches that follow each other; not to be changed."""
    return case.inputs(dtype, seed)


@lru_cache(maxsize=256)
def references(case: FlashCase, dtype: Any, seed: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Exact and low-precision o, and lse."""
    q, k, v, options = inputs(case, dtype, seed)
    exact, low = oracle(q, k, v, **options), flash_decode_rounded(q, k, v, **options)
    return (exact.o, low[0]), (exact.lse, low[1])


def check(case: FlashCase, dtype: Any, target: str, seed: int = 1) -> None:
    """o and lse of a case within their ceilings."""
    drawn = of_any_launch(case), dtype, seed
    q, k, v, options = inputs(*drawn)
    o, lse = flash_decode(q, k, v, return_lse=True, target=target, **options, **case.launch(target))
    assert o.dtype == q.dtype
    assert lse.dtype == np.float32
    for_o, for_lse = references(*drawn)
    share = check_budget("o", o, *for_o, q.dtype)
    assert share <= CEILING[q.dtype.name], f"o: {share:.2f} of the budget"
    check_budget("lse", lse, *for_lse, np.float32)


@dataclass(frozen=True)
class Run:
    """A kernel's trace and its arguments by name."""

    trace: Trace
    arguments: dict[str, Any]

    @property
    def item_keys(self) -> int:
        """Keys of a whole item."""
        return 128 * int(self.arguments["tokens"])

    def bytes_read(self, name: str) -> int:
        """Bytes of an argument that the kernel reads."""
        reads = (access for record in self.trace.records for access in record.reads)
        return sum(a.nbytes for a in reads if a.storage.is_argument and a.storage.name == name)

    def inner_steps(self) -> Iterator[list[Record]]:
        """The instructions of each further item."""
        depth, step = 0, None
        for record in self.trace.records:
            depth += {"loop_begin": 1, "loop_end": -1}.get(record.instruction, 0)
            if step is not None and record.instruction in ("loop_iteration", "loop_end"):
                yield step
                step = None
            if record.instruction == "loop_iteration" and depth == 2:
                step = []
            elif step is not None:
                step.append(record)


def traced(*args: Any, target: str = "trn2", geometry: Any = None, **kwargs: Any) -> tuple[Any, list[Run]]:
    """What `flash_decode` returns and the kernels it ran; `geometry` replaces the one it would choose."""
    runs = []

    def record(kernel: Any, *kernel_args: Any, target: str | None = None) -> Any:
        runs.append(Run(Trace(), dict(inspect.signature(kernel.function).bind(*kernel_args).arguments)))
        return simulate(kernel, target=target, trace=runs[-1].trace)(*kernel_args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_decode_launch, "simulate_kernel", record)
        if geometry is not None:
            patch.setattr(_decode_launch, "choose_geometry", lambda **_: geometry)
        return flash_decode(*args, target=target, **kwargs), runs


class _ChosenError(Exception):
    """`flash_decode` has chosen its geometry."""


def geometry_of(*args: Any, target: str = "trn2", **kwargs: Any) -> Any:
    """The geometry that `flash_decode` chooses; nothing runs."""
    chosen = []
    choose = _decode_launch.choose_geometry

    def keep(**kwargs: Any) -> Any:
        chosen.append(choose(**kwargs))
        raise _ChosenError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_decode_launch, "choose_geometry", keep)
        with pytest.raises(_ChosenError):
            flash_decode(*args, target=target, **kwargs)
    return chosen[0]


def normal(*shape: int, dtype: Any = BF16, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
