"""Messages of a messenger become dialogues, wherever they were exported from.

A dialogue ends where nobody writes for `Source.gap_minutes` (one hour: long enough for a pause, shorter than a night);
only a message that answers one of the dialogue by name (a reply) goes on with it later. Consecutive messages of one
speaker are one turn. Turns carry no roles unless `Source.assistant` names the one who replies.

metadata: `speakers` and `times`, one for each turn (a turn's time is that of its first message; where several users'
messages make one turn, its speaker is the first of them); `time`, when the dialogue began; `group`, the chat, channel
or thread; `chat`, its name, if it has one; `omitted`, how many messages had nothing to read (pictures, notices,
deleted ones). Times are ISO 8601 to the second, which sort as text: in UTC where the export says so, else as written.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.config import Source
from ssl_jax.data.formats import json_text
from ssl_jax.data.formats.lines import MAX_LINE_BYTES
from ssl_jax.data.formats.rows import BadRow, Row, attempt, speaking_turns, told


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """What somebody wrote.

    Attributes:
      number: where in the file, as in `Rejected`.
      speaker: a name, or an id where there is none.
      time: without a zone.
      text: empty: it had nothing to read.
      id: of the message in its chat.
      answers: id of the message that it replies to.
      file: where it is, if that is not the file that is being read.
    """

    number: int
    speaker: str
    time: datetime.datetime
    text: str
    id: str | None = None
    answers: str | None = None
    file: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """A chat, channel or thread. `key` tells it from all others; `own_ids`: its messages' ids are good for rows."""

    key: str
    name: str | None = None
    own_ids: bool = True


def parsed(number: int, item: Any, parse: Callable[[int, Any], Message]) -> Message | BadRow:
    """The message that `parse` makes of an item of an export's list, or why it is none."""
    if isinstance(item, BadRow):
        return item.at(number)
    return attempt(number, lambda: parse(number, json_text.checked(item)))


def dialogues(
    messages: Iterable[Message | BadRow], chat: Chat, source: Source, gap_minutes: float | None = None
) -> Iterator[Row | BadRow]:
    """The dialogues of one chat.

    A message that could not be read is passed on and ends its dialogue: an answer to it would seem to answer another.

    Args:
      messages: in order of time.
      chat: where they are from.
      source: how to divide them and whom to mark.
      gap_minutes: instead of the source's; infinite for a thread, which is one dialogue however long it takes.
    """
    gap = source.gap_minutes if gap_minutes is None else gap_minutes
    current: list[Message] = []
    ids: set[str] = set()
    size = 0
    for message in messages:
        if isinstance(message, BadRow) or (current and _is_apart(current[-1], message, gap, ids)):
            yield from _row(current, chat, source, size)
            current, ids, size = [], set(), 0
        if isinstance(message, BadRow):
            yield message
            continue
        size += len(message.text)
        # A dialogue that is too long to be one is counted on and rejected; what it says need not be kept.
        current.append(message if size <= MAX_LINE_BYTES else dataclasses.replace(message, text=""))
        if message.id is not None:
            ids.add(message.id)
    yield from _row(current, chat, source, size)


def _is_apart(last: Message, message: Message, gap_minutes: float, ids: set[str]) -> bool:
    # Clocks are set back, too.
    silence = abs((message.time - last.time).total_seconds()) / 60
    return silence > gap_minutes and message.answers not in ids


def _row(messages: Sequence[Message], chat: Chat, source: Source, size: int) -> Iterator[Row | BadRow]:
    written = [message for message in messages if message.text.strip()]
    if not written:
        return
    first = written[0]
    if size > MAX_LINE_BYTES:
        detail = f"{size} characters without a gap, more than {MAX_LINE_BYTES >> 20} MiB; set a smaller gap_minutes"
        yield BadRow("dialogue too long", detail, first.number, first.file)
        return
    turns, starts = speaking_turns([(message.speaker, message.text) for message in written], source.assistant)
    started = [written[start] for start in starts]
    metadata = {"time": _iso(first.time), "group": chat.key}
    yield Row(
        first.number,
        turns,
        id=f"{chat.key}/{first.id}" if chat.own_ids and first.id is not None else None,
        metadata=metadata
        | ({"chat": chat.name} if chat.name else {})
        | ({"omitted": omitted} if (omitted := len(messages) - len(written)) else {}),
        is_log=True,
        per_turn={
            "speakers": [message.speaker for message in started],
            "times": [_iso(message.time) for message in started],
        },
        file=first.file,
    )


def _iso(time: datetime.datetime) -> str:
    return time.isoformat(timespec="seconds")


def utc(value: object) -> datetime.datetime:
    """A time that an export gives as seconds since 1970 (perhaps as text) or in ISO 8601, in UTC, without the zone.

    Raises:
      BadRow: it is neither.
    """
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, int | float) or (isinstance(value, str) and value.replace(".", "", 1).isdecimal()):
            time = datetime.datetime.fromtimestamp(float(value), datetime.UTC)
        else:
            time = datetime.datetime.fromisoformat(str(value))
        return (time.astimezone(datetime.UTC) if time.tzinfo else time).replace(tzinfo=None, microsecond=0)
    except (ValueError, OverflowError, OSError):
        raise BadRow("no time", f"found {told(value)}") from None


def in_order(messages: Iterable[Message | BadRow]) -> list[Message | BadRow]:
    """Messages by time, for exports that do not promise an order; one that cannot be read stays where it is."""
    placed: list[tuple[datetime.datetime, Message | BadRow]] = []
    last = datetime.datetime.min
    for message in messages:
        last = last if isinstance(message, BadRow) else message.time
        placed.append((last, message))
    return [message for _, message in sorted(placed, key=lambda item: item[0])]
