"""Arithmetic of a run and the time that it takes at least, and probably."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ssl_jax.config import Config
from ssl_jax.hardware import Chip
from ssl_jax.model import GPT2
from ssl_jax.plan import Plan, flops_per_token, parameter_count

# Of the peak. llm.c reaches 39 to 46 % with GPT-2 on H100 and 56 to 61 % on A100, MaxText 61 to 67 % on v5e.
USUAL_MFU = 0.4


@dataclasses.dataclass(frozen=True)
class Cost:
    """What all steps of a run compute.

    Attributes:
      tokens_per_step: that the student reads, padding counted.
      flops_per_token: of the student, forward and backward.
      step_flops: of one step: the student's, the teachers', and what rematerialization repeats.
      total_flops: of all steps.
      drawn_tokens: by the teacher in all rounds, at most.
    """

    tokens_per_step: int
    flops_per_token: int
    step_flops: int
    total_flops: int
    drawn_tokens: int

    def seconds(self, flops_per_second: float) -> float:
        """Time of all steps at that rate."""
        return self.total_flops / flops_per_second


def cost(config: Config, plan: Plan, shape: GPT2, teachers: Mapping[str, GPT2]) -> Cost:
    """The arithmetic of a run.

    Args:
      config: the configuration.
      plan: its plan.
      shape: the student's.
      teachers: shapes of teachers other than the average, by name.
    """
    length = config.train.sequence_length
    per_token = flops_per_token(shape, length)
    tokens = plan.rows * length * (2 if config.objectives.r_drop else 1)
    # Forward and backward are three times forward; what is repeated is all of the forward pass or little of it.
    repeated = 1 / 3 if shape.remat == "full" else 0.0
    step = tokens * per_token * (1 + repeated)
    if plan.taught:
        names = config.distillation.teachers
        step += sum(
            plan.taught_rows * length * flops_per_token(teachers.get(name, shape), length) / 3 for name in names
        )
    settings = config.pseudo_labels
    asked = bool(plan.pseudo_rows) * settings.prompts_per_round
    asked += bool(plan.translated_rows) * settings.replies_per_round
    drawn = len(plan.round_steps) * asked * settings.num_return_sequences * settings.sampling.new_tokens
    return Cost(tokens, per_token, round(step), round(step * plan.total_steps), drawn)


def decoding_seconds(config: Config, cost: Cost, shape: GPT2, chip: Chip, mesh_shape: Mapping[str, int]) -> float:
    """The least time of drawing all rounds' replies: every step of decoding reads all weights from memory once."""
    rows = config.pseudo_labels.batch_size * mesh_shape["data"] * mesh_shape["fsdp"]
    weights = parameter_count(shape) * shape.dtype.itemsize / mesh_shape["tensor"]
    return cost.drawn_tokens / rows * weights / chip.bandwidth
