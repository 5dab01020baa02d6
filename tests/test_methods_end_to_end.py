"""All semi-supervised methods in one run: one compiled step, every stream fed, resumed to the bit."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny

from ssl_jax.errors import Preempted, UserError
from ssl_jax.logbook import Logbook
from ssl_jax.pseudo_labels import rounds

EVERYTHING = [
    "--tokenizer.direction-tokens=true",
    "--train.unlabeled-ratio=4",
    "--train.pseudo-label-fraction=0.25",
    "--train.back-translation-fraction=0.25",
    "--train.backward-fraction=0.25",
    "--train.raw-roles=alternate",
    "--train.token-replacement=0.05",
    "--objectives.r-drop=0.5",
    "--objectives.lm-final=0.3",
    "--distillation.weight=0.5",
    "--distillation.streams=[labeled, pseudo]",
    "--distillation.weighting=softmatch",
    "--pseudo-labels.rounds=[0.4, 0.7]",
    "--pseudo-labels.replies-per-round=16",
    "--pseudo-labels.prior-weight=0.5",
    "--pseudo-labels.backward-weight=0.5",
    "--pseudo-labels.noise.word-dropout=0.2",
    "--pseudo-labels.student=reinitialized",
    "--evaluation.generated-replies=0",
    "--evaluation.coherence-examples=0",
]


@functools.cache
def finished() -> Path:
    return tiny.run_train(tiny.config_file(), tiny.scratch() / "everything", *EVERYTHING)


def summary(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


def test_every_stream_is_fed_through_one_compiled_step() -> None:
    found = summary(finished())
    assert found["train_step_compilations"] == 1
    assert all(count > 0 for count in found["tokens_by_stream"].values()), found["tokens_by_stream"]
    assert len(found["pseudo_labels_accepted"]) == len(found["back_translations_accepted"]) == 2
    terms = {name for line in tiny.metrics(finished()) for name in line if name.startswith("loss/")}
    objectives = ("supervised", "lm", "pseudo", "back_translation", "backward", "distillation", "r_drop")
    assert terms == {f"loss/{name}" for name in objectives}


def test_every_logged_loss_is_the_weighted_sum_of_its_terms_r_drop_counting_half() -> None:
    lines = [line for line in tiny.metrics(finished()) if "loss" in line]
    for line in lines[:2]:  # the divergence of R-Drop is weighted by objective, and here all of them weigh 1
        names = [name.removeprefix("loss/") for name in line if name.startswith("loss/") and name != "loss/r_drop"]
        total = sum(line[f"loss/{name}"] * line[f"weight/{name}"] for name in names)
        assert line["loss"] >= total - 1e-3


def test_back_translated_dialogues_end_in_real_text() -> None:
    real = {line for row in tiny.raw() for line in row["text"].splitlines()}
    for number in range(2):
        for dialogue in rounds.read_round(finished() / "back_translations", number):
            assert [turn.role for turn in dialogue.turns] == ["user", "assistant"]
            assert dialogue.turns[-1].content in real


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["pseudo-label: round 0, replies", "pseudo-label: round 1, contexts", "step 10/"])
def test_a_run_that_is_interrupted_ends_as_the_undisturbed_one(
    moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    undisturbed = finished()
    phase, metrics = Logbook.phase, Logbook.metrics

    def watch_phase(self: Logbook, name: str, detail: str = "") -> None:
        phase(self, name, detail)
        if f"{name}: {detail}".startswith(moment):
            os.kill(os.getpid(), signal.SIGTERM)

    def watch_metrics(self: Logbook, step: int, values: Any) -> None:
        metrics(self, step, values)
        if f"step {step}/" == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Logbook, "phase", watch_phase)
    monkeypatch.setattr(Logbook, "metrics", watch_metrics)
    with pytest.raises(Preempted):
        tiny.run_train(tiny.config_file(), tmp_path / "run", *EVERYTHING)
    monkeypatch.undo()
    tiny.run_train(tiny.config_file(), tmp_path / "run", *EVERYTHING)
    assert tiny.stored_parameters(tmp_path / "run") == tiny.stored_parameters(undisturbed)
    assert tiny.metrics(tmp_path / "run") == tiny.metrics(undisturbed)


def test_a_finished_run_teaches_another_and_a_stranger_is_refused(tmp_path: Path) -> None:
    teach = ["--distillation.weight=1", "--distillation.streams=[labeled]", "--evaluation.generated-replies=0"]
    teacher = ["--distillation.teachers", "ema", str(tiny.finished())]
    agreement = "--distillation.weighting=agreement"
    workdir = tiny.run_train(tiny.config_file(), tmp_path / "run", *teach, *teacher, agreement)
    lines = [line for line in tiny.metrics(workdir) if "loss/distillation" in line]
    assert len(lines) == tiny.STEPS and all(line["loss/distillation"] > 0 for line in lines)
    stranger = [*teach, *teacher, agreement, "--tokenizer.vocab-size=310"]
    with pytest.raises(UserError, match=r"distillation.teachers: .* has another tokenizer than this run"):
        tiny.run_train(tiny.config_file(), tmp_path / "other", *stranger)
