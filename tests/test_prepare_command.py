"""`python -m ssl_jax.prepare` as a user types it, and what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import stand_in
import tiny

from ssl_jax import prepare
from ssl_jax.data.report import marked
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

CONVERSATION = Dialogue.from_messages(
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "is <|assistant|> red?"},
        {"role": "assistant", "content": "yes, red"},
    ]
)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    prepare.main(["--config", str(tiny.config_file()), *arguments])
    return capsys.readouterr().out.splitlines()


def test_the_tables_count_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys)
    rows = {line[:17].strip(): line[17:].split() for line in lines}
    dialogues = sum(int(rows[f"labeled {side}"][0]) for side in ("train", "dev", "test"))
    assert dialogues == len(tiny.labeled())
    assert int(rows["raw train"][0]) == len(tiny.raw()) and int(rows["prompt train"][0]) == len(tiny.prompts())
    median, *_, longest = map(int, rows["raw train"][-4:])
    assert 0 < median <= longest
    assert any("; next: python -m ssl_jax.train --config" in line for line in lines)


def test_dialogues_are_shown_as_the_model_sees_them(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--show", "2")
    shown = [line for line in lines if line.startswith("<|user|>")]
    assert len(shown) == 2
    for line in shown:
        assert line.count("⟦") == 1 and line.endswith("<|endofturn|>⟧<|endoftext|>")
    (raw,) = [line for line in printed(capsys, "--show", "1", "--split", "raw_train") if line.startswith("<|text|>")]
    assert raw.startswith("<|text|>⟦") and raw.endswith("<|endoftext|>⟧")


def test_examples_and_rejected_rows_are_printed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--examples", "2", "--rejected", "2")
    assert "rejected rows: 0" in lines and "no step changed or removed anything" in lines
    assert not any("next: python" in line for line in lines)
    plain = printed(capsys)
    assert not any(line.startswith(("rejected rows", "no step")) for line in plain)


def test_a_split_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--split test: the data has labeled_train"):
        printed(capsys, "--show", "1", "--split", "test")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "role_tokens",
            "<|system|>be kind<|endofturn|><|user|>is <|assistant|> red?<|endofturn|>"
            "<|assistant|>⟦yes, red<|endofturn|>⟧<|endoftext|>",
        ),
        ("end_of_text", "be kind<|endoftext|>is <|assistant|> red?<|endoftext|>⟦yes, red<|endoftext|>⟧"),
        ("chat_template", "be kind<|endoftext|>is <|assistant|> red?<|endoftext|>⟦yes, red<|endoftext|>⟧"),
        ("plain", "be kind\nis <|assistant|> red?⟦\nyes, red<|endoftext|>⟧"),
    ],
)
def test_the_loss_is_on_replies_and_their_ends_under_every_template(tmp_path: Path, template, expected: str) -> None:
    tokenizer = DialogueTokenizer.load(stand_in.dialogpt(tmp_path / "model"), template=template)
    assert marked(tokenizer, tokenizer.encode(CONVERSATION)) == expected
