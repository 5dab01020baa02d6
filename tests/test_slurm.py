"""The SLURM script starts one run of several processes, which SLURM's variables alone bring together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow, pytest.mark.usefixtures("compiled_fast")]

# Starts its command as two tasks of one step, as srun does, and ends with the highest of their exit codes.
SRUN = """#!/usr/bin/env python
import os, subprocess, sys
command = [word for number, word in enumerate(sys.argv[1:]) if number or not word.startswith("--")]
step = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_NODES": "1"}
step |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
tasks = [
    subprocess.Popen(command, env={**os.environ, **step, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)})
    for number in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = """#!/bin/sh
echo "$@" >> "$SCONTROL_LOG"
"""


def free_job() -> int:
    """The number of a job whose port, which JAX takes from it, nobody uses."""
    for job in range(100, 4000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 61440 + job))
            except OSError:
                continue
            return job
    raise AssertionError("no free port")


def submit(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script as SLURM would on the first node of a job."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    return subprocess.run(
        ["bash", "launch/slurm.sbatch", *words],
        env={
            **tiny.environment(),
            "PATH": os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "SLURM_JOB_ID": str(free_job()),
            "SCONTROL_LOG": str(folder / "scontrol.log"),
            "JAX_NUM_CPU_DEVICES": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_two_tasks_train_one_run_and_one_of_them_speaks(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    values = tiny.settings(tmp_path)
    values["train"] |= {"gradient_accumulation_steps": 1}
    tiny.write_config(tmp_path / "config.yaml", values)
    done = submit(tmp_path, "--config", str(tmp_path / "config.yaml"), "--workdir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == values["train"]["steps"]
    assert "'data': 2" in done.stderr and done.stdout.count("talk to it:") == 1
    assert not (tmp_path / "scontrol.log").exists()


def test_a_mistake_ends_both_tasks_and_is_not_queued_again(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    tiny.write_config(tmp_path / "config.yaml", tiny.settings(tmp_path))
    done = submit(tmp_path, "--config", str(tmp_path / "config.yaml"), "--train.stepz", "3")
    assert done.returncode == 2
    assert done.stderr.count("unknown field") == 1
    assert not (tmp_path / "scontrol.log").exists()
