"""From an example of a data set that a library knows by name to the row of a dialogue, as `FieldMapping` says.

Both TFDS and Hugging Face describe an example as nested fields and lists; a path such as `conversation.turns.text`
leads through both, and through a list it means the field of every element.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ssl_jax.config.data import FieldMapping
from ssl_jax.data.formats.rows import BadRow, Row, raw_turns, told
from ssl_jax.dialogue import ROLES, Role, Turn
from ssl_jax.errors import UserError

Labels = Mapping[str, tuple[str, ...]]
"""The names of the classes of every field that holds numbers of classes, by path."""

_SPEAKERS: tuple[Role, Role] = ("user", "assistant")
_FIELDS_SHOWN = 30


def check(fields: FieldMapping | None, features: Mapping[str, Any], name: str) -> None:
    """Compares a mapping with what the data set has.

    Args:
      fields: the mapping.
      features: description of an example by the library that opened the data set.
      name: what the user calls the data set.

    Raises:
      UserError: there is no mapping, or it names what is not there; the message lists the data set's fields.
    """
    listed = sorted(_describe(features))
    shown = ", ".join(listed[:_FIELDS_SHOWN]) + (", …" if len(listed) > _FIELDS_SHOWN else "")
    if fields is None:
        raise UserError(f"{name} needs fields, such as fields: {{messages: …}} or {{prompt: …, completion: …}}; "
                        f"it has {shown}")  # fmt: skip
    for key, path in _paths(fields).items():
        if not _is_there(features, path):
            raise UserError(f"{name}: fields.{key} names {path!r}; it has {shown}")


def labels(features: Any, path: str = "") -> dict[str, tuple[str, ...]]:
    """The `Labels` of a data set, from its description."""
    if hasattr(features, "items"):
        found: dict[str, tuple[str, ...]] = {}
        for name, feature in features.items():
            found |= labels(feature, f"{path}.{name}".removeprefix("."))
        return found
    if hasattr(features, "feature"):
        return labels(features.feature, path)
    names = getattr(features, "names", None)
    return {path: tuple(names)} if names else {}


def to_row(example: Mapping[str, Any], number: int, fields: FieldMapping, labels: Labels, split_lines: bool) -> Row:
    """The row of an example.

    Args:
      example: values by name, as the library gives them.
      number: of the example, from 1.
      fields: a mapping that `check` accepts.
      labels: names of classes, which replace their numbers.
      split_lines: whether every line of `fields.text` is a turn.

    Returns:
      The row; its metadata are the fields that are not part of the text, as far as JSON can hold them.

    Raises:
      BadRow: the example is no dialogue.
    """
    values = {name: _plain(value, labels, name) for name, value in example.items()}
    own_id = _value(values, fields.id) if fields.id else None
    if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
        raise BadRow("id is not text", f"found {told(own_id)}")
    turns, is_log = _turns(values, fields, labels, split_lines)
    return Row(
        line=number,
        turns=turns,
        id=None if own_id in (None, "") else str(own_id),
        metadata=_metadata(values, fields),
        is_log=is_log,
    )


def _paths(fields: FieldMapping) -> dict[str, str]:
    """The paths that a mapping names, by what they are for."""
    chosen = {name: getattr(fields, name) for name in ("text", "prompt", "completion", "messages", "system")}
    chosen |= {name: getattr(fields, name) for name in ("id", "group", "time")}
    if fields.messages:
        chosen |= {name: path and f"{fields.messages}.{path}" for name, path in _message_fields(fields).items()}
    return {name: path for name, path in chosen.items() if path}


def _message_fields(fields: FieldMapping) -> dict[str, str | None]:
    return {"role": fields.role, "content": fields.content}


def _is_there(features: Any, path: str) -> bool:
    if hasattr(features, "items"):
        if path in features:
            return True
        return any(_is_there(inner, path[len(name) + 1 :]) for name, inner in features.items()
                   if path.startswith(f"{name}."))  # fmt: skip
    return hasattr(features, "feature") and _is_there(features.feature, path)


def _describe(features: Any, path: str = "", lists: str = "") -> Iterator[str]:
    """Every field with its type, such as `turns.speaker (list of label)`."""
    while hasattr(features, "feature"):
        features, lists = features.feature, f"list of {lists}"
    if hasattr(features, "items"):
        for name, feature in features.items():
            yield from _describe(feature, f"{path}.{name}".removeprefix("."), lists)
    else:
        # TFDS has a type of NumPy, for which text is an object; its `dtype` would ask for TensorFlow.
        dtype = features.np_dtype if hasattr(features, "np_dtype") else getattr(features, "dtype", None)
        kind = str(dtype or type(features).__name__)
        kind = "label" if getattr(features, "names", None) else {"object": "text", "string": "text"}.get(kind, kind)
        yield f"{path} ({lists}{kind})"


def _plain(value: Any, labels: Labels, path: str) -> Any:
    """The value as JSON has it, as far as it has it: text for UTF-8 bytes, names for classes, lists for arrays."""
    match value:
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value
        case Mapping():
            return {name: _plain(inner, labels, f"{path}.{name}") for name, inner in value.items()}
        case list() | tuple():
            return [_plain(inner, labels, path) for inner in value]
        case np.ndarray() if value.ndim <= 1 or value.dtype == object:
            return _plain(value.tolist(), labels, path)
        case np.generic():
            return _plain(value.item(), labels, path)
        case datetime.date():
            return value.isoformat()
        case int() if (names := labels.get(path)) and not isinstance(value, bool):
            # TFDS and Hugging Face write -1 where the class is not known.
            return names[value] if 0 <= value < len(names) else None
        case _:
            return value


def _value(value: Any, path: str) -> Any:
    """What a path leads to, None where it ends early."""
    if isinstance(value, list):
        return [_value(element, path) for element in value]
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    name, _, rest = path.partition(".")
    return _value(value.get(name), rest) if rest else None


def _turns(
    values: Mapping[str, Any], fields: FieldMapping, labels: Labels, split_lines: bool
) -> tuple[tuple[Turn, ...], bool]:
    """The turns, and whether they were written down without a reply in mind (`Row.is_log`)."""
    if fields.text:
        return raw_turns(_text(_value(values, fields.text), fields.text), split_lines), False
    system: tuple[Turn, ...] = ()
    if fields.system and (instructions := _value(values, fields.system)):
        system = (Turn("system", _text(instructions, fields.system)),)
    if fields.messages:
        turns, has_roles = _message_turns(_value(values, fields.messages), fields, labels)
        return system + turns, not has_roles
    assert fields.prompt, "the configuration has one of text, prompt and messages"
    turns = (*system, Turn("user", _text(_value(values, fields.prompt), fields.prompt)))
    if fields.completion and (completion := _value(values, fields.completion)) not in (None, ""):
        turns += (Turn("assistant", _text(completion, fields.completion)),)
    return turns, False


def _message_turns(messages: Any, fields: FieldMapping, labels: Labels) -> tuple[tuple[Turn, ...], bool]:
    """The turns of a list of messages, and whether the messages say who speaks."""
    if isinstance(messages, dict):  # one list for each field, as TFDS stores a sequence of messages
        columns = {name: column for name, column in messages.items() if isinstance(column, list)}
        if len({len(column) for column in columns.values()}) != 1:
            raise BadRow("messages are not a list", "found fields that are not lists of one length")
        messages = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(messages, list):
        raise BadRow("messages are not a list", f"found {type(messages).__name__}")
    if not messages:
        raise BadRow("no messages", "the list is empty")
    role_field = fields.role or ("role" if isinstance(messages[0], dict) and "role" in messages[0] else None)
    turns = []
    for position, message in enumerate(messages):
        content = _value(message, fields.content or "content") if isinstance(message, dict) else message
        role = _role(message, position, role_field, fields, labels) if role_field else _SPEAKERS[position % 2]
        turns.append(Turn(role, _text(content, f"message {position}")))
    return tuple(turns), role_field is not None


def _role(message: Any, position: int, role_field: str, fields: FieldMapping, labels: Labels) -> Role:
    said = _value(message, role_field)
    roles = _roles(tuple(fields.roles.items()), labels.get(f"{fields.messages}.{role_field}", ()))
    if (role := roles.get(str(said))) is None:
        raise BadRow("unknown role", f"message {position} has {role_field} {told(said)}; name it in fields.roles")
    return role


@functools.lru_cache(maxsize=16)
def _roles(given: tuple[tuple[str, Role], ...], names: tuple[str, ...]) -> dict[str, Role]:
    """Roles by the value that stands for them; a class may be given by its name or its number."""
    roles: dict[str, Role] = {role: role for role in ROLES if role != "text"}  # pyright: ignore[reportAssignmentType]
    for value, role in given:
        roles[names[int(value)] if value.isdecimal() and int(value) < len(names) else value] = role
    return roles


def _text(value: Any, where: str) -> str:
    if isinstance(value, bytes):
        raise BadRow("invalid UTF-8", where)
    if not isinstance(value, str):
        raise BadRow("content is not text", f"{where} has {type(value).__name__}")
    return value


def _metadata(values: Mapping[str, Any], fields: FieldMapping) -> dict[str, Any]:
    """Everything that is not the dialogue itself."""
    spoken = (fields.text, fields.prompt, fields.completion, fields.messages, fields.system)
    used = {path if path in values else path.partition(".")[0] for path in spoken if path} | {fields.id}
    found = {name: value for name, value in values.items() if name not in used}
    for name, path in (("group", fields.group), ("time", fields.time)):
        if path:
            found[name] = _value(values, path)
    return {name: value for name, value in found.items() if value is not None and _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
