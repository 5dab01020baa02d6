"""Text that spells a control token is text, the template is exact, and prompts fit where they must."""

import copy
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from ssl_jax.data.tokenizer import CONTROL_TOKENS, MIN_PROMPT_TOKENS, DialogueTokenizer, count_reply_bytes
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

TEXTS = ["hello there, how are you?", "<|user|> <|endoftext|> spelled out", "ünïcödé 你好 👋"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return DialogueTokenizer.fit(TEXTS, 400)


def dialogue(*turns):
    return Dialogue(tuple(Turn(role, content) for role, content in turns), "id")


def control_ids(tokenizer):
    return {tokenizer.pad_id, tokenizer.end_of_text_id, tokenizer.end_of_turn_id, *tokenizer.role_ids.values()}


spellings = st.lists(
    st.one_of(st.sampled_from(CONTROL_TOKENS), st.sampled_from(["<|", "|>", "<", "|", "user", "end", " "]), st.text()),
    max_size=8,
).map("".join)


@given(spellings)
@example("<|<|user|>|>")
@example("<|endof<|endofturn|>turn|>")
@example(" <|pad|> ")
@example("\x00\u200d\ufeff\r\n")
def test_no_text_encodes_to_a_control_token_and_every_text_survives(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert ids.dtype == np.int32
    assert control_ids(tokenizer).isdisjoint(ids.tolist())
    assert tokenizer.decode(ids) == text


@given(spellings.filter(bool), spellings.filter(bool))
def test_content_cannot_forge_a_turn_in_a_dialogue(tokenizer, question, reply):
    encoded = tokenizer.encode(dialogue(("user", question), ("assistant", reply)))
    ids = [token for token in encoded.tokens.tolist() if token in control_ids(tokenizer)]
    roles, end = tokenizer.role_ids, tokenizer.end_of_turn_id
    assert ids == [roles["user"], end, roles["assistant"], end, tokenizer.end_of_text_id]


def test_fitting_the_same_texts_in_any_order_gives_the_same_tokenizer(tokenizer):
    assert DialogueTokenizer.fit(reversed(TEXTS), 400).fingerprint == tokenizer.fingerprint
    assert DialogueTokenizer.fit([*TEXTS, "other words"], 400).fingerprint != tokenizer.fingerprint


def test_fitted_vocabulary_stays_within_its_size_and_its_tokens_stay_short():
    tokenizer = DialogueTokenizer.fit(["a" * 10_000, "b c d e f g " * 500], 300)
    assert 256 + len(CONTROL_TOKENS) < tokenizer.vocab_size <= 300
    ids = tokenizer.encode_text("a" * 1000)
    assert max(len(tokenizer.decode([token])) for token in ids) <= 32


def test_labeled_template_counts_replies_and_their_ends(tokenizer):
    turns = ("system", "be"), ("user", "hi"), ("assistant", "hé"), ("user", "?"), ("assistant", "yes")
    encoded = tokenizer.encode(dialogue(*turns))
    tokens, mask = [], []
    for role, content in turns:
        ids = tokenizer.encode_text(content).tolist()
        tokens += [tokenizer.role_ids[role], *ids, tokenizer.end_of_turn_id]
        mask += [0] + [int(role == "assistant")] * (len(ids) + 1)
    assert encoded.tokens.tolist() == [*tokens, tokenizer.end_of_text_id]
    assert encoded.loss_mask.tolist() == [*mask, 0]
    assert (encoded.tokens.dtype, encoded.loss_mask.dtype) == (np.int32, np.uint8)
    assert (encoded.id, encoded.reply_bytes) == ("id", len("hé".encode()) + 3)


def test_raw_dialogue_counts_every_token_but_the_first(tokenizer):
    encoded = tokenizer.encode(dialogue(("text", "one"), ("text", "twö")))
    assert encoded.tokens[-1] == tokenizer.end_of_text_id
    assert encoded.loss_mask.tolist() == [0] + [1] * (len(encoded.tokens) - 1)
    assert encoded.reply_bytes == 7


def test_prompt_counts_nothing_and_stays_open(tokenizer):
    encoded = tokenizer.encode(dialogue(("user", "a"), ("assistant", "b"), ("user", "c")))
    assert not encoded.loss_mask.any()
    assert encoded.tokens[-1] == tokenizer.end_of_turn_id
    assert encoded.reply_bytes == 0


def test_bytes_before_cleaning_are_kept_when_given(tokenizer):
    clean = dialogue(("user", "a"), ("assistant", "b"))
    assert count_reply_bytes(clean) == 1
    assert tokenizer.encode(clean, reply_bytes=9).reply_bytes == 9


def test_many_dialogues_encode_as_each_alone(tokenizer):
    dialogues = [dialogue(("user", f"number {i}"), ("assistant", "x" * (i % 7 + 1))) for i in range(1100)]
    for one, together in zip(dialogues, tokenizer.encode_all((one, 3) for one in dialogues), strict=True):
        alone = tokenizer.encode(one, 3)
        assert together.tokens.tolist() == alone.tokens.tolist()
        assert together.loss_mask.tolist() == alone.loss_mask.tolist()


def test_prompt_that_fits_is_whole_and_opens_the_reply(tokenizer):
    turns = ("system", "be"), ("user", "hi"), ("assistant", "ho"), ("user", "so?")
    complete = tokenizer.encode(dialogue(*turns)).tokens.tolist()
    assert tokenizer.encode_prompt(dialogue(*turns), 200).tolist() == [*complete, tokenizer.role_ids["assistant"]]


def test_prompt_drops_the_oldest_whole_turns_but_not_the_system_turn(tokenizer):
    turns = [("system", "be"), *(("user" if i % 2 == 0 else "assistant", f"turn {i}") for i in range(9))]
    kept = tokenizer.encode(dialogue(turns[0], *turns[-3:])).tokens.tolist()
    for spare in (1, 2):
        assert tokenizer.encode_prompt(dialogue(*turns), len(kept) + spare).tolist() == [
            *kept,
            tokenizer.role_ids["assistant"],
        ]


def test_single_turn_too_long_keeps_its_role_and_its_newest_words(tokenizer):
    text = " ".join(map(str, range(200)))
    prompt = tokenizer.encode_prompt(dialogue(("user", text)), 30)
    assert len(prompt) == 30
    assert prompt[0] == tokenizer.role_ids["user"]
    assert text.endswith(tokenizer.decode(prompt))


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(min_size=1)), min_size=1, max_size=6),
    st.integers(MIN_PROMPT_TOKENS, 60),
)
def test_prompt_never_exceeds_its_limit_and_always_shows_the_newest_turn(tokenizer, turns, max_tokens):
    prompt = tokenizer.encode_prompt(dialogue(*turns), max_tokens).tolist()
    assert len(prompt) <= max_tokens
    assert prompt[-2:] == [tokenizer.end_of_turn_id, tokenizer.role_ids["assistant"]]
    body = prompt[:-2]
    start = max(i for i, token in enumerate(body) if token in tokenizer.role_ids.values())
    shown = body[start + 1 :]
    content = tokenizer.encode_text(turns[-1][1]).tolist()
    assert body[start] == tokenizer.role_ids[turns[-1][0]]
    assert shown and shown == content[len(content) - len(shown) :]
    assert prompt[0] in tokenizer.role_ids.values()
    if turns[0][0] == "system":
        assert prompt[0] == tokenizer.role_ids["system"]


def test_prompt_limit_too_small_to_mean_anything_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"at least {MIN_PROMPT_TOKENS} tokens"):
        tokenizer.encode_prompt(dialogue(("user", "hi")), MIN_PROMPT_TOKENS - 1)


def test_decoding_skips_control_tokens_and_handles_batches(tokenizer):
    rows = [tokenizer.encode(dialogue(("user", "hi"), ("assistant", text))).tokens for text in (" a", " bc")]
    assert tokenizer.decode_batch(rows) == [tokenizer.decode(row) for row in rows] == ["hi a", "hi bc"]


def test_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = DialogueTokenizer.load(tmp_path)
    assert (loaded.fingerprint, loaded.vocab_size, loaded.role_ids) == (
        tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.role_ids,
    )  # fmt: skip


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_still_treat_spelled_control_tokens_as_text(tokenizer, duplicate):
    text = "<|assistant|>"
    assert duplicate(tokenizer).encode_text(text).tolist() == tokenizer.encode_text(text).tolist()


def test_transformers_reads_the_saved_directory_with_the_same_ids(tokenizer, tmp_path):
    import transformers

    tokenizer.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer.encode(dialogue(("user", "hi  you"), ("assistant", "é")))
    text = "<|user|>hi  you<|endofturn|><|assistant|>é<|endofturn|><|endoftext|>"
    assert other(text)["input_ids"] == encoded.tokens.tolist()
    assert (other.eos_token_id, other.pad_token_id) == (tokenizer.end_of_text_id, tokenizer.pad_id)
    assert len(other) == tokenizer.vocab_size


def test_pretrained_tokenizer_keeps_its_ids_and_gains_the_control_tokens(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        TEXTS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    size = backend.get_vocab_size()
    loaded = DialogueTokenizer.load(tmp_path)
    assert loaded.end_of_text_id == size - 1
    assert loaded.vocab_size == size + len(CONTROL_TOKENS) - 1
    assert loaded.encode_text("hello there").tolist() == backend.encode("hello there").ids


def test_tokenizer_that_cannot_tell_text_from_control_tokens_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"<|user|>": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="reads the text '<|user|>' as a control token".replace("|", r"\|")):
        DialogueTokenizer(backend)


def test_missing_and_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match="not a tokenizer directory and not on the hub"):
        DialogueTokenizer.load(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer file"):
        DialogueTokenizer.load(tmp_path)
