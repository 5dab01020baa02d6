"""`python -m ssl_jax.prepare --config FILE`: reads, checks, cleans, splits, tokenizes and stores the data."""

from __future__ import annotations

import itertools
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

    show: int = Field(
        default=0, ge=0, le=1_000_000_000, description="Print this many dialogues as the model will see them."
    )
    split: str = Field(default="labeled_train", description="Of which split they are.")
    examples: int = Field(
        default=0, ge=0, le=1_000_000_000, description="Print what each step did to so many dialogues (at most five)."
    )
    rejected: int = Field(
        default=0, ge=0, le=1_000_000_000, description="Print so many of the rows that are no dialogues, and why."
    )


_OUR_OWN = set(Prepare.model_fields) - set(Config.model_fields)


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
        pretrained.resolve(Config.model_validate(command.model_dump(exclude=_OUR_OWN, exclude_unset=True)))
    )
    if command.show and command.split not in prepared.splits:
        raise UserError(f"--split {command.split}: the data has {', '.join(prepared.splits)}")
    for line in report.tables(prepared):
        print(line)
    asked = (
        report.rejected(prepared, command.rejected) if command.rejected else (),
        report.effects(prepared, command.examples) if command.examples else (),
        report.show(prepared, command.split, command.show) if command.show else (),
    )
    for line in itertools.chain(*asked):
        print(line)
    if not any((command.rejected, command.examples, command.show)):
        print(f"\ndone in {time.monotonic() - started:.1f} s; next: python -m ssl_jax.train {shlex.join(arguments)}")


if __name__ == "__main__":
    command_line.run(main, goes_on=True)
