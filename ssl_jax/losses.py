"""Cross-entropy over a large vocabulary without ever holding all its logits.

The loss is linear in each token's weight, so once the weights are known the gradient of a chunk's logits can be taken
while the chunk is at hand. Forward and backward therefore need three matrix products instead of four, and memory for
one chunk of logits instead of `[batch, time, vocabulary]` in float32.

Axes: B rows, T time, D width, V padded vocabulary, C chunk of time, N tokens of a chunk (B × C).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ssl_jax import products
from ssl_jax.sharding import BATCH, row_shards

CHUNK_TOKENS = 1024
"""Tokens whose logits are held at a time, on each device."""


def weighted_cross_entropy(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    vocab_size: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of next-token negative log-likelihoods, differentiable in `hidden_BTD` and `embedding_VD`.

    Args:
      hidden_BTD: final hidden states, any float type; products accumulate in float32.
      embedding_VD: output embedding; rows from `vocab_size` on are padding and get no probability.
      targets_BT: int32 token ids.
      weights_BT: float32; not differentiated.
      vocab_size: number of real tokens.
      mesh: the devices; see `chunked_loss`.

    Returns:
      The float32 scalar sum of weight times negative log-likelihood (nats), and the unweighted float32
      negative log-likelihoods `[B, T]`, which carry no gradient.
    """
    loss_and_nll: Any = _weighted_cross_entropy(vocab_size, mesh, hidden_BTD, embedding_VD, targets_BT, weights_BT)
    return loss_and_nll[0], jax.lax.stop_gradient(loss_and_nll[1])


def token_nll(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array | products.Int8,
    targets_BT: jax.Array,
    vocab_size: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Negative log-likelihood of every target, float32 `[B, T]`, nats; `mesh` as of `chunked_loss`."""

    def local_nll(hidden_BTD, embedding_VD, targets_BT):
        def chunk_nll(_, chunk):
            hidden_BCD, targets_BC = chunk
            logits_NV = products.logits(rows(hidden_BCD), embedding_VD, vocab_size)
            highest_N1, _, sum_N1 = softmax_parts(logits_NV)
            return None, nll(logits_NV, highest_N1, sum_N1, targets_BC.reshape(-1)).reshape(targets_BC.shape)

        _, nll_NBC = jax.lax.scan(chunk_nll, None, chunks(hidden_BTD, targets_BT))
        return unchunk(nll_NBC, targets_BT.shape[1])

    run = _on_each_device(local_nll, mesh, hidden_BTD, (BATCH, _WHOLE, BATCH), BATCH)
    return run(hidden_BTD, embedding_VD, targets_BT)


def rows(hidden_BCD: jax.Array) -> jax.Array:
    """`[N, D]`: XLA on CPU turns plain matrix products, and only those, into fast calls."""
    return hidden_BCD.reshape(-1, hidden_BCD.shape[-1])


def softmax_parts(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Highest logits `[N, 1]`, exponentials of the differences from them `[N, V]`, and their sums `[N, 1]`."""
    highest_N1 = jnp.max(logits_NV, axis=-1, keepdims=True)
    exponentials_NV = jnp.exp(logits_NV - highest_N1)
    return highest_N1, exponentials_NV, jnp.sum(exponentials_NV, axis=-1, keepdims=True)


def nll(logits_NV: jax.Array, highest_N1: jax.Array, sum_N1: jax.Array, targets_N: jax.Array) -> jax.Array:
    """Negative log-likelihood `[N]` of targets, nats, from the logits and their `softmax_parts`."""
    target_logits_N1 = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)
    return (jnp.log(sum_N1) + highest_N1 - target_logits_N1)[:, 0]


Terms = Callable[..., tuple[jax.Array, jax.Array, Any]]
"""What a chunk adds to a loss, `terms(constants, logits_NV, *arrays_N)` with float32 logits: the float32 scalar; its
gradient in the logits `[N, V]`; and a pytree of outputs `[N]`, for each token, that carry no gradient."""


def chunked_loss(
    terms: Terms,
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    vocab_size: int,
    *arrays: jax.Array,
    constants: Any = (),
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Any]:
    """The sum of a loss over chunks of time, and its outputs `[B, T]`.

    Args:
      terms: the loss of a chunk; its gradient is not used, and not computed once compiled.
      hidden_BTD: final hidden states; further axes between T and D are rows of logits of their own.
      embedding_VD: output embedding.
      vocab_size: number of real tokens.
      *arrays: `[B, T, …]`, what `terms` needs beside the logits.
      constants: a pytree of arrays that `terms` needs whole.
      mesh: devices over whose data and fsdp axes the rows lie: each goes through its own chunks, and sums are added
        up once, at the end. None: one device.
    """

    def local_loss(hidden_BTD, embedding_VD, constants, *arrays):
        def chunk_loss(loss, chunk):
            logits_NV = products.logits(rows(chunk[0]), embedding_VD, vocab_size)
            chunk_sum, _, outputs = terms(constants, logits_NV, *map(_flat, chunk[1:]))
            return loss + chunk_sum, _unflat(outputs, chunk[0])

        loss, outputs = jax.lax.scan(chunk_loss, jnp.zeros((), jnp.float32), chunks(hidden_BTD, *arrays))
        return loss, jax.tree.map(lambda output: unchunk(output, hidden_BTD.shape[1]), outputs)

    def summed(*arguments):
        loss, outputs = local_loss(*arguments)
        return jax.lax.psum(loss, BATCH[0]), outputs

    given = (BATCH, _WHOLE, _WHOLE, *(BATCH for _ in arrays))
    run = _on_each_device(local_loss, mesh, hidden_BTD, given, (_WHOLE, BATCH), summed)
    return run(hidden_BTD, embedding_VD, constants, *arrays)


def chunked_loss_and_gradients(
    terms: Terms,
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    vocab_size: int,
    *arrays: jax.Array,
    constants: Any = (),
    mesh: Mesh | None = None,
) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, jax.Array]]:
    """`chunked_loss`, and its gradients in `hidden_BTD` and `embedding_VD`, taken while a chunk is at hand."""

    def local_loss(hidden_BTD, embedding_VD, constants, *arrays):
        def chunk_loss(carry, chunk):
            loss, embedding_grad_DV = carry
            hidden_ND = rows(chunk[0])
            logits_NV = products.logits(hidden_ND, embedding_VD, vocab_size)
            chunk_sum, logits_grad_NV, outputs = terms(constants, logits_NV, *map(_flat, chunk[1:]))
            logits_grad_NV = logits_grad_NV.astype(hidden_ND.dtype)
            hidden_grad_ND = logits_grad_NV @ embedding_VD
            # In this form the small factor is transposed, not the large one.
            embedding_grad_DV += jnp.einsum("nd,nv->dv", hidden_ND, logits_grad_NV, preferred_element_type=jnp.float32)
            outputs = _unflat(outputs, chunk[0]), hidden_grad_ND.reshape(chunk[0].shape)
            return (loss + chunk_sum, embedding_grad_DV), outputs

        start = (jnp.zeros((), jnp.float32), jnp.zeros(embedding_VD.shape[::-1], jnp.float32))
        (loss, embedding_grad_DV), outputs = jax.lax.scan(chunk_loss, start, chunks(hidden_BTD, *arrays))
        outputs, hidden_grad_BTD = jax.tree.map(lambda output: unchunk(output, hidden_BTD.shape[1]), outputs)
        return loss, outputs, hidden_grad_BTD, embedding_grad_DV

    def summed(*arguments):
        loss, outputs, hidden_grad_BTD, embedding_grad_DV = local_loss(*arguments)
        loss, embedding_grad_DV = jax.lax.psum((loss, embedding_grad_DV), BATCH[0])
        return loss, outputs, hidden_grad_BTD, embedding_grad_DV

    given = (BATCH, _WHOLE, _WHOLE, *(BATCH for _ in arrays))
    run = _on_each_device(local_loss, mesh, hidden_BTD, given, (_WHOLE, BATCH, BATCH, _WHOLE), summed)
    loss, outputs, hidden_grad_BTD, embedding_grad_DV = run(hidden_BTD, embedding_VD, constants, *arrays)
    return (loss, outputs), (hidden_grad_BTD, embedding_grad_DV.T.astype(embedding_VD.dtype))


_WHOLE = PartitionSpec()


def _on_each_device(
    local: Callable[..., Any],
    mesh: Mesh | None,
    hidden_BTD: jax.Array,
    given: Any,
    returned: Any,
    summed: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`local`, or where rows lie on several devices, `summed` on the rows of each.

    Left to the compiler, the devices would take the chunks of all rows together and add up sums after each of them.
    The vocabulary stays as it is cut (tensor). Rows that do not divide are left to the compiler after all.
    """
    if mesh is None or row_shards(mesh) == 1 or hidden_BTD.shape[0] % row_shards(mesh):
        return local
    axes = set(BATCH[0])
    return jax.shard_map(
        summed or local, mesh=mesh, in_specs=given, out_specs=returned, axis_names=axes, check_vma=False
    )


def scaled(gradients: Sequence[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    """Gradients of a loss times the cotangent of the loss, each in its own type."""
    return tuple(gradient * cotangent.astype(gradient.dtype) for gradient in gradients)


def _terms(_, logits_NV, targets_N, weights_N):
    highest_N1, exponentials_NV, sum_N1 = softmax_parts(logits_NV)
    nll_N = nll(logits_NV, highest_N1, sum_N1, targets_N)
    is_target_NV = jnp.arange(logits_NV.shape[-1])[None] == targets_N[:, None]
    expected_NV = exponentials_NV * (weights_N[:, None] / sum_N1)
    logits_grad_NV = expected_NV - jnp.where(is_target_NV, weights_N[:, None], 0.0)
    return jnp.sum(nll_N * weights_N), logits_grad_NV, nll_N


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_cross_entropy(
    vocab_size: int,
    mesh: Mesh | None,
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return chunked_loss(_terms, hidden_BTD, embedding_VD, vocab_size, targets_BT, weights_BT, mesh=mesh)


def _forward(vocab_size, mesh, hidden_BTD, embedding_VD, targets_BT, weights_BT):
    return chunked_loss_and_gradients(_terms, hidden_BTD, embedding_VD, vocab_size, targets_BT, weights_BT, mesh=mesh)


def _backward(vocab_size, mesh, gradients, cotangents):
    return (*scaled(gradients, cotangents[0]), None, None)


_weighted_cross_entropy.defvjp(_forward, _backward)


def chunks(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts `[B, T, …]` along time into `[N, B, C, …]` with B × C near CHUNK_TOKENS; pads time with zeros.

    Time is cut, not rows, so that rows may stay sharded over devices.
    """
    batch, length = arrays[0].shape[:2]
    number = max(1, round(batch * length / CHUNK_TOKENS))
    size = -(-length // number)
    number = -(-length // size)

    def cut(array):
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, number * size - length)
        padded = jnp.pad(array, padding) if number * size > length else array
        return jnp.moveaxis(padded.reshape(batch, number, size, *array.shape[2:]), 1, 0)

    return tuple(cut(array) for array in arrays)


def unchunk(array_NBC: jax.Array, length: int) -> jax.Array:
    """Undoes `chunks` for one array."""
    number, batch, size = array_NBC.shape[:3]
    return jnp.moveaxis(array_NBC, 0, 1).reshape(batch, number * size, *array_NBC.shape[3:])[:, :length]


def _flat(array_BC: jax.Array) -> jax.Array:
    return array_BC.reshape(-1, *array_BC.shape[2:])


def _unflat(outputs: Any, hidden_BCD: jax.Array) -> Any:
    return jax.tree.map(lambda output_N: output_N.reshape(hidden_BCD.shape[:2]), outputs)
