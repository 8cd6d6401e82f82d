"""The command ``blipstream serve``. Importing it is cheap: the launcher comes with the command's run."""

from __future__ import annotations

import io
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from blipstream.commands.options import with_options
from blipstream.commands.requests import complain, printable
from blipstream.config import PREFIX, ServerConfig
from blipstream.errors import BlipstreamError, ServerStartError

if TYPE_CHECKING:
    from typing_extensions import Self

    from blipstream.triton.server import TritonServer

_DEFAULTS = ServerConfig()
_POLL_S = 0.2


@dataclass(frozen=True)
class ModelOptions:
    """The settings of the Triton models that the command line has: those of :class:`ServerConfig`, by its names."""

    threads: Annotated[int, typer.Option(help="CPU threads of each engine; 0 means all cores.")] = _DEFAULTS.threads
    queue_size: Annotated[int, typer.Option(help="Requests that may wait.")] = _DEFAULTS.queue_size
    request_timeout: Annotated[
        float, typer.Option(help="Seconds that a request may wait for a slot when it does not say; 0 means for ever.")
    ] = _DEFAULTS.request_timeout
    decode_niceness: Annotated[
        int,
        typer.Option(
            max=19,
            help="On a CPU, let images be read before tokens are decoded: more requests a second, but what is streamed "
            "stalls meanwhile, as 10 leaves decoding a tenth of the cores; 0 lets both go on alike.",
        ),
    ] = _DEFAULTS.decode_niceness
    cache_bytes: Annotated[int, typer.Option(help="Bytes of image features that are kept; 0 keeps none.")] = (
        _DEFAULTS.cache_bytes
    )
    prefix_bytes: Annotated[
        int, typer.Option(help="Bytes of images' keys and values that the decoder keeps; 0 keeps none.")
    ] = _DEFAULTS.prefix_bytes
    max_image_bytes: Annotated[int, typer.Option(help="Bytes of an image at most.")] = _DEFAULTS.max_image_bytes
    max_image_pixels: Annotated[
        int,
        typer.Option(help="Pixels of an image at most; a JPEG file of up to 4 times as many is decoded reduced."),
    ] = _DEFAULTS.max_image_pixels
    max_image_seconds: Annotated[float, typer.Option(help="CPU seconds that decoding an image may take.")] = (
        _DEFAULTS.max_image_seconds
    )
    max_text_bytes: Annotated[
        int, typer.Option(help="Bytes of a prompt, and of all stop words or bad words together, at most.")
    ] = _DEFAULTS.max_text_bytes
    max_words: Annotated[int, typer.Option(help="Stop words of a request, and bad words, at most.")] = (
        _DEFAULTS.max_words
    )
    jpeg_oversampling: Annotated[
        int,
        typer.Option(
            help="Decode large JPEG files at a reduced size, so many times that of the model's image at least (2 is "
            "next to exact); 0 decodes them whole."
        ),
    ] = _DEFAULTS.jpeg_oversampling
    stop_grace: Annotated[
        float, typer.Option(help="Seconds that running sequences have to end when the server stops.")
    ] = _DEFAULTS.stop_grace


@with_options(ModelOptions, PREFIX)
def serve(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `blipstream build` wrote.")],
    grpc_port: Annotated[int, typer.Option(help="Port for gRPC on the loopback address; 0 chooses a free one.")] = 8001,
    http_port: Annotated[int, typer.Option(help="The same for HTTP.")] = 8000,
    metrics_port: Annotated[int, typer.Option(help="The same for metrics.")] = 8002,
    start_timeout: Annotated[float, typer.Option(help="Seconds that the models have to load.")] = 600.0,
    log_file: Annotated[Path | None, typer.Option(help="Append all that the server says to this file.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show all that the server says.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the hashes of large files too: seconds for each gigabyte.")
    ] = False,
    *,
    options: ModelOptions,
) -> None:
    """Serve a bundle on Triton, on this machine, until Ctrl-C or SIGTERM."""
    try:
        config = replace(ServerConfig.from_environment(), **asdict(options))
        from blipstream.triton.server import TritonServer

        server = TritonServer(
            bundle,
            grpc_port=grpc_port,
            http_port=http_port,
            metrics_port=metrics_port,
            config=config,
            log_file=log_file,
            verbose=verbose,
            start_timeout=start_timeout,
            verify=verify,
        )
        _run(server, bundle, Console())
    except BlipstreamError as error:
        complain("serve", str(error))
        raise typer.Exit(1) from None
    except OSError as error:
        complain("serve", f"standard output cannot be written: {error.strerror}")
        raise typer.Exit(1) from None


def _run(server: TritonServer, bundle: Path, console: Console) -> None:
    """Serve until a signal comes or the server ends, and leave nothing behind."""
    with _StopSignals() as signals:
        try:
            _say(console, f"Loading {bundle}")
            server.start()
            signals.check()
            _show(server, bundle, console)
            fault = None
            while server.poll() is None:
                signals.check()
                if fault is None and (fault := server.log_fault):
                    complain("serve", f"{fault}; serving goes on without it")
                time.sleep(_POLL_S)
            raise ServerStartError(f"tritonserver ended unexpectedly, with status {server.poll()}")
        except KeyboardInterrupt:
            console.print("Stopping.")
        finally:
            signals.ignore()
            server.stop()


class _StopSignals:
    """Lets SIGINT and SIGTERM raise KeyboardInterrupt within the block."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._came = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._interrupt) for number in self._NUMBERS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """Let further signals do nothing."""
        for number in self._NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Raise for a signal whose exception got lost, as in a finalizer, where Python ignores it."""
        if self._came:
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        self._came = True
        raise KeyboardInterrupt


def _show(server: TritonServer, bundle: Path, console: Console) -> None:
    lines = [
        f"Serving {bundle}",
        f"  gRPC     {server.grpc_url}",
        f"  HTTP     {server.http_url}",
        f"  metrics  {server.metrics_url}",
        "Ctrl-C stops it.",
    ]
    _say(console, *lines)


def _say(console: Console, *lines: str) -> None:
    if isinstance(console.file, io.TextIOWrapper):  # a path may have what the terminal's encoding lacks
        console.file.reconfigure(errors="backslashreplace")
    console.print(printable("\n".join(lines)), markup=False, highlight=False, soft_wrap=True)
