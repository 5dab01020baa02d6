"""Files of results that hold one for every key: a model, a device, a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provenance import provenance

from ssl_jax import files


def add_result(path: str, key: str, values: Mapping[str, Any]) -> None:
    """Puts a result, and where it was measured, beside the others of a file, or in the place of one with its key."""
    file = Path(path)
    others = files.read_json(file) if file.exists() else {}
    files.write_json(file, {**others, key: {**provenance(), **values}})
