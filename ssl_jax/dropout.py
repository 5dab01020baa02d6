"""Dropout from few random bits (Srivastava et al. 2014), the same for a row whatever it is computed with."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def row_keys(key: jax.Array, numbers_B: jax.Array) -> jax.Array:
    """A PRNG key for every row, `[B]`, by the row's number.

    What a row draws depends neither on the rows beside it nor on the device: a batch may be cut over devices, hosts and
    micro-batches in any way.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers_B)


def keep_factors(key: jax.Array, numbers_B: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """Factors on what is dropped out: 0 with probability `rate`, rounded to 1/256, and 1/kept else; float32 `shape`.

    One random byte decides each: a quarter of the bits that `jax.random.bernoulli` takes, and these are the cost.

    Args:
      key: PRNG key.
      numbers_B: int32, of the rows, see `row_keys`.
      shape: its first axis is that of the rows.
      rate: see above.
    """
    dropped = round(rate * 256)
    words = (*shape[1:-1], -(-shape[-1] // 4))
    bits = jax.vmap(lambda key: jax.random.bits(key, words, jnp.uint32))(row_keys(key, numbers_B))
    draws = jax.lax.bitcast_convert_type(bits, jnp.uint8).reshape(*shape[:-1], -1)[..., : shape[-1]]
    return jnp.where(draws >= dropped, 256.0 / (256 - dropped), 0.0)
