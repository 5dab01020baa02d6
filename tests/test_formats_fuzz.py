"""Damaged files: whatever happens to some bytes, the rest is read, nothing hangs and nothing is lost in silence."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import messenger_exports as exports
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ssl_jax.config import Source
from ssl_jax.data import formats
from ssl_jax.data.formats import Rejected
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

_SECONDS = 60
_WORD = re.compile(rb"\bm\d+\b")
# Bytes that mean something to a parser.
_SPLICES = [
    b"", b"\n", b"\r", b"\r\n", b"\n\n", b"\t", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b'"', b"\\", b"\\u",
    b"\\ud800", b"{", b"}", b"[", b"]", b"{}", b"[]", b",", b":", b"null", b"NaN", b"1e999", b"-1", b'{"messages":',
    b"[[[[[[[[" * 20,
    b'{"a":' * 2000, b"text:", b"labels:", b"episode_done:True", b"<|endoftext|>", b"\xe2\x80\x8e", b"] Ann: ", b" - ",
    b"31/12/2023, 21:41 - ", b"99/99/9999, 99:99 - x: y", b"x" * 5000, b'"id": 2,', b'"parent_id": "p02",',
]  # fmt: skip


def jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in json_rows()).encode()


def json_rows() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"say m{at}"}, {"role": "assistant", "content": "ok"}], "score": 0.5}
        for at in range(12)
    ]


def log() -> bytes:
    return "\n".join(f"ann\tsay m{at}\nbob\tok\n" for at in range(12)).encode()


def text() -> bytes:
    return "\n".join(f"say m{at} 你好\nok\n" for at in range(12)).encode()


def sharegpt() -> bytes:
    return "".join(
        json.dumps({"conversations": [{"from": "human", "value": f"m{at}"}]}) + "\n" for at in range(12)
    ).encode()


def alpaca() -> bytes:
    return json.dumps([{"instruction": f"say m{at}", "input": "", "output": "ok"} for at in range(12)]).encode()


def prompts() -> bytes:
    return "".join(json.dumps({"prompt": f"m{at}", "completion": "ok"}) + "\n" for at in range(12)).encode()


@dataclasses.dataclass(frozen=True)
class Case:
    """A reader, a file for it, and what lies between two rows: what is not between the same two of them is one row."""

    format: str
    content: Callable[[], bytes]
    between: bytes


CASES = {
    "messages": Case("messages", jsonl, rb"\n"),
    "messages in an array": Case("messages", lambda: json.dumps(json_rows(), indent=2).encode(), rb"\n  \},?\n|^\[\n"),
    "prompt_completion": Case("prompt_completion", prompts, rb"\n"),
    "sharegpt": Case("sharegpt", sharegpt, rb"\n"),
    "alpaca in an array": Case("alpaca", alpaca, rb"\}, |\["),
    "text": Case("text", text, rb"\n\n"),
    "log": Case("log", log, rb"\n\n"),
    "parlai": Case("parlai", exports.parlai, rb"\n"),
    "whatsapp": Case("whatsapp", exports.whatsapp, rb"\n"),
    "telegram": Case("telegram", exports.telegram, rb'\n  \},?\n|"messages": \[\n'),
    "discord": Case("discord", exports.discord, rb'\n    \},?\n|"messages": \[\n'),
    "slack": Case("slack", exports.slack_day, rb"\n    \},?\n|\[\n"),
    "forum": Case("forum", exports.forum, rb"\n"),
}


def mutations(content: bytes, number: int, seed: int) -> Iterator[tuple[bytes, int, int]]:
    """Damaged copies, and which bytes of the original they lack or have pulled apart: `[start, end)`."""
    chance = random.Random(seed)
    for _ in range(number):
        start = chance.randrange(1, len(content))
        end = min(len(content), start + chance.choice([0, 0, 1, 1, 2, 10, 100]))
        kind = chance.randrange(5)
        if kind == 0:
            new = bytes(byte ^ (1 << chance.randrange(8)) for byte in content[start:end])
        elif kind == 1:
            new = chance.randbytes(chance.choice([1, 4, 40]))
        elif kind == 2:
            new, end = b"", len(content)  # cut
        else:
            new = chance.choice(_SPLICES)
        yield content[:start] + new + content[end:], start, end


def untouched_words(content: bytes, between: bytes, start: int, end: int) -> set[str]:
    """Words of the rows that no byte of was changed, nor of what lies before and after them."""
    ends = [0, *(match.end() for match in re.finditer(between, content)), len(content)]
    starts = [0, *(match.start() for match in re.finditer(between, content)), len(content)]
    words = set()
    for row in range(len(ends) - 1):
        # From the end of what precedes the row's separator to the end of the one after it.
        if end < starts[row] or start > ends[row + 1]:
            words.update(word.decode() for word in _WORD.findall(content[ends[row] : starts[row + 1]]))
    return words


def read(path: Path, format: str) -> list[Dialogue | Rejected]:
    return list(formats.read(Source.model_validate({"path": str(path), "format": format}), "unlabeled", 100_000))


def words_of(rows: list[Dialogue | Rejected]) -> set[str]:
    said = " ".join(turn.content for row in rows if isinstance(row, Dialogue) for turn in row.turns)
    return {word.decode() for word in _WORD.findall(said.encode())}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Interrupts a reader that does not come to an end."""

    def interrupt(*_: Any) -> None:
        raise TimeoutError("a reader hangs")

    previous = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def check(name: str, path: Path, number: int, seed: int) -> None:
    case = CASES[name]
    content = case.content()
    path.write_bytes(content)
    complete = words_of(read(path, case.format))
    assert complete == {word.decode() for word in _WORD.findall(content)}
    assert complete == words_of(read(path, "auto"))
    for damaged, start, end in mutations(content, number, seed):
        signal.alarm(_SECONDS)
        path.write_bytes(damaged)
        rows = read(path, case.format)
        lost = untouched_words(content, case.between, start, end) - words_of(rows)
        # Damage can make an id equal to that of a row, which then is rejected by name.
        if lost and not any(isinstance(row, Rejected) and row.reason == "duplicate id" for row in rows):
            pytest.fail(
                f"{sorted(lost)} lost after {damaged[max(0, start - 20) : start + 60]!r} at {start}:{end}; {rows}"
            )
        try:
            read(path, "auto")
        except UserError as error:
            assert str(path) in str(error)  # it looks like another kind of file now


def parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(json_rows()), stream, row_group_size=3, compression="zstd")
    return stream.getvalue()


PACKED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "rows.jsonl.gz": ("messages", lambda: gzip.compress(jsonl(), mtime=0)),
    "rows.jsonl.zst": ("messages", lambda: zstandard.ZstdCompressor(write_checksum=True).compress(jsonl())),
    "chat.json.gz": ("discord", lambda: gzip.compress(exports.discord(), mtime=0)),
    "rows.parquet": ("parquet", parquet),
}


def check_packed(name: str, path: Path, number: int, seed: int) -> None:
    format, make = PACKED[name]
    content = make()
    path.write_bytes(content)
    complete = words_of(read(path, format))
    assert len(complete) == 12
    for damaged, _, _ in mutations(content, number, seed):
        signal.alarm(_SECONDS)
        path.write_bytes(damaged)
        try:
            rows = read(path, format)
        except UserError as error:
            assert str(path) in str(error)
            continue
        if words_of(rows) != complete:
            # A table has no checksum: what it says in its other fields may have changed.
            assert name == "rows.parquet" or any(isinstance(row, Rejected) for row in rows)


@pytest.mark.parametrize("name", CASES)
def test_untouched_rows_of_a_damaged_file_survive(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "rows", 200, seed=0)


@pytest.mark.parametrize("name", PACKED)
def test_damaged_packed_files_never_lose_rows_in_silence(name: str, tmp_path: Path) -> None:
    check_packed(name, tmp_path / name, 200, seed=0)


@pytest.mark.parametrize(
    "damages",
    [pytest.param(500, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("name", CASES)
def test_untouched_rows_survive_many_damages(name: str, damages: int, tmp_path: Path) -> None:
    check(name, tmp_path / "rows", damages, seed=1)


@pytest.mark.parametrize(
    "damages",
    [pytest.param(500, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("name", PACKED)
def test_packed_files_survive_many_damages(name: str, damages: int, tmp_path: Path) -> None:
    check_packed(name, tmp_path / name, damages, seed=1)
