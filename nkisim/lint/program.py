"""Source files of a lint run, and what a name in them refers to. Nothing is imported or executed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

NKI = ("nki", "nkisim", "neuronxcc")


@dataclass(frozen=True)
class External:
    """Something outside the linted sources, by its full name: `nki.isa.dma_copy`, `numpy.zeros`."""

    dotted: str

    @property
    def is_nki(self) -> bool:
        """Whether it belongs to NKI."""
        return self.dotted.split(".", 1)[0] == "nki"


@dataclass(eq=False, repr=False)
class Function:
    """A function of a linted source. `scope` is its own, `owner` the class it is a method of."""

    file: SourceFile
    node: ast.FunctionDef | ast.AsyncFunctionDef
    scope: Scope
    owner: Class | None = None
    outer: Function | None = None

    @property
    def name(self) -> str:
        """Its name, with the class in front."""
        return f"{self.owner.node.name}.{self.node.name}" if self.owner else self.node.name

    @property
    def parameters(self) -> list[ast.arg]:
        """Parameters that take one argument each, in order."""
        a = self.node.args
        return [*a.posonlyargs, *a.args, *a.kwonlyargs]

    def default_of(self, parameter: str) -> ast.expr | None:
        """The default of a parameter, or None."""
        a = self.node.args
        plain = [*a.posonlyargs, *a.args]
        for arg, default in zip(reversed(plain), reversed(a.defaults), strict=False):
            if arg.arg == parameter:
                return default
        for arg, keyword_default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
            if arg.arg == parameter:
                return keyword_default
        return None


@dataclass(eq=False, repr=False)
class Class:
    """A class of a linted source."""

    file: SourceFile
    node: ast.ClassDef
    scope: Scope
    methods: dict[str, Function] = field(default_factory=dict)


@dataclass(eq=False, repr=False)
class Variable:
    """A name that a module binds to a value; `value` is None where it is bound in another way or more than once."""

    scope: Scope
    value: ast.expr | None


@dataclass(frozen=True)
class Local:
    """A name that a function binds while it runs."""


@dataclass(frozen=True)
class _Import:
    """`import module` or `from module import name`; the first component only where `module` is dotted and unnamed."""

    module: str
    name: str | None = None
    level: int = 0


@dataclass(frozen=True)
class Folder:
    """A package without an `__init__.py`."""

    path: Path


@dataclass(eq=False, repr=False)
class Scope:
    """Names bound by a module or a function."""

    file: SourceFile
    parent: Scope | None
    bindings: dict[str, Binding | _Import] = field(default_factory=dict)
    stars: list[_Import] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class SourceFile:
    """A parsed file. `shown` is its path as findings print it."""

    path: Path
    shown: str
    tree: ast.Module
    functions: list[Function] = field(default_factory=list)
    scope: Scope = field(init=False)

    def __post_init__(self) -> None:
        self.scope = Scope(self, None)

    @cached_property
    def calls(self) -> list[tuple[ast.Call, Scope]]:
        """Every call in the file and the scope it stands in."""
        found = []
        stack: list[tuple[ast.AST, Scope]] = [(self.tree, self.scope)]
        inside = {id(function.node): function.scope for function in self.functions}
        while stack:
            node, scope = stack.pop()
            if isinstance(node, ast.Call):
                found.append((node, scope))
            scope = inside.get(id(node), scope)
            stack.extend([(child, scope) for child in ast.iter_child_nodes(node)])
        return found


Binding = External | Function | Class | Variable | Local | SourceFile | Folder


class Program:
    """All files of a run, parsed once, and name resolution across them."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._files: dict[Path, SourceFile | None] = {}
        self._modules: dict[tuple[str, int, SourceFile], Binding | None] = {}
        self._found: dict[tuple[str, Scope | None], Binding | None] = {}
        self._resolving: set[tuple[int, str]] = set()

    def load(self, path: Path) -> SourceFile | None:
        """The parsed file at `path`, or None: it cannot be read or is not Python, and `errors` says why."""
        path = path.resolve()
        if path not in self._files:
            self._files[path] = None
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
            except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
                self.errors.append(f"{_shown(path)}: {error}")
                return None
            file = SourceFile(path, _shown(path), tree)
            self._files[path] = file
            _Binder(file).bind(tree.body, file.scope, None, None)
        return self._files[path]

    def lookup(self, name: str, scope: Scope | None) -> Binding | None:
        """What `name` refers to in `scope`, or None: a built-in or nothing."""
        if self._resolving:
            # On the way round a circle of imports a name may look as if there were nothing.
            return self._look_up(name, scope)
        key = (name, scope)
        if key not in self._found:
            self._found[key] = self._look_up(name, scope)
        return self._found[key]

    def _look_up(self, name: str, scope: Scope | None) -> Binding | None:
        while scope is not None:
            found = self._own(name, scope)
            if found is not None:
                return found
            scope = scope.parent
        return None

    def resolve(self, node: ast.expr, scope: Scope) -> Binding | None:
        """What a name or a chain of attributes refers to, as far as the sources say."""
        if isinstance(node, ast.Name):
            return self.lookup(node.id, scope)
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value, scope)
            return None if base is None else self.attribute(base, node.attr)
        return None

    def attribute(self, base: Binding, name: str) -> Binding | None:
        """What `base.name` refers to."""
        if isinstance(base, External):
            return _external(f"{base.dotted}.{name}")
        if isinstance(base, Folder):
            return self._at(base.path / name)
        if isinstance(base, SourceFile):
            found = self._own(name, base.scope)
            if found is None and base.path.name == "__init__.py":
                return self._at(base.path.parent / name)
            return found
        return base.methods.get(name) if isinstance(base, Class) else None

    def _own(self, name: str, scope: Scope) -> Binding | None:
        # Modules may import a name from each other in a circle.
        if (id(scope), name) in self._resolving:
            return None
        self._resolving.add((id(scope), name))
        try:
            return self._bound(name, scope)
        finally:
            self._resolving.discard((id(scope), name))

    def _bound(self, name: str, scope: Scope) -> Binding | None:
        found = scope.bindings.get(name)
        if isinstance(found, _Import):
            return self._imported(found, scope.file)
        if isinstance(found, Variable):
            return self._behind(found)
        if found is None:
            for star in scope.stars:
                module = self._module(star, scope.file)
                if isinstance(module, SourceFile) and module is not scope.file:
                    found = self._own(name, module.scope)
                elif isinstance(module, External) and module.is_nki and name in _public(module.dotted):
                    found = self.attribute(module, name)
                if found is not None:
                    return found
        return found

    def _behind(self, variable: Variable) -> Binding:
        """What a module-level variable stands for: another name, a module imported by string, or itself."""
        if isinstance(variable.value, (ast.Name, ast.Attribute)):
            return self.resolve(variable.value, variable.scope) or variable
        if isinstance(variable.value, ast.Call) and variable.value.args:
            function = self.resolve(variable.value.func, variable.scope)
            if function == External("importlib.import_module"):
                for text in self._strings(variable.value.args[0], variable.scope):
                    if text.split(".")[0] in NKI:
                        return _external(text)
        return variable

    def _strings(self, node: ast.expr, scope: Scope, depth: int = 4) -> Iterator[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.IfExp):
            yield from self._strings(node.body, scope, depth)
            yield from self._strings(node.orelse, scope, depth)
        elif isinstance(node, ast.Name) and depth:
            found = self.lookup(node.id, scope)
            if isinstance(found, Variable) and found.value is not None:
                yield from self._strings(found.value, found.scope, depth - 1)

    def _imported(self, what: _Import, file: SourceFile) -> Binding | None:
        module = self._module(what, file)
        if what.name is None or module is None:
            return module
        if isinstance(module, SourceFile) and module is file:
            return None
        return self.attribute(module, what.name)

    def _module(self, what: _Import, file: SourceFile) -> Binding | None:
        """The module that an import names; looked for once, because that takes many calls of the file system."""
        key = (what.module, what.level, file)
        if key not in self._modules:
            self._modules[key] = self._find_module(what.module, what.level, file.path.parent)
        return self._modules[key]

    def _find_module(self, dotted: str, level: int, folder: Path) -> Binding | None:
        parts = dotted.split(".") if dotted else []
        if level:
            above = folder.parents[level - 2] if level > 1 else folder
            return self._at(above.joinpath(*parts))
        if parts[0] in NKI or parts[0] in sys.stdlib_module_names:
            return _external(dotted)
        top = folder
        while (top / "__init__.py").exists():
            top = top.parent
        for root in dict.fromkeys((top, folder, Path.cwd())):
            found = self._at(root.joinpath(*parts))
            if found is not None:
                return found
        return External(dotted)

    def _at(self, path: Path) -> SourceFile | Folder | None:
        for candidate in (path.with_name(path.name + ".py"), path / "__init__.py"):
            if candidate.is_file():
                return self.load(candidate)
        return Folder(path) if path.is_dir() else None


class _Binder:
    """Fills the scopes of one file."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file

    def bind(self, body: list[ast.stmt], scope: Scope, outer: Function | None, owner: Class | None) -> None:
        for node in body:
            self._statement(node, scope, outer, owner)

    def _statement(self, node: ast.stmt, scope: Scope, outer: Function | None, owner: Class | None) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = self._function(node, scope, outer, owner)
            if owner is not None:
                owner.methods[node.name] = function
            else:
                scope.bindings[node.name] = function
            return
        if isinstance(node, ast.ClassDef):
            cls = Class(self.file, node, scope)
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    self._statement(child, scope, outer, cls)
            scope.bindings[node.name] = cls
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                # The first of two: a fallback stands in an except or else branch.
                scope.bindings.setdefault(name, _Import(alias.name if alias.asname else name))
            return
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*":
                    scope.stars.append(_Import(node.module or "", None, node.level))
                else:
                    found = _Import(node.module or "", alias.name, node.level)
                    scope.bindings.setdefault(alias.asname or alias.name, found)
            return
        for name, value in bound_names(node):
            self._name(name, value, scope, outer)
        for child_body in blocks(node):
            self.bind(child_body, scope, outer, owner)

    def _name(self, name: str, value: ast.expr | None, scope: Scope, outer: Function | None) -> None:
        if outer is not None:
            scope.bindings[name] = Local()
        elif name in scope.bindings and isinstance(scope.bindings[name], Variable):
            scope.bindings[name] = Variable(scope, None)
        else:
            scope.bindings.setdefault(name, Variable(scope, value))

    def _function(
        self,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        parent: Scope,
        outer: Function | None,
        owner: Class | None,
    ) -> Function:
        scope = Scope(self.file, parent)
        function = Function(self.file, node, scope, owner, outer)
        self.file.functions.append(function)
        a = node.args
        for arg in [*function.parameters, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]:
            scope.bindings[arg.arg] = Local()
        self.bind(node.body, scope, function, None)
        return function


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """The statement lists of a compound statement."""
    for name in ("body", "orelse", "finalbody"):
        value = getattr(node, name, None)
        if isinstance(value, list):
            yield value
    for name in ("handlers", "cases"):
        for child in getattr(node, name, []):
            yield child.body


def bound_names(node: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """Names that a statement itself binds, not those of the statements in it, and the value of a plain assignment."""
    plain: ast.expr | None = None
    if isinstance(node, ast.AnnAssign):
        plain = node.target
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        plain = node.targets[0]
    if isinstance(plain, ast.Name) and isinstance(node, (ast.Assign, ast.AnnAssign)):
        yield plain.id, node.value
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler):
            if child.name:
                yield child.name, None
        elif not isinstance(child, ast.stmt):
            for sub in ast.walk(child.pattern if isinstance(child, ast.match_case) else child):
                if isinstance(sub, ast.Name) and isinstance(sub.ctx, ast.Store) and sub is not plain:
                    yield sub.id, None
                elif isinstance(sub, (ast.MatchAs, ast.MatchStar)) and sub.name:
                    yield sub.name, None


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """Nodes that the compiler reads for a function: its body and defaults, not its decorators and annotations."""
    a = function.node.args
    stack: list[ast.AST] = [*function.node.body, *a.defaults, *[d for d in a.kw_defaults if d is not None]]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for name, value in ast.iter_fields(node):
            if name == "annotation":
                continue
            stack.extend(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, ast.AST))


def _external(dotted: str) -> External:
    """The simulator's modules and AWS's have the same names here."""
    parts = dotted.split(".")
    if parts[0] == "nkisim":
        parts[0] = "nki"
    if parts[:2] == ["nki", "nki"]:
        del parts[1]
    if parts[:3] == ["nki", "isa", "constants"]:
        del parts[2]
    return External(".".join(parts))


def _public(dotted: str) -> frozenset[str]:
    from nkisim.lint.api import NAMES

    return NAMES.get(dotted, frozenset())


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
