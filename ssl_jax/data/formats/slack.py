"""Slack's export: a folder with `users.json` and, for each channel, a folder of day files (`2024-05-31.json`).

A thread is a dialogue of its own: the message it is about and the answers, however long they took. Everything else in
a channel is divided by silence. Notices (joined, topic changed, …) are omitted; mentions become names.
"""

from __future__ import annotations

import html
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.config import Source
from ssl_jax.data.formats import json_text
from ssl_jax.data.formats.chat import Chat, Message, dialogues, in_order, utc
from ssl_jax.data.formats.json_rows import values
from ssl_jax.data.formats.lines import document
from ssl_jax.data.formats.rows import BadRow, Row, attempt, told

# Subtypes of messages that somebody wrote; all others say that something happened.
_WRITTEN = frozenset({"", "bot_message", "file_comment", "file_share", "me_message", "thread_broadcast"})
# `<@U123>`, `<@U123|ann>`, `<#C123|general>`, `<!here>`, `<https://example.org|a page>`.
_MARKUP = re.compile(r"<([@#!]?)([^<>|]+)(?:\|([^<>]*))?>")


def read(files: Sequence[Path], source: Source, users_file: Path | None) -> Iterator[Row | BadRow]:
    """The dialogues of a channel.

    Args:
      files: its days, in order.
      source: how to divide and mark them.
      users_file: who the ids are; without it they stay ids.
    """
    users: dict[str, str] = {}
    if users_file is not None:
        try:
            users = _users(users_file)
        except BadRow as bad:
            yield bad.at(1, users_file)
    channel = files[0].parent.name
    flow: list[Message | BadRow] = []
    threads: dict[str, list[Message]] = defaultdict(list)
    for file in files:
        for number, value in values(file, is_slack):
            message = (
                value.at(number, file)
                if isinstance(value, BadRow)
                else attempt(number, lambda value=value, number=number, file=file: _message(number, value, users, file))
            )
            if isinstance(message, BadRow):
                flow.append(message.at(number, file))
            elif thread := json_text.mapping(value).get("thread_ts"):
                threads[str(thread)].append(message)
            else:
                flow.append(message)
    # The beginning of a thread that nobody (in the export) answered is a message like any other.
    flow += [messages[0] for thread, messages in threads.items() if len(messages) == 1 and messages[0].id == thread]
    yield from dialogues(in_order(flow), Chat(f"slack/{channel}", channel), source)
    for thread, messages in threads.items():
        if len(messages) > 1 or messages[0].id != thread:
            chat = Chat(f"slack/{channel}/{thread}", channel)
            yield from dialogues(in_order(messages), chat, source, gap_minutes=math.inf)


def is_slack(value: Mapping[str, Any]) -> bool:
    """Whether an object is surely a message of a day file."""
    return value.get("type") == "message" and isinstance(value.get("ts"), str)


def _message(number: int, value: Any, users: Mapping[str, str], file: Path) -> Message:
    if not isinstance(value, dict):
        raise BadRow("message is not an object", f"found {type(value).__name__}")
    text = value.get("text") or ""
    if not isinstance(text, str):
        raise BadRow("content is not text", f"message has {type(text).__name__}")
    user = value.get("user") or value.get("username") or value.get("bot_id") or ""
    if not isinstance(user, str):
        raise BadRow("speaker is not text", f"found {told(user)}")
    time = utc(value.get("ts"))
    is_written = value.get("type", "message") == "message" and (value.get("subtype") or "") in _WRITTEN
    said = _MARKUP.sub(lambda match: _plain(match, users), text) if is_written else ""
    return Message(number, users.get(user, user), time, html.unescape(said), str(value["ts"]), file=file)


def _plain(match: re.Match[str], users: Mapping[str, str]) -> str:
    kind, target, label = match.groups()
    if kind == "@":
        return f"@{users.get(target) or label or target}"
    if kind == "#":
        return f"#{label or target}"
    if kind == "!":
        return label or f"@{target.split('^')[0]}"
    return label or target.removeprefix("mailto:")


def _users(file: Path) -> dict[str, str]:
    """Names by id.

    Raises:
      BadRow: the file is not a list of users.
    """
    text, damage = document(file)
    value = json_text.load(text) if damage is None else None
    if not isinstance(value, list):
        raise damage or BadRow("not a list of users")
    names = {}
    for user in value:
        if not isinstance(user, dict) or not isinstance(user.get("id"), str):
            raise BadRow("not a list of users", f"found {told(user)}")
        profile = json_text.mapping(user.get("profile"))
        known = (profile.get("display_name"), user.get("real_name"), profile.get("real_name"), user.get("name"))
        names[user["id"]] = next((name for name in known if isinstance(name, str) and name), user["id"])
    return names
