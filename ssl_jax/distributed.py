"""Several processes as one run: how they find each other, and what only one of them does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ssl_jax import ending
from ssl_jax.errors import Preempted, UserError

T = TypeVar("T")

# A process that hears nothing of the others for so long ends.
_HEARTBEAT_SECONDS = 30
# Machines of one job may start minutes apart; who is alone for longer than the first time hears why nothing happens.
_HINT_SECONDS, _JOIN_SECONDS = 10.0, 300.0
# How often a process that waits looks for a signal that it was sent.
_LOOK_MILLISECONDS = 1000
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_watch: ending.Watch | None = None
_is_joining = False


@contextlib.contextmanager
def before_joining() -> Iterator[None]:
    """Joins the other processes, see `join`, if the block fails, so that they hear of it instead of waiting.

    Raises:
      UserError: what the block raises.
    """
    try:
        yield
    except UserError:
        join()
        raise


def join() -> None:
    """Joins the other processes of the run, if the environment says that there are some. Before JAX is used.

    An explicit cluster is `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`. SLURM and Open MPI with several tasks, TPU pods and GKE are recognized by JAX itself.

    From here on all processes end together, see `ending`.

    Raises:
      UserError: the environment contradicts itself.
      Preempted: the others do not come.
    """
    global _watch, _is_joining
    explicit = _explicit(os.environ)
    if not explicit and not _is_in_cluster(os.environ):
        return
    import jax

    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    _is_joining = True
    _connect(explicit)
    _is_joining = False
    state = _state()
    if state.num_processes > 1:
        _watch = ending.Watch(state.client, state.process_id, state.num_processes)


def end(code: int, text: str) -> None:
    """Ends all processes of the run with an exit code; one of them prints the text. Returns where there is only one."""
    if _watch is not None:
        ignore_signals()
        _watch.end(code, text)
    if _is_joining:
        # A thread of JAX still waits for the others, and would abort the process when it is told to go.
        print(text, file=sys.stderr, flush=True)
        os._exit(code)


def end_for_error(error: Exception) -> None:
    """Ends all processes of the run for an error that is nobody's fault or a bug; returns where there is only one.

    If another process turns out to be gone, that is the message and the exit code is 75. An error that does not speak
    of another process shows its traceback.
    """
    if _watch is None:
        return
    ignore_signals()
    is_loss = ending.is_loss(error)
    if not is_loss:
        traceback.print_exception(error)
    import jax

    if is_loss or isinstance(error, jax.errors.JaxRuntimeError):
        _watch.end_for_error(error, Preempted.exit_code if is_loss else 1)
    text = f"error: {type(error).__name__}: {error}; the traceback is in the output of that process"
    _watch.end(1, "" if is_primary() else text)


def is_primary() -> bool:
    """Whether this process is the one that prints, and writes what is written once."""
    return _state() is None or _state().process_id == 0


def process_count() -> int:
    """How many processes this run has; does not start a backend."""
    return 1 if _state() is None else _state().num_processes


def exchange(what: str, text: str) -> list[str]:
    """What every process says, in the order of their numbers; waits for all of them, and starts no backend.

    Args:
      what: unique in a run.
      text: of this process.
    """
    if _state() is None:
        return [text]
    client, number = _state().client, _state().process_id
    client.key_value_set(f"ssl_jax/{what}/{number}", text)
    return [_wait_for(f"ssl_jax/{what}/{other}") for other in range(process_count())]


def primary_first(what: str, work: Callable[[], T]) -> T:
    """Does the work on the primary, then, when it is done, on the others, which find what it has left on disk.

    If it fails on the primary, the others end with it.

    Args:
      what: unique in a run.
      work: the same on every process.

    Raises:
      UserError: what `work` raised.
    """
    if _state() is None:
        return work()
    key = f"ssl_jax/{what}"
    if not is_primary():
        _wait_for(key)
        return work()
    result = work()
    _state().client.key_value_set(key, "done")
    return result


def ignore_signals() -> None:
    """Another signal would only keep a process that ends, which takes seconds, from telling the others."""
    if threading.current_thread() is threading.main_thread():  # Python's rule; other threads are not interrupted
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _wait_for(key: str) -> str:
    """The value of a key when another process has set it; signals are heard meanwhile."""
    import jax

    while True:
        try:
            return _state().client.blocking_key_value_get(key, _LOOK_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _connect(explicit: Mapping[str, Any]) -> None:
    """Connects to the coordination service, on a thread, because signals are not heard by one that waits for it.

    Raises:
      UserError: JAX does not find its way.
      Preempted: the others do not come.
    """
    import jax

    problems: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **explicit,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                # When this is over, JAX aborts the process.
                initialization_timeout=int(2 * _JOIN_SECONDS),
            )
        except Exception as error:
            problems.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    where = explicit.get("coordinator_address", "the address that the environment gives")
    deadline = time.monotonic() + _JOIN_SECONDS
    thread.join(_HINT_SECONDS)
    if thread.is_alive():
        print(f"waiting up to {_JOIN_SECONDS:.0f} s for all processes of this run to come to {where}", file=sys.stderr)
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(_LOOK_MILLISECONDS / 1000)
    if thread.is_alive():
        raise Preempted(
            f"not all processes of this run have come to {where} in {_JOIN_SECONDS:.0f} s; "
            "run the same command on all of them; if they run, check the address and the number of processes"
        )
    if problems:
        raise UserError(f"the processes of this run do not find each other: {str(problems[0]).splitlines()[0]}")


def _state() -> Any:
    """JAX's connection to the other processes, or None where there is none; it does not start a backend."""
    if "jax" not in sys.modules:
        return None
    # JAX has no public way to its key-value store; Orbax goes this way too.
    from jax._src import distributed

    return distributed.global_state if distributed.global_state.client is not None else None


def _explicit(variables: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` that the environment gives.

    Raises:
      UserError: some of the three variables are missing, or they are no numbers.
    """
    address, count, number = (variables.get(name) for name in _EXPLICIT)
    if count is None and number is None:
        return {}  # an address alone is a hint to a cluster's own detection
    missing = [name for name in _EXPLICIT if variables.get(name) is None]
    if missing:
        raise UserError(f"{missing[0]} is not set, but others of {', '.join(_EXPLICIT)} are; set all three or none")
    try:
        found = {"num_processes": int(count or ""), "process_id": int(number or "")}
    except ValueError:
        raise UserError(f"JAX_NUM_PROCESSES {count!r} and JAX_PROCESS_ID {number!r} must be whole numbers") from None
    if not 0 <= found["process_id"] < found["num_processes"]:
        raise UserError(f"JAX_PROCESS_ID {number} is not one of the {count} processes, which are numbered from 0")
    return {"coordinator_address": address, **found}


def _is_in_cluster(variables: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a job, or a TPU host."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(variables.get(name) or 1) > 1 for name in tasks):
        return True
    if "," in variables.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    is_cpu = variables.get("JAX_PLATFORMS") == "cpu"
    return not is_cpu and any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
