"""Settings of data and tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ssl_jax.config.section import Section

TemplateName = Literal["role_tokens", "end_of_text", "chat_template", "plain"]
"""How a dialogue becomes tokens; see `Tokenizer.template`."""


class Source(Section):
    """Where dialogues come from: files, a packaged data set, or a TFDS data set."""

    path: str | None = Field(default=None, description="Files to read: a path or a glob.")
    format: Literal[
        "auto", "messages", "prompt_completion", "sharegpt", "alpaca", "parlai", "log", "text", "parquet",
        "whatsapp", "telegram", "discord", "slack",
    ] = Field(default="auto", description="Format of the files; auto looks at the first rows.")  # fmt: skip
    dataset: Literal["chitchat"] | None = Field(default=None, description="A data set that a Python package carries.")
    tfds: str | None = Field(default=None, description="A TensorFlow Datasets name.")
    regime: Literal["labeled", "logs", "turns", "prompts", "fragments"] | None = Field(
        default=None,
        description="Form of a packaged data set's dialogues. labeled: roles marked. logs: complete, no roles. "
        "turns: replies without contexts. prompts: contexts without replies. fragments: openings nobody answered.",
    )
    max_dialogues: int | None = Field(
        default=None,
        ge=1,
        description="Take at most this many dialogues. A labeled budget leaves the rest to `unlabeled`.",
    )
    split_lines: bool = Field(default=True, description="Raw text: every line is a turn (else the whole text is one).")

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        places = [name for name in ("path", "dataset", "tfds") if getattr(self, name)]
        if len(places) != 1:
            raise ValueError(f"a source names exactly one of path, dataset, tfds; found {places or 'none'}")
        return self


class Data(Section):
    """Which dialogues, how they are checked and split, and where the prepared form is stored."""

    labeled: tuple[Source, ...] = Field(default=(), description="Sources of dialogues with roles, ending in a reply.")
    unlabeled: tuple[Source, ...] = Field(default=(), description="Sources of raw text and of prompts without replies.")
    test_size: float = Field(default=0.2, gt=0, lt=1, description="Fraction of the labeled dialogues held out as test.")
    dev_size: float = Field(default=0.1, ge=0, lt=1, description="Fraction of the labeled dialogues held out as dev.")
    split_by: Literal["fraction", "time", "group", "hash"] = Field(
        default="hash", description="How held-out dialogues are chosen. hash: by id, stable when data is appended."
    )
    prepared_dir: str = Field(
        default="prepared", description="Folder of prepared data; its name carries a content hash."
    )
    max_rejected_fraction: float = Field(
        default=0.05, ge=0, le=1, description="Stop when more than this fraction of the rows is malformed."
    )
    max_turn_bytes: int = Field(default=100_000, ge=1, description="A longer turn is malformed (UTF-8 bytes).")

    @model_validator(mode="after")
    def _room_for_train(self) -> Data:
        if self.test_size + self.dev_size >= 1:
            raise ValueError("test_size + dev_size must leave something to train on (sum below 1)")
        return self


class Tokenizer(Section):
    """Text to token ids."""

    name_or_path: str | None = Field(
        default=None, description="Hugging Face tokenizer: a directory or a hub name. Absent: fit a byte-level BPE."
    )
    vocab_size: int = Field(
        default=8192, ge=300, le=1_000_000, description="Size of a fitted BPE, control tokens included."
    )
    template: TemplateName | Literal["auto"] = Field(
        default="auto",
        description="How dialogues become tokens. role_tokens: each turn between a token for its role and one for its "
        "end, which are added to the vocabulary. end_of_text: the end-of-text token after each turn (DialoGPT). "
        "chat_template: as the tokenizer's own template says. plain: one turn a line, as a bare language model reads "
        "them. end_of_text and plain do not mark roles, and only role_tokens adds tokens. auto: what a saved tokenizer "
        "records; else role_tokens if the vocabulary has them, chat_template if the tokenizer has one, else "
        "role_tokens for training and plain for a model that was not trained here.",
    )
