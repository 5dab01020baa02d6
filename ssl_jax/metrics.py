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

from ssl_jax import bootstrap
from ssl_jax.bootstrap import Interval

Array = NDArray[np.float64]

# Scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, kana, bopomofo, Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005\u3007\u3040-\u312f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)


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


def repetition_across(chats: Sequence[Sequence[str]], n: int) -> float:
    """Mean share of a reply's word n-grams that occurred in an earlier reply of the same chat.

    Over all replies but the first of every chat, which has none before it; of fewer than n words one counts 0. 0 where
    no chat has two replies.
    """
    shares = []
    for chat in chats:
        earlier: set[tuple[str, ...]] = set()
        for number, reply in enumerate(chat):
            ngrams = list(_ngrams(words(reply), n))
            if number:
                shares.append(sum(ngram in earlier for ngram in ngrams) / max(len(ngrams), 1))
            earlier.update(ngrams)
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
    columns_DK = bootstrap.columns(numerator_a, denominator_a, numerator_b, denominator_b)
    if not np.all(columns_DK[:, [1, 3]] > 0):
        raise ValueError("a bootstrap of ratios needs positive denominators")

    def difference(sums: Array) -> Array:
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    samples = difference(bootstrap.resampled_sums(columns_DK, num_samples, seed))
    return Interval.of(difference(columns_DK.sum(axis=0)), samples)


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
    return gap_closed_over_seeds([floor], [method], [oracle], num_bytes, num_samples, seed)


def gap_closed_over_seeds(
    floors: Sequence[ArrayLike],
    methods: Sequence[ArrayLike],
    oracles: Sequence[ArrayLike],
    num_bytes: ArrayLike,
    num_samples: int = 10_000,
    seed: int = 0,
) -> GapClosed:
    """`gap_closed` of systems that were trained several times, each with the mean over its runs.

    The interval is that of a bootstrap on two levels (Davison and Hinkley 1997, section 3.8): every resample draws
    dialogues, the same for all systems, and of each system as many runs as it has, apart from the other systems'.
    With one run of each it is `gap_closed`. Few runs understate what a seed does: the variance of a resampled mean of
    R runs is (R - 1) / R of the unbiased estimate, two thirds of it for three.

    Args:
      floors, methods, oracles: one float[D] for every run of the system, nats of each dialogue as in `gap_closed`. The
        systems may have different numbers of runs.
      num_bytes: float[D], UTF-8 bytes of the replies.
      num_samples: resamples.
      seed: of the resampling.

    Raises:
      ValueError: lengths differ, no dialogues, a dialogue without bytes, or a system without runs.
    """
    systems = (floors, methods, oracles)
    if not all(len(runs) for runs in systems):
        raise ValueError(f"gap_closed needs a run of every system, got {[len(runs) for runs in systems]}")
    columns_DK = bootstrap.columns(*floors, *methods, *oracles, num_bytes)
    if not np.all(columns_DK[:, -1] > 0):
        raise ValueError("gap_closed needs at least one byte in every dialogue")
    ends = np.cumsum([len(runs) for runs in systems])

    def means_of_runs(sums: Array, weights: Sequence[Array]) -> Array:
        runs = np.split(sums[..., :-1], ends[:-1], axis=-1)
        means = [np.sum(values * weight, axis=-1) for values, weight in zip(runs, weights, strict=True)]
        return np.stack([*means, sums[..., -1]], axis=-1)

    def oracle_gap(sums: Array) -> Array:
        return (sums[..., 0] - sums[..., 2]) / (math.log(2) * sums[..., 3])

    def fraction(sums: Array) -> Array:
        # The bytes are the same for all three systems and cancel.
        return (sums[..., 0] - sums[..., 1]) / (sums[..., 0] - sums[..., 2])

    rng = np.random.default_rng([seed, len(systems)])
    resampled = [bootstrap.resampled_weights(len(runs), num_samples, rng) for runs in systems]
    sums_4 = means_of_runs(columns_DK.sum(axis=0), [np.full(len(runs), 1 / len(runs)) for runs in systems])
    sums_S4 = means_of_runs(bootstrap.resampled_sums(columns_DK, num_samples, seed), resampled)
    gap_S = oracle_gap(sums_S4)
    standard_error = float(np.std(gap_S))
    defined = oracle_gap(sums_4) > 0 and oracle_gap(sums_4) >= 2 * standard_error
    return GapClosed(
        fraction=Interval.of(fraction(sums_4), fraction(sums_S4[gap_S > 0])) if defined else None,
        oracle_gap=Interval.of(oracle_gap(sums_4), gap_S),
        oracle_gap_standard_error=standard_error,
    )


def label_equivalents(budgets: Sequence[float], bits: Sequence[float], value: float) -> float | None:
    """The fewest labeled dialogues with which training on labels alone is as good as `value`.

    The curve of what label budgets reach is a straight line in the logarithm of the budget between two of them. Where
    noise makes it rise the first crossing counts, so a better value never has fewer equivalents.

    Args:
      budgets: labeled dialogues, increasing.
      bits: bits per byte that each of them reaches.
      value: bits per byte of a method.

    Returns:
      Labeled dialogues, or None where the curve does not say: the value is worse than the smallest budget's or better
      than every budget's.

    Raises:
      ValueError: as many budgets as bits and at least one are needed, the budgets positive and increasing, and all of
        them numbers.
    """
    x_B, bits_B = np.asarray(budgets, np.float64), np.asarray(bits, np.float64)
    if x_B.ndim != 1 or not x_B.size or x_B.shape != bits_B.shape:
        raise ValueError(f"label_equivalents needs a value per budget, got {list(x_B.shape)} and {list(bits_B.shape)}")
    if not (x_B[0] > 0 and np.all(np.diff(x_B) > 0) and np.isfinite([*x_B, *bits_B, value]).all()):
        raise ValueError("label_equivalents needs positive increasing budgets and finite bits per byte")
    reached = np.flatnonzero(bits_B <= value)
    if value > bits_B[0] or not reached.size:
        return None
    if (at := int(reached[0])) == 0:
        return float(x_B[0])
    share = (bits_B[at - 1] - value) / (bits_B[at - 1] - bits_B[at])
    return float(x_B[at - 1] * (x_B[at] / x_B[at - 1]) ** share)


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
