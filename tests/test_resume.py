"""Interrupted runs: whatever stops a run and whenever, the same command goes on to the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from ssl_jax.errors import Preempted, UserError
from ssl_jax.logbook import Logbook

MOMENTS = {
    # What the run says when the moment has come: before the first step, amid steps, in the round, in the evaluation.
    "start": "plan",
    "training": "step 3/",
    "round": "pseudo-label: round 0",
    "after the round": "step 9/",
    "evaluation": "evaluate: likelihood",
}


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> None:
    """The run to compare with ends before any signal is arranged."""
    tiny.finished()


def assert_same_result(workdir: Path) -> None:
    """The run is the undisturbed one: weights to the bit, metrics, samples, labels and checkpoint steps."""
    undisturbed = tiny.finished()
    assert tiny.stored_parameters(workdir) == tiny.stored_parameters(undisturbed)
    assert tiny.metrics(workdir) == tiny.metrics(undisturbed)
    for name in ("samples.jsonl", "eval_test.json", "pseudo_labels/round_0/summary.json"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.fixture
def signal_when(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, signal.Signals], None]]:
    """Sends this process a signal at the moment that the run's logbook begins a line with a text."""

    def arrange(text: str, number: signal.Signals) -> None:
        def watch(write: Callable[..., None], line_of: Callable[..., str]) -> Callable[..., None]:
            def wrapped(self: Logbook, *arguments: object) -> None:
                write(self, *arguments)
                if line_of(*arguments).startswith(text):
                    os.kill(os.getpid(), number)

            return wrapped

        monkeypatch.undo()
        monkeypatch.setattr(Logbook, "table", watch(Logbook.table, lambda title, rows: title))
        monkeypatch.setattr(Logbook, "phase", watch(Logbook.phase, lambda name, detail="": f"{name}: {detail}"))
        monkeypatch.setattr(Logbook, "metrics", watch(Logbook.metrics, lambda step, values: f"step {step}/"))

    yield arrange


def test_a_run_that_is_interrupted_everywhere_ends_as_the_undisturbed_one(
    signal_when: Callable[[str, signal.Signals], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for turn, text in enumerate(MOMENTS.values()):
        number = (signal.SIGTERM, signal.SIGINT)[turn % 2]
        signal_when(text, number)
        with pytest.raises(Preempted, match=rf"{number.name} at step \d+; a checkpoint is saved, run the same command"):
            tiny.run_train(tiny.config_file(), tmp_path / "run")
        assert tiny.checkpoint_steps(tmp_path / "run"), "a checkpoint is saved whenever the run is interrupted"
        assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.undo()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    tiny.run_train(tiny.config_file(), tmp_path / "run")
    assert_same_result(tmp_path / "run")


def test_logged_means_do_not_depend_on_an_interruption(
    signal_when: Callable[[str, signal.Signals], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A line of metrics covers the steps since the last line, in whichever process they were taken."""
    steps = [line for line in tiny.metrics(tiny.finished()) if "loss" in line]
    options = ["--train.logging-steps", "5"]
    signal_when("evaluate", signal.SIGTERM)
    with pytest.raises(Preempted, match="at step 4"):
        tiny.run_train(tiny.config_file(), tmp_path / "run", *options)
    monkeypatch.undo()
    tiny.run_train(tiny.config_file(), tmp_path / "run", *options)
    lines = [line for line in tiny.metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line, covered in zip(lines, (steps[:5], steps[5:10], steps[10:]), strict=True):
        assert line["loss"] == pytest.approx(sum(one["loss"] for one in covered) / len(covered))


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_result(
    signal_when: Callable[[str, signal.Signals], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "run"
    signal_when("step 9/", signal.SIGTERM)
    with pytest.raises(Preempted):
        tiny.run_train(tiny.config_file(), workdir)
    monkeypatch.undo()
    newest = tiny.checkpoint_steps(workdir)[-1]
    damage(workdir / "checkpoints" / str(newest))
    tiny.run_train(tiny.config_file(), workdir)
    assert f"checkpoints/{newest} is not used" in caplog.text
    assert tiny.stored_parameters(workdir) == tiny.stored_parameters(tiny.finished())
    assert tiny.metrics(workdir) == tiny.metrics(tiny.finished())


def damage(checkpoint: Path) -> None:
    """Flips one bit in the middle of the largest file."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


class Child:
    """A training process whose output is watched."""

    def __init__(self, workdir: Path, **variables: str) -> None:
        arguments = tiny.command("train", "--config", str(tiny.config_file()), "--workdir", str(workdir))
        environment = {**tiny.environment(), **variables}
        self.process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_for(self, text: str) -> None:
        """Returns when a line that begins with `text` has been written."""
        deadline = time.monotonic() + 120
        while not any(line.startswith(text) for line in list(self.lines)):
            assert time.monotonic() < deadline and self.process.poll() is None, self.lines
            time.sleep(0.002)

    def end(self) -> int:
        """The exit code."""
        code = self.process.wait(120)
        self._reader.join(10)
        return code


def test_a_signal_ends_the_process_with_code_75_and_the_command_goes_on(tmp_path: Path) -> None:
    with Child(tmp_path / "run") as child:
        child.wait_for(MOMENTS["start"])
        child.process.send_signal(signal.SIGTERM)
        assert child.end() == 75
    assert child.lines[-1].startswith("stopped: SIGTERM at step 1;") and "Traceback" not in "".join(child.lines)
    tiny.run_train(tiny.config_file(), tmp_path / "run")
    assert_same_result(tmp_path / "run")


def test_a_killed_process_loses_only_steps(tmp_path: Path) -> None:
    """SIGKILL amid the steps leaves torn work behind; the next start goes on from the last whole checkpoint."""
    with Child(tmp_path / "run") as child:
        child.wait_for("step 7/")
        child.process.kill()
        assert child.end() == -signal.SIGKILL
    tiny.run_train(tiny.config_file(), tmp_path / "run")
    assert_same_result(tmp_path / "run")


def test_another_configuration_cannot_take_over_an_interrupted_run(
    signal_when: Callable[[str, signal.Signals], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    signal_when(MOMENTS["training"], signal.SIGINT)
    with pytest.raises(Preempted):
        tiny.run_train(tiny.config_file(), tmp_path / "run")
    monkeypatch.undo()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"train\.steps is 12 there, 24 here"):
        tiny.run_train(tiny.config_file(), tmp_path / "run", "--train.steps", "24")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_signal_at_every_moment(tmp_path: Path, moment: str) -> None:
    """Ctrl-C and a scheduler's signal in turn: one handler has both."""
    number = [signal.SIGINT, signal.SIGTERM][list(MOMENTS).index(moment) % 2]
    with Child(tmp_path / "run") as child:
        child.wait_for(MOMENTS[moment])
        child.process.send_signal(number)
        assert child.end() == 75, child.lines
    tiny.run_train(tiny.config_file(), tmp_path / "run")
    assert_same_result(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_kill_at_every_moment(tmp_path: Path, moment: str) -> None:
    with Child(tmp_path / "run") as child:
        child.wait_for(MOMENTS[moment])
        child.process.kill()
        assert child.end() == -signal.SIGKILL
    tiny.run_train(tiny.config_file(), tmp_path / "run")
    assert_same_result(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """The first one arrives while the step is being compiled, so the process is still busy when the second comes."""
    with Child(tmp_path / "run", JAX_ENABLE_COMPILATION_CACHE="0") as child:
        child.wait_for("train: ")
        sent = time.monotonic()
        while child.process.poll() is None:
            child.process.send_signal(number)
            time.sleep(0.05)
        assert child.end() == 75 and time.monotonic() - sent < 3
    assert child.lines[-1] == f"stopped: {number.name} again; run the same command to go on\n"
    assert not tiny.checkpoint_steps(tmp_path / "run")
