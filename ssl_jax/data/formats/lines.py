"""Bytes of files, decompressed, as lines and as whole documents. Damage costs what is damaged, never what is before it.

Lines may end in LF, CRLF or CR; a byte order mark, blank lines and a missing last newline are fine. Memory is bounded
by the longest line that is accepted, whatever a compressed file holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ssl_jax.data.formats.rows import BadRow
from ssl_jax.errors import UserError

MAX_LINE_BYTES = 32 * 2**20
"""A longer line, or block of lines that make one dialogue, is rejected."""

MAX_DOCUMENT_BYTES = 128 * 2**20
"""A file that can only be parsed as a whole (a JSON array, a messenger's export) must not be larger, decompressed."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_ZSTANDARD = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + low]) + b"\x2a\x4d\x18" for low in range(16)))
_CHUNK_BYTES = 2**20
_LINE_END = re.compile(rb"\n")
_BLANK_LINE = re.compile(rb"\n[^\S\n]*\n")
_GZIP_STEP_BYTES = 2**14
# Four bytes can stand for a block of 128 KiB, so a step makes at most 16 MiB.
_ZSTANDARD_STEP_BYTES = 2**9
# What people name by mistake, by how it begins, and what to do about it.
_FOREIGN = {
    b"PK\x03\x04": "is a ZIP archive; unpack it and name what was in it",
    b"\xff\xfe": "is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"%PDF-": "is a PDF; extract its text",
    b"SQLite format 3\x00": "is an SQLite database; export its rows as JSON Lines",
    b"BZh": "is compressed with bzip2; unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ\x00": "is compressed with xz; unpack it, or compress it with gzip or zstd",
    b"7z\xbc\xaf\x27\x1c": "is a 7-Zip archive; unpack it and name what was in it",
}
_TEXT_CONTROLS = frozenset(b"\t\n\v\f\r\x1b")


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line without its ending.

    Attributes:
      number: from 1.
      content: its bytes; of a line that is too long, the beginning.
      fault: why it cannot be used.
    """

    number: int
    content: bytes
    fault: tuple[str, str] | None = None

    @property
    def text(self) -> str:
        """The characters.

        Raises:
          BadRow: they are not UTF-8, or the line has a fault.
        """
        if self.fault:
            raise BadRow(*self.fault, self.number)
        try:
            return self.content.decode()
        except UnicodeDecodeError as error:
            raise BadRow("invalid UTF-8", f"byte {error.start} of the line", self.number) from None

    @property
    def is_blank(self) -> bool:
        """Whether it separates dialogues."""
        return not self.content.strip() and not self.fault


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A part of a file that is not compressed, from the beginning of a line to the end of one.

    Attributes:
      start: its first byte.
      stop: the byte behind its last.
      first_line: number of its first line, from 1.
    """

    start: int
    stop: int
    first_line: int


def chunks(file: Path, span: Span | None = None) -> Iterator[bytes]:
    """The file's content, decompressed if it is gzip or Zstandard (told by its first bytes), in pieces.

    Args:
      file: what to read.
      span: the part of it to read; absent: all.

    Raises:
      BadRow: compressed data is damaged or ends too soon; everything before that has been yielded.
      UserError: `zstandard` is needed and not installed; or the content is no text at all, and known to be another
        thing (an archive, UTF-16, …).
    """
    with open(file, "rb") as stream:
        if span:
            stream.seek(span.start)
            for left in range(span.stop - span.start, 0, -_CHUNK_BYTES):
                yield stream.read(min(left, _CHUNK_BYTES))
            return
        start = stream.read(4)
        stream.seek(0)
        if start.startswith(_GZIP):
            pieces = _gunzip(stream)
        elif start.startswith(_ZSTANDARD):
            pieces = _unzstd(stream, file)
        else:
            pieces = iter(lambda: stream.read(_CHUNK_BYTES), b"")
        first = next(pieces, b"")
        _refuse_foreign(file, first)
        yield first
        yield from pieces


def head(file: Path, size: int) -> bytes:
    """The first bytes of the (decompressed) content, fewer where it is short or damaged."""
    content = b""
    try:
        for piece in chunks(file):
            content += piece
            if len(content) >= size:
                break
    except BadRow:
        pass  # whoever reads the file reports the damage
    return content[:size]


def is_compressed(file: Path) -> bool:
    """Whether the content has to be decompressed."""
    with open(file, "rb") as stream:
        start = stream.read(4)
    return start.startswith(_GZIP) or start.startswith(_ZSTANDARD)


def cut(file: Path, size: int, *, at_blank_lines: bool) -> list[Span]:
    """Spans that make up a file that is not compressed, each of `size` bytes and what its last line has beyond that.

    Args:
      file: what to cut.
      size: bytes of a span.
      at_blank_lines: whether a span may end only where a blank line does.
    """
    boundary = _BLANK_LINE if at_blank_lines else _LINE_END
    spans: list[Span] = []
    start, first_line = 0, 1
    read, lines_read = 0, 0  # before the chunk
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            # Up to a line's end, so that no CRLF is looked at in halves.
            chunk += stream.readline()
            while found := boundary.search(chunk, max(0, start + size - 1 - read)):
                stop = read + found.end()
                spans.append(Span(start, stop, first_line))
                start, first_line = stop, 1 + lines_read + _count_lines(chunk[: found.end()])
            read, lines_read = read + len(chunk), lines_read + _count_lines(chunk)
    if read > start:
        spans.append(Span(start, read, first_line))
    return spans


def _count_lines(content: bytes) -> int:
    ends = content.count(b"\n")
    return ends + content.count(b"\r") - content.count(b"\r\n") if b"\r" in content else ends


def lines(file: Path, span: Span | None = None) -> Iterator[Line]:
    """Every line, blank ones included. What damage cut off is one line with a fault."""
    number = span.first_line - 1 if span else 0
    pending: list[bytes] = []  # of a line that is not complete yet
    too_long = False
    fault: tuple[str, str] | None = None
    pieces = chunks(file, span)
    while True:
        try:
            chunk = next(pieces, None)
        except BadRow as bad:
            fault, chunk = (bad.reason, bad.detail), None
        if chunk is None:
            break
        pending.append(chunk)
        # A CR at the end may be half a CRLF.
        if b"\n" in chunk or b"\r" in chunk or (len(pending) > 1 and pending[-2].endswith(b"\r")):
            # splitlines() of bytes knows LF, CRLF and CR and nothing else.
            complete = b"".join(pending).splitlines(keepends=True)
            pending = [] if complete[-1].endswith(b"\n") else [complete.pop()]
            for content in complete:
                number += 1
                yield _line(number, content.rstrip(b"\r\n"), too_long)
                too_long = False
        if sum(map(len, pending)) > MAX_LINE_BYTES:
            too_long, pending = True, [pending[-1][-1:]]
    rest = b"".join(pending)
    if fault:
        yield Line(number + 1, rest, fault)
        return
    for content in rest.splitlines():
        number += 1
        yield _line(number, content, too_long)
        too_long = False


def _line(number: int, content: bytes, too_long: bool) -> Line:
    if too_long or len(content) > MAX_LINE_BYTES:
        return Line(number, content[:100], ("line too long", f"more than {MAX_LINE_BYTES >> 20} MiB"))
    return Line(number, content.removeprefix(_BYTE_ORDER_MARK) if number == 1 else content)


def filled_lines(file: Path, span: Span | None = None) -> Iterator[Line]:
    """Every line that is not blank."""
    return (line for line in lines(file, span) if not line.is_blank)


def blocks(file: Path, span: Span | None = None) -> Iterator[list[Line] | BadRow]:
    """Runs of lines that are not blank; one that is too large comes as what is wrong with it."""
    for blank, group in itertools.groupby(lines(file, span), key=lambda line: line.is_blank):
        if blank:
            continue
        block: list[Line] = []
        size = 0
        for line in group:
            size += len(line.content)
            if size <= MAX_LINE_BYTES:
                block.append(line)
        if size > MAX_LINE_BYTES:
            detail = f"{size} bytes without a blank line, more than {MAX_LINE_BYTES >> 20} MiB"
            yield BadRow("dialogue too long", detail, block[0].number if block else None)
        else:
            yield block


def joined(block: Sequence[Line]) -> str:
    """The text of a block.

    Raises:
      BadRow: a line of it cannot be used.
    """
    return "\n".join(line.text for line in block)


def document(file: Path) -> tuple[str, BadRow | None]:
    """The whole content, for parsers that need it whole, and what damage cut off its end.

    Bytes that are not UTF-8 come as half surrogate pairs (U+DC80 to U+DCFF), so that they cost only what holds them.

    Raises:
      UserError: it is larger than `MAX_DOCUMENT_BYTES`.
    """
    pieces, size = [], 0
    damage = None
    try:
        for piece in chunks(file):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_DOCUMENT_BYTES:
                raise UserError(
                    f"{file}: is one JSON document of more than {MAX_DOCUMENT_BYTES >> 20} MiB, which must be read "
                    "whole; export it in parts, or write one object a line (jq -c '.[]', or '.messages[]')"
                )
    except BadRow as bad:
        damage = bad
    return b"".join(pieces).removeprefix(_BYTE_ORDER_MARK).decode(errors="surrogateescape"), damage


def _gunzip(stream: BinaryIO) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(31)
    started = True
    while compressed := stream.read(_GZIP_STEP_BYTES):
        while compressed:
            if not started:
                compressed = compressed.lstrip(b"\x00")  # padding, as tapes and some tools add
                if not compressed:
                    break
                decompressor, started = zlib.decompressobj(31), True
            before = decompressor.copy()
            try:
                output = decompressor.decompress(compressed, _CHUNK_BYTES)
            except zlib.error as error:
                yield _until_error(before, compressed)
                raise BadRow("damaged gzip data", str(error)) from None
            yield output
            compressed = decompressor.unconsumed_tail
            if decompressor.eof:
                compressed, started = decompressor.unused_data, False
    while output := decompressor.decompress(decompressor.unconsumed_tail, _CHUNK_BYTES) if started else b"":
        yield output
    if started and not decompressor.eof:
        raise BadRow("gzip data ends too soon")


def _until_error(decompressor: zlib._Decompress, compressed: bytes) -> bytes:
    """All that can be had of a step that fails."""
    output = []
    try:
        for at in range(len(compressed)):
            output.append(decompressor.decompress(compressed[at : at + 1]))
    except zlib.error:
        pass  # this is where the step failed as a whole; the caller reports it
    return b"".join(output)


def _unzstd(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UserError(f"{file}: Zstandard needs a package: pip install 'ssl_jax[formats]'") from None
    new = zstandard.ZstdDecompressor().decompressobj
    decompressor, started = new(), True
    while compressed := stream.read(_ZSTANDARD_STEP_BYTES):
        while compressed:
            if not started:
                decompressor, started = new(), True
            try:
                yield decompressor.decompress(compressed)
            except zstandard.ZstdError as error:
                raise BadRow("damaged Zstandard data", str(error)) from None
            compressed = b""
            if decompressor.eof:
                compressed, started = decompressor.unused_data, False
    if started:
        raise BadRow("Zstandard data ends too soon")


def _refuse_foreign(file: Path, start: bytes) -> None:
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise UserError(f"{file}: {what}")
    sample = start[:4096]
    controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in sample)
    if len(sample) >= 64 and controls > 0.1 * len(sample):
        raise UserError(f"{file}: is binary, not text; remove it from the source, or name the format it has")
