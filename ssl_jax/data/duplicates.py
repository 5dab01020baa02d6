"""Dialogues that are equal or nearly so: kept once, and never on two sides of a split."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np

from ssl_jax.data import minhash
from ssl_jax.data.cleaning.apply import Counts
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

Tag = TypeVar("Tag")

# In a larger bucket, a dialogue is compared with one of each group.
_COMPARED_WITH_ALL = 32
# About a word of English, or two of Chinese.
_SHINGLE_SIZE = 4


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
      dialogues: pairs of a dialogue and anything that belongs to it.
      held_out: `text_hash` of dialogues on the side that must not be seen here; counted as `held_out_duplicates`.
      seen: `text_hash` of the dialogues kept so far, extended here; repetitions are counted as `exact_duplicates`.
      counts: where removed dialogues are counted.
    """
    for dialogue, tag in dialogues:
        key = text_hash(dialogue)
        if key in held_out:
            counts.add("held_out_duplicates", dialogue, None)
        elif key in seen:
            counts.add("exact_duplicates", dialogue, None)
        else:
            seen.add(key)
            yield dialogue, tag


def near_duplicates(
    dialogues: Sequence[Dialogue],
    threshold: float = 0.8,
    *,
    unit: Literal["characters", "words"] = "characters",
    size: int = _SHINGLE_SIZE,
) -> list[int]:
    """Groups dialogues that are nearly equal; see `minhash` for the method.

    Case, width, punctuation, white space, roles and the bounds of turns do not count.

    Args:
      dialogues: any.
      threshold: Jaccard similarity of two dialogues' shingles from which they belong together, in (0, 1].
      unit: what a shingle is a run of. Characters suit every language; a Chinese character counts as a word.
      size: units of a shingle.

    Returns:
      For every dialogue the index of the first one in its group. Groups are transitive: what resembles a member
      belongs to the group. Equal arguments give equal groups.
    """
    texts = [_text(dialogue) for dialogue in dialogues]
    first_of_text: dict[str, int] = {}
    same_text = [first_of_text.setdefault(text, index) for index, text in enumerate(texts)]
    distinct = list(first_of_text.values())
    sketches = minhash.sketch([texts[index] for index in distinct], unit, size)
    parent = list(range(len(distinct)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for bucket in sketches.buckets(threshold):
        compared: list[int] = []
        for index in bucket.tolist():
            others = [other for other in compared if root(other) != root(index)]
            for other, _ in sketches.similar(index, np.array(others, np.intp), threshold) if others else ():
                low, high = sorted((root(index), root(other)))
                parent[high] = low
            if len(bucket) <= _COMPARED_WITH_ALL or all(root(other) != root(index) for other in compared):
                compared.append(index)
    group_of_text = {index: distinct[root(place)] for place, index in enumerate(distinct)}
    return [group_of_text[index] for index in same_text]


def drop_near_duplicates(
    dialogues: Sequence[tuple[Dialogue, Tag]],
    held_out: Sequence[Dialogue],
    seen: Sequence[Dialogue],
    threshold: float,
    counts: Counts,
) -> list[tuple[Dialogue, Tag]]:
    """Like `drop_duplicates`, for dialogues that are nearly equal; see `near_duplicates` and `leaks`.

    Args:
      dialogues: pairs of a dialogue and anything that belongs to it.
      held_out: dialogues on the side that must not be seen here; counted as `held_out_near_duplicates`.
      seen: dialogues that are kept already; repetitions are counted as `near_duplicates`.
      threshold: similarity from which two dialogues count as one.
      counts: where removed dialogues are counted.
    """
    leaking = _leaks_by_index([dialogue for dialogue, _ in dialogues], held_out, threshold)
    remaining = []
    for index, pair in enumerate(dialogues):
        if index in leaking:
            counts.add("held_out_near_duplicates", pair[0], None)
        else:
            remaining.append(pair)
    groups = near_duplicates([*seen, *(dialogue for dialogue, _ in remaining)], threshold)
    kept = []
    for index, pair in enumerate(remaining, start=len(seen)):
        if groups[index] == index:
            kept.append(pair)
        else:
            counts.add("near_duplicates", pair[0], None)
    return kept


@dataclasses.dataclass(frozen=True)
class Leak:
    """A dialogue to train on that is also held out, or nearly."""

    train: Dialogue
    held_out: Dialogue
    similarity: float

    def __str__(self) -> str:
        return f"{self.train.id} (train) and {self.held_out.id} (held out) are {self.similarity:.0%} alike"


def leaks(train: Sequence[Dialogue], held_out: Sequence[Dialogue], threshold: float | None = None) -> list[Leak]:
    """Finds what is on both sides of a split.

    Args:
      train: dialogues to learn from.
      held_out: dialogues to test on.
      threshold: similarity from which two dialogues count as one, see `near_duplicates`; None: only equal ones do.

    Returns:
      For every leaking dialogue of `train` one held-out dialogue that it resembles, in the order of `train`.
    """
    found = _leaks_by_index(train, held_out, threshold)
    return [found[index] for index in sorted(found)]


def refuse_leaks(train: Sequence[Dialogue], held_out: Sequence[Dialogue], threshold: float | None = None) -> None:
    """Stops a run that would be tested on what it learns from.

    Raises:
      UserError: there are `leaks`; the first three are named.
    """
    if found := leaks(train, held_out, threshold):
        raise UserError(
            f"data: {len(found)} dialogues are on both sides of the split: {'; '.join(map(str, found[:3]))}\n"
            "remove them from the sources, or set data.split_by group and give both the same group"
        )


def _leaks_by_index(
    train: Sequence[Dialogue], held_out: Sequence[Dialogue], threshold: float | None
) -> dict[int, Leak]:
    by_text = {text_hash(dialogue): dialogue for dialogue in held_out}
    found = {
        index: Leak(dialogue, by_text[key], 1.0)
        for index, dialogue in enumerate(train)
        if (key := text_hash(dialogue)) in by_text
    }
    if threshold is not None:
        start = len(held_out)
        texts = [_text(dialogue) for dialogue in (*held_out, *train)]
        sketches = minhash.sketch(texts, "characters", _SHINGLE_SIZE)
        for bucket in sketches.buckets(threshold):
            ours = bucket[bucket < start]
            for index in bucket[bucket >= start].tolist() if len(ours) else ():
                if index - start not in found:
                    for other, similarity in sketches.similar(index, ours, threshold):
                        found[index - start] = Leak(train[index - start], held_out[other], similarity)
    return found


def _text(dialogue: Dialogue) -> str:
    return "\n".join(turn.content for turn in dialogue.turns)
