"""Noise on the words of a context: what the student reads of a dialogue that its teacher answered clean.

Noisy self-training (He et al. 2020, arXiv:1909.13788) with the noise of Lample et al. 2018 (arXiv:1711.00043): words
move a little, are left out, or are blanked. Words are what white space separates. A text without white space, be it
one word or a language that writes none, is left alone.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from ssl_jax import config
from ssl_jax.dialogue import Dialogue

BLANK = "_"


def generator(seed: int, dialogue_id: str) -> np.random.Generator:
    """Random numbers of one dialogue: the same wherever and in whatever order dialogues are read."""
    digest = hashlib.blake2b(dialogue_id.encode(), digest_size=8).digest()
    return np.random.default_rng((seed, int.from_bytes(digest, "little")))


def noisy(dialogue: Dialogue, settings: config.Noise, rng: np.random.Generator) -> Dialogue:
    """The dialogue with noise on every turn but the last, which is the reply.

    Args:
      dialogue: ends in a reply.
      settings: how much; with none, the result is `dialogue` itself.
      rng: of this dialogue, from `generator`.
    """
    if not (settings.word_dropout or settings.word_blank or settings.word_shuffle > 1):
        return dialogue
    context = [
        dataclasses.replace(turn, content=noisy_text(turn.content, settings, rng)) for turn in dialogue.turns[:-1]
    ]
    return dataclasses.replace(dialogue, turns=(*context, dialogue.turns[-1]))


def noisy_text(text: str, settings: config.Noise, rng: np.random.Generator) -> str:
    """The words of a text shuffled, dropped and blanked, in this order, with one space between them."""
    words = text.split()
    if len(words) < 2:
        return text
    words = shuffle_words(words, settings.word_shuffle, rng)
    words = drop_words(words, settings.word_dropout, rng)
    return " ".join(blank_words(words, settings.word_blank, rng))


def shuffle_words(words: list[str], distance: int, rng: np.random.Generator) -> list[str]:
    """Moves every word by less than `distance` places: words sorted by place + uniform(0, distance)."""
    keys = np.arange(len(words)) + rng.uniform(0, distance, len(words))
    return [words[place] for place in np.argsort(keys, kind="stable")]


def drop_words(words: list[str], probability: float, rng: np.random.Generator) -> list[str]:
    """Leaves out each word with a probability; where that would leave none, any one of them stays."""
    kept = [word for word, number in zip(words, rng.random(len(words)), strict=True) if number >= probability]
    return kept or [words[rng.integers(len(words))]]


def blank_words(words: list[str], probability: float, rng: np.random.Generator) -> list[str]:
    """Replaces each word by `BLANK` with a probability."""
    return [BLANK if number < probability else word for word, number in zip(words, rng.random(len(words)), strict=True)]
