"""One step of training, as a pure function: `(state, batch) → (state, metrics)`; and the scoring of a batch.

A batch holds `[B, T]` arrays `tokens, targets, loss_weights, positions, segment_ids` and `stream` `[B]`. Rows of all
streams go through one forward pass; what a row is trained for is data, so the step compiles once for the whole run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssl_jax import distillation, losses, model, objectives, terms

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "ema", "optimizer_state", "skipped", "confidence"],
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
      confidence: running statistics of the teachers' certainty, or None without teachers.
    """

    step: jax.Array
    params: model.Params
    ema: model.Params | None
    optimizer_state: Any
    skipped: jax.Array
    confidence: distillation.Confidence | None


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the step needs to know of the configuration; all static.

    Attributes:
      objective_weights: step → float32 weights in the order of `objectives.NAMES`.
      schedule: step → learning rate, for the metrics.
      accumulation: micro-batches per step; the result is that of one large batch.
      token_replacement: rate of random input tokens.
      ema_decay: 0 keeps no average.
      births: steps at which a new student began, whose average is young again.
      r_drop: weight of the divergence between two passes with different dropout; 0: there is one pass.
      teaching: the teachers, or None.
    """

    objective_weights: Callable[[jax.Array], jax.Array]
    schedule: Callable[[jax.Array], Any]
    accumulation: int = 1
    token_replacement: float = 0.0
    ema_decay: float = 0.0
    births: tuple[int, ...] = ()
    r_drop: float = 0.0
    teaching: terms.Teaching | None = None


def init_state(
    shape: model.GPT2,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    key: jax.Array,
    params: model.Params | None = None,
) -> TrainState:
    """The state before the first step: with `params` where a run starts from some, else with fresh ones."""
    params = model.init(shape, key) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params) if settings.ema_decay else None,
        optimizer_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        confidence=distillation.initial_confidence(shape.vocab_size) if settings.teaching else None,
    )


def train_step(
    shape: model.GPT2,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    teachers: Sequence[model.Params] = (),
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step.

    Args:
      shape: the model.
      optimizer: optax, for a learning rate of 1.
      settings: static settings.
      state: donated by the caller's jit.
      batch: rows of all streams.
      key: the run's PRNG key; folded with the step here, so a step's randomness is a function of (seed, step).
      teachers: parameters of every teacher of `settings.teaching` but the average, in its order.

    Returns:
      The next state, and scalars: `loss` (the weighted sum of all terms), for every term `loss/<term>` (mean nats per
      token), `tokens/<term>` (sum of loss weights) and `weight/<term>`, for every stream `fed/<stream>` (tokens that
      the student reads; with R-Drop each of them twice), and `grad_norm`, `lr`, `skipped`. Terms are the
      objectives, `distillation` (divergence from the teachers, and how they see it: `distillation/confidence`, mean
      probability of the likeliest token, `distillation/token_weight`) and `r_drop`, where they are on. If the loss or
      the gradient is not finite, the state stays as it was but for `step` and `skipped`.
    """
    key = jax.random.fold_in(key, state.step)
    objective_weights = settings.objective_weights(state.step)
    batch = {**batch, "factors": objectives.token_weights(batch["stream"], batch["loss_weights"], objective_weights)}
    teaching, teaching_weight, taught = settings.teaching, jnp.zeros(()), jnp.zeros(())
    if teaching is not None:
        teaching_weight = teaching.weight(state.step)
        batch["soft_factors"], taught = objectives.soft_weights(
            batch["stream"], batch["loss_weights"], teaching.streams, teaching_weight
        )
    gradients, sums = _gradients(shape, settings, state, _all_teachers(settings, state, teachers), batch, key)

    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    rate = jnp.float32(settings.schedule(state.step))
    params = optax.apply_updates(state.params, jax.tree.map(lambda update: rate * update, updates))
    ema = None
    if state.ema is not None:
        # Young averages follow quickly, so that the first evaluations are not of the initial weights.
        born = functools.reduce(lambda last, at: jnp.where(state.step >= at, at, last), settings.births, 0)
        age = state.step - born
        decay = jnp.minimum(settings.ema_decay, (1.0 + age) / (10.0 + age))
        ema = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), state.ema, params)
    confidence = state.confidence
    if teaching is not None and confidence is not None:
        confidence = distillation.updated(confidence, teaching.confidence_decay, sums.statistics)

    def keep_if_finite(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    next_state = TrainState(
        step=state.step + 1,
        params=keep_if_finite(params, state.params),
        ema=keep_if_finite(ema, state.ema),
        optimizer_state=keep_if_finite(optimizer_state, state.optimizer_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
        confidence=keep_if_finite(confidence, state.confidence),
    )
    counts = objectives.objective_sums(batch["stream"], batch["loss_weights"])
    reported = {
        name: (sums.nll[number], counts[number], objective_weights[number])
        for number, name in enumerate(objectives.NAMES)
    }
    metrics = {"loss": sums.loss, "grad_norm": grad_norm, "lr": rate, "skipped": next_state.skipped}
    passes = 2 if settings.r_drop else 1
    fed = objectives.objective_sums(batch["stream"], passes * (batch["segment_ids"] > 0))
    metrics |= {f"fed/{name}": fed[number] for name, number in objectives.STREAM_IDS.items()}
    if teaching is not None:
        reported["distillation"] = (sums.divergence, taught, teaching_weight)
        metrics["distillation/confidence"] = sums.statistics.confidence / jnp.maximum(sums.statistics.count, 1.0)
        metrics["distillation/token_weight"] = sums.token_weight / jnp.maximum(taught, 1e-9)
    if settings.r_drop:
        reported["r_drop"] = (sums.r_drop, jnp.sum(counts), jnp.float32(settings.r_drop))
    for name, (total, count, weight) in reported.items():
        metrics[f"loss/{name}"] = total / jnp.maximum(count, 1e-9)
        metrics[f"tokens/{name}"] = count
        metrics[f"weight/{name}"] = weight
    return next_state, metrics


def pass_over(state: TrainState) -> TrainState:
    """The state after a step that learns nothing from its batch."""
    return dataclasses.replace(state, step=state.step + 1)


def score(shape: model.GPT2, params: model.Params, batch: Batch) -> jax.Array:
    """Negative log-likelihood of every target, float32 `[B, T]`, nats; padding included."""
    hidden = model.forward(shape, params, batch["tokens"], batch["positions"], batch["segment_ids"])
    embedding = model.output_embedding(params, hidden.dtype)
    return losses.token_nll(hidden, embedding, batch["targets"], shape.vocab_size, shape.mesh)


def _all_teachers(settings: StepSettings, state: TrainState, teachers: Sequence[model.Params]) -> list[model.Params]:
    """Parameters of every teacher, the running average among them."""
    if settings.teaching is None:
        return []
    given = iter(teachers)
    known = [state.ema if shape is None else next(given) for shape in settings.teaching.shapes]
    return [params for params in known if params is not None]


def _gradients(
    shape: model.GPT2,
    settings: StepSettings,
    state: TrainState,
    teachers: Sequence[model.Params],
    batch: Batch,
    key: jax.Array,
) -> tuple[model.Params, terms.Sums]:
    """Gradients and sums over all micro-batches.

    The factors already hold the global means' denominators, so micro-batches simply add up.
    """
    # A row's place in the whole batch decides what is drawn for it.
    batch = {**batch, "number": jnp.arange(batch["stream"].shape[0])}

    def loss_of(params, batch):
        replace_key, dropout_key = jax.random.split(key)
        tokens = objectives.replace_tokens(
            replace_key,
            batch["number"],
            batch["tokens"],
            batch["segment_ids"],
            settings.token_replacement,
            shape.vocab_size,
        )
        fed = {**batch, "fed": tokens}
        teaching = settings.teaching and settings.teaching.of_micro_batches(settings.accumulation)
        sums = terms.total(shape, params, fed, dropout_key, settings.r_drop, teaching, teachers, state.confidence)
        return sums.loss, sums

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    if settings.accumulation == 1:
        (_, sums), gradients = gradient_of(state.params, batch)
        return gradients, sums

    # Rows r, r + A, … form micro-batch r: every device keeps its own rows, whatever the accumulation.
    micro = jax.tree.map(
        lambda array: jnp.moveaxis(array.reshape(-1, settings.accumulation, *array.shape[1:]), 1, 0), dict(batch)
    )

    def add(carry, micro_batch):
        (_, sums), gradients = gradient_of(state.params, micro_batch)
        return jax.tree.map(jnp.add, carry, (gradients, sums)), None

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.params)
    start = (zero, terms.Sums.zero(len(objectives.NAMES)))
    (gradients, sums), _ = jax.lax.scan(add, start, micro)
    return gradients, sums
