"""Whether a run can fit at all into the memory of its devices: found out before anything is put there.

What is counted is what cannot be less. The estimate of `forecast.memory` is closer, but may be too high, and takes a
trace of the step.
"""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Mesh

from ssl_jax import sharding
from ssl_jax.config import Config
from ssl_jax.errors import UserError
from ssl_jax.forecast.memory import device_bytes
from ssl_jax.model import GPT2
from ssl_jax.plan import Plan

# Five arrays of four bytes a token, see `programs.batch_shapes`.
_BATCH_BYTES = 20


def check(config: Config, plan: Plan, shape: GPT2, state: Any, mesh: Mesh) -> None:
    """Makes sure that state, batch and what every block keeps of it are less than a device has.

    Args:
      config: the configuration.
      plan: its plan.
      shape: the model's.
      state: abstract, sharded.
      mesh: of devices that are here.

    Raises:
      UserError: they are more; the message names what to lower.
    """
    available = device_memory(mesh)
    if available is None:
        return
    shards, train = sharding.row_shards(mesh), config.train
    known = sum(map(device_bytes, jax.tree.leaves(state)))
    _compare(
        "parameters, their average and moments take",
        known,
        available,
        "lower model.n_layer, n_embd, n_inner, n_positions, vocab_size or vocab_multiple, or raise mesh.fsdp",
    )
    width = shape.n_layer * shape.n_embd * shape.dtype.itemsize
    rows = plan.rows // shards
    batch = rows * train.sequence_length * _BATCH_BYTES
    kept = rows // train.gradient_accumulation_steps * train.sequence_length * width
    _compare(
        f"{rows:,} rows of train.sequence_length {train.sequence_length:,} take at least",
        known + batch + kept,
        available,
        "lower train.per_device_train_batch_size, train.unlabeled_ratio or train.sequence_length, or raise "
        "train.gradient_accumulation_steps",
    )
    rows = train.per_device_eval_batch_size
    _compare(
        f"evaluating train.per_device_eval_batch_size {rows:,} rows takes at least",
        rows * train.sequence_length * (_BATCH_BYTES + shape.n_embd * shape.dtype.itemsize),
        available,
        "lower it",
    )
    drawing = config.pseudo_labels
    if drawing.rounds:
        # Keys and values of every place in every block.
        _compare(
            f"drawing pseudo_labels.batch_size {drawing.batch_size:,} replies takes at least",
            2 * drawing.batch_size * drawing.max_prompt_tokens * width,
            available,
            "lower it",
        )


def device_memory(mesh: Mesh) -> int | None:
    """Bytes of one device's memory; None where it is not known. Devices of a CPU share that of the machine."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit")


def _compare(what: str, needed: int, available: int, advice: str) -> None:
    if needed > available:
        raise UserError(f"{what} {needed / 1e9:,.1f} GB on each device, which has {available / 1e9:,.1f}; {advice}")
