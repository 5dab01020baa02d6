"""Which files a source means, and what compression and damage do to their rows."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import messenger_exports as exports
import pytest
import zstandard

from ssl_jax import command_line
from ssl_jax.config import Source
from ssl_jax.data import formats
from ssl_jax.data.formats import Rejected, lines
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def row(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]}


def jsonl(number: int) -> bytes:
    return "".join(json.dumps(row(at)) + "\n" for at in range(number)).encode()


def read(path: Path, **fields: Any) -> list[Dialogue | Rejected]:
    return list(formats.read(Source.model_validate({"path": str(path), **fields}), "unlabeled", 100_000))


def texts(rows: list[Dialogue | Rejected]) -> list[list[str]]:
    return [[turn.content for turn in row.turns] for row in rows if isinstance(row, Dialogue)]


def rejected(rows: list[Dialogue | Rejected]) -> list[tuple[str, int]]:
    return [(row.reason, row.line) for row in rows if isinstance(row, Rejected)]


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(5)),
        ("rows.json", json.dumps([row(at) for at in range(5)]).encode()),
        ("rows.txt", b"a\nb\n\nc\n"),
        ("log.txt", b"x\thi\ny\tho\n"),
        ("parlai.txt", exports.parlai()),
        ("chat.txt", exports.whatsapp()),
        ("result.json", exports.telegram()),
        ("general.json", exports.discord()),
        ("posts.jsonl", exports.forum()),
    ],
)
def test_every_text_format_reads_the_same_compressed(tmp_path: Path, ending: str, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    plain = texts(read(tmp_path / name))
    (tmp_path / f"{name}{ending}").write_bytes(COMPRESSED[ending](content))
    assert texts(read(tmp_path / f"{name}{ending}")) == plain and plain
    # It is the content that tells, not the name.
    (tmp_path / f"named {name}").write_bytes(COMPRESSED[ending](content))
    assert texts(read(tmp_path / f"named {name}")) == plain


@pytest.mark.parametrize("ending", COMPRESSED)
def test_compressed_parts_one_after_another_are_one_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    lines_ = jsonl(6).splitlines(keepends=True)
    path.write_bytes(b"".join(COMPRESSED[ending](b"".join(lines_[at : at + 2])) for at in (0, 2, 4)))
    assert len(texts(read(path))) == 6 and not rejected(read(path))


@pytest.mark.parametrize("ending", COMPRESSED)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_what_precedes_a_cut_in_compressed_data_is_kept_and_the_cut_is_named(
    tmp_path: Path, ending: str, share: float
) -> None:
    content = b"".join(json.dumps({"text": os.urandom(40).hex(), "id": at}).encode() + b"\n" for at in range(9000))
    compressed = COMPRESSED[ending](content)
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(compressed[: int(share * len(compressed))])
    rows = read(path)
    good = [row.id for row in rows if isinstance(row, Dialogue)]
    assert good == [str(at) for at in range(len(good))] and len(good) > 9000 * share / 2
    ((reason, line),) = rejected(rows)
    assert reason.endswith("data ends too soon") and line == len(good) + 1


@pytest.mark.parametrize("ending", COMPRESSED)
def test_damage_in_compressed_data_is_one_rejected_row(tmp_path: Path, ending: str) -> None:
    content = b"".join(json.dumps({"text": os.urandom(40).hex()}).encode() + b"\n" for _ in range(9000))
    compressed = bytearray(COMPRESSED[ending](content))
    compressed[len(compressed) // 2 : len(compressed) // 2 + 2000] = os.urandom(2000)
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(compressed)
    rows = read(path)
    assert len(texts(rows)) > 1500
    assert [reason for reason, _ in rejected(rows) if reason.startswith("damaged")]


def test_what_follows_gzip_data_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(2)) + b"\0" * 512)
    assert (len(texts(read(path))), rejected(read(path))) == (2, [])
    path.write_bytes(gzip.compress(jsonl(2)) + b"garbage")
    assert (len(texts(read(path))), rejected(read(path))) == (2, [("damaged gzip data", 3)])


def test_an_array_that_is_cut_keeps_the_elements_before(tmp_path: Path) -> None:
    content = json.dumps([row(at) for at in range(20)]).encode()
    (tmp_path / "rows.json").write_bytes(content[:500])
    rows = read(tmp_path / "rows.json")
    assert texts(rows) == [[f"q{at}", f"a{at}"] for at in range(len(texts(rows)))] and len(texts(rows)) == 5
    assert {reason for reason, _ in rejected(rows)} == {"not JSON"}
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(content)[:-30])
    assert rejected(read(tmp_path / "rows.json.gz"))[-1][0] == "gzip data ends too soon"


def test_an_array_that_is_cut_between_two_elements_says_so(tmp_path: Path) -> None:
    content = json.dumps([row(at) for at in range(20)]).encode()
    (tmp_path / "rows.json").write_bytes(
        content[: content.index(b', {"messages": [{"role": "user", "content": "q5"') + 1]
    )
    rows = read(tmp_path / "rows.json")
    assert len(texts(rows)) == 5 and rejected(rows) == [("not JSON", 6)]


@pytest.mark.parametrize(
    "hostile",
    [
        b'{"a":' * 100_000,
        b"[" * 300_000,
        b'{"a":[{},' * 60_000,
        b'[{"a":"' * 60_000,
        b"{" * 300_000,
        b"[" + b'{"a":1,' * 60_000,
        b'"{' * 150_000,
    ],
)
@pytest.mark.parametrize("format", ["telegram", "messages", "auto"])
def test_hostile_json_is_rejected_in_little_time(tmp_path: Path, hostile: bytes, format: str) -> None:
    (tmp_path / "result.json").write_bytes(hostile)
    start = time.monotonic()
    rows = read(tmp_path / "result.json", format=format)
    assert rejected(rows) and not texts(rows)
    assert time.monotonic() - start < 30


def test_a_line_without_end_is_rejected_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 3 * 2**20)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(1) + b"x" * (9 * 2**20) + b"\n" + jsonl(2)[len(jsonl(1)) :], 1))
    rows = read(path)
    assert texts(rows) == [["q0", "a0"], ["q1", "a1"]]
    assert rejected(rows) == [("line too long", 2)]


def test_a_text_without_blank_lines_is_rejected_when_it_is_too_long_for_a_dialogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    (tmp_path / "rows.txt").write_bytes(b"a\n\n" + b"some words\n" * 200 + b"\nb\n")
    rows = read(tmp_path / "rows.txt")
    assert texts(rows) == [["a"], ["b"]] and rejected(rows) == [("dialogue too long", 3)]


def test_a_document_that_is_too_large_to_be_parsed_whole_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "rows.json").write_text(json.dumps([row(at) for at in range(9)]), encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.json: is one JSON document of more than .* MiB.*jq -c"):
        read(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"PK\x03\x04", "ZIP archive; unpack"),
        ("hi".encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"%PDF-1.7", "PDF"),
        (b"BZh9", "bzip2"),
        (b"\xfd7zXZ\x00", "xz"),
        (bytes(range(256)), "binary, not text"),
    ],
)
def test_a_file_that_is_no_text_is_refused_for_what_it_is(tmp_path: Path, start: bytes, expected: str) -> None:
    (tmp_path / "export.txt").write_bytes(start + bytes(100))
    with pytest.raises(UserError, match=rf"export\.txt: is .*{expected}"):
        read(tmp_path / "export.txt")


def test_a_folder_stands_for_its_files_of_known_endings(tmp_path: Path) -> None:
    for name in ("a.jsonl", "deep/er/b.txt.gz", "deep/c.parquet", "d.PNG", "README", ".hidden.txt", ".git/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = formats.find_files(Source(path=str(tmp_path)))
    assert [str(file.relative_to(tmp_path)) for file in found] == ["a.jsonl", "deep/c.parquet", "deep/er/b.txt.gz"]


def test_a_folder_without_a_readable_file_says_which_endings_are_read(tmp_path: Path) -> None:
    (tmp_path / "image.png").touch()
    with pytest.raises(UserError, match=r"no file that ends in \.json, \.jsonl.*name a glob"):
        formats.find_files(Source(path=str(tmp_path)))


@pytest.mark.parametrize("pattern", ["", "/*", "/**/*", "/*/../../secret.txt"])
@pytest.mark.parametrize("linked", ["secret.txt", "outside"])
def test_nothing_in_a_folder_leads_out_of_it(tmp_path: Path, pattern: str, linked: str) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.txt").touch()
    (tmp_path / "secret.txt").touch()
    (folder / "link.txt").symlink_to(tmp_path / linked)
    with pytest.raises(UserError, match=r"leads out of the folder, to .*(secret\.txt|outside)"):
        formats.find_files(Source(path=f"{folder}{pattern}"))
    # Who names the link itself, means it.
    if linked == "secret.txt":
        assert formats.find_files(Source(path=str(folder / "link.txt"))) == [folder / "link.txt"]


def test_links_within_a_folder_do_not_read_a_file_twice(tmp_path: Path) -> None:
    (tmp_path / "2024.txt").write_text("hi", encoding="utf-8")
    (tmp_path / "latest.txt").symlink_to(tmp_path / "2024.txt")
    (tmp_path / "again").symlink_to(tmp_path)
    for pattern in ("", "/*", "/**/*.txt"):
        assert [file.name for file in formats.find_files(Source(path=f"{tmp_path}{pattern}"))] == ["2024.txt"]


@pytest.mark.parametrize("path", ["x\0y", "~nobody-of-that-name/x", "a" * 5000, "a/" * 3000, "/dev/null", "\n"])
def test_hostile_paths_are_refused_in_two_lines(path: str) -> None:
    with pytest.raises(UserError) as refusal:
        formats.find_files(command_line.validate(Source, {"path": path}, origin="my.yaml"))
    assert str(refusal.value).count("\n") <= 1


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path, tmp_path / "pipe.txt"):
        with pytest.raises(UserError, match="not a file with content"):
            formats.find_files(Source(path=str(path)))


def test_a_file_name_that_is_no_text_gives_ids_that_are(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_bytes(b"hi\n")
    (dialogue,) = read(tmp_path)
    assert isinstance(dialogue, Dialogue)
    assert dialogue.id == "caf�.txt:1" and dialogue.metadata["source"] == "caf�.txt"


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.txt").write_bytes(b"hi")

    def refuse(file: Path, span=None) -> Any:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(lines, "chunks", refuse)
    with pytest.raises(UserError, match=r"rows\.txt: cannot be read: Permission denied"):
        read(tmp_path / "rows.txt", format="text")
