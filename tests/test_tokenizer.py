"""Text that spells a control token is text, and tokenizers of other people are what they were."""

# ruff: noqa: RUF001 - Chinese punctuation is meant.

import copy
import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from ssl_jax.data.tokenizer import CONTROL_TOKENS, DIRECTION_TOKENS, DialogueTokenizer, count_reply_bytes
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

TEXTS = ["hello there, how are you?", "<|user|> <|endoftext|> spelled out", "ünïcödé 你好 👋"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return DialogueTokenizer.fit(TEXTS, 400)


def dialogue(*turns):
    return Dialogue(tuple(Turn(role, content) for role, content in turns), "id")


def control_ids(tokenizer):
    return {*tokenizer.end_ids, *tokenizer.suppressed_ids}


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


@pytest.fixture(scope="module")
def directed():
    return DialogueTokenizer.fit(TEXTS, 400, direction_tokens=True)


@given(spellings.flatmap(lambda text: st.sampled_from([*DIRECTION_TOKENS, ""]).map(lambda token: text + token + text)))
@example("<|<|backward|>backward|>")
@example("<|backward|><|synthetic|>")
def test_text_that_spells_a_direction_token_is_text(directed, text):
    assert {directed.backward_id, directed.synthetic_id} <= set(directed.suppressed_ids)
    ids = directed.encode_text(text)
    assert control_ids(directed).isdisjoint(ids.tolist())
    assert directed.decode(ids) == text


def test_direction_tokens_take_two_places_of_the_vocabulary_and_nothing_else(tokenizer, directed, tmp_path):
    assert (tokenizer.backward_id, tokenizer.synthetic_id) == (None, None)
    assert directed.vocab_size == tokenizer.vocab_size + 2 <= 400
    assert DialogueTokenizer.fit(TEXTS, 300, direction_tokens=True).vocab_size == 300, "within the bound"
    assert (directed.backward_id, directed.synthetic_id) == (len(CONTROL_TOKENS), len(CONTROL_TOKENS) + 1)
    assert directed.spell([directed.backward_id, directed.synthetic_id]) == "".join(DIRECTION_TOKENS)
    tokenizer.save(tmp_path)
    assert not any(token in file.read_text() for token in DIRECTION_TOKENS for file in tmp_path.iterdir())


def test_direction_tokens_are_found_again_and_added_to_a_vocabulary_that_lacks_them(tokenizer, directed, tmp_path):
    directed.save(tmp_path / "directed")
    tokenizer.save(tmp_path / "plain")
    copies = [
        DialogueTokenizer.load(tmp_path / "directed"),
        DialogueTokenizer.load(tmp_path / "directed", direction_tokens=True),
        pickle.loads(pickle.dumps(directed)),
    ]
    for found in copies:
        assert found.fingerprint == directed.fingerprint
        assert (found.backward_id, found.synthetic_id) == (directed.backward_id, directed.synthetic_id)
        assert found.encode_text("<|backward|>").tolist() == directed.encode_text("<|backward|>").tolist()
    added = DialogueTokenizer.load(tmp_path / "plain", direction_tokens=True)
    assert (added.backward_id, added.synthetic_id) == (tokenizer.vocab_size, tokenizer.vocab_size + 1)
    assert added.base_vocab_size == tokenizer.vocab_size == added.vocab_size - 2
    assert added.encode_text("<|synthetic|> hello").tolist() == tokenizer.encode_text("<|synthetic|> hello").tolist()


def test_direction_tokens_go_with_role_tokens_alone(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match=r"^tokenizer\.template plain: tokenizer\.direction_tokens needs"):
        DialogueTokenizer.load(tmp_path, "plain", direction_tokens=True)
    plain = DialogueTokenizer.load(tmp_path, "plain")
    for name in ("role_ids", "end_of_turn_id"):
        with pytest.raises(UserError, match=r"tokenizer\.template plain.*use tokenizer\.template role_tokens"):
            getattr(plain, name)
    assert tokenizer.spell(list(tokenizer.role_ids.values())) == "<|system|><|user|><|assistant|><|text|>"
    assert tokenizer.end_of_turn_id == tokenizer.end_ids[0]


def test_fitting_the_same_texts_in_any_order_gives_the_same_tokenizer(tokenizer):
    assert DialogueTokenizer.fit(reversed(TEXTS), 400).fingerprint == tokenizer.fingerprint
    assert DialogueTokenizer.fit([*TEXTS, "other words"], 400).fingerprint != tokenizer.fingerprint


def test_fitted_vocabulary_stays_within_its_size_and_its_tokens_stay_short():
    tokenizer = DialogueTokenizer.fit(["a" * 10_000, "b c d e f g " * 500], 300)
    assert 256 + len(CONTROL_TOKENS) < tokenizer.vocab_size <= 300
    ids = tokenizer.encode_text("a" * 1000)
    assert max(len(tokenizer.decode([token])) for token in ids) <= 32


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


@given(st.lists(spellings, min_size=1, max_size=3), spellings, st.booleans())
@example(["hello  there,", " how\n\nare you? "], " it's\tfine", True)
def test_dialogue_is_the_ids_of_its_turns_between_control_tokens(tokenizer, questions, system, has_system):
    """The library encodes every turn here; the tokenizer goes through its cache of words."""
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.encode_special_tokens = True
    turns = [("system", system)] * has_system
    for question in questions:
        turns += [("user", question), ("assistant", question[::-1])]
    tokens, mask = [], []
    for role, content in turns:
        ids = backend.encode(content, add_special_tokens=False).ids
        tokens += [backend.token_to_id(f"<|{role}|>"), *ids, tokenizer.end_ids[0]]
        mask += [0, *[int(role == "assistant")] * (len(ids) + 1)]
    encoded = tokenizer.encode(dialogue(*turns))
    assert encoded.tokens.tolist() == [*tokens, tokenizer.end_of_text_id]
    assert encoded.loss_mask.tolist() == [*mask, 0]
    assert encoded.prefix_length == has_system * (2 + len(backend.encode(system, add_special_tokens=False).ids))
    assert (encoded.tokens.dtype, encoded.loss_mask.dtype, encoded.unknown_bytes) == (np.int32, np.uint8, 0)


def test_copies_do_not_carry_the_words_that_were_seen():
    tokenizer = DialogueTokenizer.fit(TEXTS, 400)
    size = len(pickle.dumps(tokenizer))
    tokenizer.encode(dialogue(("text", " ".join(f"word{number}" for number in range(1000)))))
    assert len(pickle.dumps(tokenizer)) == size


def test_arrays_of_a_dialogue_can_be_written_to_without_changing_its_neighbors(tokenizer):
    dialogues = [(dialogue(("user", "a"), ("assistant", "b")), 1)] * 2
    first, second = tokenizer.encode_all(dialogues)
    expected = second.tokens.tolist(), second.loss_mask.tolist()
    first.tokens[:] = 0
    first.loss_mask[:] = 7
    assert (second.tokens.tolist(), second.loss_mask.tolist()) == expected


def test_decoding_skips_control_tokens_and_handles_batches(tokenizer):
    rows = [tokenizer.encode(dialogue(("user", "hi"), ("assistant", text))).tokens for text in (" a", " bc")]
    assert tokenizer.decode_batch(rows) == [tokenizer.decode(row) for row in rows] == ["hi a", "hi bc"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_still_treat_spelled_control_tokens_as_text(tokenizer, duplicate):
    text = "<|assistant|>"
    assert duplicate(tokenizer).encode_text(text).tolist() == tokenizer.encode_text(text).tolist()


def byte_level(texts=TEXTS, size=320, alphabet=True):
    """A tokenizer as other people have it: bytes and merges, no control tokens of ours."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    )
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def test_pretrained_tokenizer_keeps_its_ids_and_gains_the_control_tokens(tmp_path):
    backend = byte_level()
    backend.save(str(tmp_path / "tokenizer.json"))
    size = backend.get_vocab_size()
    loaded = DialogueTokenizer.load(tmp_path)
    assert loaded.template == "role_tokens"
    assert loaded.end_of_text_id == size - 1
    assert (loaded.base_vocab_size, loaded.vocab_size) == (size, size + len(CONTROL_TOKENS) - 1)
    assert loaded.encode_text("hello there").tolist() == backend.encode("hello there").ids
    assert pickle.loads(pickle.dumps(loaded)).base_vocab_size == size


@pytest.mark.parametrize("template", ["plain", "end_of_text"])
def test_forms_of_a_plain_model_add_no_token(tmp_path, template):
    backend = byte_level()
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = DialogueTokenizer.load(tmp_path, template)
    end = backend.token_to_id("<|endoftext|>")
    assert loaded.vocab_size == loaded.base_vocab_size == backend.get_vocab_size()
    assert (loaded.end_ids, loaded.suppressed_ids, loaded.pad_id) == ((end,), (), end)
    assert loaded.reply_start.tolist() == [end]


def test_end_and_pad_that_the_tokenizer_names_are_used(tmp_path):
    backend = byte_level()
    backend.add_special_tokens(["</s>", "<pad>", "<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    loaded = DialogueTokenizer.load(tmp_path, "plain")
    assert loaded.end_ids == (backend.token_to_id("</s>"),)
    assert loaded.pad_id == backend.token_to_id("<pad>")
    assert set(loaded.suppressed_ids) == {backend.token_to_id(token) for token in ("<s>", "<pad>", "<|endoftext|>")}


def test_directory_of_vocabulary_and_merges_loads_as_gpt2(tmp_path):
    backend = byte_level()
    backend.model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    end = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "<|endoftext|>": end}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    loaded = DialogueTokenizer.load(tmp_path, fallback="plain")
    assert (loaded.template, loaded.end_of_text_id, loaded.vocab_size) == ("plain", end, end + 1)
    text = "hello there, you"
    assert loaded.encode_text(text).tolist() == backend.encode(text).ids


CHINESE_VOCABULARY = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"你好世界，。,.![]'2"]
CHINESE_VOCABULARY += ["hello", "world", "un", "##k", "what", "s", "up"]


@pytest.fixture
def chinese(tmp_path):
    """A directory with what uer's Chinese GPT-2 models have, and no more."""
    (tmp_path / "vocab.txt").write_text("\n".join(CHINESE_VOCABULARY) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "tokenizer_class": "BertTokenizer"}))
    return tmp_path


def test_bert_vocabulary_reads_raw_text_as_its_models_were_trained(chinese):
    tokenizer = DialogueTokenizer.load(chinese, fallback="plain")
    ids = {token: number for number, token in enumerate(CHINESE_VOCABULARY)}
    encoded = tokenizer.encode(dialogue(("text", "你好，世界")))
    assert encoded.tokens.tolist() == [ids[token] for token in ("[CLS]", *"你好，世界", "[SEP]")]
    assert encoded.loss_mask.tolist() == [0] + [1] * 6
    assert tokenizer.end_ids == (ids["[SEP]"],)
    assert tokenizer.reply_start.tolist() == [ids["[CLS]"]]
    assert set(tokenizer.suppressed_ids) == {ids[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[MASK]")}
    assert tokenizer.vocab_size == len(CHINESE_VOCABULARY)
    assert tokenizer.encode_prompt(dialogue(("user", "你好")), 16).tokens.tolist() == [ids["[CLS]"], 6, 7]


def test_bert_vocabulary_gains_role_tokens_and_keeps_its_own_end_and_pad(chinese):
    tokenizer = DialogueTokenizer.load(chinese)
    assert tokenizer.template == "role_tokens"
    assert tokenizer.base_vocab_size == len(CHINESE_VOCABULARY)
    assert tokenizer.vocab_size == len(CHINESE_VOCABULARY) + 5  # four roles and the end of a turn
    assert (tokenizer.pad_id, tokenizer.end_of_text_id) == (0, 4)


@pytest.mark.parametrize("special", ["[UNK]", "[SEP]", "[CLS]", "[PAD]", "[MASK]"])
def test_bert_control_token_that_a_user_spells_is_text(chinese, special):
    tokenizer = DialogueTokenizer.load(chinese, "plain")
    left, *_, right = (CHINESE_VOCABULARY[token] for token in tokenizer.encode_text(special))
    assert (left, right) == ("[", "]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("你好，世界。", "你好，世界。"),
        ("hello world", "hello world"),
        ("你好 hello world 世界", "你好hello world世界"),
        ("what up, world!", "what up, world!"),
        ("你好 ， 2 世界", "你好，2世界"),
    ],
)
def test_decoding_wordpiece_spaces_latin_words_and_nothing_chinese(chinese, text, shown):
    tokenizer = DialogueTokenizer.load(chinese, "plain")
    assert tokenizer.decode(tokenizer.encode_text(text)) == shown
    assert tokenizer.decode_batch([tokenizer.encode_text(text)] * 2) == [shown] * 2


def test_text_that_the_vocabulary_lacks_is_counted_where_the_loss_is(chinese):
    tokenizer = DialogueTokenizer.load(chinese)
    replies = ("user", "龍"), ("assistant", "你 好 龍 zebra\u200b"), ("user", "龍"), ("assistant", "hello")
    assert tokenizer.encode(dialogue(*replies)).unknown_bytes == 3 + 5 + 3
    assert tokenizer.encode(dialogue(("text", "龍"), ("text", "你龜"))).unknown_bytes == 6
    assert tokenizer.encode(dialogue(("user", "龍"))).unknown_bytes == 0
    assert tokenizer.encode(dialogue(("user", "你"), ("assistant", "你好"))).unknown_bytes == 0


def test_bytes_that_a_vocabulary_drops_without_a_word_are_counted():
    tokenizer = DialogueTokenizer(byte_level(["abc abc"] * 5, 20, alphabet=False))
    assert tokenizer.encode(dialogue(("user", "x"), ("assistant", "abxyc"))).unknown_bytes == 2


@given(st.text())
def test_byte_level_tokenizer_expresses_every_text(tokenizer, text):
    assert tokenizer.encode(dialogue(("text", text))).unknown_bytes == 0


@pytest.mark.parametrize("template", ["role_tokens", "end_of_text", "plain"])
def test_saved_tokenizer_is_the_same_tokenizer(tmp_path, template):
    backend = byte_level()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = DialogueTokenizer.load(tmp_path, template)
    tokenizer.save(tmp_path / "saved")
    loaded = DialogueTokenizer.load(tmp_path / "saved")
    assert (loaded.fingerprint, loaded.template) == (tokenizer.fingerprint, template)
    assert (loaded.end_ids, loaded.suppressed_ids) == (tokenizer.end_ids, tokenizer.suppressed_ids)
    assert {"vocab.json", "merges.txt", "chat_template.jinja"} <= {file.name for file in (tmp_path / "saved").iterdir()}


def test_fingerprint_tells_templates_apart():
    tokenizers_ = [DialogueTokenizer(byte_level(), template=template) for template in ("plain", "end_of_text")]
    assert tokenizers_[0].fingerprint != tokenizers_[1].fingerprint


def test_another_template_can_be_asked_of_a_saved_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert DialogueTokenizer.load(tmp_path, "plain").template == "plain"
    assert DialogueTokenizer.load(tmp_path, fallback="plain").template == "role_tokens"


def test_saved_chinese_tokenizer_is_the_same_tokenizer(chinese, tmp_path):
    tokenizer = DialogueTokenizer.load(chinese, "plain")
    tokenizer.save(tmp_path / "saved")
    loaded = DialogueTokenizer.load(tmp_path / "saved")
    raw = dialogue(("text", "你好 what's up"))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(raw).tokens.tolist() == tokenizer.encode(raw).tokens.tolist()
    assert (tmp_path / "saved" / "vocab.txt").read_text(encoding="utf-8").split() == CHINESE_VOCABULARY


def test_tokenizer_that_cannot_tell_text_from_control_tokens_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"<|user|>": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match="reads the text '<|user|>' as a control token".replace("|", r"\|")):
        DialogueTokenizer(backend)


def test_tokenizer_that_writes_its_end_for_unknown_text_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "hi": 1}, unk_token="<|endoftext|>"))
    with pytest.raises(UserError, match="reads text that it cannot express as its end of text"):
        DialogueTokenizer(backend, template="plain")


def test_missing_and_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(UserError, match="nothing: not a tokenizer directory and not on the hub"):
        DialogueTokenizer.load(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer file"):
        DialogueTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": {"model_type": "gpt2"}}, r"holds no tokenizer: there is no tokenizer\.json, no vocab\.json"),
        ({"config.json": {"model_type": "gpt2"}, "vocab.json": {"a": 0}}, r"merges\.txt is missing"),
        ({"config.json": {"model_type": "gpt2"}, "merges.txt": {}}, r"vocab\.json is missing"),
        ({"config.json": {"tokenizer_class": "BertTokenizer"}}, r"vocab\.txt is missing, which a BertTokenizer needs"),
        ({"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}, r"vocab\.txt is missing"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: cannot be read"),
        ({"tokenizer_config.json": []}, r"tokenizer_config\.json: not a JSON object"),
        ({"config.json": {"model_type": "gpt2"}, "tokenizer.json": "{"}, "its tokenizer files cannot be read"),
        ({"tokenizer_config.json": {"dialogue_template": "plain"}}, r"tokenizer\.json is missing"),
    ],
)
def test_missing_file_is_named_with_its_directory(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        DialogueTokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_chat_template_that_a_tokenizer_lacks_cannot_be_asked_for(tokenizer, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="chat_template: the tokenizer has none; use role_tokens or plain"):
        DialogueTokenizer.load(tmp_path, "chat_template")


def test_unknown_template_is_named_with_those_there_are(tmp_path):
    with pytest.raises(UserError, match="template alpaca: use one of auto, role_tokens, end_of_text, chat_template"):
        DialogueTokenizer.load(tmp_path, "alpaca")


def test_partial_alphabet_of_a_gpt2_directory_drops_text_but_forges_no_end(tmp_path):
    """Its unknown token is by name the end of text, which it never writes."""
    byte_level(["abc"] * 5, 20, alphabet=False).model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = DialogueTokenizer.load(tmp_path, "end_of_text")
    encoded = tokenizer.encode(dialogue(("user", "a<|endoftext|>"), ("assistant", "xa")))
    assert encoded.tokens.tolist().count(tokenizer.end_of_text_id) == 2
    assert encoded.unknown_bytes == 1
