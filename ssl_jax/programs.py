"""The compiled functions of a run, made of its plan: what training executes and what is compiled ahead of time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from ssl_jax import model, objectives, sharding, step, teachers
from ssl_jax.config import Config
from ssl_jax.model import GPT2
from ssl_jax.optimizer import learning_rate_schedule, make_optimizer
from ssl_jax.plan import Plan


@dataclasses.dataclass(frozen=True)
class Programs:
    """Functions of the train state, and the shapes, types and shardings of what they take.

    Attributes:
      shape: the model.
      optimizer: optax.
      settings: of the step.
      abstract_state: `jax.ShapeDtypeStruct` leaves with shardings.
      init_state: jitted `(key[, params]) → state`.
      train_step: jitted `(state, batch, key, teachers) → (state, metrics)`; the state is donated.
      pass_over: jitted `state → state`, a step that learns nothing; the state is donated.
    """

    shape: GPT2
    optimizer: optax.GradientTransformation
    settings: step.StepSettings
    abstract_state: step.TrainState
    init_state: Any
    train_step: Any
    pass_over: Any


def make(config: Config, plan: Plan, shape: GPT2, mesh: Mesh, teacher_shapes: Mapping[str, GPT2]) -> Programs:
    """The programs of a run on a mesh; no device is touched.

    Args:
      config: the configuration.
      plan: its plan.
      shape: the model's.
      mesh: of devices that are here, or of described ones (`jax.experimental.topologies`).
      teacher_shapes: of the teachers by name, but the average.

    Raises:
      UserError: an axis of the mesh does not divide an axis of a parameter.
    """
    optimizer = make_optimizer(config.optimizer)
    settings = step.StepSettings(
        objective_weights=functools.partial(
            objectives.weights,
            config.objectives,
            first_round=plan.round_steps[0] if plan.round_steps else plan.total_steps,
            total_steps=plan.total_steps,
        ),
        schedule=learning_rate_schedule(config.optimizer, plan.total_steps, plan.restarts),
        accumulation=config.train.gradient_accumulation_steps,
        token_replacement=config.train.token_replacement,
        ema_decay=config.optimizer.ema_decay,
        births=plan.born,
        r_drop=config.objectives.r_drop,
        teaching=teachers.teaching(config.distillation, plan, teacher_shapes),
    )
    init_state = functools.partial(step.init_state, shape, optimizer, settings)
    abstract_state = _placed_state(jax.eval_shape(init_state, jax.eval_shape(jax.random.key, 0)), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return Programs(
        shape=shape,
        optimizer=optimizer,
        settings=settings,
        abstract_state=abstract_state,
        init_state=jax.jit(init_state, out_shardings=shardings, donate_argnums=1),
        train_step=jax.jit(
            functools.partial(step.train_step, shape, optimizer, settings),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        ),
        pass_over=jax.jit(step.pass_over, donate_argnums=0, out_shardings=shardings),
    )


def batch_shapes(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch of packed rows, as `step` describes it."""
    types = {
        "tokens": jnp.int32,
        "targets": jnp.int32,
        "loss_weights": jnp.float32,
        "positions": jnp.int32,
        "segment_ids": jnp.int32,
    }
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in types.items()}
    return {**batch, "stream": jax.ShapeDtypeStruct((rows,), jnp.int32)}


def abstract_batch(rows: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """`batch_shapes` as they lie on the mesh."""
    by_row = NamedSharding(mesh, sharding.BATCH)
    shapes = batch_shapes(rows, length)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_row) for name, leaf in shapes.items()}


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """What the train step takes for the run's PRNG key."""
    key = jax.eval_shape(jax.random.key, 0)
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def abstract_params(shape: GPT2, mesh: Mesh) -> model.Params:
    """Parameters of a model as they lie on the mesh."""
    return place_params(jax.eval_shape(functools.partial(model.init, shape), jax.eval_shape(jax.random.key, 0)), mesh)


def place_params(abstract: model.Params, mesh: Mesh) -> model.Params:
    """Abstract parameters, stacked or not, as they lie on the mesh."""
    return sharding.place(abstract, sharding.shard_params(abstract, mesh))


def _placed_state(abstract: step.TrainState, mesh: Mesh) -> step.TrainState:
    params = sharding.shard_params(abstract.params, mesh)
    return sharding.place(abstract, sharding.shard_like_params(abstract, params, mesh))
