"""Similar texts without comparing all pairs: shingles, MinHash signatures and locality-sensitive buckets.

The similarity of two texts is the Jaccard similarity of their sets of shingles, which are runs of characters or words;
the fraction of equal places in two MinHash signatures estimates it (Broder, 1997, On the resemblance and containment of
documents). Texts whose signatures agree in all rows of one band share a bucket (Leskovec, Rajaraman & Ullman, Mining of
Massive Datasets, chapter 3). What shares a bucket is compared exactly, so that chance can miss a pair, one in a
thousand of those at the threshold and fewer above, but never make one up.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ssl_jax.data.cleaning.characters import PUNCTUATION
from ssl_jax.data.cleaning.filters import WORD

_PERMUTATIONS = 128
_MISSED_AT_THRESHOLD = 1e-3
# A signature's estimate has a standard deviation of at most 0.5 / sqrt(128) = 0.044.
_ESTIMATE_MARGIN = 0.2
# A chunk of hashes stays in the processor's cache while every permutation goes over it.
_SHINGLES_AT_A_TIME = 1 << 17
_SEED = 0x5EED
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
_IGNORED = re.compile(rf"(?:\s|{PUNCTUATION})+")


@dataclasses.dataclass(frozen=True)
class Sketches:
    """Texts in the form in which they are compared.

    Attributes:
      shingles: of every text the hashes of its shingles, uint64[number of shingles], repeated as in the text.
      signatures: uint32[texts, 128], the least value of each of 128 random functions over a text's shingles.
    """

    shingles: Sequence[npt.NDArray[np.uint64]]
    signatures: npt.NDArray[np.uint32]

    def buckets(self, threshold: float) -> Iterator[npt.NDArray[np.intp]]:
        """Groups of two and more texts, by rising index, some pairs of which may reach `threshold`."""
        rows = _rows(threshold)
        for start in range(0, _PERMUTATIONS - rows + 1, rows):
            keys = np.zeros(len(self.signatures), np.uint64)
            for row in range(start, start + rows):
                keys = (keys ^ self.signatures[:, row]) * _GOLDEN
                keys ^= keys >> np.uint64(32)
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
            ends = np.append(starts[1:], len(order))
            shared = ends - starts > 1
            for first, last in zip(starts[shared].tolist(), ends[shared].tolist(), strict=True):
                yield order[first:last]

    def similar(self, index: int, others: npt.NDArray[np.intp], threshold: float) -> Iterator[tuple[int, float]]:
        """Those of `others` whose similarity to the text at `index` reaches `threshold`, with the similarity."""
        estimates = (self.signatures[others] == self.signatures[index]).mean(axis=1)
        plausible = others[estimates >= threshold - _ESTIMATE_MARGIN]
        if len(plausible):
            mine = set(self.shingles[index].tolist())
            for other in plausible.tolist():
                theirs = set(self.shingles[other].tolist())
                shared = len(mine & theirs)
                if (similarity := shared / (len(mine) + len(theirs) - shared)) >= threshold:
                    yield other, similarity


def sketch(texts: Sequence[str], unit: Literal["characters", "words"], size: int) -> Sketches:
    """Prepares texts for comparison; case, width, punctuation and white space do not count.

    Args:
      texts: any.
      unit: what a shingle is a run of. A Chinese character is a word.
      size: units of a shingle; a shorter text is one shingle.
    """
    shingles = [_shingles(text, unit, size) for text in texts]
    return Sketches(shingles, _signatures(shingles))


def _shingles(text: str, unit: Literal["characters", "words"], size: int) -> npt.NDArray[np.uint64]:
    text = unicodedata.normalize("NFKC", text).casefold()
    # Where there is nothing but punctuation, it counts.
    text = _IGNORED.sub(" ", text).strip() or text
    if unit == "characters":
        units = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    else:
        units = np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in WORD.findall(text)], np.uint64)
    if len(units) < size:
        units = np.pad(units, (0, size - len(units)))
    count = len(units) - size + 1
    hashes = np.zeros(count, np.uint64)
    for place in range(size):
        hashes = (hashes ^ units[place : place + count]) * _GOLDEN
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _signatures(shingles: Sequence[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint32]:
    """The least value of each random function; the functions are multiply-add-shift (Dietzfelbinger, 1996)."""
    random = np.random.default_rng(_SEED)
    factors = random.integers(0, 2**64, _PERMUTATIONS, np.uint64) | np.uint64(1)
    offsets = random.integers(0, 2**64, _PERMUTATIONS, np.uint64)
    result = np.empty((len(shingles), _PERMUTATIONS), np.uint32)
    counts = np.array([len(hashes) for hashes in shingles], np.intp)
    ends = np.cumsum(counts)
    first = 0
    while first < len(shingles):
        before = ends[first] - counts[first]
        last = max(first + 1, int(np.searchsorted(ends, before + _SHINGLES_AT_A_TIME, "right")))
        hashes = np.concatenate(shingles[first:last])
        starts = ends[first:last] - counts[first:last] - before
        for column, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
            values = ((hashes * factor + offset) >> np.uint64(32)).astype(np.uint32)
            result[first:last, column] = np.minimum.reduceat(values, starts)
        first = last
    return result


def _rows(threshold: float) -> int:
    """Most rows of a band with which a pair at the threshold is missed at most once in a thousand times."""
    rows = 1
    while (1 - threshold ** (rows + 1)) ** (_PERMUTATIONS // (rows + 1)) <= _MISSED_AT_THRESHOLD:
        rows += 1
        if rows == _PERMUTATIONS:
            break
    return rows
