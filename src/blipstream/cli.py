"""Command line: ``blipstream build | serve | caption | ask | chat``."""

from __future__ import annotations

import typer

app = typer.Typer(name="blipstream", help="Serve BLIP-2 checkpoints on NVIDIA Triton.", no_args_is_help=True)
