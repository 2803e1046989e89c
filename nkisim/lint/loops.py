"""Questions about the text of loop bodies."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

_LOOPS = (ast.For, ast.While, ast.AsyncFor)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
# What has no nodes inside, half of all, comes with the scopes.
_NOT_ENTERED = (*_SCOPES, ast.expr_context, ast.operator, ast.cmpop, ast.unaryop, ast.boolop, ast.Constant)


def walk(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Nodes of the statements, without inner functions and classes."""
    stack: list[ast.AST] = list(reversed(body))
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, _NOT_ENTERED):
            stack.extend(reversed(list(ast.iter_child_nodes(node))))


def stored(body: list[ast.stmt]) -> set[str]:
    """Names that the statements bind."""
    return {n.id for n in walk(body) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def control(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that leave the loop whose body this is, or skip the rest of a trip."""
    for node in body:
        if isinstance(node, (ast.Break, ast.Continue, ast.Return)):
            yield node
        elif isinstance(node, _LOOPS):
            yield from (n for n in walk([node]) if isinstance(n, ast.Return))
        elif not isinstance(node, _SCOPES):
            for name in ("body", "orelse", "finalbody"):
                yield from control(getattr(node, name, []))


def leaves_early(body: list[ast.stmt]) -> bool:
    """Whether a trip may be the last one before the loop's end."""
    return any(not isinstance(node, ast.Continue) for node in control(body))


def carried(
    function: ast.AST, loop: ast.stmt, body: list[ast.stmt], outside: Collection[str]
) -> Iterator[tuple[str, ast.AST]]:
    """Names bound before the loop and bound anew in its body whose value a later trip or a later statement reads."""
    first: dict[str, str] = {}
    stores: dict[str, ast.AST] = {}
    for name, context, node in _uses(body):
        first.setdefault(name, context)
        if context == "store":
            stores.setdefault(name, node)
    for name, node in stores.items():
        if name in outside and (first[name] == "load" or _read_after(function, loop, name)):
            yield name, node


def _read_after(function: ast.AST, loop: ast.stmt, name: str) -> bool:
    inside = {id(n) for n in ast.walk(loop)}
    around = [n for n in ast.walk(function) if isinstance(n, _LOOPS) and n is not loop and _contains(n, loop)]
    end = (loop.end_lineno or 0, loop.end_col_offset or 0)
    for scope in (function, *around):
        for node in ast.walk(scope):
            if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
                continue
            later = scope is not function or (node.lineno, node.col_offset) >= end
            if node.id == name and id(node) not in inside and later:
                return True
    return False


def _contains(outer: ast.AST, inner: ast.AST) -> bool:
    return any(n is inner for n in ast.walk(outer))


def _uses(body: list[ast.stmt]) -> Iterator[tuple[str, str, ast.AST]]:
    """Names in the order in which the statements read and bind them."""
    for statement in body:
        if isinstance(statement, ast.Assign):
            parts: list[ast.AST] = [statement.value, *statement.targets]
        elif isinstance(statement, ast.AnnAssign):
            parts = [*([statement.value] if statement.value else []), statement.target]
        elif isinstance(statement, ast.AugAssign):
            if isinstance(statement.target, ast.Name):
                yield statement.target.id, "load", statement
            parts = [statement.value, statement.target]
        elif isinstance(statement, (ast.For, ast.AsyncFor)):
            parts = [statement.iter, statement.target]
        else:
            parts = [c for c in ast.iter_child_nodes(statement) if not isinstance(c, ast.stmt)]
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            parts = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        for part in parts:
            for node in ast.walk(part):
                if isinstance(node, ast.Name):
                    yield node.id, "store" if isinstance(node.ctx, ast.Store) else "load", statement
        for name in ("body", "orelse", "finalbody"):
            block = getattr(statement, name, None)
            if isinstance(block, list) and not isinstance(statement, _SCOPES):
                yield from _uses(block)
