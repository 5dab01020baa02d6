"""Settings of linguistic annotation: what is recorded about a dialogue, and conditions on what was recorded."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ssl_jax.config.section import Section
from ssl_jax.shown import shortened

Annotation = Literal["words", "tags", "keywords", "entities"]
"""A kind of annotation; see `ssl_jax.data.annotation.annotate`."""

UniversalTag = Literal[
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
]  # fmt: skip
"""The parts of speech of Universal Dependencies 2."""

EntityType = Literal["url", "email", "date", "time", "amount", "name", "person", "place", "organization"]
"""What a rule finds in text. `name` is a proper name of unknown kind."""

_NUMBERS = ("turns", "words", "characters", *(f"tags.{tag}" for tag in get_args(UniversalTag)))
_LISTS = ("keywords", "entities", *(f"entities.{entity}" for entity in get_args(EntityType)))
_TEXTS = ("language", "kind")


class Condition(Section):
    """What a dialogue must meet to be kept; every part that is set must hold."""

    field: str = Field(
        description="A count: turns, words, characters, tags.NOUN (any Universal POS tag). A list: keywords, entities, "
        "entities.place (any type). A text: language, kind. Or metadata.NAME, what the source said; dots go deeper."
    )
    at_least: float | None = Field(default=None, description="Lower bound of a number, or of a list's length.")
    at_most: float | None = Field(default=None, description="Upper bound of a number, or of a list's length.")
    equals: bool | int | float | str | None = Field(default=None, description="The value itself.")
    contains: tuple[str, ...] = Field(
        default=(), description="Texts of which one must be there as whole words of an element, in any case."
    )
    lacks: tuple[str, ...] = Field(default=(), description="Texts of which none may be there.")

    @field_validator("contains", "lacks", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_the_field(self) -> Condition:
        bounds = {"at_least", "at_most"}
        if self.field in _NUMBERS:
            allowed = {*bounds, "equals"}
        elif self.field in _LISTS:
            allowed = {*bounds, "contains", "lacks"}
        elif self.field in _TEXTS:
            allowed = {"equals"}
        elif self.field.startswith("metadata.") and all(self.field.split(".")):
            allowed = {*bounds, "equals", "contains", "lacks"}
        else:
            known = [*_NUMBERS, *_LISTS, *_TEXTS]
            nearest = difflib.get_close_matches(self.field, known, n=1, cutoff=0.6)
            hint = (
                f"did you mean {nearest[0]}?"
                if nearest
                else "use "
                + ", ".join(
                    [
                        "turns",
                        "words",
                        "characters",
                        "tags.NOUN",
                        "keywords",
                        "entities.place",
                        *_TEXTS,
                        "metadata.NAME",
                    ]
                )
            )
            raise ValueError(f"field {shortened(self.field)} is unknown; {hint}")
        given = {name for name in ("at_least", "at_most", "equals") if getattr(self, name) is not None}
        given |= {name for name in ("contains", "lacks") if getattr(self, name)}
        if not given:
            raise ValueError(f"a condition on {self.field} needs one of {', '.join(sorted(allowed))}")
        if wrong := sorted(given - allowed):
            raise ValueError(f"{wrong[0]} does not fit {self.field}; use one of {', '.join(sorted(allowed))}")
        if isinstance(self.equals, int) and abs(self.equals) >= 2**63:
            raise ValueError(f"equals is a number below 2**63, got {shortened(self.equals)}")
        if self.field in _NUMBERS and isinstance(self.equals, str | bool):
            raise ValueError(f"{self.field} is a number, so equals must be one")
        return self
