"""One fault, and what came of it: the run goes on by the same command, and ends as if nothing had happened.

`Workload` is a tiny run with everything in it (prepare, compile, train, save, evaluate, a round of pseudo-labels, the
final evaluation) and its undisturbed result. Every trial starts the real command, does something to it or to its files,
starts it again until it is done, and compares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fault_injection as faults
import tiny

from ssl_jax import files, manifest
from ssl_jax.checkpoint import MANIFEST, Checkpoints
from ssl_jax.errors import UserError

# Of a process that should have ended long ago.
HANG_SECONDS = 180.0
MOST_STARTS = 4
SAVE_TOTAL_LIMIT = 3
_TRACEBACK = "Traceback (most recent call last)"

Trial = dict[str, Any]
State = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A run and its undisturbed result.

    Attributes:
      folder: where its data, and the trials, are.
      marks: what the undisturbed run said and when, beginning with its data not prepared and all else compiled.
      seconds: that it took.
    """

    folder: Path
    marks: list[faults.Line]
    seconds: float

    @classmethod
    def make(cls, folder: Path) -> Workload:
        """Writes the data and runs it undisturbed, twice: what the first one compiles the second one finds."""
        tiny.write_all(folder)
        empty = cls(folder, [], 0.0)
        for name in ("compiling", "undisturbed"):
            with empty.start(folder / name) as process:
                if process.end(HANG_SECONDS) != 0:
                    raise RuntimeError("the undisturbed run failed:\n" + "\n".join(process.errors()[-20:]))
                marks, seconds = process.marks(), max(line.at for line in process.lines)
            if name == "compiling":
                shutil.rmtree(folder / name)
        return cls(folder, marks, seconds)

    @functools.cached_property
    def half(self) -> Path:
        """Where a run was stopped in its second half, after its round; whoever damages it mends it."""
        place = self.folder / "half"
        with self.start(place) as process:
            process.wait_for("step 9/", HANG_SECONDS)
            process.send(signal.SIGTERM)
            if process.end(HANG_SECONDS) != 75:
                raise RuntimeError("the run could not be stopped:\n" + "\n".join(process.errors()[-20:]))
        return place

    @functools.cached_property
    def half_states(self) -> dict[int, State]:
        """The content of the checkpoints of `half`."""
        workdir = self.half / "run"
        return {step: state(workdir, step) for step in tiny.checkpoint_steps(workdir)}

    @property
    def undisturbed(self) -> Path:
        """The work directory of the undisturbed run."""
        return self.folder / "undisturbed" / "run"

    def start(
        self, place: Path, variables: Mapping[str, str] | None = None, *, user: int | None = None
    ) -> faults.Process:
        """Starts the run in `place/run`, with its data prepared in `place/prepared`."""
        command = tiny.command(
            "train",
            *("--config", str(self.folder / "config.yaml"), "--workdir", str(place / "run")),
            *("--data.prepared-dir", str(place / "prepared")),
            *("--train.save-total-limit", str(SAVE_TOTAL_LIMIT)),
        )
        return faults.Process(command, {**tiny.environment(), **(variables or {})}, user=user)

    def differences(self, workdir: Path) -> list[str]:
        """What of a finished run is not as in the undisturbed one."""
        found = []
        for name in ("samples.jsonl", "eval_test.json", "pseudo_labels/round_0/summary.json", "data.json"):
            if (
                not (workdir / name).is_file()
                or (workdir / name).read_bytes() != (self.undisturbed / name).read_bytes()
            ):
                found.append(name)
        if tiny.metrics(workdir) != tiny.metrics(self.undisturbed):
            found.append("metrics.jsonl")
        if _counted(workdir) != _counted(self.undisturbed):
            found.append("summary.json")
        steps = tiny.checkpoint_steps(self.undisturbed)
        if steps[-1] not in tiny.checkpoint_steps(workdir):
            return [*found, "checkpoint steps"]
        for step in set(steps).intersection(tiny.checkpoint_steps(workdir)):
            if state(workdir, step) != state(self.undisturbed, step):
                found.append(f"checkpoint {step}")
        return found


def _counted(workdir: Path) -> dict[str, Any]:
    """The summary without what depends on the clock and on how often the run was started."""
    summary = files.read_json(workdir / "summary.json")
    return {name: value for name, value in summary.items() if name not in ("seconds", "train_step_compilations")}


def state(workdir: Path, step: int) -> State:
    """All leaves of all items of a checkpoint, after verifying it: their bytes by path."""
    import jax
    import jax.numpy as jnp

    folder = workdir / "checkpoints"
    described = manifest.read(folder / str(step) / MANIFEST)["items"]
    abstract = {
        item: {path: _abstract(text, jnp, jax) for path, text in leaves.items()} for item, leaves in described.items()
    }
    restored = Checkpoints(folder).restore(step, abstract)
    return {
        f"{item}/{path}": np.asarray(leaf).tobytes()
        for item, leaves in restored.items()
        for path, leaf in leaves.items()
    }


def _abstract(text: str, jnp: Any, jax: Any) -> Any:
    """The shape that `float32[3,4]` describes."""
    name, shape = text.rstrip("]").split("[")
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, shape.split(",")))), jnp.dtype(name))


def random_of(kind: str, number: int, seed: int) -> np.random.Generator:
    """What decides a trial."""
    return np.random.default_rng((seed, zlib.crc32(kind.encode()), number))


# Processes that are stopped -------------------------------------------------------------------------------------------


def stopped(work: Workload, place: Path, random: np.random.Generator, number: signal.Signals) -> Trial:
    """Sends a signal at a random moment of a run that begins with nothing prepared."""
    after, delay = _moment(work, random)
    with work.start(place) as process:
        process.wait_for_marks(after, HANG_SECONDS)
        time.sleep(delay)
        process.send(number)
        at = process.seconds()
        code = process.end(HANG_SECONDS)
        trial = {"at": round(at, 3), "ended_after": round(process.seconds() - at, 3)}
        trial |= {"phase": phase(process, place), "code": code, "said": process.errors()[-1:]}
        has_traceback = _TRACEBACK in "\n".join(process.errors())
    allowed = (-int(number),) if number == signal.SIGKILL else (75,)
    trial["as_promised"] = code in (*allowed, 0) and not has_traceback
    return trial | go_on(work, place)


def _moment(work: Workload, random: np.random.Generator) -> tuple[int, float]:
    """A random moment of the undisturbed run, as a number of marks and seconds since the last of them.

    Half of the moments are uniform in time; the other half are in a phase that is as likely as every other.
    """
    starts = [0.0, *(line.at for line in work.marks)]
    ends = [*starts[1:], work.seconds]
    if random.random() < 0.5:
        at = random.uniform(0, work.seconds)
        last = max(index for index, start in enumerate(starts) if start <= at)
        return last, at - starts[last]
    names = ["start", *(line.text.split(":")[0].split(" ")[0] + str(":" in line.text) for line in work.marks)]
    name = random.choice(sorted(set(names)))
    last = int(random.choice([index for index, other in enumerate(names) if other == name]))
    return last, random.uniform(0, ends[last] - starts[last])


def phase(process: faults.Process, place: Path) -> str:
    """What the run was busy with when it ended."""
    marks = process.marks()
    last = marks[-1].text if marks else ""
    checkpoints = place / "run" / "checkpoints"
    is_saving = checkpoints.is_dir() and any(not (path / MANIFEST).exists() for path in checkpoints.iterdir())
    if process.end(0) == 0:
        return "done"
    if is_saving:
        return "save"
    if not marks:
        return "prepare" if any((place / "prepared").glob(".*.incomplete")) else "start"
    if last.startswith(("read ", "tokenizer of ")):
        return "prepare"
    if last.startswith(("prepared data:", "plan")):
        return "start"
    if last.startswith("pseudo-label"):
        return "round"
    if last.startswith("evaluate"):
        return "final evaluation" if ":" in last else "evaluate"
    return "compile" if last.startswith("train:") else "train"


def go_on(work: Workload, place: Path, *, user: int | None = None) -> Trial:
    """Starts the run again until it is done, and compares what it became with the undisturbed one."""
    checkpoints = Checkpoints(place / "run" / "checkpoints")
    with quiet():
        saved = checkpoints.newest() or 0
    lost, starts, warnings = 0, 0, []
    for starts in range(1, MOST_STARTS + 1):
        with work.start(place, user=user) as process:
            code = process.end(HANG_SECONDS)
            errors = process.errors()
        warnings += [line for line in errors if line.startswith(("warning", "error"))]
        if starts == 1 and not any(line.text.startswith("prepared data") for line in process.lines):
            went_on = saved  # done already: nothing was restored
        elif starts == 1:
            said = [re.fullmatch(r"going on from checkpoint (\d+)", line) for line in errors]
            went_on = max([int(match[1]) for match in said if match], default=0)
            lost = saved - went_on
        if code == 0 or code is None:
            break
    result = {"saved": saved, "lost": lost, "starts": starts, "final_code": code, "warnings": warnings[:3]}
    if code != 0:
        return result | {"differences": ["it did not end well"], "last": errors[-3:]}
    return result | {"differences": work.differences(place / "run")}


# Files that are damaged -----------------------------------------------------------------------------------------------


def damaged_checkpoint(work: Workload, _: Path, random: np.random.Generator, how: faults.Damage) -> Trial:
    """Damages a file of a checkpoint: it is refused, and the newest of the others is what it was."""
    folder = work.half / "run" / "checkpoints"
    path = faults.choose_file(folder, random)
    name = path.relative_to(folder).as_posix()
    hit = int(name.split("/")[0])
    expected = max(step for step in work.half_states if step != hit)
    if hit < expected:
        expected = max(work.half_states)
    with faults.damaged(path, how, random) as what, heard() as warnings:
        checkpoints = Checkpoints(folder)
        found = checkpoints.newest()
        is_right = found is not None and state(work.half / "run", found) == work.half_states[found]
        try:
            state(work.half / "run", hit)
            refused = False
        except (UserError, ValueError):
            refused = True
        has_warned = hit < max(work.half_states) or any(f"checkpoints/{hit} is not used" in one for one in warnings)
    return {
        "file": name,
        "what": what,
        "lost": expected - (found or 0),
        "wrong": not is_right or not refused,
        "as_promised": refused and has_warned,
    }


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings that are logged while the context is open."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, log = Handler(), logging.getLogger("ssl_jax")
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops warnings of damaged checkpoints."""
    log = logging.getLogger("ssl_jax.checkpoint")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
      trials: how many the README shows.
      run: one trial of it, in an empty folder.
    """

    trials: int
    run: Callable[[Workload, Path, np.random.Generator], Trial]


_FLIPS, _OTHERS = 200, 50
KINDS = {
    "SIGKILL": Kind(50, functools.partial(stopped, number=signal.SIGKILL)),
    "SIGTERM": Kind(20, functools.partial(stopped, number=signal.SIGTERM)),
    **{
        f"checkpoints: {how}": Kind(
            _FLIPS if how == "flip" else _OTHERS, functools.partial(damaged_checkpoint, how=how)
        )
        for how in faults.DAMAGES
    },
}
"""By name."""
