"""Files that are replaced as a whole: a reader sees the old content or the new, never half of it.

Those in a bucket, whose paths are `etils.epath.Path`, are so by themselves.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_BUFFER_BYTES = 2**20
# A bucket is asked once for as much.
_BLOCK_BYTES = 2**25


@contextlib.contextmanager
def replacing(path: Any) -> Iterator[BinaryIO]:
    """A stream whose content replaces that of a file when the context ends without an exception.

    An OSError that has no name of a file, as that of a full disk, gets this one's; one that has no number either, as
    NumPy's of a write that was cut short, becomes EIO.
    """
    if not isinstance(path, Path):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    temporary = partial_path(path)
    try:
        with temporary.open("wb", _BUFFER_BYTES) as stream:
            yield stream
        sync(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if type(error) is OSError and error.errno is None:
            raise OSError(errno.EIO, str(error), str(path)) from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Any) -> None:
    """Returns when what is in a file, or which names are in a folder, outlives a loss of power."""
    if not isinstance(path, Path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Any) -> None:
    """Removes a folder with all that is in it."""
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        folder.rmtree(missing_ok=True)


def digest(path: Any) -> tuple[int, str]:
    """Size of a file (bytes) and its SHA-256 (hex)."""
    with path.open("rb") as stream:
        if isinstance(path, Path):
            found = hashlib.file_digest(stream, "sha256")
            return os.fstat(stream.fileno()).st_size, found.hexdigest()
        found, size = hashlib.sha256(), 0
        while block := stream.read(_BLOCK_BYTES):
            found.update(block)
            size += len(block)
        return size, found.hexdigest()


def partial_path(path: Path) -> Path:
    """A name beside `path` for what will replace it, which no other attempt to do the same uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def write_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 file."""
    with replacing(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not JSON in UTF-8, or nested so deep that nobody can mean it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def leads_out(name: Any) -> bool:
    """Whether what should name a file in a folder, as another file has it, is anything else: a path that leads out."""
    return not isinstance(name, str) or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))


def make_private(folder: Path) -> None:
    """Makes a folder that is of use to its owner alone, or checks that nobody else can have put anything into it.

    Raises:
      OSError: it is somebody else's, or everybody may write into it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if {found.st_uid, folder.lstat().st_uid} != {os.geteuid()} or found.st_mode & stat.S_IWOTH:
        raise PermissionError(errno.EPERM, "belongs to somebody else, or everybody may write there", os.fspath(folder))
    if found.st_mode & 0o077:
        folder.chmod(0o700)
