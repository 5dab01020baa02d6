"""Several processes train as one process with as many devices does: the same losses, labels, state and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
import pytest
import tiny

from ssl_jax import distributed, loading
from ssl_jax.errors import UserError

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def settings(folder: Path) -> dict[str, Any]:
    """Every stream, a teacher and a round."""
    values = tiny.settings(folder)
    values["train"]["gradient_accumulation_steps"] = 1
    values["distillation"] = {"weight": 0.5, "streams": ["raw", "pseudo"]}
    return values


def train(folder: Path, name: str, count: int, devices: int) -> Path:
    """Trains in so many processes of so many devices each."""
    command = tiny.command("train", "--config", str(folder / "config.yaml"), "--workdir", str(folder / name))
    first, *others = processes.run(command, count, devices)
    assert [first.code, *(other.code for other in others)] == [0] * count, first.stderr
    assert "reply_bits_per_byte" in first.stdout
    assert [line for other in others for line in other.said()] == [], "one of them speaks for all"
    return folder / name


def curve(run: Path) -> list[dict[str, float]]:
    """Logged figures, without those of the clock."""
    clocks = ("time", "tokens_per_sec", "pseudo/seconds", "pseudo/tokens_per_sec")
    lines = tiny.read_jsonl(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


@pytest.fixture(scope="module", params=[2, 4])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run by one process with several devices and by as many processes with one each."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.write_data(folder)
    tiny.write_config(folder / "config.yaml", settings(folder))
    return train(folder, "one", 1, request.param), train(folder, "several", request.param, 1)


def test_losses_evaluations_and_token_counts_are_those_of_one_process(runs: tuple[Path, Path]) -> None:
    one, several = map(curve, runs)
    assert [line.keys() for line in one] == [line.keys() for line in several]
    for line, other in zip(one, several, strict=True):
        for name, value in line.items():
            np.testing.assert_allclose(other[name], value, rtol=2e-5, err_msg=f"{name} of step {line['step']}")
    assert any(line.get("tokens/pseudo", 0) > 0 for line in one)


def test_the_teacher_gives_the_same_labels(runs: tuple[Path, Path]) -> None:
    one, several = (json.loads((run / "pseudo_labels/round_0/summary.json").read_text()) for run in runs)
    assert one["accepted"] == several["accepted"] > 0
    assert one["sha256"].keys() == several["sha256"].keys()


def test_the_checkpoint_holds_the_same_parameters(runs: tuple[Path, Path]) -> None:
    one, several = (jax.device_get(loading.load_checkpoint(run).params) for run in runs)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(right, left, rtol=2e-4, atol=2e-6), one, several)


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
