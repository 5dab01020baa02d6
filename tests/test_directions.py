"""Dialogues read in other ways: every token where it belongs, and views that read as the functions do."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.data import directions
from ssl_jax.data.collection import Collection
from ssl_jax.data.packing import cut_windows
from ssl_jax.data.tokenizer import CONTROL_TOKENS, DIRECTION_TOKENS, DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

TEXTS = ["a b c d e f g", "hello there, how are you?"] * 3
TOKENIZER = DialogueTokenizer.fit(TEXTS, 300, direction_tokens=True)


def encode(*turns: tuple[str, str]) -> EncodedDialogue:
    return TOKENIZER.encode(Dialogue(tuple(Turn(role, content) for role, content in turns), id="id"))  # pyright: ignore[reportArgumentType]


def spelled(encoded: EncodedDialogue) -> str:
    return TOKENIZER.spell(encoded.tokens)


def learned(encoded: EncodedDialogue) -> str:
    """The tokens that are predicted."""
    return TOKENIZER.spell(encoded.tokens[encoded.loss_mask == 1])


def same(left: EncodedDialogue, right: EncodedDialogue) -> bool:
    return (
        left.tokens.tolist() == right.tokens.tolist()
        and left.loss_mask.tolist() == right.loss_mask.tolist()
        and (left.id, left.reply_bytes, left.prefix_length) == (right.id, right.reply_bytes, right.prefix_length)
    )


contents = st.one_of(st.sampled_from([*CONTROL_TOKENS, *DIRECTION_TOKENS]), st.text(max_size=8))


@st.composite
def dialogues(draw: st.DrawFn) -> EncodedDialogue:
    """Labeled dialogues, prompts and raw text; with and without a system turn."""
    texts = draw(st.lists(contents, min_size=1, max_size=5))
    if draw(st.booleans()):
        return encode(*(("text", text) for text in texts))
    system = [("system", draw(contents))] if draw(st.booleans()) else []
    return encode(*system, *((draw(st.sampled_from(["user", "assistant"])), text) for text in texts))


def test_the_last_turn_is_read_first() -> None:
    turns = directions.backward(
        encode(("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")), TOKENIZER
    )
    assert spelled(turns) == (
        "<|backward|><|assistant|>e<|endofturn|><|user|>d<|endofturn|><|assistant|>c<|endofturn|><|user|>a b"
        "<|endofturn|><|endoftext|>"
    )
    assert learned(turns) == "d<|endofturn|>c<|endofturn|>a b<|endofturn|>"
    assert (turns.tokens.dtype, turns.loss_mask.dtype, turns.id) == (np.int32, np.uint8, "id")


def test_by_hand() -> None:
    """Ids that nobody encoded: a system turn of three tokens, a turn of two contents, one of one, and the end."""
    role, end = TOKENIZER.role_ids, TOKENIZER.end_of_turn_id
    tokens = [role["system"], 90, end, role["user"], 91, 92, end, role["assistant"], 93, end, TOKENIZER.end_of_text_id]
    written = EncodedDialogue("x", np.array(tokens, np.int32), np.array([0] * 8 + [1, 1, 0], np.uint8), 5, 3)
    once = directions.backward(written, TOKENIZER)
    back = TOKENIZER.backward_id
    assert once.tokens.tolist() == [*tokens[:3], back, *tokens[7:10], *tokens[3:7], tokens[10]]
    assert once.loss_mask.tolist() == [0] * 8 + [1, 1, 1, 0]
    assert once.prefix_length == 4
    twice = directions.backward(once, TOKENIZER)
    assert twice.tokens.tolist() == [*tokens[:3], back, back, *tokens[3:]]
    assert twice.loss_mask.tolist() == [0] * 10 + [1, 1, 0]


def test_the_system_turn_stays_in_front_and_goes_with_every_window() -> None:
    turns = directions.backward(encode(("system", "be"), ("user", "a"), ("assistant", "b")), TOKENIZER)
    opening = "<|system|>be<|endofturn|><|backward|>"
    assert spelled(turns).startswith(f"{opening}<|assistant|>b")
    assert TOKENIZER.spell(turns.tokens[: turns.prefix_length]) == opening
    long = directions.backward(encode(("system", "be"), ("user", "a" * 60), ("assistant", "b" * 60)), TOKENIZER)
    windows = cut_windows(np.array([len(long.tokens)]), 32, prefix_lengths=np.array([long.prefix_length]))
    assert len(windows) > 2
    for number in range(len(windows)):
        assert TOKENIZER.spell(windows.piece(number, long.tokens, long.loss_mask)[0]).startswith(opening)


@pytest.mark.parametrize("turns", [[("user", "a")], [("text", "a")], [("system", "be"), ("assistant", "a")]])
def test_one_turn_read_backwards_teaches_nothing(turns: list[tuple[str, str]]) -> None:
    assert not directions.backward(encode(*turns), TOKENIZER).loss_mask.any()


def test_a_system_turn_alone_is_left_as_it_is_but_for_the_mark() -> None:
    turns = directions.backward(encode(("system", "be")), TOKENIZER)
    assert spelled(turns) == "<|system|>be<|endofturn|><|backward|>" and not turns.loss_mask.any()


def test_a_prompt_read_backwards_has_no_end_of_text() -> None:
    turns = directions.backward(encode(("assistant", "a"), ("user", "b")), TOKENIZER)
    assert spelled(turns) == "<|backward|><|user|>b<|endofturn|><|assistant|>a<|endofturn|>"


@pytest.mark.parametrize(
    ("number", "expected"),
    [(1, ["assistant"]), (2, ["user", "assistant"]), (3, ["assistant", "user", "assistant"])],
)
def test_the_last_turn_of_raw_text_becomes_the_assistants(number: int, expected: list[str]) -> None:
    raw = encode(*[("text", "a")] * number)
    imputed = directions.alternating(raw, TOKENIZER)
    assert spelled(imputed) == "".join(f"<|{role}|>a<|endofturn|>" for role in expected) + "<|endoftext|>"
    assert imputed.loss_mask.tolist() == raw.loss_mask.tolist() == [0] + [1] * (3 * number)
    assert spelled(raw).count("<|text|>") == number, "what was given stays as it is"


def test_only_raw_text_gets_speakers() -> None:
    for turns in ([("user", "<|text|>"), ("user", "b"), ("assistant", "c")], [("system", "a"), ("user", "b")]):
        encoded = encode(*turns)
        assert same(directions.alternating(encoded, TOKENIZER), encoded)


def test_a_prompt_as_text_is_learned_as_raw_text_is() -> None:
    prompt = directions.as_text(encode(("user", "a b"), ("assistant", "c"), ("user", "d")))
    raw = encode(("text", "a b"), ("text", "c"), ("text", "d"))
    assert prompt.loss_mask.tolist() == raw.loss_mask.tolist()[:-1], "only the end of text is missing"


def test_a_made_up_context_is_marked_and_the_mark_not_learned() -> None:
    for system in ([], [("system", "be")]):
        plain = encode(*system, ("user", "a"), ("assistant", "b"))
        marked = directions.synthetic(plain, TOKENIZER)
        assert spelled(marked) == spelled(plain).replace("<|user|>", "<|synthetic|><|user|>")
        assert learned(marked) == learned(plain) == "b<|endofturn|>"
        assert marked.prefix_length == plain.prefix_length + 1 and marked.reply_bytes == plain.reply_bytes


READINGS = {
    "text": (directions.as_text, 0),
    "roles": (partial(directions.alternating, tokenizer=TOKENIZER), 0),
    "swapped": (partial(directions.swapped, tokenizer=TOKENIZER), 0),
    "backward": (partial(directions.backward, tokenizer=TOKENIZER), 1),
    "marked": (partial(directions.synthetic, tokenizer=TOKENIZER), 1),
}


@pytest.mark.parametrize("name", READINGS)
@given(st.lists(dialogues(), max_size=4))
def test_a_collection_knows_the_lengths_of_every_reading(name: str, encoded: list[EncodedDialogue]) -> None:
    reading, marks = READINGS[name]
    lengths = np.array([len(one.tokens) for one in encoded], np.int32)
    prefixes = np.array([one.prefix_length for one in encoded], np.int32)
    read = Collection(encoded, lengths, prefixes).read_as(reading, marks=marks)
    assert [len(one.tokens) for one in read.dialogues] == read.lengths.tolist()
    assert [one.prefix_length for one in read.dialogues] == read.prefix_lengths.tolist()
    assert len(read) == len(encoded)
    assert all(same(read.dialogues[number], reading(one)) for number, one in enumerate(encoded))


@given(dialogues())
def test_reading_backwards_twice_restores_the_order(encoded: EncodedDialogue) -> None:
    """And a spelled `<|backward|>` or end of turn in a content moves with its turn."""
    twice = directions.backward(directions.backward(encoded, TOKENIZER), TOKENIZER)
    head = encoded.prefix_length
    assert np.delete(twice.tokens, [head, head + 1]).tolist() == encoded.tokens.tolist()
    assert np.count_nonzero(twice.tokens == TOKENIZER.backward_id) == 2


@given(contents)
def test_what_a_backward_model_continues_is_how_a_backward_dialogue_begins(reply: str) -> None:
    turns = directions.backward(encode(("user", "who?"), ("assistant", reply)), TOKENIZER)
    prompt = directions.backward_prompt(reply, TOKENIZER, 200)
    assert prompt.tokens.tolist() == turns.tokens[: len(prompt.tokens)].tolist()
    assert TOKENIZER.spell(turns.tokens[len(prompt.tokens) :]) == "who?<|endofturn|><|endoftext|>"


def test_of_a_long_reply_a_backward_model_sees_the_end() -> None:
    prompt = directions.backward_prompt("x" * 50 + "yz", TOKENIZER, 8)
    assert TOKENIZER.spell(prompt.tokens) == "<|backward|><|assistant|>xxyz<|endofturn|><|user|>"


def test_what_is_missing_is_named() -> None:
    plain = DialogueTokenizer.fit(TEXTS, 300)
    encoded = plain.encode(Dialogue((Turn("user", "a"), Turn("assistant", "b"))))
    for needs in (
        lambda: directions.backward(encoded, plain),
        lambda: directions.backward_prompt("a", plain, 50),
        lambda: directions.synthetic(encoded, plain),
    ):
        with pytest.raises(UserError, match=r"tokenizer\.direction_tokens"):
            needs()
