"""Writes the replies that a teacher was least sure of: `python -m ssl_jax.review --workdir W --output DIR`.

A person edits, accepts or rejects them in DIR/review.html or in DIR/review.jsonl, and trains with the source
`{path: DIR/review.jsonl, format: review}` in `data.labeled`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from ssl_jax import command_line, files, review_page
from ssl_jax.config import Section
from ssl_jax.config.paths import check_path
from ssl_jax.errors import UserError


class Review(Section):
    """Which replies, and where to."""

    workdir: str = Field(description="Work directory of a run that has made pseudo-replies.")
    output: str = Field(description="Directory for review.jsonl and review.html.")
    count: int = Field(default=50, ge=1, le=1_000_000_000, description="Replies to write; all, if the round has fewer.")
    round: int | None = Field(
        default=None, ge=0, le=1_000_000_000, description="Round that made them. Absent: the newest finished one."
    )
    order: Literal["uncertain", "random"] = Field(
        default="uncertain",
        description="uncertain: those of least mean log-probability, least first. random: drawn evenly, which tells "
        "how good the round is.",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Decides what is drawn at random.")
    overwrite: bool = Field(default=False, description="Replace a review.jsonl that has verdicts.")

    _paths = field_validator("workdir", "output")(check_path)


def main(arguments: Sequence[str]) -> None:
    """Chooses replies, writes both files, and says how to go on."""
    command = command_line.parse(Review, arguments, program="python -m ssl_jax.review", summary=(__doc__ or "").strip())

    from ssl_jax import workdir
    from ssl_jax.pseudo_labels import rounds

    workdir.read_config(Path(command.workdir))
    directory = Path(command.workdir) / workdir.PSEUDO_LABELS
    number = _round_number(directory, command)
    output = Path(command.output)
    table, page = output / "review.jsonl", output / "review.html"
    if not command.overwrite:
        _spare_verdicts(table)
    summary = rounds.read_summary(directory, number) or {}
    found = rounds.read_rows(directory, number)
    if not found:
        removed = ", ".join(f"{name} {count}" for name, count in summary["removed"].items() if count) or "none drawn"
        raise UserError(
            f"{directory}: round {number} kept no reply ({removed})\n"
            "name another --round, or train with a larger pseudo_labels.keep_fraction or wider pseudo_labels filters"
        )
    rows = choose([_row(row, number, summary["teacher_step"]) for row in found], command)
    title = f"Round {number} of {command.workdir}: {len(rows)} of {len(found)} replies, " + (
        "the least certain first" if command.order == "uncertain" else "drawn at random"
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        files.write_text(table, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        files.write_text(page, review_page.render(title, rows))
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}; name another directory") from None
    scores = [row["score"] for row in rows]
    print(title)
    print(
        f"mean log-probability of a token {min(scores):.2f} to {max(scores):.2f}, "
        f"teacher of step {summary['teacher_step']}"
    )
    print(f"{page}: open it, accept, edit or reject, and save its review.jsonl over {table}; or edit that file")
    print(f"then train with this source in data.labeled: {{path: {table}, format: review}}")


def choose(rows: Sequence[dict[str, Any]], command: Review) -> list[dict[str, Any]]:
    """At most `command.count` of the rows, in the order asked for."""
    if command.order == "random":
        return random.Random(command.seed).sample(rows, min(command.count, len(rows)))
    return sorted(rows, key=lambda row: row["score"])[: command.count]


def _row(row: Mapping[str, Any], number: int, teacher_step: int) -> dict[str, Any]:
    """A row of a round as a row of `review.jsonl`."""
    from ssl_jax.replies import mean_logprob

    return {
        "id": row["id"],
        "messages": row["messages"],
        # The round's own score may weigh other things too; how certain the teacher was does not depend on them.
        "score": mean_logprob(row["logprob"], row["tokens"]),
        "round": number,
        "teacher_step": teacher_step,
        "verdict": None,
    }


def _round_number(directory: Path, command: Review) -> int:
    """The round asked for, or the newest finished one."""
    summaries = [path for path in directory.glob("round_*/summary.json") if path.is_file()]
    finished = sorted(int(path.parent.name.removeprefix("round_")) for path in summaries)
    if not finished:
        raise UserError(
            f"--workdir {command.workdir} has no finished round (pseudo_labels/round_0/summary.json)\n"
            "train it with pseudo_labels.rounds and unlabeled prompts; if training was interrupted, run it again"
        )
    if command.round is None:
        return finished[-1]
    if command.round not in finished:
        raise UserError(
            f"--round {command.round}: --workdir {command.workdir} has not finished it; "
            f"finished: {', '.join(map(str, finished))}"
        )
    return command.round


def _spare_verdicts(table: Path) -> None:
    """Refuses to replace a review that somebody began, or a file that is something else."""
    try:
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").split("\n") if line.strip()]
        has_verdicts = any(row["verdict"] is not None for row in rows)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{table}: cannot be read: {error.strerror}; name another --output") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{table} is not as it was written; name another --output, or --overwrite it") from None
    if has_verdicts:
        raise UserError(f"{table} has verdicts; name another --output, or lose them with --overwrite")


if __name__ == "__main__":
    command_line.run(main)
