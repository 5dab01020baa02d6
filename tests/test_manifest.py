"""A folder whose manifest stands is what was written: any single change of any file shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax import manifest

BODY = {"step": 3, "metric": 0.5, "files": {"ä": {"bytes": 1, "sha256": "0" * 64}}}
TEXT = manifest.encode(BODY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three files, one of them with a manifest's name, one empty, and a fourth that does not count."""
    made = tmp_path / "made"
    (made / "below").mkdir(parents=True)
    (made / "below" / "data").write_bytes(b"some bytes")
    (made / "below" / manifest.NAME).write_bytes(b"{}")
    (made / "empty").write_bytes(b"")
    (made / "lock").write_bytes(b"")
    manifest.write(made, {"number": 7}, without="lock")
    return made


def test_what_was_encoded_is_decoded() -> None:
    assert manifest.decode(TEXT) == BODY


@given(st.integers(0, 8 * len(TEXT) - 1))
def test_a_flipped_bit_anywhere_shows(bit: int) -> None:
    changed = bytearray(TEXT)
    changed[bit // 8] ^= 1 << bit % 8
    assert manifest.decode(bytes(changed)) is None


@given(st.integers(0, len(TEXT) - 1))
def test_a_cut_shows(size: int) -> None:
    assert manifest.decode(TEXT[:size]) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"null", b"{}", b'{"sha256": 1}', b"\xff", b"[" * 100_000])
def test_other_content_is_no_manifest(content: bytes) -> None:
    assert manifest.decode(content) is None


def test_files_are_declared_but_for_the_one_that_does_not_count(folder: Path) -> None:
    said = manifest.read(folder / manifest.NAME)
    assert said["number"] == 7
    assert {name: file["bytes"] for name, file in said["files"].items()} == {
        "below/data": 10,
        "below/manifest.json": 2,
        "empty": 0,
    }
    assert manifest.problem(folder) is None
    (folder / "lock").unlink()
    assert manifest.problem(folder) is None


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("below/data", b"some bytez", "below/data differs from what was written (SHA-256)"),
        ("below/data", b"some byte", "below/data has 9 bytes instead of 10"),
        ("below/data", None, "below/data cannot be read: No such file or directory"),
        ("below/manifest.json", b"[]", "below/manifest.json differs from what was written (SHA-256)"),
        ("empty", b"x", "empty has 1 bytes instead of 0"),
    ],
)
def test_the_first_difference_is_named(
    folder: Path, name: str, content: bytes | None, problem: str, at_once: int
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert manifest.problem(folder) == problem
    assert manifest.difference(folder, manifest.read(folder / manifest.NAME)["files"], at_once=at_once) == problem


def test_without_a_manifest_nothing_is_trusted(folder: Path) -> None:
    (folder / manifest.NAME).write_bytes(b"{}")
    assert manifest.problem(folder) == "manifest.json is damaged"
    (folder / manifest.NAME).unlink()
    assert (manifest.problem(folder) or "").startswith("no manifest.json")


@pytest.mark.parametrize(
    "files",
    [
        None,
        ["below/data"],
        {"below/data": 10},
        {"below/data": {}},
        {"below/data": {"bytes": 10}},
        {"below/data": {"bytes": 10, "sha256": "0", "mode": 7}},
    ],
)
def test_a_manifest_of_other_parts_is_damaged(folder: Path, files: object) -> None:
    """Whoever writes one can give it its digest."""
    (folder / manifest.NAME).write_bytes(manifest.encode({"number": 7, "files": files}))
    assert manifest.problem(folder) == "manifest.json is damaged"


def test_a_file_elsewhere_is_named_and_not_read(folder: Path) -> None:
    files = {"../secret": {"bytes": 1, "sha256": "0"}}
    (folder / manifest.NAME).write_bytes(manifest.encode({"files": files}))
    assert manifest.problem(folder) == "manifest.json names '../secret', which leads out of its folder"
