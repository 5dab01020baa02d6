"""From settings to steps, and steps over dialogues, counted."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from ssl_jax.config import cleaning as config
from ssl_jax.data.cleaning import characters, filters, markup, masks, messages
from ssl_jax.dialogue import Dialogue

Step = Callable[[Dialogue], Dialogue | None]
Tag = TypeVar("Tag")

# The function of each step; its keyword arguments are the settings.
FUNCTIONS: dict[type[config.Step], Callable[..., Dialogue | None]] = {
    config.Newlines: characters.newlines,
    config.UnicodeNfc: characters.unicode_nfc,
    config.ControlCharacters: characters.control_characters,
    config.Strip: characters.strip,
    config.FixText: characters.fix_text,
    config.Width: characters.width,
    config.Markup: markup.markup,
    config.MaskUrls: masks.mask_urls,
    config.MaskEmails: masks.mask_emails,
    config.MaskPhones: masks.mask_phones,
    config.MaskIds: masks.mask_ids,
    config.RepeatedPunctuation: characters.repeated_punctuation,
    config.RepeatedCharacters: characters.repeated_characters,
    config.QuotedText: messages.quoted_text,
    config.Signatures: messages.signatures,
    config.Notices: messages.notices,
    config.Bots: messages.bots,
    config.Language: filters.language,
    config.Length: filters.length,
    config.Punctuation: filters.punctuation,
    config.StopWords: filters.stop_words,
}


@dataclasses.dataclass(frozen=True)
class Example:
    """What a step did to a dialogue; `after` is None where it removed it."""

    before: Dialogue
    after: Dialogue | None


@dataclasses.dataclass(frozen=True)
class Counts:
    """Dialogues that each step changed and removed; steps that did nothing are absent.

    Attributes:
      changed: by step.
      removed: by step.
      examples: by step, the first `max_examples` dialogues that it changed or removed.
      max_examples: how many to keep; they are whole dialogues.
    """

    changed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    removed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list[Example]] = dataclasses.field(default_factory=dict)
    max_examples: int = 0

    def add(self, step: str, before: Dialogue, after: Dialogue | None) -> None:
        """Counts what a step did, if it did something."""
        if after is before:
            return
        (self.removed if after is None else self.changed)[step] += 1
        if self.max_examples and len(examples := self.examples.setdefault(step, [])) < self.max_examples:
            examples.append(Example(before, after))


def step_functions(settings: Sequence[config.Step] = config.DEFAULT_STEPS) -> list[tuple[str, Step]]:
    """Names and functions of the steps, ready to be used.

    Raises:
      UserError: a step needs a package that is not installed, or names a language that nobody knows.
    """
    for step in settings:
        match step:
            case config.FixText():
                characters.load_encoding_fixer()
            case config.Language():
                filters.check_identifiable(step.keep)
            case config.StopWords():
                filters.check_stop_words(step.languages)
    return [(step.step, functools.partial(FUNCTIONS[type(step)], **step.settings())) for step in settings]


def clean(
    dialogues: Iterable[tuple[Dialogue, Tag]], counts: Counts, settings: Sequence[config.Step] = config.DEFAULT_STEPS
) -> Iterator[tuple[Dialogue, Tag]]:
    """Applies the steps of `settings` in order.

    Args:
      dialogues: pairs of a dialogue and anything that belongs to it.
      counts: where changed and removed dialogues are counted, by the step's name.
      settings: the steps.

    Returns:
      The pairs that are left, as they are asked for.

    Raises:
      UserError: as for `step_functions`, at once.
    """
    return _clean(dialogues, counts, step_functions(settings))


def _clean(
    dialogues: Iterable[tuple[Dialogue, Tag]], counts: Counts, steps: Sequence[tuple[str, Step]]
) -> Iterator[tuple[Dialogue, Tag]]:
    for dialogue, tag in dialogues:
        for name, step in steps:
            result = step(dialogue)
            counts.add(name, dialogue, result)
            if result is None:
                break
            dialogue = result
        else:
            yield dialogue, tag
