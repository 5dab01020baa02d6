"""R-Drop's divergence is the one of the paper, value and gradients, whatever the chunks."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax import divergence, losses


def problem(rows, length, width, padded_vocab_size, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(rows, length, width)).astype(np.float32),
        rng.normal(size=(rows, length, width)).astype(np.float32),
        rng.normal(size=(padded_vocab_size, width)).astype(np.float32),
        rng.uniform(0, 2, (rows, length)).astype(np.float32) * (rng.random((rows, length)) < 0.8),
    )


def numpy_divergence(first, second, embedding, vocab_size):
    """Float64, all logits at once, the padded vocabulary simply cut off."""
    logits = [hidden.astype(np.float64) @ embedding[:vocab_size].astype(np.float64).T for hidden in (first, second)]
    exponentials = [np.exp(part - part.max(axis=-1, keepdims=True)) for part in logits]
    p, q = (part / part.sum(axis=-1, keepdims=True) for part in exponentials)
    return 0.5 * (np.sum(p * np.log(p / q), axis=-1) + np.sum(q * np.log(q / p), axis=-1))


def naive_loss(first, second, embedding, weights, vocab_size):
    log_p, log_q = (
        jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding[:vocab_size])) for hidden in (first, second)
    )
    to_second = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    to_first = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    return jnp.sum(weights * 0.5 * (to_second + to_first))


def fused(vocab_size, chunk_tokens, scale=1.0):
    """Value, divergences and the three gradients, compiled with chunks of about `chunk_tokens`."""

    def loss(first, second, embedding, weights):
        total, per_token = divergence.symmetric(first, second, embedding, weights, vocab_size)
        return total * scale, per_token

    def run(*arrays):
        with mock.patch.object(losses, "CHUNK_TOKENS", chunk_tokens):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    return run


@settings(max_examples=5, deadline=None)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 13),
    width=st.integers(1, 5),
    vocab_size=st.integers(1, 11),
    padding=st.integers(0, 4),
    chunk_tokens=st.integers(1, 45),
    scale=st.sampled_from([1.0, -3.5]),
)
def test_value_and_gradients_equal_the_naive_loss_for_any_shape_and_chunk(
    rows, length, width, vocab_size, padding, chunk_tokens, scale
):
    arrays = problem(rows, length, width, vocab_size + padding)
    first, second, embedding, weights = arrays
    (loss, per_token), gradients = fused(vocab_size, chunk_tokens, scale)(*arrays)

    expected_per_token = numpy_divergence(first, second, embedding, vocab_size)
    np.testing.assert_allclose(per_token, expected_per_token, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, scale * np.sum(expected_per_token * weights), rtol=1e-5, atol=1e-5)

    expected = jax.jit(jax.grad(naive_loss, argnums=(0, 1, 2)), static_argnums=4)(*arrays, vocab_size)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, scale * expected_gradient, rtol=1e-4, atol=1e-4)
    # Padding of the vocabulary is outside of the model, whatever its rows hold.
    assert not np.any(np.asarray(gradients[2])[vocab_size:])


def test_equal_passes_have_neither_divergence_nor_gradient():
    first, _, embedding, weights = problem(2, 9, 4, 8)
    (loss, per_token), gradients = fused(7, 6)(first, first, embedding, weights)
    assert loss == 0 and not np.any(per_token)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_order_of_the_passes_does_not_matter():
    first, second, embedding, weights = problem(2, 9, 4, 8)
    (loss, per_token), gradients = fused(7, 6)(first, second, embedding, weights)
    (other_loss, other_per_token), other_gradients = fused(7, 6)(second, first, embedding, weights)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    np.testing.assert_allclose(per_token, other_per_token, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[0], other_gradients[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], other_gradients[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[2], other_gradients[2], rtol=1e-5, atol=1e-5)


def test_undifferentiated_value_is_the_differentiated_one():
    arrays = problem(2, 9, 4, 8)
    first, second, embedding, weights = map(jnp.asarray, arrays)
    with mock.patch.object(losses, "CHUNK_TOKENS", 6):
        loss, per_token = divergence.symmetric(first, second, embedding, weights, 7)
    (expected_loss, expected_per_token), _ = fused(7, 6)(*arrays)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(per_token, expected_per_token, rtol=1e-5, atol=1e-6)


def test_per_token_divergences_carry_no_gradient():
    first, second, embedding, weights = map(jnp.asarray, problem(2, 6, 4, 7))

    def loss(first, factor):
        total, per_token = divergence.symmetric(first, second, embedding, weights, 7)
        return total + factor * jnp.sum(per_token)

    with_outputs = jax.grad(loss)(first, 100.0)
    np.testing.assert_array_equal(with_outputs, jax.grad(loss)(first, 0.0))
    assert np.any(np.asarray(with_outputs))


def test_bfloat16_passes_have_bfloat16_gradients_and_a_float32_loss():
    first, second, embedding, weights = problem(2, 5, 4, 8)
    half = [jnp.asarray(array, jnp.bfloat16) for array in (first, second, embedding)]
    (loss, per_token), gradients = fused(7, 4)(*half, weights)
    assert (loss.dtype, per_token.dtype) == (jnp.float32, jnp.float32)
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype(jnp.bfloat16)}
    rounded = [np.asarray(array, np.float32) for array in half]
    np.testing.assert_allclose(per_token, numpy_divergence(*rounded, vocab_size=7), rtol=1e-4, atol=1e-4)
