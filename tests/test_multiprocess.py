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

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.usefixtures("compiled_fast")]


def settings(folder: Path) -> dict[str, Any]:
    """Every stream, a teacher and a round."""
    values = tiny.settings(folder)
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


# What comes after training is tried with one number of processes.
only_two = pytest.mark.parametrize("runs", [2], indirect=True)


def test_losses_evaluations_and_token_counts_are_those_of_one_process(runs: tuple[Path, Path]) -> None:
    one, several = map(curve, runs)
    assert [line.keys() for line in one] == [line.keys() for line in several]
    # A divergence is a small difference of two entropies, and rounded as these are.
    rounding = {"loss/distillation": 1e-7}
    for line, other in zip(one, several, strict=True):
        for name, value in line.items():
            about = f"{name} of step {line['step']}"
            np.testing.assert_allclose(other[name], value, rtol=2e-5, atol=rounding.get(name, 0), err_msg=about)
    assert any(line.get("tokens/pseudo", 0) > 0 for line in one)


def test_the_teacher_gives_the_same_labels(runs: tuple[Path, Path]) -> None:
    one, several = (json.loads((run / "pseudo_labels/round_0/summary.json").read_text()) for run in runs)
    assert one["accepted"] == several["accepted"] > 0
    assert one["sha256"].keys() == several["sha256"].keys()


def test_the_checkpoint_holds_the_same_parameters(runs: tuple[Path, Path]) -> None:
    one, several = (without_keys_bias(jax.device_get(loading.load_checkpoint(run).params)) for run in runs)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(right, left, rtol=2e-4, atol=2e-6), one, several)


def without_keys_bias(params: Any) -> Any:
    """The parameters but for one: attention does not depend on the keys' bias, so it moves by rounding errors only."""

    def cut(path: Any, leaf: np.ndarray) -> np.ndarray:
        if not jax.tree_util.keystr(path, simple=True, separator="/").endswith("attn_c_attn/bias"):
            return leaf
        query, _, value = np.split(leaf, 3, axis=-1)
        return np.concatenate([query, value], axis=-1)

    return jax.tree_util.tree_map_with_path(cut, params)


@only_two
def test_an_evaluation_by_several_processes_is_that_of_one(runs: tuple[Path, Path], tmp_path: Path) -> None:
    results = []
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        command = tiny.command("evaluate", "--workdir", str(runs[1]), "--output", str(output))
        first, *others = processes.run(command, count)
        assert [first.code, *(other.code for other in others)] == [0] * count, first.stderr
        assert [line for other in others for line in other.said()] == []
        results.append(json.loads(output.read_text(encoding="utf-8")))
    one, two = results
    assert one.pop("metrics") == pytest.approx(two.pop("metrics"), rel=1e-6)
    assert one.pop("dialogues")["nll"] == pytest.approx(two.pop("dialogues")["nll"], abs=2e-4)
    assert one.keys() == two.keys() and one["counts"] == two["counts"] and one["human"] == two["human"]


@only_two
def test_replies_are_drawn_by_all_and_printed_once(runs: tuple[Path, Path]) -> None:
    command = tiny.command("generate", "--workdir", str(runs[1]), "--prompt", "is the lamp red?", "--json")
    ((one,), (first, second)) = (processes.run(command, count) for count in (1, 2))
    (reply,), (same,) = ([json.loads(line) for line in process.printed()] for process in (one, first))
    assert second.said() == []
    assert (same["reply"], same["tokens"]) == (reply["reply"], reply["tokens"])
    assert same["logprob"] == pytest.approx(reply["logprob"], rel=1e-5)


@only_two
def test_a_chat_with_several_processes_is_refused(runs: tuple[Path, Path]) -> None:
    ended = processes.run(tiny.command("generate", "--workdir", str(runs[1]), "--chat"), 2)
    assert [one.code for one in ended] == [2, 2], ended[0].stderr
    assert "--chat reads the input of one process" in ended[0].stderr and ended[1].said() == []


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
