"""Ids from the cache of words are the library's own, for every text, and only where that can be known."""

# ruff: noqa: RUF001 - typographic characters that look like others are meant.

import random
import sys
import threading
import time
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ssl_jax.data import word_cache
from ssl_jax.data.word_cache import WordCache, make_encode

TEXTS = [
    "hello there, how are you? I'm fine, it's 10 o'clock  and we'll see\n\nthe end",
    "你好，世界。 今天天气很好\t!!! ... ünïcödé 👋🏽 x² 2½",
] * 5
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


WHITE_SPACE = [character for character in map(chr, range(0x3001)) if character.isspace()]
FRAGMENTS = [
    *[" ", "  ", "   ", "\n", "\r\n", "\t", *WHITE_SPACE, *map(chr, range(32)), "\x7f"],
    *["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "'S", "’s"],
    *["<|endoftext|>", "<|user|>", "<|", "|>"],
    *["hello", "a", "you?", "42", "2½", "²", "x̂", "你好", "，", "👩‍👧", "\u200b", "\ufeff", "ـ", "\u0378"],
]


def make_backend(size=1500, ignore_merges=False, alphabet=True):
    """Its merges were learned from uncut texts, so that a text that is cut elsewhere gets other ids."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=letters, show_progress=False, special_tokens=["<|endoftext|>", "<|user|>"]
    )
    choose = random.Random(0).choices
    backend.train_from_iterator(("".join(choose(FRAGMENTS, k=8)) for _ in range(2000)), trainer)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.encode_special_tokens = True
    return backend


def library(backend, texts):
    return [np.array(backend.encode(text, add_special_tokens=False).ids, np.int32).tobytes() for text in texts]


def is_cached(backend):
    return isinstance(getattr(make_encode(backend), "__self__", None), WordCache)


@pytest.fixture(scope="module")
def backend():
    return make_backend()


fragments = st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from([" ", "\n", "a"]), st.text(max_size=4))
texts = st.lists(fragments, max_size=12).map("".join)


@given(st.lists(texts, min_size=1, max_size=4))
@example(["a  b", "a   b", "a \n b", "a\n \n b", " \n a", "a\n", "a  ", "  ", " ", ""])
@example(["'s", " 's", "it's  's", "\n's", "a\n 's"])
@example(["a\x1c b", "a \x1c b\x1f", "\x85 a \xa0 b", "\u180e a \u200b b"])
@example(["word", " word", "\nword", "word\n", " word ", "word word"])
def test_cached_ids_are_the_ids_of_the_whole_text(backend, texts):
    cache, expected = WordCache(backend), library(backend, texts)
    assert cache.encode(texts) == expected
    assert cache.encode(texts) == expected  # with every word known


def one_unknown_token():
    """A vocabulary of few letters, in which a line end is as unknown as everything else."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5}
    backend = changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.model = models.BPE(vocabulary, [("a", "b"), ("Ġ", "a")], unk_token="<unk>")
    return backend


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: make_backend(ignore_merges=True), id="whole words are not merged"),
        pytest.param(lambda: make_backend(90, alphabet=False), id="bytes without a token"),
        pytest.param(one_unknown_token, id="unknown token"),
    ],
)
def test_cached_ids_are_the_ids_of_the_whole_text_for_other_vocabularies(make):
    backend = make()
    assert is_cached(backend)

    @given(st.lists(texts, min_size=1, max_size=4))
    @example(["ab a c ab", "d a"])
    def check(texts):
        assert WordCache(backend).encode(texts) == library(backend, texts)

    check()


def test_what_python_and_the_library_call_white_space_goes_together():
    """The cache cuts texts by Python's white space, of which the library's has to be a part in every version."""
    characters = "".join(map(chr, (*range(0xD800), *range(0xE000, sys.maxunicode + 1))))
    stripped = normalizers.Replace(tokenizers.Regex(r"\s"), "").normalize_str(characters)
    white = set(characters).difference(stripped)
    assert white <= set(filter(str.isspace, characters))
    assert {character for character in characters if character.isspace() and character.isprintable()} == {" "}
    assert {unicodedata.category(character) for character in white} == {"Zs", "Zl", "Zp", "Cc"}


def split_backend(pattern=GPT2_PATTERN, **options):
    backend = make_backend()
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), options.pop("behavior", "isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False, **options)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return backend


def test_gpt2_pattern_written_out_is_recognized():
    assert is_cached(make_backend())
    backend = split_backend()
    assert is_cached(backend)
    assert make_encode(backend)(TEXTS) == library(backend, TEXTS)


def with_token(**options):
    backend = make_backend()
    backend.add_tokens([tokenizers.AddedToken("you? I", normalized=False, **options)])
    return backend


def changed(**attributes):
    backend = make_backend()
    for name, value in attributes.items():
        setattr(backend, name, value)
    return backend


def with_dropout():
    backend = make_backend()
    backend.model.dropout = 0.5
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(lambda: changed(normalizer=normalizers.NFC()), id="normalizer"),
        pytest.param(lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), id="prefix space"),
        pytest.param(lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()), id="other pre-tokenizer"),
        pytest.param(
            lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
            id="whole text",
        ),
        pytest.param(lambda: split_backend(r"\p{L}+ ?|\s+"), id="other pattern"),
        pytest.param(lambda: split_backend(behavior="merged_with_next"), id="other behavior"),
        pytest.param(lambda: changed(encode_special_tokens=False), id="control tokens in text"),
        pytest.param(with_token, id="added token that is no control token"),
        pytest.param(with_dropout, id="dropout"),
        pytest.param(lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), id="no BPE"),
    ],
)
def test_any_other_tokenizer_is_left_to_the_library(backend):
    assert not is_cached(backend())


def test_without_a_cache_the_ids_are_the_librarys():
    backend = split_backend(r"\p{L}+ ?|\s+")
    assert make_encode(backend)(TEXTS) == library(backend, TEXTS)


def test_cache_stays_within_its_bound_and_goes_on_being_right(backend, monkeypatch):
    monkeypatch.setattr(word_cache, "_MAX_WORDS", 50)
    cache = WordCache(backend)
    for start in range(0, 300, 20):
        texts = [f"word{number} and{number} more" for number in range(start, start + 20)]
        assert cache.encode(texts) == library(backend, texts)
        assert 0 < len(cache) <= 50


def test_long_words_are_not_kept(backend):
    cache = WordCache(backend)
    texts = ["x" * 40 + " a b c d " + "y" * 40, "z" * 100]
    assert cache.encode(texts) == library(backend, texts)
    assert len(cache) <= 5


@pytest.mark.parametrize("unit", ["a", "ab ", " ", "\n", "a\n ", "你好", "' "])
def test_time_for_a_huge_text_grows_as_its_length(backend, unit):
    cache = WordCache(backend)

    def seconds(size):
        text = unit * (size // len(unit))
        start = time.process_time()
        (ids,) = cache.encode([text])
        assert len(ids) >= 4
        return time.process_time() - start

    seconds(50_000)
    assert seconds(800_000) < 16 * 6 * max(min(seconds(50_000) for _ in range(3)), 0.002)


def test_threads_share_a_cache(backend, monkeypatch):
    monkeypatch.setattr(word_cache, "_MAX_WORDS", 100)
    cache = WordCache(backend)
    texts = [f"some{number % 37} words{number} of it" for number in range(400)]
    expected = library(backend, texts)
    results = []

    def work():
        results.append([cache.encode([text])[0] for text in texts] == expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
