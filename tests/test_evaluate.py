"""`python -m ssl_jax.evaluate`, and the evaluation behind it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_in
import tiny

import ssl_jax
from ssl_jax import evaluate, manifest
from ssl_jax.config import Evaluation, Sampling
from ssl_jax.data.store import Prepared
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.errors import UserError
from ssl_jax.evaluation import measure

LITTLE = ("--recall-examples", "0", "--generated-replies", "0", "--coherence-examples", "0")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer of its own."""
    return stand_in.dialogpt(tmp_path_factory.mktemp("foreign") / "model")


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    content_hash = read(tiny.finished() / "data.json")["content_hash"]
    return Prepared.open(tiny.finished().parent / "prepared" / content_hash[:16])


@pytest.fixture(scope="module")
def model() -> DialogueModel:
    return ssl_jax.load(str(tiny.finished()))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def quick(model: DialogueModel, prepared: Prepared, count: int, rows: int) -> dict[str, float]:
    encoded, lengths = prepared.encoded("labeled_dev"), prepared.lengths("labeled_dev")
    return measure.quick(model, encoded, lengths, count, rows=rows)


def full(model: DialogueModel, prepared: Prepared, split: str, settings: Evaluation) -> dict[str, Any]:
    text_of = functools.partial(prepared.dialogue, split)
    return measure.full(model, prepared.encoded(split), text_of, settings, rows=8)


def copy_of_run(folder: Path) -> Path:
    """A copy to write into; its data stay where they are."""
    return tiny.copy_of_finished(folder)


def test_the_command_repeats_the_evaluation_at_the_end_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of_run(tmp_path)
    before = read(run / "eval_test.json")
    (run / "eval_test.json").unlink()
    evaluate.main(["--workdir", str(run)])
    after = read(run / "eval_test.json")
    assert after.pop("model") == str(run)
    assert after == {name: value for name, value in before.items() if name in after}
    assert {"split", "metrics", "human", "distance_to_human", "coherence", "counts", "dialogues"} <= after.keys()
    printed = capsys.readouterr().out
    assert all(name in printed for name in after["metrics"]) and str(run / "eval_test.json") in printed


def test_another_split_has_a_file_of_its_own(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    test = (run / "eval_test.json").read_bytes()
    evaluate.main(["--workdir", str(run), "--split", "dev", *LITTLE])
    assert (run / "eval_test.json").read_bytes() == test
    dev = read(run / "eval_dev.json")
    assert dev["split"] == "labeled_dev" and dev["metrics"]["reply_bits_per_byte"] > 0
    assert dev["counts"] == {"dialogues": len(dev["dialogues"]["id"]), "longer_than_context": 0}


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_shorter_weights_have_a_file_of_their_own_and_nearly_the_same_likelihood(tmp_path: Path, weights: str) -> None:
    run = copy_of_run(tmp_path)
    values = {}
    for kept in ("auto", weights):
        evaluate.main(["--workdir", str(run), "--split", "dev", "--weights", kept, *LITTLE])
        result = read(run / ("eval_dev.json" if kept == "auto" else f"eval_dev_{kept}.json"))
        assert result.get("weights", "auto") == kept
        values[kept] = result["metrics"]["reply_bits_per_byte"]
    assert values[weights] != values["auto"]
    assert values[weights] == pytest.approx(values["auto"], rel=2e-3)


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--split tset: .* it has train, dev, test"):
        evaluate.main(["--workdir", str(tiny.finished()), "--split", "tset"])


def test_data_that_changed_since_the_training_are_refused(tmp_path: Path) -> None:
    """Another tokenizer would be fitted, and the model would read other texts by the same ids."""
    run = copy_of_run(tmp_path)
    data = manifest.decode((run / "data.json").read_bytes())
    assert data is not None
    (run / "data.json").write_bytes(manifest.encode({**data, "content_hash": "0" * 64}))
    with pytest.raises(UserError, match="have changed since the run began"):
        evaluate.main(["--workdir", str(run), *LITTLE])


def test_another_model_is_evaluated_on_the_data_of_a_run(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its own tokens, on the same dialogues, and without touching what the run has written."""
    run, output = tmp_path / "copy", tmp_path / "foreign.json"
    copy_of_run(tmp_path)
    before = (run / "eval_test.json").read_bytes()
    evaluate.main(["--workdir", str(run), "--model", str(foreign), "--output", str(output), *LITTLE])
    ours, theirs = read(run / "eval_test.json"), read(output)
    assert (run / "eval_test.json").read_bytes() == before
    assert theirs["model"] == str(foreign) and theirs["dialogues"]["id"] == ours["dialogues"]["id"]
    assert theirs["dialogues"]["bytes"] == ours["dialogues"]["bytes"]
    assert theirs["metrics"]["reply_bits_per_byte"] > ours["metrics"]["reply_bits_per_byte"]
    assert f"written to {output}" in capsys.readouterr().out


def test_another_model_is_evaluated_on_files(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.labeled()[:5]
    path = tiny.write_jsonl(tmp_path / "dialogues.jsonl", [*rows, {"messages": []}])
    evaluate.main(["--model", str(foreign), "--data", str(path), *LITTLE])
    printed = capsys.readouterr()
    assert "1 of 6 rows are malformed; first:" in printed.err and "dialogues.jsonl:6" in printed.err
    score = ssl_jax.load(str(foreign)).score
    nll = sum(score(row["messages"])["nll"] for row in rows)
    size = sum(len(row["messages"][-1]["content"]) for row in rows)
    (line,) = (line for line in printed.out.splitlines() if line.startswith("reply_bits_per_byte"))
    assert float(line.split()[1]) == pytest.approx(nll / np.log(2) / size, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give --workdir DIR, or --model"),
        (["--model", "gpt2"], "--model needs dialogues"),
        (["--model", "gpt2", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        evaluate.main(arguments)


def test_the_process_ends_with_code_0(tmp_path: Path) -> None:
    run = copy_of_run(tmp_path)
    process = tiny.run_command("evaluate", "--workdir", str(run), "--split", "dev", *LITTLE)
    assert process.returncode == 0, process.stderr
    assert "reply_bits_per_byte" in process.stdout


def test_the_quick_evaluation_is_the_full_one_where_it_covers_all(model: DialogueModel, prepared: Prepared) -> None:
    settings = Evaluation(recall_examples=0, generated_replies=0, coherence_examples=0)
    everything = full(model, prepared, "labeled_dev", settings)["metrics"]
    assert quick(model, prepared, 10_000, rows=8) == pytest.approx(everything, rel=1e-6)


def test_rows_of_a_batch_do_not_change_the_likelihood(model: DialogueModel, prepared: Prepared) -> None:
    values = [quick(model, prepared, 5, rows=rows) for rows in (8, 1)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_fewer_test_dialogues_are_the_first_ones(model: DialogueModel, prepared: Prepared) -> None:
    settings = Evaluation(recall_examples=0, generated_replies=0)
    everything = full(model, prepared, "labeled_test", settings)["dialogues"]
    five = settings.model_copy(update={"test_dialogues": 5})
    some = full(model, prepared, "labeled_test", five)["dialogues"]
    assert some["id"] == everything["id"][:5]
    np.testing.assert_allclose(some["nll"], everything["nll"][:5], rtol=1e-4)


def test_too_few_distinct_replies_leave_out_the_ranking(model: DialogueModel, prepared: Prepared) -> None:
    settings = Evaluation(test_dialogues=5, recall_examples=5, generated_replies=0)
    result = full(model, prepared, "labeled_test", settings)
    assert "mrr" not in result["metrics"] and "rankings" not in result["counts"]


def test_true_replies_are_their_own_human_reference(model: DialogueModel, prepared: Prepared) -> None:
    settings = Evaluation(recall_examples=0, generated_replies=8, max_prompt_tokens=32,
                          sampling=Sampling(max_new_tokens=16))  # fmt: skip
    human = full(model, prepared, "labeled_test", settings)["human"]
    assert human["length_ratio"] == 1.0
