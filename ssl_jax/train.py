"""Trains a dialogue model: `python -m ssl_jax.train --config FILE [--workdir DIR] [--any.field value]`.

Prepares the data if needed, trains on labeled, unlabeled and pseudo-labeled dialogues, evaluates, checkpoints. The
same command again goes on where the run stopped. `--dry-run` prints what the run will be, need and take, and touches
nothing; with `--topology v5e:16x16` it compiles for that TPU slice without having one.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ssl_jax import agreement, command_line, distributed, ownership, pretrained, storage, workdir
from ssl_jax.config import Config
from ssl_jax.evaluation.tables import metric_lines


class Command(Config):
    """A run, and whether to plan it only."""

    dry_run: bool = Field(
        default=False, exclude=True, description="Print the plan, its memory, arithmetic and time, and train nothing."
    )
    topology: str | None = Field(
        default=None,
        exclude=True,
        description="Plan for these devices: a TPU slice (v5e:16x16, 2*v5e:16x16, v5p-128), for which the programs are "
        "compiled, or GPUs (h100:8). Implies dry_run.",
    )


def main(arguments: Sequence[str]) -> None:
    """The story of a run: configuration, work directory, data, training, what came of it."""
    with distributed.before_joining():
        config = command_line.parse(Command, arguments, program="python -m ssl_jax.train", summary=__doc__ or "")
    if config.dry_run or config.topology is not None:
        plan_only(config, writes=any(word.split("=")[0] == "--workdir" for word in arguments))
        return
    distributed.join()
    config = pretrained.resolve(config)
    agreement.check(config.model_dump(mode="json"))
    place = storage.place(config.workdir)
    with ownership.held(place) if distributed.is_primary() else contextlib.nullcontext():
        run(config, place)


def run(config: Config, place: storage.Place) -> None:
    """The run in a work directory that nobody else uses."""
    distributed.primary_first("claim the work directory", lambda: workdir.claim(place, config))
    if (summary := workdir.read_summary(place.local)) is not None:
        if distributed.is_primary():
            print(f"{place.name} is done: {summary['steps']} steps, {summary['seconds']:.0f} s")
            show(summary, place.name)
        return

    from ssl_jax.data.pipeline import prepare

    say = print if distributed.is_primary() else _say_nothing
    prepared = distributed.primary_first("prepare the data", lambda: prepare(config, say))
    distributed.primary_first("claim the data", lambda: workdir.claim_data(place, prepared.summary))
    if distributed.is_primary():
        prepared.tokenizer.save(place.local / workdir.TOKENIZER)

    from ssl_jax import compilation_cache, loop
    from ssl_jax.signals import Signals

    compilation_cache.enable()
    with Signals().listen() as signals:
        summary = loop.Run(config, prepared, place, signals).train()
    if distributed.is_primary():
        show(summary, place.name)


def plan_only(command: Command, *, writes: bool) -> None:
    """Prints the forecast of the run; with `writes`, `plan.json` in its work directory too."""
    from ssl_jax.data.pipeline import find
    from ssl_jax.forecast import plan_ahead, report
    from ssl_jax.hardware import Topology
    from ssl_jax.training_streams import TrainingStreams

    topology = None if command.topology is None else Topology.parse(command.topology)
    config = pretrained.resolve(command)
    prepared = find(config)
    if prepared is None:
        print("the data is not prepared yet: its epochs and vocabulary are left open (python -m ssl_jax.prepare)")
    streams = {} if prepared is None else TrainingStreams(config, prepared, Path()).before_rounds()
    made = plan_ahead.forecast(config, topology, prepared, streams, print)
    print("\n".join(report.lines(made)))
    if writes:
        storage.write_json(f"{command.workdir}/{workdir.PLAN}", report.as_dict(made))


def _say_nothing(_: str) -> None:
    """The other processes leave talking to the first one."""


def show(summary: dict[str, Any], name: str) -> None:
    """Prints the final metrics, the human ones and the distance to them, and what to type next."""
    for line in metric_lines(summary["split"].removeprefix("labeled_"), summary["evaluation"], summary["human"]):
        print(line)
    tokens = ", ".join(f"{count:,} {name}" for name, count in summary["tokens_by_stream"].items() if count)
    print(f"\ntokens: {tokens}; checkpoint {summary['checkpoint']} of {summary['steps']}; results in {name}")
    where = shlex.quote(name)
    print(f"\ntalk to it:\n  python -m ssl_jax.generate --workdir {where} --prompt 'hi, how are you?'")


if __name__ == "__main__":
    command_line.run(main, goes_on=True)
