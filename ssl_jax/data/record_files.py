"""ArrayRecord files written, with the errors of other files."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One record a group: a reader decompresses what it asks for and nothing else.
_OPTIONS = "group_size:1"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Any]:
    """A writer whose `write` takes the bytes of one record; the file is complete when the context has ended well.

    Raises:
      OSError: the file cannot be written (no space left).
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(os.fspath(path), _OPTIONS)
        try:
            yield writer
        finally:
            # What is written waits in memory: a full disk often shows only here.
            writer.close()
    except RuntimeError as error:  # the library raises nothing more specific
        raise OSError(errno.EIO, " ".join(str(error).split())[:300], os.fspath(path)) from error
