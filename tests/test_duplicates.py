"""Near-duplicates are found in every language, kept once, and never on two sides of a split."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.config import Config
from ssl_jax.data import duplicates, minhash
from ssl_jax.data.duplicates import first_equal, near_leaks, refuse_leaks
from ssl_jax.data.minhash import Sketches
from ssl_jax.data.pipeline import prepare
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

ENGLISH = "I would like to book a table for two people tomorrow evening at eight, please."
CHINESE = "我想预订明天晚上八点两个人的座位\uff0c最好靠窗\uff0c谢谢您的帮助\uff0c我们会准时到达餐厅门口。"
OTHER = "The weather in the mountains changes quickly, so take a warm jacket with you."


def raw(*contents, id=""):
    return Dialogue(tuple(Turn("text", content) for content in contents), id)


def numbered(texts):
    return [raw(text, id=f"id {i}") for i, text in enumerate(texts)]


def near_duplicates(dialogues, threshold, **options):
    """The groups of all dialogues."""
    return duplicates.near_duplicates(Sketches(dialogues, **options), np.arange(len(dialogues)), threshold).tolist()


def leaks(train, held_out, threshold):
    """Numbers of the dialogues of `train` that resemble one of `held_out`."""
    sketches = Sketches([*train, *held_out])
    numbers = np.arange(len(train) + len(held_out))
    found = near_leaks(sketches, numbers[: len(train)], numbers[len(train) :], threshold)
    assert (found.dtype, found.shape) == (np.bool_, (len(train),))
    return np.flatnonzero(found).tolist()


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


@given(st.lists(st.integers(0, 5), max_size=12), st.floats(0.05, 1))
def test_a_subset_is_grouped_as_if_there_were_nothing_else(numbers, threshold):
    """Dialogues may be named in any order and several times."""
    groups = duplicates.near_duplicates(FEW_SKETCHES, np.array(numbers, np.int64), threshold).tolist()
    assert groups == near_duplicates([FEW[number] for number in numbers], threshold)


FEW = numbered([ENGLISH, OTHER, ENGLISH.replace("two", "three"), "ok", ENGLISH.upper(), OTHER + " Ok?"])
FEW_SKETCHES = Sketches(FEW)


class OneByOne(list):
    """Dialogues that are read anew each time; counts how often."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def similar_texts(count):
    return [f"Your order number {i:04d} has been shipped and will arrive within three days." for i in range(count)]


def test_what_is_compared_is_read_again_and_remembered_only_as_far_as_there_is_room(monkeypatch):
    dialogues = OneByOne(numbered(similar_texts(30)))
    expected = near_duplicates(dialogues, 0.95)
    assert len(set(expected)) > 1 and dialogues.reads == 30
    monkeypatch.setattr(minhash, "_SHINGLES_REMEMBERED", 200)
    sketches = Sketches(dialogues)
    assert duplicates.near_duplicates(sketches, np.arange(30), 0.95).tolist() == expected
    assert dialogues.reads > 60
    assert sketches._recent_size == sum(map(len, sketches._recent.values())) <= 200


def test_signatures_estimate_the_jaccard_similarity_without_bias():
    words = [f"w{i}" for i in range(400)]
    texts = numbered([" ".join(words[:300]), " ".join(words[100:])])
    signatures = Sketches(texts, unit="words", size=1).signatures
    assert (signatures[0] == signatures[1]).mean() == pytest.approx(0.5, abs=0.13)


def test_a_signature_is_the_least_value_of_each_function_over_the_shingles():
    """The reference takes one shingle after the other, in Python's unlimited integers."""
    text = "a small example"
    random = np.random.default_rng(0x5EED)
    factors = (random.integers(0, 2**64, 128, np.uint64) | np.uint64(1)).tolist()
    offsets = random.integers(0, 2**64, 128, np.uint64).tolist()
    hashes = []
    for start in range(len(text) - 3):
        value = 0
        for character in text[start : start + 4]:
            value = (value ^ ord(character)) * 0x9E3779B97F4A7C15 % 2**64
            value ^= value >> 29
        hashes.append(value)
    expected = [
        min((value * factor + offset) % 2**64 >> 32 for value in hashes)
        for factor, offset in zip(factors, offsets, strict=True)
    ]
    signatures = Sketches(numbered(["ok", text, "", OTHER])).signatures
    assert (signatures.dtype, signatures.shape) == (np.uint32, (4, 128))
    assert signatures[1].tolist() == expected


def test_signatures_do_not_depend_on_the_other_texts():
    texts = numbered(random_texts(2000))
    together, alone = Sketches(texts), Sketches(texts[-1:])
    assert (together.signatures[-1] == alone.signatures[0]).all()
    assert (together.hashes[-1] == alone.hashes[0]).all()


def test_the_temporary_file_is_in_the_folder_asked_for_and_leaves_nothing_behind(tmp_path):
    assert len(Sketches(numbered(["a", "b"]), tmp_path).signatures) == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Sketches(numbered(["a"]), tmp_path / "nowhere")


def test_what_resembles_a_held_out_dialogue_leaks():
    train = numbered([OTHER, ENGLISH.replace("two", "three"), CHINESE, CHINESE])
    held_out = [raw(ENGLISH), raw(CHINESE)]
    assert leaks(train, held_out, 0.7) == [1, 2, 3]
    assert leaks(train, held_out, 0.99) == [2, 3]
    assert leaks(held_out, train[:1], 0.7) == leaks([], held_out, 0.7) == leaks(train, [], 0.7) == []


def test_leaks_are_those_of_comparing_every_pair():
    generator = random.Random(5)
    texts = random_texts(40)
    changed = [text.split(" ") for text in texts]
    for words in changed:
        for _ in range(generator.randint(1, 5)):
            words[generator.randrange(len(words))] = "changed"
    train, held_out = numbered([" ".join(words) for words in changed]), numbered(texts[:20])
    shingles = [{text[i : i + 4] for i in range(len(text) - 3)} for text in texts]
    others = [{text[i : i + 4] for i in range(len(text) - 3)} for text in map(" ".join, changed)]
    expected = [
        number
        for number, mine in enumerate(others)
        if any(len(mine & theirs) / len(mine | theirs) >= 0.7 for theirs in shingles[:20])
    ]
    assert leaks(train, held_out, 0.7) == expected
    assert 0 < len(expected) < 20


HASHES = st.lists(st.tuples(st.sampled_from([0, 1, 2**63, 2**64 - 1]), st.integers(0, 2)), max_size=20)


@given(HASHES)
def test_first_equal_is_the_number_of_the_first_equal_hash(hashes):
    first: dict[tuple[int, int], int] = {}
    expected = [first.setdefault(pair, number) for number, pair in enumerate(hashes)]
    found = first_equal(np.array(hashes, np.uint64).reshape(-1, 2))
    assert found.tolist() == expected and found.dtype == np.int64


@given(HASHES, HASHES)
def test_a_text_on_both_sides_stops_the_run_and_the_first_three_are_named(train, held_out):
    found = [f"id {number}" for number, pair in enumerate(train) if pair in held_out]
    arrays = [np.array(hashes, np.uint64).reshape(-1, 2) for hashes in (train, held_out)]
    if not found:
        refuse_leaks(*arrays, train_id=lambda number: f"id {number}")
        return
    with pytest.raises(UserError) as raised:
        refuse_leaks(*arrays, train_id=lambda number: f"id {number}")
    first_line, fix = str(raised.value).splitlines()
    assert first_line == f"data: {len(found)} dialogues to learn from are also held out: {', '.join(found[:3])}"
    assert "remove them from the sources" in fix


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
