"""TFDS and Hugging Face data sets by name: every form of mapping, and what a user is told when something is wrong."""

import json
import shutil
import sys
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.config import Config, Source
from ssl_jax.config.data import FieldMapping
from ssl_jax.data import field_mapping, named
from ssl_jax.data.formats import Accepted, Expected, Rejected
from ssl_jax.data.formats.rows import BadRow
from ssl_jax.data.pipeline import prepare
from ssl_jax.dialogue import Turn
from ssl_jax.errors import UserError

ROWS = 12


def tfds_example(number):
    return {
        "dialog": [f"hi {number}", "你好", "bye"],
        "turns": [{"speaker": 0, "utterance": f"question {number}"}, {"speaker": 1, "utterance": "answer"}],
        "question": f"q {number}",
        "answer": f"a {number}" if number else "",
        "number": number,
        "emotion": number % 2,
        "picture": np.zeros((2, 2), np.float32),
    }


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A folder that TFDS has prepared a data set in, as ArrayRecord."""
    import tensorflow_datasets as tfds

    class TinyTalk(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "tiny_talk"
        code_path = None

        def _info(self):
            text = tfds.features.Text()
            turn = {"speaker": tfds.features.ClassLabel(names=["customer", "agent"]), "utterance": text}
            features = {
                "dialog": tfds.features.Sequence(text),
                "turns": tfds.features.Sequence(turn),
                "question": text,
                "answer": text,
                "number": np.int64,
                "emotion": tfds.features.ClassLabel(names=["sad", "glad"]),
                "picture": tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(ROWS), "test": self._generate_examples(3)}

        def _generate_examples(self, rows):
            for number in range(rows):
                yield number, tfds_example(number)

    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TinyTalk(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory):
    """A folder of JSON Lines as people keep them beside `datasets`, and a place for its cache."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("huggingface")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        (folder / "data").mkdir()
        for split, count in (("train", ROWS), ("test", 3)):
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": f"hi {number}"},
                        {"role": "assistant", "content": f"hello {number}"},
                    ],
                    "talk": {"lines": [{"who": "A", "says": f"one {number}"}, {"who": "B", "says": "two"}]},
                    "topic": "greeting",
                }
                for number in range(count)
            ]
            (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder


def read(expected: Expected, max_turn_bytes: int, numbers: slice, source: dict[str, Any]) -> list[Accepted | Rejected]:
    found = Source.model_validate(source)
    return list(named.read(found, expected, max_turn_bytes, "name", range(named.size(found))[numbers]))


def rows(expected: Expected = "labeled", max_turn_bytes: int = 1000, **source: Any) -> list[Any]:
    """All dialogues of a source, and its rejected rows."""
    found = read(expected, max_turn_bytes, slice(None), source)
    return [row if isinstance(row, Rejected) else row.dialogue for row in found]


def said(dialogue):
    return [(turn.role, turn.content) for turn in dialogue.turns]


QUESTION_AND_ANSWER = [("user", "question 1"), ("assistant", "answer")]


@pytest.mark.parametrize(
    ("expected", "fields", "turns"),
    [
        ("labeled", {"messages": "dialog"}, [("user", "hi 1"), ("assistant", "你好")]),
        ("unlabeled", {"messages": "dialog"}, [("text", "hi 1"), ("text", "你好"), ("text", "bye")]),
        ("labeled", {"messages": "turns", "content": "utterance"}, QUESTION_AND_ANSWER),
        ("labeled", {"messages": "turns.utterance"}, QUESTION_AND_ANSWER),
        (
            "labeled",
            {"messages": "turns", "content": "utterance", "role": "speaker",
             "roles": {"customer": "user", "agent": "assistant"}},
            QUESTION_AND_ANSWER,
        ),
        (
            "unlabeled",
            {"messages": "turns", "content": "utterance", "role": "speaker", "roles": {0: "assistant", 1: "user"}},
            [("assistant", "question 1"), ("user", "answer")],
        ),
        ("labeled", {"prompt": "question", "completion": "answer"}, [("user", "q 1"), ("assistant", "a 1")]),
        ("unlabeled", {"prompt": "question"}, [("user", "q 1")]),
        ("unlabeled", {"text": "question"}, [("text", "q 1")]),
        (
            "labeled",
            {"prompt": "question", "completion": "answer", "system": "emotion"},
            [("system", "glad"), ("user", "q 1"), ("assistant", "a 1")],
        ),
    ],
)  # fmt: skip
def test_every_form_of_mapping_reads_a_tfds_data_set(tfds_folder, expected, fields, turns):
    found = rows(expected, tfds="tiny_talk", data_dir=str(tfds_folder), split="train[1:]", fields=fields)
    assert len(found) == ROWS - 1
    assert said(found[0]) == turns


def test_an_absent_completion_makes_a_prompt_and_a_labeled_source_rejects_it(tfds_folder):
    source: dict[str, Any] = {"tfds": "tiny_talk", "data_dir": str(tfds_folder)}
    fields = {"prompt": "question", "completion": "answer"}
    first, *rest = rows(**source, fields=fields)
    assert first == Rejected("name", 1, "no reply", "ends in a user turn")
    assert len(rest) == ROWS - 1
    assert rows("unlabeled", **source, fields=fields)[0].kind == "prompt"


def test_other_fields_become_metadata_as_far_as_json_can_hold_them(tfds_folder):
    fields = {"messages": "turns", "content": "utterance", "group": "emotion", "id": "number"}
    dialogue = rows(tfds="tiny_talk", data_dir=str(tfds_folder), fields=fields)[3]
    assert dialogue.id == "3"
    assert dialogue.metadata == {
        "source": "name", "dialog": ["hi 3", "你好", "bye"], "question": "q 3", "answer": "a 3", "emotion": "glad",
        "group": "glad",
    }  # fmt: skip


def test_a_part_of_the_examples_is_read_with_the_numbers_that_they_have_in_all(tfds_folder):
    source = {
        "tfds": "tiny_talk",
        "data_dir": str(tfds_folder),
        "fields": {"prompt": "question", "completion": "answer"},
    }
    everything = read("labeled", 1000, slice(None), source)
    assert [row.line for row in everything] == list(range(1, ROWS + 1))
    assert [row.dialogue.id for row in everything if isinstance(row, Accepted)] == [
        f"name:{number}" for number in range(2, ROWS + 1)
    ]
    for cut in (0, 1, 5, ROWS):
        parts = [read("labeled", 1000, part, source) for part in (slice(cut), slice(cut, None))]
        assert [row for part in parts for row in part] == everything


def test_examples_with_an_id_that_was_there_before_are_rejected_with_their_number(tfds_folder, tmp_path):
    fields = {"messages": "dialog", "id": "emotion"}
    data = {
        "labeled": [{"tfds": "tiny_talk", "data_dir": str(tfds_folder), "fields": fields}],
        "prepared_dir": str(tmp_path / "prepared"),
        "max_rejected_fraction": 1.0,
    }
    values = {"data": data, "tokenizer": {"vocab_size": 300}, "train": {"unlabeled_ratio": 0}}
    prepared = prepare(Config.model_validate(values), lambda line: None)
    assert prepared.summary["sources"] == {"tiny_talk:train": 2}
    rejected = [json.loads(line) for line in (prepared.directory / "rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in rejected] == [
        ("tiny_talk:train", number, "duplicate id") for number in range(3, ROWS + 1)
    ]
    assert rejected[1]["detail"] == "'glad' is also at tiny_talk:train:2"


def test_a_long_turn_is_rejected(tfds_folder):
    found = rows(tfds="tiny_talk", data_dir=str(tfds_folder), max_turn_bytes=4, fields={"messages": "dialog"})
    assert {row.reason for row in found} == {"turn too long"}


def test_a_folder_that_tfds_prepared_is_read_without_its_name(tfds_folder):
    assert len(rows(tfds=str(tfds_folder / "tiny_talk"), fields={"messages": "dialog"}, split="test")) == 3


FIELDS = r"it has answer \(text\), dialog \(list of text\), emotion \(label\), .*turns\.utterance \(list of text\)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, f"tfds tiny_talk needs fields, .*{FIELDS}"),
        ({"fields": {"messages": "dialogue"}}, f"fields.messages names 'dialogue'; {FIELDS}"),
        ({"fields": {"messages": "turns", "content": "text"}}, "fields.content names 'turns.text'"),
        ({"split": "dev", "fields": {"text": "question"}}, "tfds tiny_talk: split dev: Unknown split 'dev'"),
        ({"tfds": "tiny_tale", "fields": {"text": "question"}}, "tfds tiny_tale: TFDS has no such data set"),
        ({"tfds": "imdb_revews", "data_dir": None}, "no such data set; did you mean imdb_reviews"),
        ({"tfds": "what is this"}, "tfds what is this: Parsing builder name string"),
    ],
)
def test_what_tfds_does_not_have_is_named(tfds_folder, source, message):
    with pytest.raises(UserError, match=message) as raised:
        named.data_files(Source.model_validate({"tfds": "tiny_talk", "data_dir": str(tfds_folder), **source}))
    assert len(str(raised.value).splitlines()) <= 2


def test_a_folder_without_a_data_set_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"name the folder with features\.json; found nothing"):
        named.data_files(Source(tfds=str(tmp_path)))


def test_a_stored_class_that_is_not_of_tfds_is_not_imported(tfds_folder, tmp_path, monkeypatch):
    folder = tmp_path / "copied"
    shutil.copytree(tfds_folder / "tiny_talk" / "1.0.0", folder)
    features = (folder / "features.json").read_text()
    (folder / "features.json").write_text(
        features.replace("tensorflow_datasets.core.features.text_feature.Text", "evil_module.Text")
    )
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"names evil_module\.Text, a class that is not of TFDS"):
        named.data_files(Source(tfds=str(folder)))


def test_data_that_need_tensorflow_name_the_way_out(tfds_folder, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(tfds_folder / "tiny_talk" / "1.0.0", folder)
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"stored as tfrecord, which needs TensorFlow; build it with file_format='arr"):
        named.data_files(Source(tfds=str(folder), fields=FieldMapping(messages="dialog")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError(name="tensorflow"), "cannot be built without the package tensorflow; where that is"),
        (ModuleNotFoundError(name="mwxml"), "cannot be built without the package mwxml; pip install"),
        (RuntimeError("503 from a server"), "cannot be built: RuntimeError: 503 from a server\nbuild it elsewhere"),
    ],
)
def test_a_builder_that_fails_is_a_message_and_not_a_traceback(tmp_path, monkeypatch, error, message):
    import tensorflow_datasets as tfds

    def fail(self):
        raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError, match=message):
        named.data_files(Source(tfds="imdb_reviews", data_dir=str(tmp_path)))


def test_a_damaged_file_is_named(tfds_folder, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(tfds_folder / "tiny_talk" / "1.0.0", folder)
    (file,) = folder.glob("*train*")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"examples 1 to 12 cannot be read, a file is damaged"):
        rows(tfds=str(folder), fields={"messages": "dialog"})


@pytest.mark.parametrize("where", ["folder", "file", "parquet", "saved"])
def test_huggingface_reads_local_data_in_every_shape(huggingface_folder, tmp_path, where):
    import datasets

    data = huggingface_folder / "data"
    if where in ("parquet", "saved"):
        found = datasets.load_dataset(str(data))
        assert isinstance(found, datasets.DatasetDict)
        found["train"].to_parquet(str(tmp_path / "train.parquet"))
        found.save_to_disk(str(tmp_path / "saved"))
    place = {"folder": data, "file": data / "train.jsonl", "parquet": tmp_path / "train.parquet",
             "saved": tmp_path / "saved"}[where]  # fmt: skip
    source: dict[str, Any] = {"huggingface": str(place), "fields": {"messages": "messages"}}
    found = rows(**source, split="train[:4]")
    assert [said(row) for row in found] == [[("user", f"hi {i}"), ("assistant", f"hello {i}")] for i in range(4)]
    assert found[0].metadata["topic"] == "greeting"
    assert all(file.is_file() for file in named.data_files(Source.model_validate(source)))
    if where in ("folder", "saved"):
        assert len(rows(**source, split="test")) == 3


def test_huggingface_nested_messages_with_a_role_field(huggingface_folder):
    fields = {"messages": "talk.lines", "role": "who", "content": "says", "roles": {"A": "user", "B": "assistant"}}
    found = rows(huggingface=str(huggingface_folder / "data"), fields=fields)
    assert said(found[2]) == [("user", "one 2"), ("assistant", "two")]
    assert "talk" not in found[2].metadata
    (rejected, *_) = rows(huggingface=str(huggingface_folder / "data"), fields={**fields, "roles": {"A": "user"}})
    assert rejected.reason == "unknown role" and "'B'; name it in fields.roles" in rejected.detail


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, r"needs fields, .*it has messages\.content \(list of text\), messages\.role"),
        ({"split": "dev"}, r'Unknown split "dev"'),
        ({"huggingface": "nobody/has-this"}, "huggingface nobody/has-this: "),
        ({"subset": "zz"}, "BuilderConfig 'zz' not found"),
        ({"huggingface": "pyproject.toml"}, r"files of \.json, .* can be loaded"),
    ],
)
def test_what_huggingface_does_not_have_is_named(huggingface_folder, source, message):
    with pytest.raises(UserError, match=message):
        named.data_files(Source.model_validate({"huggingface": str(huggingface_folder / "data"), **source}))


def test_missing_package_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ssl_jax\[datasets\]'"):
        named.data_files(Source(huggingface="x"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages are not a list"),
        ([], "no messages"),
        (["a", 1], "content is not text"),
        (["a", b"\xff"], "invalid UTF-8"),
        ({"a": ["x"], "b": ["x", "y"]}, "messages are not a list"),
        ([{"content": "a", "role": "user"}, "b"], "unknown role"),
    ],
)
def test_messages_that_are_none_are_bad_rows(messages, reason):
    with pytest.raises(BadRow) as bad:
        field_mapping.to_row({"m": messages}, 1, FieldMapping(messages="m"), {}, split_lines=True)
    assert bad.value.reason == reason


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
    | st.dates() | st.integers(-2, 3).map(np.int64) | st.just(np.zeros((2, 2))),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["content", "role", "m", "x"]), inner, max_size=3)
    | st.lists(inner, max_size=3).map(lambda items: np.array([*items, None], dtype=object)[:-1]),
    max_leaves=8,
)  # fmt: skip
MAPPINGS = [
    FieldMapping(messages="m"),
    FieldMapping(messages="m.x", role="role", roles={"1": "user"}, id="x"),
    FieldMapping(prompt="m", completion="x", system="m.x", time="x"),
    FieldMapping(text="m", group="x"),
]


@given(st.fixed_dictionaries({"m": VALUES, "x": VALUES}), st.sampled_from(MAPPINGS))
def test_any_value_makes_a_row_or_a_bad_row_and_metadata_are_json(example, fields):
    try:
        row = field_mapping.to_row(example, 1, fields, {"x": ("a", "b"), "m.role": ("c", "d")}, split_lines=True)
    except BadRow:
        return
    assert row.turns and all(isinstance(turn.content, str) for turn in row.turns)
    assert json.loads(json.dumps(row.metadata, allow_nan=False)) == row.metadata


def test_a_field_whose_name_has_dots_is_found_before_a_nested_one():
    example = {"a.b": "flat", "a": {"b": "nested"}}
    row = field_mapping.to_row(example, 1, FieldMapping(prompt="a.b"), {}, split_lines=True)
    assert row.turns == (Turn("user", "flat"),)
    assert row.metadata == {"a": {"b": "nested"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tfds": "x", "fields": {}}, "exactly one of text, prompt, messages; found none"),
        ({"tfds": "x", "fields": {"text": "a", "messages": "b"}}, "exactly one of text, prompt, messages"),
        ({"tfds": "x", "fields": {"text": "a", "role": "b"}}, "role without messages"),
        ({"tfds": "x", "fields": {"messages": "a", "roles": {"b": "user"}}}, "roles without role"),
        ({"path": "x", "fields": {"text": "a"}}, "fields goes with tfds or huggingface, not with path"),
        ({"path": "x", "language": "chinese"}, "language goes with dataset, not with path"),
        ({"tfds": "x", "huggingface": "y"}, "exactly one of path, dataset, tfds, huggingface"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(values, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        Source.model_validate(values)


def test_prepared_data_of_both_libraries_name_their_sources(tfds_folder, huggingface_folder, tmp_path):
    tfds = {"tfds": "tiny_talk", "data_dir": str(tfds_folder), "fields": {"messages": "dialog"}}
    huggingface = {"huggingface": str(huggingface_folder / "data"), "fields": {"messages": "messages"}}
    prompts = {**tfds, "split": "test", "fields": {"prompt": "question"}}
    data = {"labeled": [tfds, huggingface], "unlabeled": [prompts], "prepared_dir": str(tmp_path / "prepared")}
    values = {"data": data, "tokenizer": {"vocab_size": 320}}
    prepared = prepare(Config.model_validate(values), lambda line: None)
    place = f"{huggingface_folder / 'data'}:train"
    assert prepared.summary["sources"] == {"tiny_talk:train": ROWS, place: ROWS, "tiny_talk:test": 3}
    stored = [
        prepared.dialogue(split, index) for split in prepared.splits for index in range(len(prepared.lengths(split)))
    ]
    assert {dialogue.metadata["source"] for dialogue in stored} == {"tiny_talk:train", "data:train", "tiny_talk:test"}
    assert {dialogue.id.rpartition(":")[0] for dialogue in stored} == {
        "tiny_talk:train",
        "data:train",
        "tiny_talk:test",
    }
    assert prepare(Config.model_validate(values), lambda line: None).directory == prepared.directory
    values["data"]["labeled"][0]["split"] = "train[:50%]"
    assert prepare(Config.model_validate(values), lambda line: None).directory != prepared.directory
