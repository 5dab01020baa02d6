"""Seconds from the start of a process to the end of its imports, of the first training step, of a reply's first token.

    python benchmarks/start_up.py --size quickstart

Every figure is the median over fresh processes, measured from outside, the interpreter's own start included. `cold` is
with an empty cache of compiled programs, where the commands have it, `warm` with what an earlier process left there.
The peer is transformers with PyTorch, which compiles nothing: `import transformers`, `Trainer`'s first step, and
`generate`. A step is that of a run on random data; a token comes from a model that is read from its directory.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field
from store import add_result
from workload import Device, Size, child, has_peer, variables, workload

from ssl_jax import command_line
from ssl_jax.config import Section
from ssl_jax.errors import UserError

OURS = "ssl_jax"
Peer = Literal["huggingface"]
Goal = Literal["import", "step", "token"]
_NAMES: dict[Goal, str] = {
    "import": "import",
    "step": "first training step",
    "token": "first token of a reply",
}


class Options(Section):
    """What is started, and where the result goes."""

    size: Size = Field(default="quickstart", description="Model and batch.")
    device: Device = Field(default="cpu", description="Where to compute: float32 on cpu, bfloat16 on cuda.")
    goals: tuple[Goal, ...] = Field(default=("import", "step", "token"), description="How far a process goes.")
    peers: tuple[Peer, ...] = Field(default=("huggingface",), description="Whom to compare with.")
    repeats: int = Field(default=3, ge=1, description="Processes per figure.")
    output: str = Field(default="benchmarks/results/start_up.json", description="File that receives the result.")


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table, puts the result beside those of other sizes in the file."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/start_up.py", summary=(__doc__ or "").strip()
    )
    peers = options.peers if has_peer() else ()
    seconds = measure(options, peers)
    print(report(seconds))
    result = {**options.model_dump(exclude={"output"}), "seconds": seconds}
    result["not_measured"] = [peer for peer in options.peers if peer not in peers]
    add_result(options.output, f"{options.size}, {options.device}", result)


def measure(options: Options, peers: Sequence[Peer]) -> dict[str, dict[Goal, list[float]]]:
    """Seconds of every repeat by column (`cold`, `warm`, and the peer) and goal."""
    columns = {"cold": OURS, "warm": OURS, **{peer: peer for peer in peers}}
    seconds: dict[str, dict[Goal, list[float]]] = {column: {goal: [] for goal in options.goals} for column in columns}
    described = workload(options.size, options.device).model_dump_json()
    elsewhere = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    environment |= variables(options.device)
    with tempfile.TemporaryDirectory(prefix="start_up_") as name:
        model = f"{name}/model"
        if "token" in options.goals:
            start(OURS, "write", f"{described}\n{model}", environment)
        for goal in options.goals:
            argument = {"import": "", "step": described, "token": f"{options.device}\n{model}"}[goal]
            for repeat in range(options.repeats):
                # What the first process leaves in the cache the second one finds.
                cached = {**environment, "XDG_CACHE_HOME": f"{name}/{goal}-{repeat}"}
                for column, contestant in columns.items():
                    seconds[column][goal].append(start(contestant, goal, argument, cached))
    return seconds


def start(contestant: str, goal: str, argument: str, environment: Mapping[str, str]) -> float:
    """Seconds from the start of a process to its goal.

    Raises:
      UserError: it did not get there.
    """
    started = time.monotonic()
    result = subprocess.run(
        child("start_up_child.py", contestant, goal, argument),
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if result.returncode:
        raise UserError(f"{contestant}, {goal}: its process ended with exit code {result.returncode}; see above")
    return float(result.stdout.splitlines()[-1]) - started


def report(seconds: Mapping[str, Mapping[Goal, Sequence[float]]]) -> str:
    """The medians for people."""
    lines = [f"{'seconds, median':<26}" + "".join(f"{column:>14}" for column in seconds)]
    for goal in seconds["cold"]:
        cells = [statistics.median(column[goal]) for column in seconds.values()]
        lines.append(f"{_NAMES[goal]:<26}" + "".join(f"{cell:>14.2f}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
