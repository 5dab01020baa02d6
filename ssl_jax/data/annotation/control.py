"""Key phrases in the system turn, by which a reply can be steered: the same line in training and at generation.

The line is the last of the system turn, in every language:

    keywords: black holes; telescope; Einstein
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from ssl_jax.data.annotation.keywords import keywords
from ssl_jax.data.annotation.language import Language, language_of
from ssl_jax.data.annotation.records import KEY, annotation_of
from ssl_jax.data.annotation.words import segment, tag
from ssl_jax.dialogue import Dialogue, Turn

_LABEL = "keywords: "
_SEPARATOR = "; "


def steer(dialogue: Dialogue, phrases: Iterable[str]) -> Dialogue:
    """Asks for a reply with key phrases: adds their line to the system turn, or a system turn that is this line.

    Without phrases, and where roles are not marked, the dialogue stays as it is. Annotations keep pointing at the turns
    that they were made of; the line itself is not annotated.
    """
    line = _LABEL + _SEPARATOR.join(" ".join(phrase.split()) for phrase in phrases)
    if line == _LABEL or dialogue.kind == "raw":
        return dialogue
    first, *rest = dialogue.turns
    if first.role == "system":
        return dataclasses.replace(dialogue, turns=(Turn("system", f"{first.content}\n{line}"), *rest))
    moved = dataclasses.replace(dialogue, turns=(Turn("system", line), *dialogue.turns))
    record = annotation_of(dialogue)
    return dataclasses.replace(moved, metadata={**dialogue.metadata, KEY: _one_turn_later(record)}) if record else moved


def keyword_prefix(dialogue: Dialogue, count: int, language: Literal["auto"] | Language = "auto") -> Dialogue:
    """Steers a labeled dialogue to its own last reply, by the reply's best key phrases, best first.

    Trained on such dialogues, a model learns to follow phrases that `steer` gives it for a prompt. A reply without key
    phrases, a prompt and raw text stay as they are, so that the model also sees dialogues without. Held-out dialogues
    must not be prefixed: the line tells what the reply is about.

    Args:
      dialogue: any.
      count: how many phrases at most.
      language: of the dialogue; `auto` for `language_of`.

    Raises:
      UserError: the language's tagger is not installed.
    """
    if not count or dialogue.kind != "labeled":
        return dialogue
    language = language_of(dialogue) if language == "auto" else language
    reply = tag(segment(dialogue.turns[-1].content, language), language)
    return steer(dialogue, [phrase for phrase, _ in keywords([reply], language, count)])


def _one_turn_later(record: Any) -> dict[str, Any]:
    moved = dict(record)
    if "turns" in record:
        moved["turns"] = [{name: [] for name in record["turns"][0]}, *record["turns"]]
    if "entities" in record:
        moved["entities"] = [{**entity, "turn": entity["turn"] + 1} for entity in record["entities"]]
    return moved
