"""The benchmarks of preparation and of reading run on little data and write what the README's table reads."""

import json
import sys
from pathlib import Path

import pytest
import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import input_stream  # noqa: E402
import performance_table  # noqa: E402
import prepare  # noqa: E402


def test_preparation_is_timed_as_a_whole_and_step_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_CLOCK_GRAIN_SECONDS", 0)
    output = tmp_path / "prepare.json"
    prepare.main(["--megabytes", "1", "--step-megabytes", "1", "--folder", str(tmp_path), "--output", str(output)])
    result = json.loads(output.read_text())
    assert 10**6 <= result["bytes"] < 1.1 * 10**6
    assert result["megabytes_per_sec"] == pytest.approx(result["bytes"] / result["seconds"] / 1e6)
    assert result["peak_bytes"] > 10**7
    assert all(seconds > 0 for seconds in result["step_cpu_seconds_per_megabyte"].values())
    assert performance_table.preparation({"prepare": result})[1] == f"{result['megabytes_per_sec']:.1f} MB/s"
    assert list(tmp_path.iterdir()) == [output], "what was prepared is removed"


def test_batches_are_read_from_disk_and_from_memory_in_turn(tmp_path):
    output = tmp_path / "input_stream.json"
    options = ("--tokens", "4000", "--sequence-length", "64", "--rows", "2", "--batches", "3", "--repeats", "2")
    input_stream.main(["--run", str(tiny.write_all(tmp_path / "run")), *options, "--output", str(output)])
    result = json.loads(output.read_text())
    assert [len(rates) for rates in result["tokens_per_sec"].values()] == [2, 2]
    assert all(0.5 < share <= 1 for share in result["fill"].values())
    row = performance_table.reading({"input_stream": result})
    assert row[1] == f"{sum(result['tokens_per_sec']['shards on disk']) / 2e6:.1f}M tokens/s"
