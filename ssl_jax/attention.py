"""Causal attention within segments, in the form that XLA runs well on every backend.

Axes: B rows, H heads, T query time, S key time, K head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # a finite "minus infinity": a row of padding keeps a finite softmax


def segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Which key each query may see: itself and earlier tokens of its own segment; bool `[B, 1, T, T]`.

    Segment 0 is padding; padding sees only padding.
    """
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    length = segment_ids_BT.shape[1]
    causal_TS = jnp.tri(length, dtype=bool)
    return (same_BTS & causal_TS[None])[:, None]


def attend(
    query_BHTK: jax.Array,
    key_BHSK: jax.Array,
    value_BHSK: jax.Array,
    mask: jax.Array,
    scale: float | None = None,
    keep_BHTS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, `[B, H, T, K]`; the softmax is in float32.

    Heads are a leading axis: on CPU the small batched products run a third faster than in time-major form.

    Args:
      query_BHTK: queries.
      key_BHSK: keys.
      value_BHSK: values.
      mask: bool, broadcastable to `[B, H, T, S]`; False keys get no weight.
      scale: factor on the scores; 1/sqrt(K) by default.
      keep_BHTS: factors on the probabilities (dropout), or None.
    """
    scale = 1.0 / math.sqrt(query_BHTK.shape[-1]) if scale is None else scale
    scores_BHTS = jnp.einsum("bhtk,bhsk->bhts", query_BHTK * scale, key_BHSK, preferred_element_type=jnp.float32)
    probabilities_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, NEGATIVE), axis=-1)
    if keep_BHTS is not None:
        probabilities_BHTS = probabilities_BHTS * keep_BHTS
    return jnp.einsum("bhts,bhsk->bhtk", probabilities_BHTS.astype(value_BHSK.dtype), value_BHSK)
