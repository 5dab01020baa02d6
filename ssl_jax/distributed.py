"""Several processes as one run: how they find each other, and what only one of them does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ssl_jax.errors import Elsewhere, Preempted, UserError

T = TypeVar("T")

# A process that hears nothing of the others for so long ends.
_HEARTBEAT_SECONDS = 30
# Preparing data can take days; whoever waits for it hears from the heartbeat if nobody works on it any more.
_WAIT_MILLISECONDS = 30 * 24 * 3600 * 1000
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Joins the other processes of the run, if the environment says that there are some. Before JAX is used.

    An explicit cluster is `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`. SLURM and Open MPI with several tasks, TPU pods and GKE are recognized by JAX itself.

    Raises:
      UserError: the environment contradicts itself, or the others are not reached.
    """
    explicit = _explicit(os.environ)
    if not explicit and not _is_in_cluster(os.environ):
        return
    import jax

    try:
        jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run do not find each other: {str(error).splitlines()[0]}") from None


def is_primary() -> bool:
    """Whether this process is the one that prints, and writes what is written once."""
    return _state() is None or _state().process_id == 0


def primary_first(what: str, work: Callable[[], T]) -> T:
    """Does the work on the primary, then, when it is done, on the others, which find what it has left on disk.

    Args:
      what: unique in a run.
      work: the same on every process.

    Raises:
      UserError: on the primary, what `work` raised.
      Elsewhere: on the others, that it did.
    """
    if _state() is None:
        return work()
    client, key = _state().client, f"ssl_jax/{what}"
    if not is_primary():
        if code := int(client.blocking_key_value_get(key, _WAIT_MILLISECONDS)):
            raise Elsewhere(code)
        return work()
    code = 1
    try:
        result = work()
        code = 0
    except (UserError, Preempted) as error:
        code = error.exit_code
        raise
    finally:
        client.key_value_set(key, str(code))
    return result


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
