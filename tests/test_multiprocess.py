"""Several processes train as one process with as many devices does: the same losses, labels, state and evaluation."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import yaml

from ssl_jax import distributed, loading
from ssl_jax.errors import UserError

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def settings(folder: Path) -> dict[str, Any]:
    """Every stream, a teacher and a round, on two devices."""
    values = tiny.settings(folder)
    values["train"]["gradient_accumulation_steps"] = 1
    values["distillation"] = {"weight": 0.5, "streams": ["raw", "pseudo"]}
    return values


def train(folder: Path, name: str, processes: int, devices: int) -> list[subprocess.CompletedProcess[str]]:
    """Trains in so many processes of so many devices each, all to their ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = tiny.command("train", "--config", str(folder / "config.yaml"), "--workdir", str(folder / name))
    running = []
    for number in range(processes):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(number),
        }
        variables = {**tiny.environment(), "JAX_NUM_CPU_DEVICES": str(devices), **(cluster if processes > 1 else {})}
        running.append(
            subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    ended = []
    for process in running:
        stdout, stderr = process.communicate(timeout=300)
        ended.append(subprocess.CompletedProcess(command, process.returncode, stdout, stderr))
    return ended


def curve(run: Path) -> list[dict[str, float]]:
    """Logged figures, without those of the clock."""
    clocks = ("time", "tokens_per_sec", "pseudo/seconds", "pseudo/tokens_per_sec")
    lines = tiny.read_jsonl(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run by one process with two devices and by two processes with one each."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_data(folder)
    tiny.write_config(folder / "config.yaml", settings(folder))
    (one,) = train(folder, "one", 1, 2)
    assert one.returncode == 0, one.stderr
    first, second = train(folder, "two", 2, 1)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "reply_bits_per_byte" in first.stdout
    # One of them speaks for all, but for what the collectives' library says.
    assert [line for line in (second.stdout + second.stderr).splitlines() if "Gloo" not in line] == []
    return {"one": folder / "one", "two": folder / "two"}


def test_losses_evaluations_and_token_counts_are_those_of_one_process(runs: dict[str, Path]) -> None:
    one, two = curve(runs["one"]), curve(runs["two"])
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for line, other in zip(one, two, strict=True):
        for name, value in line.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-5, err_msg=f"{name} of step {line['step']}")
    assert any(line.get("tokens/pseudo", 0) > 0 for line in one)


def test_the_teacher_gives_the_same_labels(runs: dict[str, Path]) -> None:
    summaries = [json.loads((run / "pseudo_labels/round_0/summary.json").read_text()) for run in runs.values()]
    assert summaries[0]["accepted"] == summaries[1]["accepted"] > 0
    assert summaries[0]["sha256"].keys() == summaries[1]["sha256"].keys()


def test_the_checkpoint_holds_the_same_parameters(runs: dict[str, Path]) -> None:
    one, two = (jax.device_get(loading.load_checkpoint(run).params) for run in runs.values())
    jax.tree.map(lambda left, right: np.testing.assert_allclose(right, left, rtol=2e-4, atol=2e-6), one, two)


def test_what_the_primary_finds_wrong_ends_all_processes_with_one_message(tmp_path: Path) -> None:
    values = settings(tmp_path)
    values["data"]["labeled"] = [{"path": str(tmp_path / "nowhere.jsonl")}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    first, second = train(tmp_path, "run", 2, 1)
    assert (first.returncode, second.returncode) == (2, 2), first.stderr + second.stderr
    assert "nowhere.jsonl" in first.stderr and "error" not in second.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "whole numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "not one of the 2"),
    ],
)
def test_an_environment_that_contradicts_itself_is_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        distributed._explicit(variables)
