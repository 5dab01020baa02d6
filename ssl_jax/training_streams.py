"""What each stream of a run is made of: which dialogues, read in which way, how often each is shown."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ssl_jax import workdir
from ssl_jax.config import Config
from ssl_jax.data import directions
from ssl_jax.data.mixture import dialogue_weights
from ssl_jax.data.store import Prepared
from ssl_jax.data.streams import PackedStream
from ssl_jax.data.tokenizer import EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.pseudo_labels import noise, rounds
from ssl_jax.pseudo_labels.make import choose

ROUNDS = {"pseudo": workdir.PSEUDO_LABELS, "translated": workdir.BACK_TRANSLATIONS}
"""Where the work directory keeps the rounds that a stream is made of."""


@dataclasses.dataclass(frozen=True)
class Collection:
    """Encoded dialogues and their columns.

    Attributes:
      dialogues: by number.
      lengths: tokens of each, int `[N]`.
      prefix_lengths: tokens of each one's system turn, int `[N]`.
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

    def seen_as(self, view: directions.View) -> Collection:
        """The same dialogues, read in another way."""
        return Collection(view, view.lengths, view.prefix_lengths, self.weights)


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


@dataclasses.dataclass(frozen=True)
class TrainingStreams:
    """The streams of a run, made when they are asked for.

    Attributes:
      config: the configuration.
      prepared: the data.
      directory: the work directory, where rounds are.
    """

    config: Config
    prepared: Prepared
    directory: Path

    def before_rounds(self) -> dict[str, PackedStream]:
        """Those that need no round."""
        streams = {"labeled": self._packed(self._split("labeled_train"), self.config.objectives.prompt_loss_weight)}
        raw = self._raw()
        if raw:
            streams["raw"] = self._packed(joined(raw))
        if self.config.train.backward_fraction:
            streams["backward"] = self._packed(self._backward())
        return streams

    def of_rounds(self, name: str, held: int) -> PackedStream | None:
        """All that the first `held` rounds have given to a stream of `ROUNDS`; None where that is nothing.

        Rounds accumulate (Gerstgrasser et al. 2024, arXiv 2404.01413), unless the configuration says they replace.
        """
        directory = self.directory / ROUNDS[name]
        settings, tokenizer = self.config.pseudo_labels, self.prepared.tokenizer
        by_round = [rounds.read_round(directory, number) for number in range(held)]
        by_round = [dialogues for dialogues in by_round if dialogues]
        if not by_round:
            return None
        dialogues = [dialogue for one in (by_round if settings.accumulate else by_round[-1:]) for dialogue in one]
        seen = [noise.noisy(one, settings.noise, noise.generator(self.config.seed, one.id)) for one in dialogues]
        encoded = [tokenizer.encode(dialogue) for dialogue in seen]
        if name == "translated":
            encoded = [directions.synthetic(dialogue, tokenizer) for dialogue in encoded]
        weight_of = self._weight_of_asked(name, held)
        collection = Collection(
            encoded,
            np.array([len(dialogue.tokens) for dialogue in encoded]),
            np.array([dialogue.prefix_length for dialogue in encoded]),
            None if weight_of is None else np.array([weight_of[dialogue.id] for dialogue in dialogues]),
        )
        return self._packed(collection, seed=self.config.seed + held)

    def asked(self, name: str, round_number: int) -> list[Dialogue]:
        """What a round asks the teacher about: prompts to answer, or real replies to make up contexts for."""
        split, chosen = self._chosen(name, round_number)
        dialogues = [self.prepared.dialogue(split, index) for index in chosen]
        return dialogues if name == "pseudo" else [_one_reply(dialogue, self.config.seed) for dialogue in dialogues]

    def _chosen(self, name: str, round_number: int) -> tuple[str, list[int]]:
        """The split that a round asks about, and the numbers of its dialogues."""
        settings = self.config.pseudo_labels
        split, number = ("prompt_train", settings.prompts_per_round)
        if name == "translated":
            split, number = ("raw_train", settings.replies_per_round)
        population = len(self.prepared.lengths(split))
        return split, choose(population, number, round_number, self.config.seed)

    def _weight_of_asked(self, name: str, held: int) -> Mapping[str, float] | None:
        """By id: a pseudo-label counts as much as the source of what was asked."""
        split, _ = self._chosen(name, 0)
        weights = dialogue_weights(self.config.data, self.prepared, split)
        if weights is None:
            return None
        weight_of: dict[str, float] = {}
        for number in range(held):
            _, chosen = self._chosen(name, number)
            asked = self.prepared.encoded(split).__getitems__(chosen)
            weight_of |= {one.id: weights[index] for index, one in zip(chosen, asked, strict=True)}
        return weight_of

    def _raw(self) -> list[Collection]:
        """Raw text and, where they count as such, prompts."""
        train, tokenizer, collections = self.config.train, self.prepared.tokenizer, []
        if "raw_train" in self.prepared.splits:
            raw = self._split("raw_train")
            if train.raw_roles == "alternate":
                view = directions.Alternating(raw.dialogues, tokenizer, raw.lengths, raw.prefix_lengths)
                raw = raw.seen_as(view)
            collections.append(raw)
        if "prompt_train" in self.prepared.splits and train.prompts_as_text:
            prompts = self._split("prompt_train")
            if train.raw_roles == "alternate":
                view = directions.Swapped(prompts.dialogues, tokenizer, prompts.lengths, prompts.prefix_lengths)
                prompts = prompts.seen_as(view)
            view = directions.AsText(prompts.dialogues, tokenizer, prompts.lengths, prompts.prefix_lengths)
            collections.append(prompts.seen_as(view))
        return collections

    def _backward(self) -> Collection:
        """Labeled dialogues and raw ones of several turns, from the last turn to the first."""
        collections = [self._split("labeled_train")]
        if "raw_train" in self.prepared.splits:
            several = np.flatnonzero(self.prepared.turn_counts("raw_train") > 1)
            collections += [self._raw()[0].chosen(several)] if len(several) else []
        forward = joined(collections)
        view = directions.Backward(forward.dialogues, self.prepared.tokenizer, forward.lengths, forward.prefix_lengths)
        return forward.seen_as(view)

    def _split(self, split: str) -> Collection:
        prepared = self.prepared
        weights = dialogue_weights(self.config.data, prepared, split)
        return Collection(prepared.encoded(split), prepared.lengths(split), prepared.prefix_lengths(split), weights)

    def _packed(self, collection: Collection, context_weight: float = 0.0, *, seed: int | None = None) -> PackedStream:
        return PackedStream(
            collection.dialogues,
            collection.lengths,
            prefix_lengths=collection.prefix_lengths,
            sequence_length=self.config.train.sequence_length,
            overlap=self.config.train.window_overlap,
            seed=self.config.seed if seed is None else seed,
            context_weight=context_weight,
            weights=collection.weights,
        )


class _Joined(Sequence[EncodedDialogue]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[EncodedDialogue]]) -> None:
        self._parts = parts
        self._starts = [0, *itertools.accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        part = bisect.bisect_right(self._starts, range(len(self))[index]) - 1
        return self._parts[part][range(len(self))[index] - self._starts[part]]


class _Chosen(Sequence[EncodedDialogue]):
    """Some of a sequence, by number."""

    def __init__(self, dialogues: Sequence[EncodedDialogue], numbers: np.ndarray) -> None:
        self._dialogues, self._numbers = dialogues, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._dialogues[int(self._numbers[index])]


def _one_reply(dialogue: Dialogue, seed: int) -> Dialogue:
    """One turn of a dialogue, as the reply that a context is made up for; its id and the seed decide which."""
    number = int(np.random.default_rng((seed, *dialogue.id.encode())).integers(len(dialogue.turns)))
    return Dialogue((Turn("text", dialogue.turns[number].content),), id=dialogue.id)
