"""Collections: dialogues chosen, joined and read in other ways keep their columns and are found when asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ssl_jax.data.collection import Collection, joined
from ssl_jax.data.tokenizer import EncodedDialogue


def collection(*lengths: int, first: int = 0, weights: list[float] | None = None) -> Collection:
    dialogues = [
        EncodedDialogue(str(first + number), np.zeros(length, np.int32), np.zeros(length, np.uint8), 0)
        for number, length in enumerate(lengths)
    ]
    columns = np.array(lengths), np.arange(len(lengths))
    return Collection(dialogues, *columns, None if weights is None else np.array(weights))


def ids(of: Collection) -> list[str]:
    assert [dialogue.id for dialogue in of.dialogues[:]] == [of.dialogues[n].id for n in range(len(of))]
    assert [len(dialogue.tokens) for dialogue in of.dialogues[:]] == of.lengths.tolist()
    return [dialogue.id for dialogue in of.dialogues[:]]


def test_joined_collections_are_one_after_the_other_with_their_columns() -> None:
    both = joined([collection(3, 5), collection(7, first=2, weights=[2.0]), collection(4, 4, first=3)])
    assert ids(both) == ["0", "1", "2", "3", "4"]
    assert both.weights is not None and both.weights.tolist() == [1, 1, 2, 1, 1]
    assert both.prefix_lengths.tolist() == [0, 1, 0, 0, 1]
    assert both.dialogues[-1].id == "4"
    assert [one.id for one in both.dialogues[-2::-2]] == ["3", "1"]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            both.dialogues[outside]
    one = collection(3)
    assert joined([one]) is one and one.weights is None


def test_chosen_dialogues_keep_their_columns() -> None:
    some = joined([collection(3, 5), collection(7, 9, first=2, weights=[2.0, 3.0])]).chosen(np.array([3, 0]))
    assert ids(some) == ["3", "0"]
    assert some.weights is not None and some.weights.tolist() == [3, 1]


def test_a_dialogue_is_read_when_it_is_asked_for() -> None:
    asked: list[str] = []

    def reading(one: EncodedDialogue) -> EncodedDialogue:
        asked.append(one.id)
        return dataclasses.replace(one, id=f"read {one.id}")

    read = collection(3, 5, 7, weights=[1.0, 2.0, 3.0]).read_as(reading, marks=2)
    assert asked == [] and read.weights is not None and read.weights.tolist() == [1, 2, 3]
    assert read.lengths.tolist() == [5, 7, 9] and read.prefix_lengths.tolist() == [2, 3, 4]
    assert read.dialogues[-1].id == "read 2" and asked == ["2"]
    assert [one.id for one in read.chosen(np.array([1])).dialogues] == ["read 1"]
