"""A long run watched from outside: does its process grow, keep files open, slow down?

    python benchmarks/soak.py --steps 100000

`python -m ssl_jax.train` trains a tiny model in a child, with evaluations, checkpoints and rounds of pseudo-labels,
while /proc is asked for its resident memory, its open files, its threads and the processor time that it has used. What
the first tenth of the run takes is warm-up: by then everything is compiled and the first round is held. Of the rest the
first tenth is compared with the last one, by medians, and a line is laid through all of it. As the machine may be
busier at one time than at another, the processor time is also set against that of a fixed piece of work beside the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import Field
from store import add_result
from workload import variables

from ssl_jax import command_line
from ssl_jax.config import Section
from ssl_jax.errors import UserError

THINGS = ("apple", "bread", "cloud", "drum", "eagle", "field", "glass", "horse", "island", "jacket")
COLORS = ("red", "blue", "green", "gray", "black", "white")
WARM_UP = 0.1
# Of the series that the result keeps; medians and lines are of all samples.
_KEPT_SAMPLES = 200
_TAIL_BYTES = 1 << 14
# As training, work of the interpreter that makes many objects; arithmetic alone is slowed down by less than they are.
_REFERENCE = [{"number": number, "text": str(number)} for number in range(4000)]

Record = TypeVar("Record")


class Options(Section):
    """How long, how often something happens, and where the result goes."""

    steps: int = Field(default=100_000, ge=100, description="Steps of the run.")
    logging_steps: int = Field(default=100, ge=1, description="Steps between lines of metrics.")
    eval_steps: int = Field(default=2000, ge=1, description="Steps between evaluations.")
    save_steps: int = Field(default=1000, ge=1, description="Steps between checkpoints.")
    rounds: int = Field(default=10, ge=1, description="Rounds of pseudo-labels, evenly spread; the first at a 20th.")
    sample_seconds: float = Field(default=1.0, gt=0, description="Between two looks at the process.")
    output: str = Field(default="benchmarks/results/soak.json", description="File that receives the result.")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One look at the process.

    Attributes:
      seconds: since it started.
      step: of its last line of metrics.
      resident_bytes: memory.
      open_files: descriptors.
      threads: of the kernel.
      cpu_seconds: that it has used so far.
      record_bytes: of metrics.jsonl, samples.jsonl and TensorBoard's events.
      reference_seconds: processor time of a fixed piece of work in the process that looks: how fast the machine is now.
    """

    seconds: float
    step: int
    resident_bytes: int
    open_files: int
    threads: int
    cpu_seconds: float
    record_bytes: int
    reference_seconds: float


def main(arguments: Sequence[str]) -> None:
    """Runs, prints a table, puts the result beside those of other lengths in the file."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/soak.py", summary=(__doc__ or "").strip()
    )
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        samples = watch(options, Path(name))
        lines = read_metrics(Path(name) / "run")
        summary = json.loads((Path(name) / "run" / "summary.json").read_text(encoding="utf-8"))
    rows = {**of_samples(samples, options.steps), **of_metrics(lines, options.steps)}
    print(report(rows))
    result = {
        **options.model_dump(exclude={"output"}),
        "seconds": samples[-1].seconds,
        "parameters": summary["parameters"],
        "train_step_compilations": summary["train_step_compilations"],
        "pseudo_accepted": summary["pseudo_labels_accepted"],
        "rows": rows,
        "samples": [dataclasses.astuple(sample) for sample in thinned(samples)],
        "sample_fields": [field.name for field in dataclasses.fields(Sample)],
    }
    add_result(options.output, f"{options.steps} steps", result)


def settings(options: Options, folder: Path) -> dict[str, Any]:
    """The configuration: the smallest model with streams of every kind, and all events."""
    sampling = {"max_new_tokens": 8}
    return {
        "workdir": str(folder / "run"),
        "data": {
            "labeled": [{"path": str(folder / "labeled.jsonl")}],
            "unlabeled": [{"path": str(folder / "raw.jsonl")}, {"path": str(folder / "prompts.jsonl")}],
            "prepared_dir": str(folder / "prepared"),
            "test_size": 0.3,
        },
        "tokenizer": {"vocab_size": 320},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 16, "n_positions": 32, "dtype": "float32"},
        "train": {
            "steps": options.steps,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 8,
            "sequence_length": 32,
            "window_overlap": 8,
            "unlabeled_ratio": 2,
            "pseudo_label_fraction": 0.5,
            "labeled_only_fraction": 0.0,
            "logging_steps": options.logging_steps,
            "eval_steps": options.eval_steps,
            "save_steps": options.save_steps,
        },
        "pseudo_labels": {
            "rounds": [(number + 0.5) / options.rounds for number in range(options.rounds)],
            "prompts_per_round": 16,
            "num_return_sequences": 1,
            "batch_size": 8,
            "max_prompt_tokens": 16,
            "min_reply_tokens": 1,
            "max_repetition": 1.0,
            "max_copy": 1.0,
            "max_duplicates": 1000,
            "keep_fraction": 1.0,
            "sampling": sampling,
        },
        "evaluation": {
            "dev_dialogues": 8,
            "recall_examples": 4,
            "coherence_examples": 0,
            "generated_replies": 8,
            "max_prompt_tokens": 16,
            "sampling": sampling,
            "sample_prompts": [f"is the {thing} red?" for thing in THINGS[:8]],
        },
    }


def write_inputs(options: Options, folder: Path) -> Path:
    """Data and configuration; returns the latter's path."""
    pairs = list(itertools.product(THINGS, COLORS))
    _write_jsonl(folder / "labeled.jsonl", (_chat(f"is the {t} {c}?", f"yes, {c} {t}") for t, c in pairs))
    _write_jsonl(folder / "raw.jsonl", ({"text": f"the {thing} was {color}."} for thing, color in pairs))
    _write_jsonl(folder / "prompts.jsonl", (_chat(f"is an old {thing} {color}?") for thing, color in pairs))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(options, folder)), encoding="utf-8")
    return config


def watch(options: Options, folder: Path) -> list[Sample]:
    """Trains in a child and looks at it until it ends.

    Raises:
      UserError: it failed, or this is not Linux.
    """
    config, log = write_inputs(options, folder), folder / "log"
    if not Path("/proc/self/fd").is_dir():
        raise UserError("there is no /proc; measure on Linux")
    samples: list[Sample] = []
    started = time.monotonic()
    with log.open("w") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "ssl_jax.train", "--config", str(config)],
            stdout=said,
            stderr=said,
            env={**os.environ, **variables("cpu")},
        )
        try:
            while child.poll() is None:
                time.sleep(options.sample_seconds)
                try:
                    samples.append(look(child.pid, folder / "run", time.monotonic() - started))
                except (OSError, KeyError, IndexError):  # it has just ended
                    continue
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        raise UserError(f"the run ended with exit code {child.returncode}: " + " | ".join(tail))
    return samples


def look(process: int, workdir: Path, seconds: float) -> Sample:
    """What /proc and the work directory say now.

    Raises:
      OSError, KeyError, IndexError: the process has ended.
    """
    folder = Path("/proc") / str(process)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines())
    # The name of the program, in parentheses, may hold blanks; utime and stime are the 14th and 15th field.
    fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    records = [workdir / "metrics.jsonl", workdir / "samples.jsonl", *workdir.glob("tensorboard/*")]
    return Sample(
        seconds=seconds,
        step=last_step(workdir / "metrics.jsonl"),
        resident_bytes=1024 * int(status["VmRSS"].split()[0]),
        open_files=len(os.listdir(folder / "fd")),
        threads=int(status["Threads"]),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        record_bytes=sum(path.stat().st_size for path in records if path.exists()),
        reference_seconds=reference(),
    )


def reference() -> float:
    """Processor seconds of a fixed piece of work, which are more when others want the cores, too."""
    started = time.thread_time()
    json.loads(json.dumps(_REFERENCE))
    return time.thread_time() - started


def last_step(path: Path) -> int:
    """Of the last complete line of a file of metrics; 0 before there is one."""
    if not path.exists():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        complete = stream.read().split(b"\n")[:-1]
    return json.loads(complete[-1])["step"] if complete else 0


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Lines of metrics of steps, without those of evaluations and rounds."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]


def of_samples(samples: Sequence[Sample], steps: int) -> dict[str, dict[str, float]]:
    """How memory, open files, threads, processor time and records went after the warm-up.

    Raises:
      UserError: a tenth of the run has too few samples.
    """
    tenths = in_tenths([sample for sample in samples if sample.step >= WARM_UP * steps], lambda sample: sample.step)
    spans = [(tenth[0], tenth[-1]) for tenth in tenths]
    costs = [(last.cpu_seconds - first.cpu_seconds) / (last.step - first.step) for first, last in spans]
    references = median_of(tenths, lambda sample: sample.reference_seconds)
    return {
        "resident memory, MB": compare(median_of(tenths, lambda sample: sample.resident_bytes / 1e6)),
        "open files": compare(median_of(tenths, lambda sample: sample.open_files)),
        "threads": compare(median_of(tenths, lambda sample: sample.threads)),
        "processor time, ms a step": compare([1e3 * cost for cost in costs]),
        "… ÷ that of fixed work": compare([cost / fixed for cost, fixed in zip(costs, references, strict=True)]),
        "records, bytes a step": compare(
            [(last.record_bytes - first.record_bytes) / (last.step - first.step) for first, last in spans]
        ),
    }


def of_metrics(lines: Sequence[Mapping[str, Any]], steps: int) -> dict[str, dict[str, float]]:
    """How fast steps were by the run's own clock after the warm-up; the wall time has all events in it.

    Raises:
      UserError: a tenth of the run has too few lines.
    """
    tenths = in_tenths([line for line in lines if line["step"] >= WARM_UP * steps], lambda line: line["step"])
    spans = [(tenth[0], tenth[-1]) for tenth in tenths]
    return {
        "wall time, ms a step": compare(
            [1e3 * (last["time"] - first["time"]) / (last["step"] - first["step"]) for first, last in spans]
        ),
        "tokens/s between events": compare(median_of(tenths, lambda line: line["tokens_per_sec"])),
    }


def in_tenths(records: Sequence[Record], step_of: Callable[[Record], int]) -> list[list[Record]]:
    """Records, whose steps rise, in ten parts of equally many steps.

    Raises:
      UserError: a part has no two records of different steps.
    """
    steps = np.array([step_of(record) for record in records])
    edges = np.searchsorted(steps, np.linspace(steps[0], steps[-1], 11)) if len(steps) else np.zeros(11, int)
    edges[-1] = len(steps)
    tenths = [list(records[begin:end]) for begin, end in itertools.pairwise(edges)]
    if any(len({step_of(record) for record in tenth}) < 2 for tenth in tenths):
        raise UserError("too few values for ten parts of the run; set sample_seconds or logging_steps lower")
    return tenths


def median_of(tenths: Sequence[Sequence[Record]], value_of: Callable[[Record], float]) -> list[float]:
    """Of every tenth."""
    return [statistics.median(value_of(record) for record in tenth) for tenth in tenths]


def compare(values: Sequence[float]) -> dict[str, float]:
    """The first and the last tenth, and the straight line through all ten.

    Returns:
      `first`, `last`, `change` (last ÷ first − 1) and `trend` (rise of the line from the first to the last ÷ mean).
    """
    slope = statistics.linear_regression(range(len(values)), values).slope
    return {
        "first": values[0],
        "last": values[-1],
        "change": values[-1] / values[0] - 1,
        "trend": slope * (len(values) - 1) / statistics.fmean(values),
    }


def thinned(samples: Sequence[Sample]) -> Sequence[Sample]:
    """At most so many of them as a result keeps, evenly spread."""
    return samples[:: -(-len(samples) // _KEPT_SAMPLES)]


def report(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The comparison for people."""
    lines = [f"{'':<28}{'first tenth':>14}{'last tenth':>14}{'change':>10}{'trend':>10}"]
    lines += [
        f"{name:<28}{row['first']:>14,.2f}{row['last']:>14,.2f}{row['change']:>+10.2%}{row['trend']:>+10.2%}"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def _chat(*turns: str) -> dict[str, Any]:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
