"""Scores become what the definition of each option says, whatever the rows' lengths and whatever stands behind them."""

import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from ssl_jax import logits_processors, sampling

VOCABULARY, PLACES = 11, 9

# Compiled fast rather than well: the arithmetic is the same.
compile = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@st.composite
def texts(draw: Any) -> list[list[int]]:
    """Four rows of one to `PLACES` tokens, few kinds of them so that they repeat."""
    return [draw(st.lists(st.integers(0, 3), min_size=1, max_size=PLACES)) for _ in range(4)]


def padded(rows: list[list[int]], pad: int) -> tuple[Any, Any]:
    """int32 sequences with `pad` behind each row's end, and lengths."""
    sequences = np.array([row + [pad] * (PLACES - len(row)) for row in rows], np.int32)
    return sequences, np.array([len(row) for row in rows], np.int32)


SCORES: Any = np.random.default_rng(0).normal(size=(4, VOCABULARY)).astype(np.float32)


# What has been said so far --------------------------------------------------------------------------------------------

penalize = compile(logits_processors.repetition_penalty)
ban_repeats = compile(logits_processors.no_repeat_ngram, static_argnums=3)
add_biases = compile(logits_processors.sequence_bias, static_argnums=3)


@settings(deadline=None, max_examples=40)
@given(rows=texts(), pad=st.integers(0, 3))
def test_repetition_penalty_makes_every_token_of_the_row_less_likely_once(rows, pad):
    found = np.asarray(penalize(SCORES, *padded(rows, pad), 1.5))
    for row, scores, before in zip(rows, found, SCORES, strict=True):
        expected = [
            (score * 1.5 if score < 0 else score / 1.5) if token in row else score for token, score in enumerate(before)
        ]
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(rows=texts(), pad=st.integers(0, 3), size=st.integers(1, 4))
def test_no_ngram_is_completed_a_second_time(rows, pad, size):
    found = np.asarray(ban_repeats(SCORES, *padded(rows, pad), size))
    for row, scores, before in zip(rows, found, SCORES, strict=True):
        seen = {tuple(row[start : start + size]) for start in range(len(row) - size + 1)}
        banned = [len(row) + 1 >= size and (*row[len(row) + 1 - size :], token) in seen for token in range(VOCABULARY)]
        np.testing.assert_array_equal(scores, np.where(banned, -np.inf, before))


BIASES = (((2,), 1.5), ((0, 1), 2.0), ((0, 0, 1), -1.0), ((1, 2, 3, 1), 4.0), ((3, 10), -np.inf), ((2,), 0.5))


@settings(deadline=None, max_examples=60)
@given(rows=texts(), pad=st.integers(0, 3))
def test_biases_are_added_where_their_sequence_would_be_completed(rows, pad):
    found = np.asarray(add_biases(SCORES, *padded(rows, pad), BIASES))
    for row, scores, before in zip(rows, found, SCORES, strict=True):
        expected = before.copy()
        for sequence, bias in dict(BIASES).items():  # of two biases of one sequence the last one counts
            prefix = list(sequence[:-1])
            if not prefix or row[-len(prefix) :] == prefix:
                expected[sequence[-1]] += bias
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_an_end_token_alone_is_no_bad_word_but_may_end_one():
    sequences, lengths = padded([[1], [2], [3], [1, 2]], 0)
    found = logits_processors.bad_words(SCORES, sequences, lengths, ((5,), (7,), (2, 5), (7,)), end_ids=(5,))
    banned = np.isneginf(found)
    assert banned[:, 7].all(), "a bad word of one token is always banned"
    assert banned[:, 5].tolist() == [False, True, False, True]
    assert banned.sum() == 6
    same = logits_processors.bad_words(SCORES, sequences, lengths, ((5,),), end_ids=(5,))
    np.testing.assert_array_equal(same, SCORES)


@pytest.mark.parametrize("sequence", [(), (0, -1), (VOCABULARY,)])
def test_a_sequence_that_cannot_be_is_refused(sequence):
    with pytest.raises(ValueError, match="empty or has an id outside the vocabulary of 11"):
        logits_processors.sequence_bias(SCORES, *padded([[1]] * 4, 0), (((3, 4), 1.0), (sequence, 1.0)))


def test_many_bad_words_make_larger_arrays_but_not_a_longer_program():
    def operations(number):
        words = tuple((token % 5, token % 7, token % VOCABULARY) for token in range(number))
        ban = functools.partial(logits_processors.bad_words, bad_words_ids=words, end_ids=())
        program = str(jax.make_jaxpr(ban)(SCORES, *padded([[1]] * 4, 0)))
        return program.count("=")

    assert operations(300) == operations(2)


# What may be drawn ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Two hundred rows from flat to peaked, half of them full of ties, some with impossible tokens."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(200, 23)) * np.geomspace(1e-3, 30, 200)[:, None]
    rows[::2] = np.round(rows[::2])
    rows[5::7, ::3] = -np.inf
    rows[3] = 0.0
    rows[7] = [0.0, -0.0] * 11 + [0.0]
    rows[8] = np.where(np.arange(23) == 4, 0.0, -np.inf)
    return rows.astype(np.float32)


def softmax(row: np.ndarray) -> np.ndarray:
    probabilities = np.exp(row - row.max())
    return probabilities / probabilities.sum()


def kept_by_top_k(row, top_k):
    return row >= np.sort(row)[-min(top_k, len(row))]


def kept_by_top_p(row, top_p):
    """Tokens whose likelier ones do not reach `top_p`."""
    probabilities = softmax(row)
    return np.array([probabilities[probabilities > own].sum() < top_p for own in probabilities])


def kept_by_min_p(row, min_p):
    probabilities = softmax(row)
    return probabilities >= min_p * probabilities.max()


def kept_by_typical_p(row, typical_p):
    """Tokens for which those closer to the entropy do not reach `typical_p`."""
    probabilities = softmax(row)
    surprise = np.full(len(row), np.inf)
    surprise[probabilities > 0] = -np.log(probabilities[probabilities > 0])
    entropy = (probabilities[probabilities > 0] * surprise[probabilities > 0]).sum()
    distances = np.abs(surprise - entropy).round(9)
    return np.array([probabilities[distances < own].sum() < typical_p for own in distances])


@pytest.mark.parametrize(
    ("filter", "kept", "values"),
    [
        (logits_processors.top_k, kept_by_top_k, [1, 5, 23, 100]),
        (logits_processors.top_p, kept_by_top_p, [0.95, 0.5, 1e-6]),
        (logits_processors.min_p, kept_by_min_p, [1e-4, 0.1, 1.0]),
        (logits_processors.typical_p, kept_by_typical_p, [0.95, 0.5, 0.1]),
    ],
)
def test_filters_keep_what_their_definition_keeps(logits, filter, kept, values):
    compiled = compile(filter)
    for value in values:
        checked = 0
        for row, found in zip(logits, np.asarray(compiled(logits, value)), strict=True):
            # Where the edge is within rounding of a token, the last bit decides.
            edges = {value} if isinstance(value, int) or value == 1 else {value * 0.999, value * 1.001}
            keeps = [kept(row.astype(np.float64), edge) for edge in edges]
            if all(np.array_equal(keep, keeps[0]) for keep in keeps):
                checked += 1
                np.testing.assert_array_equal(found, np.where(keeps[0], row, -np.inf))
            assert np.isfinite(found).any(), "nothing is left to draw"
        assert checked > 170


def test_top_p_close_to_one_cuts_the_right_tail_of_a_large_vocabulary():
    """What is cut of 50,000 tokens holds one part in ten thousand: sums from the large end would round it away."""
    scores = np.random.default_rng(0).normal(size=(2, 50_000)).astype(np.float32) * 2
    found = np.asarray(logits_processors.top_p(jnp.asarray(scores), 0.9999))
    for row, kept in zip(scores.astype(np.float64), np.isfinite(found), strict=True):
        assert 0 < (~kept).sum() < 49_000
        assert softmax(row)[~kept].sum() == pytest.approx(1e-4, rel=1e-3)
        assert row[kept].min() > row[~kept].max()


# All of them together -------------------------------------------------------------------------------------------------


def processed(options: sampling.Options, rows: list[list[int]], prompts: list[int], scores: Any = SCORES) -> np.ndarray:
    sequences, lengths = padded(rows, 0)
    given = sequences if options.reads_sequences else None
    return np.asarray(
        logits_processors.process(options, scores[: len(rows)], given, jnp.asarray(lengths), jnp.asarray(prompts))
    )


def test_options_by_default_change_nothing():
    options = sampling.Options(max_new_tokens=3)
    np.testing.assert_array_equal(processed(options, [[1, 2]] * 4, [1] * 4), SCORES)
    np.testing.assert_array_equal(logits_processors.warp(options, jnp.asarray(SCORES)), SCORES)


def test_the_penalty_comes_after_the_bias_and_a_custom_processor_after_the_ban():
    options = sampling.Options(
        max_new_tokens=3,
        sequence_bias=(((1,), 10.0),),
        repetition_penalty=2.0,
        suppress_tokens=(4,),
        processors=(lambda scores, sequences, lengths: scores.at[:, 4].set(sequences[:, 0] + lengths),),
    )
    found = processed(options, [[1, 2]], [1])
    assert found[0, 1] == pytest.approx((SCORES[0, 1] + 10) / 2)
    assert found[0, 4] == 3.0


def test_temperature_comes_before_the_filters_and_each_filter_sees_what_the_last_one_left():
    scores = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    both = sampling.Options(max_new_tokens=1, top_k=2, top_p=0.6)
    # Of the two that are left, the first holds 0.625: enough for top_p 0.6, but not of all four.
    assert np.isfinite(logits_processors.warp(both, scores)).tolist() == [[True, False, False, False]]
    flat = sampling.Options(max_new_tokens=1, temperature=100.0, top_p=0.6)
    assert np.isfinite(logits_processors.warp(flat, scores)).sum() == 3


def test_end_tokens_wait_for_the_shortest_length_in_either_form():
    rows, prompts = [[1], [1, 2, 3], [1, 2, 3, 1]], [1, 1, 3]
    total = sampling.Options(max_new_tokens=5, end_ids=(6, 8), min_length=4)
    assert np.isneginf(processed(total, rows, prompts)[:, [6, 8]]).tolist() == [[True] * 2, [True] * 2, [False] * 2]
    new = sampling.Options(max_new_tokens=5, end_ids=(6, 8), min_new_tokens=2, min_length=4)
    assert np.isneginf(processed(new, rows, prompts)[:, 8]).tolist() == [True, False, True]
    assert np.isneginf(processed(new, rows, prompts)).sum() == 4


def test_forced_tokens_are_the_only_choice_at_their_place():
    options = sampling.Options(max_new_tokens=3, max_length=5, forced_bos_token_id=9, forced_eos_token_id=6)
    # Reply begun behind one token; cut by max_new_tokens; cut by max_length; in between.
    found = processed(options, [[1], [1, 2, 3], [1, 2, 3, 1], [1, 2, 3]], [1, 1, 4, 2])
    for row, token in ((0, 9), (1, 6), (2, 6)):
        np.testing.assert_array_equal(found[row], np.where(np.arange(VOCABULARY) == token, 0.0, -np.inf))
    np.testing.assert_array_equal(found[3], SCORES[3])


def test_tokens_suppressed_at_the_beginning_wait_for_a_forced_one():
    plain = sampling.Options(max_new_tokens=3, begin_suppress_tokens=(4,), suppress_tokens=(99, -1))
    rows, prompts = [[1], [1, 2], [1, 2]], [1, 1, 2]
    assert np.isneginf(processed(plain, rows, prompts)[:, 4]).tolist() == [True, False, True]
    forced = sampling.Options(max_new_tokens=3, begin_suppress_tokens=(4,), forced_bos_token_id=4)
    assert np.isneginf(processed(forced, rows, prompts)[:, 4]).tolist() == [False, True, True]


def test_a_reply_ends_at_max_new_tokens_or_at_what_its_prompt_leaves_of_max_length():
    lengths = jnp.array([0, 1, 6, 9, 10, 12])
    both = sampling.Options(max_new_tokens=5, max_length=10)
    assert logits_processors.new_token_limits(both, lengths).tolist() == [5, 5, 4, 1, 0, 0]
    one = sampling.Options(max_new_tokens=5)
    assert logits_processors.new_token_limits(one, lengths).tolist() == [5] * 6


def test_options_that_read_sequences_do_not_go_without():
    options = sampling.Options(max_new_tokens=3, no_repeat_ngram_size=2)
    with pytest.raises(ValueError, match="there are none"):
        logits_processors.process(options, jnp.asarray(SCORES), None, jnp.ones(4, jnp.int32), jnp.ones(4, jnp.int32))
