"""Entities that a rule finds: patterns for dates, times, amounts and addresses, parts of speech for names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from ssl_jax.config.annotation import EntityType
from ssl_jax.data.annotation import patterns
from ssl_jax.data.annotation.keywords import is_vague
from ssl_jax.data.annotation.language import Language
from ssl_jax.data.annotation.words import Tagged

Span = tuple[EntityType, int, int]
"""Type, and the places of the first character and of the one behind the last."""

_PATTERNS = {"en": patterns.ENGLISH, "zh": patterns.CHINESE, "other": patterns.ANY}
_NAMES_JIEBA: dict[str, EntityType] = {
    "nr": "person", "nrfg": "person", "nrt": "person", "ns": "place", "nt": "organization", "nz": "name",
}  # fmt: skip


def entities(text: str, turn: Sequence[Tagged], language: Language) -> list[Span]:
    """The entities of one turn, in order, without overlap.

    Patterns go first: URLs, e-mail addresses, dates, times of day, amounts (money, percentages, measures). What is left
    may hold names. English: runs of capitalized nouns and adjectives with a proper noun among them, so that a title,
    and a first name that the tagger does not know, belong to it. Chinese: words of two characters or more that jieba
    tags as a person (adjacent ones joined: a family and a given name), a place, an organization or another proper name.

    Args:
      text: the turn's content.
      turn: its tagged words.
      language: of the dialogue; "other" has URLs and e-mail addresses only.
    """
    found: list[Span] = [
        (cast(EntityType, match.lastgroup), match.start(), match.end())
        for match in _PATTERNS[language].finditer(text)
        if match.end() > match.start()
    ]
    taken = {place for _, start, end in found for place in range(start, end)}
    free = [item for item in turn if item.token.start not in taken]
    match language:
        case "en":
            found += _english_names(free)
        case "zh":
            found += _chinese_names(free)
    return sorted(found, key=lambda span: span[1])


def _english_names(turn: Sequence[Tagged]) -> Iterator[Span]:
    capitalized = [
        (token, tag)
        for token, tag, _ in turn
        if tag in {"PROPN", "NOUN", "ADJ", "X"}
        and token.text[0].isupper()
        and len(token.text) > 1
        and not is_vague(token.text)
    ]
    proper = {token.start for token, tag in capitalized if tag == "PROPN"}
    spans: list[Span] = [("name", token.start, token.start + len(token.text)) for token, _ in capitalized]
    # Words of one name have a space between them.
    for span in _joined(spans, gap=1):
        if not proper.isdisjoint(range(span[1], span[2])):
            yield span


def _chinese_names(turn: Sequence[Tagged]) -> Iterator[Span]:
    spans: list[Span] = [
        (_NAMES_JIEBA[raw_tag], token.start, token.start + len(token.text))
        for token, _, raw_tag in turn
        if raw_tag in _NAMES_JIEBA and not is_vague(token.text)
    ]
    persons = _joined((span for span in spans if span[0] == "person"), gap=0)
    others = (span for span in spans if span[0] != "person")
    # One character is more often a word that jieba takes for a name.
    yield from (span for span in itertools.chain(persons, others) if span[2] - span[1] > 1)


def _joined(spans: Iterable[Span], gap: int) -> Iterator[Span]:
    """Makes one span of neighbors with exactly `gap` characters between them."""
    current: Span | None = None
    for span in spans:
        if current is not None and span[1] - current[2] == gap:
            current = (current[0], current[1], span[2])
            continue
        if current is not None:
            yield current
        current = span
    if current is not None:
        yield current
