"""Text to token ids through a cache of words, for tokenizers whose words do not depend on what is around them.

GPT-2's pre-tokenization (Radford et al. 2019) cuts a text into pieces, each encoded for itself. A piece is white space,
or has none but a space at its beginning. So there is always a cut between a character that is no white space and a
space behind it. The pattern looks further than its piece only behind white space, which these cuts are not. So a word
has, with the space before it, the same ids alone as in a text; and most words of a dialogue have been seen before.

Ids are bytes here, as int32 in the byte order of the machine: joining bytes is the fastest way to join many short rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np
import tokenizers
from tokenizers import models

# Ids of every text.
Encode = Callable[[Sequence[str]], list[bytes]]

ID_BYTES = 4

# About 140 bytes each in English; 120 MB in all where every word is as long as it may be.
_MAX_WORDS = 2**18
_MAX_WORD_CHARACTERS = 32
# Words that are longer than this on average are rarely words: the text is of a language that writes no spaces.
_LONG_WORDS = 16

_SPACE_BEHIND_WORD = re.compile(r"(?<!\s) ")
# A line end is a piece for itself before these, and so is what they have before a line end.
_PLAIN_WORD = re.compile(r" ?\S{1,32}")
_LINES = 128

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_HARD_TEXTS = (
    "We'll see: it's 10 o'clock, isn't it?  Yes   'tis ",
    " \n\n a\t\t b \r\n c\u00a0 d \u3000 e\x1c f\x85 g\u200b h \u180e i",
    "你好 世界\uff0c 2½ ²³ x̂ 👩‍👧 ـ",
    "<|endoftext|> <|user|><|pad|> \x00 \x7f",
)


def make_encode(backend: tokenizers.Tokenizer) -> Encode:
    """The fastest way from texts to their ids, without control tokens: with a cache where that is right.

    Args:
      backend: must read control tokens in text as text, and not change any more.
    """
    cache = WordCache(backend)
    if _has_context_free_words(backend) and cache.encode(_HARD_TEXTS) == encode(backend, _HARD_TEXTS):
        return cache.encode
    return lambda texts: encode(backend, texts)


def encode(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[bytes]:
    """Ids of every text, without control tokens, on all cores."""
    return [pack(encoding.ids) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def pack(ids: Sequence[int]) -> bytes:
    """Ids as bytes."""
    return np.array(ids, np.int32).tobytes()


class WordCache:
    """Ids of the words that were there before; `backend` is asked for the others.

    Threads may share it. It holds at most `_MAX_WORDS` words, and begins anew when there are more.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._line_end = backend.encode("\n", add_special_tokens=False).ids
        # What texts begin with, and what is behind a space, by the word without that space.
        self._first: dict[str, bytes] = {}
        self._spaced: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._first) + len(self._spaced)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of every text, equal to `encode` of the backend."""
        results = [b""] * len(texts)
        incomplete: list[tuple[int, list[bytes | None], dict[int, str]]] = []
        for number, text in enumerate(texts):
            words = _words(text)
            found = list(map(self._spaced.get, words))
            found[0] = self._first.get(words[0])
            if all(found):
                results[number] = b"".join(found)  # pyright: ignore[reportArgumentType]
            else:
                places = [place for place, ids in enumerate(found) if ids is None]
                missing = {place: " " + words[place] if place else words[0] for place in places}
                incomplete.append((number, found, missing))
        if incomplete:
            unknown = list(dict.fromkeys(word for *_, missing in incomplete for word in missing.values()))
            new = dict(zip(unknown, self._encode_words(unknown), strict=True))
            for number, found, missing in incomplete:
                for place, word in missing.items():
                    found[place] = new[word]
                results[number] = b"".join(found)  # pyright: ignore[reportArgumentType]
            self._remember(new)
        return results

    def _encode_words(self, words: Sequence[str]) -> list[bytes]:
        """Ids of every word. The library takes as long for each text as for a word, so words become lines of a text."""
        ids: dict[str, bytes] = {}
        plain = list(filter(_PLAIN_WORD.fullmatch, words)) if len(self._line_end) == 1 else []
        groups = [plain[start : start + _LINES] for start in range(0, len(plain), _LINES)]
        packed = encode(self._backend, ["\n".join(group) for group in groups])
        for group, row in zip(groups, packed, strict=True):
            ends = (np.flatnonzero(np.frombuffer(row, np.int32) == self._line_end[0]) * ID_BYTES).tolist()
            if len(ends) == len(group) - 1:  # else some of these are words that the vocabulary cannot express
                starts = [0, *(end + ID_BYTES for end in ends)]
                ids.update(zip(group, map(row.__getitem__, map(slice, starts, [*ends, len(row)])), strict=True))
        others = [word for word in words if word not in ids]
        ids.update(zip(others, encode(self._backend, others), strict=True))
        return list(map(ids.__getitem__, words))

    def _remember(self, new: Mapping[str, bytes]) -> None:
        if len(self) + len(new) > _MAX_WORDS:
            self._first.clear()
            self._spaced.clear()
        for word, ids in islice(new.items(), _MAX_WORDS):
            if len(word) > _MAX_WORD_CHARACTERS:
                continue
            if word.startswith(" "):
                self._spaced[word[1:]] = ids
            else:
                self._first[word] = ids


def _words(text: str) -> list[str]:
    """The parts of a text between spaces that do not follow white space; `" ".join` gives the text."""
    # A space is the only white space that is printable, so here the two are the same.
    simple = text.isprintable() and "  " not in text
    words = text.split(" ") if simple else _SPACE_BEHIND_WORD.split(text)
    return words if len(text) <= _LONG_WORDS * len(words) else [text]


def _has_context_free_words(backend: tokenizers.Tokenizer) -> bool:
    """Whether it is a BPE that always merges alike, and cuts texts by GPT-2's pattern and in no other way."""
    if not isinstance(backend.model, models.BPE) or backend.model.dropout or backend.normalizer is not None:
        return False
    if not all(token.special for token in backend.get_added_tokens_decoder().values()):
        return False  # such a token is found in a text before the text is cut
    if not backend.encode_special_tokens or backend.pre_tokenizer is None:
        return False
    settings = json.loads(backend.pre_tokenizer.__getstate__())
    steps = settings["pretokenizers"] if settings["type"] == "Sequence" else [settings]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if steps[-1]["use_regex"]:
        return len(steps) == 1
    split = {"type": "Split", "pattern": {"Regex": _GPT2_PATTERN}, "behavior": "Isolated", "invert": False}
    return steps[:-1] == [split]
