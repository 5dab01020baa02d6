"""What happens to one process of a run happens to all: they stop at the same step, or end in time with one message."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
from processes import Ended, Group

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.usefixtures("compiled_fast")]

# The training command, in which what the environment's FAULT names goes wrong.
PROGRAM = """
    import os, time
    from ssl_jax import command_line, distributed, loop, manifest, train
    import orbax.checkpoint as ocp

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    def broken(self):
        raise TypeError("a bug")

    def late(self):
        time.sleep(0.15)
        return after_step(self)

    match os.environ.get("FAULT"):
        case "no space for arrays":
            ocp.AsyncCheckpointer.save = full
        case "no space for the manifest":
            manifest.write = full
        case "bug":
            loop.SharedSignals.after_step = broken
        case "late":
            after_step, loop.SharedSignals.after_step = loop.SharedSignals.after_step, late
        case "impatient":
            distributed._HINT_SECONDS = distributed._JOIN_SECONDS = 2.0
    command_line.run(train.main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a configuration, the program, and `undisturbed`: the run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("failures")
    values = tiny.settings(folder)
    tiny.write_data(folder)
    tiny.write_config(folder / "config.yaml", values)
    tiny.write_config(folder / "other.yaml", values | {"train": values["train"] | {"steps": 24}})
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    ended = processes.run(command(folder, "undisturbed"), 2)
    assert [one.code for one in ended] == [0, 0], ended[0].stderr
    return folder


def command(folder: Path, name: str, config: str = "config.yaml") -> list[str]:
    """The program's command line for a work directory of this name."""
    paths = (str(folder / part) for part in ("program.py", config, name))
    program, config, workdir = paths
    return [sys.executable, program, "--config", config, "--workdir", workdir]


def messages(ended: list[Ended]) -> list[str]:
    """Lines of all of them that say why they end."""
    return [line for one in ended for line in one.said() if re.search(r"\b(error|stopped): ", line)]


@dataclasses.dataclass
class Stage:
    """A part of an eventful run: what happened when, and how its processes ended."""

    at: float
    ended: list[Ended]


@pytest.fixture(scope="module")
def eventful(folder: Path) -> dict[str, Stage]:
    """A run of which first one process is killed, then the other one, then one is told to stop; at last it ends."""
    stages = {}
    for name, moment, number, process in (
        ("kill of another", "step 5/", signal.SIGKILL, 1),
        ("kill of the primary", "step 7/", signal.SIGKILL, 0),
        ("signal", "step 8/", signal.SIGTERM, 1),
    ):
        with Group(command(folder, "eventful"), 2, each={0: {"FAULT": "late"}}) as group:
            group.wait_for(moment)
            stages[name] = Stage(group.send(number, process), group.end())
    stages["end"] = Stage(0.0, processes.run(command(folder, "eventful"), 2))
    return stages


@pytest.mark.parametrize(("name", "dead"), [("kill of another", 1), ("kill of the primary", 0)])
def test_who_is_left_names_the_dead_in_time(eventful: dict[str, Stage], name: str, dead: int) -> None:
    stage = eventful[name]
    assert stage.ended[dead].code == -signal.SIGKILL
    left = stage.ended[1 - dead]
    assert left.code == 75, left.stderr
    assert left.at - stage.at < 60
    first, second = left.stderr.splitlines()[-2:]
    assert first.startswith(f"stopped: process {dead} of 2 (numbered from 0) is gone")
    assert second.startswith("run the same command again")


def test_a_signal_to_one_stops_all_after_the_same_step(eventful: dict[str, Stage], folder: Path) -> None:
    """Also where the other one is late at every step."""
    ended = eventful["signal"].ended
    assert [one.code for one in ended] == [75, 75], ended[0].stderr
    (message,) = messages(ended)
    found = re.match(r"stopped: SIGTERM at step (\d+); a checkpoint is saved", message)
    assert found is not None
    assert f"going on from checkpoint {found[1]}" in eventful["end"].ended[0].stderr


def test_it_ends_as_the_undisturbed_run_to_the_bit(eventful: dict[str, Stage], folder: Path) -> None:
    assert [one.code for one in eventful["end"].ended] == [0, 0], eventful["end"].ended[0].stderr
    run, undisturbed = folder / "eventful", folder / "undisturbed"
    assert tiny.stored_parameters(run) == tiny.stored_parameters(undisturbed)
    assert tiny.metrics(run) == tiny.metrics(undisturbed)
    for name in ("samples.jsonl", "eval_test.json", "pseudo_labels/round_0/summary.json"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize(
    ("fault", "process", "code", "message"),
    [
        (
            "no space for arrays",
            1,
            2,
            r"process 1 of 2 \(.*\): error: checkpoint 1 could not .* No space left on device",
        ),
        ("no space for the manifest", 0, 2, r"error: checkpoint 1 could not .* No space left"),
        (
            "bug",
            1,
            1,
            r"process 1 of 2 \(.*\): error: TypeError: a bug; the traceback is in the output of that process",
        ),
    ],
)
def test_an_error_of_one_ends_all_with_its_code(
    folder: Path, fault: str, process: int, code: int, message: str
) -> None:
    often = ["--train.save-steps", "1"]
    ended = processes.run([*command(folder, fault), *often], 2, each={process: {"FAULT": fault}})
    assert [one.code for one in ended] == [code, code], ended[0].stderr
    assert abs(ended[0].at - ended[1].at) < 20
    (found,) = messages(ended)
    assert re.match(message, found)
    assert ("Traceback" in ended[process].stderr) == (fault == "bug")


def test_what_the_primary_finds_wrong_ends_all_processes_with_one_message(folder: Path, tmp_path: Path) -> None:
    missing = ["--data.labeled", f"[{{path: {tmp_path / 'nowhere.jsonl'}}}]"]
    ended = processes.run([*command(folder, "no data"), *missing], 2)
    assert [one.code for one in ended] == [2, 2], ended[0].stderr
    (message,) = messages(ended)
    assert message in ended[0].stderr and "nowhere.jsonl" in message


def different(folder: Path, **variables: str) -> list[Ended]:
    """Two processes that read their arguments and their code where the variables say; the second one's differ."""
    shell = f'exec "{sys.executable}" -P -m ssl_jax.train --config "$CONFIG" --workdir "{folder}/different"'
    same = {"CONFIG": str(folder / "config.yaml")}
    return processes.run(["bash", "-c", shell], 2, each={0: same, 1: same | variables})


def refused(folder: Path, ended: list[Ended]) -> str:
    """The only message of processes that end at once, because of what the user can fix."""
    assert [one.code for one in ended] == [2, 2], ended[0].stderr
    assert not (folder / "different").exists(), "nothing is done before they agree"
    (message,) = messages(ended)
    assert message in ended[0].stderr
    return message


def test_another_configuration_is_refused_and_its_field_named(folder: Path) -> None:
    message = refused(folder, different(folder, CONFIG=str(folder / "other.yaml")))
    assert "process 1 has another configuration than process 0 (train.steps is 24 there, 12 here)" in message


def test_a_configuration_that_only_one_has_ends_the_others_too(folder: Path) -> None:
    message = refused(folder, different(folder, CONFIG=str(folder / "nowhere.yaml")))
    assert "nowhere.yaml: no such file" in message


def test_other_code_is_refused_and_its_file_named(folder: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(tiny.ROOT / "ssl_jax", tmp_path / "ssl_jax"))
    with (package / "step.py").open("a", encoding="utf-8") as stream:
        stream.write("# one more line\n")
    message = refused(folder, different(folder, PYTHONPATH=str(tmp_path)))
    assert "process 1 runs other code than process 0: ssl_jax/step.py differs" in message


def test_a_process_that_stays_alone_says_so(folder: Path) -> None:
    variables: dict[str, Any] = {"JAX_NUM_PROCESSES": "2", "FAULT": "impatient"}
    with Group(command(folder, "alone"), 1, each={0: variables | alone()}) as group:
        (ended,) = group.end(60)
    assert ended.code == 75, ended.stderr
    (message,) = messages([ended])
    assert "not all processes of this run have come" in message


def alone() -> dict[str, str]:
    """The environment of the first of two processes, of which the other one never comes."""
    address = processes.free_address()
    return {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_PROCESS_ID": "0"}
