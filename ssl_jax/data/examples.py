"""What a step did to a dialogue, for people: the part that differs, cut to a bearable size and marked."""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from ssl_jax.dialogue import Dialogue

_TURNS, _CHARACTERS = 4, 400
_CONTEXT = 40
_CUT = "…"
# What a difference is told in: words of letters and digits; all other characters, and those of the scripts that are
# written without spaces, one by one.
_PIECE = re.compile(r"[^\W\u2e80-\U0010ffff]+|.", re.DOTALL)

_WORD = re.compile(r"\w")


def shown(before: Dialogue, after: Dialogue | None) -> dict[str, Any]:
    """The turns around a change, as JSON: `{"id": …, "before": [texts], "after": [texts] | None}`.

    Args:
      before: what a step was given.
      after: what it made of it; None: it removed the dialogue.
    """
    old = [turn.content for turn in before.turns]
    if after is None:
        return {"id": before.id, "before": _cut(old), "after": None}
    new = [turn.content for turn in after.turns]
    if len(old) == len(new):
        pairs = [_around_change(*pair) for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
        old, new = [one for one, _ in pairs], [one for _, one in pairs]
    else:
        start = _shared_start(old, new)
        end = _shared_start(old[start:][::-1], new[start:][::-1])
        old, new = old[start : len(old) - end], new[start : len(new) - end]
    return {"id": before.id, "before": _cut(old), "after": _cut(new)}


def difference(before: Sequence[str], after: Sequence[str] | None) -> Iterator[str]:
    """A line for each text of an example: `[-what went-]{+what came+}`, invisible characters as escapes.

    Args:
      before: texts of `shown`.
      after: the same; None: the dialogue was removed, and its texts are shown as they are.
    """
    if after is None:
        yield from map(visible, before)
        return
    if len(before) == len(after):
        for old, new in zip(before, after, strict=True):
            yield _marked(old, new)
        return
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal":
            yield from map(visible, before[i:i_end])
        elif i_end - i == j_end - j:
            yield from (_marked(old, new) for old, new in zip(before[i:i_end], after[j:j_end], strict=True))
        else:
            yield from (f"[-{visible(text)}-]" for text in before[i:i_end])
            yield from (f"{{+{visible(text)}+}}" for text in after[j:j_end])


def visible(text: str) -> str:
    """Text in which every character can be seen: controls, format characters and odd spaces are escapes."""
    # Letters, marks, numbers, punctuation and symbols can be seen; separators, controls and what has no meaning cannot.
    return "".join(
        _escape(character) if unicodedata.category(character)[0] in "ZC" and character != " " else character
        for character in text
    )


def _escape(text: str) -> str:
    return text.encode("unicode_escape").decode()


def _cut(texts: Sequence[str]) -> list[str]:
    few = [text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} {_CUT}" for text in texts]
    return few if len(few) <= _TURNS else [*few[:_TURNS], f"{_CUT} {len(few) - _TURNS} more turns"]


def _around_change(old: str, new: str) -> tuple[str, str]:
    """Two long texts without the beginning and the end that they share, so that what differs is not cut off."""
    if max(len(old), len(new)) <= _CHARACTERS:
        return old, new
    shared = _shared_start(old, new)
    shared_end = _shared_start(old[shared:][::-1], new[shared:][::-1])
    start, end = max(shared - _CONTEXT, 0), max(shared_end - _CONTEXT, 0)
    head, tail = f"{_CUT} " if start else "", f" {_CUT}" if end else ""
    return f"{head}{old[start : len(old) - end]}{tail}", f"{head}{new[start : len(new) - end]}{tail}"


def _marked(old: str, new: str) -> str:
    """One line for two texts: what they share, shortened, and what differs."""
    is_cut = max(len(old), len(new)) > _CHARACTERS
    changes = _changes(old[:_CHARACTERS], new[:_CHARACTERS])
    # A change that made one text longer shifts where the two are cut: that end is no change of its own.
    if is_cut and sum(gone != come for gone, come in changes) > 1 and changes[-1][0] != changes[-1][1]:
        del changes[-1]
    parts = []
    for number, (gone, come) in enumerate(changes):
        if gone == come:
            parts.append(_shortened(gone, number > 0, number < len(changes) - 1))
            continue
        looks_equal = unicodedata.normalize("NFC", gone) == unicodedata.normalize("NFC", come)
        parts += [f"[-{_escape(gone) if looks_equal else visible(gone)}-]"] * bool(gone)
        parts += [f"{{+{visible(come)}+}}"] * bool(come)
    line = "".join(parts)
    return f"{line} {_CUT}" if is_cut and not line.endswith(_CUT) else line


def _shortened(text: str, follows: bool, precedes: bool) -> str:
    """The ends of a shared text that lie at a change."""
    head, tail = text[: _CONTEXT * follows], text[len(text) - _CONTEXT * precedes :]
    if len(text) <= len(head) + len(tail) + _CONTEXT:
        return visible(text)
    return f"{visible(head)}{' ' * follows}{_CUT}{' ' * precedes}{visible(tail)}"


def _changes(old: str, new: str) -> list[tuple[str, str]]:
    """Both texts in pairs of what corresponds, equal and different ones in turn."""
    pieces, others = _PIECE.findall(old), _PIECE.findall(new)
    pairs: list[tuple[str, str]] = []
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, pieces, others, autojunk=False).get_opcodes():
        one, other = "".join(pieces[i:i_end]), "".join(others[j:j_end])
        pairs += [(one, other)] if kind == "equal" else _narrowed(one, other)
    pairs = _runs(pairs)
    # Words that changed, and what is between them but no word, are one change.
    between = {n for n in range(1, len(pairs) - 1) if pairs[n][0] == pairs[n][1] and not _WORD.search(pairs[n][0])}
    return _runs([part for pair in _runs(pairs, between) for part in _narrowed(*pair)])


def _runs(pairs: Sequence[tuple[str, str]], different: Collection[int] = ()) -> list[tuple[str, str]]:
    """Neighbouring equal pairs joined, and neighbouring different ones, to which the numbers in `different` count."""
    numbers = itertools.groupby(range(len(pairs)), key=lambda n: n not in different and pairs[n][0] == pairs[n][1])
    return [_joined(pairs[number] for number in group) for _, group in numbers]


def _joined(pairs: Iterable[tuple[str, str]]) -> tuple[str, str]:
    ones, others = zip(*pairs, strict=True)
    return "".join(ones), "".join(others)


def _narrowed(gone: str, come: str) -> list[tuple[str, str]]:
    """A difference without the characters that both sides begin and end with, which are pairs of their own."""
    start = _shared_start(gone, come)
    end = _shared_start(gone[start:][::-1], come[start:][::-1])
    stop = len(gone) - end
    pairs = (gone[:start], gone[:start]), (gone[start:stop], come[start : len(come) - end]), (gone[stop:], gone[stop:])
    return [pair for pair in pairs if any(pair)]


def _shared_start(one: Sequence[str], other: Sequence[str]) -> int:
    """How many elements two sequences begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
