"""Starting from pretrained weights: what the configuration takes from them, and the fine-tuning configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import stand_in
import tiny
import yaml

import ssl_jax
from ssl_jax import command_line, loading, loop, pretrained
from ssl_jax.config import Config, Sampling
from ssl_jax.conversation import as_prompt
from ssl_jax.data.pipeline import prepare
from ssl_jax.errors import UserError
from ssl_jax.signals import Signals

CONFIGS = Path(__file__).parent.parent / "configs"

# What makes any of the configurations small; data and weights come from the test.
SMALL = [
    "--train.steps", "4", "--train.sequence-length", "64", "--train.window-overlap", "8",
    "--train.per-device-train-batch-size", "2", "--train.unlabeled-ratio", "1", "--train.pseudo-label-fraction", "0.5",
    "--train.gradient-accumulation-steps", "2", "--train.per-device-eval-batch-size", "8", "--train.logging-steps", "1",
    "--train.eval-steps", "4", "--train.save-steps", "4", "--pseudo-labels.prompts-per-round", "4",
    "--pseudo-labels.max-prompt-tokens", "16", "--pseudo-labels.sampling.max-new-tokens", "16",
    "--pseudo-labels.batch-size", "8", "--evaluation.max-prompt-tokens", "16",
    "--evaluation.sampling.max-new-tokens", "16", "--evaluation.recall-examples", "0",
    "--evaluation.generated-replies", "0", "--evaluation.sample-prompts", "--data.test-size", "0.3",
]  # fmt: skip


def chinese_data(folder: Path) -> None:
    hello, question, answer, *others = stand_in.CHINESE
    rows = [(hello, hello), (question, answer), (others[0], others[1]), (others[2], hello), (question, others[1])]
    labeled = [
        {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": replied}], "id": f"{n}-{m}"}
        for n, (said, replied) in enumerate(rows)
        for m in range(1)
    ]
    labeled += [
        {"messages": [{"role": "user", "content": said * n}, {"role": "assistant", "content": replied}]}
        for n in (2, 3, 4)
        for said, replied in rows
    ]
    tiny.write_jsonl(folder / "labeled.jsonl", labeled)
    tiny.write_jsonl(folder / "raw.jsonl", [{"text": "\n".join(stand_in.CHINESE[n:])} for n in range(5)])
    tiny.write_jsonl(
        folder / "prompts.jsonl", [{"messages": [{"role": "user", "content": text}]} for text in "你好吗苹"]
    )


def overrides(folder: Path, weights: Path) -> list[str]:
    labeled, raw, prompts = (str(folder / f"{name}.jsonl") for name in ("labeled", "raw", "prompts"))
    return [
        "--model.init-from", str(weights), "--data.prepared-dir", str(folder / "prepared"),
        "--data.labeled", f"[{{path: {labeled}}}]", "--data.unlabeled", f"[{{path: {raw}}}, {{path: {prompts}}}]",
        *SMALL,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make", "data", "template", "prompt"),
    [
        ("gpt2_finetune", stand_in.gpt2, tiny.write_data, "role_tokens", "is the apple red?"),
        pytest.param(
            *("dialogpt_finetune", stand_in.dialogpt, tiny.write_data, "end_of_text", "is the apple red?"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("gpt2_chinese", stand_in.chinese, chinese_data, "role_tokens", "苹果是红色的吗?"), marks=pytest.mark.slow
        ),
    ],
)
def test_the_configurations_for_fine_tuning_run(
    tmp_path: Path, name: str, make: Callable, data: Callable, template: str, prompt: str
) -> None:
    """On a small stand-in of their model: they train, end well, answer, and the result loads without the weights."""
    weights = make(tmp_path / "weights")
    data(tmp_path)
    arguments = overrides(tmp_path, weights)
    if name == "gpt2_chinese":
        # In epochs, as it is written, instead of steps.
        arguments = [*arguments[: arguments.index("--train.steps")], *arguments[arguments.index("--train.steps") + 2 :]]
        arguments += ["--train.num-train-epochs", "2"]
    run = tiny.run_train(CONFIGS / f"{name}.yaml", tmp_path / "run", *arguments)
    weights.rename(tmp_path / "elsewhere")
    resolved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert resolved["model"]["n_embd"] == 32 and resolved["model"]["n_positions"] == 64
    model = ssl_jax.load(str(run))
    assert model.tokenizer.template == template
    assert len(model.generate_response(prompt, max_new_tokens=16, num_return_sequences=2)) == 2
    score = model.score([{"role": "user", "content": prompt}, {"role": "assistant", "content": prompt}])
    assert score["bits_per_byte"] > 0


def resolved_config(folder: Path, weights: Path, *more: str) -> Config:
    arguments = ["--config", str(CONFIGS / "gpt2_finetune.yaml"), *overrides(folder, weights), *more]
    return pretrained.resolve(command_line.parse(Config, arguments, program="train", summary=""))


def test_a_run_starts_from_the_weights_and_new_tokens_from_their_mean(tmp_path: Path) -> None:
    weights = stand_in.gpt2(tmp_path / "weights")
    tiny.write_data(tmp_path)
    config = resolved_config(tmp_path, weights)
    prepared = prepare(config, say=lambda _: None)
    state = loop.Run(config, prepared, tmp_path / "run", Signals()).initial_state()
    original = loading.load(str(weights), template="plain")
    known = original.tokenizer.vocab_size
    table, theirs = (np.asarray(params["wte"]["embedding"]) for params in (state.params, original.params))
    assert prepared.tokenizer.vocab_size > known
    np.testing.assert_array_equal(table[:known], theirs[:known])
    added = table[known : prepared.tokenizer.vocab_size]
    np.testing.assert_allclose(added, np.tile(theirs[:known].mean(axis=0), (len(added), 1)), atol=1e-6)
    stacked = np.asarray(state.params["h"]["mlp_c_fc"]["kernel"])
    for layer in range(2):
        np.testing.assert_array_equal(stacked[layer], original.params["h"][str(layer)]["mlp_c_fc"]["kernel"])
    assert state.ema is not None
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)


@pytest.mark.slow
def test_a_fine_tuned_model_begins_better_than_a_fresh_one(tmp_path: Path) -> None:
    """The run that made the weights has seen this data, so the first loss shows whether they arrived."""
    source = loading.load_checkpoint(tiny.finished())
    weights = tmp_path / "weights"
    from ssl_jax import huggingface

    tokenizer = source.tokenizer
    huggingface.write(
        weights,
        source.shape,
        source.params,
        end_ids=tokenizer.end_ids,
        end_of_text_id=tokenizer.end_of_text_id,
        pad_id=tokenizer.pad_id,
    )
    tokenizer.save(weights)
    tiny.write_data(tmp_path)
    more = ["--train.labeled-only-fraction", "0"]
    run = tiny.run_train(CONFIGS / "gpt2_finetune.yaml", tmp_path / "run", *overrides(tmp_path, weights), *more)
    first, fresh = (tiny.metrics(workdir)[0]["loss/supervised"] for workdir in (run, tiny.finished()))
    assert first < 0.9 * fresh


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--model.n-layer", "3"], r"model.n_layer is 3, but .*config.json says 2"),
        (["--train.sequence-length", "128"], r"train.sequence_length 128 exceeds model.n_positions 64"),
        (["--model.size", "gpt2-medium"], r"model.n_layer is 24"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(
    tmp_path: Path, more: list[str], expected: str
) -> None:
    weights = stand_in.gpt2(tmp_path / "weights")
    with pytest.raises(UserError, match=expected):
        resolved_config(tmp_path, weights, *more)


def test_dropout_is_the_users(tmp_path: Path) -> None:
    weights = stand_in.gpt2(tmp_path / "weights")
    config = resolved_config(tmp_path, weights, "--model.resid-pdrop", "0.3")
    assert (config.model.resid_pdrop, config.model.attn_pdrop) == (0.3, 0.1)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """It has more tokens than the embedding has rows."""
    weights, other = stand_in.chinese(tmp_path / "weights"), stand_in.gpt2(tmp_path / "other")
    tiny.write_data(tmp_path)
    config = resolved_config(tmp_path, weights, "--tokenizer.name-or-path", str(other))
    prepared = prepare(config, say=lambda _: None)
    with pytest.raises(UserError, match="take the tokenizer that the model was trained with"):
        loop.Run(config, prepared, tmp_path / "run", Signals()).initial_state()


def test_a_model_ends_where_its_generation_config_says(tmp_path: Path) -> None:
    weights = stand_in.gpt2(tmp_path / "weights")
    (weights / "SHA256SUMS").unlink()
    model = ssl_jax.load(str(weights))
    (reply,) = model.draw([as_prompt("is the apple red?")], Sampling(max_new_tokens=16, do_sample=False))[0]
    end = reply.token_ids[3]
    path = weights / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [end, model.tokenizer.end_of_text_id]}), encoding="utf-8")
    (shorter,) = ssl_jax.load(str(weights)).draw(
        [as_prompt("is the apple red?")], Sampling(max_new_tokens=16, do_sample=False)
    )[0]
    assert shorter.token_ids == reply.token_ids[: reply.token_ids.index(end)] and shorter.finish_reason == "stop"
    path.write_text(json.dumps({"eos_token_id": "</s>"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is a token id"):
        ssl_jax.load(str(weights))
