"""Which dialogues are held out: a pure function from dialogues to the names of their sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ssl_jax.data.duplicates import near_duplicates, text_hash
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

Side = Literal["train", "dev", "test"]


def assign(
    dialogues: Sequence[Dialogue],
    split_by: Literal["fraction", "time", "group", "hash"],
    test_size: float,
    dev_size: float,
    seed: int,
    near_duplicate_threshold: float | None = None,
) -> list[Side]:
    """The side of every dialogue.

    hash: by a hash of the id; a dialogue keeps its side when others are added. Sizes are right on average.
    fraction: by a permutation of `seed`; sizes are exact.
    group: like hash, by `metadata["group"]`: a group is never on two sides.
    time: the newest by `metadata["time"]` are test, those before them dev.
    hash and fraction put dialogues of equal text on one side, and with `near_duplicate_threshold` those that are nearly
    equal, where a dialogue that is added later and resembles members of two groups moves the later group. time and
    group follow what the metadata says. If chance leaves nothing to train on, the dialogues nearest to it do: a tiny
    set is trained on rather than held out.

    Raises:
      UserError: `time` or `group` is missing in a dialogue's metadata, or times cannot be compared.
    """
    match split_by:
        case "hash":
            first_ids = _first_alike(dialogues, near_duplicate_threshold)
            return _by_position([_unit_interval(id) for id in first_ids], test_size, dev_size)
        case "group":
            groups = _metadata(dialogues, "group")
            return _by_position([_unit_interval(repr(group)) for group in groups], test_size, dev_size)
        case "fraction":
            first_ids = _first_alike(dialogues, near_duplicate_threshold)
            units = list(dict.fromkeys(first_ids))
            order = np.random.default_rng(seed).permutation(len(units))
            sides = dict(zip((units[i] for i in order), _by_rank(len(units), test_size, dev_size), strict=True))
            return [sides[id] for id in first_ids]
        case "time":
            return _by_time(dialogues, test_size, dev_size)


def _by_position(positions: Sequence[float], test_size: float, dev_size: float) -> list[Side]:
    """`positions` in [0, 1): the lowest part is test, then dev, then train."""
    start = min(test_size + dev_size, max(positions, default=0.0))
    return ["train" if at >= start else "test" if at < test_size else "dev" for at in positions]


def _by_rank(number: int, test_size: float, dev_size: float) -> list[Side]:
    held_out = min(round(number * (test_size + dev_size)), number - 1) if number else 0
    test = min(round(number * test_size), held_out)
    return ["test" if rank < test else "dev" if rank < held_out else "train" for rank in range(number)]


def _by_time(dialogues: Sequence[Dialogue], test_size: float, dev_size: float) -> list[Side]:
    times = _metadata(dialogues, "time")
    try:
        newest_first = sorted(range(len(dialogues)), key=lambda i: (times[i], dialogues[i].id), reverse=True)
    except TypeError:
        raise UserError("data.split_by time: 'time' must be a number in every row, or text in every row") from None
    sides: list[Side] = ["train"] * len(dialogues)
    for index, side in zip(newest_first, _by_rank(len(dialogues), test_size, dev_size), strict=True):
        sides[index] = side
    return sides


def _metadata(dialogues: Sequence[Dialogue], key: str) -> list[Any]:
    for dialogue in dialogues:
        if dialogue.metadata.get(key) is None:
            raise UserError(
                f"data.split_by {key}: dialogue {dialogue.id} has no field '{key}'; add it to every row or use hash"
            )
    return [dialogue.metadata[key] for dialogue in dialogues]


def _first_alike(dialogues: Sequence[Dialogue], near_duplicate_threshold: float | None) -> list[str]:
    """For every dialogue, the id of the first one that has the same text, or nearly the same."""
    if near_duplicate_threshold is not None:
        return [dialogues[first].id for first in near_duplicates(dialogues, near_duplicate_threshold)]
    first_ids: dict[bytes, str] = {}
    return [first_ids.setdefault(text_hash(dialogue), dialogue.id) for dialogue in dialogues]


def _unit_interval(text: str) -> float:
    """A stable hash as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
