"""Places: a folder of this machine, or a folder of a bucket (`gs://`, `s3://`) and one here that mirrors it.

What needs real files (ArrayRecord, log files, TensorBoard events, tokenizers) works in `Place.local`, wherever the
place is. For a folder of this machine that is the folder itself, and `pull` and `push` have nothing to do. For a
bucket, `pull` brings what is there to the mirror, and `push` sends what has changed here since. Checkpoints are not
mirrored: every host writes and reads its part of them in the bucket, at `Place.path`.

An object appears whole or not at all. Where several make one thing, a `summary.json` among them says that the thing is
complete, and is sent last.

Credentials are those that the drivers, gcsfs and s3fs, find in the environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ssl_jax import distributed, files
from ssl_jax.errors import UserError

# By scheme: the driver of fsspec, the extra that installs it, and what to do about a missing permission.
_DRIVERS = {
    "gs": (
        "gcsfs",
        "gcs",
        "log in with gcloud auth application-default login, or run as a service account, that has the role "
        "roles/storage.objectAdmin on the bucket",
    ),
    "s3": (
        "s3fs",
        "s3",
        "give credentials (aws configure, AWS_PROFILE, AWS_ACCESS_KEY_ID, or a role of the machine) that may list, "
        "get, put and delete objects of the bucket",
    ),
}
# Whose exceptions tell of the bucket or the way to it. The drivers turn only some of them into OSError.
_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3"}
_ABSENT = re.compile(r"NoSuchBucket|bucket does not exist|\b404\b|not ?found", re.IGNORECASE)
_FORBIDDEN = re.compile(
    r"\b40[13]\b|denied|forbidden|credential|unauthorized|permission|InvalidAccessKey", re.IGNORECASE
)

LOCK = "lock"
"""Who uses a place, see `ownership`."""

_NOT_MIRRORED = "checkpoints"
_COMPLETE = "summary.json"
_TEMPORARY = re.compile(r".*\.[0-9a-f]{32}\.partial|.*\.tmp")
# Of a file that may grow meanwhile, what it holds now is sent. Larger files are complete before they are sent.
_IN_MEMORY_BYTES = 2**26


class Place:
    """A folder of this machine, which all hosts of a run see.

    Attributes:
      name: what the user calls it.
      local: the folder in which files are read and written.
    """

    def __init__(self, name: str, local: Path) -> None:
        self.name, self.local = name, local

    def path(self, name: str) -> Any:
        """A `pathlib` or `etils.epath` path of what all hosts write to the place itself."""
        return self.local / name

    def check_writable(self) -> None:
        """Makes sure that a bucket can be written; whether a folder can is found out by whoever makes it.

        Raises:
          UserError: no such bucket, no permission, or no way to it.
        """

    def pull(self, *names: str) -> None:
        """Brings files, and folders with all in them, from the bucket; without names, makes the mirror equal to it.

        Raises:
          UserError: no permission, or no way to the bucket.
        """

    def pull_complete(self, name: str) -> None:
        """Brings a folder that has a `summary.json`, unless it is here already; it appears whole.

        Raises:
          UserError: no permission, or no way to the bucket.
        """

    def push(self, *names: str) -> None:
        """Sends what the first process has changed since the last time; without names, all of it.

        Raises:
          UserError: the bucket refuses it.
        """

    def push_complete(self, name: str) -> None:
        """Sends a folder that has a `summary.json`, from the first process, unless it is there already.

        Raises:
          UserError: the bucket refuses it.
        """

    @contextlib.contextmanager
    def sent_at_end(self) -> Iterator[None]:
        """Pushes when the block ends, well or not."""
        try:
            yield
        except Exception:
            with contextlib.suppress(UserError):  # what stopped the block is the news
                self.push()
            raise
        self.push()

    def share(self, event: str, *names: str) -> None:
        """Lets all processes of the run see what the first one has written; all of them come here.

        Args:
          event: unique in a run.
          names: of folders.

        Raises:
          UserError: the bucket refuses it.
        """


class Bucket(Place):
    """A folder of a bucket. Only the first process of a run changes it here."""

    def __init__(self, url: str, local: Path) -> None:
        """Reads nothing yet.

        Args:
          url: `gs://bucket/folder`.
          local: the mirror.
        """
        super().__init__(url, local)
        self._files = filesystem(url)
        self._root: str = self._files._strip_protocol(url)
        # By name: how the object and the file were told from others when they were last the same. None: not known.
        self._same: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.Lock()
        local.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Any:
        """In the bucket."""
        from etils import epath

        return epath.Path(self.name) / name

    def check_writable(self) -> None:
        """Writes an object and takes it away."""
        probe = f"{self._root}/.writable-{uuid.uuid4().hex}"
        with explained(self.name, "write"):
            self._files.pipe_file(probe, b"")
            self._files.rm_file(probe)

    def pull(self, *names: str) -> None:
        """Brings what differs."""
        with self._lock, explained(self.name, "read"):
            there = self._there(names)
            changed = [
                name for name in there if None in (same := self._seen(name)) or same != (there[name], self._here(name))
            ]
            _download(self._files, {f"{self._root}/{name}": self.local / name for name in changed})
            self._same |= {name: (there[name], self._here(name)) for name in changed}
            if not names:
                for name in set(self._all_here()).difference(there):
                    (self.local / name).unlink()
                    self._same.pop(name, None)

    def pull_complete(self, name: str) -> None:
        """Brings it beside its place, then moves it there."""
        folder = self.local / name
        with _locked(self.local / f".{name}.lock"), explained(self.name, "read"):
            if (folder / _COMPLETE).is_file() or not self._files.exists(f"{self._root}/{name}/{_COMPLETE}"):
                return
            partial = files.partial_path(folder)
            try:
                names = [found.removeprefix(f"{name}/") for found in self._there([name])]
                _download(self._files, {f"{self._root}/{name}/{found}": partial / found for found in names})
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def push(self, *names: str) -> None:
        """Sends what differs, what declares other things complete last, and takes away what is no longer here."""
        if not distributed.is_primary():
            return
        with self._lock, explained(self.name, "write"):
            here = {name: self._here(name) for name in self._all_here() if _is_below(name, names)}
            changed = [name for name in here if self._seen(name)[1] != here[name]]
            for is_last in (False, True):
                self._upload([name for name in changed if (Path(name).name == _COMPLETE) == is_last])
            self._same |= {name: (None, here[name]) for name in changed}
            gone = [name for name in self._same if _is_below(name, names) and name not in here]
            if gone:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm([f"{self._root}/{name}" for name in gone])
            for name in gone:
                del self._same[name]

    def push_complete(self, name: str) -> None:
        """As `push`, which sends the summary last."""
        with explained(self.name, "read"):
            is_there = not distributed.is_primary() or self._files.exists(f"{self._root}/{name}/{_COMPLETE}")
        if not is_there:
            self.push(name)

    def share(self, event: str, *names: str) -> None:
        """The first process pushes, then the others pull."""
        distributed.primary_first(event, self.push if distributed.is_primary() else lambda: self.pull(*names))

    def _seen(self, name: str) -> tuple[Any, Any]:
        return self._same.get(name, (None, None))

    def _upload(self, names: list[str]) -> None:
        small = [name for name in names if (self.local / name).stat().st_size <= _IN_MEMORY_BYTES]
        for batch in _batches(small, lambda name: (self.local / name).stat().st_size):
            self._files.pipe({f"{self._root}/{name}": (self.local / name).read_bytes() for name in batch})
        for name in set(names).difference(small):
            self._files.put_file(str(self.local / name), f"{self._root}/{name}")

    def _there(self, names: Iterable[str]) -> dict[str, str]:
        """What tells an object from others of its name, by name; those that are not mirrored leave a folder only."""
        found: dict[str, str] = {}
        for name in tuple(names) or ("",):
            found |= _objects(self._files, self._root, name)
        mirrored = {name: identity for name, identity in found.items() if _is_mirrored(name)}
        if any(name.startswith(f"{_NOT_MIRRORED}/") for name in found):
            (self.local / _NOT_MIRRORED).mkdir(exist_ok=True)
        elif not names:
            shutil.rmtree(self.local / _NOT_MIRRORED, ignore_errors=True)
        return mirrored

    def _here(self, name: str) -> Any:
        try:
            stat = (self.local / name).stat()
        except FileNotFoundError:
            return None
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def _all_here(self) -> list[str]:
        paths = (path for path in self.local.rglob("*") if path.is_file())
        return [name for path in paths if _is_mirrored(name := path.relative_to(self.local).as_posix())]


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether this names something of a bucket."""
    return "://" in os.fspath(name)


def place(name: str | Path | Place, *, shared: bool = False) -> Place:
    """The place that a user names.

    Args:
      name: a path, or a URL of a bucket; a place is itself.
      shared: whether all processes of this machine use the same mirror; otherwise each has its own.

    Raises:
      UserError: an unknown scheme, or its driver is not installed.
    """
    if isinstance(name, Place):
        return name
    if not is_url(name):
        return Place(str(name), Path(name))
    filesystem(str(name))
    return _bucket(str(name).rstrip("/"), shared)


@functools.cache
def _bucket(url: str, shared: bool) -> Bucket:
    base = cache_folder() / ("shared" if shared else "mirrors") / _key(url)
    return Bucket(url, base if shared else _own_folder(base))


def fetch(url: str, keep: Callable[[str], bool]) -> Path:
    """Copies the files of a bucket that a user names to this machine, but for those that are here already.

    Args:
      url: of a file, of a folder, or with the wildcards of `glob`.
      keep: whether a file of a folder is wanted, by its name.

    Returns:
      A path, with the same wildcards, that names the copies and nothing else.

    Raises:
      UserError: there is no such file, no permission, or no way to the bucket.
    """
    store = filesystem(url)
    given: str = store._strip_protocol(url.rstrip("/"))
    has_wildcards = any(character in given for character in "*?[")
    parts = given.split("/")
    fixed = next((number for number, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    root, rest = "/".join(parts[:fixed]), "/".join(parts[fixed:])
    with explained(url, "read"):
        if has_wildcards:
            found = {name: info for name, info in store.glob(given, detail=True).items() if info["type"] == "file"}
            there = {_inner(name.removeprefix(f"{root}/")): _identity(info) for name, info in found.items()}
        else:
            objects = _objects(store, root, rest) if root else _objects(store, given, "")
            there = {name: identity for name, identity in objects.items() if name == rest or keep(name)}
    if not there:
        raise UserError(f"{url}: " + ("no file matches" if has_wildcards else "no such file, or a folder without one"))
    base = cache_folder() / "sources" / _key(url)
    folder, index = base / "files", base / "index.json"
    base.mkdir(parents=True, exist_ok=True)
    with _locked(base / "lock"), explained(url, "read"):
        known = files.read_json(index) if index.is_file() else {}
        wanted = {
            f"{root}/{name}" if root else f"{given}/{name}": folder / name
            for name, identity in there.items()
            if known.get(name) != identity or not (folder / name).is_file()
        }
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if path.relative_to(folder).as_posix() not in there:
                path.unlink()
        _download(store, wanted)
        files.write_json(index, there)
    return folder / rest if root else folder


def names_below(folder: Any) -> list[str]:
    """Names of the files in a folder, as `Place.path` gives it, and in its folders, relative to it, sorted."""
    return sorted(identities_below(folder))


def identities_below(folder: Any) -> dict[str, str]:
    """What tells each file of `names_below` from others of its name: it changes when the file does."""
    if is_url(folder):
        store = filesystem(os.fspath(folder))
        return _objects(store, store._strip_protocol(os.fspath(folder)), "")
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            with contextlib.suppress(FileNotFoundError):  # it goes while we look
                stat = path.stat()
                identity = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
                found[path.relative_to(folder).as_posix()] = " ".join(map(str, identity))
    return found


def write_json(name: str, value: Any) -> None:
    """Replaces a file by indented JSON, on this machine or in a bucket.

    Raises:
      UserError: the bucket refuses it.
    """
    if not is_url(name):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        files.write_json(Path(name), value)
        return
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with explained(name, "write"):
        filesystem(name).pipe_file(name, text.encode())


@functools.cache
def filesystem(url: str) -> Any:
    """The driver of fsspec for a URL.

    Raises:
      UserError: an unknown scheme, no bucket, or the driver is not installed.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in _DRIVERS:
        raise UserError(
            f"{url}: unknown kind of storage; write {', '.join(f'{known}://' for known in _DRIVERS)} or a path"
        )
    if not rest.strip("/"):
        raise UserError(f"{url}: names no bucket; write {scheme}://BUCKET/FOLDER")
    module, extra, _ = _DRIVERS[scheme]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{url}: {module} is not installed; pip install 'ssl_jax[{extra}]'")
    import fsspec
    from fsspec.config import conf

    # Others write too: other hosts, and TensorStore in this process. Orbax makes its drivers with the same settings.
    for protocol in ("gs", "gcs", "s3"):
        conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    # It logs what it raises as well, with a traceback.
    logging.getLogger("gcsfs").addFilter(lambda record: not record.exc_info)
    return fsspec.filesystem(scheme)


@contextlib.contextmanager
def explained(url: str, verb: str) -> Iterator[None]:
    """Turns what a bucket refuses into a message that names it and the fix.

    Raises:
      UserError: what the block was refused.
    """
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        raise UserError(explanation(url, verb, error)) from error


def is_refusal(error: BaseException) -> bool:
    """Whether an exception tells of the storage or the way to it, rather than of a bug."""
    if isinstance(error, UserError):
        return False
    is_bad_request = isinstance(error, ValueError) and str(error).startswith("Bad Request")  # how gcsfs puts it
    return isinstance(error, OSError) or is_bad_request or type(error).__module__.split(".")[0] in _LIBRARIES


def explanation(url: str, verb: str, error: BaseException) -> str:
    """What went wrong with a bucket and what to do, in one line."""
    scheme, _, rest = url.partition("://")
    bucket, reason = f"{scheme}://{rest.split('/')[0]}", " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, PermissionError) or _FORBIDDEN.search(reason):
        fix = _DRIVERS[scheme][2] if scheme in _DRIVERS else "get the permission"
        return f"{url}: no permission to {verb} {bucket} ({reason}); {fix}"
    if isinstance(error, FileNotFoundError) or _ABSENT.search(reason):
        return f"{url}: there is no bucket {bucket} ({reason}); make it, or correct the name"
    return f"{url}: cannot {verb} {bucket}: {reason}; check the network, the endpoint and the free disk space"


def cache_folder() -> Path:
    """Where copies of what is in buckets lie: `$XDG_CACHE_HOME/ssl_jax/buckets`, by default below `~/.cache`.

    Where that cannot be written, a folder of the machine's temporary ones. Nobody else can read or write either.

    Raises:
      UserError: there is no such folder.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no permission, or no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssl_jax" / "buckets"
        files.make_private(folder)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"ssl_jax_buckets_{os.getuid()}"
    try:
        files.make_private(folder)
    except OSError as error:  # there anybody may have made it
        raise UserError(f"{folder}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours") from None
    return folder


def _own_folder(base: Path) -> Path:
    """The first numbered folder that no other process of this machine holds, for as long as this one lives."""
    base.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        # Never closed: the lock goes when the process ends.
        lock = os.open(base / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return base / str(number)
    raise AssertionError


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _objects(store: Any, root: str, name: str) -> dict[str, str]:
    """The objects of a name below a root, or below that name, and what tells each from others of its name."""
    where = f"{root}/{name}".rstrip("/")
    try:
        found: Mapping[str, Mapping[str, Any]] = store.find(where, detail=True)
    except FileNotFoundError:
        if not store.exists(root.split("/")[0]):
            raise
        return {}
    return {
        _inner(path.removeprefix(f"{root}/").lstrip("/")): _identity(info)
        for path, info in found.items()
        if info["type"] == "file" and not path.endswith("/")
    }


def _inner(name: str) -> str:
    """The name of an object, whose copy shall lie in a folder here.

    Raises:
      UserError: as a path it would lead out of the folder.
    """
    if files.leads_out(name):
        raise UserError(f"an object is named {name!r:.200}, which is no path within a folder; remove or rename it")
    return name


def _identity(info: Mapping[str, Any]) -> str:
    version = next((info[key] for key in ("etag", "ETag", "generation", "mtime", "created") if info.get(key)), "")
    return f"{info['size']} {version}"


def _download(store: Any, targets: Mapping[str, Path]) -> None:
    """Copies objects to files, each of which is replaced as a whole."""
    partial = {path: files.partial_path(path) for path in targets.values()}
    try:
        for path in partial:
            path.parent.mkdir(parents=True, exist_ok=True)
        if targets:
            store.get(list(targets), [str(partial[path]) for path in targets.values()])
        for path, temporary in partial.items():
            temporary.replace(path)
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


def _batches(names: Iterable[str], size: Callable[[str], int]) -> Iterator[list[str]]:
    """Names in groups that fit in memory together."""
    batch, total = [], 0
    for name in names:
        if batch and total + size(name) > 2 * _IN_MEMORY_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += size(name)
    if batch:
        yield batch


def _is_below(name: str, parents: tuple[str, ...]) -> bool:
    return not parents or any(name == parent or name.startswith(f"{parent}/") for parent in parents)


def _is_mirrored(name: str) -> bool:
    parts = name.split("/")
    return parts != [LOCK] and parts[0] != _NOT_MIRRORED and not any(_TEMPORARY.fullmatch(part) for part in parts)


def _key(url: str) -> str:
    """A folder's name for a URL, which people can read and which no other URL has."""
    return f"{urllib.parse.quote(url, safe='')[-80:]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
