"""Scalars for TensorBoard: event files, written at once by whoever has a number to show.

Event files are records of protocol buffers, each between its length and checksums. tensorboardX's own writer leaves
writing to a thread: where that ends because the disk is full, everybody who comes with another number waits forever.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

_SECONDS_BETWEEN_FLUSHES = 10.0


class EventFile:
    """A new file of events beside those of earlier processes, read after them."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begins the file.

        Args:
          folder: created if absent.
          first_step: of this process; TensorBoard forgets what earlier files say of it and of later ones.

        Raises:
          OSError: the file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, whatever the clock says.
        earlier = [int(found[1]) for path in folder.iterdir() if (found := re.search(r"tfevents\.(\d+)\.", path.name))]
        begun = max([int(time.time()), *(number + 1 for number in earlier)])
        path = folder / f"events.out.tfevents.{begun:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = path.open("xb")
        self._flushed = 0.0
        self._write(file_version="brain.Event:2", step=first_step)
        start = event_pb2.SessionLog.START  # pyright: ignore[reportAttributeAccessIssue]
        session = event_pb2.SessionLog(status=start)  # pyright: ignore[reportAttributeAccessIssue]
        self._write(session_log=session, step=first_step)

    def add(self, name: str, value: float, step: int) -> None:
        """Adds a number.

        Raises:
          OSError: the file cannot be written.
        """
        self._write(summary=scalar(name, value), step=step)
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes the rest and closes the file, also where that fails; closing again does nothing.

        Raises:
          OSError: the file cannot be written.
        """
        self._file.close()

    def _write(self, **fields: object) -> None:
        event = event_pb2.Event(wall_time=time.time(), **fields)  # pyright: ignore[reportAttributeAccessIssue]
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        self._file.write(b"".join((length, next(checksums), content, next(checksums))))
