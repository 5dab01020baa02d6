"""Other readings of an encoded dialogue: from its last turn to its first, as text, with imputed speakers, marked.

Turns are found by their tokens, so the dialogue's text is not needed: with the template role_tokens, a turn is all from
the token of its role to the end of turn, and no content can hold either of them. What stands before the turns, a system
turn of `EncodedDialogue.prefix_length` tokens, stays in front. A mark is added to its end, and counts as a part of it:
all windows of a long dialogue then begin with it.

Every reading is a function of one dialogue; `Collection.read_as` reads many, each when it is asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from ssl_jax.data import prompts
from ssl_jax.data.prompts import Prompt
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError


def backward(encoded: EncodedDialogue, tokenizer: DialogueTokenizer) -> EncodedDialogue:
    """A dialogue read from its last turn to its first, so that a model learns which context a reply answers.

    `[system turn] <|backward|> turn n … turn 1 [end of text]`, the tokens of every turn in their order. Predicted are
    the content and the end of every turn but the one that is read first; of a single turn, nothing.

    Returns:
      A dialogue that is one token longer. The bytes that its loss mask covers are not counted (0).

    Raises:
      UserError: the tokenizer has no direction tokens.
    """
    head = encoded.prefix_length
    bounds = _turn_bounds(encoded, tokenizer)
    turns = [encoded.tokens[start:stop] for start, stop in itertools.pairwise(bounds)][::-1]
    masks = [np.ones(len(turn), np.uint8) for turn in turns]
    for number, mask in enumerate(masks):
        mask[: 1 if number else None] = 0
    end = encoded.tokens[bounds[-1] :]
    before = np.append(encoded.tokens[:head], np.int32(backward_id(tokenizer)))
    return EncodedDialogue(
        id=encoded.id,
        tokens=np.concatenate([before, *turns, end]),
        loss_mask=np.concatenate([np.zeros(len(before), np.uint8), *masks, np.zeros(len(end), np.uint8)]),
        reply_bytes=0,
        prefix_length=len(before),
    )


def alternating(encoded: EncodedDialogue, tokenizer: DialogueTokenizer) -> EncodedDialogue:
    """Raw text with speakers: user and assistant in turn, the last turn the assistant's. Others stay as they are."""
    roles = tokenizer.role_ids
    places = np.flatnonzero(encoded.tokens == roles["text"])
    if not len(places):
        return encoded
    tokens = encoded.tokens.copy()
    tokens[places[::-1]] = np.resize(np.array([roles["assistant"], roles["user"]], np.int32), len(places))
    return dataclasses.replace(encoded, tokens=tokens)


def swapped(encoded: EncodedDialogue, tokenizer: DialogueTokenizer) -> EncodedDialogue:
    """A dialogue in which user and assistant have changed places: what one of two people says, the other might say."""
    user, assistant = tokenizer.role_ids["user"], tokenizer.role_ids["assistant"]
    tokens = encoded.tokens.copy()
    tokens[encoded.tokens == user], tokens[encoded.tokens == assistant] = assistant, user
    return dataclasses.replace(encoded, tokens=tokens)


def as_text(encoded: EncodedDialogue) -> EncodedDialogue:
    """A dialogue of which all is learned, as of raw text: for prompts, which have no reply."""
    mask = np.ones_like(encoded.loss_mask)
    mask[0] = 0
    return dataclasses.replace(encoded, loss_mask=mask)


def synthetic(encoded: EncodedDialogue, tokenizer: DialogueTokenizer) -> EncodedDialogue:
    """A dialogue marked as one whose context a model made up (tagged back-translation, Caswell et al. 2019).

    `<|synthetic|>` stands in front, behind a system turn, and is not predicted. The mark tells a model how far to trust
    the context, so that what is odd about made-up ones does not spoil what it does with real ones.

    Raises:
      UserError: the tokenizer has no direction tokens.
    """
    if tokenizer.synthetic_id is None:
        raise UserError(
            "this tokenizer has no token for contexts that a model made up (train.back_translation_fraction)\n"
            "set tokenizer.direction_tokens true"
        )
    place = encoded.prefix_length
    return dataclasses.replace(
        encoded,
        tokens=np.insert(encoded.tokens, place, tokenizer.synthetic_id),
        loss_mask=np.insert(encoded.loss_mask, place, 0),
        prefix_length=place + 1,
    )


def backward_prompt(reply: str, tokenizer: DialogueTokenizer, max_tokens: int) -> Prompt:
    """What a model that reads backwards continues with what was said before a reply.

    `<|backward|> <|assistant|> reply <|endofturn|> <|user|>`; of a reply that is too long, the end.

    Args:
      reply: the text of the reply.
      tokenizer: with direction tokens.
      max_tokens: upper bound on the prompt's length.

    Raises:
      UserError: the tokenizer has no direction tokens, or there is no room.
    """
    first, last = backward_id(tokenizer), tokenizer.role_ids["user"]

    def encode(turns: Sequence[Turn]) -> list[int]:
        end_of_text = 1
        return [first, *tokenizer.encode(Dialogue(tuple(turns))).tokens[:-end_of_text].tolist(), last]

    return prompts.fit((Turn("assistant", reply),), max_tokens, encode, starts_anywhere=True)


def backward_id(tokenizer: DialogueTokenizer) -> int:
    """Id of the token that begins a dialogue read backwards.

    Raises:
      UserError: the tokenizer has no direction tokens.
    """
    if tokenizer.backward_id is None:
        raise UserError(
            "this tokenizer has no token for dialogues that are read backwards\n"
            "set tokenizer.direction_tokens true, and train with train.backward_fraction above 0"
        )
    return tokenizer.backward_id


def _turn_bounds(encoded: EncodedDialogue, tokenizer: DialogueTokenizer) -> list[int]:
    """Where each turn behind the prefix begins, and where the last one ends."""
    behind = encoded.tokens[encoded.prefix_length :]
    starts = np.flatnonzero(np.isin(behind, list(tokenizer.role_ids.values())))
    last = starts[-1] if len(starts) else 0
    ends = last + np.flatnonzero(behind[last:] == tokenizer.end_of_turn_id)
    stop = ends[0] + 1 if len(starts) else 0
    return [encoded.prefix_length + int(place) for place in (*starts, stop)]
