"""Each objective is a mean over its own tokens of the whole batch, times a weight that follows the formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax import objectives
from ssl_jax.config import Distillation, Objectives


def test_stream_numbers_point_at_their_objectives():
    pairs = {stream: objectives.NAMES[number] for stream, number in objectives.STREAM_IDS.items()}
    assert pairs == {
        "labeled": "supervised",
        "raw": "lm",
        "pseudo": "pseudo",
        "translated": "back_translation",
        "backward": "backward",
    }


@pytest.mark.parametrize(
    ("step", "elapsed"), [(0, 0.0), (40, 0.0), (41, 1 / 30), (55, 0.5), (69, 29 / 30), (70, 1.0), (100, 1.0)]
)
def test_weight_of_pseudo_labels_ramps_from_the_first_round(step, elapsed):
    settings = Objectives(supervised=2.0, lm=0.25, pseudo=0.5, pseudo_ramp=0.3, back_translation=0.25, backward=0.75)
    weights = objectives.weights(settings, jnp.int32(step), first_round=40, total_steps=100)
    ramp = math.exp(-5 * (1 - elapsed) ** 2)
    np.testing.assert_allclose(weights, [2.0, 0.25, 0.5 * ramp, 0.25 * ramp, 0.75], rtol=1e-6)
    assert weights.dtype == jnp.float32


def test_ramp_of_length_zero_is_over_after_one_step():
    settings = Objectives(pseudo=0.5, pseudo_ramp=0.0)
    weights = [objectives.weights(settings, jnp.int32(s), first_round=40, total_steps=100)[2] for s in (40, 41, 42)]
    np.testing.assert_allclose(weights, [0.5 * math.exp(-5), 0.5, 0.5])


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (50, 0.65), (100, 0.3)])
def test_weight_of_raw_text_goes_evenly_to_its_last_value(step, expected):
    weights = objectives.weights(Objectives(lm=1.0, lm_final=0.3), jnp.int32(step), first_round=40, total_steps=101)
    assert float(weights[1]) == pytest.approx(expected)


def test_weight_of_raw_text_in_a_run_of_one_step_is_its_first_value():
    weights = objectives.weights(Objectives(lm=1.0, lm_final=0.3), jnp.int32(0), first_round=0, total_steps=1)
    assert float(weights[1]) == 1.0


@pytest.mark.parametrize(("step", "elapsed"), [(0, 0.0), (10, 0.5), (20, 1.0), (90, 1.0)])
def test_weight_of_soft_labels_ramps_from_the_first_step(step, elapsed):
    weight = objectives.distillation_weight(Distillation(weight=2.0, ramp=0.2), jnp.int32(step), total_steps=100)
    assert float(weight) == pytest.approx(2.0 * math.exp(-5 * (1 - elapsed) ** 2))


def test_soft_labels_weigh_the_tokens_of_taught_streams_alone():
    loss_weights = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    factors, count = objectives.soft_weights(jnp.array([0, 1, 2]), loss_weights, (1, 2), jnp.float32(3.0))
    assert float(count) == 2.0
    np.testing.assert_allclose(factors, [[0, 0], [1.5, 0], [0.75, 0.75]])
    none, count = objectives.soft_weights(jnp.array([0, 0, 0]), loss_weights, (1, 2), jnp.float32(3.0))
    assert float(count) == 0.0 and not np.any(none)


@settings(max_examples=25, deadline=None)
@given(streams=st.lists(st.integers(0, 2), min_size=6, max_size=6), seed=st.integers(0, 1000))
def test_factors_turn_a_sum_into_weighted_means_of_each_objectives_tokens(streams, seed):
    rng = np.random.default_rng(seed)
    loss_weights = (rng.random((6, 5)) < 0.5) * rng.choice([1.0, 0.3], (6, 5))
    nll = rng.uniform(0, 9, (6, 5))
    objective_weights = rng.uniform(0, 2, len(objectives.NAMES))

    factors = objectives.token_weights(
        jnp.array(streams), jnp.asarray(loss_weights, jnp.float32), jnp.asarray(objective_weights, jnp.float32)
    )

    expected = 0.0
    for number, weight in enumerate(objective_weights):
        members = np.array(streams) == number
        count = loss_weights[members].sum()
        expected += weight * (nll[members] * loss_weights[members]).sum() / count if count else 0.0
    np.testing.assert_allclose(np.sum(np.asarray(factors) * nll), expected, rtol=1e-5, atol=1e-6)


def test_an_objective_without_tokens_contributes_nothing_and_is_finite():
    factors = objectives.token_weights(
        jnp.array([0, 2]), jnp.array([[1.0, 1.0], [0.0, 0.0]]), jnp.ones(len(objectives.NAMES))
    )
    assert factors.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_sums_belong_to_the_objective_of_their_row():
    sums = objectives.objective_sums(jnp.array([1, 0, 1]), jnp.array([[1.0, 2.0], [10.0, 20.0], [4.0, 8.0]]))
    assert sums.tolist() == [30.0, 15.0, 0.0, 0.0, 0.0]


def test_token_replacement_has_its_rate_and_leaves_padding_alone():
    tokens = jnp.full((200, 100), 7)
    segment_ids = jnp.tile(jnp.where(jnp.arange(100) < 80, 1, 0)[None], (200, 1))
    replaced = objectives.replace_tokens(jax.random.key(0), jnp.arange(200), tokens, segment_ids, 0.15, 50)
    changed = np.asarray(replaced) != 7
    assert not changed[:, 80:].any()
    # A drawn token is the old one in 1 of 50 cases; 16 000 draws have a standard deviation of 0.0028.
    assert abs(changed[:, :80].mean() - 0.15 * 49 / 50) < 0.012
    drawn = np.asarray(replaced)[changed]
    assert set(drawn.tolist()) == set(range(50)) - {7}
    assert replaced.dtype == tokens.dtype


def test_rate_zero_replaces_nothing_and_another_key_replaces_others():
    tokens, segment_ids = jnp.full((4, 50), 7), jnp.ones((4, 50), jnp.int32)
    assert objectives.replace_tokens(jax.random.key(0), jnp.arange(4), tokens, segment_ids, 0.0, 50) is tokens

    def replaced(seed, *numbers):
        rows = len(numbers)
        key = jax.random.key(seed)
        return np.asarray(
            objectives.replace_tokens(key, jnp.array(numbers), tokens[:rows], segment_ids[:rows], 0.5, 50)
        )

    assert np.any(replaced(0, 0, 1, 2, 3) != replaced(1, 0, 1, 2, 3))
    assert np.array_equal(replaced(0, 0, 1, 2, 3)[[3, 1]], replaced(0, 3, 1)), "a row draws by its number"
