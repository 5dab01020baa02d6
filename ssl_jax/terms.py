"""One forward pass of the student over all rows, of the teachers over those they teach, and every term of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax import distillation, divergence, losses, model, objectives


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What the step needs to know of its teachers; all static.

    Attributes:
      shapes: of every teacher; None for the running average of the student. Parameters of the others are arguments.
      rows: how many rows of a batch, its last ones, the teachers read.
      streams: numbers of the streams that are taught among them.
      weight: step → float32 weight of their soft labels.
      rule: how a token's label is made and what it counts.
      confidence_decay: of the running statistics of the teachers' confidence.
    """

    shapes: tuple[model.GPT2 | None, ...]
    rows: int
    streams: tuple[int, ...]
    weight: Callable[[jax.Array], jax.Array]
    rule: distillation.Rule
    confidence_decay: float

    def of_micro_batches(self, number: int) -> Teaching:
        """The same for each of a number of micro-batches, that take a batch's rows in turn."""
        return dataclasses.replace(self, rows=-(-self.rows // number))


class Sums(NamedTuple):
    """What adds up over micro-batches, float32.

    Attributes:
      loss: the weighted sum of all terms.
      nll: negative log-likelihoods of every objective's tokens, in the order of `objectives.NAMES`, nats.
      divergence: of the student from its teachers over taught tokens, nats.
      token_weight: what these tokens count, by the teachers.
      statistics: of the teachers' confidence.
      r_drop: divergence of two passes over all tokens, nats.
    """

    loss: jax.Array
    nll: jax.Array
    divergence: jax.Array
    token_weight: jax.Array
    statistics: distillation.Statistics
    r_drop: jax.Array

    @classmethod
    def zero(cls, objectives: int) -> Sums:
        """Of no tokens."""
        zero = jnp.zeros((), jnp.float32)
        nll = jnp.zeros(objectives, jnp.float32)
        return cls(zero, nll, zero, zero, distillation.Statistics(zero, zero, zero), zero)


def total(
    shape: model.GPT2,
    params: model.Params,
    batch: Mapping[str, jax.Array],
    dropout_key: jax.Array,
    r_drop: float = 0.0,
    teaching: Teaching | None = None,
    teachers: Sequence[model.Params] = (),
    confidence: distillation.Confidence | None = None,
) -> Sums:
    """The loss of a batch; what it is made of carries no gradient.

    With R-Drop (Liang et al. 2021, arXiv 2106.14448) every row is fed twice, side by side so that both passes stay on
    one device, each counts half, and half of `r_drop` times the divergence of the two is added. It is the paper's loss
    halved, so that the weights of the objectives keep their meaning.

    Args:
      shape: the student.
      params: its parameters, in which the loss is differentiable.
      batch: as `step` has it, with `number` `[B]` (int32, of each row, which decides what dropout draws for it), `fed`
        (the tokens that the student reads; teachers read `tokens`), `factors` (weights of the targets) and, with
        teachers, `soft_factors` (weights of their labels), `[B, T]`.
      dropout_key: PRNG key.
      r_drop: weight of the divergence; 0: one pass.
      teaching: what the teachers do, or None.
      teachers: their parameters.
      confidence: running statistics of their certainty.
    """
    passes = 2 if r_drop else 1
    rows = batch["tokens"].shape[0] * passes
    if passes > 1:
        batch = {name: jnp.repeat(array, passes, axis=0) for name, array in batch.items()}
        batch |= {name: batch[name] / passes for name in ("factors", "soft_factors", "loss_weights") if name in batch}
        batch["number"] = batch["number"] * passes + jnp.arange(rows) % passes
    hidden = model.forward(
        shape, params, batch["fed"], batch["positions"], batch["segment_ids"], dropout_key, batch["number"]
    )
    embedding = model.output_embedding(params, hidden.dtype)

    taught = 0 if teaching is None else min(rows, passes * teaching.rows)
    sums, nll = Sums.zero(len(objectives.NAMES)), []
    if taught < rows:
        plain = slice(0, rows - taught)
        loss, nll_BT = losses.weighted_cross_entropy(
            hidden[plain], embedding, batch["targets"][plain], batch["factors"][plain], shape.vocab_size, shape.mesh
        )
        sums, nll = sums._replace(loss=sums.loss + loss), [nll_BT]
    if taught:
        assert teaching is not None and confidence is not None
        part = {name: array[rows - taught :] for name, array in batch.items()}
        loss, soft = distillation.weighted_cross_entropy(
            hidden[rows - taught :],
            embedding,
            part["targets"],
            part["factors"],
            [
                _read(known or shape, params, part, passes)
                for known, params in zip(teaching.shapes, teachers, strict=True)
            ],
            part["soft_factors"],
            teaching.rule,
            confidence,
            shape.vocab_size,
            shape.mesh,
        )
        counted_BT = part["loss_weights"] * (part["soft_factors"] > 0)
        sums = sums._replace(
            loss=sums.loss + loss,
            divergence=jnp.sum(soft.divergence * counted_BT),
            token_weight=jnp.sum(soft.token_weight * counted_BT),
            statistics=distillation.statistics(soft.confidence, part["soft_factors"]),
        )
        nll.append(soft.nll)
    if passes > 1:
        pairs = _pairs(hidden)
        factors_BT, weights_BT = (jnp.sum(_pairs(batch[name]), axis=1) for name in ("factors", "loss_weights"))
        loss, divergence_BT = divergence.symmetric(
            pairs[:, 0], pairs[:, 1], embedding, 0.5 * r_drop * factors_BT, shape.vocab_size, shape.mesh
        )
        sums = sums._replace(loss=sums.loss + loss, r_drop=jnp.sum(divergence_BT * weights_BT))
    nll_BT = jnp.concatenate(nll) if len(nll) > 1 else nll[0]
    return sums._replace(nll=objectives.objective_sums(batch["stream"], nll_BT * batch["loss_weights"]))


def _pairs(array: jax.Array) -> jax.Array:
    """`[B, 2, …]`: both passes of every row."""
    return array.reshape(-1, 2, *array.shape[1:])


def _read(
    shape: model.GPT2, params: model.Params, batch: Mapping[str, jax.Array], passes: int
) -> tuple[jax.Array, jax.Array]:
    """A teacher's hidden states of clean rows, without dropout, each read once, and its output embedding."""
    tokens, positions, segment_ids = (batch[name][::passes] for name in ("tokens", "positions", "segment_ids"))
    hidden = model.forward(shape, params, tokens, positions, segment_ids)
    return jnp.repeat(hidden, passes, axis=0) if passes > 1 else hidden, model.output_embedding(params, hidden.dtype)
