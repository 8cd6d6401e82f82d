"""What binds each name of a module, class or function, read off its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from tests.tensorrt.catalogue import MODULES

PACKAGE = MODULES[0]


@dataclass(frozen=True)
class Source:
    """Where a name gets a value from: an ``import`` of a path, an annotation, an expression, a definition; or none."""

    path: str = ""
    annotation: ast.expr | None = None
    value: ast.expr | None = None
    definition: Scope | None = None


_UNKNOWN = Source()
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_Binder: TypeAlias = (
    "ast.With | ast.AsyncWith | ast.For | ast.AsyncFor | ast.comprehension"
    " | ast.AugAssign | ast.Assign | ast.Delete | ast.match_case"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(eq=False)
class Scope:
    """A module, class or function, and what binds each name in it.

    Attributes:
        node: its definition.
        parent: the one that it is defined in.
        names: every source of every name's value.
        attributes: of a class: the same for what its methods give to ``self``, and the scope of that method.
        inner: the functions and classes that are defined directly in it.
    """

    node: ast.Module | Definition
    parent: Scope | None = None
    names: dict[str, list[Source]] = field(default_factory=dict)
    attributes: dict[str, list[tuple[Source, Scope]]] = field(default_factory=dict)
    inner: list[Scope] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.node, Function):
            self._bind_parameters(self.node.args)
        for statement in self.node.body:
            self._bind(statement)

    @property
    def owner(self) -> Scope | None:
        """The class that this is a method of."""
        return self.parent if self.parent is not None and isinstance(self.parent.node, ast.ClassDef) else None

    def lookup(self, name: str) -> tuple[Scope, list[Source]] | None:
        """The sources of a name that is read here, and the scope that has them."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names and (scope is self or not isinstance(scope.node, ast.ClassDef)):
                return scope, scope.names[name]
            scope = scope.parent
        return None

    def _bind_parameters(self, arguments: ast.arguments) -> None:
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        if self.owner is not None and named and not _is_static(self.node):
            self._add(named.pop(0).arg, Source(definition=self.owner))
        for parameter in named:
            self._add(parameter.arg, Source(annotation=parameter.annotation))
        for parameter in filter(None, (arguments.vararg, arguments.kwarg)):
            self._add(parameter.arg, _UNKNOWN)

    def _bind(self, node: ast.AST) -> None:
        """Take down what a statement or expression binds, short of what belongs to another scope."""
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                scope = Scope(node, self)
                self.inner.append(scope)
                self._add(node.name, Source(definition=scope))
                return
            case ast.Import() | ast.ImportFrom():
                for name, path in bound_by_import(node):
                    self._add(name, Source(path=path))
            case ast.Global() | ast.Nonlocal():
                for name in node.names:
                    self._spoil(name)
            case ast.Assign(targets=[target]):
                self._assign(target, Source(value=node.value))
            case ast.AnnAssign():
                self._assign(node.target, Source(annotation=node.annotation))
            case ast.NamedExpr():
                self._assign(node.target, Source(value=node.value))
            case ast.With() | ast.AsyncWith() | ast.For() | ast.AsyncFor() | ast.comprehension() | ast.AugAssign():
                self._assign_unknown(node)
            case ast.Assign() | ast.Delete() | ast.match_case():
                self._assign_unknown(node)
            case ast.ExceptHandler(name=str(name)):
                self._add(name, _UNKNOWN)
            case ast.Lambda():
                for parameter in ast.walk(node.args):
                    if isinstance(parameter, ast.arg):
                        self._add(parameter.arg, _UNKNOWN)
        for child in ast.iter_child_nodes(node):
            self._bind(child)

    def _assign(self, target: ast.expr, source: Source) -> None:
        match target:
            case ast.Name():
                self._add(target.id, source)
            case ast.Attribute(value=ast.Name(id=name)) if self.owner is not None and self.names.get(name) == [
                Source(definition=self.owner)
            ]:
                self.owner.attributes.setdefault(target.attr, []).append((source, self))
            case ast.Tuple() | ast.List():
                for element in target.elts:
                    self._assign(element, _UNKNOWN)
            case ast.Starred():
                self._assign(target.value, _UNKNOWN)

    def _assign_unknown(self, node: _Binder) -> None:
        """What is bound by a statement of which the value's type is not followed, nested targets included."""
        match node:
            case ast.With() | ast.AsyncWith():
                targets = [item.optional_vars for item in node.items if item.optional_vars]
            case ast.For() | ast.AsyncFor() | ast.comprehension() | ast.AugAssign():
                targets = [node.target]
            case ast.Assign() | ast.Delete():
                targets = node.targets
            case _:
                names = [getattr(part, "name", None) or getattr(part, "rest", None) for part in ast.walk(node.pattern)]
                targets = [ast.Name(name) for name in names if name]
        for target in targets:
            self._assign(target, _UNKNOWN)

    def _spoil(self, name: str) -> None:
        """A name that is rebound from within: nowhere that it is visible is its value certain."""
        scope: Scope | None = self
        while scope is not None:
            scope._add(name, _UNKNOWN)
            scope = scope.parent

    def _add(self, name: str, source: Source) -> None:
        self.names.setdefault(name, []).append(source)


def bound_by_import(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """The names that an import binds, each with the path in the API, or "" when it is not of the API."""
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            path = f"{node.module}.{alias.name}" if not node.level else ""
            name = alias.asname or alias.name
        else:
            path = alias.name if alias.asname else alias.name.partition(".")[0]
            name = alias.asname or path
        yield name, path if path.partition(".")[0] == PACKAGE else ""


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes under ``node`` that are read in its scope, and what is read of a definition where that stands."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            continue
        yield child
        yield from own_nodes(child)


def _is_static(node: ast.AST) -> bool:
    """Whether a method's first parameter is no object of its class."""
    names = [decorator.id for decorator in getattr(node, "decorator_list", ()) if isinstance(decorator, ast.Name)]
    return "staticmethod" in names or "classmethod" in names
