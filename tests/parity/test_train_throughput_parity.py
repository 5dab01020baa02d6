"""The benchmark of training lets the peer do the same work."""

import json
import math
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import train_huggingface  # noqa: E402
import train_throughput  # noqa: E402
from workload import workload  # noqa: E402


def test_both_train_a_model_of_the_same_size_from_the_same_loss(tmp_path):
    output = tmp_path / "result.json"
    options = ("--size", "tiny", "--dropout", "0", "--rounds", "2", "--turn-seconds", "0.01", "--output", str(output))
    train_throughput.main(options)
    (result,) = json.loads(output.read_text()).values()
    ours, theirs = result["contestants"]["ssl_jax"], result["contestants"]["huggingface"]
    assert result["not_measured"] == []
    assert theirs["parameters"] == ours["parameters"]
    uniform, length = math.log(result["workload"]["vocab_size"]), result["workload"]["sequence_length"]
    assert result["last_loss"]["ssl_jax"] == pytest.approx(uniform, rel=0.01)
    # The Trainer takes the mean over all labels, of which the first of a row is not predicted.
    assert result["last_loss"]["huggingface"] == pytest.approx(uniform * (length - 1) / length, rel=0.01)
    mine, its = result["tokens_per_sec"]["ssl_jax"], result["tokens_per_sec"]["huggingface"]
    assert result["ratio"]["huggingface"]["max"] == pytest.approx(max(a / b for a, b in zip(mine, its, strict=True)))


def test_one_after_the_other_each_has_its_own_number_of_steps(tmp_path):
    output = tmp_path / "result.json"
    options = ("--size", "tiny", "--dropout", "0", "--rounds", "2", "--turn-seconds", "0.05", "--output", str(output))
    train_throughput.main([*options, "--together", "False"])
    (result,) = json.loads(output.read_text()).values()
    assert result["steps_per_turn"].keys() == {"ssl_jax", "huggingface"}
    assert len(result["tokens_per_sec"]["huggingface"]) == len(result["tokens_per_sec"]["ssl_jax"]) == 2


def test_attention_of_the_compiled_peer_is_causal_without_a_mask():
    work = workload("tiny", dropout=0.0)
    tokens_BT = torch.randint(work.vocab_size, (work.rows, work.sequence_length))
    usual, unmasked = (
        train_huggingface.make_network(work, attention)(tokens_BT).logits
        for attention in ("sdpa", train_huggingface.UNMASKED)
    )
    assert torch.equal(usual, unmasked)
