"""Prepared data for people: tables of what is there, and dialogues as the model will see them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ssl_jax.data.store import Prepared
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue

_PERCENTILES = (50, 90, 99, 100)


def tables(prepared: Prepared) -> Iterator[str]:
    """Dialogues, tokens and lengths of every split, and what became of the sources' rows, as lines."""
    summary = prepared.summary
    titles = ["median" if p == 50 else "longest" if p == 100 else f"{p} %" for p in _PERCENTILES]
    yield f"{'split':<20}{'dialogues':>11}{'tokens':>13}   tokens each:" + "".join(f"{title:>9}" for title in titles)
    for split in prepared.splits:
        lengths = prepared.lengths(split)
        row = f"{split.replace('_', ' '):<20}{len(lengths):>11,}{int(lengths.sum(dtype=np.int64)):>13,}{'':>15}"
        yield row + "".join(f"{int(length):>9,}" for length in np.percentile(lengths, _PERCENTILES, method="higher"))
    for title in ("sources", "rejected", "removed", "changed"):
        yield f"{title + ':':<10}{_counts(summary[title])}"


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


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
