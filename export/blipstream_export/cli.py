"""The command ``blipstream build``. Importing it is cheap: torch and transformers come with the command's run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from blipstream.errors import BlipstreamError
from blipstream.extras import needing
from blipstream.manifest import EngineName
from blipstream_export import options
from blipstream_export.observer import BuildObserver
from blipstream_export.plans.options import PlanOptions
from blipstream_export.terminal import Terminal, show

if TYPE_CHECKING:
    from blipstream_export.build import BuildResult
    from blipstream_export.checkpoint import Source


def build(
    output: options.Output,
    checkpoint: options.CheckpointName = None,
    revision: options.Revision = None,
    engine: options.Engine = "onnxruntime",
    precision: options.Precision = "fp32",
    max_batch: options.MaxBatch = 8,
    max_sequences: options.MaxSequences = 16,
    max_tokens: options.MaxTokens = None,
    calibration: options.Calibration = None,
    test_set: options.TestSet = None,
    question_template: options.QuestionTemplate = None,
    force: options.Force = False,
    no_plugins: options.NoPlugins = False,
    debug_parity: options.DebugParity = False,
    version_compatible: options.VersionCompatible = False,
    hardware: options.Hardware = "none",
    timing_cache: options.TimingCache = None,
    lavis: options.LavisTrained = None,
    vision: options.LavisVision = None,
    llm: options.LavisLanguage = None,
    qformer_tokenizer: options.LavisTokenizer = None,
    vision_layers: options.LavisVisionLayers = None,
    image_size: options.LavisImageSize = None,
) -> None:
    """Export a checkpoint into a bundle that Triton serves, and prove that it computes the same."""
    console, errors = Console(), Console(stderr=True)
    try:
        parts = {
            "vision": vision,
            "llm": llm,
            "qformer_tokenizer": qformer_tokenizer,
            "vision_layers": vision_layers,
            "image_size": image_size,
        }
        with _terminated_cleanly(), Terminal(console) as observer:
            source = _source(checkpoint, lavis, parts)
            tensorrt = {
                "plugins": not no_plugins,
                "version_compatible": version_compatible,
                "hardware": hardware,
                "timing_cache": timing_cache,
            }
            chosen = {
                "engine": engine,
                "plans": _plan_options(engine, tensorrt),
                "debug_parity": debug_parity,
                "precision": precision,
                "max_batch": max_batch,
                "max_sequences": max_sequences,
                "max_tokens": max_tokens,
                "calibration": calibration,
                "test_set": test_set,
                "replace": force,
                "revision": revision,
                "question_template": question_template,
            }
            result = _run(source, output, chosen, observer)
    except (BlipstreamError, OSError) as error:  # of the latter: no space left, or no permission to write
        errors.print(f"blipstream build: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    show(result, console)


def _plan_options(engine: EngineName, given: Mapping[str, Any]) -> PlanOptions | None:
    """How TensorRT's engines are to be built; what was said of it for another engine is refused by the build."""
    asked = PlanOptions(**given)
    return asked if engine == "tensorrt" or asked != PlanOptions() else None


def _source(checkpoint: str | None, trained: Path | None, parts: Mapping[str, Any]) -> str | Source:
    """What is to be built: CHECKPOINT, or the parts of one in LAVIS's layout."""
    given = [f"--{name.replace('_', '-')}" for name, value in parts.items() if value is not None]
    if checkpoint is not None and trained is not None:
        raise BlipstreamError("CHECKPOINT and --lavis were given, and one of them says what to build")
    if checkpoint is not None:
        if given:
            raise BlipstreamError(f"{', '.join(given)}: only a checkpoint that --lavis names has such parts")
        return checkpoint
    if trained is None:
        raise BlipstreamError("neither CHECKPOINT nor --lavis was given, and one of them says what to build")
    if parts["llm"] is None:
        raise BlipstreamError("--lavis names the trained part alone: its language model is expected as --llm FOLDER")
    with needing("export"):
        from blipstream_export.lavis.composition import LavisParts

        return LavisParts(trained, **parts)


def _run(checkpoint: str | Source, output: Path, options: Mapping[str, Any], observer: BuildObserver) -> BuildResult:
    with needing("export"):
        from blipstream_export import build as builder
    return builder.build(checkpoint, output, builder.BuildOptions(**options), observer=observer)


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that the unfinished bundle is removed."""

    def stop(number: int, frame: Any) -> None:
        del frame
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
