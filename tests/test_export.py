"""`python -m ssl_jax.export` as a user types it."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from ssl_jax import export, export_check, files, gpt2_tensors, huggingface, loading, model
from ssl_jax.config import Sampling
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with fresh weights and a fitted tokenizer."""
    tokenizer = DialogueTokenizer.fit(["hello there, how are you?"] * 3, 300)
    rows = tokenizer.vocab_size
    shape = model.GPT2(rows, rows, 32, 16, 2, 2, 64, scan_layers=False)
    directory = tmp_path_factory.mktemp("models") / "source"
    huggingface.write(
        directory,
        shape,
        model.init(shape, jax.random.key(0)),
        end_ids=tokenizer.end_ids,
        end_of_text_id=tokenizer.end_of_text_id,
        pad_id=tokenizer.pad_id,
        generation={"do_sample": True, "top_k": 7},
        add_files=tokenizer.save,
    )
    return directory


def run(*arguments: Any) -> None:
    export.main([str(argument) for argument in arguments])


def test_a_model_goes_out_as_it_came_in(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", source, "--output", tmp_path / "out")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    printed = capsys.readouterr().out
    shape = loading.load(str(source)).shape
    wte, wpe, blocks = shape.vocab_size * 16, 32 * 16, 2 * (12 * 16 * 16 + 13 * 16)
    assert f"{wte + wpe + blocks + 2 * 16:,} parameters, float32" in printed
    assert f"model.safetensors  {(source / 'model.safetensors').stat().st_size:,} bytes" in printed
    assert f"transformers.GPT2LMHeadModel.from_pretrained('{tmp_path / 'out'}')" in printed


def test_a_run_goes_out_with_tokenizer_and_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tiny.finished()
    capsys.readouterr()
    run("--workdir", workdir, "--output", tmp_path / "out", "--max-shard-size", "40KB")
    ours, theirs = loading.load_checkpoint(workdir), loading.load(str(tmp_path / "out"))
    assert theirs.tokenizer.fingerprint == ours.tokenizer.fingerprint
    assert theirs.tokenizer.end_ids == ours.tokenizer.end_ids
    assert dataclasses.replace(theirs.shape, scan_layers=True) == dataclasses.replace(
        ours.shape, scan_layers=True, remat=theirs.shape.remat, padded_vocab_size=theirs.shape.padded_vocab_size
    )
    values = gpt2_tensors.stored_values(theirs.params, theirs.shape)
    for name, value in gpt2_tensors.stored_values(ours.params, ours.shape).items():
        np.testing.assert_array_equal(values[name](), value(), err_msg=name)
    generation = files.read_json(tmp_path / "out" / "generation_config.json")
    assert generation["eos_token_id"] == list(ours.tokenizer.end_ids)
    assert (generation["do_sample"], generation["top_p"]) == (True, 0.95)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_sampling_options_that_would_be_ignored_are_left_out() -> None:
    greedy = export.generation_settings(Sampling(do_sample=False, temperature=2.0, stop=("x",), num_beams=4))
    assert greedy == {"do_sample": False, "max_new_tokens": 48, "num_beams": 4}
    drawn = export.generation_settings(Sampling(top_k=5, min_p=0.1, suppress_tokens=(3,), max_length=20))
    assert drawn == {
        "do_sample": True, "max_new_tokens": 20, "temperature": 1.0, "top_k": 5, "top_p": 0.95, "min_p": 0.1,
        "suppress_tokens": [3],
    }  # fmt: skip


def test_sampling_options_are_those_of_transformers() -> None:
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    everything = Sampling(
        top_k=5, min_p=0.1, typical_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=3, min_length=2,
        min_new_tokens=1, suppress_tokens=(3,), begin_suppress_tokens=(4,), forced_bos_token_id=1,
        forced_eos_token_id=2, length_penalty=0.5, early_stopping=True,
    )  # fmt: skip
    assert set(export.generation_settings(everything)) <= set(known)


@pytest.mark.parametrize(("size", "expected"), [("500MB", 500 * 10**6), ("2GiB", 2**31), ("1.5 kb", 1500), ("7B", 7)])
def test_sizes_are_spelled_as_in_transformers(size: str, expected: int) -> None:
    assert export._bytes(size) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "out"], "give --workdir DIR or --model"),
        (["--output", "out", "--model", "a", "--workdir", "b"], "give --workdir DIR or --model"),
        (["--model", "a"], "output"),
        (["--model", "a", "--output", "out", "--dtype", "int8"], r"dtype.*'float32'"),
        (["--model", "a", "--output", "out", "--max-shard-size", "big"], "max_shard_size.*such as 500MB or 2GiB"),
        (["--model", "a", "--output", "out", "--max-shard-size", "0GB"], "max_shard_size.*such as 500MB or 2GiB"),
        (["--model", "a", "--output", "out", "--chek"], "--chek: unknown field; did you mean check?"),
        (["--model", "a/b/c", "--output", "out"], "a/b/c: there is no directory ./a/b/c"),
        (["--workdir", "nowhere", "--output", "out"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        run(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_refused_before_the_model_is_loaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setattr(loading, "load_named", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="is not an earlier export"):
        run("--model", source, "--output", tmp_path, "--overwrite")
    with pytest.raises(UserError, match="replace it with --overwrite"):
        run("--model", source, "--output", source)


def test_an_earlier_export_is_replaced_if_asked(source: Path, tmp_path: Path) -> None:
    run("--model", source, "--output", tmp_path / "out")
    run("--model", source, "--output", tmp_path / "out", "--overwrite", "--dtype", "bfloat16")
    assert files.read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_checking_without_the_reference_is_refused_before_the_export(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--check needs PyTorch; pip install 'ssl_jax\[parity\]'"):
        run("--model", source, "--output", tmp_path / "out", "--check")
    assert not (tmp_path / "out").exists()


def test_a_difference_beyond_rounding_fails_the_check() -> None:
    logits = np.zeros((1, 2, 3), np.float32)
    assert export_check._compare_logits(logits, logits + 1.9e-4).passed
    assert not export_check._compare_logits(logits, logits + 2.1e-4).passed
    assert export_check._compare_logits(logits + 100, logits + 100.001).passed
    assert not export_check._compare_logits(logits + 100, logits + 100.003).passed
    failed = export_check._compare_lists("text", [1, 2], [1, 3])
    with pytest.raises(UserError, match=r"text: token ids differ: \[1, 2\] here, \[1, 3\] in transformers"):
        export._report([failed])


def test_the_command_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    process = tiny.run_command("export", "--model", str(tmp_path), "--output", str(tmp_path / "out"))
    assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
