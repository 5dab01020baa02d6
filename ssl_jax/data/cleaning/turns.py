"""How a step that knows only text changes a dialogue."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from ssl_jax.dialogue import Dialogue, Turn

# Metadata with one value for every turn, which goes when its turn goes.
PER_TURN_METADATA = ("speakers", "times")


def map_content(dialogue: Dialogue, change: Callable[[str], str]) -> Dialogue:
    """Changes the text of every turn; the same object if nothing changes, so that `is` tells."""
    contents = [change(turn.content) for turn in dialogue.turns]
    if all(content == turn.content for content, turn in zip(contents, dialogue.turns, strict=True)):
        return dialogue
    turns = tuple(Turn(turn.role, content) for turn, content in zip(dialogue.turns, contents, strict=True))
    return dataclasses.replace(dialogue, turns=turns)


def cut_content(dialogue: Dialogue, change: Callable[[str], str]) -> Dialogue | None:
    """Like `map_content`, without the turns that become blank; see `keep_turns`."""
    changed = map_content(dialogue, change)
    if changed is dialogue:
        return dialogue
    turns = zip(dialogue.turns, changed.turns, strict=True)
    return keep_turns(changed, [now is before or bool(now.content.strip()) for before, now in turns])


def keep_turns(dialogue: Dialogue, keep: Sequence[bool]) -> Dialogue | None:
    """Takes out turns.

    Args:
      dialogue: any.
      keep: for every turn, whether it stays.

    Returns:
      The dialogue without the others; None if no turn is left, or if it no longer ends as its kind does: a labeled
      dialogue in a reply, a prompt in what is to be answered.
    """
    if all(keep):
        return dialogue
    if not any(keep):
        return None

    def kept(values: Sequence[Any]) -> list[Any]:
        return [value for value, stays in zip(values, keep, strict=True) if stays]

    metadata = {
        key: kept(value) if key in PER_TURN_METADATA and _is_per_turn(value, len(keep)) else value
        for key, value in dialogue.metadata.items()
    }
    result = dataclasses.replace(dialogue, turns=tuple(kept(dialogue.turns)), metadata=metadata)
    return result if result.kind == dialogue.kind else None


def speakers_of(dialogue: Dialogue) -> Sequence[str | None]:
    """Who speaks each turn, as `metadata["speakers"]` tells; None for what is not known."""
    names = dialogue.metadata.get("speakers")
    if not _is_per_turn(names, len(dialogue.turns)):
        return [None] * len(dialogue.turns)
    return [name if isinstance(name, str) else None for name in names]


def _is_per_turn(value: Any, count: int) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) and len(value) == count
