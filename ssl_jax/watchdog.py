"""Saying what a run was doing when nothing has moved for long, since a hang that nobody notices costs machines."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


class Watchdog:
    """A thread that speaks when the run has not moved for a while: in which phase, and where in the code.

    It ends nothing. What looks like a hang may be a compiler at work, and who restarts a run that hangs (a scheduler, a
    person) knows more than this process does.
    """

    def __init__(self, patience: float, say: Callable[[str], None]) -> None:
        """Watches nothing yet.

        Args:
          patience: seconds without a move before the first warning; each further one takes twice as long. 0: never.
          say: shows a line; called from another thread.
        """
        self._patience, self._say = patience, say
        self._phase, self._moved = "start", time.monotonic()
        self._done = threading.Event()

    def moved(self, phase: str | None = None) -> None:
        """Notes that the run has moved, and what it does from now on, where that is something else."""
        self._phase, self._moved = phase or self._phase, time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watches the thread that opens the context while it is open."""
        self.moved()
        thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), name="watchdog", daemon=True)
        if self._patience:
            thread.start()
        try:
            yield self
        finally:
            self._done.set()
            if self._patience:
                thread.join()
                self._done.clear()

    def _watch(self, watched: int) -> None:
        warned_for, patience = self._moved, self._patience
        while not self._done.wait(self._patience / 10):
            moved, phase = self._moved, self._phase
            if moved != warned_for:
                warned_for, patience = moved, self._patience
            if time.monotonic() - moved < patience:
                continue
            patience *= 2
            self._say(
                f"warning: nothing has moved for {time.monotonic() - moved:.0f} s in phase '{phase}': "
                f"{_whereabouts(watched)}; if that is a hang, stop the process and run the same command again "
                "(train.hang_warning_seconds)"
            )


def _whereabouts(thread: int) -> str:
    """Where a thread is: the innermost line of ours that it has come to, and the function that it is in."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "its thread has ended"
    stack = traceback.extract_stack(frame)
    ours = next((one for one in reversed(stack) if one.filename.startswith(_PACKAGE)), stack[-1])
    inner = "" if ours is stack[-1] else f", in {stack[-1].name} of {Path(stack[-1].filename).name}"
    return f"{Path(ours.filename).name}:{ours.lineno} ({ours.name}){inner}"
