"""Sources cut into pieces that are read independently of each other, so that work is shared and can be continued.

The cut follows from the sources alone. A piece is a few small files, one file, or a part of a large one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ssl_jax.data import formats, named
from ssl_jax.data.formats import Accepted, Rejected, Unit
from ssl_jax.data.packaged import Part, ResolvedSource
from ssl_jax.data.sources import PACKAGED, short_names

_MIN_BYTES = 2**22
_MAX_BYTES = 2**26
# Above the least size, so many pieces keep all processes busy to the end.
_PIECES = 64
# What a compressed byte is taken for when pieces are weighed.
_COMPRESSION = 4
_EXAMPLES = 2**14


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
    """A part of one source, or of all sources of a packaged data set.

    Attributes:
      sources: the sources; several only of a packaged data set, which must see all of them.
      numbers: of the sources among all sources.
      units: of a source of files, the parts.
      examples: of a data set by name, the numbers of the part's examples.
      name: of a data set by name, what it is called in ids.
      size: bytes to read, about.
    """

    sources: tuple[ResolvedSource, ...]
    numbers: tuple[int, ...]
    units: tuple[Unit, ...] = ()
    examples: range = range(0)
    name: str = ""
    size: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What is read together.

    Attributes:
      number: of the piece, in order.
      stretches: what it consists of, in order.
    """

    number: int
    stretches: tuple[Stretch, ...]

    @property
    def size(self) -> int:
        """Bytes to read, about."""
        return sum(stretch.size for stretch in self.stretches)

    def source(self, number: int) -> ResolvedSource:
        """A source by its number among all sources."""
        for stretch in self.stretches:
            if number in stretch.numbers:
                return stretch.sources[stretch.numbers.index(number)]
        raise KeyError(number)


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A row of a source.

    Attributes:
      source: number of its source.
      part: the part of the labeled dialogues that it must be in: that of a packaged data set's own split, or train if
        it may not be held out. None: any, or the source is unlabeled.
      row: what was read.
      unique_id: whether its id must be the only one of its kind. Packaged data sets know what they repeat.
    """

    source: int
    part: Part | None
    row: Accepted | Rejected
    unique_id: bool = True


def cut(sources: Sequence[ResolvedSource], size: int | None = None) -> list[Piece]:
    """The pieces of all sources: packaged data sets first, then the others in order.

    Args:
      sources: resolved.
      size: bytes of a piece; absent: a 64th of all, between 4 and 64 MiB.

    Raises:
      UserError: a file or a data set cannot be opened.
    """
    if size is None:
        total = sum(_size(file) for resolved in sources for file in resolved.files)
        size = min(max(total // _PIECES, _MIN_BYTES), _MAX_BYTES)
    pieces: list[Piece] = []
    gathered: list[Stretch] = []
    for stretch in _stretches(sources, size):
        gathered.append(stretch)
        if sum(one.size for one in gathered) >= size:
            pieces.append(Piece(len(pieces), tuple(gathered)))
            gathered = []
    if gathered:
        pieces.append(Piece(len(pieces), tuple(gathered)))
    return pieces


def read(piece: Piece, max_turn_bytes: int) -> Iterator[Item]:
    """The rows of a piece, in order.

    Raises:
      UserError: a file cannot be read or is no text.
    """
    for stretch in piece.stretches:
        (first, *_), (number, *_) = stretch.sources, stretch.numbers
        if first.source.dataset:
            numbers = dict(zip(map(id, stretch.sources), stretch.numbers, strict=True))
            for resolved, part, row in PACKAGED[first.source.dataset].dialogues(stretch.sources):
                accepted = row if isinstance(row, Rejected) else Accepted(row, first.place, first.place, 0)
                yield Item(numbers[id(resolved)], part, accepted, unique_id=False)
        elif stretch.units:
            rows = (formats.read_unit(unit, first.source, first.expected, max_turn_bytes) for unit in stretch.units)
            yield from _of(number, first, itertools.chain.from_iterable(rows))
        else:
            rows = named.read(first.source, first.expected, max_turn_bytes, stretch.name, stretch.examples)
            yield from _of(number, first, rows)


def _stretches(sources: Sequence[ResolvedSource], size: int) -> Iterator[Stretch]:
    for name in dict.fromkeys(resolved.source.dataset for resolved in sources if resolved.source.dataset):
        numbers = tuple(number for number, resolved in enumerate(sources) if resolved.source.dataset == name)
        together = tuple(sources[number] for number in numbers)
        yield Stretch(together, numbers, size=sum(map(_size, {file for one in together for file in one.files})))
    names = short_names(sources)
    for number, resolved in enumerate(sources):
        source = resolved.source
        if source.dataset:
            continue
        if source.path:
            units = tuple(formats.units(source, names))
            resolved = dataclasses.replace(resolved, files=())  # a piece names its own files; these may be a million
            if source.max_dialogues:  # rows are taken in order until there are enough: nothing to share
                yield Stretch((resolved,), (number,), units, size=sum(map(_unit_size, units)))
                continue
            for unit in itertools.chain.from_iterable(formats.cut(whole, source, size) for whole in units):
                yield Stretch((resolved,), (number,), (unit,), size=_unit_size(unit))
        else:
            name = resolved.name.replace(resolved.place, names[Path(resolved.place)], 1)
            count, bytes_of_all = named.size(source), sum(map(_size, resolved.files))
            share = count if source.max_dialogues else _EXAMPLES
            for start in range(0, count, max(share, 1)):
                examples = range(start, min(start + share, count))
                weight = bytes_of_all * len(examples) // count
                yield Stretch((resolved,), (number,), (), examples, name, weight)


def _of(number: int, resolved: ResolvedSource, rows: Iterator[Accepted | Rejected]) -> Iterator[Item]:
    """The rows of a source, up to its `max_dialogues`."""
    taken: set[str] = set()
    for row in rows:
        is_dialogue = isinstance(row, Accepted)
        is_train = is_dialogue and row.train_only and resolved.expected == "labeled"
        yield Item(number, "train" if is_train else None, row)
        if resolved.source.max_dialogues is not None and is_dialogue and row.left_out is None:
            taken.add(row.dialogue.id)
            if len(taken) == resolved.source.max_dialogues:
                return


def _unit_size(unit: Unit) -> int:
    return unit.span.stop - unit.span.start if unit.span else sum(map(_size, unit.files))


def _size(file: Path) -> int:
    size = file.stat().st_size
    return size * _COMPRESSION if file.suffix in (".gz", ".zst", ".parquet") else size
