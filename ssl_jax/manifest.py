"""Folders that know whether they are what was written: a manifest with the size and SHA-256 of every file.

The manifest is a JSON object with a digest of itself, and is written last: a folder without one is not complete.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import files, storage

NAME = "manifest.json"

# Of a bucket, whose single answers are slow.
_READS_AT_ONCE = 16


def encode(body: Mapping[str, Any]) -> bytes:
    """The only spelling of a JSON object: with its own digest, so that a changed byte anywhere in it shows."""
    text = json.dumps(body, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True).encode()


def decode(content: bytes) -> dict[str, Any] | None:
    """What was encoded, or None if the content is not as it was written."""
    try:
        body = json.loads(content)
        del body["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return body if encode(body) == content else None


def write(folder: Any, body: Mapping[str, Any], *, without: str | None = None) -> None:
    """Makes the files of a folder durable, then the manifest that declares them, in this order.

    Args:
      folder: as `storage.Place.path` gives it.
      body: what the manifest says besides `files`.
      without: name of a file that is not part of what is made.

    Raises:
      OSError: a file cannot be read, or the manifest not written.
    """
    names = [name for name in storage.names_below(folder) if name not in (NAME, without)]
    for name in names:
        files.sync(folder / name)
    with files.replacing(folder / NAME) as stream:
        stream.write(encode({**body, "files": declare(folder, names)}))
    files.sync(folder)
    files.sync(folder.parent)


def declare(folder: Any, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of files of a folder by name.

    Raises:
      OSError: one cannot be read.
    """
    declared = {}
    for name, found in _digests(folder, names):
        if isinstance(found, OSError):
            raise found
        declared[name] = {"bytes": found[0], "sha256": found[1]}
    return declared


def read(path: Any) -> dict[str, Any]:
    """What a manifest says, without its own digest.

    Raises:
      ValueError: it is absent or not as it was written; the message says which.
    """
    try:
        content = path.read_bytes()
    except OSError:
        raise ValueError(f"no {NAME}: writing was cut off, or this is something else") from None
    body = decode(content)
    # Whoever writes another manifest can give it its digest.
    if body is None or not _declares_files(body.get("files")):
        raise ValueError(f"{NAME} is damaged")
    if names := [name for name in body["files"] if files.leads_out(name)]:
        raise ValueError(f"{NAME} names {names[0]!r:.80}, which leads out of its folder")
    return body


def difference(folder: Any, declared: Mapping[str, Mapping[str, Any]], *, at_once: int = 1) -> str | None:
    """How the files of a folder differ from what a manifest declares of them, the first difference, or None.

    Args:
      folder: as `storage.Place.path` gives it.
      declared: `bytes` and `sha256` of files by name.
      at_once: how many of a folder of this machine are read together.
    """
    for name, found in _digests(folder, list(declared), at_once):
        if isinstance(found, OSError):
            return f"{name} cannot be read: {found.strerror or found}"
        if found[0] != declared[name]["bytes"]:
            return f"{name} has {found[0]} bytes instead of {declared[name]['bytes']}"
        if found[1] != declared[name]["sha256"]:
            return f"{name} differs from what was written (SHA-256)"
    return None


def problem(folder: Any, *, but_not: str | None = None, at_once: int = 1) -> str | None:
    """Why a folder is not what was written, or None; a folder in it with the name `but_not` is not looked at."""
    try:
        declared = read(folder / NAME)["files"]
    except ValueError as error:
        return str(error)
    looked_at = {name: file for name, file in declared.items() if name.split("/")[0] != but_not}
    return difference(folder, looked_at, at_once=at_once)


def _declares_files(declared: Any) -> bool:
    return isinstance(declared, dict) and all(
        isinstance(file, dict) and file.keys() == {"bytes", "sha256"} for file in declared.values()
    )


def _digests(folder: Any, names: Sequence[str], at_once: int = 1) -> Iterator[tuple[str, tuple[int, str] | OSError]]:
    """Size and SHA-256 of every file of a folder, or why it cannot be read; many at once of a bucket."""
    root = folder.resolve() if isinstance(folder, Path) else None

    def digest(name: str) -> tuple[str, tuple[int, str] | OSError]:
        try:
            if root is not None:
                _check_place(root, root / name)
            return name, files.digest(folder / name)
        except OSError as error:
            return name, error

    if root is not None and at_once == 1:
        yield from map(digest, names)
        return
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE if root is None else at_once) as threads:
        yield from threads.map(digest, names)


def _check_place(root: Path, path: Path) -> None:
    """Raises OSError where a link leads out of the folder, or to what is not a file and may never end."""
    if path.exists() and not (path.is_file() and path.resolve().is_relative_to(root)):
        raise OSError(None, "it is a link that leads elsewhere, or no file")
