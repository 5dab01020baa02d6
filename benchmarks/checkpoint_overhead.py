"""What checkpoints cost a run: how long a save blocks it, what manifest and verification add.

    python benchmarks/checkpoint_overhead.py

A run's own step trains on random data in a fresh process, with and without an average of the weights. First a few
saves and restores are timed part by part, beside the limits of the machine: copying memory, SHA-256, writing to the
disk. A save blocks for as long as its call takes and for what the next step takes longer than others. Then turns of
equal length alternate: no save, a save by Orbax alone at the beginning of a turn, and one of ours, with manifest and
retention. What is compared is the steps per second, and the processor time per step, within a round.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from alternate import spread
from pydantic import Field
from store import add_result
from workload import Size, Workload, child, variables, workload

from ssl_jax import command_line
from ssl_jax.config import Section
from ssl_jax.errors import UserError

NONE, ORBAX, OURS = "no saves", "Orbax alone", "ours"


class Options(Section):
    """What is saved, how often, and where the result goes."""

    size: Size = Field(default="gpt2", description="Model.")
    rows: int = Field(default=1, ge=1, description="Rows of a step's batch.")
    sequence_length: int = Field(default=64, ge=8, description="Tokens per row.")
    averaged: tuple[bool, ...] = Field(default=(False, True), description="Without and with an average of the weights.")
    saves: int = Field(default=4, ge=1, description="Saves that are timed part by part.")
    rounds: int = Field(default=3, ge=0, description="Rounds of turns; 0: only the parts are timed.")
    turn_seconds: float = Field(default=60.0, gt=0, description="Length of a turn, which has one save.")
    folder: str = Field(
        default="", description="Where checkpoints are written; absent: the folder for temporary files."
    )
    output: str = Field(
        default="benchmarks/results/checkpoint_overhead.json", description="File that receives the result."
    )


def main(arguments: Sequence[str]) -> None:
    """Measures, prints a table, puts the result beside the others in the file."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/checkpoint_overhead.py", summary=(__doc__ or "").strip()
    )
    for averaged in options.averaged:
        work = workload(
            options.size,
            rows=options.rows,
            sequence_length=options.sequence_length,
            dropout=0.0,
            averaged=averaged,
        )
        load = os.getloadavg()[0]
        measured = measure(work, options)
        summary = summarize(measured, options.turn_seconds)
        title = f"{options.size}, {'with' if averaged else 'without'} average"
        print(report(title, measured, summary), flush=True)
        settings = options.model_dump(exclude={"output", "averaged", "folder"})
        result = {**settings, "workload": work.model_dump(), "load_before": load, **measured, "summary": summary}
        add_result(options.output, title, result)


def measure(work: Workload, options: Options) -> dict[str, Any]:
    """What a fresh process says.

    Raises:
      UserError: it failed, perhaps for want of memory or room.
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint_overhead_", dir=options.folder or None) as folder:
        arguments = {
            **options.model_dump(include={"saves", "rounds", "turn_seconds"}),
            "modes": [NONE, ORBAX, OURS],
            "folder": folder,
        }
        result = subprocess.run(
            child("checkpoint_overhead_child.py", work.model_dump_json(), json.dumps(arguments)),
            check=False,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables(work.device)},
        )
    if result.returncode:
        raise UserError(f"the process ended with exit code {result.returncode}; what it said is above")
    return json.loads(result.stdout.splitlines()[-1])


def summarize(measured: Mapping[str, Any], turn_seconds: float) -> dict[str, Any]:
    """The figures that matter to whoever trains.

    Returns:
      `bytes`, `blocked_seconds` (spread over saves: the call, and the delay of the step after it), `call_seconds`,
      `call_processor_seconds` (what the call took of all cores, whatever else the machine was busy with),
      `manifest_share_of_processors` (processor time of manifest and retention ÷ that of all cores between two saves),
      `manifest_share_of_wall`, `verification_seconds`; with turns also `steps_ratio` and `processor_ratio`, each a
      spread over rounds by pair of modes: steps per second, and processor time per step.
    """
    saves = measured["saves"]
    summary: dict[str, Any] = {
        "bytes": measured["state_bytes"],
        "blocked_seconds": spread(
            [one["call"] + max(0.0, one["next_step"] - measured["step_seconds"]) for one in saves]
        ),
        "call_seconds": spread([one["call"] for one in saves]),
        "call_processor_seconds": spread([one["call_cpu"] for one in saves]),
        "manifest_share_of_processors": statistics.median(one["manifest_cpu"] for one in saves)
        / (turn_seconds * measured["cores"]),
        "manifest_share_of_wall": statistics.median(one["manifest"] for one in saves) / turn_seconds,
        "verification_seconds": statistics.median(one["newest"] for one in measured["restores"]),
    }
    turns = measured["turns"]
    if turns:
        by_mode = {mode: [turn for turn in turns if turn["mode"] == mode] for mode in (NONE, ORBAX, OURS)}
        rates = {mode: [turn["steps"] / turn["seconds"] for turn in found] for mode, found in by_mode.items()}
        costs = {mode: [turn["cpu"] / turn["steps"] for turn in found] for mode, found in by_mode.items()}
        for name, values in (("steps_ratio", rates), ("processor_ratio", costs)):
            summary[name] = {
                f"{one} ÷ {other}": spread([a / b for a, b in zip(values[one], values[other], strict=True)])
                for one, other in ((ORBAX, NONE), (OURS, NONE), (OURS, ORBAX))
            }
    return summary


def report(title: str, measured: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """One state for people: every part with its limit."""
    saves, restores, limits = measured["saves"], measured["restores"], measured["limits"]
    size = summary["bytes"]

    def median(name: str, rows: Sequence[Mapping[str, float]] = saves) -> float:
        return statistics.median(row[name] for row in rows)

    file_size = measured["file_bytes"]
    rows = [
        ("blocked: the call of save", median("call"), size / limits["copy_bytes_per_second"]),
        ("blocked: longest call", summary["call_seconds"]["max"], size / limits["copy_bytes_per_second"]),
        ("blocked: processor time of the call", median("call_cpu"), size / limits["copy_bytes_per_second"]),
        ("delay of the next step", median("next_step") - measured["step_seconds"], 0.0),
        ("in the background, all of it", median("background"), file_size / limits["write_bytes_per_second"]),
        ("manifest, wall time", median("manifest"), file_size / limits["sha256_bytes_per_second"]),
        ("manifest, processor time", median("manifest_cpu"), file_size / limits["sha256_bytes_per_second"]),
        ("newest(), which verifies", median("newest", restores), file_size / limits["sha256_bytes_per_second"]),
        ("restore() after it", median("restore", restores), 0.0),
    ]
    lines = [f"{title}: {size / 1e9:.2f} GB, files {file_size / 1e9:.2f} GB, step {measured['step_seconds']:.2f} s"]
    lines += [f"{'seconds, median':<38}{'measured':>10}{'limit':>10}"]
    lines += [f"{name:<38}{value:>10.3f}{f'{limit:.3f}' if limit else '–':>10}" for name, value, limit in rows]
    lines += [f"{'manifest, share of all cores':<38}{summary['manifest_share_of_processors']:>10.2%}"]
    for name, words in (("steps_ratio", "steps per second"), ("processor_ratio", "processor time per step")):
        for pair, found in summary.get(name, {}).items():
            lines.append(f"{words + ', ' + pair:<52}{found['median']:>8.4f}  ({found['min']:.4f} … {found['max']:.4f})")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
