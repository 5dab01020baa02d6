"""Clean dialogues on disk between reading and storing, and of each the little that decides what becomes of it.

Every piece of the sources becomes four files: `<n>.jsonl` (a line for each dialogue), `<n>.npy` (its `KEYS`),
`<n>.json` (everything else) and `<n>.manifest.json` (SHA-256 of the others, written last: a piece that has it is
complete, and one that differs from it is written again). Memory holds the keys alone, about 100 bytes a dialogue.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ssl_jax import files, manifest
from ssl_jax.config import Data
from ssl_jax.data import annotation, examples, pieces, splits
from ssl_jax.data.cleaning.apply import Counts, step_functions
from ssl_jax.data.duplicates import halves, text_hash
from ssl_jax.data.formats import Rejected
from ssl_jax.data.pieces import Item, Piece
from ssl_jax.data.store import from_json, to_json
from ssl_jax.data.tokenizer import count_reply_bytes
from ssl_jax.dialogue import Dialogue

SECTIONS = ("train", "dev", "test", "test_seen", "unsplit", "raw", "prompt")
"""Where a dialogue stands before splits are decided: a part of a packaged data set's own split, labeled, unlabeled."""

KEYS = np.dtype(
    [
        ("id", "<u8", (2,)),  # of SHA-256
        ("text", "<u8", (2,)),  # of `text_hash`; 0 of a dialogue that was removed
        ("position", "<f8"),  # see `splits.position`
        ("offset", "<i8"),  # of its line
        ("size", "<i8"),  # of its line, bytes
        ("reply_bytes", "<i8"),  # as the source wrote them
        ("line", "<i8"),  # where it was read
        ("piece", "<i4"),
        ("place", "<i4"),  # number of its file among the piece's
        ("outcome", "<i4"),  # what cleaning did: number among the piece's
        ("source", "<i4"),
        ("section", "u1"),  # number among SECTIONS
        ("unique_id", "?"),
        ("removed", "?"),
    ]
)
"""What is known of a dialogue without its text."""

_SUFFIXES = ("jsonl", "npy", "json")
_EXAMPLES = 5
_KEYS_AT_ONCE = 2**14


def write(folder: Path, data: Data, piece: Piece) -> None:
    """Reads, cleans and annotates the dialogues of a piece, and writes them to `folder`, unless they are there.

    Raises:
      UserError: a file that cannot be read, annotation that lacks a package, or a dialogue without what the split asks.
      OSError: the folder cannot be written.
    """
    if _is_whole(folder, piece.number):
        return
    steps = step_functions(data.cleaning)
    counts = Counts(max_examples=_EXAMPLES)
    rows: list[tuple[Any, ...]] = []
    rejected: list[Rejected] = []
    places: dict[tuple[str, str], int] = {}
    outcomes: dict[tuple[tuple[str, ...], str | None], int] = {}
    times: list[Any] = []
    offset = 0
    with files.replacing(_file(folder, piece.number, "jsonl")) as stream:
        for item in pieces.read(piece, data.max_turn_bytes):
            accepted = item.row
            if isinstance(accepted, Rejected):
                rejected.append(accepted)
                continue
            source = piece.source(item.source)
            dialogue = accepted.dialogue
            if "source" not in dialogue.metadata:
                dialogue = dataclasses.replace(dialogue, metadata={"source": source.name, **dialogue.metadata})
            if accepted.left_out is None:
                changed, removed, cleaned = _clean(dialogue, steps, data, counts)
            else:
                changed, removed, cleaned = [], accepted.left_out, None
                counts.add(accepted.left_out, dialogue, None)
            line = to_json(cleaned) if cleaned else json.dumps({"id": dialogue.id}).encode()
            stream.write(line + b"\n")
            section = _section(item, source.expected, cleaned or dialogue)
            position = 0.0
            if cleaned and section == "unsplit":
                position = splits.position(cleaned, data.split_by)
                if data.split_by == "time":
                    times.append(splits.time(cleaned))
            rows.append(
                (
                    halves(hashlib.sha256(dialogue.id.encode(errors="surrogatepass")).digest()),
                    halves(text_hash(cleaned)) if cleaned else (0, 0),
                    position,
                    offset,
                    len(line),
                    count_reply_bytes(dialogue),
                    accepted.line,
                    piece.number,
                    places.setdefault((accepted.file, accepted.name), len(places)),
                    outcomes.setdefault((tuple(changed), removed), len(outcomes)),
                    item.source,
                    SECTIONS.index(section),
                    item.unique_id,
                    cleaned is None,
                )
            )
            offset += len(line) + 1
    with files.replacing(_file(folder, piece.number, "npy")) as stream:
        np.save(stream, np.array(rows, KEYS))
    files.write_json(
        _file(folder, piece.number, "json"),
        {
            "places": list(places),
            "outcomes": list(outcomes),
            "times": times,
            "rejected": [dataclasses.asdict(row) for row in rejected],
            "examples": {
                step: [examples.shown(example.before, example.after) for example in found]
                for step, found in counts.examples.items()
            },
        },
    )
    declared = manifest.declare(folder, [_file(folder, piece.number, suffix).name for suffix in _SUFFIXES])
    with files.replacing(_file(folder, piece.number, manifest.NAME)) as stream:
        stream.write(manifest.encode({"files": declared}))


def _is_whole(folder: Path, number: int) -> bool:
    """Whether `write` completed a piece, and nothing has changed it since."""
    try:
        declared = manifest.read(_file(folder, number, manifest.NAME))["files"]
    except ValueError:
        return False
    return manifest.difference(folder, declared) is None


def _clean(
    dialogue: Dialogue, steps: Sequence[tuple[str, Any]], data: Data, counts: Counts
) -> tuple[list[str], str | None, Dialogue | None]:
    """The steps that changed a dialogue, the one that removed it, and what is left of it, annotated."""
    changed = []
    for name, step in steps:
        result = step(dialogue)
        if result is not dialogue:
            counts.add(name, dialogue, result)
            if result is None:
                return changed, name, None
            changed.append(name)
            dialogue = result
    kept = annotation.select(dialogue, data)
    if kept is None:
        counts.add("keep_if", dialogue, None)
        return changed, "keep_if", None
    return changed, None, kept


def _section(item: Item, expected: str, dialogue: Dialogue) -> str:
    if item.part is not None:
        return item.part
    if expected == "labeled":
        return "unsplit"
    return "raw" if dialogue.kind == "raw" else "prompt"


def _file(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"{number}.{suffix}"


class Spool:
    """Pieces that `write` completed.

    Attributes:
      folder: where they are.
      keys: `KEYS` of all dialogues, in the order of the pieces.
      rejected: rows that are no dialogues.
      times: of the labeled dialogues without a split of their own that were not removed, for a split by time.
    """

    def __init__(self, folder: Path, count: int) -> None:
        """Opens pieces 0 to `count` - 1."""
        self.folder = folder
        self._details: list[Mapping[str, Any]] = [files.read_json(_file(folder, n, "json")) for n in range(count)]
        parts = [np.load(_file(folder, number, "npy")) for number in range(count)]
        self.keys: np.ndarray = np.concatenate([np.empty(0, KEYS), *parts])
        self.rejected = [Rejected(**row) for details in self._details for row in details["rejected"]]
        self.times: list[Any] = [time for details in self._details for time in details["times"]]

    def lines(self, rows: Iterable[int]) -> Iterator[bytes]:
        """The lines of dialogues by number; numbers that rise are read fastest."""
        yield from read_lines(self.folder, self.keys[np.fromiter(rows, np.int64)])

    def dialogues(self, rows: Iterable[int]) -> Iterator[Dialogue]:
        """Dialogues by number."""
        return map(from_json, self.lines(rows))

    def ids(self, rows: Iterable[int]) -> Iterator[str]:
        """The ids of dialogues by number, of those that were removed too."""
        return (json.loads(line)["id"] for line in self.lines(rows))

    def place(self, row: int) -> tuple[str, str, int]:
        """File, the file's name in ids, and line of a dialogue."""
        key = self.keys[row]
        file, name = self._details[key["piece"]]["places"][key["place"]]
        return file, name, int(key["line"])

    def effects(self, rows: np.ndarray) -> tuple[collections.Counter[str], collections.Counter[str]]:
        """How many of the dialogues each step of cleaning changed, and removed."""
        changed: collections.Counter[str] = collections.Counter()
        removed: collections.Counter[str] = collections.Counter()
        pairs = self.keys["piece"][rows].astype(np.int64) << 32 | self.keys["outcome"][rows]
        found, times = np.unique(pairs, return_counts=True)
        for pair, count in zip(found.tolist(), times.tolist(), strict=True):
            changing, removing = self._details[pair >> 32]["outcomes"][pair & 0xFFFFFFFF]
            changed.update(dict.fromkeys(changing, count))
            if removing:
                removed[removing] += count
        return changed, removed

    def examples(self) -> dict[str, list[Any]]:
        """By step of cleaning, the first dialogues that it changed or removed: `{id, before, after}`."""
        found: dict[str, list[Any]] = {}
        for details in self._details:
            for step, shown in details["examples"].items():
                kept = found.setdefault(step, [])
                kept += shown[: _EXAMPLES - len(kept)]
        return found


class View(Sequence[Dialogue]):
    """Some dialogues of a spool, each read from disk when it is asked for."""

    def __init__(self, spool: Spool, rows: np.ndarray) -> None:
        """Takes the numbers of the dialogues, int64[N]."""
        self._spool, self._rows = spool, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Dialogue: ...
    @overload
    def __getitem__(self, index: slice) -> View: ...
    def __getitem__(self, index: int | slice) -> Dialogue | View:
        if isinstance(index, slice):
            return View(self._spool, self._rows[index])
        (dialogue,) = self._spool.dialogues([self._rows[index]])
        return dialogue

    def __iter__(self) -> Iterator[Dialogue]:
        return self._spool.dialogues(self._rows)


def read_lines(folder: Path, keys: np.ndarray) -> Iterator[bytes]:
    """The lines of the dialogues that `keys` (`KEYS`[N]) stand for, in their order."""
    stream, current, behind = None, -1, 0
    try:
        for number, offset, size in _places(keys):
            if stream is None or number != current:
                if stream:
                    stream.close()
                stream, current, behind = open(_file(folder, number, "jsonl"), "rb"), number, 0  # noqa: SIM115
            if offset != behind:
                stream.seek(offset)
            yield stream.read(size)
            # The line's end lies before the next line.
            stream.read(1)
            behind = offset + size + 1
    finally:
        if stream:
            stream.close()


def _places(keys: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Piece, offset and size of every line; a few at a time, since as Python's numbers they take far more memory."""
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        block = keys[start : start + _KEYS_AT_ONCE]
        yield from zip(block["piece"].tolist(), block["offset"].tolist(), block["size"].tolist(), strict=True)
