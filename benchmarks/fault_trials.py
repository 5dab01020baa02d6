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
import os
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
from ssl_jax.data import store
from ssl_jax.errors import UserError
from ssl_jax.pseudo_labels import rounds

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
    def make(cls, folder: Path, *, compile_first: bool = True) -> Workload:
        """Writes the data and runs it undisturbed, or finds what an earlier call left in the folder.

        Args:
          folder: where.
          compile_first: whether a run before it leaves it nothing to compile, as nothing is left to all others.
        """
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "workload.json"
        if done.is_file():
            found = files.read_json(done)
            return cls(folder, [faults.Line(**line) for line in found["marks"]], found["seconds"])
        for name in ("undisturbed", "half"):
            shutil.rmtree(folder / name, ignore_errors=True)
        tiny.write_all(folder)
        empty = cls(folder, [], 0.0)
        for name in ("compiling", "undisturbed") if compile_first else ("undisturbed",):
            with empty.start(folder / name) as process:
                if process.end(HANG_SECONDS) != 0:
                    raise RuntimeError("the undisturbed run failed:\n" + "\n".join(process.errors()[-20:]))
                marks, seconds = process.marks(), max(line.at for line in process.lines)
            if name == "compiling":
                shutil.rmtree(folder / name)
        files.write_json(done, {"marks": [dataclasses.asdict(line) for line in marks], "seconds": seconds})
        return cls(folder, marks, seconds)

    @functools.cached_property
    def half(self) -> Path:
        """Where a run was stopped in its second half, after its round; whoever damages it mends it."""
        place = self.folder / "half"
        if place.is_dir():
            return place
        making = place.with_name("half_made")
        shutil.rmtree(making, ignore_errors=True)
        with self.start(making) as process:
            process.wait_for("step 9/", HANG_SECONDS)
            process.send(signal.SIGTERM)
            if process.end(HANG_SECONDS) != 75:
                raise RuntimeError("the run could not be stopped:\n" + "\n".join(process.errors()[-20:]))
        return making.rename(place)

    @functools.cached_property
    def half_states(self) -> dict[int, State]:
        """The content of the checkpoints of `half`."""
        workdir = self.half / "run"
        return {step: state(workdir, step) for step in tiny.checkpoint_steps(workdir)}

    @property
    def undisturbed(self) -> Path:
        """The work directory of the undisturbed run."""
        return self.folder / "undisturbed" / "run"

    def start(self, place: Path, variables: Mapping[str, str] | None = None, *, is_root: bool = True) -> faults.Process:
        """Starts the run in `place/run`, with its data prepared in `place/prepared`.

        Args:
          place: where.
          variables: of its environment, besides those that all runs have.
          is_root: whether it may write everywhere if this process may.
        """
        command = tiny.command(
            "train",
            *("--config", str(self.folder / "config.yaml"), "--workdir", str(place / "run")),
            *("--data.prepared-dir", str(place / "prepared")),
            *("--train.save-total-limit", str(SAVE_TOTAL_LIMIT)),
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(tiny.ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if not is_root:
            command = faults.without_privileges(command)
        return faults.Process(command, {**environment, **(variables or {})})

    @property
    def compiled(self) -> Path:
        """Where runs keep what they compile."""
        return self.folder / "compiled"

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
        checkpoints = Checkpoints(workdir / "checkpoints")
        with quiet():
            if checkpoints.newest() != steps[-1]:
                found.append("newest checkpoint")
            for step in set(steps).intersection(checkpoints.steps()):
                # One that was damaged is left for a person to look at, and known for what it is.
                stored = _state_if_whole(workdir, step)
                if stored is not None and stored != state(self.undisturbed, step):
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


def _state_if_whole(workdir: Path, step: int) -> State | None:
    try:
        return state(workdir, step)
    except UserError:
        return None


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
        was_there = process.send(number)
        at = process.seconds()
        code = process.end(HANG_SECONDS)
        trial = {"at": round(at, 3), "ended_after": round(process.seconds() - at, 3)}
        trial |= {"phase": phase(process, place), "code": code, "said": process.errors()[-1:]}
        has_traceback = _TRACEBACK in "\n".join(process.errors())
    if not was_there:  # it was faster than the undisturbed run: another moment
        shutil.rmtree(place)
        return stopped(work, place, random, number)
    allowed = {-int(number)} if number == signal.SIGKILL else {75}
    if trial["phase"] == "start" and not (place / "run").exists():
        allowed.add(-int(number))  # before the first line of ours is executed
    if trial["phase"] == "done":
        allowed.add(0)
    trial["as_promised"] = code in allowed and not has_traceback
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


def go_on(work: Workload, place: Path, variables: Mapping[str, str] | None = None, *, user: int | None = None) -> Trial:
    """Starts the run again until it is done, and compares what it became with the undisturbed one."""
    checkpoints = Checkpoints(place / "run" / "checkpoints")
    with quiet():
        saved = checkpoints.newest() or 0
    lost, starts, tracebacks, warnings = 0, 0, 0, []
    for starts in range(1, MOST_STARTS + 1):
        with work.start(place, variables) as process:
            code = process.end(HANG_SECONDS)
            errors = process.errors()
        tracebacks += _TRACEBACK in "\n".join(errors)
        warnings += [line for line in errors if line.startswith(("warning", "error"))]
        if starts == 1 and not any(line.text.startswith("prepared data") for line in process.lines):
            went_on = saved  # done already: nothing was restored
        elif starts == 1:
            said = [re.fullmatch(r"going on from checkpoint (\d+)", line) for line in errors]
            went_on = max([int(match[1]) for match in said if match], default=0)
            lost = saved - went_on
        if code == 0 or code is None:
            break
    result = {"saved": saved, "lost": lost, "starts": starts, "final_code": code}
    result |= {"tracebacks": tracebacks, "warnings": [line.replace(str(place), "") for line in warnings[:3]]}
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


def damaged_data(work: Workload, _: Path, random: np.random.Generator, how: faults.Damage) -> Trial:
    """Damages a file of the prepared data: opening them notices."""
    (folder,) = (path.parent for path in (work.half / "prepared").glob("*/manifest.json"))
    path = faults.choose_file(folder, random)
    name = path.relative_to(folder).as_posix()
    with faults.damaged(path, how, random) as what:
        found = store.problem(folder)
    is_named = found is not None and found.startswith((name, f"no {name}"))
    return {"file": name, "what": what, "lost": 0, "wrong": found is None, "as_promised": is_named}


def damaged_round(work: Workload, _: Path, random: np.random.Generator, how: faults.Damage) -> Trial:
    """Damages a file of a round of pseudo-labels or of its copy: it is mended."""
    folder = work.half / "run" / "pseudo_labels"
    path = faults.choose_file(folder, random)
    before = _content(folder)
    with faults.damaged(path, how, random) as what, heard() as warnings:
        whole = rounds.mend([folder], 1)
        after = _content(folder)
    return {
        "file": path.relative_to(folder).as_posix(),
        "what": what,
        "lost": 1 - whole,
        "wrong": after != before,
        "as_promised": len(warnings) == 1 and path.name in warnings[0],
    }


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged_and_started_again(work: Workload, place: Path, random: np.random.Generator, what: str) -> Trial:
    """Damages a file of an interrupted run: the same command notices, and ends as the undisturbed run."""
    shutil.copytree(work.half, place, dirs_exist_ok=True)
    folder = place / what
    if what == "run":
        paths = [path for path in (*folder.iterdir(), *(folder / "tokenizer").iterdir()) if path.is_file()]
        paths = sorted(path for path in paths if path.stat().st_size)
        path = paths[int(random.integers(len(paths)))]
    else:
        path = faults.choose_file(folder, random)
    how = faults.DAMAGES[int(random.integers(len(faults.DAMAGES)))]
    name = path.relative_to(place).as_posix()
    trial: Trial = {"file": name, "what": faults.damage(path, how, random)}
    trial |= go_on(work, place)
    # Lines of a damaged log are gone; that is all.
    lost_lines = {path.name} if path.suffix == ".jsonl" else set()
    trial["differences"] = [one for one in trial["differences"] if one not in lost_lines]
    return trial | {"as_promised": trial["starts"] == 1 and trial["final_code"] == 0 and not trial["tracebacks"]}


# Disks and clocks -----------------------------------------------------------------------------------------------------

# What is on its way when the disk fills: the line that the run says just before.
_FILLS_AT = {
    "prepare": None,
    "metrics": "train:",
    "save": "step 4/",
    "round": "pseudo-label",
    "final evaluation": "evaluate: likelihood",
}
# Some times what a run takes, and little enough that it is filled before the run has gone on.
_DISK_BYTES = 2**25
_LOCKED_AT = ("at the start", "between two starts", "amid the run")


def full_disk(work: Workload, place: Path, random: np.random.Generator, moment: str) -> Trial:
    """Fills the disk that work directory and prepared data are on, and makes room again when the run has ended."""
    text = _FILLS_AT[moment]
    with faults.small_disk(place, _DISK_BYTES):
        # Preparing fails somewhere, later phases wherever they write next.
        prepared = sum(path.stat().st_size for path in (work.half / "prepared").rglob("*") if path.is_file())
        filler = faults.fill_disk(place, leave=int(random.integers(prepared)) if text is None else _DISK_BYTES)
        with work.start(place) as process:
            if text is not None:
                process.wait_for(text, HANG_SECONDS)
                faults.fill_disk(place)
            code = process.end(HANG_SECONDS)
            trial = {"phase": moment, "code": code} | _refusal(process, place, code)
        filler.unlink()
        return trial | go_on(work, place)


def read_only(work: Workload, place: Path, random: np.random.Generator, moment: str) -> Trial:
    """Takes the right to write from the run's folders and files, and gives it back when the run has ended."""
    if moment == "between two starts":
        shutil.copytree(work.half, place, dirs_exist_ok=True)
    if moment != "amid the run":
        faults.set_writable(place, False)
    with work.start(place, is_root=False) as process:
        if moment == "amid the run":
            after, delay = _moment(work, random)
            process.wait_for_marks(after, HANG_SECONDS)
            time.sleep(delay)
            faults.set_writable(place, False)
        code = process.end(HANG_SECONDS)
        trial = {"phase": moment, "code": code} | _refusal(process, place, code)
    faults.set_writable(place, True)
    return trial | go_on(work, place)


def _refusal(process: faults.Process, place: Path, code: int | None) -> Trial:
    """Whether a run that could not write said so as promised: two lines at most, which name the path, and code 2."""
    errors = process.errors()
    first = next((number for number, line in enumerate(errors) if line.startswith("error:")), len(errors))
    said = errors[first:]
    is_told = 1 <= len(said) <= 2 and str(place) in said[0]
    has_traceback = _TRACEBACK in "\n".join(errors)
    is_promised = not has_traceback and (code == 0 or (code == 2 and is_told))
    return {"said": [line.replace(str(place), "") for line in said[:3]], "as_promised": is_promised}


def jumping_clock(work: Workload, place: Path, random: np.random.Generator) -> Trial:
    """Turns the clock by hours, forwards and back, and kills the run in between; it goes on with an earlier time."""
    jumps = [(random.uniform(0, work.seconds), by * 3600 * random.uniform(1, 48)) for by in (1, -1)]
    after, delay = _moment(work, random)
    paths = f"{place / 'clock'}:{tiny.ROOT}"
    with work.start(place, {**faults.jumping_clock(place / "clock", jumps), "PYTHONPATH": paths}) as process:
        process.wait_for_marks(after, HANG_SECONDS)
        time.sleep(delay)
        process.send(signal.SIGKILL)
        code = process.end(HANG_SECONDS)
        trial = {"phase": phase(process, place), "code": code, "jumps": [[round(x, 1) for x in jump] for jump in jumps]}
    back = faults.jumping_clock(place / "clock", [(0.0, -3600 * random.uniform(1, 48))])
    trial |= go_on(work, place, {**back, "PYTHONPATH": paths})
    return trial | {"as_promised": code in (-signal.SIGKILL, 0) and trial["starts"] == 1}


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
      function: one trial of it, in an empty folder.
      moments: that trials take in turn, as the last argument; none where chance decides.
    """

    trials: int
    function: Callable[..., Trial]
    moments: tuple[str, ...] = ()

    def run(self, work: Workload, place: Path, random: np.random.Generator, number: int) -> Trial:
        """The trial of this number."""
        moment = (self.moments[number % len(self.moments)],) if self.moments else ()
        return self.function(work, place, random, *moment)


_FLIPS, _OTHERS = 200, 50
_DAMAGED = {"checkpoints": damaged_checkpoint, "prepared data": damaged_data, "rounds": damaged_round}
_NAMES: dict[faults.Damage, str] = {"flip": "a bit", "truncate": "cut short", "delete": "deleted", "empty": "emptied"}
KINDS = {
    "SIGKILL": Kind(50, functools.partial(stopped, number=signal.SIGKILL)),
    "SIGTERM": Kind(20, functools.partial(stopped, number=signal.SIGTERM)),
    **{
        f"{what}: {name}": Kind(_FLIPS if how == "flip" else _OTHERS, functools.partial(function, how=how))
        for what, function in _DAMAGED.items()
        for how, name in _NAMES.items()
    },
    **{
        f"{what}, run again": Kind(trials, functools.partial(damaged_and_started_again, what=folder))
        for what, folder, trials in (
            ("checkpoints", "run/checkpoints", 10),
            ("prepared data", "prepared", 10),
            ("rounds", "run/pseudo_labels", 10),
            ("other files of the work directory", "run", 20),
        )
    },
    "full disk": Kind(15, full_disk, tuple(_FILLS_AT)),
    "read-only folders": Kind(9, read_only, _LOCKED_AT),
    "clock that jumps": Kind(6, jumping_clock),
}
"""By name."""
