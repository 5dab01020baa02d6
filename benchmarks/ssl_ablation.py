"""Compares the semi-supervised methods: every row of the published table, trained, evaluated and rendered.

    python benchmarks/ssl_ablation.py --scale cpu --minutes 600 --jobs 2

Each run is a `python -m ssl_jax.train` of its own, whose configuration is written into its folder first. The same
command goes on where it was stopped: finished runs are not repeated. `--render-only` writes tables and plots from the
results alone.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ablation_plots
import ablation_results
import ablation_runs
import ablation_table
import yaml
from ablation_rows import LABELS, REGIMES
from ablation_runs import SCALES, Run, Selection
from ablation_schedule import Outcome, Task, run_all
from pydantic import Field
from readme import replace_section

from ssl_jax import command_line, files
from ssl_jax.config import Config, Section
from ssl_jax.errors import UserError

ROW_FILE = "row.yaml"

_TRAIN, _BASELINES = "train", "baselines"
_HERE = Path(__file__).parent


class Options(Section):
    """What is compared, how long it may take, and where results go."""

    scale: Literal["cpu", "gpu", "tiny"] = Field("cpu", description="Size of everything; tiny shows that it works.")
    regimes: tuple[str, ...] = Field(tuple(REGIMES), min_length=1, description="Forms of the unlabeled data.")
    budgets: tuple[int, ...] = Field(
        (100, 300, 700), min_length=1, description="Labeled dialogues; the first one is every row's."
    )
    rows: tuple[str, ...] = Field((), description="Rows by name, with those that teach them; empty: all.")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Seeds; the first one is every row's.")
    complete: bool = Field(False, description="Every row with every budget and seed (else the main rows alone).")
    minutes: float = Field(60.0, ge=0, description="No run is begun that would not end within this time.")
    jobs: int = Field(2, ge=1, description="Runs at a time, each on its share of the processor cores.")
    steps: int | None = Field(None, ge=1, description="Training steps; absent: the scale's.")
    runs_dir: str = Field("runs/ablation", description="Holds a folder for each scale, and in it one for each run.")
    base: str = Field("configs/ablation.yaml", description="The configuration that rows change.")
    output: str = Field("benchmarks/results/ssl_ablation.json", description="Figures; arrays go beside it.")
    docs: str = Field("docs", description="Folder of ablation.md and the plots.")
    readme: str | None = Field(None, description="A README that gets a summary; absent: none does.")
    render_only: bool = Field(False, description="Run nothing; render from the results.")


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing, then writes results, page, plots and summary."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/ssl_ablation.py", summary="Compares semi-supervised methods."
    )
    _check(options)
    if not options.render_only:
        _run(options)
    render(options)


def render(options: Options) -> None:
    """Writes page, plots and summary from the results.

    Raises:
      UserError: there are no results, the plots' library is missing, or the README has no place for the summary.
    """
    comparison = ablation_table.Comparison(*ablation_results.read(Path(options.output), options.scale))
    if not (comparison.regimes and comparison.budgets):
        raise UserError(f"{options.output}: no finished run with unlabeled data yet; give it more --minutes")
    docs = Path(options.docs)
    plots = ablation_plots.draw(comparison, docs)
    command = f"python benchmarks/ssl_ablation.py --scale {options.scale}"
    files.write_text(docs / "ablation.md", ablation_table.page(comparison, command, plots))
    if options.readme is not None:
        replace_section(Path(options.readme), "ablation table", ablation_table.summary(comparison))
    print(ablation_table.summary(comparison))
    print(f"\nwritten to {docs / 'ablation.md'}")


def _run(options: Options) -> None:
    folder = Path(options.runs_dir) / options.scale
    runs = ablation_runs.select(
        Selection(options.rows, options.regimes, options.budgets, options.seeds, options.complete)
    )
    base, scale = command_line.read_yaml(options.base), SCALES[options.scale]
    configurations = {
        run.name: ablation_runs.configuration(run, base, scale, folder, options.seeds, options.steps) for run in runs
    }
    baselines = {
        f"{regime}-{budget}": ablation_runs.baseline_configuration(regime, budget, base, scale, folder)
        for regime in dict.fromkeys(run.regime for run in runs if run.regime != LABELS)
        for budget in options.budgets
    }
    _write_configurations(folder, {**configurations, **{f"{name}/{_BASELINES}": v for name, v in baselines.items()}})
    _make_tokenizer(ablation_runs.tokenizer_configuration(base, scale, folder, options.budgets), folder)

    tasks = [_training(run, folder, options.seeds) for run in runs] + [_baseline(name, folder) for name in baselines]
    durations = [(_TRAIN, seconds) for seconds in ablation_results.seconds_of(folder / run.name for run in runs)]
    outcomes: dict[str, Outcome] = {}
    try:
        run_all(
            tasks,
            jobs=options.jobs,
            seconds=options.minutes * 60,
            outcomes=outcomes,
            durations=durations,
            environment=_environment(options),
            say=functools.partial(print, flush=True),
        )
    finally:
        results = {name: folder / name / _BASELINES / ablation_results.BASELINES for name in baselines}
        ablation_results.write(Path(options.output), options.scale, folder, runs, outcomes, results)
        print(_report(tasks, outcomes))


def _check(options: Options) -> None:
    for name in ("regimes", "budgets", "rows", "seeds"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names one twice: {' '.join(map(str, values))}")
    if min(options.budgets) < 1 or min(options.seeds) < 0:
        raise UserError("--budgets are at least 1 and --seeds at least 0")


def _write_configurations(folder: Path, configurations: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes every run's configuration into its folder.

    Raises:
      UserError: one is no valid configuration, or a run there was finished with another one.
    """
    stale = []
    for name, values in configurations.items():
        command_line.validate(Config, dict(values), origin=name)
        file = folder / name / ROW_FILE
        if file.is_file() and command_line.read_yaml(file) != values and ablation_results.is_finished(file.parent):
            stale.append(str(file.parent))
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(file, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))
    if stale:
        more = f" and {len(stale) - 3} more" if len(stale) > 3 else ""
        raise UserError(
            f"finished with other settings than now: {', '.join(stale[:3])}{more}; remove them or name another "
            "--runs-dir"
        )


def _make_tokenizer(values: Mapping[str, Any], folder: Path) -> None:
    """Fits the tokenizer of all runs, unless it is there."""
    directory = folder / "tokenizer"
    if (directory / "tokenizer.json").is_file():
        return
    config = command_line.validate(Config, dict(values), origin="the tokenizer's configuration")
    # Preparing imports the data libraries, which `--help` and a mistyped flag should not wait for.
    from ssl_jax.data.pipeline import prepare

    prepare(config).tokenizer.save(directory)


def _training(run: Run, folder: Path, seeds: Sequence[int]) -> Task:
    directory = folder / run.name
    return Task(
        run.name,
        (sys.executable, "-m", "ssl_jax.train", "--config", str(directory / ROW_FILE)),
        directory,
        functools.partial(ablation_results.is_finished, directory),
        needs=tuple(teacher.name for teacher in ablation_runs.teachers(run, seeds)),
        kind=_TRAIN,
    )


def _baseline(name: str, folder: Path) -> Task:
    directory = folder / name / _BASELINES
    output = directory / ablation_results.BASELINES
    script = str(_HERE / "baselines.py")
    return Task(
        f"{name}/{_BASELINES}",
        (sys.executable, script, "--config", str(directory / ROW_FILE), "--output", str(output)),
        directory,
        output.is_file,
        kind=_BASELINES,
    )


def _environment(options: Options) -> dict[str, str]:
    """Of the runs: several on one GPU share its memory."""
    if options.scale != "gpu" or options.jobs == 1:
        return dict(os.environ)
    return {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / options.jobs:.2f}"}


def _report(tasks: Sequence[Task], outcomes: Mapping[str, Outcome]) -> str:
    """What is done, what has failed and why, and what is left."""
    states = {task.name: outcomes.get(task.name, Outcome("left", "stopped")) for task in tasks}
    by_state = {state: [name for name in states if states[name].state == state] for state in ("done", "failed", "left")}
    lines = [", ".join(f"{len(names)} {state}" for state, names in by_state.items())]
    for task in tasks:
        outcome = states[task.name]
        if outcome.state == "failed":
            lines.append(f"failed: {task.name}, exit code {outcome.exit_code}: {outcome.why}")
            lines.append(f"  {shlex.join(task.command)}")
        elif outcome.state == "left":
            lines.append(f"left: {task.name} ({outcome.why})")
    return "\n".join(lines)


if __name__ == "__main__":
    command_line.run(main)
