"""Settings of a command that takes a model from a run or from elsewhere."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ssl_jax.config.data import TemplateName
from ssl_jax.config.section import Section

Weights = Literal["auto", "bfloat16", "int8"]


class ServedWeights(Section):
    """How exactly the weights are kept that answer."""

    weights: Weights = Field(
        default="auto",
        description="auto: as stored; bfloat16: they and the arithmetic; int8: matrices and embeddings, each output "
        "with its scale, and what they multiply.",
    )


class Served(Section):
    """Which model."""

    workdir: str | None = Field(default=None, description="Work directory of a run.")
    model: str | None = Field(default=None, description="Instead: a Hugging Face GPT-2, a directory or a hub name.")
    template: TemplateName | Literal["auto"] = Field(
        default="auto",
        description="How a Hugging Face model reads dialogues; auto: its chat template, else as text.",
    )

    @model_validator(mode="after")
    def _one_model(self) -> Served:
        if (self.workdir is None) == (self.model is None):
            raise ValueError("give --workdir DIR or --model DIR_OR_HUB_NAME, one of them")
        return self
