"""A work directory has one run at a time: the second one is told who has it, and nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from ssl_jax import ownership, storage, train
from ssl_jax.errors import UserError

# Owns the folder that it is given, says so, and waits to be ended.
HOLDER = """
import sys, time
from ssl_jax import ownership, storage
with ownership.held(storage.place(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=tiny.environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(30)
    process.stdout.close()


def test_a_second_run_is_told_who_has_the_folder_and_changes_nothing(holder: Any, tmp_path: Path) -> None:
    config = tiny.write_all(tmp_path / "data")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=rf"{tmp_path} is in use by process {holder.pid} on .* since .*--workdir"):
        train.main(["--config", str(config), "--workdir", str(tmp_path)])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_dead_process_held_is_free(holder: Any, tmp_path: Path, number: signal.Signals) -> None:
    holder.send_signal(number)
    holder.wait(30)
    with ownership.held(storage.place(tmp_path)):
        assert str(os.getpid()) in (tmp_path / storage.LOCK).read_text()
    assert not (tmp_path / storage.LOCK).exists()


def test_a_lock_that_is_taken_away_in_between_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opens the file, and locks it after its owner has removed it, holds a file that nobody else will find."""
    flock, turns = ownership.fcntl.flock, []

    def remove_first(lock: int, how: int) -> None:
        if not turns:
            (tmp_path / storage.LOCK).unlink()
        turns.append(lock)
        flock(lock, how)

    monkeypatch.setattr(ownership.fcntl, "flock", remove_first)
    with ownership.held(storage.place(tmp_path)):
        assert len(turns) == 2
        assert os.path.samestat(os.fstat(turns[-1]), (tmp_path / storage.LOCK).stat())


def test_only_one_of_many_at_once_gets_it(tmp_path: Path) -> None:
    inside, refused, most = [], [], []
    start = threading.Barrier(8)

    def take() -> None:
        start.wait()
        for _ in range(50):
            try:
                with ownership.held(storage.place(tmp_path)):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except UserError:
                refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and refused and not (tmp_path / storage.LOCK).exists()


class Store:
    """Objects of a bucket, as fsspec gives them."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def _strip_protocol(self, name: str) -> str:
        return name.split("://")[1]

    def cat_file(self, name: str) -> bytes:
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.objects[name]

    def pipe_file(self, name: str, content: bytes) -> None:
        self.objects[name] = content

    def rm_file(self, name: str) -> None:
        del self.objects[name]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Store, Callable[[], Any]]:
    """A bucket whose clocks run a hundred times as fast, and how to own a folder of it."""
    store = Store()
    monkeypatch.setattr(storage, "filesystem", lambda name: store)
    for name in ("_RENEW_SECONDS", "_WATCH_SECONDS", "_SETTLE_SECONDS"):
        monkeypatch.setattr(ownership, name, getattr(ownership, name) / 100)
    return store, lambda: ownership.held(storage.Place("s3://bucket/run", tmp_path))


def test_a_folder_of_a_bucket_has_one_owner(bucket: tuple[Store, Callable[[], Any]]) -> None:
    store, own = bucket
    with own():
        assert list(store.objects) == ["bucket/run/lock"]
        with pytest.raises(UserError, match=f"s3://bucket/run is in use by process {os.getpid()} on"), own():
            pass
    assert not store.objects


def test_what_a_dead_owner_left_in_a_bucket_is_taken_over(bucket: tuple[Store, Callable[[], Any]]) -> None:
    store, own = bucket
    store.objects["bucket/run/lock"] = b'{"process": 1}\n7\n'
    with own():
        assert f'"process": {os.getpid()}'.encode() in store.objects["bucket/run/lock"]
    assert not store.objects


def test_of_two_who_take_over_at_once_the_last_to_write_wins(
    bucket: tuple[Store, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, own = bucket
    store.objects["bucket/run/lock"] = b"left\n"
    monkeypatch.setattr(
        ownership.time,
        "sleep",
        lambda seconds: store.objects.update({"bucket/run/lock": b"mine\n"}) if seconds == 0.02 else None,
    )
    with pytest.raises(UserError, match="in use by another process"), own():
        pass
    assert store.objects == {"bucket/run/lock": b"mine\n"}
