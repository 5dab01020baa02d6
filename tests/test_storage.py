"""Places: what is read and written here is what is there, in a bucket as on a disk."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ssl_jax import storage, workdir
from ssl_jax.config import Config, Source
from ssl_jax.data import formats
from ssl_jax.errors import UserError
from ssl_jax.storage import Bucket, Place

URL = "memory://bucket/run"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A bucket in memory, whose driver fsspec has in itself; copies go to a folder of the test."""
    monkeypatch.setitem(storage._DRIVERS, "memory", ("fsspec", "none", "ask for it"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = storage.filesystem(URL)
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    store.mkdir("/bucket")
    yield store
    store.store.clear()
    storage._bucket.cache_clear()


def bucket(folder: Path) -> Bucket:
    """The same place as another host sees it, with its own mirror."""
    return Bucket(URL, folder)


def write(place: Place, name: str, text: str) -> None:
    (place.local / name).parent.mkdir(parents=True, exist_ok=True)
    (place.local / name).write_text(text)


def there(memory: Any) -> dict[str, str]:
    return {
        name.removeprefix("/bucket/run/"): memory.cat_file(name).decode() for name in sorted(memory.find("/bucket/run"))
    }


def here(place: Place) -> dict[str, str]:
    return {str(path.relative_to(place.local)): path.read_text() for path in place.local.rglob("*") if path.is_file()}


def count_calls(monkeypatch: pytest.MonkeyPatch, memory: Any, name: str) -> list[Any]:
    """What a function of the driver is called with from now on."""
    calls: list[Any] = []
    function: Callable[..., Any] = getattr(memory, name)
    monkeypatch.setattr(memory, name, lambda *a, **o: (calls.append(a[0]), function(*a, **o))[1])
    return calls


def test_a_folder_is_its_own_place(tmp_path: Path) -> None:
    place = storage.place(str(tmp_path / "run"))
    assert place.local == tmp_path / "run" and place.path("checkpoints") == tmp_path / "run" / "checkpoints"
    place.check_writable()
    place.pull()
    place.push()
    assert not place.local.exists() and storage.place(place) is place


def test_what_one_host_pushes_another_pulls(memory: Any, tmp_path: Path) -> None:
    first, second = bucket(tmp_path / "a"), bucket(tmp_path / "b")
    write(first, "config.yaml", "seed: 1")
    write(first, "pseudo_labels/round_0/labels", "x")
    first.push()
    second.pull()
    assert here(second) == here(first) == there(memory)


def test_pull_replaces_what_differs_and_removes_what_is_gone(memory: Any, tmp_path: Path) -> None:
    first, second = bucket(tmp_path / "a"), bucket(tmp_path / "b")
    write(first, "metrics.jsonl", "one\n")
    first.push()
    write(second, "metrics.jsonl", "one\nof a run that was killed\n")
    write(second, "samples.jsonl", "nor is this there")
    second.pull()
    assert here(second) == {"metrics.jsonl": "one\n"}


def test_a_pull_by_name_leaves_other_files_alone(memory: Any, tmp_path: Path) -> None:
    first, second = bucket(tmp_path / "a"), bucket(tmp_path / "b")
    for name in ("config.yaml", "tokenizer/vocab.json", "metrics.jsonl", "configuration"):
        write(first, name, name)
    first.push()
    write(second, "notes", "mine")
    second.pull("config.yaml", "tokenizer", "absent")
    assert sorted(here(second)) == ["config.yaml", "notes", "tokenizer/vocab.json"]


def test_only_what_has_changed_travels(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = bucket(tmp_path / "a")
    write(place, "config.yaml", "seed: 1")
    write(place, "metrics.jsonl", "one\n")
    place.push()
    sent = count_calls(monkeypatch, memory, "pipe")
    place.push()
    assert sent == []
    write(place, "metrics.jsonl", "one\ntwo\n")
    place.push()
    assert sent == [{"/bucket/run/metrics.jsonl": b"one\ntwo\n"}]
    place.pull()
    brought = count_calls(monkeypatch, memory, "get")
    place.pull()
    assert brought == []


def test_what_is_removed_here_is_removed_there(memory: Any, tmp_path: Path) -> None:
    place = bucket(tmp_path / "a")
    write(place, "pseudo_labels/round_0.partial/piece", "x")
    write(place, "config.yaml", "seed: 1")
    place.push()
    memory.pipe_file("/bucket/run/somebody's notes", b"not ours")
    (place.local / "pseudo_labels/round_0.partial/piece").unlink()
    place.push()
    assert sorted(there(memory)) == ["config.yaml", "somebody's notes"]


def test_unfinished_files_and_checkpoints_are_not_sent(memory: Any, tmp_path: Path) -> None:
    place = bucket(tmp_path / "a")
    for name in (f"config.yaml.{'0' * 32}.partial", "pseudo_labels/round_0.tmp/labels", "checkpoints/4/manifest.json"):
        write(place, name, "x")
    place.push()
    assert there(memory) == {}


def test_checkpoints_stay_where_they_are_and_leave_their_folder(memory: Any, tmp_path: Path) -> None:
    place = bucket(tmp_path / "a")
    place.pull()
    assert not (place.local / "checkpoints").exists()
    memory.pipe_file("/bucket/run/checkpoints/4/manifest.json", b"{}")
    place.pull()
    assert (place.local / "checkpoints").is_dir() and here(place) == {}


def test_a_round_that_was_sent_in_part_is_made_again(memory: Any, tmp_path: Path) -> None:
    names = ["pseudo_labels/round_0/labels", "pseudo_labels/round_0/summary.json", "pseudo_labels/round_1/labels"]
    memory.pipe({f"/bucket/run/{name}": b"x" for name in [*names, "pseudo_labels/round_1.partial/piece"]})
    place = bucket(tmp_path / "a")
    workdir.claim(place, Config())
    assert sorted(here(place)) == ["config.yaml", *names[:2], "pseudo_labels/round_1.partial/piece"]
    assert sorted(there(memory)) == sorted(here(place))


def test_a_summary_is_sent_after_what_it_declares(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = bucket(tmp_path / "a")
    for name in ("abc/summary.json", "abc/a", "abc/z"):
        write(place, name, "x")
    sent = count_calls(monkeypatch, memory, "pipe")
    place.push_complete("abc")
    assert [sorted(Path(name).name for name in batch) for batch in sent] == [["a", "z"], ["summary.json"]]
    bucket(tmp_path / "a").push_complete("abc")
    assert len(sent) == 2, "what is complete there is not sent again"


def test_a_folder_comes_whole_or_not_at_all(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = bucket(tmp_path / "b")
    memory.pipe({"/bucket/run/abc/part": b"1"})
    place.pull_complete("abc")
    assert not (place.local / "abc").exists(), "nobody has said that it is complete"
    memory.pipe({"/bucket/run/abc/summary.json": b"{}", "/bucket/run/abcd/summary.json": b"{}"})
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(memory, "get", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        place.pull_complete("abc")
    assert not list(place.local.glob("abc*"))
    place.pull_complete("abc")
    assert sorted(path.name for path in (place.local / "abc").iterdir()) == ["part", "summary.json"]


def test_what_is_sent_at_the_end_is_sent_after_an_error_too(memory: Any, tmp_path: Path) -> None:
    place = bucket(tmp_path / "a")
    with pytest.raises(ZeroDivisionError), place.sent_at_end():
        write(place, "metrics.jsonl", "one\n")
        raise ZeroDivisionError
    assert there(memory) == {"metrics.jsonl": "one\n"}


def test_processes_of_a_machine_have_their_own_mirrors(memory: Any, tmp_path: Path) -> None:
    ours = storage.place(URL).local
    code = (
        f"from ssl_jax import storage; from pathlib import Path; print(storage._own_folder(Path({str(ours.parent)!r})))"
    )
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(theirs).parent == ours.parent and Path(theirs) != ours
    assert storage.place(f"{URL}/").local == ours, "one process has one mirror of a place"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("memory://bucket/data/a.jsonl", ["a.jsonl"]),
        ("memory://bucket/data/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("memory://bucket/data/**/*.txt", ["d.txt"]),
        ("memory://bucket/data", ["a.jsonl", "b.jsonl", "d.txt"]),
        ("memory://bucket/data/", ["a.jsonl", "b.jsonl", "d.txt"]),
    ],
)
def test_sources_in_a_bucket_are_named_as_those_on_a_disk(memory: Any, path: str, found: list[str]) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.png", "deep/d.txt", ".hidden.txt"):
        memory.pipe_file(f"/bucket/data/{name}", name.encode())
    files = formats.find_files(Source(path=path))
    assert [file.name for file in files] == found
    assert all(file.read_text().endswith(file.name) for file in files)


def test_sources_are_fetched_once_and_again_when_they_change(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe({"/bucket/data/a.txt": b"first", "/bucket/data/b.txt": b"second"})
    source = Source(path="memory://bucket/data/*.txt")
    brought = count_calls(monkeypatch, memory, "get")
    for _ in range(2):
        files = formats.find_files(source)
    assert brought == [["/bucket/data/a.txt", "/bucket/data/b.txt"]]
    memory.rm("/bucket/data/b.txt")
    memory.pipe_file("/bucket/data/a.txt", b"changed")
    files = formats.find_files(source)
    assert [(file.name, file.read_text()) for file in files] == [("a.txt", "changed")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://bucket/data/*.csv", r"memory://bucket/data/\*.csv: no file matches"),
        ("memory://bucket/data/absent.jsonl", "absent.jsonl: no such file"),
        ("memory://elsewhere/data", "memory://elsewhere/data: no such file"),
    ],
)
def test_a_source_that_is_not_there_is_named(memory: Any, path: str, message: str) -> None:
    memory.pipe_file("/bucket/data/a.jsonl", b"{}")
    with pytest.raises(UserError, match=message):
        formats.find_files(Source(path=path))


def test_results_are_written_where_a_url_says(memory: Any, tmp_path: Path) -> None:
    storage.write_json(f"{URL}/eval_test.json", {"a": 1})
    storage.write_json(str(tmp_path / "eval_test.json"), {"a": 1})
    assert there(memory) == {"eval_test.json": (tmp_path / "eval_test.json").read_text()}
    assert json.loads(there(memory)["eval_test.json"]) == {"a": 1}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("az://bucket/run", "az://bucket/run: unknown kind of storage; write gs://, s3://"),
        ("gs://", "names no bucket; write gs://BUCKET/FOLDER"),
        ("nodriver://bucket", r"no_such_module is not installed; pip install 'ssl_jax\[extra\]'"),
    ],
)
def test_a_url_that_cannot_be_used_says_what_to_do(monkeypatch: pytest.MonkeyPatch, url: str, message: str) -> None:
    monkeypatch.setitem(storage._DRIVERS, "nodriver", ("no_such_module", "extra", ""))
    with pytest.raises(UserError, match=message):
        storage.place(url)


def test_a_refusal_names_the_bucket_and_the_fix(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(memory, "pipe_file", refuse)
    with pytest.raises(UserError, match=r"no permission to write memory://bucket \(Forbidden\); ask for it"):
        bucket(tmp_path / "a").check_writable()


def test_a_bug_is_no_refusal() -> None:
    with pytest.raises(KeyError), storage.explained(URL, "read"):
        raise KeyError("a bug")


def test_drivers_are_not_imported_before_they_are_needed() -> None:
    code = "import sys, ssl_jax.train; print([m for m in ('fsspec', 'gcsfs', 's3fs') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
