"""Cross-entropy with soft labels is what anybody would write down, value and gradient, for every rule and any chunk."""

import functools
import itertools
import typing
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax import distillation, losses
from ssl_jax.config.methods import Weighting

# About the median of the confidences below, so that thresholds and Gaussians divide the tokens.
CONFIDENCE = distillation.Confidence(jnp.float32(0.45), jnp.float32(0.04))
THRESHOLD = 0.45
WEIGHTINGS = typing.get_args(Weighting)


def problem(rows=2, length=7, vocab_size=9, padding=1, teachers=1, width=4, seed=0) -> Any:
    """Arrays in the order of the arguments; every teacher has a width and a padding of its own."""
    rng = np.random.default_rng(seed)

    def model(width, padding):
        hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
        return hidden, rng.normal(size=(vocab_size + padding, width)).astype(np.float32)

    def weights():
        return rng.uniform(0, 2, (rows, length)).astype(np.float32) * (rng.random((rows, length)) < 0.8)

    targets = rng.integers(0, vocab_size, (rows, length)).astype(np.int32)
    taught_by = tuple(model(width + number, number * 2) for number in range(teachers))
    return (*model(width, padding), targets, weights(), taught_by, weights())


def numpy_log_softmax(hidden, embedding, vocab_size, temperature=1.0):
    logits = hidden.astype(np.float64) @ embedding[:vocab_size].astype(np.float64).T / temperature
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def numpy_outputs(arrays, rule, confidence, vocab_size):
    """Float64, all logits at once, the padded vocabulary simply cut off."""
    hidden, embedding, targets, _, teachers, _ = arrays
    log_p = numpy_log_softmax(hidden, embedding, vocab_size)
    taught = [
        np.exp(numpy_log_softmax(*teacher, vocab_size=vocab_size, temperature=rule.temperature)) for teacher in teachers
    ]
    q = np.mean(taught, axis=0)
    highest = q.max(axis=-1)
    entropies = [-np.sum(p * np.log(p), axis=-1) for p in (q, *taught)]
    mean, variance = float(confidence.mean), float(confidence.variance)
    token_weight = {
        "none": lambda: np.ones_like(highest),
        "agreement": lambda: 1 - (entropies[0] - np.mean(entropies[1:], axis=0)) / np.log(len(teachers)),
        "fixmatch": lambda: (highest >= rule.threshold) * 1.0,
        "freematch": lambda: (highest >= mean) * 1.0,
        "softmatch": lambda: np.where(highest < mean, np.exp(-4 * (highest - mean) ** 2 / (2 * variance)), 1.0),
    }[rule.weighting]()
    if rule.hard:
        kl = -np.take_along_axis(log_p, q.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    else:
        kl = np.sum(q * (np.log(q) - log_p), axis=-1)
    nll = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    outputs: Any = (nll, kl, token_weight, highest)
    return distillation.Outputs(*outputs)


@functools.partial(jax.jit, static_argnums=5)
@functools.partial(jax.grad, argnums=(0, 1))
def naive_gradients(hidden, embedding, arrays, soft_label, token_weight, vocab_size):
    """Differentiable, with the soft labels and what the tokens count given; the labels' entropy is left out."""
    _, _, targets, weights, _, soft_weights = arrays
    log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding[:vocab_size]))
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * nll) - jnp.sum((soft_weights * token_weight)[..., None] * soft_label * log_p)


def fused(rule, vocab_size, chunk_tokens=6, scale=1.0, confidence=CONFIDENCE):
    """Value, outputs and both gradients, compiled with chunks of about `chunk_tokens`."""

    def loss(*arrays):
        total, outputs = distillation.weighted_cross_entropy(
            *arrays, rule=rule, confidence=confidence, vocab_size=vocab_size
        )
        return total * scale, outputs

    def run(*arrays):
        with mock.patch.object(losses, "CHUNK_TOKENS", chunk_tokens):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)

    return run


def check(arrays, rule, vocab_size, chunk_tokens, scale=1.0):
    """Everything equals the float64 computation."""
    hidden, embedding, _, weights, teachers, soft_weights = arrays
    (loss, outputs), gradients = fused(rule, vocab_size, chunk_tokens, scale)(*arrays)

    expected = numpy_outputs(arrays, rule, CONFIDENCE, vocab_size)
    for name in distillation.Outputs._fields:
        actual = getattr(outputs, name)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, getattr(expected, name), rtol=1e-5, atol=1e-5, err_msg=name)
    total = np.sum(weights * expected.nll) + np.sum(soft_weights * expected.token_weight * expected.divergence)
    np.testing.assert_allclose(loss, scale * total, rtol=1e-5, atol=1e-5)

    soft_label = np.mean(
        [
            np.exp(numpy_log_softmax(*teacher, vocab_size=vocab_size, temperature=rule.temperature))
            for teacher in teachers
        ],
        axis=0,
    )
    if rule.hard:
        soft_label = np.eye(vocab_size)[soft_label.argmax(axis=-1)]
    expected_gradients = naive_gradients(
        hidden, embedding, arrays, *(np.asarray(x, np.float32) for x in (soft_label, expected.token_weight)), vocab_size
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, scale * expected_gradient, rtol=1e-4, atol=1e-5)
    # Padding of the vocabulary is outside of the model, whatever its rows hold.
    assert not np.any(np.asarray(gradients[1])[vocab_size:])
    return expected.token_weight


def rules():
    """Every weighting, kind of label, temperature and number of teachers; by default a quarter, spread evenly."""
    pairs = [pair for pair in itertools.product((1, 2, 3), WEIGHTINGS) if pair != (1, "agreement")]
    kinds = list(itertools.product((False, True), (1.0, 0.4)))
    for (number, (teachers, weighting)), (kind, (hard, temperature)) in itertools.product(
        enumerate(pairs), enumerate(kinds)
    ):
        rule = distillation.Rule(weighting, THRESHOLD, hard, temperature)
        yield pytest.param(teachers, rule, marks=() if number % len(kinds) == kind else pytest.mark.exhaustive)


@pytest.mark.parametrize(("teachers", "rule"), list(rules()))
def test_value_outputs_and_gradients_equal_the_naive_loss_for_every_rule(teachers, rule):
    token_weight = check(problem(teachers=teachers), rule, 9, chunk_tokens=6)
    assert rule.weighting == "none" or token_weight.min() < token_weight.max()


@settings(max_examples=5, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 13),
    width=st.integers(1, 5),
    vocab_size=st.integers(1, 11),
    padding=st.integers(0, 4),
    chunk_tokens=st.integers(1, 45),
    scale=st.sampled_from([1.0, -3.5]),
    teachers=st.integers(1, 3),
)
def test_value_outputs_and_gradients_equal_the_naive_loss_for_any_shape_and_chunk(
    rows, length, width, vocab_size, padding, chunk_tokens, scale, teachers
):
    arrays = problem(rows, length, vocab_size, padding, teachers, width)
    rule = distillation.Rule("agreement" if teachers > 1 else "softmatch", temperature=2.0)
    check(arrays, rule, vocab_size, chunk_tokens, scale)


@pytest.mark.parametrize("teachers", [1, 2])
def test_without_soft_weights_it_is_the_plain_cross_entropy(teachers):
    hidden, embedding, targets, weights, taught_by, soft_weights = problem(teachers=teachers)
    (loss, outputs), gradients = fused(distillation.Rule(), 9)(
        hidden, embedding, targets, weights, taught_by, 0 * soft_weights
    )

    def plain(hidden, embedding):
        return losses.weighted_cross_entropy(hidden, embedding, targets, weights, 9)

    with mock.patch.object(losses, "CHUNK_TOKENS", 6):
        (expected, nll), expected_gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(
            hidden, embedding
        )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(outputs.nll, nll, rtol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


def test_a_student_that_equals_its_teacher_has_neither_divergence_nor_gradient():
    hidden, embedding, targets, weights, _, soft_weights = problem()
    (loss, outputs), gradients = fused(distillation.Rule(), 9)(
        hidden, embedding, targets, 0 * weights, ((hidden, embedding),), soft_weights
    )
    assert loss == 0 and not np.any(outputs.divergence)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_teachers_get_no_gradient_and_outputs_carry_none():
    hidden, embedding, targets, weights, teachers, soft_weights = jax.tree.map(jnp.asarray, problem(teachers=2))
    rule = distillation.Rule("agreement")

    def loss(hidden, teachers, factor):
        total, outputs = distillation.weighted_cross_entropy(
            hidden, embedding, targets, weights, teachers, soft_weights, rule, CONFIDENCE, 9
        )
        return total + factor * sum(map(jnp.sum, outputs))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    hidden_grad, teachers_grad = gradients(hidden, teachers, 100.0)
    assert np.any(np.asarray(hidden_grad)) and not any(map(np.any, jax.tree.leaves(teachers_grad)))
    np.testing.assert_array_equal(hidden_grad, gradients(hidden, teachers, 0.0)[0])


@pytest.mark.parametrize("hard", [False, True])
def test_padded_vocabulary_teaches_nothing_even_with_huge_embeddings(hard):
    """Neither the student's padding nor a teacher's, which is of another size."""
    hidden, embedding, targets, weights, ((taught, table), (others, other_table)), soft_weights = problem(
        teachers=2, padding=3
    )
    huge = [np.full((padding, 4 + padding), 1000.0, np.float32) for padding in (0, 1)]
    teachers = ((taught, np.concatenate([table, huge[0]])), (others, np.concatenate([other_table[:9], huge[1]])))
    embedding[9:] = 1000.0
    arrays = (hidden, embedding, targets, weights, teachers, soft_weights)
    check(arrays, distillation.Rule("agreement", hard=hard), 9, chunk_tokens=6)


def test_teachers_that_agree_count_fully_and_disjoint_ones_not_at_all():
    """The first place has equal teachers, the second ones sure of different tokens."""
    hidden, embedding, targets, weights, _, soft_weights = problem(rows=1, length=2, padding=0)
    sure = 100 * np.eye(9, dtype=np.float32)
    places = np.arange(2)
    teachers = tuple((np.eye(9, dtype=np.float32)[None, number * places], sure) for number in range(3))
    (_, outputs), _ = fused(distillation.Rule("agreement"), 9)(
        hidden, embedding, targets, weights, teachers, soft_weights
    )
    np.testing.assert_allclose(outputs.token_weight, [[1.0, 0.0]], atol=1e-6)


def test_labels_of_no_probability_left_are_no_nan():
    """Float32 has no number for the probability of a token that is 200 nats behind."""
    hidden, embedding, targets, weights, _, soft_weights = problem(rows=1, length=2, padding=2)
    surest = np.eye(9, dtype=np.float32)[None, :2]
    teachers = ((surest, 200 * np.eye(9, dtype=np.float32)), (surest, 300 * np.eye(9, dtype=np.float32)))
    (loss, outputs), gradients = fused(distillation.Rule("agreement"), 9)(
        hidden, embedding, targets, weights, teachers, soft_weights
    )
    for array in jax.tree.leaves((loss, outputs, gradients)):
        assert np.all(np.isfinite(array))


def test_softmatch_without_variance_takes_what_reaches_the_mean():
    arrays = problem()
    _, highest = numpy_outputs(arrays, distillation.Rule(), CONFIDENCE, 9)[2:]
    constant = distillation.Confidence(jnp.float32(np.median(highest) + 1e-4), jnp.float32(0.0))
    (_, outputs), _ = fused(distillation.Rule("softmatch"), 9, confidence=constant)(*arrays)
    np.testing.assert_array_equal(outputs.token_weight, highest > np.median(highest))


@pytest.mark.parametrize(("teachers", "weighting"), [(0, "none"), (1, "agreement")])
def test_too_few_teachers_are_refused(teachers, weighting):
    with pytest.raises(ValueError, match=f"{teachers} teachers"):
        fused(distillation.Rule(weighting), 9)(*problem(teachers=teachers))


def test_undifferentiated_value_is_the_differentiated_one():
    arrays = jax.tree.map(jnp.asarray, problem(teachers=2))
    rule = distillation.Rule("softmatch", temperature=0.7)
    with mock.patch.object(losses, "CHUNK_TOKENS", 6):
        loss, outputs = distillation.weighted_cross_entropy(*arrays, rule=rule, confidence=CONFIDENCE, vocab_size=9)
    (expected_loss, expected_outputs), _ = fused(rule, 9)(*arrays)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for output, expected in zip(outputs, expected_outputs, strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_states_have_bfloat16_gradients_and_float32_losses():
    hidden, embedding, targets, weights, teachers, soft_weights = problem(teachers=2)
    hidden, embedding, teachers = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (hidden, embedding, teachers))
    rule = distillation.Rule("agreement")
    (loss, outputs), gradients = fused(rule, 9)(hidden, embedding, targets, weights, teachers, soft_weights)
    assert loss.dtype == jnp.float32
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype(jnp.bfloat16)}
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), (hidden, embedding, teachers))
    expected = numpy_outputs((*rounded[:2], targets, weights, rounded[2], soft_weights), rule, CONFIDENCE, 9)
    for output, expected_output in zip(outputs, expected, strict=True):
        assert output.dtype == jnp.float32
        np.testing.assert_allclose(output, expected_output, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), taught=st.integers(2, 12), decay=st.sampled_from([0.0, 0.9, 0.999]))
def test_running_statistics_are_moving_averages_over_taught_tokens_of_all_micro_batches(seed, taught, decay):
    rng = np.random.default_rng(seed)
    values = rng.random((2, 2, 3)).astype(np.float32)
    weights = np.zeros(12, np.float32)
    weights[rng.permutation(12)[:taught]] = rng.uniform(0.1, 2, taught)
    weights = weights.reshape(values.shape)
    before = distillation.Confidence(jnp.float32(0.3), jnp.float32(0.5))

    parts = [distillation.statistics(*map(jnp.asarray, pair)) for pair in zip(values, weights, strict=True)]
    after = distillation.updated(before, decay, jax.tree.map(jnp.add, *parts))

    chosen = values[weights > 0].astype(np.float64)
    np.testing.assert_allclose(after.mean, decay * 0.3 + (1 - decay) * chosen.mean(), rtol=1e-5)
    np.testing.assert_allclose(after.variance, decay * 0.5 + (1 - decay) * chosen.var(ddof=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("taught", "mean", "variance"), [(0, 1 / 8, 1.0), (1, 0.5 * (1 / 8) + 0.5 * 0.75, 1.0)])
def test_running_statistics_stay_where_a_batch_says_nothing(taught, mean, variance):
    """No token has no mean, and a single one no variance."""
    weights = jnp.asarray([[1.0, 0.0]]) * taught
    sums = distillation.statistics(jnp.asarray([[0.75, 0.2]]), weights)
    after = distillation.updated(distillation.initial_confidence(8), 0.5, sums)
    assert (float(after.mean), float(after.variance)) == (mean, variance)
