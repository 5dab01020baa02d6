"""The chitchat data set (BYU-PCCL, 2018; PyPI `chitchat-dataset`): human small talk, split by time.

A usable conversation has two senders and at least four turns, a turn being consecutive utterances of one sender. The
last 20 % of the usable conversations by start are test, the 10 % before them dev, the rest train. Test is reported in
two parts: `test` has no speaker of an earlier usable conversation, `test_seen` is the rest. Senders' names are used to
tell speakers apart and are not passed on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ssl_jax.config import Source
from ssl_jax.data.formats import merge_consecutive
from ssl_jax.data.packaged import Part, ResolvedSource, user_turns, without_roles
from ssl_jax.dialogue import Dialogue, Role, Turn
from ssl_jax.errors import UserError

Regime = Literal["logs", "turns", "prompts", "fragments"]

UNLABELED_REGIMES: tuple[str, ...] = get_args(Regime)

TEST_SIZE = 0.2
DEV_SIZE = 0.1
MIN_TURNS = 4

# Decides which train conversations a label budget takes first; the same for every run, so that budgets are nested.
_ORDER_SALT = "ssl_jax chitchat label budget"


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as published, utterances of one sender merged.

    Attributes:
      id: the data set's own.
      start: ISO 8601, UTC.
      turns: `(sender, text)` in order.
      senders: everybody who wrote.
      metadata: start, and ratings and prompt (the topic suggested to the two) where the data set has them.
    """

    id: str
    start: str
    turns: tuple[tuple[str, str], ...]
    senders: frozenset[str]
    metadata: Mapping[str, Any]

    @property
    def is_usable(self) -> bool:
        """Whether it is a dialogue: two senders, `MIN_TURNS` turns."""
        return len(self.senders) == 2 and len(self.turns) >= MIN_TURNS


@dataclasses.dataclass(frozen=True, slots=True)
class TimeSplit:
    """Usable conversations by start, and the fragments before dev begins."""

    train: tuple[Conversation, ...]
    dev: tuple[Conversation, ...]
    test: tuple[Conversation, ...]
    test_seen: tuple[Conversation, ...]
    fragments: tuple[Conversation, ...]


def data_file() -> Path:
    """The file that the package carries.

    Raises:
      UserError: the package is not installed.
    """
    try:
        import chitchat_dataset
    except ModuleNotFoundError:
        raise UserError("dataset chitchat needs a package: pip install 'ssl_jax[demo]'") from None
    return Path(chitchat_dataset._PATH)


def data_files(source: Source) -> list[Path]:
    """The one file, whatever the source.

    Raises:
      UserError: the package is not installed, or a language is named.
    """
    if source.language:
        raise UserError("dataset chitchat is English; remove language")
    return [data_file()]


def dialogues(sources: Sequence[ResolvedSource]) -> Iterator[tuple[ResolvedSource, Part | None, Dialogue]]:
    """What the sources yield, see `Packaged.dialogues`; what a label budget leaves goes to the unlabeled ones."""
    split = split_by_time(load(sources[0].files[0]))
    taken = 0
    for resolved in sources:
        if resolved.expected == "labeled":
            parts = labeled(split, resolved.source.max_dialogues)
            taken = len(parts["train"])
            for part, found in parts.items():
                for dialogue in found:
                    yield resolved, part, dialogue
    for resolved in sources:
        regime = resolved.source.regime
        if resolved.expected == "unlabeled" and regime is not None and regime != "labeled":
            found = unlabeled(split, regime, taken, resolved.source.max_dialogues)
            yield from ((resolved, None, dialogue) for dialogue in found)


def load(file: Path) -> list[Conversation]:
    """All conversations of the data set, ordered by start, then id."""
    records = json.loads(file.read_bytes())
    return sorted((_conversation(id, record) for id, record in records.items()), key=lambda c: (c.start, c.id))


def split_by_time(conversations: list[Conversation]) -> TimeSplit:
    """Splits conversations that are in order of time."""
    usable = [conversation for conversation in conversations if conversation.is_usable]
    test_start = len(usable) - round(TEST_SIZE * len(usable))
    dev_start = test_start - round(DEV_SIZE * len(usable))
    known = frozenset().union(*(conversation.senders for conversation in usable[:test_start]))
    test = usable[test_start:]
    unseen = tuple(conversation for conversation in test if not conversation.senders & known)
    unseen_senders = frozenset().union(*(conversation.senders for conversation in unseen))
    fragments = tuple(
        conversation
        for conversation in conversations
        if len(conversation.senders) == 1
        and conversation.start < usable[dev_start].start
        and not conversation.senders & unseen_senders
    )
    return TimeSplit(
        train=tuple(usable[:dev_start]),
        dev=tuple(usable[dev_start:test_start]),
        test=unseen,
        test_seen=tuple(conversation for conversation in test if conversation.senders & known),
        fragments=fragments,
    )


def labeled(split: TimeSplit, max_dialogues: int | None = None, seed: int | None = None) -> dict[Part, list[Dialogue]]:
    """Dialogues with roles: the first speaker is the user, the second the assistant.

    Args:
      split: the conversations.
      max_dialogues: size of train; a smaller budget's train is part of a larger one's.
      seed: another order of train; absent: the one order that all runs share.

    Returns:
      Lists of train, dev, test and test_seen.
    """
    parts: dict[Part, Sequence[Conversation]] = {
        "train": _budget_order(split.train, seed)[:max_dialogues],
        "dev": split.dev,
        "test": split.test,
        "test_seen": split.test_seen,
    }
    return {name: [_labeled(conversation) for conversation in part] for name, part in parts.items()}


def unlabeled(
    split: TimeSplit, regime: Regime, skip: int = 0, max_dialogues: int | None = None, seed: int | None = None
) -> list[Dialogue]:
    """The conversations that a label budget left, in a form that lacks something.

    logs: complete, without roles. turns: every turn alone, in an order that has nothing to do with the conversations.
    prompts: every turn of the first speaker alone, as a prompt. fragments: what one sender wrote where nobody
    answered, as one prompt; these are other conversations, so no budget takes from them.

    Args:
      split: the conversations.
      regime: the form.
      skip: conversations that the label budget took.
      max_dialogues: how many conversations to take, so that regimes compare at equal amounts.
      seed: as for `labeled`.
    """
    if regime == "fragments":
        chosen = _budget_order(split.fragments, seed)[:max_dialogues]
        return [dialogue for conversation in chosen for dialogue in _fragment(conversation)]
    forms: dict[str, Callable[[Conversation], Iterator[Dialogue]]] = {
        "logs": _log,
        "turns": _turns,
        "prompts": _prompts,
    }
    chosen = _budget_order(split.train, seed)[skip:][:max_dialogues]
    dialogues = [dialogue for conversation in chosen for dialogue in forms[regime](conversation)]
    if regime == "turns":
        dialogues.sort(key=lambda dialogue: _pseudo_random(dialogue.id, seed))
    return dialogues


def _conversation(id: str, record: Mapping[str, Any]) -> Conversation:
    utterances = [(message["sender"], message["text"]) for block in record["messages"] for message in block]
    metadata = {key: record[key] for key in ("start", "ratings", "prompt") if record.get(key)}
    turns = tuple(merge_consecutive(utterances))
    return Conversation(id, record["start"], turns, frozenset(sender for sender, _ in turns), metadata)


def _spoken(conversation: Conversation) -> list[tuple[str, str]]:
    """Turns without the few that are only white space; their neighbours then merge."""
    return merge_consecutive((sender, text) for sender, text in conversation.turns if text.strip())


def _with_roles(conversation: Conversation) -> list[Turn]:
    spoken = _spoken(conversation)
    first = spoken[0][0]
    return [Turn("user" if sender == first else "assistant", text) for sender, text in spoken]


def _labeled(conversation: Conversation) -> Dialogue:
    turns = _with_roles(conversation)
    if turns[-1].role == "user":
        turns.pop()
    return _dialogue(conversation, "", turns)


def _log(conversation: Conversation) -> Iterator[Dialogue]:
    yield without_roles(_dialogue(conversation, "", _with_roles(conversation)))


def _turns(conversation: Conversation) -> Iterator[Dialogue]:
    for number, (_, text) in enumerate(_spoken(conversation)):
        yield _dialogue(conversation, f"/turn/{number}", [Turn("text", text)])


def _prompts(conversation: Conversation) -> Iterator[Dialogue]:
    yield from user_turns(_dialogue(conversation, "", _with_roles(conversation)))


def _fragment(conversation: Conversation) -> Iterator[Dialogue]:
    role: Role = "user"
    for _, text in _spoken(conversation):
        yield _dialogue(conversation, "", [Turn(role, text)])


def _dialogue(conversation: Conversation, suffix: str, turns: list[Turn]) -> Dialogue:
    return Dialogue(tuple(turns), id=conversation.id + suffix, metadata=conversation.metadata)


def _budget_order(conversations: tuple[Conversation, ...], seed: int | None) -> list[Conversation]:
    return sorted(conversations, key=lambda conversation: _pseudo_random(conversation.id, seed))


def _pseudo_random(id: str, seed: int | None) -> bytes:
    return hashlib.sha256(f"{_ORDER_SALT}/{'' if seed is None else seed}/{id}".encode()).digest()
