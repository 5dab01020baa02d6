"""R-Drop: the divergence between two passes of one model with different dropout (Wu et al. 2021, 2106.14448).

Axes as in `losses`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ssl_jax import losses


def symmetric(
    first_BTD: jax.Array,
    second_BTD: jax.Array,
    embedding_VD: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Σ weight × ½ (KL(p1 ‖ p2) + KL(p2 ‖ p1)), R-Drop's eq. 2; differentiable in both passes and the embedding.

    A chunk holds the logits of both passes: twice the memory of `losses.weighted_cross_entropy`.

    Args:
      first_BTD: final hidden states of one pass, any float type; products accumulate in float32.
      second_BTD: those of the other.
      embedding_VD: output embedding; rows from `vocab_size` on are padding and get no probability.
      weights_BT: float32; not differentiated.
      vocab_size: number of real tokens.
      mesh: the devices; see `losses.chunked_loss`.

    Returns:
      The float32 scalar (nats), and the unweighted divergences, float32 `[B, T]`, which carry no gradient.
    """
    # Side by side at each place, so that rows may stay sharded over devices and one product serves both.
    hidden_BTPD = jnp.stack([first_BTD, second_BTD], axis=2)
    loss_and_divergence: Any = _symmetric(vocab_size, mesh, hidden_BTPD, embedding_VD, weights_BT)
    return loss_and_divergence[0], jax.lax.stop_gradient(loss_and_divergence[1])


def _terms(vocab_size: int) -> losses.Terms:
    """The loss of a chunk; its logits `[2 N, V]` are those of both passes in turn, its array the weights."""

    def terms(_, logits_MV, weights_N):
        highest_M1, exponentials_MV, sum_M1 = losses.softmax_parts(logits_MV)
        pairs = (weights_N.shape[0], 2, logits_MV.shape[-1])
        p_NPV = (exponentials_MV / sum_M1).reshape(pairs)
        log_p_NPV = (logits_MV - highest_M1 - jnp.log(sum_M1)).reshape(pairs)
        is_real_1V = jnp.arange(logits_MV.shape[-1])[None] < vocab_size
        # Of the logarithms, the first pass minus the second.
        difference_NV = jnp.where(is_real_1V, log_p_NPV[:, 0] - log_p_NPV[:, 1], 0.0)
        to_second_N1 = jnp.sum(p_NPV[:, 0] * difference_NV, axis=-1, keepdims=True)
        to_first_N1 = -jnp.sum(p_NPV[:, 1] * difference_NV, axis=-1, keepdims=True)
        apart_NV = p_NPV[:, 0] - p_NPV[:, 1]
        first_grad_NV = p_NPV[:, 0] * (difference_NV - to_second_N1) + apart_NV
        second_grad_NV = -p_NPV[:, 1] * (difference_NV + to_first_N1) - apart_NV
        logits_grad_NPV = jnp.stack([first_grad_NV, second_grad_NV], axis=1) * (0.5 * weights_N[:, None, None])
        divergence_N = 0.5 * (to_second_N1 + to_first_N1)[:, 0]
        return jnp.sum(divergence_N * weights_N), logits_grad_NPV.reshape(logits_MV.shape), divergence_N

    return terms


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _symmetric(
    vocab_size: int, mesh: Mesh | None, hidden_BTPD: jax.Array, embedding_VD: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return losses.chunked_loss(_terms(vocab_size), hidden_BTPD, embedding_VD, vocab_size, weights_BT, mesh=mesh)


def _forward(vocab_size, mesh, hidden_BTPD, embedding_VD, weights_BT):
    return losses.chunked_loss_and_gradients(
        _terms(vocab_size), hidden_BTPD, embedding_VD, vocab_size, weights_BT, mesh=mesh
    )


def _backward(vocab_size, mesh, gradients, cotangents):
    return (*losses.scaled(gradients, cotangents[0]), None)


_symmetric.defvjp(_forward, _backward)
