"""The bootstrap of sums over units: dialogues, or runs of a system with different seeds.

Every metric that is compared between systems is a function of sums over dialogues, so a resample is no more than the
number of times that each dialogue was drawn, and all resamples are one product of matrices.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Resamples drawn at a time; bounds memory at this many counts per unit.
_CHUNK = 500


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A value measured on the whole test set and its 95 % percentile interval over resampled dialogues."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Array | np.float64, samples: Array) -> Interval:
        """The interval that holds the middle 95 % of the resampled values, float64[num_samples]."""
        low, high = np.quantile(samples, [0.025, 0.975])
        return cls(float(value), float(low), float(high))


def columns(*arrays: ArrayLike) -> Array:
    """Stacks K arrays with one number per dialogue to float64[D, K].

    Raises:
      ValueError: lengths differ, or no dialogues.
    """
    stacked = [np.asarray(array, np.float64) for array in arrays]
    shapes = {array.shape for array in stacked}
    if len(shapes) > 1 or stacked[0].ndim != 1 or not stacked[0].size:
        raise ValueError(f"a bootstrap needs one number per dialogue in every array, got shapes {sorted(shapes)}")
    return np.stack(stacked, axis=1)


def resampled_sums(columns_DK: Array, num_samples: int, seed: int) -> Array:
    """Sums of the columns over dialogues drawn with replacement: float64[num_samples, K]."""
    rng = np.random.default_rng(seed)
    starts = range(0, num_samples, _CHUNK)
    sizes = [min(_CHUNK, num_samples - start) for start in starts]
    return np.concatenate([_counts(rng, len(columns_DK), size) @ columns_DK for size in sizes])


def resampled_weights(num_units: int, num_samples: int, rng: np.random.Generator) -> Array:
    """Weights of the units in the mean over as many, drawn with replacement: float64[num_samples, num_units]."""
    return _counts(rng, num_units, num_samples) / num_units


def _counts(rng: np.random.Generator, num_units: int, num_samples: int) -> NDArray[np.int64]:
    """How often each unit is drawn when as many are drawn as there are."""
    return rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=num_samples)
