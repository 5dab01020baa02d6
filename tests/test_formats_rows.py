"""ParlAI's text, forum threads and Parquet become dialogues like any other row."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import messenger_exports as exports
import pyarrow
import pyarrow.parquet
import pytest

from ssl_jax.config import Source
from ssl_jax.data import formats
from ssl_jax.data.formats import Expected, Rejected
from ssl_jax.dialogue import Dialogue

Read = Callable[..., list[Any]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes a file and reads it back as rows."""

    def read(content: Any, name: str = "rows.txt", expected: Expected = "labeled", **fields: Any) -> list[Any]:
        path = tmp_path / name
        if isinstance(content, pyarrow.Table):
            pyarrow.parquet.write_table(content, path, row_group_size=4)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(formats.read(Source.model_validate({"path": str(path), **fields}), expected, 100_000))

    return read


def turns(dialogue: Dialogue) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in dialogue.turns]


def texts(dialogue: Dialogue) -> list[str]:
    return [turn.content for turn in dialogue.turns]


@pytest.mark.parametrize("fields", [{}, {"format": "parlai"}])
def test_parlai_episodes_are_dialogues(read: Read, fields: dict[str, str]) -> None:
    first, *rest = read(exports.parlai(3), **fields)
    assert turns(first) == [
        ("user", "say m0 你好\nthere"), ("assistant", "fine"), ("user", "say m1"), ("assistant", "bye"),
    ]  # fmt: skip
    assert first.metadata == {
        "source": "rows.txt", "labels": [["fine", "good"]], "label_candidates": [["fine", "no"]],
    }  # fmt: skip
    assert [row.id for row in rest] == ["rows.txt:3", "rows.txt:5"]


def test_parlai_context_without_label_and_evaluation_labels(read: Read) -> None:
    (row,) = read(
        "text:your persona: a: b\\tc__PIPE__d\nid:task\ttext:hi\teval_labels:ho\tepisode_done:True\n", format="parlai"
    )
    assert turns(row) == [("user", "your persona: a: b\tc|d"), ("user", "hi"), ("assistant", "ho")]
    (prompt,) = read("text:hi\tepisode_done:True\n", expected="unlabeled")
    assert prompt.kind == "prompt"


def test_parlai_line_that_is_no_example_is_rejected_and_the_rest_of_the_file_kept(read: Read) -> None:
    lines = exports.parlai(3).splitlines()
    lines[2] = b"\xff"
    rows = read(b"\n".join(lines))
    assert [(row.reason, row.line) if isinstance(row, Rejected) else texts(row)[0] for row in rows] == [
        "say m0 你好\nthere", ("invalid UTF-8", 3), "say m3", "say m4 你好\nthere",
    ]  # fmt: skip


def test_forum_thread_gives_every_way_from_its_first_post_to_an_end(read: Read) -> None:
    posts = [
        {"id": "d", "parent_id": "b", "body": "four", "author": "x", "created_utc": 1_700_000_300},
        {"id": "a", "parent_id": "t3_thread", "link_id": "t3_thread", "title": "Why?", "body": "one", "author": "x",
         "created_utc": 1_700_000_000},
        {"id": "b", "parent_id": "t1_a", "body": "two", "author": "y", "created_utc": "1700000100"},
        {"id": "c", "parent_id": "t1_a", "body": "three", "author": "z", "created_utc": None},
    ]  # fmt: skip
    rows = read("\n".join(map(json.dumps, posts)), "posts.jsonl", "unlabeled")
    assert [texts(row) for row in rows] == [["Why?\n\none", "two", "four"], ["Why?\n\none", "three"]]
    assert rows[0].metadata == {
        "source": "posts.jsonl", "group": "thread", "paths": 2, "time": "2023-11-14T22:13:20",
        "speakers": ["x", "y", "x"],
        "times": ["2023-11-14T22:13:20", "2023-11-14T22:15:00", "2023-11-14T22:18:20"],
    }  # fmt: skip
    assert [row.id for row in rows] == ["thread/d", "thread/c"]
    (labeled, rejected) = read("\n".join(map(json.dumps, posts)), "posts.jsonl", "labeled", assistant="y")
    assert [role for role, _ in turns(labeled)] == ["user", "assistant"] and rejected.reason == "no reply"


def test_forum_fields_can_be_named(read: Read) -> None:
    posts = [{"nr": 1, "re": None, "says": "one", "by": "x"}, {"nr": 2, "re": 1, "says": "two", "by": "y"}]
    (row,) = read(
        json.dumps(posts), "posts.json", "unlabeled", posts={"id": "nr", "parent": "re", "text": "says", "author": "by"}
    )
    assert texts(row) == ["one", "two"] and row.metadata["speakers"] == ["x", "y"]


def test_forum_thread_with_too_many_ends_keeps_the_longest_and_counts_the_rest(read: Read) -> None:
    posts = [{"id": "0", "parent": "", "text": "first", "user": "u"}]
    posts += [{"id": f"a{at}", "parent": "0", "text": f"a{at}", "user": "v"} for at in range(50)]
    posts += [{"id": "b", "parent": "a40", "text": "b", "user": "u"}]
    *rows, bad = read("\n".join(map(json.dumps, posts)), "posts.jsonl", "unlabeled", max_paths=3)
    assert [texts(row)[1:] for row in rows] == [["a0"], ["a1"], ["a40", "b"]]
    assert bad.reason == "thread has more than max_paths"
    assert bad.detail == "3 of 50 paths kept, 47 of 52 posts left out"


def test_forum_posts_that_are_none_are_rejected_and_circles_do_not_hang(read: Read) -> None:
    posts = [
        {"id": "a", "parent": "b", "text": "x"},
        {"id": "b", "parent": "a", "text": "x"},
        {"id": "c", "parent": "c", "text": "own"},
        {"id": "c", "parent": None, "text": "again"},
        {"id": "d", "parent": ["a"], "text": "x"},
        {"id": "e", "parent": None, "text": 5},
        {"parent": None, "text": "x"},
    ]
    rows = read("\n".join(map(json.dumps, posts)), "posts.jsonl", "unlabeled", format="forum")
    assert [texts(row) for row in rows if isinstance(row, Dialogue)] == [["own"], ["x x"]]
    assert sorted((row.line, row.reason) for row in rows if isinstance(row, Rejected)) == [
        (1, "posts answer each other in a circle"), (4, "duplicate id"), (5, "id is not text"),
        (6, "content is not text"), (7, "post without id"),
    ]  # fmt: skip


def test_a_very_long_thread_is_one_path(read: Read) -> None:
    posts = [{"id": str(at), "parent": str(at - 1), "text": "x", "author": str(at % 2)} for at in range(5000)]
    (row,) = read("\n".join(map(json.dumps, posts)), "posts.jsonl", "unlabeled")
    assert len(row.turns) == 5000


PAIR = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"prompt": "hi", "completion": "hello"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"instruction": "hi", "input": "", "output": "hello"},
    ],
)
@pytest.mark.parametrize("format", ["auto", "parquet", "named"])
def test_parquet_rows_have_the_formats_of_json_rows(read: Read, row: dict[str, Any], format: str) -> None:
    named = {"messages": "messages", "prompt": "prompt_completion", "conversations": "sharegpt"}
    fields = {"format": named.get(next(iter(row)), "alpaca") if format == "named" else format}
    rows = read(pyarrow.Table.from_pylist([row] * 10), "rows.parquet", **fields)
    assert [turns(row) for row in rows] == [[("user", "hi"), ("assistant", "hello")]] * 10
    assert rows[9].id == "rows.parquet:10" and rows[9].metadata == {"source": "rows.parquet"}


def test_parquet_metadata_is_json(read: Read) -> None:
    row = {
        "text": "hi", "id": 7, "at": datetime.datetime(2024, 5, 31, 10), "day": datetime.date(2024, 5, 31),
        "score": math.nan, "raw": b"\x00", "none": None, "nested": {"a": [1, 2]},
    }  # fmt: skip
    table = pyarrow.Table.from_pylist([row, {**row, "id": 8, "score": 0.5, "none": "x"}])
    first, second = read(table, "data", "unlabeled")
    assert first.metadata == {
        "source": "data", "at": "2024-05-31T10:00:00", "day": "2024-05-31", "score": None, "raw": "AA==",
        "nested": {"a": [1, 2]},
    }  # fmt: skip
    assert (first.id, second.metadata["score"], second.metadata["none"]) == ("7", 0.5, "x")
    json.dumps([first.metadata, second.metadata], allow_nan=False)


def test_parquet_row_that_is_none_is_rejected_by_number(read: Read) -> None:
    table = pyarrow.Table.from_pylist([{"messages": PAIR}, {"messages": None}, {"messages": PAIR}])
    assert [(row.reason, row.line) for row in read(table, "x.parquet") if isinstance(row, Rejected)] == [
        ("no messages or text", 2)
    ]


def test_parquet_with_a_damaged_group_keeps_the_others_and_counts_the_rows(read: Read, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"text": f"row {at} " + "x" * 500} for at in range(12)])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=4, compression="zstd")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    chunk = pyarrow.parquet.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    rows = read(bytes(content), "x.parquet", "unlabeled")
    assert [texts(row)[0][:6].strip() for row in rows if isinstance(row, Dialogue)] == [
        f"row {at}" for at in (0, 1, 2, 3, 8, 9, 10, 11)
    ]
    (bad,) = [row for row in rows if isinstance(row, Rejected)]
    assert (bad.reason, bad.line) == ("damaged Parquet data", 5) and bad.detail.startswith("4 rows of row group 1")


def test_parquet_that_is_cut_is_one_rejected_row(read: Read, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "x"}]), tmp_path / "x.parquet")
    (bad,) = read((tmp_path / "x.parquet").read_bytes()[:-10], "x.parquet", "unlabeled")
    assert bad.reason == "not a Parquet file, or damaged"
