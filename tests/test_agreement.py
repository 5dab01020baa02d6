"""Processes of one run that differ in code or configuration are told apart, and told how."""

from __future__ import annotations

import copy
import re

import pytest

from ssl_jax import agreement, ending, signals
from ssl_jax.config import Config
from ssl_jax.errors import UserError


def facts() -> agreement.Facts:
    return agreement._facts(
        Config.model_validate({"data": {"labeled": [{"path": "chats.jsonl"}]}}).model_dump(mode="json")
    )


def test_one_process_agrees_with_itself() -> None:
    agreement.check({"a": 1})
    agreement._compare([facts(), facts()])


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("versions", "jax", "0.9.0", r"process 2 has jax 0\.9\.0, process 0 has .*; install the same versions"),
        ("sources", "ssl_jax/step.py", "0", r"process 2 runs other code than process 0: ssl_jax/step\.py differs"),
        ("sources", "ssl_jax/mine.py", "0", r"process 2 runs other code than process 0: ssl_jax/mine\.py differs"),
        ("settings", "train.steps", 7, r"process 2 has another configuration than process 0 \(train\.steps is 7 there"),
        ("settings", "data.labeled.0.path", "b", r"data\.labeled\.0\.path is 'b' there, 'chats\.jsonl' here"),
    ],
)
def test_what_differs_is_named(kind: str, name: str, value: object, message: str) -> None:
    other = copy.deepcopy(facts())
    other[kind][name] = value
    with pytest.raises(UserError, match=message):
        agreement._compare([facts(), facts(), other])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: pair.cc:547 Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
        (
            RuntimeError("UNAVAILABLE: Socket closed; while calling /xla.coordination.CoordinationService/GetKeyValue"),
            True,
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes"), False),
        (ValueError("NOT_FOUND: Error reading checkpoints/4/params: OS error: No such file or directory"), False),
        (KeyError("gloo"), False),
    ],
)
def test_a_lost_process_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert ending.is_loss(error) == expected


def test_the_dead_are_named() -> None:
    assert ending._obituary([1, 3], 4).startswith("stopped: process 1, 3 of 4 (numbered from 0) is gone")
    assert re.search(r"one of 4 processes is gone.*\n.*run the same command again", ending._obituary([], 4))


def test_a_reason_survives_the_key_value_store() -> None:
    why = ending.End(2, "error: „quoted“\n", 3, is_suspicion=True)
    assert ending.End.read(why.write()) == why


def mesh():
    from ssl_jax import config, sharding

    return sharding.make_mesh(config.Mesh())


def test_one_process_hears_of_its_signal_at_once() -> None:
    own = signals.Signals()
    shared = signals.SharedSignals(own, mesh())
    assert shared.after_step() is None and shared.now() is None
    own.received = "SIGINT"
    assert shared.after_step() == shared.now() == "SIGINT"


def test_of_several_processes_each_hears_of_a_signal_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    own = signals.Signals()
    shared = signals.SharedSignals(own, mesh())
    monkeypatch.setattr(shared, "_is_alone", False)
    assert [shared.after_step(), shared.after_step()] == [None, None]
    own.received = "SIGTERM"
    assert [shared.after_step(), shared.after_step(), shared.after_step()] == [None, "SIGTERM", "SIGTERM"]
    assert shared.now() == "SIGTERM"
