"""Safetensors in a directory, one file or several with an index, and the SHA-256 of files.

Files are read with `pread`, not mapped: pages of a mapping would count as resident memory beside the arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches numpy bfloat16
import numpy as np
import safetensors
from safetensors.numpy import save_file

from ssl_jax import files
from ssl_jax.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DIGESTS = "SHA256SUMS"

FLOAT_TYPES = ("F32", "F16", "BF16")
"""Types that weights may be stored in, by the format's names."""

_DIGEST_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_FILE_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; its values are still on disk.

    Attributes:
      name: as the file has it.
      file: where it lies.
      dtype: by the format's name, such as `F32`.
      shape: its axes.
      content: the library's handle, which reads the part that it is indexed by.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    content: Any

    def read(self, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """The part of the tensor at `index`, as `dtype`.

        Raises:
          UserError: the file cannot be read, or a value is infinite or not a number.
        """
        try:
            part = self.content[index]
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{self.file}: {self.name} cannot be read ({error}); copy the file again") from None
        if not np.isfinite(part).all():
            raise UserError(f"{self.file}: {self.name} holds values that are infinite or not a number")
        return part.astype(dtype, copy=False)


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor in a directory's safetensors, by the name that the file gives it. Only headers are read.

    Raises:
      UserError: no safetensors, or an index or a file that is damaged, incomplete or contradicts the other.
    """
    if not (directory / INDEX).is_file():
        return _open_file(directory / WEIGHTS)
    places = _read_index(directory / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        for name, tensor in _open_file(directory / file).items():
            if places.get(name) != file:
                where = f"it places it in {places[name]}" if name in places else "it does not list it"
                raise UserError(f"{directory / INDEX}: {file} holds {name}, but {where}; copy the directory again")
            tensors[name] = tensor
    for name, file in places.items():
        if name not in tensors:
            raise UserError(f"{directory / INDEX}: {name} is not in {file}; copy the directory again")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        places = files.read_json(path)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not an index of safetensors (no readable weight_map); copy it again") from None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{path}: weight_map must say in which file each tensor is; copy it again")
    for name, file in places.items():
        # A path that leads elsewhere is no part of the model.
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: weight_map places {name} in {file!r}, which is not a file of this directory")
    return places


def _open_file(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: no such file; copy the whole directory")
    try:
        file = safetensors.safe_open(path, framework="numpy", backend="pread")
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - a handle, not a dictionary
            content = file.get_slice(name)
            tensors[name] = StoredTensor(name, path, content.get_dtype(), tuple(content.get_shape()), content)
        return tensors
    except (OSError, safetensors.SafetensorError) as error:
        detail = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{path}: truncated, damaged or not safetensors ({detail:.200}); copy it again") from None


def write_tensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Writes one safetensors file, or several with an index, one file in memory at a time.

    Args:
      directory: where to.
      shapes: every tensor, in the order in which files are filled.
      read: the values of a tensor, of its shape, in any float type.
      dtype: type of the stored values: float32, float16 or bfloat16.
      max_shard_bytes: a file takes tensors up to this size; a larger tensor has a file of its own.

    Raises:
      UserError: a value is not finite in `dtype`.
    """
    item_bytes = np.dtype(dtype).itemsize
    sizes = {name: item_bytes * int(np.prod(shape)) for name, shape in shapes.items()}
    shards = _cut(sizes, max_shard_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _cast(name, read(name), dtype) for name in names}
        # What transformers writes, and older releases of it ask for.
        save_file(tensors, directory / file, metadata={"format": "pt"})
        # The library leaves it to its owner alone.
        (directory / file).chmod(directory.stat().st_mode & 0o666)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        files.write_json(
            directory / INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))},
        )


def _cut(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Groups names in order, each group as large as the limit allows."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _cast(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(values.astype(dtype, copy=False))
    if not np.isfinite(cast).all():
        raise UserError(f"{name} holds values that {dtype} cannot express; choose bfloat16 or float32")
    return cast


def write_digests(directory: Path) -> None:
    """Writes `SHA256SUMS` over all files of a directory, as `sha256sum --check` reads it."""
    names = sorted(path.name for path in directory.iterdir() if path.name != DIGESTS)
    lines = [f"{_sha256(directory / name)}  {name}\n" for name in names]
    files.write_text(directory / DIGESTS, "".join(lines))


def verify_digests(directory: Path) -> None:
    """Compares files with what is known about them: `SHA256SUMS`, and the names of large files in the hub's cache.

    Raises:
      UserError: a file is missing or differs.
    """
    for path, digest in {**_cached_digests(directory), **_listed_digests(directory / DIGESTS)}.items():
        try:
            found = _sha256(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); copy the whole directory again") from None
        if found != digest:
            raise UserError(
                f"{path}: damaged or changed, its SHA-256 is not the one recorded; copy it again"
                + (f", or remove {DIGESTS} if the change is yours" if (directory / DIGESTS).is_file() else "")
            )


def _listed_digests(path: Path) -> dict[Path, str]:
    if not path.is_file():
        return {}
    digests = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _DIGEST_LINE.fullmatch(line)
        if match is None or Path(match[2]).name != match[2]:
            raise UserError(f"{path}: {line[:80]!r} is not a line of sha256sum; copy the whole directory again")
        digests[path.parent / match[2]] = match[1]
    return digests


def _cached_digests(directory: Path) -> dict[Path, str]:
    """The hub's cache links to blobs; those of large files are named by their SHA-256."""
    blobs = {path: path.resolve() for path in directory.glob("*.safetensors") if path.is_symlink()}
    return {
        path: blob.name
        for path, blob in blobs.items()
        if blob.parent.name == "blobs" and _FILE_DIGEST.fullmatch(blob.name)
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
