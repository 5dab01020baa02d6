"""Steps that would spoil a run: not finite, they change nothing; a loss that jumps is undone and passed over."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax import spikes
from ssl_jax.config import Config
from ssl_jax.data.pipeline import find
from ssl_jax.data.streams import Batches
from ssl_jax.errors import Preempted, TrainingDiverged
from ssl_jax.logbook import Logbook
from ssl_jax.progress import Progress

# Long enough for a spike, short of everything that takes time.
STEPS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labeled and raw text, no rounds and hardly an evaluation."""
    folder = tmp_path_factory.mktemp("guards")
    tiny.write_data(folder)
    values = tiny.settings(folder)
    values["pseudo_labels"]["rounds"] = []
    values["train"] |= {"steps": STEPS, "pseudo_label_fraction": 0.0, "eval_steps": STEPS, "save_total_limit": STEPS}
    values["evaluation"] |= {
        "generated_replies": 0,
        "recall_examples": 0,
        "coherence_examples": 0,
        "sample_prompts": [],
    }
    return tiny.write_config(folder / "config.yaml", values)


Poison = Callable[..., None]


def not_finite(batch: dict[str, np.ndarray]) -> None:
    batch["loss_weights"] = batch["loss_weights"] * np.float32(math.nan)


def other_targets(batch: dict[str, np.ndarray]) -> None:
    """As wrong as a model that has begun to learn can be."""
    batch["targets"] = (batch["targets"] + 7) % 256


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Spoils the batches of the steps with these numbers, counted from 1, whenever they are read."""
    read = Batches.__getitem__

    def arrange(*steps: int, how: Callable[[dict[str, np.ndarray]], None] = not_finite) -> None:
        def poisoned(self: Batches, index: int) -> Any:
            batch = read(self, index)
            if self._phase.start + index + 1 in steps:
                how(batch)
            return batch

        monkeypatch.setattr(Batches, "__getitem__", poisoned)

    return arrange


def ids(config: Path) -> set[str]:
    """Of all dialogues that a run may be fed."""
    settings = Config.model_validate(yaml.safe_load(config.read_text()))
    prepared = find(settings)
    assert prepared is not None
    return {
        one.id
        for split in prepared.splits
        for one in prepared.encoded(split).__getitems__(range(len(prepared.lengths(split))))
    }


def test_a_step_that_is_not_finite_changes_nothing_and_is_noted(
    config: Path, poison: Poison, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    poison(5)
    run = tiny.run_train(config, tmp_path / "run", "--train.save-steps", "1")
    parameters = {step: tiny.stored_parameters(run, step) for step in (4, 5, 6)}
    assert parameters[4] == parameters[5] != parameters[6]
    (line,) = tiny.read_jsonl(run / "skipped.jsonl")
    assert line["step"] == 5 and line["reason"].startswith("not finite: loss nan, gradient norm ")
    assert set(line["dialogues"]) == {"labeled", "raw"}
    named = [one for names in line["dialogues"].values() for one in names]
    assert len(named) > 2 and ids(config).issuperset(named)
    said = capfd.readouterr().err
    assert f"step 5: loss or gradient is not finite; the update is skipped (dialogues of labeled: {named[0]}" in said
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


def test_too_many_in_a_row_end_the_run_and_name_step_and_dialogues(
    config: Path, poison: Poison, tmp_path: Path
) -> None:
    poison(3, 6, 7, 8)
    options = ["--train.max-nonfinite-steps", "3", "--train.save-steps", "4"]
    with pytest.raises(TrainingDiverged) as caught:
        tiny.run_train(config, tmp_path / "run", *options)
    message = str(caught.value)
    lines = tiny.read_jsonl(tmp_path / "run/skipped.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7, 8]
    assert "not finite 3 times in a row, up to step 8, with dialogues of labeled: " in message
    assert lines[-1]["dialogues"]["labeled"][0] in message
    assert "the last good checkpoint is 4; lower optimizer.learning_rate" in message
    assert caught.value.exit_code == 3 and message.count("\n") == 1
    poison()
    run = tiny.run_train(config, tmp_path / "run", *options)
    assert tiny.read_jsonl(run / "skipped.jsonl") == lines[:1], "what was after the checkpoint is forgotten"
    assert [line["step"] for line in tiny.metrics(run) if "loss" in line] == list(range(1, STEPS + 1))


SPIKES = ["--train.loss-spike-threshold", "5", "--train.loss-spike-window", "8", "--train.loss-spike-skip", "3"]


def test_a_loss_that_jumps_is_undone_and_its_batches_passed_over(
    config: Path, poison: Poison, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    poison(15, how=other_targets)
    run = tiny.run_train(config, tmp_path / "run", *SPIKES)
    lines = tiny.read_jsonl(run / "skipped.jsonl")
    assert [line["step"] for line in lines] == [13, 14, 15] and all(line["dialogues"]["labeled"] for line in lines)
    assert lines[0]["reason"].startswith("passed over: the loss of step 15, ")
    assert "the loss of step 15" in (said := capfd.readouterr().err)
    assert "going back to checkpoint 12 and passing over the batches of steps 13 to 15" in said
    learned = [line["step"] for line in tiny.metrics(run) if "loss" in line]
    assert learned == [step for step in range(1, STEPS + 1) if step not in (13, 14, 15)]
    undisturbed = tiny.run_train(config, tmp_path / "undisturbed")
    for line, other in zip(tiny.metrics(run), tiny.metrics(undisturbed), strict=False):
        if line["step"] < 13:
            assert line == other, "until then nothing has happened"


def test_an_interrupted_run_goes_back_as_an_undisturbed_one(
    config: Path, poison: Poison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever checkpoints an interruption leaves: also one between the batches that are passed over."""
    poison(15, how=other_targets)
    undisturbed = tiny.run_train(config, tmp_path / "undisturbed", *SPIKES)
    write = Logbook.metrics

    def stop_at(number: int) -> Callable[..., None]:
        def watched(self: Logbook, step: int, values: Any) -> None:
            write(self, step, values)
            if step == number:
                os.kill(os.getpid(), signal.SIGTERM)

        return watched

    for number in (10, 13, 17):  # before the spike, amid the batches, behind them
        with monkeypatch.context() as patch:
            patch.setattr(Logbook, "metrics", stop_at(number))
            with pytest.raises(Preempted):
                tiny.run_train(config, tmp_path / "run", *SPIKES)
    assert tiny.checkpoint_steps(tmp_path / "run")[-1] > 15
    run = tiny.run_train(config, tmp_path / "run", *SPIKES)
    skipped = (undisturbed / "skipped.jsonl").read_bytes()
    assert skipped and (run / "skipped.jsonl").read_bytes() == skipped
    assert tiny.stored_parameters(run) == tiny.stored_parameters(undisturbed)
    assert tiny.metrics(run) == tiny.metrics(undisturbed)


def test_a_run_that_goes_back_too_often_has_diverged(config: Path, poison: Poison, tmp_path: Path) -> None:
    poison(*range(14, STEPS), how=other_targets)
    with pytest.raises(TrainingDiverged, match=r"the loss of step 1\d, .* after 2 rollbacks .*\n.*checkpoint is 12"):
        tiny.run_train(config, tmp_path / "run", *SPIKES, "--train.max-rollbacks", "2")


def test_without_a_threshold_nothing_is_undone(config: Path, poison: Poison, tmp_path: Path) -> None:
    poison(15, how=other_targets)
    run = tiny.run_train(config, tmp_path / "run")
    assert not (run / "skipped.jsonl").exists()
    assert [line["step"] for line in tiny.metrics(run) if "loss" in line] == list(range(1, STEPS + 1))


# The rule -------------------------------------------------------------------------------------------------------------


def test_a_spike_is_far_above_the_mean_in_standard_deviations() -> None:
    losses = [9.0, *[2.0, 4.0] * 4]  # the last eight have mean 3 and deviation 1
    assert spikes.find(10, 5.9, losses, window=8, threshold=3.0) is None
    assert spikes.find(10, 6.1, losses, window=8, threshold=3.0) == spikes.Spike(10, 6.1, 3.0, 1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -100.0, 0.0, 3.02])
def test_what_is_no_spike(loss: float) -> None:
    """What is not finite is another guard's; a fall is none; losses that do not vary are no measure."""
    assert spikes.find(9, loss, [3.0] * 8, window=8, threshold=1.0) is None


def test_with_too_few_losses_there_is_no_spike() -> None:
    assert spikes.find(8, 1e9, [3.0, 4.0] * 3, window=8, threshold=1.0) is None


@given(st.lists(st.floats(0.1, 100), min_size=8, max_size=8), st.floats(0.5, 20), st.floats(0.01, 100))
def test_it_does_not_depend_on_the_unit(losses: list[float], threshold: float, unit: float) -> None:
    mean, deviation = np.mean(losses), max(np.std(losses), 0.01 * abs(np.mean(losses)))
    for factor, expected in ((0.99, False), (1.01, True)):
        loss = float(mean + factor * threshold * deviation) * unit
        found = spikes.find(9, loss, [one * unit for one in losses], window=8, threshold=threshold)
        assert (found is not None) == expected


def test_rollbacks_are_saved_with_a_checkpoint() -> None:
    rollbacks = [
        spikes.Rollback(spikes.Spike(7, 9.5, 2.25, 0.5), 4, (5, 7)),
        spikes.Rollback(spikes.Spike(11, 9.25, 2.25, 0.5), 8, (11, 11)),
    ]
    found = Progress.from_meta(json.loads(json.dumps(Progress(rollbacks=rollbacks).to_meta())))
    assert found.rollbacks == rollbacks
    assert {step: spike.step for step, spike in spikes.passed_over(rollbacks).items()} == {5: 7, 6: 7, 7: 7, 11: 11}
