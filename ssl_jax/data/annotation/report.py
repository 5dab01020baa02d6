"""What the annotations of many dialogues say, by language."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from ssl_jax.data.annotation.records import annotation_of
from ssl_jax.dialogue import Dialogue

# Memory is bounded: beyond this many different keywords the rarest are forgotten, all that came as seldom.
_MAX_KEYWORDS = 200_000


@dataclasses.dataclass
class _Totals:
    dialogues: int = 0
    turns: int = 0
    words_per_turn: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    tags: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    keywords: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    entities: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def summarize(dialogues: Iterable[Dialogue], most: int = 20) -> dict[str, Any]:
    """Totals of annotated dialogues by language, most frequent language first; those without annotation are left out.

    Args:
      dialogues: a stream; read once, in bounded memory.
      most: how many of the most frequent keywords to list.

    Returns:
      JSON: `{"en": {"dialogues": 2, "turns": 9, "words": 70, "words_per_turn": {"mean": 7.8, "median": 7, "p95": 15},
      "tags": {"NOUN": 0.21, …}, "keywords": [{"phrase": "music", "dialogues": 2}, …], "entities": {"date": 3, …}}}`.
      Tags are shares of all words, keywords are counted once a dialogue; what was not annotated has no key.
    """
    totals: dict[str, _Totals] = {}
    for dialogue in dialogues:
        if record := annotation_of(dialogue):
            _add(totals.setdefault(record["language"], _Totals()), record, len(dialogue.turns))
    by_size = sorted(totals.items(), key=lambda item: (-item[1].dialogues, item[0]))
    return {language: _as_json(found, most) for language, found in by_size}


def _add(totals: _Totals, record: Any, turns: int) -> None:
    totals.dialogues += 1
    totals.turns += turns
    for turn in record.get("turns", ()):
        totals.tags.update(turn.get("tags", ()))
        words = turn.get("words", turn.get("tags"))
        if words is not None:
            totals.words_per_turn[len(words)] += 1
    totals.keywords.update({keyword["phrase"] for keyword in record.get("keywords", ())})
    totals.entities.update(entity["type"] for entity in record.get("entities", ()))
    floor = 0
    while len(totals.keywords) > _MAX_KEYWORDS:
        floor += 1
        totals.keywords = collections.Counter({name: n for name, n in totals.keywords.items() if n > floor})


def _as_json(totals: _Totals, most: int) -> dict[str, Any]:
    summary: dict[str, Any] = {"dialogues": totals.dialogues, "turns": totals.turns}
    if lengths := totals.words_per_turn:
        words = sum(length * turns for length, turns in lengths.items())
        summary["words"] = words
        summary["words_per_turn"] = {
            "mean": round(words / lengths.total(), 2),
            "median": _quantile(lengths, 0.5),
            "p95": _quantile(lengths, 0.95),
        }
    if tags := totals.tags:
        summary["tags"] = {tag: round(count / tags.total(), 4) for tag, count in _ranked(tags)}
    if totals.keywords:
        summary["keywords"] = [
            {"phrase": phrase, "dialogues": count} for phrase, count in _ranked(totals.keywords)[:most]
        ]
    if totals.entities:
        summary["entities"] = dict(_ranked(totals.entities))
    return summary


def _ranked(counts: collections.Counter[str]) -> list[tuple[str, int]]:
    """Most frequent first; equals by name, so that the order of the dialogues does not show."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _quantile(lengths: collections.Counter[int], fraction: float) -> int:
    """The least length that at least this fraction of the turns does not exceed."""
    below = 0
    for length in sorted(lengths):
        below += lengths[length]
        if below >= fraction * lengths.total():
            return length
    raise ValueError("no turns")
