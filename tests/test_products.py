"""Products with 8-bit weights: their arithmetic, and a model whose weights are such."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import model, products, sampling

RNG = np.random.default_rng(0)
SHAPE = model.GPT2(61, 64, 40, 32, 2, 4, 64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.fixture(scope="module")
def params() -> model.Params:
    return model.init(SHAPE, jax.random.key(0))


def random_matrix(*shape: int) -> np.ndarray:
    return (RNG.normal(size=shape) * RNG.lognormal(0, 2, (shape[0], 1))).astype(np.float32)


def test_every_value_is_within_half_a_step_of_its_outputs_scale():
    matrix = random_matrix(40, 33)
    rounded = products.Int8.of(jnp.asarray(matrix))
    values, scales = np.asarray(rounded.values_OI), np.asarray(rounded.scales_O)
    np.testing.assert_allclose(scales, np.abs(matrix).max(axis=1) / 127, rtol=1e-6)
    assert (np.abs(values * scales[:, None] - matrix) <= 0.5001 * scales[:, None]).all()
    assert np.abs(values).max(axis=1).tolist() == [127] * 40
    np.testing.assert_allclose(
        rounded.rows(jnp.array([[3], [7]]), jnp.float32)[:, 0], (values * scales[:, None])[[3, 7]]
    )


def test_a_matrix_with_a_row_of_zeros_stays_finite():
    rounded = products.Int8.of(jnp.zeros((3, 4)))
    assert np.asarray(products.matmul(jnp.zeros((2, 4)), rounded)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_products_are_those_of_the_rounded_factors(rows):
    """In integers, which NumPy computes exactly."""
    matrix, x = random_matrix(50, 37), random_matrix(rows, 37)
    step = np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
    kernel = products.Int8.of(jnp.asarray(matrix))
    sums = np.round(x / step).astype(np.int64) @ np.asarray(kernel.values_OI, np.int64).T
    expected = sums * step.astype(np.float64) * np.asarray(kernel.scales_O, np.float64)
    np.testing.assert_allclose(jax.jit(products.matmul)(x, kernel), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_row_gives_what_it_gives_among_others(dtype):
    x, kernel = jnp.asarray(random_matrix(4, 16), dtype), jnp.asarray(random_matrix(16, 24), dtype)
    alone = products.matmul(x[:1], kernel).astype(jnp.float32)
    assert alone.shape == (1, 24)
    among = products.matmul(x, kernel)[:1].astype(jnp.float32)
    np.testing.assert_allclose(alone, among, rtol=1e-5 if dtype == "float32" else 0.02, atol=1e-4)


def test_padding_of_the_vocabulary_gets_no_probability():
    hidden, embedding = jnp.asarray(random_matrix(3, 8)), jnp.asarray(random_matrix(16, 8))
    for table in (embedding, products.Int8.of(embedding)):
        logits = np.asarray(products.logits(hidden, table, 13))
        assert np.isneginf(logits[:, 13:]).all() and np.isfinite(logits[:, :13]).all()


def test_a_model_with_shorter_weights_predicts_nearly_the_same(params):
    tokens = jnp.asarray(RNG.integers(0, 61, (3, 40)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(40)[None], (3, 40))

    def log_probs(shape, params) -> Any:
        hidden = jax.jit(model.forward, static_argnums=0)(shape, params, tokens, positions, jnp.ones_like(tokens))
        return jax.nn.log_softmax(model.logits(shape, params, hidden.reshape(-1, 32))[:, :61])

    exact = log_probs(SHAPE, params)
    for shape, shorter in (model.with_weights(SHAPE, params, "int8"), model.with_weights(SHAPE, params, "bfloat16")):
        divergence = jnp.sum(jnp.exp(exact) * (exact - log_probs(shape, shorter)), axis=1)
        assert 0 < float(divergence.max()) < 1e-3
    assert model.with_weights(SHAPE, params, "auto") == (SHAPE, params)


def test_eight_bit_weights_take_a_quarter_of_the_memory(params):
    def size(params) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves({**params, "wpe": None}))

    _, shorter = model.with_weights(SHAPE, params, "int8")
    assert size(shorter) < 0.36 * size(params)  # at this width norms, biases and scales count


def test_the_cache_continues_what_the_forward_pass_of_8_bit_weights_says(params):
    """Greedy replies equal the likeliest tokens of a whole pass."""
    shape, layers = model.with_weights(SHAPE, params, "int8")
    prompts = jnp.asarray(RNG.integers(0, 61, (2, 9)), jnp.int32)
    options = sampling.Options(max_new_tokens=6, do_sample=False)
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = jax.jit(sampling.sample, static_argnums=(0, 1))(shape, options, layers, prompts, jnp.array([9, 9]), keys)
    texts = jnp.concatenate([prompts, drawn.tokens], axis=1)
    positions = jnp.broadcast_to(jnp.arange(texts.shape[1])[None], texts.shape)
    hidden = jax.jit(model.forward, static_argnums=0)(shape, layers, texts, positions, jnp.ones_like(texts))
    likeliest = jnp.argmax(model.logits(shape, layers, hidden[:, 8:-1].reshape(-1, 32)), axis=1)
    assert np.array_equal(np.asarray(drawn.tokens).reshape(-1), likeliest)
