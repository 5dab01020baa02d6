"""What may be the name of a file, a folder, or something of a hub or a bucket."""

from __future__ import annotations

import os
import unicodedata
from typing import Any

from ssl_jax.shown import shortened

# Of Linux: a whole path, and one name in it (bytes).
_LONGEST_PATH, _LONGEST_NAME = 4095, 255


def check_path(value: Any) -> Any:
    """A validator of fields that hold a path, none, or several.

    Raises:
      ValueError: it is empty, has a control character, which no name needs and which no message could show, or is
        longer than any file system takes.
    """
    for path in value if isinstance(value, tuple) else (value,):
        if path is None:
            continue
        if not path.strip():
            raise ValueError("the path is empty; name a file or a folder")
        if any(unicodedata.category(character) == "Cc" for character in path):
            raise ValueError(f"a path has no control characters, got {shortened(path)}")
        size, longest = len(os.fsencode(path)), max(len(os.fsencode(name)) for name in path.split("/"))
        if size > _LONGEST_PATH or longest > _LONGEST_NAME:
            raise ValueError(
                f"a path has at most {_LONGEST_PATH} bytes and {_LONGEST_NAME} for each name in it, got {size} and "
                f"{longest}"
            )
    return value
