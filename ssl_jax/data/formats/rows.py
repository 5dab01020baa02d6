"""What a reader of files makes: rows, not yet checked, and what is wrong with those that are none."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ssl_jax.dialogue import Dialogue, Role, Turn

Expected = Literal["labeled", "unlabeled"]
Speaker = TypeVar("Speaker")
Value = TypeVar("Value")

# What a program would call a field, a role or a time.
_NAME = re.compile(r"[\w.:/+-]{1,40}", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is not a dialogue.

    Attributes:
      file: as the source names it.
      line: number of the row's (first bad) line from 1; in a file that is one JSON array, the number of the element;
        in a messenger's JSON export, the number of the message; in Parquet, the number of the row.
      reason: a short constant text, good for counting.
      detail: what exactly was found.
    """

    file: str
    line: int
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Accepted:
    """A dialogue and where it is from.

    Attributes:
      dialogue: the dialogue.
      file: as in `Rejected`.
      name: what the file is called in ids.
      line: as in `Rejected`.
      left_out: why it is not to be used, though nothing is wrong with it; counted as a step that removed it.
      train_only: it may not be held out.
    """

    dialogue: Dialogue
    file: str
    name: str
    line: int
    left_out: str | None = None
    train_only: bool = False

    @property
    def place(self) -> str:
        """File and line for people."""
        return f"{self.name}:{self.line}"


def told(value: Any) -> str:
    """A value as a message may show it: names and numbers; of all else, which may be what somebody said, what it is."""
    if isinstance(value, str):
        return repr(value) if _NAME.fullmatch(value) else f"a text of {len(value)} characters"
    return repr(value) if value is None or isinstance(value, bool | float) else f"{type(value).__name__}"


def told_keys(row: Mapping[str, Any]) -> str:
    """The first keys of an object, as a message may show them."""
    return ", ".join(key if _NAME.fullmatch(key) else told(key) for key in map(str, list(row)[:6])) or "no fields"


def duplicate_id(file: str, line: int, id: str, first: str) -> Rejected:
    """A row whose id was at the place `first` before."""
    return Rejected(file, line, "duplicate id", f"{id!r:.80} is also at {first}")


class BadRow(Exception):
    """Why a row is no dialogue.

    Attributes:
      line: where, as in `Rejected`; None: where the row begins.
      file: where, if the row is not from the file that is being read.
    """

    def __init__(self, reason: str, detail: str = "", line: int | None = None, file: Path | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.line = line
        self.file = file

    def at(self, line: int, file: Path | None = None) -> BadRow:
        """The same, with a place where none was known."""
        self.line = line if self.line is None else self.line
        self.file = self.file or file
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A parsed row, not yet checked.

    Attributes:
      line: where it begins, as in `Rejected`.
      is_log: it was written down without a reply in mind.
      per_turn: metadata that has one value for each turn.
      file: where it is, if that is not the file that is being read.
      left_out: as in `Accepted`.
      train_only: as in `Accepted`.
    """

    line: int
    turns: tuple[Turn, ...]
    id: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_log: bool = False
    per_turn: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    file: Path | None = None
    left_out: str | None = None
    train_only: bool = False


def attempt(line: int, parse: Callable[[], Value]) -> Value | BadRow:
    """What `parse` returns, or the `BadRow` that it raises, placed at `line`."""
    try:
        return parse()
    except BadRow as bad:
        return bad.at(line)


def finish(row: Row, default_id: str, expected: Expected, max_turn_bytes: int, source: str) -> Dialogue:
    """Checks a row against what its source is for, and notes the source in the metadata unless the row has one.

    Raises:
      BadRow: it does not fit.
    """
    # Whoever rejects a reply may have emptied it first.
    for position, turn in enumerate(row.turns if row.left_out is None else ()):
        if not turn.content.strip():
            raise BadRow("empty reply" if turn.role == "assistant" else "empty turn", f"message {position}")
        if (size := len(turn.content.encode())) > max_turn_bytes:
            raise BadRow("turn too long", f"message {position} has {size} bytes; data.max_turn_bytes {max_turn_bytes}")
    turns = row.turns
    if expected == "labeled" and row.is_log and len(turns) > 1 and turns[-1].role == "user":
        turns = turns[:-1]
    metadata = {
        "source": source,
        **row.metadata,
        **{key: list(values[: len(turns)]) for key, values in row.per_turn.items()},
    }
    try:
        dialogue = Dialogue(turns, id=row.id or default_id, metadata=metadata)
    except ValueError as error:
        raise BadRow("roles on some turns only", str(error)) from None
    if expected == "labeled" and row.left_out is None:
        if dialogue.kind == "raw":
            raise BadRow("no roles", "a labeled dialogue says who speaks")
        if dialogue.kind == "prompt":
            raise BadRow("no reply", f"ends in a {dialogue.turns[-1].role} turn")
    if expected == "unlabeled" and (dialogue.kind == "labeled" or row.is_log):
        return dataclasses.replace(dialogue, turns=tuple(Turn("text", turn.content) for turn in turns))
    return dialogue


def merge_consecutive(utterances: Iterable[tuple[Speaker, str]]) -> list[tuple[Speaker, str]]:
    """Joins neighbouring utterances of one speaker with a space."""
    return [
        (speaker, " ".join(text for _, text in group))
        for speaker, group in itertools.groupby(utterances, key=lambda utterance: utterance[0])
    ]


def raw_turns(text: str, split_lines: bool) -> tuple[Turn, ...]:
    """Text that nobody is named for: a turn, or one for each line.

    Raises:
      BadRow: there is none.
    """
    pieces = [piece for piece in text.splitlines() if piece.strip()] if split_lines else [text]
    if not pieces or not text.strip():
        raise BadRow("empty text")
    return tuple(Turn("text", piece) for piece in pieces)


def speaking_turns(utterances: Sequence[tuple[str, str]], assistant: str | None) -> tuple[tuple[Turn, ...], list[int]]:
    """Turns of `(speaker, text)`, consecutive ones joined, and the number of the utterance that each begins with.

    Without an assistant, a turn is of one speaker and has no role; with one, everybody else is the user.
    """
    roles: list[Role] = [role_of(speaker, assistant) for speaker, _ in utterances]
    keys: list[tuple[Role, str]] = [
        (role, speaker if assistant is None else "") for role, (speaker, _) in zip(roles, utterances, strict=True)
    ]
    starts = [at for at, key in enumerate(keys) if not at or key != keys[at - 1]]
    merged = merge_consecutive(zip(keys, (text for _, text in utterances), strict=True))
    return tuple(Turn(role, text) for (role, _), text in merged), starts


def role_of(speaker: str, assistant: str | None) -> Role:
    """The role of a named speaker where `Source.assistant` may name the one who replies."""
    if assistant is None:
        return "text"
    return "assistant" if speaker == assistant else "user"
