"""Follows a kernel as the compiler does: callees inlined, decided branches taken, static loops counted.

Loop bodies are followed once; a static loop multiplies what its body issues by its trips where they are known and
by one where they are not, so the count of instructions is a lower bound.
"""

from __future__ import annotations

import ast
from collections.abc import Hashable

from nkisim.lint import loops
from nkisim.lint.calls import Calls
from nkisim.lint.evaluate import Uses
from nkisim.lint.program import Class, External, Function
from nkisim.lint.reach import is_kernel
from nkisim.lint.values import (
    UNKNOWN,
    Closure,
    Const,
    Frame,
    Instance,
    Items,
    Range,
    Register,
    Tensor,
    Value,
    join,
    key_of,
)

DEPTH_MAX = 40
STATEMENTS_MAX = 200_000


class _TooLarge(Exception):
    """The walk takes too long."""


class Walker(Calls):
    """Statements, functions and loops."""

    _loop_number = 0
    _statements = 0
    _no_reorder = 0
    _static_depth = 0
    _one_left = False

    def walk(self, function: Function, kernel: bool) -> int:
        """Follow `function` with unknown arguments; returns how many instructions it issues at least."""
        self.frame = Frame(function, {a.arg: UNKNOWN for a in function.parameters}, is_kernel=kernel)
        self.count, self.weight, self.loops = 0, 1, ()
        self._undecided, self._uses = 0, []
        self._no_reorder = self._static_depth = self._statements = 0
        self._active: list[Function] = [function]
        self._followed: set[Function] = getattr(self, "_followed", set())
        self._followed.add(function)
        self._known: dict[Hashable, tuple[Value, int]] = {}
        try:
            self._block(function.node.body)
        except _TooLarge:
            self.report(function.node, "reach-unresolved", f"{function.name} is too large to follow; checked in part")
        return self.count

    def followed(self, function: Function) -> bool:
        """Whether a walk has entered `function`."""
        return function in self._followed

    # -- functions

    def enter(self, function: Function, node: ast.Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Inline a call of a function of the sources."""
        if is_kernel(self.program, function):
            self.report(node, "api-nested-jit", function.name)
        return self._inline(function, args, kwargs, self._frame_of(node.func))[0]

    def _frame_of(self, node: ast.expr) -> Frame | None:
        value = self.frame.find(node.id) if isinstance(node, ast.Name) else None
        return value.frame if isinstance(value, Closure) else None

    def _inline(
        self, function: Function, args: list[Value], kwargs: dict[str, Value], outer: Frame | None
    ) -> tuple[Value, Frame | None]:
        names = self._parameters(function, args, kwargs)
        if len(self._active) >= DEPTH_MAX or self._active.count(function) > 1:
            return UNKNOWN, None
        keys = [key_of(v) for v in names.values()]
        state = (function, tuple(keys), self.loops, self._no_reorder > 0, self.frame.doubtful or self._undecided > 0)
        known = self._known.get(state) if None not in keys and outer is None else None
        if known is not None:
            self.count += self.weight * known[1]
            return known[0], None
        before, count, weight, depth = self.frame, self.count, self.weight, self._static_depth
        passed = frozenset(map(id, names.values()))
        self.frame = Frame(
            function,
            names,
            outer,
            passed=passed,
            doubtful=self.frame.doubtful or self._undecided > 0,
        )
        self.count, self.weight, self._static_depth = 0, 1, 0
        undecided, self._undecided = self._undecided, 0
        self._active.append(function)
        self._followed.add(function)
        try:
            self._block(function.node.body)
            frame, issued = self.frame, self.count
        finally:
            self.frame, self.count, self.weight, self._static_depth = before, count, weight, depth
            self._undecided = undecided
            self._active.pop()
        self.count += self.weight * issued
        result: Value = Const(None) if not frame.returned else frame.returned[0]
        for value in frame.returned[1:]:
            result = join(result, value)
        if None not in keys and outer is None:
            self._known[state] = (result, issued)
        return result, frame

    def _parameters(self, function: Function, args: list[Value], kwargs: dict[str, Value]) -> dict[str, Value]:
        parameters = [a.arg for a in function.parameters]
        names: dict[str, Value] = dict(zip(parameters, args, strict=False))
        for name in parameters:
            if name in names:
                continue
            default = function.default_of(name)
            names[name] = kwargs[name] if name in kwargs else UNKNOWN if default is None else self._default(default)
        return names

    def _default(self, node: ast.expr) -> Value:
        self._muted += 1
        value = self.eval(node)
        self._muted -= 1
        return value if isinstance(value, Const) else UNKNOWN

    def construct(self, cls: Class, node: ast.Call, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Make an object: run its __init__, or set its fields."""
        made = Instance(cls, {}, self.loops)
        init = cls.methods.get("__init__")
        if init is not None:
            self.enter(init, node, [made, *args], kwargs)
            return made
        fields = [c.target.id for c in cls.node.body if isinstance(c, ast.AnnAssign) and isinstance(c.target, ast.Name)]
        made.attributes.update(zip(fields, args, strict=False))
        made.attributes.update(kwargs)
        post = cls.methods.get("__post_init__")
        if post is not None:
            self.enter(post, node, [made], {})
        return made

    # -- statements

    def _block(self, body: list[ast.stmt]) -> bool:
        """Follow statements in order; whether control certainly leaves the block."""
        undecided = self._undecided
        try:
            for node in body:
                self._statements += 1
                if self._statements > STATEMENTS_MAX:
                    raise _TooLarge
                if self._statement(node):
                    return True
                # What follows `if unknown: return` runs on some ways only.
                self._undecided += isinstance(node, ast.If) and self._one_left
        finally:
            self._undecided = undecided
        return False

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Return):
            self._return(node)
            return True
        if isinstance(node, (ast.Break, ast.Continue, ast.Raise)):
            return True
        if isinstance(node, ast.If):
            return self._if(node)
        if isinstance(node, (ast.For, ast.AsyncFor)):
            self._for(node)
        elif isinstance(node, ast.While):
            self._while(node)
        elif isinstance(node, ast.With):
            return self._with(node)
        elif isinstance(node, ast.Assign):
            value = self.eval(node.value)
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._assign(node.target, self.eval(node.value))
        elif isinstance(node, ast.AugAssign):
            left = self.eval(node.target)
            self._assign(node.target, self.binary(node, left, node.op, self.eval(node.value)))
        elif isinstance(node, ast.Assert):
            self.test(node.test)
        elif isinstance(node, ast.Expr):
            self.eval(node.value)
        elif isinstance(node, ast.FunctionDef):
            inner = self.frame.function.scope.bindings.get(node.name)
            if isinstance(inner, Function):
                self.frame.names[node.name] = Closure(inner, self.frame)
        elif isinstance(node, ast.Try):
            self._block(node.body)
        return False

    def _assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.frame.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            known = value.elements() if isinstance(value, Items) else None
            if known is None or len(known) != len(target.elts):
                known = [UNKNOWN] * len(target.elts)
            for element, item in zip(target.elts, known, strict=True):
                self._assign(element, item)
        elif isinstance(target, ast.Subscript):
            base = self.eval(target.value)
            index = self.eval(target.slice) if not isinstance(target.slice, ast.Slice) else UNKNOWN
            if isinstance(base, Tensor):
                self.report(target, "tensor-store", f"{ast.unparse(target)} = ...")
            elif isinstance(base, Items):
                self.stores(target, base, index.value if isinstance(index, Const) else None)
                self._store(base, index, value)
        elif isinstance(target, ast.Attribute):
            owner = self.eval(target.value)
            if isinstance(owner, Instance):
                if owner.attributes.get(target.attr) is not value or value is UNKNOWN:
                    self.stores(target, owner, target.attr)
                before = owner.attributes.get(target.attr, value)
                owner.attributes[target.attr] = join(before, value)

    def _store(self, base: Items, index: Value, value: Value) -> None:
        if isinstance(base.values, dict) and isinstance(index, Const) and isinstance(index.value, str):
            base.values[index.value] = value
        elif not isinstance(base.values, list):
            base.values = None
        elif (
            isinstance(index, Const)
            and type(index.value) is int
            and -len(base.values) <= index.value < len(base.values)
        ):
            base.values[index.value] = value
        else:
            base.values = None

    def _return(self, node: ast.Return) -> None:
        value = self.eval(node.value)
        self.frame.returned.append(value)
        if self.frame.is_kernel:
            for element in _flat(value):
                if isinstance(element, Tensor) and element.buffer in ("sbuf", "psum", "private_hbm"):
                    self.report(node, "api-output", f"it is in nl.{element.buffer}")
                elif isinstance(element, Tensor) and element.buffer == "hbm":
                    self.report(node, "api-output-hbm")

    def _if(self, node: ast.If) -> bool:
        known = self.test(node.test, branch=True)
        if known is not None:
            leaves = self._block(node.body if known else node.orelse)
            self._one_left = False
            return leaves
        names, count = dict(self.frame.names), self.count
        self._static_depth += 1
        self._undecided += 1
        left = self._block(node.body)
        then_names, then_count = self.frame.names, self.count
        self.frame.names, self.count = names, count
        right = self._block(node.orelse)
        self._static_depth -= 1
        self._undecided -= 1
        if left and not right:
            pass
        elif right and not left:
            self.frame.names = then_names
        else:
            names = self.frame.names
            for name in [*then_names, *names]:
                if name in then_names and name in names:
                    names[name] = join(then_names[name], names[name])
                else:
                    names[name] = then_names.get(name, names.get(name, UNKNOWN))
        self.count = min(self.count, then_count)
        self._one_left = left != right
        return left and right

    def _with(self, node: ast.With) -> bool:
        ordered = 0
        for item in node.items:
            self.eval(item.context_expr)
            call = item.context_expr
            name = self.program.resolve(call.func, self.frame.function.scope) if isinstance(call, ast.Call) else None
            ordered += name == External("nki.language.no_reorder")
        self._no_reorder += ordered
        left = self._block(node.body)
        self._no_reorder -= ordered
        return left

    # -- loops

    def _for(self, node: ast.For | ast.AsyncFor) -> None:
        iterable = self.eval(node.iter)
        if isinstance(iterable, Range) and iterable.dynamic:
            self.report(node.iter, "loop-deprecated", "nl.dynamic_range")
            self._device(node, node.body, iterable.by_register, {_name(node.target): Register(index=True)})
            return
        trips: int | None = None
        item: Value = UNKNOWN
        if isinstance(iterable, Range):
            trips = iterable.trips
            item = Const(0) if trips == 1 and isinstance(node.iter, ast.Call) and len(node.iter.args) == 1 else UNKNOWN
        elif isinstance(iterable, Items):
            if iterable.kind == "dict":
                self.report(node.iter, "py-in", f"for over the dict {ast.unparse(node.iter)}")
            known = iterable.elements()
            if known is not None:
                trips = len(known)
                for i, value in enumerate(known):
                    item = value if i == 0 else join(item, value)
        elif isinstance(iterable, Tensor):
            self.report(node.iter, "tensor-operator", f"for over the tensor {ast.unparse(node.iter)}")
        self._static(node.body, trips, lambda: self._assign(node.target, item))

    def _static(self, body: list[ast.stmt], trips: int | None, begin: object = None) -> None:
        for name in loops.stored(body):
            value = self.frame.names.get(name)
            # What a later trip sees is not what the first one sees.
            if isinstance(value, (Const, Items)) and trips != 1:
                self.frame.names[name] = UNKNOWN
        if callable(begin):
            begin()
        weight = self.weight
        self.weight = weight * (1 if trips is None or loops.leaves_early(body) else trips)
        self._static_depth += 1
        self._block(body)
        self._static_depth -= 1
        self.weight = weight

    def _while(self, node: ast.While) -> None:
        value = self.eval(node.test)
        if isinstance(value, Register):
            self.report(node.test, "loop-deprecated", "while on a register")
            self._device(node, node.body, True, {})
        elif self.test(node.test) is not False:
            self._static(node.body, None)

    def _device(
        self, node: ast.For | ast.AsyncFor | ast.While, body: list[ast.stmt], register: bool, names: dict[str, Value]
    ) -> None:
        """A loop that stays a loop on the device, written as a for or while statement."""
        self._check_device(node, register)
        for control in loops.control(body):
            self.report(control, "loop-control", type(control).__name__.lower())
        outside = set(self.frame.names) - set(names)
        carried = list(loops.carried(self.frame.function.node, node, body, outside))
        earlier = dict(self.frame.names)
        self._loop_number += 1
        before = self.loops
        self.loops = (*before, self._loop_number)
        self._uses.append(Uses())
        self.frame.names.update(names)
        self._static(body, 1)
        self._uses.pop()
        self.loops = before
        for name, store in carried:
            # A view of the same tensor carries nothing.
            if self.frame.names.get(name) is not earlier[name] or earlier[name] is UNKNOWN:
                self.report(store, "loop-rebind", name)

    def _check_device(self, node: ast.AST, register: bool) -> None:
        if self._no_reorder:
            self.report(node, "loop-no-reorder")
        if self.loops and register:
            self.report(node, "loop-nested")

    def device_loop(self, name: str, node: ast.Call, bound: dict[str, Value]) -> None:
        """Follow fori_loop or while_loop: the body once, with a register."""
        if not bound:
            return
        if name == "fori_loop":
            self.check_step(node, bound)
        self._check_device(node, register=False)
        body = bound.get("body_fun")
        function = body.function if isinstance(body, Closure) else _function(body)
        if function is None:
            return
        self._loop_number += 1
        before = self.loops
        self.loops = (*before, self._loop_number)
        self._uses.append(Uses())
        outer = body.frame if isinstance(body, Closure) else None
        result, _ = self._inline(function, [Register(index=name == "fori_loop")], {}, outer)
        self._uses.pop()
        self.loops = before
        if name == "fori_loop" and result != Const(None):
            self.report(function.node, "loop-body-return", f"{function.name} returns a value")
        if name == "while_loop" and result == Const(None):
            self.report(function.node, "loop-body-return", f"{function.name} returns nothing")

    @property
    def weight_is_one(self) -> bool:
        """Whether the statement being followed runs exactly once in its function."""
        return self._static_depth == 0


def _function(value: Value | None) -> Function | None:
    binding = getattr(value, "binding", None)
    return binding if isinstance(binding, Function) else None


def _flat(value: Value) -> list[Value]:
    if isinstance(value, Items):
        found = value.values.values() if isinstance(value.values, dict) else value.values or []
        return [e for v in found for e in _flat(v)]
    return [value]


def _name(target: ast.expr) -> str:
    return target.id if isinstance(target, ast.Name) else ""
