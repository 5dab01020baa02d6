"""A run goes on where it stopped on other devices and in other processes: the same state, the same rows to come."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import tiny

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.usefixtures("compiled_fast")]

LABELED_ROWS = 8

# Prints digests of every leaf of the state that a run would go on with, and of the rows of its next steps.
PROGRAM = """
    import hashlib, itertools, json, sys
    from pathlib import Path

    import jax
    import numpy as np

    from ssl_jax import command_line, distributed, objectives, sharding
    from ssl_jax.config import Config
    from ssl_jax.data.pipeline import prepare
    from ssl_jax.data.streams import Batches
    from ssl_jax.loop import Run
    from ssl_jax.signals import Signals

    def digest(array):
        return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()

    def main(arguments):
        config = command_line.parse(Config, arguments, program="", summary="")
        distributed.join()
        run = Run(config, prepare(config, lambda _: None), Path(config.workdir), Signals())
        newest = run.checkpoints.newest()
        state, _ = run._restore(newest)
        fetched = jax.tree.leaves_with_path(sharding.fetch(state))
        leaves = {jax.tree_util.keystr(path): digest(leaf) for path, leaf in fetched}
        batches = Batches(
            next(run._phases(newest)), run.streams, objectives.STREAM_IDS,
            sequence_length=config.train.sequence_length,
            rows=sharding.local_rows(run.mesh, run.plan.rows),
        )
        steps = [
            [
                digest(np.concatenate([np.ravel(batch[name][row]) for name in sorted(batch)]))
                for row in range(len(batch["tokens"]))
            ]
            for batch in itertools.islice(batches.read(), 3)
        ]
        print("FOUND " + json.dumps({"step": newest, "leaves": leaves, "steps": steps}))

    command_line.run(main)
"""


def flags(devices: int) -> list[str]:
    return ["--train.per-device-train-batch-size", str(LABELED_ROWS // devices)]


def fsdp(devices: int) -> list[str]:
    return ["--mesh.data", "1", "--mesh.fsdp", str(devices)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`: the run of two processes of four devices; `half`: what its work directory was half way."""
    folder = tmp_path_factory.mktemp("elastic")
    tiny.write_data(folder)
    values = tiny.settings(folder)
    values["pseudo_labels"]["rounds"] = []
    values["train"] |= {"steps": 8, "pseudo_label_fraction": 0.0, "save_total_limit": 4, "token_replacement": 0.05}
    values["evaluation"] |= {"generated_replies": 0, "recall_examples": 0, "sample_prompts": []}
    tiny.write_config(folder / "config.yaml", values)
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    words = ["--config", str(folder / "config.yaml"), "--workdir", str(folder / "whole"), *flags(8), *fsdp(8)]
    for ended in processes.run(tiny.command("train", *words), 2, 4):
        assert ended.code == 0, ended.stderr
    shutil.copytree(folder / "whole", folder / "half")
    shutil.rmtree(folder / "half/checkpoints/8")
    (folder / "half/summary.json").unlink()
    return folder


def found(folder: Path, count: int, devices: int, mesh: list[str]) -> list[dict[str, Any]]:
    words = ["--config", str(folder / "config.yaml"), "--workdir", str(folder / "half"), *flags(count * devices), *mesh]
    ended = processes.run([sys.executable, str(folder / "program.py"), *words], count, devices)
    assert all(one.code == 0 for one in ended), ended[0].stderr
    lines = [line for one in ended for line in one.stdout.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


def test_state_and_rows_to_come_are_those_of_the_run_on_any_devices(folder: Path) -> None:
    first, second = found(folder, 2, 4, fsdp(8))
    assert first["step"] == 4 and first["leaves"] == second["leaves"] and len(first["leaves"]) > 20
    steps = [one + other for one, other in zip(first["steps"], second["steps"], strict=True)]
    for devices, mesh in ((1, []), (2, ["--mesh.tensor", "2"]), (4, fsdp(4))):
        # A mesh with a tensor axis has fewer devices that see different rows.
        rows = ["--train.per-device-train-batch-size", str(LABELED_ROWS)] if "--mesh.tensor" in mesh else []
        (other,) = found(folder, 1, devices, [*mesh, *rows])
        assert other["leaves"] == first["leaves"]
        assert other["steps"] == steps


@pytest.mark.parametrize("devices", [1, 4])
def test_the_run_goes_on_to_the_same_end(folder: Path, devices: int) -> None:
    there = folder / f"on {devices}"
    shutil.copytree(folder / "half", there)
    words = ["--config", str(folder / "config.yaml"), "--workdir", str(there), *flags(devices)]
    ended = tiny.run_command("train", *words, devices=devices)
    assert ended.returncode == 0, ended.stderr
    curves = [
        [(line["step"], line["loss"]) for line in tiny.read_jsonl(run / "metrics.jsonl") if "loss" in line]
        for run in (folder / "whole", there)
    ]
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]] == list(range(1, 9))
    np.testing.assert_allclose([loss for _, loss in curves[1]], [loss for _, loss in curves[0]], rtol=2e-5)


def test_other_rows_a_step_are_refused_with_what_to_set(folder: Path) -> None:
    words = ["--config", str(folder / "config.yaml"), "--workdir", str(folder / "half"), *flags(8)]
    ended = tiny.run_command("train", *words, devices=2)
    assert ended.returncode == 2
    assert "gives 2 labeled rows a step, and the run has 8; set it to 4" in ended.stderr
