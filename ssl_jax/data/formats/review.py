"""What `ssl_jax.review` wrote for a person, read back: a teacher's replies, accepted, edited or rejected.

JSON Lines of `{"id", "messages", "score", "round", "teacher_step", "verdict"}`. `verdict` is `"accept"`, `"reject"` or,
until the person decides, `null`. What was rejected or not decided is left out and counted as `review_rejected` and
`review_pending`. The others' metadata have `reviewed: true`. They are never held out: replies that a person wrote or
chose because the model was uncertain would be another test than the one that earlier runs took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssl_jax.config import Source
from ssl_jax.data.formats import json_rows
from ssl_jax.data.formats.rows import BadRow, Row, attempt, told, told_keys

REJECTED, PENDING = "review_rejected", "review_pending"


def read(file: Path, source: Source) -> Iterator[Row | BadRow]:
    """The rows of a review file."""
    for number, value in json_rows.values(file, is_review):
        if isinstance(value, BadRow):
            yield value.at(number)
        else:
            yield attempt(number, lambda number=number, value=value: _row(number, value, source))


def is_review(value: Mapping[str, Any]) -> bool:
    """Whether an object is surely a row of a review file; other data may have verdicts of their own."""
    return {"messages", "verdict", "score", "round"} <= value.keys()


def _row(number: int, value: Any, source: Source) -> Row:
    if isinstance(value, dict) and value.get("messages") is None:
        raise BadRow("no messages", f"found {told_keys(value)}")
    row = json_rows.row(number, value, "messages", source)
    verdict = row.metadata.get("verdict")
    match verdict:
        case "accept":
            left_out = None
        case "reject":
            left_out = REJECTED
        case None:
            left_out = PENDING
        case _:
            raise BadRow("unknown verdict", f"{told(verdict)}; a verdict is accept, reject or null")
    round_number = row.metadata.get("round")
    return dataclasses.replace(
        row,
        # Every round may answer the same prompt.
        id=row.id if row.id is None or round_number is None else f"{row.id}/round_{round_number}",
        metadata={key: item for key, item in row.metadata.items() if key != "verdict"} | {"reviewed": True},
        left_out=left_out,
        train_only=True,
    )
