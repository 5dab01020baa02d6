"""An evaluation as aligned lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def metric_lines(split: str, values: Mapping[str, float], human: Mapping[str, float]) -> list[str]:
    """A table of metrics; where people have one, their value and the distance to it (value minus theirs).

    Args:
      split: title of the column of values.
      values: metrics by name.
      human: the same statistics of the true replies, as far as they exist.
    """
    rows = [("metric", split, "human", "distance")]
    for name, value in values.items():
        people, distance = (f"{human[name]:.4f}", f"{value - human[name]:+.4f}") if name in human else ("", "")
        rows.append((name, f"{value:.4f}", people, distance))
    return aligned(rows)


def coherence_lines(by_number: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of `Coherence.by_number`: a row for each number that a reply has in its dialogue."""
    names = list(dict.fromkeys(name for values in by_number.values() for name in values))
    rows = [("reply number", *(name.replace("_", " ") for name in names))]
    for number, values in by_number.items():
        rows.append((number, *(_number(values.get(name)) for name in names)))
    return aligned(rows)


def comparison_lines(comparison: Mapping[str, Any]) -> list[str]:
    """What `comparison.compare` found: metrics minus the baseline's, with an interval where there is one."""
    rows = [("metric", "minus baseline", "95 % interval")]
    for name, difference in comparison["differences"].items():
        interval = comparison.get(name)
        rows.append((name, f"{difference:+.4f}", _interval(interval, "+.4f") if interval else ""))
    lines = aligned(rows)
    if (gap := comparison.get("gap_closed")) is not None:
        of_oracle = f"{gap['oracle_gap']['value']:+.4f} bits per byte, {_interval(gap['oracle_gap'], '+.4f')}"
        share = gap["fraction"]
        closed = (
            f"{share['value']:.1%}, {_interval(share, '.1%')}"
            if share
            else "undefined: the oracle's gap is under two of its standard errors"
        )
        lines += [f"gap closed: {closed}", f"oracle gap: {of_oracle}"]
    return lines


def _interval(interval: Mapping[str, float], form: str) -> str:
    return f"{interval['low']:{form}} to {interval['high']:{form}}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which the cells of a column stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
