"""Which dialogues are held out: pure functions of what is known of them.

hash: by a hash of the id; a dialogue keeps its side when others are added. Sizes are right on average.
fraction: by a permutation of the seed; sizes are exact.
group: like hash, by `metadata["group"]`: a group is never on two sides.
time: the newest by `metadata["time"]` are test, those before them dev.

hash and fraction put dialogues that are alike (of equal text, or nearly) on one side, where a dialogue that is added
later and resembles members of two groups moves the later group. time and group follow what the metadata says. If chance
leaves nothing to train on, the dialogues nearest to it do: a tiny set is trained on rather than held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

SplitBy = Literal["fraction", "time", "group", "hash"]

SIDES = ("train", "dev", "test")


def position(dialogue: Dialogue, split_by: SplitBy) -> float:
    """A stable number in [0, 1) that decides the side of a dialogue, and of its group where groups decide.

    Raises:
      UserError: the dialogue has no group.
    """
    key = repr(_metadata(dialogue, "group")) if split_by == "group" else dialogue.id
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def time(dialogue: Dialogue) -> Any:
    """When a dialogue was.

    Raises:
      UserError: it does not say so.
    """
    return _metadata(dialogue, "time")


def assign(
    positions: np.ndarray,
    alike: np.ndarray,
    split_by: SplitBy,
    test_size: float,
    dev_size: float,
    seed: int,
    times: Sequence[tuple[Any, str]] = (),
) -> np.ndarray:
    """The side of every dialogue as its number among `SIDES`, uint8[N].

    Args:
      positions: float64[N], `position` of every dialogue.
      alike: int64[N], for every dialogue the number of the first one that it must share its side with.
      split_by: how; see above.
      test_size: fraction of test.
      dev_size: fraction of dev.
      seed: of the permutation, for fraction.
      times: for a split by time, `time` and id of every dialogue.

    Raises:
      UserError: times cannot be compared.
    """
    match split_by:
        case "hash":
            return _by_position(positions[alike], test_size, dev_size)
        case "group":
            return _by_position(positions, test_size, dev_size)
        case "fraction":
            # np.unique sorts: units are numbered in the order of their first dialogues.
            units, unit_of = np.unique(alike, return_inverse=True)
            order = np.random.default_rng(seed).permutation(len(units))
            sides = np.empty(len(units), np.uint8)
            sides[order] = _by_rank(len(units), test_size, dev_size)
            return sides[unit_of]
        case "time":
            return _by_time(times, test_size, dev_size)


def _by_position(positions: np.ndarray, test_size: float, dev_size: float) -> np.ndarray:
    """The lowest part of [0, 1) is test, then dev, then train."""
    train, dev, test = range(3)
    start = min(test_size + dev_size, positions.max(initial=0.0))
    return np.select([positions >= start, positions < test_size], [train, test], dev).astype(np.uint8)


def _by_rank(number: int, test_size: float, dev_size: float) -> np.ndarray:
    train, dev, test = range(3)
    held_out = min(round(number * (test_size + dev_size)), number - 1) if number else 0
    tested = min(round(number * test_size), held_out)
    return np.repeat(np.array([test, dev, train], np.uint8), [tested, held_out - tested, number - held_out])


def _by_time(times: Sequence[tuple[Any, str]], test_size: float, dev_size: float) -> np.ndarray:
    try:
        newest_first = sorted(range(len(times)), key=times.__getitem__, reverse=True)
    except TypeError:
        raise UserError("data.split_by time: 'time' must be a number in every row, or text in every row") from None
    sides = np.empty(len(times), np.uint8)
    sides[np.array(newest_first, np.int64)] = _by_rank(len(times), test_size, dev_size)
    return sides


def _metadata(dialogue: Dialogue, key: str) -> Any:
    if dialogue.metadata.get(key) is None:
        raise UserError(
            f"data.split_by {key}: dialogue {dialogue.id} has no field '{key}'; add it to every row or use hash"
        )
    return dialogue.metadata[key]
