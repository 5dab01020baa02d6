"""What the tests of preparation by processes and by Beam share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_jax.config import Config
from ssl_jax.data import pipeline
from ssl_jax.data.store import Prepared

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "me", "with", "big", "green", "eyes", "while")


def config(settings: dict[str, Any], **data: Any) -> Config:
    """The configuration of some settings, with some fields of its data changed."""
    return Config.model_validate({**settings, "data": {**settings["data"], **data}})


def quietly(config: Config) -> Prepared:
    """Prepares, and says nothing."""
    return pipeline.prepare(config, say=lambda line: None)


def content(directory: Path, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """All files of a directory by their names in it, but for those with some suffixes."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.suffix not in without
    }
