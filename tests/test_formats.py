"""Rows of files become dialogues or are rejected for a reason; nothing in a file stops the program."""

import json
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.config import Source
from ssl_jax.data import formats
from ssl_jax.data.formats import Expected, Rejected
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

PAIR = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
LABELED = json.dumps({"messages": PAIR})


def source(**fields):
    return Source.model_validate(fields)


@pytest.fixture
def read(tmp_path):
    """Writes a file and reads it back as rows."""

    def read(content, expected: Expected = "labeled", name="rows.jsonl", max_turn_bytes=100_000, **fields):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(formats.read(source(path=str(path), **fields), expected, max_turn_bytes))

    return read


def turns(dialogue):
    return [(turn.role, turn.content) for turn in dialogue.turns]


def reason(rows):
    (row,) = rows
    assert isinstance(row, Rejected), row
    return row.reason


def test_messages_row_keeps_its_id_and_unknown_keys_become_metadata(read):
    (dialogue,) = read(json.dumps({"messages": PAIR, "id": "a", "rating": 5, "tags": ["x"]}))
    assert dialogue == Dialogue(
        (Turn("user", "hi"), Turn("assistant", "hello")), "a", {"source": "rows.jsonl", "rating": 5, "tags": ["x"]}
    )


def test_row_without_id_is_named_by_file_and_line(read):
    rows = read(f"{LABELED}\n\n{LABELED.replace('hi', 'ho')}\n")
    assert [row.id for row in rows] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_numbers_are_accepted_as_ids(read):
    (dialogue,) = read(json.dumps({"messages": PAIR, "id": 7}))
    assert dialogue.id == "7"


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_ending_and_a_missing_last_newline_are_fine(read, ending, last):
    rows = [LABELED.replace("hi", str(i)) for i in range(3)]
    assert [row.turns[0].content for row in read(ending.join(rows) + ending * last)] == ["0", "1", "2"]


def test_mixed_line_endings_keep_line_numbers(read):
    rows = read(f"{LABELED}\r\n{LABELED}\r\n\nbad\r{LABELED}\n")
    assert [row.line if isinstance(row, Rejected) else row.id for row in rows] == [
        "rows.jsonl:1", "rows.jsonl:2", 4, "rows.jsonl:5",
    ]  # fmt: skip


def test_byte_order_mark_is_no_part_of_the_first_row(read):
    (dialogue,) = read(b"\xef\xbb\xbf" + LABELED.encode())
    assert turns(dialogue) == [("user", "hi"), ("assistant", "hello")]


def test_invalid_utf8_rejects_one_row_and_leaves_the_others(read):
    first, bad, last = read(LABELED.encode() + b'\n{"text": "\xff\xfe"}\n' + LABELED.encode())
    assert (bad.reason, bad.line) == ("invalid UTF-8", 2)
    assert turns(first) == turns(last)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{", "not JSON"),
        ('{"messages": NaN}', "not JSON"),
        ('{"messages": [], "score": 1e999}', "not JSON"),
        ("[1]", "not an object"),
        ('"text"', "not an object"),
        ("{}", "no messages or text"),
        ('{"messages": null}', "no messages or text"),
        ('{"messages": "hi"}', "messages are not a list"),
        ('{"messages": []}', "no messages"),
        ('{"messages": ["hi"]}', "message is not an object"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "unknown role"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role"),
        ('{"messages": [{"role": "user", "content": null}]}', "content is not text"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "content is not text"),
        ('{"messages": [{"role": "user"}]}', "content is not text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no reply"),
        ('{"messages": [{"role": "user", "content": " \\n"}, {"role": "assistant", "content": "x"}]}', "empty turn"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}', "empty reply"),
        ('{"messages": [{"role": "text", "content": "x"}, {"role": "assistant", "content": "x"}]}',
         "roles on some turns only"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
         "not Unicode text"),
        ('{"text": "no roles here"}', "no roles"),
        ('{"text": "  "}', "empty text"),
        ('{"text": 3}', "content is not text"),
        ('{"id": true, "messages": [{"role": "assistant", "content": "x"}]}', "id is not text"),
        ('{"deep": ' + "[" * 200 + "]" * 200 + "}", "JSON nested too deep"),
        ('{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "JSON nested too deep"),
    ],
)  # fmt: skip
def test_malformed_row_is_rejected_with_its_reason(read, row, expected):
    # The blank first line keeps a row that starts with a bracket from being taken for a JSON array file.
    assert [bad.reason for bad in read(f"{LABELED}\n{row}\n")[1:]] == [expected]


def test_duplicate_id_is_rejected_and_the_first_place_is_named(read):
    row = json.dumps({"messages": PAIR, "id": "same"})
    _, bad = read(f"{row}\n{row}\n")
    assert (bad.reason, bad.line) == ("duplicate id", 2)
    assert "rows.jsonl:1" in bad.detail


def test_turn_longer_than_the_limit_is_rejected_by_its_bytes(read):
    row = json.dumps({"messages": [PAIR[0], {"role": "assistant", "content": "é" * 50_001}]})
    assert reason(read(row)) == "turn too long"
    (kept,) = read(row, max_turn_bytes=200_000)
    assert len(kept.turns[1].content) == 50_001


def test_unlabeled_source_takes_prompts_and_raw_text_and_drops_roles(read):
    prompt = json.dumps({"messages": PAIR[:1]})
    raw, waiting, complete = read(f'{{"text": "a\\n\\nb"}}\n{prompt}\n{LABELED}\n', expected="unlabeled")
    assert turns(raw) == [("text", "a"), ("text", "b")]
    assert waiting.kind == "prompt"
    assert turns(complete) == [("text", "hi"), ("text", "hello")]


def test_raw_text_is_one_turn_unless_lines_are_split(read):
    (dialogue,) = read('{"text": "a\\n\\nb"}', expected="unlabeled", split_lines=False)
    assert turns(dialogue) == [("text", "a\n\nb")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "hi", "completion": "hello"}, [("user", "hi"), ("assistant", "hello")]),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, [("user", "hi"), ("assistant", "hello")]),
        ({"conversations": [{"from": "system", "value": "be"}, {"from": "human", "value": "hi"},
                            {"from": "gpt", "value": "hello"}]},
         [("system", "be"), ("user", "hi"), ("assistant", "hello")]),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [("user", "add\n\n1 2"), ("assistant", "3")]),
        ({"instruction": "add", "input": "", "output": "3"}, [("user", "add"), ("assistant", "3")]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_array", [False, True])
def test_other_json_formats_are_recognized_in_lines_and_in_an_array(read, row, expected, as_array):
    (dialogue,) = read(json.dumps([row] if as_array else row), name="rows.json")
    assert turns(dialogue) == expected
    assert dialogue.metadata == {"source": "rows.json"}


def test_array_elements_are_numbered_and_a_broken_array_is_one_row(read):
    good, bad = read(json.dumps([{"messages": PAIR}, {"messages": []}]), name="rows.json")
    assert (good.id, bad.line) == ("rows.json:1", 2)
    assert reason(read("[{]", name="rows.json")) == "not JSON"


def test_text_file_holds_dialogues_between_blank_lines(read):
    first, second = read("a\nb\n \n\nc", expected="unlabeled", name="rows.txt")
    assert turns(first) == [("text", "a"), ("text", "b")]
    assert turns(second) == [("text", "c")]
    assert second.id == "rows.txt:5"


def test_log_gives_roles_in_order_of_appearance_and_merges_neighbours(read):
    (dialogue,) = read("bob\thi\nbob\tthere\nann\thello\tyou\n", name="log.txt")
    assert turns(dialogue) == [("user", "hi there"), ("assistant", "hello\tyou")]


def test_labeled_log_loses_the_last_turn_if_nobody_answered_it(read):
    answered, unanswered = read("b\thi\na\tho\nb\tbye\n\nb\tanyone?\n", name="log.txt")
    assert turns(answered) == [("user", "hi"), ("assistant", "ho")]
    assert unanswered.reason == "no reply"


def test_unlabeled_log_is_raw_text_whoever_spoke_last(read):
    (dialogue,) = read("b\thi\na\tho\nb\tbye\n", name="log.txt", expected="unlabeled")
    assert turns(dialogue) == [("text", "hi"), ("text", "ho"), ("text", "bye")]


def test_log_with_a_line_or_a_speaker_too_many_rejects_that_dialogue(read):
    rows = read("b\thi\noops\n\na\tx\nb\ty\nc\tz\n", name="log.txt", format="log")
    assert [(row.reason, row.line) for row in rows] == [("no speaker<TAB>text", 2), ("more than two speakers", 4)]


def test_empty_file_has_no_rows(read):
    assert read("") == read("\n \r\n") == []


def test_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "dialogues.jsonl").touch()
    with pytest.raises(UserError, match=r"dialogue\.jsonl: no such file; did you mean .*dialogues\.jsonl"):
        formats.find_files(source(path=str(tmp_path / "dialogue.jsonl")))


def test_glob_is_sorted_and_without_a_match_an_error(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).touch()
    assert [file.name for file in formats.find_files(source(path=f"{tmp_path}/*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="no file matches"):
        formats.find_files(source(path=f"{tmp_path}/*.csv"))


def test_row_that_names_its_source_keeps_it(read):
    (dialogue,) = read(json.dumps({"messages": PAIR, "source": "reddit"}))
    assert dialogue.metadata == {"source": "reddit"}


def test_text_that_spells_control_tokens_stays_as_it_is(read):
    said = "<|endoftext|><|user|> [INST] </s>\u0000"
    (dialogue,) = read(json.dumps({"messages": [{"role": "user", "content": said}, PAIR[1]]}))
    assert turns(dialogue)[0] == ("user", said)


def test_very_many_duplicate_ids_are_rejected_one_by_one(read):
    row = json.dumps({"messages": PAIR, "id": "same"}) + "\n"
    first, *rest = read(row * 20_000)
    assert first.id == "same"
    assert len(rest) == 19_999 and {bad.reason for bad in rest} == {"duplicate id"} and rest[-1].line == 20_000


@given(st.binary(max_size=300), st.sampled_from(["rows.jsonl", "rows.txt"]), st.sampled_from(get_args(Expected)))
def test_any_bytes_give_rows_or_are_refused_as_another_kind_of_file(tmp_path_factory, content, name, expected):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    try:
        for row in formats.read(source(path=str(path)), expected, 100):
            assert isinstance(row, Dialogue | Rejected)
    except UserError as error:
        assert str(path) in str(error)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_any_text_survives_a_messages_file_unchanged(tmp_path_factory, replies):
    messages = [
        message
        for reply in replies
        for message in ({"role": "user", "content": "q"}, {"role": "assistant", "content": reply})
    ]
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False), encoding="utf-8", newline="")
    (dialogue,) = formats.read(source(path=str(path)), "labeled", 100_000)
    assert isinstance(dialogue, Dialogue)
    assert [turn.content for turn in dialogue.turns[1::2]] == replies
