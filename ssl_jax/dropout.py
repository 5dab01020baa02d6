"""Dropout from few random bits (Srivastava et al. 2014)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def keep_factors(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Factors on what is dropped out: 0 with probability `rate`, rounded to 1/256, and 1/kept else; float32 `shape`.

    One random byte decides each: a quarter of the bits that `jax.random.bernoulli` takes, and these are the cost.
    """
    dropped = round(rate * 256)
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 4)), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*shape[:-1], -1)[..., : shape[-1]]
    return jnp.where(draws >= dropped, 256.0 / (256 - dropped), 0.0)
