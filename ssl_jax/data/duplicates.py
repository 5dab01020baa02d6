"""Dialogues that are equal or nearly so: kept once, and never on two sides of a split."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Callable

import numpy as np

from ssl_jax.data.minhash import Sketches
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

# In a larger bucket, a dialogue is compared with one of each group.
_COMPARED_WITH_ALL = 32


def text_hash(dialogue: Dialogue) -> bytes:
    """Equal for dialogues of equal turns, whatever their roles, ids and metadata."""
    digest = hashlib.sha256()
    for turn in dialogue.turns:
        content = turn.content.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def halves(digest: bytes) -> tuple[int, int]:
    """The first 16 bytes of a digest as two integers of 64 bits."""
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def first_equal(hashes: np.ndarray) -> np.ndarray:
    """For every hash the number of the first equal one, int64[N].

    Args:
      hashes: uint64[N, 2].
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones stay in their order
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, np.any(ordered[1:] != ordered[:-1], axis=1)][: len(order)])
    lengths = np.diff(starts, append=len(order))
    first = np.empty(len(order), np.int64)
    first[order] = np.repeat(order[starts], lengths)
    return first


def near_duplicates(sketches: Sketches, numbers: np.ndarray, threshold: float) -> np.ndarray:
    """Groups dialogues that are nearly equal; see `minhash` for the method.

    Args:
      sketches: of all dialogues.
      numbers: int64[N], those to be grouped by their number in `sketches`, in order; one may be named several times.
      threshold: Jaccard similarity of two dialogues' shingles from which they belong together, in (0, 1].

    Returns:
      int64[N], for every dialogue the place in `numbers` of the first one of its group. Groups are transitive: what
      resembles a member belongs to the group. Equal arguments give equal groups.
    """
    first = first_equal(sketches.hashes[numbers])
    distinct, place_of = np.unique(first, return_inverse=True)
    numbers = numbers[distinct]
    parent = array.array("q", range(len(distinct)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    for bucket in sketches.buckets(numbers, threshold):
        compared: list[int] = []
        for place in bucket.tolist():
            others = [other for other in compared if root(other) != root(place)]
            for found in sketches.similar(int(numbers[place]), numbers[others], threshold) if others else ():
                low, high = sorted((root(place), root(others[found])))
                parent[high] = low
            if len(bucket) <= _COMPARED_WITH_ALL or all(root(other) != root(place) for other in compared):
                compared.append(place)
    roots = np.fromiter(map(root, range(len(distinct))), np.int64, len(distinct))
    return distinct[roots][place_of]


def near_leaks(sketches: Sketches, train: np.ndarray, held_out: np.ndarray, threshold: float) -> np.ndarray:
    """Finds what is nearly the same on both sides of a split.

    Args:
      sketches: of all dialogues.
      train: int64[N], dialogues to learn from, by number.
      held_out: int64[M], dialogues to test on, by number.
      threshold: similarity from which two dialogues count as one, see `near_duplicates`.

    Returns:
      bool[N], whether a dialogue of `train` resembles one that is held out.
    """
    found = np.zeros(len(train), bool)
    numbers = np.concatenate([held_out, train])
    start = len(held_out)
    for bucket in sketches.buckets(numbers, threshold):
        others = numbers[bucket[bucket < start]]
        for place in bucket[bucket >= start].tolist() if len(others) else ():
            if not found[place - start]:
                found[place - start] = any(True for _ in sketches.similar(int(numbers[place]), others, threshold))
    return found


def refuse_leaks(train: np.ndarray, held_out: np.ndarray, train_id: Callable[[int], str]) -> None:
    """Stops a run that would be tested on what it learns from.

    Args:
      train: uint64[N, 2], hashes of the texts to learn from.
      held_out: uint64[M, 2], hashes of the texts to test on.
      train_id: the id of a dialogue of `train` by number.

    Raises:
      UserError: a text is on both sides; the first three are named.
    """
    first = first_equal(np.concatenate([held_out, train]))[len(held_out) :]
    found = np.flatnonzero(first < len(held_out)).tolist()
    if found:
        names = ", ".join(train_id(number) for number in found[:3])
        raise UserError(
            f"data: {len(found)} dialogues to learn from are also held out: {names}\n"
            "remove them from the sources, or set data.split_by group and give both the same group"
        )
