"""The model that somebody names: a work directory's checkpoint, a Hugging Face directory, or the hub."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from ssl_jax import config, model, pretrained, sharding, storage, workdir
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.config import TemplateName
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.errors import UserError
from ssl_jax.storage import Place


def load(
    name: str,
    *,
    template: TemplateName | Literal["auto"] = "auto",
    weights: config.Weights = "auto",
    mesh: jax.sharding.Mesh | None = None,
) -> DialogueModel:
    """The model of a work directory, of a Hugging Face directory, or of the hub.

    Args:
      name: a directory, that of a run also in a bucket, or a hub name such as `gpt2`.
      template: how a Hugging Face model reads dialogues, as `tokenizer.template`; a work directory knows its own.
      weights: how exactly they are kept, see `model.with_weights`.
      mesh: where the parameters go; None for one device.

    Raises:
      UserError: nothing by that name, or what is there cannot be used.
    """
    place = workdir.find(name)
    directory = place.local
    if (directory / workdir.CONFIG).is_file():
        return _with_weights(load_checkpoint(place, mesh=mesh), weights)
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise UserError(
            f"{name} is neither a work directory (it has no config.yaml) nor a Hugging Face model (no config.json)"
        )
    shape, params, tokenizer = pretrained.load(name, template=template, mesh=mesh)
    return _with_weights(DialogueModel(shape, params, tokenizer, mesh), weights)


def load_named(
    workdir_name: str | None,
    model_name: str | None,
    template: TemplateName | Literal["auto"] = "auto",
    weights: config.Weights = "auto",
) -> DialogueModel:
    """The model that a command's `--workdir` or `--model` names; exactly one of them does.

    It lies on one device or, where several processes ask together, on all of theirs: as the run's mesh says if that
    fits them, else with a copy on each.
    """
    mesh = _mesh_of_all(workdir_name) if jax.process_count() > 1 else None
    if workdir_name is not None:
        return _with_weights(load_checkpoint(workdir_name, mesh=mesh), weights)
    assert model_name is not None
    return load(model_name, template=template, weights=weights, mesh=mesh)


def _mesh_of_all(workdir_name: str | None) -> jax.sharding.Mesh:
    settings = config.Mesh() if workdir_name is None else workdir.read_config(workdir_name).mesh
    try:
        return sharding.make_mesh(settings)
    except UserError:
        return sharding.make_mesh(config.Mesh())


def load_checkpoint(
    name: str | Path | Place, *, step_number: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> DialogueModel:
    """The model of a work directory: its best checkpoint where the run has one, else its newest good one.

    Raises:
      UserError: no work directory, or no checkpoint in it that verifies.
    """
    settings, place = workdir.read_config(name), storage.place(name)
    checkpoints = Checkpoints(place.path(workdir.CHECKPOINTS))
    if step_number is None:
        step_number = served_step(checkpoints, settings.train)
    if step_number is None:
        raise UserError(
            f"{place.name} has no good checkpoint yet; run python -m ssl_jax.train --config "
            f"{place.local / workdir.CONFIG} --workdir {place.name}"
        )
    tokenizer = DialogueTokenizer.load(place.local / workdir.TOKENIZER)
    workdir.check_tokenizer(place, tokenizer.fingerprint)
    shape = model.GPT2.from_config(settings.model, tokenizer.vocab_size, mesh)
    item = "ema" if settings.optimizer.ema_decay else "params"
    if item == "ema":
        shape = dataclasses.replace(shape, param_dtype=np.dtype(np.float32))
    abstract = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    if mesh is not None:
        abstract = sharding.place(abstract, sharding.shard_params(abstract, mesh))
    return DialogueModel(shape, checkpoints.restore(step_number, {item: abstract})[item], tokenizer, mesh)


def _with_weights(loaded: DialogueModel, weights: config.Weights) -> DialogueModel:
    shape, params = model.with_weights(loaded.shape, loaded.params, weights)
    return dataclasses.replace(loaded, shape=shape, params=params)


def served_step(checkpoints: Checkpoints, settings: config.Train) -> int | None:
    """The verified step that is evaluated and that answers: the best one if so configured, else the newest."""
    best = checkpoints.best() if settings.load_best_model_at_end else None
    return checkpoints.newest() if best is None else best
