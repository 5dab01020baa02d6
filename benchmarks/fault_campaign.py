"""A run that everything happens to: killed, signalled, damaged, out of space, on a clock that jumps.

`python benchmarks/fault_campaign.py` injects each fault for real, starts the same command again and compares what the
run became, to the bit, with a run that nothing happened to. A trial is decided by seed, kind and number; those that are
in the file of results already are not repeated, so that the campaign goes on where it was stopped.
`python benchmarks/fault_table.py` renders the README's table.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fault_table
import fault_trials
from provenance import provenance
from pydantic import Field

from ssl_jax import command_line, files
from ssl_jax.config import Section


class Options(Section):
    """Which faults, how many, for how long."""

    kinds: tuple[str, ...] = Field(default=(), description=f"Of {', '.join(fault_trials.KINDS)}; empty: all.")
    trials: int | None = Field(default=None, ge=1, description="Of each kind; absent: as many as the README asks for.")
    minutes: float | None = Field(default=None, gt=0, description="Begin no further trial after so long.")
    seed: int = Field(default=0, ge=0, description="Decides moments and bits.")
    folder: str | None = Field(
        default=None, description="Keep the undisturbed run here; absent: in a temporary folder."
    )
    output: str = Field(default="benchmarks/results/fault_campaign.json", description="Where the results are.")


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing, and prints the table."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/fault_campaign.py", summary=(__doc__ or "").strip()
    )
    path = Path(options.output)
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    missing = _missing(_read(path)["trials"], options)
    if missing:
        with contextlib.ExitStack() as stack:
            folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="ssl_jax_faults_"))
            work = fault_trials.Workload.make(Path(folder))
            measured_on = {**provenance(), "undisturbed_seconds": round(work.seconds, 2)}
            for kind, number in missing:
                if until is not None and time.monotonic() > until:
                    break
                trial = run(work, kind, number, options.seed)
                # Another campaign may have written meanwhile.
                results = {**_read(path), **measured_on}
                results["trials"].setdefault(kind, {})[str(number)] = {"commit": results["commit"], **trial}
                found = results["trials"]
                results["trials"] = {known: found[known] for known in fault_trials.KINDS if known in found}
                files.write_json(path, results)
                print(f"{kind} {number}: {fault_table.line(trial)}", flush=True)
    print(fault_table.render(_read(path)))


def _read(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.exists() else {"trials": {}}


def run(work: fault_trials.Workload, kind: str, number: int, seed: int) -> fault_trials.Trial:
    """One trial, in a folder of its own."""
    place = work.folder / re.sub(r"\W+", "_", f"{kind} {number}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    trial = fault_trials.KINDS[kind].run(work, place, fault_trials.random_of(kind, number, seed), number)
    shutil.rmtree(place, ignore_errors=True)
    return {"seed": seed, **trial}


def _missing(trials: dict[str, Any], options: Options) -> list[tuple[str, int]]:
    """Kinds and numbers of trials without a result; one of every kind before the second of any."""
    kinds = options.kinds or tuple(fault_trials.KINDS)
    command_line_counts = {kind: options.trials or fault_trials.KINDS[kind].trials for kind in kinds}
    return [
        (kind, number)
        for number in range(max(command_line_counts.values()))
        for kind in kinds
        if number < command_line_counts[kind] and str(number) not in trials.get(kind, {})
    ]


if __name__ == "__main__":
    command_line.run(main)
