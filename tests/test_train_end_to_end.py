"""A whole run, as a user starts it: what lies in the work directory, and that it can be repeated to the bit."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny
import yaml

from ssl_jax import command_line, loop, train
from ssl_jax.config import Config
from ssl_jax.data.pipeline import prepare
from ssl_jax.data.streams import PackedStream
from ssl_jax.errors import UserError
from ssl_jax.pseudo_labels import rounds
from ssl_jax.signals import Signals


@pytest.fixture(scope="module")
def run() -> Path:
    return tiny.finished()


def lines_with(workdir: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a metric."""
    return [line for line in tiny.read_jsonl(workdir / "metrics.jsonl") if name in line]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


NO_DRAWING = (
    "--evaluation.sample-prompts", "--evaluation.generated-replies=0", "--evaluation.recall-examples=0",
)  # fmt: skip
NO_ROUNDS = ("--pseudo-labels.rounds", "[]")


def test_the_work_directory_is_complete(run: Path) -> None:
    files = {"config.yaml", "data.json", "eval_test.json", "metrics.jsonl", "samples.jsonl", "summary.json"}
    assert {path.name for path in run.iterdir() if path.is_file()} == files
    folders = {"checkpoints", "pseudo_labels", "tensorboard", "tokenizer"}
    assert {path.name for path in run.iterdir() if path.is_dir()} == folders
    assert any(path.stat().st_size > 0 for path in (run / "tensorboard").glob("events.out.tfevents.*"))


def test_the_stored_configuration_is_a_valid_and_complete_one(run: Path) -> None:
    stored = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert Config.model_validate(stored).model_dump(mode="json") == stored


def test_training_lines_have_every_step_once_and_in_order(run: Path) -> None:
    assert [line["step"] for line in lines_with(run, "loss")] == list(range(1, tiny.STEPS + 1))
    times = [line["time"] for line in tiny.read_jsonl(run / "metrics.jsonl")]
    assert times == sorted(times)


def test_training_lines_have_the_keys_that_scripts_read(run: Path) -> None:
    always = {"step", "time", "tokens", "tokens_per_sec", "loss", "loss/supervised", "lr", "grad_norm"}
    streams = {"tokens/labeled", "tokens/raw", "tokens/pseudo"}
    for line in lines_with(run, "loss"):
        assert always | streams <= line.keys()
        assert ("loss/lm" in line) == (line["step"] < tiny.STEPS), "the last tenth is labeled only"
        assert ("loss/pseudo" in line) == (tiny.ROUND_STEP < line["step"] < tiny.STEPS)
        assert line["tokens"] == sum(line[name] for name in streams)


def test_tokens_of_a_stream_never_decrease_and_end_as_the_summary_says(run: Path) -> None:
    lines, summary = lines_with(run, "loss"), read(run / "summary.json")
    for name in ("labeled", "raw", "pseudo"):
        counts = [line[f"tokens/{name}"] for line in lines]
        assert counts == sorted(counts)
        assert counts[-1] == summary["tokens_by_stream"][name] > 0


def pseudo_stream(of: loop.Run) -> PackedStream:
    stream = of.sources.of_rounds("pseudo", 1)
    assert stream is not None
    return stream


def test_epochs_are_the_rows_of_a_stream_so_far_by_the_rows_of_an_epoch(run: Path) -> None:
    """Also at the end, when labeled rows alone are drawn; pseudo-labels have epochs from their first round on."""
    settings = command_line.parse(Config, ["--config", str(tiny.config_file())], program="train", summary="")
    again = loop.Run(settings, prepare(settings), run, Signals())
    streams = {**again.streams, "pseudo": pseudo_stream(again)}
    drawn = dict.fromkeys(streams, 0)
    for line, before in zip(lines_with(run, "loss"), range(tiny.STEPS), strict=True):
        for name, count in again.plan.rows_at(before, again._accepted()):
            drawn[name] += count
        found = {name.removeprefix("epoch/"): value for name, value in line.items() if name.startswith("epoch/")}
        assert found == {
            name: streams[name].passes(rows) for name, rows in drawn.items() if name in again.streams or rows
        }
    assert all(value > 0 for value in found.values()) and found.keys() == streams.keys()
    first = lines_with(run, "loss")[0]
    assert first["epoch/labeled"] == again.plan.labeled_rows / streams["labeled"].rows_in_epoch(0)


def test_the_loss_is_the_weighted_sum_of_its_terms(run: Path) -> None:
    for line in lines_with(run, "loss"):
        terms = [name for name in ("supervised", "lm", "pseudo") if f"loss/{name}" in line]
        expected = sum(line[f"weight/{name}"] * line[f"loss/{name}"] for name in terms)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_learns(run: Path) -> None:
    supervised = [line["loss/supervised"] for line in lines_with(run, "loss")]
    assert supervised[-1] < 0.75 * supervised[0]
    dev = [line["eval/reply_bits_per_byte"] for line in lines_with(run, "eval/reply_bits_per_byte")]
    assert dev[-1] < dev[0]


def test_evaluations_come_at_their_interval_and_the_best_one_is_remembered(run: Path) -> None:
    lines = lines_with(run, "eval/reply_bits_per_byte")
    assert [line["step"] for line in lines] == [4, 8, 12]
    best = min(lines, key=lambda line: line["eval/reply_bits_per_byte"])
    summary = read(run / "summary.json")
    assert summary["best_dev_reply_bits_per_byte"] == best["eval/reply_bits_per_byte"]
    assert summary["checkpoint"] == best["step"]


def test_samples_are_replies_to_the_fixed_prompts_at_every_evaluation(run: Path) -> None:
    rows = tiny.read_jsonl(run / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (4, 8, 12) for prompt in tiny.SAMPLE_PROMPTS
    ]
    assert all(isinstance(row["reply"], str) for row in rows)


def test_every_kept_checkpoint_has_its_manifest(run: Path) -> None:
    folders = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert folders == tiny.checkpoint_steps(run)
    assert folders[-1] == tiny.STEPS


def test_a_pseudo_labeling_round_is_stored_and_logged(run: Path) -> None:
    (line,) = lines_with(run, "pseudo/accept_rate")
    stored = read(run / "pseudo_labels" / "round_0" / "summary.json")
    assert line["step"] - 1 == stored["teacher_step"] == tiny.ROUND_STEP
    assert (line["pseudo/generated"], line["pseudo/accepted"]) == (stored["generated"], stored["accepted"])
    assert line["pseudo/accept_rate"] == stored["accept_rate"] == stored["accepted"] / stored["prompts"]
    dialogues = rounds.read_round(run / "pseudo_labels", 0)
    assert len(dialogues) == stored["accepted"] > 0
    assert all(dialogue.kind == "labeled" and dialogue.turns[0].content in questions() for dialogue in dialogues)


def questions() -> set[str]:
    return {row["messages"][0]["content"] for row in tiny.prompts()}


def test_the_summary_holds_the_final_evaluation(run: Path) -> None:
    summary, evaluation = read(run / "summary.json"), read(run / "eval_test.json")
    assert (summary["exit"], summary["steps"]) == (0, tiny.STEPS)
    assert summary["evaluation"] == evaluation["metrics"] and summary["human"] == evaluation["human"]
    likelihood = {"reply_bits_per_byte", "reply_nll", "recall_at_1_of_20", "mrr"}
    statistics = {"distinct_1", "distinct_2", "entropy_4", "length_ratio", "repetition_4"}
    assert likelihood | statistics <= summary["evaluation"].keys()
    assert statistics <= summary["human"].keys()
    dialogues = evaluation["dialogues"]
    assert len(dialogues["id"]) == evaluation["counts"]["dialogues"] == len(set(dialogues["id"]))
    bits = sum(dialogues["nll"]) / sum(dialogues["bytes"]) / 0.6931471805599453
    assert bits == pytest.approx(summary["evaluation"]["reply_bits_per_byte"], rel=1e-4)


def test_the_step_is_compiled_once_for_all_phases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labeled and raw, then pseudo-labels too, then labeled alone: JAX's own log agrees with the summary."""
    config = tiny.config_file()
    with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
        workdir = tiny.run_train(config, tmp_path / "run", *NO_DRAWING)
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert len([message for message in compiled if re.search(r"\btrain_step\b", message)]) == 1, compiled
    assert read(workdir / "summary.json")["train_step_compilations"] == 1
    assert read(workdir / "summary.json")["tokens_by_stream"]["pseudo"] > 0


def test_the_stored_configuration_repeats_the_run_to_the_bit(run: Path, tmp_path: Path) -> None:
    again = tiny.run_train(run / "config.yaml", tmp_path / "again")
    assert tiny.metrics(again) == tiny.metrics(run)
    assert tiny.stored_parameters(again) == tiny.stored_parameters(run)
    assert read(again / "eval_test.json") == read(run / "eval_test.json")
    for path in (run / "pseudo_labels" / "round_0").iterdir():
        assert (again / "pseudo_labels" / "round_0" / path.name).read_bytes() == path.read_bytes()
    assert tiny.read_jsonl(again / "samples.jsonl") == tiny.read_jsonl(run / "samples.jsonl")


def test_another_seed_is_another_run(run: Path, tmp_path: Path) -> None:
    other = tiny.run_train(tiny.config_file(), tmp_path / "run", *NO_DRAWING, "--seed", "1")
    assert tiny.stored_parameters(other) != tiny.stored_parameters(run)
    # From the first step on: initial weights and data order follow the seed.
    assert all(
        one["loss"] != two["loss"] for one, two in zip(lines_with(other, "loss"), lines_with(run, "loss"), strict=True)
    )


def test_a_finished_run_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, started = snapshot(run), time.monotonic()
    tiny.run_train(tiny.config_file(), run)
    assert time.monotonic() - started < 5
    assert snapshot(run) == before
    printed = capsys.readouterr().out
    assert "is done: 12 steps" in printed and "reply_bits_per_byte" in printed and "ssl_jax.generate" in printed


def test_settings_that_change_nothing_of_the_result_may_differ_when_a_run_goes_on(run: Path) -> None:
    before = snapshot(run)
    tiny.run_train(tiny.config_file(), run, "--train.logging-steps", "7", "--train.save-total-limit", "9")
    assert snapshot(run) == before


def test_labeled_data_alone(tmp_path: Path) -> None:
    options = ["--data.unlabeled", "[]", "--train.unlabeled-ratio=0", "--train.per-device-train-batch-size=6"]
    workdir = tiny.run_train(tiny.config_file(), tmp_path / "run", *NO_DRAWING, *NO_ROUNDS, *options)
    tokens = read(workdir / "summary.json")["tokens_by_stream"]
    assert tokens["labeled"] > 0 and tokens["raw"] == tokens["pseudo"] == 0
    assert not lines_with(workdir, "loss/lm") and not (workdir / "pseudo_labels").exists()


def test_raw_text_without_prompts(tmp_path: Path) -> None:
    raw = tiny.config_file().with_name("raw.jsonl")
    options = ["--data.unlabeled", f"[{{path: {raw}}}]"]
    workdir = tiny.run_train(tiny.config_file(), tmp_path / "run", *NO_DRAWING, *NO_ROUNDS, *options)
    tokens = read(workdir / "summary.json")["tokens_by_stream"]
    assert tokens["raw"] > 0 and tokens["pseudo"] == 0
    assert lines_with(workdir, "loss/lm")


def test_prompts_without_raw_text(tmp_path: Path) -> None:
    """Until the first round has answered them, their rows are labeled ones."""
    prompts = tiny.config_file().with_name("prompts.jsonl")
    options = ["--data.unlabeled", f"[{{path: {prompts}}}]", "--train.prompts-as-text", "false"]
    workdir = tiny.run_train(tiny.config_file(), tmp_path / "run", *NO_DRAWING, *options)
    tokens = read(workdir / "summary.json")["tokens_by_stream"]
    assert tokens["raw"] == 0
    lines = lines_with(workdir, "loss")
    assert [line["tokens/pseudo"] > 0 for line in lines] == [line["step"] > tiny.ROUND_STEP for line in lines]


def test_no_dev_split(tmp_path: Path) -> None:
    """Nothing says which checkpoint is the best, so the last one is served."""
    workdir = tiny.run_train(tiny.config_file(), tmp_path / "run", *NO_DRAWING, "--data.dev-size", "0")
    summary = read(workdir / "summary.json")
    assert summary["best_dev_reply_bits_per_byte"] is None and summary["checkpoint"] == tiny.STEPS
    assert not lines_with(workdir, "eval/reply_bits_per_byte")
    assert summary["evaluation"]["reply_bits_per_byte"] > 0


def test_sources_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the raw text, all prompts' answers twice; the same prepared data and the same labeled rows as without."""
    folder = tiny.config_file().parent
    unlabeled = f"[{{path: {folder}/raw.jsonl, weight: 0.5}}, {{path: {folder}/prompts.jsonl, weight: 2}}]"
    options = ["--data.unlabeled", unlabeled, "--train.prompts-as-text", "false"]
    workdir = tiny.run_train(tiny.config_file(), tmp_path / "run", *NO_DRAWING, *options)
    printed = capsys.readouterr().err
    assert f"weights         {folder}/raw.jsonl × 0.5, {folder}/prompts.jsonl × 2 (" in printed
    arguments = ["--config", str(workdir / "config.yaml")]
    settings = command_line.parse(Config, arguments, program="train", summary="")
    prepared = prepare(settings)
    assert prepared.directory == prepare(Config.model_validate(tiny.settings(folder))).directory
    weighted = loop.Run(settings, prepared, workdir, Signals())
    values = tiny.settings(folder)
    values["train"]["prompts_as_text"] = False
    plain = loop.Run(Config.model_validate(values), prepared, workdir, Signals())

    tokens = [
        {
            **{name: stream.tokens_in_epoch(0) for name, stream in one.streams.items()},
            "pseudo": pseudo_stream(one).tokens_in_epoch(0),
        }
        for one in (weighted, plain)
    ]
    assert tokens[0]["labeled"] == tokens[1]["labeled"]
    assert tokens[0]["raw"] == pytest.approx(tokens[1]["raw"] / 2, rel=0.1)
    assert tokens[0]["pseudo"] == 2 * tokens[1]["pseudo"] > 0


def test_epochs_instead_of_steps(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    values = tiny.settings(tiny.config_file().parent)
    del values["train"]["steps"]
    tiny.write_config(config, values)

    def steps(epochs: str) -> int:
        arguments = ["--config", str(config), "--train.num-train-epochs", epochs]
        settings = command_line.parse(Config, arguments, program="train", summary="")
        return loop.Run(settings, prepare(settings), tmp_path / "run", Signals()).plan.total_steps

    one, ten = steps("1"), steps("10")
    assert one > 1 and ten in range(10 * one - 9, 10 * one + 1)


def test_a_few_malformed_rows_are_counted_and_do_not_stop_a_run(tmp_path: Path) -> None:
    config = tiny.write_all(tmp_path)
    labeled = tmp_path / "labeled.jsonl"
    labeled.write_text(labeled.read_text() + "{torn\n" + '{"messages": 3}\n', encoding="utf-8")
    workdir = tiny.run_train(config, tmp_path / "run", *NO_DRAWING)
    assert sum(read(workdir / "data.json")["rejected"].values()) == 2


def test_data_that_changed_since_the_run_began_are_refused(tmp_path: Path) -> None:
    """A fitted tokenizer follows the data: going on would mean other texts by the same ids."""
    config = tiny.write_all(tmp_path)
    workdir = tiny.run_train(config, tmp_path / "run", *NO_DRAWING)
    os.remove(workdir / "summary.json")
    rows = [*tiny.labeled(), {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}]
    tiny.write_jsonl(tmp_path / "labeled.jsonl", rows)
    with pytest.raises(UserError, match="have changed since the run began"):
        train.main(["--config", str(config), "--workdir", str(workdir), *NO_DRAWING])
