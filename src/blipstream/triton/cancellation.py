"""Learning of cancellations: Triton tells nobody, it has to be asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

_log = logging.getLogger(__name__)


class Cancellable(Protocol):
    """Something that a client may have cancelled."""

    def is_cancelled(self) -> bool:
        """Ask; may take a fraction of a millisecond."""
        ...


C = TypeVar("C", bound=Cancellable)


class CancellationWatch(Generic[C]):
    """One thread that asks for every call in turn, so that the decode loop never waits for such an answer.

    Args:
        on_cancel: is called on the watch's thread, once for a call that was cancelled; the call is forgotten then.
        interval: seconds between two rounds.
    """

    def __init__(self, on_cancel: Callable[[C], None], interval: float = 0.025) -> None:
        self._on_cancel = on_cancel
        self._interval = interval
        self._calls: set[C] = set()
        self._changed = threading.Condition()  # guards the set and the flag
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="cancellation-watch", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def add(self, call: C) -> None:
        """Watch a call."""
        with self._changed:
            self._calls.add(call)
            self._changed.notify()

    def discard(self, call: C) -> None:
        """Stop watching a call."""
        with self._changed:
            self._calls.discard(call)

    def close(self) -> None:
        """Stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._calls)
                self._changed.wait_for(lambda: self._closing, timeout=self._interval)
                if self._closing:
                    return
                calls = list(self._calls)
            for call in calls:
                self._ask(call)

    def _ask(self, call: C) -> None:
        try:
            if call.is_cancelled():
                self.discard(call)
                self._on_cancel(call)
        except Exception:  # the Python backend's own exceptions; the call itself goes on
            _log.exception("a call could not be asked whether it is cancelled")
            self.discard(call)
