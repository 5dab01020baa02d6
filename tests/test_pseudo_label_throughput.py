"""The benchmark of pseudo-labeling runs at its smallest size and writes figures that belong together."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pseudo_label_throughput  # noqa: E402


def test_refilled_rows_do_the_same_work_in_fewer_row_steps(tmp_path, capsys):
    output = tmp_path / "pseudo_label_throughput.json"
    output.write_text('{"another": {}}')
    pseudo_label_throughput.main(
        ["--size", "tiny", "--prompts", "24", "--num-return-sequences", "2", "--batch-size", "12", "--new-tokens", "24",
         "--prompt-tokens", "8", "--mean-tokens", "6", "--rounds", "2", "--output", str(output)]
    )  # fmt: skip
    written = json.loads(output.read_text())
    assert list(written) == ["another", "tiny, cpu, 24 × 2, batch 12"]
    result = written["tiny, cpu, 24 × 2, batch 12"]
    useful = result["tokens"] - 48
    for name, share in result["row_utilization"].items():
        assert share == pytest.approx(useful / result["row_steps"][name]) and 0 < share <= 1
        rates = [result["tokens"] / seconds for seconds in result["seconds"][name]]
        assert result["useful_tokens_per_sec"][name] == pytest.approx(rates) and len(rates) == 2
    assert result["row_steps"]["refilled"] < result["row_steps"]["in step"]
    assert "refilled ÷ in step" in capsys.readouterr().out
