"""Words, tags, keywords and entities of English and Chinese, and the filters, prefixes and report made of them."""

# ruff: noqa: RUF001 - Chinese punctuation is meant.

import dataclasses
import json
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssl_jax import command_line
from ssl_jax.config import Config, Data
from ssl_jax.config.annotation import Condition
from ssl_jax.data import annotation
from ssl_jax.data.annotation import (
    annotate,
    keeps,
    keyword_prefix,
    language_of,
    needed_annotations,
    select,
    steer,
    summarize,
)
from ssl_jax.data.annotation.tags import FROM_C5, from_jieba
from ssl_jax.data.annotation.words import segment, tag
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

ALL = ("words", "tags", "keywords", "entities")


def dialogue(*contents: str, **metadata: object) -> Dialogue:
    """User and assistant in turn."""
    turns = tuple(Turn("assistant" if place % 2 else "user", content) for place, content in enumerate(contents))
    return Dialogue(turns, id="d1", metadata=metadata)


ENGLISH = dialogue(
    "Hi! I can't decide: should I visit Kyoto or Osaka next summer?",
    "I'd visit Kyoto. The old temples and the stone gardens are beautiful, and the temples open at 6:30 am.",
    "Thanks :) The train costs $35.50, right?",
    "Yes. See https://example.com/trains?from=osaka, or mail rail@example.co.jp by May 5th.",
)
CHINESE = dialogue(
    "你好！我明年想去北京大学学习计算机科学，你觉得怎么样？",
    "计算机科学很有意思。北京大学的计算机专业很好，学费大约5000元。",
    "谢谢！我和李小龙下午3点去看看。",
    "好的，请看https://example.cn/cs，或者写信给info@example.cn。",
)


def words_of(text: str, language: annotation.Language) -> list[str]:
    return [token.text for token in segment(text, language)]


def tags_of(text: str, language: annotation.Language) -> list[tuple[str, str]]:
    return [(item.token.text, item.tag) for item in tag(segment(text, language), language)]


def entities_of(text: str, language: annotation.Language) -> list[tuple[str, str]]:
    record = annotate(dialogue(text), ["entities"], language).metadata["annotation"]
    return [(entity["type"], entity["text"]) for entity in record["entities"]]


def keywords_of(dialogue: Dialogue) -> list[str]:
    record = annotate(dialogue, ["keywords"], "auto").metadata["annotation"]
    return [keyword["phrase"] for keyword in record["keywords"]]


# Text as people write it, and what the rules look for, in any order.
SNIPPETS = """I can't it's 'em e.g. U.S. don’t 3,000.50 5pm $30 :) 👍🏽 👩‍👩‍👧 https://a.b/c?d= x@y.org May 5 ... !!!
    我 北京大学 三点 ５０％ 。 ！ “ привет かな 한국 é e\u0301 \u200b _ http:// www. @"""
snippets = st.sampled_from([*SNIPPETS.split(), " ", "\n", "\t", "\u3000"])
texts = st.lists(st.one_of(snippets, st.text(max_size=8)), max_size=12).map("".join)
languages = st.sampled_from(["en", "zh", "other"])


@given(text=texts, language=languages)
@example(text="你好　世界 \x1c\x85hello", language="zh")
@example(text="don't" * 3, language="en")
@settings(deadline=None)
def test_words_are_the_text_without_its_white_space_and_know_their_places(text, language):
    tokens = segment(text, language)
    assert "".join(token.text for token in tokens) == "".join(text.split())
    assert all(token.text == text[token.start : token.start + len(token.text)] != "" for token in tokens)


@given(contents=st.lists(texts, min_size=1, max_size=4), language=languages)
@settings(deadline=None)
def test_every_word_has_a_tag_and_every_entity_its_text_and_annotating_again_changes_nothing(contents, language):
    before = dialogue(*contents, rating=3)
    after = annotate(before, ALL, language)
    assert after.turns == before.turns and after.metadata["rating"] == 3
    record = json.loads(json.dumps(after.metadata["annotation"]))
    for turn, found in zip(before.turns, record["turns"], strict=True):
        assert len(found["words"]) == len(found["tags"]) == len(found["raw_tags"])
        assert found["words"] == words_of(turn.content, language)
    ends: dict[int, int] = {}
    for entity in record["entities"]:
        assert before.turns[entity["turn"]].content[entity["start"] : entity["end"]] == entity["text"] != ""
        assert entity["start"] >= ends.get(entity["turn"], 0), "entities overlap"
        ends[entity["turn"]] = entity["end"]
    assert annotate(after, ALL, language) == after


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    "unit", ["1.", "a", "haha1", "http://", "www.", "a@", "三", "1,111", "-a", "'", ":(", "May ", "xX", "👍\u200d"]
)
def test_time_is_linear_in_the_text_whatever_it_repeats(unit, language):
    hostile = dialogue(unit * (20_000 // len(unit)))
    annotate(dialogue("warm up 一"), ALL, language)
    start = time.process_time()
    annotate(hostile, ALL, language)
    assert time.process_time() - start < 5


def test_english_words_follow_the_documented_rule():
    assert words_of("I can't believe it's 3,000.50 already... right?!", "en") == [
        "I", "ca", "n't", "believe", "it", "'s", "3,000.50", "already", "...", "right", "?", "!",
    ]  # fmt: skip
    assert words_of("The U.S. state-of-the-art o’clock rock_n_roll", "en") == [
        "The", "U.S.", "state-of-the-art", "o’clock", "rock", "_", "n", "_", "roll",
    ]  # fmt: skip
    assert words_of("See https://a.org/b?c=1, ok :) 👍🏽👩‍👩‍👧", "en") == [
        "See", "https://a.org/b?c=1", ",", "ok", ":)", "👍🏽", "👩‍👩‍👧",
    ]  # fmt: skip


def test_english_tags_are_those_of_a_grammar():
    assert tags_of("She doesn’t like the old dog. John quickly gave me two books!", "en") == [
        ("She", "PRON"), ("does", "VERB"), ("n’t", "PART"), ("like", "VERB"), ("the", "DET"), ("old", "ADJ"),
        ("dog", "NOUN"), (".", "PUNCT"), ("John", "PROPN"), ("quickly", "ADV"), ("gave", "VERB"), ("me", "PRON"),
        ("two", "NUM"), ("books", "NOUN"), ("!", "PUNCT"),
    ]  # fmt: skip


def test_chinese_words_and_tags_are_those_of_jiebas_dictionary():
    assert tags_of("我昨天在北京大学见到了李小龙，价格是3.5元。", "zh") == [
        ("我", "PRON"), ("昨天", "NOUN"), ("在", "ADP"), ("北京大学", "PROPN"), ("见到", "VERB"), ("了", "PART"),
        ("李小龙", "PROPN"), ("，", "PUNCT"), ("价格", "NOUN"), ("是", "VERB"), ("3.5", "NUM"), ("元", "NUM"),
        ("。", "PUNCT"),
    ]  # fmt: skip


@pytest.mark.parametrize("language", ["en", "zh", "other"])
def test_marks_numbers_signs_and_addresses_have_the_same_tag_in_every_language(language):
    text = "?! 3.5 € 👍🏽 :) https://a.org x@y.org"
    assert [universal for _, universal in tags_of(text, language)] == [
        "PUNCT", "PUNCT", "NUM", "SYM", "SYM", "SYM", "X", "X",
    ]  # fmt: skip


def test_the_raw_tags_are_the_taggers_own():
    for turns, expected in ((dialogue("Two dogs"), ["CRD", "NN2"]), (dialogue("吃苹果"), ["v", "n"])):
        record = annotate(turns, ["tags"], "auto").metadata["annotation"]
        assert record["turns"][0]["raw_tags"] == expected


def test_the_table_knows_every_tag_of_hantas_model():
    from HanTa.HanoverTagger import HanoverTagger

    model = HanoverTagger("morphmodel_en.pgz")
    assert {model.int2tag[-tag] for tag in model.int2tag if tag < 0 and -tag in model.int2tag} <= set(FROM_C5)


def test_a_jieba_tag_that_is_not_in_the_table_has_its_first_letters():
    assert [from_jieba(raw) for raw in ("uj", "vg", "vn", "nrt", "?")] == ["PART", "VERB", "NOUN", "PROPN", "X"]


@pytest.mark.parametrize(
    ("content", "metadata", "expected"),
    [
        ("How are you?", {}, "en"),
        ("你好吗？", {}, "zh"),
        ("我喜欢Python programming", {}, "zh"),
        ("How do you say 你好 in Chinese?", {}, "en"),
        ("Привет, как дела?", {}, "other"),
        ("今日は良い天気ですね", {}, "other"),
        ("한국어", {}, "other"),
        ("👍 123", {}, "other"),
        ("Wie geht es dir?", {"language": "german"}, "other"),
        ("ok", {"language": "zh-TW"}, "zh"),
        ("你好", {"language": "English"}, "en"),
    ],
)
def test_the_source_or_the_script_tells_the_language(content, metadata, expected):
    assert language_of(dialogue(content, **metadata)) == expected


def test_keywords_of_english_are_noun_phrases_weighted_by_degree():
    text = dialogue("Deep space telescopes! I love space. Great people, lol, hahaha. Is that telescope new?")
    record = annotate(text, ["keywords"], "en").metadata["annotation"]
    # Degrees: space is in candidates of 3 and 1 words, deep and telescopes in one of 3.
    assert record["keywords"] == [
        {"phrase": "deep space telescopes", "score": 10.0},
        {"phrase": "space", "score": 4.0},
        {"phrase": "telescope", "score": 1.0},
    ]


def test_keywords_of_chinese_are_ranked_by_the_company_they_keep():
    text = dialogue("我喜欢音乐和电影。", "谢谢！你知道音乐和足球吗？")
    record = annotate(text, ["keywords"], "auto").metadata["annotation"]
    # PageRank of a star: center = 0.15 + 0.85 · 2 · leaf, leaf = 0.15 + 0.85 · center / 2.
    leaf = round((0.15 + 0.425 * 0.15) / (0.15 + 1.7 * 0.15), 4)
    assert record["keywords"] == [
        {"phrase": "音乐", "score": 1.0},
        {"phrase": "电影", "score": leaf},
        {"phrase": "足球", "score": leaf},
    ]


def test_keywords_of_a_chinese_dialogue_are_what_it_is_about():
    phrases = keywords_of(CHINESE)
    assert {"北京大学", "计算机科学", "学费"} <= set(phrases)
    assert not {"谢谢", "觉得", "你好", "我"}.intersection(phrases)


def test_keywords_leave_out_the_system_turn():
    system = dataclasses.replace(ENGLISH, turns=(Turn("system", "You sell bicycles."), *ENGLISH.turns))
    assert keywords_of(system) == keywords_of(ENGLISH)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Barack Obama was born on August 4th, 1961 in Honolulu.",
            [("name", "Barack Obama"), ("date", "August 4th, 1961"), ("name", "Honolulu")],
        ),
        (
            "Monday, 12 May 2025 at 5 pm or 17:30: $1,200.50, 30 euros (20%).",
            [("date", "Monday, 12 May 2025"), ("time", "5 pm"), ("time", "17:30"), ("amount", "$1,200.50"),
             ("amount", "30 euros"), ("amount", "20%")],
        ),
        ("I may leave next Friday at noon.", [("date", "next Friday"), ("time", "noon")]),
        ("Since 2019, in New York City.", [("date", "2019"), ("name", "New York City")]),
        ("See (https://a.org/b_(c)), x.y@z.org.", [("url", "https://a.org/b_(c"), ("email", "x.y@z.org")]),
        ("Version 10.5.3.2 of 12:61, hahaha, Yesss", []),
    ],
)  # fmt: skip
def test_entities_of_english(text, expected):
    assert entities_of(text, "en") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "李小龙下午三点半在北京大学，门票3.5元。",
            [("person", "李小龙"), ("time", "下午三点半"), ("organization", "北京大学"), ("amount", "3.5元")],
        ),
        (
            "二〇二四年五月一日去上海，花了三百块钱，百分之五十。",
            [("date", "二〇二四年五月一日"), ("place", "上海"), ("amount", "三百块钱"), ("amount", "百分之五十")],
        ),
        ("下周一早上8:30，别迟到一点。", [("date", "下周一"), ("time", "早上8:30")]),
        ("住了二十年，2001年回来，10月1号走", [("amount", "二十年"), ("date", "2001年"), ("date", "10月1号")]),
        ("见https://a.cn/x，或a.b@c.com.cn。", [("url", "https://a.cn/x"), ("email", "a.b@c.com.cn")]),
        ("谢谢你的东西", []),
    ],
)
def test_entities_of_chinese(text, expected):
    assert entities_of(text, "zh") == expected


def test_other_languages_have_words_and_addresses_only():
    record = annotate(dialogue("Привет Иван! https://a.org 5 мая"), ALL, "auto").metadata["annotation"]
    assert record["language"] == "other" and record["keywords"] == []
    assert record["turns"][0]["tags"] == ["X", "X", "PUNCT", "X", "NUM", "X"]
    assert [entity["type"] for entity in record["entities"]] == ["url"]


def test_only_what_is_asked_for_is_recorded():
    assert annotate(ENGLISH, [], "auto") is ENGLISH
    record = annotate(ENGLISH, ["words"], "auto").metadata["annotation"]
    assert record.keys() == {"language", "turns"} and record["turns"][0].keys() == {"words"}
    record = annotate(ENGLISH, ["keywords"], "auto").metadata["annotation"]
    assert record.keys() == {"language", "keywords"}


@pytest.mark.parametrize(("module", "language"), [("rjieba", "zh"), ("HanTa.HanoverTagger", "en")])
def test_a_missing_tagger_names_the_extra(monkeypatch, module, language):
    from ssl_jax.data.annotation import words

    monkeypatch.setitem(sys.modules, module, None)
    for load in (words._jieba_tag, words._hanta):
        load.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'ssl_jax\[annotate\]'"):
        annotate(dialogue("Hello 你好"), ["tags"], language)


def test_the_english_model_is_the_packages_own_not_a_file_of_its_name_in_the_current_folder(monkeypatch, tmp_path):
    from ssl_jax.data.annotation import words

    (tmp_path / "morphmodel_en.pgz").write_bytes(b"foreign")
    monkeypatch.chdir(tmp_path)
    words._hanta.cache_clear()
    assert tags_of("a dog", "en") == [("a", "DET"), ("dog", "NOUN")]


def test_segmenting_english_needs_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "HanTa.HanoverTagger", None)
    assert annotate(ENGLISH, ["words"], "en").metadata["annotation"]["turns"][0]["words"][0] == "Hi"


RATED = dataclasses.replace(ENGLISH, metadata={"rating": 4, "by": {"name": "Ann"}, "topics": ["travel"]})
KYOTO = annotate(RATED, ALL, "en")


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"field": "turns", "at_least": 4, "at_most": 4}, True),
        ({"field": "turns", "at_most": 3}, False),
        ({"field": "turns", "equals": 4}, True),
        ({"field": "words", "at_least": 40}, True),
        ({"field": "characters", "at_most": 100}, False),
        ({"field": "tags.NOUN", "at_least": 2}, True),
        ({"field": "tags.INTJ", "at_least": 20}, False),
        ({"field": "keywords", "contains": "TEMPLES"}, True),
        ({"field": "keywords", "contains": ["castle", "stone gardens"]}, True),
        ({"field": "keywords", "contains": "temple"}, False),
        ({"field": "keywords", "lacks": ["castle", "temples"]}, False),
        ({"field": "keywords", "at_least": 1}, True),
        ({"field": "entities.name", "contains": "Kyoto"}, True),
        ({"field": "entities.date", "contains": "Kyoto"}, False),
        ({"field": "entities", "at_least": 7}, True),
        ({"field": "entities.organization", "at_most": 0}, True),
        ({"field": "language", "equals": "en"}, True),
        ({"field": "kind", "equals": "prompt"}, False),
        ({"field": "metadata.rating", "at_least": 3}, True),
        ({"field": "metadata.rating", "equals": True}, False),
        ({"field": "metadata.by.name", "equals": "Ann"}, True),
        ({"field": "metadata.topics", "contains": "travel"}, True),
        ({"field": "metadata.absent", "at_most": 3}, False),
        ({"field": "metadata.rating.deeper", "equals": 4}, False),
    ],
)
def test_a_condition_holds_or_not(condition, expected):
    assert keeps([Condition.model_validate(condition)], KYOTO) is expected


def test_all_conditions_must_hold():
    few, many = Condition(field="turns", at_most=10), Condition(field="turns", at_least=10)
    assert keeps([], KYOTO) and keeps([few], KYOTO) and not keeps([few, many], KYOTO)


def test_conditions_name_the_annotations_that_they_need():
    fields = ["turns", "metadata.words", "tags.NOUN", "entities.place", "words", "language"]
    conditions = [
        Condition(field=field, equals="en" if field == "language" else 1) for field in fields[:3] + fields[4:]
    ]
    conditions.append(Condition(field="entities.place", at_least=1))
    assert needed_annotations(conditions) == {"tags", "entities", "words"}
    with pytest.raises(ValueError, match="'d1' has no annotation 'tags'"):
        keeps([Condition(field="tags.NOUN", at_least=1)], annotate(ENGLISH, ["words"], "auto"))


@pytest.mark.parametrize("what", [(), ("keywords",), ("words",), ("tags", "entities"), ALL])
def test_selecting_annotates_as_asked_whatever_the_conditions_need(what):
    conditions = (Condition(field="tags.NOUN", at_least=2), Condition(field="keywords", lacks=("castle",)))
    assert select(ENGLISH, Data(annotate=what, keep_if=conditions)) == annotate(ENGLISH, what, "auto")
    assert select(ENGLISH, Data(annotate=what, keep_if=(Condition(field="turns", at_most=3),))) is None


def test_the_language_that_the_settings_name_decides():
    mixed = dialogue("你好吗")
    assert language_of(mixed) == "zh"
    selected = select(mixed, Data(annotate=("words",), language="en"))
    assert selected is not None and selected.metadata["annotation"]["turns"][0]["words"] == ["你", "好", "吗"]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("{field: tags.NOUNS, at_least: 2}", r"keep_if.0: field 'tags.NOUNS' is unknown; did you mean tags.NOUN\?"),
        ("{field: mood, equals: good}", "field 'mood' is unknown; use turns, words, characters, tags.NOUN, keywords"),
        ("{field: turns}", "a condition on turns needs one of at_least, at_most, equals"),
        ("{field: turns, contains: a}", "contains does not fit turns; use one of at_least, at_most, equals"),
        ("{field: turns, equals: many}", "turns is a number, so equals must be one"),
        ("{field: keywords, equals: a}", "equals does not fit keywords"),
        ("{field: turns, atleast: 2}", r"unknown field; did you mean data.keep_if.0.at_least\?"),
        ("{field: turns, at_least: two}", "keep_if.0.at_least: .*number.*'two'"),
    ],
)
def test_a_wrong_condition_is_refused_with_its_place_and_the_fix(yaml, message):
    with pytest.raises(UserError, match=message):
        command_line.parse(Config, ["--data.keep_if", f"[{yaml}]"], program="prepare", summary="")


def test_metadata_of_the_wrong_type_is_named_with_its_dialogue():
    rated = dialogue("hi", rating="good", size=3)
    with pytest.raises(UserError, match=r"metadata\.rating is 'good' in dialogue 'd1', which has no size"):
        keeps([Condition(field="metadata.rating", at_least=3)], rated)
    with pytest.raises(UserError, match=r"metadata\.size is 3 in dialogue 'd1', which is no text"):
        keeps([Condition(field="metadata.size", contains=("a",))], rated)


def test_the_configuration_reads_annotations_and_conditions():
    arguments = ["--data.annotate", "words", "tags", "--data.keep_if", "[{field: keywords, contains: 音乐}]"]
    data = command_line.parse(Config, arguments, program="prepare", summary="").data
    assert data.annotate == ("words", "tags") and data.keyword_prefix == 0
    assert data.keep_if == (Condition(field="keywords", contains=("音乐",)),)


def test_a_reply_is_prefixed_with_its_own_keywords_in_the_documented_form():
    prefixed = keyword_prefix(dialogue("What is your hobby?", "Black holes! I own two telescopes."), 2)
    assert prefixed.turns[0] == Turn("system", "keywords: black holes; telescopes")
    assert prefixed.turns[1].content == "What is your hobby?" and len(prefixed.turns) == 3
    assert keyword_prefix(dialogue("你好", "我喜欢音乐"), 3).turns[0] == Turn("system", "keywords: 音乐")


def test_a_prompt_is_steered_by_the_same_line_as_a_training_dialogue():
    trained = keyword_prefix(dialogue("What is your hobby?", "Black holes! I own two telescopes."), 2)
    steered = steer(dialogue("What is your hobby?"), ["black holes", " telescopes\n"])
    assert steered.turns == trained.turns[:2]


def test_the_line_goes_behind_the_instructions_of_a_system_turn():
    told = Dialogue((Turn("system", "Be brief."), *dialogue("Hobby?", "Music.").turns))
    assert keyword_prefix(told, 2).turns == (Turn("system", "Be brief.\nkeywords: music"), *told.turns[1:])


@pytest.mark.parametrize(
    "unchanged",
    [
        dialogue("What is your hobby, black holes?"),
        dialogue("Hi!", "Well, yes."),
        Dialogue((Turn("text", "Black holes are a hobby."),)),
    ],
)
def test_prompts_raw_text_and_replies_without_keywords_are_not_prefixed(unchanged):
    assert keyword_prefix(unchanged, 3) is unchanged
    assert keyword_prefix(ENGLISH, 0) is ENGLISH


def test_raw_text_is_not_steered():
    raw = Dialogue((Turn("text", "Black holes are a hobby."),))
    assert steer(raw, ["music"]) is raw


def test_annotations_follow_their_turns_when_a_prefix_moves_them():
    moved = keyword_prefix(annotate(ENGLISH, ALL, "auto"), 2)
    record = moved.metadata["annotation"]
    assert record["turns"][0]["words"] == [] and len(record["turns"]) == len(moved.turns)
    for entity in record["entities"]:
        assert moved.turns[entity["turn"]].content[entity["start"] : entity["end"]] == entity["text"]


def test_the_report_counts_by_language():
    corpus = [annotate(one, ALL, "auto") for one in (ENGLISH, ENGLISH, CHINESE)] + [dialogue("not annotated")]
    report = json.loads(json.dumps(summarize(corpus)))
    assert list(report) == ["en", "zh"]
    assert report["en"]["dialogues"] == 2 and report["en"]["turns"] == 8
    counts = [len(words_of(turn.content, "en")) for turn in ENGLISH.turns]
    assert report["en"]["words"] == 2 * sum(counts)
    assert report["en"]["words_per_turn"]["mean"] == pytest.approx(sum(counts) / 4, abs=0.005)
    assert report["en"]["words_per_turn"]["median"] == sorted(counts)[1]
    assert sum(report["zh"]["tags"].values()) == pytest.approx(1, abs=1e-3)
    assert report["en"]["keywords"][0]["dialogues"] == 2
    assert report["zh"]["entities"]["organization"] == 2 and report["en"]["entities"]["amount"] == 2


def test_the_report_does_not_depend_on_the_order_of_the_dialogues():
    corpus = [annotate(one, ALL, "auto") for one in (ENGLISH, CHINESE, dialogue("Music and art", "Art and music"))]
    assert json.dumps(summarize(corpus)) == json.dumps(summarize(corpus[::-1]))


def test_metadata_of_the_same_name_from_elsewhere_is_no_annotation():
    foreign = dialogue("hello there", annotation="checked by Ann")
    assert summarize([foreign]) == {} and keeps([Condition(field="language", equals="en")], foreign)


def test_the_report_forgets_rare_keywords_rather_than_grow(monkeypatch):
    from ssl_jax.data.annotation import report

    monkeypatch.setattr(report, "_MAX_KEYWORDS", 3)
    contents = ["music", "music", "art", "art", "opera", "guitar", "violin", "music"]
    found = summarize(annotate(dialogue(content), ["keywords"], "en") for content in contents)
    assert found["en"]["keywords"][:2] == [{"phrase": "music", "dialogues": 3}, {"phrase": "art", "dialogues": 2}]
    assert len(found["en"]["keywords"]) <= 3
