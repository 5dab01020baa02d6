"""Ids, masks and saved files agree with transformers' own tokenizers and chat templates."""

# ruff: noqa: RUF001 - Chinese punctuation is meant.

import json

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue import Dialogue, Turn

TEXTS = [
    "Hello there!\n\nHow are you, my friend?  I'm fine.",
    "user assistant system [INST] role\n",
    " leading, trailing \n",
    "ünïcödé 你好 👋 12345",
] * 8
CONVERSATIONS = [
    [("user", "Hello there!"), ("assistant", "Hi, how are you?")],
    [("user", " hi "), ("assistant", "\n\nwell\n"), ("user", "12 + 5?"), ("assistant", "  17\n")],
    [("user", "你好"), ("assistant", "👋"), ("user", "\nnew\n\nlines\n")],
    [("user", "Who?")],
]
WITH_SYSTEM = [[("system", " Be kind.\n"), *turns] for turns in CONVERSATIONS]

CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_ML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% else %}\n"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
DIALOGPT = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
PHI = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim "
    "+ '<|strip|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATES = {
    "chatml": (CHAT_ML, True),
    "chatml with generation blocks": (CHAT_ML_MARKED, True),
    "llama 2": (LLAMA_2, False),
    "zephyr": (ZEPHYR, True),
    "dialogpt": (DIALOGPT, True),
    "token that takes spaces along": (PHI, True),
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def dialogue(turns):
    return Dialogue(tuple(Turn(role, content) for role, content in turns), "id")


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def byte_level():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


@pytest.fixture(scope="module")
def chat_directories(tmp_path_factory):
    """Saved tokenizers of other people, one for each chat template."""
    directories = {}
    for name, (template, _) in CHAT_TEMPLATES.items():
        backend = byte_level()
        backend.add_special_tokens([*NAMED.values(), "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"])
        backend.add_special_tokens([AddedToken("<|strip|>", lstrip=True, rstrip=True, special=True)])
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **NAMED)
        directories[name] = tmp_path_factory.mktemp("chat")
        theirs.save_pretrained(directories[name])
    return directories


def conversations(name):
    return CONVERSATIONS + (WITH_SYSTEM if CHAT_TEMPLATES[name][1] else [])


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_chat_template_gives_the_ids_of_apply_chat_template(chat_directories, name):
    theirs = transformers.AutoTokenizer.from_pretrained(chat_directories[name])
    ours = DialogueTokenizer.load(chat_directories[name])
    assert ours.template == "chat_template"
    for turns in conversations(name):
        complete = theirs.apply_chat_template(messages(turns), return_dict=False)
        assert ours.encode(dialogue(turns)).tokens.tolist() == complete
        prompt = theirs.apply_chat_template(messages(turns), add_generation_prompt=True, return_dict=False)
        if turns[-1][0] == "user":
            assert ours.encode_prompt(dialogue(turns), 1000).tokens.tolist() == prompt


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_prompt_and_reply_together_are_the_complete_dialogue(chat_directories, name):
    ours = DialogueTokenizer.load(chat_directories[name])
    for turns in conversations(name):
        if turns[-1][0] == "assistant":
            complete = ours.encode(dialogue(turns)).tokens.tolist()
            prompt = ours.encode_prompt(dialogue(turns[:-1]), 1000).tokens.tolist()
            reply = ours.encode_reply(turns[-1][1]).tolist()
            together = [*prompt, *reply]
            # Where text meets text, tokens may join; what is said is the same, up to a line end behind the end token.
            said, all_said = ours.decode(together), ours.decode(complete)
            assert all_said.startswith(said)
            assert all_said[len(said) :] in ("", "\n")
            assert together[-1] == ours.end_ids[0]


def test_generation_blocks_give_the_mask_of_apply_chat_template(chat_directories):
    name = "chatml with generation blocks"
    theirs = transformers.AutoTokenizer.from_pretrained(chat_directories[name])
    ours = DialogueTokenizer.load(chat_directories[name])
    for turns in conversations(name):
        if turns[-1][0] == "assistant":
            expected = theirs.apply_chat_template(messages(turns), return_assistant_tokens_mask=True, return_dict=True)
            assert ours.encode(dialogue(turns)).loss_mask.tolist() == expected["assistant_masks"]


def test_mask_without_blocks_is_that_of_the_same_template_with_them(chat_directories):
    plain = DialogueTokenizer.load(chat_directories["chatml"])
    marked = DialogueTokenizer.load(chat_directories["chatml with generation blocks"])
    for turns in conversations("chatml"):
        encoded, expected = (tokenizer.encode(dialogue(turns)) for tokenizer in (plain, marked))
        assert encoded.loss_mask.tolist() == expected.loss_mask.tolist()


def saved_tokenizers(directory):
    """(name, our tokenizer) for every template of our own, over byte-level and BERT vocabularies."""
    byte_level().save(str(directory / "tokenizer.json"))
    bert = directory / "bert"
    bert.mkdir()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"你好世界，。!?,.",
        "hello",
        "who",
        "are",
        "##s",
        "you",
        "be",
    ]
    (bert / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (bert / "config.json").write_text(json.dumps({"model_type": "gpt2", "tokenizer_class": "BertTokenizer"}))
    for template in ("role_tokens", "end_of_text", "plain"):
        yield f"bytes {template}", DialogueTokenizer.load(directory, template)
        yield f"bert {template}", DialogueTokenizer.load(bert, template)


def test_saved_directory_gives_transformers_the_same_ids_and_prompts(tmp_path):
    for name, ours in saved_tokenizers(tmp_path):
        ours.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(theirs) == ours.vocab_size
        assert theirs.convert_tokens_to_ids(theirs.pad_token or theirs.eos_token) == ours.pad_id
        for text in [*TEXTS[:4], "你好，世界。", "<|im_start|>", "a\x00b\r\n\u200b"]:
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode_text(text).tolist(), (name, text)
        for turns in (*CONVERSATIONS, *WITH_SYSTEM):
            complete = theirs.apply_chat_template(messages(turns), return_dict=False)
            assert ours.encode(dialogue(turns)).tokens.tolist() == complete, (name, turns)
            if turns[-1][0] == "user":
                prompt = theirs.apply_chat_template(messages(turns), add_generation_prompt=True, return_dict=False)
                assert ours.encode_prompt(dialogue(turns), 1000).tokens.tolist() == prompt, (name, turns)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_saved_chat_template_survives(chat_directories, tmp_path, name):
    ours = DialogueTokenizer.load(chat_directories[name])
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = CONVERSATIONS[0]
    expected = ours.encode(dialogue(turns)).tokens.tolist()
    assert theirs.apply_chat_template(messages(turns), return_dict=False) == expected
    assert DialogueTokenizer.load(tmp_path).encode(dialogue(turns)).tokens.tolist() == expected


def test_bert_reads_raw_text_as_transformers_does(tmp_path):
    for name, ours in saved_tokenizers(tmp_path):
        if name == "bert plain":
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
            for text in ("你好，世界。", "hello 你好", "龍!"):
                raw = Dialogue((Turn("text", text),))
                assert ours.encode(raw).tokens.tolist() == theirs(text)["input_ids"]


honest = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<>|[]"), min_size=1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(turns=st.lists(honest, min_size=1, max_size=5), name=st.sampled_from(list(CHAT_TEMPLATES)))
def test_any_honest_text_gives_the_ids_of_apply_chat_template(chat_directories, loaded, turns, name):
    ours, theirs = loaded(name)
    turns = [(("user", "assistant")[number % 2], content) for number, content in enumerate(turns)]
    expected = theirs.apply_chat_template(messages(turns), return_dict=False)
    assert ours.encode(dialogue(turns)).tokens.tolist() == expected


@pytest.fixture(scope="module")
def loaded(chat_directories):
    """Both readings of a chat template's tokenizer, by name."""
    both = {
        name: (DialogueTokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory))
        for name, directory in chat_directories.items()
    }
    return both.__getitem__
