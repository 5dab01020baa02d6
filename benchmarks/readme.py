"""Tables of a README that are rendered from results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ssl_jax import files
from ssl_jax.errors import UserError


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, a line a row."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows))


def replace_section(readme: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
      UserError: they are not there.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found_begin, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise UserError(f"{readme}: the markers {begin} and {end} are missing")
    files.write_text(readme, f"{before}{begin}\n{text}\n{end}{after}")
