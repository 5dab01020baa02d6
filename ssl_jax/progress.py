"""What the host counts while the device trains, and the means that it logs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssl_jax import objectives, spikes


@dataclasses.dataclass
class Progress:
    """What a run knows besides its state: counted on the host, saved with every checkpoint.

    Attributes:
      tokens: tokens fed so far, by stream.
      seconds: wall time of the run so far.
      best: lowest dev reply_bits_per_byte and its step.
      unlogged: metrics of the steps since the last line of metrics, so that a mean does not depend on interruptions.
      losses: of the last steps that drew the same streams, which the next one is compared with.
      rollbacks: what losses that jumped have made the run pass over.
    """

    tokens: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(objectives.STREAM_IDS, 0))
    seconds: float = 0.0
    best: tuple[float, int] | None = None
    unlogged: list[dict[str, float]] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    rollbacks: list[spikes.Rollback] = dataclasses.field(default_factory=list)

    def to_meta(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Progress:
        """Back from JSON values."""
        best = meta["best"]
        return cls(
            dict(meta["tokens"]),
            meta["seconds"],
            (best[0], best[1]) if best else None,
            meta["unlogged"],
            meta.get("losses", []),
            [spikes.Rollback.from_json(one) for one in meta.get("rollbacks", [])],
        )


class Window:
    """Means over the steps since the last line of metrics."""

    def __init__(self, rows: list[dict[str, float]]) -> None:
        """Goes on with `rows`, which a checkpoint saves; the rate covers this window's own steps."""
        self._rows = rows
        self._tokens = 0
        self._seconds = 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets the time that passed between steps (an evaluation, a save)."""
        self._since = time.monotonic()

    def add(self, metrics: Mapping[str, float], tokens: int) -> None:
        """Counts a step: its metrics and the tokens it was fed."""
        now = time.monotonic()
        self._rows.append(dict(metrics))
        self._tokens += tokens
        self._seconds += now - self._since
        self._since = now

    def __len__(self) -> int:
        """Steps since the last line."""
        return len(self._rows)

    def means(self) -> dict[str, float]:
        """Mean loss, and per loss term the mean over its tokens; the newest learning rate and gradient norm."""
        newest = self._rows[-1]
        values = {"loss": float(np.mean([row["loss"] for row in self._rows]))}
        for name in (key.removeprefix("tokens/") for key in newest if key.startswith("tokens/")):
            counts = np.array([row[f"tokens/{name}"] for row in self._rows])
            if counts.sum() > 0:
                losses = np.array([row[f"loss/{name}"] for row in self._rows])
                values[f"loss/{name}"] = float((losses * counts).sum() / counts.sum())
                values[f"weight/{name}"] = newest[f"weight/{name}"]
        return {**values, "lr": newest["lr"], "grad_norm": newest["grad_norm"]}

    def tokens_per_second(self) -> float:
        """Tokens fed in the time between steps; 0 before any time has passed."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    def clear(self) -> None:
        """Begins the next line."""
        self._rows.clear()
        self._tokens = 0
        self._seconds = 0.0
