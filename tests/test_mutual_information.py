"""Sums of log-probabilities are those of the model's own distributions, and the formula is that of its source."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config, mutual_information
from ssl_jax import model as gpt2
from ssl_jax.conversation import as_prompt
from ssl_jax.data import directions
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.errors import UserError
from ssl_jax.replies import Reply

TEXTS = ["is the apple red?", "yes, it is", "no idea <|backward|>"] * 3


@pytest.fixture(scope="module")
def model() -> DialogueModel:
    """Random and wide enough that what stands before a token matters."""
    tokenizer = DialogueTokenizer.fit(TEXTS, 300, direction_tokens=True)
    shape = gpt2.GPT2(tokenizer.vocab_size, 320, 64, 16, 1, 2, 32)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(gpt2.init, shape), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), leaf.dtype), shapes)
    return DialogueModel(shape, params, tokenizer)


CONTEXTS = (
    Dialogue((Turn("user", "is the apple red?"),)),
    Dialogue((Turn("system", "be"), Turn("user", "hm"), Turn("assistant", "so?"), Turn("user", "is it <|user|>"))),
)
PAIRS = [(context, reply) for context in CONTEXTS for reply in ("yes, it is", "<|backward|>", "", "yes, it is")]

_forward = jax.jit(gpt2.forward, static_argnums=0)


def naive(model: DialogueModel, opening: list[str | int], target: str) -> float:
    """The sum of log p of a text and its end of turn, behind an opening of texts and of ids of control tokens."""
    ids: list[int] = []
    for part in opening:
        ids += [part] if isinstance(part, int) else model.tokenizer.encode_text(part).tolist()
    first = len(ids)
    ids += [*model.tokenizer.encode_text(target).tolist(), model.tokenizer.end_of_turn_id]
    row, places = np.zeros((1, 64), np.int32), np.arange(64, dtype=np.int32)[None]
    row[0, : len(ids)] = ids
    hidden = _forward(model.shape, model.params, row, places, np.ones_like(row))[0]
    embedding = np.asarray(gpt2.output_embedding(model.params, hidden.dtype), np.float64)[: model.shape.vocab_size]
    logits = np.asarray(hidden, np.float64) @ embedding.T
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(log_p[place - 1, ids[place]] for place in range(first, len(ids))))


def by_hand(model: DialogueModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forward, prior and backward log-probabilities of `PAIRS`."""
    roles, end, back = model.tokenizer.role_ids, model.tokenizer.end_of_turn_id, model.tokenizer.backward_id
    assert back is not None
    forward, prior, backward = [], [], []
    for context, reply in PAIRS:
        opening = [part for turn in context.turns for part in (roles[turn.role], turn.content, end)]
        forward.append(naive(model, [*opening, roles["assistant"]], reply))
        prior.append(naive(model, [roles["assistant"]], reply))
        read = [back, roles["assistant"], reply, end, roles["user"]]
        backward.append(naive(model, read, context.turns[-1].content))
    return np.array(forward), np.array(prior), np.array(backward)


def test_log_probabilities_are_sums_over_the_models_own_distributions(model: DialogueModel) -> None:
    forward, prior, backward = by_hand(model)
    np.testing.assert_allclose(mutual_information.forward(model, PAIRS, 48), forward, rtol=1e-5)
    np.testing.assert_allclose(mutual_information.prior(model, [reply for _, reply in PAIRS]), prior, rtol=1e-5)
    np.testing.assert_allclose(mutual_information.backward(model, PAIRS), backward, rtol=1e-5)
    assert np.ptp(forward[[0, 4]]) > 0.1 and np.ptp(backward[[0, 1]]) > 0.1, "what stands before it matters"


@pytest.mark.parametrize(("prior_weight", "backward_weight"), [(0.0, 0.0), (1.0, 0.0), (0.5, 2.0)])
def test_the_score_is_the_formula_on_sums_by_hand(
    model: DialogueModel, prior_weight: float, backward_weight: float
) -> None:
    forward, prior, backward = by_hand(model)
    tokens = np.array([1 + len(model.tokenizer.encode_text(reply)) for _, reply in PAIRS])
    said = np.array([1 + len(model.tokenizer.encode_text(context.turns[-1].content)) for context, _ in PAIRS])
    expected = (forward - prior_weight * prior) / tokens + backward_weight * backward / said
    scores = mutual_information.score(
        model, PAIRS, prior_weight=prior_weight, backward_weight=backward_weight, max_prompt_tokens=48
    )
    np.testing.assert_allclose(scores, expected, rtol=1e-4)


class Counting:
    """A model that counts the dialogues it is asked to score, and finds every target equally unlikely."""

    def __init__(self, model: DialogueModel) -> None:
        self.shape, self.tokenizer, self.asked = model.shape, model.tokenizer, []

    def score_dialogues(self, dialogues: Sequence[EncodedDialogue], *, rows: int) -> np.ndarray:
        del rows
        self.asked.append(len(dialogues))
        return np.array([float(dialogue.loss_mask.sum()) for dialogue in dialogues])


def test_equal_replies_are_scored_once_and_what_weighs_nothing_not_at_all(model: DialogueModel) -> None:
    counting = Counting(model)
    replies = [reply for _, reply in PAIRS]
    assert (
        mutual_information.prior(counting, replies).tolist()
        == (-mutual_information.count_tokens(counting, replies)).tolist()
    )
    assert counting.asked == [len(set(replies))]
    counting.asked.clear()
    mutual_information.score(counting, PAIRS, prior_weight=0.0, backward_weight=0.0, max_prompt_tokens=48)
    assert counting.asked == [len(PAIRS)]


def test_what_is_longer_than_the_context_is_cut_to_it(model: DialogueModel) -> None:
    long = "x" * 200
    pairs = [(as_prompt(long), long)]
    counting = Counting(model)
    assert mutual_information.forward(counting, pairs, 40).tolist() == [-(64 - 40)]
    assert mutual_information.prior(counting, [long]).tolist() == [-(64 - 1)]
    assert mutual_information.backward(counting, pairs).tolist() == [-(64 - 32)]
    assert np.isfinite(mutual_information.backward(model, pairs)).all()


def test_backward_scores_need_a_model_that_reads_backwards(model: DialogueModel) -> None:
    plain = dataclasses.replace(model, tokenizer=DialogueTokenizer.fit(TEXTS, 300))
    with pytest.raises(UserError, match=r"tokenizer\.direction_tokens true.*train\.backward_fraction") as refused:
        mutual_information.backward(plain, PAIRS)
    assert str(refused.value).count("\n") <= 1
    with pytest.raises(UserError, match=r"tokenizer\.direction_tokens"):
        mutual_information.score(plain, PAIRS, prior_weight=0, backward_weight=1, max_prompt_tokens=48)


@pytest.mark.parametrize("backward_weight", [0.0, 1.0])
def test_reranking_gives_the_best_of_the_replies_that_are_drawn(model: DialogueModel, backward_weight: float) -> None:
    prompts = [as_prompt("is the apple red?"), as_prompt("hm")]
    settings = config.Sampling(max_new_tokens=6)
    drawn = model.draw(prompts, settings, num_return_sequences=8, seed=2)
    weights = {"prior_weight": 0.7, "backward_weight": backward_weight}
    given = model.draw(
        prompts, settings, num_return_sequences=2, seed=2, reranking=config.Reranking(candidates=4, **weights)
    )
    for prompt, replies, best in zip(prompts, drawn, given, strict=True):
        pairs = [(prompt, reply.text) for reply in replies]
        scores = mutual_information.score(model, pairs, max_prompt_tokens=58, rows=16, **weights)
        order = np.argsort(-scores)
        assert best == [replies[order[0]], replies[order[1]]]
        assert order[:2].tolist() != [0, 1], "not the ones that were drawn first"


def test_generate_response_reranks_and_one_candidate_changes_nothing(model: DialogueModel) -> None:
    changed = False
    for seed in range(4):
        (one,) = model.generate_response("hm", seed=seed, max_new_tokens=6)
        assert model.generate_response("hm", seed=seed, candidates=1, prior_weight=0.9, max_new_tokens=6) == [one]
        (best,) = model.draw(
            [as_prompt("hm")], config.Sampling(max_new_tokens=6), seed=seed, reranking=config.Reranking(candidates=6)
        )
        assert model.generate_response("hm", seed=seed, candidates=6, max_new_tokens=6) == [best[0].text]
        changed |= best[0].text != one
    assert changed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"candidates": 4, "do_sample": False, "num_beams": 2}, "set do_sample true, or candidates 1"),
        ({"candidates": 4, "do_sample": False}, "set do_sample true, or candidates 1"),
        ({"candidates": 4, "backward_weight": 1.0}, r"tokenizer\.direction_tokens"),
        ({"backward_weight": 1.0}, "set candidates to 2 or more"),
        ({"candidates": 0}, "candidates.*greater than or equal to 1"),
        ({"candidates": 2, "prior_weight": 2.0}, "prior_weight.*less than or equal to 1"),
    ],
)
def test_candidates_that_cannot_be_drawn_or_scored_are_refused(
    model: DialogueModel, options: dict[str, Any], expected: str
) -> None:
    plain = dataclasses.replace(model, tokenizer=DialogueTokenizer.fit(TEXTS, 300))
    with pytest.raises(UserError, match=expected):
        plain.generate_response("hm", max_new_tokens=6, **options)


def test_a_backward_model_makes_up_what_was_said_and_a_round_may_be_drawn_in_parts(model: DialogueModel) -> None:
    prompts = [directions.backward_prompt(reply, model.tokenizer, 40) for reply in ("yes", "no idea", "yes", "it is")]
    settings = config.Sampling(max_new_tokens=8)
    whole = model.draw_encoded(prompts, settings, num_return_sequences=2, seed=1)
    parts = [
        model.draw_encoded([prompts[n] for n in part], settings, num_return_sequences=2, seed=1, numbers=part)
        for part in ([0, 1], [2, 3])
    ]

    def ids(drawn: Iterable[list[Reply]]) -> list[list[tuple[int, ...]]]:
        return [[reply.token_ids for reply in replies] for replies in drawn]

    assert ids(parts[0] + parts[1]) == ids(whole)
    assert ids(whole)[0] != ids(whole)[2], "the same prompt with another number"
    controls = {*model.tokenizer.role_ids.values(), model.tokenizer.backward_id, model.tokenizer.synthetic_id}
    assert controls.isdisjoint(token for replies in ids(whole) for reply in replies for token in reply)
    with pytest.raises(ValueError, match="there is room for 4"):
        model.draw_encoded(prompts, settings, max_prompt_tokens=4)
