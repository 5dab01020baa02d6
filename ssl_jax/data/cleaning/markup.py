"""The step that turns marked-up text into plain text."""

from __future__ import annotations

import functools
import html
import html.entities
import re
from collections.abc import Callable

from ssl_jax.data.cleaning.turns import map_content
from ssl_jax.dialogue import Dialogue

# Deeper nesting is no writer's; it stays, so that a hostile text costs no more than so many passes.
MAX_NESTING = 16

_Rule = Callable[[str], str]

# Of a comment or a script. A longer one is none, or was never closed.
_MAX_HIDDEN = 5000

# Only names that HTML has: "<3", "a < b > c", "<Media omitted>" and "<url>" are text.
_BLOCKS = "p|div|br|hr|li|ul|ol|tr|table|tbody|thead|h[1-6]|blockquote|pre|section|article|header|footer|dl|dt|dd"
_INLINE = (
    "a|abbr|b|big|center|cite|code|del|dfn|em|font|i|img|ins|kbd|mark|q|s|samp|small|span|strike|strong|sub|sup|td|th|tt"
    "|u|var|wbr|html|head|body|title|meta|link|button|form|iframe|video|audio|figure|figcaption|nav|aside|colgroup"
)
_BB_TAGS = "b|i|u|s|url|img|color|size|font|quote|code|spoiler|center|left|right|list|email|h[1-6]|sub|sup|td|tr|table"
# What an emphasis begins and ends with; ASCII signs make faces and formulas: ^_^ *_* 2*3*4 snake_case.
_FIRST, _LAST = r"(?:[A-Za-z0-9\"'(@#$]|[^\x00-\x7f\s])", r"(?:[A-Za-z0-9\"').,:;!?%]|[^\x00-\x7f\s])"
_TARGET = r"(?:https?://|/|mailto:)[^\s()]*(?:\([^\s()]*\))?"
_MAYBE_MARKED = re.compile(r"[<&*_~`\[]|^ {0,3}#", re.MULTILINE)


def markup(dialogue: Dialogue, *, mention: str) -> Dialogue:
    """See `config.cleaning.Markup`.

    Line breaks of HTML become line feeds; of a link its text is kept, of an emphasis what it emphasizes. What is
    uncovered by decoding is decoded again, so that text escaped twice becomes plain as well.
    """
    rules = _rules(mention)

    def change(text: str) -> str:
        if not _MAYBE_MARKED.search(text):
            return text
        for _ in range(MAX_NESTING):
            before = text
            for rule in rules:
                text = rule(text)
            if text == before:
                break
        return text

    return map_content(dialogue, change)


@functools.cache
def _rules(mention: str) -> tuple[_Rule, ...]:
    def emphasis(mark: str) -> re.Pattern[str]:
        content = rf"(?={_FIRST})([^{mark}\n]{{1,500}})(?<={_LAST})"
        return re.compile(rf"(?<![A-Za-z0-9\\{mark}])({mark}{{1,3}}){content}\1(?![A-Za-z0-9{mark}])")

    def named_mention(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{match['kind']}{name.removeprefix(match['kind'])}" if name else mention

    replaced: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
        # HTML
        (re.compile(rf"<(?:{_BLOCKS})(?:\s[^<>]*|/)?>", re.IGNORECASE), _line_break),
        (re.compile(rf"</(?:{_BLOCKS})\s*>|</?(?:{_INLINE})(?:\s[^<>]*|/)?>", re.IGNORECASE), ""),
        (re.compile(r"&(?:amp;|#38;|#x26;)*(#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});"), _entity),
        # Slack and Discord
        (re.compile(r"<(?P<kind>[@#])[!&]?[A-Z0-9]{5,24}(?:\|(?P<name>[^<>|\n]*))?>"), named_mention),
        (re.compile(r"<!(here|channel|everyone)(?:\|[^<>\n]*)?>"), r"@\1"),
        (re.compile(r"<!subteam\^[A-Z0-9]+(?:\|@?([^<>\n]*))?>"), lambda m: f"@{m[1]}" if m[1] else mention),
        (re.compile(r"<a?(:\w{2,32}:)[0-9]{5,24}>"), r"\1"),
        (re.compile(r"<(?:https?://|mailto:)[^\s<>|]*\|([^<>\n]+)>"), r"\1"),
        (re.compile(r"<(https?://[^\s<>|]*)>|<mailto:([^\s<>|]*)>"), lambda m: m[1] or m[2]),
        # BBCode
        (re.compile(r"\[img\b[^\[\]]*\][^\[\]]*\[/img\]", re.IGNORECASE), ""),
        (re.compile(rf"\[({_BB_TAGS})(?:=[^\[\]\n]*)?\]([^\[\]]*)\[/\1\]", re.IGNORECASE), r"\2"),
        # Markdown
        (re.compile(rf"!?\[([^\[\]\n]*)\]\({_TARGET}(?:\s\"[^\"\n]*\")?\)"), r"\1"),
        (re.compile(r"^ {0,3}```[A-Za-z0-9+#\-]*[ \t]*(?:\n|\Z)", re.MULTILINE), ""),
        (re.compile(r"(?<!`)(`{1,3})(?!`)([^`\n]+)\1(?!`)"), r"\2"),
        (re.compile(r"^ {0,3}#{1,6} +(?=\S)", re.MULTILINE), ""),
        (emphasis(r"\*"), r"\2"),
        (emphasis("_"), r"\2"),
        (re.compile(r"(?<!~)~~(?=[^\s~])([^~\n]{1,500})(?<!\s)~~(?!~)"), r"\1"),
    )
    return (
        functools.partial(_without, re.compile("<!--"), re.compile("-->")),
        *(
            functools.partial(
                _without,
                re.compile(rf"<{name}\b[^<>]*>", re.IGNORECASE),
                re.compile(rf"</{name}\s*>", re.IGNORECASE),
            )
            for name in ("script", "style")
        ),
        *(functools.partial(pattern.sub, replacement) for pattern, replacement in replaced),
    )


def _without(opening: re.Pattern[str], closing: re.Pattern[str], text: str) -> str:
    """A text without what is from an opening to the next closing; the text is searched once, however many open."""
    kept: list[str] = []
    position = 0
    closed: re.Match[str] | None = None
    for opened in opening.finditer(text):
        if opened.start() < position:
            continue
        if closed is None or closed.start() < opened.end():
            closed = closing.search(text, opened.end())
        if closed is None:
            break
        if closed.start() - opened.end() <= _MAX_HIDDEN:
            kept.append(text[position : opened.start()])
            position = closed.end()
    return "".join([*kept, text[position:]]) if position else text


def _line_break(match: re.Match[str]) -> str:
    """What starts a block starts a line, once; at the end of the text nothing follows."""
    return "\n" if match.start() > 0 and match.end() < len(match.string) else ""


def _entity(match: re.Match[str]) -> str:
    """An entity that HTML does not know stays; what stands between its mark and name is the mark, escaped again."""
    name = match[1]
    return html.unescape(f"&{name};") if name.startswith("#") or f"{name};" in html.entities.html5 else f"&{name};"
