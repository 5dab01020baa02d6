"""Remembering a signal until there is a good moment to stop, the same one for all processes of a run."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from ssl_jax import distributed
from ssl_jax.errors import Preempted

if TYPE_CHECKING:
    import jax

_STOPPING = (signal.SIGTERM, signal.SIGINT)
# A terminal and a launch script that it runs each send a signal for one Ctrl-C.
_SAME_SECONDS = 0.5
# Less than any scheduler's grace, and more than a step or a piece of a round usually takes.
_PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.1


class Signals:
    """Remembers a SIGTERM or SIGINT until the loop asks for it, or a thread has reason not to wait for that.

    Python hears signals between two of its own instructions, so not while XLA compiles or a collective waits for a
    host. Its handler in C writes every one to a socket at once, and a thread reads there: a second signal ends the
    process whatever it is busy with; so does the first where nothing would be lost and nobody asks for it in time.

    Attributes:
      received: name of the first signal, or None.
      is_saved: whether all that the run has done would be found again; whoever does something unsaved says so.
    """

    def __init__(self, *, patience: float = _PATIENCE_SECONDS) -> None:
        """Hears nothing yet.

        Args:
          patience: seconds that the main thread has to react to a signal where nothing would be lost.
        """
        self.received: str | None = None
        self.is_saved = True
        self._patience = patience
        self._endings: list[Callable[[], object]] = []

    @contextlib.contextmanager
    def listen(self, *, interrupts: bool = False) -> Iterator[Signals]:
        """Replaces the handlers of both signals while the context is open.

        Args:
          interrupts: whether a signal also raises KeyboardInterrupt in the main thread, for who has to clean up. That
            is no way to be sure of an end: an exception that comes up in foreign code, such as a library that is
            being imported or a callback, may be lost, or the process with it.
        """
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)  # a signal's handler must not wait

        def remember(number: int, frame: Any) -> None:
            self.received = self.received or signal.Signals(number).name
            if interrupts:
                signal.default_int_handler(number, frame)

        former_socket = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        former = {number: signal.signal(number, remember) for number in _STOPPING}
        thread = threading.Thread(target=self._watch, args=(ours,), name="signals", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(former_socket, warn_on_full_buffer=former_socket == -1)
            theirs.close()
            thread.join()
            ours.close()

    @contextlib.contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """While the context is open, `end` is called, from another thread, before the process ends at once."""
        self._endings.append(end)
        try:
            yield
        finally:
            self._endings.remove(end)

    def _watch(self, heard: socket.socket) -> None:
        """Reads signals until the socket is closed."""
        since = None
        while True:
            if select.select([heard], [], [], None if since is None else _LOOK_SECONDS)[0]:
                content = heard.recv(64)
                if not content:
                    return
                for number in set(content).intersection(_STOPPING):
                    name = signal.Signals(number).name
                    self.received = self.received or name
                    if since is None:
                        since = time.monotonic()
                    elif time.monotonic() - since > _SAME_SECONDS:
                        lost = "" if self.is_saved else "; the steps since the last checkpoint are lost"
                        self._leave(f"stopped: {name} again{lost}; run the same command to go on")
            if since is not None and self.is_saved and time.monotonic() - since >= self._patience:
                self._leave(f"stopped: {self.received}; nothing is lost, run the same command to go on")

    def _leave(self, text: str) -> NoReturn:
        """Ends the process, and the others of the run, without waiting for what it is doing."""
        for end in self._endings:
            with contextlib.suppress(Exception):
                end()
        distributed.end(Preempted.exit_code, text)
        print(text, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(Preempted.exit_code)


class SharedSignals:
    """What all processes of a run know together of the signals that any of them has received.

    Every process makes the same calls at the same points of the run, so all of them stop at the same point, however
    late one of them is. With one process both answers are what it has received so far.
    """

    def __init__(self, own: Signals, mesh: jax.sharding.Mesh) -> None:
        """Asks nobody yet.

        Args:
          own: of this process.
          mesh: all devices of the run.
        """
        import jax
        import jax.numpy as jnp

        self._own, self._size = own, mesh.size
        self._is_alone = jax.process_count() == 1
        self._by_device = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        self._everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._largest = jax.jit(jnp.max, out_shardings=self._everywhere)
        self._numbers: dict[int, jax.Array] = {}
        self._asked: jax.Array | None = None

    def saved(self, is_saved: bool) -> None:
        """Says whether all that the run has done would be found again, so that a signal may end it at any moment."""
        self._own.is_saved = is_saved

    def ending(self, end: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
        """`end` is called if a signal ends the process while the context is open."""
        return self._own.ending(end)

    def after_step(self) -> str | None:
        """The name of a signal that somebody had received when this was last called.

        The question goes to the devices behind the step that they are busy with, and is answered when the next step is
        behind it: nobody waits for a device.
        """
        if self._is_alone:
            return self._own.received
        answer, self._asked = self._asked, self._ask()
        return None if answer is None else _name(answer)

    def now(self) -> str | None:
        """The name of a signal that somebody has received; waits for all processes to come here."""
        return self._own.received if self._is_alone else _name(self._ask())

    def _ask(self) -> jax.Array:
        """Begins to find the largest number of a signal; 0 is none."""
        import jax
        import numpy as np

        number = int(signal.Signals[self._own.received]) if self._own.received else 0
        if number not in self._numbers:
            self._numbers[number] = jax.make_array_from_callback(
                (self._size,), self._by_device, lambda _: np.array([number], np.int32)
            )
        return self._largest(self._numbers[number])


def _name(number: jax.Array) -> str | None:
    return signal.Signals(int(number)).name if int(number) else None
