"""Every public name of TensorRT's Python API, with its kind, its type and how it is called.

The bindings publish no stubs; what they say of themselves is in their docstrings, where pybind11 writes the signature
of each function and property. :func:`describe` reads it, in a process in which the bindings import (run this module:
it answers with the catalogue); :func:`load` asks it. Names are those that users write, such as
``tensorrt.Builder.create_network``, and so are types.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from tests.tensorrt.standins import Bindings, answer

MODULES = ("tensorrt", "tensorrt.plugin")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a signature.

    Attributes:
        name: as a caller may write it.
        kind: the name of one of :class:`inspect.Parameter`'s kinds.
        optional: whether it has a default.
    """

    name: str
    kind: str
    optional: bool


@dataclass(frozen=True)
class Signature:
    """One way to call a function, without the ``self`` of a method.

    Attributes:
        parameters: in order.
        returns: the class of the API that it returns, or "" for anything else.
    """

    parameters: tuple[Parameter, ...]
    returns: str

    def accepts(self, positional: int, keywords: tuple[str, ...]) -> bool:
        """Whether it can be called with so many positional arguments and these keywords."""
        signature = inspect.Signature([_inspectable(parameter) for parameter in self.parameters])
        try:
            signature.bind(*range(positional), **dict.fromkeys(keywords))
        except TypeError:
            return False
        return True

    def __str__(self) -> str:
        return str(inspect.Signature([_inspectable(parameter) for parameter in self.parameters]))


@dataclass(frozen=True)
class Entry:
    """What a name stands for.

    Attributes:
        kind: "module", "class", "method", "function" (of a module, or static) or "value" (an attribute or enum value).
        type: of a value: the class of the API that it is of, or "" for anything else.
        signatures: of a function, or of a class's construction: the ways to call it; none when they are not known.
        settable: of a value: whether it may be assigned to.
    """

    kind: str
    type: str = ""
    signatures: tuple[Signature, ...] = ()
    settable: bool = False


Catalogue: TypeAlias = Mapping[str, Entry]


def load(bindings: Bindings) -> Catalogue:
    """The catalogue of these bindings.

    Raises:
        StandinError: they do not import.
    """
    rows = bindings.ask(__name__)
    return {name: _entry(**row) for name, row in rows.items()}


def describe() -> Catalogue:
    """The catalogue of the ``tensorrt`` that imports in this process."""
    names = _Names()
    return {path: entry for module in MODULES for path, entry in names.of_module(module)}


def _entry(signatures: list[dict[str, Any]], **row: Any) -> Entry:
    return Entry(**row, signatures=tuple(_signature(**signature) for signature in signatures))


def _signature(parameters: list[dict[str, Any]], returns: str) -> Signature:
    return Signature(tuple(Parameter(**parameter) for parameter in parameters), returns)


def _inspectable(parameter: Parameter) -> inspect.Parameter:
    kind = getattr(inspect.Parameter, parameter.kind)
    return inspect.Parameter(parameter.name, kind, default=None if parameter.optional else inspect.Parameter.empty)


class _Names:
    """Describes the modules, and knows under which public name each of their classes goes."""

    def __init__(self) -> None:
        self._public: dict[str, str] = {}  # by the name that a class has where it was defined
        for module in MODULES:
            for path, value in _classes(module, _members(importlib.import_module(module))):
                self._public.setdefault(f"{value.__module__}.{value.__qualname__}", path)

    def of_module(self, module: str) -> Iterator[tuple[str, Entry]]:
        yield module, Entry("module")
        for name, value in _members(importlib.import_module(module)):
            path = f"{module}.{name}"
            if inspect.isclass(value):
                yield from self._of_class(path, value)
            elif path not in MODULES:
                yield path, self._of_member(name, value)

    def _of_class(self, path: str, value: type) -> Iterator[tuple[str, Entry]]:
        yield path, Entry("class", signatures=self._signatures("__init__", value.__init__, is_method=True))  # type: ignore[misc]
        for name in sorted({name for name in dir(value) if not name.startswith("_")} | _assigned(value)):
            member = inspect.getattr_static(value, name, None)
            if inspect.isclass(member):
                yield from self._of_class(f"{path}.{name}", member)
            else:
                yield f"{path}.{name}", self._of_member(name, member, is_method=True)

    def _of_member(self, name: str, value: object, *, is_method: bool = False) -> Entry:
        if isinstance(value, property):
            return Entry("value", type=self._type_of(value), settable=value.fset is not None)
        if isinstance(value, staticmethod | classmethod):
            # A class method's first parameter is bound, as a method's is.
            is_bound = isinstance(value, classmethod)
            return Entry("function", signatures=self._signatures(name, value.__func__, is_method=is_bound))
        if callable(value):
            kind = "method" if is_method else "function"
            return Entry(kind, signatures=self._signatures(name, value, is_method=is_method))
        # A Python object's attribute, which is there once an instance is, may be assigned to; an enum's value may not.
        return Entry("value", type=self._name(type(value)), settable=value is None)

    def _type_of(self, value: property) -> str:
        if value.fget is None:
            return ""
        if isinstance(value.fget, types.FunctionType):
            return self._annotated(value.fget)
        found = _parsed("getter", f"getter{(value.fget.__doc__ or '').strip()}")
        return self._type(found[0]) if found else ""

    def _signatures(self, name: str, value: Callable[..., object], *, is_method: bool) -> tuple[Signature, ...]:
        if isinstance(value, types.FunctionType):
            parameters = list(inspect.signature(value).parameters.values())[is_method:]
            known = (Parameter(p.name, p.kind.name, p.default is not p.empty) for p in parameters)
            return (Signature(tuple(known), self._annotated(value)),)
        definitions = _parsed(name, value.__doc__ or "")
        return tuple(Signature(_parameters(found)[is_method:], self._type(found)) for found in definitions)

    def _type(self, definition: ast.FunctionDef) -> str:
        return self._public.get(ast.unparse(definition.returns) if definition.returns else "", "")

    def _annotated(self, function: types.FunctionType) -> str:
        annotation = typing.get_type_hints(function).get("return")
        return self._name(annotation) if inspect.isclass(annotation) else ""

    def _name(self, value: type) -> str:
        return self._public.get(f"{value.__module__}.{value.__qualname__}", "")


def _members(module: types.ModuleType) -> list[tuple[str, object]]:
    """The names that the module itself is about; not the modules that it imports."""
    return [
        (name, value)
        for name, value in sorted(vars(module).items())
        if name == "__version__" or not (name.startswith("_") or type(value) is types.ModuleType)
    ]


def _classes(parent: str, members: Iterable[tuple[str, object]]) -> Iterator[tuple[str, type]]:
    for name, value in members:
        if inspect.isclass(value):
            yield f"{parent}.{name}", value
            yield from _classes(f"{parent}.{name}", [row for row in vars(value).items() if not row[0].startswith("_")])


def _assigned(value: type) -> set[str]:
    """The public attributes that a Python class gives to ``self``; a class of the extension module has none."""
    methods = [member for member in vars(value).values() if isinstance(member, types.FunctionType)]
    trees = (ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))) for method in methods)
    return {
        node.attr
        for tree in trees
        for node in tree
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
        and not node.attr.startswith("_")
    }


def _parsed(name: str, docstring: str) -> list[ast.FunctionDef]:
    """The signatures that pybind11 wrote into a docstring: one, or several, numbered; none if any is unclear."""
    lines = re.findall(rf"^(?:\d+\. )?({re.escape(name)}\(.*)$", docstring, re.MULTILINE)
    overloads = [line for line in lines if not line.startswith(f"{name}(*args, **kwargs)")]
    try:
        return [_definition(line) for line in overloads]
    except SyntaxError:
        return []


def _definition(line: str) -> ast.FunctionDef:
    line = re.sub(r"<[^<>]*>", "...", line)  # a default that has no literal: <BuilderFlag.TF32: 5>
    line = line.replace("nvonnxparser::IParserError", "nvonnxparser::ParserError")  # Python has it without the I
    line = re.sub(r"\w+::(?:v_\d+_\d+::)?", "tensorrt_bindings.tensorrt.", line)  # a class bound after this function
    line = re.sub(r"\bin: ", "in_: ", line)  # a parameter named by a keyword of Python, so given by position alone
    definition = ast.parse(f"def {line}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


def _parameters(definition: ast.FunctionDef) -> tuple[Parameter, ...]:
    arguments = definition.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    kinds = ["POSITIONAL_ONLY"] * len(arguments.posonlyargs) + ["POSITIONAL_OR_KEYWORD"] * len(arguments.args)
    found = [Parameter(p.arg, kind, i >= required) for i, (p, kind) in enumerate(zip(positional, kinds, strict=True))]
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, "VAR_POSITIONAL", False))
    by_keyword = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [Parameter(p.arg, "KEYWORD_ONLY", default is not None) for p, default in by_keyword]
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, "VAR_KEYWORD", False))
    return tuple(found)


if __name__ == "__main__":
    answer(lambda _: {name: asdict(entry) for name, entry in describe().items()})
