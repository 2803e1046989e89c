"""Python operators on what has no value while the kernel is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NoReturn


def _refusing(symbol: str) -> Callable[..., NoReturn]:
    def method(self: Unknown, *_: object) -> NoReturn:
        self._refuse_operator(symbol)

    return method


class Unknown:
    """Base of classes whose objects refuse Python's arithmetic and order."""

    __slots__ = ()

    # Keeps NumPy scalars on the left from turning the object into an array.
    __array_ufunc__: ClassVar[None] = None

    def _refuse_operator(self, symbol: str) -> NoReturn:
        raise NotImplementedError

    __add__ = __radd__ = _refusing("+")
    __sub__ = __rsub__ = _refusing("-")
    __mul__ = __rmul__ = _refusing("*")
    __truediv__ = __rtruediv__ = _refusing("/")
    __floordiv__ = __rfloordiv__ = _refusing("//")
    __mod__ = __rmod__ = _refusing("%")
    __pow__ = __rpow__ = _refusing("**")
    __matmul__ = __rmatmul__ = _refusing("@")
    __lshift__ = __rlshift__ = _refusing("<<")
    __rshift__ = __rrshift__ = _refusing(">>")
    __and__ = __rand__ = _refusing("&")
    __or__ = __ror__ = _refusing("|")
    __xor__ = __rxor__ = _refusing("^")
    __lt__ = _refusing("<")
    __le__ = _refusing("<=")
    __gt__ = _refusing(">")
    __ge__ = _refusing(">=")
    __neg__ = _refusing("-")
    __pos__ = _refusing("+")
    __invert__ = _refusing("~")
    __abs__ = _refusing("abs()")
    __round__ = _refusing("round()")
