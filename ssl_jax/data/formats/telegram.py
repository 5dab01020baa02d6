"""Telegram Desktop's JSON export: `result.json` of one chat, or of all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.config import Source
from ssl_jax.data.formats import json_text
from ssl_jax.data.formats.chat import Chat, Message, dialogues, in_order, parsed, utc
from ssl_jax.data.formats.lines import document
from ssl_jax.data.formats.rows import BadRow, Row, told

# The lists of chats in an export of everything.
_LISTS = ("chats", "left_chats")
_OPENED = re.compile(r'"id"\s*:\s*(-?\d+)')


def read(file: Path, source: Source, name: str) -> Iterator[Row | BadRow]:
    """The dialogues of every chat. Service messages, and those without text, are omitted.

    Of a broken file, what can be told to be a chat or a message is read.
    """
    text, damage = document(file)
    value = None if damage else json_text.document(text)
    number = 0
    chats = list(_chats(json_text.mapping(value), name))
    if not chats:
        chats = list(_recovered_chats(text, name))
        if value is not None:
            yield BadRow("no messages", "not a chat that Telegram exported", 1)
    for chat, messages in chats:
        found_messages = [parsed(number + at, item, _message) for at, item in enumerate(messages, 1)]
        number += len(messages)
        yield from dialogues(in_order(found_messages), chat, source)
    if damage:
        yield damage.at(number + 1)


def is_telegram(value: Mapping[str, Any]) -> bool:
    """Whether an object is surely the export of a chat or of all."""
    if any(isinstance(json_text.mapping(value.get(key)).get("list"), list) for key in _LISTS):
        return True
    return _is_chat(value) and all(isinstance(item, dict) and "date" in item for item in value["messages"][:3])


def _is_chat(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("messages"), list) and "type" in value and ("name" in value or "id" in value)


def _is_message(value: Mapping[str, Any]) -> bool:
    # Where the end of a list in a message is damaged, the messages after it can seem to be in it.
    lists = (item for item in value.values() if isinstance(item, list))
    swallowed = any("date" in json_text.mapping(part) for parts in lists for part in parts)
    return {"type", "date", "text"} <= value.keys() and not swallowed


def _chats(value: Mapping[str, Any], name: str) -> Iterator[tuple[Chat, Sequence[Any]]]:
    chats = [value] if "messages" in value else []
    for key in _LISTS:
        part = json_text.mapping(value.get(key)).get("list")
        chats += part if isinstance(part, list) else []
    for chat in chats:
        messages = json_text.mapping(chat).get("messages")
        found = messages if isinstance(messages, list) else list(json_text.within(chat, _is_message))
        yield _chat(chat, name), found or [BadRow("no messages", f"{_chat(chat, name).key:.60}")]


def _chat(value: Any, name: str) -> Chat:
    if not isinstance(value, dict):
        return Chat(name, own_ids=False)
    title = value.get("name")
    key = value.get("id", title)
    is_known = isinstance(key, str | int)
    return Chat(f"telegram/{key}" if is_known else name, title if isinstance(title, str) else None, own_ids=is_known)


def _recovered_chats(text: str, name: str) -> Iterator[tuple[Chat, Sequence[Any]]]:
    chat = Chat(name, own_ids=False)
    messages: list[Any] = []

    def opened(fragment: str) -> None:
        nonlocal chat
        if '"messages"' in fragment:
            found = _OPENED.search(fragment)
            chat = Chat(f"telegram/{found[1]}") if found else Chat(name, own_ids=False)

    current = chat
    for item in json_text.recovered(text, lambda value: _is_chat(value) or _is_message(value), opened):
        if chat is not current:
            yield current, messages
            current, messages = chat, []
        if not isinstance(item, BadRow) and _is_chat(item):
            yield from _chats(item, name)
        else:
            messages.append(item)
    yield current, messages


def _message(number: int, value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadRow("message is not an object", f"found {type(value).__name__}")
    time = utc(value.get("date_unixtime") or value.get("date"))
    id, answers = value.get("id"), value.get("reply_to_message_id")
    text = "" if value.get("type") == "service" else _text(value.get("text", ""))
    speaker = value.get("from") or value.get("from_id") or value.get("actor") or ""
    if text and not isinstance(speaker, str):
        raise BadRow("speaker is not text", f"found {told(speaker)}")
    return Message(
        number, str(speaker), time, text, None if id is None else str(id), None if answers is None else str(answers)
    )


def _text(value: Any) -> str:
    """A message's text: plain, or a list of texts and entities (links, mentions, bold, …)."""
    if isinstance(value, str):
        return value
    parts = (
        [part.get("text") if isinstance(part, dict) else part for part in value] if isinstance(value, list) else [None]
    )
    if not all(isinstance(part, str) for part in parts):
        raise BadRow("content is not text", f"message has {type(value).__name__}")
    return "".join(part for part in parts if isinstance(part, str))
