"""Prepared data for people: what is there, where the sources' rows went, and dialogues as the model will see them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ssl_jax import files
from ssl_jax.data import examples, languages
from ssl_jax.data.store import Prepared
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue

_WIDTH = 100
_PERCENTILES = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
_MOST_LANGUAGES, _MOST_ITEMS = 8, 8
_MIN_BAR, _MAX_BAR = 3, 24
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
_HINT = "pip install 'ssl_jax[text]' and prepare into an empty data.prepared_dir, and it is told"


def tables(prepared: Prepared) -> Iterator[str]:
    """What became of the sources' rows, and what every split holds, as lines of at most 100 columns.

    Names of sources and reasons, which may be long, end their lines.
    """
    summary = prepared.summary
    kept = sum(map(len, map(prepared.lengths, prepared.splits)))
    for table in (
        _flow(summary),
        _sources(summary),
        _changes(summary),
        _splits(prepared),
        _lengths(summary["lengths"]),
        _languages(summary["languages"], kept),
        _annotation(summary.get("annotation", {})),
    ):
        yield from itertools.chain([""], lines) if (lines := list(table)) else ()


def show(prepared: Prepared, split: str, number: int) -> Iterator[str]:
    """The first `number` dialogues of a split as the model reads them; what it learns to predict is marked."""
    encoded = prepared.encoded(split)
    for index in range(min(number, len(encoded))):
        dialogue = encoded[index]
        learned = int(dialogue.loss_mask.sum())
        yield ""
        yield f"{split} {index}, id {dialogue.id}: {len(dialogue.tokens)} tokens, ⟦{learned} of them predicted⟧"
        yield marked(prepared.tokenizer, dialogue)


def marked(tokenizer: DialogueTokenizer, dialogue: EncodedDialogue) -> str:
    """The tokens of a dialogue as text, control tokens spelled out, ⟦what the loss counts⟧ in brackets."""
    pieces = []
    for is_learned, places in itertools.groupby(range(len(dialogue.tokens)), key=lambda i: bool(dialogue.loss_mask[i])):
        text = tokenizer.spell([dialogue.tokens[place] for place in places])
        pieces.append(f"⟦{text}⟧" if is_learned else text)
    return "".join(pieces)


def effects(prepared: Prepared, number: int) -> Iterator[str]:
    """Up to `number` dialogues of each step that changed or removed some, with the difference marked."""
    found = files.read_json(prepared.directory / "examples.json")
    changed, removed = prepared.summary["changed"], prepared.summary["removed"]
    steps = [step for step in dict.fromkeys([*found, *changed, *removed]) if step in changed or step in removed]
    yield ""
    told = "what the steps did: [-removed-]{+added+}, invisible characters as escapes"
    yield told if steps else "no step changed or removed anything"
    for step in steps:
        counts = [f"{verb} {of[step]:,}" for verb, of in (("changed", changed), ("removed", removed)) if step in of]
        stored = found.get(step, [])
        yield ""
        yield f"{step}: {', '.join(counts)}; {min(number, len(stored))} of them:"
        for example in stored[:number]:
            is_removed = example["after"] is None
            yield f"  {example['id']}{' (removed)' if is_removed else ''}"
            mark = "-" if is_removed else " "
            yield from (f"   {mark} {line}" for line in examples.difference(example["before"], example["after"]))


def rejected(prepared: Prepared, number: int) -> Iterator[str]:
    """The first `number` rows that are no dialogues: where, and why."""
    total = sum(prepared.summary["rejected"].values())
    yield ""
    yield f"rejected rows: {total:,}{f'; the first {min(number, total):,}:' if total else ''}"
    with open(prepared.directory / "rejected.jsonl", encoding="utf-8") as lines:
        for row in map(json.loads, itertools.islice(lines, number)):
            detail = f" ({examples.visible(row['detail'])})" if "detail" in row else ""
            yield f"  {row['file']}:{row['line']}: {row['reason']}{detail}"


def _flow(summary: Mapping[str, Any]) -> Iterator[str]:
    """From the rows of the sources to the dialogues of the splits, a sum."""
    rejected, removed, kept = summary["rejected"], summary["removed"], summary["dialogues"]
    yield f"{sum(summary['sources'].values()) + sum(rejected.values()):>13,}  rows in the sources"
    if not rejected:
        yield f"{0:>13}  rejected"
    for reason, count in rejected.items():
        yield f"{-count:>13,}  rejected: {reason}"
    for step, count in removed.items():
        yield f"{-count:>13,}  removed by {step}"
    counts = {kind: sum(kept[kind].values()) for kind in ("labeled", "unlabeled")}
    yield f"{sum(counts.values()):>13,}  dialogues kept: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items())


def _changes(summary: Mapping[str, Any]) -> Iterator[str]:
    for step, count in summary["changed"].items():
        yield f"{count:>13,}  changed by {step}"


def _sources(summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'dialogues':>13}{'removed':>12}{'kept':>13}  source"
    for name, kept in summary["kept"].items():
        read = summary["sources"].get(name, 0)
        yield f"{read:>13,}{read - kept:>12,}{kept:>13,}  {name}"


def _splits(prepared: Prepared) -> Iterator[str]:
    titles = "".join(f"{title:>8}" for title in _PERCENTILES)
    yield f"{'':<17}{'dialogues':>11}{'turns':>12}{'each':>6}{'tokens':>15}  each:{titles}"
    for split in prepared.splits:
        lengths, turns = prepared.lengths(split), prepared.turn_counts(split)
        total, tokens = int(turns.sum(dtype=np.int64)), int(lengths.sum(dtype=np.int64))
        row = f"{split.replace('_', ' '):<17}{len(lengths):>11,}{total:>12,}{total / len(lengths):>6,.1f}{tokens:>15,}"
        percentiles = np.percentile(lengths, list(_PERCENTILES.values()), method="higher")
        yield row + " " * 7 + "".join(f"{int(length):>8,}" for length in percentiles)


def _lengths(histograms: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """A row for each bucket, a column for each split: how many dialogues, with bars that fill the fullest bucket's."""
    if not histograms:
        return
    title = "tokens up to"
    names = [split.removeprefix("labeled_").removesuffix("_train").replace("_", " ") for split in histograms]
    digits = [
        max(len(name), len(f"{max(counts.values()):,}"))
        for name, counts in zip(names, histograms.values(), strict=True)
    ]
    room = (_WIDTH - len(title) - sum(digits)) // len(histograms) - 3
    bar = min(max(room, _MIN_BAR), _MAX_BAR)
    heads = (f"  {name:>{width}} {'':{bar}}" for name, width in zip(names, digits, strict=True))
    yield (title + "".join(heads)).rstrip()
    for bucket in next(iter(histograms.values())):
        cells = (
            f"  {counts[bucket]:>{width},} {_bar(counts[bucket] / max(counts.values()), bar)}"
            for counts, width in zip(histograms.values(), digits, strict=True)
        )
        yield f"{int(bucket.removeprefix('<=')):>{len(title)},}{''.join(cells)}".rstrip()


def _bar(share: float, width: int) -> str:
    """A bar that fills a share of `width` columns, in eighths of one; what is not nothing can be seen."""
    full, rest = divmod(max(round(share * width * 8), int(share > 0)), 8)
    return f"{'█' * full}{_EIGHTHS[rest]}".ljust(width)


def _languages(found: Mapping[str, Any], dialogues: int) -> Iterator[str]:
    which = "all" if found["sampled"] == dialogues else f"a sample of {found['sampled']:,}"
    yield f"languages of {which} dialogues, by {found['by']}"
    for kind in ("labeled", "unlabeled"):
        ranked = list(found[kind].items())
        shares = [f"{language} {share:.1%}" for language, share in ranked[:_MOST_LANGUAGES]]
        if others := ranked[_MOST_LANGUAGES:]:
            shares.append(f"{len(others)} others {sum(share for _, share in others):.1%}")
        if shares:
            yield f"  {kind:<11}{', '.join(shares)}"
    if any(languages.UNKNOWN in found[kind] for kind in ("labeled", "unlabeled")):
        missing = "script" in found["by"]
        yield f"  unknown: {_HINT if missing else 'too short to tell, or a mixture'}"


def _annotation(found: Mapping[str, Any]) -> Iterator[str]:
    for language, counts in found.items():
        words = f", {counts['words']:,} words" if "words" in counts else ""
        yield f"annotated as {language}: {counts['dialogues']:,} dialogues{words}"
        lists = {
            "tags": [f"{tag} {share:.0%}" for tag, share in counts.get("tags", {}).items()],
            "keywords": [f"{keyword['phrase']} {keyword['dialogues']:,}" for keyword in counts.get("keywords", ())],
            "entities": [f"{kind} {count:,}" for kind, count in counts.get("entities", {}).items()],
        }
        yield from (f"  {name:<11}{', '.join(items[:_MOST_ITEMS])}" for name, items in lists.items() if items)
