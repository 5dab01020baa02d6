"""Teachers whose soft labels a student follows: who they are, and what the step needs to know of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax

from ssl_jax import config, distillation, loading, objectives, terms
from ssl_jax.config import EMA
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.errors import UserError
from ssl_jax.model import GPT2
from ssl_jax.plan import Plan


def load(
    settings: config.Distillation, train: config.Train, tokenizer: DialogueTokenizer, mesh: jax.sharding.Mesh
) -> dict[str, DialogueModel]:
    """The teachers that the configuration names, but the average; none where nothing is distilled.

    Raises:
      UserError: there is no such model, or it cannot read what the student reads.
    """
    if not settings.weight:
        return {}
    loaded = {name: loading.load(name, mesh=mesh) for name in settings.teachers if name != EMA}
    for name, teacher in loaded.items():
        if teacher.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"distillation.teachers: {name} has another tokenizer than this run; give both the same "
                "tokenizer.name_or_path"
            )
        if teacher.shape.n_positions < train.sequence_length:
            raise UserError(
                f"distillation.teachers: {name} reads {teacher.shape.n_positions} tokens at most, and "
                f"train.sequence_length is {train.sequence_length}; lower it"
            )
    return loaded


def teaching(settings: config.Distillation, plan: Plan, shapes: Mapping[str, GPT2]) -> terms.Teaching | None:
    """What the step needs to know of the teachers, in the order of the configuration; None where there are none."""
    if not settings.weight:
        return None
    return terms.Teaching(
        shapes=tuple(None if name == EMA else shapes[name] for name in settings.teachers),
        rows=plan.taught_rows,
        streams=tuple(objectives.STREAM_IDS[name] for name in settings.streams),
        weight=functools.partial(objectives.distillation_weight, settings, total_steps=plan.total_steps),
        rule=distillation.Rule(settings.weighting, settings.threshold, settings.hard, settings.temperature),
        confidence_decay=settings.confidence_decay,
    )
