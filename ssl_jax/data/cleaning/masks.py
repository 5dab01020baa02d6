"""Steps that replace what identifies people and places: addresses and numbers.

Everything is matched in ASCII, so that Chinese text may follow without a space. Numbers in full-width digits are found
after the step `width`.
"""

from __future__ import annotations

import ipaddress
import re

from ssl_jax.data.cleaning.turns import map_content
from ssl_jax.dialogue import Dialogue

# Characters of RFC 3986; one that usually ends a sentence or a bracket is no part of the end of an address.
_URL_TAIL = r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]*[A-Za-z0-9\-_~/#@$&*+=%]"
_TOP_LEVEL = "com|org|net|edu|gov|io|co|cn|de|fr|uk|jp|ru|info|me|tv|app|dev|ai|ly|gg|be"
_URL = re.compile(
    rf"(?<![A-Za-z0-9])(?:https?|ftp)://{_URL_TAIL}"
    rf"|(?<![A-Za-z0-9.@/])www\.{_URL_TAIL}"
    # An address without a protocol needs a path: "fine.me too" is a missing space.
    rf"|(?<![A-Za-z0-9.@/\-])(?:[A-Za-z0-9][A-Za-z0-9\-]{{0,62}}\.){{1,4}}(?:{_TOP_LEVEL})/(?:{_URL_TAIL})?",
    re.IGNORECASE,
)
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+\-])[A-Za-z0-9._%+\-]{1,64}@[A-Za-z0-9\-]{1,63}(?:\.[A-Za-z0-9\-]{1,63}){0,4}\.[A-Za-z]{2,24}"
)
_PHONE = re.compile(
    r"""
    (?<![A-Za-z0-9_.+\-]) (?:
        (?: \+ | 00 ) [ ]? [1-9][0-9]{0,2} (?: [ .()\-]{0,2} [0-9] ){6,12}         # +44 20 7946 0958, 0049 (30) 123456
      | (?: 1 [ .\-]? )? (?: \( [2-9][0-9]{2} \) [ ]? | [2-9][0-9]{2} [ .\-] )
        [2-9][0-9]{2} [ .\-] [0-9]{4}                                             # (555) 234-5678, 1-555-234-5678
      | (?: 86 [ \-]? )? 1[3-9][0-9] [ \-]? [0-9]{4} [ \-]? [0-9]{4}               # 13812345678, 138-1234-5678
      | \(? 0[1-9][0-9]{1,3} \)? [ /\-]{1,3} [0-9]{3,4} (?: [ \-]? [0-9]{2,4} ){1,2}  # 010-62771234, 030 / 123 456
    ) (?! [0-9A-Za-z_] | [.\-][0-9] )
    """,
    re.VERBOSE,
)
_CARD = re.compile(r"(?<![0-9])[0-9](?:[ \-]?[0-9]){12,18}(?![0-9])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_CHINESE_ID = re.compile(r"(?<![0-9])[0-9]{17}[0-9Xx](?![0-9])")
_MAYBE_ID = re.compile("[0-9]|::")
_IP_V4 = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9]|\.[0-9])")
_IP_V6 = re.compile(r"(?<![0-9A-Za-z:])[0-9A-Fa-f:]{6,39}(?![0-9A-Za-z:])")


def mask_urls(dialogue: Dialogue, *, replacement: str) -> Dialogue:
    """See `config.cleaning.MaskUrls`."""
    return map_content(dialogue, lambda text: _URL.sub(lambda _: replacement, text) if "." in text else text)


def mask_emails(dialogue: Dialogue, *, replacement: str) -> Dialogue:
    """See `config.cleaning.MaskEmails`."""
    return map_content(dialogue, lambda text: _EMAIL.sub(lambda _: replacement, text) if "@" in text else text)


def mask_phones(dialogue: Dialogue, *, replacement: str) -> Dialogue:
    """See `config.cleaning.MaskPhones`."""
    return map_content(dialogue, lambda text: _PHONE.sub(lambda _: replacement, text))


def mask_ids(dialogue: Dialogue, *, replacement: str, min_digits: int) -> Dialogue:
    """See `config.cleaning.MaskIds`."""
    long_run = re.compile(rf"[0-9]{{{min_digits},}}")

    def change(text: str) -> str:
        if not _MAYBE_ID.search(text):
            return text
        text = _IBAN.sub(lambda match: replacement if _is_iban(match[0]) else match[0], text)
        text = _CARD.sub(lambda match: replacement if _is_card(match[0]) else match[0], text)
        text = _CHINESE_ID.sub(lambda _: replacement, text)
        for pattern in (_IP_V4, _IP_V6):
            text = pattern.sub(lambda match: replacement if _is_ip(match[0]) else match[0], text)
        return long_run.sub(lambda _: replacement, text)

    return map_content(dialogue, change)


def _is_card(text: str) -> bool:
    """The check digit of ISO/IEC 7812-1 (Luhn): every second digit from the right doubled, the digits' sum divides."""
    digits = [int(character) for character in reversed(text) if character.isdigit()]
    return any(digits) and (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def _is_iban(text: str) -> bool:
    """The check digits of ISO 13616: the number with letters as 10 to 35 and its head at the end is 1 modulo 97."""
    compact = text.replace(" ", "")
    return int("".join(str(int(character, 36)) for character in compact[4:] + compact[:4])) % 97 == 1


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
