"""Messenger exports become dialogues: who said what, when, in which chat, divided by silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import messenger_exports as exports
import pytest

from ssl_jax.config import Source
from ssl_jax.data import formats
from ssl_jax.data.formats import Expected, Rejected
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

Read = Callable[..., list[Any]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes a file and reads it back as rows."""

    def read(
        content: bytes | str, name: str = "chat.txt", expected: Expected = "unlabeled", **fields: Any
    ) -> list[Any]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(formats.read(Source.model_validate({"path": str(path), **fields}), expected, 100_000))

    return read


def texts(dialogue: Dialogue) -> list[str]:
    return [turn.content for turn in dialogue.turns]


FORMATS = {
    "whatsapp": (exports.whatsapp, "chat.txt"),
    "telegram": (exports.telegram, "result.json"),
    "discord": (exports.discord, "general.json"),
    "slack": (exports.slack_day, "2024-05-30.json"),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("named", [False, True])
def test_messages_are_divided_by_silence_and_keep_speaker_time_and_group(read: Read, format: str, named: bool) -> None:
    content, name = FORMATS[format]
    rows = read(content(), name, **({"format": format} if named else {}))
    assert [texts(row) for row in rows] == [
        [f"say m{at} 你好" for at in range(first, first + 4)] for first in range(0, 12, 4)
    ]
    assert {turn.role for turn in rows[0].turns} == {"text"}
    metadata = rows[1].metadata
    assert metadata["time"] == "2024-05-30T12:04:00" == metadata["times"][0] and len(metadata["times"]) == 4
    assert len(metadata["speakers"]) == 4 and len(set(metadata["speakers"])) == 2
    assert len({row.metadata["group"] for row in rows}) == 1 and {row.metadata["source"] for row in rows} == {name}
    assert len({row.id for row in rows}) == 3


@pytest.mark.parametrize("format", FORMATS)
def test_a_wider_gap_makes_one_dialogue(read: Read, format: str) -> None:
    content, name = FORMATS[format]
    assert [len(row.turns) for row in read(content(), name, gap_minutes=200)] == [12]


@pytest.mark.parametrize("format", FORMATS)
def test_the_named_assistant_replies_and_the_rest_are_users(read: Read, format: str) -> None:
    content, name = FORMATS[format]
    assistant = "U1" if format == "slack" else "Bob Ray"
    rows = read(content(), name, "labeled", assistant=assistant)
    assert [[turn.role for turn in row.turns] for row in rows] == [["user", "assistant"] * 2] * 3
    first, *_ = read(content(), name, "labeled", assistant="U0" if format == "slack" else "Ann")
    assert [turn.role for turn in first.turns] == ["assistant", "user", "assistant"]
    assert len(first.metadata["speakers"]) == len(first.metadata["times"]) == 3


@pytest.mark.parametrize("format", FORMATS)
def test_a_labeled_source_without_an_assistant_is_refused_with_the_speakers(read: Read, format: str) -> None:
    content, name = FORMATS[format]
    with pytest.raises(UserError, match=rf"{name}: {format} does not say who replies.* such as '(Ann|U0)' or"):
        read(content(), name, "labeled")


ARABIC_DIGITS = {ord(str(digit)): chr(0x660 + digit) for digit in range(10)}
WHATSAPP = {
    "android US": "12/31/23, 9:41 PM - Ann: m0\n12/31/23, 9:42 PM - Bob: m1",
    "android narrow space": "12/31/23, 9:41\u202fPM - Ann: m0\n12/31/23, 9:42\u202fPM - Bob: m1",
    "android UK": "31/12/2023, 21:41 - Ann: m0\n31/12/2023, 21:42 - Bob: m1",
    "android German": "31.12.23, 21:41 - Ann: m0\n31.12.23, 21:42 - Bob: m1",
    "android Dutch": "31-12-2023 21:41 - Ann: m0\n31-12-2023 21:42 - Bob: m1",
    "android French": "31/12/2023 à 21:41 - Ann : m0\n31/12/2023 à 21:42 - Bob : m1",
    "android Spanish": "31/12/23, 9:41 p.\xa0m. - Ann: m0\n31/12/23, 9:42 p.\xa0m. - Bob: m1",
    "android Chinese": "2023/12/31 下午9:41 - Ann: m0\n2023/12/31 下午9:42 - Bob: m1",
    "android Korean": "2023. 12. 31. 오후 9:41 - Ann: m0\n2023. 12. 31. 오후 9:42 - Bob: m1",
    "android Arabic": "\u200f31/12/2023، 9:41 م - Ann: m0\n\u200f31/12/2023، 9:42 م - Bob: m1".translate(ARABIC_DIGITS),
    "ISO": "2023-12-31, 21:41 - Ann: m0\n2023-12-31, 21:42 - Bob: m1",
    "iOS UK": "[31/12/2023, 21:41:00] Ann: m0\n[31/12/2023, 21:42:00] Bob: m1",
    "iOS US": "[12/31/23, 9:41:00\u202fPM] Ann: m0\n[12/31/23, 9:42:00\u202fPM] Bob: m1",
    "iOS German": "[31.12.23, 21:41:00] Ann: m0\n[31.12.23, 21:42:00] ~\u202fBob: m1",
    "iOS Chinese": "[2023/12/31 下午9:41:00] Ann: m0\n[2023/12/31 下午9:42:00] Bob: m1",
}


@pytest.mark.parametrize("region", WHATSAPP)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_whatsapp_dates_of_every_region(read: Read, region: str, ending: str) -> None:
    (dialogue,) = read(WHATSAPP[region].replace("\n", ending) + ending)
    said = ["m0", "m1"] if region != "android Arabic" else [text.translate(ARABIC_DIGITS) for text in ("m0", "m1")]
    assert texts(dialogue) == said
    assert dialogue.metadata["speakers"] == ["Ann", "Bob"]
    assert dialogue.metadata["times"] == ["2023-12-31T21:41:00", "2023-12-31T21:42:00"]


@pytest.mark.parametrize(
    ("dates", "first"),
    [
        (("01/02/2024", "13/02/2024"), "2024-02-01"),  # only a day can be 13
        (("01/02/2024", "02/13/2024"), "2024-01-02"),
        (("09/01/2024", "10/01/2024", "01/02/2024"), "2024-01-09"),  # time does not go back
        (("01/02/2024", "01/03/2024"), "2024-01-02"),  # a day apart rather than a month
        (("23/12/30", "23/12/31"), "2023-12-30"),
        (("01/02/2024",), "2024-02-01"),
    ],
)
def test_whatsapp_order_of_day_and_month_is_found_in_the_whole_file(
    read: Read, dates: tuple[str, ...], first: str
) -> None:
    rows = read("\n".join(f"{date}, 10:00 - Ann: hi" for date in dates))
    assert rows[0].metadata["time"] == f"{first}T10:00:00" and len(rows) == len(dates)


def test_whatsapp_noon_and_midnight(read: Read) -> None:
    rows = read("1/13/24, 12:05 AM - Ann: a\n1/13/24, 12:05 PM - Ann: b")
    assert [row.metadata["time"][11:] for row in rows] == ["00:05:00", "12:05:00"]


def test_whatsapp_messages_of_many_lines_and_things_nobody_wrote(read: Read) -> None:
    (dialogue,) = read(
        "\u200e[31/05/2024, 10:00:00] Club: \u200eMessages and calls are end-to-end encrypted.\n"
        '[31/05/2024, 10:00:01] Ann changed the subject to "Re: party"\n'
        "[31/05/2024, 10:00:02] Ann joined using this group's invite link\n"
        "[31/05/2024, 10:01:00] Ann: first line\n\nthird: line\n"
        "\u200e[31/05/2024, 10:02:00] Ann: \u200eimage omitted\n"
        "[31/05/2024, 10:02:01] Bob: <Media omitted>\n"
        "[31/05/2024, 10:02:02] Bob: This message was deleted\n"
        "[31/05/2024, 10:02:03] Bob: IMG-1.jpg (file attached)\nlook at this\n"
        "[31/05/2024, 10:03:00] Bob: typo \u200e<This message was edited>\n"
        "[31/05/2024, 10:04:00] Ann: a <b> c: d\n"
    )
    assert texts(dialogue) == ["first line\n\nthird: line", "look at this typo", "a <b> c: d"]
    assert dialogue.metadata["omitted"] == 6
    assert dialogue.id == "chat.txt:4"


def test_whatsapp_text_before_the_first_date_is_one_rejected_row(read: Read) -> None:
    bad, good = read("exported\nby me\n" + exports.whatsapp(4).decode(), format="whatsapp")
    assert (bad.reason, bad.line) == ("no date and time", 1)
    assert len(good.turns) == 4


def test_a_message_that_cannot_be_read_ends_its_dialogue(read: Read) -> None:
    rows = exports.whatsapp(4).split(b"\n")
    rows[3] = rows[3].replace(b"m2", b"\xff")
    before, bad, after = read(b"\n".join(rows))
    assert (bad.reason, bad.line) == ("invalid UTF-8", 4)
    assert texts(before) == ["say m0 你好", "say m1 你好"] and texts(after) == ["say m3 你好"]


def test_a_log_with_dates_in_its_text_is_no_chat(read: Read) -> None:
    (dialogue,) = read("notes of\n31/12/2023, 21:41 - Ann: m0\n")
    assert "speakers" not in dialogue.metadata


def test_telegram_full_export_keeps_chats_apart(read: Read) -> None:
    export = {
        "about": "…",
        "personal_information": {"first_name": "Ann"},
        "chats": {"about": "…", "list": [exports.telegram_chat(4), exports.telegram_chat(4, id=5)]},
        "left_chats": {"list": [exports.telegram_chat(4, id=6)]},
    }
    rows = read(json.dumps(export), "result.json")
    assert [row.metadata["group"] for row in rows] == ["telegram/4711", "telegram/5", "telegram/6"]
    assert [row.id for row in rows] == ["telegram/4711/2", "telegram/5/2", "telegram/6/2"]
    assert rows[0].metadata["chat"] == "Friends"


def test_telegram_reply_goes_on_with_its_dialogue_after_a_silence(read: Read) -> None:
    chat = exports.telegram_chat(5)
    chat["messages"][5]["reply_to_message_id"] = 3
    assert [len(row.turns) for row in read(json.dumps(chat), "result.json")] == [5]


def test_telegram_messages_that_are_none_are_rejected_by_number(read: Read) -> None:
    chat = exports.telegram_chat(4)
    chat["messages"][2]["text"] = [{"type": "bold"}]
    chat["messages"][4] = 7
    rows = read(json.dumps(chat), "result.json")
    assert [(row.reason, row.line) for row in rows if isinstance(row, Rejected)] == [
        ("content is not text", 3),
        ("message is not an object", 5),
    ]
    assert [texts(row) for row in rows if isinstance(row, Dialogue)] == [["say m0 你好"], ["say m2 你好"]]


@pytest.mark.parametrize("format", ["telegram", "discord"])
def test_a_broken_export_keeps_all_other_messages(read: Read, format: str) -> None:
    content, name = FORMATS[format]
    broken = content().replace(b'"say m5' if format == "discord" else b'"m5"', b'"x', 1)
    assert broken != content()
    rows = read(broken[: -len(broken) // 10], name)
    said = " ".join(text for row in rows if isinstance(row, Dialogue) for text in texts(row)).split()
    assert {f"m{at}" for at in range(10)} - {"m5"} <= set(said)
    assert {row.reason for row in rows if isinstance(row, Rejected)} == {"not JSON"}
    group = {row.metadata["group"] for row in rows if isinstance(row, Dialogue)}
    assert group == {"discord/77" if format == "discord" else "telegram/4711"}


def test_discord_notices_are_left_out_and_replies_followed(read: Read) -> None:
    export = json.loads(exports.discord(5))
    export["messages"][1] |= {"type": "GuildMemberJoin", "content": "Joined the server."}
    export["messages"][4] |= {"type": "Reply", "reference": {"messageId": "1000", "channelId": "77"}}
    (dialogue,) = read(json.dumps(export), "general.json")
    assert texts(dialogue) == ["say m0 你好 say m2 你好", "say m3 你好", "say m4 你好"]
    assert dialogue.metadata["omitted"] == 1 and dialogue.metadata["chat"] == "general"


@pytest.fixture
def slack(tmp_path: Path) -> Path:
    """A Slack export with two channels, a thread and a day's change in the middle of a dialogue."""
    export = tmp_path / "export"
    day = 86_400

    def message(seconds: float, user: str, text: str, **fields: Any) -> dict[str, Any]:
        return {"type": "message", "user": user, "ts": f"{1_700_000_000 + seconds:.6f}", "text": text, **fields}

    days = {
        "general/2023-11-14.json": [
            message(0, "U0", "<@U1> joined", subtype="channel_join"),
            message(1, "U0", "hi <@U1>, see <https://x.org|the page> &amp; <#C1|random>"),
            message(2, "U1", "who asks?", thread_ts="1700000002.000000"),
            message(3, "U0", "late", thread_ts="1700000002.000000"),
        ],
        "general/2023-11-15.json": [
            message(30, "U1", "next day, same talk"),
            message(day, "U0", "even later", thread_ts="1700000002.000000"),
        ],
        "random/2023-11-14.json": [message(5, "U9", "alone", thread_ts="1700000005.000000")],
    }
    for name, messages in days.items():
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_text(json.dumps(messages), encoding="utf-8")
    (export / "users.json").write_bytes(exports.slack_users())
    (export / "channels.json").write_text('[{"id": "C1", "name": "random"}]', encoding="utf-8")
    return export


@pytest.mark.parametrize("fields", [{}, {"format": "slack"}])
def test_slack_export_gives_channels_across_days_threads_and_names(slack: Path, fields: dict[str, str]) -> None:
    source = Source.model_validate({"path": str(slack), **fields})
    assert slack / "users.json" in formats.find_files(source)
    rows = [row for row in formats.read(source, "unlabeled", 1000) if isinstance(row, Dialogue)]
    assert [(row.metadata["group"], texts(row)) for row in rows] == [
        ("slack/general", ["hi @Bob Ray, see the page & #random", "next day, same talk"]),
        ("slack/general/1700000002.000000", ["who asks?", "late even later"]),
        ("slack/random", ["alone"]),
    ]
    assert rows[0].metadata["speakers"] == ["Ann", "Bob Ray"] and rows[2].metadata["speakers"] == ["U9"]


def test_slack_days_named_by_a_glob_come_with_the_users(slack: Path) -> None:
    source = Source(path=f"{slack}/general/*.json")
    assert [file.name for file in formats.find_files(source)] == ["2023-11-14.json", "2023-11-15.json", "users.json"]
    rows = list(formats.read(source, "unlabeled", 1000))
    assert isinstance(rows[0], Dialogue) and rows[0].metadata["speakers"] == ["Ann", "Bob Ray"]


def test_slack_users_that_cannot_be_read_are_a_rejected_row_and_ids_stay(slack: Path) -> None:
    (slack / "users.json").write_text("[{", encoding="utf-8")
    bad, first, *_ = formats.read(Source(path=str(slack)), "unlabeled", 1000)
    assert isinstance(bad, Rejected) and bad.file.endswith("users.json")
    assert isinstance(first, Dialogue) and first.metadata["speakers"] == ["U0", "U1"]
