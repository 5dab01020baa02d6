"""Mistakes that people make, through the commands as they run them: exit code 2 and a line that names the fix."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny

from ssl_jax import command_line, evaluate, generate, train

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must end with exit code 2 and at most two lines; returns them."""

    def run(main: Callable[..., None], *arguments: str) -> str:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as exit_:
            command_line.run(main)
        message = capfd.readouterr().err
        assert exit_.value.code == 2, message
        assert message.startswith("error: ") and message.count("\n") <= 2, message
        assert "Traceback" not in message
        return message

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that would run, with its data beside it."""
    return tiny.write_all(tmp_path)


def rewrite(config: Path, **sections: Mapping[str, Any]) -> None:
    """Updates sections of a configuration file."""
    values = tiny.settings(config.parent)
    tiny.write_config(config, {**values, **{name: {**values[name], **fields} for name, fields in sections.items()}})


def test_cleaning_that_leaves_nothing(refused: Refused, config: Path) -> None:
    rewrite(config, data={"cleaning": [{"step": "length", "min_turns": 99}]})
    message = refused(train.main, "--config", str(config))
    assert "nothing is left to train on; removed" in message and "let data.cleaning" in message


def test_a_misspelled_file_suggests_the_one_beside_it(refused: Refused, config: Path) -> None:
    message = refused(train.main, "--config", str(config.with_name("confg.yaml")))
    assert "no such file" in message and f"did you mean {config}?" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.stepz", "3"], r"--train\.stepz: unknown field; did you mean train\.steps\?"),
        (["--train.steps", "many"], r"--train\.steps: .*integer.*got 'many'"),
        (["--train.steps", "0"], r"--train\.steps: .*greater than or equal to 1"),
        (["--train.num-train-epochs", "2"], r"steps .*num_train_epochs"),
        (["--train.sequence-length", "65"], r"train\.sequence_length 65 exceeds model\.n_positions 64"),
        (["--pseudo-labels.rounds", "0.5", "0.25"], r"pseudo_labels.*increasing fractions"),
        (["--pseudo-labels.rounds", "0.5", "0.51"], r"pseudo_labels\.rounds: 2 rounds do not fit into 12 steps"),
        (
            ["--train.gradient-accumulation-steps", "4"],
            r"gradient_accumulation_steps 4 does not divide the 6 rows of each device",
        ),
        (["--mesh.tensor", "2"], r"mesh"),
        (["--mesh.data", "3"], r"mesh"),
        (
            ["--train.unlabeled-ratio", "0"],
            r"train\.unlabeled_ratio 0 and .* leave no rows.*--pseudo-labels\.rounds \[\]",
        ),
        (["--tokenizer.vocab-size", "10"], r"--tokenizer\.vocab.size: .*300"),
        (["--tokenizer.name-or-path", "no//such"], r"tokenizer\.name_or_path: .*no//such"),
        (["--model.n-embd", "65536", "--model.n-layer", "512"], r"GB on each device, .*model\.n_layer, n_embd"),
        (
            ["--train.per-device-train-batch-size", "65536", "--train.unlabeled-ratio", "1000"],
            r"GB on each device, .*train\.per_device_train_batch_size, train\.unlabeled_ratio",
        ),
        (["--seed=1", "train.steps", "3"], r"unexpected argument 'train\.steps'"),
    ],
)
def test_a_flag_that_cannot_be(refused: Refused, config: Path, arguments: list[str], expected: str) -> None:
    assert re.search(expected, refused(train.main, "--config", str(config), *arguments))


def test_an_unknown_field_in_the_file_is_named_with_the_file(refused: Refused, config: Path) -> None:
    rewrite(config, optimizer={"learning_rat": 1e-3})
    message = refused(train.main, "--config", str(config))
    assert f"{config}: optimizer.learning_rat: unknown field; did you mean optimizer.learning_rate?" in message


def test_a_file_that_is_not_yaml(refused: Refused, config: Path) -> None:
    config.write_text("train: {steps: 3\n", encoding="utf-8")
    assert f"{config}: not valid YAML" in refused(train.main, "--config", str(config))


def test_a_missing_data_file(refused: Refused, config: Path) -> None:
    missing = config.with_name("nowhere.jsonl")
    rewrite(config, data={"labeled": [{"path": str(missing)}]})
    message = refused(train.main, "--config", str(config))
    assert "data.labeled" in message and str(missing) in message


@pytest.mark.parametrize("side", ["labeled", "unlabeled"])
def test_no_source_at_all(refused: Refused, config: Path, side: str) -> None:
    rewrite(config, data={side: []})
    assert f"data.{side}: no source" in refused(train.main, "--config", str(config))


@pytest.mark.parametrize("side", ["labeled", "unlabeled"])
def test_a_source_without_rows(refused: Refused, config: Path, side: str) -> None:
    empty = tiny.write_jsonl(config.with_name("empty.jsonl"), [])
    rewrite(config, data={side: [{"path": str(empty)}]})
    assert f"data.{side}" in refused(train.main, "--config", str(config))


def test_rounds_without_prompts(refused: Refused, config: Path) -> None:
    rewrite(config, data={"unlabeled": [{"path": str(config.with_name("raw.jsonl"))}]})
    message = refused(train.main, "--config", str(config))
    assert "no prompts to answer" in message and "--pseudo-labels.rounds []" in message


def test_prompts_that_no_round_answers(refused: Refused, config: Path) -> None:
    prompts = {"unlabeled": [{"path": str(config.with_name("prompts.jsonl"))}]}
    rewrite(config, data=prompts, pseudo_labels={"rounds": []}, train={"prompts_as_text": False})
    message = refused(train.main, "--config", str(config))
    assert "prompts but no raw text to learn from; set --pseudo-labels.rounds 0.5" in message


def test_too_many_malformed_rows_name_the_first_and_where_all_are(refused: Refused, config: Path) -> None:
    path = config.with_name("labeled.jsonl")
    path.write_text(path.read_text() + '{"messages": 3}\n' * 20, encoding="utf-8")
    message = refused(train.main, "--config", str(config))
    assert "20 of" in message and "data.max_rejected_fraction" in message
    assert f"labeled.jsonl:{len(tiny.labeled()) + 1}:" in message
    listed = re.search(r"all: (\S+)", message)
    assert listed and len(tiny.read_jsonl(Path(listed[1]))) == 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(refused: Refused, config: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    message = refused(train.main, "--config", str(config), "--workdir", str(locked / "run"))
    assert str(locked / "run") in message and "--workdir" in message


def test_a_work_directory_that_is_a_file(refused: Refused, config: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder", encoding="utf-8")
    message = refused(train.main, "--config", str(config), "--workdir", str(file))
    assert str(file) in message and "--workdir" in message


def test_a_mistake_does_not_bind_the_work_directory(refused: Refused, config: Path, tmp_path: Path) -> None:
    """Who corrects the configuration may go on using the directory that the failed attempt left."""
    first = refused(train.main, "--config", str(config), "--mesh.data", "3")
    second = refused(train.main, "--config", str(config), "--mesh.data", "5")
    assert "3" in first and "5" in second and "another configuration" not in second


def test_another_configuration_in_the_same_work_directory_is_named(refused: Refused) -> None:
    arguments = ["--config", str(tiny.config_file()), "--workdir", str(tiny.finished())]
    message = refused(train.main, *arguments, "--optimizer.learning-rate", "0.5")
    assert "optimizer.learning_rate is 0.01 there, 0.5 here" in message and "--workdir" in message


def test_another_seed_in_the_same_work_directory_is_named(refused: Refused) -> None:
    arguments = ["--config", str(tiny.config_file()), "--workdir", str(tiny.finished())]
    assert "seed is 0 there, 1 here" in refused(train.main, *arguments, "--seed", "1")


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_work_directory_that_is_not_there(refused: Refused, tmp_path: Path, command: str) -> None:
    main, more = (generate.main, ["--prompt", "hi"]) if command == "generate" else (evaluate.main, [])
    message = refused(main, "--workdir", str(tmp_path / "nowhere"), *more)
    assert f"{tmp_path / 'nowhere'} does not exist" in message and "ssl_jax.train" in message


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_folder_that_is_no_work_directory(refused: Refused, tmp_path: Path, command: str) -> None:
    main, more = (generate.main, ["--prompt", "hi"]) if command == "generate" else (evaluate.main, [])
    assert "is not a work directory" in refused(main, "--workdir", str(tmp_path), *more)


def test_the_process_itself_ends_with_code_2(config: Path) -> None:
    process = tiny.run_command("train", "--config", str(config), "--mesh.data", "3")
    assert process.returncode == 2
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") <= 2
