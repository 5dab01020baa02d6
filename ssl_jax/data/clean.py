"""Cleaning that is safe for text a language model learns from: small named steps, each a pure function.

A step takes a dialogue and returns it, a changed copy, or None where nothing is left of it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator
from typing import TypeVar

from ssl_jax.dialogue import Dialogue, Turn

Step = Callable[[Dialogue], Dialogue | None]
Tag = TypeVar("Tag")

# C0 and C1 controls and DEL, without newline and tab.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Dialogues that each step changed and removed; steps that did nothing are absent."""

    changed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    removed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def newlines(dialogue: Dialogue) -> Dialogue:
    """Carriage returns, alone or before a line feed, become line feeds."""
    return _map_content(dialogue, lambda text: text.replace("\r\n", "\n").replace("\r", "\n"))


def unicode_nfc(dialogue: Dialogue) -> Dialogue:
    """Composes characters that have a composed form (Unicode NFC), so that equal text is equal bytes."""
    return _map_content(dialogue, lambda text: unicodedata.normalize("NFC", text))


def control_characters(dialogue: Dialogue) -> Dialogue:
    """Removes C0 and C1 control characters and DEL; newline and tab stay."""
    return _map_content(dialogue, lambda text: _CONTROL_CHARACTERS.sub("", text))


def strip(dialogue: Dialogue) -> Dialogue | None:
    """Removes white space around every turn, and the dialogue if one of its turns is then empty."""
    stripped = _map_content(dialogue, str.strip)
    return stripped if all(turn.content for turn in stripped.turns) else None


STEPS: tuple[Step, ...] = (newlines, unicode_nfc, control_characters, strip)


def clean(dialogues: Iterable[tuple[Dialogue, Tag]], counts: Counts) -> Iterator[tuple[Dialogue, Tag]]:
    """Applies `STEPS` in order.

    Args:
      dialogues: pairs of a dialogue and anything that belongs to it.
      counts: where changed and removed dialogues are counted, by the step's name.

    Yields:
      The pairs that are left.
    """
    for original, tag in dialogues:
        dialogue: Dialogue | None = original
        for step in STEPS:
            before = dialogue
            dialogue = step(before)
            if dialogue is None:
                counts.removed[step.__name__] += 1
                break
            if dialogue is not before:
                counts.changed[step.__name__] += 1
        else:
            yield dialogue, tag


def text_hash(dialogue: Dialogue) -> bytes:
    """Equal for dialogues of equal turns, whatever their roles, ids and metadata."""
    digest = hashlib.sha256()
    for turn in dialogue.turns:
        content = turn.content.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def drop_duplicates(
    dialogues: Iterable[tuple[Dialogue, Tag]], held_out: Container[bytes], seen: set[bytes], counts: Counts
) -> Iterator[tuple[Dialogue, Tag]]:
    """Keeps the first of equal dialogues, and none that is also held out.

    Args:
      dialogues: as for `clean`.
      held_out: `text_hash` of dialogues on the side that must not be seen here; counted as `held_out_duplicates`.
      seen: `text_hash` of the dialogues kept so far, extended here; repetitions are counted as `exact_duplicates`.
      counts: where removed dialogues are counted.
    """
    for dialogue, tag in dialogues:
        key = text_hash(dialogue)
        if key in held_out:
            counts.removed["held_out_duplicates"] += 1
        elif key in seen:
            counts.removed["exact_duplicates"] += 1
        else:
            seen.add(key)
            yield dialogue, tag


def _map_content(dialogue: Dialogue, change: Callable[[str], str]) -> Dialogue:
    """The same object if nothing changes, so that `is` tells."""
    contents = [change(turn.content) for turn in dialogue.turns]
    if all(content == turn.content for content, turn in zip(contents, dialogue.turns, strict=True)):
        return dialogue
    turns = tuple(Turn(turn.role, content) for turn, content in zip(dialogue.turns, contents, strict=True))
    return dataclasses.replace(dialogue, turns=turns)
