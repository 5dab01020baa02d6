"""Steps that remove whole dialogues, and those that leave only the words that carry meaning."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ssl_jax.data.cleaning.characters import PUNCTUATION
from ssl_jax.data.cleaning.turns import cut_content
from ssl_jax.data.language_codes import code_of
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN_RUN = re.compile(f"[{_HAN}]+")
_KANA = "\u3040-\u30ff"
WORD = re.compile(rf"[{_HAN}{_KANA}]|[^\W{_HAN}{_KANA}]+(?:['’][^\W{_HAN}{_KANA}]+)*")
_LATIN_WORD = re.compile(rf"[^\W{_HAN}{_KANA}]+(?:['’][^\W{_HAN}{_KANA}]+)*")
_INNER_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
_PUNCTUATION = re.compile(f"(?:{PUNCTUATION})+")


def language(
    dialogue: Dialogue, *, keep: tuple[str, ...], min_confidence: float, min_characters: int, sample_characters: int
) -> Dialogue | None:
    """See `config.cleaning.Language`; the model is langid's (Lui & Baldwin, 2012), naive Bayes over byte n-grams."""
    text = "\n".join(turn.content for turn in dialogue.turns)
    if len(text) < min_characters:
        return dialogue
    confidence = sum(
        probability
        for code, probability in load_identifier().rank(text[:sample_characters])
        if code in keep or code_of(code) in keep
    )
    return dialogue if confidence >= min_confidence else None


def length(
    dialogue: Dialogue,
    *,
    min_turns: int,
    max_turns: int | None,
    min_characters: int,
    max_characters: int | None,
    min_words: int,
    max_words: int | None,
    min_turn_characters: int,
    max_turn_characters: int | None,
) -> Dialogue | None:
    """See `config.cleaning.Length`."""
    lengths = [len(turn.content) for turn in dialogue.turns]
    fits = (
        _within(len(lengths), min_turns, max_turns)
        and _within(sum(lengths), min_characters, max_characters)
        and _within(min(lengths), min_turn_characters, None)
        and _within(max(lengths), 0, max_turn_characters)
    )
    if fits and (min_words or max_words is not None):
        words = sum(len(WORD.findall(turn.content)) for turn in dialogue.turns)
        fits = _within(words, min_words, max_words)
    return dialogue if fits else None


def punctuation(dialogue: Dialogue) -> Dialogue | None:
    """See `config.cleaning.Punctuation`; an apostrophe within a word goes, every other mark becomes a space."""

    def change(text: str) -> str:
        text = _INNER_APOSTROPHE.sub("", text)
        return _tidy(_PUNCTUATION.sub(" ", text)) if _PUNCTUATION.search(text) else text

    return cut_content(dialogue, change)


def stop_words(dialogue: Dialogue, *, languages: tuple[str, ...]) -> Dialogue | None:
    """See `config.cleaning.StopWords`; Chinese is cut into words by rjieba."""
    stops = _stop_words(languages)

    def change(text: str) -> str:
        changed = _LATIN_WORD.sub(lambda word: "" if word[0].casefold().replace("’", "'") in stops else word[0], text)
        if "zh" in languages:
            cut = load_cutter()
            changed = _HAN_RUN.sub(lambda run: "".join(word for word in cut(run[0]) if word not in stops), changed)
        return text if changed == text else _tidy(changed)

    return cut_content(dialogue, change)


def check_identifiable(languages: Sequence[str]) -> None:
    """Refuses languages that `language` cannot tell.

    Raises:
      UserError: an unknown code, or py3langid is missing.
    """
    _check_languages("language", languages, load_identifier().labels)


def check_stop_words(languages: Sequence[str]) -> None:
    """Refuses languages that `stop_words` has no words of.

    Raises:
      UserError: an unknown code, or stopwordsiso or rjieba is missing.
    """
    _check_languages("stop_words", languages, _stop_words_package().langs())
    if "zh" in languages:
        load_cutter()


def _check_languages(step: str, languages: Sequence[str], known: Collection[str]) -> None:
    for code in languages:
        if code not in known:
            raise UserError(f"data.cleaning: {step}: unknown language {code!r}; known: {', '.join(sorted(known))}")


def _within(value: int, low: int, high: int | None) -> bool:
    return value >= low and (high is None or value <= high)


def _tidy(text: str) -> str:
    """Single spaces, none at the ends of lines."""
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


@functools.cache
def load_identifier() -> Any:
    """Returns the model that tells languages apart.

    Raises:
      UserError: py3langid is not installed.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("data.cleaning: language needs py3langid; pip install 'ssl_jax[text]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _stop_words_package() -> Any:
    try:
        import stopwordsiso
    except ImportError:
        raise UserError("data.cleaning: stop_words needs stopwordsiso; pip install 'ssl_jax[text]'") from None
    return stopwordsiso


@functools.cache
def _stop_words(languages: tuple[str, ...]) -> frozenset[str]:
    return frozenset(word.casefold() for word in _stop_words_package().stopwords(list(languages)))


@functools.cache
def load_cutter() -> Callable[[str], list[str]]:
    """Returns what cuts Chinese text into words.

    Raises:
      UserError: rjieba is not installed.
    """
    try:
        import rjieba
    except ImportError:
        raise UserError("data.cleaning: stop_words of Chinese need rjieba; pip install 'ssl_jax[text]'") from None
    return rjieba.cut
