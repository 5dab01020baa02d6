"""What somebody typed or passed, as a `Dialogue`, with errors that say what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

Messages = Sequence[Mapping[str, str]]


def as_prompt(prompt: str | Messages) -> Dialogue:
    """What somebody says, or a conversation so far, as a dialogue that waits for a reply.

    Raises:
      UserError: an empty prompt, malformed messages, or a conversation that ends in a reply.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("the prompt is empty; say something")
        return _readable(Dialogue((Turn("user", prompt.strip()),)))
    dialogue = _from_messages(prompt)
    if dialogue.kind != "prompt":
        raise UserError("the conversation must end in a user turn, so that there is something to answer")
    return dialogue


def as_labeled(messages: Messages) -> Dialogue:
    """A conversation whose replies can be scored.

    Raises:
      UserError: malformed messages, or no assistant turn at the end.
    """
    dialogue = _from_messages(messages)
    if dialogue.kind != "labeled":
        raise UserError("score: the conversation must end in an assistant turn")
    return dialogue


def _from_messages(messages: Messages) -> Dialogue:
    try:
        dialogue = Dialogue.from_messages(messages)
    except ValueError as error:
        raise UserError(f"messages: {error}") from None
    return _readable(dialogue)


def _readable(dialogue: Dialogue) -> Dialogue:
    """The dialogue, if every turn can be written as UTF-8: a terminal may hand over any bytes as lone surrogates."""
    for turn in dialogue.turns:
        try:
            turn.content.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text {turn.content[:40]!r} is not valid UTF-8 (character {error.start})") from None
    return dialogue
