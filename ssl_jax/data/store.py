"""Prepared dialogues on disk: written with TensorFlow Datasets as ArrayRecord, read by random access without it.

A prepared directory holds `dialogues/<version>/*.array_record*` (a TFDS data set), `lengths.npz` and
`prefix_lengths.npz` (tokens of every record and of its system turn, by split, so that rows are packed without reading
records), `tokenizer/`, `summary.json` and `rejected.jsonl`. It is immutable: its name carries the hash of everything
that went into it, and it appears under that name only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

# Raise it when the layout, the record or the meaning of a field changes: older directories are then prepared again.
FORMAT_VERSION = 2

LABELED_SPLITS = ("labeled_train", "labeled_dev", "labeled_test", "labeled_test_seen")
UNLABELED_SPLITS = ("raw_train", "prompt_train")
SPLITS = LABELED_SPLITS + UNLABELED_SPLITS

_IN_MEMORY_BYTES = 2**27
_DATASET = "dialogues"
_LENGTHS = "lengths.npz"
_PREFIX_LENGTHS = "prefix_lengths.npz"
_VERSION = f"{FORMAT_VERSION}.0.0"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What is stored of one dialogue: its tokens and, for people and for other tokenizers, its text."""

    encoded: EncodedDialogue
    dialogue: Dialogue


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
            summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
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
        return tuple(self._lengths)

    @functools.cached_property
    def tokenizer(self) -> DialogueTokenizer:
        """The tokenizer that made the ids."""
        return DialogueTokenizer.load(self.directory / "tokenizer")

    def lengths(self, split: str) -> np.ndarray:
        """int32[N]: tokens of every record of `split`."""
        self._require(split)
        return self._lengths[split]

    def prefix_lengths(self, split: str) -> np.ndarray:
        """int32[N]: tokens of the leading system turn of every record of `split`, 0 without one."""
        self._require(split)
        return self._prefix_lengths[split]

    def encoded(self, split: str) -> EncodedSplit:
        """The token records of `split`, by number."""
        self._require(split)
        return self._encoded[split]

    def dialogue(self, split: str, index: int) -> Dialogue:
        """The cleaned text of record `index` of `split`."""
        stored = json.loads(self.encoded(split).fields((index,))[0]["dialogue"].bytes_list.value[0])
        return Dialogue.from_messages(stored["messages"], id=stored["id"], metadata=stored["metadata"])

    @functools.cached_property
    def _encoded(self) -> dict[str, EncodedSplit]:
        folder = self.directory / _DATASET / _VERSION
        return {
            split: EncodedSplit(sorted(map(str, folder.glob(f"{_DATASET}-{split}.array_record-*"))), lengths)
            for split, lengths in self._lengths.items()
        }

    @functools.cached_property
    def _lengths(self) -> dict[str, np.ndarray]:
        return self._by_split(_LENGTHS)

    @functools.cached_property
    def _prefix_lengths(self) -> dict[str, np.ndarray]:
        return self._by_split(_PREFIX_LENGTHS)

    def _by_split(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.directory / name) as stored:
            return {split: stored[split] for split in SPLITS if split in stored}

    def _require(self, split: str) -> None:
        if split not in self._lengths:
            raise UserError(f"{self.directory}: no split {split!r}; there are {', '.join(self._lengths)}")


def write(
    directory: Path,
    splits: Mapping[str, Iterable[Record]],
    tokenizer: DialogueTokenizer,
    summary: Mapping[str, Any],
    rejected: Iterable[Mapping[str, Any]],
) -> Prepared:
    """Builds a prepared directory beside `directory` and renames it when it is complete.

    An interrupted call leaves at most a hidden folder that nobody reads. If another process completed the same
    directory meanwhile, its result stands.

    Args:
      directory: the final name.
      splits: records of every split, in stored order; empty splits are omitted.
      tokenizer: what made the ids.
      summary: `summary.json` without `dialogues`, `tokens` and `kinds`, which are counted here from what is stored.
      rejected: lines of `rejected.jsonl`.

    Raises:
      UserError: the folder cannot be written.
    """
    make_folder(directory.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".incomplete", dir=directory.parent))
    try:
        lengths, prefix_lengths = _write_records(temporary, splits)
        np.savez(temporary / _LENGTHS, **lengths)  # pyright: ignore[reportArgumentType]
        np.savez(temporary / _PREFIX_LENGTHS, **prefix_lengths)  # pyright: ignore[reportArgumentType]
        tokenizer.save(temporary / "tokenizer")
        with open(temporary / "rejected.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rejected)
        counted = {**summary, **_count(lengths), "format_version": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint}
        (temporary / "summary.json").write_text(json.dumps(counted, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        _move_into_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Prepared.open(directory)


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


def _count(lengths: Mapping[str, np.ndarray]) -> dict[str, Any]:
    def totals(names: Sequence[str], count: Any) -> dict[str, int]:
        return {name.split("_", 1)[1]: count(name) for name in names if name in lengths}

    def both(count: Any) -> dict[str, dict[str, int]]:
        unlabeled = [count(name) for name in UNLABELED_SPLITS if name in lengths]
        return {
            "labeled": totals(LABELED_SPLITS, count),
            "unlabeled": {"train": sum(unlabeled)} if unlabeled else {},
        }

    return {
        "dialogues": both(lambda name: len(lengths[name])),
        "tokens": both(lambda name: int(lengths[name].sum(dtype=np.int64))),
        "kinds": {name: len(lengths[name]) for name in UNLABELED_SPLITS if name in lengths},
    }


def _write_records(
    directory: Path, splits: Mapping[str, Iterable[Record]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Writes the TFDS data set; returns tokens of every record and of its prefix, per split that is not empty."""
    import tensorflow_datasets as tfds

    lengths: dict[str, list[int]] = {}
    prefix_lengths: dict[str, list[int]] = {}

    def examples(split: str, records: Iterable[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
        lengths[split], prefix_lengths[split] = [], []
        for number, record in enumerate(records):
            encoded, dialogue = record.encoded, record.dialogue
            lengths[split].append(len(encoded.tokens))
            prefix_lengths[split].append(encoded.prefix_length)
            text = {"id": dialogue.id, "messages": dialogue.to_messages(), "metadata": dict(dialogue.metadata)}
            yield (
                number,
                {
                    "id": encoded.id,
                    "tokens": encoded.tokens,
                    "loss_mask": encoded.loss_mask,
                    "reply_bytes": encoded.reply_bytes,
                    "prefix_length": encoded.prefix_length,
                    "unknown_bytes": encoded.unknown_bytes,
                    "dialogue": json.dumps(text, ensure_ascii=False),
                },
            )

    generators = {}
    for split, records in splits.items():
        iterator = iter(records)
        first = next(iterator, None)
        if first is not None:
            generators[split] = (split, _chain(first, iterator))

    # The class is made here because it needs TFDS, which takes a second to import; it is not for the registry.
    class Dialogues(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Dialogues as token ids with loss masks, and their text."""

        VERSION = tfds.core.Version(_VERSION)
        name = _DATASET
        # Without a place in the source tree TFDS looks for no check sums of downloads, of which there are none.
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            raw = tfds.features.Encoding.BYTES
            features = {
                "id": tfds.features.Text(),
                "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding=raw),
                "loss_mask": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding=raw),
                "reply_bytes": tfds.features.Scalar(dtype=np.int64),
                "prefix_length": tfds.features.Scalar(dtype=np.int64),
                "unknown_bytes": tfds.features.Scalar(dtype=np.int64),
                "dialogue": tfds.features.Text(),
            }
            # Records keep their order: their number is how streams name them.
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: examples(*generator) for split, generator in generators.items()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError("every split brings its own generator")

    tfds.disable_progress_bar()
    builder = Dialogues(data_dir=str(directory), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, which this is not
        builder.download_and_prepare()
    shutil.rmtree(directory / "downloads", ignore_errors=True)
    written = [split for split in SPLITS if split in lengths]
    return (
        {split: np.array(lengths[split], np.int32) for split in written},
        {split: np.array(prefix_lengths[split], np.int32) for split in written},
    )


def _chain(first: Record, rest: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from rest
