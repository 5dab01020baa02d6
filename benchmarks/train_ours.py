"""Our contestant: a run's own compiled step, fed as a run feeds it. `python benchmarks/train_ours.py WORKLOAD_JSON`."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from alternate import Turns
from workload import Device, Workload

from ssl_jax import config, hardware, model, objectives, plan, sharding
from ssl_jax.data.streams import Batches
from ssl_jax.data.tokenizer import EncodedDialogue
from ssl_jax.loop import Run
from ssl_jax.signals import Signals

_STEPS = 10**6
_DIALOGUES = 4096
# Large enough that starting the product does not count, small enough for a moment.
_LIMIT_SIZE: dict[Device, int] = {"cpu": 1024, "cuda": 8192}
_LIMIT_REPEATS = 20


class RandomDialogues:
    """Prepared data that need no preparation: every dialogue is random and fills a row."""

    def __init__(self, workload: Workload) -> None:
        shape = (_DIALOGUES, workload.sequence_length + 1)
        tokens = np.random.default_rng(0).integers(0, workload.vocab_size, shape, np.int32)
        mask = np.ones(workload.sequence_length + 1, np.uint8)
        self._dialogues = [EncodedDialogue(str(n), row, mask, 0, 0, 0) for n, row in enumerate(tokens)]
        self.tokenizer = SimpleNamespace(vocab_size=workload.vocab_size)
        self.splits = ("labeled_train", "raw_train", "prompt_train")

    def encoded(self, split: str) -> Sequence[EncodedDialogue]:
        """The same dialogues for every split."""
        return self._dialogues

    def lengths(self, split: str) -> np.ndarray:
        """int32[N]."""
        return np.array([len(dialogue.tokens) for dialogue in self._dialogues], np.int32)

    def prefix_lengths(self, split: str) -> np.ndarray:
        """int32[N], zeros."""
        return np.zeros(len(self._dialogues), np.int32)


class Training:
    """A run without its events: no evaluation, no log, no checkpoint."""

    def __init__(self, workload: Workload) -> None:
        prepared: Any = RandomDialogues(workload)
        self._device: Device = workload.device
        self.run = Run(make_config(workload), prepared, Path("unused"), Signals())
        self.key = jax.device_put(jax.random.key(0), sharding.replicated(self.run.mesh))
        streams = {**self.run.streams, "pseudo": self.run.streams["labeled"]}
        # The last phase has all streams that a run ever has.
        self._batches = Batches(
            self.run.plan.phases()[-1],
            streams,
            objectives.STREAM_IDS,
            sequence_length=workload.sequence_length,
        ).read()
        self.state = self.run.initial_state()

    def next_batch(self) -> dict[str, jax.Array]:
        """The next batch, on the device."""
        return sharding.put_rows(next(self._batches), self.run.mesh)

    def take(self, steps: int) -> dict[str, float]:
        """Takes steps as `Run` does; `seconds` they took, `data_seconds` of them waited for data, last `loss`."""
        started, waited, late = time.perf_counter(), 0.0, None
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self._batches)
            waited += time.perf_counter() - asked
            with jax.transfer_guard("disallow"):
                self.state, metrics = self.run.programs.train_step(
                    self.state, sharding.put_rows(batch, self.run.mesh), self.key
                )
            if late is not None:
                jax.device_get(late)
            late = metrics
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - started
        assert late is not None
        return {"seconds": seconds, "data_seconds": waited, "loss": float(late["loss"])}

    def describe(self) -> dict[str, Any]:
        """`parameters`, `flops_per_token`, `dtype`, `attention`, `device` and its `peak_flops`, with its origin."""
        shape, kind = self.run.shape, jax.devices()[0].device_kind
        chip, size = hardware.chip_of(kind), _LIMIT_SIZE[self._device]
        known = chip.peak if chip is not None else None
        return {
            "parameters": plan.parameter_count(shape),
            "flops_per_token": plan.flops_per_token(shape, self.run.config.train.sequence_length),
            "dtype": str(shape.dtype),
            "attention": shape.attn_implementation,
            "device": kind,
            "peak_flops": known or matmul_flops(shape.dtype, size),
            "peak_from": "data sheet" if known else f"measured product of {size} × {size} matrices",
        }


def matmul_flops(dtype: Any, size: int) -> float:
    """The best of a few products of large square matrices, FLOP/s: what this device gives to whom it gives most."""
    multiply = jax.jit(jnp.matmul)
    matrix = jnp.ones((size, size), dtype)
    multiply(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(_LIMIT_REPEATS):
        started = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def make_config(workload: Workload) -> config.Config:
    """The run's configuration; what the peer does not have is switched off."""
    ratio, rate = workload.unlabeled_ratio, workload.learning_rate
    return config.Config(
        model=config.Model(
            **workload.model_dump(include={"n_layer", "n_embd", "n_head", "vocab_size", "n_positions"}),
            resid_pdrop=workload.dropout,
            embd_pdrop=workload.dropout,
            attn_pdrop=workload.dropout,
            # As in configs/quickstart.yaml: blocks that lie apart need not be cut out of a stack at every step.
            scan_layers=workload.device != "cpu",
        ),
        train=config.Train(
            steps=_STEPS,
            per_device_train_batch_size=workload.labeled_rows,
            sequence_length=workload.sequence_length,
            window_overlap=0,
            unlabeled_ratio=ratio,
            pseudo_label_fraction=0.5,
            labeled_only_fraction=0.0,
        ),
        optimizer=config.Optimizer(
            learning_rate=rate,
            warmup_steps=0,
            lr_scheduler_type="constant",
            ema_decay=0.99 if workload.averaged or workload.taught_by_average else 0.0,
        ),
        distillation=config.Distillation(weight=float(workload.taught_by_average)),
        pseudo_labels=config.PseudoLabels(rounds=(0.5,) if ratio else ()),
        evaluation=config.Evaluation(max_prompt_tokens=8, sampling=config.Sampling(max_new_tokens=8)),
    )


def random_model(workload: Workload) -> tuple[model.GPT2, model.Params]:
    """A model as replies are drawn from, its blocks apart, and random weights in the type that it computes in."""
    stacked = model.GPT2.from_config(make_config(workload).model, workload.vocab_size)

    @jax.jit
    def make() -> model.Params:
        return model.unstack(stacked, model.init(stacked, jax.random.key(0)))

    params = jax.tree.map(lambda leaf: leaf.astype(stacked.dtype), make())
    return dataclasses.replace(stacked, scan_layers=False), params


def main() -> None:
    """Gets ready, then takes as many steps as it is told, turn after turn."""
    turns = Turns()
    training = Training(Workload.model_validate_json(sys.argv[1]))
    turns.ready(training.describe())
    while (steps := turns.wait()) is not None:
        turns.answer(training.take(steps))


if __name__ == "__main__":
    main()
