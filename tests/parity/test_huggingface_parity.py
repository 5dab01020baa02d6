"""Directories that transformers writes are read, and what is written transformers reads, weight by weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import network, read, torch

from ssl_jax import export, export_check, gpt2_tensors, huggingface, model
from ssl_jax.data.tokenizer import DialogueTokenizer

VOCAB_SIZE, LENGTH = 211, 64
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def reference(folder: Path, dtype: str = "float32", shard: str = "5GB", **fields: Any) -> Any:
    """A small network, and its directory."""
    settings = {"vocab_size": VOCAB_SIZE, "n_positions": LENGTH, "n_embd": 48, "n_layer": 3, "n_head": 4, **fields}
    made = network(**settings).to(TYPES[dtype])
    made.save_pretrained(folder, max_shard_size=shard)
    return made


def values(shape: model.GPT2, params: model.Params) -> dict[str, np.ndarray]:
    return {name: value() for name, value in gpt2_tensors.stored_values(params, shape).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("tie", "scan_layers", "shard"), [(True, True, "5GB"), (False, False, "100KB"), (False, True, "5GB")]
)
def test_in_out_and_in_again_leaves_every_weight_as_it_is(
    tmp_path: Path, dtype: str, tie: bool, scan_layers: bool, shard: str
) -> None:
    from transformers import GPT2LMHeadModel

    network = reference(tmp_path / "theirs", dtype, shard, tie_word_embeddings=tie)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard != "5GB")
    shape, params = read(tmp_path / "theirs", VOCAB_SIZE, scan_layers=scan_layers)
    huggingface.write(
        tmp_path / "ours", shape, params, dtype=dtype, max_shard_bytes=5 * 2**30 if shard == "5GB" else 100_000,
        end_ids=(3, 0), end_of_text_id=0, pad_id=1,
    )  # fmt: skip
    loader: Any = GPT2LMHeadModel
    again, report = loader.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert again.dtype == TYPES[dtype]
    assert again.generation_config.eos_token_id == [3, 0]
    weights = again.state_dict()
    for name, weight in network.state_dict().items():
        assert torch.equal(weights[name], weight), name
    first, second = values(shape, params), values(*read(tmp_path / "ours", VOCAB_SIZE, scan_layers=not scan_layers))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


def test_settings_survive_both_ways(tmp_path: Path) -> None:
    from transformers import GPT2Config

    fields: dict[str, Any] = {
        "n_inner": 80, "activation_function": "gelu", "layer_norm_epsilon": 1e-3, "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "tie_word_embeddings": False,
        "resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.0, "initializer_range": 0.01,
    }  # fmt: skip
    reference(tmp_path / "theirs", **fields)
    shape, params = read(tmp_path / "theirs", VOCAB_SIZE)
    huggingface.write(tmp_path / "ours", shape, params, end_ids=(0,), end_of_text_id=0, pad_id=1)
    written = GPT2Config.from_pretrained(tmp_path / "ours")
    assert {name: getattr(written, name) for name in fields} == fields
    assert huggingface.read_settings(tmp_path / "ours") == huggingface.read_settings(tmp_path / "theirs")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation_function": "relu", "n_inner": 80, "layer_norm_epsilon": 1e-2},
        {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ],
)
def test_the_check_passes_for_an_imported_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, fields: dict[str, Any]
) -> None:
    """From a directory of transformers, through `export --check`, with every logit of a full context compared."""
    tokenizer = DialogueTokenizer.fit(["hello there, how are you?"] * 3, 300)
    reference(tmp_path / "theirs", vocab_size=tokenizer.vocab_size, **fields)
    tokenizer.save(tmp_path / "theirs")
    export.main(["--model", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours"), "--check", "--dtype", dtype])
    checks = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check: ")]
    assert [line.split(": ")[1] for line in checks] == ["weights", "logits", "text", "conversation"]
    assert f"over {LENGTH} tokens" in checks[1]


def test_the_check_notices_a_changed_weight_and_a_missing_one(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from ssl_jax import loading

    tokenizer = DialogueTokenizer.fit(["hello there, how are you?"] * 3, 300)
    reference(tmp_path / "theirs", vocab_size=tokenizer.vocab_size)
    tokenizer.save(tmp_path / "theirs")
    ours = loading.load(str(tmp_path / "theirs"))
    path = tmp_path / "theirs" / "model.safetensors"
    stored = load_file(path)

    changed = {**stored, "transformer.ln_f.bias": stored["transformer.ln_f.bias"] + np.float32(0.01)}
    save_file(changed, path, metadata={"format": "pt"})
    assert [check.passed for check in export_check.compare(tmp_path / "theirs", ours, "float32")][:2] == [True, False]

    del changed["transformer.h.1.ln_1.bias"]
    save_file(changed, path, metadata={"format": "pt"})
    names = export_check.compare(tmp_path / "theirs", ours, "float32")[0]
    assert not names.passed and "transformer.h.1.ln_1.bias" in str(names)
