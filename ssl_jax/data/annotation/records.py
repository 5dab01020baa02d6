"""Annotations as metadata: made, and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

from ssl_jax.config.annotation import Annotation
from ssl_jax.data.annotation.entities import entities
from ssl_jax.data.annotation.keywords import keywords
from ssl_jax.data.annotation.language import Language, language_of
from ssl_jax.data.annotation.words import segment, tag
from ssl_jax.dialogue import Dialogue

KEY = "annotation"
"""Where annotations are in a dialogue's metadata."""


def annotate(dialogue: Dialogue, what: Collection[Annotation], language: Literal["auto"] | Language) -> Dialogue:
    """Records `what` under `metadata["annotation"]`; turns, id and the rest of the metadata stay as they are.

    The value is JSON:

        {"language": "en",
         "turns": [{"words": ["Call", "me"], "tags": ["VERB", "PRON"], "raw_tags": ["VVB", "PNP"]}, …],
         "keywords": [{"phrase": "phone number", "score": 4.0}, …],
         "entities": [{"type": "time", "text": "5 pm", "turn": 0, "start": 8, "end": 12}, …]}

    `turns` has one element for each turn, with the lists that were asked for; `words` are its text without white
    space, `tags` the Universal POS tags and `raw_tags` the tagger's own, one a word. `keywords` come from all turns but
    the system's, best first. `start` and `end` count the characters of the turn's content. An annotation that is not
    asked for has no key, and one that was there before is replaced.

    Args:
      dialogue: cleaned; annotations of a text that changes later are wrong.
      what: kinds of annotation.
      language: `auto` for `language_of`.

    Raises:
      UserError: the language's tagger is not installed.
    """
    if not what:
        return dialogue
    language = language_of(dialogue) if language == "auto" else language
    record: dict[str, Any] = {"language": language}
    segmented = [segment(turn.content, language) for turn in dialogue.turns]
    turns: list[dict[str, list[str]]] = [{} for _ in segmented]
    if "words" in what:
        for turn, tokens in zip(turns, segmented, strict=True):
            turn["words"] = [token.text for token in tokens]
    if set(what) != {"words"}:
        tagged = [tag(tokens, language) for tokens in segmented]
        if "tags" in what:
            for turn, items in zip(turns, tagged, strict=True):
                turn["tags"] = [item.tag for item in items]
                turn["raw_tags"] = [item.raw_tag for item in items]
        if "keywords" in what:
            said = [items for turn, items in zip(dialogue.turns, tagged, strict=True) if turn.role != "system"]
            record["keywords"] = [{"phrase": phrase, "score": score} for phrase, score in keywords(said, language)]
        if "entities" in what:
            record["entities"] = [
                {"type": kind, "text": turn.content[start:end], "turn": place, "start": start, "end": end}
                for place, (turn, items) in enumerate(zip(dialogue.turns, tagged, strict=True))
                for kind, start, end in entities(turn.content, items, language)
            ]
    if any(turns):
        record["turns"] = turns
    return dataclasses.replace(dialogue, metadata={**dialogue.metadata, KEY: record})


def annotation_of(dialogue: Dialogue) -> Mapping[str, Any]:
    """The record that `annotate` left; empty if there is none, or if a source has something else of that name."""
    record = dialogue.metadata.get(KEY)
    if isinstance(record, Mapping) and record.get("language") in get_args(Language):
        return record
    return {}


def restrict(dialogue: Dialogue, what: Collection[Annotation]) -> Dialogue:
    """The dialogue with no other annotations than these; as if `annotate` had been asked for these alone."""
    record = annotation_of(dialogue)
    metadata = {name: value for name, value in dialogue.metadata.items() if name != KEY}
    if record and what:
        kept = {name: record[name] for name in ("language", "keywords", "entities") if name in {"language", *what}}
        lists = {*(("words",) if "words" in what else ()), *(("tags", "raw_tags") if "tags" in what else ())}
        if lists:
            kept["turns"] = [{name: turn[name] for name in turn if name in lists} for turn in record["turns"]]
        metadata[KEY] = kept
    return dataclasses.replace(dialogue, metadata=metadata)
