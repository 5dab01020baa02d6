"""A run's step, and saves of its state: `python benchmarks/checkpoint_overhead_child.py WORKLOAD_JSON ARGUMENTS_JSON`.

Prints one line of JSON: sizes, the limits of the machine, seconds of every part of every save and restore, and the
turns with each kind of save.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from train_ours import Training
from workload import Workload

from ssl_jax import files, manifest, run_state
from ssl_jax.checkpoint import Checkpoints

_LIMIT_BYTES = 2**28
_LIMIT_REPEATS = 5
_WARM_UP_STEPS, _TIMED_STEPS, _RESTORES = 2, 5, 2


class OrbaxAlone(Checkpoints):
    """Writes as ours, but neither digests nor manifest, and keeps the newest step whatever it holds."""

    def _finish(self, step: int, body: dict[str, Any]) -> None:
        self._checkpointer.wait_until_finished()
        for older in self._step_folders():
            if older != step:
                files.remove_folder(self._path(older))


@dataclasses.dataclass
class Clock:
    """Seconds, and processor seconds of the thread, that the manifest and what follows it took."""

    wall: float = 0.0
    cpu: float = 0.0


def main() -> None:
    """Measures everything."""
    workload, arguments = Workload.model_validate_json(sys.argv[1]), json.loads(sys.argv[2])
    training, folder = Training(workload), Path(arguments["folder"])
    for _ in range(_WARM_UP_STEPS):
        training.take(1)
    step_seconds = statistics.median(training.take(1)["seconds"] for _ in range(_TIMED_STEPS))
    items = run_state.items(training.state)
    result: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(items)),
        "step_seconds": step_seconds,
        "limits": limits(folder),
        "saves": list(time_saves(training, folder / "parts", arguments["saves"])),
    }
    result["restores"] = list(time_restores(training, folder / "parts"))
    newest = max((folder / "parts").iterdir(), key=lambda path: int(path.name))
    result["file_bytes"] = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    files.remove_folder(folder / "parts")
    result["turns"] = list(take_turns(training, folder, arguments))
    print(json.dumps(result))


def limits(folder: Path) -> dict[str, float]:
    """Bytes a second: copies in memory that is there, SHA-256 by one core, a file written and synchronized."""
    source = np.ones(_LIMIT_BYTES, np.uint8)
    content = source.tobytes()
    target = np.zeros_like(source)

    def best(work: Any) -> float:
        seconds = []
        for _ in range(_LIMIT_REPEATS):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return _LIMIT_BYTES / min(seconds)

    def write() -> None:
        with (folder / "limit").open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    rates = {
        "copy_bytes_per_second": best(lambda: np.copyto(target, source)),
        "sha256_bytes_per_second": best(lambda: hashlib.sha256(content).digest()),
        "write_bytes_per_second": best(write),
    }
    (folder / "limit").unlink()
    return rates


def time_saves(training: Training, folder: Path, count: int) -> Iterator[dict[str, float]]:
    """Seconds of the parts of saves, each with a step of training behind it."""
    checkpoints = Checkpoints(folder, save_total_limit=1)
    checkpoints.reserve(run_state.items(training.state))
    for _ in range(count):
        with manifest_clock() as clock:
            started, cpu = time.perf_counter(), time.process_time()
            save(checkpoints, training)
            called, cpu = time.perf_counter(), time.process_time() - cpu
            next_step = training.take(1)["seconds"]
            checkpoints.wait()
            ended = time.perf_counter()
        yield {
            "call": called - started,
            "call_cpu": cpu,
            "next_step": next_step,
            "background": ended - called,
            "manifest": clock.wall,
            "manifest_cpu": clock.cpu,
        }
    checkpoints.close()


@contextmanager
def manifest_clock() -> Iterator[Clock]:
    """Times what is ours in the background while the context is open: the manifest and the retention."""
    clock = Clock()

    def timed(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments)
            finally:
                clock.wall += time.perf_counter() - wall
                clock.cpu += time.thread_time() - cpu

        return run

    with (
        mock.patch.object(manifest, "write", timed(manifest.write)),
        mock.patch.object(Checkpoints, "_delete_superfluous", timed(Checkpoints._delete_superfluous)),
    ):
        yield clock


def time_restores(training: Training, folder: Path) -> Iterator[dict[str, float]]:
    """Seconds that a process that goes on needs for its newest checkpoint."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        run_state.items(training.state),
    )
    for _ in range(_RESTORES):
        checkpoints = Checkpoints(folder)
        started = time.perf_counter()
        newest = checkpoints.newest()
        assert newest is not None
        found = time.perf_counter()
        checkpoints.restore(newest, shapes)
        yield {"newest": found - started, "restore": time.perf_counter() - found}


def take_turns(training: Training, folder: Path, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Turns in the order of the modes, round after round: without saves, with Orbax's, with ours."""
    none, orbax, ours = arguments["modes"]
    writers = {
        none: None,
        orbax: OrbaxAlone(folder / "orbax", save_total_limit=1),
        ours: Checkpoints(folder / "ours", save_total_limit=1),
    }
    for writer in (orbax, ours):
        writers[writer].reserve(run_state.items(training.state))
    for number in range(arguments["rounds"]):
        for mode, checkpoints in writers.items():
            started, cpu, steps = time.perf_counter(), time.process_time(), 0
            if checkpoints is not None:
                save(checkpoints, training)
            while time.perf_counter() - started < arguments["turn_seconds"]:
                training.take(1)
                steps += 1
            if checkpoints is not None:
                checkpoints.wait()
            yield {
                "round": number,
                "mode": mode,
                "steps": steps,
                "seconds": time.perf_counter() - started,
                "cpu": time.process_time() - cpu,
            }
    for checkpoints in writers.values():
        if checkpoints is not None:
            checkpoints.close()


def save(checkpoints: Checkpoints, training: Training) -> None:
    """As a run does."""
    checkpoints.save(int(training.state.step), run_state.items(training.state), {})


if __name__ == "__main__":
    main()
