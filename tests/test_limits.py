"""What is known to need more memory than a device has is refused, and the message says what to lower."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from ssl_jax import plan, programs, sharding
from ssl_jax.config import Config
from ssl_jax.errors import UserError
from ssl_jax.forecast import limits
from ssl_jax.model import GPT2

RECORDS = {"labeled_train": 100, "raw_train": 100, "prompt_train": 100}
SETTINGS: dict[str, Any] = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 256, "dtype": "float32"},
    "train": {"steps": 100, "per_device_train_batch_size": 4, "sequence_length": 64, "unlabeled_ratio": 1},
    "evaluation": {"max_prompt_tokens": 64},
    "pseudo_labels": {"max_prompt_tokens": 64},
}


def check(monkeypatch: pytest.MonkeyPatch, available: int | None, **sections: dict[str, Any]) -> None:
    """Checks a small run, with fields of its sections set otherwise, on a device of so many bytes."""
    values = {name: {**SETTINGS.get(name, {}), **sections.get(name, {})} for name in {*SETTINGS, *sections}}
    config = Config.model_validate(values)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    shape = GPT2.from_config(config.model, 320, mesh, sequence_length=64)
    made = plan.make_plan(config, RECORDS, 10, 1)
    state = programs.make(config, made, shape, mesh, {}).abstract_state
    monkeypatch.setattr(limits, "device_memory", lambda _: available)
    limits.check(config, made, shape, state, mesh)


def test_a_small_run_fits_into_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    device_memory = limits.device_memory(sharding.make_mesh(Config().mesh, jax.devices()[:1]))
    assert device_memory is not None and device_memory > 2**28
    check(monkeypatch, device_memory)


def test_where_memory_is_not_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, None, train={"per_device_train_batch_size": 65_536})


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"n_embd": 512}}, r"parameters, their average and moments take .* lower model\.n_layer, n_embd"),
        (
            {"train": {"per_device_train_batch_size": 1000}},
            r"2,000 rows of .* lower train\.per_device_train_batch_size",
        ),
        (
            {"train": {"per_device_eval_batch_size": 10_000}},
            r"evaluating train\.per_device_eval_batch_size 10,000 rows",
        ),
        (
            {"pseudo_labels": {"batch_size": 10_000, "rounds": [0.5]}},
            r"drawing pseudo_labels\.batch_size 10,000 replies",
        ),
    ],
)
def test_what_is_too_much_is_named(monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], says: str) -> None:
    check(monkeypatch, 20_000_000)
    with pytest.raises(UserError, match=says):
        check(monkeypatch, 20_000_000, **sections)


def test_micro_batches_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"per_device_train_batch_size": 600}
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        check(monkeypatch, 20_000_000, train=train)
    check(monkeypatch, 20_000_000, train={**train, "gradient_accumulation_steps": 10})
