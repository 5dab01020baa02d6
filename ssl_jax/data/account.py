"""An account of a preparation: what was in the sources, what became of it, and why."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.config import Data
from ssl_jax.data import annotation, examples, languages
from ssl_jax.data.formats import Rejected
from ssl_jax.data.packaged import ResolvedSource
from ssl_jax.data.selection import Selection
from ssl_jax.data.spool import Spool


def summarize(
    data: Data, sources: Sequence[ResolvedSource], spool: Spool, chosen: Selection, rejected: Sequence[Rejected]
) -> dict[str, Any]:
    """The part of `summary.json` that is known before anything is stored.

    Args:
      data: the settings.
      sources: all sources.
      spool: what was read.
      chosen: what became of it.
      rejected: rows that are no dialogues.
    """
    rows = np.concatenate(list(chosen.rows.values()))
    stored = np.bincount(spool.keys["source"][rows], minlength=len(sources))
    read: collections.Counter[str] = collections.Counter()
    kept: collections.Counter[str] = collections.Counter()
    for number, source in enumerate(sources):  # several may have the same name
        if count := chosen.sources.get(number):
            read[source.name] += count
        kept[source.name] += int(stored[number])
    summary = {
        "rejected": dict(collections.Counter(row.reason for row in rejected)),
        "removed": _in_order(chosen.removed, data),
        "changed": _in_order(chosen.changed, data),
        "sources": dict(read),
        "kept": dict(kept),
        "languages": languages.summarize(spool, chosen.rows),
    }
    if data.annotate:
        summary["annotation"] = annotation.summarize(spool.dialogues(rows))
    return summary


def shown_examples(data: Data, spool: Spool, chosen: Selection) -> dict[str, Any]:
    """`examples.json`: by step the first dialogues that it changed or removed."""
    left_out = {
        step: [examples.shown(dialogue, None) for dialogue in spool.dialogues(rows)]
        for step, rows in chosen.left_out.items()
    }
    return _in_order({**spool.examples(), **left_out}, data)


def _in_order(by_step: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """Steps of cleaning as they are applied, then what comes after them."""
    places = {step.step: place for place, step in enumerate(data.cleaning)}
    return {step: by_step[step] for step in sorted(by_step, key=lambda step: places.get(step, len(places)))}
