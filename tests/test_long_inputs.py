"""A conversation of 5,000 tokens and a context of 256: all of it is learned from and scored, and the run says how."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import yaml

from ssl_jax import generate, loading
from ssl_jax import model as gpt2
from ssl_jax.config import Config, Evaluation, Sampling, Train
from ssl_jax.conversation import as_prompt
from ssl_jax.data.pipeline import prepare
from ssl_jax.data.store import Prepared
from ssl_jax.data.tokenizer import EncodedDialogue
from ssl_jax.dialogue import Dialogue
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.evaluation import measure
from ssl_jax.loop import Run
from ssl_jax.signals import Signals

CONTEXT, OVERLAP = 256, 24
# A dialogue is held out by a hash of its id; this one is trained on.
LONG_ID = "long"
SAMPLING = Sampling(max_new_tokens=16)


def conversation() -> list[dict[str, str]]:
    """About 5,000 tokens: instructions, a reply that is longer than the context, and many short turns."""
    messages = [{"role": "system", "content": "you know the color of every thing and say so kindly, always."}]
    for number, thing in enumerate(tiny.THINGS * 6):
        color = tiny.COLORS[number % len(tiny.COLORS)]
        story = f" it was a {color} {thing}, as you can see." * (20 if number == 30 else 1)
        messages += [
            {"role": "user", "content": f"number {number}: is the {thing} {color}?"},
            {"role": "assistant", "content": f"yes, {color} {thing}.{story}"},
        ]
    return messages


def settings(folder: Path) -> dict[str, Any]:
    values = tiny.settings(folder)
    # One block without dropout compiles in half of the time that two with dropout take.
    values["model"] |= {"n_positions": CONTEXT, "n_layer": 1, "scan_layers": False}
    values["model"] |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    values["train"] |= {
        "steps": 8,
        "sequence_length": CONTEXT,
        "window_overlap": OVERLAP,
        "unlabeled_ratio": 1,
        "eval_steps": 8,
        "save_steps": 8,
    }
    values["pseudo_labels"]["rounds"] = []
    values["evaluation"] |= {"generated_replies": 0, "recall_examples": 0, "sample_prompts": []}
    return values


@pytest.fixture(scope="module")
def folder() -> Path:
    """Data with the long conversation, and the configuration of a run on them."""
    folder = tiny.scratch() / "long"
    tiny.write_data(folder)
    tiny.write_jsonl(folder / "labeled.jsonl", [*tiny.labeled(), {"id": LONG_ID, "messages": conversation()}])
    tiny.write_config(folder / "config.yaml", settings(folder))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> tuple[Path, str]:
    """The work directory of a run, and what it told its user."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        directory = tiny.run_train(folder / "config.yaml", folder / "run")
    return directory, told.getvalue()


@pytest.fixture(scope="module")
def model(run: tuple[Path, str]) -> DialogueModel:
    """The trained model, its matrices magnified so that what it says depends on what it reads."""
    trained = loading.load_checkpoint(run[0])
    return dataclasses.replace(
        trained, params=jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, trained.params)
    )


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return Config.model_validate(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def prepared(config: Config, run: tuple[Path, str]) -> Prepared:
    return prepare(config)


@pytest.fixture(scope="module")
def encoded(prepared: Prepared) -> EncodedDialogue:
    """The long conversation, as the run reads it."""
    (dialogue,) = (dialogue for dialogue in prepared.encoded("labeled_train") if dialogue.id == LONG_ID)
    return dialogue


def test_the_conversation_is_what_the_other_tests_need(encoded: EncodedDialogue, model: DialogueModel) -> None:
    assert len(encoded.tokens) >= 5000
    turns = [len(model.tokenizer.encode_text(message["content"])) for message in conversation()]
    assert max(turns) > CONTEXT and sorted(turns)[-2] < CONTEXT
    assert turns[0] < encoded.prefix_length < CONTEXT // 4
    assert model.shape.n_positions == CONTEXT


# Training -------------------------------------------------------------------------------------------------------------


def test_a_run_says_how_many_dialogues_are_longer_than_a_row_and_how_they_are_cut(
    run: tuple[Path, str], encoded: EncodedDialogue
) -> None:
    (line,) = (line for line in run[1].splitlines() if "long dialogues" in line)
    targets, stride = len(encoded.tokens) - 1, CONTEXT - OVERLAP - encoded.prefix_length
    # The first window may be shorter than a row, which moves the last one's end.
    counts = {1 + math.ceil((targets - first) / stride) for first in (1, CONTEXT)}
    assert any(f"labeled 1 cut into {count} windows, raw none; overlap {OVERLAP} tokens" in line for count in counts)


def test_an_epoch_learns_every_reply_token_of_the_long_conversation_once(
    folder: Path, config: Config, prepared: Prepared, encoded: EncodedDialogue
) -> None:
    """In windows that begin with the system turn, so that it is never out of sight."""
    stream = Run(config, prepared, folder / "unused", Signals()).streams["labeled"]
    system = encoded.tokens[: encoded.prefix_length].tolist()
    targets, weight = [], 0.0
    for number in range(stream.rows_in_epoch(0)):
        row = stream[number]
        weight += float(row["loss_weights"].sum())
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            places = row["segment_ids"] == segment
            # No other conversation of this data has a system turn.
            if row["tokens"][places][: len(system)].tolist() == system:
                targets += row["targets"][places][row["loss_weights"][places] > 0].tolist()
    assert weight == sum(int(dialogue.loss_mask.sum()) for dialogue in prepared.encoded("labeled_train"))
    assert sorted(targets) == sorted(encoded.tokens[encoded.loss_mask > 0].tolist())


def test_a_run_learns_from_rows_that_the_long_conversation_fills(run: tuple[Path, str]) -> None:
    losses = [
        line["loss/supervised"] for line in tiny.read_jsonl(run[0] / "metrics.jsonl") if "loss/supervised" in line
    ]
    assert len(losses) == 8 and losses[-1] < 0.9 * losses[0]


def test_an_overlap_that_leaves_a_window_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="window_overlap 64 must be below sequence_length 64; set it to 8"):
        Train(sequence_length=64, window_overlap=64)
    assert Train(sequence_length=64, window_overlap=63).window_overlap == 63


# Scoring --------------------------------------------------------------------------------------------------------------


_forward = jax.jit(gpt2.forward, static_argnums=0)


def log_probabilities(model: DialogueModel, tokens: np.ndarray) -> np.ndarray:
    """Gives log p(token | tokens before it) for all but the first, float64 `[n - 1]`, n - 1 at most a row."""
    fed, targets = tokens[:-1], tokens[1:]
    places = np.arange(CONTEXT, dtype=np.int32)
    row = np.zeros_like(places)
    row[: len(fed)] = fed
    segments = (places < len(fed)).astype(np.int32)
    hidden = np.asarray(_forward(model.shape, model.params, row[None], places[None], segments[None])[0], np.float64)
    embedding = np.asarray(model.params["wte"]["embedding"], np.float64)[: model.shape.vocab_size]
    logits = hidden[: len(fed)] @ embedding.T
    logits -= logits.max(axis=1, keepdims=True)
    return logits[np.arange(len(fed)), targets] - np.log(np.exp(logits).sum(axis=1))


def slide_by_hand(model: DialogueModel, dialogue: EncodedDialogue, overlap: int, prefix_length: int) -> float:
    """The cost of a dialogue's targets, nats: as many of them at a time as the context still takes."""
    tokens, mask = dialogue.tokens, dialogue.loss_mask
    cost, done = 0.0, 0  # the last token that was predicted
    while done < len(tokens) - 1:
        begin = max(0, done - overlap) if done else 0
        context = [*range(min(prefix_length, begin)), *range(begin, done + 1)]
        new = [*range(done + 1, min(done + 2 + CONTEXT - len(context), len(tokens)))]
        log_probs = log_probabilities(model, tokens[context + new])[-len(new) :]
        cost -= float(log_probs @ mask[new])
        done = new[-1]
    return cost


@pytest.mark.parametrize("overlap", [None, 0, 100])
def test_the_score_is_that_of_a_window_that_slides_over_the_conversation(
    model: DialogueModel, encoded: EncodedDialogue, overlap: int | None
) -> None:
    """By default a quarter of the context is repeated."""
    score = float(model.score_dialogues([encoded], rows=8, overlap=overlap)[0])
    repeated = CONTEXT // 4 if overlap is None else overlap
    assert score == pytest.approx(slide_by_hand(model, encoded, repeated, encoded.prefix_length), rel=1e-5)
    without = float(model.score_dialogues([dataclasses.replace(encoded, prefix_length=0)], rows=8, overlap=overlap)[0])
    assert without == pytest.approx(slide_by_hand(model, encoded, repeated, 0), rel=1e-5)
    assert abs(score - without) > 1e-3 * score, "the system turn is seen"


def test_a_system_turn_longer_than_half_of_what_the_overlap_leaves_is_repeated_in_part(
    model: DialogueModel, encoded: EncodedDialogue
) -> None:
    endless = dataclasses.replace(encoded, prefix_length=2000)
    expected = slide_by_hand(model, encoded, CONTEXT // 4, (CONTEXT - CONTEXT // 4) // 2)
    assert model.score_dialogues([endless], rows=8)[0] == pytest.approx(expected, rel=1e-5)


def test_messages_of_any_length_are_scored_as_their_tokens(model: DialogueModel, encoded: EncodedDialogue) -> None:
    score = model.score(conversation())
    assert score["nll"] == pytest.approx(float(model.score_dialogues([encoded], rows=1)[0]), rel=1e-6)
    replies = "".join(message["content"] for message in conversation() if message["role"] == "assistant")
    assert score["bits_per_byte"] == pytest.approx(score["nll"] / math.log(2) / len(replies))


def test_text_that_the_tokenizer_cannot_express_costs_eight_bits_a_byte(
    model: DialogueModel, encoded: EncodedDialogue
) -> None:
    (known, unknown) = model.score_dialogues([encoded, dataclasses.replace(encoded, unknown_bytes=7)], rows=8)
    assert unknown - known == pytest.approx(7 * 8 * math.log(2), rel=1e-6)


# Generation -----------------------------------------------------------------------------------------------------------


def test_a_reply_sees_the_system_turn_and_the_newest_whole_turns(model: DialogueModel) -> None:
    """And says how much it did not see: what is left out and what is read make up the whole conversation."""
    messages = [*conversation()[:-1]]
    whole = len(model.tokenizer.encode_prompt(as_prompt(messages), 10**6).tokens)
    (reply,) = model.draw([as_prompt(messages)], SAMPLING, seed=1)[0]
    seen = [messages[0], *messages[1 + reply.dropped_turns :]]
    (same,) = model.draw([as_prompt(seen)], SAMPLING, seed=1)[0]
    assert (same.dropped_turns, same.dropped_tokens) == (0, 0)
    assert (reply.token_ids, reply.token_logprobs) == (same.token_ids, same.token_logprobs)
    read = len(model.tokenizer.encode_prompt(as_prompt(seen), 10**6).tokens)
    assert reply.dropped_tokens == whole - read > 4500
    # One turn more would not fit.
    longer = [messages[0], *messages[reply.dropped_turns :]]
    limit = model.prompt_limit(SAMPLING)
    assert read <= limit < len(model.tokenizer.encode_prompt(as_prompt(longer), 10**6).tokens)


def test_a_turn_longer_than_the_context_loses_its_beginning(model: DialogueModel) -> None:
    said = " ".join(f"number {number}: is the lamp red?" for number in range(200))
    (reply,) = model.draw([as_prompt(said)], SAMPLING, seed=1)[0]
    (other,) = model.draw([as_prompt("is the river white? " + said)], SAMPLING, seed=1)[0]
    assert reply.dropped_turns == 0 and reply.dropped_tokens > 1000
    assert other.dropped_tokens > reply.dropped_tokens and other.token_ids == reply.token_ids


def test_the_command_says_what_a_reply_did_not_see(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(f"number {number}: is the lamp red?" for number in range(200))
    arguments = ["--workdir", str(run[0]), "--max-new-tokens", "16", "--json", "--prompt", said]
    generate.main(arguments)
    printed = capsys.readouterr()
    line = json.loads(printed.out)
    assert line["dropped_turns"] == 0
    assert printed.err == (
        "note: the conversation is longer than the context: the beginning of a turn "
        f"({line['dropped_tokens']} tokens) was left out\n"
    )


def test_the_final_evaluation_counts_what_is_longer_than_the_context(model: DialogueModel) -> None:
    dialogue = Dialogue.from_messages(conversation(), id="long")
    settings = Evaluation(
        recall_examples=0, generated_replies=3, max_prompt_tokens=64, sampling=Sampling(max_new_tokens=16)
    )
    encoded = [model.tokenizer.encode(dialogue)]
    counts = measure.full(model, encoded, lambda _: dialogue, settings, rows=8)["counts"]
    assert counts == {"dialogues": 1, "longer_than_context": 1, "replies": 3, "contexts_cut_before_a_reply": 3}
