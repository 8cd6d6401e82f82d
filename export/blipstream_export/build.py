"""``blipstream build``: checkpoint -> wrappers -> graphs -> bundle -> parity, one stage after the other."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from blipstream.contract import (
    BLIP2,
    GRAPH_FILE,
    MODEL_VERSION,
    QFORMER,
    QFORMER_TOKENIZER_FILE,
    TOKENIZER_FILE,
    VISION_ENCODER,
)
from blipstream.engines import check_onnxruntime_cuda
from blipstream.errors import BundleError, EngineError
from blipstream.extras import needing
from blipstream.manifest import DecoderSection, EngineName, Manifest, Precision
from blipstream.repository import write_models
from blipstream_export.accuracy import Question, measure_accuracy, read_images, read_test_set
from blipstream_export.activations import Activations, observe
from blipstream_export.bundle import check_output, list_files, new_bundle
from blipstream_export.checkpoint import Checkpoint, Source, load_model, open_checkpoint
from blipstream_export.generation import generation_notes, generation_section
from blipstream_export.graphs import GraphInputs, qformer_inputs, vision_inputs
from blipstream_export.initializers import SharedWeights
from blipstream_export.manifest import instruction_section, make_manifest, num_image_tokens
from blipstream_export.models.qformer import InstructionQFormer, QFormer
from blipstream_export.models.vision import VisionEncoder
from blipstream_export.needs import Needs, check_disk, estimate_needs
from blipstream_export.observer import BuildObserver
from blipstream_export.parity import ParityReport, Thresholds, measure, thresholds_of
from blipstream_export.plans.options import PlanOptions
from blipstream_export.plans.profiles import ServedShapes
from blipstream_export.plans.samples import GraphSamples
from blipstream_export.precision import parse_precision
from blipstream_export.quantized_graph import LayerPrecision
from blipstream_export.reference import BRIEF, FULL, Reference, compute_calibration, compute_reference, exercise
from blipstream_export.tokenizer import check_qformer_tokenizer, check_tokenizer, save_tokenizer, tokenizer_notes
from blipstream_export.units import GIB
from blipstream_export.writers import Item, OnnxRuntimeWriter, PlanWriter, TypedWriter, Watch, Writer

DEFAULT_MAX_TOKENS = 256
_BRIEF_FROM = 8 * GIB
"""Size of the weights in fp32 above which the checkpoint is run on few samples."""
_CALIBRATED = {"int8", "int4", "fp8"}
"""Precisions that are built better with samples."""
_QUANTIZED = {"int8", "fp8"}
"""Precisions for which TensorRT's graphs are quantized."""
_COMPARABLE = {"fp32", "fp16"}
_HALF = parse_precision("fp16")
"""Of a graph from which a TensorRT engine is built, if not wider."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Raises:
        UnsupportedCheckpointError: a precision or a stage that there is not.
        BundleError: a size below 1.
    """

    engine: EngineName = "onnxruntime"
    """What runs the graphs."""
    precision: str = "fp32"
    """As on the command line: of all stages, or of each (:func:`~blipstream_export.precision.parse_precision`)."""
    max_batch: int = 8
    """Images that the vision encoder, or the Q-Former, reads at once."""
    max_sequences: int = 16
    """Sequences that decode at once."""
    max_tokens: int | None = None
    """Tokens of one sequence: soft tokens, prompt and answer, or of prompt and answer each where an encoder reads the
    prompt. By default 256, or what the model can read if less."""
    replace: bool = False
    """Replace an existing bundle."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    question_template: str | None = None
    """What clients put a question into, in place of ``{}``; by default as the family was shown questions."""
    calibration: Path | None = None
    """A folder of images like those that will be served, from which int8 learns where it must be finer, and TensorRT's
    int8 and fp8 what values to expect; by default a few synthetic images."""
    test_set: Path | None = None
    """Questions with their answers (:mod:`blipstream_export.accuracy`), for the report."""
    thresholds: Mapping[Precision, Thresholds] | None = None
    """What the report asks for; by default :func:`~blipstream_export.parity.thresholds_of` the engine."""
    debug_parity: bool = False
    """Compare each TensorRT engine with ONNX Runtime tensor by tensor; :data:`~blipstream.manifest.LAYERS_FILE`."""
    plans: PlanOptions | None = None
    """How TensorRT's engines are built; by default as :class:`PlanOptions` says."""

    def __post_init__(self) -> None:
        precisions = parse_precision(self.precision, self.engine)
        if self.calibration is not None and not _CALIBRATED & set(precisions.as_dict().values()):
            raise BundleError(
                f"calibration images are read for int8, fp8 and int4, and precision {self.precision!r} has none of them"
            )
        if (self.plans is not None or self.debug_parity) and self.engine != "tensorrt":
            raise BundleError(f"options of TensorRT were given, and the engine is {self.engine}")
        if self.debug_parity and (others := set(precisions.as_dict().values()) - _COMPARABLE):
            raise BundleError(
                f"engines are compared tensor by tensor in {', '.join(sorted(_COMPARABLE))}, in which ONNX Runtime "
                f"computes on the CPU, and precision {self.precision!r} has {', '.join(sorted(others))}"
            )
        if self.question_template is not None and self.question_template.count("{}") != 1:
            raise BundleError(
                f"the question's template must hold {{}} exactly once, but it is {self.question_template!r}"
            )
        for name in ("max_batch", "max_sequences", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BundleError(f"{name} must be at least 1, but it is {value}")


@dataclass(frozen=True)
class StageResult:
    """What one stage of a build cost."""

    name: str
    seconds: float
    bytes: int | None = None


@dataclass(frozen=True)
class BuildResult:
    """A finished bundle, and how it came about."""

    bundle: Path
    manifest: Manifest
    parity: ParityReport
    stages: tuple[StageResult, ...]
    notes: tuple[str, ...]
    """What a user should know, one sentence each."""


def build(
    source: str | Source,
    output: Path,
    options: BuildOptions | None = None,
    *,
    observer: BuildObserver | None = None,
) -> BuildResult:
    """Build the bundle ``output`` from a checkpoint.

    Args:
        source: a folder or a hub id in the Hugging Face layout, or the parts of a checkpoint.
        output: the bundle's folder; it appears when the build has succeeded.
        options: what to build.
        observer: is told how the build goes.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, inconsistent or of a kind that is not served.
        BundleError: the output is in the way, or the options do not fit the checkpoint.
        ParityError: the graphs do not reproduce the checkpoint.
    """
    options = options or BuildOptions()
    check_output(output, replace=options.replace)
    with quiet_transformers(), new_bundle(output, replace=options.replace) as folder:
        run = _Build(source, folder, options, observer or BuildObserver())
        manifest, parity = run.run()
    return BuildResult(output, manifest, parity, tuple(run.stages), tuple(run.notes))


class _Build:
    """One build into ``folder``."""

    def __init__(self, source: str | Source, folder: Path, options: BuildOptions, observer: BuildObserver) -> None:
        self._source = source
        self._folder = folder
        self._options = options
        self._precisions = parse_precision(options.precision, options.engine)
        self._activations: Activations | None = None
        self._calibration: list[Image.Image] = []
        self._calibrated: Reference | None = None
        self._layers: list[LayerPrecision] = []
        self._observer = observer
        self.stages: list[StageResult] = []
        self.notes: list[str] = []

    def run(self) -> tuple[Manifest, ParityReport]:
        with self._stage("checkpoint"):
            options = self._options
            questions = read_test_set(options.test_set) if options.test_set else []
            self._calibration = read_images(options.calibration) if options.calibration else []
            checkpoint = open_checkpoint(self._source, revision=options.revision)
            _check_questions(questions, checkpoint)
            tokenizers = {TOKENIZER_FILE: check_tokenizer(checkpoint)}
            if checkpoint.instructed:
                tokenizers[QFORMER_TOKENIZER_FILE] = check_qformer_tokenizer(checkpoint)
            sizes = _decoder_sizes(self._options, checkpoint)
            self._check_engine()
            model = load_model(checkpoint, deferred=True)
            generation = generation_section(model, checkpoint, question_template=options.question_template)
            self.notes += [*checkpoint.notes, *tokenizer_notes(checkpoint), *generation_notes(model, checkpoint)]
            needs = self._needs(model)
        with self._stage("reference"):
            reference = self._reference(model, checkpoint, sizes, needs)
        self._writer = self._make_writer(checkpoint, sizes, reference)
        self._export_images(model, checkpoint)
        self._export_decoder(model, checkpoint, sizes)
        with self._stage("bundle"):
            for file, tokenizer in tokenizers.items():
                save_tokenizer(tokenizer, self._folder / BLIP2 / MODEL_VERSION / file)
            manifest = make_manifest(
                checkpoint,
                sizes,
                generation,
                engine=options.engine,
                plans=self._writer.plans,
                max_batch=options.max_batch,
                precision=self._precisions.as_dict(),
            )
            write_models(self._folder, manifest)
            manifest = manifest.model_copy(update={"files": list_files(self._folder)})
            manifest.dump(self._folder)
        with self._stage("parity"):
            parity = measure(self._folder, manifest, reference, options.thresholds or thresholds_of(options.engine))
            parity = replace(parity, layers=tuple(self._layers))
            self._writer.finish()
            parity.check()
            if questions:
                accuracy = measure_accuracy(self._folder, questions, on_progress=self._observer.progress)
                parity = replace(parity, accuracy=accuracy)
            parity.dump(self._folder)
        return manifest, parity

    def _needs(self, model: Any) -> Needs:
        needs = estimate_needs(model, self._precisions)
        if self._options.engine == "tensorrt":  # each graph lies beside its engine until that is built
            needs = replace(needs, disk=needs.disk + estimate_needs(model, _HALF).disk)
        check_disk(needs, self._folder.parent)  # the unfinished bundle is nothing that the user knows
        self._observer.needs(needs)
        return needs

    def _reference(self, model: Any, checkpoint: Checkpoint, sizes: DecoderSection, needs: Needs) -> Reference:
        """What the checkpoint computes; how much of it depends on its size, and not on the machine."""
        extent = BRIEF if needs.weights > _BRIEF_FROM else FULL
        runnable = model if needs.streamed else load_model(checkpoint)
        with observe(runnable) as self._activations:
            reference = compute_reference(runnable, checkpoint, sizes, extent, on_progress=self._observer.progress)
        if self._calibration and self._options.engine == "tensorrt":
            told = self._observer.progress
            self._calibrated = compute_calibration(runnable, checkpoint, self._calibration, sizes, on_progress=told)
        elif self._calibration:
            with observe(runnable) as self._activations:
                exercise(runnable, checkpoint, self._calibration, on_progress=self._observer.progress)
        del runnable
        gc.collect()  # its weights must be gone before the graphs are written and loaded
        return reference

    def _check_engine(self) -> None:
        """Notice before any work is done that a GPU is missing, or a package."""
        if self._options.engine == "onnxruntime-cuda":
            check_onnxruntime_cuda()
        elif self._options.engine == "tensorrt":
            with needing("tensorrt", EngineError):
                from blipstream_export.plans.builder import PlanBuilder
            self._plan_builder = PlanBuilder(self._options.plans or PlanOptions())
            if _QUANTIZED & set(self._precisions.as_dict().values()):
                from blipstream_export.plans.quantization import check_modelopt

                check_modelopt()

    def _make_writer(self, checkpoint: Checkpoint, sizes: DecoderSection, reference: Reference) -> Writer:
        """What writes graphs for the engine."""
        options = self._options
        if options.engine == "onnxruntime":
            return OnnxRuntimeWriter()
        if options.engine == "onnxruntime-cuda":
            return TypedWriter(options.engine, sizes)
        shapes = ServedShapes(
            max_batch=options.max_batch,
            num_query_tokens=checkpoint.config.num_query_tokens,
            num_images=checkpoint.family.image_side.num_frames,
            instruction=instruction_section(checkpoint),
            sizes=sizes,
        )
        samples = GraphSamples(self._calibrated or reference, sizes, instruction_section(checkpoint), options.max_batch)
        plugins = (options.plans or PlanOptions()).plugins
        return PlanWriter(
            self._folder, self._plan_builder, shapes, samples, plugins=plugins, debug=options.debug_parity
        )

    def _export_images(self, model: Any, checkpoint: Checkpoint) -> None:
        vision_config = checkpoint.config.vision_config
        with self._stage(VISION_ENCODER) as written:
            inputs = vision_inputs(checkpoint.image.size)
            written(self._write(VisionEncoder(model.vision_model), inputs, VISION_ENCODER))
        with self._stage(QFORMER) as written:
            num_tokens, instructed = num_image_tokens(checkpoint), checkpoint.instructed
            inputs = qformer_inputs(num_tokens, vision_config.hidden_size, instructed=instructed)
            written(self._write(InstructionQFormer(model) if instructed else QFormer(model), inputs, QFORMER))

    def _export_decoder(self, model: Any, checkpoint: Checkpoint, sizes: DecoderSection) -> None:
        with self._stage("decoder") as written:
            shared = SharedWeights() if sizes.encoder is not None else None
            for graph in checkpoint.language.graphs(model.language_model, sizes):
                path = self._folder / BLIP2 / MODEL_VERSION / graph.file
                tables = graph.head_tables
                written(self._write(graph.module, graph.inputs, "decoder", path, head_tables=tables, shared=shared))

    def _write(self, module: Any, inputs: GraphInputs, stage: str, path: Path | None = None, **sharing: Any) -> int:
        """Write a graph of a stage, by default the one of the Triton model of that name; return its bytes."""
        path = path or self._folder / stage / MODEL_VERSION / GRAPH_FILE
        precision, activations = self._precisions.of(stage), self._activations
        item = Item(module, inputs, path, stage, precision, activations=activations, **sharing)
        return self._writer.write(item, Watch(self._observer.progress, self._layers.append))

    @contextmanager
    def _stage(self, name: str) -> Iterator[Callable[[int], None]]:
        self._observer.stage(name)
        sizes: list[int] = []
        started = time.perf_counter()
        yield sizes.append
        self.stages.append(StageResult(name, time.perf_counter() - started, sum(sizes) if sizes else None))


def _check_questions(questions: Sequence[Question], checkpoint: Checkpoint) -> None:
    if questions and checkpoint.family.image_side.num_frames > 1:
        raise BundleError(f"{checkpoint.name} reads several frames a request, and a test set asks about single images")


def _decoder_sizes(options: BuildOptions, checkpoint: Checkpoint) -> DecoderSection:
    """The language model's sizes with a cache as asked for, checked against what the model reads and needs."""
    config = checkpoint.config
    longest = checkpoint.language.max_positions(config.text_config)
    wanted = options.max_tokens or min(DEFAULT_MAX_TOKENS, longest or DEFAULT_MAX_TOKENS)
    if longest is not None and wanted > longest:
        raise BundleError(f"max_tokens = {wanted} is more than the language model reads: it has {longest} positions")
    shortest = checkpoint.num_soft_tokens + 2  # a begin token and a generated one
    if wanted < shortest:
        raise BundleError(
            f"max_tokens = {wanted} leaves no room for text behind {checkpoint.num_soft_tokens} soft tokens: expected "
            f"at least {shortest}"
        )
    return checkpoint.decoder_section(max_sequences=options.max_sequences, max_tokens=wanted)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and remarks of transformers off the terminal; what fails is raised all the same."""
    from transformers.utils import logging as transformers_logging

    logger = transformers_logging.get_logger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
