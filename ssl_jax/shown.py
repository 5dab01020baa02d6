"""What a user gave, as a message shows it: in a few characters that every terminal can print, however large it is."""

from __future__ import annotations

import re
import reprlib
from typing import Any

_LONGEST_VALUE, _LONGEST_NAME = 80, 120
# Python refuses to write larger numbers in decimals.
_LONGEST_NUMBER_BITS = 1024
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Repr(reprlib.Repr):
    """`repr` that looks at the first elements only: a few lines of YAML can mean more of them than memory holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = _LONGEST_VALUE
        self.maxlist = self.maxtuple = self.maxdict = 6

    def repr_int(self, x: int, level: int) -> str:
        """A number that would fill the screen by its size."""
        if x.bit_length() > _LONGEST_NUMBER_BITS:
            return f"a number of {x.bit_length()} bits"
        return super().repr_int(x, level)


_repr = _Repr()


def shortened(value: Any) -> str:
    """A value of a configuration as Python writes it, at most 80 characters."""
    return cut(_repr.repr(value), _LONGEST_VALUE)


def printable(text: str, longest: int = _LONGEST_NAME) -> str:
    """A name or a text without what would move the cursor or begin a line, and no longer than that."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: longest + 1])
    return cut(shown, longest)


def without_controls(text: str) -> str:
    """A text of several lines without what would give a terminal orders."""
    return _CONTROL.sub(lambda control: repr(control[0])[1:-1], text)


def cut(text: str, longest: int) -> str:
    """The beginning of a text."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
