"""Causal attention within segments, in the form that XLA runs well on every backend.

Axes: B rows, H heads, T query time, S key time, K head width.
"""

from __future__ import annotations

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
    scale: float | jax.Array,
    *,
    upcast: bool = False,
    keep_BHTS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, `[B, H, T, K]` in the type of `value_BHSK`; the softmax is in float32.

    Heads are a leading axis: on CPU the small batched products run a third faster than in time-major form.

    Args:
      query_BHTK: queries.
      key_BHSK: keys.
      value_BHSK: values.
      mask: bool, broadcastable to `[B, H, T, S]`; False keys get no weight.
      scale: factor on the scores, a scalar.
      upcast: takes the product of scaled queries and keys in full float32 (`reorder_and_upcast_attn`, Mistral GPT-2);
        otherwise in the type they come in, with float32 sums.
      keep_BHTS: factors on the probabilities (dropout), or None.
    """
    # The queries are scaled, not the scores, which are more; in float32, so that the scale itself is never rounded.
    scaled_BHTK = query_BHTK.astype(jnp.float32) * scale
    if upcast:
        key_BHSK = key_BHSK.astype(jnp.float32)
    scores_BHTS = jnp.einsum(
        "bhtk,bhsk->bhts",
        scaled_BHTK.astype(key_BHSK.dtype),
        key_BHSK,
        precision=jax.lax.Precision.HIGHEST if upcast else None,  # accelerators shorten float32 products by default
        preferred_element_type=jnp.float32,
    )
    probabilities_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, NEGATIVE), axis=-1)
    if keep_BHTS is not None:
        probabilities_BHTS = probabilities_BHTS * keep_BHTS
    return jnp.einsum("bhts,bhsk->bhtk", probabilities_BHTS.astype(value_BHSK.dtype), value_BHSK)
