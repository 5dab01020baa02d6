"""Every benchmark that has a peer lets it work, too, at the smallest size."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import generate_throughput  # noqa: E402
import memory  # noqa: E402
import start_up  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_fast")


def run(script: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    """The only result that a script writes."""
    output = folder / "result.json"
    script.main([*arguments, "--size", "tiny", "--output", str(output)])
    (result,) = json.loads(output.read_text()).values()
    return result


def test_generation_of_both_forms_of_the_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_throughput, "_BANDWIDTH_BYTES", 2**20)
    peers = ("huggingface", "huggingface-static")
    options = ("--batch-sizes", "2", "--modes", "sample", "--prompt-tokens", "8", "--new-tokens", "5", "--rounds", "1")
    result = run(generate_throughput, tmp_path, *options, "--peers", *peers)
    assert result["not_measured"] == []
    for ratio, seconds in (("prefill_ratio", "first_token_seconds"), ("decode_ratio", "decode_seconds")):
        mine = result[seconds]["ssl_jax"][0]
        for peer in peers:
            assert result[ratio][peer]["median"] == pytest.approx(result[seconds][peer][0] / mine)


def test_start_up_of_the_peer_reaches_its_first_token_after_its_import(tmp_path):
    seconds = run(start_up, tmp_path, "--repeats", "1", "--goals", "import", "token")["seconds"]["huggingface"]
    assert 0 < seconds["import"][0] < seconds["token"][0]


def test_memory_of_the_peers_step_is_measured(tmp_path):
    options = ("--lengths", "64", "--rows", "4", "--vocabularies", "--steps", "1")
    measured = run(memory, tmp_path, *options)["huggingface"]
    assert measured["peak_bytes"] > measured["baseline_bytes"] > 0
