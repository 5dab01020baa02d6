"""Every processor is Hugging Face's: the same scores, and minus infinity at the same places, on random cases."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import torch

from ssl_jax import logits_processors, sampling

VOCABULARY, PADDED, PLACES = 61, 64, 24
ROWS, SETTINGS = 20, 10  # ten settings of each processor on twenty rows each: two hundred cases


@pytest.fixture(scope="module")
def cases() -> Any:
    """For each setting: scores, sequences and lengths of `ROWS` rows, from flat to peaked; few kinds of tokens."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(SETTINGS):
        scores = rng.normal(size=(ROWS, PADDED)) * np.geomspace(0.01, 30, ROWS)[:, None]
        scores[::5, rng.integers(0, VOCABULARY, 9)] = -np.inf
        scores[:, VOCABULARY:] = -np.inf  # the pad of our table, which theirs does not have
        sequences = rng.integers(0, rng.choice([3, 8, VOCABULARY], (ROWS, 1)), (ROWS, PLACES))
        found.append((scores.astype(np.float32), sequences.astype(np.int32), rng.integers(1, PLACES + 1, ROWS)))
    return found


# Compiled fast rather than well: the arithmetic is the same.
compile = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def reference(processor, scores, sequences, lengths):
    """Hugging Face's scores, each row alone."""
    rows = [
        processor(torch.tensor(sequence[None, :length], dtype=torch.long), torch.tensor(row[None, :VOCABULARY]))[0]
        for row, sequence, length in zip(scores, sequences, lengths, strict=True)
    ]
    return np.stack([row.numpy() for row in rows])


def assert_equal_scores(found, expected, changed_from=None):
    found = np.asarray(found)
    assert not np.isfinite(found[:, VOCABULARY:]).any(), "the pad is never predicted"
    found = found[:, :VOCABULARY]
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    if changed_from is not None:
        assert not np.array_equal(expected, changed_from[:, :VOCABULARY]), "the case asks something"


def token_sequences(rng: np.random.Generator, sequences: Any, lengths: Any, number: int) -> Any:
    """Random token sequences of one to four tokens, most of which some row is about to complete."""
    found = {}
    for _ in range(number):
        row, size = rng.integers(len(sequences)), rng.integers(0, 4)
        end = lengths[row]
        prefix = sequences[row, max(end - size, 0) : end] if rng.random() < 0.7 else rng.integers(0, VOCABULARY, size)
        found[*prefix.tolist(), int(rng.integers(VOCABULARY))] = float(np.float32(rng.normal()))
    return found


# What has been said so far --------------------------------------------------------------------------------------------


def test_repetition_penalty(cases):
    from transformers import RepetitionPenaltyLogitsProcessor

    ours = compile(logits_processors.repetition_penalty)
    for (scores, sequences, lengths), penalty in zip(cases, np.linspace(0.5, 2.3, SETTINGS), strict=True):
        expected = reference(RepetitionPenaltyLogitsProcessor(float(penalty)), scores, sequences, lengths)
        assert_equal_scores(ours(scores, sequences, lengths, penalty), expected, scores)


def test_no_repeat_ngram(cases):
    from transformers import NoRepeatNGramLogitsProcessor

    ours = compile(logits_processors.no_repeat_ngram, static_argnums=3)
    for (scores, sequences, lengths), size in zip(cases, [1, 2, 3, 4, 1, 2, 3, 4, 2, 40], strict=True):
        expected = reference(NoRepeatNGramLogitsProcessor(size), scores, sequences, lengths)
        assert_equal_scores(ours(scores, sequences, lengths, size), expected, scores if size < 4 else None)


def test_sequence_bias(cases):
    from transformers import SequenceBiasLogitsProcessor

    rng = np.random.default_rng(1)
    add = compile(logits_processors.sequence_bias, static_argnums=3)
    for number, (scores, sequences, lengths) in enumerate(cases):
        biases = token_sequences(rng, sequences, lengths, 5 + 30 * number)
        expected = reference(SequenceBiasLogitsProcessor(biases), scores, sequences, lengths)
        assert_equal_scores(add(scores, sequences, lengths, tuple(biases.items())), expected, scores)


def test_bad_words(cases):
    from transformers import NoBadWordsLogitsProcessor

    rng = np.random.default_rng(2)
    ban = compile(logits_processors.bad_words, static_argnums=(3, 4))
    for number, (scores, sequences, lengths) in enumerate(cases):
        words = list(token_sequences(rng, sequences, lengths, 5 + 30 * number))
        end_ids = (words[0][-1], 60)
        words += [end_ids[:1], words[1]]  # an end token alone, a word twice
        theirs = NoBadWordsLogitsProcessor([list(word) for word in words], list(end_ids))
        ours = ban(scores, sequences, lengths, tuple(words), end_ids)
        assert_equal_scores(ours, reference(theirs, scores, sequences, lengths), scores)


# What may be said at this place ---------------------------------------------------------------------------------------


def test_suppress(cases):
    from transformers import SuppressTokensLogitsProcessor

    rng = np.random.default_rng(3)
    for number, (scores, sequences, lengths) in enumerate(cases):
        token_ids = rng.integers(0, VOCABULARY, 1 + 3 * number).tolist()
        expected = reference(SuppressTokensLogitsProcessor(token_ids), scores, sequences, lengths)
        assert_equal_scores(logits_processors.suppress(scores, tuple(token_ids)), expected, scores)


def test_begin_suppress(cases):
    from transformers import SuppressTokensAtBeginLogitsProcessor

    rng = np.random.default_rng(4)
    for begin, (scores, sequences, lengths) in enumerate(cases, start=1):
        lengths = np.where(rng.random(ROWS) < 0.5, begin, lengths)
        token_ids = rng.integers(0, VOCABULARY, begin).tolist()
        theirs = SuppressTokensAtBeginLogitsProcessor(token_ids, begin)
        ours = logits_processors.begin_suppress(scores, tuple(token_ids), jnp.asarray(lengths - begin))
        assert_equal_scores(ours, reference(theirs, scores, sequences, lengths), scores)


def test_forced_bos(cases):
    from transformers import ForcedBOSTokenLogitsProcessor

    rng = np.random.default_rng(5)
    for scores, sequences, lengths in cases:
        lengths, token = np.where(rng.random(ROWS) < 0.5, 1, lengths), int(rng.integers(VOCABULARY))
        expected = reference(ForcedBOSTokenLogitsProcessor(token), scores, sequences, lengths)
        assert_equal_scores(logits_processors.forced_bos(scores, jnp.asarray(lengths), token), expected, scores)


def test_forced_eos(cases):
    from transformers import ForcedEOSTokenLogitsProcessor

    rng = np.random.default_rng(6)
    for number, (scores, sequences, lengths) in enumerate(cases):
        limit = int(rng.integers(2, PLACES))
        lengths = np.where(rng.random(ROWS) < 0.5, limit - 1, lengths)
        tokens = rng.integers(0, VOCABULARY, 3).tolist()
        token_id = tokens[0] if number % 2 else tokens
        expected = reference(ForcedEOSTokenLogitsProcessor(limit, token_id), scores, sequences, lengths)
        found = logits_processors.forced_eos(scores, jnp.asarray(lengths), token_id, jnp.full(ROWS, limit))
        assert_equal_scores(found, expected, scores)


def test_min_length(cases):
    from transformers import MinLengthLogitsProcessor

    rng = np.random.default_rng(7)
    for number, (scores, sequences, lengths) in enumerate(cases):
        end_ids, least = rng.integers(0, VOCABULARY, 1 + number % 3).tolist(), 5 + number
        expected = reference(MinLengthLogitsProcessor(least, end_ids), scores, sequences, lengths)
        assert_equal_scores(logits_processors.min_length(scores, lengths, tuple(end_ids), least), expected, scores)


def test_min_new_tokens(cases):
    from transformers import MinNewTokensLengthLogitsProcessor

    rng = np.random.default_rng(8)
    for number, (scores, sequences, lengths) in enumerate(cases):
        end_ids, least, prompt = rng.integers(0, VOCABULARY, 1 + number % 3).tolist(), 2 + number, 3
        lengths = np.maximum(lengths, prompt)
        expected = reference(MinNewTokensLengthLogitsProcessor(prompt, least, end_ids), scores, sequences, lengths)
        found = logits_processors.min_new_tokens(scores, lengths - prompt, tuple(end_ids), least)
        assert_equal_scores(found, expected, scores)


# What may be drawn ----------------------------------------------------------------------------------------------------


def test_temperature(cases):
    from transformers import TemperatureLogitsWarper

    for case, value in zip(cases, np.geomspace(0.1, 5, SETTINGS).tolist(), strict=True):
        found = logits_processors.temperature(case[0], value)
        assert_equal_scores(found, reference(TemperatureLogitsWarper(value), *case), case[0])


@pytest.fixture(scope="module")
def tied_cases(cases):
    """Every second row rounded, so that most of its scores tie."""
    rounded = [scores.copy() for scores, _, _ in cases]
    for scores in rounded:
        scores[::2] = np.round(scores[::2])
    return [(scores, *case[1:]) for scores, case in zip(rounded, cases, strict=True)]


def test_top_k(tied_cases):
    from transformers import TopKLogitsWarper

    ours = compile(logits_processors.top_k)
    for case, value in zip(tied_cases, [1, 2, 3, 5, 8, 13, 21, 40, 61, 100], strict=True):
        assert_equal_scores(ours(case[0], value), reference(TopKLogitsWarper(value), *case))


def test_top_p(cases):
    """Without ties, of which theirs keeps some by the order of its sort."""
    from transformers import TopPLogitsWarper

    ours = compile(logits_processors.top_p)
    for case, value in zip(cases, [1e-6, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.9999], strict=True):
        assert_equal_scores(ours(case[0], value), reference(TopPLogitsWarper(value), *case), case[0])


def test_min_p(tied_cases):
    from transformers import MinPLogitsWarper

    ours = compile(logits_processors.min_p)
    for case, value in zip(tied_cases, [1e-6, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9, 1.0], strict=True):
        assert_equal_scores(ours(case[0], value), reference(MinPLogitsWarper(value), *case), case[0])


def test_typical_p(tied_cases):
    from transformers import TypicalLogitsWarper

    ours = compile(logits_processors.typical_p)
    for case, value in zip(tied_cases, [0.001, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99, 0.999], strict=True):
        assert_equal_scores(ours(case[0], value), reference(TypicalLogitsWarper(value), *case), case[0])


# All of them together -------------------------------------------------------------------------------------------------


def everything(rng: np.random.Generator, sequences: Any, lengths: Any) -> dict[str, Any]:
    """Random options under their own names, each switched on in about half of the draws."""
    choices = {
        "sequence_bias": token_sequences(rng, sequences, lengths, 20),
        "repetition_penalty": float(rng.uniform(1.05, 2)),
        "no_repeat_ngram_size": int(rng.integers(1, 4)),
        "bad_words_ids": [list(word) for word in token_sequences(rng, sequences, lengths, 20)],
        "min_length": int(rng.integers(1, PLACES)),
        "min_new_tokens": int(rng.integers(1, 10)),
        "forced_bos_token_id": int(rng.integers(VOCABULARY)),
        "forced_eos_token_id": int(rng.integers(VOCABULARY)),
        "suppress_tokens": rng.integers(0, VOCABULARY, 3).tolist(),
        "begin_suppress_tokens": rng.integers(0, VOCABULARY, 3).tolist(),
        "temperature": float(rng.uniform(0.5, 2)),
        "top_k": int(rng.integers(20, VOCABULARY)),
        "top_p": float(rng.uniform(0.9, 0.99)),
        "min_p": float(rng.uniform(1e-4, 1e-3)),
        "typical_p": float(rng.uniform(0.9, 0.99)),
    }
    return {name: value for name, value in choices.items() if rng.random() < 0.5}


def hashable(value: Any) -> Any:
    match value:
        case dict():
            return tuple(value.items())
        case list():
            return tuple(hashable(item) for item in value)
    return value


@functools.cache
def network():
    """Only its method that lists processors is used."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=None)
    return GPT2LMHeadModel(config)


def test_options_mean_what_generation_config_means_in_the_same_order(cases):
    """`process` and `warp` against the list that `generate` builds for a row, a processor of the user's included."""
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    class Last(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * 0.5 + input_ids[:, -1:] * 0.01

    def last(scores_BV, sequences_BS, lengths_B):
        ends_B1 = jnp.take_along_axis(sequences_BS, lengths_B[:, None] - 1, axis=1)
        return scores_BV * 0.5 + ends_B1 * 0.01

    @functools.partial(compile, static_argnums=0)
    def apply(options, scores, sequences, lengths, prompts):
        processed = logits_processors.process(options, scores, sequences, lengths, prompts)
        return logits_processors.warp(options, processed)

    rng = np.random.default_rng(9)
    end_ids = (7, 11)
    for scores, sequences, lengths in cases:
        lengths = np.where(rng.random(ROWS) < 0.3, 1, lengths)
        fields = everything(rng, sequences, lengths)
        prompts = np.where(rng.random(ROWS) < 0.5, lengths, rng.integers(1, lengths + 1))
        expected = []
        for row, length, prompt in zip(range(ROWS), lengths, prompts, strict=True):
            config = GenerationConfig(**fields, do_sample=True, eos_token_id=list(end_ids), max_length=int(prompt) + 9)
            if "min_new_tokens" in fields:
                config.min_length = fields["min_new_tokens"] + int(prompt)  # as `generate` does
            config._eos_token_tensor = torch.tensor(end_ids)
            theirs = network()._get_logits_processor(
                config, int(prompt), logits_processor=LogitsProcessorList([Last()])
            )
            one = slice(row, row + 1)
            expected.append(reference(theirs, scores[one], sequences[one], [length])[0])
        options = sampling.Options(
            max_new_tokens=9, end_ids=end_ids, processors=(last,), **{name: hashable(fields[name]) for name in fields}
        )
        found = apply(options, scores, sequences, lengths, prompts)
        assert np.isfinite(expected).any(axis=1).sum() > ROWS // 2, "most rows have something left"
        assert_equal_scores(found, np.stack(expected), scores)
