"""A build on the terminal: a bar while it runs, and tables of what came of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from blipstream.manifest import LAYERS_FILE
from blipstream_export.observer import STAGES, BuildObserver
from blipstream_export.units import format_bytes

if TYPE_CHECKING:
    from blipstream_export.build import BuildResult
    from blipstream_export.needs import Needs

_SHOWN_LAYERS = 5


class Terminal(BuildObserver):
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

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def needs(self, needs: Needs) -> None:
        """See :meth:`BuildObserver.needs`."""
        text = f"This build needs about {format_bytes(needs.disk)} of disk and {format_bytes(needs.memory)} of memory"
        if needs.streamed:
            text += "; the checkpoint is too large to be held in memory and is run weight by weight"
        self._console.print(f"{text}.", highlight=False, soft_wrap=True)

    def stage(self, name: str) -> None:
        """See :meth:`BuildObserver.stage`."""
        self._stage = name
        self._bar.update(self._task, description=name, completed=STAGES.index(name))

    def progress(self, done: int, total: int) -> None:
        """See :meth:`BuildObserver.progress`."""
        part = done / total if total else 0
        self._bar.update(
            self._task, description=f"{self._stage} ({part:.0%})", completed=STAGES.index(self._stage) + part
        )


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
    show_layers(result.bundle / LAYERS_FILE, console)
    for note in result.notes:
        console.print(f"Note: {note}.", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Bundle: {result.bundle}", markup=False, highlight=False, soft_wrap=True)


def show_layers(file: Path, console: Console) -> None:
    """Print which tensors of each TensorRT engine depart farthest from ONNX Runtime's, if that was measured."""
    if not file.is_file():
        return
    for engine, rows in json.loads(file.read_text(encoding="utf-8")).items():
        table = Table("tensor", "operator", "rel. error", "largest difference")
        table.title = f"{engine}: farthest from ONNX Runtime, of {len(rows)} tensors"
        for row in sorted(rows, key=lambda row: -row["relative_error"])[:_SHOWN_LAYERS]:
            table.add_row(
                row["tensor"], row["operator"], f"{row['relative_error']:.2g}", f"{row['max_difference']:.2g}"
            )
        console.print(table)
