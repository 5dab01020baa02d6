"""JSON as strangers write it: strictly parsed, bounded in depth, and recovered around a broken spot."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ssl_jax.data.formats.rows import BadRow

_MAX_DEPTH = 64  # of nested JSON; real metadata stays far below, a hostile row could exhaust the stack
_ROW_OPENINGS = 4
# One inside the other.
_OPENINGS = re.compile(r"(?:[\[{][^\[\]{}]*)+")
# Recovery reads a broken stretch once for each object that is open there; real documents nest less.
_MAX_READINGS = 8


def load(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      BadRow: it is not JSON (NaN and infinities are not), nested too deep, or holds half a character.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f"{error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise BadRow("not JSON", str(error)) from None
    # Most rows can have neither fault: they are short of brackets, and write no half of a surrogate pair.
    suspicious = text.count("[") + text.count("{") > _MAX_DEPTH or "\\u" in text
    return checked(value) if suspicious else value


def checked(value: Any) -> Any:
    """`value`, if it is not nested too deep and all its text is Unicode.

    Raises:
      BadRow: otherwise.
    """
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise _too_deep()
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = str(error.object)[error.start]
        # What `surrogateescape` makes of a byte.
        is_byte = "\udc80" <= found <= "\udcff"
        raise (BadRow("invalid UTF-8") if is_byte else BadRow("not Unicode text", "half a surrogate pair")) from None
    return value


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is an object, else an empty one: for fields that may be missing."""
    return value if isinstance(value, dict) else {}


def array(text: str) -> list[Any] | None:
    """The elements of a text that is one JSON array, not yet `checked`; None if it is broken: see `recovered`."""
    value = document(text)
    return value if isinstance(value, list) else None


def document(text: str) -> Any | None:
    """The value of a whole file, not yet `checked`; None if it is broken: see `recovered`."""
    try:
        return _DECODER.decode(text)
    except (RecursionError, ValueError):
        return None


def recovered(
    text: str,
    is_row: Callable[[Mapping[str, Any]], bool],
    opened: Callable[[str], None] = lambda fragment: None,
) -> Iterator[Mapping[str, Any] | BadRow]:
    """The rows of a broken JSON document, and what is wrong between them, in the order of the text.

    Args:
      text: the document.
      is_row: whether an object is a row, rather than a part of one that is broken.
      opened: called with the beginning of an object that is broken, up to the next object.
    """
    position = 0
    readings = _MAX_READINGS * len(text) + 10_000
    failures: collections.Counter[int] = collections.Counter()
    while (start := text.find("{", position)) >= 0:
        value, failure = _decoded(text, start)
        if failure is None:
            yield from within(value[0], is_row)
            position = value[1]
            continue
        if failure.position not in failures:
            yield failure.row()
        failures[failure.position] += 1
        # The decoder also counts the lines before an error.
        readings -= len(text) // 4 if failure.is_too_deep else failure.position - start + failure.position // 256 + 1
        if readings < 0:
            yield BadRow("not JSON", f"too broken to go on at character {start + 1}")
            return
        position = start + 1
        # What is nested deeper than a row can be is no row.
        if failure.is_too_deep and (openings := _OPENINGS.match(text, start)):
            # The last ones may be those of the next row.
            for _ in range(_ROW_OPENINGS):
                position = max(
                    start + 1, text.rfind("{", start + 1, position if position > start + 1 else openings.end())
                )
        elif failures[failure.position] > _MAX_DEPTH:
            position = max(position, failure.position)
        following = text.find("{", start + 1)
        opened(text[start : following if following >= 0 else len(text)])
    # A document can also be broken between its rows, or have none.
    whole = _decoded(text, len(text) - len(text.lstrip()))[1]
    if whole and whole.position not in failures:
        yield whole.row()


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    """Why a text is no JSON, and at which character."""

    position: int
    reason: str
    is_too_deep: bool = False

    def row(self) -> BadRow:
        where = f"at character {self.position + 1}"
        return (
            BadRow("JSON nested too deep", where) if self.is_too_deep else BadRow("not JSON", f"{self.reason} {where}")
        )


def _decoded(text: str, start: int) -> tuple[tuple[Any, int], _Failure | None]:
    """The value that begins at a position and where it ends, or why there is none."""
    try:
        return _DECODER.raw_decode(text, start), None
    except RecursionError:
        return (None, start), _Failure(start, "", is_too_deep=True)
    except json.JSONDecodeError as error:
        return (None, start), _Failure(error.pos, error.msg)
    except ValueError as error:  # a number that JSON does not have
        return (None, start), _Failure(start, str(error))


def within(value: Any, is_row: Callable[[Mapping[str, Any]], bool]) -> Iterator[Mapping[str, Any]]:
    """The rows in a value that is one, or holds some: the outermost of them, in order."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict) and is_row(item):
            yield item
        elif isinstance(item, dict | list):
            waiting += reversed(list(item.values()) if isinstance(item, dict) else item)


def _too_deep() -> BadRow:
    return BadRow("JSON nested too deep", f"more than {_MAX_DEPTH} levels")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"a number of {len(digits)} characters is out of range")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
