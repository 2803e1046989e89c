"""Rules that a function's text decides alone: statements, expressions, parameters, decorators, classes, names."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator

from nkisim.lint import api
from nkisim.lint.program import Class, External, Function, Program, Scope, Variable

Report = Callable[[Function | Class, ast.AST, str, str], None]

BUILTINS = frozenset(
    """
    abs bool dict divmod float int isinstance len list max min print range slice str tuple type
    """.split()  # noqa: SIM905
)
_BUILT_IN = frozenset(name for name in dir(builtins) if not name.startswith("_"))
MATH = frozenset({"ceil", "e", "floor", "gcd", "inf", "log10", "log2", "nan", "pi", "pow", "sqrt"})
DECORATORS = ("nki.jit", "staticmethod", "dataclasses.dataclass")
BASES = ("NKIObject", "Enum")
NUMPY_TYPES = frozenset(
    """
    bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 dtype
    """.split()  # noqa: SIM905
)
# Modules of the standard library that a kernel names without calling into them at run time.
_DECLARATIONS = ("typing", "dataclasses", "enum", "builtins", "__future__", "collections.abc")
_INT32 = 2**31

_STATEMENTS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Raise: ("py-raise", ""),
    ast.Try: ("py-try", ""),
    ast.Delete: ("py-del", ""),
    ast.Global: ("py-scope", "global"),
    ast.Nonlocal: ("py-scope", "nonlocal"),
    ast.Import: ("py-import", ""),
    ast.ImportFrom: ("py-import", ""),
    ast.Match: ("py-match", ""),
    ast.AsyncFunctionDef: ("py-async", "async def"),
    ast.AsyncFor: ("py-async", "async for"),
    ast.AsyncWith: ("py-async", "async with"),
    ast.ClassDef: ("py-class-nested", ""),
    ast.Await: ("py-async", "await"),
    ast.Yield: ("py-yield", ""),
    ast.YieldFrom: ("py-yield", ""),
    ast.Lambda: ("py-lambda", ""),
    ast.ListComp: ("py-comprehension", "list"),
    ast.SetComp: ("py-comprehension", "set"),
    ast.DictComp: ("py-comprehension", "dict"),
    ast.GeneratorExp: ("py-comprehension", "generator"),
    ast.NamedExpr: ("py-walrus", ""),
    ast.Set: ("py-set", ""),
    ast.Starred: ("py-star", ""),
}
for _name, _rule in (("TryStar", "py-try"), ("TypeAlias", "py-type-alias")):
    if hasattr(ast, _name):
        _STATEMENTS[getattr(ast, _name)] = (_rule, "")


def check_function(program: Program, function: Function, kernel: bool, report: Report) -> None:
    """Report what the text of `function` breaks; inner functions are checked on their own."""
    if isinstance(function.node, ast.AsyncFunctionDef):
        report(function, function.node, "py-async", "async def")
    _check_parameters(function, kernel, report)
    _check_decorators(program, function, report)
    visitor = _Visitor(program, function, report)
    for default in (*function.node.args.defaults, *function.node.args.kw_defaults):
        if default is not None:
            visitor.visit(default)
    for statement in function.node.body:
        visitor.visit(statement)


def check_class(program: Program, cls: Class, report: Report) -> None:
    """Report what the compiler does not take of a class: bases, keywords, statements in its body."""
    node = cls.node
    if not node.bases:
        report(cls, node, "py-class", f"{node.name} has no base")
    for base in node.bases:
        name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
        if not any(known in name for known in BASES):
            report(cls, base, "py-class", f"{node.name} has the base {ast.unparse(base)}")
    if node.keywords:
        report(cls, node, "py-class", f"{node.name} has keywords")
    for decorator in node.decorator_list:
        if _decorator_name(program, decorator, cls.scope) not in DECORATORS:
            report(cls, decorator, "py-decorator", ast.unparse(decorator))
    for child in node.body:
        plain = isinstance(child, (ast.Pass, ast.FunctionDef)) or (
            isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        )
        field = (isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name)) or (
            isinstance(child, ast.Assign) and len(child.targets) == 1 and isinstance(child.targets[0], ast.Name)
        )
        if not plain and not field:
            report(cls, child, "py-class", f"{type(child).__name__} in the body of {node.name}")


def check_api_uses(program: Program, scope: Scope, node: ast.AST, owner: Function | Class, report: Report) -> None:
    """Report a name of NKI that does not exist."""
    if not isinstance(node, (ast.Name, ast.Attribute)) or not isinstance(node.ctx, ast.Load):
        return
    found = program.resolve(node, scope)
    if not isinstance(found, External):
        return
    if found.dotted in api.REMOVED or found.dotted.startswith("neuronxcc."):
        report(owner, node, "api-removed", found.dotted)
    elif found.is_nki and not api.exists(found.dotted):
        base = program.resolve(node.value, scope) if isinstance(node, ast.Attribute) else None
        # Only where the chain breaks, not for what stands behind the break.
        if not isinstance(base, External) or api.exists(base.dotted):
            report(owner, node, "api-name", found.dotted)


def _check_parameters(function: Function, kernel: bool, report: Report) -> None:
    a = function.node.args
    if a.vararg:
        report(function, a.vararg, "py-varargs", f"*{a.vararg.arg}")
    if a.kwarg:
        report(function, a.kwarg, "py-kwargs", f"**{a.kwarg.arg}")
    if not kernel:
        return
    for arg in a.kwonlyargs:
        report(function, arg, "py-kwonly", arg.arg)
    for arg in function.parameters:
        default = function.default_of(arg.arg)
        base = arg.annotation.value if isinstance(arg.annotation, ast.Subscript) else arg.annotation
        annotated = base is not None and ast.unparse(base) in ("list", "List", "typing.List")
        if isinstance(default, (ast.List, ast.ListComp)) or annotated:
            report(function, arg, "py-list-argument", arg.arg)


def _check_decorators(program: Program, function: Function, report: Report) -> None:
    scope = function.scope.parent
    assert scope is not None
    for decorator in function.node.decorator_list:
        if _decorator_name(program, decorator, scope) not in DECORATORS:
            report(function, decorator, "py-decorator", ast.unparse(decorator))


def _decorator_name(program: Program, decorator: ast.expr, scope: Scope) -> str:
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    found = program.resolve(node, scope)
    return found.dotted if isinstance(found, External) else ast.unparse(node)


def loop_bodies(program: Program, function: Function) -> Iterator[str]:
    """Names that the function passes to fori_loop or while_loop."""
    for node in ast.walk(function.node):
        if isinstance(node, ast.Call):
            found = program.resolve(node.func, function.scope)
            if found in (External("nki.language.fori_loop"), External("nki.language.while_loop")):
                for value in (*node.args, *[k.value for k in node.keywords]):
                    if isinstance(value, ast.Name):
                        yield value.id


class _Visitor(ast.NodeVisitor):
    """Walks one function's own text."""

    def __init__(self, program: Program, function: Function, report: Report) -> None:
        self.program = program
        self.function = function
        self.scope = function.scope
        self._report = report
        self._bodies = frozenset(loop_bodies(program, function))
        self._iterators: set[int] = set()

    def report(self, node: ast.AST, rule: str, detail: str = "") -> None:
        self._report(self.function, node, rule, detail)

    def visit(self, node: ast.AST) -> None:
        if type(node) in _STATEMENTS:
            self.report(node, *_STATEMENTS[type(node)])
        check_api_uses(self.program, self.scope, node, self.function, self._report)
        super().visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """The raised exception is part of the finding."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """An inner class is one finding."""

    def visit_Import(self, node: ast.Import) -> None:
        """Nothing in it."""

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        """Its body is checked on its own."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in self._bodies:
            self.report(node, "py-def-nested", node.name)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._check_targets(node, [node.target])
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._check_targets(node, node.targets)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._check_targets(node, [node.target])
        if isinstance(node.op, ast.MatMult):
            self.report(node, "py-matmul")
        self.generic_visit(node)

    def _check_targets(self, node: ast.stmt, targets: list[ast.expr]) -> None:
        stores = [t for t in targets if isinstance(t, (ast.Subscript, ast.Attribute))]
        if len(stores) > 1:
            self.report(node, "py-target", "several elements or attributes in one assignment")
        for target in targets:
            self._check_target(target)

    def _check_target(self, target: ast.expr) -> None:
        if isinstance(target, ast.List):
            self.report(target, "py-target", "[a, b] = ...; write a, b = ...")
        elif isinstance(target, ast.Tuple):
            for element in target.elts:
                if isinstance(element, (ast.Subscript, ast.Attribute)):
                    self.report(element, "py-target", f"{ast.unparse(element)} in an unpacking")
                else:
                    self._check_target(element)
        elif isinstance(target, ast.Subscript) and isinstance(target.slice, (ast.Tuple, ast.Slice)):
            self.report(target, "py-target", f"{ast.unparse(target)} = ...")
        elif isinstance(target, (ast.Subscript, ast.Attribute)):
            root = target.value
            found = self.program.resolve(root, self.scope)
            if isinstance(found, Variable) and isinstance(root, ast.Name):
                self.report(target, "py-global-state", root.id)

    def visit_For(self, node: ast.For) -> None:
        if not isinstance(node.target, ast.Name):
            self.report(node.target, "py-for-target", ast.unparse(node.target))
        if node.orelse:
            self.report(node, "py-loop-else")
        if isinstance(node.iter, ast.Call):
            self._iterators.add(id(node.iter.func))
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        if node.orelse:
            self.report(node, "py-loop-else")
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        item = node.items[0]
        call = item.context_expr
        simple = (
            len(node.items) == 1
            and item.optional_vars is None
            and isinstance(call, ast.Call)
            and not call.args
            and not call.keywords
            and self.program.resolve(call.func, self.scope) == External("nki.language.no_reorder")
        )
        if not simple:
            self.report(node, "py-with", ast.unparse(call))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg is None:
                self.report(keyword.value, "py-star", f"**{ast.unparse(keyword.value)}")
        found = self.program.resolve(node.func, self.scope)
        if isinstance(found, External):
            self._check_library(node, found)
        name = node.func.id if isinstance(node.func, ast.Name) and found is None else ""
        if name in ("min", "max") and len(node.args) > 2:
            self.report(node, "py-builtin", f"{name} of more than two values")
        self._check_change(node)
        self.generic_visit(node)

    def _check_library(self, node: ast.Call, found: External) -> None:
        root = found.dotted.split(".")[0]
        if root == "math":
            if found.dotted.partition(".")[2] not in MATH:
                self.report(node, "py-library", f"{found.dotted}; of math there are {', '.join(sorted(MATH))}")
        elif root not in ("nki", "neuronxcc") and not found.dotted.startswith(_DECLARATIONS):
            known = root in api.LIBRARIES
            self.report(node, "py-library" if known else "reach-unresolved", found.dotted)

    def _check_change(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            found = self.program.resolve(node.func.value, self.scope)
            changes = (
                "append",
                "clear",
                "extend",
                "pop",
                "remove",
                "reverse",
                "setdefault",
                "update",
                "insert",
                "sort",
            )
            if isinstance(found, Variable) and node.func.attr in changes:
                self.report(node, "py-global-state", node.func.value.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        found = self.program.resolve(node, self.scope)
        if isinstance(found, External) and found.dotted.startswith("numpy.") and node.attr in NUMPY_TYPES:
            self.report(node, "py-library", f"{found.dotted}; use nl.{node.attr}")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load) or self.program.lookup(node.id, self.scope) is not None:
            return
        if node.id == "range" and id(node) not in self._iterators:
            self.report(node, "py-builtin", "range outside the head of a for loop")
        elif node.id in _BUILT_IN and node.id not in BUILTINS:
            self.report(node, "py-builtin", node.id)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self.report(node, "py-matmul")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, (ast.Is, ast.IsNot)):
                none = isinstance(right, ast.Constant) and right.value is None and len(node.ops) == 1
                self.report(node, "py-is-none" if none else "py-is", ast.unparse(node))
            elif isinstance(op, (ast.In, ast.NotIn)) and (len(node.ops) > 1 or isinstance(right, ast.Dict)):
                self.report(node, "py-in", ast.unparse(node))
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                self.report(value, "py-star", f"**{ast.unparse(value)}")
            elif not isinstance(key, ast.Constant):
                self.report(key, "py-dict-computed-key", ast.unparse(key))
            elif not isinstance(key.value, str):
                self.report(key, "py-dict-key", ast.unparse(key))
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                if value.format_spec is not None:
                    self.report(value, "py-format-spec", ast.unparse(node))
                self.visit(value.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            if not (isinstance(part, ast.Constant) and part.value is Ellipsis):
                self.visit(part)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if value is Ellipsis:
            self.report(node, "py-ellipsis")
        elif isinstance(value, (bytes, complex)):
            self.report(node, "py-constant", repr(value))
        elif isinstance(value, int) and value >= _INT32:
            self.report(node, "py-constant", f"{value} does not fit 32 bits")
