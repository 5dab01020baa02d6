"""Settings of the semi-supervised methods: loss terms, soft labels of teachers, noise."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ssl_jax.config.paths import check_path
from ssl_jax.config.section import Section

Weighting = Literal["none", "agreement", "fixmatch", "freematch", "softmatch"]
StreamName = Literal["labeled", "raw", "pseudo", "translated"]

# The teacher that needs no run of its own: the running average of the student.
EMA = "ema"


class Objectives(Section):
    """Weights of the loss terms. Each term is a mean over its own tokens."""

    supervised: float = Field(default=1.0, ge=0, le=1000, description="Weight of labeled replies.")
    lm: float = Field(default=1.0, ge=0, le=1000, description="Weight of raw text.")
    lm_final: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="Weight of raw text at the last step, approached evenly. Absent: as at first.",
    )
    pseudo: float = Field(default=0.5, ge=0, le=1000, description="Weight of pseudo-labeled replies after the ramp.")
    pseudo_ramp: float = Field(
        default=0.3, ge=0, le=1, description="Fraction of the steps over which the weight of pseudo-labels rises."
    )
    back_translation: float = Field(
        default=0.5,
        ge=0,
        le=1000,
        description="Weight of real replies behind contexts that the model made up, after the ramp.",
    )
    backward: float = Field(
        default=1.0, ge=0, le=1000, description="Weight of dialogues read from their last turn to their first."
    )
    prompt_loss_weight: float = Field(
        default=0.0, ge=0, le=1, description="Weight of a labeled dialogue's other tokens, relative to its replies."
    )
    r_drop: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Weight of the divergence between two passes with different dropout (R-Drop); every row is then "
        "fed twice.",
    )


class Distillation(Section):
    """Soft labels: the student follows the distributions of teachers, token by token."""

    weight: float = Field(
        default=0.0, ge=0, le=1000, description="Weight of the divergence after the ramp; 0: no teachers."
    )
    ramp: float = Field(
        default=0.3, ge=0, le=1, description="Fraction of the steps over which the weight rises, from the first one."
    )
    teachers: tuple[str, ...] = Field(
        default=(EMA,),
        min_length=1,
        description="Who teaches: ema (the average of the student), work directories, Hugging Face directories. "
        "Several are an ensemble, whose mean distribution is followed.",
    )
    streams: tuple[StreamName, ...] = Field(
        default=("raw", "pseudo"),
        min_length=1,
        description="Rows that are taught, of labeled, raw, pseudo, translated; only these cost a teacher's pass.",
    )
    weighting: Weighting = Field(
        default="none",
        description="How much a token counts. agreement: by how well the teachers agree. fixmatch: if the likeliest "
        "token has the probability `threshold`. freematch: if it has that of a running mean. softmatch: by a Gaussian "
        "below the running mean.",
    )
    threshold: float = Field(default=0.95, gt=0, lt=1, description="Probability that fixmatch asks for.")
    confidence_decay: float = Field(
        default=0.999, ge=0, lt=1, description="Decay of the running mean and variance of freematch and softmatch."
    )
    hard: bool = Field(default=False, description="Follow the teachers' likeliest token instead of their distribution.")
    temperature: float = Field(
        default=1.0, gt=0, le=100, description="The teachers' logits are divided by this; below 1 sharpens (UDA)."
    )

    _paths = field_validator("teachers")(check_path)

    @model_validator(mode="after")
    def _makes_sense(self) -> Distillation:
        if len(set(self.teachers)) < len(self.teachers):
            raise ValueError("distillation.teachers names one twice; drop it")
        if self.weighting == "agreement" and len(self.teachers) < 2:
            raise ValueError("distillation.weighting agreement compares teachers; name two or more in teachers")
        return self


class Noise(Section):
    """Noise on the words of a context, after a teacher has answered the clean one (noisy self-training)."""

    word_dropout: float = Field(default=0.0, ge=0, lt=1, description="Probability that a word is left out.")
    word_blank: float = Field(default=0.0, ge=0, lt=1, description="Probability that a word is replaced by _.")
    word_shuffle: int = Field(
        default=0, ge=0, le=100, description="Words move by less than this many places; 0 and 1 keep their order."
    )
