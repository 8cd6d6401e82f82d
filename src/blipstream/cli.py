"""Command line: ``blipstream build | serve | caption | ask | chat``."""

from __future__ import annotations

import typer
from blipstream_export.cli import build

from blipstream.commands.serve import serve

app = typer.Typer(name="blipstream", no_args_is_help=True)
app.command()(build)
app.command()(serve)


@app.callback()
def main() -> None:
    """Serve BLIP-2 checkpoints on NVIDIA Triton."""
