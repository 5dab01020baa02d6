"""A reply is what its model, prompt, options and key say: nothing more, and never more steps than needed."""

import dataclasses
import functools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from hypothesis import strategies

from ssl_jax import config, model, sampling, step
from ssl_jax.data.packing import assemble, stack

SHAPE = model.GPT2(37, 64, 40, 16, 2, 2, 32)
PROMPTS = ([1, 2, 3], [30, 7, 8, 9, 10, 11], [5])


@pytest.fixture(scope="module")
def params():
    """Wide enough that the distributions are neither flat nor certain."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(model.init, SHAPE), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.45, leaf.shape), leaf.dtype), shapes)


# Compiled fast rather than well: the arithmetic is the same.
FAST: dict[str, Any] = {"xla_backend_optimization_level": 0}
sample = jax.jit(sampling.sample, static_argnums=(0, 1), compiler_options=FAST)
start = jax.jit(sampling.start, static_argnums=(0, 1), compiler_options=FAST)
TRACED: list[sampling.Options] = []


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, compiler_options=FAST)
def advance(shape, options, params, state, steps):
    TRACED.append(options)
    return sampling.advance(shape, options, params, state, steps)


def batch(options, prompts=PROMPTS, places=8, seeds=None):
    """`(tokens, lengths, keys)` of `prompts`; row r has the key of `seeds[r]` (its own number by default)."""
    tokens = np.full((len(prompts), places), 33, np.int32)  # what stands behind a prompt must not matter
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    seeds = range(len(prompts) * options.num_return_sequences) if seeds is None else seeds
    return tokens, lengths, jax.vmap(jax.random.key)(jnp.array(list(seeds)))


def on_host(replies):
    return sampling.Replies(*(np.array(array) for array in replies))


def draw(params, options, prompts=PROMPTS, places=8, seeds=None):
    """Host arrays of the replies to `prompts`."""
    return on_host(sample(SHAPE, options, params, *batch(options, prompts, places, seeds)))


@pytest.fixture(scope="module")
def next_log_probs(params):
    """Log-probabilities `[37]` of what follows a text, by a full forward pass."""

    @jax.jit
    def hidden(tokens):
        positions = jnp.arange(24)[None]
        return model.forward(SHAPE, params, tokens, positions, jnp.ones((1, 24), jnp.int32))

    def compute(text):
        tokens = np.zeros((1, 24), np.int32)
        tokens[0, : len(text)] = text
        logits = np.asarray(hidden(tokens), np.float64)[0, len(text) - 1] @ np.asarray(params["wte"]["embedding"]).T
        return logits[:37] - np.log(np.exp(logits[:37]).sum())

    return compute


# Whole replies --------------------------------------------------------------------------------------------------------


GREEDY = sampling.Options(max_new_tokens=10, do_sample=False)


def test_greedy_reply_is_the_argmax_of_repeated_full_passes(params, next_log_probs):
    found = draw(params, GREEDY)
    for row, prompt in enumerate(PROMPTS):
        text, expected = list(prompt), []
        for _ in range(10):
            log_probs = next_log_probs(text)
            text.append(int(log_probs.argmax()))
            expected.append(log_probs.max())
        assert found.tokens[row].tolist() == text[len(prompt) :]
        np.testing.assert_allclose(found.logprobs[row], expected, rtol=1e-4, atol=1e-5)
    assert found.lengths.tolist() == [10, 10, 10] and not found.stopped.any()


DRAWN = sampling.Options(max_new_tokens=12, end_ids=(4, 20), suppress_tokens=(0, 9), temperature=0.8, top_p=0.95)


def test_a_reply_depends_on_its_prompt_and_key_not_on_its_batch(params):
    together = draw(params, DRAWN)
    for row, prompt in enumerate(PROMPTS):
        alone = draw(params, DRAWN, [prompt], places=16, seeds=[row])
        assert np.array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def many(params):
    """Three hundred replies to each prompt."""
    options = sampling.Options(
        max_new_tokens=12,
        num_return_sequences=300,
        end_ids=(4, 20),
        suppress_tokens=(0, 9),
        temperature=0.8,
        top_p=0.95,
    )
    return draw(params, options)


def test_replies_of_one_prompt_stand_together_and_differ(many, params):
    assert many.tokens.shape == (900, 12)
    for first in (0, 300, 600):
        assert len({row.tobytes() for row in many.tokens[first : first + 300]}) > 200
    # Row r of prompt n is at n × R + r: it is the reply that this prompt draws alone with that row's key.
    alone = draw(params, DRAWN, [PROMPTS[1]], places=16, seeds=[300 + 17])
    assert np.array_equal(alone.tokens[0], many.tokens[317])


def test_an_end_token_ends_the_reply_and_is_not_part_of_it(many):
    assert 0 < many.stopped.sum() < len(many.stopped), "the test sees both ends"
    for tokens, length, stopped in zip(many.tokens, many.lengths, many.stopped, strict=True):
        assert not set(tokens[:length].tolist()) & {4, 20}
        assert not tokens[length:].any()
        assert stopped == (length < 12)


def test_suppressed_and_padding_tokens_never_appear(many):
    real = many.tokens[np.arange(12)[None] < many.lengths[:, None]]
    assert not np.isin(real, [0, 9]).any()
    assert real.max() < 37
    assert len(np.unique(real)) > 20, "the test sees most of the vocabulary"


def test_logprobs_are_the_models_own_scores_of_every_token_and_the_end(many, params):
    """Under the unmodified model: temperature, nucleus and suppression change the draw, not the score."""
    rows = [0, 1, 2, 301, 302, 640, 641, *np.flatnonzero(~many.stopped)[:3].tolist()]
    texts, starts = [], []
    for row in rows:
        prompt, reply = PROMPTS[row // 300], many.tokens[row, : many.lengths[row]].tolist()
        # Which of the two end tokens it was is not recorded; score both and take the one that fits.
        endings = [[4], [20]] if many.stopped[row] else [[]]
        texts.append([[*prompt, *reply, *ending] for ending in endings])
        starts.append(len(prompt))
    score = jax.jit(step.score, static_argnums=0)
    for row, candidates, start in zip(rows, texts, starts, strict=True):
        fits = []
        for text in candidates:
            weights = np.r_[np.zeros(start), np.ones(len(text) - start)]
            packed = stack([assemble([(np.array(text), weights)], 24)], 1, 24)
            nll = np.asarray(score(SHAPE, params, packed))[0]
            expected = np.zeros(12)
            expected[: len(text) - start] = -nll[packed["loss_weights"][0] > 0]
            fits.append(np.allclose(many.logprobs[row], expected, rtol=1e-4, atol=1e-5))
        assert any(fits), (candidates, many.logprobs[row])


@pytest.fixture
def decoded(monkeypatch):
    """How many steps the loop really took, counted where they run."""
    taken = []
    decode = model.decode

    def counted(*arguments):
        jax.debug.callback(lambda: taken.append(1))
        return decode(*arguments)

    monkeypatch.setattr(model, "decode", counted)
    return taken


def test_the_loop_ends_with_the_longest_reply_and_empty_places_do_not_prolong_it(params, decoded):
    # Other options than elsewhere, so that this is compiled with the counter.
    options = sampling.Options(max_new_tokens=30, end_ids=tuple(range(0, 37, 2)), top_k=30)
    replies = draw(params, options, [*PROMPTS, [], []])
    jax.effects_barrier()
    longest = int(replies.lengths.max())
    assert replies.stopped[:3].all() and 0 < longest < 20
    # The first token comes from the prompt's own pass; the end token of the longest reply is the last one drawn.
    assert len(decoded) == longest
    assert not (replies.tokens[3:].any() or replies.lengths[3:].any() or replies.logprobs[3:].any())
    assert not replies.stopped[3:].any()

    decoded.clear()
    draw(params, options, [[]] * 5)
    jax.effects_barrier()
    assert not decoded, "a batch of empty places takes no step"


# In chunks ------------------------------------------------------------------------------------------------------------


CHUNKED = sampling.Options(
    max_new_tokens=14, num_return_sequences=2, end_ids=(4, 20), temperature=0.8, max_length=17, repetition_penalty=1.2
)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(strategies.lists(strategies.integers(0, 20), min_size=1, max_size=20), strategies.integers(0, 50))
def test_chunks_of_any_sizes_give_what_one_call_gives(params, sizes, seed):
    prompts = [*PROMPTS, []]
    whole = draw(params, CHUNKED, prompts, seeds=range(seed, seed + 8))
    state = start(SHAPE, CHUNKED, params, *batch(CHUNKED, prompts, seeds=range(seed, seed + 8)))
    for size in [*sizes, 14]:
        before, number, done = on_host(sampling.replies(state)), int(state.step) + 1, np.array(state.done_B)
        state = advance(SHAPE, CHUNKED, params, state, np.int32(size))
        after = on_host(sampling.replies(state))
        assert int(state.step) + 1 <= number + size, "no more tokens than asked for"
        assert bool(state.done_B.all()) or int(state.step) + 1 == number + size, "and no fewer"
        # What is drawn stands: complete rows do not change, the others only grow.
        for old, new in zip(before, after, strict=True):
            assert np.array_equal(new[done], old[done])
        assert np.array_equal(after.logprobs[:, :number], before.logprobs[:, :number])
        assert np.array_equal(after.tokens[:, :number], before.tokens[:, :number])
    assert state.done_B.all()
    for found, expected in zip(sampling.replies(state), whole, strict=True):
        assert np.array_equal(found, expected)


def test_chunks_share_one_compiled_function_and_the_cache_stays_in_place(params):
    state = start(SHAPE, CHUNKED, params, *batch(CHUNKED, [*PROMPTS, []]))
    place = state.cache[0][0].unsafe_buffer_pointer()
    for steps in (1, 3, 2):
        state = advance(SHAPE, CHUNKED, params, state, np.int32(steps))
        assert state.cache[0][0].unsafe_buffer_pointer() == place
    assert TRACED.count(CHUNKED) == 1


def test_unstacked_parameters_give_the_same_replies(params):
    flat = dataclasses.replace(SHAPE, scan_layers=False)
    keys = batch(DRAWN)
    found = sample(flat, DRAWN, model.unstack(SHAPE, params), *keys)
    assert np.array_equal(found.tokens, draw(params, DRAWN).tokens)


def test_rows_that_the_caller_ends_take_no_further_token(params):
    arguments = batch(CHUNKED, [*PROMPTS, []])
    whole = on_host(sample(SHAPE, CHUNKED, params, *arguments))
    state = advance(SHAPE, CHUNKED, params, start(SHAPE, CHUNKED, params, *arguments), np.int32(2))
    longest = int(np.argmax(whole.lengths[:6]))
    ended = np.arange(8) == longest
    assert whole.lengths[longest] > 3, "the test ends a row that would go on"
    state = advance(SHAPE, CHUNKED, params, state._replace(done_B=state.done_B | ended), np.int32(3))
    assert int(state.step) + 1 == 6
    state = advance(SHAPE, CHUNKED, params, state._replace(done_B=jnp.ones(8, bool)), np.int32(14))
    assert int(state.step) + 1 == 6, "where all rows are ended no step is taken"
    found = on_host(sampling.replies(state))
    for row in range(6):
        kept = min(whole.lengths[row], 3 if ended[row] else 6)
        assert found.lengths[row] == kept
        assert np.array_equal(found.tokens[row], np.where(np.arange(14) < kept, whole.tokens[row], 0))
    assert np.array_equal(found.logprobs[~ended, :6], whole.logprobs[~ended, :6])
    cut = found.logprobs[longest]
    assert np.array_equal(cut[:3], whole.logprobs[longest, :3]) and not cut[3:].any()
    assert not found.stopped[longest]


# Refilled -------------------------------------------------------------------------------------------------------------


REFILLED = sampling.Options(
    max_new_tokens=6, num_return_sequences=2, end_ids=(4, 20), temperature=0.9, top_p=0.95, max_length=12,
    repetition_penalty=1.2, no_repeat_ngram_size=2, bad_words_ids=((7,), (8, 9)), min_new_tokens=2,
)  # fmt: skip
refill = jax.jit(sampling.refill, static_argnums=(0, 1), donate_argnums=3, compiler_options=FAST)
ROWS = 6


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(strategies.data())
def test_rows_refilled_at_any_time_reply_as_in_a_batch_of_their_own(params, data):
    """Whatever is refilled with what and when; a place without a prompt, or a row that does not exist, holds nothing.

    Prompts fill their places and replies take all of theirs, so that the ring is as full as it can be.
    """
    key = iter(range(data.draw(strategies.integers(0, 1000)), 10_000))
    state = sampling.empty(SHAPE, REFILLED, params, ROWS, 8)
    assert state.done_B.all()
    expected: list[Any] = [None] * ROWS
    for _ in range(data.draw(strategies.integers(1, 6))):
        rows = data.draw(strategies.permutations(range(ROWS + 2)))[:4]
        texts = strategies.lists(strategies.integers(0, 36), min_size=0, max_size=8)
        prompts, seeds = [data.draw(texts) for _ in range(2)], [next(key) for _ in range(4)]
        arguments = batch(REFILLED, prompts, seeds=seeds)
        started = on_host(sampling.replies(state))
        state, before = refill(SHAPE, REFILLED, params, state, np.array(rows, np.int32), *arguments)
        alone = on_host(sample(SHAPE, REFILLED, params, *arguments))
        for place, row in enumerate(rows):
            if row < ROWS:
                expected[row] = [array[place] for array in alone]
                for old, shown in zip(started, before, strict=True):
                    assert np.array_equal(shown[place], old[row])
        state = advance(SHAPE, REFILLED, params, state, np.int32(data.draw(strategies.integers(0, 9))))
    state = advance(SHAPE, REFILLED, params, state, np.int32(6))
    assert state.done_B.all()
    found = on_host(sampling.replies(state))
    for row, alone in enumerate(expected):
        tokens, length, logprobs, stopped = alone or (0, 0, 0.0, False)
        assert (found.lengths[row], found.stopped[row]) == (length, stopped)
        assert (found.tokens[row] == tokens).all()
        np.testing.assert_allclose(found.logprobs[row], np.broadcast_to(logprobs, 6), rtol=1e-4, atol=1e-5)


def test_the_loop_stops_when_as_many_rows_are_done_as_asked_for(params):
    arguments = batch(CHUNKED)
    lengths = np.sort(draw(params, CHUNKED).lengths + draw(params, CHUNKED).stopped)
    assert lengths[1] < lengths[3] < lengths[5]
    state = start(SHAPE, CHUNKED, params, *arguments)
    for enough in (2, 4, 6):
        state = jax.jit(sampling.advance, static_argnums=(0, 1), compiler_options=FAST)(
            SHAPE, CHUNKED, params, state, np.int32(14), np.int32(enough)
        )
        assert int(state.step) + 1 == lengths[enough - 1]


def test_prompts_that_the_ring_has_no_room_for_are_refused(params):
    state = sampling.empty(SHAPE, REFILLED, params, ROWS, 8)
    with pytest.raises(ValueError, match="9 places of a prompt do not fit into 14 slots"):
        refill(SHAPE, REFILLED, params, state, np.arange(6), *batch(REFILLED, places=9))


# Limits and processors ------------------------------------------------------------------------------------------------


def test_max_length_bounds_prompt_and_reply_of_every_row(params):
    """A prompt that is as long as that gets no reply. A limit cuts a reply and does not change it."""
    seeds = (0, 0, 0)
    longer = draw(params, DRAWN, seeds=seeds)
    found = draw(params, dataclasses.replace(DRAWN, max_length=6), seeds=seeds)
    limits = np.array([3, 0, 5])
    assert (longer.lengths >= limits).all(), "the limits are what ends the replies"
    assert found.lengths.tolist() == limits.tolist() and not found.stopped.any()
    for row, limit in enumerate(limits):
        assert np.array_equal(found.tokens[row], np.where(np.arange(12) < limit, longer.tokens[row], 0))
        expected = np.where(np.arange(12) < limit, longer.logprobs[row], 0.0)
        np.testing.assert_allclose(found.logprobs[row], expected, rtol=1e-4, atol=1e-5)


def test_a_forced_end_stands_at_every_rows_own_limit(params):
    forced = {"max_new_tokens": 7, "max_length": 9, "end_ids": (20,), "forced_eos_token_id": 20}
    found, free = draw(params, dataclasses.replace(GREEDY, **forced)), draw(params, GREEDY)
    limits = np.array([6, 3, 7])
    assert not (free.tokens[:, :7] == 20).any(), "the end comes from its being forced"
    assert found.stopped.all()
    assert found.lengths.tolist() == (limits - 1).tolist()
    for row, limit in enumerate(limits):
        assert np.array_equal(found.tokens[row, : limit - 1], free.tokens[row, : limit - 1])
        assert found.logprobs[row, limit - 1] < 0 and not found.logprobs[row, limit:].any()


def test_no_reply_ends_before_its_least_length(params):
    drawn = draw(params, sampling.Options(max_new_tokens=20, end_ids=tuple(range(0, 37, 2)), min_length=9, top_k=30))
    sizes = [len(prompt) + length for prompt, length in zip(PROMPTS, drawn.lengths, strict=True)]
    assert drawn.stopped.all() and min(sizes) == 9


def count_up(scores_BV, sequences_BS, lengths_B):
    """Allows only the number after the text's last token, which it reads where prompt and reply have been joined."""
    last_B = jnp.take_along_axis(sequences_BS, lengths_B[:, None] - 1, axis=1)
    return jnp.where(jnp.arange(scores_BV.shape[1])[None] == last_B + 1, scores_BV, -jnp.inf)


def length_of_text(scores_BV, sequences_BS, lengths_B):
    """Allows only the token that is the length of the text."""
    return jnp.where(jnp.arange(scores_BV.shape[1])[None] == lengths_B[:, None], 0.0, -jnp.inf)


def flat(scores_BV, sequences_BS, lengths_B):
    """Makes all scores equal, those of padding too."""
    return jnp.zeros_like(scores_BV)


def test_custom_processors_see_each_rows_own_text(params):
    counted = draw(params, sampling.Options(max_new_tokens=6, processors=(count_up,)))
    measured = draw(params, sampling.Options(max_new_tokens=6, do_sample=False, processors=(length_of_text,)))
    for row, prompt in enumerate(PROMPTS):
        assert counted.tokens[row].tolist() == [prompt[-1] + 1 + i for i in range(6)]
        assert measured.tokens[row].tolist() == [len(prompt) + i for i in range(6)]
    assert (counted.logprobs < -0.1).all(), "the score is the unmodified model's"


def test_the_last_processor_decides_but_cannot_bring_in_padding_tokens(params):
    options = sampling.Options(max_new_tokens=20, num_return_sequences=40, processors=(length_of_text, flat))
    drawn = draw(params, options)
    assert drawn.tokens.max() == 36
    assert len(np.unique(drawn.tokens)) == 37, "all tokens are equally likely"


def test_beams_are_asked_of_the_beam_search():
    options = sampling.Options(max_new_tokens=4, num_beams=2, do_sample=False)
    with pytest.raises(ValueError, match=r"num_beams 2: sampling has no beams; see beam_search\.search"):
        start(SHAPE, options, {}, *batch(options))


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "new_tokens"),
    [({}, 48), ({"max_new_tokens": 7}, 7), ({"max_length": 30}, 30), ({"max_new_tokens": 7, "max_length": 30}, 7)],
)
def test_the_longest_reply_follows_from_both_limits(values, new_tokens):
    assert config.Sampling.model_validate(values).new_tokens == new_tokens


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"num_beams": 0}, "num_beams"),
        ({"early_stopping": "always"}, "early_stopping"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens 5 is more than max_new_tokens 4"),
        ({"max_length": 4, "min_new_tokens": 5}, "min_new_tokens 5 is more than max_length 4"),
        ({"min_new_tokens": 49}, "min_new_tokens 49 is more than the default of 48; raise max_new_tokens"),
        ({"max_length": 4, "min_length": 5}, "min_length 5 is more than max_length 4"),
        ({"num_beams": 4}, "num_beams 4 takes the likeliest replies; set do_sample to false"),
        ({"suppress_tokens": [3, -1]}, "suppress_tokens are token ids from 0 to 999999, got -1"),
        ({"begin_suppress_tokens": [-2]}, "begin_suppress_tokens are token ids from 0 to 999999, got -2"),
        ({"suppress_tokens": [3], "forced_eos_token_id": 3}, "forced_eos_token_id 3 is among suppress_tokens"),
        ({"stop": [""]}, "stop has an empty text"),
        ({"bad_words": ["a", ""]}, "bad_words has an empty text"),
        ({"sequence_bias": {"": 1.0}}, "sequence_bias has an empty text"),
        ({"sequence_bias": {"a": math.nan}}, "sequence_bias of 'a' is -.inf or between ±1,000,000, got nan"),
        ({"sequence_bias": {"a": math.inf}}, "sequence_bias of 'a' is -.inf or between ±1,000,000, got inf"),
    ],
)
def test_settings_that_nothing_can_satisfy_are_refused_and_named(values, says):
    with pytest.raises(pydantic.ValidationError) as caught:
        config.Sampling.model_validate(values)
    assert says in str(caught.value)


def test_settings_of_every_field_are_accepted():
    """A length bound in one form does not contradict a least length in the other, which depends on the prompt."""
    values = {
        "max_new_tokens": 4, "max_length": 10, "min_length": 20, "min_new_tokens": 4, "do_sample": False,
        "min_p": 0.1, "typical_p": 0.5, "repetition_penalty": 0.5, "no_repeat_ngram_size": 3, "bad_words": ["a b"],
        "sequence_bias": {"a": -math.inf, "b": 2}, "suppress_tokens": [1], "begin_suppress_tokens": [2],
        "forced_bos_token_id": 0, "forced_eos_token_id": 5, "stop": ["\n"], "num_beams": 4, "length_penalty": -1,
        "early_stopping": "never",
    }  # fmt: skip
    settings = config.Sampling.model_validate(values)
    assert settings.early_stopping == "never" and settings.sequence_bias == {"a": -math.inf, "b": 2.0}


# The distribution -----------------------------------------------------------------------------------------------------


def test_frequencies_follow_the_filtered_distribution(params, next_log_probs):
    number = 4000
    options = sampling.Options(1, num_return_sequences=number, temperature=1.5, top_k=15, top_p=0.8)
    found = np.bincount(draw(params, options, [PROMPTS[0]]).tokens[:, 0], minlength=37)

    probabilities = np.exp(next_log_probs(PROMPTS[0]) / 1.5)
    likely = probabilities >= np.sort(probabilities)[-15]
    probabilities = np.where(likely, probabilities, 0.0) / probabilities[likely].sum()
    nucleus = np.array([probabilities[probabilities > own].sum() < 0.8 for own in probabilities])
    assert 5 < (likely & nucleus).sum() < 15, "both filters take something"
    expected = np.where(likely & nucleus, probabilities, 0.0)
    expected *= number / expected.sum()
    assert not found[expected == 0].any()
    cells = expected > 0
    assert expected[cells].min() > 5, "the chi-square approximation holds"
    statistic = ((found - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = cells.sum() - 1
    # Wilson & Hilferty 1931: the cube root of chi-square over its degrees is normal; 3.7 deviations are 1 in 10 000.
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.7 * spread**0.5) ** 3


def test_equally_likely_tokens_beyond_the_kth_are_not_drawn():
    """Where few tokens are kept, they are exactly k, whatever ties with the last of them."""
    scores_BV = jnp.zeros((2000, 64)).at[:, 7].set(1.0)
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(sampling._draw(sampling.Options(1, top_k=3), scores_BV, keys))
    assert set(drawn.tolist()) == {0, 1, 7}
    assert (drawn == 7).mean() == pytest.approx(math.e / (math.e + 2), abs=0.05)


@pytest.mark.parametrize("vocabulary", [1, 2, 37, 64])
def test_a_draw_over_the_whole_vocabulary_follows_the_softmax(vocabulary):
    """Whatever the size, banned tokens included: no token comes that cannot, and the others as often as they should."""
    scores_V = np.random.default_rng(vocabulary).normal(0, 1.5, vocabulary).astype(np.float32)
    scores_V[5::7] = -np.inf
    number = 20_000
    keys = jax.random.split(jax.random.key(vocabulary), number)
    drawn = np.asarray(sampling._categorical(jnp.broadcast_to(scores_V, (number, vocabulary)), keys))
    found = np.bincount(drawn, minlength=vocabulary)
    probabilities = np.exp(scores_V) / np.exp(scores_V).sum()
    assert len(found) == vocabulary and not found[probabilities == 0].any()
    deviations = np.sqrt(number * probabilities * (1 - probabilities)) + 1e-6
    assert (np.abs(found - number * probabilities) < 4.5 * deviations + 1).all()


def test_many_kept_tokens_are_drawn_as_often_as_few():
    """Above a size the draw goes over the whole vocabulary; what is kept and how often it comes is the same."""
    ranks = jnp.arange(2 * sampling._FEW, dtype=jnp.float32)
    scores_BV = jnp.broadcast_to(-ranks / 2, (4000, len(ranks)))
    keys = jax.random.split(jax.random.key(1), 4000)
    means = []
    for top_k in (sampling._FEW, sampling._FEW + 1):
        drawn = np.asarray(sampling._draw(sampling.Options(1, top_k=top_k, top_p=0.9), scores_BV, keys))
        assert set(drawn.tolist()) == set(range(5)), "five tokens hold nine tenths"
        means.append(drawn.mean())
    assert means[0] == pytest.approx(means[1], abs=0.12)


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_the_compiled_loop_does_not_copy_the_cache(params, rows):
    """A copy a step would cost as much as reading the whole conversation so far."""
    options = sampling.Options(max_new_tokens=9, do_sample=False)
    state = start(SHAPE, options, params, *batch(options, PROMPTS[:rows]))
    key_RHSK = state.cache[0][0]
    assert key_RHSK.shape[0] == rows
    program = advance.lower(SHAPE, options, params, state, np.int32(4)).compile().as_text() or ""
    assert " while(" in program
    cache_shapes = [",".join(map(str, shape)) for shape in (key_RHSK.shape, key_RHSK.shape[1:])]
    copies = [line for line in program.splitlines() if " copy(" in line and any(f"[{s}]" in line for s in cache_shapes)]
    assert not copies


def test_a_refill_writes_its_rows_into_the_cache_in_place(params):
    state = sampling.empty(SHAPE, REFILLED, params, ROWS, 8)
    arguments = batch(REFILLED, PROMPTS[:2])
    place = state.cache[0][0].unsafe_buffer_pointer()
    shape = ",".join(map(str, state.cache[0][0].shape))
    program = refill.lower(SHAPE, REFILLED, params, state, np.arange(4), *arguments).compile().as_text() or ""
    assert not [line for line in program.splitlines() if " copy(" in line and f"[{shape}]" in line.split(" copy(")[0]]
    state, _ = refill(SHAPE, REFILLED, params, state, np.arange(4), *arguments)
    assert state.cache[0][0].unsafe_buffer_pointer() == place
