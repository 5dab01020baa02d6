"""In which languages dialogues are, told from a sample."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ssl_jax.config import cleaning
from ssl_jax.data.annotation.language import language_of
from ssl_jax.data.cleaning.filters import load_identifier
from ssl_jax.data.language_codes import code_of
from ssl_jax.data.spool import Spool
from ssl_jax.data.store import LABELED_SPLITS, UNLABELED_SPLITS
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

UNKNOWN = "unknown"
IDENTIFIER = "py3langid"

_SAMPLE = 1000
_CHARACTERS = 300  # of a dialogue, from its start: enough to tell, and a third of the time of the step's
_STEP = cleaning.Language(keep=("en",))  # for the bounds that it has by default


def summarize(spool: Spool, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Shares of the dialogues that are kept, labeled and unlabeled, by language.

    `metadata["language"]` decides where the source gave one; else py3langid, with the bounds that the cleaning step
    `language` has by default; else, where that is not installed, the script, which tells Chinese.

    Args:
      spool: the dialogues.
      rows: by split the numbers of its dialogues in `spool`.

    Returns:
      JSON: `{"labeled": {"en": 0.93, "unknown": 0.07}, "unlabeled": {…}, "sampled": 1000, "by": "py3langid"}`, most
      frequent first. At most 1,000 dialogues are looked at, always the same ones of the same data.
    """
    kinds = {
        kind: np.concatenate([np.empty(0, np.int64), *(rows[split] for split in splits if split in rows)])
        for kind, splits in (("labeled", LABELED_SPLITS), ("unlabeled", UNLABELED_SPLITS))
    }
    share = max(_SAMPLE // 2, _SAMPLE - min(map(len, kinds.values())))
    by: collections.Counter[str] = collections.Counter()
    shares: dict[str, Any] = {}
    identifier = functools.cache(_identifier)
    for kind, numbers in kinds.items():
        # Hashes of texts are drawn as evenly as dice, and the same whatever the order of the sources.
        hashes = spool.keys["text"][numbers, 0]
        drawn = numbers[np.argpartition(hashes, share)[:share]] if len(numbers) > share else numbers
        found: collections.Counter[str] = collections.Counter()
        for dialogue in spool.dialogues(np.sort(drawn)):
            language, source = _identify(dialogue, identifier)
            found[language] += 1
            by[source] += 1
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        shares[kind] = {language: round(count / len(drawn), 4) for language, count in ranked}
    return {**shares, "sampled": by.total(), "by": ", ".join(sorted(by))}


def _identifier() -> Any:
    """What tells languages apart; None where its package is not installed."""
    try:
        return load_identifier()
    except UserError:
        return None


def _identify(dialogue: Dialogue, identifier: Callable[[], Any]) -> tuple[str, str]:
    """The language's code, and who says so."""
    named = dialogue.metadata.get("language")
    if isinstance(named, str) and named.strip():
        return code_of(named), "metadata"
    model = identifier()
    text = "\n".join(turn.content for turn in dialogue.turns)
    if model is None or len(text) < _STEP.min_characters:
        language = "zh" if language_of(dialogue) == "zh" else UNKNOWN
        return language, "script" if model is None else IDENTIFIER
    code, confidence = model.classify(text[:_CHARACTERS])
    return (code_of(code) if confidence >= _STEP.min_confidence else UNKNOWN), IDENTIFIER
