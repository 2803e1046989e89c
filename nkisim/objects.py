"""Objects of a kernel other than tensors: the base of its classes, and registers."""

from __future__ import annotations

from typing import Any, NoReturn

from nkisim.errors import NkiError
from nkisim.machine import running_core
from nkisim.unknown import Unknown


class NKIObject:
    """Base of the classes that a kernel may use; keyword arguments become attributes."""

    def __init__(self, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)


class VirtualRegister(NKIObject, Unknown):
    """A 32-bit scalar in an engine's register file; its value exists at run time only.

    `frozen` registers hold the index of a loop and refuse writes.
    """

    def __init__(self, state: Any = None, frozen: bool = False) -> None:
        self._core = running_core()
        self._life = None if self._core is None else self._core.sequencer.new_register()
        self._value: int | float | None = None
        self._loop: Any = None
        self.frozen = False
        if state is not None:
            self.value = state
        self.frozen = frozen

    @property
    def value(self) -> int | float:
        """The value at this point of the program.

        Raises:
            NkiError: nothing was written into the register.
        """
        if self._value is None:
            raise NkiError(
                "VirtualRegister",
                "",
                "uninitialized read",
                received="a register that was never written",
                allowed="register_alloc(value), register_move or register_load before",
                source="nki.isa.register_alloc, NKI 0.6",
            )
        if self._core is not None and self._life is not None:
            self._life.touch(self._core.position)
        return self._value

    @value.setter
    def value(self, value: int | float) -> None:
        if self.frozen:
            raise NkiError(
                "VirtualRegister",
                "",
                "write to a loop's index register",
                received="the register of a running loop",
                allowed="a register from nki.isa.register_alloc",
                source="NKI language guide, dynamic control flow (NKI 0.6)",
            )
        if self._core is not None and self._life is not None:
            self._core.sequencer.write_register(self._life, self._core.position)
        self._value = value

    @property
    def defined(self) -> bool:
        """Whether something was written into it."""
        return self._value is not None

    @property
    def carried(self) -> frozenset[int]:
        """Numbers of the dynamic loops that write the register although it was allocated outside of them."""
        return frozenset() if self._life is None else self._life.carried

    @property
    def place(self) -> tuple[int, ...]:
        """Which register of a loop's body it is, or of the kernel."""
        return () if self._life is None else self._life.place

    def __bool__(self) -> bool:
        # `while reg:` is the documented (deprecated) dynamic loop of the parser front end.
        going = self.value != 0
        if self._core is not None:
            self._loop = self._core.test_condition(self._loop, going)
        return going

    def _refuse_operator(self, symbol: str) -> NoReturn:
        instead = (
            "bound the loop by a register (nl.fori_loop, nl.while_loop), or decide on the device"
            if symbol in ("<", "<=", ">", ">=")
            else "let the loop count in elements (nl.fori_loop(..., step=128)), have the view scale the index "
            "(t.select(dim, register), .ap(scalar_offset=register)), or compute in a tensor and load the register"
        )
        raise TypeError(
            f"VirtualRegister {symbol}: a register's value is not known while the kernel is built, so Python's "
            f"operators do not work on it; {instead}"
        )

    def __index__(self) -> NoReturn:
        raise TypeError(
            "VirtualRegister: a register's value is not known while the kernel is built, so int() and range() "
            "do not take one; use nl.fori_loop, nl.while_loop or scalar_offset"
        )

    __int__ = __index__

    def __eq__(self, other: object) -> bool:
        # Python would answer False, and the kernel's `if i == 0:` silently take a branch.
        raise TypeError(
            "VirtualRegister: a register's value is not known while the kernel is built, so it cannot be compared; "
            "decide on the device"
        )

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"VirtualRegister({self._value})"
