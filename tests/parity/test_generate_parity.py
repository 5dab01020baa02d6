"""Replies, their log-probabilities and their frequencies are those of Hugging Face's `generate`.

The reference answers each prompt alone; ours answers all of them in one batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import imported, network, torch

from ssl_jax import model, sampling

VOCABULARY = 211
PROMPTS = ([11, 5, 23, 142, 8, 90], [77], [3, 3, 161, 17, 29, 54, 133, 71, 2, 96])
NETWORKS: dict[str, dict[str, Any]] = {
    "default": {},
    "untied, gelu, narrow": dict(tie_word_embeddings=False, activation_function="gelu", n_inner=80),
    "Mistral": dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, layer_norm_epsilon=1e-3),
}


@functools.cache
def reference(name: str) -> Any:
    return network(
        2.0, vocab_size=VOCABULARY, n_positions=224, n_embd=48, n_layer=2, n_head=4, bos_token_id=None,
        eos_token_id=None, **NETWORKS[name],
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[model.GPT2, model.Params]]:
    """The reference of that name as it is imported."""

    @functools.cache
    def load(name):
        return imported(reference(name), tmp_path_factory.mktemp("network"))

    return load


sample = jax.jit(sampling.sample, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})


def reply(ours, options, prompts=PROMPTS, seed=0) -> sampling.Replies:
    """Our replies to all prompts at once, on the host."""
    tokens = np.full((len(prompts), 12), 13, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    keys = jax.random.split(jax.random.key(seed), len(prompts) * options.num_return_sequences)
    return sampling.Replies(*map(np.asarray, sample(ours[0], options, ours[1], tokens, lengths, keys)))


def generate(network, prompt, *, end_ids=(), processors=(), **fields) -> Any:
    """Hugging Face's output for one prompt, with its scores, and `replies` without the prompt."""
    from transformers import LogitsProcessorList

    if "max_length" in fields:
        fields["max_new_tokens"] = None
    tokens = torch.tensor([prompt])
    found = network.generate(
        tokens, attention_mask=torch.ones_like(tokens), eos_token_id=list(end_ids) or None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, output_scores=True,
        logits_processor=LogitsProcessorList(processors), **fields,
    )  # fmt: skip
    found["reply"] = found.sequences[0, len(prompt) :].tolist()
    return found


def log_probs(logits, tokens) -> np.ndarray:
    """What the unmodified model says of every token."""
    scores = torch.log_softmax(torch.cat(logits), dim=-1)
    return scores[torch.arange(len(tokens)), torch.tensor(tokens)].numpy()


def assert_equal_replies(found, expected, end_ids) -> None:
    """Row for row: the tokens, whether an end token came, and the log-probability of each, the end token's included."""
    for row, theirs in enumerate(expected):
        stopped = theirs["reply"][-1] in end_ids
        length = len(theirs["reply"]) - stopped
        assert found.tokens[row, : found.lengths[row]].tolist() == theirs["reply"][:length]
        assert found.stopped[row] == stopped
        expected_log_probs = np.zeros(found.logprobs.shape[1])
        expected_log_probs[: length + stopped] = log_probs(theirs.logits, theirs["reply"])
        np.testing.assert_allclose(found.logprobs[row], expected_log_probs, rtol=1e-5, atol=2e-5)


# Greedy ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_two_hundred_likeliest_tokens_are_the_references(ours, name):
    network = reference(name)
    found = reply(ours(name), sampling.Options(max_new_tokens=200, do_sample=False))
    expected = [generate(network, prompt, do_sample=False, max_new_tokens=200) for prompt in PROMPTS]
    for theirs in expected:
        four_grams = set(zip(*(theirs["reply"][place:] for place in range(4)), strict=False))
        assert len(four_grams) > 150, "the text is varied"
        best_two = torch.cat(theirs.logits).topk(2).values
        assert (best_two[:, 0] - best_two[:, 1]).min() > 1e-3, "rounding decides nothing"
        scores = network.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)
        np.testing.assert_allclose(scores[0].numpy(), log_probs(theirs.logits, theirs["reply"]), atol=1e-5)
    assert found.lengths.tolist() == [200] * 3
    assert_equal_replies(found, expected, ())


def few(texts: list[list[int]]) -> tuple[int, ...]:
    """All tokens but a dozen, so that what is left must repeat itself."""
    return tuple(sorted(set(range(VOCABULARY)) - set(texts[0][:12])))


# Each makes its options from the plain replies, so that they matter, under the name of the one that must.
OPTIONS: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
    "repetition_penalty": lambda texts: {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": lambda texts: {"no_repeat_ngram_size": 2, "suppress_tokens": few(texts)},
    "bad_words_ids": lambda texts: {
        "bad_words_ids": ((texts[0][2],), tuple(texts[1][3:5]), tuple(texts[2][7:10]), (1, 2, 3, 4, 5))
    },
    "sequence_bias": lambda texts: {
        "sequence_bias": (((texts[0][2],), -9.0), (tuple(texts[1][3:5]), -12.0), ((30,), 3.0), ((30, 31), 9.0))
    },
    "suppress_tokens": lambda texts: {"suppress_tokens": tuple(text[place] for text in texts for place in (0, 4, 9))},
    "begin_suppress_tokens": lambda texts: {"begin_suppress_tokens": tuple(text[0] for text in texts)},
    "forced_bos_token_id": lambda texts: {"forced_bos_token_id": 42},
    "forced_eos_token_id": lambda texts: {"forced_eos_token_id": 42, "end_ids": (42, 43)},
    "end_ids": lambda texts: {"end_ids": tuple(text[place] for place, text in zip((4, 11, 23), texts, strict=True))},
    "min_new_tokens": lambda texts: {"min_new_tokens": 20, "end_ids": tuple(text[4] for text in texts)},
    "min_length": lambda texts: {"min_length": 14, "end_ids": tuple(text[4] for text in texts)},
    "max_length": lambda texts: {"max_length": 33},
}


@functools.cache
def plain_texts() -> list[list[int]]:
    return [generate(reference("default"), prompt, do_sample=False, max_new_tokens=32)["reply"] for prompt in PROMPTS]


@pytest.mark.parametrize("option", OPTIONS)
def test_likeliest_tokens_with_each_option_are_the_references(ours, option):
    fields = {"max_new_tokens": 32, "do_sample": False, **OPTIONS[option](plain_texts())}
    found = reply(ours("default"), sampling.Options(**fields))

    def theirs(**fields):
        if "bad_words_ids" in fields:
            fields["bad_words_ids"] = [list(word) for word in fields["bad_words_ids"]]
        if "sequence_bias" in fields:
            fields["sequence_bias"] = dict(fields["sequence_bias"])
        return [generate(reference("default"), prompt, **fields) for prompt in PROMPTS]

    expected = theirs(**fields)
    without = theirs(**{name: value for name, value in fields.items() if name != option})
    assert any(one["reply"] != other["reply"] for one, other in zip(expected, without, strict=True)), "it matters"
    assert_equal_replies(found, expected, fields.get("end_ids", ()))


def test_likeliest_tokens_with_a_custom_processor_are_the_references(ours):
    """After the built-in ones: what those have banned stays banned, since minus infinity plus a number is itself."""

    def towards_next(input_ids, scores):
        return scores + 6.0 * torch.nn.functional.one_hot((input_ids[:, -1] + 1) % VOCABULARY, VOCABULARY)

    def towards_next_ours(scores_BV, sequences_BS, lengths_B):
        last_B = jnp.take_along_axis(sequences_BS, lengths_B[:, None] - 1, axis=1)[:, 0]
        return scores_BV + 6.0 * jax.nn.one_hot((last_B + 1) % VOCABULARY, scores_BV.shape[1])

    fields: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "suppress_tokens": (79, 92, 98)}
    found = reply(ours("default"), sampling.Options(**fields, processors=(towards_next_ours,)))
    expected = [generate(reference("default"), prompt, **fields, processors=[towards_next]) for prompt in PROMPTS]
    steps = [two == one + 1 for text in expected for one, two in zip(text["reply"], text["reply"][1:], strict=False)]
    assert 0.1 < np.mean(steps) < 0.9, "the processor decides some tokens and the model others"
    assert_equal_replies(found, expected, ())


# Drawn ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=1.2, top_k=30, top_p=0.9),
        dict(temperature=1.2, min_p=0.05),
        dict(temperature=1.2, typical_p=0.8),
    ],
    ids=lambda fields: " ".join(fields),
)
def test_frequencies_are_those_of_the_references_distribution(ours, fields):
    """A chi-square test of 20,480 draws of one token."""
    from scipy import stats

    fields = {"top_k": 0, **fields}
    theirs = generate(reference("default"), PROMPTS[0], do_sample=True, max_new_tokens=1, **fields)
    probabilities = torch.softmax(theirs.scores[0][0].double(), dim=-1).numpy()
    kept = probabilities > 0
    assert 10 < kept.sum() < VOCABULARY, "the filters take some tokens and leave others"

    options = sampling.Options(max_new_tokens=1, num_return_sequences=4096, **fields)
    drawn = np.concatenate([reply(ours("default"), options, PROMPTS[:1], seed).tokens[:, 0] for seed in range(5)])
    found, expected = np.bincount(drawn, minlength=VOCABULARY), len(drawn) * probabilities
    assert not found[~kept].any()
    # The chi-square approximation asks for five expected in every cell: rare tokens are put together.
    rare = expected < 5
    found, expected = np.append(found[~rare], found[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue > 1e-3
