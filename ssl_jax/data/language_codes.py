"""Languages as data sets name them, and their codes (ISO 639-1)."""

from __future__ import annotations

import re

_CODES = {
    "arabic": "ar", "bengali": "bn", "chinese": "zh", "czech": "cs", "danish": "da", "dutch": "nl", "english": "en",
    "finnish": "fi", "french": "fr", "german": "de", "greek": "el", "hebrew": "he", "hindi": "hi", "hungarian": "hu",
    "indonesian": "id", "italian": "it", "japanese": "ja", "korean": "ko", "marathi": "mr", "norwegian": "no",
    "oriya": "or", "persian": "fa", "polish": "pl", "portuguese": "pt", "romanian": "ro", "russian": "ru",
    "spanish": "es", "swedish": "sv", "tamil": "ta", "telugu": "te", "thai": "th", "traditionalchinese": "zh",
    "turkish": "tr", "ukrainian": "uk", "urdu": "ur", "vietnamese": "vi", "yoruba": "yo",
    "eng": "en", "zho": "zh", "cmn": "zh", "yue": "zh", "wuu": "zh",  # ISO 639-3: members of the macrolanguage zho
}  # fmt: skip


def code_of(name: str) -> str:
    """The code of a language that is given by its English name or any code, with or without a region.

    All kinds of Chinese are `zh`. A name that is not known is returned without its region, in lower case.
    """
    base = re.split(r"[-_]", name.strip().casefold())[0]
    return _CODES.get(base, base)
