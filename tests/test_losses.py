"""The fused loss is the cross-entropy that anybody would write down, value and gradient, whatever the chunks."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax import losses


def problem(rows, length, width, vocab_size, padded_vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(rows, length, width)).astype(np.float32),
        rng.normal(size=(padded_vocab_size, width)).astype(np.float32),
        rng.integers(0, vocab_size, (rows, length)).astype(np.int32),
        rng.uniform(0, 2, (rows, length)).astype(np.float32) * (rng.random((rows, length)) < 0.8),
    )


def numpy_nll(hidden, embedding, targets, vocab_size):
    """Float64, all logits at once, the padded vocabulary simply cut off."""
    logits = hidden.astype(np.float64) @ embedding[:vocab_size].astype(np.float64).T
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    return log_z - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def naive_loss(hidden, embedding, targets, weights, vocab_size):
    log_probs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, embedding[:vocab_size]))
    return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0] * weights)


def fused(vocab_size, chunk_tokens, scale=1.0):
    """Value, per-token losses and both gradients, compiled with chunks of about `chunk_tokens`."""

    def loss(hidden, embedding, targets, weights):
        total, nll = losses.weighted_cross_entropy(hidden, embedding, targets, weights, vocab_size)
        return total * scale, nll

    def run(*arrays):
        with mock.patch.object(losses, "CHUNK_TOKENS", chunk_tokens):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)

    return run


@settings(max_examples=10, deadline=None)
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
    arrays = problem(rows, length, width, vocab_size, vocab_size + padding)
    hidden, embedding, targets, weights = arrays
    (loss, nll), (hidden_grad, embedding_grad) = fused(vocab_size, chunk_tokens, scale)(*arrays)

    expected_nll = numpy_nll(hidden, embedding, targets, vocab_size)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, scale * np.sum(expected_nll * weights), rtol=1e-5, atol=1e-5)

    expected = jax.jit(jax.grad(naive_loss, argnums=(0, 1)), static_argnums=4)(*arrays, vocab_size)
    np.testing.assert_allclose(hidden_grad, scale * expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embedding_grad, scale * expected[1], rtol=1e-4, atol=1e-5)
    # Padding of the vocabulary is outside of the model, whatever its rows hold.
    assert not np.any(np.asarray(embedding_grad)[vocab_size:])


def test_undifferentiated_value_is_the_differentiated_one():
    arrays = problem(2, 9, 4, 7, 8)
    hidden, embedding, targets, weights = map(jnp.asarray, arrays)
    with mock.patch.object(losses, "CHUNK_TOKENS", 6):
        loss, nll = losses.weighted_cross_entropy(hidden, embedding, targets, weights, 7)
    (expected_loss, expected_nll), _ = fused(7, 6)(*arrays)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-6)


def test_padded_vocabulary_gets_no_probability_even_with_huge_embeddings():
    """Σ over the real tokens of exp(-nll) is one although a padding row would win by far."""
    hidden, embedding, _, _ = problem(1, 5, 4, 6, 8)
    embedding[6:] = 1000.0
    every_target = [
        losses.token_nll(jnp.asarray(hidden), jnp.asarray(embedding), jnp.full((1, 5), token), 6) for token in range(6)
    ]
    np.testing.assert_allclose(np.exp(-np.stack(every_target)).sum(axis=0), 1.0, rtol=1e-5)


def test_per_token_losses_carry_no_gradient():
    hidden, embedding, targets, weights = map(jnp.asarray, problem(2, 6, 4, 7, 7))

    def loss(hidden, factor):
        total, nll = losses.weighted_cross_entropy(hidden, embedding, targets, weights, 7)
        return total + factor * jnp.sum(nll)

    with_nll = jax.grad(loss)(hidden, 100.0)
    np.testing.assert_array_equal(with_nll, jax.grad(loss)(hidden, 0.0))
    assert np.any(np.asarray(with_nll))


def test_a_token_without_weight_has_no_gradient():
    hidden, embedding, targets, weights = problem(2, 7, 4, 9, 9)
    weights[:] = 1.0
    weights[1, 3] = 0.0
    _, (hidden_grad, _) = fused(9, 5)(hidden, embedding, targets, weights)
    touched = np.any(np.asarray(hidden_grad), axis=-1)
    assert not touched[1, 3] and touched.sum() == touched.size - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_have_the_types_of_their_arrays_and_losses_are_float32(dtype):
    hidden, embedding, targets, weights = problem(2, 5, 4, 7, 8)
    arrays = jnp.asarray(hidden, dtype), jnp.asarray(embedding, dtype), targets, weights
    (loss, nll), (hidden_grad, embedding_grad) = fused(7, 4)(*arrays)
    assert (loss.dtype, nll.dtype) == (jnp.float32, jnp.float32)
    assert (hidden_grad.dtype, embedding_grad.dtype) == (dtype, dtype)
    expected = numpy_nll(hidden, embedding, targets, 7)
    np.testing.assert_allclose(nll, expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.1)


@pytest.mark.parametrize(("rows", "length"), [(3, 7), (1, 1), (64, 5), (2, 1000)])
def test_no_chunk_is_much_larger_than_asked_and_all_cover_the_time_once(rows, length):
    """Memory is the reason for chunks: a chunk holds at most half again what was asked (or one place of all rows)."""
    times = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
    with mock.patch.object(losses, "CHUNK_TOKENS", 100):
        (cut,) = losses.chunks(times)
    assert cut.shape[1] == rows and cut.shape[1] * cut.shape[2] <= max(150, 2 * rows)
    np.testing.assert_array_equal(losses.unchunk(cut, length), times)
