"""Formats in which a JSON object is a dialogue: messages, prompt and completion, ShareGPT, Alpaca."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from ssl_jax.config import Source
from ssl_jax.data.formats import json_text
from ssl_jax.data.formats.lines import Line, Span, document, filled_lines
from ssl_jax.data.formats.rows import BadRow, Row, attempt, raw_turns, told, told_keys
from ssl_jax.dialogue import Role, Turn

_ROLES: Mapping[str, Role] = {role: role for role in get_args(Role)}
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
}

# A parser takes a row and returns its turns and the keys it used; all other keys are metadata.
_Parsed = tuple[tuple[Turn, ...], frozenset[str]]
_Parser = Callable[[Mapping[str, Any], bool], _Parsed]


def read_rows(file: Path, source: Source, format: str, span: Span | None = None) -> Iterator[Row | BadRow]:
    """The rows of JSON Lines, or of a file that is one JSON array.

    Args:
      file: what to read.
      source: `split_lines` decides how raw text becomes turns.
      format: one of `FORMATS`.
      span: the part of JSON Lines to read; absent: all.
    """
    for number, value in values(file, lambda row: not KEYS[format].isdisjoint(row), span):
        if isinstance(value, BadRow):
            yield value.at(number)
        else:
            yield attempt(number, lambda number=number, value=value: row(number, value, format, source))


def values(
    file: Path, is_row: Callable[[Mapping[str, Any]], bool], span: Span | None = None
) -> Iterator[tuple[int, Any | BadRow]]:
    """The JSON values of a file, numbered by line, or by element if the file is one array.

    Args:
      file: what to read.
      is_row: whether an object of a broken array is an element of it.
      span: the part to read of a file that is no array; absent: all.
    """
    found = filled_lines(file, span)
    first = next(found, None)
    if first is None:
        return
    if span or not is_array(first):
        for line in itertools.chain([first], found):
            yield line.number, attempt(line.number, lambda line=line: json_text.load(line.text))
        return
    text, damage = document(file)
    elements = None if damage else json_text.array(text)
    number = 0
    for element in json_text.recovered(text, is_row) if elements is None else elements:
        number += 1
        if isinstance(element, BadRow):
            yield number, element
        else:
            yield number, attempt(number, lambda element=element: json_text.checked(element))
    if damage:
        yield number + 1, damage


def is_array(first: Line) -> bool:
    """Whether a file whose first filled line this is holds one JSON array."""
    return first.content.lstrip().startswith(b"[")


def row(number: int, value: Any, format: str, source: Source) -> Row:
    """A parsed JSON value as a row.

    Raises:
      BadRow: it does not have the format.
    """
    if not isinstance(value, dict):
        raise BadRow("not an object", f"found {type(value).__name__}")
    turns, used = _PARSERS[format](value, source.split_lines)
    own_id = value.get("id")
    if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
        raise BadRow("id is not text", f"found {told(own_id)}")
    metadata = {key: item for key, item in value.items() if key not in used and key != "id"}
    return Row(number, turns, None if own_id in (None, "") else str(own_id), metadata)


def _parse_messages(row: Mapping[str, Any], split_lines: bool) -> _Parsed:
    if row.get("messages") is not None:
        return _turns(row["messages"], "role", "content", _ROLES), frozenset({"messages"})
    if row.get("text") is not None:
        return raw_turns(_text(row["text"], "text"), split_lines), frozenset({"text", "messages"})
    raise _missing(row, "messages or text")


def _parse_prompt_completion(row: Mapping[str, Any], split_lines: bool) -> _Parsed:
    if row.get("prompt") is None:
        raise _missing(row, "prompt")
    turns: tuple[Turn, ...] = ()
    parts: tuple[tuple[str, Role], ...] = (("prompt", "user"), ("completion", "assistant"))
    for key, role in parts:
        if isinstance(value := row.get(key), list):
            turns += _turns(value, "role", "content", _ROLES)
        elif value is not None:
            turns += (Turn(role, _text(value, key)),)
    return turns, frozenset({"prompt", "completion"})


def _parse_sharegpt(row: Mapping[str, Any], split_lines: bool) -> _Parsed:
    if row.get("conversations") is None:
        raise _missing(row, "conversations")
    return _turns(row["conversations"], "from", "value", _SHAREGPT_ROLES), frozenset({"conversations"})


def _parse_alpaca(row: Mapping[str, Any], split_lines: bool) -> _Parsed:
    if row.get("instruction") is None:
        raise _missing(row, "instruction")
    request = _text(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        request = f"{request}\n\n{_text(row['input'], 'input')}"
    turns = (Turn("user", request),)
    if row.get("output") is not None:
        turns += (Turn("assistant", _text(row["output"], "output")),)
    return turns, frozenset({"instruction", "input", "output"})


def _turns(messages: Any, role_key: str, text_key: str, roles: Mapping[str, Role]) -> tuple[Turn, ...]:
    if not isinstance(messages, list):
        raise BadRow("messages are not a list", f"found {type(messages).__name__}")
    if not messages:
        raise BadRow("no messages", "the list is empty")
    turns = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow("message is not an object", f"message {position}")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise BadRow("unknown role", f"message {position} has {role_key} {told(role)}")
        turns.append(Turn(roles[role], _text(message.get(text_key), f"message {position}")))
    return tuple(turns)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("content is not text", f"{where} has {type(value).__name__}")
    return value


def _missing(row: Mapping[str, Any], what: str) -> BadRow:
    return BadRow(f"no {what}", f"found {told_keys(row)}")


KEYS: Mapping[str, frozenset[str]] = {
    "messages": frozenset({"messages", "text"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction"}),
    "prompt_completion": frozenset({"prompt"}),
}
"""What a row of a format must have one of; the first format that fits a row is meant."""

_PARSERS: Mapping[str, _Parser] = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
}
FORMATS = tuple(_PARSERS)


def format_of(row: Any) -> str | None:
    """The format that a JSON value has, as far as its keys tell."""
    if not isinstance(row, dict):
        return None
    return next((format for format, keys in KEYS.items() if not keys.isdisjoint(row)), None)
