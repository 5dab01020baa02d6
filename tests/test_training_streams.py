"""What a stream is made of: dialogues of several sources in order, chosen ones, and those of rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from ssl_jax.config import Config
from ssl_jax.data.pipeline import prepare
from ssl_jax.data.store import Prepared
from ssl_jax.pseudo_labels import rounds
from ssl_jax.training_streams import TrainingStreams


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(Config.model_validate(tiny.settings(tiny.config_file().parent)))


def with_rounds(prepared: Prepared, directory: Path, *texts: list[str], **settings: Any) -> TrainingStreams:
    values = tiny.settings(tiny.config_file().parent)
    values["pseudo_labels"] |= settings
    for number, replies in enumerate(texts):
        rows = [
            {
                "id": f"{number}/{place}",
                "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}],
            }
            for place, reply in enumerate(replies)
        ]
        rounds.write(directory / "pseudo_labels", number, rows, {"accepted": len(rows)})
    return TrainingStreams(Config.model_validate(values), prepared, directory)


@pytest.mark.parametrize(
    ("accumulate", "held", "dialogues"), [(True, 1, 2), (True, 2, 5), (True, 3, 5), (False, 2, 3), (False, 3, 3)]
)
def test_rounds_add_up_or_replace_and_an_empty_one_changes_nothing(
    prepared: Prepared, tmp_path: Path, accumulate: bool, held: int, dialogues: int
) -> None:
    streams = with_rounds(prepared, tmp_path, ["a", "b"], ["c", "d", "e"], [], accumulate=accumulate)
    stream = streams.of_rounds("pseudo", held)
    assert stream is not None
    assert len(np.unique(stream._plan(0).windows.record)) == dialogues


def test_rounds_that_accepted_nothing_are_no_stream(prepared: Prepared, tmp_path: Path) -> None:
    assert with_rounds(prepared, tmp_path, [], []).of_rounds("pseudo", 2) is None


def test_prompts_are_text_and_raw_text_may_have_roles(prepared: Prepared, tmp_path: Path) -> None:
    def raw_tokens(**train: Any) -> set[int]:
        values = tiny.settings(tiny.config_file().parent)
        values["train"] |= train
        stream = TrainingStreams(Config.model_validate(values), prepared, tmp_path).before_rounds()["raw"]
        rows = [stream[number] for number in range(stream.rows_in_epoch(0))]
        return {int(token) for row in rows for token in np.unique(row["tokens"][row["segment_ids"] > 0])}

    roles = prepared.tokenizer.role_ids
    speakers = {roles[role] for role in ("user", "assistant", "text")}
    assert raw_tokens() & speakers == {roles["user"], roles["text"]}
    assert raw_tokens(prompts_as_text=False) & speakers == {roles["text"]}
    assert raw_tokens(raw_roles="alternate") & speakers == {roles["user"], roles["assistant"]}
