"""From a source of files to dialogues and rejected rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ssl_jax.config import Source
from ssl_jax.data.formats import discord, forum, json_rows, parquet, plain, slack, telegram, whatsapp
from ssl_jax.data.formats.detect import detect
from ssl_jax.data.formats.paths import find_files, slack_export, slack_users
from ssl_jax.data.formats.rows import BadRow, Expected, Rejected, Row, finish
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError


def read(
    source: Source,
    expected: Expected,
    max_turn_bytes: int,
    names: Mapping[Path, str] | None = None,
    seen: dict[str, str] | None = None,
) -> Iterator[Dialogue | Rejected]:
    """Reads every row of a source of files.

    Args:
      source: where, and in which format.
      expected: "labeled" accepts only dialogues that end in a reply. "unlabeled" accepts raw text and prompts, and
        takes the roles off complete dialogues (they become raw).
      max_turn_bytes: a longer turn (UTF-8) rejects its row.
      names: what a file is called in the ids of its rows; absent: its name without folders.
      seen: where each id was seen first; extended here. A row whose id is in it is rejected.

    Yields:
      Dialogues, with the row's own id or `<file>:<line>`, and rejected rows, in order of the files. A dialogue's
      metadata has `source`, the file's name, unless its row says itself what its source is.

    Raises:
      UserError: see `find_files`; a file that cannot be opened, is no text, or is too large to be parsed whole;
        messages without roles in a labeled source.
    """
    seen = {} if seen is None else seen
    for unit in _units(find_files(source), source):
        try:
            for row in _rows(unit, source, expected, names or {}):
                file = row.file or unit[0]
                name = _name(file, names or {})
                if isinstance(row, BadRow):
                    yield Rejected(str(file), row.line or 1, row.reason, row.detail)
                    continue
                place = f"{name}:{row.line}"
                try:
                    dialogue = finish(row, place, expected, max_turn_bytes, name)
                    if dialogue.id in seen:
                        raise BadRow("duplicate id", f"{dialogue.id!r:.80} is also at {seen[dialogue.id]}")
                    seen[dialogue.id] = place
                    yield dialogue
                except BadRow as bad:
                    yield Rejected(str(file), bad.line or row.line, bad.reason, bad.detail)
        except OSError as error:
            raise UserError(f"{error.filename or unit[0]}: cannot be read: {error.strerror}") from None


def _units(files: Sequence[Path], source: Source) -> Iterator[Sequence[Path]]:
    """Files that are read together: the days of a Slack channel; else each alone.

    What else lies in the folder of a Slack export (lists of users, channels, …) has no messages.
    """
    exports = {export for file in files if source.format in ("auto", "slack") and (export := slack_export(file))}
    files = [file for file in files if file.parent not in exports]

    def key(file: Path) -> Path:
        return file.parent if source.format == "slack" or file.parent.parent in exports else file

    for _, unit in itertools.groupby(sorted(files, key=lambda file: (key(file), file)), key=key):
        yield list(unit)


def _rows(
    unit: Sequence[Path], source: Source, expected: Expected, names: Mapping[Path, str]
) -> Iterator[Row | BadRow]:
    file = unit[0]
    format = source.format if source.format != "auto" else detect(file, source.posts)
    match format:
        case "text":
            return plain.read_text(file, source)
        case "log":
            return plain.read_log(file, source)
        case "parlai":
            return plain.read_parlai(file, source)
        case "parquet":
            return parquet.read(file, source, None)
        case "whatsapp":
            rows = whatsapp.read(file, source, _name(file, names))
        case "telegram":
            rows = telegram.read(file, source, _name(file, names))
        case "discord":
            rows = discord.read(file, source, _name(file, names))
        case "slack":
            rows = slack.read(unit, source, slack_users(file))
        case "forum":
            rows = forum.read(file, source)
        case _ if parquet.is_parquet(file):
            return parquet.read(file, source, format)
        case _:
            return json_rows.read_rows(file, source, format)
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


def _name(file: Path, names: Mapping[Path, str]) -> str:
    """What a file is called in ids; bytes of its name that are no characters are replaced."""
    return names.get(file, file.name).encode(errors="surrogateescape").decode(errors="replace")
