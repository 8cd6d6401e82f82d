"""``blipstream build``: checkpoint -> wrappers -> graphs -> bundle -> parity, one stage after the other."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from blipstream.contract import (
    BLIP2,
    BUNDLE_REVISION,
    GRAPH_FILE,
    MODEL_VERSION,
    QFORMER,
    QFORMER_TOKENIZER_FILE,
    TOKENIZER_FILE,
    VISION_ENCODER,
    DecoderSection,
    GenerationSection,
    InstructionSection,
    Manifest,
    Precision,
    QFormerSection,
    VisionSection,
)
from blipstream.errors import BundleError
from blipstream_export.accuracy import Question, measure_accuracy, read_images, read_test_set
from blipstream_export.activations import Activations, observe
from blipstream_export.bundle import check_output, copy_models, list_files, new_bundle
from blipstream_export.checkpoint import Checkpoint, Source, load_model, open_checkpoint
from blipstream_export.generation import generation_notes, generation_section
from blipstream_export.graphs import GraphInputs, export_graph, qformer_inputs, vision_inputs
from blipstream_export.initializers import SharedWeights
from blipstream_export.models.qformer import InstructionQFormer, QFormer
from blipstream_export.models.vision import VisionEncoder
from blipstream_export.needs import Needs, check_disk, estimate_needs
from blipstream_export.observer import BuildObserver
from blipstream_export.parity import THRESHOLDS, ParityReport, Thresholds, measure
from blipstream_export.precision import StagePrecisions, parse_precision
from blipstream_export.quantized_graph import LayerPrecision
from blipstream_export.reference import BRIEF, FULL, Reference, compute_reference, exercise
from blipstream_export.tokenizer import check_qformer_tokenizer, check_tokenizer, save_tokenizer, tokenizer_notes
from blipstream_export.units import GIB

DEFAULT_MAX_TOKENS = 256
_BRIEF_FROM = 8 * GIB
"""Size of the weights in fp32 above which the checkpoint is run on few samples."""
_ENGINE: Literal["onnxruntime"] = "onnxruntime"
_VERSIONED = ("blipstream", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Raises:
        UnsupportedCheckpointError: a precision or a stage that there is not.
        BundleError: a size below 1.
    """

    precision: str = "fp32"
    """As on the command line: of all stages, or of each (:func:`~blipstream_export.precision.parse_precision`)."""
    max_sequences: int = 16
    """Sequences that decode at once."""
    max_tokens: int | None = None
    """Tokens of one sequence: soft tokens, prompt and answer, or of prompt and answer each where an encoder reads the
    prompt. By default 256, or what the model can read if less."""
    replace: bool = False
    """Replace an existing bundle."""
    calibration: Path | None = None
    """A folder of images like those that will be served, from which int8 learns where it must be finer; by default a
    few synthetic images."""
    test_set: Path | None = None
    """Questions with their answers (:mod:`blipstream_export.accuracy`), for the report."""
    thresholds: Mapping[Precision, Thresholds] = field(default_factory=lambda: THRESHOLDS)

    def __post_init__(self) -> None:
        precisions = parse_precision(self.precision)
        if self.calibration is not None and not {"int8", "int4"} & set(precisions.as_dict().values()):
            raise BundleError(
                f"calibration images are read for int8 and int4, and precision {self.precision!r} has neither"
            )
        for name in ("max_sequences", "max_tokens"):
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
        self._precisions = parse_precision(options.precision)
        self._activations: Activations | None = None
        self._calibration: list[Image.Image] = []
        self._layers: list[LayerPrecision] = []
        self._observer = observer
        self.stages: list[StageResult] = []
        self.notes: list[str] = []

    def run(self) -> tuple[Manifest, ParityReport]:
        with self._stage("checkpoint"):
            options = self._options
            questions = read_test_set(options.test_set) if options.test_set else []
            self._calibration = read_images(options.calibration) if options.calibration else []
            checkpoint = open_checkpoint(self._source)
            _check_questions(questions, checkpoint)
            tokenizers = {TOKENIZER_FILE: check_tokenizer(checkpoint)}
            if checkpoint.instructed:
                tokenizers[QFORMER_TOKENIZER_FILE] = check_qformer_tokenizer(checkpoint)
            sizes = _decoder_sizes(self._options, checkpoint)
            model = load_model(checkpoint, deferred=True)
            generation = generation_section(model, checkpoint)
            self.notes += [*checkpoint.notes, *tokenizer_notes(checkpoint), *generation_notes(model, checkpoint)]
            needs = self._needs(model)
        with self._stage("reference"):
            reference = self._reference(model, checkpoint, sizes, needs)
        self._export_images(model, checkpoint)
        self._export_decoder(model, checkpoint, sizes)
        with self._stage("bundle"):
            for file, tokenizer in tokenizers.items():
                save_tokenizer(tokenizer, self._folder / BLIP2 / MODEL_VERSION / file)
            manifest = _manifest(checkpoint, sizes, generation, self._precisions)
            values = {**manifest.dims(), "max_sequences": sizes.max_sequences}
            copy_models(self._folder, values, instructed=manifest.qformer.instruction is not None)
            manifest = manifest.model_copy(update={"files": list_files(self._folder)})
            manifest.dump(self._folder)
        with self._stage("parity"):
            parity = measure(self._folder, manifest, reference, self._options.thresholds)
            parity = replace(parity, layers=tuple(self._layers))
            parity.check()
            if questions:
                accuracy = measure_accuracy(self._folder, questions, on_progress=self._observer.progress)
                parity = replace(parity, accuracy=accuracy)
            parity.dump(self._folder)
        return manifest, parity

    def _needs(self, model: Any) -> Needs:
        needs = estimate_needs(model, self._precisions)
        check_disk(needs, self._folder)
        self._observer.needs(needs)
        return needs

    def _reference(self, model: Any, checkpoint: Checkpoint, sizes: DecoderSection, needs: Needs) -> Reference:
        """What the checkpoint computes; how much of it depends on its size, and not on the machine."""
        extent = BRIEF if needs.weights > _BRIEF_FROM else FULL
        runnable = model if needs.streamed else load_model(checkpoint)
        with observe(runnable) as self._activations:
            reference = compute_reference(runnable, checkpoint, sizes, extent, on_progress=self._observer.progress)
        if self._calibration:
            with observe(runnable) as self._activations:
                exercise(runnable, checkpoint, self._calibration, on_progress=self._observer.progress)
        del runnable
        gc.collect()  # its weights must be gone before the graphs are written and loaded
        return reference

    def _export_images(self, model: Any, checkpoint: Checkpoint) -> None:
        vision_config = checkpoint.config.vision_config
        with self._stage(VISION_ENCODER) as written:
            inputs = vision_inputs(checkpoint.image.size)
            written(self._export(VisionEncoder(model.vision_model), inputs, VISION_ENCODER, VISION_ENCODER, GRAPH_FILE))
        with self._stage(QFORMER) as written:
            num_tokens, instructed = _num_image_tokens(checkpoint), checkpoint.instructed
            inputs = qformer_inputs(num_tokens, vision_config.hidden_size, instructed=instructed)
            wrapper = InstructionQFormer(model) if instructed else QFormer(model)
            written(self._export(wrapper, inputs, QFORMER, QFORMER, GRAPH_FILE))

    def _export_decoder(self, model: Any, checkpoint: Checkpoint, sizes: DecoderSection) -> None:
        with self._stage("decoder") as written:
            shared = SharedWeights() if sizes.encoder is not None else None
            for graph in checkpoint.language.graphs(model.language_model, sizes):
                sharing = {"head_tables": graph.head_tables, "shared": shared}
                written(self._export(graph.module, graph.inputs, "decoder", BLIP2, graph.file, **sharing))

    def _export(self, module: Any, inputs: GraphInputs, stage: str, model: str, file: str, **sharing: Any) -> int:
        path = self._folder / model / MODEL_VERSION / file
        precision = self._precisions.of(stage)
        return export_graph(
            module,
            inputs,
            path,
            engine=_ENGINE,
            precision=precision,
            activations=self._activations,
            on_progress=self._observer.progress,
            on_layer=self._layers.append,
            **sharing,
        )

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


def _num_image_tokens(checkpoint: Checkpoint) -> int:
    patch = checkpoint.config.vision_config.patch_size
    side = checkpoint.image.size // (patch if isinstance(patch, int) else patch[0])
    return int(side * side + 1)


def _manifest(
    checkpoint: Checkpoint, decoder: DecoderSection, generation: GenerationSection, precisions: StagePrecisions
) -> Manifest:
    vision, qformer = checkpoint.config.vision_config, checkpoint.config.qformer_config
    return Manifest(
        revision=BUNDLE_REVISION,
        kind=checkpoint.family.kind,
        source=checkpoint.name,
        engine=_ENGINE,
        precision=precisions.as_dict(),
        image=checkpoint.image,
        vision=VisionSection(
            num_image_tokens=_num_image_tokens(checkpoint),
            hidden_size=vision.hidden_size,
            num_layers=vision.num_hidden_layers,
            num_frames=checkpoint.family.image_side.num_frames,
        ),
        qformer=QFormerSection(
            num_query_tokens=checkpoint.config.num_query_tokens,
            hidden_size=qformer.hidden_size,
            num_layers=qformer.num_hidden_layers,
            instruction=_instruction_section(qformer) if checkpoint.instructed else None,
        ),
        decoder=decoder,
        generation=generation,
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
        files={},
    )


def _instruction_section(qformer: Any) -> InstructionSection:
    return InstructionSection(
        vocab_size=qformer.vocab_size,
        max_tokens=qformer.max_position_embeddings,
        pad_token_id=qformer.pad_token_id or 0,
    )


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
