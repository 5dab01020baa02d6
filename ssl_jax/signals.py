"""Remembering a signal until there is a good moment to stop, the same one for all processes of a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax


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
