"""Finished rounds on disk: an artifact that appears whole or not at all, is never changed, and says where it is from.

A round is a folder `round_<n>/` with its dialogues (ArrayRecord shards of JSON rows) and `summary.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import files
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

RECORDS_PER_SHARD = 4096


def read_summary(directory: Path, round_number: int) -> dict[str, Any] | None:
    """The summary of a finished round, or None if there is none."""
    path = _folder(directory, round_number) / "summary.json"
    return files.read_json(path) if path.is_file() else None


def read_rows(directory: Path, round_number: int) -> list[dict[str, Any]]:
    """The rows of a finished round: `id`, `messages`, scores and provenance.

    Raises:
      UserError: a shard is missing or not what was written.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    folder = _folder(directory, round_number)
    summary = read_summary(directory, round_number)
    assert summary is not None, f"{folder} is not finished"
    rows = []
    for name, expected in summary["sha256"].items():
        shard = folder / name
        if files.leads_out(name) or not shard.is_file() or hashlib.sha256(shard.read_bytes()).hexdigest() != expected:
            raise UserError(f"{shard} is damaged; remove {folder} and run the same command to make the round again")
        reader = ArrayRecordReader(str(shard))
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
    """Writes a round beside its place, then moves it there. Of several processes, the first writes.

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
        files.write_json(temporary / "summary.json", {**summary, "sha256": hashes})
        files.sync(temporary)
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


def _write_shard(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row, ensure_ascii=False).encode())
    writer.close()
    files.sync(path)
