"""Every cleaning step on what people really write, in English and Chinese; and what all steps promise together."""

import inspect
import re
import time
import unicodedata

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ssl_jax.config import Config
from ssl_jax.config import cleaning as config
from ssl_jax.data.cleaning import filters
from ssl_jax.data.cleaning.apply import FUNCTIONS, Counts, clean, step_functions
from ssl_jax.data.pipeline import prepare
from ssl_jax.dialogue import Dialogue, Turn
from ssl_jax.errors import UserError

EMOJI = "😀 👍🏽 👩‍👩‍👧‍👦 ❤️ 🇨🇳 #️⃣ *️⃣ ‼️ ⁉️ 〰️ 3️⃣ ㊗️ 😂😂😂😂😂😂"


def steps_of(*written):
    return Config.model_validate({"data": {"cleaning": list(written)}}).data.cleaning


def raw(*contents, **metadata):
    return Dialogue(tuple(Turn("text", content) for content in contents), "id", metadata)


def apply(written, dialogue):
    """The dialogue after one step, None if it is removed."""
    return next((result for result, _ in clean([(dialogue, None)], Counts(), steps_of(written))), None)


def change(written, text):
    """The text after one step, None if nothing is left of it."""
    result = apply(written, raw(text))
    return None if result is None else result.turns[0].content


# A step, before, after. "" and "=": the text stays as it is.
EXAMPLES = [
    ("fix_text", "schÃ¶n, donâ€™t", "schön, don’t"),
    ("fix_text", "你好\uff0c世界".encode().decode("cp1252"), "你好\uff0c世界"),
    ("fix_text", "“curly” ﬁne \uff11 <b> &amp;", "="),
    ("unicode_nfc", "e\u0301 中文", "é 中文"),
    ("width", "\uff28\uff49 \uff11\uff12\uff13\uff05\u3000ok", "Hi 123% ok"),
    ("width", "你好\uff0c世界\uff01\uff08真的\uff1f\uff09", "="),
    ("width", "\uff76\uff9e\uff77", "ガキ"),
    ("control_characters", "a\x00b\x1b[0m\tc\n", "ab[0m\tc\n"),
    ("newlines", "a\r\nb\rc", "a\nb\nc"),
    ("strip", " \u3000你好 \n", "你好"),
    ("strip", " \n", None),
    ("markup", "<p>Hi <b>Ann</b>!</p><p>See <a href='x'>this</a><br/>bye</p>", "Hi Ann!\nSee this\nbye"),
    ("markup", "Tom &amp; Jerry &lt;3 &#20320;&#x597d; &amp;amp; &nosuch; AT&T", "Tom & Jerry <3 你好 & &nosuch; AT&T"),
    ("markup", "I <3 you, a < b > c, <Media omitted>, <url>", "="),
    ("markup", "<script>alert('<p>')</script>hi<!-- no -->", "hi"),
    (
        "markup",
        "**bold** and *it* and ***both*** and __u__ and ~~no~~ `code`",
        "bold and it and both and u and no code",
    ),
    ("markup", "**重要**通知\uff0c请看[链接](https://a.cn/x_(y))", "重要通知\uff0c请看链接"),
    ("markup", "a **b *c* d** e", "a b c d e"),
    ("markup", "2*3*4 snake_case_name *_* ^_^ and ^_^ >_< T_T ~_~ a[i] c:\\*x* 1 ~ 2 [sic]", "="),
    ("markup", "# Title\n```python\nx = 1\n```\n#hashtag", "Title\nx = 1\n#hashtag"),
    ("markup", "[b]bold[/b] [url=http://x.y]there[/url] [img]http://x/y.png[/img]", "bold there "),
    ("markup", "<@123456789> <@!123456789> look <:smile:12345> <#99999|general>", "@user @user look :smile: #general"),
    ("markup", "<@U02ABCDEF|ann> <!here> <https://x.com/a|x> <https://x.com>", "@ann @here x https://x.com"),
    ({"step": "markup", "mention": "someone"}, "<@123456789> hi", "someone hi"),
    ("mask_urls", "see https://a.org/b?c=d#e, www.x.com. ok (http://x.y/z)", "see <url>, <url>. ok (<url>)"),
    ("mask_urls", "看https://t.cn/AbC很好\uff0cwww.baidu.com也行 bit.ly/x1", "看<url>很好\uff0c<url>也行 <url>"),
    ("mask_urls", "fine.me too, e.g. this, 3.14, file.py, ok...no", "="),
    ({"step": "mask_urls", "replacement": "\\1[URL]"}, "http://a.b", "\\1[URL]"),
    ("mask_emails", "write to ann.b+c@mail.example.co.uk, or @ann", "write to <email>, or @ann"),
    ("mask_emails", "邮箱zhang_san@qq.com谢谢", "邮箱<email>谢谢"),
    ("mask_phones", "call +44 20 7946 0958 or (555) 234-5678, 1-555-234-5678", "call <phone> or <phone>, <phone>"),
    ("mask_phones", "我的手机13812345678\uff0c座机010-62771234", "我的手机<phone>\uff0c座机<phone>"),
    ("mask_phones", "138 1234 5678 / 030 / 123 4567 / +8613912345678", "<phone> / <phone> / <phone>"),
    ("mask_phones", "on 2024-01-15 at 10:30, 03/04/2024, 1,000,000 or 3.14159265, v1.2.3", "="),
    ("mask_ids", "card 4111 1111 1111 1111, iban DE89 3704 0044 0532 0130 00.", "card <id>, iban <id>."),
    ("mask_ids", "card 5500 0055 5555 5559, iban CZ65 0800 0000 1920 0014 5399", "card <id>, iban <id>"),
    ("mask_ids", "card 5500 0055 5555 5558, iban GB00 WEST 1234 5698 7654 32", "="),
    ("mask_ids", "身份证11010519491231002X\uff0cQQ号1234567890", "身份证<id>\uff0cQQ号<id>"),
    ("mask_ids", "ping 192.168.0.1 and 2001:db8::8a2e:370:7334 now", "ping <id> and <id> now"),
    ("mask_ids", "in 2024, 12345678 people at 10:30:15 version 1.2.3, 999.1.1.1, AB12 CDEF", "="),
    ({"step": "mask_ids", "min_digits": 5, "replacement": "#"}, "pin 12345", "pin #"),
    ("repeated_punctuation", "what?????? no!!!! ok... -----", "what??? no!!! ok... ---"),
    (
        "repeated_punctuation",
        "真的吗\uff1f\uff1f\uff1f\uff1f\uff1f好\u3002\u3002\u3002\u3002",
        "真的吗\uff1f\uff1f\uff1f好\u3002\u3002\u3002",
    ),
    ({"step": "repeated_punctuation", "keep": 1}, "hm...", "hm."),
    ("repeated_characters", "sooooo goooood 100000 哈哈哈哈哈哈", "sooo goood 100000 哈哈哈"),
    ("quoted_text", "> old\n>> older\nI agree", "I agree"),
    ("quoted_text", "Yes.\n\nOn Mon, Jan 5, 2024 at 3:04 PM, Ann <a@b.c> wrote:\n> question?", "Yes."),
    ("quoted_text", "好的\n在 2024年1月5日\uff0c张三 <a@b.c> 写道\uff1a\n> 明天来吗\uff1f", "好的"),
    ("quoted_text", "see below\n-----Original Message-----\nFrom: Ann\nhello", "see below"),
    ("quoted_text", "收到\n------------------ 原始邮件 ------------------\n发件人: 张三", "收到"),
    ("quoted_text", "[quote=Ann]a [quote]b[/quote] c[/quote] I agree", "I agree"),
    ("quoted_text", ">_< no\n>:( why\nOn this he wrote: a book", "="),
    ("quoted_text", "> only this", None),
    ("signatures", "See you\n-- \nAnn Bee\nExample Ltd", "See you"),
    ("signatures", "OK!\n\nSent from my iPhone", "OK!"),
    ("signatures", "好的\n发自我的iPhone", "好的"),
    ("signatures", "one -- two\n--- three", "="),
    ({"step": "signatures", "max_lines": 1}, "a\n--\nb\nc", "="),
    ("notices", "<Media omitted>", None),
    ("notices", "\u200eimage omitted\nlook at that", "look at that"),
    ("notices", "Ann joined using this group's invite link", None),
    ("notices", "Ann Bee left the group\n*** bob (~b@host) has quit (Ping timeout)\nhi", "hi"),
    ("notices", "张三邀请李四加入了群聊\n你好", "你好"),
    ("notices", "小明 撤回了一条消息", None),
    ("notices", "[图片]", None),
    ("notices", "<Medien ausgeschlossen>", None),
    ("notices", "Anna hat die Gruppe verlassen.", None),
    ("notices", "She left. I joined the gym, the image was nice", "="),
    ("notices", "我已经退出了比赛\uff0c照片在这里", "="),
    ({"step": "notices", "patterns": [r"GAME OVER \d+"]}, "GAME OVER 7\nagain?", "again?"),
    ("punctuation", "Well, don't! 你好\uff0c世界\u3002 (a-b)", "Well dont 你好 世界 a b"),
    ("stop_words", "this is the Wednesday meeting", "Wednesday meeting"),
    ("stop_words", "我们的会议非常重要", "会议非常重要"),
]


@pytest.mark.parametrize(("written", "before", "after"), EXAMPLES)
def test_a_step_does_this(written, before, after):
    assert change(written, before) == (before if after == "=" else after)


def test_every_step_has_an_example():
    whole_dialogues = {"bots", "language", "length"}
    shown = {written if isinstance(written, str) else written["step"] for written, _, _ in EXAMPLES}
    assert shown | whole_dialogues == set(config.STEP_CLASSES)


def chat(*turns, **metadata):
    return Dialogue(tuple(Turn("text", content) for _, content in turns), "id", {
        "speakers": [speaker for speaker, _ in turns], "times": list(range(len(turns))), **metadata
    })  # fmt: skip


def test_turns_of_bots_and_commands_go_with_their_metadata():
    dialogue = chat(
        ("ann", "!play song"), ("MusicBot", "playing"), ("Talbot", "nice"), ("bo", "/usr/bin is full"), title=7
    )
    result = apply("bots", dialogue)
    assert result is not None
    assert [turn.content for turn in result.turns] == ["nice", "/usr/bin is full"]
    assert result.metadata == {"speakers": ["Talbot", "bo"], "times": [2, 3], "title": 7}


def test_bots_are_told_by_the_names_and_prefixes_of_the_settings():
    dialogue = chat(("Dyno", "hi"), ("ann", "?rank"), ("GitBot", "/help"))
    result = apply({"step": "bots", "speakers": ["^Dyno$"], "command_prefixes": ["?"]}, dialogue)
    assert result is not None
    assert result.metadata["speakers"] == ["GitBot"]
    assert apply({"step": "bots", "speakers": [], "command_prefixes": []}, dialogue) is dialogue


def test_a_dialogue_that_loses_its_reply_or_its_question_is_removed():
    notice, text = "<Media omitted>", "hello"
    for roles, contents, stays in [
        (("user", "assistant"), (text, notice), False),
        (("user", "assistant"), (notice, text), True),
        (("user", "assistant", "user"), (text, text, notice), False),
        (("text", "text"), (text, notice), True),
    ]:
        dialogue = Dialogue(tuple(map(Turn, roles, contents)))
        result = apply("notices", dialogue)
        assert (result is not None) == stays
        assert result is None or result.kind == dialogue.kind


@pytest.mark.parametrize(
    ("text", "keep", "stays"),
    [
        ("How are you today? I went to the market to buy some fresh bread.", ["en"], True),
        ("今天天气很好\uff0c我们一起去公园散步\uff0c然后在附近的饭馆吃晚饭怎么样?", ["en"], False),
        ("今天天气很好\uff0c我们一起去公园散步\uff0c然后在附近的饭馆吃晚饭怎么样?", ["en", "zh"], True),
        ("Ich habe gestern im Garten gearbeitet und bin heute sehr müde.", ["en", "zh"], False),
        ("ok lol", ["zh"], True),
    ],
)
def test_dialogues_in_other_languages_are_removed_unless_too_short_to_tell(text, keep, stays):
    assert (change({"step": "language", "keep": keep}, text) is not None) == stays


@pytest.mark.parametrize(
    ("keep", "min_confidence", "stays"),
    [(("zh",), 0.75, True), (("zh",), 0.76, False), (("wuu",), 0.5, True), (("wuu", "zh"), 0.76, False)],
)
def test_what_counts_for_a_language_is_the_sum_over_it_and_its_members(monkeypatch, keep, min_confidence, stays):
    class Identifier:
        def rank(self, text):
            assert text == "0123456789\n0"
            return [("wuu", 0.5), ("zh", 0.25), ("en", 0.25)]

    monkeypatch.setattr(filters, "load_identifier", Identifier)
    dialogue = raw("0123456789", "0123456789")
    options = {"keep": keep, "min_confidence": min_confidence}
    result = filters.language(dialogue, **options, min_characters=21, sample_characters=12)
    assert result is (dialogue if stays else None)
    assert filters.language(dialogue, **options, min_characters=22, sample_characters=12) is dialogue


@pytest.mark.parametrize(
    ("settings", "stays"),
    [
        ({}, True),
        ({"min_turns": 3}, False),
        ({"max_turns": 2}, True),
        ({"max_turns": 1}, False),
        ({"min_characters": 15}, True),
        ({"min_characters": 16}, False),
        ({"max_characters": 14}, False),
        ({"min_words": 4, "max_words": 4}, True),
        ({"min_words": 5}, False),
        ({"max_words": 3}, False),
        ({"min_turn_characters": 3}, False),
        ({"max_turn_characters": 12}, False),
        ({"min_turn_characters": 2, "max_turn_characters": 13}, True),
    ],
)
def test_length_counts_turns_characters_and_words(settings, stays):
    dialogue = raw("hello, ladies", "你好")  # 13 + 2 characters, 2 + 2 words
    assert (apply({"step": "length", **settings}, dialogue) is dialogue) == stays


# Whole settings, so that a required one is there.
ALL_STEPS = [{"step": name, "keep": ["en", "zh"]} if name == "language" else name for name in config.STEP_CLASSES]
PIECES = [
    *"*_`<>&;#1+!\uff01é\u0301.:0\n ",
    "~~",
    "amp;",
    "[b]",
    "[/b]",
    "<b>",
    "</p>",
    "http://",
    "a@b.co",
    "Ã©",
    "-- ",
]
FRAGMENTS = st.sampled_from([before for _, before, _ in EXAMPLES] + [EMOJI, *PIECES])
TEXTS = st.one_of(st.text(max_size=40), st.lists(FRAGMENTS, max_size=6).map("".join))


@pytest.mark.parametrize("written", ALL_STEPS, ids=list(config.STEP_CLASSES))
@given(text=TEXTS)
def test_a_step_done_twice_is_a_step_done_once(written, text):
    once = apply(written, raw(text))
    if once is not None:
        assert apply(written, once) == once


MASKS = ("mask_urls", "mask_emails", "mask_phones", "mask_ids")
CHANGING = ("newlines", "unicode_nfc", "fix_text", "width", "markup", *MASKS)
REMOVING = [name for name in config.STEP_CLASSES if name not in CHANGING]


@pytest.mark.parametrize("name", REMOVING)
@given(text=TEXTS)
def test_what_a_removing_step_leaves_was_there_in_this_order(name, text):
    after = change(ALL_STEPS[list(config.STEP_CLASSES).index(name)], text)
    rest = iter(text)
    # White space that is tidied may change its kind.
    assert all(character in rest for character in after or "" if not character.isspace())


@given(text=TEXTS)
def test_width_and_composition_keep_every_character_but_its_form(text):
    for step in ("width", "unicode_nfc"):
        assert unicodedata.normalize("NFKC", change(step, text) or "") == unicodedata.normalize("NFKC", text)


@given(text=TEXTS)
def test_masks_and_markup_add_nothing_but_their_replacements_and_what_entities_stand_for(text):
    text = re.sub("[&@]", "", text)
    for step in (*MASKS, "markup"):
        after = re.sub("<(url|email|phone|id)>|@user|@", "", change(step, text) or "")
        rest = iter(text)
        # A block of HTML starts a line.
        assert all(character in rest for character in after if not character.isspace())


@pytest.mark.parametrize("written", ALL_STEPS, ids=list(config.STEP_CLASSES))
def test_emoji_stay(written):
    text = f"What a lovely evening this was, thank you {EMOJI} see you tomorrow, 很好 {EMOJI}"
    assert (change(written, text) or "").count(EMOJI) == 2


def test_steps_are_done_in_the_order_of_the_list():
    text = "\uff11\uff13\uff18\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18"
    first, second = (
        next(clean([(raw(text), None)], Counts(), steps_of(*order)))[0].turns[0].content
        for order in (("width", "mask_phones"), ("mask_phones", "width"))
    )
    assert (first, second) == ("<phone>", "13812345678")


def test_counts_and_the_first_examples_of_every_step_are_kept_on_request():
    counts = Counts(max_examples=2)
    dialogues = [(raw(text), None) for text in ("a!!!!", "b!!!!", "fine", "c!!!!", "")]
    kept = list(clean(dialogues, counts, steps_of("repeated_punctuation", {"step": "length", "min_characters": 1})))
    assert len(kept) == 4
    assert (dict(counts.changed), dict(counts.removed)) == ({"repeated_punctuation": 3}, {"length": 1})
    shown = [(example.before.turns[0].content, example.after and example.after.turns[0].content)
             for example in counts.examples["repeated_punctuation"]]  # fmt: skip
    assert shown == [("a!!!!", "a!!!"), ("b!!!!", "b!!!")]
    assert counts.examples["length"][0].after is None
    assert Counts().examples == {}


def test_the_default_is_what_is_safe_for_every_text():
    assert Config().data.cleaning == steps_of("newlines", "unicode_nfc", "control_characters", "strip")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("mask_url", "unknown step 'mask_url'; did you mean mask_urls?"),
        ("zzz", "unknown step 'zzz'; known: newlines, "),
        ({"step": "length", "max_turn": 2}, "length: unknown setting 'max_turn'; did you mean max_turns?"),
        ({"step": "strip", "a": 2}, "strip: unknown setting 'a'; known: none"),
        ({"step": "length", "max_turns": 0}, "greater than or equal to 1"),
        ({"step": "length", "min_turns": 3, "max_turns": 2}, "min_turns 3 exceeds max_turns 2"),
        ({"step": "notices", "patterns": ["("]}, "patterns: '(' is no regular expression"),
        ({"step": "bots", "command_prefixes": [""]}, "an empty prefix makes every turn a command"),
        ({"step": "markup", "mention": "<@1>"}, "should match pattern"),
        ("language", "language: setting 'keep' is missing; write {step: language, keep: …}"),
        ({"keep": 3}, "a step is a name or a mapping with 'step: NAME'"),
        (7, "a step is a name or a mapping with 'step: NAME'"),
    ],
)
def test_a_mistake_in_the_list_is_named_with_its_fix(written, says):
    with pytest.raises(pydantic.ValidationError) as caught:
        steps_of("strip", written)
    assert says in str(caught.value)
    assert caught.value.errors()[0]["loc"][:3] == ("data", "cleaning", 1)


@pytest.mark.parametrize(
    "written",
    [{"step": "language", "keep": ["en", "xx"]}, {"step": "stop_words", "languages": ["xx"]}],
)
def test_an_unknown_language_is_refused_before_any_dialogue_is_read(written):
    with pytest.raises(UserError, match=r"cleaning: (language|stop_words): unknown language 'xx'; known: .*zh"):
        clean(iter(()), Counts(), steps_of(written))


def test_preparing_names_a_step_that_cannot_work_before_it_reads_a_row(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("malformed\n")
    data = {"labeled": [{"path": str(rows)}], "cleaning": [{"step": "language", "keep": ["xx"]}]}
    data["prepared_dir"] = str(tmp_path / "prepared")
    with pytest.raises(UserError, match="unknown language 'xx'"):
        prepare(Config.model_validate({"data": data, "train": {"steps": 1, "unlabeled_ratio": 0}}))


@pytest.mark.parametrize(
    ("package", "written"),
    [
        ("ftfy", "fix_text"),
        ("py3langid.langid", {"step": "language", "keep": ["en"]}),
        ("stopwordsiso", "stop_words"),
        ("rjieba", "stop_words"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, package, written):
    from ssl_jax.data.cleaning import characters, filters

    for cached in (characters.load_encoding_fixer, filters.load_identifier, filters.load_cutter):
        cached.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'ssl_jax\[text\]'"):
        step_functions(steps_of(written))


def test_settings_survive_yaml_and_are_as_short_as_they_were_written():
    config_ = Config.model_validate({"data": {"cleaning": ["strip", {"step": "length", "max_turns": 3}]}})
    dumped = yaml.safe_load(yaml.safe_dump(config_.model_dump(mode="json")))
    assert dumped["data"]["cleaning"][0] == "strip"
    assert dumped["data"]["cleaning"][1]["max_turns"] == 3
    assert Config.model_validate(dumped) == config_


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_settings_of_a_step_are_the_arguments_of_its_function(kind):
    _, *settings = inspect.signature(FUNCTIONS[kind]).parameters
    assert settings == [name for name in kind.model_fields if name != "step"]
    assert all(field.description for name, field in kind.model_fields.items() if name != "step")


def test_every_step_has_a_function_and_is_described():
    assert set(FUNCTIONS) == set(config.STEP_CLASSES.values())
    description = Config.model_fields["data"].default.__class__.model_fields["cleaning"].description
    assert all(f"{name}" in description for name in config.STEP_CLASSES)


@pytest.mark.parametrize("written", ALL_STEPS, ids=list(config.STEP_CLASSES))
def test_hostile_text_does_not_make_a_step_slow(written):
    ((_, step),) = step_functions(steps_of(written))
    step(raw("loads what the step needs, once"))
    started = time.process_time()
    for piece in (
        "<!--",
        "<p ",
        "&amp;",
        "[quote]",
        "*a",
        "`",
        "a.",
        "a@",
        "1 ",
        "::",
        "On 1 ",
        "Ann added ",
        "!?",
        "-- \n",
    ):
        step(raw(piece * (20_000 // len(piece)) + "\n!"))
    for opening, closing in (("[b]", "[/b]"), ("[quote]", "[/quote]"), ("*_", "_*"), ("<b>", "</b>"), ("&#3", "8;")):
        step(raw(opening * 3000 + "x" + closing * 3000))
    # Together they take a fraction of a second; one search that tries every place to every end takes longer.
    assert time.process_time() - started < 5
