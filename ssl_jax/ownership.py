"""One run at a time in a work directory.

On this machine, and on file systems that hosts share, a lock of the operating system, which goes with the process that
holds it. A bucket knows no locks: there an object is written again and again by whoever owns the place, and somebody
else takes over only after having watched it stay the same for longer than that takes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from ssl_jax import distributed, storage
from ssl_jax.errors import UserError
from ssl_jax.storage import Place

# How often the owner of a bucket shows that it lives, and how long somebody else watches for that.
_RENEW_SECONDS, _WATCH_SECONDS = 10.0, 25.0
# Two who take a bucket over at once: the one who wrote last sees its own name after this.
_SETTLE_SECONDS = 2.0

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def held(place: Place) -> Iterator[None]:
    """Owns a place while the context is open; the first process of a run calls this for all of them.

    Raises:
      UserError: another run owns it, or it cannot be made.
    """
    with _held_bucket(place) if storage.is_url(place.name) else _held_folder(place.local):
        yield


@contextlib.contextmanager
def _held_folder(folder: Path) -> Iterator[None]:
    path = folder / storage.LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except OSError as error:
        if folder.is_dir() and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            yield  # who cannot make this file can make no other one there
            return
        raise UserError(f"{folder}: cannot be written: {error.strerror}; name another --workdir") from None
    try:
        with contextlib.suppress(OSError):  # the lock is what counts; on a full disk it has no name
            os.ftruncate(lock, 0)
            os.pwrite(lock, _card(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(lock)


def _lock(path: Path) -> int:
    """The descriptor of a file that this process has locked.

    Raises:
      OSError: it cannot be made.
      UserError: another process has locked it.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            card = os.pread(lock, 4096, 0)
            os.close(lock)
            raise _taken(str(path.parent), card) from None
        except OSError as error:  # a file system without locks
            _log.warning("%s cannot be locked (%s): make sure that no other run uses it", path.parent, error.strerror)
            return lock
        # Whoever had it may have taken the file away in between; then it is another one that others would lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)


@contextlib.contextmanager
def _held_bucket(place: Place) -> Iterator[None]:
    store = storage.filesystem(place.name)
    name = f"{store._strip_protocol(place.name)}/{storage.LOCK}"
    card, done = _card(), threading.Event()

    def content() -> bytes | None:
        try:
            return store.cat_file(name)
        except FileNotFoundError:
            return None

    with storage.explained(place.name, "write"):
        if (before := content()) is not None:
            _log.warning(
                "%s was not left in order: watching for %.0f s whether its run goes on", place.name, _WATCH_SECONDS
            )
            deadline = time.monotonic() + _WATCH_SECONDS
            while time.monotonic() < deadline and before is not None:
                time.sleep(min(1.0, _WATCH_SECONDS))
                if (now := content()) not in (None, before):
                    raise _taken(place.name, now or b"")
                before = now
        store.pipe_file(name, _beat(card, 0))
        if before is not None:
            time.sleep(_SETTLE_SECONDS)
        if not (now := content() or b"").startswith(card):
            raise _taken(place.name, now)

    def renew() -> None:
        number = 0
        while not done.wait(_RENEW_SECONDS):
            with contextlib.suppress(Exception):  # what the bucket refuses, the next checkpoint tells
                if (now := content()) is not None and not now.startswith(card):
                    text = f"error: {_taken(place.name, now)}"
                    distributed.end(UserError.exit_code, text)
                    print(text, file=sys.stderr, flush=True)
                    os._exit(UserError.exit_code)
                number += 1
                store.pipe_file(name, _beat(card, number))

    thread = threading.Thread(target=renew, name="owner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(Exception):
            store.rm_file(name)


def _card() -> bytes:
    """Who owns a place, and a mark that nobody else has."""
    owner = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    return json.dumps({**owner, "mark": uuid.uuid4().hex}).encode() + b"\n"


def _beat(card: bytes, number: int) -> bytes:
    return card + b"%d\n" % number


def _taken(name: str, card: bytes) -> UserError:
    try:
        owner = json.loads(card.split(b"\n")[0])
        who = f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return UserError(f"{name} is in use by {who}; wait until that run has ended or stop it, or name another --workdir")
