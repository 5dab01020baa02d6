"""Settings of data and tokenizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from ssl_jax.config.annotation import Annotation, Condition
from ssl_jax.config.cleaning import DEFAULT_STEPS, CleaningStep, describe_steps
from ssl_jax.config.paths import check_path
from ssl_jax.config.section import Section

_PLACES = ("path", "dataset", "tfds", "huggingface")
_FIELDS_OF_PLACES = {
    "language": ("dataset",),
    "split": ("tfds", "huggingface"),
    "fields": ("tfds", "huggingface"),
    "subset": ("huggingface",),
    "revision": ("huggingface",),
    "data_dir": ("tfds",),
}

TemplateName = Literal["role_tokens", "end_of_text", "chat_template", "plain"]
"""How a dialogue becomes tokens; see `Tokenizer.template`."""


class FieldMapping(Section):
    """Which fields of a named data set's examples make a dialogue: text, or prompt (and completion), or messages.

    A name with dots leads into nested fields. Fields that are not named here become metadata.
    """

    text: str | None = Field(default=None, description="Raw text, nobody marked as a speaker.")
    prompt: str | None = Field(default=None, description="What the user says.")
    completion: str | None = Field(default=None, description="The reply; empty or absent makes a prompt.")
    messages: str | None = Field(
        default=None, description="The turns: a list of texts, which user and assistant say in turn, or of messages."
    )
    role: str | None = Field(
        default=None,
        description="Field of a message that says who speaks. Absent: role, or user and assistant in turn without it.",
    )
    content: str | None = Field(default=None, description="Field of a message that holds its text. Absent: content.")
    roles: dict[str, Literal["system", "user", "assistant"]] = Field(
        default={}, description="What a value of role means, for example {customer: user, agent: assistant, '0': user}."
    )
    system: str | None = Field(default=None, description="Instructions that go before the first turn.")
    id: str | None = Field(default=None, description="What identifies the dialogue. Absent: its number in the split.")
    group: str | None = Field(default=None, description="What data.split_by group keeps on one side.")
    time: str | None = Field(default=None, description="What data.split_by time orders by.")

    @field_validator("roles", mode="before")
    @classmethod
    def _numbers_are_text(cls, value: Any) -> Any:
        return {str(key): role for key, role in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _one_form(self) -> FieldMapping:
        forms = [name for name in ("text", "prompt", "messages") if getattr(self, name)]
        if len(forms) != 1:
            raise ValueError(f"fields name exactly one of text, prompt, messages; found {forms or 'none'}")
        for name, needed in (("completion", "prompt"), ("role", "messages"), ("content", "messages")):
            if getattr(self, name) and needed not in forms:
                raise ValueError(f"fields name {name} without {needed}")
        if self.roles and not self.role:
            raise ValueError("fields name roles without role")
        if self.system and self.text:
            raise ValueError("fields name system, but text has no speakers")
        return self


class PostFields(Section):
    """Names of the fields of a forum post; a field that is absent here goes by the usual names.

    Usual names: id, post_id, comment_id; parent_id, parent, reply_to, in_reply_to; thread_id, thread, link_id,
    conversation_id, root; body, text, content, message, selftext; author, user, username, speaker; created_utc,
    created_at, timestamp, time, date. A hyphen in a field's name counts as an underscore.
    """

    id: str | None = Field(default=None, description="What identifies the post.")
    parent: str | None = Field(default=None, description="Id of the post that it answers; empty for the first one.")
    thread: str | None = Field(default=None, description="What all posts of a thread share. Absent: the first post.")
    text: str | None = Field(default=None, description="What the post says.")
    author: str | None = Field(default=None, description="Who wrote it.")
    time: str | None = Field(default=None, description="When: seconds since 1970, or text that sorts by time.")


class Source(Section):
    """Where dialogues come from: files, a packaged data set, or one that TFDS or Hugging Face know by name."""

    path: str | None = Field(
        default=None,
        description="Files to read, as they are or as .gz or .zst: a path, a glob, or a folder with all files in it.",
    )
    format: Literal[
        "auto", "messages", "prompt_completion", "sharegpt", "alpaca", "parlai", "log", "text", "parquet",
        "whatsapp", "telegram", "discord", "slack", "forum", "review",
    ] = Field(default="auto", description="Format of the files; auto looks at the first rows.")  # fmt: skip
    assistant: str | None = Field(
        default=None,
        description="Logs and messenger exports: the speaker whose messages are replies; everybody else is a user. "
        "Absent: messenger exports become raw text.",
    )
    gap_minutes: float = Field(
        default=60.0, gt=0, le=10_000_000, description="Messenger exports: a longer silence ends a dialogue (minutes)."
    )
    posts: PostFields = Field(default=PostFields(), description="Forum posts: the names of their fields.")
    max_paths: int = Field(
        default=32,
        ge=1,
        le=1_000_000,
        description="Forum threads: at most this many dialogues of a thread, the longest paths from its first post.",
    )
    dataset: Literal["chitchat", "chatterbot"] | None = Field(
        default=None, description="A data set that a Python package carries."
    )
    language: tuple[str, ...] = Field(
        default=(), description="Languages of dataset chatterbot: names such as chinese, one or several, or all."
    )
    tfds: str | None = Field(
        default=None, description="A TensorFlow Datasets name, name/config, or the folder of a prepared one."
    )
    huggingface: str | None = Field(
        default=None, description="A data set of the Hugging Face hub, or a folder or file that `datasets` can load."
    )
    split: str | None = Field(
        default=None, description="Part of a tfds or huggingface data set, such as train[:10%]. Absent: train."
    )
    subset: str | None = Field(default=None, description="Configuration of a huggingface data set that has several.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a huggingface data set.")
    data_dir: str | None = Field(
        default=None, description="Where tfds looks for prepared data, and prepares it. Absent: as TFDS itself."
    )
    fields: FieldMapping | None = Field(
        default=None, description="What makes a dialogue in a tfds or huggingface data set."
    )
    regime: Literal["labeled", "logs", "turns", "prompts", "fragments"] | None = Field(
        default=None,
        description="Form of a packaged data set's dialogues. labeled: roles marked. logs: complete, no roles. "
        "turns: replies without contexts. prompts: contexts without replies. fragments: openings nobody answered.",
    )
    max_dialogues: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Take at most this many dialogues. A labeled budget leaves the rest to `unlabeled`.",
    )
    split_lines: bool = Field(default=True, description="Raw text: every line is a turn (else the whole text is one).")
    weight: float = Field(
        default=1.0,
        ge=0.001,
        le=1000,
        description="How many times an epoch of training shows each dialogue. 2.5: twice, and a third time every other "
        "epoch. 0.1: in one epoch of ten. Evaluation does not know it.",
    )

    _paths = field_validator("path", "tfds", "huggingface", "data_dir")(check_path)

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        places = [name for name in _PLACES if getattr(self, name)]
        if len(places) != 1:
            raise ValueError(f"a source names exactly one of {', '.join(_PLACES)}; found {places or 'none'}")
        for name, owners in _FIELDS_OF_PLACES.items():
            if getattr(self, name) and places[0] not in owners:
                raise ValueError(f"{name} goes with {' or '.join(owners)}, not with {places[0]}")
        return self

    @field_validator("language", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


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
    num_proc: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Processes that prepare data at the same time; the result does not depend on it. Absent: one for "
        "each core, where there is enough to do.",
    )
    beam_options: tuple[Annotated[str, StringConstraints(pattern="^--")], ...] | None = Field(
        default=None,
        description="Prepare data on Apache Beam instead (extra beam): options of its pipeline, for example "
        "[--runner=FlinkRunner, --flink_master=HOST:8081]; [] is Beam's runner for one machine. All workers need this "
        "package, and the sources and prepared_dir at the same absolute paths. The result does not depend on it.",
    )
    max_rejected_fraction: float = Field(
        default=0.05, ge=0, le=1, description="Stop when more than this fraction of the rows is malformed."
    )
    cleaning: tuple[CleaningStep, ...] = Field(
        default=DEFAULT_STEPS,
        description="Steps of cleaning in order, each a name or {step: NAME, SETTING: VALUE}. " + describe_steps(),
    )
    near_duplicate_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Dialogues that share this fraction of their character 4-grams (Jaccard similarity) count as one: "
        "the first is kept, and they are never on two sides of a split. Absent: only equal ones do. It is off because "
        "short replies resemble each other by chance. 0.8 is usual. It takes time, and 512 bytes of disk a dialogue "
        "while data are prepared.",
    )
    max_turn_bytes: int = Field(
        default=100_000, ge=1, le=2**30, description="A longer turn is malformed (UTF-8 bytes)."
    )
    language: Literal["auto", "en", "zh"] = Field(
        default="auto", description="Language that annotation assumes. auto: by the script of each dialogue."
    )
    annotate: tuple[Annotation, ...] = Field(
        default=(),
        description="What is recorded about every dialogue as metadata; its text stays as it is. words: segmentation. "
        "tags: parts of speech. keywords: key phrases with scores. entities: dates, times, amounts, addresses, names. "
        "Words take about twice the space of the text, tags four times.",
    )
    keep_if: tuple[Condition, ...] = Field(
        default=(), description="Conditions that every dialogue must meet, for example {field: tags.NOUN, at_least: 2}."
    )
    keyword_prefix: int = Field(
        default=0,
        ge=0,
        le=32,
        description="Tell the model up to this many key phrases of a training dialogue's last reply, in its system "
        "turn, so that phrases given there at generation steer the reply. 0: none.",
    )

    _path = field_validator("prepared_dir")(check_path)

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
    fit_bytes: int = Field(
        default=2**24,
        ge=1,
        le=2**40,
        description="A fitted BPE learns from at most this much text (bytes), drawn evenly from the train splits.",
    )
    direction_tokens: bool = Field(
        default=False,
        description="Add control tokens for dialogues that are read backwards and for contexts that a model made up "
        "(train.backward_fraction, train.back_translation_fraction). They need the template role_tokens.",
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

    _path = field_validator("name_or_path")(check_path)
