"""Text to words with parts of speech: Chinese by jieba's dictionary (rjieba), English by a rule and HanTa.

A text's words, one after the other, are the text without its white space: nothing is added, changed or lost.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ssl_jax.config.annotation import UniversalTag
from ssl_jax.data.annotation import tags
from ssl_jax.data.annotation.language import Language
from ssl_jax.data.annotation.patterns import ADDRESS
from ssl_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """A word, number or mark.

    Attributes:
      text: as it stands in the turn.
      start: place of its first character in the turn.
      raw_tag: the part of speech that segmentation knows already, in the tagger's own tag set; "" if none.
    """

    text: str
    start: int
    raw_tag: str = ""


class Tagged(NamedTuple):
    """A token, its Universal POS tag, and the tagger's own tag ("" where there is no tagger)."""

    token: Token
    tag: UniversalTag
    raw_tag: str


_EMOJI_BASE = r"[\u2190-\u2bff\u3030\u303d\U0001f000-\U0001f1e5\U0001f200-\U0001faff]"
_EMOJI_MODIFIER = r"[\ufe0f\U0001f3fb-\U0001f3ff]*"
_EMOJI = (
    rf"[\U0001f1e6-\U0001f1ff]{{2}}|[0-9#*]\ufe0f?\u20e3"
    rf"|{_EMOJI_BASE}{_EMOJI_MODIFIER}(?:\u200d{_EMOJI_BASE}{_EMOJI_MODIFIER})*"
)
_EMOTICON = r"(?<!\S)(?:[:;=][-']?[()\[\]DPpOo3|/\\*]+|<3|[xX]D+)(?!\w)"
# What is one word in every language, and whose part of speech no tagger knows.
_ATOM = re.compile(rf"(?P<address>{ADDRESS})|(?P<sign>{_EMOTICON}|{_EMOJI})")

# A letter or digit that belongs to a word written between spaces; Han characters and kana stand for themselves.
_LETTER = r"[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
# The rule for English, tried in order: a number with its separators; an abbreviation with full stops; letters and
# digits with hyphens and apostrophes inside; the same mark repeated; anything else by itself.
_ENGLISH_WORD = re.compile(
    rf"\d+(?:[.,:/]\d+)+|(?:[A-Za-z]\.){{2,}}|{_LETTER}+(?:['’-]{_LETTER}+)*|(?P<mark>[^\w\s]|_)(?P=mark)*|\S"
)
# Contractions are two words, as in the corpora that taggers learn from: do n't, it 's, we 'll.
_CONTRACTION = re.compile(r"(?i)(?<=\w)(?:n['’]t|['’](?:s|m|d|re|ve|ll))$")

# The time that HanTa takes grows with the square of a word's length or worse; few English words are longer.
_MAX_WORD_CHARACTERS = 24
_LONG_WORD = "something"
# HanTa fails where the logarithm of a sentence's probability falls below -1e6.
_MAX_SENTENCE_WORDS = 200
_UNKNOWN: list[UniversalTag] = ["X"]
_SENTENCE_END = frozenset(".!?")
_STRAIGHT_QUOTES = str.maketrans("‘’“”", "''\"\"")


def segment(text: str, language: Language) -> list[Token]:
    """Cuts text into words; white space belongs to none.

    URLs, e-mail addresses, emoji with their modifiers and emoticons are one word. The rest of a Chinese text is cut by
    jieba's dictionary, with its hidden Markov model for words that are not in it. Any other text is cut by a rule:
    letters and digits with hyphens and apostrophes inside, contractions apart (`do n't`), numbers with separators,
    runs of one mark, and every Han character and kana by itself.

    Raises:
      UserError: Chinese, and rjieba is not installed.
    """
    cut = _cut_chinese if language == "zh" else _cut_english
    unclassified = tags.UNCLASSIFIED_JIEBA if language == "zh" else tags.UNCLASSIFIED_C5
    tokens: list[Token] = []
    end = 0
    for atom in _ATOM.finditer(text):
        tokens += cut(text[end : atom.start()], end)
        tokens.append(Token(atom.group(), atom.start(), unclassified))
        end = atom.end()
    tokens += cut(text[end:], end)
    return tokens


def tag(tokens: Sequence[Token], language: Language) -> list[Tagged]:
    """Parts of speech of one turn's tokens.

    Marks, numbers in digits and emoji get the tag that their characters say. English words are tagged by HanTa,
    sentence by sentence; Chinese ones by jieba's dictionary, word by word. The words of other languages are X.

    Raises:
      UserError: English, and HanTa is not installed.
    """
    universal: Sequence[UniversalTag]
    match language:
        case "en":
            raw_tags = _tag_english(tokens)
            universal = [tags.FROM_C5[raw_tag] for raw_tag in raw_tags]
        case "zh":
            raw_tags = [token.raw_tag for token in tokens]
            universal = [tags.from_jieba(raw_tag) for raw_tag in raw_tags]
        case "other":
            raw_tags, universal = [""] * len(tokens), _UNKNOWN * len(tokens)
    return [
        Tagged(token, _by_form(token.text) or tag, raw_tag)
        for token, tag, raw_tag in zip(tokens, universal, raw_tags, strict=True)
    ]


# Words repeat.
@functools.lru_cache(maxsize=100_000)
def _by_form(word: str) -> UniversalTag | None:
    if atom := _ATOM.fullmatch(word):
        return "SYM" if atom.group("sign") else "X"
    return tags.by_characters(word)


def _cut_chinese(text: str, start: int) -> Iterator[Token]:
    if not text or text.isspace():
        return
    for word, raw_tag in _jieba_tag()(text):
        if not word.isspace():
            yield Token(word, start, raw_tag)
        start += len(word)


def _cut_english(text: str, start: int) -> Iterator[Token]:
    for match in _ENGLISH_WORD.finditer(text):
        word, place = match.group(), start + match.start()
        contraction = _CONTRACTION.search(word) if "'" in word or "’" in word else None
        if contraction is None:
            yield Token(word, place)
        else:
            yield Token(word[: contraction.start()], place)
            yield Token(contraction.group(), place + contraction.start())


def _tag_english(tokens: Sequence[Token]) -> list[str]:
    raw_tags: list[str] = []
    sentence: list[str] = []
    for place, token in enumerate(tokens, start=1):
        sentence.append(_as_hanta_knows_it(token))
        if token.text[0] in _SENTENCE_END or len(sentence) == _MAX_SENTENCE_WORDS or place == len(tokens):
            raw_tags += _hanta()(sentence)
            sentence = []
    return [token.raw_tag or raw_tag for token, raw_tag in zip(tokens, raw_tags, strict=True)]


def _as_hanta_knows_it(token: Token) -> str:
    """What stands for a token in a sentence: what HanTa cannot know is a comma between words, or a word."""
    if token.raw_tag or _by_form(token.text) == "SYM":
        return ","
    if len(token.text) > _MAX_WORD_CHARACTERS:
        return _LONG_WORD
    # Of a repeated mark, one; typewriter quotes.
    word = token.text[:1] if _by_form(token.text) == "PUNCT" and token.text != "..." else token.text
    return word.translate(_STRAIGHT_QUOTES)


@functools.cache
def _jieba_tag() -> Callable[[str], list[tuple[str, str]]]:
    try:
        import rjieba
    except ImportError:
        raise UserError("annotating Chinese needs a package: pip install 'ssl_jax[annotate]'") from None
    return rjieba.tag


@functools.cache
def _hanta() -> Callable[[Sequence[str]], Any]:
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError:
        raise UserError("annotating English needs a package: pip install 'ssl_jax[annotate]'") from None
    # By its full path, because HanTa would prefer a file of that name in the current folder.
    with importlib.resources.as_file(importlib.resources.files("HanTa") / "morphmodel_en.pgz") as model:
        tagger = HanoverTagger(str(model))
    # The analysis of a word that is not in the model's own table is slow, and depends on the word alone.
    tagger.analyze_forward = functools.lru_cache(maxsize=100_000)(tagger.analyze_forward)
    return functools.partial(tagger.tag_sent, taglevel=0)
