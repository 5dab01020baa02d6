"""Keywords of a dialogue, "the important information": RAKE for English, TextRank for Chinese, both on tagged words.

Both see words with their parts of speech instead of a list of stop words, need no corpus, and are deterministic.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ssl_jax.data.annotation.language import Language
from ssl_jax.data.annotation.words import Tagged, Token

# Words that say nothing about what a dialogue is about, and what chat writes that taggers take for a name.
_VAGUE_ENGLISH = """
    thing things stuff lot lots bit kind kinds sort sorts way ways one ones something anything everything nothing guy
    guys people person time times day days part point reason idea lets let other own same such last next good great nice
    cool better best thanks thank hi hey hello bye yeah yea yep yup nah nope ok okay oh ah argh wow whew whoa hmm lol
    lmao rofl omg btw idk tbh gonna wanna gotta dunno kinda sorta cuz cos pls plz im ive dont didnt doesnt cant wont
    isnt thats whats theyre youre ur today tonight tomorrow yesterday year years month months week weeks weekend hour
    hours minute minutes second seconds half monday tuesday wednesday thursday friday saturday sunday january february
    march april may june july august september october november december
"""
# The same for Chinese, with words that jieba's dictionary takes for names.
_VAGUE_CHINESE = """
    人 人们 人家 个人 有人 事 事情 东西 话 时 时候 时间 点 点儿 样子 问题 意思 地方 方面 情况 有点 有 没有 有没有 知道
    觉得 认为 感觉 喜欢 想要 可以 可能 应该 需要 希望 告诉 成为 作为 进行 开始 使用 看到 看过 听到 听说 得到 感到 见到
    受到 小时 分钟 没来 包括 具有 致力于 取决于 是否 是不是 不会 不能 我会 我能 这是 起来 问 说得对 先生 小姐 谢谢 请问
    聊天 太多 美味
"""
_VAGUE = frozenset(_VAGUE_ENGLISH.split()) | frozenset(_VAGUE_CHINESE.split())
_LAUGHTER = re.compile(r"[aehj]{4,}|(?:h[iou]){2,}h?", re.IGNORECASE)
_DRAWN_OUT = re.compile(r"([a-z])\1\1", re.IGNORECASE)
_MAX_PHRASE_WORDS = 4

# jieba's tags of words that carry content, by their first letters: nouns and what stands as one, foreign words, verbs.
_CONTENT_JIEBA = ("n", "an", "eng", "j", "v")
_WINDOW = 5
_DAMPING = 0.85
# Scores are rounded to as many digits, which hides where the iteration stopped.
_TOLERANCE = 1e-7
_DIGITS = 4


def keywords(turns: Iterable[Sequence[Tagged]], language: Language, count: int = 10) -> list[tuple[str, float]]:
    """The best key phrases of a dialogue.

    English: candidates are runs of adjectives and nouns that end in a noun, at most four words long; a word's weight is
    its degree, the number of words in all candidates with it, and a phrase weighs what its words weigh (Rose et al.
    2010, "Automatic keyword extraction from individual documents", the deg(w) measure; it prefers words that come
    often and in long candidates). Phrases are in lower case, except those with a proper noun.

    Chinese: nouns, verbs, names and foreign words are ranked by PageRank on the graph that connects each with the next
    four of its turn (Mihalcea and Tarau 2004, "TextRank: bringing order into texts"); the best has weight 1.

    Args:
      turns: tagged words.
      language: of the dialogue; "other" has no keywords.
      count: how many at most.

    Returns:
      (phrase, score) pairs, best first; of equal ones the first in the dialogue.
    """
    match language:
        case "en":
            scores = _rake(phrase for turn in turns for phrase in _noun_phrases(turn))
        case "zh":
            scores = _text_rank([[token.text for token, _, raw in turn if _is_content(token, raw)] for turn in turns])
        case "other":
            scores = {}
    # A sort keeps the order of equals.
    return sorted(scores.items(), key=lambda item: -item[1])[:count]


def is_vague(word: str) -> bool:
    """Whether a word says nothing about what a dialogue is about: a filler, laughter, yesss, a noun for anything."""
    return bool(word.casefold() in _VAGUE or _LAUGHTER.fullmatch(word) or _DRAWN_OUT.search(word))


def _noun_phrases(turn: Sequence[Tagged]) -> Iterator[tuple[str, ...]]:
    """Runs of adjectives and nouns without the adjectives behind the last noun, cut to the last four words."""

    def is_part(item: Tagged) -> bool:
        token, tag, _ = item
        is_word = len(token.text) > 1 and token.text[0].isalpha() and not is_vague(token.text)
        return is_word and tag in {"ADJ", "NOUN", "PROPN"}

    for usable, run in itertools.groupby(turn, is_part):
        words = list(run) if usable else []
        while words and words[-1][1] == "ADJ":
            words.pop()
        if words:
            words = words[-_MAX_PHRASE_WORDS:]
            has_name = any(tag == "PROPN" for _, tag, _ in words)
            yield tuple(token.text if has_name else token.text.lower() for token, _, _ in words)


def _rake(candidates: Iterable[tuple[str, ...]]) -> dict[str, float]:
    candidates = list(candidates)
    degrees: collections.Counter[str] = collections.Counter()
    surfaces: dict[str, str] = {}
    for candidate in candidates:
        for word in candidate:
            degrees[word.casefold()] += len(candidate)
        phrase = " ".join(candidate)
        surfaces.setdefault(phrase.casefold(), phrase)
    return {surface: float(sum(degrees[word] for word in phrase.split(" "))) for phrase, surface in surfaces.items()}


def _is_content(token: Token, raw_tag: str) -> bool:
    is_content = raw_tag.startswith(_CONTENT_JIEBA) and not is_vague(token.text)
    # One character is a word where it is a common noun, and more often a part of one elsewhere.
    return is_content and (len(token.text) > 1 or raw_tag == "n")


def _text_rank(turns: Sequence[Sequence[str]]) -> dict[str, float]:
    graph: dict[str, collections.Counter[str]] = {word: collections.Counter() for turn in turns for word in turn}
    for turn in turns:
        for place, word in enumerate(turn):
            for neighbor in turn[place + 1 : place + _WINDOW]:
                if neighbor != word:
                    graph[word][neighbor] += 1
                    graph[neighbor][word] += 1
    ranks = _page_rank(graph)
    best = max(ranks.values(), default=1.0)
    return {word: round(rank / best, _DIGITS) for word, rank in ranks.items()}


def _page_rank(graph: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Weighted PageRank of an undirected graph: every word passes its rank on in proportion to the edges' weights."""
    ranks = dict.fromkeys(graph, 1.0)
    totals = {word: sum(edges.values()) for word, edges in graph.items()}
    change = 1.0
    while change > _TOLERANCE:
        before = ranks
        passed_on = {
            word: sum(before[other] * weight / totals[other] for other, weight in edges.items())
            for word, edges in graph.items()
        }
        ranks = {word: 1 - _DAMPING + _DAMPING * rank for word, rank in passed_on.items()}
        # The changes' sum shrinks by the damping factor in every round, because a word passes on all of its rank.
        change = max((abs(ranks[word] - before[word]) for word in graph), default=0.0)
    return ranks
