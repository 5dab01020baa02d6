"""Near-duplicates are found in every language, kept once, and never on two sides of a split."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.config import Config
from ssl_jax.data import minhash
from ssl_jax.data.cleaning.apply import Counts
from ssl_jax.data.duplicates import drop_near_duplicates, leaks, near_duplicates, refuse_leaks
from ssl_jax.data.pipeline import prepare
from ssl_jax.data.splits import assign
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

ENGLISH = "I would like to book a table for two people tomorrow evening at eight, please."
CHINESE = "我想预订明天晚上八点两个人的座位\uff0c最好靠窗\uff0c谢谢您的帮助\uff0c我们会准时到达餐厅门口。"
OTHER = "The weather in the mountains changes quickly, so take a warm jacket with you."


def raw(*contents, id=""):
    return Dialogue(tuple(Turn("text", content) for content in contents), id)


def numbered(texts):
    return [raw(text, id=f"id {i}") for i, text in enumerate(texts)]


def random_texts(count, seed=0):
    """Texts of random words: none resembles another."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(3, 8))) for _ in range(2000)]
    return [" ".join(generator.choices(words, k=20)) for _ in range(count)]


@pytest.mark.parametrize("unit", ["characters", "words"])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_texts_that_differ_a_little_are_one_group_and_others_are_not(text, unit):
    shouted = text.replace(",", " !!! ").replace("\uff0c", "\uff01\uff01").upper() + "\n"
    changed = text.replace("two", "three").replace("两", "三")
    groups = near_duplicates(numbered([OTHER, text, shouted, changed]), 0.6, unit=unit, size=2)
    assert groups == [0, 1, 1, 1]


def test_the_bounds_of_turns_and_roles_do_not_count():
    roles = Dialogue((Turn("user", ENGLISH[:30]), Turn("assistant", ENGLISH[30:])), "x")
    assert near_duplicates([raw(ENGLISH), roles], 0.8) == [0, 0]


def test_texts_too_short_for_a_shingle_and_of_punctuation_alone_are_compared_whole():
    assert near_duplicates(numbered(["ok", "no", "OK!", "...", "???", "...", "", "😀"]), 0.8) == [
        0,
        1,
        0,
        3,
        4,
        3,
        6,
        7,
    ]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_groups_are_those_of_comparing_every_pair(threshold):
    generator = random.Random(1)
    texts = random_texts(60)
    for _ in range(90):
        words = generator.choice(texts).split(" ")
        for _ in range(generator.randint(1, 4)):
            words[generator.randrange(len(words))] = "changed"
        texts.append(" ".join(words))

    shingles = [{text[i : i + 4] for i in range(len(text) - 3)} for text in texts]
    group = list(range(len(texts)))
    for i, j in itertools.combinations(range(len(texts)), 2):
        if len(shingles[i] & shingles[j]) / len(shingles[i] | shingles[j]) >= threshold:
            low, high = sorted((group[i], group[j]))
            group = [low if member == high else member for member in group]
    assert near_duplicates(numbered(texts), threshold) == group
    assert len(set(group)) < len(texts) or threshold == 1


def test_a_template_filled_in_many_times_is_one_group():
    texts = [
        f"Your order number {i:05d} has been shipped and will arrive within three working days." for i in range(400)
    ]
    assert set(near_duplicates(numbered(texts), 0.7)) == {0}


@given(st.lists(st.text(alphabet="ab 你好", max_size=12), max_size=12), st.floats(0.05, 1))
def test_a_group_is_named_by_its_first_member_and_equal_texts_share_it(texts, threshold):
    groups = near_duplicates(numbered(texts), threshold)
    assert all(group <= index and groups[group] == group for index, group in enumerate(groups))
    assert all(groups[i] == groups[texts.index(text)] for i, text in enumerate(texts))


def test_signatures_estimate_the_jaccard_similarity_without_bias():
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(words[:300]), " ".join(words[100:])]
    sketches = minhash.sketch(texts, "words", 1)
    assert (sketches.signatures[0] == sketches.signatures[1]).mean() == pytest.approx(0.5, abs=0.13)


def test_signatures_do_not_depend_on_the_other_texts():
    texts = random_texts(2000)
    together, alone = minhash.sketch(texts, "characters", 4), minhash.sketch(texts[-1:], "characters", 4)
    assert (together.signatures[-1] == alone.signatures[0]).all()


def test_leaks_name_both_sides_and_how_alike_they_are():
    train = numbered([OTHER, ENGLISH.replace("two", "three"), CHINESE])
    held_out = [raw(ENGLISH, id="test 1"), raw(CHINESE, id="test 2")]
    assert [str(leak) for leak in leaks(train, held_out)] == ["id 2 (train) and test 2 (held out) are 100% alike"]
    near = leaks(train, held_out, 0.7)
    assert [(leak.train.id, leak.held_out.id) for leak in near] == [("id 1", "test 1"), ("id 2", "test 2")]
    assert 0.7 <= near[0].similarity < 1 == near[1].similarity
    assert leaks(held_out, train[:1], 0.7) == leaks([], held_out, 0.7) == leaks(train, [], 0.7) == []


def test_a_leak_stops_the_run_and_names_the_dialogues():
    refuse_leaks(numbered([OTHER]), [raw(ENGLISH)], 0.5)
    with pytest.raises(
        UserError, match=r"1 dialogues are on both sides of the split: id 1 \(train\) and x \(held out\)"
    ):
        refuse_leaks(numbered([OTHER, ENGLISH]), [raw(ENGLISH, id="x")])


def test_near_duplicates_of_kept_and_of_held_out_dialogues_are_dropped_and_told_apart():
    counts = Counts(max_examples=1)
    items = [
        (dialogue, dialogue.id) for dialogue in numbered([OTHER, OTHER + " Ok?", ENGLISH + " Ok?", CHINESE + "好"])
    ]
    kept = drop_near_duplicates(items, [raw(ENGLISH)], [raw(CHINESE)], 0.8, counts)
    assert [tag for _, tag in kept] == ["id 0"]
    assert dict(counts.removed) == {"held_out_near_duplicates": 1, "near_duplicates": 2}
    assert counts.examples["held_out_near_duplicates"][0].before is items[2][0]


@pytest.mark.parametrize("split_by", ["hash", "fraction"])
def test_near_duplicates_are_never_on_two_sides(split_by):
    texts = random_texts(40)
    dialogues = numbered(texts + [f"{text} and more" for text in texts] + [text.upper() for text in texts])
    sides = assign(dialogues, split_by, 0.3, 0.2, 0, 0.7)
    assert len(set(sides)) == 3
    assert sides[:40] == sides[40:80] == sides[80:]
    apart = assign(dialogues, split_by, 0.3, 0.2, 0)
    assert apart[:40] != apart[40:80]


def write(path, texts):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": t}]} for t in texts]
    path.write_text("".join(json.dumps({"id": f"{i}", **row}) + "\n" for i, row in enumerate(rows)))
    return {"path": str(path)}


def test_prepared_data_has_no_near_duplicates_where_they_count_as_one(tmp_path):
    texts = random_texts(60)
    unlabeled = tmp_path / "raw.txt"
    unlabeled.write_text("\n\n".join([f"hi {text} again" for text in texts[:30]] + random_texts(5, seed=9)))
    data = {
        "labeled": [write(tmp_path / "a.jsonl", texts + [f"{text} too" for text in texts])],
        "unlabeled": [{"path": str(unlabeled), "format": "text"}],
        "prepared_dir": str(tmp_path / "prepared"),
        "test_size": 0.3,
        "dev_size": 0.2,
    }
    values = {"tokenizer": {"vocab_size": 300}, "train": {"steps": 1}}
    off = prepare(Config.model_validate({**values, "data": data}), say=lambda _: None)
    on = prepare(
        Config.model_validate({**values, "data": {**data, "near_duplicate_threshold": 0.7}}), say=lambda _: None
    )
    assert off.summary["content_hash"] != on.summary["content_hash"]
    assert "near_duplicates" not in off.summary["removed"]
    sides = {name: [on.dialogue(name, i) for i in range(len(on.encoded(name)))] for name in on.splits}
    held_out = sides["labeled_test"] + sides["labeled_dev"]
    for name in ("labeled_train", "raw_train"):
        assert leaks(sides[name], held_out, 0.7) == []
        assert near_duplicates(sides[name], 0.7) == list(range(len(sides[name])))
    assert len(sides["raw_train"]) == 5
