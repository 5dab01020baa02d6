"""Losses that jump: noticed, and undone by going back to a checkpoint and passing over the batches that led there.

Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, section 5.1) found that a spike does not come back if the run restarts
before it and skips the batches around it, although the same batches do no harm elsewhere. Since a run is a function of
(configuration, seed, step), going back alone would lead to the same spike again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Losses that hardly vary, such as those of a model that has learned its data by heart, jump by less than matters.
_LEAST_DEVIATION = 0.01


@dataclasses.dataclass(frozen=True)
class Spike:
    """A loss that jumped.

    Attributes:
      step: which step's.
      loss: it.
      mean: of the losses before.
      deviation: their standard deviation, at least a hundredth of their mean.
    """

    step: int
    loss: float
    mean: float
    deviation: float

    def __str__(self) -> str:
        how_far = (self.loss - self.mean) / self.deviation
        return (
            f"the loss of step {self.step}, {self.loss:.4g}, is {how_far:.1f} standard deviations above the mean "
            f"{self.mean:.4g} of the steps before"
        )


class LossSpiked(Exception):
    """Tells whoever takes the steps that the run goes back."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(str(spike))
        self.spike = spike


def find(step: int, loss: float, losses: Sequence[float], *, window: int, threshold: float) -> Spike | None:
    """The spike that a loss is, if it is one.

    Args:
      step: which step's.
      loss: nats.
      losses: of the steps before; with fewer than `window` of them there is nothing to compare with.
      window: how many of the last losses are looked at.
      threshold: standard deviations above their mean that make a spike.
    """
    if len(losses) < window or not math.isfinite(loss):
        return None
    last = losses[-window:]
    mean = math.fsum(last) / window
    deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in last) / window)
    deviation = max(deviation, _LEAST_DEVIATION * abs(mean))
    return Spike(step, loss, mean, deviation) if loss - mean > threshold * deviation else None


@dataclasses.dataclass(frozen=True)
class Rollback:
    """A spike and what was done about it.

    Attributes:
      spike: it.
      checkpoint: step that the run went back to; 0 is its beginning.
      passed_over: first and last step whose batches are not learned from.
    """

    spike: Spike
    checkpoint: int
    passed_over: tuple[int, int]

    def __str__(self) -> str:
        first, last = self.passed_over
        back = f"checkpoint {self.checkpoint}" if self.checkpoint else "the beginning"
        which = f"the batch of step {first}" if first == last else f"the batches of steps {first} to {last}"
        return f"{self.spike}: going back to {back} and passing over {which}"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Rollback:
        """Back from what `dataclasses.asdict` made of it, through JSON."""
        first, last = values["passed_over"]
        return cls(Spike(**values["spike"]), values["checkpoint"], (first, last))


def passed_over(rollbacks: Sequence[Rollback]) -> dict[int, Spike]:
    """Steps, counted from 1, whose batches are not learned from, and the spike that is the reason."""
    return {step: one.spike for one in rollbacks for step in range(one.passed_over[0], one.passed_over[1] + 1)}
