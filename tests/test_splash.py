"""Splash attention is attention: forward and backward, on one device and on a mesh of TPUs that is not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import attention, splash

ROWS, HEADS, LENGTH, WIDTH = 2, 2, 256, 64


def packed_rows() -> tuple[list[jax.Array], jax.Array]:
    """Random queries, keys, values, weights of the outputs; segments cross the kernel's tiles, padding ends them."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(ROWS, HEADS, LENGTH, WIDTH)), jnp.float32) for _ in range(4)]
    ends = np.array([[30, 130, 200], [128, 129, 129]])
    ids = 1 + (np.arange(LENGTH)[None, None] >= ends[..., None]).sum(axis=1)
    return arrays, jnp.asarray(np.where(ids == 4, 0, ids), jnp.int32)


def results(attend, arrays, ids, scale):
    """Outputs, and the gradients of their weighted sum in queries, keys, values and the scale."""
    query, key, value, weights = arrays
    is_real = (ids > 0)[:, None, :, None]

    def total(query, key, value, scale):
        context = attend(query, key, value, ids, scale)
        return jnp.sum(jnp.where(is_real, context * weights, 0.0)), context

    (_, context), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(query, key, value, scale)
    return context, *gradients


def test_the_kernel_gives_the_values_and_gradients_of_all_scores_at_once():
    """Also for a scale that is traced, as that of a layer in a loop over layers is."""
    arrays, ids = packed_rows()
    scale = jnp.float32(WIDTH**-0.5 / 3)

    def kernel(query, key, value, ids, scale):
        return splash.attend(query * scale, key, value, ids, interpret=True)

    def at_once(query, key, value, ids, scale):
        return attention.attend(query, key, value, attention.segment_mask(ids), scale)

    found, expected = results(kernel, arrays, ids, scale), results(at_once, arrays, ids, scale)
    assert all(np.all(np.isfinite(array)) for array in found)
    is_real = np.asarray(ids > 0)[:, None, :, None]
    np.testing.assert_allclose(np.where(is_real, found[0], 0), np.where(is_real, expected[0], 0), rtol=2e-5, atol=2e-5)
    for one, other in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
