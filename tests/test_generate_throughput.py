"""The benchmark of generation runs at its smallest size and writes figures that belong together."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import generate_throughput  # noqa: E402
import performance_table  # noqa: E402


@pytest.mark.usefixtures("compiled_fast")
@pytest.mark.parametrize(("weights", "suffix"), [("auto", ""), ("int8", ", int8")])
def test_a_result_stands_beside_others_and_its_rates_are_those_of_its_times(
    tmp_path, capsys, monkeypatch, weights, suffix
):
    monkeypatch.setattr(generate_throughput, "has_peer", lambda: False)
    monkeypatch.setattr(generate_throughput, "_BANDWIDTH_BYTES", 2**20)
    output = tmp_path / "generate_throughput.json"
    output.write_text('{"another": {}}')
    generate_throughput.main(
        ["--size", "tiny", "--batch-sizes", "2", "--modes", "sample", "--prompt-tokens", "8", "--new-tokens", "5",
         "--rounds", "2", "--weights", weights, "--output", str(output)]
    )  # fmt: skip
    written = json.loads(output.read_text())
    key = f"tiny, cpu, batch 2, sample{suffix}"
    assert list(written) == ["another", key]
    result = written[key]
    for seconds, rate in zip(
        result["decode_seconds"]["ssl_jax"], result["decode_tokens_per_sec"]["ssl_jax"], strict=True
    ):
        assert rate == pytest.approx(2 * 4 / seconds)
    for seconds, rate in zip(
        result["first_token_seconds"]["ssl_jax"], result["prefill_tokens_per_sec"]["ssl_jax"], strict=True
    ):
        assert rate == pytest.approx(2 * 8 / seconds)
    assert result["bandwidth_share"]["median"] > 0
    assert result["not_measured"] == ["huggingface"]
    shown = {"generate_throughput": {f"gpt2, cpu, batch 1, sample{suffix}": result}}
    assert performance_table.replies(shown, 1, "sample", "a goal", suffix.removeprefix(", "))[2] == "not measured"
    assert "peer not measured" in capsys.readouterr().out
