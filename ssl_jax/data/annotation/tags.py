"""Parts of speech: the tag sets of the taggers in terms of Universal Dependencies, and a rule for marks and numbers."""

from __future__ import annotations

import unicodedata

from ssl_jax.config.annotation import UniversalTag

# The BNC's C5 tag set, by which HanTa's English model tags. `do` and `have` are VERB, auxiliary or not.
FROM_C5: dict[str, UniversalTag] = {
    "AJ0": "ADJ", "AJC": "ADJ", "AJS": "ADJ", "AT0": "DET", "AV0": "ADV", "AVP": "ADP", "AVQ": "ADV", "CJC": "CCONJ",
    "CJS": "SCONJ", "CJT": "SCONJ", "CRD": "NUM", "DPS": "PRON", "DT0": "DET", "DTQ": "DET", "EX0": "PRON", "IN": "ADP",
    "ITJ": "INTJ", "NN": "NOUN", "NN0": "NOUN", "NN1": "NOUN", "NN2": "NOUN", "NP0": "PROPN", "ORD": "ADJ",
    "PNI": "PRON", "PNP": "PRON", "PNQ": "PRON", "PNX": "PRON", "POS": "PART", "PRF": "ADP", "PRP": "ADP",
    "PUL": "PUNCT", "PUN": "PUNCT", "PUQ": "PUNCT", "PUR": "PUNCT", "TO0": "PART", "UNC": "X", "UNKNOWN": "X",
    "VBB": "AUX", "VBD": "AUX", "VBG": "AUX", "VBI": "AUX", "VBN": "AUX", "VBZ": "AUX", "VDB": "VERB", "VDD": "VERB",
    "VDG": "VERB", "VDI": "VERB", "VDN": "VERB", "VDZ": "VERB", "VHB": "VERB", "VHD": "VERB", "VHG": "VERB",
    "VHI": "VERB", "VHN": "VERB", "VHZ": "VERB", "VM0": "AUX", "VVB": "VERB", "VVD": "VERB", "VVG": "VERB",
    "VVI": "VERB", "VVN": "VERB", "VVZ": "VERB", "XX0": "PART", "ZZ0": "X", "!!!": "X",
}  # fmt: skip

# The tag set of jieba's dictionary (ICTCLAS). A tag that is not here has its first letter's: `uj` is a kind of `u`.
# Idioms and set phrases (i, l) are more than one part of speech; localizers (f) and classifiers (q) are ADP and NOUN
# in the Chinese treebanks; an adjective or verb that stands as a noun (an, vn) is NOUN.
FROM_JIEBA: dict[str, UniversalTag] = {
    "a": "ADJ", "an": "NOUN", "b": "ADJ", "c": "CCONJ", "d": "ADV", "e": "INTJ", "eng": "X", "f": "ADP", "g": "X",
    "h": "PART", "i": "X", "j": "NOUN", "k": "PART", "l": "X", "m": "NUM", "mq": "NUM", "n": "NOUN", "nr": "PROPN",
    "nrfg": "PROPN", "nrt": "PROPN", "ns": "PROPN", "nt": "PROPN", "nz": "PROPN", "o": "INTJ", "p": "ADP", "q": "NOUN",
    "r": "PRON", "s": "NOUN", "t": "NOUN", "u": "PART", "v": "VERB", "vn": "NOUN", "x": "X", "y": "PART", "z": "ADJ",
}  # fmt: skip

# Unclassified, in either tag set.
UNCLASSIFIED_C5 = "UNC"
UNCLASSIFIED_JIEBA = "x"

# Unicode counts these as punctuation, Universal Dependencies as symbols.
_SYMBOLS = frozenset("%‰&@#§%&@#")
# Joiners, variation selectors and skin tones: parts of an emoji.
_EMOJI_PARTS = frozenset({"Cf", "Mn", "Me", "Sk"})


def from_jieba(raw_tag: str) -> UniversalTag:
    """The universal tag of a tag of jieba's."""
    return FROM_JIEBA.get(raw_tag) or FROM_JIEBA.get(raw_tag[:1], "X")


def by_characters(word: str) -> UniversalTag | None:
    """The tag of a word that its characters decide: PUNCT, SYM (signs, emoji) or NUM (digits); None for all others."""
    categories = {"So" if character in _SYMBOLS else unicodedata.category(character) for character in word}
    classes = {category[0] for category in categories}
    if "N" in classes and classes <= {"N", "P"}:
        return "NUM"
    if classes == {"P"}:
        return "PUNCT"
    if "S" in classes and all(category[0] in "PS" or category in _EMOJI_PARTS for category in categories):
        return "SYM"
    return None
