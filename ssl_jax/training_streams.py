"""What each stream of a run is made of: which dialogues, read in which way, how often each is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ssl_jax import workdir
from ssl_jax.config import Config
from ssl_jax.data import directions
from ssl_jax.data.collection import Collection, joined
from ssl_jax.data.mixture import dialogue_weights
from ssl_jax.data.store import Prepared
from ssl_jax.data.streams import PackedStream
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.pseudo_labels import noise, rounds
from ssl_jax.pseudo_labels.make import choose

ROUNDS = {"pseudo": workdir.PSEUDO_LABELS, "translated": workdir.BACK_TRANSLATIONS}
"""Where the work directory keeps the rounds that a stream is made of."""


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
        has_roles = train.raw_roles == "alternate"
        if "raw_train" in self.prepared.splits:
            raw = self._split("raw_train")
            collections.append(raw.read_as(partial(directions.alternating, tokenizer=tokenizer)) if has_roles else raw)
        if "prompt_train" in self.prepared.splits and train.prompts_as_text:
            prompts = self._split("prompt_train")
            if has_roles:
                prompts = prompts.read_as(partial(directions.swapped, tokenizer=tokenizer))
            collections.append(prompts.read_as(directions.as_text))
        return collections

    def _backward(self) -> Collection:
        """Labeled dialogues and raw ones of several turns, from the last turn to the first."""
        collections = [self._split("labeled_train")]
        if "raw_train" in self.prepared.splits:
            several = np.flatnonzero(self.prepared.turn_counts("raw_train") > 1)
            collections += [self._raw()[0].chosen(several)] if len(several) else []
        return joined(collections).read_as(partial(directions.backward, tokenizer=self.prepared.tokenizer), marks=1)

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


def _one_reply(dialogue: Dialogue, seed: int) -> Dialogue:
    """One turn of a dialogue, as the reply that a context is made up for; its id and the seed decide which."""
    number = int(np.random.default_rng((seed, *dialogue.id.encode())).integers(len(dialogue.turns)))
    return Dialogue((Turn("text", dialogue.turns[number].content),), id=dialogue.id)
