"""The sources that a configuration names: found, checked, and identified by the bytes of their files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import files, manifest, storage
from ssl_jax.config import Config, Source
from ssl_jax.data import chatterbot, chitchat, formats, named, store
from ssl_jax.data.formats import Expected
from ssl_jax.data.packaged import Packaged, ResolvedSource
from ssl_jax.errors import UserError

PACKAGED: Mapping[str, Packaged] = {"chitchat": chitchat, "chatterbot": chatterbot}
"""The data sets that `Source.dataset` names."""

# What a tokenizer may be made of. Weights often lie beside it, and are no part of it.
_TOKENIZER_SUFFIXES = {".json", ".txt", ".jinja"}
# Settings that say where and how fast data is prepared, or how it is used: not what it is.
_NO_CONTENT = {
    "prepared_dir": True,
    "num_proc": True,
    "beam_options": True,
    "labeled": {"__all__": {"weight"}},
    "unlabeled": {"__all__": {"weight"}},
}
_DIGESTS = "digests.json"
# A file may change twice within the grain of a clock, and look the same. (Git's index has the same rule.)
_CLOCK_GRAIN_NS = 2_000_000_000


def resolve(config: Config) -> list[ResolvedSource]:
    """Finds every source's files, so that a mistake in any of them is reported before work begins.

    Returns:
      The sources of `data.labeled`, then those of `data.unlabeled`.

    Raises:
      UserError: a source is missing or contradicts itself.
    """
    if not config.data.labeled:
        raise UserError("data.labeled: no source; name a file of dialogues that end in an assistant turn")
    if not config.data.unlabeled and config.train.unlabeled_ratio > 0:
        raise UserError(
            f"data.unlabeled: no source, but train.unlabeled_ratio is {config.train.unlabeled_ratio:g}; "
            "add a source or set train.unlabeled_ratio 0"
        )
    resolved = []
    sections: tuple[tuple[Expected, Sequence[Source]], ...] = (
        ("labeled", config.data.labeled),
        ("unlabeled", config.data.unlabeled),
    )
    for expected, sources in sections:
        for source in sources:
            resolved.append(ResolvedSource(expected, source, _files(expected, source)))
    packaged = [(source.dataset, source.language) for source in config.data.labeled if source.dataset]
    for name, language in packaged:
        if packaged.count((name, language)) > 1:
            raise UserError(f"data.labeled: dataset {' '.join([name, *language])} is named twice")
    return resolved


def _files(expected: Expected, source: Source) -> tuple[Path, ...]:
    where = f"data.{expected}"
    try:
        if source.dataset:
            packaged = PACKAGED[source.dataset]
            allowed = (None, "labeled") if expected == "labeled" else packaged.UNLABELED_REGIMES
            if source.regime not in allowed:
                names = ", ".join(name for name in allowed if name)
                raise UserError(f"dataset {source.dataset} with regime {source.regime!r}; use one of: {names}")
            return tuple(packaged.data_files(source))
        if source.regime:
            place = ResolvedSource(expected, source, ()).place
            raise UserError(f"{place}: regime {source.regime!r} is for packaged data sets; remove it")
        return tuple(formats.find_files(source) if source.path else named.data_files(source))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def content_hash(config: Config, sources: Sequence[ResolvedSource], *, remember: bool = True) -> str:
    """SHA-256 (hex) of all that decides the prepared content: bytes of the sources, settings, and our own version.

    Digests of files are remembered in `data.prepared_dir`, and believed while size and times of a file stay the same.

    Args:
      config: the run's configuration.
      sources: those that `data` names.
      remember: whether new digests are written there.

    Raises:
      UserError: a file cannot be read.
    """
    remembered = storage.place(config.data.prepared_dir, shared=True).local / _DIGESTS
    known = _read_digests(remembered)
    digests: dict[str, list[Any]] = {}

    def file_hash(file: Path) -> str:
        try:
            stat = file.stat()
            identity = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            key = str(file.absolute())
            if key not in digests:
                found = known.get(key)
                digests[key] = found if found and found[:-1] == identity else [*identity, _digest(file)]
            return digests[key][-1]
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None

    tokenizer: Any = [config.tokenizer.vocab_size, config.tokenizer.fit_bytes]
    if config.tokenizer.name_or_path:
        folder = Path(config.tokenizer.name_or_path)
        texts = sorted(f for f in folder.iterdir() if f.suffix in _TOKENIZER_SUFFIXES) if folder.is_dir() else []
        hashes = [[file.name, file_hash(file)] for file in texts]
        tokenizer = [config.tokenizer.name_or_path, config.tokenizer.template, hashes]
    if config.tokenizer.direction_tokens:
        tokenizer.append("direction_tokens")
    ingredients = {
        "format_version": store.FORMAT_VERSION,
        "data": config.data.model_dump(exclude=_NO_CONTENT),
        "seed": config.seed if config.data.split_by == "fraction" else None,
        "tokenizer": tokenizer,
        "sources": [
            [resolved.expected, [[file.name, file_hash(file)] for file in resolved.files]] for resolved in sources
        ],
    }
    settled = time.time_ns() - _CLOCK_GRAIN_NS
    old = {key: found for key, found in digests.items() if max(found[1], found[2]) < settled}
    if remember and not old.items() <= known.items():
        with contextlib.suppress(OSError):  # it only saves time
            remembered.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(remembered) as stream:
                stream.write(manifest.encode({**known, **old}))
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_digests(file: Path) -> Mapping[str, list[Any]]:
    try:
        return manifest.decode(file.read_bytes()) or {}
    except OSError:
        return {}


def short_names(sources: Sequence[ResolvedSource]) -> dict[Path, str]:
    """What files, and data sets by name, are called in ids and metadata.

    Names without folders keep ids stable when data moves; the whole path where two would be equal.
    """
    in_order = [resolved for resolved in sources if not resolved.source.dataset]
    names = {}
    for places in (
        [file for resolved in in_order if resolved.source.path for file in resolved.files],
        [Path(resolved.place) for resolved in in_order if not resolved.source.path],
    ):
        folders: dict[str, set[Path]] = {}
        for place in places:
            folders.setdefault(place.name, set()).add(place.parent)
        names |= {place: place.name if len(folders[place.name]) == 1 else os.fspath(place) for place in places}
    return names
