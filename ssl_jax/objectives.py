"""The loss terms and how much each weighs at every step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax import config
from ssl_jax.dropout import row_keys

NAMES = ("supervised", "lm", "pseudo", "back_translation", "backward")
"""The objective of each stream, in the order of the numbers in a batch's `stream` array."""

STREAM_IDS = {"labeled": 0, "raw": 1, "pseudo": 2, "translated": 3, "backward": 4}
"""Rows of these streams are trained with the objective of the same number."""


def ramp(step: jax.Array, first: int, steps: float) -> jax.Array:
    """exp(-5 (1 - t)^2), t the elapsed fraction of `steps` steps from `first` on (Laine & Aila 2017, section 3).

    A young student is not to be drowned in a young teacher's labels.
    """
    elapsed = jnp.clip((step - first) / max(1.0, steps), 0.0, 1.0)
    return jnp.exp(-5.0 * jnp.square(1.0 - elapsed))


def weights(settings: config.Objectives, step: jax.Array, *, first_round: int, total_steps: int) -> jax.Array:
    """Weight of every objective at `step`, float32 in the order of `NAMES`.

    What a model made up, replies as contexts, weighs more and more from the first round on; raw text goes evenly from
    `lm` to `lm_final`.
    """
    rising = ramp(step, first_round, settings.pseudo_ramp * total_steps)
    lm = jnp.float32(settings.lm)
    if settings.lm_final is not None:
        lm += (settings.lm_final - settings.lm) * step / max(1, total_steps - 1)
    by_name = {
        "supervised": jnp.float32(settings.supervised),
        "lm": lm,
        "pseudo": settings.pseudo * rising,
        "back_translation": settings.back_translation * rising,
        "backward": jnp.float32(settings.backward),
    }
    return jnp.stack([by_name[name] for name in NAMES])


def distillation_weight(settings: config.Distillation, step: jax.Array, *, total_steps: int) -> jax.Array:
    """Weight of the teachers' soft labels at `step`, float32: it rises from the first step on."""
    return settings.weight * ramp(step, 0, settings.ramp * total_steps)


def token_weights(stream_B: jax.Array, loss_weights_BT: jax.Array, objective_weights: jax.Array) -> jax.Array:
    """Per-token factors `[B, T]` whose weighted sum of losses is Σ weight × mean over the objective's own tokens.

    The means are taken over the whole global batch, once: devices and micro-batches may hold any share of an
    objective's tokens. An objective without tokens contributes nothing.
    """
    counts = objective_sums(stream_B, loss_weights_BT)
    factors = objective_weights / jnp.maximum(counts, 1e-9)  # of an objective without tokens all weights are 0
    return loss_weights_BT * factors[stream_B][:, None]


def objective_sums(stream_B: jax.Array, values_BT: jax.Array) -> jax.Array:
    """Sum of `values_BT` over the rows of every objective, float32 in the order of `NAMES`."""
    is_objective = stream_B[:, None] == jnp.arange(len(NAMES))[None, :]
    return jnp.sum(jnp.sum(values_BT, axis=1)[:, None] * is_objective, axis=0, dtype=jnp.float32)


def soft_weights(
    stream_B: jax.Array, loss_weights_BT: jax.Array, taught: tuple[int, ...], weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Per-token factors `[B, T]` of the teachers' soft labels, whose sum is `weight`, and what they count in all.

    Args:
      stream_B: int32, the stream of every row.
      loss_weights_BT: float32; a token counts for a soft label as it does for its own.
      taught: numbers of the streams that are taught.
      weight: float32 scalar.
    """
    is_taught_B = jnp.any(stream_B[:, None] == jnp.array(taught)[None, :], axis=1)
    counted_BT = loss_weights_BT * is_taught_B[:, None]
    count = jnp.sum(counted_BT)
    return counted_BT * (weight / jnp.maximum(count, 1e-9)), count


def replace_tokens(
    key: jax.Array,
    numbers_B: jax.Array,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    rate: float,
    vocab_size: int,
) -> jax.Array:
    """Replaces a fraction of the input tokens by uniformly drawn ones; targets and padding stay.

    What is drawn for a row follows from its number, as in `dropout`.

    Random-token replacement regularizes language models that see their data many times (arXiv 2606.16246).
    """
    if rate == 0.0:
        return tokens_BT

    def draw(key):
        chosen_key, drawn_key = jax.random.split(key)
        chosen_T = jax.random.bernoulli(chosen_key, rate, tokens_BT.shape[1:])
        return chosen_T, jax.random.randint(drawn_key, tokens_BT.shape[1:], 0, vocab_size, tokens_BT.dtype)

    chosen_BT, drawn_BT = jax.vmap(draw)(row_keys(key, numbers_B))
    return jnp.where(chosen_BT & (segment_ids_BT > 0), drawn_BT, tokens_BT)
