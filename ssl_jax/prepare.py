"""`python -m ssl_jax.prepare --config FILE`: reads, checks, cleans, splits, tokenizes and stores the data."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence

from pydantic import Field

from ssl_jax import command_line, pretrained
from ssl_jax.config import Config
from ssl_jax.data import report
from ssl_jax.data.pipeline import prepare
from ssl_jax.errors import UserError


class Prepare(Config):
    """A run's configuration, and what to show of its data."""

    show: int = Field(default=0, ge=0, description="Print this many dialogues as the model will see them.")
    split: str = Field(default="labeled_train", description="Of which split they are.")


def main(arguments: Sequence[str]) -> None:
    """Prepares the data that the configuration names, and says what came out of it."""
    command = command_line.parse(
        Prepare,
        arguments,
        program="python -m ssl_jax.prepare",
        summary="Reads, checks, cleans, splits, tokenizes and stores the data that `data` names.",
    )
    started = time.monotonic()
    prepared = prepare(
        pretrained.resolve(Config.model_validate(command.model_dump(exclude={"show", "split"}, exclude_unset=True)))
    )
    if command.show and command.split not in prepared.splits:
        raise UserError(f"--split {command.split}: the data has {', '.join(prepared.splits)}")
    for line in report.tables(prepared):
        print(line)
    if command.show:
        for line in report.show(prepared, command.split, command.show):
            print(line)
        return
    print(f"done in {time.monotonic() - started:.1f} s; next: python -m ssl_jax.train {shlex.join(arguments)}")


if __name__ == "__main__":
    command_line.run(main)
