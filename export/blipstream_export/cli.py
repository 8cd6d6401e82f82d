"""The command ``blipstream build``. Importing it is cheap: torch and transformers come with the command's run."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from blipstream.errors import BlipstreamError
from blipstream_export.observer import STAGES, BuildObserver
from blipstream_export.units import format_bytes

if TYPE_CHECKING:
    from blipstream_export.build import BuildResult
    from blipstream_export.checkpoint import Source
    from blipstream_export.needs import Needs

_EXTRA = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors", "tokenizers", "PIL")
_LAVIS = "A checkpoint in LAVIS's layout"


def build(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The folder that becomes the bundle.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT", help="A folder, or a hub id, in the Hugging Face layout.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="PRECISION",
            help="fp32, fp16, bf16 or int8 for all stages, or one for each: vision_encoder=int8,decoder=int4; a stage "
            "that is not named is fp32.",
        ),
    ] = "fp32",
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences that decode at once.")] = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="256, or what the model reads if less",
            help="Tokens of one sequence: soft tokens, prompt and answer; behind an encoder (T5), of each of the two.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Images like those that will be served, for int8; by default a few synthetic ones.",
            show_default=False,
        ),
    ] = None,
    test_set: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Questions with their answers: the report says how many the bundle gets right.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    lavis: Annotated[
        Path | None,
        typer.Option(metavar="QFORMER.pth", help="The trained part, in place of CHECKPOINT.", rich_help_panel=_LAVIS),
    ] = None,
    vision: Annotated[
        Path | None,
        typer.Option(metavar="VIT.pth", help="Its ViT: eva_vit_g, or CLIP ViT-L/14.", rich_help_panel=_LAVIS),
    ] = None,
    llm: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Its language model, in the Hugging Face layout.", rich_help_panel=_LAVIS),
    ] = None,
    qformer_tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="BERT's tokenizer, where it is an InstructBLIP.", rich_help_panel=_LAVIS),
    ] = None,
    vision_layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Blocks of the ViT to keep.", show_default="as LAVIS keeps them", rich_help_panel=_LAVIS
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pixels of an image's side.",
            show_default="as the ViT's position embeddings",
            rich_help_panel=_LAVIS,
        ),
    ] = None,
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
        with _terminated_cleanly(), _Terminal(console) as observer:
            source = _source(checkpoint, lavis, parts)
            options = {
                "precision": precision,
                "max_sequences": max_sequences,
                "max_tokens": max_tokens,
                "calibration": calibration,
                "test_set": test_set,
                "replace": force,
            }
            result = _run(source, output, options, observer)
    except (BlipstreamError, OSError) as error:  # of the latter: no space left, or no permission to write
        errors.print(f"blipstream build: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    show(result, console)


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
    with _extra():
        from blipstream_export.lavis.composition import LavisParts

        return LavisParts(trained, **parts)


@contextmanager
def _extra() -> Iterator[None]:
    """Say what to install where something of the extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise BlipstreamError(f"{error.name} is not installed: building a bundle needs blipstream[export]") from None


def _run(checkpoint: str | Source, output: Path, options: Mapping[str, Any], observer: BuildObserver) -> BuildResult:
    with _extra():
        from blipstream_export import build as builder
    return builder.build(checkpoint, output, builder.BuildOptions(**options), observer=observer)


class _Terminal(BuildObserver):
    """Shows a build as a bar over its stages; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<21}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("starting", total=len(STAGES))
        self._stage = ""

    def __enter__(self) -> _Terminal:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def needs(self, needs: Needs) -> None:
        text = f"This build needs about {format_bytes(needs.disk)} of disk and {format_bytes(needs.memory)} of memory"
        if needs.streamed:
            text += "; the checkpoint is too large to be held in memory and is run weight by weight"
        self._console.print(f"{text}.", highlight=False, soft_wrap=True)

    def stage(self, name: str) -> None:
        self._stage = name
        self._bar.update(self._task, description=name, completed=STAGES.index(name))

    def progress(self, done: int, total: int) -> None:
        part = done / total if total else 0
        self._bar.update(
            self._task, description=f"{self._stage} ({part:.0%})", completed=STAGES.index(self._stage) + part
        )


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


def show(result: BuildResult, console: Console) -> None:
    """Print what was built, how long it took, and how close it comes to the checkpoint."""
    stages = Table("stage", "size", "seconds", title="Build")
    for column in stages.columns[1:]:
        column.justify = "right"
    for stage in result.stages:
        stages.add_row(stage.name, "" if stage.bytes is None else format_bytes(stage.bytes), f"{stage.seconds:.1f}")
    total = sum(entry.bytes for entry in result.manifest.files.values())
    stages.add_section()
    stages.add_row("total", format_bytes(total), f"{sum(stage.seconds for stage in result.stages):.1f}")
    console.print(stages)

    parity = Table("stage", "", "cosine", "rel. error", "largest difference", "largest value")
    parity.title = "Parity with the checkpoint in fp32"
    for column in parity.columns[2:]:
        column.justify = "right"
    for row in result.parity.stages:
        figures = (f"{row.cosine:.7f}", f"{row.relative_error:.2g}", f"{row.max_difference:.2g}")
        parity.add_row(row.stage, row.precision, *figures, f"{row.max_reference:.3g}")
    console.print(parity)
    equal = sum(text.equal for text in result.parity.texts)
    console.print(
        f"Greedy tokens: {equal} of {len(result.parity.texts)} sample texts equal the checkpoint's; token by token, "
        f"{result.parity.agreement:.1%} agree."
    )
    forms = Counter(layer.form for layer in result.parity.layers)
    if forms:
        console.print(f"Matrices: {'; '.join(f'{count} in {form}' for form, count in forms.items())}.")
    if result.parity.accuracy:
        accuracy = Table("questions", "asked", "right", title="Accuracy on the test set")
        for kind in result.parity.accuracy:
            accuracy.add_row(kind.kind, str(kind.asked), f"{kind.right / kind.asked:.1%}")
        console.print(accuracy)
    for note in result.notes:
        console.print(f"Note: {note}.", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Bundle: {result.bundle}", markup=False, highlight=False, soft_wrap=True)
