"""Which replies of held-out dialogues are looked at: the same ones for every model and run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssl_jax.dialogue import Dialogue

# A reply behind the dialogue that it answers.
Pair = tuple[Dialogue, str]

# What is chosen and drawn for the statistics must not depend on a run's seed.
EXAMPLE_SEED = 20


def reply_pairs(dialogue: Dialogue) -> list[Pair]:
    """Every assistant turn that answers a user turn, behind the dialogue before it."""
    return [
        (Dialogue(dialogue.turns[:position], id=dialogue.id), turn.content)
        for position, turn in enumerate(dialogue.turns)
        if turn.role == "assistant" and position and dialogue.turns[position - 1].role == "user"
    ]


def choose(population: int, number: int) -> list[int]:
    """The same `number` of a population for every model and run, in order."""
    rng = np.random.default_rng(EXAMPLE_SEED)
    return sorted(rng.choice(population, min(number, population), replace=False).tolist())


def by_reply_number(pairs_by_dialogue: Sequence[Sequence[Pair]]) -> dict[str, list[Pair]]:
    """The first, second, third and fourth replies of all dialogues, and `5+`: the middle one of each one's later ones.

    No list has two replies of a dialogue. Replies are numbered as `reply_pairs` finds them, from 1.
    """
    numbered = {
        str(number): [pairs[number - 1] for pairs in pairs_by_dialogue if len(pairs) >= number]
        for number in range(1, 5)
    }
    later = [pairs[4:] for pairs in pairs_by_dialogue if len(pairs) > 4]
    return {**numbered, "5+": [pairs[len(pairs) // 2] for pairs in later]}
