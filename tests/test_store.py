"""What is stored comes back, from any thread or process, and only complete directories count."""

import dataclasses
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ssl_jax.data import store
from ssl_jax.data.store import EncodedSplit, Prepared, Record
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue import Dialogue, Role, Turn
from ssl_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return DialogueTokenizer.fit(["some text 你好"], 300)


def records(tokenizer, count, role: Role = "assistant"):
    for i in range(count):
        turns = (
            (Turn("user", f"frage {i}"), Turn("assistant", "ä" * (i + 1)))
            if role == "assistant"
            else (Turn(role, f"text {i}"),)
        )
        dialogue = Dialogue(turns, id=f"{role} {i}", metadata={"time": i, "tags": ["ü", None]})
        encoded = tokenizer.encode(dialogue, reply_bytes=1000 + i)
        yield Record(dataclasses.replace(encoded, prefix_length=i % 5, unknown_bytes=i % 3), dialogue)


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory):
    splits = {
        "labeled_train": records(tokenizer, 40),
        "labeled_dev": records(tokenizer, 0),
        "labeled_test": records(tokenizer, 3),
        "raw_train": records(tokenizer, 7, "text"),
        "prompt_train": records(tokenizer, 2, "user"),
    }
    directory = tmp_path_factory.mktemp("store") / "prepared" / "abc"
    return store.write(directory, splits, tokenizer, {"rejected": {"bad": 1}}, [{"file": "f", "line": 1}])


def same(one, other):
    return (
        (one.id, one.reply_bytes, one.prefix_length, one.unknown_bytes)
        == (other.id, other.reply_bytes, other.prefix_length, other.unknown_bytes)
        and np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.loss_mask, other.loss_mask)
        and (one.tokens.dtype, one.loss_mask.dtype) == (np.int32, np.uint8)
    )


def test_records_come_back_in_order_with_their_text(prepared, tokenizer):
    encoded = prepared.encoded("labeled_train")
    assert len(encoded) == 40
    for index, record in enumerate(records(tokenizer, 40)):
        assert same(encoded[index], record.encoded)
        assert prepared.dialogue("labeled_train", index) == record.dialogue


def test_large_split_is_read_from_disk_with_the_same_result(prepared, monkeypatch):
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", 0)
    cached = prepared.encoded("labeled_train")
    on_disk = EncodedSplit(cached._paths, cached._lengths)
    assert not on_disk._fits_in_memory and cached._fits_in_memory
    assert all(same(on_disk[i], cached[i]) for i in range(-40, 40))
    assert all(map(same, on_disk.__getitems__([5, 3, 5]), [cached[5], cached[3], cached[5]]))
    for split in (on_disk, cached):
        with pytest.raises(IndexError):
            split[40]


def test_slices_are_lists(prepared):
    encoded = prepared.encoded("labeled_train")
    assert [one.id for one in encoded[3:9:2]] == [encoded[i].id for i in (3, 5, 7)]


def test_empty_splits_are_absent(prepared):
    assert prepared.splits == ("labeled_train", "labeled_test", "raw_train", "prompt_train")
    with pytest.raises(UserError, match="no split 'labeled_dev'; there are labeled_train, labeled_test"):
        prepared.encoded("labeled_dev")


def test_summary_counts_what_is_stored(prepared):
    lengths = {split: [len(one.tokens) for one in prepared.encoded(split)] for split in prepared.splits}
    for split, expected in lengths.items():
        assert prepared.lengths(split).tolist() == expected
    assert prepared.summary["dialogues"] == {"labeled": {"train": 40, "test": 3}, "unlabeled": {"train": 9}}
    assert prepared.summary["tokens"] == {
        "labeled": {"train": sum(lengths["labeled_train"]), "test": sum(lengths["labeled_test"])},
        "unlabeled": {"train": sum(lengths["raw_train"]) + sum(lengths["prompt_train"])},
    }
    assert prepared.summary["kinds"] == {"raw_train": 7, "prompt_train": 2}
    assert prepared.summary["tokenizer"] == prepared.tokenizer.fingerprint


def test_packing_learns_the_lengths_of_system_turns_without_reading_a_record(prepared, monkeypatch):
    expected = {
        split: [one.prefix_length for one in prepared.encoded(split)]
        for split in ("labeled_train", "labeled_test", "raw_train", "prompt_train")
    }
    assert set(expected["labeled_train"]) == {0, 1, 2, 3, 4}
    monkeypatch.setattr(EncodedSplit, "fields", None)
    reopened = Prepared.open(prepared.directory)
    for split, lengths in expected.items():
        assert reopened.prefix_lengths(split).tolist() == lengths
        assert reopened.prefix_lengths(split).dtype == np.int32
    with pytest.raises(UserError, match="no split 'labeled_dev'"):
        reopened.prefix_lengths("labeled_dev")


def test_split_can_be_pickled_and_read_from_several_threads(prepared):
    encoded = pickle.loads(pickle.dumps(prepared.encoded("labeled_train")))
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda i: encoded[i % 40].id, range(400)))
    assert ids == [f"assistant {i % 40}" for i in range(400)]


def test_tensorflow_datasets_reads_the_directory_too(prepared):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared.directory / "dialogues" / "2.0.0")
    (example,) = builder.as_data_source(split="labeled_test[:1]")  # pyright: ignore[reportCallIssue]
    assert example["tokens"].tolist() == prepared.encoded("labeled_test")[0].tokens.tolist()
    assert "tensorflow" not in sys.modules


def test_reading_imports_neither_jax_nor_transformers_nor_tensorflow(prepared):
    program = (
        "import sys; from ssl_jax.data.store import Prepared; p = Prepared.open(sys.argv[1]); p.tokenizer; "
        "p.encoded('raw_train')[0]; print([m for m in ('jax', 'transformers', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, prepared.directory], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_interrupted_build_leaves_nothing_that_is_taken_for_complete(tokenizer, tmp_path):
    def interrupted():
        yield from records(tokenizer, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(tmp_path / "new", {"labeled_train": interrupted()}, tokenizer, {}, [])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="not prepared data"):
        Prepared.open(tmp_path / "new")


def test_killed_builds_folder_is_ignored_by_the_next(tokenizer, tmp_path, monkeypatch):
    def killed(temporary, directory):
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(store, "_move_into_place", killed)
        patched.setattr(store.shutil, "rmtree", lambda *arguments, **options: None)
        store.write(tmp_path / "new", {"labeled_train": records(tokenizer, 3)}, tokenizer, {}, [])
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".") and (leftover / "summary.json").is_file()
    assert not (tmp_path / "new").exists()
    assert store.write(tmp_path / "new", {"labeled_train": records(tokenizer, 2)}, tokenizer, {}, []).splits


def test_directory_that_another_process_completed_first_stands(tokenizer, tmp_path):
    first = store.write(tmp_path / "new", {"labeled_train": records(tokenizer, 3)}, tokenizer, {}, [])
    second = store.write(tmp_path / "new", {"labeled_train": records(tokenizer, 9)}, tokenizer, {}, [])
    assert len(first.encoded("labeled_train")) == len(second.encoded("labeled_train")) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_foreign_content_in_the_way_is_named_and_left_alone(tokenizer, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").touch()
    with pytest.raises(UserError, match="delete what is there"):
        store.write(tmp_path / "new", {"labeled_train": records(tokenizer, 3)}, tokenizer, {}, [])
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), (json.dumps({"format_version": store.FORMAT_VERSION - 1}), "written by another version")],
)
def test_damaged_or_older_directory_says_what_to_do(tmp_path, content, message):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Prepared.open(tmp_path)


def test_folder_that_cannot_be_made_is_named(tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.prepared_dir .*file"):
        store.write(tmp_path / "file" / "new", {}, tokenizer, {}, [])
