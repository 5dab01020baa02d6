"""Independent tasks on several processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")


class Killed(Exception):
    """A process was ended from outside: by the system when memory was short, most likely."""


# Starting processes takes a second or two: less work is done sooner without.
_WORTH_STARTING_BYTES = 2**24


def run(
    function: Callable[[Task], None], tasks: Sequence[Task], sizes: Sequence[int], num_proc: int | None
) -> Iterator[int]:
    """Calls `function` with every task.

    Args:
      function: what can be pickled.
      tasks: of any order.
      sizes: bytes that each task has to do with.
      num_proc: how many processes; absent: as many as there are cores, one where there is little to do.

    Yields:
      The size of every task that is done.

    Raises:
      Killed: a process was.
      Exception: what `function` raises.
    """
    wanted = num_proc or len(os.sched_getaffinity(0))
    if min(wanted, len(tasks)) == 1 or (num_proc is None and sum(sizes) < _WORTH_STARTING_BYTES):
        for task, size in zip(tasks, sizes, strict=True):
            function(task)
            yield size
        return
    executor = concurrent.futures.ProcessPoolExecutor(
        min(wanted, len(tasks)), multiprocessing.get_context("spawn"), initializer=_start
    )
    try:
        size_of = {executor.submit(function, task): size for task, size in zip(tasks, sizes, strict=True)}
        for future in concurrent.futures.as_completed(size_of):
            future.result()
            yield size_of[future]
    except BrokenProcessPool:
        raise Killed from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start() -> None:
    """Prepares a process: one thread of work, no say in signals to the terminal, and no life after its parent's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
