"""Does source code use TensorRT's API as it is?

:func:`check` reads modules that import ``tensorrt``, without running them, follows each expression that starts at one
of its names as far as types are certain, and holds every attribute and call against the catalogue
(:mod:`tests.tensorrt.catalogue`). It knows the types of

- the modules and what is imported from them, and what they construct and return;
- parameters, variables and attributes that are annotated with a class of the API, or assigned one of its objects once;
- functions and methods of the same file that are annotated to return one.

A name that is bound to different things, or to something unknown, is not followed: what is reported is wrong, but not
all that is wrong is reported. Types of arguments are the business of a type checker, and are not looked at.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tests.tensorrt.catalogue import Catalogue, Entry
from tests.tensorrt.scopes import PACKAGE, Function, Scope, Source, bound_by_import, own_nodes


@dataclass(frozen=True, order=True)
class Fault:
    """One use of the API that fails when it is run."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        faults: by file and line.
        used: the names of the API that were looked up, found or not: what has been checked at all.
    """

    faults: tuple[Fault, ...]
    used: frozenset[str]

    def __str__(self) -> str:
        return "\n".join(map(str, self.faults))


def check(folders: Iterable[Path], catalogue: Catalogue) -> Report:
    """Check every module under ``folders`` that imports ``tensorrt``."""
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    reports = [check_source(source, str(file), catalogue) for file in files if PACKAGE in (source := file.read_text())]
    faults = sorted(fault for report in reports for fault in report.faults)
    return Report(tuple(faults), frozenset().union(*(report.used for report in reports)))


def check_source(source: str, file: str, catalogue: Catalogue) -> Report:
    """Check one module's source; ``file`` is what its faults are reported under."""
    tree = ast.parse(source, file)
    reader = _Reader(catalogue, file)
    if any(_imported(node) for node in ast.walk(tree)):
        reader.read(Scope(tree))
    return Report(tuple(sorted(reader.faults)), frozenset(reader.used))


@dataclass(frozen=True)
class _Named:
    """The very thing that the catalogue has under ``path``: a module, class, function or value."""

    path: str


@dataclass(frozen=True)
class _Instance:
    """An object of the class that the catalogue has under ``path``."""

    path: str


@dataclass(frozen=True)
class _Method:
    """A method under ``path``, of an object if it is ``bound``."""

    path: str
    bound: bool


@dataclass(frozen=True)
class _Local:
    """A function or class of the file itself, or (``made``) what calling it gives: an object of that class."""

    scope: Scope
    made: bool = False


_Type: TypeAlias = "_Named | _Instance | _Method | _Local | None"  # None: unknown


class _Reader:
    """Reads a module's expressions, infers their types and gathers the faults."""

    def __init__(self, catalogue: Catalogue, file: str) -> None:
        self.faults: set[Fault] = set()
        self.used: set[str] = set()
        self._catalogue = catalogue
        self._file = file
        self._open: list[tuple[Scope, str]] = []  # the names whose types are being inferred

    def read(self, scope: Scope) -> None:
        """Look at every expression of a scope and of those in it."""
        for node in own_nodes(scope.node):
            self._read_node(node, scope)
        for inner in scope.inner:
            self.read(inner)

    def _read_node(self, node: ast.AST, scope: Scope) -> None:
        match node:
            case ast.ImportFrom():
                self._read_import(node)
            case ast.Attribute(ctx=ast.Store()):
                self._read_assignment(node, scope)
            case ast.Attribute() | ast.Call():
                self._type(node, scope)
            case ast.arg(annotation=ast.expr() as annotation) | ast.AnnAssign(annotation=annotation):
                self._annotated(annotation, scope)

    def _read_import(self, node: ast.ImportFrom) -> None:
        for name, path in bound_by_import(node):
            if name == "*":
                self._report(node, f"from {node.module} import * cannot be checked")
            elif path:
                self._entry(path, node)

    def _read_assignment(self, node: ast.Attribute, scope: Scope) -> None:
        path = self._owner(self._type(node.value, scope))
        entry = self._entry(f"{path}.{node.attr}", node) if path else None
        if entry is not None and not entry.settable:
            self._report(node, f"{path}.{node.attr} cannot be assigned to")

    def _type(self, node: ast.expr, scope: Scope) -> _Type:
        """The type of an expression, every attribute and call on the way held against the catalogue."""
        match node:
            case ast.Name():
                return self._name(node.id, scope)
            case ast.Attribute():
                return self._attribute(self._type(node.value, scope), node)
            case ast.Call():
                return self._call(self._type(node.func, scope), node)
        return None

    def _name(self, name: str, scope: Scope) -> _Type:
        found = scope.lookup(name)
        if found is None:
            return None
        where, sources = found
        return self._certain(name, where, [(source, where) for source in sources])

    def _certain(self, name: str, where: Scope, sources: list[tuple[Source, Scope]]) -> _Type:
        """The one type that all these sources of a name agree on."""
        if (where, name) in self._open:  # it is made of itself
            return None
        self._open.append((where, name))
        types = {self._given(source, scope) for source, scope in _decisive(sources)}
        self._open.pop()
        return types.pop() if len(types) == 1 else None

    def _given(self, source: Source, scope: Scope) -> _Type:
        if source.path:
            return _Named(source.path)
        if source.definition is not None:
            # A method's first parameter is an object of the class that the method is in.
            return _Local(source.definition, made=source.definition is scope.owner)
        if source.annotation is not None:
            return self._annotated(source.annotation, scope)
        return self._type(source.value, scope) if source.value is not None else None

    def _annotated(self, annotation: ast.expr, scope: Scope) -> _Type:
        """The type of what is annotated so; an optional one is taken to be there, which a type checker sees to."""
        match annotation:
            case ast.Constant(value=str(text)):
                quoted = ast.parse(text, mode="eval").body
                return self._annotated(ast.copy_location(quoted, annotation), scope)
            case ast.BinOp(op=ast.BitOr(), left=left, right=ast.Constant(value=None)):
                return self._annotated(left, scope)
            case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
                return self._annotated(inner, scope)
            case ast.Name() | ast.Attribute():
                return self._made(self._type(annotation, scope))
        return None

    def _made(self, known: _Type) -> _Type:
        """An object of a class."""
        match known:
            case _Named(path) if path in self._catalogue and self._catalogue[path].kind == "class":
                return _Instance(path)
            case _Local(scope, made=False) if isinstance(scope.node, ast.ClassDef):
                return _Local(scope, made=True)
        return None

    def _attribute(self, owner: _Type, node: ast.Attribute) -> _Type:
        if isinstance(owner, _Local):
            return self._local_attribute(owner, node.attr)
        path = self._owner(owner)
        entry = self._entry(f"{path}.{node.attr}", node) if path else None
        if entry is None:
            return None
        if entry.kind == "method":
            return _Method(f"{path}.{node.attr}", bound=isinstance(owner, _Instance))
        if entry.kind == "value":
            # On the class itself a property is not the value that an object has; an enum's member is.
            return (
                _Instance(entry.type) if entry.type and (isinstance(owner, _Instance) or not entry.settable) else None
            )
        return _Named(f"{path}.{node.attr}")

    def _local_attribute(self, owner: _Local, name: str) -> _Type:
        scope = owner.scope
        if not isinstance(scope.node, ast.ClassDef):
            return None
        sources = [(source, scope) for source in scope.names.get(name, [])] + scope.attributes.get(name, [])
        found = self._certain(name, scope, sources)
        return self._returned(found) if isinstance(found, _Local) and _is_property(found.scope.node) else found

    def _call(self, called: _Type, node: ast.Call) -> _Type:
        match called:
            case _Named(path) if path in self._catalogue:
                return self._hold(path, node)
            case _Method(path, bound=True):
                return self._hold(path, node)
            case _Local(scope, made=False):
                return self._made(called) if isinstance(scope.node, ast.ClassDef) else self._returned(called)
        return None

    def _returned(self, function: _Local) -> _Type:
        node, parent = function.scope.node, function.scope.parent
        if isinstance(node, Function) and node.returns is not None and parent is not None:
            return self._annotated(node.returns, parent)
        return None

    def _hold(self, path: str, node: ast.Call) -> _Type:
        """Hold a call against the signatures of what is called."""
        entry = self._catalogue[path]
        if entry.kind == "class" and not entry.signatures:
            self._report(node, f"{path} has no constructor")
        keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
        unpacked = len(keywords) < len(node.keywords) or any(isinstance(part, ast.Starred) for part in node.args)
        fits = [signature for signature in entry.signatures if signature.accepts(len(node.args), keywords)]
        if entry.signatures and not fits and not unpacked:
            ways = " or ".join(map(str, dict.fromkeys(entry.signatures)))
            self._report(node, f"{path} takes {ways}, not {ast.unparse(node)}")
        if entry.kind == "class":
            return _Instance(path)
        returned = {signature.returns for signature in fits}
        return _Instance(returned.pop()) if len(returned) == 1 and all(returned) else None

    def _owner(self, known: _Type) -> str | None:
        """The path under which the catalogue has the attributes of something; None when they are not known."""
        match known:
            case _Instance(path):
                return path
            case _Named(path) if path in self._catalogue and self._catalogue[path].kind in ("module", "class"):
                return path
        return None

    def _entry(self, path: str, node: ast.AST) -> Entry | None:
        if path.rpartition(".")[2].startswith("__") and path not in self._catalogue:
            return None  # every object has such
        self.used.add(path)
        if path not in self._catalogue:
            self._report(node, f"there is no {path}")
        return self._catalogue.get(path)

    def _report(self, node: ast.AST, text: str) -> None:
        self.faults.add(Fault(self._file, getattr(node, "lineno", 0), text))


def _imported(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom) and any(path for _, path in bound_by_import(node))


def _decisive(sources: list[tuple[Source, Scope]]) -> list[tuple[Source, Scope]]:
    """An annotation holds for whatever else is assigned to the name."""
    return [row for row in sources if row[0].annotation is not None] or sources


def _is_property(node: ast.AST) -> bool:
    names = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
    return any(name.rpartition(".")[2] in ("property", "cached_property") for name in names)
