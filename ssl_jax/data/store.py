"""Prepared dialogues on disk: a TensorFlow Datasets data set of ArrayRecord files, read by random access.

A prepared directory holds `dialogues/<version>/*.array_record*` (the data set), `records.npz` (by split and record the
tokens of it and of its system turn, so that rows are packed without reading records, its source and its turns),
`tokenizer/`, `summary.json`, `examples.json`, `rejected.jsonl` and `manifest.json` (SHA-256 of every file). It is
immutable: its name carries the hash of everything that went into it, and it appears under that name only when it is
complete. `shards` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ssl_jax import files, manifest
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

# Raise it when the layout, the record or the meaning of a field changes: older directories are then prepared again.
FORMAT_VERSION = 3

LABELED_SPLITS = ("labeled_train", "labeled_dev", "labeled_test", "labeled_test_seen")
UNLABELED_SPLITS = ("raw_train", "prompt_train")
SPLITS = LABELED_SPLITS + UNLABELED_SPLITS

DATASET = "dialogues"
VERSION = f"{FORMAT_VERSION}.0.0"
INDEX = "records.npz"

# `json.dumps` makes an encoder anew at every call that has options.
_encode_json = json.JSONEncoder(ensure_ascii=False, default=dict).encode
_IN_MEMORY_BYTES = 2**27
# Files whose digests are taken together.
_READS_AT_ONCE = 8


def to_json(dialogue: Dialogue) -> bytes:
    """A dialogue as it is stored: a JSON object in UTF-8, on one line."""
    text = {"id": dialogue.id, "messages": dialogue.to_messages(), "metadata": dialogue.metadata}
    return _encode_json(text).encode()


def from_json(text: bytes) -> Dialogue:
    """The dialogue of `to_json`."""
    stored = json.loads(text)
    turns = tuple([Turn(message["role"], message["content"]) for message in stored["messages"]])
    return Dialogue(turns, stored["id"], stored["metadata"])


class EncodedSplit(Sequence[EncodedDialogue]):
    """Random access to the token records of a split; picklable, and safe to read from several threads.

    A split that is small enough is read into memory at the first access (15 microseconds a record, once). Of a larger
    one, ask for several records in one call where possible: a call costs 20 to 300 microseconds, growing with the
    number of records in a file, a further record of the same call 15.
    """

    def __init__(self, paths: Sequence[str], lengths: np.ndarray) -> None:
        """Takes the split's ArrayRecord files and the number of tokens of its records, int32[N]."""
        self._paths = tuple(paths)
        self._lengths = lengths
        self._lock = threading.Lock()
        self._opened: Any = None
        self._in_memory: list[EncodedDialogue] | None = None
        # The arrays of all records, and about what the objects that hold them take.
        size = 5 * int(lengths.sum(dtype=np.int64)) + 512 * len(lengths)
        self._fits_in_memory = size <= _IN_MEMORY_BYTES

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> EncodedDialogue: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedDialogue]: ...
    def __getitem__(self, index: int | slice) -> EncodedDialogue | list[EncodedDialogue]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.__getitems__((index,))[0]

    def __getitems__(self, indices: Sequence[int]) -> list[EncodedDialogue]:
        """Records by number, in the given order (the name is the one Grain and PyTorch call)."""
        if not self._fits_in_memory:
            return [_decode(fields) for fields in self.fields(indices)]
        if self._in_memory is None:
            everything = [_decode(fields) for fields in self.fields(range(len(self)))]
            with self._lock:
                self._in_memory = everything
        return [self._in_memory[index] for index in indices]

    def fields(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """The stored features of records by name, as protocol buffers."""
        from tensorflow_datasets.proto import tf_example_pb2

        # TFDS's own decoder takes several times as long as its protocol buffer class.
        example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
        size = len(self)
        for index in indices:
            if not -size <= index < size:
                raise IndexError(f"record {index} of {size}")
        positions = [index % size for index in indices]
        source = self._source()
        # For several records the library starts threads, anew at each call; one comes ten times faster without.
        records = [source[positions[0]]] if len(positions) == 1 else source.__getitems__(positions)
        return [example.FromString(record).features.feature for record in records]

    def _source(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        with self._lock:
            if self._opened is None:
                self._opened = ArrayRecordDataSource(list(self._paths))
            return self._opened

    def __getstate__(self) -> tuple[tuple[str, ...], np.ndarray]:
        return self._paths, self._lengths

    def __setstate__(self, state: tuple[tuple[str, ...], np.ndarray]) -> None:
        EncodedSplit.__init__(self, *state)


def _decode(fields: Mapping[str, Any]) -> EncodedDialogue:
    return EncodedDialogue(
        id=fields["id"].bytes_list.value[0].decode(),
        tokens=np.frombuffer(fields["tokens"].bytes_list.value[0], np.int32),
        loss_mask=np.frombuffer(fields["loss_mask"].bytes_list.value[0], np.uint8),
        reply_bytes=fields["reply_bytes"].int64_list.value[0],
        prefix_length=fields["prefix_length"].int64_list.value[0],
        unknown_bytes=fields["unknown_bytes"].int64_list.value[0],
    )


def problem(directory: Path, *, with_records: bool = True) -> str | None:
    """Why a prepared directory is not what was written, or None.

    Everything is read: 1.5 GB/s on one core, several files at once. Without the records, next to nothing is.
    """
    at_once = min(_READS_AT_ONCE, os.cpu_count() or 1)
    return manifest.problem(directory, but_not=None if with_records else DATASET, at_once=at_once)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A complete prepared directory.

    Attributes:
      directory: where it is.
      summary: the content of its `summary.json`.
    """

    directory: Path
    summary: Mapping[str, Any]

    @classmethod
    def open(cls, directory: str | Path) -> Prepared:
        """Opens a directory that `write` completed.

        Raises:
          UserError: it is not one, or another version of the program wrote it.
        """
        directory = Path(directory)
        try:
            summary = files.read_json(directory / "summary.json")
        except FileNotFoundError:
            raise UserError(f"{directory}: not prepared data (no summary.json); run ssl_jax.prepare") from None
        except ValueError as error:
            raise UserError(f"{directory}/summary.json: not valid JSON: {error}; delete the folder") from None
        if summary.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{directory}: written by another version; run ssl_jax.prepare again")
        return cls(directory, summary)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that hold anything, a subset of `SPLITS` in its order."""
        return tuple(split for split in SPLITS if f"{split}/length" in self._index)

    @functools.cached_property
    def tokenizer(self) -> DialogueTokenizer:
        """The tokenizer that made the ids."""
        return DialogueTokenizer.load(self.directory / "tokenizer")

    def lengths(self, split: str) -> np.ndarray:
        """int32[N]: tokens of every record of `split`."""
        return self._column(split, "length")

    def prefix_lengths(self, split: str) -> np.ndarray:
        """int32[N]: tokens of the leading system turn of every record of `split`, 0 without one."""
        return self._column(split, "prefix_length")

    def turn_counts(self, split: str) -> np.ndarray:
        """int32[N]: turns of every record of `split`, a system turn among them."""
        return self._column(split, "turns")

    def source_numbers(self, split: str) -> np.ndarray:
        """int32[N]: for every record of `split` the number of its source in `[*data.labeled, *data.unlabeled]`."""
        return self._column(split, "source")

    def encoded(self, split: str) -> EncodedSplit:
        """The token records of `split`, by number."""
        self._column(split, "length")
        return self._encoded[split]

    def dialogue(self, split: str, index: int) -> Dialogue:
        """The cleaned text of record `index` of `split`."""
        return from_json(self.encoded(split).fields((index,))[0]["dialogue"].bytes_list.value[0])

    @functools.cached_property
    def _encoded(self) -> dict[str, EncodedSplit]:
        folder = self.directory / DATASET / VERSION
        return {
            split: EncodedSplit(sorted(map(str, folder.glob(f"{DATASET}-{split}.array_record-*"))), self.lengths(split))
            for split in self.splits
        }

    @functools.cached_property
    def _index(self) -> dict[str, np.ndarray]:
        with np.load(self.directory / INDEX) as stored:
            return dict(stored)

    def _column(self, split: str, name: str) -> np.ndarray:
        if split not in self.splits:
            raise UserError(f"{self.directory}: no split {split!r}; there are {', '.join(self.splits)}")
        return self._index[f"{split}/{name}"]
