"""Which part of a conversation a model reads where the whole is too long."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ssl_jax.dialogue import Turn
from ssl_jax.errors import UserError

_FIRST_GUESS = 64


class Prompt(NamedTuple):
    """A context to answer.

    Attributes:
      tokens: int32[n], up to the beginning of the reply.
      dropped_turns: turns that are not shown at all.
      dropped_tokens: how many tokens longer the whole conversation is.
    """

    tokens: np.ndarray
    dropped_turns: int = 0
    dropped_tokens: int = 0


def fit(
    turns: Sequence[Turn], max_tokens: int, encode: Callable[[Sequence[Turn]], list[int]], *, starts_anywhere: bool
) -> Prompt:
    """The most recent part of a conversation that fits.

    The whole conversation where it fits. Else its leading system turn and the newest whole turns that fit behind it.
    Else the newest turn without its beginning, behind the system turn. A system turn that does not fit either loses its
    end, but no more than the newest turn needs, and it keeps up to half of the room. Cuts are between characters, and
    keep as many as fit: with one more, the prompt would be too long.

    Args:
      turns: so far, in order.
      max_tokens: upper bound on the prompt's length.
      encode: the ids of a conversation, with what opens the reply.
      starts_anywhere: whether what is kept may begin with any turn, or only with the user's.

    Raises:
      UserError: the template and the beginning of the reply leave no room for a character of the newest turn.
    """
    whole = encode(turns)
    if len(whole) <= max_tokens:
        return Prompt(np.array(whole, np.int32))
    system = tuple(turns[:1]) if turns[0].role == "system" and len(turns) > 1 else ()
    rest = turns[len(system) :]
    starts = [start for start in range(1, len(rest)) if starts_anywhere or rest[start].role == "user"]
    # Fewer turns are never longer.
    first = bisect.bisect_left(starts, True, key=lambda start: len(encode((*system, *rest[start:]))) <= max_tokens)
    if first < len(starts):
        tokens, dropped = encode((*system, *rest[starts[first] :])), starts[first]
        return Prompt(np.array(tokens, np.int32), dropped, len(whole) - len(tokens))
    # In so small a room that the system turn's place is all of it, the newest turn comes first.
    for head in dict.fromkeys((system, ())):
        if tokens := _cut(head, rest[-1], max_tokens, encode):
            return Prompt(np.array(tokens, np.int32), len(turns) - len(head) - 1, len(whole) - len(tokens))
    empty = len(encode([dataclasses.replace(rest[-1], content="")]))
    raise UserError(
        f"a prompt of at most {max_tokens} tokens has no room: the template and the beginning of the reply take "
        f"{empty}; allow a longer prompt"
    )


def _cut(
    system: tuple[Turn, ...], newest: Turn, max_tokens: int, encode: Callable[[Sequence[Turn]], list[int]]
) -> list[int] | None:
    """The end of the newest turn, behind as much of the system turn's beginning as fits; None without room for it."""

    def shown(system_text: str, newest_text: str) -> list[int]:
        head = [dataclasses.replace(turn, content=system_text) for turn in system]
        return encode((*head, dataclasses.replace(newest, content=newest_text)))

    def longest_end(room: int) -> int:
        size = len(newest.content)
        return _most(size, lambda count: len(shown("", newest.content[size - count :])) <= room)

    system_text = system[0].content if system else ""
    empty = len(shown("", ""))
    half = min(len(shown(system_text, "")) - empty, max(0, max_tokens - empty) // 2)
    kept = longest_end(max_tokens - half) or longest_end(max_tokens)
    if empty > max_tokens or (newest.content and not kept):
        return None
    text = newest.content[len(newest.content) - kept :]
    kept = _most(len(system_text), lambda count: len(shown(system_text[:count], text)) <= max_tokens)
    return shown(system_text[:kept], text)


def _most(size: int, fits: Callable[[int], bool]) -> int:
    """A count up to `size` that fits while the next one does not; 0, which is not tried, where not even 1 fits."""
    low, high = 0, min(_FIRST_GUESS, size)
    while high > low and fits(high):
        low, high = high, min(2 * high, size)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
