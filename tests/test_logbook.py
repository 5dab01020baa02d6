"""What a run leaves behind for scripts, and what it shows to a person."""

import errno
import io
import json
import os
import pty
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from ssl_jax.errors import UserError
from ssl_jax.events import EventFile
from ssl_jax.logbook import Logbook, describe, format_count, format_duration

ROOT = Path(__file__).parent.parent

TRAIN = {
    "loss": 4.8123,
    "loss/supervised": 4.7,
    "loss/lm": 4.92,
    "tokens": 4096,
    "tokens/labeled": 1024,
    "tokens_per_sec": 3100.0,
    "lr": 1e-3,
    "grad_norm": 1.5,
}


def lines(path: Path) -> list[dict[str, Any]]:
    """Strict JSON: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def scalars(workdir: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every event file, in the order of writing."""
    paths = sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return [found for path in paths for found in scalars_of(path)]


def scalars_of(path: Path) -> Iterator[tuple[str, int, float]]:
    """(tag, step, value) of an event file."""
    content = path.read_bytes()
    position = 0
    while position < len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        event = Event.FromString(content[position + 12 : position + 12 + length])
        yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)
        position += 12 + length + 4


def test_a_line_of_metrics_is_step_time_and_values(tmp_path: Path) -> None:
    with Logbook(tmp_path, resume_step=0, total_steps=1400) as logbook:
        logbook.metrics(10, TRAIN)
        logbook.metrics(10, {"eval/reply_bits_per_byte": 2.5})
    first, second = lines(tmp_path / "metrics.jsonl")
    assert list(first) == ["step", "time", *TRAIN]
    assert {name: first[name] for name in TRAIN} == TRAIN
    assert isinstance(first["tokens"], int)
    assert 0 <= first["time"] <= second["time"] < 60
    assert second["eval/reply_bits_per_byte"] == 2.5


def test_lines_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with Logbook(tmp_path, resume_step=0, total_steps=5) as logbook:
        logbook.metrics(1, TRAIN)
        logbook.samples(1, [{"prompt": "hi", "reply": "hello"}])
        assert len(lines(tmp_path / "metrics.jsonl")) == 1
        assert lines(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "hi", "reply": "hello"}]


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")])
def test_what_json_cannot_express_is_null_and_named(value: float, name: str, tmp_path: Path) -> None:
    with Logbook(tmp_path, resume_step=0, total_steps=5) as logbook:
        logbook.metrics(1, {"loss": value, "lr": 1.0})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["loss_nonfinite"], line["lr"]) == (None, name, 1.0)
    assert "lr_nonfinite" not in line
    assert scalars(tmp_path) == [("lr", 1, 1.0)]


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    with Logbook(tmp_path, resume_step=0, total_steps=5) as logbook:
        logbook.metrics(1, {"loss": numpy.float32(0.5), "tokens": numpy.int64(7), "lr": numpy.array(2.0)})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["tokens"], line["lr"]) == (0.5, 7, 2.0)


@given(reply=st.text(st.characters(codec=None)))
def test_any_reply_is_one_valid_line(reply: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    workdir = tmp_path_factory.mktemp("samples")
    with Logbook(workdir, resume_step=0, total_steps=5) as logbook:
        logbook.samples(3, [{"prompt": "?", "reply": reply}])
    content = (workdir / "samples.jsonl").read_bytes()
    assert content.count(b"\n") == 1
    assert json.loads(content.decode("utf-8")) == {"step": 3, "prompt": "?", "reply": reply}


def test_a_resumed_run_has_every_step_once_and_its_clock_goes_on(tmp_path: Path) -> None:
    with Logbook(tmp_path, resume_step=0, resume_time=100.0, total_steps=50) as logbook:
        for step in (10, 20, 30):
            logbook.metrics(step, TRAIN)
            logbook.samples(step, [{"prompt": "hi", "reply": str(step)}])
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    with Logbook(tmp_path, resume_step=20, total_steps=50) as logbook:
        assert 100 <= logbook.elapsed() < 160
        assert (tmp_path / "metrics.jsonl").stat().st_ino != before, "replaced as a whole, not rewritten in place"
        for step in (30, 40):
            logbook.metrics(step, TRAIN)
            logbook.samples(step, [{"prompt": "hi", "reply": str(step)}])
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == [10, 20, 30, 40]
    assert [line["time"] for line in written] == sorted(line["time"] for line in written)
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [10, 20, 30, 40]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_the_checkpoints_clock_counts_where_no_line_says_more(tmp_path: Path) -> None:
    with Logbook(tmp_path, resume_step=20, resume_time=500.0, total_steps=50) as logbook:
        assert 500 <= logbook.elapsed() < 560


def test_a_new_run_starts_with_empty_files(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint starts again from nothing."""
    with Logbook(tmp_path, resume_step=0, total_steps=50) as logbook:
        logbook.metrics(0, {"eval/reply_bits_per_byte": 3.0})
        logbook.metrics(10, TRAIN)
    with Logbook(tmp_path, resume_step=0, total_steps=50) as logbook:
        assert logbook.elapsed() < 60
    assert lines(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    "torn", [b'{"step": 30, "ti', b'{"step": 30, "time": 3.0}', b"\xff\xfe", b"\0\0\0", b"[1]\n", b"\n"]
)
def test_a_line_that_a_kill_cut_off_is_dropped(torn: bytes, tmp_path: Path) -> None:
    good = b'{"step": 10, "time": 1.0}\n{"step": 20, "time": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + torn)
    with Logbook(tmp_path, resume_step=20, total_steps=50) as logbook:
        logbook.metrics(30, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [10, 20, 30]


def test_damaged_lines_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are gone, but the run goes on."""
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 10, "time": 1.0}\n{"step": 20, "ti\xede": 2.0}\n{"step": 30, "t'
    )
    with Logbook(tmp_path, resume_step=30, total_steps=50) as logbook:
        logbook.metrics(40, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [10, 40]
    assert caplog.messages == [f"{tmp_path / 'metrics.jsonl'}: 1 damaged lines are left out"]


def test_a_last_line_without_its_newline_is_not_glued_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 10, "time": 1.0}')
    with Logbook(tmp_path, resume_step=20, total_steps=50) as logbook:
        logbook.metrics(30, {"loss": 1.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [10, 30]


def test_a_kill_while_lines_are_dropped_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = b'{"step": 10, "time": 1.0}\n{"step": 20, "time": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(before)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", killed)
        Logbook(tmp_path, resume_step=10, total_steps=50)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    with Logbook(tmp_path, resume_step=0, total_steps=50) as logbook:
        logbook.metrics(10, {"loss": 0.5, "lr": 0.25})
    with Logbook(tmp_path, resume_step=10, total_steps=50) as logbook:
        logbook.metrics(20, {"loss": 0.125})
    assert scalars(tmp_path) == [("loss", 10, 0.5), ("lr", 10, 0.25), ("loss", 20, 0.125)]


def test_other_processes_write_and_show_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Logbook(tmp_path / "w", resume_step=0, resume_time=7.0, total_steps=5, primary=False) as logbook:
        logbook.phase("train")
        logbook.metrics(1, TRAIN)
        logbook.samples(1, [{"prompt": "a", "reply": "b"}])
        logbook.say("hello")
        logbook.table("plan", [("model", "tiny")])
        assert 7 <= logbook.elapsed() < 67
    assert not (tmp_path / "w").exists()
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_every_event_is_one_plain_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 10.0, 20.0])
    with Logbook(tmp_path, resume_step=0, total_steps=120) as logbook:
        monkeypatch.setattr(logbook, "elapsed", lambda: next(now))
        logbook.phase("compile", "gpt2 [tiny]")
        logbook.metrics(10, TRAIN)
        logbook.metrics(20, TRAIN)
        logbook.metrics(20, {"eval/reply_bits_per_byte": 2.31, "eval/dialogues": 64})
        logbook.say("[bold]as it is[/bold]")
        logbook.table("plan", [("model", "3.2 M"), ("tokens a step", "4096")])
    captured = capsys.readouterr()
    assert captured.out == ""
    numbers = "loss 4.812 (supervised 4.70, lm 4.92)  lr 1.0e-03  3.1k tok/s"
    assert captured.err.splitlines() == [
        "compile: gpt2 [tiny]",
        f"step 10/120  {numbers}",
        f"step 20/120  {numbers}  2 min left",
        "step 20/120  eval: reply_bits_per_byte 2.310, dialogues 64",
        "[bold]as it is[/bold]",
        "plan",
        "  model          3.2 M",
        "  tokens a step  4096",
    ]


def test_on_a_terminal_a_bar_shows_phase_step_and_numbers_below_what_is_said(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with Logbook(tmp_path, resume_step=30, total_steps=120, console=console) as logbook:
        logbook.phase("train")
        logbook.metrics(40, TRAIN)
        logbook.say("[bold]as it is[/bold]")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert " 30/120" in plain
    assert re.search(
        r"train [━╸╺]+ +40/120 loss 4\.812 \(supervised 4\.70, lm 4\.92\)  lr 1\.0e-03  3\.1k tok/s", plain
    )
    assert "[bold]as it is[/bold]\n" in plain
    assert screen.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is visible again"


def test_a_narrow_terminal_gets_one_line_and_no_wrapped_bar(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=60)
    with Logbook(tmp_path, resume_step=0, total_steps=120, console=console) as logbook:
        logbook.metrics(40, TRAIN)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert plain.count("\n") <= 1
    assert "…" in plain


def test_a_real_terminal_is_recognized_and_standard_output_stays_a_file(tmp_path: Path) -> None:
    """`train > file` on a terminal: the bar goes to the terminal, what is printed goes to the file."""
    program = (
        "import sys; from pathlib import Path; from ssl_jax.logbook import Logbook\n"
        "with Logbook(Path(sys.argv[1]), resume_step=0, total_steps=9) as logbook:\n"
        "    logbook.metrics(3, {'loss': 1.0})\n"
        "    print('result')\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=slave, cwd=ROOT, env=environment
    )
    os.close(slave)
    screen = os.read(master, 65536).decode()
    os.close(master)
    assert done.stdout == b"result\n"
    assert "3/9" in screen
    assert "\x1b[" in screen


def test_an_error_gives_the_terminal_back(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    with pytest.raises(RuntimeError), Logbook(tmp_path, resume_step=0, total_steps=9, console=console):
        raise RuntimeError("in the loop")
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    logbook = Logbook(tmp_path, resume_step=0, total_steps=9)
    logbook.close()
    logbook.close()


def test_a_workdir_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: .*--workdir"):
        Logbook(tmp_path / "file", resume_step=0, total_steps=9)


def test_a_full_disk_is_a_user_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        name = "metrics.jsonl"

        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with Logbook(tmp_path, resume_step=0, total_steps=9) as logbook, monkeypatch.context() as patched:
        patched.setattr(logbook, "_metrics", Full())
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
            logbook.metrics(1, {"loss": 1.0})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss": 1.0}, ["loss 1.000"]),
        ({"loss": 1.0, "mfu": 0.314}, ["loss 1.000", "mfu 31%"]),
        ({"pseudo/generated": 512, "pseudo/accept_rate": 0.5}, ["pseudo: generated 512, accept_rate 0.500"]),
        ({"grad_norm": 1.0, "tokens": 5}, ["grad_norm 1.000", "tokens 5"]),
        ({}, []),
    ],
)
def test_a_person_reads_the_numbers_that_matter(values: dict[str, float], words: list[str]) -> None:
    assert describe(values) == words


def test_numbers_are_rounded_for_people() -> None:
    assert [format_count(n) for n in (0, 950, 3123, 1.25e6, 6.44e9)] == ["0", "950", "3.1k", "1.2M", "6.4G"]
    assert [format_duration(s) for s in (0, 45, 89, 240, 5399, 11520)] == [
        "0 s",
        "45 s",
        "89 s",
        "4 min",
        "90 min",
        "3.2 h",
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Files cannot grow beyond 4 KiB, as they could not on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["metrics.jsonl", "events"])
def test_a_disk_that_fills_ends_the_run_with_one_message_and_nothing_hangs(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever file it is that does not fit; what was written stays readable."""
    with (
        pytest.raises(UserError, match="cannot be written: File too large\nearlier checkpoints"),
        monkeypatch.context() as patch,
        Logbook(small_disk, resume_step=0, total_steps=10_000) as logbook,
    ):
        # The other file takes everything.
        patch.setattr(*((EventFile, "add") if name == "metrics.jsonl" else (Logbook, "_append")), lambda *_: None)
        for step in range(1, 10_000):
            logbook.metrics(step, TRAIN)
    with Logbook(small_disk, resume_step=1, total_steps=10_000) as logbook:
        logbook.metrics(2, {"loss": 1.0})
    assert list(scalars_of(max((small_disk / "tensorboard").iterdir()))) == [("loss", 2, 1.0)]


def test_a_clock_that_was_turned_back_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads event files in the order of their names, and forgets what a later one begins again."""
    now = 2e9
    monkeypatch.setattr(time, "time", lambda: now)
    for number, jump in enumerate((0.0, -3600.0, 0.0, 7200.0)):
        now += jump
        with Logbook(tmp_path, resume_step=number, total_steps=50) as logbook:
            logbook.metrics(number + 1, {"loss": float(number)})
    monkeypatch.undo()
    steps = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        steps += [value for _, value, _ in scalars_of(path)]
    assert steps == [1, 2, 3, 4]
