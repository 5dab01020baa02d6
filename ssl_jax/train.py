"""Trains a dialogue model: `python -m ssl_jax.train --config FILE [--workdir DIR] [--any.field value]`.

Prepares the data if needed, trains on labeled, unlabeled and pseudo-labeled dialogues, evaluates, checkpoints. The
same command again goes on where the run stopped.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_jax import command_line, distributed, pretrained, workdir
from ssl_jax.config import Config
from ssl_jax.evaluation.tables import metric_lines


def main(arguments: Sequence[str]) -> None:
    """The story of a run: configuration, work directory, data, training, what came of it."""
    config = command_line.parse(Config, arguments, program="python -m ssl_jax.train", summary=__doc__ or "")
    distributed.join()
    config = pretrained.resolve(config)
    directory = Path(config.workdir)
    distributed.primary_first("claim the work directory", lambda: workdir.claim(directory, config))
    if (summary := workdir.read_summary(directory)) is not None:
        if distributed.is_primary():
            print(f"{directory} is done: {summary['steps']} steps, {summary['seconds']:.0f} s")
            show(summary, directory)
        return

    from ssl_jax.data.pipeline import prepare

    say = print if distributed.is_primary() else _say_nothing
    prepared = distributed.primary_first("prepare the data", lambda: prepare(config, say))
    distributed.primary_first("claim the data", lambda: workdir.claim_data(directory, prepared.summary))
    if distributed.is_primary():
        prepared.tokenizer.save(directory / workdir.TOKENIZER)

    from ssl_jax import compilation_cache, loop
    from ssl_jax.signals import Signals

    compilation_cache.enable()
    with Signals().listen() as signals:
        summary = loop.Run(config, prepared, directory, signals).train()
    if distributed.is_primary():
        show(summary, directory)


def _say_nothing(_: str) -> None:
    """The other processes leave talking to the first one."""


def show(summary: dict[str, Any], directory: Path) -> None:
    """Prints the final metrics, the human ones and the distance to them, and what to type next."""
    for line in metric_lines(summary["split"].removeprefix("labeled_"), summary["evaluation"], summary["human"]):
        print(line)
    tokens = ", ".join(f"{count:,} {name}" for name, count in summary["tokens_by_stream"].items() if count)
    print(f"\ntokens: {tokens}; checkpoint {summary['checkpoint']} of {summary['steps']}; results in {directory}")
    where = shlex.quote(str(directory))
    print(f"\ntalk to it:\n  python -m ssl_jax.generate --workdir {where} --prompt 'hi, how are you?'")


if __name__ == "__main__":
    command_line.run(main)
