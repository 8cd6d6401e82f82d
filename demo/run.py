"""``make demo``: build the demo bundle, serve it on a real Triton server, caption the sample images and ask about them.

    python demo/run.py --work FOLDER

Exits with status 1 when an answer is wrong or anything fails.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from blipstream.errors import BlipstreamError

interrupted = False
DEMO = Path(__file__).resolve().parent
CHECKPOINT = DEMO / "checkpoint"
IMAGES = DEMO / "images"


def main() -> int:
    """Run the demo; return the exit status."""
    from blipstream_export.build import BuildOptions, build  # imports take seconds, and Ctrl-C may come in them
    from blipstream_export.cli import show

    from blipstream.triton.server import TritonServer

    parser = argparse.ArgumentParser(description="Caption the sample images with the demo checkpoint.")
    parser.add_argument("--work", type=Path, default=Path(".work"), help="folder for the bundle")
    bundle = parser.parse_args().work / "demo-bundle"
    console = Console()
    console.rule("1. Build: the checkpoint becomes a bundle")
    show(build(str(CHECKPOINT), bundle, BuildOptions(replace=True)), console)
    console.rule("2. Serve: tritonserver on this machine")
    check_interrupt()
    console.print("loading the models")
    with TritonServer(bundle) as server:
        console.print(f"ready: gRPC {server.grpc_url}, HTTP {server.http_url}, metrics {server.metrics_url}")
        console.rule("3. Ask: image files, over gRPC")
        right = ask_all(console, server.grpc_url)
    check_interrupt()
    console.print("the server has stopped")
    print_next_steps(console, bundle)
    return 0 if right else 1


def ask_all(console: Console, url: str) -> bool:
    """Caption each sample and ask its question; print a table; return whether every answer is right."""
    from blipstream_client import Client

    table = Table("image", "caption", "question", "answer", "right", show_lines=True)
    all_right = True
    with Client(url) as client:
        for sample in json.loads((IMAGES / "samples.json").read_text()):
            image = IMAGES / sample["file"]
            caption = client.caption(image).text.strip()
            answer = client.ask(image, sample["question"]).text.strip()
            right = caption == sample["caption"] and answer == sample["answer"]
            all_right = all_right and right
            table.add_row(sample["file"], caption, sample["question"], answer, "yes" if right else "NO")
    console.print(table)
    return all_right


def print_next_steps(console: Console, bundle: Path) -> None:
    """Say what to try now."""
    console.rule("What to try next")
    image = f"demo/images/{json.loads((IMAGES / 'samples.json').read_text())[0]['file']}"
    for line in (
        "source .venv/bin/activate",
        f"blipstream serve {shlex.quote(str(bundle))}                     # in one terminal; it prints its endpoints",
        f"blipstream caption {image} --url localhost:8001      # in another",
        f'blipstream ask {image} "How many objects are there?"',
        f"blipstream chat {image}",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def interrupt(*_: object) -> NoReturn:
    """Answer Ctrl-C; a library that swallows the exception puts it off until :func:`check_interrupt`."""
    global interrupted
    interrupted = True
    raise KeyboardInterrupt


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if Ctrl-C came before."""
    if interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is left running", file=sys.stderr)
        sys.exit(130)
    except BlipstreamError as error:
        sys.exit(f"demo: {error}")
