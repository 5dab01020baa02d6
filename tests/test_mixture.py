"""Weights say how often epochs show dialogues: exactly over any run of epochs, anew in each, the same for a seed."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax.config import Data
from ssl_jax.data.mixture import Mixture, describe_weights, dialogue_weights

# Binary fractions, so that their multiples are exact.
WEIGHTS = st.integers(1, 300).map(lambda number: number / 64)


def times_shown(mixture, epochs, number):
    """How often some epochs together show each of so many dialogues."""
    return np.sum([np.bincount(mixture.shown(epoch), minlength=number) for epoch in epochs], axis=0)


def near(count, share):
    """The share or, where it is no whole number, one of its neighbours."""
    return math.floor(share) <= count <= math.ceil(share)


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(WEIGHTS, min_size=1, max_size=12),
    seed=st.integers(0, 2**31 - 1),
    first=st.integers(0, 1000),
    epochs=st.integers(1, 40),
)
def test_any_run_of_epochs_shows_every_dialogue_its_share_and_dialogues_of_a_weight_theirs(
    weights, seed, first, epochs
):
    counts = times_shown(Mixture(np.array(weights), seed), range(first, first + epochs), len(weights))
    assert all(near(count, epochs * Fraction(weight)) for count, weight in zip(counts, weights, strict=True))
    for weight in set(weights):
        members = [number for number, other in enumerate(weights) if other == weight]
        assert near(counts[members].sum(), epochs * len(members) * Fraction(weight))


@pytest.mark.parametrize(("weight", "epochs"), [(0.1, 10), (2.5, 2), (0.3, 10), (1.75, 4)])
def test_the_epochs_of_a_cycle_show_every_dialogue_equally_often(weight, epochs):
    """The epochs share the rest of the weight out among themselves, in another way in each: 0.1 is ten tenths."""
    mixture = Mixture(np.full(1000, weight), 0)
    assert np.all(times_shown(mixture, range(epochs), 1000) == round(weight * epochs))
    extra = [times_shown(mixture, [epoch], 1000) > math.floor(weight) for epoch in range(epochs)]
    assert all(members.sum() == round(1000 * (weight % 1)) for members in extra)
    assert not any(np.array_equal(one, other) for one, other in itertools.pairwise(extra))


def test_an_epoch_is_a_function_of_seed_and_number():
    weights = np.full(100, 0.5)
    assert np.array_equal(Mixture(weights, 3).shown(7), Mixture(weights, 3).shown(7))
    assert not np.array_equal(Mixture(weights, 3).shown(7), Mixture(weights, 4).shown(7))


def test_over_seeds_an_epoch_shows_every_dialogue_with_the_same_probability():
    """Neighbours in the data are not chosen together: with 400 seeds the standard deviation of a count is 9."""
    counts = np.sum([times_shown(Mixture(np.full(20, 0.3), seed), [0], 20) for seed in range(400)], axis=0)
    assert np.all(np.abs(counts - 120) < 45)
    both = sum(set(Mixture(np.full(20, 0.3), seed).shown(0).tolist()) >= {4, 5} for seed in range(400))
    assert abs(both - 400 * 6 / 20 * 5 / 19) < 20


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_without_a_meaning_is_refused(weight):
    with pytest.raises(ValueError, match="above 0"):
        Mixture(np.array([1.0, weight]), 0)


# Sources --------------------------------------------------------------------------------------------------------------


class Stored:
    """Prepared data that know the source of each record, or that must not be asked."""

    def __init__(self, **numbers):
        self._numbers = numbers

    def source_numbers(self, split):
        return np.array(self._numbers[split], np.int32)


def data(labeled, unlabeled=()):
    return Data.model_validate(
        {
            "labeled": [{"path": f"l{n}.jsonl", "weight": weight} for n, weight in enumerate(labeled)],
            "unlabeled": [{"path": f"u{n}.jsonl", "weight": weight} for n, weight in enumerate(unlabeled)],
        }
    )


def test_every_record_has_the_weight_of_its_source_unlabeled_ones_counted_on():
    stored: Any = Stored(labeled_train=[0, 1, 1, 0], raw_train=[2, 3, 3], prompt_train=[2, 2])
    mixed = data([1, 2.5], [1, 0.1])
    labeled, raw = (dialogue_weights(mixed, stored, split) for split in ("labeled_train", "raw_train"))
    assert labeled is not None and labeled.tolist() == [1, 2.5, 2.5, 1]
    assert raw is not None and raw.tolist() == [1, 0.1, 0.1]
    assert dialogue_weights(mixed, stored, "prompt_train") is None, "all of them once: the stream as it is without"


def test_data_without_weights_are_not_asked_for_sources():
    stored: Any = Stored()
    assert dialogue_weights(data([1, 1.0], [1]), stored, "labeled_train") is None


def test_sources_with_a_weight_are_named():
    assert describe_weights(data([1, 2.5], [1, 0.1])) == "l1.jsonl × 2.5, u1.jsonl × 0.1"
    assert describe_weights(data([1], [1])) == ""


@pytest.mark.parametrize("weight", [0, -1, 0.0005, 1001, float("nan")])
def test_a_weight_of_a_source_is_between_a_thousandth_and_a_thousand(weight):
    """With smaller ones a small source would be looked for through millions of empty epochs."""
    with pytest.raises(ValueError, match="weight"):
        data([weight])
