"""`python -m ssl_jax.prepare --config FILE`: reads, checks, cleans, splits, tokenizes and stores the data."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssl_jax import command_line, pretrained
from ssl_jax.config import Config
from ssl_jax.data.pipeline import prepare


def main(arguments: Sequence[str]) -> None:
    """Prepares the data that the configuration names, and says what came out of it."""
    config = command_line.parse(
        Config,
        arguments,
        program="python -m ssl_jax.prepare",
        summary="Reads, checks, cleans, splits, tokenizes and stores the data that `data` names.",
    )
    started = time.monotonic()
    prepared = prepare(pretrained.resolve(config))
    for line in report(prepared.summary):
        print(line)
    print(f"done in {time.monotonic() - started:.1f} s; next: python -m ssl_jax.train {shlex.join(arguments)}")


def report(summary: Mapping[str, Any]) -> Iterator[str]:
    """`summary.json` as lines of a table."""
    yield f"{'split':<22}{'dialogues':>12}{'tokens':>14}"
    for side, splits in summary["dialogues"].items():
        for split, dialogues in splits.items():
            yield f"{side + ' ' + split:<22}{dialogues:>12,}{summary['tokens'][side][split]:>14,}"
    for title in ("sources", "rejected", "removed", "changed"):
        counts = ", ".join(f"{name} {count:,}" for name, count in summary[title].items())
        yield f"{title + ':':<10}{counts or 'none'}"


if __name__ == "__main__":
    command_line.run(main)
