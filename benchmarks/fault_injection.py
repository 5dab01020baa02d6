"""Faults as they come: processes that are killed, bytes that change on disk, disks that are full, clocks that jump."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np

from ssl_jax.errors import UserError

Damage = Literal["flip", "truncate", "delete", "empty"]
DAMAGES: tuple[Damage, ...] = ("flip", "truncate", "delete", "empty")

# What a run says, and nobody else: the lines that tell how far it is.
_MARKS = ("read ", "tokenizer of ", "prepared data:", "plan", "train:", "step ", "evaluate", "pseudo-label")

# Patches the clock of a child: seconds since its start (of the monotonic clock) and by how much the clock jumps then.
_CLOCK_PROGRAM = """
import os, time
_jumps = [tuple(map(float, jump.split(":"))) for jump in os.environ["FAULT_CLOCK_JUMPS"].split(",")]
_time, _time_ns, _started = time.time, time.time_ns, time.monotonic()
def _offset():
    return sum(by for at, by in _jumps if time.monotonic() - _started >= at)
time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + int(_offset() * 1e9)
"""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line that a process wrote: when (seconds since its start), where, and what."""

    at: float
    stream: Literal["stdout", "stderr"]
    text: str

    @property
    def is_mark(self) -> bool:
        """Whether the line tells how far a run is."""
        return self.text.startswith(_MARKS)


class Process:
    """A command in a process of its own, whose lines are read as they come; a context manager that leaves none behind.

    Attributes:
      lines: what it has written so far.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Starts it.

        Args:
          command: program and arguments.
          variables: its environment.
        """
        self.lines: list[Line] = []
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            env={**variables, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self._process.stdout, "stdout"), (self._process.stderr, "stderr"))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self.end(60)

    def _read(self, stream: IO[str], name: Literal["stdout", "stderr"]) -> None:
        with stream:
            for text in stream:
                self.lines.append(Line(time.monotonic() - self._started, name, text.rstrip("\n")))

    def marks(self) -> list[Line]:
        """The lines that tell how far the run is."""
        return [line for line in list(self.lines) if line.is_mark]

    def wait_for_marks(self, count: int, seconds: float) -> bool:
        """Returns when so many marks are there, and whether they are; not if the process ended or time is up."""
        while len(self.marks()) < count:
            if self._process.poll() is not None or time.monotonic() - self._started > seconds:
                return False
            time.sleep(0.002)
        return True

    def wait_for(self, text: str, seconds: float) -> bool:
        """Returns when a line begins with a text, and whether one does."""
        while not any(line.text.startswith(text) for line in list(self.lines)):
            if self._process.poll() is not None or time.monotonic() - self._started > seconds:
                return False
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals) -> bool:
        """Sends a signal; returns whether the process was there to receive it."""
        if self._process.poll() is not None:
            return False
        self._process.send_signal(number)
        return True

    def end(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it did not end in time and had to be killed."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(60)
            code = None
        for thread in self._threads:
            thread.join(10)
        return code

    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._started

    def errors(self) -> list[str]:
        """What is on stderr."""
        return [line.text for line in list(self.lines) if line.stream == "stderr"]


def damage(path: Path, how: Damage, random: np.random.Generator) -> str:
    """Damages a file as a disk or a person might; returns what was done to it."""
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
        return "deleted"
    if how == "empty":
        path.write_bytes(b"")
        return f"emptied, had {len(content)} bytes"
    if how == "truncate":
        kept = int(random.integers(len(content)))
        path.write_bytes(content[:kept])
        return f"cut to {kept} of {len(content)} bytes"
    bit = int(random.integers(8 * len(content)))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    return f"bit {bit} of {8 * len(content)} flipped"


def choose_file(folder: Path, random: np.random.Generator) -> Path:
    """One of the files with content below a folder, each as likely as the others."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return paths[int(random.integers(len(paths)))]


@contextlib.contextmanager
def damaged(path: Path, how: Damage, random: np.random.Generator) -> Iterator[str]:
    """Damages a file as long as the context is open; gives what was done to it."""
    content, stat = path.read_bytes(), path.stat()
    try:
        yield damage(path, how, random)
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    return os.geteuid() == 0 and shutil.which("mount") is not None and _try_mount()


def _try_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), 2**16):
                return True
        except (OSError, subprocess.SubprocessError):
            return False


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes, in memory, mounted at a folder as long as the context is open.

    Raises:
      subprocess.SubprocessError: it may not be mounted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _quiet("mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _quiet("umount", "--lazy", str(folder))


def fill_disk(folder: Path, *, leave: int = 0) -> Path:
    """Writes a file until no more than `leave` bytes fit on the disk at a folder; returns the file."""
    filler = folder / "filler"
    with open(filler, "ab", buffering=0) as stream:
        size = 2**20
        while size and (free := shutil.disk_usage(folder).free) > leave:
            try:
                stream.write(b"\0" * min(size, free - leave))
            except OSError:
                size //= 2
    return filler


def can_drop_privileges() -> bool:
    """Whether `without_privileges` can make a command obey the permissions of files."""
    return os.geteuid() != 0 or shutil.which("setpriv") is not None


def without_privileges(command: Sequence[str]) -> list[str]:
    """A command that obeys the permissions of files even as root, who owns them.

    Raises:
      UserError: util-linux's setpriv is missing.
    """
    if not can_drop_privileges():
        raise UserError("setpriv is missing; install util-linux, or run as another user than root")
    if os.geteuid() != 0:
        return list(command)
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]


def set_writable(folder: Path, writable: bool) -> None:
    """Gives its owner the right to write in a folder and below it, or takes it."""
    for path in (folder, *folder.rglob("*")):
        # A file may go while the folder is walked.
        with contextlib.suppress(FileNotFoundError):
            path.chmod((0o755 if writable else 0o555) if path.is_dir() else (0o644 if writable else 0o444))


def _quiet(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def jumping_clock(folder: Path, jumps: Sequence[tuple[float, float]]) -> dict[str, str]:
    """Variables of a child whose clock jumps.

    Args:
      folder: for a module that patches it; before all others on the child's `PYTHONPATH`.
      jumps: when (seconds after the start) and by how much (seconds, negative for backwards).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_CLOCK_PROGRAM, encoding="utf-8")
    return {"FAULT_CLOCK_JUMPS": ",".join(f"{at}:{by}" for at, by in jumps)}
