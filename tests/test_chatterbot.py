"""The packaged corpus of many languages: what it yields by language and regime, and Chinese from files to replies."""

import itertools
import json
import re
import sys
from typing import Any

import pytest
import stand_in
import tiny

from ssl_jax import generate
from ssl_jax.config import Config, Source
from ssl_jax.data import chatterbot
from ssl_jax.data.formats import Expected, Rejected
from ssl_jax.data.packaged import ResolvedSource
from ssl_jax.data.pipeline import prepare
from ssl_jax.errors import UserError

CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")
CONVERSATIONS = """\
categories: [talk]
conversations:
- [a, b]
- [a, c, d]
- [a, e]
- [f, g, h, i]
- [j, k]
- just text
- [l, ' ']
- [m, 1]
- [n]
"""


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A small corpus of two languages in the package's layout."""
    for language in ("klingon", "quenya"):
        (tmp_path / "corpus" / language).mkdir(parents=True)
        (tmp_path / "corpus" / language / "talk.yml").write_text(CONVERSATIONS, encoding="utf-8")
    monkeypatch.setattr(chatterbot, "data_folder", lambda: tmp_path / "corpus")
    return tmp_path / "corpus"


def resolve(expected: Expected, language: Any = "klingon", **settings: Any) -> ResolvedSource:
    source = Source(dataset="chatterbot", language=language, **settings)
    return ResolvedSource(expected, source, tuple(chatterbot.data_files(source)))


def rows(*sources):
    return [(source, row) for source, _, row in chatterbot.dialogues(sources) if not isinstance(row, Rejected)]


def texts(found):
    return sorted(" ".join(turn.content for turn in row.turns) for _, row in found)


def test_labeled_dialogues_alternate_and_end_with_a_reply(corpus):
    found = rows(resolve("labeled"))
    assert texts(found) == ["a b", "a c", "a e", "f g h i", "j k"]
    for _, dialogue in found:
        assert [turn.role for turn in dialogue.turns] == ["user", "assistant"] * (len(dialogue.turns) // 2)


def test_logs_are_complete_and_without_roles(corpus):
    found = rows(resolve("unlabeled", regime="logs"))
    assert texts(found) == ["a b", "a c d", "a e", "f g h i", "j k"]
    assert {row.kind for _, row in found} == {"raw"}


def test_prompts_hold_no_word_of_the_assistant(corpus):
    found = rows(resolve("unlabeled", regime="prompts"))
    assert texts(found) == ["a", "a", "a", "d", "f", "h", "j"]
    assert {row.kind for _, row in found} == {"prompt"}
    assert len({row.id for _, row in found}) == len(found)


def test_what_is_no_conversation_is_reported_once_with_its_number(corpus):
    sources = (resolve("labeled"), resolve("unlabeled", regime="logs"))
    rejected = [row for _, _, row in chatterbot.dialogues(sources) if isinstance(row, Rejected)]
    assert [(row.line, row.reason) for row in rejected] == [
        (6, "conversation is not a list"), (7, "empty turn"), (8, "content is not text"), (9, "no reply"),
    ]  # fmt: skip


def test_a_dialogue_knows_its_language_category_and_opening(corpus):
    (first, *_) = sorted((row for _, row in rows(resolve("labeled"))), key=lambda row: row.id)
    assert first.id == "klingon/talk/1"
    assert first.metadata == {"language": "klingon", "category": "talk", "group": "klingon: a"}


def test_ids_do_not_depend_on_which_languages_are_read(corpus):
    alone = {row.id for _, row in rows(resolve("labeled", "quenya"))}
    both = {row.id for _, row in rows(resolve("labeled", ["klingon", "quenya"]))}
    assert both == {row.id for _, row in rows(resolve("labeled", "all"))}
    assert alone == {id for id in both if id.startswith("quenya/")}


@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_label_budgets_are_nested_keep_openings_together_and_leave_the_rest(corpus, budget):
    labeled, logs = resolve("labeled", max_dialogues=budget), resolve("unlabeled", regime="logs")
    found = rows(logs, labeled)
    taken = [row.id for source, row in found if source is labeled]
    rest = [row.id for source, row in found if source is logs]
    assert len(taken) == budget and len(taken) + len(rest) == 5
    assert not set(taken) & set(rest)
    assert taken == [row.id for _, row in rows(resolve("labeled"))][:budget]
    openings = [row.metadata["group"] for _, row in rows(resolve("labeled"))]
    assert len(list(itertools.groupby(openings))) == len(set(openings)) == 3


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ((), "dataset chatterbot needs language: all, or some of klingon, quenya"),
        ("klingn", r"dataset chatterbot has no language 'klingn'; did you mean klingon\?"),
        (["quenya", "zz"], "no language 'zz'; use all, or some of klingon, quenya"),
    ],
)
def test_a_language_that_is_not_there_is_an_error_that_lists_them(corpus, language, message):
    with pytest.raises(UserError, match=message):
        resolve("labeled", language)


@pytest.mark.parametrize("content", ["conversations: [", "[]", "conversations: !!python/object/new:os.system [id]"])
def test_a_damaged_file_is_named_and_yaml_makes_no_objects(corpus, content):
    (corpus / "klingon" / "talk.yml").write_text(content)
    with pytest.raises(UserError, match=r"talk\.yml: .*install chatterbot-corpus again"):
        rows(resolve("labeled"))


def test_missing_package_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "chatterbot_corpus", None)
    with pytest.raises(UserError, match=r"pip install 'ssl_jax\[demo\]'"):
        chatterbot.data_folder()


def configuration(folder, labeled=None, unlabeled=(), **data):
    labeled = {"dataset": "chatterbot", "language": "klingon"} if labeled is None else labeled
    data = {"labeled": [labeled], "unlabeled": list(unlabeled), "prepared_dir": str(folder / "prepared"), **data}
    return {"data": data, "train": {"unlabeled_ratio": 1 if unlabeled else 0}, "tokenizer": {"vocab_size": 400}}


def test_prepared_data_name_their_source_and_change_with_the_package(corpus, tmp_path):
    config = Config.model_validate(configuration(tmp_path, max_rejected_fraction=0.5, test_size=0.01, dev_size=0))
    first = prepare(config, lambda line: None)
    assert first.summary["sources"] == {"chatterbot:klingon": 5}
    assert first.dialogue("labeled_train", 0).metadata["source"] == "chatterbot:klingon"
    (corpus / "quenya" / "talk.yml").write_text("conversations: []")
    assert prepare(config, lambda line: None).directory == first.directory
    (corpus / "klingon" / "talk.yml").write_text(CONVERSATIONS.replace("[j, k]", "[j, kk]"))
    assert prepare(config, lambda line: None).directory != first.directory


@pytest.mark.parametrize(
    ("expected", "source", "message"),
    [
        ("labeled", {"regime": "logs"}, "data.labeled: dataset chatterbot with regime 'logs'; use one of: labeled"),
        ("unlabeled", {"regime": "turns"}, "with regime 'turns'; use one of: logs, prompts"),
        ("unlabeled", {}, "with regime None; use one of: logs, prompts"),
    ],
)
def test_a_regime_that_the_corpus_does_not_have_is_refused(corpus, tmp_path, expected, source, message):
    source = {"dataset": "chatterbot", "language": "klingon", **source}
    sources = {"labeled": source} if expected == "labeled" else {"unlabeled": [source]}
    with pytest.raises(UserError, match=message):
        prepare(Config.model_validate(configuration(tmp_path, **sources)), lambda line: None)


def test_the_whole_package_is_read_and_says_what_it_cannot_use():
    pytest.importorskip("chatterbot_corpus")
    found = [row for _, _, row in chatterbot.dialogues([resolve("labeled", "all")])]
    dialogues = [row for row in found if not isinstance(row, Rejected)]
    assert len({dialogue.metadata["language"] for dialogue in dialogues}) == 28
    assert len(dialogues) > 7000
    assert len({dialogue.id for dialogue in dialogues}) == len(dialogues)
    assert 0 < len(found) - len(dialogues) < 0.01 * len(found)


def chinese(folder):
    """Chinese, some of it labeled and the rest as logs."""
    pytest.importorskip("chatterbot_corpus")
    source = {"dataset": "chatterbot", "language": "chinese"}
    labeled = {**source, "max_dialogues": 200}
    return configuration(folder, labeled, [{**source, "regime": "logs"}], split_by="group")


def test_chinese_is_prepared_with_no_opening_on_two_sides(tmp_path):
    prepared = prepare(Config.model_validate(chinese(tmp_path)), lambda line: None)
    assert prepared.summary["sources"] == {"chatterbot:chinese": 200, "chatterbot:chinese:logs": 267}
    openings = {
        split: {prepared.dialogue(split, i).metadata["group"] for i in range(len(prepared.lengths(split)))}
        for split in ("labeled_train", "labeled_dev", "labeled_test")
    }
    for one, other in itertools.combinations(openings.values(), 2):
        assert not one & other
    encoded = prepared.encoded("labeled_train")[0]
    assert CHINESE_CHARACTER.search(prepared.tokenizer.decode(encoded.tokens))
    assert encoded.unknown_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["fitted BPE", "characters of BertTokenizer"])
def test_a_model_of_the_chinese_corpus_replies_in_chinese(tmp_path, capsys, vocabulary):
    values = chinese(tmp_path)
    values["tokenizer"] = {"vocab_size": 1200}
    if vocabulary != "fitted BPE":
        found = (row for _, row in rows(resolve("labeled", "chinese")))
        stand_in.chinese(tmp_path / "chinese", [turn.content for row in found for turn in row.turns])
        values["tokenizer"] = {"name_or_path": str(tmp_path / "chinese"), "template": "role_tokens"}
    values["model"] = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 256, "dtype": "float32"}
    values["train"] = {
        "steps": 100, "per_device_train_batch_size": 16, "sequence_length": 64, "unlabeled_ratio": 1,
        "pseudo_label_fraction": 0, "eval_steps": 100, "save_steps": 100,
    }  # fmt: skip
    values["optimizer"] = {"learning_rate": 5.0e-3}
    sampling = {"max_new_tokens": 16}
    values["evaluation"] = {"dev_dialogues": 8, "generated_replies": 0, "recall_examples": 2, "sampling": sampling}
    workdir = tiny.run_train(tiny.write_config(tmp_path / "config.yaml", values), tmp_path / "run")
    capsys.readouterr()
    options = ["--max-new-tokens", "24", "--do-sample", "false", "--json"]
    generate.main(["--workdir", str(workdir), *options, "--prompt", "你好", "你是谁"])
    replies = [json.loads(line)["reply"] for line in capsys.readouterr().out.splitlines()]
    assert len(replies) == 2
    for reply in replies:
        characters = CHINESE_CHARACTER.findall(reply)
        assert len(characters) >= max(1, len(reply) // 2), replies
        assert "##" not in reply and "[UNK]" not in reply, replies
