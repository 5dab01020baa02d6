"""What a person and a script see of a run: progress on stderr, `metrics.jsonl`, `samples.jsonl`, TensorBoard events.

Scripts read the JSON Lines files: every line is valid JSON, complete and about one step, also after a kill and a
resume. People read stderr: a progress bar on a terminal, one line per logged step elsewhere.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ssl_jax import files
from ssl_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console


_log = logging.getLogger(__name__)


class Logbook:
    """Writes the records of one run; a context manager, so that the terminal is itself again after an error."""

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int,
        resume_time: float = 0.0,
        total_steps: int,
        primary: bool = True,
        console: Console | None = None,
    ) -> None:
        """Opens the files of `workdir` and drops what an earlier process wrote past the step that is resumed.

        Args:
          workdir: created if absent.
          resume_step: last step that is done; 0 for a new run, which drops every line.
          resume_time: seconds that the run took so far, where no kept line says more.
          total_steps: steps of the whole run.
          primary: other processes write and show nothing.
          console: where people look; absent: stderr.

        Raises:
          UserError: `workdir` cannot be written.
        """
        self._primary = primary
        self._started = time.monotonic() - resume_time
        if not primary:
            return
        workdir = Path(workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            kept = _drop_after(workdir / "metrics.jsonl", resume_step)
            for name in ("samples.jsonl", "skipped.jsonl"):
                _drop_after(workdir / name, resume_step)
            self._metrics = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
            # A lone surrogate becomes its JSON escape instead of an encoding error.
            self._samples = (workdir / "samples.jsonl").open("a", encoding="utf-8", errors="backslashreplace")

            from ssl_jax.events import EventFile

            self._events = EventFile(workdir / "tensorboard", resume_step + 1 if resume_step else 0)
        except OSError as error:
            raise UserError(f"{workdir}: cannot be written: {error.strerror}; name another --workdir") from None
        recorded = [line["time"] for line in kept if isinstance(line.get("time"), int | float)]
        self._started = time.monotonic() - max([resume_time, *recorded])

        self._workdir = workdir
        self._total_steps = total_steps
        self._time_left = _TimeLeft(total_steps)
        self._view = _view(console, resume_step, total_steps)

    def phase(self, name: str, detail: str = "") -> None:
        """Shows what the run is busy with: prepare, compile, train, evaluate, pseudo-label."""
        if self._primary:
            self._view.phase(name, detail)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of `metrics.jsonl` and TensorBoard scalars, and shows them.

        JSON has no NaN and no infinity: such a value is null, and `<name>_nonfinite` says which of them it was
        ("nan", "inf", "-inf").

        Raises:
          UserError: the file cannot be written (no space left).
        """
        if not self._primary:
            return
        now = self.elapsed()
        record: dict[str, Any] = {"step": step, "time": round(now, 3)}
        for name, value in values.items():
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            finite = math.isfinite(number)
            record[name] = number if finite else None
            if not finite:
                record[f"{name}_nonfinite"] = str(number)
        self._append(self._metrics, record)
        try:
            for name in values:
                if record[name] is not None:
                    self._events.add(name, record[name], step)
        except OSError as error:
            raise _refused(error, self._workdir) from error
        words = describe(values)
        if "loss" not in values:
            self._view.say("  ".join([f"step {step}/{self._total_steps}", *words]))
            return
        if (left := self._time_left(step, now)) is not None:
            words.append(f"{format_duration(left)} left")
        self._view.progress(step, "  ".join(words))

    def samples(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Writes `{"step", "prompt", "reply"}` lines to `samples.jsonl`.

        Raises:
          UserError: the file cannot be written (no space left).
        """
        if self._primary:
            for row in rows:
                self._append(self._samples, {"step": step, **row})

    def skipped(self, step: int, reason: str, dialogues: Mapping[str, Sequence[str]]) -> None:
        """Writes a line of `skipped.jsonl`: a step without an update, why, and by stream the ids of its dialogues.

        Raises:
          UserError: the file cannot be written (no space left).
        """
        if not self._primary:
            return
        record = {"step": step, "reason": reason, "dialogues": dict(dialogues)}
        path = self._workdir / "skipped.jsonl"
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                self._append(file, record)
        except OSError as error:
            raise _refused(error, path) from error

    def say(self, text: str) -> None:
        """Shows a line as it is, above the progress bar where there is one."""
        if self._primary:
            self._view.say(text)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Shows names and values in two columns under a title."""
        from rich.cells import cell_len

        width = max((cell_len(name) for name, _ in rows), default=0)
        self.say("\n".join([title, *(f"  {name}{' ' * (width - cell_len(name))}  {value}" for name, value in rows)]))

    def elapsed(self) -> float:
        """Seconds that the run took, in this process and in those before it."""
        return time.monotonic() - self._started

    def close(self) -> None:
        """Flushes and closes everything; closing again does nothing.

        Raises:
          UserError: what was still to be written cannot be.
        """
        if not self._primary:
            return
        self._view.close()
        refused = None
        for file in (self._events, self._metrics, self._samples):
            try:
                file.close()
            except OSError as error:
                refused = error
        if refused is not None:
            raise _refused(refused, self._workdir) from refused

    def __enter__(self) -> Logbook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError:
            # A disk that was full already is no news.
            if error is None:
                raise

    @staticmethod
    def _append(file: Any, record: Mapping[str, Any]) -> None:
        try:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            raise _refused(error, file.name) from error


def _refused(error: OSError, name: str | Path) -> UserError:
    return UserError(
        f"{name}: cannot be written: {error.strerror}\n"
        "earlier checkpoints stand; make room or set permissions, then run the same command again"
    )


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrites a JSON Lines file without torn lines and without lines of later steps; returns the others.

    The file is replaced as a whole, so that a kill leaves the old one or the new one.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    parsed = [_parse(raw) for raw in content.splitlines()]
    lines = [line for line in parsed if line is not None]
    if damaged := parsed[:-1].count(None):  # the last one is what a kill cuts off
        _log.warning("%s: %d damaged lines are left out", path, damaged)
    kept = [line for line in lines if line["step"] <= step] if step else []
    rewritten = b"".join(
        json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n" for line in kept
    )
    if rewritten != content:
        with files.replacing(path) as stream:
            stream.write(rewritten)
    return kept


def _parse(raw: bytes) -> dict[str, Any] | None:
    """A line's record, or None where a process was killed in the middle of writing it."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


class _View(Protocol):
    """How a person follows the run."""

    def phase(self, name: str, detail: str) -> None: ...

    def progress(self, step: int, numbers: str) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Lines:
    """One plain line per event, for log files and pipes."""

    def __init__(self, console: Console | None, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps

    def phase(self, name: str, detail: str) -> None:
        self.say(f"{name}: {detail}" if detail else name)

    def progress(self, step: int, numbers: str) -> None:
        self.say(f"step {step}/{self._total_steps}  {numbers}")

    def say(self, text: str) -> None:
        # sys.stderr is looked up at every call, so that whoever replaces it (a notebook, a test) sees the lines.
        print(text, file=self._console.file if self._console else sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A progress bar that stays at the bottom of the terminal while lines scroll above it."""

    def __init__(self, console: Console, resume_step: int, total_steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            refresh_per_second=4,
            # Standard output may be a file that a script reads: only what goes to a terminal is moved above the bar.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("start", total=total_steps, completed=resume_step, numbers="")
        self._progress.start()

    def phase(self, name: str, detail: str) -> None:
        self._progress.update(self._task, description=f"{name} ({detail})" if detail else name, refresh=True)

    def progress(self, step: int, numbers: str) -> None:
        self._progress.update(self._task, completed=step, numbers=numbers, refresh=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _view(console: Console | None, resume_step: int, total_steps: int) -> _View:
    if console is None and not sys.stderr.isatty():
        return _Lines(None, total_steps)
    from rich.console import Console

    console = console or Console(stderr=True)
    return _Bar(console, resume_step, total_steps) if console.is_terminal else _Lines(console, total_steps)


class _TimeLeft:
    """Extrapolates from the steps between the first report of this process, when all is compiled, and the latest."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None

    def __call__(self, step: int, now: float) -> float | None:
        """Seconds from `now` to the end, or None as long as there is nothing to extrapolate from."""
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._total_steps - step)


def describe(values: Mapping[str, float]) -> list[str]:
    """What a person wants to read of the metrics, in a few words each.

    Totals (`tokens`, `tokens/<stream>`, `epoch/<stream>`) and `grad_norm` are for scripts; they are shown where nothing
    else is.
    """
    parts = []
    if "loss" in values:
        terms = [f"{name.removeprefix('loss/')} {values[name]:.2f}" for name in values if name.startswith("loss/")]
        parts.append(f"loss {values['loss']:.3f}" + (f" ({', '.join(terms)})" if terms else ""))
    if "lr" in values:
        parts.append(f"lr {values['lr']:.1e}")
    if "tokens_per_sec" in values:
        parts.append(f"{format_count(values['tokens_per_sec'])} tok/s")
    if "mfu" in values:
        parts.append(f"mfu {values['mfu']:.0%}")
    for group in ("eval", "pseudo", "translated"):
        prefix = f"{group}/"
        members = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        if members:
            parts.append(f"{group}: " + ", ".join(f"{name} {_short(value)}" for name, value in members.items()))
    return parts or [f"{name} {_short(value)}" for name, value in values.items()]


def format_count(number: float) -> str:
    """`950`, `3.1k`, `1.2M`, `6.4G`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """`0.02 s`, `45 s`, `4 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 or not seconds else f"{seconds:.1g} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _short(value: float) -> str:
    return str(value) if isinstance(value, numbers.Integral) else f"{value:.3f}"
