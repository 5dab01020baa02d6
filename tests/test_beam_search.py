"""Beam search finds the best replies, each prompt on its own, and takes no more steps than it needs."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import beam_search, model, sampling

SHAPE = model.GPT2(
    vocab_size=7, padded_vocab_size=8, n_positions=24, n_embd=16, n_layer=1, n_head=2, n_inner=32, scan_layers=False
)
PROMPTS = ([1, 2, 3], [5, 4, 0, 1, 6, 2], [5])


@pytest.fixture(scope="module")
def params():
    """Weights large enough that the replies are varied, without biases that would favor a token."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if leaf.ndim == 1:
            return jnp.full(leaf.shape, path[-1].key == "scale", leaf.dtype)
        return jnp.asarray(rng.normal(0.0, 0.5, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(functools.partial(model.init, SHAPE), jax.random.key(0))
    )


# Compiled fast rather than well: the arithmetic is the same.
compile = functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
search = compile(beam_search.search)


def options(**fields: Any) -> sampling.Options:
    return sampling.Options(**{"max_new_tokens": 10, "do_sample": False, "num_beams": 3, **fields})


def find(params, options, prompts=PROMPTS, places=8, search: Any = search) -> Any:
    """Host arrays of the replies to `prompts`."""
    tokens = np.full((len(prompts), places), 6, np.int32)  # what stands behind a prompt must not matter
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return sampling.Replies(*map(np.asarray, search(SHAPE, options, params, tokens, lengths)))


def spoken(replies: Any, row: int) -> list[int]:
    return replies.tokens[row, : replies.lengths[row]].tolist()


@pytest.fixture(scope="module")
def log_probs(params):
    """Log-probabilities `[rows, T, 7]` of what follows every token of texts of one length, by a full forward pass."""

    @jax.jit
    def compute(texts):
        positions = jnp.broadcast_to(jnp.arange(texts.shape[1])[None], texts.shape)
        hidden = model.forward(SHAPE, params, texts, positions, jnp.ones_like(texts))
        return jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, params["wte"]["embedding"])[..., :7])

    return compute


# The best replies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_penalty", [1.0, -1.5])
def test_with_a_beam_for_every_text_the_replies_are_the_best_of_all_texts(params, log_probs, length_penalty):
    """All replies of up to three tokens, end tokens included, ranked by log-probability ÷ length^penalty."""
    ends, prompt = {1, 4}, PROMPTS[0]
    texts = np.array([[*prompt, *reply] for reply in itertools.product(range(7), repeat=3)])
    scores = np.asarray(log_probs(texts), np.float64)
    ranked: dict[tuple[int, ...], float] = {}
    for text, of_text in zip(texts[:, 3:].tolist(), scores, strict=True):
        length = next((place + 1 for place, token in enumerate(text) if token in ends), 3)
        ranked[tuple(text[:length])] = (
            sum(of_text[2 + place, text[place]] for place in range(length)) / length**length_penalty
        )
    best = sorted(ranked, key=ranked.__getitem__, reverse=True)[:6]

    fields = dict(max_new_tokens=3, num_beams=49, num_return_sequences=6, end_ids=(1, 4), early_stopping="never")
    replies = find(params, options(**fields, length_penalty=length_penalty), [prompt])
    for row, text in enumerate(best):
        stopped = text[-1] in ends
        assert spoken(replies, row) == list(text[: len(text) - stopped])
        assert replies.stopped[row] == stopped
        total = replies.logprobs[row].sum() / len(text) ** length_penalty
        assert total == pytest.approx(ranked[text], rel=1e-4)
    assert len(set(map(len, best))) > 1, "the best replies have different lengths"


def test_one_beam_is_greedy(params):
    fields = dict(num_beams=1, end_ids=(4,), max_length=14)
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    greedy = functools.partial(compile(sampling.sample), SHAPE)

    def sample(_, options, params, tokens, lengths):
        return greedy(options, params, tokens, lengths, keys)

    for found, expected in zip(
        find(params, options(**fields)), find(params, options(**fields), search=sample), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


RICH = options(num_return_sequences=2, end_ids=(4,), repetition_penalty=1.2, length_penalty=2.0, max_length=14)


def test_replies_depend_on_their_prompt_not_on_its_batch(params):
    together = find(params, RICH)
    assert len(set(together.lengths.tolist())) > 1, "the searches end at different times"
    mixed = find(params, RICH, [PROMPTS[1], [6] * 12, PROMPTS[2], [], PROMPTS[0]], places=12)
    alone = [find(params, RICH, [prompt, [], []]) for prompt in PROMPTS]
    for number in range(3):
        for other, first in ((alone[number], 0), (mixed, (8, 0, 4)[number])):
            for found, expected in zip(other, together, strict=True):
                np.testing.assert_allclose(found[first : first + 2], expected[2 * number :][:2], rtol=1e-4, atol=1e-4)


def test_logprobs_are_the_models_own_of_each_token_and_the_end(params, log_probs):
    """Under the unmodified model: processors change the choice, not the score."""
    replies = find(params, RICH)
    assert 0 < replies.stopped.sum() < 6, "the test sees both ends"
    for row in range(6):
        prompt, text = PROMPTS[row // 2], [*spoken(replies, row), *[4] * int(replies.stopped[row])]
        scores = np.asarray(log_probs(np.array([[*prompt, *text, *[0] * (24 - len(prompt) - len(text))]])))[0]
        expected = [scores[len(prompt) - 1 + place, token] for place, token in enumerate(text)]
        np.testing.assert_allclose(replies.logprobs[row, : len(text)], expected, atol=1e-4)
        assert not replies.logprobs[row, len(text) :].any()
        assert not replies.tokens[row, replies.lengths[row] :].any()


def test_max_length_limits_prompt_and_reply_of_each_prompt_together(params):
    replies = find(params, options(max_length=6))
    assert replies.lengths.tolist() == [3, 0, 5]
    assert not replies.stopped.any() and not replies.logprobs[1].any()


def test_processors_see_each_beams_own_text(params):
    """A processor that bans what the prompt and its own beam have said leaves no token said twice."""

    def never_twice(scores_BV, sequences_BS, lengths_B):
        said_BSV = jax.nn.one_hot(sequences_BS, scores_BV.shape[1], dtype=bool)
        valid_BS = jnp.arange(sequences_BS.shape[1])[None] < lengths_B[:, None]
        return jnp.where((said_BSV & valid_BS[..., None]).any(axis=1), -jnp.inf, scores_BV)

    prompts = ([1, 2], [5])
    replies = find(params, options(max_new_tokens=5, num_return_sequences=3, processors=(never_twice,)), prompts)
    assert replies.lengths.tolist() == [5] * 6
    for row in range(6):
        text = [*prompts[row // 3], *spoken(replies, row)]
        assert len(set(text)) == len(text)
    assert len({tuple(spoken(replies, row)) for row in range(6)}) == 6


# The work it takes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def work(monkeypatch):
    """Rows that `prefill` and `decode` really computed, one entry a call."""
    done = {"prefill": [], "decode": []}

    def counted(name):
        function = getattr(model, name)

        def call(shape, layers, tokens, *rest):
            jax.debug.callback(lambda: done[name].append(tokens.shape[0]))
            return function(shape, layers, tokens, *rest)

        return call

    for name in done:
        monkeypatch.setattr(model, name, counted(name))
    return done


def test_a_prompt_is_read_once_and_the_search_ends_when_all_prompts_are_done(params, work):
    # Other options than elsewhere, so that this is compiled with the counter.
    early = options(max_new_tokens=15, end_ids=(0, 4), early_stopping=True, num_return_sequences=3)
    replies = find(params, early, [*PROMPTS, [], []])
    jax.effects_barrier()
    assert work["prefill"] == [5]
    assert replies.stopped[:9].all()
    # Its first token comes from the prompt's own pass, its end token from the last step.
    assert work["decode"] == [15] * int(replies.lengths.max())
    assert replies.lengths.max() < 14
    for empty in replies:
        assert not empty[9:].any()

    work["decode"].clear()
    find(params, early, [[]] * 5)
    jax.effects_barrier()
    assert not work["decode"], "a batch of empty places takes no step"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(do_sample=True), "do_sample"),
        (dict(num_return_sequences=4), "num_return_sequences 4 is more than num_beams 3"),
    ],
)
def test_what_a_beam_search_cannot_do_is_refused(params, fields, message):
    with pytest.raises(ValueError, match=message):
        beam_search.search(SHAPE, options(**fields), params, jnp.ones((1, 3), jnp.int32), jnp.array([3]))
