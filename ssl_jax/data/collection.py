"""Dialogues and their lengths: chosen, joined, read in other ways, each when it is asked for."""

from __future__ import annotations

import abc
import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from ssl_jax.data.tokenizer import EncodedDialogue

Reading = Callable[[EncodedDialogue], EncodedDialogue]


@dataclasses.dataclass(frozen=True)
class Collection:
    """Encoded dialogues and their columns.

    Attributes:
      dialogues: by number.
      lengths: tokens of each, int `[N]`.
      prefix_lengths: of these, tokens of the part that every window of a long dialogue repeats, int `[N]`.
      weights: how many times an epoch shows each, `[N]`; None: once.
    """

    dialogues: Sequence[EncodedDialogue]
    lengths: np.ndarray
    prefix_lengths: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def chosen(self, numbers: np.ndarray) -> Collection:
        """Some of them, in the given order."""
        weights = None if self.weights is None else self.weights[numbers]
        return Collection(
            _Chosen(self.dialogues, numbers), self.lengths[numbers], self.prefix_lengths[numbers], weights
        )

    def read_as(self, reading: Reading, *, marks: int = 0) -> Collection:
        """The same dialogues, read in another way.

        Args:
          reading: of one dialogue, such as those in `directions`.
          marks: tokens that it adds to the part that every window repeats.
        """
        dialogues = _Read(self.dialogues, reading)
        return Collection(dialogues, self.lengths + marks, self.prefix_lengths + marks, self.weights)


def joined(collections: Sequence[Collection]) -> Collection:
    """One collection after another."""
    if len(collections) == 1:
        return collections[0]
    weights = None
    if any(one.weights is not None for one in collections):
        weights = np.concatenate([np.ones(len(one)) if one.weights is None else one.weights for one in collections])
    return Collection(
        _Joined([one.dialogues for one in collections]),
        np.concatenate([one.lengths for one in collections]),
        np.concatenate([one.prefix_lengths for one in collections]),
        weights,
    )


class _Sequence(Sequence[EncodedDialogue]):
    """Dialogues that are found one by one."""

    @overload
    def __getitem__(self, index: int) -> EncodedDialogue: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedDialogue]: ...
    def __getitem__(self, index: int | slice) -> EncodedDialogue | list[EncodedDialogue]:
        numbers = range(len(self))[index]
        return self._find(numbers) if isinstance(numbers, int) else [self._find(number) for number in numbers]

    @abc.abstractmethod
    def _find(self, number: int) -> EncodedDialogue:
        """The dialogue with a number from 0 to `len(self) - 1`."""


class _Joined(_Sequence):
    def __init__(self, parts: Sequence[Sequence[EncodedDialogue]]) -> None:
        self._parts = parts
        self._starts = [0, *itertools.accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, number: int) -> EncodedDialogue:
        part = bisect.bisect_right(self._starts, number) - 1
        return self._parts[part][number - self._starts[part]]


class _Chosen(_Sequence):
    def __init__(self, dialogues: Sequence[EncodedDialogue], numbers: np.ndarray) -> None:
        self._dialogues, self._numbers = dialogues, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def _find(self, number: int) -> EncodedDialogue:
        return self._dialogues[int(self._numbers[number])]


class _Read(_Sequence):
    def __init__(self, dialogues: Sequence[EncodedDialogue], reading: Reading) -> None:
        self._dialogues, self._reading = dialogues, reading

    def __len__(self) -> int:
        return len(self._dialogues)

    def _find(self, number: int) -> EncodedDialogue:
        return self._reading(self._dialogues[number])
