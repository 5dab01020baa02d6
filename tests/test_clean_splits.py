"""Cleaning changes only what it names, and no dialogue is on two sides of a split."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.data import splits
from ssl_jax.data.cleaning.apply import Counts, clean, step_functions
from ssl_jax.data.duplicates import first_equal, halves, text_hash
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError


def raw(*contents, id="", **metadata):
    return Dialogue(tuple(Turn("text", content) for content in contents), id, metadata)


def numbered(count, **metadata):
    return [raw(f"text {i}", id=f"id {i}", **{key: value(i) for key, value in metadata.items()}) for i in range(count)]


def assign(dialogues, split_by, test_size, dev_size, seed):
    """The name of every dialogue's side."""
    positions = np.array([splits.position(dialogue, split_by) for dialogue in dialogues])
    hashes = np.array([halves(text_hash(dialogue)) for dialogue in dialogues], np.uint64).reshape(-1, 2)
    times = [(splits.time(dialogue), dialogue.id) for dialogue in dialogues] if split_by == "time" else ()
    sides = splits.assign(positions, first_equal(hashes), split_by, test_size, dev_size, seed, times)
    assert (sides.dtype, sides.shape) == (np.uint8, (len(dialogues),))
    return [splits.SIDES[side] for side in sides]


def cleaned(dialogue):
    return [turn.content for result, _ in clean([(dialogue, None)], Counts()) for turn in result.turns]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("e\u0301", "é"),
        ("a\x00b\x1b[0m\x85\x7fc", "ab[0mc"),
        ("a\tb\nc", "a\tb\nc"),
        (" \u3000a b \n", "a b"),
        ("The, quick!? 你好。 👩‍👧", "The, quick!? 你好。 👩‍👧"),
    ],
)
def test_cleaning_changes_what_it_names_and_nothing_else(before, after):
    assert cleaned(raw(before)) == [after]


def test_dialogue_with_a_turn_that_cleaning_empties_is_removed_and_counted():
    counts = Counts()
    items = [(raw("a", "\x00 "), 1), (raw("b "), 2), (raw("c"), 3)]
    assert [tag for _, tag in clean(items, counts)] == [2, 3]
    assert dict(counts.removed) == {"strip": 1}
    assert dict(counts.changed) == {"control_characters": 1, "strip": 1}


@given(st.text())
def test_cleaning_twice_is_cleaning_once_and_leaves_text_normal(text):
    once = cleaned(raw(text))
    assert [again for content in once for again in cleaned(raw(content))] == once
    assert all(unicodedata.is_normalized("NFC", content) and "\r" not in content for content in once)


def test_untouched_dialogue_is_the_same_object():
    dialogue = raw("plain", "text")
    assert all(step(dialogue) is dialogue for _, step in step_functions())


def test_text_hash_ignores_roles_and_separates_turns():
    roles = Dialogue((Turn("user", "a"), Turn("assistant", "b")), "x", {"k": 1})
    assert text_hash(roles) == text_hash(raw("a", "b"))
    assert text_hash(raw("a", "b")) != text_hash(raw("ab")) != text_hash(raw("a", "b", ""))


def test_hash_split_keeps_every_side_when_data_is_appended():
    dialogues = numbered(400)
    before, after = (assign(dialogues[:count], "hash", 0.2, 0.1, seed=0) for count in (200, 400))
    assert after[:200] == before


def test_hash_split_has_about_the_sizes_asked_for():
    sides = assign(numbered(2000), "hash", 0.2, 0.1, seed=0)
    assert abs(sides.count("test") / 2000 - 0.2) < 0.04
    assert abs(sides.count("dev") / 2000 - 0.1) < 0.03


def test_fraction_split_is_exact_and_follows_the_seed():
    first, again, other = (assign(numbered(50), "fraction", 0.2, 0.1, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert (first.count("test"), first.count("dev")) == (10, 5)


@pytest.mark.parametrize("split_by", ["hash", "fraction"])
def test_equal_text_is_never_on_two_sides(split_by):
    dialogues = [raw(f"text {i % 20}", id=str(i)) for i in range(100)]
    sides = assign(dialogues, split_by, 0.3, 0.2, seed=3)
    assert len(set(sides)) > 1
    assert all(sides[i] == sides[i % 20] for i in range(100))


@pytest.mark.parametrize("split_by", ["hash", "fraction"])
def test_what_is_alike_is_never_on_two_sides(split_by):
    """Dialogues need not be equal; the first one of a group decides."""
    dialogues = numbered(100)
    positions = np.array([splits.position(dialogue, split_by) for dialogue in dialogues])
    sides = splits.assign(positions, np.arange(100) % 20, split_by, 0.3, 0.2, seed=3)
    assert len(set(sides.tolist())) == 3
    assert np.array_equal(sides, np.tile(sides[:20], 5))


def test_positions_stay_what_they_were():
    """Others would move dialogues from train to test when data are prepared again."""
    dialogues = [raw("a", id="one"), raw("b", id="two"), raw("c", id="three", group=1)]
    positions = [splits.position(dialogue, "hash") for dialogue in dialogues]
    assert positions == pytest.approx([0.463176946437, 0.249096691249, 0.544366698888], abs=1e-12)
    assert splits.position(dialogues[2], "group") == pytest.approx(0.420024064369, abs=1e-12)


def test_group_split_keeps_groups_whole():
    sides = assign(numbered(300, group=lambda i: i % 30), "group", 0.3, 0.1, seed=0)
    assert len(set(sides)) == 3
    assert all(sides[i] == sides[i % 30] for i in range(300))


def test_time_split_holds_out_the_newest():
    sides = assign(numbered(10, time=lambda i: (i * 7) % 10), "time", 0.2, 0.1, seed=0)
    by_time = [side for _, side in sorted(zip([(i * 7) % 10 for i in range(10)], sides, strict=True))]
    assert by_time == ["train"] * 7 + ["dev"] + ["test"] * 2


@pytest.mark.parametrize("split_by", ["time", "group"])
def test_missing_metadata_names_the_field_and_the_dialogue(split_by):
    with pytest.raises(UserError, match=f"data.split_by {split_by}: dialogue id 0 has no field '{split_by}'"):
        assign(numbered(2), split_by, 0.2, 0.1, seed=0)


def test_times_that_cannot_be_compared_are_an_error():
    with pytest.raises(UserError, match="must be a number in every row, or text in every row"):
        assign([raw("a", time=1), raw("b", time="2020")], "time", 0.2, 0.1, seed=0)


@given(
    st.integers(0, 12),
    st.sampled_from(["hash", "fraction", "time", "group"]),
    st.floats(0.01, 0.6),
    st.floats(0, 0.39),
)
def test_something_is_always_left_to_train_on(count, split_by, test_size, dev_size):
    dialogues = numbered(count, time=lambda i: i, group=lambda i: i)
    sides = assign(dialogues, split_by, test_size, dev_size, seed=0)
    assert len(sides) == count
    assert count == 0 or "train" in sides
