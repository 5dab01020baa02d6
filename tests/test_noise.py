"""Noise changes the words of a context within its bounds, and nothing where it is switched off."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax.config import Noise
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.pseudo_labels.noise import BLANK, blank_words, drop_words, generator, noisy, noisy_text, shuffle_words

NUMBERED = [str(number) for number in range(1000)]
SEEDS = st.integers(0, 2**32 - 1)
TEXTS = st.text(min_size=1).filter(str.strip)
NOISES = st.builds(
    Noise, word_dropout=st.floats(0, 0.99), word_blank=st.floats(0, 0.99), word_shuffle=st.integers(0, 100)
)


def dialogue(*contents: str, id: str = "a dialogue") -> Dialogue:
    context = [Turn("user", content) for content in contents[:-1]]
    return Dialogue((*context, Turn("assistant", contents[-1])), id=id, metadata={"kept": True})


@pytest.mark.parametrize("nothing", [Noise(), Noise(word_shuffle=1)])
def test_without_noise_it_is_the_very_same_dialogue(nothing):
    original = dialogue("where  do you\nlive?", "in a small town")
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert noisy(original, nothing, rng) is original
    assert rng.bit_generator.state == before


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5), NOISES, SEEDS)
def test_only_words_of_the_context_change_and_no_turn_is_lost(contents, noise, seed):
    original = dialogue(*contents)
    changed = noisy(original, noise, generator(seed, original.id))
    assert (changed.id, changed.metadata, changed.turns[-1]) == (original.id, original.metadata, original.turns[-1])
    assert [turn.role for turn in changed.turns] == [turn.role for turn in original.turns]
    for before, after in zip(original.turns, changed.turns, strict=True):
        assert after.content.strip()
        extra = Counter(after.content.split()) - Counter(before.content.split())
        assert set(extra) <= {BLANK}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(0, 100), SEEDS)
def test_shuffled_words_move_by_less_than_the_distance(number, distance, seed):
    moved = shuffle_words(NUMBERED[:number], distance, np.random.default_rng(seed))
    assert sorted(moved) == sorted(NUMBERED[:number])
    places = np.array([int(word) for word in moved])
    assert np.all(np.abs(places - np.arange(number)) < max(1, distance))


def test_shuffled_words_are_sorted_by_place_and_a_uniform_number():
    """The formula of Lample et al. (2018), as they write it: with alpha below k, sort i + alpha."""
    moved = shuffle_words(NUMBERED[:50], 4, np.random.default_rng(7))
    alpha = 4 * np.random.default_rng(7).random(50)
    assert moved == [str(place) for _, place in sorted((place + alpha[place], place) for place in range(50))]
    assert moved != NUMBERED[:50]


@pytest.mark.parametrize("change", [drop_words, blank_words])
@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_as_many_words_are_dropped_or_blanked_as_the_probability_says(change, probability):
    changed = change(NUMBERED, probability, np.random.default_rng(0))
    kept = [word for word in changed if word != BLANK]
    # Four standard deviations of a binomial distribution.
    assert abs(len(kept) - 1000 * (1 - probability)) <= 4 * np.sqrt(1000 * probability * (1 - probability))
    assert sorted(kept, key=int) == kept
    assert len(changed) == (len(kept) if change is drop_words else 1000)


@given(SEEDS)
def test_a_word_stays_where_all_would_be_dropped(seed):
    assert len(drop_words(["one", "two"], 0.999999, np.random.default_rng(seed))) >= 1


@pytest.mark.parametrize("text", ["hello", "我觉得今天天气很好", " hello\n"])
def test_a_text_without_white_space_between_words_is_left_alone(text):
    everything = Noise(word_dropout=0.9, word_blank=0.9, word_shuffle=9)
    assert noisy_text(text, everything, np.random.default_rng(0)) == text


def test_noise_is_a_function_of_seed_and_dialogue():
    noise = Noise(word_dropout=0.3, word_blank=0.3, word_shuffle=3)

    def context(seed: int, id: str) -> str:
        return noisy(dialogue(" ".join(NUMBERED[:30]), "yes", id=id), noise, generator(seed, id)).turns[0].content

    assert context(0, "a") == context(0, "a")
    assert len({context(0, "a"), context(1, "a"), context(0, "b")}) == 3
