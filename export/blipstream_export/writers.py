"""How a wrapper becomes a file of the bundle, for each engine: a graph, or a plan that TensorRT builds from one."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from blipstream.contract import ENCODER_FILE, QFORMER, VISION_ENCODER
from blipstream.manifest import LAYERS_FILE, PLAN_SUFFIX, DecoderSection, EngineName, PlanSection, Precision
from blipstream_export.activations import Activations
from blipstream_export.deferred import labels
from blipstream_export.graphs import GraphInputs, export_graph
from blipstream_export.initializers import SharedWeights
from blipstream_export.lowering.plugins import use_plugins
from blipstream_export.plans.calibration import Calibration
from blipstream_export.quantized_graph import OnLayer

if TYPE_CHECKING:
    from blipstream_export.plans.builder import PlanBuilder
    from blipstream_export.plans.layers import LayerDifference
    from blipstream_export.plans.profiles import Profile, ServedShapes
    from blipstream_export.plans.quantization import QuantizedPrecision
    from blipstream_export.plans.samples import GraphSamples

_COMPUTED_IN: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float16,
    "fp8": torch.float16,
}
"""On a GPU: what all that is not quantized computes in."""

_PLUGIN_PRECISIONS = ("fp32", "fp16", "bf16")
"""In which the plugins read their weights; quantized layers are TensorRT's own."""


@dataclass(frozen=True)
class Item:
    """One graph to write.

    Attributes:
        module: its wrapper.
        inputs: sample inputs and names.
        path: of the graph in a bundle for ONNX Runtime.
        stage: name of its stage.
        precision: of its stage.
        head_tables: as of :class:`~blipstream_export.graphs.Graph`.
        shared: weights of graphs in the same folder.
        activations: what its linear layers read on samples.
    """

    module: nn.Module
    inputs: GraphInputs
    path: Path
    stage: str
    precision: Precision
    head_tables: Sequence[str] = ()
    shared: SharedWeights | None = None
    activations: Activations | None = None


@dataclass(frozen=True)
class Watch:
    """Who is told how the writing goes: of bytes, or steps, done and in all; and of each quantized matrix."""

    on_progress: Callable[[int, int], None] = field(default=lambda _done, _total: None)
    on_layer: OnLayer = field(default=lambda _layer: None)


class Writer(ABC):
    """Writes graphs for one engine."""

    @property
    def plans(self) -> PlanSection | None:
        """What the manifest says of the plans, if these are."""
        return None

    @abstractmethod
    def write(self, item: Item, watch: Watch) -> int:
        """Write a graph; return the bytes of its files."""

    def finish(self) -> None:  # noqa: B027  # most have nothing to add
        """Write what is to be said of all graphs together."""


class OnnxRuntimeWriter(Writer):
    """Graphs for ONNX Runtime on the CPU."""

    def write(self, item: Item, watch: Watch) -> int:
        """See :meth:`Writer.write`."""
        return export_graph(
            item.module,
            item.inputs,
            item.path,
            engine="onnxruntime",
            precision=item.precision,
            activations=item.activations,
            head_tables=item.head_tables,
            shared=item.shared,
            on_progress=watch.on_progress,
            on_layer=watch.on_layer,
        )


class TypedWriter(Writer):
    """Graphs that compute in the types that they have: for ONNX Runtime on a GPU, or for TensorRT to read.

    Args:
        engine: which of the two.
        sizes: of the language model, whose caches have a fixed length in the graph.
    """

    def __init__(self, engine: EngineName, sizes: DecoderSection) -> None:
        self._engine = engine
        self._capacities = {"capacity": sizes.max_tokens, "prompt_capacity": sizes.max_prompt_tokens}

    def write(self, item: Item, watch: Watch) -> int:
        """See :meth:`Writer.write`."""
        return export_graph(
            item.module,
            item.inputs.fixed(self._capacities),
            item.path,
            engine=self._engine,
            dtype=_COMPUTED_IN[item.precision],
            shared=item.shared,
            on_progress=watch.on_progress,
        )


class PlanWriter(Writer):
    """Plans: each graph is written beside the bundle, quantized if it is to be, built, and removed.

    Args:
        folder: of the bundle.
        builder: builds them.
        shapes: for which shapes.
        samples: what the graphs read of the samples: they are quantized for it, and compared on it.
        plugins: whether the Q-Former's cross-attention is Blipstream's own kernel.
        debug: whether each plan is compared with its graph, tensor by tensor.
    """

    def __init__(
        self,
        folder: Path,
        builder: PlanBuilder,
        shapes: ServedShapes,
        samples: GraphSamples,
        *,
        plugins: bool = True,
        debug: bool = False,
    ) -> None:
        self._folder = folder
        self._builder = builder
        self._shapes = shapes
        self._samples = samples
        self._calibration = Calibration(samples)
        self._plugins = plugins
        self._debug = debug
        self._graphs = TypedWriter("tensorrt", shapes.sizes)
        self._differences: dict[str, list[LayerDifference]] = {}
        self._seconds: dict[str, float] = {}
        self._fused = 0

    @property
    def plans(self) -> PlanSection:
        """See :attr:`Writer.plans`."""
        return self._builder.section(self._seconds, plugins=self._fused > 0)

    def write(self, item: Item, watch: Watch) -> int:
        """See :meth:`Writer.write`."""
        plan, profiles = item.path.with_suffix(PLAN_SUFFIX), self._profiles(item)
        name = plan.relative_to(self._folder).as_posix()
        with tempfile.TemporaryDirectory(prefix=".graph.", dir=self._folder.parent) as temporary:
            graph = Path(temporary, item.path.name)
            self._graphs.write(replace(item, path=graph, shared=None), watch)  # alone in its folder
            if item.precision == "int8" or item.precision == "fp8":
                graph = self._quantize(graph, item, item.precision, watch)
            if self._plugins and item.stage == QFORMER and item.precision in _PLUGIN_PRECISIONS:
                self._fused = use_plugins(graph, self._builder.gpu)
            built = self._builder.build(graph, plan, profiles, watch.on_progress)
            if self._debug:
                from blipstream_export.plans.layers import compare_layers

                feed = self._samples.feed(item.stage, graph)
                self._differences[name] = compare_layers(graph, self._builder, profiles, feed)
        self._seconds[name] = round(built.seconds, 1)
        return built.bytes

    def _quantize(self, graph: Path, item: Item, precision: QuantizedPrecision, watch: Watch) -> Path:
        """Write a graph quantized, beside itself, and tell of each matrix by its names in the checkpoint."""
        from blipstream_export.plans.quantization import quantize_graph

        output = graph.with_name(f"{graph.stem}.{precision}{graph.suffix}")
        names = {name: labels(weight) for name, weight in item.module.named_parameters(remove_duplicate=False)}
        for layer in quantize_graph(graph, output, precision, self._calibration.feeds(item.stage, graph)):
            watch.on_layer(replace(layer, weight=", ".join(sorted(names.get(layer.weight, ()))) or layer.weight))
        return output

    def finish(self) -> None:
        """Write where the plans depart from their graphs, if that was asked for."""
        if self._debug:
            from blipstream_export.plans.layers import dump

            dump(self._differences, self._folder / LAYERS_FILE)

    def _profiles(self, item: Item) -> Sequence[Profile]:
        if item.stage == VISION_ENCODER:
            return self._shapes.vision_encoder()
        if item.stage == QFORMER:
            return self._shapes.qformer()
        return self._shapes.encoder() if item.path.name == ENCODER_FILE else self._shapes.decoder()
