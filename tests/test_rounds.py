"""Rounds on disk: damage shows, is mended from the copy, and what cannot be mended is no round any more."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl_jax.errors import UserError
from ssl_jax.pseudo_labels import rounds

FILES = ("labels-00000.array_record", "labels-00001.array_record", "summary.json", "manifest.json")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "RECORDS_PER_SHARD", 3)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two rounds of four rows."""
    for number in range(2):
        rows = [{"id": f"{number} {row}", "messages": [{"role": "user", "content": "hi"}]} for row in range(4)]
        rounds.write(tmp_path, number, rows, {"accepted": 4})
    return tmp_path


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_round_and_its_copy_are_the_same_files(directory: Path) -> None:
    assert {path.name for path in directory.iterdir()} == {
        *("round_0", "round_1", "copy_of_round_0", "copy_of_round_1")
    }
    for number in range(2):
        assert set(content(directory / f"round_{number}")) == set(FILES)
        assert content(directory / f"round_{number}") == content(directory / f"copy_of_round_{number}")


def test_whole_rounds_are_left_alone(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = content(directory)
    assert rounds.mend([directory], 2) == 2
    assert content(directory) == before and not caplog.messages


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("folder", ["round_0", "copy_of_round_1"])
def test_damage_is_mended_with_one_warning_that_names_the_file(
    directory: Path, folder: str, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = content(directory)
    DAMAGES[damage](directory / folder / name)
    if folder == "round_0" and (directory / folder / "summary.json").exists():
        with pytest.raises(UserError, match=r"round_0 is damaged: .*training mends it"):
            rounds.read_rows(directory, 0)
    assert rounds.mend([directory], 2) == 2
    assert content(directory) == before
    (message,) = caplog.messages
    assert f"{directory / folder} is damaged" in message and name in message


@pytest.mark.parametrize("folder", ["round_1", "copy_of_round_0"])
def test_a_folder_that_is_gone_is_made_again(directory: Path, folder: str) -> None:
    before = content(directory)
    shutil.rmtree(directory / folder)
    assert rounds.mend([directory], 2) == 2
    assert content(directory) == before


@pytest.mark.parametrize(("first", "second"), list(itertools.product(["a flipped bit", "deleted"], repeat=2)))
def test_what_cannot_be_mended_is_set_aside_with_what_came_later(directory: Path, first: str, second: str) -> None:
    """Rounds are numbered: a later one must not be taken for the one that is lost."""
    DAMAGES[first](directory / "round_0" / FILES[0])
    DAMAGES[second](directory / "copy_of_round_0" / FILES[0])
    assert rounds.mend([directory], 2) == 0
    assert {path.name for path in directory.iterdir()} == {"damaged_round_0", "damaged_round_1"}
    assert rounds.read_summary(directory, 0) is None and rounds.read_summary(directory, 1) is None


def test_a_round_that_was_not_held_yet_is_nothing_to_warn_of(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert rounds.mend([directory], 5) == 2
    assert not caplog.messages


def test_rounds_of_two_kinds_count_together(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    rounds.write(other, 0, [], {"accepted": 0})
    assert rounds.mend([directory, other], 2) == 1
    assert rounds.read_summary(directory, 1) is not None, "the round that is amid being held keeps what it has"


def test_a_full_disk_while_a_copy_is_written_is_told_as_such(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its number, by which a command knows that it is for the user to fix."""

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    shutil.rmtree(directory / "copy_of_round_0")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError) as caught:
        rounds.mend([directory], 2)
    assert caught.value.errno == errno.ENOSPC


def test_a_kill_between_the_copy_and_the_round_leaves_a_round(directory: Path) -> None:
    before = content(directory)
    (directory / "round_1").rename(directory / "round_1.tmp")
    assert rounds.mend([directory], 2) == 2
    assert content(directory / "round_1") == {
        name.removeprefix("round_1/"): text for name, text in before.items() if name.startswith("round_1/")
    }
