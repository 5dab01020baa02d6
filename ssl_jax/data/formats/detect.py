"""Which format a file has, from its first rows, where they leave no doubt; else the plainest that fits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.config.data import PostFields
from ssl_jax.data.formats import discord, forum, json_rows, json_text, parquet, plain, review, slack, telegram, whatsapp
from ssl_jax.data.formats.lines import Line, document, filled_lines, head
from ssl_jax.data.formats.paths import slack_export, suffix
from ssl_jax.data.formats.rows import BadRow

_ROWS_TO_SNIFF = 20
_HEAD_BYTES = 2**18
# The beginnings of exports that are one large document. A quote inside of a JSON text has a backslash before it, so
# that these are fields. Telegram's kinds of chat: https://core.telegram.org/import-export
_DISCORD = re.compile(r'"guild"\s*:\s*\{.*"channel"\s*:\s*\{', re.DOTALL)
_TELEGRAM = re.compile(
    r'"personal_information"\s*:\s*\{|"(?:left_)?chats"\s*:\s*\{'
    r'|"type"\s*:\s*"(?:saved_messages|replies|verification_codes|personal_chat|bot_chat'
    r'|(?:private|public)_(?:group|supergroup|channel))"'
)


def detect(file: Path, posts: PostFields) -> str:
    """The format of a file, as `Source.format` names it.

    Raises:
      UserError: the file is no text at all.
    """
    if parquet.is_parquet(file):
        return "parquet"
    if slack_export(file):
        return "slack"
    first = list(itertools.islice(filled_lines(file), _ROWS_TO_SNIFF))
    texts = [text for line in first if (text := _text(line)) is not None]
    if whatsapp.is_whatsapp(texts):
        return "whatsapp"
    is_json = suffix(file) in {".json", ".jsonl", ".ndjson"}
    if is_json or (first and first[0].content.lstrip().startswith((b"{", b"["))):
        return _json(file, first, posts)
    if texts and all(plain.is_parlai(text) for text in texts):
        return "parlai"
    return "log" if first and all(b"\t" in line.content for line in first) else "text"


def _json(file: Path, first: Sequence[Line], posts: PostFields) -> str:
    is_array = bool(first) and json_rows.is_array(first[0])
    for value in _array(file) if is_array else _lines(first):
        if isinstance(value, dict) and (format := _format_of(value, posts)):
            return format
    start = head(file, _HEAD_BYTES).decode(errors="replace")
    if not is_array and _DISCORD.search(start):
        return "discord"
    if not is_array and _TELEGRAM.search(start):
        return "telegram"
    return "messages"


def _format_of(value: dict[str, Any], posts: PostFields) -> str | None:
    if discord.is_discord(value):
        return "discord"
    if telegram.is_telegram(value):
        return "telegram"
    if slack.is_slack(value):
        return "slack"
    if review.is_review(value):
        return "review"
    if "messages" not in value and forum.is_post(value, posts):
        return "forum"
    return json_rows.format_of(value)


def _lines(first: Sequence[Line]) -> Iterator[Any]:
    for line in first:
        try:
            yield json_text.load(line.text)
        except BadRow:
            continue


def _array(file: Path) -> Iterator[Any]:
    """The first elements of an array; of the whole, if it is too large to see one at its beginning."""
    start = head(file, _HEAD_BYTES)
    found = json_text.recovered(start.decode(errors="replace"), lambda value: True)
    first = next(found, None)
    if isinstance(first, BadRow) and len(start) == _HEAD_BYTES:
        yield from itertools.islice(json_text.array(document(file)[0]) or [], _ROWS_TO_SNIFF)
    elif first is not None:
        yield from itertools.islice(itertools.chain([first], found), _ROWS_TO_SNIFF)


def _text(line: Line) -> str | None:
    try:
        return line.text
    except BadRow:
        return None
