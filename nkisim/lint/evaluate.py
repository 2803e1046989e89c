"""Abstract evaluation of expressions: constants are folded, tensors and registers are followed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nkisim import language
from nkisim.hardware import TARGETS, Hardware
from nkisim.lint import api
from nkisim.lint.program import Class, External, Function, Program, Variable
from nkisim.lint.values import (
    UNKNOWN,
    Closure,
    Const,
    Frame,
    Instance,
    Items,
    Loops,
    Method,
    Outside,
    Range,
    Register,
    Tensor,
    Value,
    join,
)

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.eq,
    ast.IsNot: operator.ne,
}
METHODS = {
    "list": frozenset({"append", "clear", "copy", "count", "extend", "index", "pop", "remove", "reverse"}),
    "dict": frozenset({"clear", "copy", "get", "items", "keys", "pop", "setdefault", "values"}),
    "tuple": frozenset[str](),
    "str": frozenset[str](),
}
_VERSIONS = "nki.isa.nc_version."
_SIZES = "nki.language.tile_size."
_FOLD_MAX = 1 << 64


@dataclass
class Uses:
    """Elements and attributes that the body of a dynamic loop has read before a store, and stored."""

    read: set[tuple[int, Any]] = field(default_factory=set)
    stored: set[tuple[int, Any]] = field(default_factory=set)


class Evaluator:
    """Expressions; statements and calls are in the classes derived from it."""

    def __init__(
        self, program: Program, report: Callable[[Function | Class, ast.AST, str, str], None], target: Hardware | None
    ) -> None:
        self.program = program
        self.target = target
        self.frame: Frame
        self.loops: Loops = ()
        self._sink = report
        self._muted = 0
        self._undecided = 0
        self._uses: list[Uses] = []
        self._globals: dict[int, Value] = {}

    def report(self, node: ast.AST, rule: str, detail: str = "") -> None:
        """A finding in the function that is being followed."""
        if not self._muted:
            self._sink(self.frame.function, node, rule, detail)

    def misuse(self, node: ast.AST, rule: str, value: Value) -> None:
        """A finding about the kind of a value.

        A helper that takes a number or a tensor decides by a flag which it is; where that branch is not decided, the
        kind of an argument says nothing.
        """
        if id(value) in self.frame.passed and (self._undecided or self.frame.doubtful):
            return
        self.report(node, rule, ast.unparse(node))

    def call(self, node: ast.Call) -> Value:
        """Follow a call."""
        raise NotImplementedError

    def eval(self, node: ast.expr | None) -> Value:
        """What is known of an expression's value."""
        if node is None:
            return Const(None)
        method = getattr(self, f"_eval_{type(node).__name__}", None)
        if method is not None:
            result: Value = method(node)
            return result
        for child in ast.iter_child_nodes(node):
            # Comprehensions and lambdas are reported for themselves; their names are not this function's.
            if isinstance(child, ast.expr) and not isinstance(node, (ast.Lambda, ast.GeneratorExp, ast.DictComp)):
                self.eval(child)
        return UNKNOWN

    def test(self, node: ast.expr, branch: bool = False) -> bool | None:
        """The truth of an expression, or None; a tensor or a register has none."""
        value = self.eval(node)
        if isinstance(value, Register):
            self.misuse(node, "loop-register-branch" if branch else "loop-register-python", value)
        elif isinstance(value, Tensor):
            self.misuse(node, "tensor-truth", value)
        return truth(value)

    # -- names

    def _eval_Constant(self, node: ast.Constant) -> Value:
        return Const(node.value) if node.value is not Ellipsis else UNKNOWN

    def _eval_Name(self, node: ast.Name) -> Value:
        found = self.frame.find(node.id)
        if found is None:
            binding = self.program.lookup(node.id, self.frame.function.scope)
            if binding is None:
                return Outside(External(f"builtins.{node.id}"))
            return self._binding(binding)
        self._check_escape(node, found)
        return found

    def _check_escape(self, node: ast.expr, value: Value) -> None:
        if isinstance(value, Tensor) and value.loops != self.loops[: len(value.loops)]:
            self.report(node, "loop-tensor-escape", ast.unparse(node))

    def _binding(self, binding: Any) -> Value:
        if isinstance(binding, Variable):
            return self._global(binding)
        if isinstance(binding, External):
            return self._external(binding)
        return Outside(binding) if isinstance(binding, (Function, Class)) or binding is not None else UNKNOWN

    def _global(self, variable: Variable) -> Value:
        if id(variable) not in self._globals:
            self._globals[id(variable)] = UNKNOWN
            if variable.value is not None and isinstance(variable.value, _PLAIN):
                # Module level is ordinary Python: evaluated in its own scope, and nothing is reported.
                frame = getattr(self, "frame", None)
                self.frame = Frame(Function(variable.scope.file, _EMPTY, variable.scope))
                self._muted += 1
                self._globals[id(variable)] = self.eval(variable.value)
                self._muted -= 1
                if frame is not None:
                    self.frame = frame
        return self._globals[id(variable)]

    def _external(self, found: External) -> Value:
        dotted = found.dotted
        if dotted.startswith(_VERSIONS):
            member = getattr(api.find("nki.isa.nc_version"), dotted.removeprefix(_VERSIONS), None)
            return UNKNOWN if member is None else Const(member.value)
        if dotted.startswith(_SIZES):
            return self._tile_size(dotted.removeprefix(_SIZES))
        return Outside(found)

    def _tile_size(self, name: str) -> Value:
        """A size of the target; of no target in particular, if all have the same."""
        sizes = {
            getattr(type("Sizes", (type(language.tile_size),), {"_hardware": hardware})(), name, None)
            for hardware in ([self.target] if self.target else TARGETS.values())
        }
        return Const(sizes.pop()) if len(sizes) == 1 and None not in sizes else UNKNOWN

    def _eval_Attribute(self, node: ast.Attribute) -> Value:
        base = self.eval(node.value)
        if isinstance(base, Outside):
            found = self.program.attribute(base.binding, node.attr)
            return UNKNOWN if found is None else self._binding(found)
        if isinstance(base, Tensor):
            if node.attr not in api.TENSOR_ATTRIBUTES:
                self.report(node, "tensor-attribute", node.attr)
                return UNKNOWN
            if node.attr == "buffer" and base.buffer is not None:
                return Outside(External(f"nki.language.{base.buffer}"))
            return Method(base, node.attr) if callable(getattr(language.NkiTensor, node.attr, None)) else UNKNOWN
        if isinstance(base, Instance):
            return self._instance_attribute(base, node)
        kind = base.kind if isinstance(base, Items) else "str" if _is_text(base) else ""
        if kind:
            if node.attr not in METHODS[kind]:
                self.report(node, "py-method", f"{kind}.{node.attr}")
            return Method(base, node.attr)
        return UNKNOWN

    def _instance_attribute(self, base: Instance, node: ast.Attribute) -> Value:
        if node.attr in base.attributes:
            self._reads(base, node.attr)
            value = base.attributes[node.attr]
            self._check_escape(node, value)
            return value
        method = base.cls.methods.get(node.attr)
        return UNKNOWN if method is None else Method(base, node.attr, method)

    # -- state that a dynamic loop carries in objects

    def _reads(self, owner: Value, key: Any) -> None:
        for uses in self._uses:
            if (id(owner), key) not in uses.stored:
                uses.read.add((id(owner), key))

    def stores(self, node: ast.expr, owner: Items | Instance, key: Any) -> None:
        """A store into an object: reported if it carries something from one trip of a dynamic loop to the next."""
        for uses in self._uses[len(owner.loops) :]:
            if (id(owner), key) in uses.read:
                self.report(node, "loop-rebind", f"{ast.unparse(node)} = ...")
        for uses in self._uses:
            uses.stored.add((id(owner), key))

    # -- operators

    def _eval_BinOp(self, node: ast.BinOp) -> Value:
        return self.binary(node, self.eval(node.left), node.op, self.eval(node.right))

    def binary(self, node: ast.AST, left: Value, op: ast.operator, right: Value) -> Value:
        """`left op right`; `node` is where it stands."""
        for kind, rule in ((Register, "loop-register-python"), (Tensor, "tensor-operator")):
            for value in (left, right):
                if isinstance(value, kind):
                    self.misuse(node, rule, value)
                    return UNKNOWN
        if isinstance(left, Const) and isinstance(right, Const):
            return fold(_BINARY.get(type(op)), left.value, right.value)
        if isinstance(left, Items) and isinstance(right, Items) and isinstance(op, ast.Add) and left.kind == right.kind:
            a, b = left.elements(), right.elements()
            return Items(left.kind, None if a is None or b is None else [*a, *b], self.loops)
        if isinstance(left, Items) and isinstance(op, ast.Mult):
            n = right.value if isinstance(right, Const) and isinstance(right.value, int) else None
            known = left.elements()
            small = known is not None and n is not None and n * len(known) <= 4096
            return Items(left.kind, known * n if small and known is not None and n is not None else None, self.loops)
        return UNKNOWN

    def _eval_UnaryOp(self, node: ast.UnaryOp) -> Value:
        if isinstance(node.op, ast.Not):
            known = self.test(node.operand)
            return UNKNOWN if known is None else Const(not known)
        value = self.eval(node.operand)
        if isinstance(value, Register):
            self.misuse(node, "loop-register-python", value)
        elif isinstance(value, Tensor):
            self.misuse(node, "tensor-operator", value)
        elif isinstance(value, Const) and isinstance(value.value, (int, float)):
            if isinstance(node.op, ast.USub):
                return Const(-value.value)
            return value if isinstance(node.op, ast.UAdd) else UNKNOWN
        return UNKNOWN

    def _eval_BoolOp(self, node: ast.BoolOp) -> Value:
        stops_at = isinstance(node.op, ast.Or)
        result: Value = UNKNOWN
        unknown = False
        for i, operand in enumerate(node.values):
            last = i == len(node.values) - 1
            result = self.eval(operand)
            if last:
                break
            if isinstance(result, Register):
                self.misuse(operand, "loop-register-python", result)
            elif isinstance(result, Tensor):
                self.misuse(operand, "tensor-truth", result)
            known = truth(result)
            if known is None:
                unknown = True
            elif known is stops_at:
                # What follows is not evaluated, unless something before it is not known.
                return UNKNOWN if unknown else result
        return UNKNOWN if unknown else result

    def _eval_Compare(self, node: ast.Compare) -> Value:
        values = [self.eval(node.left), *[self.eval(c) for c in node.comparators]]
        results: list[bool | None] = []
        for left, op, right in zip(values, node.ops, values[1:], strict=False):
            results.append(self._compare(node, left, op, right))
        if any(r is False for r in results):
            return Const(False)
        return Const(True) if all(results) else UNKNOWN

    def _compare(self, node: ast.Compare, left: Value, op: ast.cmpop, right: Value) -> bool | None:
        if isinstance(op, (ast.In, ast.NotIn)):
            if isinstance(right, Items) and right.kind == "dict":
                self.report(node, "py-in", ast.unparse(node))
            return None
        none = Const(None) in (left, right)
        ordered = not isinstance(op, (ast.Eq, ast.NotEq, ast.Is, ast.IsNot))
        for value in (left, right):
            if isinstance(value, Register) and not none:
                self.misuse(node, "loop-register-python", value)
            elif isinstance(value, Tensor) and ordered:
                self.misuse(node, "tensor-operator", value)
        if isinstance(left, Const) and isinstance(right, Const):
            result = fold(_ORDER.get(type(op)), left.value, right.value)
            return bool(result.value) if isinstance(result, Const) else None
        if none and isinstance(op, (ast.Eq, ast.NotEq, ast.Is, ast.IsNot)):
            other = right if left == Const(None) else left
            if other is not UNKNOWN and not isinstance(other, Const):
                return isinstance(op, (ast.NotEq, ast.IsNot))
        return None

    def _eval_IfExp(self, node: ast.IfExp) -> Value:
        known = self.test(node.test)
        if known is not None:
            return self.eval(node.body if known else node.orelse)
        return join(self.eval(node.body), self.eval(node.orelse))

    # -- containers

    def _eval_Tuple(self, node: ast.Tuple) -> Value:
        return self._items("tuple", node.elts)

    def _eval_List(self, node: ast.List) -> Value:
        return self._items("list", node.elts)

    def _items(self, kind: str, elements: list[ast.expr]) -> Value:
        values = [self.eval(e) for e in elements]
        starred = any(isinstance(e, ast.Starred) for e in elements)
        return Items(kind, None if starred else values, self.loops)

    def _eval_Dict(self, node: ast.Dict) -> Value:
        keys = [k.value if isinstance(k, ast.Constant) else None for k in node.keys]
        values = [self.eval(v) for v in node.values]
        texts = [k for k in keys if isinstance(k, str)]
        known = dict(zip(texts, values, strict=True)) if len(texts) == len(keys) else None
        return Items("dict", known, self.loops)

    def _eval_Subscript(self, node: ast.Subscript) -> Value:
        base = self.eval(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        index = [self._index(p) for p in parts]
        if any(isinstance(i, Register) for i in index):
            rule = "loop-register-python" if isinstance(base, Items) else "loop-register-index"
            self.report(node, rule, ast.unparse(node))
        if isinstance(base, Tensor):
            return base
        if isinstance(base, Items) and len(index) == 1 and isinstance(index[0], Const):
            return self._element(node, base, index[0].value)
        return UNKNOWN

    def _index(self, node: ast.expr) -> Value:
        if not isinstance(node, ast.Slice):
            return self.eval(node)
        bounds = [self.eval(b) for b in (node.lower, node.upper, node.step) if b is not None]
        return next((b for b in bounds if isinstance(b, Register)), UNKNOWN)

    def _element(self, node: ast.Subscript, base: Items, key: Any) -> Value:
        self._reads(base, key)
        value: Value = UNKNOWN
        if isinstance(base.values, dict):
            value = base.values.get(key, UNKNOWN)
        elif isinstance(base.values, list) and isinstance(key, int) and -len(base.values) <= key < len(base.values):
            value = base.values[key]
        self._check_escape(node, value)
        return value

    def _eval_Call(self, node: ast.Call) -> Value:
        return self.call(node)


_PLAIN = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.Tuple, ast.List, ast.Dict, ast.Name, ast.Attribute)
_EMPTY = ast.FunctionDef("<module>", ast.arguments([], [], None, [], [], None, []), [], [], lineno=1, col_offset=0)


def truth(value: Value) -> bool | None:
    """The truth of a value if it is known."""
    if isinstance(value, Const):
        return bool(value.value)
    if isinstance(value, Items) and value.values is not None:
        return bool(value.values)
    return True if isinstance(value, (Outside, Instance, Closure, Method, Range)) else None


def fold(function: Callable[[Any, Any], Any] | None, left: Any, right: Any) -> Value:
    """An operator on two constants."""
    if function is None or (function is operator.pow and not _small(left, right)):
        return UNKNOWN
    if function is operator.lshift and not (isinstance(right, int) and 0 <= right < 64):
        return UNKNOWN
    if function is operator.mul and (isinstance(left, str) or isinstance(right, str)):
        return UNKNOWN
    try:
        result = function(left, right)
    except (TypeError, ValueError, ArithmeticError):
        return UNKNOWN
    if isinstance(result, int) and abs(result) > _FOLD_MAX:
        return UNKNOWN
    return Const(result) if isinstance(result, (bool, int, float, str)) else UNKNOWN


def _small(base: Any, exponent: Any) -> bool:
    return isinstance(base, (int, float)) and isinstance(exponent, (int, float)) and abs(exponent) <= 64


def _is_text(value: Value) -> bool:
    return isinstance(value, Const) and isinstance(value.value, str)
