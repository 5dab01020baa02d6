"""A reply is what its model, prompt, options and key say: nothing more, and never more steps than needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import model, sampling, step
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
sample = jax.jit(sampling.sample, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})


def draw(params, options, prompts=PROMPTS, places=8, seeds=None):
    """Host arrays of the replies to `prompts`; row r has the key of `seeds[r]` (its own number by default)."""
    tokens = np.full((len(prompts), places), 33, np.int32)  # what stands behind a prompt must not matter
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    seeds = range(len(prompts) * options.num_return_sequences) if seeds is None else seeds
    keys = jax.vmap(jax.random.key)(jnp.array(list(seeds)))
    return sampling.Replies(*map(np.asarray, sample(SHAPE, options, params, tokens, lengths, keys)))


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


def test_greedy_reply_is_the_argmax_of_repeated_full_passes(params, next_log_probs):
    found = draw(params, sampling.Options(max_new_tokens=10, do_sample=False))
    for row, prompt in enumerate(PROMPTS):
        text, logprob = list(prompt), 0.0
        for _ in range(10):
            log_probs = next_log_probs(text)
            text.append(int(log_probs.argmax()))
            logprob += log_probs.max()
        assert found.tokens[row].tolist() == text[len(prompt) :]
        assert found.logprobs[row] == pytest.approx(logprob, rel=1e-4)
    assert found.lengths.tolist() == [10, 10, 10] and not found.stopped.any()


DRAWN = sampling.Options(max_new_tokens=12, end_ids=(4, 20), suppressed_ids=(0, 9), temperature=0.8, top_p=0.95)


def test_a_reply_depends_on_its_prompt_and_key_not_on_its_batch(params):
    together = draw(params, DRAWN)
    for row, prompt in enumerate(PROMPTS):
        alone = draw(params, DRAWN, [prompt], seeds=[row])
        wider = draw(params, DRAWN, [[9] * 16, prompt], places=16, seeds=[77, row])
        for other, place in ((alone, 0), (wider, 1)):
            assert np.array_equal(other.tokens[place], together.tokens[row])
            assert other.logprobs[place] == pytest.approx(together.logprobs[row], rel=1e-4)


@pytest.fixture(scope="module")
def many(params):
    """Three hundred replies to each prompt."""
    options = sampling.Options(
        max_new_tokens=12, num_return_sequences=300, end_ids=(4, 20), suppressed_ids=(0, 9), temperature=0.8, top_p=0.95
    )
    return draw(params, options)


def test_replies_of_one_prompt_stand_together_and_differ(many, params):
    assert many.tokens.shape == (900, 12)
    for first in (0, 300, 600):
        assert len({row.tobytes() for row in many.tokens[first : first + 300]}) > 200
    # Row r of prompt n is at n × R + r: it is the reply that this prompt draws alone with that row's key.
    alone = draw(params, DRAWN, [PROMPTS[1]], seeds=[300 + 17])
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


def test_logprob_is_the_models_own_score_of_reply_and_end(many, params):
    """Under the unmodified model: temperature, nucleus and suppression change the draw, not the score."""
    rows = [0, 1, 2, 301, 302, 640, 641, *np.flatnonzero(~many.stopped)[:3].tolist()]
    texts, expected_weights = [], []
    for row in rows:
        prompt, reply = PROMPTS[row // 300], many.tokens[row, : many.lengths[row]].tolist()
        # Which of the two end tokens it was is not recorded; score both and take the one that fits.
        endings = [[4], [20]] if many.stopped[row] else [[]]
        texts.append([[*prompt, *reply, *ending] for ending in endings])
        expected_weights.append(len(prompt))
    score = jax.jit(step.score, static_argnums=0)
    for row, candidates, start in zip(rows, texts, expected_weights, strict=True):
        found = []
        for text in candidates:
            weights = np.r_[np.zeros(start), np.ones(len(text) - start)]
            batch = stack([assemble([(np.array(text), weights)], 24)], 1, 24)
            found.append(-float((np.asarray(score(SHAPE, params, batch)) * batch["loss_weights"]).sum()))
        assert np.isclose(found, many.logprobs[row], rtol=1e-4).any(), (found, many.logprobs[row])


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


# The distribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (8, 1.0), (0, 0.7)])
def test_frequencies_follow_the_filtered_distribution(params, next_log_probs, top_k, top_p):
    number = 4000
    options = sampling.Options(1, num_return_sequences=number, temperature=1.5, top_k=top_k, top_p=top_p)
    found = np.bincount(draw(params, options, [PROMPTS[0]]).tokens[:, 0], minlength=37)

    probabilities = np.exp(next_log_probs(PROMPTS[0]) / 1.5)
    probabilities /= probabilities.sum()
    probabilities = np.where(numpy_keep(probabilities, top_k, top_p), probabilities, 0.0)
    expected = number * probabilities / probabilities.sum()
    assert not found[expected == 0].any()
    # Rare tokens are put together, as the chi-square approximation asks for five expected in every cell.
    rare = (expected > 0) & (expected < 5)
    cells = [(found[i], expected[i]) for i in np.flatnonzero(expected >= 5)]
    if rare.any():
        cells.append((found[rare].sum(), max(expected[rare].sum(), 1.0)))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom >= 4
    # Wilson & Hilferty 1931: the cube root of chi-square over its degrees is normal; 3.7 deviations are 1 in 10 000.
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.7 * spread**0.5) ** 3


def numpy_keep(probabilities, top_k, top_p):
    """Which tokens survive, by the definition, one row at a time."""
    keep = np.ones(len(probabilities), bool)
    if 0 < top_k < len(probabilities):
        keep = probabilities >= np.sort(probabilities)[-top_k]
    if top_p < 1:
        rest = np.where(keep, probabilities, 0.0) / probabilities[keep].sum()
        keep &= np.array([rest[rest > own].sum() < top_p for own in rest])
    return keep


@pytest.fixture(scope="module")
def logits():
    """Two hundred rows from flat to peaked, half of them full of ties, some with impossible tokens."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(200, 23)) * np.geomspace(1e-3, 30, 200)[:, None]
    rows[::2] = np.round(rows[::2])
    rows[5::7, ::3] = -np.inf
    rows[3] = 0.0
    rows[8] = np.where(np.arange(23) == 4, 0.0, -np.inf)
    return rows.astype(np.float32)


@pytest.mark.parametrize("top_k", [0, 1, 5, 23, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_filters_keep_what_their_definition_keeps(logits, top_k, top_p):
    filtered = np.asarray(jax.jit(sampling.filter_logits, static_argnums=(1, 2))(logits, top_k, top_p))
    checked = 0
    for row, found in zip(logits.astype(np.float64), filtered, strict=True):
        probabilities = np.exp(row - row.max())
        probabilities /= probabilities.sum()
        # A nucleus whose edge is within rounding of a token is decided by the last bit.
        keeps = [numpy_keep(probabilities, top_k, p) for p in ({1.0} if top_p == 1 else {top_p * 0.999, top_p * 1.001})]
        if all(np.array_equal(keep, keeps[0]) for keep in keeps):
            checked += 1
            expected = np.where(keeps[0], row, -np.inf)
            np.testing.assert_array_equal(found, expected.astype(np.float32))
        assert np.isfinite(found).any(), "nothing is left to draw"
    assert checked > 180
