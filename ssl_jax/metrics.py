"""Metrics of replies and of systems, as pure functions of strings and NumPy arrays.

Text statistics describe a set of replies and are read as a distance to the same numbers of the human replies, never
as something to maximize: more diversity than people show is noise.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, kana, bopomofo, Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005\u3007\u3040-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)

# Resamples drawn at a time; bounds memory at this many counts per dialogue.
_BOOTSTRAP_CHUNK = 500


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks, in order.

    A word is a run of letters, digits and their combining marks, with apostrophes inside it kept ("don't"). Every
    character of a script without spaces (Chinese, Japanese, Thai, …) is a word, as is every other character that is
    not white space. Nothing but white space is lost.
    """
    return _word_pattern().findall(text.lower())


def distinct(replies: Sequence[str], n: int) -> float:
    """Unique word n-grams ÷ word n-grams over the whole set (Li et al. 2016, arXiv:1510.03055).

    Falls as the set grows, so only sets of the same size compare. 0 where no reply has n words.
    """
    counts = _ngram_counts(replies, n)
    return len(counts) / max(counts.total(), 1)


def entropy(replies: Sequence[str], n: int) -> float:
    """Entropy in nats of the empirical distribution of word n-grams (Zhang et al. 2018, arXiv:1809.05972).

    DialoGPT's Ent-4 is `entropy(replies, 4)`. 0 where no reply has n words.
    """
    counts = np.fromiter(_ngram_counts(replies, n).values(), np.float64)
    if not counts.size:
        return 0.0
    total = counts.sum()
    # log(total) - log(count), unlike -log(count / total), is exactly 0 for a single n-gram and never negative.
    return float(np.sum(counts / total * (np.log(total) - np.log(counts))))


def repetition(replies: Sequence[str], n: int) -> float:
    """Mean over replies of the share of word n-grams that occurred earlier in the same reply.

    A reply of fewer than n words counts 0, as does an empty set.
    """
    shares = []
    for reply in replies:
        ngrams = list(_ngrams(words(reply), n))
        shares.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return sum(shares) / max(len(shares), 1)


def length_ratio(replies: Sequence[str], references: Sequence[str]) -> float:
    """Words of all replies ÷ words of all references.

    Raises:
      ValueError: the references have no words.
    """
    reference_words = sum(len(words(reference)) for reference in references)
    if not reference_words:
        raise ValueError("length_ratio needs references with at least one word")
    return sum(len(words(reply)) for reply in replies) / reference_words


def text_statistics(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`distinct_1`, `distinct_2`, `entropy_4`, `length_ratio` and `repetition_4` of the replies.

    Only `length_ratio` looks at the references; `text_statistics(references, references)` are the human values.

    Raises:
      ValueError: the references have no words.
    """
    return {
        "distinct_1": distinct(replies, 1),
        "distinct_2": distinct(replies, 2),
        "entropy_4": entropy(replies, 4),
        "length_ratio": length_ratio(replies, references),
        "repetition_4": repetition(replies, 4),
    }


def bits_per_byte(nll_nats: ArrayLike, num_bytes: ArrayLike) -> float:
    """Total negative log-likelihood ÷ (ln 2 · total UTF-8 bytes).

    Args:
      nll_nats: nats, one number or one per dialogue.
      num_bytes: bytes of the same text, one number or one per dialogue.

    Raises:
      ValueError: no bytes.
    """
    total_bytes = np.sum(np.asarray(num_bytes, np.float64))
    if not total_bytes > 0:
        raise ValueError(f"bits_per_byte needs at least one byte, got {total_bytes:g}")
    return float(np.sum(np.asarray(nll_nats, np.float64)) / (math.log(2) * total_bytes))


def frozen_candidates(
    replies: Sequence[str], num_examples: int, num_candidates: int = 20, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which examples are ranked, and which replies compete in each.

    The choice is a hash of the seed and of positions in the list, so it is the same on every machine and under every
    NumPy version. Fewer examples or candidates with the same list and seed are a prefix of more.

    Args:
      replies: the true replies, one per dialogue.
      num_examples: N, how many dialogues are ranked.
      num_candidates: C, the true reply included.
      seed: another seed gives other examples and distractors.

    Returns:
      examples: int64[N], distinct positions in `replies`.
      candidates: int64[N, C], positions in `replies`. Column 0 is the example's own reply, so scores must be ranked
        by `ranking`, which gives ties to the distractors. The others belong to other dialogues and differ, as text,
        from the true reply and from one another.

    Raises:
      ValueError: fewer replies than examples, fewer distinct replies than candidates, or a size below 1 (below 2
        for candidates).
    """
    if num_examples < 1 or num_candidates < 2:
        raise ValueError(f"cannot rank {num_examples} examples with {num_candidates} candidates each")
    if num_examples > len(replies):
        raise ValueError(f"{num_examples} examples asked of {len(replies)} replies")
    # One position per text: drawing among these is fast and fair however often a stock phrase occurs.
    first_positions: dict[str, int] = {}
    for position, reply in enumerate(replies):
        first_positions.setdefault(reply, position)
    distinct_positions = list(first_positions.values())
    if num_candidates > len(distinct_positions):
        raise ValueError(f"{num_candidates} candidates asked of {len(distinct_positions)} distinct replies")

    examples = sorted(range(len(replies)), key=lambda position: _hash(seed, "example", position))[:num_examples]
    candidates = np.empty((num_examples, num_candidates), np.int64)
    for row, example in zip(candidates, examples, strict=True):
        row[0] = example
        taken = {replies[example]}
        draw = 0
        while len(taken) < num_candidates:
            position = distinct_positions[_hash(seed, "distractor", example, draw) % len(distinct_positions)]
            draw += 1
            if replies[position] not in taken:
                row[len(taken)] = position
                taken.add(replies[position])
    return np.asarray(examples, np.int64), candidates


def ranking(scores_NC: ArrayLike) -> dict[str, float]:
    """Retrieval metrics of candidates whose true reply is in column 0; a higher score is better.

    A distractor with the truth's score ranks above it, so a constant score has recall 0 and no order of the columns
    can be exploited.

    Args:
      scores_NC: float[N, C] for N examples and C candidates.

    Returns:
      `recall_at_1_of_<C>`, the share of examples whose truth is strictly first, and `mrr`, the mean of 1 ÷ rank.

    Raises:
      ValueError: not two-dimensional, no examples, fewer than two candidates, or a score that is not a number.
    """
    scores_NC = np.asarray(scores_NC, np.float64)
    if scores_NC.ndim != 2 or scores_NC.shape[0] < 1 or scores_NC.shape[1] < 2:
        raise ValueError(f"ranking needs scores of shape [examples, candidates >= 2], got {list(scores_NC.shape)}")
    if np.isnan(scores_NC).any():
        raise ValueError("ranking got a score that is not a number")
    rank_N = 1 + np.sum(scores_NC[:, 1:] >= scores_NC[:, :1], axis=1)
    return {
        f"recall_at_1_of_{scores_NC.shape[1]}": float(np.mean(rank_N == 1)),
        "mrr": float(np.mean(1 / rank_N)),
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A value measured on the whole test set and its 95 % percentile interval over resampled dialogues."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True)
class GapClosed:
    """How much of the way from the floor to the oracle a method goes.

    Attributes:
      fraction: 0 at the floor, 1 at the oracle. None where the oracle gap is under two of its standard errors: the
        ratio would be noise over noise. Its interval leaves out the few resamples in which the oracle does not win.
      oracle_gap: bits per byte of the floor minus those of the oracle.
      oracle_gap_standard_error: its standard deviation over resampled dialogues.
    """

    fraction: Interval | None
    oracle_gap: Interval
    oracle_gap_standard_error: float


def paired_bootstrap(
    numerator_a: ArrayLike,
    denominator_a: ArrayLike,
    numerator_b: ArrayLike,
    denominator_b: ArrayLike,
    num_samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Difference a - b of two ratios of sums over the same dialogues, by paired bootstrap (Koehn 2004, W04-3250).

    For bits per byte the numerators are bits and the denominators bytes; position i is dialogue i in all four
    arrays. Every resample draws D dialogues with replacement and computes both ratios on them.

    Args:
      numerator_a, denominator_a, numerator_b, denominator_b: float[D], sums of one dialogue each.
      num_samples: resamples.
      seed: of the resampling.

    Raises:
      ValueError: lengths differ, no dialogues, or a denominator that is not positive.
    """
    columns_DK = _columns(numerator_a, denominator_a, numerator_b, denominator_b)
    if not np.all(columns_DK[:, [1, 3]] > 0):
        raise ValueError("a bootstrap of ratios needs positive denominators")

    def difference(sums: Array) -> Array:
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    samples = difference(_resampled_sums(columns_DK, num_samples, seed))
    return _interval(difference(columns_DK.sum(axis=0)), samples)


def gap_closed(
    floor: ArrayLike,
    method: ArrayLike,
    oracle: ArrayLike,
    num_bytes: ArrayLike,
    num_samples: int = 10_000,
    seed: int = 0,
) -> GapClosed:
    """(floor - method) ÷ (floor - oracle) in bits per byte, with a bootstrap interval over dialogues.

    Args:
      floor, method, oracle: float[D], negative log-likelihood in nats of each dialogue's replies under the system
        trained on the labels alone, the method, and the system trained with every label.
      num_bytes: float[D], UTF-8 bytes of the same replies.
      num_samples: resamples.
      seed: of the resampling.

    Raises:
      ValueError: lengths differ, no dialogues, or a dialogue without bytes.
    """
    columns_DK = _columns(floor, method, oracle, num_bytes)
    if not np.all(columns_DK[:, 3] > 0):
        raise ValueError("gap_closed needs at least one byte in every dialogue")

    def oracle_gap(sums: Array) -> Array:
        return (sums[..., 0] - sums[..., 2]) / (math.log(2) * sums[..., 3])

    def fraction(sums: Array) -> Array:
        # The bytes are the same for all three systems and cancel.
        return (sums[..., 0] - sums[..., 1]) / (sums[..., 0] - sums[..., 2])

    sums_K = columns_DK.sum(axis=0)
    sums_SK = _resampled_sums(columns_DK, num_samples, seed)
    gap_S = oracle_gap(sums_SK)
    standard_error = float(np.std(gap_S))
    defined = oracle_gap(sums_K) > 0 and oracle_gap(sums_K) >= 2 * standard_error
    return GapClosed(
        fraction=_interval(fraction(sums_K), fraction(sums_SK[gap_S > 0])) if defined else None,
        oracle_gap=_interval(oracle_gap(sums_K), gap_S),
        oracle_gap_standard_error=standard_error,
    )


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    # `\w` leaves out combining marks, which would cut Hindi or decomposed accents into pieces.
    marks = "".join(_ranges(code for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M"))
    # Possessive, since runs within runs would otherwise be retried in every division.
    letters = rf"(?:[^\W_{_UNSPACED}]++[{marks}]*+)++"
    return re.compile(rf"[{_UNSPACED}][{marks}]*|{letters}(?:['\u2019]{letters})*|[^\w\s]|_")


def _ranges(codes: Iterable[int]) -> Iterator[str]:
    """`first-last` of every run of consecutive code points, for a character class."""
    # Within a run the code and its position in the whole sequence grow together.
    for _, run in itertools.groupby(enumerate(codes), key=lambda item: item[1] - item[0]):
        members = [code for _, code in run]
        yield f"{chr(members[0])}-{chr(members[-1])}"


def _ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n-grams need n of at least 1, got {n}")
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def _ngram_counts(replies: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram occurs within replies; none spans two of them."""
    return Counter(ngram for reply in replies for ngram in _ngrams(words(reply), n))


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def _columns(*columns: ArrayLike) -> Array:
    """Stacks K per-dialogue arrays to float64[D, K]."""
    arrays = [np.asarray(column, np.float64) for column in columns]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1 or arrays[0].ndim != 1 or not arrays[0].size:
        raise ValueError(f"a bootstrap needs one number per dialogue in every array, got shapes {sorted(shapes)}")
    return np.stack(arrays, axis=1)


def _resampled_sums(columns_DK: Array, num_samples: int, seed: int) -> Array:
    """Sums of the columns over dialogues drawn with replacement: float64[num_samples, K]."""
    num_dialogues = len(columns_DK)
    probabilities = np.full(num_dialogues, 1 / num_dialogues)
    rng = np.random.default_rng(seed)
    chunks = []
    for start in range(0, num_samples, _BOOTSTRAP_CHUNK):
        size = min(_BOOTSTRAP_CHUNK, num_samples - start)
        # D draws with replacement, as the number of times that each dialogue was drawn.
        chunks.append(rng.multinomial(num_dialogues, probabilities, size=size) @ columns_DK)
    return np.concatenate(chunks)


def _interval(value: Array | np.float64, samples: Array) -> Interval:
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))
