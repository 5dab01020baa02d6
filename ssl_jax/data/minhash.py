"""Similar dialogues without comparing all pairs: shingles, MinHash signatures and locality-sensitive buckets.

The similarity of two dialogues is the Jaccard similarity of their sets of shingles, which are runs of characters or
words; the fraction of equal places in two MinHash signatures estimates it (Broder, 1997, On the resemblance and
containment of documents). Dialogues whose signatures agree in all rows of one band share a bucket (Leskovec, Rajaraman
& Ullman, Mining of Massive Datasets, chapter 3). What shares a bucket is compared exactly, so that chance can miss a
pair, one in a thousand of those at the threshold and fewer above, but never make one up.
"""

from __future__ import annotations

import collections
import hashlib
import re
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from ssl_jax.data.cleaning.characters import PUNCTUATION
from ssl_jax.data.cleaning.filters import WORD
from ssl_jax.dialogue import Dialogue

_PERMUTATIONS = 128
# About a word of English, or two of Chinese.
_SHINGLE_SIZE = 4
_MISSED_AT_THRESHOLD = 1e-3
# A signature's estimate has a standard deviation of at most 0.5 / sqrt(128) = 0.044.
_ESTIMATE_MARGIN = 0.2
# A chunk of shingles stays in the processor's cache while every permutation goes over it.
_UNITS_AT_A_TIME = 1 << 17
_SIGNATURES_AT_A_TIME = 1 << 14
# Of dialogues that are compared again soon: 64 MiB.
_SHINGLES_REMEMBERED = 1 << 23
_SEED = 0x5EED
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
_PUNCTUATION = re.compile(f"(?:{PUNCTUATION})+")

Unit = Literal["characters", "words"]


class Sketches:
    """Dialogues in the form in which they are compared.

    Texts stay where they are and are read again when they are compared.

    Attributes:
      hashes: uint64[N, 2], equal for equal texts.
      signatures: uint32[N, 128], the least value of each of 128 random functions over a text's shingles; in a file.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        folder: Path | None = None,
        *,
        unit: Unit = "characters",
        size: int = _SHINGLE_SIZE,
    ) -> None:
        """Reads all dialogues once. Case, width, punctuation, white space, roles and the bounds of turns do not count.

        Args:
          dialogues: any; best one that reads them when asked for.
          folder: where a temporary file of 512 bytes a dialogue goes; absent: the system's place for such files.
          unit: what a shingle is a run of. A Chinese character is a word.
          size: units of a shingle; a shorter text is one shingle.

        Raises:
          OSError: the file cannot be written.
        """
        self._dialogues = dialogues
        self._unit: Unit = unit
        self._size = size
        self._recent: collections.OrderedDict[int, npt.NDArray[np.uint64]] = collections.OrderedDict()
        self._recent_size = 0
        self.hashes = np.empty((len(dialogues), 2), np.uint64)
        with tempfile.TemporaryFile(dir=folder) as file:
            _write_signatures(file, self._read_all(), size)
            file.flush()
            shape = (len(dialogues), _PERMUTATIONS)
            # An empty file cannot be mapped.
            mapped = np.memmap(file, np.uint32, "r", shape=shape) if dialogues else np.empty(shape, np.uint32)
            self.signatures = np.asarray(mapped)

    def buckets(self, numbers: npt.NDArray[np.int64], threshold: float) -> Iterator[npt.NDArray[np.intp]]:
        """Groups of two and more places in `numbers`, rising, where some pairs of dialogues may reach `threshold`."""
        rows = _rows(threshold)
        for start in range(0, _PERMUTATIONS - rows + 1, rows):
            keys = np.zeros(len(numbers), np.uint64)
            for first in range(0, len(numbers), _SIGNATURES_AT_A_TIME):
                part = slice(first, first + _SIGNATURES_AT_A_TIME)
                for column in self.signatures[numbers[part], start : start + rows].T:
                    keys[part] = (keys[part] ^ column) * _GOLDEN
                    keys[part] ^= keys[part] >> np.uint64(32)
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
            ends = np.append(starts[1:], len(order))
            shared = ends - starts > 1
            for first, last in zip(starts[shared].tolist(), ends[shared].tolist(), strict=True):
                yield order[first:last]

    def similar(self, number: int, others: npt.NDArray[np.int64], threshold: float) -> Iterator[int]:
        """Places in `others`, numbers of dialogues, whose similarity to dialogue `number` reaches `threshold`."""
        equal = np.count_nonzero(self.signatures[others] == self.signatures[number], axis=1)
        for place in np.flatnonzero(equal >= (threshold - _ESTIMATE_MARGIN) * _PERMUTATIONS).tolist():
            mine, theirs = self._distinct_shingles(number), self._distinct_shingles(int(others[place]))
            shared = len(np.intersect1d(mine, theirs, assume_unique=True))
            if shared / (len(mine) + len(theirs) - shared) >= threshold:
                yield place

    def _read_all(self) -> Iterator[npt.NDArray[np.uint64]]:
        for number, dialogue in enumerate(self._dialogues):
            text = _text(dialogue)
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            self.hashes[number] = np.frombuffer(digest, np.uint64)
            yield _units(text, self._unit, self._size)

    def _distinct_shingles(self, number: int) -> npt.NDArray[np.uint64]:
        if number in self._recent:
            self._recent.move_to_end(number)
        else:
            units = _units(_text(self._dialogues[number]), self._unit, self._size)
            found = np.unique(_shingles(units, self._size))
            self._recent[number] = found
            self._recent_size += len(found)
            while self._recent_size > _SHINGLES_REMEMBERED and len(self._recent) > 1:
                self._recent_size -= len(self._recent.popitem(last=False)[1])
        return self._recent[number]


def _text(dialogue: Dialogue) -> str:
    return "\n".join(turn.content for turn in dialogue.turns)


def _units(text: str, unit: Unit, size: int) -> npt.NDArray[np.uint64]:
    """What shingles are runs of, uint64[number of units]; at least `size`."""
    text = unicodedata.normalize("NFKC", text).casefold()
    # Where there is nothing but punctuation, it counts.
    text = " ".join(_PUNCTUATION.sub(" ", text).split()) or text
    if unit == "characters":
        units = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    else:
        units = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in WORD.findall(text)], np.uint64)
    return units if len(units) >= size else np.pad(units, (0, size - len(units)))


def _shingles(units: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint64]:
    """Hashes of all runs of `size` units, uint64[number of units - size + 1]."""
    count = len(units) - size + 1
    hashes = np.zeros(count, np.uint64)
    for place in range(size):
        hashes ^= units[place : place + count]
        hashes *= _GOLDEN
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _write_signatures(file: IO[bytes], texts: Iterator[npt.NDArray[np.uint64]], size: int) -> None:
    """Writes uint32[number of texts, 128] in row-major order, given the units of every text."""
    gathered: list[npt.NDArray[np.uint64]] = []
    count = 0
    for units in texts:
        gathered.append(units)
        count += len(units)
        if count >= _UNITS_AT_A_TIME:
            file.write(_signatures(gathered, size).tobytes())
            gathered, count = [], 0
    if gathered:
        file.write(_signatures(gathered, size).tobytes())


def _signatures(texts: Sequence[npt.NDArray[np.uint64]], size: int) -> npt.NDArray[np.uint32]:
    """The least value of each random function; the functions are multiply-add-shift (Dietzfelbinger, 1996)."""
    random = np.random.default_rng(_SEED)
    factors = random.integers(0, 2**64, _PERMUTATIONS, np.uint64) | np.uint64(1)
    offsets = random.integers(0, 2**64, _PERMUTATIONS, np.uint64)
    # Of one long text; a shingle over the end of a text is in none of the stretches that are looked at.
    hashes = _shingles(np.concatenate([*texts, np.zeros(size, np.uint64)]), size)
    lengths = np.array([len(units) for units in texts])
    starts = np.cumsum(lengths) - lengths
    stretches = np.stack([starts, starts + lengths - size + 1], axis=1).ravel()
    least = np.empty((len(texts), _PERMUTATIONS), np.uint64)
    values = np.empty_like(hashes)
    for column, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        np.multiply(hashes, factor, out=values)
        np.add(values, offset, out=values)
        least[:, column] = np.minimum.reduceat(values, stretches)[::2]
    # The least of the values has the least upper half.
    return (least >> np.uint64(32)).astype(np.uint32)


def _rows(threshold: float) -> int:
    """Most rows of a band with which a pair at the threshold is missed at most once in a thousand times."""
    rows = 1
    while (1 - threshold ** (rows + 1)) ** (_PERMUTATIONS // (rows + 1)) <= _MISSED_AT_THRESHOLD:
        rows += 1
        if rows == _PERMUTATIONS:
            break
    return rows
