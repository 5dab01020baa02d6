"""What is stored comes back, from any thread or process, and only complete directories count."""

import contextlib
import dataclasses
import json
import pickle
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ssl_jax.data import shards, store
from ssl_jax.data.shards import Record
from ssl_jax.data.store import EncodedSplit, Prepared
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue import Dialogue, Role, Turn
from ssl_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return DialogueTokenizer.fit(["some text 你好"], 300)


def records(tokenizer, count, role: Role = "assistant", first=0):
    for i in range(first, first + count):
        turns = (
            (Turn("user", f"frage {i}"), Turn("assistant", "ä" * (i % 40 + 1)))
            if role == "assistant"
            else (Turn(role, f"text {i}"),)
        )
        dialogue = Dialogue(turns, id=f"{role} {i}", metadata={"time": i, "tags": ["ü", None]})
        encoded = tokenizer.encode(dialogue, reply_bytes=1000 + i)
        encoded = dataclasses.replace(encoded, prefix_length=i % 5, unknown_bytes=i % 3)
        yield Record.of(encoded, dialogue, source=i % 3)


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory):
    splits = {
        "labeled_train": records(tokenizer, 40),
        "labeled_dev": records(tokenizer, 0),
        "labeled_test": records(tokenizer, 3, first=40),
        "raw_train": records(tokenizer, 7, "text"),
        "prompt_train": records(tokenizer, 2, "user"),
    }
    directory = tmp_path_factory.mktemp("store") / "prepared" / "abc"
    return shards.write(directory, splits, tokenizer, {"rejected": {"bad": 1}}, [{"file": "f", "line": 1}])


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
        assert prepared.dialogue("labeled_train", index) == store.from_json(record.text)
        assert prepared.dialogue("labeled_train", index).metadata == {"time": index, "tags": ["ü", None]}


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
    assert prepared.summary["rejected"] == {"bad": 1}
    assert json.loads((prepared.directory / "rejected.jsonl").read_text()) == {"file": "f", "line": 1}


@pytest.mark.parametrize(
    ("column", "of"),
    [
        ("lengths", lambda encoded, dialogue: len(encoded.tokens)),
        ("prefix_lengths", lambda encoded, dialogue: encoded.prefix_length),
        ("source_numbers", lambda encoded, dialogue: dialogue.metadata["time"] % 3),
        ("turn_counts", lambda encoded, dialogue: len(dialogue.turns)),
    ],
)
def test_packing_and_mixing_learn_about_records_without_reading_one(prepared, monkeypatch, column, of):
    expected = {
        split: [
            of(prepared.encoded(split)[number], prepared.dialogue(split, number))
            for number in range(len(prepared.encoded(split)))
        ]
        for split in prepared.splits
    }
    assert len({value for values in expected.values() for value in values}) > 1
    monkeypatch.setattr(EncodedSplit, "fields", None)
    reopened = Prepared.open(prepared.directory)
    for split, values in expected.items():
        assert getattr(reopened, column)(split).tolist() == values
        assert getattr(reopened, column)(split).dtype == np.int32
    with pytest.raises(UserError, match="no split 'labeled_dev'"):
        getattr(reopened, column)("labeled_dev")


def test_split_can_be_pickled_and_read_from_several_threads(prepared):
    encoded = pickle.loads(pickle.dumps(prepared.encoded("labeled_train")))
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda i: encoded[i % 40].id, range(400)))
    assert ids == [f"assistant {i % 40}" for i in range(400)]


def test_tensorflow_datasets_reads_the_directory_too(prepared):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared.directory / store.DATASET / store.VERSION)
    assert {name: info.num_examples for name, info in builder.info.splits.items()} == {
        split: len(prepared.encoded(split)) for split in prepared.splits
    }
    for split in prepared.splits:
        examples = list(builder.as_data_source(split=split))  # pyright: ignore[reportCallIssue]
        for number, (example, ours) in enumerate(zip(examples, prepared.encoded(split), strict=True)):
            assert example["id"].decode() == ours.id
            for name in ("tokens", "loss_mask"):
                assert np.array_equal(example[name], getattr(ours, name))
                assert example[name].dtype == getattr(ours, name).dtype
            for name in ("reply_bytes", "prefix_length", "unknown_bytes"):
                assert example[name] == getattr(ours, name)
            assert store.from_json(example["dialogue"]) == prepared.dialogue(split, number)
    assert len(list(builder.as_data_source(split="labeled_train[10:14]"))) == 4  # pyright: ignore[reportCallIssue]
    assert "tensorflow" not in sys.modules


def test_a_record_is_serialized_as_tensorflow_datasets_does_it(prepared, tokenizer):
    """Even where one serializer wrote other records before."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer
    from tensorflow_datasets.proto import tf_example_pb2

    features = tfds.builder_from_directory(prepared.directory / store.DATASET / store.VERSION).info.features
    assert isinstance(features, tfds.features.FeaturesDict)
    reference = ExampleSerializer(features.get_serialized_info())  # pyright: ignore[reportArgumentType]
    serialize = shards.Serializer()
    parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]
    for record in (*records(tokenizer, 5), *records(tokenizer, 2, "text")):
        example = {**dataclasses.asdict(record.encoded), "dialogue": record.text.decode()}
        expected = reference.serialize_example(features.encode_example({name: example[name] for name in features}))
        assert parse(serialize(record)) == parse(expected)


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
        shards.write(tmp_path / "new", {"labeled_train": interrupted()}, tokenizer, {}, [])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="not prepared data"):
        Prepared.open(tmp_path / "new")


def test_killed_builds_folder_is_ignored_by_the_next(tokenizer, tmp_path, monkeypatch):
    def killed(temporary, directory):
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(shards, "_move_into_place", killed)
        patched.setattr(
            tempfile, "TemporaryDirectory", lambda **options: contextlib.nullcontext(tempfile.mkdtemp(**options))
        )
        shards.write(tmp_path / "new", {"labeled_train": records(tokenizer, 3)}, tokenizer, {}, [])
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".") and (leftover / "working" / "summary.json").is_file()
    assert not (tmp_path / "new").exists()
    assert shards.write(tmp_path / "new", {"labeled_train": records(tokenizer, 2)}, tokenizer, {}, []).splits


def test_records_of_many_shards_are_one_split_in_order(tokenizer, tmp_path):
    """More than ten, since names of files do not sort as numbers do."""
    everything = list(records(tokenizer, 30))
    working = tmp_path / "working"
    for number in range(12):
        path = shards.shard_path(working, "labeled_train", number, 12)
        assert not shards.is_written(path)
        shards.write_shard(path, everything[30 * number // 12 : 30 * (number + 1) // 12])
        assert shards.is_written(path)
    tokenizer.save(working / "tokenizer")
    (working / "examples.json").write_text("{}")
    prepared = shards.complete(working, tmp_path / "new", {"labeled_train": 12}, tokenizer, {}, [])
    assert all(map(same, prepared.encoded("labeled_train"), [record.encoded for record in everything]))
    assert prepared.source_numbers("labeled_train").tolist() == [record.source for record in everything]
    assert not working.exists()
    left = [path.name for path in (tmp_path / "new" / store.DATASET / store.VERSION).iterdir()]
    assert sum("array_record" in name for name in left) == 12 == len(left) - 2, "and two files that describe them"


def test_an_interrupted_shard_is_not_taken_for_written(tokenizer, tmp_path):
    path = shards.shard_path(tmp_path, "raw_train", 0, 1)

    def interrupted():
        yield from records(tokenizer, 3, "text")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(path, interrupted())
    assert not shards.is_written(path)
    shards.write_shard(path, records(tokenizer, 2, "text"))
    assert shards.is_written(path)


@pytest.mark.parametrize("split", ["labeled_train", "raw_train", "prompt_train"])
@pytest.mark.parametrize("held_out", ["labeled_dev", "labeled_test", "labeled_test_seen"])
def test_a_text_that_is_stored_on_both_sides_is_refused(tokenizer, tmp_path, split, held_out):
    splits = {split: records(tokenizer, 9), held_out: records(tokenizer, 4, first=7)}
    with pytest.raises(UserError, match="2 dialogues to learn from are also held out: assistant 7, assistant 8"):
        shards.write(tmp_path / "new", splits, tokenizer, {}, [])
    assert list(tmp_path.iterdir()) == []


def test_directory_that_another_process_completed_first_stands(tokenizer, tmp_path):
    first = shards.write(tmp_path / "new", {"labeled_train": records(tokenizer, 3)}, tokenizer, {}, [])
    second = shards.write(tmp_path / "new", {"labeled_train": records(tokenizer, 9)}, tokenizer, {}, [])
    assert len(first.encoded("labeled_train")) == len(second.encoded("labeled_train")) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_foreign_content_in_the_way_is_named_and_left_alone(tokenizer, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").touch()
    with pytest.raises(UserError, match="delete what is there"):
        shards.write(tmp_path / "new", {"labeled_train": records(tokenizer, 3)}, tokenizer, {}, [])
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
        shards.write(tmp_path / "file" / "new", {}, tokenizer, {}, [])
