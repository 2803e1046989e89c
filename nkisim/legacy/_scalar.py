"""`nki.typing.scalar`: values of tensors as conditions of loops, as "NKI API errors" shows them.

Only loops that test at their end exist: the first condition is `scalar(True)`, the later ones come from tensors. The
simulator runs them as Python does, one trip after the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from nkisim import isa
from nkisim.errors import call_site
from nkisim.legacy._errors import refuse
from nkisim.legacy._issue import operand
from nkisim.legacy._state import state
from nkisim.legacy.language._shared import is_number
from nkisim.memory import DMA_ABLE


class Scalar:
    """A number that the device has at run time; `known` ones the kernel's text says."""

    __slots__ = ("known", "value")
    __array_ufunc__: ClassVar[None] = None
    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __init__(self, value: float, known: bool) -> None:
        self.value = value
        self.known = known

    def _compared(self, other: Any, test: Callable[[Any, Any], bool]) -> Scalar:
        if not isinstance(other, Scalar):
            if not is_number(other):
                refuse("scalar", "", "type compared with", type(other).__name__, "a number or a scalar")
            other = Scalar(other, True)
        return Scalar(test(self.value, other.value), self.known and other.known)

    def __lt__(self, other: Any) -> Scalar:
        return self._compared(other, operator.lt)

    def __le__(self, other: Any) -> Scalar:
        return self._compared(other, operator.le)

    def __gt__(self, other: Any) -> Scalar:
        return self._compared(other, operator.gt)

    def __ge__(self, other: Any) -> Scalar:
        return self._compared(other, operator.ge)

    def __eq__(self, other: object) -> Scalar:  # type: ignore[override]
        return self._compared(other, operator.eq)

    def __ne__(self, other: object) -> Scalar:  # type: ignore[override]
        return self._compared(other, operator.ne)

    def __bool__(self) -> bool:
        """The condition of a `while`: known where the loop begins, a tensor's afterwards."""
        entered, site = state("scalar").entered, call_site()
        if self.known:
            entered.add(site)
        elif site not in entered:
            refuse(
                "scalar",
                "",
                "err_while_loop_requires_unconditional_entry: a condition on a tensor's value",
                "one that is tested before a loop's first trip, or in an if",
                "`cond = scalar(True)` before `while cond:`, and tests at the end of its body",
            )
        if not self.value:
            entered.discard(site)
        return bool(self.value)

    def __index__(self) -> NoReturn:
        rule = "err_dynamic_control_flow_not_supported: a tensor's value as a Python number"
        refuse("scalar", "", rule, repr(self), "values known when the kernel is built")

    __int__ = __float__ = __index__

    def __repr__(self) -> str:
        return f"scalar({self.value})" if self.known else "scalar of a tensor"


def scalar(x: Any) -> Scalar:
    """A number, or the one element of a tile in SBUF or of a tensor in HBM, to test in a `while`.

    Raises:
        NkiError: neither; an element of a type that a register does not hold.
    """
    state("scalar")
    if is_number(x):
        return Scalar(x, True)
    source = operand("scalar", "x", x, DMA_ABLE)
    register = isa.register_alloc()
    isa.register_load(register, source.tensor("scalar", "x"))
    return Scalar(register.value, False)
