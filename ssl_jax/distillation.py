"""Soft labels: cross-entropy plus the divergence from teachers' distributions, token by token, fused.

The student follows the mean distribution of its teachers: a running average of itself (Mean Teacher, 1703.01780), or an
ensemble (BabyLlama, 2308.02019). Tokens may count by the teachers' confidence (FixMatch, 2001.07685; FreeMatch,
2205.07246; SoftMatch, 2301.10921) or agreement, and the teachers' logits may be sharpened (UDA, 1904.12848).

Axes as in `losses`; K teachers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ssl_jax import losses, products
from ssl_jax.config.methods import Weighting

# SoftMatch's Gaussian has the running variance divided by the square of this, as in its published runs (USB's n_sigma).
_SOFTMATCH_DEVIATIONS = 2.0


@dataclasses.dataclass(frozen=True)
class Rule:
    """How soft labels are made of teachers' logits, and what a token counts.

    Attributes:
      weighting: none: 1. agreement: 1 − (Jensen-Shannon divergence of the teachers) / log K. fixmatch: 1 where the
        confidence is at least `threshold`. freematch: 1 where it is at least its running mean, FreeMatch's global
        threshold (eq. 5); the thresholds of single classes are left out, for most of a vocabulary's tokens are too
        rare to have one. softmatch: exp(−min(confidence − mean, 0)² n² / (2 variance)), n = 2.
      threshold: of fixmatch.
      hard: the label is the teachers' likeliest token alone.
      temperature: divides the teachers' logits, not the student's.
    """

    weighting: Weighting = "none"
    threshold: float = 0.95
    hard: bool = False
    temperature: float = 1.0


class Outputs(NamedTuple):
    """Per token, float32 `[B, T]`, without gradient.

    Attributes:
      nll: negative log-likelihood of the target under the student, nats.
      divergence: KL(soft label ‖ student), nats, whatever the token counts; for a hard label its negative
        log-likelihood.
      token_weight: what the token counts by the rule, 0 to 1.
      confidence: highest probability of the teachers' mean distribution.
    """

    nll: jax.Array
    divergence: jax.Array
    token_weight: jax.Array
    confidence: jax.Array


class Confidence(NamedTuple):
    """Running mean and variance of the confidence over taught tokens, float32 scalars."""

    mean: jax.Array
    variance: jax.Array


class Statistics(NamedTuple):
    """Sums over taught tokens, float32 scalars; those of micro-batches add up, field by field."""

    count: jax.Array
    confidence: jax.Array
    confidence_squared: jax.Array


def initial_confidence(vocab_size: int) -> Confidence:
    """What FreeMatch and SoftMatch start from: mean 1 / `vocab_size`, variance 1."""
    return Confidence(jnp.float32(1.0 / vocab_size), jnp.float32(1.0))


def statistics(confidence_BT: jax.Array, soft_weights_BT: jax.Array) -> Statistics:
    """Sums over the tokens that are taught: those with a soft weight."""
    is_taught_BT = (soft_weights_BT > 0).astype(jnp.float32)
    taught_BT = confidence_BT * is_taught_BT
    return Statistics(jnp.sum(is_taught_BT), jnp.sum(taught_BT), jnp.sum(jnp.square(taught_BT)))


def updated(confidence: Confidence, decay: float, sums: Statistics) -> Confidence:
    """Running averages after a batch: decay × old + (1 − decay) × the batch's mean, and its unbiased variance.

    As in SoftMatch, 2301.10921. Without a taught token nothing changes; with a single one the variance stays.
    """
    mean = sums.confidence / jnp.maximum(sums.count, 1.0)
    # The clamp is for rounding alone.
    squares = jnp.maximum(sums.confidence_squared - sums.count * jnp.square(mean), 0.0)
    variance = squares / jnp.maximum(sums.count - 1.0, 1.0)
    return Confidence(
        jnp.where(sums.count > 0, decay * confidence.mean + (1.0 - decay) * mean, confidence.mean),
        jnp.where(sums.count > 1, decay * confidence.variance + (1.0 - decay) * variance, confidence.variance),
    )


def weighted_cross_entropy(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    teachers: Sequence[tuple[jax.Array, jax.Array]],
    soft_weights_BT: jax.Array,
    rule: Rule,
    confidence: Confidence,
    vocab_size: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Outputs]:
    """Σ weight × nll + Σ soft weight × token weight × KL(soft label ‖ student).

    Differentiable in `hidden_BTD` and `embedding_VD` only. Without soft weights it is `losses.weighted_cross_entropy`.

    Args:
      hidden_BTD: the student's final hidden states, any float type; products accumulate in float32.
      embedding_VD: its output embedding; rows from `vocab_size` on are padding and get no probability.
      targets_BT: int32 token ids.
      weights_BT: float32, of the targets.
      teachers: for each its final hidden states `[B, T, Dk]` and its output embedding `[Vk, Dk]`, both of one type,
        which may have another width and other padding than the student's.
      soft_weights_BT: float32, of the soft labels.
      rule: static.
      confidence: running statistics, used by freematch and softmatch.
      vocab_size: number of real tokens, the student's and every teacher's.
      mesh: the devices; see `losses.chunked_loss`.

    Returns:
      The float32 scalar (nats), and what it is made of, per token.

    Raises:
      ValueError: no teacher; or agreement of fewer than two.
    """
    if len(teachers) < (2 if rule.weighting == "agreement" else 1):
        raise ValueError(f"{len(teachers)} teachers for the weighting {rule.weighting}")
    hiddens = tuple(hidden for hidden, _ in teachers)
    embeddings = tuple(_fitted(embedding, vocab_size, embedding_VD.shape[0]) for _, embedding in teachers)
    arrays = (targets_BT, weights_BT, soft_weights_BT, *hiddens)
    loss_and_outputs: Any = _distilled(
        rule, vocab_size, mesh, hidden_BTD, embedding_VD, arrays, (embeddings, confidence)
    )
    return loss_and_outputs[0], jax.lax.stop_gradient(loss_and_outputs[1])


def _fitted(embedding: jax.Array, vocab_size: int, padded_vocab_size: int) -> jax.Array:
    """An embedding with the student's padding, so that no `[N, V]` array has to be cut or padded."""
    if embedding.shape[0] == padded_vocab_size:
        return embedding
    return jnp.pad(embedding[:vocab_size], ((0, padded_vocab_size - vocab_size), (0, 0)))


class _Labels(NamedTuple):
    probabilities_NV: jax.Array
    log_probabilities_NV: jax.Array
    confidence_N: jax.Array
    agreement_N: jax.Array


def _terms(rule: Rule, vocab_size: int) -> losses.Terms:
    """The loss of a chunk.

    Its constants are the teachers' embeddings and the running statistics, its arrays targets, weights, soft weights and
    the hidden states of every teacher.
    """

    def terms(constants, logits_NV, targets_N, weights_N, soft_weights_N, *hiddens_ND):
        embeddings, confidence = constants
        labels = _labels(
            [
                products.logits(hidden_ND, embedding_VD, vocab_size) / rule.temperature
                for hidden_ND, embedding_VD in zip(hiddens_ND, embeddings, strict=True)
            ],
            with_agreement=rule.weighting == "agreement",
        )
        highest_N1, exponentials_NV, sum_N1 = losses.softmax_parts(logits_NV)
        nll_N = losses.nll(logits_NV, highest_N1, sum_N1, targets_N)
        if rule.hard:
            likeliest_N = jnp.argmax(labels.probabilities_NV, axis=-1)
            label_NV = _one_hot(likeliest_N, logits_NV, jnp.float32(1.0))
            divergence_N = losses.nll(logits_NV, highest_N1, sum_N1, likeliest_N)
        else:
            label_NV = labels.probabilities_NV
            log_probabilities_NV = logits_NV - highest_N1 - jnp.log(sum_N1)
            divergence_N = _divergence(label_NV, labels.log_probabilities_NV, log_probabilities_NV)
        token_weight_N = _token_weights(rule, labels, confidence)
        taught_N = soft_weights_N * token_weight_N
        expected_NV = exponentials_NV * ((weights_N + taught_N)[:, None] / sum_N1)
        logits_grad_NV = expected_NV - _one_hot(targets_N, logits_NV, weights_N[:, None]) - taught_N[:, None] * label_NV
        loss = jnp.sum(nll_N * weights_N + divergence_N * taught_N)
        return loss, logits_grad_NV, Outputs(nll_N, divergence_N, token_weight_N, labels.confidence_N)

    return terms


def _labels(logits: Sequence[jax.Array], with_agreement: bool) -> _Labels:
    """The mean of the distributions `softmax(logits)`, and how well they agree."""
    parts = [losses.softmax_parts(logits_NV) for logits_NV in logits]
    distributions = [exponentials_NV / sum_N1 for _, exponentials_NV, sum_N1 in parts]
    log_distributions = [
        logits_NV - highest_N1 - jnp.log(sum_N1)
        for logits_NV, (highest_N1, _, sum_N1) in zip(logits, parts, strict=True)
    ]
    if len(logits) == 1:
        confidence_N = 1.0 / parts[0][2][:, 0]
        return _Labels(distributions[0], log_distributions[0], confidence_N, jnp.ones_like(confidence_N))
    mean_NV = sum(distributions[1:], distributions[0]) / len(logits)
    log_mean_NV = jnp.log(mean_NV)
    confidence_N = jnp.max(mean_NV, axis=-1)
    agreement_N = jnp.ones_like(confidence_N)
    if with_agreement:
        for distribution_NV, log_distribution_NV in zip(distributions, log_distributions, strict=True):
            share_N = _divergence(distribution_NV, log_distribution_NV, log_mean_NV)
            agreement_N -= share_N / (len(logits) * math.log(len(logits)))
    return _Labels(mean_NV, log_mean_NV, confidence_N, jnp.clip(agreement_N, 0.0, 1.0))


def _divergence(p_NV: jax.Array, log_p_NV: jax.Array, log_q_NV: jax.Array) -> jax.Array:
    """KL(p ‖ q) in nats, `[N]`. The difference is taken first, so that equal distributions diverge by exactly 0."""
    return jnp.sum(p_NV * jnp.where(p_NV > 0, log_p_NV - log_q_NV, 0.0), axis=-1)


def _one_hot(tokens_N: jax.Array, logits_NV: jax.Array, value: jax.Array) -> jax.Array:
    """`[N, V]`: `value` at the tokens, zero elsewhere."""
    return jnp.where(jnp.arange(logits_NV.shape[-1])[None] == tokens_N[:, None], value, 0.0)


def _token_weights(rule: Rule, labels: _Labels, confidence: Confidence) -> jax.Array:
    match rule.weighting:
        case "none":
            return jnp.ones_like(labels.confidence_N)
        case "agreement":
            return labels.agreement_N
        case "fixmatch":
            return (labels.confidence_N >= rule.threshold).astype(jnp.float32)
        case "freematch":
            return (labels.confidence_N >= confidence.mean).astype(jnp.float32)
        case "softmatch":
            below_N = jnp.minimum(labels.confidence_N - confidence.mean, 0.0)
            # Confidences that are all the same have no variance.
            variance = jnp.maximum(confidence.variance, jnp.finfo(jnp.float32).tiny)
            return jnp.exp(-jnp.square(_SOFTMATCH_DEVIATIONS * below_N) / (2.0 * variance))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _distilled(
    rule: Rule,
    vocab_size: int,
    mesh: Mesh | None,
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    arrays: tuple[jax.Array, ...],
    constants: tuple[tuple[jax.Array, ...], Confidence],
) -> tuple[jax.Array, Outputs]:
    return losses.chunked_loss(
        _terms(rule, vocab_size), hidden_BTD, embedding_VD, vocab_size, *arrays, constants=constants, mesh=mesh
    )


def _forward(rule, vocab_size, mesh, hidden_BTD, embedding_VD, arrays, constants):
    return losses.chunked_loss_and_gradients(
        _terms(rule, vocab_size), hidden_BTD, embedding_VD, vocab_size, *arrays, constants=constants, mesh=mesh
    )


def _backward(rule, vocab_size, mesh, gradients, cotangents):
    return (*losses.scaled(gradients, cotangents[0]), None, None)


_distilled.defvjp(_forward, _backward)
