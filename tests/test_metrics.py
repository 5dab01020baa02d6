"""Text statistics, retrieval metrics, frozen candidates and bootstrap intervals."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax import metrics

replies_lists = st.lists(st.text("ab ,", max_size=12), max_size=6)
lengths_of_ngram = st.integers(1, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP!", ["don't", "stop", "!"]),
        ("'quoted' rock\u2019n\u2019roll", ["'", "quoted", "'", "rock\u2019n\u2019roll"]),
        ("a_b 3.5", ["a", "_", "b", "3", ".", "5"]),
        ("你好\uff0c世界", ["你", "好", "\uff0c", "世", "界"]),
        ("東京タワーok", ["東", "京", "タ", "ワ", "ー", "ok"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("cafe\u0301s", ["cafe\u0301s"]),
        ("привет😀", ["привет", "😀"]),
        (" \n\t", []),
    ],
)
def test_words_follow_the_script(text: str, expected: list[str]) -> None:
    """Spaced scripts give words with their marks and apostrophes, unspaced scripts give characters."""
    assert metrics.words(text) == expected


@settings(deadline=None)
@given(st.text())
def test_words_lose_nothing_but_white_space(text: str) -> None:
    """Every other character is in exactly one word, in order."""
    assert "".join(metrics.words(text)) == "".join(text.lower().split())


def test_long_words_take_linear_time() -> None:
    """A hundred thousand letters with marks and a dangling apostrophe are one word, without backtracking."""
    word = "e\u0301" * 50_000
    assert metrics.words(word + "'") == [word, "'"]


def test_statistics_match_a_worked_example() -> None:
    """Six words of which three differ, four bigrams of which three differ; ratios against five words."""
    replies, references = ["a b a", "a b", "c"], ["one two three", "four five"]
    assert metrics.distinct(replies, 1) == 3 / 6
    assert metrics.distinct(replies, 2) == 2 / 3
    # Bigrams: (a b) twice, (b a) once.
    assert metrics.entropy(replies, 2) == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert metrics.repetition(replies, 1) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert metrics.length_ratio(replies, references) == 6 / 5


def test_text_statistics_names_every_metric_once() -> None:
    """The keys are the documented metric names, each with the value of its own function."""
    replies, references = ["a b c d a b c d", "a b c d e"], ["a b c"]
    assert metrics.text_statistics(replies, references) == {
        "distinct_1": metrics.distinct(replies, 1),
        "distinct_2": metrics.distinct(replies, 2),
        "entropy_4": metrics.entropy(replies, 4),
        "length_ratio": 13 / 3,
        # Of the first reply's five 4-grams the last repeats the first one.
        "repetition_4": pytest.approx((1 / 5 + 0) / 2),
    }


@settings(deadline=None)
@given(replies_lists, lengths_of_ngram)
def test_statistics_agree_with_a_slow_count(replies: list[str], n: int) -> None:
    """Distinct, entropy and repetition equal loops that follow their definitions word by word."""
    everything, shares = [], []
    for reply in replies:
        tokens = metrics.words(reply)
        own = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
        repeats = sum(ngram in own[:position] for position, ngram in enumerate(own))
        shares.append(repeats / len(own) if own else 0)
        everything += own
    total = len(everything)
    entropy = sum(-count / total * math.log(count / total) for count in Counter(everything).values())
    assert metrics.distinct(replies, n) == pytest.approx(len(set(everything)) / total if total else 0)
    assert metrics.entropy(replies, n) == pytest.approx(entropy, abs=1e-12)
    assert metrics.repetition(replies, n) == pytest.approx(np.mean(shares) if shares else 0)


@settings(deadline=None)
@given(replies_lists, lengths_of_ngram, st.randoms())
def test_statistics_ignore_the_order_of_replies(replies: list[str], n: int, random) -> None:
    """A set of replies has one value, whatever order they were generated in, and it is within its range."""
    shuffled = random.sample(replies, len(replies))
    for metric, upper in (
        (metrics.distinct, 1),
        (metrics.repetition, 1),
        (metrics.entropy, math.log(max(1, sum(map(len, replies))))),
    ):
        assert metric(replies, n) == pytest.approx(metric(shuffled, n))
        assert 0 <= metric(replies, n) <= upper + 1e-12


def test_entropy_is_in_nats_and_largest_when_uniform() -> None:
    """Eight different 4-grams, once each, have ln 8 nats."""
    assert metrics.entropy([" ".join("abcdefghijk")], 4) == pytest.approx(math.log(8))
    assert metrics.entropy(["a a a a a a"], 4) == 0


def test_ngrams_do_not_span_replies() -> None:
    """Two one-word replies have no bigram between them."""
    assert metrics.distinct(["a", "b"], 2) == 0


def test_an_ngram_has_at_least_one_word() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        metrics.distinct(["a"], 0)


def test_length_ratio_needs_references_with_words() -> None:
    """A ratio to nothing is an error, replies without words are not."""
    assert metrics.length_ratio(["", " "], ["a"]) == 0
    with pytest.raises(ValueError, match="references"):
        metrics.length_ratio(["a"], [" "])


def test_bits_per_byte_is_a_ratio_of_totals() -> None:
    """8 bits on 2 bytes and 1 bit on 1 byte are 3 bits per byte, not the mean of 4 and 1."""
    assert metrics.bits_per_byte(np.array([8, 1]) * math.log(2), [2, 1]) == pytest.approx(3)
    assert metrics.bits_per_byte(math.log(2), 2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="byte"):
        metrics.bits_per_byte(1.0, 0)


REPLIES = [f"reply {number % 40}" for number in range(50)]


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.integers(0, 99))
def test_candidates_are_the_truth_and_other_texts(replies: list[str], seed: int) -> None:
    """Column 0 is the example itself, the rest are pairwise different texts, the truth's included."""
    num_candidates = max(2, len(set(replies)))
    if len(set(replies)) < 2:
        with pytest.raises(ValueError, match="distinct"):
            metrics.frozen_candidates(replies, 1, num_candidates, seed)
        return
    examples, candidates = metrics.frozen_candidates(replies, len(replies), num_candidates, seed)
    assert sorted(examples) == list(range(len(replies)))
    np.testing.assert_array_equal(candidates[:, 0], examples)
    for row in candidates:
        assert len({replies[position] for position in row}) == num_candidates


def test_candidates_are_frozen() -> None:
    """The lists of a given seed never change: a changed literal here makes published numbers incomparable."""
    examples, candidates = metrics.frozen_candidates(REPLIES, 3, 4)
    assert examples.tolist() == [9, 3, 34]
    assert candidates.tolist() == [[9, 15, 12, 32], [3, 37, 2, 12], [34, 29, 2, 26]]


def test_fewer_candidates_are_a_prefix_of_more() -> None:
    """A quick evaluation ranks a part of what the full one ranks."""
    few_examples, few = metrics.frozen_candidates(REPLIES, 5, 10, seed=3)
    many_examples, many = metrics.frozen_candidates(REPLIES, 50, 20, seed=3)
    np.testing.assert_array_equal(few_examples, many_examples[:5])
    np.testing.assert_array_equal(few, many[:5, :10])


def test_seed_changes_examples_and_distractors() -> None:
    first_examples, first = metrics.frozen_candidates(REPLIES, 50, 20, seed=0)
    other_examples, other = metrics.frozen_candidates(REPLIES, 50, 20, seed=1)
    assert first_examples.tolist() != other_examples.tolist()
    by_example = dict(zip(other_examples.tolist(), other.tolist(), strict=True))
    assert any(row.tolist() != by_example[row[0]] for row in first)


def test_distractors_are_drawn_evenly_from_texts() -> None:
    """A stock phrase in nine of ten replies is no likelier a distractor than any other text."""
    replies = ["ok"] * 900 + [f"rare {number}" for number in range(100)]
    examples, candidates = metrics.frozen_candidates(replies, 1000, 11)
    rare_rows = candidates[np.argsort(examples)][900:]
    share = np.mean([0 in row for row in rare_rows])
    assert share == pytest.approx(10 / 100, abs=0.09)


@pytest.mark.parametrize(
    ("num_examples", "num_candidates", "message"),
    [(51, 2, "examples"), (1, 41, "distinct"), (0, 2, "rank"), (1, 1, "rank")],
)
def test_impossible_rankings_are_refused(num_examples: int, num_candidates: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.frozen_candidates(REPLIES, num_examples, num_candidates)


def test_ranking_matches_a_worked_example() -> None:
    """Ranks 1, 2 and 3: recall 1/3 and mrr (1 + 1/2 + 1/3) / 3."""
    scores = [[3, 2, 1], [2, 3, 1], [1, 2, 3]]
    assert metrics.ranking(scores) == {
        "recall_at_1_of_3": pytest.approx(1 / 3),
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 3) / 3),
    }


@pytest.mark.parametrize("constant", [0.0, -np.inf, np.inf])
def test_a_constant_score_ranks_the_truth_last(constant: float) -> None:
    """A broken scorer gets the worst result, not a perfect one."""
    assert metrics.ranking(np.full((4, 20), constant)) == {"recall_at_1_of_20": 0, "mrr": pytest.approx(1 / 20)}


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=6), st.permutations(range(3))
)
def test_ranking_ignores_the_order_of_distractors(scores: list[list[int]], order: list[int]) -> None:
    """Only which scores compete matters, nor does their scale."""
    array = np.array(scores)
    permuted = np.concatenate([array[:, :1], array[:, 1:][:, order]], axis=1)
    result = metrics.ranking(array)
    assert metrics.ranking(permuted * 2 + 1) == result
    assert 0 <= result["recall_at_1_of_4"] <= result["mrr"] <= 1


@pytest.mark.parametrize("scores", [[[1, math.nan]], [[math.nan, 1]], [[1]], [1, 2], np.empty((0, 2))])
def test_scores_that_cannot_be_ranked_are_refused(scores) -> None:
    with pytest.raises(ValueError, match="ranking"):
        metrics.ranking(scores)


def test_bootstrap_of_a_constant_difference_has_no_width() -> None:
    """If a costs one bit per byte more than b in every dialogue, so it does in every resample."""
    num_bytes = np.array([3.0, 10.0, 7.0])
    interval = metrics.paired_bootstrap(num_bytes * 3, num_bytes, num_bytes * 2, num_bytes, num_samples=200)
    assert (interval.value, interval.low, interval.high) == pytest.approx((1, 1, 1))


def test_bootstrap_uses_the_pairing() -> None:
    """Dialogues that are hard for both systems widen each score, but not the difference."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 9, 200)
    a, b, ones = hard + rng.normal(0.1, 0.01, 200), hard, np.ones(200)
    paired = metrics.paired_bootstrap(a, ones, b, ones)
    unpaired = metrics.paired_bootstrap(a, ones, rng.permutation(b), ones)
    assert paired.low < 0.1 < paired.high
    assert (paired.high - paired.low) * 20 < unpaired.high - unpaired.low


def test_bootstrap_interval_matches_the_normal_approximation() -> None:
    """For a mean of many dialogues the percentile interval is value ± 1.96 standard errors."""
    rng = np.random.default_rng(1)
    a, b, ones = rng.normal(2, 1, 400), rng.normal(1.5, 1, 400), np.ones(400)
    interval = metrics.paired_bootstrap(a, ones, b, ones)
    standard_error = float(np.std(a - b)) / 20
    assert interval.value == pytest.approx(np.mean(a - b))
    assert interval.low == pytest.approx(interval.value - 1.96 * standard_error, abs=0.1 * standard_error)
    assert interval.high == pytest.approx(interval.value + 1.96 * standard_error, abs=0.1 * standard_error)


def test_bootstrap_matches_a_slow_resampling() -> None:
    """Ratios of sums over drawn dialogues, computed one draw at a time, have the same quantiles."""
    rng = np.random.default_rng(2)
    bits_a, bits_b, num_bytes = rng.uniform(1, 5, (3, 30))
    differences = []
    for _ in range(20_000):
        drawn = rng.integers(0, 30, 30)
        total = num_bytes[drawn].sum()
        differences.append(bits_a[drawn].sum() / total - bits_b[drawn].sum() / total)
    interval = metrics.paired_bootstrap(bits_a, num_bytes, bits_b, num_bytes, num_samples=20_000)
    width = interval.high - interval.low
    assert [interval.low, interval.high] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.04 * width)


def test_bootstrap_is_decided_by_its_seed() -> None:
    a, b, ones = np.arange(10.0), np.arange(10.0)[::-1], np.ones(10)
    first = metrics.paired_bootstrap(a, ones, b, ones, num_samples=1100, seed=0)
    assert first == metrics.paired_bootstrap(a, ones, b, ones, num_samples=1100, seed=0)
    assert first != metrics.paired_bootstrap(a, ones, b, ones, num_samples=1100, seed=1)


@pytest.mark.parametrize(
    ("denominator", "message"), [([1.0, 0.0], "positive"), ([1.0], "shapes"), ([[1.0], [1.0]], "shapes")]
)
def test_bootstrap_refuses_what_has_no_ratio(denominator: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.paired_bootstrap([1.0, 2.0], denominator, [1.0, 2.0], [1.0, 1.0])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, -0.5])
def test_gap_closed_is_the_share_of_the_way(share: float) -> None:
    """A method that goes the same share of the way in every dialogue closes exactly that share, below 0 if it harms."""
    floor, oracle = np.array([5.0, 8.0, 6.0, 7.0]), np.array([3.0, 7.0, 4.5, 5.0])
    result = metrics.gap_closed(floor, floor - share * (floor - oracle), oracle, [2, 4, 3, 3], num_samples=500)
    assert result.fraction is not None
    assert (result.fraction.value, result.fraction.low, result.fraction.high) == pytest.approx((share,) * 3)
    assert result.oracle_gap.value == pytest.approx(6.5 / math.log(2) / 12)


def test_gap_closed_interval_covers_the_truth() -> None:
    """Of 100 test sets with a true share of one half, the 95 % intervals hold it in about 95."""
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        hard = rng.uniform(5, 9, 150)
        floor, method, oracle = hard + rng.normal([[2], [1.5], [1]], 1, (3, 150))
        fraction = metrics.gap_closed(floor, method, oracle, np.ones(150), num_samples=400, seed=seed).fraction
        assert fraction is not None
        covered += fraction.low <= 0.5 <= fraction.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize(
    ("oracle", "gap"),
    [([4.0, 7.0, 6.0, 9.0], 0.0), ([4.0, 6.0, 7.0, 8.1], 0.225), ([6.0, 7.0, 8.0, 9.0], -1.0)],
    ids=["no gap", "gap within noise", "oracle worse than floor"],
)
def test_gap_closed_is_undefined_without_a_clear_gap(oracle: list[float], gap: float) -> None:
    """Where the oracle does not beat the floor by two standard errors no share is reported, but the gap is."""
    floor = np.array([5.0, 6.0, 7.0, 8.0])
    result = metrics.gap_closed(floor, floor - 0.1, oracle, np.ones(4), num_samples=300)
    assert result.fraction is None
    assert result.oracle_gap.value == pytest.approx(gap / math.log(2))


def test_gap_closed_refuses_dialogues_without_bytes() -> None:
    with pytest.raises(ValueError, match="byte"):
        metrics.gap_closed([2.0], [1.5], [1.0], [0])


def test_gap_closed_over_seeds_with_one_run_each_is_gap_closed() -> None:
    """To the last bit: the same dialogues are drawn, and a single run is drawn every time."""
    rng = np.random.default_rng(0)
    floor, method, oracle = rng.uniform(5, 9, 30) + rng.normal([[3], [2], [0]], 0.5, (3, 30))
    num_bytes = rng.integers(1, 9, 30)
    single = metrics.gap_closed(floor, method, oracle, num_bytes, num_samples=700, seed=4)
    assert single == metrics.gap_closed_over_seeds([floor], [method], [oracle], num_bytes, num_samples=700, seed=4)


def test_gap_closed_over_seeds_is_of_the_mean_over_runs() -> None:
    """Totals of 12 and 16, of 10, and of 5, 6 and 7: (14 - 10) / (14 - 6) of the way, over 8 nats and 4 bytes."""
    floors, methods = [[4.0, 8.0], [6.0, 10.0]], [[5.0, 5.0]]
    oracles = [[2.5, 2.5], [3.0, 3.0], [3.0, 4.0]]
    result = metrics.gap_closed_over_seeds(floors, methods, oracles, [1, 3], num_samples=200)
    assert result.fraction is not None
    assert result.fraction.value == pytest.approx(0.5)
    assert result.oracle_gap.value == pytest.approx(8 / math.log(2) / 4)


def test_gap_closed_over_seeds_resamples_dialogues_and_runs() -> None:
    """Its intervals are those of loops that draw dialogues for all and runs for each system."""
    rng = np.random.default_rng(1)
    hard = rng.uniform(5, 9, 12)
    floors, methods, oracles = (
        [hard + mean + rng.normal(0, 0.3) + rng.normal(0, 0.2, 12) for _ in range(runs)]
        for mean, runs in ((3, 3), (1.5, 2), (0, 4))
    )
    num_bytes = rng.integers(1, 5, 12)
    shares, gaps = [], []
    for _ in range(4000):
        dialogues = rng.integers(12, size=12)
        floor, method, oracle = (
            np.mean([system[run][dialogues].sum() for run in rng.integers(len(system), size=len(system))])
            for system in (floors, methods, oracles)
        )
        shares.append((floor - method) / (floor - oracle))
        gaps.append((floor - oracle) / math.log(2) / num_bytes[dialogues].sum())
    result = metrics.gap_closed_over_seeds(floors, methods, oracles, num_bytes, num_samples=20_000)
    assert result.fraction is not None
    for interval, samples in ((result.fraction, shares), (result.oracle_gap, gaps)):
        width = interval.high - interval.low
        assert [interval.low, interval.high] == pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=0.06 * width)
    assert result.oracle_gap_standard_error == pytest.approx(np.std(gaps), rel=0.06)


def test_runs_that_differ_widen_the_interval() -> None:
    """The same mean over runs, with and without a spread between them."""
    floor, oracle = np.full(20, 4.0) + np.arange(20) % 3, np.full(20, 2.0)
    same, apart = (
        metrics.gap_closed_over_seeds(
            [floor], [floor - 1 - spread, floor - 1 + spread], [oracle], np.ones(20), num_samples=500
        ).fraction
        for spread in (0.0, 0.5)
    )
    assert same is not None and apart is not None and same.value == pytest.approx(apart.value)
    assert apart.high - apart.low > 2 * (same.high - same.low)


@pytest.mark.parametrize(
    ("methods", "num_bytes", "message"),
    [([], [1, 1], "a run of every system"), ([[1.0]], [1, 1], "shapes"), ([[1.0, 1.0]], [1, 0], "byte")],
)
def test_gap_closed_over_seeds_refuses_what_it_cannot_compare(methods: list, num_bytes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.gap_closed_over_seeds([[2.0, 2.0]], methods, [[1.0, 1.0]], num_bytes)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3.0, 100.0),
        (2.0, 400.0),
        # Half of the way from 3 to 2 bits is half of the logarithm from 100 to 400.
        (2.5, 200.0),
        # A quarter of the way from 2 to 1 bits, from 400 to 6400: two doublings of four would be one half.
        (1.75, 800.0),
        (1.0, 6400.0),
        (3.01, None),
        (0.99, None),
    ],
)
def test_label_equivalents_interpolate_in_the_logarithm(value: float, expected: float | None) -> None:
    found = metrics.label_equivalents([100, 400, 6400], [3.0, 2.0, 1.0], value)
    assert found == (None if expected is None else pytest.approx(expected))


def test_label_equivalents_of_a_curve_that_rises_are_the_first_crossing() -> None:
    """100 labels reach 2 bits, 200 by accident 2.5 and 400 one: 1.9 bits are between the last two."""
    found = metrics.label_equivalents([100, 200, 400], [2.0, 2.5, 1.0], 1.9)
    assert found == pytest.approx(200 * 2 ** (0.6 / 1.5))
    assert metrics.label_equivalents([100, 200, 400], [2.0, 2.5, 1.0], 2.0) == 100
    assert metrics.label_equivalents([100, 200, 400], [2.0, 2.5, 1.0], 2.2) is None


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0, 10), st.floats(0, 10))
def test_a_better_value_never_has_fewer_label_equivalents(bits: list[float], first: float, second: float) -> None:
    budgets = [100.0 * 3**number for number in range(len(bits))]
    better, worse = (metrics.label_equivalents(budgets, bits, value) for value in sorted((first, second)))
    if better is not None and worse is not None:
        assert budgets[0] <= worse <= better * (1 + 1e-12) and better <= budgets[-1] * (1 + 1e-12)


@pytest.mark.parametrize(
    ("budgets", "bits"), [([], []), ([100], [1, 2]), ([100, 100], [2, 1]), ([0, 100], [2, 1]), ([1], [math.nan])]
)
def test_label_equivalents_refuse_what_is_no_curve(budgets: list, bits: list) -> None:
    with pytest.raises(ValueError, match="label_equivalents"):
        metrics.label_equivalents(budgets, bits, 1.0)


def test_repetition_across_counts_what_an_earlier_reply_said() -> None:
    """Half of "b c d e f" was said, "a b c d" two replies before; a lone word is no 4-gram.

    What another chat said, and what a reply says twice itself, do not count.
    """
    chat = ["a b c d e", "b c d e f", "a b c d", "a"]
    assert metrics.repetition_across([chat], 4) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert metrics.repetition_across([chat, ["a b c d e", "x x x x x x"]], 4) == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert metrics.repetition_across([["a b c d"], []], 4) == 0


@settings(deadline=None)
@given(st.lists(replies_lists, max_size=4), lengths_of_ngram)
def test_repetition_across_agrees_with_a_slow_count(chats: list[list[str]], n: int) -> None:
    shares = []
    for chat in chats:
        ngrams = [
            [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)] for tokens in map(metrics.words, chat)
        ]
        for number in range(1, len(chat)):
            before = {ngram for reply in ngrams[:number] for ngram in reply}
            shares.append(np.mean([one in before for one in ngrams[number]]) if ngrams[number] else 0.0)
    assert metrics.repetition_across(chats, n) == pytest.approx(np.mean(shares) if shares else 0.0)
