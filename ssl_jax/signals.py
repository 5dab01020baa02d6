"""Remembering a signal until there is a good moment to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Signals:
    """Remembers a SIGTERM or SIGINT until the loop asks; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator[Signals]:
        """Replaces the handlers of both signals while the context is open."""
        previous = {}

        def remember(number: int, _: Any) -> None:
            self.received = signal.Signals(number).name
            for either, handler in previous.items():
                signal.signal(either, handler)

        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, remember)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
