"""What ``tritonserver`` says: where it goes, and what of it explains a failure."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import IO

_LINE = re.compile(r"^(?P<severity>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ \S+\] (?P<text>.*)$")
_TABLE = re.compile(r"^\s*([+|].*)?$")

_HARMLESS = ("pinned_memory_manager", "CudaDriverHelper", "CUDA driver version", "DCGM", "NVML", "Signal (")
"""Parts of lines that the server writes on every machine without a GPU, or at every stop."""

_KEPT_LINES = 400

_CAUSES = (
    re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?:\w[\w ]*: )?(?P<cause>.+)"),
    re.compile(r"(?P<cause>failed to start .+ service: .+)"),
    re.compile(r"(?P<cause>error while loading shared libraries: .+)"),
    re.compile(r"(?P<cause>failed to load all models.+|Invalid model repository.+|failed to stat file .+)"),
)
"""What names a cause, the most telling first."""

_OWN_ERRORS = re.compile(r"^(?:Bundle|Engine|ServerStart)Error: ")


class LogPump:
    """A thread that reads the server's output, keeps its end, and passes on what is wanted.

    Args:
        source: the server's standard output and error, as one pipe.
        write: takes each wanted line. When it raises OSError, the line is lost, and the first such error is kept as
            :attr:`fault`; the server must not wait for a full disk.
        wanted: says which lines are; all by default.
        rewrite: what becomes of each line first.
    """

    def __init__(
        self,
        source: IO[bytes],
        write: Callable[[str], object],
        wanted: Callable[[str], bool] | None = None,
        rewrite: Callable[[str], str] = str,
    ) -> None:
        self._source = source
        self._write = write
        self._wanted = wanted
        self._rewrite = rewrite
        self._tail: deque[str] = deque(maxlen=_KEPT_LINES)
        self.fault: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="server-log", daemon=True)
        self._thread.start()

    def tail(self) -> list[str]:
        """The last lines."""
        return list(self._tail)

    def join(self) -> None:
        """Wait until the output has ended."""
        self._thread.join()
        self._source.close()

    def _run(self) -> None:
        for raw in self._source:
            line = self._rewrite(raw.decode("utf-8", "replace").rstrip("\n"))
            self._tail.append(line)
            if self._wanted is None or self._wanted(line):
                try:
                    self._write(line)
                except OSError as error:
                    self.fault = self.fault or error


def is_alarming(line: str) -> bool:
    """Whether a line deserves attention: a warning, an error or a model's own words, and nothing usual."""
    if any(part in line for part in _HARMLESS) or _TABLE.match(line):
        return False
    match = _LINE.match(line)
    return match is None or match["severity"] != "I"


def has_failed(lines: Iterable[str]) -> bool:
    """Whether a model has failed to load; the server itself ends only after the others have loaded."""
    return any(_CAUSES[0].search(line) for line in lines if "failed to load '" in line)


def is_passing(lines: Iterable[str]) -> bool:
    """Whether a start failed of a race in Triton's own shared memory, and another one will do."""
    return any("lock_exception" in line for line in lines)


def find_cause(lines: Iterable[str]) -> str:
    """The line that tells best why the server did not start, as part of a sentence."""
    lines = [line for line in lines if not any(part in line for part in _HARMLESS)]
    texts = [_text(line) for line in lines]
    for pattern in _CAUSES:
        for text in texts:
            match = pattern.search(text)
            if match:
                cause = _OWN_ERRORS.sub("", match["cause"]).rstrip(".")
                model = match.groupdict().get("model")
                return f"model {model}: {cause}" if model else cause
    alarming = [text for line in lines if is_alarming(line) and (text := _text(line))]
    return alarming[-1] if alarming else "it said nothing"


def _text(line: str) -> str:
    """A line without the log's frame: its message up to the first line break, which the log writes as ``\\n``."""
    match = _LINE.match(line)
    text = match["text"].strip('"') if match else line
    return text.partition("\\n")[0].strip()
