"""All benchmarks on one GPU of 80 GB, in parts that take less than ten minutes each.

    python benchmarks/gpu.py --parts training

Figures go beside those of other devices into the files of `--results`, each as soon as it is there. What fails against
its peers is measured again without them, and keeps nothing else from being measured.
"""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from workload import child

from ssl_jax import command_line
from ssl_jax.config import Section
from ssl_jax.errors import UserError

Part = Literal[
    "training",
    "training-1.5B",
    "generation",
    "generation-batches",
    "pseudo-labels",
    "start-up",
    "memory",
    "scaling",
]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A script of this folder, its options but for device and output, and its peers if it has any."""

    script: str
    options: str
    peers: tuple[str, ...] | None = None

    def arguments(self, results: str, *, with_peers: bool) -> list[str]:
        """The script's arguments."""
        output = str(Path(results) / f"{self.script}.json")
        peers = [] if self.peers is None else ["--peers", *(self.peers if with_peers else ())]
        return ["--device", "cuda", *self.options.split(), "--output", output, *peers]


_COMPILED, _GENERATE = ("huggingface-compiled",), ("huggingface", "huggingface-static")
_REPLIES = "--size gpt2 --new-tokens 257 --rounds 5"

# A compiling peer takes a minute or more to get ready, so the commands are few.
PARTS: dict[Part, tuple[Benchmark, ...]] = {
    "training": (
        Benchmark("train_throughput", "--size gpt2 --dropout 0", _COMPILED),
        Benchmark("train_throughput", "--size gpt2-medium --dropout 0", _COMPILED),
    ),
    # Parameters, their moments and gradients of two such models leave no memory for what training keeps of a batch.
    "training-1.5B": (
        Benchmark("train_throughput", "--size gpt2-xl --dropout 0 --together False --rounds 5", _COMPILED),
    ),
    "generation": tuple(
        Benchmark("generate_throughput", f"{_REPLIES} --batch-sizes {batch} --modes {mode}", _GENERATE)
        for batch in (1, 256)
        for mode in ("greedy", "sample")
    ),
    "generation-batches": tuple(
        Benchmark("generate_throughput", f"{_REPLIES} --batch-sizes {batch} --modes greedy", _GENERATE)
        for batch in (8, 32, 128)
    ),
    "pseudo-labels": (Benchmark("pseudo_label_throughput", "--size gpt2 --prompts 4096 --batch-size 256"),),
    "start-up": (Benchmark("start_up", "--size gpt2 --repeats 2", ("huggingface",)),),
    "memory": (Benchmark("memory", "--size gpt2 --dropout 0 --lengths 1024 --vocabularies 131072", ("huggingface",)),),
    "scaling": (Benchmark("scaling", "--size quickstart --dropout 0"),),
}


class Options(Section):
    """What is measured, and where the results go."""

    parts: tuple[Part, ...] = Field(default=tuple(PARTS), description="What is measured.")
    results: str = Field(default="benchmarks/results", description="Folder of the files that receive the results.")


def main(arguments: Sequence[str]) -> None:
    """Measures one part after the other.

    Raises:
      UserError: something could not be measured even alone; the rest has been.
    """
    options = command_line.parse(
        Options, arguments, program="python benchmarks/gpu.py", summary=(__doc__ or "").strip()
    )
    failed = []
    for part in options.parts:
        started = time.monotonic()
        failed += [benchmark for benchmark in PARTS[part] if not _measure(benchmark, options.results)]
        print(f"{part}: {time.monotonic() - started:,.0f} s", flush=True)
    if failed:
        names = "; ".join(f"{benchmark.script} {benchmark.options}" for benchmark in failed)
        raise UserError(f"not measured: {names}; what was said is above")


def _measure(benchmark: Benchmark, results: str) -> bool:
    for with_peers in (True, False) if benchmark.peers else (True,):
        command = child(f"{benchmark.script}.py", *benchmark.arguments(results, with_peers=with_peers))
        if subprocess.run(command, check=False).returncode == 0:
            return True
    return False


if __name__ == "__main__":
    command_line.run(main)
