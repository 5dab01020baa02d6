"""Signals are remembered until there is a good moment, and end a process that has none: whatever it is busy with."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

# Is busy in C for minutes, where Python hears no signal: as XLA is when it compiles.
PROGRAM = """
import hashlib, sys
from ssl_jax import command_line
from ssl_jax.signals import Signals

def busy(*_):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

match sys.argv[1]:
    case "imports":
        command_line.run(lambda _: exec("import time\\nprint('busy', flush=True)\\ntime.sleep(60)"), goes_on=True)
    case "collects":
        import gc, time
        def collecting(*_):
            gc.callbacks.remove(collecting)
            print("busy", flush=True)
            time.sleep(60)
        gc.callbacks.append(collecting)
        command_line.run(lambda _: [gc.collect(), *(time.sleep(0.01) for _ in range(6000))], goes_on=True)
    case "ends":
        import atexit, time
        atexit.register(lambda: (print("busy", flush=True), time.sleep(1.5)))
        command_line.run(lambda _: None)
    case "command":
        Signals.__init__.__kwdefaults__["patience"] = 0.3
        command_line.run(busy)
    case what:
        signals = Signals(patience=0.3)
        with signals.listen(), signals.ending(lambda: print("ended", flush=True)):
            signals.is_saved = what == "saved"
            busy()
"""


class Busy:
    """A process that runs the program."""

    def __init__(self, what: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, what],
            env=tiny.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "busy\n"

    def send(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def goes_on(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def end(self) -> tuple[int, str, str]:
        """Exit code, what it wrote, and what it said."""
        output, said = self.process.communicate(timeout=20)
        return self.process.returncode, output, said


@pytest.fixture
def busy(request: pytest.FixtureRequest) -> Iterator[Busy]:
    child = Busy(request.param)
    yield child
    child.process.kill()
    child.process.communicate()


@pytest.mark.parametrize("busy", ["saved"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_where_nothing_is_lost_the_first_signal_ends_what_does_not_listen(busy: Busy, number: signal.Signals) -> None:
    busy.send(number)
    said = f"stopped: {number.name}; nothing is lost, run the same command to go on\n"
    assert busy.end() == (75, "ended\n", said)


@pytest.mark.parametrize("busy", ["unsaved"], indirect=True)
def test_where_steps_would_be_lost_it_takes_a_second_signal(busy: Busy) -> None:
    busy.send(signal.SIGTERM)
    assert busy.goes_on(1.5)
    busy.send(signal.SIGTERM)
    said = "stopped: SIGTERM again; the steps since the last checkpoint are lost; run the same command to go on\n"
    assert busy.end() == (75, "ended\n", said)


@pytest.mark.parametrize("busy", ["unsaved"], indirect=True)
def test_two_signals_for_one_key_are_one(busy: Busy) -> None:
    """A terminal sends Ctrl-C to a launch script and to the run, and the script passes it on."""
    busy.send(signal.SIGINT, signal.SIGTERM)
    assert busy.goes_on(1.5)


@pytest.mark.parametrize("busy", ["command"], indirect=True)
def test_a_command_that_does_not_listen_ends(busy: Busy) -> None:
    busy.send(signal.SIGINT)
    code, _, said = busy.end()
    assert code == 75 and said.startswith("stopped: ") and "Traceback" not in said


@pytest.mark.parametrize("busy", ["imports"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_amid_a_text_that_is_executed_the_code_is_the_same(busy: Busy, number: signal.Signals) -> None:
    """As classes are made when modules are imported; CPython takes a KeyboardInterrupt there for one nobody catches."""
    busy.send(number)
    said = f"stopped: {number.name}; nothing is lost, run the same command to go on\n"
    assert busy.end() == (75, "", said)


@pytest.mark.parametrize("busy", ["collects"], indirect=True)
def test_amid_a_callback_whose_exceptions_nobody_catches_it_is_heard_as_well(busy: Busy) -> None:
    """JAX has one of the garbage collector."""
    busy.send(signal.SIGTERM)
    assert busy.end() == (75, "", "stopped: SIGTERM; nothing is lost, run the same command to go on\n")


@pytest.mark.parametrize("busy", ["ends"], indirect=True)
def test_a_command_that_is_done_is_done(busy: Busy) -> None:
    """The interpreter and the libraries take their time to end, in which a signal would be a traceback."""
    busy.send(signal.SIGTERM)
    assert busy.end() == (0, "", "")


def test_a_command_that_listens_ends_at_once(tmp_path: Path) -> None:
    """Amid the preparation of data, and the next call goes on."""
    tiny.write_data(tmp_path)
    values = tiny.settings(tmp_path)
    fifo = tmp_path / "labeled.jsonl"
    rows = fifo.read_bytes()
    fifo.unlink()
    values["data"]["labeled"] = [{"path": str(tmp_path / "labeled.jsonl.*")}]
    for number in range(200):  # files enough for the signal to come while they are read
        (tmp_path / f"labeled.jsonl.{number:03d}").write_bytes(rows)
    config = tiny.write_config(tmp_path / "config.yaml", values)
    process = subprocess.Popen(
        tiny.command("prepare", "--config", str(config)), env=tiny.environment(), stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("prepared/*")):
        assert process.poll() is None
        time.sleep(0.002)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75 and said == "stopped: SIGTERM; nothing is lost, run the same command to go on\n"
    assert time.monotonic() - sent < 8, "it does not take the patience that a compiler is given"
