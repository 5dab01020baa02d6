"""Steps on characters: encodings, forms, widths, controls and repetitions."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable

from ssl_jax.data.cleaning.turns import map_content
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

# C0 and C1 controls and DEL, without newline and tab.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# The full-width forms of ASCII, without the marks that Chinese writes full-width: !"'(),:;?[]{}~
_WIDE = re.compile(
    "[\uff03-\uff06\uff0a\uff0b\uff0d-\uff19\uff1c-\uff1e\uff20-\uff3a\uff3c\uff3e-\uff5a\uff5c"
    "\uff61-\uff9f\uffa1-\uffdc\uffe0-\uffe2\uffe4-\uffe6\u3000]+"
)
_MAX_REPAIRS = 8
# ASCII, general punctuation, Chinese and Japanese, full-width.
_PUNCTUATION_MARK = (
    r"[!-/:-@\[-`{-~\u00a1\u00ab\u00b7\u00bb\u00bf\u2010-\u2027\u2030-\u205e\u3001-\u3003\u3008-\u3011\u3014-\u301f"
    r"\u3030\u303d\u30fb\ufe30-\ufe4f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
# A mark that an emoji selector follows is an emoji.
PUNCTUATION = rf"{_PUNCTUATION_MARK}(?![\ufe0f\u20e3])"


def newlines(dialogue: Dialogue) -> Dialogue:
    """See `config.cleaning.Newlines`."""
    return map_content(dialogue, lambda text: text.replace("\r\n", "\n").replace("\r", "\n"))


def unicode_nfc(dialogue: Dialogue) -> Dialogue:
    """See `config.cleaning.UnicodeNfc`."""
    return map_content(dialogue, lambda text: unicodedata.normalize("NFC", text))


def control_characters(dialogue: Dialogue) -> Dialogue:
    """See `config.cleaning.ControlCharacters`."""
    return map_content(dialogue, lambda text: _CONTROL_CHARACTERS.sub("", text))


def strip(dialogue: Dialogue) -> Dialogue | None:
    """See `config.cleaning.Strip`."""
    stripped = map_content(dialogue, str.strip)
    return stripped if all(turn.content for turn in stripped.turns) else None


def fix_text(dialogue: Dialogue) -> Dialogue:
    """See `config.cleaning.FixText`; the method is ftfy's (Speer, 2019), restricted to encodings."""
    return map_content(dialogue, _fix_encoding)


def width(dialogue: Dialogue) -> Dialogue:
    """See `config.cleaning.Width`."""
    return map_content(dialogue, lambda text: _WIDE.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text))


def repeated_punctuation(dialogue: Dialogue, *, keep: int) -> Dialogue:
    """See `config.cleaning.RepeatedPunctuation`."""
    return map_content(dialogue, functools.partial(_shorten, _runs(PUNCTUATION, keep), keep))


def repeated_characters(dialogue: Dialogue, *, keep: int) -> Dialogue:
    """See `config.cleaning.RepeatedCharacters`."""
    return map_content(dialogue, functools.partial(_shorten, _runs(r"[^\W\d_]", keep), keep))


def _fix_encoding(text: str) -> str:
    if text.isascii():
        return text
    fix = load_encoding_fixer()
    # One repair can uncover the next.
    for _ in range(_MAX_REPAIRS):
        fixed = fix(text)
        if fixed == text:
            break
        text = fixed
    return text


@functools.cache
def load_encoding_fixer() -> Callable[[str], str]:
    """Returns what ftfy repairs of encodings, and nothing else that it does.

    Raises:
      UserError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError:
        raise UserError("data.cleaning: fix_text needs ftfy; pip install 'ssl_jax[text]'") from None
    settings = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return functools.partial(ftfy.fix_text, config=settings)


@functools.cache
def _runs(character: str, keep: int) -> re.Pattern[str]:
    return re.compile(rf"({character})\1{{{keep},}}")


def _shorten(runs: re.Pattern[str], keep: int, text: str) -> str:
    return runs.sub(lambda run: run[1] * keep, text)
