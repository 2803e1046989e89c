"""Calls: arguments against the documented signatures and the target, containers, and what a call returns."""

from __future__ import annotations

import ast
from abc import abstractmethod
from enum import Enum
from typing import Any

from nkisim.lint import api
from nkisim.lint.evaluate import Evaluator
from nkisim.lint.program import Class, External, Function
from nkisim.lint.values import (
    UNKNOWN,
    Closure,
    Const,
    Instance,
    Items,
    Method,
    Outside,
    Range,
    Register,
    Tensor,
    Value,
)

_RANGES = ("affine_range", "sequential_range", "static_range")
_CONVERSIONS = ("abs", "bool", "divmod", "float", "int", "max", "min", "range", "slice")
_CHANGES = frozenset({"append", "clear", "extend", "pop", "remove", "reverse", "setdefault"})
_BUFFERS = ("sbuf", "psum", "hbm", "private_hbm", "shared_hbm")


class Calls(Evaluator):
    """Calls of NKI, of built-ins and of methods; functions of the sources are followed by the derived class."""

    weight = 1
    count = 0

    @abstractmethod
    def enter(self, function: Function, node: ast.Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Follow a call of a function of the sources."""

    @abstractmethod
    def device_loop(self, name: str, node: ast.Call, bound: dict[str, Value]) -> None:
        """Follow fori_loop or while_loop."""

    @abstractmethod
    def construct(self, cls: Class, node: ast.Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Follow the construction of an object of a class of the sources."""

    def call(self, node: ast.Call) -> Value:
        """Follow a call: check it and say what is known of the result."""
        function = self.eval(node.func)
        args = [self.eval(a.value if isinstance(a, ast.Starred) else a) for a in node.args]
        kwargs = {k.arg: self.eval(k.value) for k in node.keywords if k.arg is not None}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.eval(keyword.value)
        starred = any(isinstance(a, ast.Starred) for a in node.args) or len(kwargs) < len(node.keywords)
        if isinstance(function, Method) and function.function is None:
            return self._method(node, function, args, kwargs)
        if starred and isinstance(function, (Closure, Outside, Method)):
            args, kwargs = [], {}
        if isinstance(function, Method) and function.function is not None:
            static = any(ast.unparse(d) == "staticmethod" for d in function.function.node.decorator_list)
            return self.enter(function.function, node, args if static else [function.receiver, *args], kwargs)
        if isinstance(function, Closure):
            return self.enter(function.function, node, args, kwargs)
        if isinstance(function, Outside):
            return self._outside(node, function, args, kwargs, starred)
        if isinstance(function, Instance):
            called = function.cls.methods.get("__call__")
            return UNKNOWN if called is None else self.enter(called, node, [function, *args], kwargs)
        return UNKNOWN

    def _outside(
        self, node: ast.Call, function: Outside, args: list[Value], kwargs: dict[str, Value], starred: bool
    ) -> Value:
        binding = function.binding
        if isinstance(binding, Function):
            return self.enter(binding, node, args, kwargs)
        if isinstance(binding, Class):
            return self.construct(binding, node, args, kwargs)
        if isinstance(binding, External):
            root, _, name = binding.dotted.partition(".")
            if root == "builtins":
                return self._builtin(node, name, args, kwargs)
            if binding.is_nki:
                return self._nki(node, binding.dotted, args, kwargs, starred)
        return UNKNOWN

    # -- NKI

    def _nki(self, node: ast.Call, dotted: str, args: list[Value], kwargs: dict[str, Value], starred: bool) -> Value:
        name = dotted.rpartition(".")[2]
        bound = {} if starred else self._bind(node, dotted, args, kwargs)
        self._check_target(node, dotted, bound)
        language = dotted.startswith("nki.language.")
        if dotted == f"nki.isa.{name}" and name in api.INSTRUCTIONS:
            self.count += self.weight
            return self._instruction(node, name, bound)
        if dotted == "nki.isa.get_nc_version":
            return Const(self.target.generation) if self.target else UNKNOWN
        if language and name in _RANGES:
            return self._range(args)
        if language and name == "dynamic_range":
            return self._dynamic_range(node, bound)
        if language and name in ("fori_loop", "while_loop"):
            self.device_loop(name, node, bound)
            return Const(None)
        if language and name in api.NAMES["nki.language"] and name not in api.PLAIN:
            return self._wrapper(node, name, bound)
        return UNKNOWN

    def _bind(self, node: ast.Call, dotted: str, args: list[Value], kwargs: dict[str, Value]) -> dict[str, Value]:
        """Arguments by parameter; nothing if they do not bind or the signature is not known."""
        signature = api.signature(dotted)
        if signature is None:
            return {}
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            self.report(node, "api-bind", f"{dotted}: {error}")
            return {}
        for parameter, value in bound.arguments.items():
            if not isinstance(value, Const) or value.value is None:
                continue
            default = signature.parameters[parameter].default
            if parameter == "buffer" and isinstance(value.value, str):
                self.report(node, "api-buffer", f"{dotted}: buffer={value.value!r}")
            elif isinstance(default, Enum) and parameter != "buffer" and isinstance(value.value, (int, float)):
                rule = "api-enum-dma" if parameter in ("dge_mode", "oob_mode") else "api-enum"
                self.report(node, rule, f"{dotted}: {parameter}={value.value!r}")
        return dict(bound.arguments)

    def _check_target(self, node: ast.Call, dotted: str, bound: dict[str, Value]) -> None:
        if self.target is None:
            return
        target, generation = self.target.target, self.target.generation
        first = api.FIRST_GENERATION.get(dotted, 0)
        if first > generation:
            self.report(node, "target-instruction", f"{dotted} on {target}, needs NeuronCore-v{first}")
        for needs in api.FIRST_ARGUMENT.get(dotted, ()):
            value = bound.get(needs.parameter)
            if needs.generation <= generation or value is None or value in (UNKNOWN, Const(None)):
                continue
            if needs.member is None or _dotted(value).rpartition(".")[2] == needs.member:
                detail = f"{dotted}: {needs.parameter} on {target}, needs NeuronCore-v{needs.generation}"
                self.report(node, "target-argument", detail)
        for parameter, value in bound.items():
            first = api.FIRST_GENERATION.get(_dotted(value), 0)
            if first > generation:
                detail = f"{dotted}: {parameter}={_dotted(value)} on {target}, needs NeuronCore-v{first}"
                self.report(node, "target-argument", detail)

    def _instruction(self, node: ast.Call, name: str, bound: dict[str, Value]) -> Value:
        if name == "register_alloc":
            return Register()
        if name in ("register_load", "register_move"):
            written = bound.get("dst")
            if isinstance(written, Register) and written.index:
                self.report(node, "loop-variable-write", f"nki.isa.{name}")
        return UNKNOWN

    def _wrapper(self, node: ast.Call, name: str, bound: dict[str, Value]) -> Value:
        if name not in api.ALLOCATES:
            self.count += self.weight
        if name in api.NOT_ON_DEVICE:
            self.report(node, "api-not-on-device", f"nl.{name}: {api.NOT_ON_DEVICE[name]}")
        if name == "matmul" and bound and bound.get("transpose_x", Const(False)) == Const(False):
            self.report(node, "api-not-on-device", "nl.matmul: transpose_x=True only")
        if name in ("store", "random_seed", "device_print"):
            return Const(None)
        if name in api.CREATES:
            buffer = bound.get("buffer", Outside(External("nki.language.sbuf")))
            return Tensor(_buffer(buffer), self.loops)
        return Tensor(None, self.loops)

    def _dynamic_range(self, node: ast.Call, bound: dict[str, Value]) -> Value:
        self.check_step(node, bound)
        registers = any(isinstance(v, Register) for v in bound.values())
        return Range(None, dynamic=True, by_register=registers)

    def check_step(self, node: ast.Call, bound: dict[str, Value]) -> None:
        """The step of a dynamic loop is a positive constant."""
        step = bound.get("step", Const(1))
        wrong = isinstance(step, Const) and not (type(step.value) is int and step.value >= 1)
        if wrong or isinstance(step, (Register, Tensor)):
            self.report(node, "loop-step", ast.unparse(node))

    # -- Python

    def _range(self, args: list[Value]) -> Value:
        numbers = [a.value for a in args if isinstance(a, Const) and type(a.value) is int]
        if len(numbers) != len(args) or not numbers or len(numbers) > 3 or (len(numbers) == 3 and not numbers[2]):
            return Range(None)
        return Range(len(range(*numbers)))

    def _builtin(self, node: ast.Call, name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
        if name in _CONVERSIONS:
            for value in args:
                if isinstance(value, Register):
                    self.misuse(node, "loop-register-python", value)
                    return UNKNOWN
                if isinstance(value, Tensor) and name not in ("range", "slice"):
                    self.misuse(node, "tensor-operator", value)
                    return UNKNOWN
        if name == "isinstance" and len(args) == 2:
            answer = _is_instance(*args)
            return UNKNOWN if answer is None else Const(answer)
        if name == "range":
            return self._range(args)
        if name == "len" and len(args) == 1 and isinstance(args[0], Items) and args[0].values is not None:
            return Const(len(args[0].values))
        if name in ("list", "tuple"):
            known = args[0].elements() if args and isinstance(args[0], Items) else None if args else []
            return Items(name, None if known is None else list(known), self.loops)
        if name == "dict":
            return Items("dict", None if args else dict(kwargs), self.loops)
        if name in ("abs", "int", "float", "bool", "min", "max") and args:
            numbers = [a.value for a in args if isinstance(a, Const) and isinstance(a.value, (int, float))]
            if len(numbers) == len(args) and (len(numbers) == 1) == (name not in ("min", "max")):
                functions: dict[str, Any] = {
                    "abs": abs,
                    "int": int,
                    "float": float,
                    "bool": bool,
                    "min": min,
                    "max": max,
                }
                return Const(functions[name](*numbers))
        return UNKNOWN

    def _method(self, node: ast.Call, method: Method, args: list[Value], kwargs: dict[str, Value]) -> Value:
        receiver = method.receiver
        if isinstance(receiver, Tensor):
            first = api.TENSOR_METHODS.get(method.name, 0)
            if self.target is not None and first > self.target.generation:
                detail = f"NkiTensor.{method.name} on {self.target.target}, needs NeuronCore-v{first}"
                self.report(node, "target-instruction", detail)
            self._bind_method(node, method.name, args, kwargs)
            return UNKNOWN if method.name in ("get_pattern", "is_contiguous", "is_indirect") else receiver
        if isinstance(receiver, Items):
            return self._container(node, receiver, method.name, args)
        return UNKNOWN

    def _bind_method(self, node: ast.Call, name: str, args: list[Value], kwargs: dict[str, Value]) -> None:
        signature = api.method_signature(name)
        if signature is None or any(isinstance(a, ast.Starred) for a in node.args):
            return
        if any(k.arg is None for k in node.keywords):
            return
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError as error:
            self.report(node, "api-bind", f"NkiTensor.{name}: {error}")

    def _container(self, node: ast.Call, receiver: Items, name: str, args: list[Value]) -> Value:
        if name in _CHANGES:
            self.check_change(node, receiver.loops, ast.unparse(node.func))
            once = self.weight_is_one and isinstance(receiver.values, list) and name == "append" and len(args) == 1
            if once and isinstance(receiver.values, list):
                receiver.values.append(args[0])
            else:
                receiver.values = None
        return Items("list", None, self.loops) if name in ("copy", "items", "keys", "values") else UNKNOWN

    @property
    def weight_is_one(self) -> bool:
        """Whether the statement being followed runs exactly once in its function."""
        return False

    def check_change(self, node: ast.AST, loops: tuple[int, ...], what: str) -> None:
        """A change of something made outside the dynamic loop that is open."""
        if loops != self.loops and loops == self.loops[: len(loops)]:
            self.report(node, "loop-rebind", what)


def _buffer(value: Value) -> str | None:
    name = value.value if isinstance(value, Const) else _dotted(value).rpartition(".")[2]
    return name if name in _BUFFERS else None


def _is_instance(value: Value, cls: Value) -> bool | None:
    binding = cls.binding if isinstance(cls, Outside) else None
    if isinstance(binding, Class):
        return value.cls is binding if isinstance(value, Instance) else _is_plain(value)
    if not isinstance(binding, External) or not binding.dotted.startswith("builtins."):
        return None
    name = binding.dotted.partition(".")[2]
    if isinstance(value, Const):
        return type(value.value).__name__ == name
    if isinstance(value, Items):
        return value.kind == name
    return False if isinstance(value, (Tensor, Register, Instance)) else None


def _is_plain(value: Value) -> bool | None:
    return False if isinstance(value, (Const, Tensor, Register, Items)) else None


def _dotted(value: Value) -> str:
    return value.binding.dotted if isinstance(value, Outside) and isinstance(value.binding, External) else ""
