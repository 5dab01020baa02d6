"""Discord channels as DiscordChatExporter writes them in JSON: an object with guild, channel and messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssl_jax.config import Source
from ssl_jax.data.formats import json_text
from ssl_jax.data.formats.chat import Chat, Message, dialogues, in_order, parsed, utc
from ssl_jax.data.formats.lines import document
from ssl_jax.data.formats.rows import BadRow, Row, told

# Messages that somebody wrote; all other types say that something happened.
_WRITTEN = frozenset({"Default", "Reply", "ThreadStarterMessage", "ChatInputCommand", "ApplicationCommand", "0", "19"})

_CHANNEL = re.compile(r'"channel"\s*:\s*\{\s*"id"\s*:\s*"(\d+)"')


def read(file: Path, source: Source, name: str) -> Iterator[Row | BadRow]:
    """The dialogues of a channel. Notices, and messages without text, are omitted.

    Of a broken file, what can be told to be a message is read.
    """
    text, damage = document(file)
    value = None if damage else json_text.document(text)
    export = json_text.mapping(value)
    messages = export.get("messages")
    if isinstance(messages, list):
        items = list(messages)
        channel = {key: str(item) for key, item in json_text.mapping(export.get("channel")).items()}
    else:
        items = list(json_text.recovered(text, _is_message))
        if value is not None:
            items.append(BadRow("no messages", "not a channel that DiscordChatExporter wrote"))
        found = _CHANNEL.search(text)
        channel = {"id": found[1]} if found else {}
    if damage:
        items.append(damage)
    found_messages = [parsed(number, item, _message) for number, item in enumerate(items, 1)]
    key = channel.get("id")
    chat = Chat(f"discord/{key}" if key else name, channel.get("name"), own_ids=key is not None)
    yield from dialogues(in_order(found_messages), chat, source)


def is_discord(value: Mapping[str, Any]) -> bool:
    """Whether an object is surely an exported channel."""
    return isinstance(value.get("channel"), dict) and "guild" in value and isinstance(value.get("messages"), list)


def _is_message(value: Mapping[str, Any]) -> bool:
    return {"id", "timestamp", "content"} <= value.keys()


def _message(number: int, value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadRow("message is not an object", f"found {type(value).__name__}")
    text = value.get("content")
    if not isinstance(text, str):
        raise BadRow("content is not text", f"message has {type(text).__name__}")
    author = json_text.mapping(value.get("author"))
    speaker = author.get("nickname") or author.get("name") or author.get("id")
    if text and not isinstance(speaker, str):
        raise BadRow("speaker is not text", f"found {told(speaker)}")
    if str(value.get("type", "Default")) not in _WRITTEN:
        text = ""
    id = value.get("id")
    answers = json_text.mapping(value.get("reference")).get("messageId")
    return Message(
        number,
        str(speaker),
        utc(value.get("timestamp")),
        text,
        None if id is None else str(id),
        None if answers is None else str(answers),
    )
