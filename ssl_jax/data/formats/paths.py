"""From a path, a glob or a folder to the files in it, none of them outside."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ssl_jax import storage
from ssl_jax.config import Source
from ssl_jax.errors import UserError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".log", ".parquet", ".tsv", ".txt")
"""What a file in a folder must end in to be read, before .gz or .zst."""

COMPRESSED_SUFFIXES = (".gz", ".zst")

_DAY_FILE = re.compile(r"\d{4}-\d{2}-\d{2}\.json")
_SLACK_USERS = "users.json"


def find_files(source: Source) -> list[Path]:
    """The files that `source.path` names, sorted.

    A folder stands for all files in it, and in its folders, that end in one of `SUFFIXES`, perhaps compressed; hidden
    ones are left out. A Slack export's list of users comes with it.

    Raises:
      UserError: nothing is there, it is no file, or a link or `..` in what was found leads out of the named folder.
    """
    given = str(source.path)
    if storage.is_url(given):
        given = str(storage.fetch(given, lambda name: suffix(Path(name)) in SUFFIXES))
    try:
        path = Path(given).expanduser()
        if path.is_dir():
            files = _inside(path, _walk(path), given)
            if not files:
                raise UserError(f"{given}: the folder has no file that ends in {', '.join(SUFFIXES)}; name a glob")
        elif path.exists():
            files = [path]
        else:
            files = _inside(_fixed_folder(path), _glob(path), given)
    except (OSError, RuntimeError, ValueError) as error:  # too long, not permitted, no such home, a zero byte
        if isinstance(error, UserError):
            raise
        raise UserError(f"{given!r:.200}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not files:
        what = "no file matches" if glob.has_magic(given) else "no such file"
        raise UserError(f"{given}: {what}{_nearest(path)}")
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file}: is not a file with content (a pipe, a device or a broken link); write it to a file"
            )
    users = {users for file in files if slack_export(file) and (users := slack_users(file))}
    return sorted(users.union(files))


def suffix(file: Path) -> str:
    """The ending of a name, before that of a compression, in lower case."""
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED_SUFFIXES else name.suffix


def slack_export(file: Path) -> Path | None:
    """The folder of the Slack export that a file is a day of: `EXPORT/CHANNEL/2024-05-31.json`."""
    if not _DAY_FILE.fullmatch(file.name):
        return None
    export = file.parent.parent
    is_export = (export / _SLACK_USERS).is_file() or (export / "channels.json").is_file()
    return export if is_export else None


def slack_users(day: Path) -> Path | None:
    """Who the ids in a day file of a Slack export are."""
    file = day.parent.parent / _SLACK_USERS
    return file if file.is_file() else None


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(parent) / name).is_symlink():
                yield Path(parent) / name
        yield from (
            Path(parent) / name for name in names if not name.startswith(".") and suffix(Path(name)) in SUFFIXES
        )


def _inside(folder: Path, found: Iterable[Path], given: str) -> list[Path]:
    """Files that were found in a folder, each once. Links to folders are followed by nobody, those outside refused."""
    root = folder.resolve()
    real: dict[Path, Path] = {}
    for file in found:
        target = file.resolve()
        if not target.is_relative_to(root):
            raise UserError(
                f"{given}: {file} leads out of the folder, to {target}; name that path itself to read it, or remove it"
            )
        if not target.is_dir() and (target not in real or not file.is_symlink()):
            real[target] = file
    return sorted(real.values())


def _fixed_folder(pattern: Path) -> Path:
    """The folder that a glob names before its first wildcard."""
    fixed: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _glob(pattern: Path) -> Iterator[Path]:
    """What a glob matches, hidden names only where it spells their dot. `**` does not follow links to folders."""
    folder = _fixed_folder(pattern)
    parts = pattern.parts[len(folder.parts) :]
    if not parts or not glob.has_magic(str(pattern)):
        return
    if parts[-1] == "**":
        parts = (*parts, "*")
    spelled = {part for part in parts if part.startswith(".")}
    for found in folder.glob("/".join(parts)):
        hidden = [part for part in found.parts[len(folder.parts) :] if part.startswith(".")]
        if all(any(fnmatch.fnmatch(part, pattern) for pattern in spelled) for part in hidden) and (
            found.is_symlink() or not found.is_dir()
        ):
            yield found


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})" if not glob.has_magic(str(path.parent)) else ""
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / matches[0]}?" if matches else ""
