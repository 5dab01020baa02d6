"""Many commands, a few at a time: in order, within a time, whatever becomes of any of them.

A task is done when its file says so, so that the same call goes on where an earlier one was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

from ssl_jax.errors import Preempted

State = Literal["done", "failed", "left"]

STDOUT, STDERR = "stdout.txt", "stderr.txt"

_LOCK = "schedule.lock"
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclasses.dataclass(frozen=True)
class Task:
    """A command.

    Attributes:
      name: unique.
      command: program and arguments.
      folder: of its output and its lock; made if missing.
      is_done: whether there is nothing left to do.
      needs: names of tasks that must be done before.
      kind: tasks of one kind take about as long as each other.
    """

    name: str
    command: Sequence[str]
    folder: Path
    is_done: Callable[[], bool]
    needs: Collection[str] = ()
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
      state: done, failed, or left: not begun, or stopped and to be gone on with.
      why: for people; of a failed one, the last line that it wrote to standard error.
      exit_code: None where it did not run, 0 where it was done before.
    """

    state: State
    why: str = ""
    exit_code: int | None = None


@dataclasses.dataclass
class _Child:
    task: Task
    process: subprocess.Popen[bytes]
    slot: int
    started: float
    errors_from: int


def run_all(
    tasks: Sequence[Task],
    *,
    jobs: int,
    seconds: float,
    outcomes: dict[str, Outcome],
    durations: Sequence[tuple[str, float]] = (),
    environment: dict[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Runs all tasks that are not done, the first ones first.

    Every task runs on its own share of the processor cores: several processes of one thread each do more than one
    process of several threads, and do not disturb one another.

    Args:
      tasks: in order of priority; what one needs stands before it.
      jobs: processes at a time.
      seconds: no task is begun that would probably not end within this time; what runs is waited for.
      outcomes: filled with what becomes of every task, by name, as it does.
      durations: kind and seconds of tasks that were done before, from which that is judged.
      environment: of the children; absent: this process's.
      say: called with a line for every task that begins or ends.

    Raises:
      KeyboardInterrupt: passed on after every child was asked to stop, and has.
    """
    _Scheduler(jobs, seconds, outcomes, list(durations), environment, say).run(tasks)


class _Scheduler:
    def __init__(
        self,
        jobs: int,
        seconds: float,
        outcomes: dict[str, Outcome],
        durations: list[tuple[str, float]],
        environment: dict[str, str] | None,
        say: Callable[[str], None],
    ) -> None:
        self._deadline = time.monotonic() + seconds
        self._outcomes = outcomes
        self._durations = durations
        self._environment = environment
        self._say = say
        self._free = list(range(jobs))
        self._shares = _shares_of_cores(jobs)
        self._children: list[_Child] = []

    def run(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if task.is_done():
                self._outcomes[task.name] = Outcome("done", exit_code=0)
        try:
            while True:
                self._begin_what_can(tasks)
                if not self._children:
                    break
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                self._look()
        finally:
            self._stop()
        for task in tasks:
            self._outcomes.setdefault(task.name, Outcome("left", "out of time"))

    def _begin_what_can(self, tasks: Sequence[Task]) -> None:
        running = {child.task.name for child in self._children}
        for task in tasks:
            if not self._free:
                return
            if task.name in self._outcomes or task.name in running:
                continue
            states = {name: self._outcomes[name].state if name in self._outcomes else None for name in task.needs}
            if missing := [name for name, state in states.items() if state in ("failed", "left")]:
                self._outcomes[task.name] = Outcome("left", f"needs {missing[0]}")
            elif all(state == "done" for state in states.values()) and self._would_end(task):
                self._begin(task)

    def _would_end(self, task: Task) -> bool:
        same_kind = [seconds for kind, seconds in self._durations if kind == task.kind]
        expected = statistics.median(same_kind) if same_kind else 0.0
        return time.monotonic() + expected < self._deadline

    def _begin(self, task: Task) -> None:
        task.folder.mkdir(parents=True, exist_ok=True)
        with (
            (task.folder / _LOCK).open("wb") as lock,
            (task.folder / STDOUT).open("ab") as output,
            (task.folder / STDERR).open("ab") as errors,
        ):
            if not _locked(lock):
                self._outcomes[task.name] = Outcome("left", "another process is at it")
                self._say(f"{task.name}: another process is at it")
                return
            slot = self._free.pop(0)
            process = subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=self._environment,
                pass_fds=[lock.fileno()],  # held until the last process that has it ends, even if this one is killed
                start_new_session=True,  # Ctrl-C is for this process, which tells the others
            )
            self._children.append(_Child(task, process, slot, time.monotonic(), errors.tell()))
        if hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, self._shares[slot])
        self._say(f"{task.name}: started")

    def _look(self) -> None:
        for child in list(self._children):
            if child.process.poll() is not None:
                self._end(child)

    def _end(self, child: _Child) -> None:
        self._children.remove(child)
        self._free.append(child.slot)
        task, code, seconds = child.task, child.process.returncode, time.monotonic() - child.started
        if code == 0 and task.is_done():
            self._durations.append((task.kind, seconds))
            outcome = Outcome("done", exit_code=0)
        elif code == Preempted.exit_code:
            outcome = Outcome("left", "stopped", code)
        else:
            why = _last_line(task.folder / STDERR, child.errors_from) or "ended without its result"
            outcome = Outcome("failed", why, code)
        self._outcomes[task.name] = outcome
        reason = f" with exit code {code}: {outcome.why}" if outcome.state == "failed" else ""
        self._say(f"{task.name}: {outcome.state}{reason} after {seconds:.0f} s")

    def _stop(self) -> None:
        """Asks what still runs to stop, which makes training save a checkpoint, and waits for it."""
        for child in self._children:
            child.process.terminate()
        for child in list(self._children):
            child.process.wait()
            self._end(child)


def _shares_of_cores(jobs: int) -> list[set[int]]:
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[slot::jobs]) or {cores[slot % len(cores)]} for slot in range(jobs)]


def _locked(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _last_line(file: Path, start: int) -> str:
    """The last line of a file with something in it, from a position on."""
    return next(_lines_from_the_end(file, start), "")


def _lines_from_the_end(file: Path, start: int) -> Iterator[str]:
    text = file.read_bytes()[start:].decode(errors="replace")
    return (line.strip() for line in reversed(text.splitlines()) if line.strip())
