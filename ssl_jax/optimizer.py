"""AdamW with warm-up, decay and clipping, assembled from optax."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import optax
import optax.contrib

from ssl_jax import config


def learning_rate_schedule(
    settings: config.Optimizer, total_steps: int, restarts: Sequence[int] = ()
) -> optax.Schedule:
    """Linear warm-up to the peak, then the decay that `lr_scheduler_type` names.

    A `warmup_steps` below 1 is a fraction of the steps, as in Hugging Face's `TrainingArguments`. Every step of
    `restarts` begins a schedule of its own, and the one before ends there: what is trained from it on is another
    student, or is fine-tuned.
    """
    edges = (0, *restarts, total_steps)
    schedules = [_one_schedule(settings, stop - start) for start, stop in itertools.pairwise(edges)]
    return optax.join_schedules(schedules, list(restarts))


def _one_schedule(settings: config.Optimizer, steps: int) -> optax.Schedule:
    warmup = settings.warmup_steps if settings.warmup_steps >= 1 else settings.warmup_steps * steps
    warmup = min(round(warmup), steps)
    peak, decay_steps = settings.learning_rate, max(1, steps - warmup)
    match settings.lr_scheduler_type:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=settings.min_lr_ratio)
        case "linear":
            decay = optax.linear_schedule(peak, peak * settings.min_lr_ratio, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
    # The first update already moves: step 0 of the warm-up has 1/warmup of the peak.
    start = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([start, decay], [warmup])


def make_optimizer(settings: config.Optimizer) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019) that decays matrices only; or Muon.

    Muon (Jordan et al. 2024) orthogonalizes the update of every matrix inside the blocks and leaves embeddings, biases
    and norms to AdamW. Its updates are scaled to the size of AdamW's (`consistent_rms` 0.2, Liu et al. 2025, arXiv
    2502.16982), so learning rate and weight decay keep their meaning.

    The updates are those of a learning rate of 1; the step multiplies them by the rate of its own number, which goes on
    where a new student's moments begin anew.
    """
    if settings.name == "adamw":
        update = optax.adamw(
            1.0,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
        )
    else:
        update = optax.contrib.muon(
            1.0,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            weight_decay_mask=decay_mask,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=_block_matrices,
            consistent_rms=0.2,
        )
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), update)


def decay_mask(params: optax.Params) -> optax.Params:
    """True for kernels and embeddings, False for biases and layer norms, whether or not blocks are stacked."""
    decayed = {"kernel", "embedding"}
    return jax.tree.map_with_path(lambda path, _: path[-1].key in decayed, params)


def _block_matrices(params: optax.Params) -> optax.Params:
    """The `[…, in, out]` kernels for Muon; a leading axis of stacked blocks is a batch of matrices."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map_with_path(lambda path, _: axes if path[-1].key == "kernel" else None, params)
