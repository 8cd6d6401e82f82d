"""Command line: ``blipstream build | serve | caption | ask | chat | bench | plan``.

Importing it imports none of the packages that the commands need; each command brings its own when it runs.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer
from blipstream_export.cli import build

from blipstream.commands.ask import ask
from blipstream.commands.bench import bench
from blipstream.commands.caption import caption
from blipstream.commands.chat import chat
from blipstream.commands.plan import plan
from blipstream.commands.serve import serve

app = typer.Typer(name="blipstream", no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
for command in (build, serve, caption, ask, chat, bench, plan):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blipstream {version('blipstream')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve BLIP-2 checkpoints on NVIDIA Triton, and talk to the server."""
