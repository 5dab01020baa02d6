"""Settings of a command that takes a model from a run or from elsewhere."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ssl_jax.config.data import TemplateName
from ssl_jax.config.paths import check_path
from ssl_jax.config.section import Section

Weights = Literal["auto", "bfloat16", "int8"]


class ServedWeights(Section):
    """How exactly the weights are kept that answer."""

    weights: Weights = Field(
        default="auto",
        description="auto: as stored; bfloat16: they and the arithmetic; int8: matrices and embeddings, each output "
        "with its scale, and what they multiply.",
    )


class Reranking(Section):
    """Choice among drawn replies by mutual information, forward and backward (Li et al. 2016)."""

    candidates: int = Field(
        default=1,
        ge=1,
        le=256,
        description="Replies drawn for every one that is given: the best by mutual information with the context.",
    )
    prior_weight: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="A candidate's score is log p(reply | context) less this times log p(reply), per token.",
    )
    backward_weight: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="The score also counts this times log p(what was said last | reply) per token; for a model trained "
        "with train.backward_fraction.",
    )

    @model_validator(mode="after")
    def _something_to_choose_from(self) -> Reranking:
        if self.backward_weight and self.candidates == 1:
            raise ValueError("backward_weight chooses among candidates; set candidates to 2 or more")
        return self


class Served(Section):
    """Which model."""

    workdir: str | None = Field(default=None, description="Work directory of a run.")
    model: str | None = Field(default=None, description="Instead: a Hugging Face GPT-2, a directory or a hub name.")
    template: TemplateName | Literal["auto"] = Field(
        default="auto",
        description="How a Hugging Face model reads dialogues; auto: its chat template, else as text.",
    )

    _paths = field_validator("workdir", "model")(check_path)

    @model_validator(mode="after")
    def _one_model(self) -> Served:
        if (self.workdir is None) == (self.model is None):
            raise ValueError("give --workdir DIR or --model DIR_OR_HUB_NAME, one of them")
        return self
