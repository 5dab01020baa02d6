"""The language of a dialogue: what its source says, else what its script says."""

from __future__ import annotations

import re
from typing import Literal

from ssl_jax.data.annotation.patterns import ADDRESS
from ssl_jax.data.language_codes import code_of
from ssl_jax.dialogue import Dialogue

Language = Literal["en", "zh", "other"]
"""`other` has words and entities with a pattern of their own (URLs, e-mails), but no parts of speech nor keywords."""

_ANNOTATED: dict[str, Language] = {"en": "en", "zh": "zh"}

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# Kana and Hangul: a text that has them beside Han characters is not Chinese.
_OTHER_EAST_ASIAN = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\u1100-\u11ff\uac00-\ud7af]")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_WORD = re.compile(r"[^\W\d_]+")
# Is Latin in every language.
_ADDRESS = re.compile(ADDRESS)


def language_of(dialogue: Dialogue) -> Language:
    """The language in which a dialogue is annotated.

    `metadata["language"]` decides where the source gave one (a name or a code, with or without a region). Else the
    script does, addresses aside: Chinese, if there are at least as many Han characters as other words and no kana or
    Hangul; English, if at least half of the words are Latin; else other. A script does not tell English from other
    languages that are written in Latin letters: have the source name them.
    """
    named = dialogue.metadata.get("language")
    if isinstance(named, str) and named:
        return _ANNOTATED.get(code_of(named), "other")
    text = _ADDRESS.sub(" ", "\n".join(turn.content for turn in dialogue.turns))
    han = len(_HAN.findall(text))
    words = _WORD.findall(_HAN.sub(" ", text))
    if han and han >= len(words) and not _OTHER_EAST_ASIAN.search(text):
        return "zh"
    latin = sum(1 for word in words if _LATIN_WORD.fullmatch(word))
    return "en" if latin and 2 * latin >= len(words) + han else "other"
