"""One step of training, as a pure function: `(state, batch) → (state, metrics)`; and the scoring of a batch.

A batch holds `[B, T]` arrays `tokens, targets, loss_weights, positions, segment_ids` and `stream` `[B]`. Rows of all
streams go through one forward pass; what a row is trained for is data, so the step compiles once for the whole run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssl_jax import losses, model, objectives

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "ema", "optimizer_state", "skipped"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: int32, steps taken.
      params: the student.
      ema: exponential moving average of the parameters in float32, or None.
      optimizer_state: optax's.
      skipped: int32, updates in a row that were skipped because loss or gradient was not finite.
    """

    step: jax.Array
    params: model.Params
    ema: model.Params | None
    optimizer_state: Any
    skipped: jax.Array


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the step needs to know of the configuration; all static.

    Attributes:
      objective_weights: step → float32 weights in the order of `objectives.NAMES`.
      schedule: step → learning rate, for the metrics.
      accumulation: micro-batches per step; the result is that of one large batch.
      token_replacement: rate of random input tokens.
      ema_decay: 0 keeps no average.
    """

    objective_weights: Callable[[jax.Array], jax.Array]
    schedule: Callable[[jax.Array], Any]
    accumulation: int = 1
    token_replacement: float = 0.0
    ema_decay: float = 0.0


def init_state(
    shape: model.GPT2,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    key: jax.Array,
    params: model.Params | None = None,
) -> TrainState:
    """The state before the first step: with `params` where a run starts from some, else with fresh ones."""
    params = model.init(shape, key) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params) if ema_decay else None,
        optimizer_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
    )


def train_step(
    shape: model.GPT2,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step.

    Args:
      shape: the model.
      optimizer: optax.
      settings: static settings.
      state: donated by the caller's jit.
      batch: rows of all streams.
      key: the run's PRNG key; folded with the step here, so a step's randomness is a function of (seed, step).

    Returns:
      The next state, and scalars: `loss` (Σ weight × objective), `loss/<objective>` (mean nats per token),
      `tokens/<objective>` (sum of loss weights), `weight/<objective>`, `grad_norm`, `lr`, `skipped`. If the loss or
      the gradient is not finite, the state stays as it was but for `step` and `skipped`.
    """
    key = jax.random.fold_in(key, state.step)
    objective_weights = settings.objective_weights(state.step)
    factors_BT = objectives.token_weights(batch["stream"], batch["loss_weights"], objective_weights)
    gradients, loss, nll_sums = _gradients(shape, settings, state.params, {**batch, "factors": factors_BT}, key)

    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None
    if state.ema is not None:
        # Young averages follow quickly, so that the first evaluations are not of the initial weights.
        decay = jnp.minimum(settings.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), state.ema, params)

    def keep_if_finite(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    next_state = TrainState(
        step=state.step + 1,
        params=keep_if_finite(params, state.params),
        ema=keep_if_finite(ema, state.ema),
        optimizer_state=keep_if_finite(optimizer_state, state.optimizer_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    counts = objectives.objective_sums(batch["stream"], batch["loss_weights"])
    means = nll_sums / jnp.maximum(counts, 1e-9)
    metrics = {"loss": loss, "grad_norm": grad_norm, "lr": jnp.float32(settings.schedule(state.step))}
    for number, name in enumerate(objectives.NAMES):
        metrics[f"loss/{name}"] = means[number]
        metrics[f"tokens/{name}"] = counts[number]
        metrics[f"weight/{name}"] = objective_weights[number]
    return next_state, {**metrics, "skipped": next_state.skipped}


def score(shape: model.GPT2, params: model.Params, batch: Batch) -> jax.Array:
    """Negative log-likelihood of every target, float32 `[B, T]`, nats; padding included."""
    hidden = model.forward(shape, params, batch["tokens"], batch["positions"], batch["segment_ids"])
    embedding = model.output_embedding(params, hidden.dtype)
    return losses.token_nll(hidden, embedding, batch["targets"], shape.vocab_size)


def _gradients(
    shape: model.GPT2, settings: StepSettings, params: model.Params, batch: Batch, key: jax.Array
) -> tuple[model.Params, jax.Array, jax.Array]:
    """Gradients, loss and per-objective sums of negative log-likelihoods, over all micro-batches.

    The factors already hold the global means' denominators, so micro-batches simply add up.
    """

    def loss_of(params, batch, key):
        replace_key, dropout_key = jax.random.split(key)
        tokens = objectives.replace_tokens(
            replace_key, batch["tokens"], batch["segment_ids"], settings.token_replacement, shape.vocab_size
        )
        hidden = model.forward(shape, params, tokens, batch["positions"], batch["segment_ids"], dropout_key)
        embedding = model.output_embedding(params, hidden.dtype)
        loss, nll_BT = losses.weighted_cross_entropy(
            hidden, embedding, batch["targets"], batch["factors"], shape.vocab_size
        )
        return loss, objectives.objective_sums(batch["stream"], nll_BT * batch["loss_weights"])

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    if settings.accumulation == 1:
        (loss, nll_sums), gradients = gradient_of(params, batch, key)
        return gradients, loss, nll_sums

    # Rows r, r + A, … form micro-batch r: every device keeps its own rows, whatever the accumulation.
    micro = jax.tree.map(
        lambda array: jnp.moveaxis(array.reshape(-1, settings.accumulation, *array.shape[1:]), 1, 0), dict(batch)
    )

    def add(carry, xs):
        micro_batch, number = xs
        (loss, nll_sums), gradients = gradient_of(params, micro_batch, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, carry, (gradients, loss, nll_sums)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    start = (zeros, jnp.zeros((), jnp.float32), jnp.zeros(len(objectives.NAMES), jnp.float32))
    (gradients, loss, nll_sums), _ = jax.lax.scan(add, start, (micro, jnp.arange(settings.accumulation)))
    return gradients, loss, nll_sums
