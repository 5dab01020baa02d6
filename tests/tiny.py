"""A data set and a configuration that a whole run needs seconds for: short dialogues with a rule to be learned."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

from ssl_jax import loading, train
from ssl_jax.training_streams import ROUNDS

ROOT = Path(__file__).parent.parent
THINGS = (
    "apple", "bread", "cloud", "drum", "eagle", "field", "glass", "horse", "island", "jacket", "kettle", "lamp",
    "mirror", "needle", "ocean", "pencil", "queen", "river", "stone", "table",
)  # fmt: skip
COLORS = ("red", "blue", "green", "gray", "black", "white")
STEPS, ROUND_STEP = 12, 6
# As many as a batch of everything else that is drawn, so that the sampler is compiled once.
SAMPLE_PROMPTS = tuple(f"is the {thing} red?" for thing in THINGS[:8])


def labeled(things: Iterable[str] = THINGS) -> list[dict[str, Any]]:
    """A question that names a thing and its color, and the reply that says them again."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"is the {thing} {color}?"},
                {"role": "assistant", "content": f"yes, {color} {thing}"},
            ]
        }
        for thing in things
        for color in COLORS
    ]


def raw() -> list[dict[str, Any]]:
    """Texts of the same words, nobody marked as a speaker."""
    return [{"text": f"the {thing} was here.\nit is {color}."} for thing in THINGS for color in COLORS[:3]]


def prompts() -> list[dict[str, Any]]:
    """Questions of the same form about other things, without a reply."""
    return [
        {"messages": [{"role": "user", "content": f"is the old {thing} {color}?"}]}
        for thing in THINGS
        for color in COLORS[:2]
    ]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, every line of which must be complete."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_data(folder: Path) -> None:
    """`labeled.jsonl`, `raw.jsonl` and `prompts.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "labeled.jsonl", labeled())
    write_jsonl(folder / "raw.jsonl", raw())
    write_jsonl(folder / "prompts.jsonl", prompts())


def settings(folder: Path) -> dict[str, Any]:
    """A configuration with every stream, one pseudo-labeling round, evaluations and checkpoints along the way."""
    sampling = {"max_new_tokens": 16}
    return {
        "workdir": str(folder / "run"),
        "data": {
            "labeled": [{"path": str(folder / "labeled.jsonl")}],
            "unlabeled": [{"path": str(folder / "raw.jsonl")}, {"path": str(folder / "prompts.jsonl")}],
            "prepared_dir": str(folder / "prepared"),
            "test_size": 0.3,
        },
        "tokenizer": {"vocab_size": 320},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "dtype": "float32"},
        "train": {
            "steps": STEPS,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 8,
            "sequence_length": 64,
            "unlabeled_ratio": 2,
            "pseudo_label_fraction": 0.5,
            "logging_steps": 1,
            "eval_steps": 4,
            "save_steps": 4,
        },
        "optimizer": {"learning_rate": 1.0e-2},
        "pseudo_labels": {
            "rounds": [ROUND_STEP / STEPS],
            "prompts_per_round": 24,
            "num_return_sequences": 1,
            "batch_size": len(SAMPLE_PROMPTS),
            "max_prompt_tokens": 32,
            "min_reply_tokens": 1,
            "max_repetition": 1.0,
            "max_copy": 1.0,
            "keep_fraction": 1.0,
            "sampling": sampling,
        },
        "evaluation": {
            "dev_dialogues": 8,
            "recall_examples": 4,
            "generated_replies": len(SAMPLE_PROMPTS),
            "max_prompt_tokens": 32,
            "sampling": sampling,
            "sample_prompts": list(SAMPLE_PROMPTS),
        },
    }


def write_config(path: Path, values: Mapping[str, Any]) -> Path:
    """A YAML file."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """The data and the configuration; returns the latter's path."""
    write_data(folder)
    return write_config(folder / "config.yaml", settings(folder))


@functools.cache
def scratch() -> Path:
    """A folder for what all tests of this process share; it goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="ssl_jax_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def finished() -> Path:
    """The work directory of a run that has ended well. Tests read it; one that writes works on a copy."""
    folder = scratch() / "finished"
    return run_train(write_all(folder), folder / "run")


def config_file() -> Path:
    """The configuration of `finished`, whose data lie beside it."""
    return finished().parent / "config.yaml"


def copy_of_finished(folder: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished(), folder / "copy"))


def run_train(config: Path, workdir: Path, *overrides: str) -> Path:
    """Trains in this process; returns the work directory."""
    train.main(["--config", str(config), "--workdir", str(workdir), *overrides])
    return workdir


def command(name: str, *arguments: str) -> list[str]:
    """The command as a user types it."""
    return [sys.executable, "-m", f"ssl_jax.{name}", *arguments]


def environment() -> dict[str, str]:
    """Of a child process."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_command(name: str, *arguments: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a command in a child process, on so many virtual devices, to its end."""
    variables = {**environment(), "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.run(
        command(name, *arguments), env=variables, capture_output=True, text=True, timeout=300, check=False
    )


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    clocks = {"time", "tokens_per_sec"} | {
        f"{kind}/{name}" for kind in ROUNDS for name in ("seconds", "tokens_per_sec")
    }
    return [
        {name: value for name, value in line.items() if name not in clocks}
        for line in read_jsonl(workdir / "metrics.jsonl")
    ]


def checkpoint_steps(workdir: Path) -> list[int]:
    """Steps with a manifest."""
    return sorted(int(path.parent.name) for path in workdir.glob("checkpoints/*/manifest.json"))


def stored_parameters(workdir: Path, step: int | None = None) -> dict[str, bytes]:
    """The averaged weights of a checkpoint, the newest one by default: bytes of every leaf by path."""
    model = loading.load_checkpoint(workdir, step_number=step or checkpoint_steps(workdir)[-1])
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.params)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
