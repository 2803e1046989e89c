"""What the compiler reads in a kernel's text: masks joined by `and`, and annotated variables.

Python gives neither a value of its own: `a and b` is b, and annotations of variables are not evaluated. A kernel that
has one of the two is compiled again, with `&` and with a check of the shape in its place; others run as they are.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from nkisim.legacy._errors import refuse
from nkisim.legacy._tile import Tile
from nkisim.legacy.typing import TensorType

_CHECK = "__nkisim_annotated__"
_compiled: dict[CodeType, CodeType | None] = {}


def as_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the compiler reads it; the same one where there is no difference, or no text."""
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__
    if code not in _compiled:
        _compiled[code] = _rewritten(function)
    changed = _compiled[code]
    if changed is None:
        return function
    function.__globals__.setdefault(_CHECK, annotated)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    made = FunctionType(
        changed,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in changed.co_freevars),
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def annotated(value: Any, declared: Any, name: str) -> Any:
    """`value`, which an annotated variable gets.

    Raises:
        NkiError: a tensor of another shape than the annotation's.
    """
    if isinstance(value, Tile) and isinstance(declared, TensorType) and declared.shape not in (None, value.shape):
        rule = "err_annotation_shape_mismatch: shape of a variable"
        refuse("assignment", name, rule, list(value.shape), list(declared.shape or ()))
    return value


def _rewritten(function: FunctionType) -> CodeType | None:
    """The function's code after the changes; None where there are none, or where its text is not to be had."""
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    # A nested function's text is indented: a block around it makes it a program again.
    nested = lines[0][:1].isspace()
    try:
        tree = ast.parse("if True:\n" + "".join(lines) if nested else "".join(lines))
    except SyntaxError:
        return None  # a lambda in the middle of an expression
    body = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    kernel = body[0]
    if not isinstance(kernel, ast.FunctionDef) or kernel.name != function.__name__:
        return None
    change = _Change()
    change.visit(kernel)
    if not change.found:
        return None
    kernel.decorator_list = []
    ast.increment_lineno(ast.fix_missing_locations(kernel), first - 1 - nested)
    free = function.__code__.co_freevars
    # Names of enclosing functions are parameters of one around it, so that they are free in it again.
    around = ast.parse(f"def around({', '.join(free)}): pass").body[0]
    assert isinstance(around, ast.FunctionDef)
    around.body = [kernel]
    kernel.args.defaults = [ast.Constant(value=None) for _ in kernel.args.defaults]
    kernel.args.kw_defaults = [None if d is None else ast.Constant(value=None) for d in kernel.args.kw_defaults]
    for argument in ast.walk(kernel.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    kernel.returns = None
    module = ast.fix_missing_locations(ast.Module(body=[around], type_ignores=[]))
    outer = _inner_code(compile(module, function.__code__.co_filename, "exec"), "around")
    return _inner_code(outer, function.__name__)


def _inner_code(code: CodeType, name: str) -> CodeType:
    return next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)


class _Change(ast.NodeTransformer):
    """`and` in `mask=` arguments becomes `&`; `x: tensor[...] = value` checks the value's shape."""

    def __init__(self) -> None:
        self.found = False

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        """An argument by name."""
        self.generic_visit(node)
        if node.arg == "mask":
            node.value = _Joined(self).visit(node.value)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """An annotated assignment."""
        self.generic_visit(node)
        annotation = node.annotation
        if node.value is None or not isinstance(node.target, ast.Name) or not isinstance(annotation, ast.Subscript):
            return node
        base = annotation.value
        if (base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")) != "tensor":
            return node
        self.found = True
        check = ast.Call(
            func=ast.Name(id=_CHECK, ctx=ast.Load()),
            args=[node.value, annotation, ast.Constant(value=node.target.id)],
            keywords=[],
        )
        return ast.copy_location(ast.Assign(targets=[node.target], value=check), node)


class _Joined(ast.NodeTransformer):
    """`a and b` becomes `(a) & (b)`."""

    def __init__(self, change: _Change) -> None:
        self._change = change

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """A chain of `and` or `or`."""
        self.generic_visit(node)
        if not isinstance(node.op, ast.And):
            return node
        self._change.found = True
        joined = node.values[0]
        for value in node.values[1:]:
            joined = ast.BinOp(left=joined, op=ast.BitAnd(), right=value)
        return ast.copy_location(joined, node)
