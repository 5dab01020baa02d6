"""What a run saves and goes on from: its state as items of a checkpoint, and what makes a checkpoint its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssl_jax import step, workdir
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.config import Config
from ssl_jax.errors import UserError
from ssl_jax.plan import Plan


def items(state: step.TrainState) -> dict[str, Any]:
    """A state, or its shapes, as the items of a checkpoint: what answers can be read without the optimizer's part."""
    counters = {"step": state.step, "skipped": state.skipped, "state": state.optimizer_state}
    if state.confidence is not None:
        counters["confidence"] = state.confidence
    averaged = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, "optimizer": counters, **averaged}


def restore(checkpoints: Checkpoints, number: int, abstract: step.TrainState) -> step.TrainState:
    """The state that a step's checkpoint holds, placed as the abstract one says.

    Raises:
      UserError: the checkpoint is damaged, or of another structure.
    """
    restored = checkpoints.restore(number, items(abstract))
    counters = restored["optimizer"]
    return step.TrainState(
        step=counters["step"],
        params=restored["params"],
        ema=restored.get("ema"),
        optimizer_state=counters["state"],
        skipped=counters["skipped"],
        confidence=counters.get("confidence"),
    )


def origin(config: Config, content_hash: str, plan: Plan) -> dict[str, Any]:
    """What a checkpoint's meta says about the run that it is of.

    Args:
      config: its configuration.
      content_hash: of its prepared data.
      plan: its rows a step.
    """
    made_with = {"config": workdir.fingerprint(config), "data": content_hash}
    return {**made_with, "seed": config.seed, "labeled_rows": plan.labeled_rows, "rows": plan.rows}


def check_origin(meta: Mapping[str, Any], own: Mapping[str, Any], config: Config, shards: int, name: str) -> None:
    """Makes sure that a checkpoint is of this run, whatever the work directory says, and of as many rows a step.

    Args:
      meta: of the checkpoint.
      own: `origin` of this run.
      config: its configuration.
      shards: devices that see different rows.
      name: of the checkpoint, for people.

    Raises:
      UserError: it is not.
    """
    for key, what in (("config", "another configuration"), ("data", "other data")):
        if meta.get(key, own[key]) != own[key]:
            raise UserError(f"{name} was made with {what}; name another --workdir")
    labeled = meta.get("labeled_rows", own["labeled_rows"])
    if (labeled, meta.get("rows", own["rows"])) == (own["labeled_rows"], own["rows"]):
        return
    divides = labeled % shards == 0
    way_out = f"set it to {labeled // shards}" if divides else f"use a number of devices that divides {labeled}"
    raise UserError(
        f"train.per_device_train_batch_size {config.train.per_device_train_batch_size} on {shards} devices "
        f"gives {own['labeled_rows']} labeled rows a step, and the run has {labeled}; {way_out}"
    )
