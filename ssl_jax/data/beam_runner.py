"""Independent tasks on the workers of an Apache Beam runner: what `processes` is, for more than one machine.

Beam hands out the numbers of the tasks, and tries again where a worker was lost; files carry everything else. So the
workers must see the same folders at the same paths, and a task may run more than once, even twice at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ssl_jax import files
from ssl_jax.errors import UserError

Task = TypeVar("Task")

# Some runners give a process several tasks at once. A task may fill memory by itself, and shares the interpreter.
_one_at_a_time = threading.Lock()

_TASKS = "tasks.pickle"
_RAISED = ".raised"


def check(options: Sequence[str]) -> None:
    """Looks whether `run` can be called with these options.

    Raises:
      UserError: Beam is not installed, or does not accept the options.
    """
    _make_pipeline(options)


def run(function: Callable[[Task], None], tasks: Sequence[Task], folder: Path, options: Sequence[str]) -> None:
    """Calls `function` with every task, and returns when all are done.

    Args:
      function: what can be pickled. It may be given the same task again.
      tasks: of any order.
      folder: one that all workers share, for the time of the call.
      options: of the pipeline, as Beam's commands take them. Without `--runner`, Beam's runner for one machine.

    Raises:
      UserError: Beam is not installed, does not accept the options, or `function` raised it; of several, the first
        task's.
      OSError: `function` raised it.
      Exception: the pipeline failed, in the runner's own words.
    """
    beam, pipeline = _make_pipeline(options)
    with tempfile.TemporaryDirectory(prefix="beam-", dir=folder) as name:
        shared = Path(name)
        # Not in the pipeline: runners limit its size, and tasks share much that a file holds once.
        content = pickle.dumps(list(tasks))
        (shared / _TASKS).write_bytes(content)
        with pipeline:
            attempt = functools.partial(_attempt, function, shared, hashlib.sha256(content).hexdigest())
            _ = pipeline | "Numbers" >> beam.Create(range(len(tasks)), reshuffle=True) | "Run" >> beam.Map(attempt)
        raised = sorted(shared.glob(f"*{_RAISED}"), key=lambda file: int(file.stem))
        exceptions = [_exception(files.read_json(file)) for file in raised]
        if exceptions:  # another attempt may get past a disk that is full, not past the user's mistake
            raise min(exceptions, key=lambda exception: isinstance(exception, OSError))


def _attempt(function: Callable[[Any], None], shared: Path, digest: str, number: int) -> None:
    """Runs a task on a worker, and writes down what the launcher shall raise: runners only hand on text."""
    if not shared.is_dir():
        raise UserError(f"{shared}: not on this worker; all of them need data.prepared_dir at the same path")
    with _one_at_a_time:
        try:
            function(_tasks(shared, digest)[number])
        except (UserError, OSError) as error:
            is_system = isinstance(error, OSError)
            told = (
                [error.errno, error.strerror or str(error), error.filename and str(error.filename)]
                if is_system
                else [str(error)]
            )
            files.write_json(shared / f"{number}{_RAISED}", told)


def _exception(told: Sequence[Any]) -> UserError | OSError:
    return UserError(*told) if len(told) == 1 else OSError(*told)


@functools.lru_cache(maxsize=1)
def _tasks(shared: Path, digest: str) -> Sequence[Any]:
    """What the launcher wrote. A pickle runs code: its digest must be the one that Beam brought with the function."""
    content = (shared / _TASKS).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{shared / _TASKS}: not what the launcher wrote; see who else may write there")
    return pickle.loads(content)


def _make_pipeline(options: Sequence[str]) -> tuple[Any, Any]:
    """The module `apache_beam`, and a pipeline without steps."""
    try:
        with _without_warnings():
            import apache_beam as beam  # pyright: ignore[reportMissingImports]
            from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
                PipelineOptions,
                StandardOptions,
            )
            from apache_beam.runners.portability.fn_api_runner import (  # pyright: ignore[reportMissingImports]
                FnApiRunner,
            )
    except ImportError:
        raise UserError("data.beam_options needs Apache Beam: pip install 'ssl_jax[beam]'") from None
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = PipelineOptions(list(options))  # without arguments it would take this program's
            # What Beam chooses for one machine begins with a download.
            runner = parsed.view_as(StandardOptions).runner or FnApiRunner()
            parsed.get_all_options(retain_unknown_options=True)  # values are looked at when they are needed, or here
            return beam, beam.Pipeline(runner, parsed)
    except SystemExit:  # of argparse, which has written the reason
        reason = complaint.getvalue().strip().rpartition("error: ")[2]
    except (ValueError, ImportError, AttributeError) as error:
        reason = str(error)
    raise UserError(f"data.beam_options {' '.join(options)}: {' '.join(reason.split())}")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps the log free of what importing Beam warns of: packages that it could use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
