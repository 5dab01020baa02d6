"""Finished rounds on disk: an artifact that appears whole or not at all, is never changed, and says where it is from.

A round is a folder `round_<n>/` with its dialogues (ArrayRecord shards of JSON rows), `summary.json` and
`manifest.json` (SHA-256 of both). Checkpoints after a round are worth nothing without it, and it is small beside them:
`copy_of_round_<n>/` holds the same once more, and `mend` makes either from the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import files, manifest
from ssl_jax.data import record_files
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

RECORDS_PER_SHARD = 4096

_SUMMARY = "summary.json"

_log = logging.getLogger(__name__)


def mend(directories: Collection[Path], count: int) -> int:
    """Makes damaged rounds whole from their copies, and damaged copies from their rounds.

    A round that cannot be mended is set aside, and with it those that come later.

    Args:
      directories: where rounds are, of each kind of round.
      count: of all rounds of a run.

    Returns:
      How many of the first rounds are whole, of every kind.
    """
    for number in range(count):
        if not all([_mend(_folder(directory, number), _copy(directory, number)) for directory in directories]):
            for later in range(number + 1, count):
                for directory in directories:
                    _set_aside(_folder(directory, later), _copy(directory, later))
            return number
    return count


def _mend(folder: Path, copy: Path) -> bool:
    """Makes a round and its copy equal to whichever of them is whole; returns whether one is."""
    problems = {path: manifest.problem(path) for path in (folder, copy)}
    whole = [path for path, problem in problems.items() if problem is None]
    if not whole:
        if folder.exists():
            _log.warning("%s and its copy are damaged: %s; the round is made again", folder, problems[folder])
        _set_aside(folder, copy)
        return False
    for path in problems.keys() - set(whole):
        what = f"is damaged ({problems[path]})" if path.exists() else "is not there"
        _log.warning("%s %s; it is made again from %s", path, what, whole[0].name)
        _write_copy(whole[0], path)
    return True


def _set_aside(folder: Path, copy: Path) -> None:
    """Takes a round away; what is there of it stays for a person to look at until the same happens again."""
    shutil.rmtree(copy, ignore_errors=True)
    if folder.exists():
        aside = folder.with_name(f"damaged_{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def read_summary(directory: Path, round_number: int) -> dict[str, Any] | None:
    """The summary of a finished round, or None if there is none.

    Raises:
      UserError: it is not what was written.
    """
    folder = _folder(directory, round_number)
    if not (folder / _SUMMARY).is_file():
        return None
    _verify(folder, only=_SUMMARY)
    return files.read_json(folder / _SUMMARY)


def read_rows(directory: Path, round_number: int) -> list[dict[str, Any]]:
    """The rows of a finished round: `id`, `messages`, scores and provenance.

    Raises:
      UserError: a shard is missing or not what was written.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    folder = _folder(directory, round_number)
    summary = read_summary(directory, round_number)
    assert summary is not None, f"{folder} is not finished"
    _verify(folder)
    rows = []
    for name in summary["sha256"]:
        if files.leads_out(name):
            raise UserError(f"{folder / _SUMMARY} names {name!r:.80}, which leads out of the round; remove {folder}")
        reader = ArrayRecordReader(str(folder / name))
        rows += [json.loads(record) for record in reader.read_all()]
        reader.close()
    return rows


def read_round(directory: Path, round_number: int) -> list[Dialogue]:
    """The dialogues of a finished round.

    Raises:
      UserError: a shard is missing or not what was written.
    """
    return [Dialogue.from_messages(row["messages"], id=row["id"]) for row in read_rows(directory, round_number)]


def write(directory: Path, round_number: int, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Writes a round beside its place, and its copy, then moves it there. Of several processes, the first writes.

    Args:
      directory: where rounds are.
      round_number: from 0.
      rows: the same in every process.
      summary: what `read_summary` will give, beside the shards' hashes.
    """
    import jax

    folder = _folder(directory, round_number)
    temporary = folder.with_name(folder.name + ".tmp")
    shards = {
        temporary / f"labels-{number:05d}.array_record": rows[first : first + RECORDS_PER_SHARD]
        for number, first in enumerate(range(0, len(rows), RECORDS_PER_SHARD))
    }
    if jax.process_index() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for path, share in shards.items():
            _write_shard(path, share)
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}
        files.write_json(temporary / _SUMMARY, {**summary, "sha256": hashes})
        manifest.write(temporary, {"round": round_number})
        _write_copy(temporary, _copy(directory, round_number))
        temporary.rename(folder)
    wait_for_all(f"{folder.name} is in its place")


def wait_for_all(event: str) -> None:
    """Returns when all processes have come to the event; at once where there is one process."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(event)


def _folder(directory: Path, round_number: int) -> Path:
    return directory / f"round_{round_number}"


def _copy(directory: Path, round_number: int) -> Path:
    return directory / f"copy_of_round_{round_number}"


def _write_copy(source: Path, target: Path) -> None:
    """Makes a folder equal to one of files; it appears whole."""
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, temporary / path.name)
        files.sync(temporary / path.name)
    files.sync(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    files.sync(target.parent)


def _verify(folder: Path, *, only: str | None = None) -> None:
    """Raises UserError if a round, or one file of it, is not what was written."""
    try:
        declared = manifest.read(folder / manifest.NAME)["files"]
    except ValueError as error:
        problem = str(error)
    else:
        chosen = declared if only is None else {name: file for name, file in declared.items() if name == only}
        problem = manifest.difference(folder, chosen)
    if problem is not None:
        raise UserError(f"{folder} is damaged: {problem}; training mends it (python -m ssl_jax.train, the same again)")


def _write_shard(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with record_files.writing(path) as writer:
        for row in rows:
            writer.write(json.dumps(row, ensure_ascii=False).encode())
    files.sync(path)
