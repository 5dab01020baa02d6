"""WhatsApp's text export ("Export chat"), as Android and iOS write it, in the date formats of many regions.

Android: `12/31/23, 9:41 PM - Ann: hi`; iOS: `[31.12.23, 21:41:07] Ann: hi`. A line that does not begin with a date goes
on with the message before it. The order of day, month and year is not written down; of those that make dates of all
lines, it is the one in which time goes back least, then that with the fewest days from first to last, then the usual
one for the separators. Lines that nobody wrote
(`Ann joined`, the encryption notice), placeholders of media and deleted messages are left out and counted as omitted.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ssl_jax.config import Source
from ssl_jax.data.formats.chat import Chat, Message, dialogues
from ssl_jax.data.formats.lines import MAX_LINE_BYTES, Line, filled_lines, lines
from ssl_jax.data.formats.rows import BadRow, Row

_Order = Literal["dmy", "mdy", "ymd"]

# Marks of writing direction, which iOS puts before what its users did not type, and a byte order mark inside a file.
_MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
_IOS_NOT_TYPED = "\u200e"
_AM = frozenset({"am", "上午", "早上", "凌晨", "清晨", "오전", "午前", "ص", "vorm", "πμ", "öö", "de", "fm", "sa"})
_PM = frozenset({"pm", "下午", "晚上", "中午", "傍晚", "오후", "午後", "م", "nachm", "μμ", "ös", "du", "em", "ch"})
_WORD = "|".join(sorted(_AM | _PM, key=len, reverse=True)) + r"|[ap]\.[\s]?m\.?"
_DATE = r"(\d{1,4})(?:\.\s|[./-]|年|년\s)\s?(\d{1,2})(?:\.\s|[./-]|月|월\s)\s?(\d{1,4})(?:日|일|\.)?"
_TIME = rf"(?:({_WORD})\.?\s?)?(\d{{1,2}})[:.](\d{{2}})(?:[:.](\d{{2}}))?(?:\s?({_WORD})\.?)?"
_STAMP = rf"{_DATE}(?:[,،、]|\s(?:à|kl|um|at)\.?)?\s*{_TIME}"
_HEADER = re.compile(rf"(?:\[{_STAMP}\]\s?|{_STAMP}\s[-–]\s)", re.IGNORECASE)
_FIRST_YEAR = 2009  # of WhatsApp
_GROUPS = 8  # of _STAMP
_SPEAKER = re.compile(r"([^:\"“”„«»]{1,100}?)\s?:(?:\s|$)")
_PLACEHOLDER = re.compile(r"<[^<>\n]{2,80}>")
_EDITED = re.compile(r"\u200e?<[^<>\n]{3,40}\bedit[^<>\n]{0,30}>\s*$", re.IGNORECASE)
# `IMG-20230405-WA0001.jpg (file attached)`; what follows on the next lines is the caption.
_ATTACHED = re.compile(r"[^\n]{1,100}\.\w{2,5} \([^()\n]{4,40}\)(?:\n|$)")
_ATTACHED_IOS = re.compile(r"\u200e?<[^<>\n]{2,20}: [^<>\n]{3,100}\.\w{2,5}>")
_NOT_TEXT = frozenset(
    {
        "this message was deleted", "you deleted this message", "null",
        "missed voice call", "missed video call", "waiting for this message. this may take a while",
        "image omitted", "video omitted", "audio omitted", "sticker omitted", "gif omitted", "document omitted",
        "contact card omitted",
        "diese nachricht wurde gelöscht", "du hast diese nachricht gelöscht", "bild weggelassen", "video weggelassen",
        "audio weggelassen", "sticker weggelassen", "dokument weggelassen",
        "se eliminó este mensaje", "este mensaje fue eliminado", "eliminaste este mensaje", "imagen omitida",
        "video omitido", "audio omitido", "sticker omitido", "documento omitido",
        "ce message a été supprimé", "vous avez supprimé ce message", "image absente", "vidéo absente", "audio omis",
        "esta mensagem foi apagada", "mensagem apagada", "você apagou esta mensagem", "imagem ocultada",
        "vídeo omitido", "áudio ocultado", "figurinha omitida",
        "questo messaggio è stato eliminato", "hai eliminato questo messaggio", "immagine omessa", "video omesso",
        "audio omesso", "dit bericht is verwijderd", "afbeelding weggelaten",
        "данное сообщение удалено", "вы удалили данное сообщение", "bu mesaj silindi",
        "此消息已被删除", "你已删除这条消息", "您已删除此消息", "此訊息已刪除", "图像已忽略", "忽略图片", "略過圖片",
        "このメッセージは削除されました", "삭제된 메시지입니다",
    }
)  # fmt: skip


def read(file: Path, source: Source, name: str) -> Iterator[Row | BadRow]:
    """The dialogues of a chat; `name` is the chat's, as the export does not say it."""
    order = _order(file)
    yield from dialogues(_messages(file, order), Chat(name, own_ids=False), source)


def is_whatsapp(first: Sequence[str]) -> bool:
    """Whether a file's first lines are surely a chat: they begin with a date, and one of them is a message."""
    matches = [_HEADER.match(_bare(line)) for line in first]
    return (
        bool(matches)
        and matches[0] is not None
        and any(
            match and _SPEAKER.match(_bare(line)[match.end() :]) for line, match in zip(first, matches, strict=True)
        )
    )


def _messages(file: Path, order: _Order) -> Iterator[Message | BadRow]:
    started: tuple[int, datetime.datetime, str] | None = None
    rest: list[str] = []
    size = 0
    is_lost = False  # what precedes the first message, or follows a line that cannot be read

    def finished() -> Iterator[Message | BadRow]:
        if started and size > MAX_LINE_BYTES:
            yield BadRow("dialogue too long", "a message without end", started[0])
        elif started:
            yield _message(*started, rest)

    for line in lines(file):
        if line.is_blank and started is None:
            continue
        text = _decoded(line)
        header = _HEADER.match(_bare(text)) if isinstance(text, str) else None
        time = _time(_stamp(header), order) if header else None
        if isinstance(text, BadRow) or (time is None and started is None):
            yield from finished()
            started, rest, size = None, [], 0
            if isinstance(text, BadRow):
                yield text
            elif not is_lost:
                yield BadRow("no date and time", f"a line of {len(text)} characters", line.number)
            is_lost = True
        elif time is not None and header is not None:
            yield from finished()
            content = _bare(text)[header.end() :]
            started, rest, size, is_lost = (line.number, time, content), [], len(content), False
        else:
            size += len(text)
            if size <= MAX_LINE_BYTES:
                rest.append(text)
    yield from finished()


def _decoded(line: Line) -> str | BadRow:
    try:
        return line.text
    except BadRow as bad:
        return bad


def _message(number: int, time: datetime.datetime, content: str, rest: Sequence[str]) -> Message:
    speaker = _SPEAKER.match(content.lstrip(_MARKS))
    if not speaker:
        return Message(number, "", time, "")  # nobody wrote it
    said = "\n".join([content.lstrip(_MARKS)[speaker.end() :], *rest]).rstrip()
    return Message(number, speaker[1].strip(_MARKS + "~ \u202f\xa0"), time, _typed(said))


def _typed(said: str) -> str:
    """What the speaker wrote of a message; empty if nothing."""
    text = _ATTACHED_IOS.sub("", _ATTACHED.sub("", said, count=1))
    if text.startswith(_IOS_NOT_TYPED) and text.count("\n") == 0:
        return ""
    if edited := _EDITED.search(text):
        text = text[: edited.start()].rstrip()
    text = text.strip(_MARKS + " ")
    if _PLACEHOLDER.fullmatch(text) or text.rstrip(".").casefold() in _NOT_TEXT:
        return ""
    return text


def _bare(text: str) -> str:
    """A line without what hides its date: marks in front of it, and the narrow spaces within."""
    return text.lstrip(_MARKS + " ") if text[:1] in _MARKS else text


def _stamp(header: re.Match[str]) -> tuple[str | None, ...]:
    groups = header.groups()
    return groups[:_GROUPS] if groups[0] is not None else groups[_GROUPS:]


def _time(stamp: Sequence[str | None], order: _Order) -> datetime.datetime | None:
    first, second, third, before, hour, minute, seconds, after = stamp
    date = _date((int(first or 0), int(second or 0), int(third or 0)), order)
    half = re.sub(r"[\s.]", "", (before or after or "").lower())
    hours = int(hour or 0)
    if half:
        # At 中午 (noon) the hours 11 and 12 are before and at noon, the rest after it.
        hours = hours if half == "中午" and hours == 11 else hours % 12 + 12 * (half in _PM)
    if date is None or hours > 23 or int(minute or 0) > 59 or int(seconds or 0) > 59:
        return None
    return datetime.datetime.combine(date, datetime.time(hours, int(minute or 0), int(seconds or 0)))


def _date(numbers: tuple[int, int, int], order: _Order) -> datetime.date | None:
    at = order if numbers[0] < 100 else "ymd"
    year, month, day = (numbers[at.index(unit)] for unit in "ymd")
    try:
        date = datetime.date(year + 2000 if year < 100 else year, month, day)
    except ValueError:
        return None
    return date if date.year >= _FIRST_YEAR else None


def _order(file: Path) -> _Order:
    """The order of day, month and year in a chat's dates."""
    numbers: list[tuple[int, int, int]] = []
    separators, has_halves = "", False
    for line in filled_lines(file):
        text = _decoded(line)
        header = _HEADER.match(_bare(text)) if isinstance(text, str) else None
        if not header:
            continue
        stamp = _stamp(header)
        date = int(stamp[0] or 0), int(stamp[1] or 0), int(stamp[2] or 0)
        if not numbers or numbers[-1] != date:
            numbers.append(date)
        if not separators:
            separators, has_halves = header[0], bool(stamp[3] or stamp[7])
    us_first: tuple[_Order, ...] = ("mdy", "dmy", "ymd")
    day_first: tuple[_Order, ...] = ("dmy", "mdy", "ymd")
    usual = us_first if "/" in separators and has_halves else day_first
    return min(usual, key=lambda order: _disorder(numbers, order))


def _disorder(numbers: Sequence[tuple[int, int, int]], order: _Order) -> tuple[int, int]:
    """How often time goes back or a date is none in an order, and the days from the first date to the last."""
    dates = [_date(date, order) for date in numbers]
    known = [date for date in dates if date is not None]
    backwards = sum(later < earlier for earlier, later in itertools.pairwise(known))
    days = (max(known) - min(known)).days if known else 0
    return 2 * (len(dates) - len(known)) + backwards, days
