"""A model one can talk to, from Python."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import ssl_jax
from ssl_jax import model as gpt2
from ssl_jax.config import Sampling
from ssl_jax.conversation import as_prompt
from ssl_jax.data.tokenizer import EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.errors import UserError

SHORT = Sampling(max_new_tokens=16)
CONVERSATION = [{"role": "user", "content": "is the apple red?"}, {"role": "assistant", "content": "yes, red apple"}]


@pytest.fixture(scope="module")
def model() -> DialogueModel:
    return ssl_jax.load(str(tiny.finished()))


_forward = jax.jit(gpt2.forward, static_argnums=0)


def next_token_log_probabilities(model: DialogueModel, tokens: np.ndarray) -> np.ndarray:
    """Gives log p(next token | tokens so far) at every place, float64 `[n, V]`: one forward pass, the rest in NumPy."""
    places = np.arange(model.shape.n_positions, dtype=np.int32)
    row = np.zeros_like(places)
    row[: len(tokens)] = tokens
    segments = (places < len(tokens)).astype(np.int32)
    hidden = _forward(model.shape, model.params, row[None], places[None], segments[None])[0, : len(tokens)]
    embedding = np.asarray(gpt2.output_embedding(model.params, hidden.dtype), np.float64)[: model.shape.vocab_size]
    logits = np.asarray(hidden, np.float64) @ embedding.T
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def log_probabilities(model: DialogueModel, tokens: np.ndarray) -> np.ndarray:
    """Gives log p(token | tokens before it) for all but the first, float64 `[n - 1]`."""
    return next_token_log_probabilities(model, tokens[:-1])[np.arange(len(tokens) - 1), tokens[1:]]


def by_hand(model: DialogueModel, encoded: EncodedDialogue) -> float:
    """Negative log-likelihood of a dialogue that fits into the context."""
    return -float((log_probabilities(model, encoded.tokens) * encoded.loss_mask[1:]).sum())


def long_dialogue(turns: int) -> Dialogue:
    words = [Turn("user", f"is the {thing} red?") if n % 2 == 0 else Turn("assistant", f"yes, red {thing}")
             for n, thing in enumerate(tiny.THINGS[:turns])]  # fmt: skip
    return Dialogue(tuple(words))


def test_a_score_is_the_sum_of_minus_log_p(model: DialogueModel) -> None:
    encoded = model.tokenizer.encode(Dialogue.from_messages(CONVERSATION))
    score = model.score(CONVERSATION)
    assert score["nll"] == pytest.approx(by_hand(model, encoded), rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(score["nll"] / math.log(2) / len("yes, red apple"))
    assert encoded.loss_mask.sum() == len(model.tokenizer.encode_text("yes, red apple")) + 1, "with its end of turn"


def test_a_trained_model_prefers_the_reply_that_it_was_taught(model: DialogueModel) -> None:
    wrong = [CONVERSATION[0], {"role": "assistant", "content": "qzj xkv wq zzzzz"}]
    assert model.score(CONVERSATION)["bits_per_byte"] < model.score(wrong)["bits_per_byte"]


def test_many_dialogues_are_scored_as_each_alone(model: DialogueModel) -> None:
    """Dialogues share rows; neither their neighbors nor the number of rows may matter."""
    dialogues = [model.tokenizer.encode(long_dialogue(turns)) for turns in (2, 4, 2, 6, 4, 2)]
    together = model.score_dialogues(dialogues, rows=8)
    alone = [model.score_dialogues([dialogue], rows=8)[0] for dialogue in dialogues]
    fitting = [by_hand(model, dialogue) for dialogue in dialogues if len(dialogue.tokens) <= 65]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(
        [nll for nll, dialogue in zip(together, dialogues, strict=True) if len(dialogue.tokens) <= 65],
        fitting,
        rtol=1e-5,
    )


def test_a_dialogue_longer_than_the_context_is_scored_whole(model: DialogueModel) -> None:
    """Window by window: every target counts once, with the context that a window repeats."""
    encoded = model.tokenizer.encode(long_dialogue(20))
    length, overlap = model.shape.n_positions, 16
    targets = len(encoded.tokens) - 1
    assert targets > 2 * length
    expected, done = 0.0, 0
    while done < targets:
        start = max(0, done - (overlap if done else 0))
        stop = min(start + length, targets)
        log_probs = log_probabilities(model, encoded.tokens[start : stop + 1])[done - start :]
        expected -= float((log_probs * encoded.loss_mask[done + 1 : stop + 1]).sum())
        done = stop
    assert model.score_dialogues([encoded], rows=8, overlap=overlap)[0] == pytest.approx(expected, rel=1e-5)


def test_more_context_does_not_change_how_many_targets_count(model: DialogueModel) -> None:
    """Under a uniform model every target costs the same, so the sum counts the targets."""
    zeros = dataclasses.replace(
        model, params={**model.params, "wte": {"embedding": 0 * model.params["wte"]["embedding"]}}
    )
    encoded = model.tokenizer.encode(long_dialogue(20))
    expected = encoded.loss_mask.sum() * math.log(model.shape.vocab_size)
    for overlap in (0, 16, 63):
        assert zeros.score_dialogues([encoded], rows=8, overlap=overlap)[0] == pytest.approx(expected, rel=1e-5)


def test_a_reply_does_not_depend_on_the_batch_that_it_is_drawn_in(model: DialogueModel) -> None:
    prompts = [as_prompt(f"{thing} red?"[n:]) for n, thing in enumerate(tiny.THINGS[:5])]
    together = model.draw(prompts, SHORT, seed=3, batch_size=8)
    alone = model.draw(prompts, SHORT, seed=3, batch_size=1)
    assert [[(r.text, r.tokens, r.finish_reason) for r in replies] for replies in together] == [
        [(r.text, r.tokens, r.finish_reason) for r in replies] for replies in alone
    ]
    np.testing.assert_allclose(
        [replies[0].logprob for replies in together], [replies[0].logprob for replies in alone], rtol=1e-4
    )


def test_the_same_prompt_twice_gets_two_draws(model: DialogueModel) -> None:
    prompt = as_prompt("is the apple red?")
    replies = model.draw([prompt] * 8, SHORT, seed=0)
    assert len({reply[0].text for reply in replies}) > 1


def test_the_log_probability_of_a_reply_is_that_of_the_model(model: DialogueModel) -> None:
    """Under the unfiltered distribution, whatever filters shaped the draw; greedy replies decode to their tokens."""
    prompt = as_prompt("is the table black?")
    greedy = Sampling(max_new_tokens=16, do_sample=False)
    (reply,) = model.draw([prompt], greedy)[0]
    context = model.tokenizer.encode_prompt(prompt, 48).tokens
    tokens, log_probs = list(context), []
    for _ in range(reply.tokens + (reply.finish_reason == "stop")):
        best, best_log_prob = likeliest(model, np.array(tokens, np.int32), list(model.tokenizer.suppressed_ids))
        tokens.append(best)
        log_probs.append(best_log_prob)
    np.testing.assert_allclose(reply.token_logprobs, log_probs, rtol=1e-4, atol=1e-5)
    assert reply.logprob == pytest.approx(sum(log_probs), rel=1e-4)
    drawn = tokens[len(context) :]
    assert tuple(drawn[: reply.tokens]) == reply.token_ids
    assert model.tokenizer.decode(drawn).strip() == reply.text


def likeliest(model: DialogueModel, tokens: np.ndarray, suppressed: list[int]) -> tuple[int, float]:
    """The next token of highest probability that may be drawn, and its log-probability."""
    log_probs = next_token_log_probabilities(model, tokens)[-1]
    allowed = log_probs.copy()
    allowed[suppressed] = -np.inf
    best = int(np.argmax(allowed))
    return best, float(log_probs[best])


def test_generate_response_takes_a_text_or_a_conversation(model: DialogueModel) -> None:
    text = model.generate_response("is the apple red?", max_new_tokens=16, seed=1)
    messages = model.generate_response([CONVERSATION[0]], max_new_tokens=16, seed=1)
    assert text == messages and len(text) == 1
    longer = [*CONVERSATION, {"role": "user", "content": "is the lamp red?"}]
    assert len(model.generate_response(longer, max_new_tokens=16)) == 1
    assert len(model.generate_response("is the apple red?", max_new_tokens=16, num_return_sequences=4)) == 4


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("hi", {"topk": 5}, r"generate_response: topk: unknown field; did you mean top_k\?"),
        ("hi", {"top_p": 2.0}, r"top_p: .*less than or equal to 1"),
        ("hi", {"max_new_tokens": 64}, "leaves no room"),
        ("hi", {"temperature": -1}, "temperature: .*greater than or equal to 0.000001"),
        ("hi", {"num_beams": 2}, "set do_sample to false"),
        ("hi", {"num_beams": 2, "do_sample": False, "num_return_sequences": 3}, "exceeds num_beams 2"),
        ("hi", {"suppress_tokens": [99999]}, "suppress_tokens: the model has no token 99999"),
        ("", {}, "the prompt is empty"),
        ([], {}, "messages: a dialogue needs at least one turn"),
        (CONVERSATION, {}, "must end in a user turn"),
        ([{"role": "boss", "content": "hi"}], {}, "message 0 has role 'boss'"),
        ([{"role": "user"}], {}, "message 0 .user. has no text"),
        ([{"role": "user", "content": "\ud800"}], {}, "not valid UTF-8"),
    ],
)
def test_what_cannot_be_answered_is_refused(model: DialogueModel, prompt: Any, options: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        model.generate_response(prompt, **options)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (CONVERSATION[:1], "must end in an assistant turn"),
        ([{"role": "text", "content": "raw"}], "must end in an assistant turn"),
        ([], "messages: a dialogue needs at least one turn"),
    ],
)
def test_what_cannot_be_scored_is_refused(model: DialogueModel, messages: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        model.score(messages)


@pytest.mark.parametrize("name", ["runs/nowhere", "./runs/nowhere"])
def test_what_is_neither_a_folder_nor_on_the_hub_cannot_be_loaded(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no directory .*runs/nowhere"):
        ssl_jax.load(name)


def test_a_folder_without_a_model_cannot_be_loaded(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"neither a work directory .* nor a Hugging Face model"):
        ssl_jax.load(str(tmp_path))


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_the_reply_in_pieces(model: DialogueModel, seed: int) -> None:
    pieces = list(model.stream_response("is the apple red?", max_new_tokens=16, seed=seed))
    assert [("".join(pieces))] == model.generate_response("is the apple red?", max_new_tokens=16, seed=seed)
    assert len(pieces) > 1


def test_a_stop_string_ends_the_reply_before_it(model: DialogueModel) -> None:
    """The reply is the one without it, cut; its tokens are counted up to the string."""
    (whole,) = model.draw([as_prompt("is the apple red?")], SHORT, seed=2)[0]
    stop = whole.text[3:5]
    settings = SHORT.model_copy(update={"stop": (stop,)})
    (cut,) = model.draw([as_prompt("is the apple red?")], settings, seed=2)[0]
    assert stop in whole.text and cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.finish_reason == "stop" and 0 < cut.tokens < whole.tokens
    assert cut.token_ids == whole.token_ids[: cut.tokens]
    assert list(model.stream_response("is the apple red?", max_new_tokens=16, seed=2, stop=(stop,))) != []
    assert "".join(model.stream_response("is the apple red?", max_new_tokens=16, seed=2, stop=(stop,))) == cut.text


def test_a_reply_begins_as_asked(model: DialogueModel) -> None:
    replies = model.generate_response(
        "is the apple red?", reply_prefix="well, no", max_new_tokens=8, num_return_sequences=4
    )
    assert len(set(replies)) > 1 and all(reply.startswith("well, no") for reply in replies)
    streamed = "".join(model.stream_response("is the apple red?", reply_prefix="well, no", max_new_tokens=8))
    assert streamed == replies[0]


def test_bad_words_do_not_appear_wherever_they_stand(model: DialogueModel) -> None:
    """A byte-level vocabulary spells a word at the beginning and after a blank in two ways."""
    greedy = {"max_new_tokens": 16, "do_sample": False}
    (before,) = model.generate_response("is the table black?", **greedy)
    word = before.split()[-1]
    (after,) = model.generate_response("is the table black?", bad_words=[word], **greedy)
    assert word in before.split() and word not in after.split()


def test_a_bias_on_a_text_moves_the_reply(model: DialogueModel) -> None:
    prompt, greedy = as_prompt("is the apple red?"), Sampling(max_new_tokens=8, do_sample=False)
    (before,) = model.draw([prompt], greedy)[0]
    first = model.tokenizer.decode(before.token_ids[:1])
    (after,) = model.draw([prompt], greedy.model_copy(update={"sequence_bias": {first: -100.0}}))[0]
    assert before.token_ids[0] != after.token_ids[0]


def test_custom_processors_run_inside_the_loop(model: DialogueModel) -> None:
    """Here: nothing but one token, and the end once the reply has three of it."""
    token = int(model.tokenizer.encode_text("a")[0])
    prompt_length = len(model.tokenizer.encode_prompt(as_prompt("is the apple red?"), 48).tokens)

    def only_a(scores_BV: jax.Array, sequences_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        wanted_B = jnp.where(lengths_B - prompt_length < 3, token, model.tokenizer.end_ids[0])
        allowed_BV = jnp.arange(scores_BV.shape[1])[None] == wanted_B[:, None]
        return jnp.where(allowed_BV, 0.0, -jnp.inf)

    assert model.generate_response("is the apple red?", logits_processor=[only_a], max_new_tokens=8) == ["aaa"]


def test_beams_give_the_best_replies_first(model: DialogueModel) -> None:
    settings = Sampling(max_new_tokens=8, do_sample=False, num_beams=4, length_penalty=0.0)
    (replies,) = model.draw([as_prompt("is the apple red?")], settings, num_return_sequences=3)
    scores = [reply.logprob for reply in replies]
    assert scores == sorted(scores, reverse=True) and len({reply.token_ids for reply in replies}) == 3
    (greedy,) = model.draw([as_prompt("is the apple red?")], Sampling(max_new_tokens=8, do_sample=False))[0]
    assert scores[0] >= greedy.logprob - 1e-4


def test_max_length_counts_the_prompt(model: DialogueModel) -> None:
    prompt = as_prompt("is the apple red?")
    size = len(model.tokenizer.encode_prompt(prompt, 48).tokens)
    settings = Sampling(max_length=size + 5, min_length=size + 5)
    (reply,) = model.draw([prompt], settings)[0]
    assert reply.tokens == 5 and reply.finish_reason == "length"
    with pytest.raises(UserError, match="max_length 20 counts the prompt too"):
        model.generate_response("is the apple red? " * 5, max_length=20)


def test_a_conversation_too_long_is_answered_with_a_warning(
    model: DialogueModel, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [Turn("system", "be kind"), *long_dialogue(20).turns, Turn("user", "is the lamp red?")]
    messages = Dialogue(tuple(turns)).to_messages()
    (reply,) = model.draw([as_prompt(messages)], SHORT)[0]
    assert reply.dropped_turns > 0 and reply.dropped_tokens > 64
    model.generate_response(messages, max_new_tokens=16)
    assert f"the oldest {reply.dropped_turns} turns ({reply.dropped_tokens} tokens) were left out" in caplog.text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_that_is_not_blank_is_a_prompt(text: str) -> None:
    if text.strip():
        assert as_prompt(text).turns == (Turn("user", text.strip()),)
    else:
        with pytest.raises(UserError, match="empty"):
            as_prompt(text)
