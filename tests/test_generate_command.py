"""`python -m ssl_jax.generate` as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import ssl_jax
from ssl_jax import command_line, generate
from ssl_jax.data.tokenizer import CONTROL_TOKENS
from ssl_jax.errors import UserError

PROMPT = "is the apple red?"


@pytest.fixture(scope="module", autouse=True)
def run() -> None:
    """What the training prints is out of the way before a test looks at the output."""
    tiny.finished()


def say(capsys: pytest.CaptureFixture[str], *arguments: str, workdir: Path | None = None) -> list[str]:
    """The lines that the command prints."""
    capsys.readouterr()
    generate.main(["--workdir", str(workdir or tiny.finished()), "--max-new-tokens", "16", *arguments])
    return capsys.readouterr().out.splitlines()


def replies(capsys: pytest.CaptureFixture[str], *arguments: str, workdir: Path | None = None) -> list[dict[str, Any]]:
    """The objects that the command prints with `--json`."""
    return [json.loads(line) for line in say(capsys, "--json", *arguments, workdir=workdir)]


def test_json_lines_hold_what_scripts_read(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = replies(capsys, "--prompt", PROMPT)
    assert list(row) == ["prompt", "reply", "tokens", "logprob", "finish_reason"]
    assert row["prompt"] == PROMPT and isinstance(row["reply"], str)
    assert 0 <= row["tokens"] <= 16 and row["logprob"] < 0
    assert row["finish_reason"] == ("stop" if row["tokens"] < 16 else row["finish_reason"])
    assert row["finish_reason"] in ("stop", "length")


def test_without_json_the_reply_alone_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = replies(capsys, "--prompt", PROMPT)
    assert "\n".join(say(capsys, "--prompt", PROMPT)) == row["reply"]


def test_a_seed_reproduces_and_another_seed_differs(capsys: pytest.CaptureFixture[str]) -> None:
    first = replies(capsys, "--prompt", PROMPT, "--seed", "5")
    assert replies(capsys, "--prompt", PROMPT, "--seed", "5") == first
    assert replies(capsys, "--prompt", PROMPT, "--seed", "6") != first


def test_without_sampling_the_seed_does_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", PROMPT, "--do-sample", "false"]
    assert replies(capsys, *options, "--seed", "5") == replies(capsys, *options, "--seed", "6")


@pytest.mark.slow
def test_the_likeliest_token_alone_is_greedy(capsys: pytest.CaptureFixture[str]) -> None:
    greedy = replies(capsys, "--prompt", PROMPT, "--do-sample", "false")
    assert replies(capsys, "--prompt", PROMPT, "--top-k", "1", "--seed", "3") == greedy


def test_eight_bit_weights_answer_too(capsys: pytest.CaptureFixture[str]) -> None:
    first, again = (replies(capsys, "--prompt", PROMPT, "--weights", "int8", "--seed", "4") for _ in range(2))
    assert first == again and first[0]["logprob"] < 0


def test_several_prompts_are_answered_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = list(tiny.SAMPLE_PROMPTS)
    assert [row["prompt"] for row in replies(capsys, "--prompt", *prompts)] == prompts
    printed = say(capsys, "--prompt", *prompts)
    assert [line for line in printed if line.startswith("> ")] == [f"> {prompt}" for prompt in prompts]


def test_several_replies_to_a_prompt_differ(capsys: pytest.CaptureFixture[str]) -> None:
    rows = replies(capsys, "--prompt", PROMPT, "--num-return-sequences", "4")
    assert len(rows) == 4 and len({row["reply"] for row in rows}) > 1


def test_the_best_candidate_is_one_of_the_replies_that_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    """With the log p that the reply has, not the score that it was chosen by; one candidate is no choice."""
    drawn = replies(capsys, "--prompt", PROMPT, "--num-return-sequences", "4")
    (best,) = replies(capsys, "--prompt", PROMPT, "--candidates", "4", "--prior-weight", "1")
    assert best in drawn and list(best) == list(drawn[0])
    assert replies(capsys, "--prompt", PROMPT, "--candidates", "1") == replies(capsys, "--prompt", PROMPT)


def test_a_prompt_that_spells_control_tokens_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "".join(CONTROL_TOKENS) + "hi"
    (row,) = replies(capsys, "--prompt", prompt)
    assert row["prompt"] == prompt
    assert not any(token in row["reply"] for token in CONTROL_TOKENS)


def test_a_prompt_longer_than_the_context_is_answered_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    """Its newest tokens are read: what is far back does not change the reply, and nothing is cut in silence."""
    long = "is the lamp black? " * 60 + PROMPT
    rows = []
    for prompt in (long, "is the river white? " + long):
        capsys.readouterr()
        generate.main(["--workdir", str(tiny.finished()), "--max-new-tokens", "16", "--prompt", prompt, "--json"])
        printed = capsys.readouterr()
        assert "note: the conversation is longer than the context" in printed.err and printed.err.count("\n") == 1
        rows.append(json.loads(printed.out))
    assert rows[0]["reply"] == rows[1]["reply"] and rows[0]["logprob"] == rows[1]["logprob"]
    assert 0 < rows[0]["dropped_tokens"] < rows[1]["dropped_tokens"]


def test_a_prompt_that_fits_is_answered_without_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--workdir", str(tiny.finished()), "--max-new-tokens", "16", "--prompt", PROMPT])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", PROMPT, "--top-k", "-1"], r"top_k.*greater than or equal to 0"),
        (["--prompt", PROMPT, "--top-p", "0"], r"top_p.*greater than 0"),
        (["--prompt", PROMPT, "--top-p", "1.5"], r"top_p.*less than or equal to 1"),
        (["--prompt", PROMPT, "--temperature", "0"], r"temperature.*greater than or equal to 0\.000001"),
        (["--prompt", PROMPT, "--max-new-tokens", "0"], r"max_new_tokens.*greater than or equal to 1"),
        (["--prompt", PROMPT, "--max-new-tokens", "64"], r"max_new_tokens 64 leaves no room.*at most 48"),
        (["--prompt", PROMPT, "--num-return-sequences", "0"], r"num_return_sequences.*greater than or equal to 1"),
        (["--prompt", PROMPT, "--seed", "-1"], r"seed.*greater than or equal to 0"),
        (["--prompt", PROMPT, "--tempratur", "1"], r"--tempratur: unknown field; did you mean temperature\?"),
        (["--prompt", PROMPT, "--jsn"], r"--jsn: unknown field; did you mean json\?"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "  \n "], "the prompt is empty"),
        (["--prompt"], "--prompt needs a text"),
        (["--prompt", "caf\udce9"], "not valid UTF-8"),
        ([], "--prompt needs a text"),
        (["--prompt", PROMPT, "--chat"], "--chat reads prompts from the input"),
        (["--prompt", PROMPT, "--stream", "--json"], "--stream prints one reply as text"),
        (["--prompt", PROMPT, "--model", "gpt2"], "give --workdir DIR or --model"),
        (["--prompt", PROMPT, "--num-beams", "3"], "set do_sample to false"),
        (["--prompt", PROMPT, "--num-beams", "2", "--do-sample", "false", "--stream"], "nothing to show"),
        (["--prompt", PROMPT, "--sequence-bias", "{well: much}"], "sequence_bias.well"),
        (["--prompt", PROMPT, "--candidates", "4", "--stream"], "nothing can be shown before all are drawn"),
        (["--chat", "--candidates", "4"], "nothing can be shown before all are drawn"),
        (["--prompt", PROMPT, "--candidates", "4", "--do-sample", "false", "--num-beams", "2"], "or candidates 1"),
        (["--prompt", PROMPT, "--candidates", "4", "--backward-weight", "1"], "tokenizer.direction_tokens true"),
        (["--prompt", PROMPT, "--backward-weight", "1"], "set candidates to 2 or more"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as refused:
        generate.main(["--workdir", str(tiny.finished()), *arguments])
    assert str(refused.value).count("\n") <= 1


def test_a_stream_prints_the_same_reply(capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys, "--prompt", PROMPT, "--stream") == say(capsys, "--prompt", PROMPT)


def test_log_probabilities_of_tokens_come_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = replies(capsys, "--prompt", PROMPT, "--token-logprobs")
    assert len(row["token_ids"]) == row["tokens"]
    assert len(row["token_logprobs"]) == row["tokens"] + (row["finish_reason"] == "stop")
    assert sum(row["token_logprobs"]) == pytest.approx(row["logprob"])


def test_a_system_turn_changes_the_reply(capsys: pytest.CaptureFixture[str]) -> None:
    (plain,), (told,) = replies(capsys, "--prompt", PROMPT), replies(capsys, "--prompt", PROMPT, "--system", "be kind")
    assert plain["prompt"] == told["prompt"] and plain["logprob"] != told["logprob"]


def test_biases_are_a_yaml_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", PROMPT, "--do-sample", "false", "--token-logprobs"]
    (row,) = replies(capsys, *options)
    first = ssl_jax.load(str(tiny.finished())).tokenizer.decode(row["token_ids"][:1])
    (other,) = replies(capsys, *options, "--sequence-bias", f"{{{json.dumps(first)}: -100}}")
    assert other["token_ids"][0] != row["token_ids"][0]


def test_a_chat_remembers_what_was_said() -> None:
    """Line by line from the input; the second reply depends on the first exchange."""
    arguments = ["--workdir", str(tiny.finished()), "--chat", "--max-new-tokens", "8", "--do-sample", "false"]

    def chat(said: str) -> list[str]:
        process = subprocess.run(
            tiny.command("generate", *arguments),
            input=said, env=tiny.environment(), capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        assert process.stderr == ""
        return process.stdout.splitlines()

    both = chat("is the apple red?\nis the lamp white?\n")
    assert len(both) == 2 and both[0] == chat("is the apple red?\n\nis the lamp white?\n")[0]
    messages = [
        {"role": "user", "content": "is the apple red?"},
        {"role": "assistant", "content": both[0]},
        {"role": "user", "content": "is the lamp white?"},
    ]
    model = ssl_jax.load(str(tiny.finished()))
    assert model.generate_response(messages, max_new_tokens=8, do_sample=False) == [both[1]]


def test_help_shows_the_names_that_users_write(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    printed = capsys.readouterr().out
    assert "--json BOOL" in printed and "json_lines" not in printed


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    workdir = tiny.copy_of_finished(tmp_path)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match="no good checkpoint yet"):
        generate.main(["--workdir", str(workdir), "--prompt", PROMPT])


def test_a_run_that_is_still_training_answers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Only a checkpoint amid the run is there: no summary, no final evaluation."""
    workdir = tiny.copy_of_finished(tmp_path)
    for path in (workdir / "summary.json", workdir / "eval_test.json"):
        path.unlink()
    first, *others = tiny.checkpoint_steps(workdir)
    for step in others:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert first < tiny.STEPS
    assert replies(capsys, "--prompt", PROMPT, workdir=workdir) != replies(capsys, "--prompt", PROMPT)


def test_a_damaged_checkpoint_gives_way_to_an_older_one_with_a_warning(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    workdir = tiny.copy_of_finished(tmp_path)
    older, newest = tiny.checkpoint_steps(workdir)[-2:]
    data = max((workdir / "checkpoints" / str(newest)).rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    answered = replies(capsys, "--prompt", PROMPT, workdir=workdir)
    assert f"checkpoints/{newest} is not used" in caplog.text
    shutil.rmtree(workdir / "checkpoints" / str(newest))
    assert tiny.checkpoint_steps(workdir)[-1] == older
    assert replies(capsys, "--prompt", PROMPT, workdir=workdir) == answered


def test_the_command_ends_with_code_0_and_prints_only_the_reply_on_stdout() -> None:
    process = tiny.run_command(
        "generate", "--workdir", str(tiny.finished()), "--prompt", PROMPT, "--max-new-tokens", "16", "--json"
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["prompt"] == PROMPT
    assert process.stderr == ""


def test_bytes_that_are_no_text_end_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A terminal that is not UTF-8 hands over lone surrogates, which no file and no tokenizer can hold."""
    monkeypatch.setattr(sys, "argv", ["generate", "--workdir", str(tiny.finished()), "--prompt", "\udcff"])
    with pytest.raises(SystemExit) as exit_:
        command_line.run(generate.main)
    assert exit_.value.code == 2 and "not valid UTF-8" in capfd.readouterr().err
