"""Which functions and classes the compiler reads: the kernels of a file and every helper they refer to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from nkisim.lint.program import Class, External, Function, Program, SourceFile, own_nodes

JIT = External("nki.jit")
SIMULATE = External("nki.simulate")


@dataclass
class Reached:
    """Kernels in order of appearance, and all functions and classes that they reach, themselves included."""

    kernels: list[Function] = field(default_factory=list)
    functions: dict[Function, None] = field(default_factory=dict)
    classes: dict[Class, None] = field(default_factory=dict)


def reach(program: Program, files: list[SourceFile]) -> Reached:
    """Kernels of `files` and what they reach, across files."""
    found = Reached()
    for file in files:
        for function in kernels(program, file):
            if function not in found.kernels:
                found.kernels.append(function)
    for kernel in found.kernels:
        _follow(program, kernel, found)
    return found


def kernels(program: Program, file: SourceFile) -> Iterator[Function]:
    """Functions that the file decorates with, or passes to, `nki.jit`, or passes to `nki.simulate`."""
    for function in file.functions:
        if is_kernel(program, function):
            yield function
    for call, scope in file.calls:
        if program.resolve(call.func, scope) in (JIT, SIMULATE) and call.args:
            argument = call.args[0]
            found = program.resolve(argument.value if isinstance(argument, ast.Subscript) else argument, scope)
            if isinstance(found, Function):
                yield found


def is_kernel(program: Program, function: Function) -> bool:
    """Whether the function is decorated with `nki.jit`, bare or with arguments."""
    outside = function.scope.parent
    assert outside is not None
    for decorator in function.node.decorator_list:
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        if program.resolve(name, outside) == JIT:
            return True
    return False


def _follow(program: Program, kernel: Function, found: Reached) -> None:
    work: list[Function | Class] = [kernel]
    while work:
        item = work.pop()
        if isinstance(item, Class):
            if item not in found.classes:
                found.classes[item] = None
                work.extend(item.methods.values())
            continue
        if item in found.functions:
            continue
        found.functions[item] = None
        for node in own_nodes(item):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = item.scope.bindings.get(node.name)
                if isinstance(inner, Function):
                    work.append(inner)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                target = program.resolve(node, item.scope)
                if isinstance(target, (Function, Class)):
                    work.append(target)
