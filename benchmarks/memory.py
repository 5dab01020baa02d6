"""Peak memory of a training step against sequence length and vocabulary.

    python benchmarks/memory.py
    python benchmarks/memory.py --size gpt2 --rows 8 --lengths 1024 --vocabularies --steps 0

Every figure comes from a fresh process that takes the first steps of a run: on a CPU its largest resident memory less
what it had before there was a model (compilation is in it), on a GPU its allocator's peak. Beside it stands what the
compiler counts: arguments, results and temporaries. `naive` is our step with the logits of all tokens held at once;
`huggingface` is `Trainer` with `GPT2LMHeadModel`. With `--steps 0` nothing runs and only the compiler is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from pydantic import Field
from store import add_result
from workload import Device, Size, Workload, child, has_peer, variables, workload

from ssl_jax import command_line
from ssl_jax.config import Section
from ssl_jax.errors import UserError

OURS, NAIVE, PEER = "ours", "naive", "huggingface"
Peer = Literal["huggingface"]


class Options(Section):
    """What is trained, and where the result goes."""

    size: Size = Field(default="quickstart", description="Model.")
    device: Device = Field(default="cpu", description="Where to compute: float32 on cpu, bfloat16 on cuda.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="On embeddings, attention and residual stream.")
    rows: int = Field(default=8, ge=1, description="Rows of a batch.")
    lengths: tuple[int, ...] = Field(default=(128, 256, 512, 1024), description="Tokens per row, one after the other.")
    vocabularies: tuple[int, ...] = Field(default=(8192, 32768, 131072), description="Vocabularies, one by one.")
    vocabulary_length: int = Field(default=512, ge=8, description="Tokens per row while vocabularies are varied.")
    peers: tuple[Peer, ...] = Field(default=("huggingface",), description="Whom to compare with.")
    steps: int = Field(default=2, ge=0, description="Steps that a process takes; 0: compile only.")
    output: str = Field(default="benchmarks/results/memory.json", description="File that receives the result.")


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table, puts each result beside the others in the file as soon as it is there."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/memory.py", summary=(__doc__ or "").strip()
    )
    contestants = [OURS, NAIVE]
    if options.steps and has_peer():
        contestants += options.peers
    settings = options.model_dump(exclude={"output", "lengths", "vocabularies", "vocabulary_length"})
    print(f"{'MB, over the baseline':<34}" + "".join(f"{name:>14}" for name in (OURS, NAIVE, PEER, "ours ÷ naive")))
    for work in workloads(options):
        measured = {contestant: measure(contestant, work, options.steps) for contestant in contestants}
        print(report(work, measured), flush=True)
        key = f"{options.size}, {options.device}, {work.rows} × {work.sequence_length}, vocabulary {work.vocab_size}"
        key += f", dropout {work.dropout:g}"
        add_result(options.output, key, {**settings, "workload": work.model_dump(), **measured})


def workloads(options: Options) -> Iterator[Workload]:
    """First along the lengths, then along the vocabularies."""
    base = workload(options.size, options.device, dropout=options.dropout, rows=options.rows)
    along_lengths = [(length, base.vocab_size) for length in options.lengths]
    along_vocabularies = [(options.vocabulary_length, vocabulary) for vocabulary in options.vocabularies]
    for length, vocabulary in along_lengths + along_vocabularies:
        positions = max(length, base.n_positions)
        changes = {"sequence_length": length, "n_positions": positions, "vocab_size": vocabulary}
        yield command_line.validate(Workload, {**base.model_dump(), **changes}, origin="the command line")


def measure(contestant: str, work: Workload, steps: int) -> dict[str, int]:
    """What a fresh process says of its memory, in bytes.

    Raises:
      UserError: it failed, perhaps for want of memory.
    """
    command = child("memory_child.py", contestant, work.model_dump_json(), str(steps))
    result = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables(work.device)}
    )
    if result.returncode:
        raise UserError(f"{contestant}: its process ended with exit code {result.returncode}; what it said is above")
    return json.loads(result.stdout.splitlines()[-1])


def report(work: Workload, measured: Mapping[str, Mapping[str, int]]) -> str:
    """One workload for people: a line of what was measured and one of what the compiler counts."""
    title = f"{work.rows} × {work.sequence_length}, vocabulary {work.vocab_size}"
    over = {
        name: sizes["peak_bytes"] - sizes["baseline_bytes"] for name, sizes in measured.items() if "peak_bytes" in sizes
    }
    counted = {name: sizes["compiler_bytes"] for name, sizes in measured.items() if "compiler_bytes" in sizes}
    return "\n".join(
        f"{title + label:<34}"
        + "".join(f"{sizes[name] / 1e6:>14,.0f}" if name in sizes else f"{'–':>14}" for name in (OURS, NAIVE, PEER))
        + f"{sizes[OURS] / sizes[NAIVE]:>14.2f}"
        for label, sizes in ((", peak", over), (", compiler", counted))
        if sizes
    )


if __name__ == "__main__":
    command_line.run(main)
