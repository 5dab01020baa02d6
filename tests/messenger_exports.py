"""Exports as messengers and forums write them, small: what tests of their readers read and damage.

Every function returns the content of a file whose messages have a word of their own, `m0`, `m1`, …
"""

from __future__ import annotations

import datetime
import json
from typing import Any

START = datetime.datetime(2024, 5, 30, 9, 0, 0)


def times(number: int) -> list[datetime.datetime]:
    """A minute between two messages, and three hours before every fourth."""
    return [START + datetime.timedelta(minutes=at, hours=3 * (at // 4)) for at in range(number)]


def speaker(at: int) -> str:
    return ("Ann", "Bob Ray")[at % 2]


def whatsapp(number: int = 12) -> bytes:
    rows = ["30/05/2024, 08:59 - Messages and calls are end-to-end encrypted. Only people in this chat can read them."]
    rows += [f"{time:%d/%m/%Y, %H:%M} - {speaker(at)}: say m{at} 你好" for at, time in enumerate(times(number))]
    return "\n".join(rows).encode() + b"\n"


def telegram_chat(number: int = 12, id: int = 4711) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [
        {
            "id": 1,
            "type": "service",
            "date": "2024-05-30T08:00:00",
            "actor": "Ann",
            "action": "create_group",
            "text": "",
        }
    ]
    for at, time in enumerate(times(number)):
        messages.append(
            {
                "id": at + 2,
                "type": "message",
                "date": time.isoformat(),
                "date_unixtime": str(int(time.replace(tzinfo=datetime.UTC).timestamp())),
                "from": speaker(at),
                "from_id": f"user{at % 2}",
                "text": ["say ", {"type": "bold", "text": f"m{at}"}, " 你好"],
                "text_entities": [{"type": "bold", "text": f"m{at}"}],
            }
        )
    return {"name": "Friends", "type": "private_group", "id": id, "messages": messages}


def telegram(number: int = 12) -> bytes:
    return json.dumps(telegram_chat(number), indent=1, ensure_ascii=False).encode()


def discord(number: int = 12) -> bytes:
    messages = [
        {
            "id": str(1000 + at),
            "type": "Default",
            "timestamp": f"{time.isoformat()}.123+00:00",
            "content": f"say m{at} 你好",
            "author": {"id": str(at % 2), "name": speaker(at).lower(), "nickname": speaker(at), "isBot": False},
            "attachments": [],
            "mentions": [],
        }
        for at, time in enumerate(times(number))
    ]
    export = {
        "guild": {"id": "1", "name": "Guild"},
        "channel": {"id": "77", "type": "GuildTextChat", "name": "general"},
        "messages": messages,
        "messageCount": number,
    }
    return json.dumps(export, indent=2, ensure_ascii=False).encode()


def slack_day(number: int = 12) -> bytes:
    messages = [
        {"type": "message", "user": f"U{at % 2}", "ts": f"{stamp(time)}.0002{at:02d}", "text": f"say m{at} 你好"}
        for at, time in enumerate(times(number))
    ]
    return json.dumps(messages, indent=4, ensure_ascii=False).encode()


def slack_users() -> bytes:
    users = [{"id": f"U{at}", "name": f"user{at}", "profile": {"display_name": speaker(at)}} for at in range(2)]
    return json.dumps(users).encode()


def parlai(episodes: int = 5) -> bytes:
    rows = []
    for at in range(0, 2 * episodes, 2):
        rows.append(f"text:say m{at} 你好\\nthere\tlabels:fine|good\tlabel_candidates:fine|no")
        rows.append(f"text:say m{at + 1}\tlabels:bye\tepisode_done:True")
    return "\n".join(rows).encode() + b"\n"


def forum(threads: int = 4) -> bytes:
    posts = []
    for thread in range(threads):
        for at in range(3):
            parent = f"p{thread}{at - 1}" if at else None
            number = 3 * thread + at
            posts.append(
                {"id": f"p{thread}{at}", "parent_id": parent, "thread_id": f"t{thread}", "author": speaker(at),
                 "body": f"say m{number} 你好", "created_utc": stamp(START) + number}
            )  # fmt: skip
    return "\n".join(json.dumps(post, ensure_ascii=False) for post in posts).encode() + b"\n"


def stamp(time: datetime.datetime) -> int:
    """Seconds since 1970."""
    return int(time.replace(tzinfo=datetime.UTC).timestamp())
