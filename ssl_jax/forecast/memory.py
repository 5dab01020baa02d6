"""Memory of the train step on one device, by kind, from shapes alone.

What the backward pass keeps of the forward pass is not modelled but read off the step itself, traced with the rows of
one device. What is left to a rule are the buffers around it: gradients, logits of a chunk, a recomputed block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import losses, model, programs, terms
from ssl_jax.config import Config
from ssl_jax.plan import Plan

# Logits, their exponentials, and their gradient.
_LOGIT_BUFFERS = 3


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device during the train step, at its peak.

    Attributes:
      params: the student's parameters.
      ema: their average.
      optimizer: moments and counters.
      teachers: parameters of teachers other than the average.
      accumulated: gradients that micro-batches add up.
      activations: what the backward pass keeps of the forward pass.
      loss: logits of one chunk of tokens with what the loss makes of them, and the vocabulary's gradient.
      backward: gradients of all parameters, and what the backward pass computes again of one block.
      gathered: parameters of one block, and the vocabulary, put together from the devices that share them.
      batch: its arrays.
    """

    params: int
    ema: int
    optimizer: int
    teachers: int
    accumulated: int
    activations: int
    loss: int
    backward: int
    gathered: int
    batch: int

    @property
    def total(self) -> int:
        """At the peak: the loss is done before the backward pass begins, the rest is there all the time."""
        parts = dataclasses.asdict(self)
        return sum(parts.values()) - min(self.loss, self.backward)


def estimate(
    config: Config,
    plan: Plan,
    made: programs.Programs,
    mesh_shape: Mapping[str, int],
    teachers: Sequence[Any],
    *,
    platform: str,
) -> Memory:
    """Estimates the memory of the train step on one device.

    Args:
      config: the configuration.
      plan: its plan.
      made: its programs; the state's leaves know how they are sharded.
      mesh_shape: sizes of the mesh's axes.
      teachers: abstract parameters of teachers other than the average, sharded.
      platform: JAX's name of the backend that will run it.
    """
    state, shape = made.abstract_state, made.shape
    row_shards, tensor = mesh_shape["data"] * mesh_shape["fsdp"], mesh_shape["tensor"]
    rows = plan.rows // row_shards // config.train.gradient_accumulation_steps
    length = config.train.sequence_length
    params = _bytes(state.params)
    activations = _kept(made, rows, length, tensor, shape.remat)
    recomputed = 0
    if shape.remat != "none":
        recomputed = max(0, _kept(made, rows, length, tensor, "none") - activations) // shape.n_layer
    elif platform == "cpu" and (not shape.scan_layers or shape.scan_unroll > 1):
        # Without a loop XLA on CPU also keeps matrix products as they were before their biases were added.
        width = shape.n_inner + 4 * shape.n_embd
        activations += rows * length * width * shape.dtype.itemsize * shape.n_layer // tensor
    is_shared = mesh_shape["fsdp"] > 1
    vocabulary = shape.padded_vocab_size * shape.n_embd // tensor
    block = (4 * shape.n_embd + 2 * shape.n_inner) * shape.n_embd // tensor
    gathered = (vocabulary + block) * shape.dtype.itemsize if is_shared else 0
    per_chunk = min(rows * length, losses.CHUNK_TOKENS)
    logits = _LOGIT_BUFFERS * per_chunk * 4 * shape.padded_vocab_size // tensor
    return Memory(
        params=params,
        ema=_bytes(state.ema),
        optimizer=_bytes(state.optimizer_state) + _bytes(state.confidence),
        teachers=_bytes(teachers),
        accumulated=params if config.train.gradient_accumulation_steps > 1 else 0,
        activations=activations,
        loss=logits + 4 * vocabulary,
        backward=params + recomputed,
        gathered=gathered,
        batch=plan.rows // row_shards * (5 * length + 1) * 4,
    )


def device_bytes(leaf: Any) -> int:
    """Bytes of an abstract array on each device that holds a part of it."""
    sharding_of = getattr(leaf, "sharding", None)
    shape = sharding_of.shard_shape(leaf.shape) if sharding_of is not None else leaf.shape
    item = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
    return int(np.prod(shape, dtype=np.int64)) * item


def _bytes(tree: Any) -> int:
    return sum(map(device_bytes, jax.tree.leaves(tree)))


def _kept(made: programs.Programs, rows: int, length: int, tensor: int, remat: str) -> int:
    """Bytes that the backward pass keeps of the forward pass of so many rows, but for the parameters themselves."""
    # cuDNN's kernel cannot be traced where there is no NVIDIA GPU; splash attention keeps the same arrays.
    fused = made.shape.attn_implementation != "einsum"
    shape = dataclasses.replace(made.shape, mesh=None, remat=remat, attn_implementation="splash" if fused else "einsum")
    settings = made.settings
    teaching = settings.teaching and settings.teaching.of_micro_batches(settings.accumulation)
    if teaching is not None:
        # No gradient goes through a teacher, so that any parameters do.
        teaching = dataclasses.replace(teaching, rows=min(rows, teaching.rows), shapes=(None,) * len(teaching.shapes))

    def forward(params, ema, confidence, batch, key):
        batch = {**batch, "fed": batch["tokens"], "number": batch["stream"]}
        batch |= {name: batch["loss_weights"] for name in ("factors", "soft_factors")}
        known = [ema] * len(teaching.shapes) if teaching is not None else []

        def loss(params):
            sums = terms.total(shape, params, batch, key, settings.r_drop, teaching, known, confidence)
            return sums.loss, sums

        _, backward, _ = jax.vjp(loss, params, has_aux=True)
        return backward

    def plain(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    state = made.abstract_state
    params = jax.eval_shape(functools.partial(model.init, shape), jax.eval_shape(jax.random.key, 0))
    average = plain(state.params if state.ema is None else state.ema)
    arguments = (params, average, plain(state.confidence), programs.batch_shapes(rows, length))
    traced = jax.make_jaxpr(forward)(*arguments, jax.eval_shape(jax.random.key, 0)).jaxpr
    given = {id(variable) for variable in traced.invars}
    kept = {id(variable): variable.aval for variable in traced.outvars if id(variable) not in given}
    split = {shape.n_head, shape.n_inner, 3 * shape.n_embd, shape.padded_vocab_size} if tensor > 1 else set()
    return sum(
        device_bytes(aval) // (tensor if split.intersection(aval.shape) else 1)
        for aval in kept.values()
        if hasattr(aval, "dtype")
    )
