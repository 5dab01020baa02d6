"""Steps on what mail and messengers add to a message: quotations, signatures, notices, bots."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ssl_jax.data.cleaning.markup import MAX_NESTING
from ssl_jax.data.cleaning.turns import cut_content, keep_turns, speakers_of
from ssl_jax.dialogue import Dialogue

# A space or another > follows, or nothing: ">_<" is a face.
_QUOTED_LINE = re.compile(r"[ \t]{0,3}>(?:[ \t>].*)?")
_BB_QUOTE = re.compile(r"\[quote\b[^\[\]]*\][^\[\]]*\[/quote\]\s*", re.IGNORECASE)
# A number in it (of a date) tells "On 3 May Ann wrote:" from "On this he wrote:".
_ATTRIBUTION = re.compile(
    r"[ \t]*(?:"
    r"On\b(?=.*[0-9]).{4,200}\bwrote"
    r"|(?:在|于|於)\s?(?=.*[0-9]).{4,200}(?:写道|寫道|写到|寫到)"
    r"|Am\b(?=.*[0-9]).{4,200}\bschrieb\b.{0,100}"
    r"|Le\b(?=.*[0-9]).{4,200}\ba écrit"
    r"|El\b(?=.*[0-9]).{4,200}\bescribió"
    r"|Em\b(?=.*[0-9]).{4,200}\bescreveu"
    r"|Il\b(?=.*[0-9]).{4,200}\bha scritto"
    r")\s?[:\uff1a][ \t]*"
)
_FORWARDED = re.compile(
    r"[ \t]*[\-_]{2,}[ \t]*(?:Original Message|Forwarded message|Ursprüngliche Nachricht|Weitergeleitete Nachricht"
    r"|Message d'origine|Mensaje original|原始邮件|原始郵件|转发邮件|转发的邮件)[ \t]*[\-_]{2,}[ \t]*",
    re.IGNORECASE,
)
_SIGNATURE_MARK = re.compile(r"-- ?")
_SENT_FROM = re.compile(
    r"[ \t]*(?:Sent (?:from|via|with) (?:my|the|an?|Mail|Yahoo|Outlook|Proton)\b.{0,50}|Get Outlook for .{1,40}"
    r"|发自我的.{1,30}|發自我的.{1,30}|从我的.{1,30}发送|從我的.{1,30}傳送|[来來]自我的.{1,30}"
    r"|Von meinem .{1,40} gesendet|Envoyé de(?:puis)? mon .{1,40}|Enviado (?:desde|do|de) (?:mi|meu) .{1,40}"
    r"|Inviato da(?:l mio)? .{1,40}|.{1,20}から送信)[ \t]*",
    re.IGNORECASE,
)
_NAME = r"[^\n.!?\u3002\uff01\uff1f]{1,60}"
_PLACE = r"(?:the |this |our )?(?:group|channel|chat|server|room|conversation|meeting|call)"
_NOTICES = (
    # Media
    r"[<\[(]?\s?(?:media|image|video|audio|sticker|gif|document|contact card|photo|voice message|file)"
    r" (?:omitted|not included)\s?[>\])]?",
    r"<(?:Medien ausgeschlossen|Multimedia omitido|Médias omis|Arquivo de mídia oculto|Mídia oculta|Media omessi)>",
    r"<(?:媒体文件已省略|媒體已略去|忽略多媒體檔)>|(?:图片|视频|音频|贴图|文档|圖片|影片|語音|贴纸)已(?:省略|忽略|略去)",
    r"(?:Bild|Video|Audio|Sticker|Dokument) weggelassen|(?:imagen|video|audio|sticker) omitid[oa]|image absente",
    r"\[(?:图片|视频|语音|表情|动画表情|文件|链接|位置|名片|红包|转账|photo|video|voice|sticker|file|audio|gif|image)\]",
    # Who comes and goes
    rf"{_NAME} (?:has )?(?:joined|left|quit) {_PLACE}(?: using .{{1,60}})?\.?",
    rf"{_NAME} joined using (?:this group's|an?|your) invite link\.?",
    rf"{_NAME} (?:added|removed|invited|kicked) {_NAME} (?:to|from) {_PLACE}\.?",
    rf"{_NAME} (?:created|changed) (?:the|this) (?:group|subject|channel|topic)\b.{{0,120}}",
    r"(?:\*{1,3}|-->|<--|-!-|==>|→|←) ?\S{1,40}(?: [\[(]\S{1,100}[\])])?"
    r" (?:has )?(?:joined|left|quit|parted)\b.{0,120}",
    r"\S{1,30} ?已?(?:加入了?|退出了?|离开了?|離開了?)[本该此这]?个?"
    r"(?:群聊|群组|群組|群|频道|頻道|聊天室|直播间)\u3002?",
    r".{1,30}邀请.{1,60}加入了?(?:群聊|群组|群)\u3002?",
    r".{1,60} ist der Gruppe (?:mit dem Einladungslink )?beigetreten\.?|.{1,60} hat die Gruppe verlassen\.?",
    r".{1,60} a (?:rejoint|quitté) le groupe\.?|.{1,60} (?:salió del|se unió al) grupo\.?|.{1,60} saiu do grupo\.?",
    # Deleted, missed, encrypted
    r"This message was deleted\.?|You deleted this message\.?|\[(?:message deleted|deleted message)\]",
    r"\S{0,30} ?撤回了一条消息|此(?:消息|訊息)已(?:被)?(?:删除|刪除|撤回)|您?已删除此(?:条)?消息",
    r"Diese Nachricht wurde gelöscht\.?|Ce message a été supprimé\.?|Se eliminó este mensaje\.?|Mensagem apagada\.?",
    r"Missed (?:group )?(?:voice|video) call\b.{0,40}|未接(?:语音|视频|語音|視訊)(?:通话|通話|来电|來電).{0,20}",
    r"Messages (?:and calls |you send to this group |to this chat and calls )?are (?:now )?end-to-end encrypted"
    r".{0,200}",
    r"消息和通话.{0,10}端到端加密.{0,120}",
)
_NOTICE = re.compile("|".join(f"(?:{pattern})" for pattern in _NOTICES), re.IGNORECASE)


def quoted_text(dialogue: Dialogue) -> Dialogue | None:
    """See `config.cleaning.QuotedText`."""
    return cut_content(dialogue, _without_quotations)


def signatures(dialogue: Dialogue, *, max_lines: int) -> Dialogue | None:
    """See `config.cleaning.Signatures`."""
    return cut_content(dialogue, lambda text: _without_signature(text, max_lines))


def notices(dialogue: Dialogue, *, patterns: tuple[str, ...]) -> Dialogue | None:
    """See `config.cleaning.Notices`."""
    own = [re.compile(pattern) for pattern in patterns]

    def change(text: str) -> str:
        # Messengers put marks of writing direction before what they write themselves.
        lines = (line.strip(" \t\u200e\u200f") for line in text.split("\n"))
        return _without_lines(text, [any(notice.fullmatch(line) for notice in (_NOTICE, *own)) for line in lines])

    return cut_content(dialogue, change)


def bots(dialogue: Dialogue, *, speakers: tuple[str, ...], command_prefixes: tuple[str, ...]) -> Dialogue | None:
    """See `config.cleaning.Bots`; names are those of `metadata["speakers"]`."""
    command = re.compile(rf"(?:{'|'.join(map(re.escape, command_prefixes))})[A-Za-z][\w\-]*(?:\s|$)")
    names = [re.compile(pattern) for pattern in speakers]
    keep = [
        not (command_prefixes and command.match(turn.content))
        and not (speaker is not None and any(name.search(speaker) for name in names))
        for turn, speaker in zip(dialogue.turns, speakers_of(dialogue), strict=True)
    ]
    return keep_turns(dialogue, keep)


def _without_quotations(text: str) -> str:
    for _ in range(MAX_NESTING if "[" in text else 0):  # from the inside out
        before = text
        text = _BB_QUOTE.sub("", text)
        if text == before:
            break
    lines = text.split("\n")
    forwarded = next((number for number, line in enumerate(lines) if _FORWARDED.fullmatch(line)), len(lines))
    quoted = [
        number >= forwarded or bool(_QUOTED_LINE.fullmatch(line) or _ATTRIBUTION.fullmatch(line))
        for number, line in enumerate(lines)
    ]
    return _without_lines(text, quoted)


def _without_signature(text: str, max_lines: int) -> str:
    """Removes signatures until the last lines are none, as where a mail program adds its own below the writer's."""
    lines = text.rstrip().split("\n")
    count = None
    while count != len(lines):
        count = len(lines)
        while lines and (not lines[-1].strip() or _SENT_FROM.fullmatch(lines[-1])):
            lines.pop()
        for number in range(max(0, len(lines) - 1 - max_lines), len(lines)):
            if _SIGNATURE_MARK.fullmatch(lines[number]):
                del lines[number:]
                break
    result = "\n".join(lines)
    return text if result == text.rstrip() else result.rstrip()


def _without_lines(text: str, out: Sequence[bool]) -> str:
    if not any(out):
        return text
    kept = [line for line, is_out in zip(text.split("\n"), out, strict=True) if not is_out]
    return "\n".join(kept).strip()
