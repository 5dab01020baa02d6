"""Beam search finds the replies that Hugging Face's `generate` finds, token for token and in the same order."""

from typing import Any

import jax
import numpy as np
import pytest
import reference
from reference import torch

from ssl_jax import beam_search, model, sampling

VOCABULARY, BEAMS, NEW_TOKENS = 97, 4, 60
PROMPTS = ([77], [3, 3, 61, 17, 29, 54, 33, 71, 2, 96])


@pytest.fixture(scope="module")
def network() -> Any:
    return reference.network(6.0, vocab_size=VOCABULARY, n_positions=80, n_embd=32, n_layer=2, n_head=4)


@pytest.fixture(scope="module")
def ours(network: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[model.GPT2, model.Params]:
    return reference.imported(network, tmp_path_factory.mktemp("network"))


search = jax.jit(beam_search.search, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})

CASES: dict[str, dict[str, Any]] = {
    "no end token": dict(end_ids=()),
    "one end token": dict(end_ids=(68,)),
    "short replies": dict(end_ids=(42, 7, 19), length_penalty=-1.0),
    "long replies": dict(end_ids=(42, 7, 19), length_penalty=2.0),
    "many end tokens": dict(end_ids=tuple(range(0, VOCABULARY, 3)), length_penalty=1.5, early_stopping="never"),
    "no length penalty": dict(end_ids=(42, 7), length_penalty=0.0),
    "early": dict(end_ids=(42, 7, 19), early_stopping=True),
    "never early": dict(end_ids=(68,), early_stopping="never"),
    "never early, short replies": dict(end_ids=(42, 7, 19), early_stopping="never", length_penalty=-0.5),
    "repetition": dict(end_ids=(42,), repetition_penalty=1.3),
    "n-grams": dict(end_ids=(42,), no_repeat_ngram_size=2),
    "total length": dict(end_ids=(42,), max_length=30, min_length=20),
    "many options": dict(
        end_ids=(42, 7), no_repeat_ngram_size=3, repetition_penalty=1.1, min_new_tokens=12,
        forced_bos_token_id=33, forced_eos_token_id=7, suppress_tokens=(5, 11), begin_suppress_tokens=(1, 2, 3),
        bad_words_ids=((9,), (10, 12)), sequence_bias=(((30,), 1.5), ((8, 31), -2.0)), length_penalty=0.5,
    ),
}  # fmt: skip


def generate(network: Any, prompt: list[int], fields: dict[str, Any]) -> list[list[int]]:
    """Hugging Face's replies to one prompt, best first, end tokens included."""
    theirs = dict(fields, eos_token_id=list(fields["end_ids"]) or None)
    del theirs["end_ids"]
    if "bad_words_ids" in theirs:
        theirs["bad_words_ids"] = [list(word) for word in theirs["bad_words_ids"]]
    if "sequence_bias" in theirs:
        theirs["sequence_bias"] = dict(theirs["sequence_bias"])
    if "max_length" not in theirs:
        theirs["max_new_tokens"] = NEW_TOKENS
    tokens = torch.tensor([prompt])
    found = network.generate(
        tokens, attention_mask=torch.ones_like(tokens), num_beams=BEAMS, num_return_sequences=BEAMS, do_sample=False,
        pad_token_id=VOCABULARY, **theirs,
    )  # fmt: skip
    return [row[row != VOCABULARY].tolist() for row in found[:, len(prompt) :]]


def log_probs(network: Any, prompt: list[int], reply: list[int]) -> np.ndarray:
    """What the reference gives each token of a reply."""
    with torch.no_grad():
        scores = network(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return scores[torch.arange(len(reply)), torch.tensor(reply)].numpy()


@pytest.mark.parametrize("case", CASES)
def test_replies_are_those_of_generate(network, ours, case):
    """Prompts of different lengths in one batch of ours, each alone there; all four replies in their order."""
    fields = CASES[case]
    shape, params = ours
    options = sampling.Options(
        max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=BEAMS, num_return_sequences=BEAMS, **fields
    )
    prompts = np.full((len(PROMPTS), 12), 13, np.int32)
    for row, prompt in enumerate(PROMPTS):
        prompts[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    replies = sampling.Replies(*map(np.asarray, search(shape, options, params, prompts, lengths)))

    expected = [(prompt, reply) for prompt in PROMPTS for reply in generate(network, prompt, fields)]
    assert max(len(set(reply)) for _, reply in expected) > 6, "the replies are not degenerate"
    for row, (prompt, reply) in enumerate(expected):
        stopped = reply[-1] in fields["end_ids"]
        assert replies.tokens[row].tolist() == [*reply[: len(reply) - stopped], *[0] * NEW_TOKENS][:NEW_TOKENS]
        assert (replies.lengths[row], replies.stopped[row]) == (len(reply) - stopped, stopped)
        np.testing.assert_allclose(replies.logprobs[row, : len(reply)], log_probs(network, prompt, reply), atol=1e-3)
        assert not replies.logprobs[row, len(reply) :].any()
