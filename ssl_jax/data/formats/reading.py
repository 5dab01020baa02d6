"""From a source of files to dialogues and rejected rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from ssl_jax.config import Source
from ssl_jax.data.formats import discord, forum, json_rows, lines, parquet, plain, review, slack, telegram, whatsapp
from ssl_jax.data.formats.detect import detect
from ssl_jax.data.formats.lines import Span
from ssl_jax.data.formats.paths import find_files, slack_export, slack_users
from ssl_jax.data.formats.rows import Accepted, BadRow, Expected, Rejected, Row, duplicate_id, finish
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

_BLOCK_FORMATS = ("text", "log")


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """What is read together: the days of a Slack channel, a file, or a part of one.

    Attributes:
      files: in order.
      names: what the files are called in the ids of their rows.
      span: the part of the file; None: all of it.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    span: Span | None = None

    def name(self, file: Path) -> str:
        """What `file` is called; bytes of its name that are no characters are replaced."""
        name = dict(zip(self.files, self.names, strict=True)).get(file, file.name)
        return name.encode(errors="surrogateescape").decode(errors="replace")


def units(source: Source, names: Mapping[Path, str] | None = None) -> Iterator[Unit]:
    """What a source of files consists of, in order.

    What else lies in the folder of a Slack export (lists of users, channels, …) has no messages.

    Args:
      source: where.
      names: what a file is called in the ids of its rows; absent: its name without folders.

    Raises:
      UserError: see `find_files`.
    """
    files = find_files(source)
    exports = {export for file in files if source.format in ("auto", "slack") and (export := slack_export(file))}
    files = [file for file in files if file.parent not in exports]

    def key(file: Path) -> Path:
        return file.parent if source.format == "slack" or file.parent.parent in exports else file

    for _, group in itertools.groupby(sorted(files, key=lambda file: (key(file), file)), key=key):
        together = tuple(group)
        yield Unit(together, tuple((names or {}).get(file, file.name) for file in together))


def cut(unit: Unit, source: Source, size: int) -> list[Unit]:
    """A unit in parts of about `size` bytes that are read independently; the unit itself where that cannot be.

    Files of JSON Lines, raw text and logs can be cut, unless they are compressed.

    Raises:
      UserError: the file cannot be opened, or is no text.
    """
    (file, *others) = unit.files
    if others or file.stat().st_size <= size:
        return [unit]
    try:
        format = _format(file, source)
        by_blocks = format in _BLOCK_FORMATS
        if lines.is_compressed(file) or not (by_blocks or _is_json_lines(file, format)):
            return [unit]
        spans = lines.cut(file, size, at_blank_lines=by_blocks)
    except OSError as error:
        raise _unreadable(file, error) from None
    return [dataclasses.replace(unit, span=span) for span in spans]


def read(
    source: Source, expected: Expected, max_turn_bytes: int, names: Mapping[Path, str] | None = None
) -> Iterator[Dialogue | Rejected]:
    """Reads every row of a source of files, see `read_unit`; a row whose id was there before is rejected.

    Args:
      source: where, and in which format.
      expected: as for `read_unit`.
      max_turn_bytes: as for `read_unit`.
      names: as for `units`.
    """
    seen: dict[str, Accepted] = {}
    for unit in units(source, names):
        for row in read_unit(unit, source, expected, max_turn_bytes):
            if isinstance(row, Rejected):
                yield row
            elif (first := seen.setdefault(row.dialogue.id, row)) is not row:
                yield duplicate_id(row.file, row.line, row.dialogue.id, first.place)
            elif row.left_out is None:
                yield row.dialogue


def read_unit(unit: Unit, source: Source, expected: Expected, max_turn_bytes: int) -> Iterator[Accepted | Rejected]:
    """Reads every row of a part of a source of files.

    Args:
      unit: the part.
      source: its format.
      expected: "labeled" accepts only dialogues that end in a reply. "unlabeled" accepts raw text and prompts, and
        takes the roles off complete dialogues (they become raw).
      max_turn_bytes: a longer turn (UTF-8) rejects its row.

    Yields:
      Dialogues, with the row's own id or `<file>:<line>`, and rejected rows, in order of the files. A dialogue's
      metadata has `source`, the file's name, unless its row says itself what its source is.

    Raises:
      UserError: a file that cannot be opened, is no text, or is too large to be parsed whole; messages without roles in
        a labeled source.
    """
    try:
        for row in _rows(unit, source, expected):
            file = row.file or unit.files[0]
            name = unit.name(file)
            if isinstance(row, BadRow):
                yield Rejected(str(file), row.line or 1, row.reason, row.detail)
                continue
            try:
                dialogue = finish(row, f"{name}:{row.line}", expected, max_turn_bytes, name)
                yield Accepted(dialogue, str(file), name, row.line, row.left_out, row.train_only)
            except BadRow as bad:
                yield Rejected(str(file), bad.line or row.line, bad.reason, bad.detail)
    except OSError as error:
        raise _unreadable(unit.files[0], error) from None


def _format(file: Path, source: Source) -> str:
    return source.format if source.format != "auto" else detect(file, source.posts)


def _is_json_lines(file: Path, format: str) -> bool:
    if format not in json_rows.FORMATS or parquet.is_parquet(file):
        return False
    first = next(lines.filled_lines(file), None)
    return first is not None and not json_rows.is_array(first)


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or file}: cannot be read: {error.strerror}")


def _rows(unit: Unit, source: Source, expected: Expected) -> Iterator[Row | BadRow]:
    file = unit.files[0]
    format = _format(file, source)
    match format:
        case "text":
            return plain.read_text(file, source, unit.span)
        case "log":
            return plain.read_log(file, source, unit.span)
        case "parlai":
            return plain.read_parlai(file, source)
        case "parquet":
            return parquet.read(file, source, None)
        case "whatsapp":
            rows = whatsapp.read(file, source, unit.name(file))
        case "telegram":
            rows = telegram.read(file, source, unit.name(file))
        case "discord":
            rows = discord.read(file, source, unit.name(file))
        case "slack":
            rows = slack.read(unit.files, source, slack_users(file))
        case "forum":
            rows = forum.read(file, source)
        case "review":
            return review.read(file, source)
        case _ if parquet.is_parquet(file):
            return parquet.read(file, source, format)
        case _:
            return json_rows.read_rows(file, source, format, unit.span)
    return _with_roles(rows, file, format, source) if expected == "labeled" else rows


def _with_roles(rows: Iterator[Row | BadRow], file: Path, format: str, source: Source) -> Iterator[Row | BadRow]:
    """Rows whose speakers are only marked as the source asks, for a source that needs them marked.

    Raises:
      UserError: the source does not say who the assistant is.
    """
    for row in rows:
        if isinstance(row, Row) and source.assistant is None:
            speakers = list(dict.fromkeys(row.per_turn.get("speakers", ())))
            raise UserError(
                f"{file}: {format} does not say who replies; set the source's assistant to a speaker, "
                f"such as {' or '.join(repr(speaker) for speaker in speakers[:3])}, or name the file in data.unlabeled"
            )
        yield row
