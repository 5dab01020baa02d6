"""Prepared dialogues written: ArrayRecord shards that are made independently, and the directory that they complete."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import files, manifest
from ssl_jax.data import record_files
from ssl_jax.data.duplicates import halves, refuse_leaks, text_hash
from ssl_jax.data.store import (
    DATASET,
    FORMAT_VERSION,
    INDEX,
    LABELED_SPLITS,
    SPLITS,
    UNLABELED_SPLITS,
    VERSION,
    EncodedSplit,
    Prepared,
    to_json,
)  # fmt: skip
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

LOCK = "lock"
"""A file of whoever works in a working directory, which is not part of what is made there."""

COLUMNS = {"length": np.int32, "prefix_length": np.int32, "source": np.int32, "turns": np.int32}
"""What is kept of every record outside of the shards, and its type."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What is stored of one dialogue.

    Attributes:
      encoded: its tokens.
      text: `store.to_json` of the dialogue, for people and for other tokenizers.
      text_hash: of what it says, two integers of 64 bits.
      turns: how many turns it has.
      source: number of its source among all sources.
    """

    encoded: EncodedDialogue
    text: bytes
    text_hash: tuple[int, int]
    turns: int
    source: int = 0

    @classmethod
    def of(cls, encoded: EncodedDialogue, dialogue: Dialogue, source: int = 0) -> Record:
        """The record of a dialogue."""
        return cls(encoded, to_json(dialogue), halves(text_hash(dialogue)), len(dialogue.turns), source)


def shard_path(directory: Path, split: str, number: int, count: int) -> Path:
    """The file of a shard, as TFDS names it."""
    return directory / DATASET / VERSION / f"{DATASET}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Writes a shard and, when it is complete, beside it its `COLUMNS` and the hashes of its texts.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = files.partial_path(path)
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, "text")}
    size = 0
    serialize = Serializer()
    with record_files.writing(partial) as writer:
        for record in records:
            content = serialize(record)
            writer.write(content)
            size += len(content)
            columns["length"].append(len(record.encoded.tokens))
            columns["prefix_length"].append(record.encoded.prefix_length)
            columns["source"].append(record.source)
            columns["turns"].append(record.turns)
            columns["text"].append(record.text_hash)
    files.sync(partial)
    partial.replace(path)
    arrays: dict[str, np.ndarray] = {name: np.array(columns[name], dtype) for name, dtype in COLUMNS.items()}
    arrays["text"] = np.array(columns["text"], np.uint64).reshape(-1, 2)
    arrays["size"] = np.array(size, np.int64)
    arrays["sha256"] = np.array(files.digest(path)[1])
    with files.replacing(_columns_path(path)) as stream:
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]


def is_written(path: Path) -> bool:
    """Whether `write_shard` completed a shard, and nothing has changed it since."""
    if not _columns_path(path).exists():
        return False
    try:
        stored = _read_columns(path)["sha256"]
    except Exception:  # damaged files end in any exception: of zip files, of arrays, of a missing name
        return False
    return path.is_file() and files.digest(path)[1] == stored.item()


def _columns_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.npz")


class Serializer:
    """Records as TFDS stores them: a `tf.train.Example` of the features in `_write_metadata`."""

    def __init__(self) -> None:
        from tensorflow_datasets.proto import tf_example_pb2

        # To make seven messages takes several times as long as to fill them in anew for every record.
        self._example = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
        features = self._example.features.feature
        self._texts = {name: features[name].bytes_list.value for name in ("id", "tokens", "loss_mask", "dialogue")}
        self._numbers = {
            name: features[name].int64_list.value for name in ("reply_bytes", "prefix_length", "unknown_bytes")
        }
        for values in self._texts.values():
            values.append(b"")
        for values in self._numbers.values():
            values.append(0)

    def __call__(self, record: Record) -> bytes:
        """The serialized example."""
        encoded = record.encoded
        self._texts["id"][0] = encoded.id.encode()
        self._texts["tokens"][0] = encoded.tokens.tobytes()
        self._texts["loss_mask"][0] = encoded.loss_mask.tobytes()
        self._texts["dialogue"][0] = record.text
        self._numbers["reply_bytes"][0] = encoded.reply_bytes
        self._numbers["prefix_length"][0] = encoded.prefix_length
        self._numbers["unknown_bytes"][0] = encoded.unknown_bytes
        return self._example.SerializeToString(deterministic=True)


def complete(
    working: Path,
    directory: Path,
    shards: Mapping[str, int],
    tokenizer: DialogueTokenizer,
    summary: Mapping[str, Any],
    rejected: Iterable[Mapping[str, Any]],
) -> Prepared:
    """Makes a prepared directory of a working directory in which all shards are written.

    If another process completed the same directory meanwhile, its result stands.

    Args:
      working: where `write_shard` wrote to, at `shard_path`; has `tokenizer/` and `examples.json`.
      directory: the final name.
      shards: how many shards every split has; splits without records have none.
      tokenizer: what made the ids.
      summary: `summary.json` without `dialogues`, `tokens` and `kinds`, which are counted here from what is stored.
      rejected: lines of `rejected.jsonl`.

    Raises:
      UserError: something is both held out and learned from, or the directory cannot be made.
    """
    paths = {
        split: [shard_path(working, split, number, shards[split]) for number in range(shards[split])]
        for split in SPLITS
        if shards.get(split)
    }
    parts = {split: [_read_columns(path) for path in ours] for split, ours in paths.items()}
    stored = {
        split: {name: np.concatenate([part[name] for part in ours]) for name in (*COLUMNS, "text")}
        for split, ours in parts.items()
    }
    _refuse_leaks({split: columns["text"] for split, columns in stored.items()}, paths)
    index = {f"{split}/{name}": columns[name] for split, columns in stored.items() for name in COLUMNS}
    np.savez(working / INDEX, **index)  # pyright: ignore[reportArgumentType]
    for path in (path for ours in paths.values() for path in ours):
        _columns_path(path).unlink()
    for partial in working.rglob("*.partial"):  # of attempts that were killed
        partial.unlink()
    _write_metadata(working / DATASET / VERSION, parts)
    with open(working / "rejected.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rejected)
    counted = {
        **summary,
        **_count(stored),
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
    }
    files.write_json(working / "summary.json", counted)
    manifest.write(working, {}, without=LOCK)
    _move_into_place(working, directory)
    return Prepared.open(directory)


def write(
    directory: Path,
    splits: Mapping[str, Iterable[Record]],
    tokenizer: DialogueTokenizer,
    summary: Mapping[str, Any],
    rejected: Iterable[Mapping[str, Any]],
) -> Prepared:
    """Writes a prepared directory, a shard for every split that has records; the parameters are those of `complete`."""
    make_folder(directory.parent)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as folder:
        working = Path(folder) / "working"
        shards = {}
        for split, records in splits.items():
            iterator = iter(records)
            first = next(iterator, None)
            if first is not None:
                write_shard(shard_path(working, split, 0, 1), itertools.chain([first], iterator))
                shards[split] = 1
        tokenizer.save(working / "tokenizer")
        files.write_json(working / "examples.json", {})
        return complete(working, directory, shards, tokenizer, summary, rejected)


def make_folder(folder: Path) -> None:
    """Makes the folder that prepared directories go to.

    Raises:
      UserError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.prepared_dir {folder}: cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"data.prepared_dir {folder}: cannot be written")


def _move_into_place(temporary: Path, directory: Path) -> None:
    try:
        os.rename(temporary, directory)
    except OSError as error:
        # A rename onto a folder with content fails. If it is complete, somebody else finished first.
        if not (directory / "summary.json").is_file():
            raise UserError(f"{directory}: cannot be made ({error.strerror}); delete what is there") from None


def _count(stored: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    def totals(names: Sequence[str], count: Any) -> dict[str, int]:
        return {name.split("_", 1)[1]: count(stored[name]) for name in names if name in stored}

    def both(count: Any) -> dict[str, dict[str, int]]:
        unlabeled = [count(stored[name]) for name in UNLABELED_SPLITS if name in stored]
        return {
            "labeled": totals(LABELED_SPLITS, count),
            "unlabeled": {"train": sum(unlabeled)} if unlabeled else {},
        }

    return {
        "dialogues": both(lambda columns: len(columns["length"])),
        "turns": both(lambda columns: int(columns["turns"].sum(dtype=np.int64))),
        "tokens": both(lambda columns: int(columns["length"].sum(dtype=np.int64))),
        "lengths": histograms({split: columns["length"] for split, columns in stored.items()}),
        "kinds": {name: len(stored[name]["length"]) for name in UNLABELED_SPLITS if name in stored},
    }


def histograms(lengths: Mapping[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """By split, how many lengths are in each bucket: up to a power of two (`"<=16"`), above the one before.

    All splits have the same buckets, from the one of the least length to the one of the greatest.
    """
    if not lengths:
        return {}
    powers = 2 ** np.arange(32)
    exponents = {split: np.searchsorted(powers, values) for split, values in lengths.items()}
    low, high = min(map(np.min, exponents.values())), max(map(np.max, exponents.values()))
    names = [f"<={2**exponent}" for exponent in range(low, high + 1)]
    return {
        split: dict(zip(names, np.bincount(values - low, minlength=len(names)).tolist(), strict=True))
        for split, values in exponents.items()
    }


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    with np.load(_columns_path(path)) as stored:
        return dict(stored)


def _refuse_leaks(texts: Mapping[str, np.ndarray], paths: Mapping[str, Sequence[Path]]) -> None:
    """Compares what was really written, whoever decided about it."""
    held_out = [texts[split] for split in LABELED_SPLITS if split != "labeled_train" and split in texts]
    for split in ("labeled_train", *UNLABELED_SPLITS):
        if split in texts and held_out:
            stored = EncodedSplit([os.fspath(path) for path in paths[split]], np.empty(len(texts[split]), np.int32))
            refuse_leaks(texts[split], np.concatenate(held_out), lambda number, stored=stored: stored[number].id)


def _write_metadata(folder: Path, parts: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> None:
    """What makes the shards a data set for TFDS."""
    import tensorflow_datasets as tfds
    from etils import epath

    raw = tfds.features.Encoding.BYTES
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=DATASET, filetype_suffix="array_record"
    )
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(part["length"]) for part in shards],
            num_bytes=sum(int(part["size"]) for part in shards),
            filename_template=template,
        )
        for split, shards in parts.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features={
            "id": tfds.features.Text(),
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding=raw),
            "loss_mask": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding=raw),
            "reply_bytes": tfds.features.Scalar(dtype=np.int64),
            "prefix_length": tfds.features.Scalar(dtype=np.int64),
            "unknown_bytes": tfds.features.Scalar(dtype=np.int64),
            "dialogue": tfds.features.Text(),
        },
        split_infos=infos,
        version=VERSION,
        filename_template=template,
        check_data=False,
        disable_shuffling=True,
        description="Dialogues as token ids with loss masks, and their text.",
    )
