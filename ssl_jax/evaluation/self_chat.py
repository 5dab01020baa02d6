"""A model that talks to itself: does it say the same again as a conversation goes on?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ssl_jax import config, metrics
from ssl_jax.dialogue import Dialogue, Role, Turn
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.evaluation.examples import EXAMPLE_SEED, choose

TURNS = 6


def hold(
    model: DialogueModel, openings: Sequence[Dialogue], sampling: config.Sampling, max_prompt_tokens: int
) -> list[list[str]]:
    """Conversations of the model with itself: to each opening the next `TURNS` turns.

    It answers as the assistant every time: the roles of the turns before are swapped at each turn.

    Args:
      model: who speaks.
      openings: a user's turn each, possibly behind a system turn.
      sampling: how every turn is drawn.
      max_prompt_tokens: longest context (newest turns).

    Raises:
      UserError: as `DialogueModel.draw`.
    """
    said = [[opening.turns[-1].content] for opening in openings]
    for number in range(TURNS):
        prompts = [
            Dialogue((*opening.turns[:-1], *_as_user_last(contents)), id=opening.id)
            for opening, contents in zip(openings, said, strict=True)
        ]
        # Another seed for every turn: with one, a chat would meet the same random numbers in each of its turns.
        drawn = model.draw(prompts, sampling, seed=EXAMPLE_SEED + number, max_prompt_tokens=max_prompt_tokens)
        for contents, (reply,) in zip(said, drawn, strict=True):
            contents.append(reply.text)
    return [contents[1:] for contents in said]


def choose_openings(dialogues: Sequence[Dialogue], number: int) -> tuple[list[Dialogue], list[list[str]]]:
    """Where conversations begin, and how people went on.

    They are the first user turns of dialogues of which people took `TURNS` more turns, so that what people said is
    behind the same openings and as long; where there is none such, of any dialogue, and nothing of people.

    Args:
      dialogues: what is chosen from; those that the assistant begins are left out.
      number: how many at most.

    Returns:
      openings: each one ends in a user turn.
      people: the `TURNS` turns behind each opening, or an empty list.
    """
    begun = [(len(opening.turns), dialogue, opening) for dialogue in dialogues if (opening := _opening(dialogue))]
    long = [one for one in begun if len(one[1].turns) >= one[0] + TURNS]
    pool = long or begun
    chosen = [pool[index] for index in choose(len(pool), number)]
    openings = [opening for _, _, opening in chosen]
    if not long:
        return openings, []
    return openings, [[turn.content for turn in dialogue.turns[at : at + TURNS]] for at, dialogue, _ in chosen]


def statistics(chats: Sequence[Sequence[str]]) -> dict[str, float]:
    """`self_chat_repetition` and `self_chat_distinct_2` of conversations.

    The former is `metrics.repetition_across` of 4-grams: their share in a turn that an earlier turn of the same chat
    had, whoever said it. The latter is `metrics.distinct` of bigrams over all turns of all chats.
    """
    return {
        "self_chat_repetition": metrics.repetition_across(chats, 4),
        "self_chat_distinct_2": metrics.distinct(list(itertools.chain.from_iterable(chats)), 2),
    }


def _opening(dialogue: Dialogue) -> Dialogue | None:
    """The dialogue up to its first user turn, or None where the assistant speaks before it."""
    for position, turn in enumerate(dialogue.turns):
        if turn.role == "user":
            return Dialogue(dialogue.turns[: position + 1], id=dialogue.id)
        if turn.role != "system":
            return None
    return None


def _as_user_last(contents: Sequence[str]) -> list[Turn]:
    """The turns in order, in alternating roles of which the user has the last."""
    roles: tuple[Role, Role] = ("user", "assistant")
    return [Turn(roles[(len(contents) - 1 - position) % 2], content) for position, content in enumerate(contents)]
