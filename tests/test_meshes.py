"""Any mesh gives the run that one device gives: the same loss of every objective at every step, and the same labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_fast")]

STEPS = 20
LABELED_ROWS = 8
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "tensor 2 × fsdp 4": {"data": 1, "fsdp": 4, "tensor": 2},
    "data 2 × fsdp 2 × tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}


def settings(folder: Path) -> dict[str, Any]:
    """Every stream, objective and regularizer at once, dropout among them, and a round of replies and of contexts."""
    values = tiny.settings(folder)
    values["tokenizer"]["direction_tokens"] = True
    values["train"] |= {
        "steps": STEPS,
        "per_device_train_batch_size": LABELED_ROWS,
        "unlabeled_ratio": 2,
        "pseudo_label_fraction": 0.25,
        "back_translation_fraction": 0.25,
        "backward_fraction": 0.25,
        "raw_roles": "alternate",
        "token_replacement": 0.05,
        "eval_steps": STEPS // 2,
        "save_steps": STEPS,
    }
    values["objectives"] = {"r_drop": 0.5, "lm_final": 0.3}
    values["distillation"] = {"weight": 0.5, "streams": ["raw", "pseudo"], "weighting": "softmatch"}
    values["pseudo_labels"] |= {"rounds": [0.3], "replies_per_round": 16, "backward_weight": 0.5, "prior_weight": 0.5}
    values["evaluation"] |= {"generated_replies": 0, "coherence_examples": 0, "sample_prompts": []}
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    tiny.write_data(folder)
    tiny.write_config(folder / "config.yaml", settings(folder))
    return folder


def train(folder: Path, name: str, mesh: dict[str, int], accumulation: int = 1) -> Path:
    """A run with the global batch of all the others."""
    devices = int(np.prod(list(mesh.values())))
    flags = [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
    rows = LABELED_ROWS * mesh.get("tensor", 1) // devices
    flags += [f"--train.per-device-train-batch-size={rows}", f"--train.gradient-accumulation-steps={accumulation}"]
    config, workdir = str(folder / "config.yaml"), folder / name
    ended = tiny.run_command("train", "--config", config, "--workdir", str(workdir), *flags, devices=devices)
    assert ended.returncode == 0, ended.stderr
    return workdir


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return train(folder, "one device", {"data": 1})


def test_the_run_has_every_term_in_its_loss(alone: Path) -> None:
    terms = {name for line in tiny.metrics(alone) for name in line if name.startswith("loss/")}
    names = ("supervised", "lm", "pseudo", "back_translation", "backward", "distillation", "r_drop")
    assert terms == {f"loss/{name}" for name in names}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gives_the_run_of_one_device(name: str, folder: Path, alone: Path) -> None:
    compare(train(folder, name, MESHES[name]), alone)


def test_micro_batches_give_the_run_of_whole_batches(folder: Path, alone: Path) -> None:
    compare(train(folder, "accumulation 4", {"data": 1}, accumulation=4), alone)


def compare(run: Path, alone: Path) -> None:
    """Every logged figure within 2e-5, and the same texts that the teacher made up.

    The teacher, an average of the student, is almost the student at first: a divergence of 4e-4 nats. It is the
    difference of logarithms that float32 knows to 5e-7, so that its own last digits are rounding, whatever the mesh.
    """
    ours, theirs = tiny.metrics(run), tiny.metrics(alone)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        for name, value in line.items():
            what, nats = f"{name} of step {line['step']}", 1e-7 if name == "loss/distillation" else 0.0
            np.testing.assert_allclose(value, other[name], rtol=2e-5, atol=nats, err_msg=what)
    for kind in ("pseudo_labels", "back_translations"):
        summaries = [json.loads((one / kind / "round_0/summary.json").read_text()) for one in (run, alone)]
        assert summaries[0]["accepted"] == summaries[1]["accepted"] > 0
        assert summaries[0]["sha256"].keys() == summaries[1]["sha256"].keys()
