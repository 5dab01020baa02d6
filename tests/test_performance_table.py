"""The README's table of speed says what was measured and what was not; a GPU's benchmarks are commands that exist."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ssl_jax import command_line
from ssl_jax.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import performance_table  # noqa: E402
import readme  # noqa: E402
from alternate import spread  # noqa: E402

ON_CPU = {"device": "cpu", "cpu": "Some CPU", "cores": 2, "gpus": [], "versions": {"jax": "1.2", "torch": None}}
ON_GPU = {
    "device": "cuda",
    "cpu": "Some CPU",
    "cores": 16,
    "gpus": ["Some GPU, 80 GB, 1.0"],
    "versions": {"torch": "3"},
}
RESULTS: dict[str, Any] = {
    "train_throughput": {
        "quickstart, cpu, 16 × 128, dropout 0": {
            **ON_CPU,
            "tokens_per_sec": {"ssl_jax": [2000.0, 3000.0, 4000.0], "huggingface": [1000.0, 2000.0, 4000.0]},
            "ratio": {"huggingface": spread([2.0, 1.5, 1.0])},
            "mfu": {"ssl_jax": 0.6, "huggingface": 0.4},
            "data_share": 0.001,
        },
        "gpt2, cuda, 32 × 1024, dropout 0": {
            **ON_GPU,
            "tokens_per_sec": {"ssl_jax": [400_000.0], "huggingface-compiled": [200_000.0]},
            "ratio": {"huggingface-compiled": spread([2.0])},
            "mfu": {"ssl_jax": 0.5, "huggingface-compiled": 0.25},
            "data_share": 0.001,
        },
    },
    "generate_throughput": {
        "gpt2, cpu, batch 1, greedy": {
            **ON_CPU,
            "new_tokens": 30,
            "first_token_seconds": {"ssl_jax": [1.0, 1.0], "huggingface": [1.0, 3.0]},
            "decode_seconds": {"ssl_jax": [2.0, 2.0], "huggingface": [5.0, 9.0]},
            "decode_tokens_per_sec": {"ssl_jax": [14.5, 14.5], "huggingface": [5.8, 3.2]},
            "ratio": {"huggingface": spread([2.0, 4.0])},
            "decode_ratio": {"huggingface": spread([2.5, 4.5])},
            "bandwidth_share": spread([0.7]),
        },
        "gpt2, cuda, batch 256, greedy": {
            **ON_GPU,
            "new_tokens": 30,
            "first_token_seconds": {"ssl_jax": [1.0]},
            "decode_seconds": {"ssl_jax": [2.0]},
            "decode_tokens_per_sec": {"ssl_jax": [123_456.0]},
            "ratio": {},
            "decode_ratio": {},
        },
    },
    "start_up": {
        "quickstart, cpu": {
            **ON_CPU,
            "seconds": {
                "cold": {"step": [10.0, 12.0]},
                "warm": {"step": [2.0, 4.0]},
                "huggingface": {"step": [8.0, 8.0]},
            },
        }
    },
    "memory": {
        "gpt2, cpu, 8 × 1024, vocabulary 50257, dropout 0.1": {
            "ours": {"compiler_bytes": 4 * 10**9},
            "naive": {"compiler_bytes": 10**10},
        }
    },
    "scaling": {
        "quickstart, cpu, unlabeled": {
            "points": {"0 to 1": {"ms_per_ktoken": [100.0, 110.0]}, "3 to 1": {"ms_per_ktoken": [100.0, 100.0]}}
        }
    },
    "pseudo_label_throughput": {
        "quickstart, cpu, 512 × 1, batch 64": {
            "useful_tokens_per_sec": {"in step": [100.0, 120.0], "refilled": [220.0, 200.0]},
            "row_utilization": {"in step": 0.35, "refilled": 0.9},
            "ratio": spread([2.2, 1.8]),
        }
    },
    "prepare": {"bytes": 10**9, "peak_bytes": 5 * 10**8, "megabytes_per_sec": 7.25},
    "input_stream": {"tokens_per_sec": {"shards on disk": [3e6], "memory": [2e7]}},
}


def write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir()
    for name, content in results.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def rendered(folder: Path, results: dict[str, Any]) -> str:
    """The README after the results were rendered into it."""
    write(folder / "results", results)
    (folder / "README.md").write_text(
        "before\n<!-- performance table -->\nold\n<!-- end of performance table -->\nafter"
    )
    performance_table.main(["--results", str(folder / "results"), "--readme", str(folder / "README.md")])
    return (folder / "README.md").read_text()


def test_rows_are_medians_with_their_peers_quartiles_and_goals(tmp_path):
    text = rendered(tmp_path, RESULTS)
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    for row in (
        "| training, CPU, 7M, batch 16 × 128, dropout 0 | 3,000 tokens/s | 2,000 tokens/s | 1.50 × (1.25 to 1.75) | "
        "60% of the peak's FLOP/s; ≥ 1.0 × |",
        "| training's wait for data, CPU, 7M | 0.10% of the time |  |  | < 2% |",
        "| a token with 3 unlabeled rows per labeled one, CPU, 7M | 100 µs | 105 µs (labeled rows alone) | "
        "1.05 × (1.02 to 1.08) | 1.0 ×: no more than its share |",
        "| replies, CPU, 124M, batch 1, greedy | 10 tokens/s | 4 tokens/s | 3.00 × (2.50 to 3.50) | "
        "70% of memory bandwidth, ≥ 60%; ≥ 3 × |",
        "| a teacher's replies, CPU, 7M, finished rows refilled | 210 tokens/s | 110 tokens/s (whole batches) | "
        "2.00 × (1.90 to 2.10) | 90% of row-steps useful (35%); ≥ 1.0 × |",
        "| first training step, 7M, second start | 3.0 s | 8.0 s | 3.00 × (2.50 to 3.50) | "
        "0.27 × the first (11.0 s); ≤ 0.5 × the first |",
        "| memory of a step, CPU, 124M, batch 8 × 1024 | 4.0 GB | 10.0 GB (all logits at once) | 2.50 × | ≥ 2 × |",
        "| preparing data, CPU | 7.2 MB/s |  |  | 1,000 MB in 500 MB of memory |",
        "| reading packed batches from disk, CPU | 3.0M tokens/s |  |  | 20.0M tokens/s from memory |",
        "| training, GPU, 124M, batch 32 × 1024, dropout 0 | 400,000 tokens/s | 200,000 tokens/s (`torch.compile`) | "
        "2.00 × (2.00 to 2.00) | 50% of the peak's FLOP/s; ≥ 350,000 tokens/s, ≥ 1.3 × |",
    ):
        assert row in text
    assert "CPU: Some CPU, 2 cores, float32. GPU: Some GPU, bfloat16. jax 1.2, torch 3" in text


def test_a_peer_that_was_not_measured_is_no_ratio(tmp_path):
    row = "| decoding, GPU, 124M, batch 256, greedy | 123,456 tokens/s | not measured (static cache, compiled) |  |"
    assert row in rendered(tmp_path, RESULTS)


def test_rows_without_results_say_so(tmp_path):
    text = rendered(tmp_path, {})
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert all(row.split(" | ")[1] == "not measured" for row in rows)
    assert sum("GPU" in row for row in rows) == 6
    assert "CPU: not measured. GPU: not measured." in text


def test_a_readme_without_markers_is_named_with_them(tmp_path):
    (tmp_path / "README.md").write_text("<!-- table -->")
    with pytest.raises(UserError, match=r"README.md: the markers <!-- table --> and <!-- end of table --> are missing"):
        readme.replace_section(tmp_path / "README.md", "table", "text")
    assert (tmp_path / "README.md").read_text() == "<!-- table -->"


@pytest.mark.parametrize("benchmark", [one for part in gpu.PARTS.values() for one in part], ids=str)
def test_commands_for_a_gpu_are_what_their_scripts_understand(benchmark, tmp_path):
    script = importlib.import_module(benchmark.script)
    for with_peers in (True, False):
        arguments = benchmark.arguments(str(tmp_path), with_peers=with_peers)
        options = command_line.parse(script.Options, arguments, program=benchmark.script, summary="")
        assert (options.device, Path(options.output).parent) == ("cuda", tmp_path)
        if benchmark.peers is not None:
            assert options.peers == (benchmark.peers if with_peers else ())


def test_what_fails_against_its_peers_is_measured_alone_and_what_fails_alone_is_told_at_the_end(tmp_path, monkeypatch):
    log = tmp_path / "log"

    def child(script: str, *arguments: str) -> list[str]:
        fails = "broken" in arguments or "peer" in arguments
        return ["sh", "-c", f"echo {script} {arguments[-1]} >> {log}; exit {int(fails)}"]

    parts = {
        "training": (gpu.Benchmark("one", "--size tiny", ("peer",)), gpu.Benchmark("two", "broken", ())),
        "memory": (gpu.Benchmark("three", "--size tiny"),),
    }
    monkeypatch.setattr(gpu, "child", child)
    monkeypatch.setattr(gpu, "PARTS", parts)
    with pytest.raises(UserError, match="not measured: two broken; what was said is above"):
        gpu.main(["--parts", "training", "memory"])
    assert log.read_text().splitlines() == [
        "one.py peer",
        "one.py --peers",
        "two.py --peers",
        "three.py benchmarks/results/three.json",
    ]
