"""Settings of the cleaning steps: one class a step, its docstring what the step does."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_serializer, model_validator
from typing_extensions import TypeAliasType

from ssl_jax.config.section import Section
from ssl_jax.shown import shortened


class Step(Section):
    """A cleaning step. Written as its name, or as a mapping of `step: NAME` and settings."""

    step: Any

    def settings(self) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "step"}

    @model_serializer(mode="plain")
    def _shortest(self) -> str | dict[str, Any]:
        settings = self.settings()
        return {"step": self.step, **settings} if settings else self.step

    def __repr__(self) -> str:
        given = ", ".join(f"{name}: {value!r}" for name, value in self.settings().items())
        return f"{{step: {self.step}, {given}}}" if given else self.step


class Newlines(Step):
    """Carriage returns, alone or before a line feed, become line feeds."""

    step: Literal["newlines"] = "newlines"


class UnicodeNfc(Step):
    """Composes characters that have a composed form (Unicode NFC), so that equal text is equal bytes."""

    step: Literal["unicode_nfc"] = "unicode_nfc"


class ControlCharacters(Step):
    """Removes C0 and C1 control characters and DEL; newline and tab stay."""

    step: Literal["control_characters"] = "control_characters"


class Strip(Step):
    """Removes white space around every turn, and the dialogue if one of its turns is then empty."""

    step: Literal["strip"] = "strip"


class FixText(Step):
    """Repairs text that was decoded in a wrong encoding, once or several times (ftfy). Quotes and widths stay."""

    step: Literal["fix_text"] = "fix_text"


class Width(Step):
    """Full-width letters, digits and signs become ASCII, half-width kana full; Chinese punctuation stays."""

    step: Literal["width"] = "width"


class Markup(Step):
    """Removes HTML, Markdown and BBCode and keeps their text; decodes entities, mentions of Discord and Slack."""

    step: Literal["markup"] = "markup"
    mention: str = Field(
        default="@user",
        pattern=r"^[^<>*_~`\[\]&\\#]*$",
        description="Stands for a mention that gives a number instead of a name.",
    )


class MaskUrls(Step):
    """Replaces web addresses. One ends before the first character that is not ASCII, such as a Chinese one."""

    step: Literal["mask_urls"] = "mask_urls"
    replacement: str = Field(default="<url>", description="Stands for an address.")


class MaskEmails(Step):
    """Replaces e-mail addresses."""

    step: Literal["mask_emails"] = "mask_emails"
    replacement: str = Field(default="<email>", description="Stands for an address.")


class MaskPhones(Step):
    """Replaces telephone numbers: international, national with a trunk zero, North American, Chinese mobile."""

    step: Literal["mask_phones"] = "mask_phones"
    replacement: str = Field(default="<phone>", description="Stands for a number.")


class MaskIds(Step):
    """Replaces card numbers (Luhn), IBANs (mod 97), Chinese ids, IP addresses and long runs of digits."""

    step: Literal["mask_ids"] = "mask_ids"
    replacement: str = Field(default="<id>", description="Stands for a number.")
    min_digits: int = Field(default=9, ge=5, le=1000, description="A run of at least this many digits is an id.")


class RepeatedPunctuation(Step):
    """Shortens runs of one punctuation mark, also a Chinese one: !!!!!! becomes !!!."""

    step: Literal["repeated_punctuation"] = "repeated_punctuation"
    keep: int = Field(default=3, ge=1, le=1000, description="Marks that are left of a longer run.")


class RepeatedCharacters(Step):
    """Shortens runs of one letter: sooooo becomes sooo. Digits stay."""

    step: Literal["repeated_characters"] = "repeated_characters"
    keep: int = Field(default=3, ge=2, le=1000, description="Letters that are left of a longer run.")


class QuotedText(Step):
    """Removes what a message quotes: lines after >, the line that says who wrote them, forwarded messages."""

    step: Literal["quoted_text"] = "quoted_text"


class Signatures(Step):
    """Removes signatures: what follows a line of two dashes, and last lines such as Sent from my phone."""

    step: Literal["signatures"] = "signatures"
    max_lines: int = Field(default=8, ge=1, le=1_000_000, description="More lines after two dashes are no signature.")


class Notices(Step):
    """Removes lines that a messenger wrote: who joined or left, omitted media, deleted messages, missed calls."""

    step: Literal["notices"] = "notices"
    patterns: tuple[str, ...] = Field(default=(), description="More notices: regular expressions of a whole line.")

    @model_validator(mode="after")
    def _regular_expressions(self) -> Notices:
        _check_patterns("patterns", self.patterns)
        return self


class Bots(Step):
    """Removes turns of speakers with a bot's name and turns that command one."""

    step: Literal["bots"] = "bots"
    speakers: tuple[str, ...] = Field(
        default=(r"(?i)(?<!\bab)(?<!\btal)(?<!\bca)bot[\d\])]*$",),
        description="Regular expressions, found in the name of a bot.",
    )
    command_prefixes: tuple[str, ...] = Field(
        default=("!", "/"), description="A turn that begins with one of these and a word is a command."
    )

    @model_validator(mode="after")
    def _regular_expressions(self) -> Bots:
        _check_patterns("speakers", self.speakers)
        if not all(self.command_prefixes):
            raise ValueError("command_prefixes: an empty prefix makes every turn a command")
        return self


class Language(Step):
    """Removes dialogues in other languages (py3langid, all turns together)."""

    step: Literal["language"] = "language"
    keep: tuple[str, ...] = Field(min_length=1, description="ISO 639-1 codes of the languages to keep: [en, zh].")
    min_confidence: float = Field(default=0.5, ge=0, le=1, description="Probability that it is one of them.")
    min_characters: int = Field(
        default=20, ge=0, le=1_000_000_000, description="A shorter dialogue is kept: too little to tell."
    )
    sample_characters: int = Field(
        default=1000, ge=1, le=1_000_000_000, description="Looks at so much of a dialogue, from its start."
    )


class Length(Step):
    """Removes dialogues that are too short or too long. A Chinese character counts as a word."""

    step: Literal["length"] = "length"
    min_turns: int = Field(default=1, ge=1, le=1_000_000_000, description="Turns of a dialogue.")
    max_turns: int | None = Field(default=None, ge=1, le=1_000_000_000, description="Turns of a dialogue.")
    min_characters: int = Field(default=0, ge=0, le=1_000_000_000, description="Characters of a dialogue.")
    max_characters: int | None = Field(default=None, ge=1, le=1_000_000_000, description="Characters of a dialogue.")
    min_words: int = Field(default=0, ge=0, le=1_000_000_000, description="Words of a dialogue.")
    max_words: int | None = Field(default=None, ge=1, le=1_000_000_000, description="Words of a dialogue.")
    min_turn_characters: int = Field(default=0, ge=0, le=1_000_000_000, description="Characters of every turn.")
    max_turn_characters: int | None = Field(
        default=None, ge=1, le=1_000_000_000, description="Characters of every turn."
    )

    @model_validator(mode="after")
    def _bounds(self) -> Length:
        for what in ("turns", "characters", "words", "turn_characters"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if high is not None and low > high:
                raise ValueError(f"min_{what} {low} exceeds max_{what} {high}")
        return self


class Punctuation(Step):
    """Removes punctuation. For analysis and filters: a model trained on this cannot write a sentence."""

    step: Literal["punctuation"] = "punctuation"


class StopWords(Step):
    """Removes frequent words (stopwordsiso). For analysis: a model trained on this cannot write a sentence."""

    step: Literal["stop_words"] = "stop_words"
    languages: tuple[str, ...] = Field(default=("en", "zh"), min_length=1, description="ISO 639-1 codes.")


AnyStep = (
    Newlines | UnicodeNfc | ControlCharacters | Strip | FixText | Width | Markup | MaskUrls | MaskEmails | MaskPhones
    | MaskIds | RepeatedPunctuation | RepeatedCharacters | QuotedText | Signatures | Notices | Bots | Language | Length
    | Punctuation | StopWords
)  # fmt: skip
STEP_CLASSES: dict[str, type[Step]] = {kind.model_fields["step"].default: kind for kind in get_args(AnyStep)}


def _check_patterns(field: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:  # a number, or parentheses, without end
            raise ValueError(f"{field}: {shortened(pattern)} is no regular expression: {error}") from None


def _as_mapping(value: Any) -> Any:
    """A bare name becomes a mapping; unknown names and settings are refused with the nearest known one."""
    if isinstance(value, Step):
        return value
    if isinstance(value, str):
        value = {"step": value}
    if not isinstance(value, dict) or not isinstance(value.get("step"), str):
        raise ValueError(f"a step is a name or a mapping with 'step: NAME' and settings, got {shortened(value)}")
    name = value["step"]
    if name not in STEP_CLASSES:
        raise ValueError(f"unknown step {shortened(name)}{_nearest(name, STEP_CLASSES)}")
    known = [field for field in STEP_CLASSES[name].model_fields if field != "step"]
    for setting in value:
        if setting != "step" and setting not in known:
            raise ValueError(f"{name}: unknown setting {shortened(setting)}{_nearest(str(setting), known)}")
    for setting in known:
        if STEP_CLASSES[name].model_fields[setting].is_required() and setting not in value:
            raise ValueError(f"{name}: setting {setting!r} is missing; write {{step: {name}, {setting}: …}}")
    return value


def _nearest(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else f"; known: {', '.join(known) or 'none'}"


CleaningStep = TypeAliasType(
    "CleaningStep", Annotated[Annotated[AnyStep, Field(discriminator="step")], BeforeValidator(_as_mapping)]
)
"""What a list of steps holds: an instance of one of the classes above."""

DEFAULT_STEPS: tuple[CleaningStep, ...] = (Newlines(), UnicodeNfc(), ControlCharacters(), Strip())


def describe_steps() -> str:
    """Every step with its settings in a paragraph, for help texts."""
    return " ".join(_describe(kind) for kind in STEP_CLASSES.values())


def _describe(kind: type[Step]) -> str:
    meaning = textwrap.dedent(kind.__doc__ or "").strip()
    settings = "; ".join(_describe_settings(kind))
    return f"{kind.model_fields['step'].default}{f' ({settings})' if settings else ''}: {meaning}"


def _describe_settings(kind: type[Step]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        if name != "step":
            yield name if field.is_required() else f"{name} {field.default!r}"
