"""Weighted mixtures: how often an epoch of a stream shows every dialogue.

A weight is a rate, not a probability. A dialogue of weight w that began its cycle at u has been shown floor(e w + u)
times before epoch e: every run of k epochs shows it floor(k w) or ceil(k w) times, and nothing is remembered between
epochs. The u of dialogues of equal weight are evenly spaced in random order (systematic sampling, Madow and Madow
1944), so that a run of k epochs also shows N of them floor(k N w) or ceil(k N w) times in all (Hermite's identity).

Axes: N dialogues of a split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data.packaged import ResolvedSource

if TYPE_CHECKING:
    from ssl_jax.data.store import Prepared


class Mixture:
    """Which dialogues each epoch shows, and how often.

    Args:
      weights: how many times an epoch shows each dialogue on average, `[N]`, above 0.
      seed: decides, with the epoch, which dialogues get what is left of a weight that is no whole number.
    """

    def __init__(self, weights: np.ndarray, seed: int):
        self._weights = np.asarray(weights, np.float64)
        if not np.all((self._weights > 0) & np.isfinite(self._weights)):
            raise ValueError("weights of dialogues are finite and above 0")
        # A spawn key keeps these draws apart from those of the epochs, which are seeded with (seed, epoch).
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        _, group, counts = np.unique(self._weights, return_inverse=True, return_counts=True)
        order = rng.permutation(len(group))
        order = order[np.argsort(group[order], kind="stable")]
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = np.repeat(rng.random(len(counts)), counts)
        self._offsets = np.empty(len(order))
        self._offsets[order] = (place + start) / np.repeat(counts, counts)

    def shown(self, epoch: int) -> np.ndarray:
        """int64: numbers of the dialogues that an epoch shows, ascending, each as often as the epoch shows it."""
        times = self._times_before(epoch + 1) - self._times_before(epoch)
        return np.repeat(np.arange(len(times)), times)

    def _times_before(self, epoch: int) -> np.ndarray:
        """int64[N]: how often the epochs before this one show each dialogue, up to the same constant for all epochs."""
        return np.floor(epoch * self._weights + self._offsets).astype(np.int64)


def dialogue_weights(data: Data, prepared: Prepared, split: str) -> np.ndarray | None:
    """float64[N]: the weight of every record's source (`Source.weight`), or None where all of them are 1."""
    by_source = np.array([source.weight for source in (*data.labeled, *data.unlabeled)])
    if np.all(by_source == 1):
        return None
    weights = by_source[prepared.source_numbers(split)]
    return None if np.all(weights == 1) else weights


def describe_weights(data: Data) -> str:
    """The sources whose weight is not 1, for people; empty where there are none."""
    sources = [ResolvedSource("labeled", source, ()) for source in data.labeled]
    sources += [ResolvedSource("unlabeled", source, ()) for source in data.unlabeled]
    return ", ".join(f"{one.name} × {one.source.weight:g}" for one in sources if one.source.weight != 1)
