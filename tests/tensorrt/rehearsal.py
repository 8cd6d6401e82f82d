"""A rehearsal of what TensorRT's builder asks of an ahead-of-time plugin that is written in Python.

The builder calls a plugin through a template class of ``tensorrt.plugin``, which calls the functions that are
decorated ``register``, ``autotune`` and ``aot_impl``. :func:`rehearse` takes the builder's part, in the builder's
order: it finds the plugin's creator in the registry (which the lean runtime has), has it make the plugin, and asks for
output types, output shapes, supported combinations, and launch parameters and kernel of each tactic. Only the symbolic
dimensions are not TensorRT's, since nothing but a build makes those; each has its value at three shapes here, those of
an optimization profile. A dimension that varies over the profile refuses to be read as a constant, as in a build.

Nothing is launched: what a kernel computes is not seen here. :attr:`Launch.parameters` is what its code expects.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

from tests.tensorrt.standins import Bindings, answer

Shape: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class Input:
    """An input of the plugin, over an optimization profile.

    Attributes:
        type: a name of ``tensorrt.DataType``.
        shapes: its smallest, its optimal and its largest shape.
    """

    type: str
    shapes: tuple[Shape, Shape, Shape]


@dataclass(frozen=True)
class Launch:
    """How a tactic is launched; each number at the three shapes of the profile.

    Attributes:
        tactic: which.
        kernel: the name of its entry in ``code``.
        code: PTX.
        grid: (x, y, z) blocks.
        block: (x, y, z) threads.
        shared: bytes of dynamic shared memory per block.
        arguments: the extra arguments.
    """

    tactic: int
    kernel: str
    code: str
    grid: tuple[Shape, ...]
    block: tuple[Shape, ...]
    shared: tuple[int, ...]
    arguments: tuple[Shape, ...]

    @property
    def parameters(self) -> tuple[int, ...]:
        """The parameters that the code of the kernel declares, by their bits.

        Raises:
            ValueError: the code has no such entry.
        """
        found = re.search(rf"\.entry\s+{re.escape(self.kernel)}\s*\((.*?)\)", self.code, re.DOTALL)
        if found is None:
            raise ValueError(f"the code has no entry {self.kernel!r}")
        return tuple(map(int, re.findall(r"\.param\s+\.[a-z](\d+)", found[1])))

    @property
    def required_threads(self) -> int | None:
        """The threads per block that the code insists on, or None if it does not."""
        found = re.search(r"\.reqntid\s+([\d, ]+)", self.code)
        return math.prod(map(int, found[1].split(","))) if found else None


@dataclass(frozen=True)
class Rehearsal:
    """What the plugin answered.

    Attributes:
        fields: the attributes that its creator takes, each with a name of ``tensorrt.PluginFieldType``.
        outputs: the type of each output, and its shape at the three shapes of the profile.
        combinations: the supported (type, format) of all inputs and outputs.
        launches: one for each tactic.
    """

    fields: Mapping[str, str]
    outputs: tuple[tuple[str, tuple[Shape, ...]], ...]
    combinations: tuple[tuple[tuple[str, str], ...], ...]
    launches: tuple[Launch, ...]


def rehearse(
    bindings: Bindings, module: str, plugin: str, inputs: Sequence[Input], attributes: Mapping[str, object]
) -> Rehearsal:
    """Import ``module``, which registers ``plugin`` ("namespace::name"), and rehearse its build.

    The launches are those of the first supported combination.

    Raises:
        StandinError: the module or the plugin failed; what it raised is in the message.
    """
    given = [asdict(one) for one in inputs]
    found = bindings.ask(
        __name__, {"module": module, "plugin": plugin, "inputs": given, "attributes": dict(attributes)}
    )
    launches = tuple(Launch(**{name: _tuples(value) for name, value in row.items()}) for row in found["launches"])
    return Rehearsal(found["fields"], _tuples(found["outputs"]), _tuples(found["combinations"]), launches)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class _Dimension:
    """A symbolic dimension, by its values at the three shapes; ``isinstance`` takes it for one of TensorRT's."""

    def __init__(self, values: tuple[int, ...], *, constant: bool) -> None:
        self.values = values
        self._constant = constant

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return importlib.import_module("tensorrt").IDimensionExpr  # type: ignore[no-any-return]

    def is_constant(self) -> bool:
        return self._constant

    def is_size_tensor(self) -> bool:
        return False

    def get_constant_value(self) -> int:
        return self.values[0]


class _Dimensions:
    """What TensorRT calls an expression builder."""

    _operations: Mapping[str, Callable[[int, int], int]] = {
        "SUM": operator.add,
        "SUB": operator.sub,
        "PROD": operator.mul,
        "FLOOR_DIV": operator.floordiv,
        "CEIL_DIV": lambda first, second: -(-first // second),
        "MAX": max,
        "MIN": min,
        "EQUAL": operator.eq,
        "LESS": operator.lt,
    }

    def constant(self, value: int) -> _Dimension:
        return _Dimension((value,) * 3, constant=True)

    def operation(self, operation: Any, first: _Dimension, second: _Dimension) -> _Dimension:
        apply = self._operations[operation.name]
        values = tuple(int(apply(a, b)) for a, b in zip(first.values, second.values, strict=True))
        return _Dimension(values, constant=first.is_constant() and second.is_constant())


class _Arguments(dict[int, _Dimension]):
    """Takes the extra arguments, as the builder's object does."""

    nbSymExprs = 0  # noqa: N815  # the name is TensorRT's


class _Builder:
    """The builder's part; it lives in a process that has a registry."""

    def __init__(self, question: Mapping[str, Any]) -> None:
        import tensorrt
        from tensorrt_bindings.plugin import _tensor

        self._trt = tensorrt
        # Both take nothing but TensorRT's own dimensions.
        tensorrt.DimsExprs = lambda length: [None] * length
        _tensor.SymExprImpl = lambda expression: expression._expr

        importlib.import_module(question["module"])
        self._namespace, self._name = question["plugin"].split("::")
        self._inputs = [Input(one["type"], _tuples(one["shapes"])) for one in question["inputs"]]
        self._attributes = question["attributes"]

    def rehearse(self) -> dict[str, object]:
        creator = self._trt.get_plugin_registry().get_creator(self._name, "1", self._namespace)
        if creator is None:
            raise LookupError(f"there is no plugin {self._namespace}::{self._name} in the registry")
        plugin = self._create(creator)
        types = plugin.get_output_data_types(
            [getattr(self._trt.DataType, one.type) for one in self._inputs],
            [len(one.shapes[0]) for one in self._inputs],
        )
        shapes = plugin.get_output_shapes(list(map(_symbolic, self._inputs)), [], _Dimensions())
        outputs = [
            (kind.name, list(zip(*(dimension.values for dimension in shape), strict=True)))
            for kind, shape in zip(types, shapes, strict=True)
        ]
        described = [self._described(one.type, one.shapes) for one in self._inputs]
        described += [self._described(kind, shape) for kind, shape in outputs]
        flat = plugin.get_supported_format_combinations(described, len(self._inputs))
        combinations = [flat[i : i + len(described)] for i in range(0, len(flat), len(described))]
        return {
            "fields": {one.name: one.type.name for one in creator.field_names},
            "outputs": outputs,
            "combinations": [[(one.type.name, one.format.name) for one in row] for row in combinations],
            "launches": self._launches(plugin, described, combinations[0]),
        }

    def _create(self, creator: Any) -> Any:
        # As tensorrt.plugin.op.<namespace>.<name>(...) does it, which needs the tensors of a network.
        from tensorrt_bindings.plugin import _lib

        definition = _lib.QDP_REGISTRY[f"{self._namespace}::{self._name}"]
        attributes = {name: kind(self._attributes[name]) for name, kind in definition.input_attrs.items()}
        fields = self._trt.PluginFieldCollection([self._field(name, value) for name, value in attributes.items()])
        request = self._trt.QuickPluginCreationRequest.STRICT_AOT
        return creator.create_plugin(self._name, self._namespace, fields, self._trt.TensorRTPhase.BUILD, request)

    def _field(self, name: str, value: object) -> Any:
        import numpy as np
        from tensorrt_bindings.plugin import _utils

        if isinstance(value, str):
            return self._trt.PluginField(name, value.encode(), self._trt.PluginFieldType.CHAR)
        return self._trt.PluginField(name, np.array([value]), _utils._built_in_to_plugin_field_type[type(value)])

    def _described(self, kind: str, shapes: Sequence[Sequence[int]]) -> Any:
        """The description of a tensor over the profile; a dimension that varies is -1 in it."""
        smallest, optimal, largest = shapes
        described = self._trt.DynamicPluginTensorDesc()
        tensor = described.desc
        tensor.dims = self._trt.Dims([a if a == b else -1 for a, b in zip(smallest, largest, strict=True)])
        tensor.type = getattr(self._trt.DataType, kind)
        tensor.format = self._trt.TensorFormat.LINEAR
        described.desc = tensor
        described.min, described.opt, described.max = map(self._trt.Dims, (smallest, optimal, largest))
        return described

    def _launches(self, plugin: Any, described: list[Any], combination: list[Any]) -> list[dict[str, object]]:
        for one, supported in zip(described, combination, strict=True):
            tensor = one.desc
            tensor.type, tensor.format = supported.type, supported.format
            one.desc = tensor
        inputs, outputs = described[: len(self._inputs)], described[len(self._inputs) :]
        plugin.configure_plugin(inputs, outputs)
        # Without tactics of its own a plugin has the default one, 0.
        return [self._launch(plugin, inputs, outputs, tactic) for tactic in sorted(plugin.get_valid_tactics()) or [0]]

    def _launch(self, plugin: Any, inputs: list[Any], outputs: list[Any], tactic: int) -> dict[str, object]:
        launch, arguments = SimpleNamespace(), _Arguments()
        plugin.set_tactic(tactic)
        plugin.get_launch_params(
            list(map(_symbolic, self._inputs)), [*inputs, *outputs], len(inputs), launch, arguments, _Dimensions()
        )
        if sorted(arguments) != list(range(arguments.nbSymExprs)):
            raise ValueError(
                f"{arguments.nbSymExprs} extra arguments are announced, and these are set: {list(arguments)}"
            )
        kernel, code = plugin.get_kernel([one.desc for one in inputs], [one.desc for one in outputs])
        return {
            "tactic": tactic,
            "kernel": kernel,
            "code": code.decode(),
            "grid": _at_each_shape(launch.grid_x, launch.grid_y, launch.grid_z),
            "block": _at_each_shape(launch.block_x, launch.block_y, launch.block_z),
            "shared": launch.shared_mem.values,
            "arguments": [arguments[i].values for i in range(len(arguments))],
        }


def _symbolic(one: Input) -> list[_Dimension]:
    return [_Dimension(values, constant=len(set(values)) == 1) for values in zip(*one.shapes, strict=True)]


def _at_each_shape(*dimensions: _Dimension) -> list[tuple[int, ...]]:
    return list(zip(*(dimension.values for dimension in dimensions), strict=True))


if __name__ == "__main__":
    answer(lambda question: _Builder(question).rehearse())
