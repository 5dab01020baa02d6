"""A file is replaced as a whole or not at all, in a folder and in a bucket; digests are those of the content."""

from __future__ import annotations

import errno
import hashlib
import io
from pathlib import Path

import pytest

from ssl_jax import files

CONTENT = bytes(range(256)) * 3


class Object:
    """What `files` asks of a path in a bucket."""

    def __init__(self, content: bytes = b"old") -> None:
        self.content, self.asked = content, []

    def write_bytes(self, content: bytes) -> None:
        self.content = content

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self.content)

    def rmtree(self, *, missing_ok: bool) -> None:
        self.asked.append(("rmtree", missing_ok))


def test_a_file_gets_its_new_content_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files.replacing(path) as stream:
        stream.write(CONTENT)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_keeps_its_content_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as stream:
        stream.write(CONTENT)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "nothing is left of the attempt"


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, files.replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_write_that_numpy_says_was_cut_short_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, files.replacing(tmp_path / "file"):
        raise OSError("12 requested and 0 written")
    assert (caught.value.errno, caught.value.strerror) == (errno.EIO, "12 requested and 0 written")
    assert caught.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_an_object_of_a_bucket_is_written_once_and_only_without_an_exception() -> None:
    path = Object()
    with files.replacing(path) as stream:
        stream.write(CONTENT[:100])
        stream.write(CONTENT[100:])
        assert path.content == b"old"
    assert path.content == CONTENT
    with pytest.raises(ValueError), files.replacing(path) as stream:
        stream.write(b"half of")
        raise ValueError
    assert path.content == CONTENT


@pytest.mark.parametrize("content", [b"", b"x", CONTENT])
def test_digests_are_size_and_sha_256_however_large_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    expected = (len(content), hashlib.sha256(content).hexdigest())
    (tmp_path / "file").write_bytes(content)
    assert files.digest(tmp_path / "file") == expected
    assert files.digest(Object(content)) == expected
    monkeypatch.setattr(files, "_BLOCK_BYTES", 100)
    assert files.digest(Object(content)) == expected


def test_folders_are_removed_with_all_that_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").write_bytes(CONTENT)
    files.remove_folder(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    bucket = Object()
    files.remove_folder(bucket)
    assert bucket.asked == [("rmtree", True)], "a bucket has no folder where it has no object"


def test_nothing_is_waited_for_in_a_bucket() -> None:
    files.sync(Object())


def test_json_is_readable_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"text": "你好", "list": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "text": "你好",\n  "list": [\n    1\n  ]\n}\n'
    assert files.read_json(path) == {"text": "你好", "list": [1]}
