"""Rows of files to dialogues. A row that cannot be one is returned as `Rejected`, never raised.

Files are read as bytes and decoded line by line, so that one bad byte costs one row. Lines may end in LF, CRLF or CR;
a byte order mark, blank lines and a missing last newline are fine.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ssl_jax.config import Source
from ssl_jax.dialogue import Dialogue, Role, Turn
from ssl_jax.errors import UserError

Expected = Literal["labeled", "unlabeled"]
Speaker = TypeVar("Speaker")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_DEPTH = 64  # of nested JSON; real metadata stays far below, a hostile row could exhaust the stack
_ROWS_TO_SNIFF = 20
_ROLES: Mapping[str, Role] = {role: role for role in get_args(Role)}
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is not a dialogue.

    Attributes:
      file: as the source names it.
      line: number of the row's (first bad) line from 1; in a file that is one JSON array, the number of the element.
      reason: a short constant text, good for counting.
      detail: what exactly was found.
    """

    file: str
    line: int
    reason: str
    detail: str = ""


class _BadRow(Exception):
    """Why a row is no dialogue."""

    def __init__(self, reason: str, detail: str = "", line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.line = line


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    number: int
    content: bytes

    @property
    def text(self) -> str:
        try:
            return self.content.decode()
        except UnicodeDecodeError as error:
            raise _BadRow("invalid UTF-8", f"byte {error.start} of the line", self.number) from None


# A parser takes a row and returns its turns and the keys it used; all other keys are metadata.
_Parsed = tuple[tuple[Turn, ...], frozenset[str]]
_RowParser = Callable[[Mapping[str, Any], bool], _Parsed]


def find_files(source: Source) -> list[Path]:
    """The files that `source.path` names, sorted.

    Raises:
      UserError: nothing is there, a folder is named, or the format is not supported.
    """
    name = "parquet" if source.format == "auto" and str(source.path).endswith(".parquet") else source.format
    if name not in SUPPORTED_FORMATS:
        raise UserError(f"{source.path}: format {name} cannot be read yet; supported: {', '.join(SUPPORTED_FORMATS)}")
    path = Path(str(source.path)).expanduser()
    if path.is_dir():
        raise UserError(f"{source.path}: is a folder; name its files, for example {path / '*.jsonl'}")
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if files := [file for file in found if file.is_file()]:
        return files
    what = "no file matches" if glob.has_magic(str(path)) else "no such file"
    raise UserError(f"{source.path}: {what}{_nearest(path)}")


def read(
    source: Source,
    expected: Expected,
    max_turn_bytes: int,
    names: Mapping[Path, str] | None = None,
    seen: dict[str, str] | None = None,
) -> Iterator[Dialogue | Rejected]:
    """Reads every row of a source of files.

    Args:
      source: where, and in which format.
      expected: "labeled" accepts only dialogues that end in a reply. "unlabeled" accepts raw text and prompts, and
        takes the roles off complete dialogues (they become raw).
      max_turn_bytes: a longer turn (UTF-8) rejects its row.
      names: what a file is called in the ids of its rows; absent: its name without folders.
      seen: where each id was seen first; extended here. A row whose id is in it is rejected.

    Yields:
      Dialogues, with the row's own id or `<file>:<line>`, and rejected rows, in order of the files.

    Raises:
      UserError: see `find_files`; a file that cannot be opened.
    """
    seen = {} if seen is None else seen
    for file in find_files(source):
        name = (names or {}).get(file, file.name)
        try:
            for number, row in _rows(file, source):
                place = f"{name}:{number}"
                try:
                    dialogue = _finish(row(), place, expected, max_turn_bytes)
                    if dialogue.id in seen:
                        raise _BadRow("duplicate id", f"{dialogue.id!r:.80} is also at {seen[dialogue.id]}")
                    seen[dialogue.id] = place
                    yield dialogue
                except _BadRow as bad:
                    yield Rejected(str(file), bad.line or number, bad.reason, bad.detail)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def merge_consecutive(utterances: Iterable[tuple[Speaker, str]]) -> list[tuple[Speaker, str]]:
    """Joins neighbouring utterances of one speaker with a space."""
    return [
        (speaker, " ".join(text for _, text in group))
        for speaker, group in itertools.groupby(utterances, key=lambda utterance: utterance[0])
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """A parsed row, not yet checked. `is_log`: it was written down without a reply in mind."""

    turns: tuple[Turn, ...]
    id: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_log: bool = False


def _finish(row: _Row, default_id: str, expected: Expected, max_turn_bytes: int) -> Dialogue:
    """Checks a row against what its source is for."""
    for position, turn in enumerate(row.turns):
        if not turn.content.strip():
            raise _BadRow("empty reply" if turn.role == "assistant" else "empty turn", f"message {position}")
        if (size := len(turn.content.encode())) > max_turn_bytes:
            raise _BadRow("turn too long", f"message {position} has {size} bytes; data.max_turn_bytes {max_turn_bytes}")
    turns = row.turns
    if expected == "labeled" and row.is_log and len(turns) > 1 and turns[-1].role == "user":
        turns = turns[:-1]
    try:
        dialogue = Dialogue(turns, id=row.id or default_id, metadata=row.metadata)
    except ValueError as error:
        raise _BadRow("roles on some turns only", str(error)) from None
    if expected == "labeled":
        if dialogue.kind == "raw":
            raise _BadRow("no roles", "a labeled dialogue says who speaks")
        if dialogue.kind == "prompt":
            raise _BadRow("no reply", f"ends in a {dialogue.turns[-1].role} turn")
    elif dialogue.kind == "labeled" or row.is_log:
        return dataclasses.replace(dialogue, turns=tuple(Turn("text", turn.content) for turn in turns))
    return dialogue


def _rows(file: Path, source: Source) -> Iterator[tuple[int, Callable[[], _Row]]]:
    """`(line number, a call that parses the row)` for every row of a file."""
    format = source.format if source.format != "auto" else _sniff(file)
    if format == "text":
        for lines in _blocks(file):
            yield lines[0].number, lambda lines=lines: _text_block(lines, source.split_lines)
    elif format == "log":
        for lines in _blocks(file):
            yield lines[0].number, lambda lines=lines: _log_block(lines)
    else:
        parse = _JSON_FORMATS[format]
        for number, load in _json_rows(file):
            yield number, lambda load=load: _json_row(load(), parse, source.split_lines)


def _lines(file: Path) -> Iterator[_Line]:
    """Every line without its ending, blank ones included."""
    with open(file, "rb") as stream:
        number = 0
        for chunk in stream:
            # The file object splits at LF alone; splitlines() of bytes knows LF, CRLF and CR and nothing else.
            for content in chunk.splitlines():
                number += 1
                yield _Line(number, content.removeprefix(_BYTE_ORDER_MARK) if number == 1 else content)


def _blocks(file: Path) -> Iterator[list[_Line]]:
    """Runs of lines that are not blank."""
    for blank, lines in itertools.groupby(_lines(file), key=lambda line: not line.content.strip()):
        if not blank:
            yield list(lines)


def _text_block(lines: Sequence[_Line], split_lines: bool) -> _Row:
    return _Row(_raw_turns("\n".join(line.text for line in lines), split_lines))


def _log_block(lines: Sequence[_Line]) -> _Row:
    utterances = []
    for line in lines:
        speaker, tab, text = line.text.partition("\t")
        if not tab or not speaker.strip():
            raise _BadRow("no speaker<TAB>text", f"{line.text[:60]!r}", line.number)
        utterances.append((speaker.strip(), text))
    merged = merge_consecutive(utterances)
    speakers = list(dict.fromkeys(speaker for speaker, _ in merged))
    if len(speakers) > 2:
        raise _BadRow("more than two speakers", ", ".join(speakers[:4]))
    roles: tuple[Role, Role] = ("user", "assistant")
    return _Row(tuple(Turn(roles[speakers.index(speaker)], text) for speaker, text in merged), is_log=True)


def _raw_turns(text: str, split_lines: bool) -> tuple[Turn, ...]:
    pieces = [piece for piece in text.splitlines() if piece.strip()] if split_lines else [text]
    if not pieces or not text.strip():
        raise _BadRow("empty text")
    return tuple(Turn("text", piece) for piece in pieces)


def _json_rows(file: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    lines = (line for line in _lines(file) if line.content.strip())
    first = next(lines, None)
    if first is None:
        return
    if first.content.lstrip().startswith(b"["):
        yield from _array_rows(file)
        return
    for line in itertools.chain([first], lines):
        yield line.number, lambda line=line: _load_json(line.text)


def _array_rows(file: Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Elements of a file that is one JSON array; if the array is broken, there is one row: the error."""

    def fail(bad: _BadRow) -> Any:
        raise bad

    try:
        elements = _load_json(_Line(1, file.read_bytes().removeprefix(_BYTE_ORDER_MARK)).text)
    except _BadRow as bad:
        yield bad.line or 1, lambda bad=bad: fail(bad)
        return
    for number, element in enumerate(elements, 1):
        yield number, lambda element=element: element


def _load_json(text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(value) > _MAX_DEPTH:
            raise RecursionError
        if "\\u" in text:  # the only way to write half a surrogate pair, which is no character
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _BadRow("JSON nested too deep", f"more than {_MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise _BadRow("not JSON", f"{error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise _BadRow("not Unicode text", "half a surrogate pair") from None
    except ValueError as error:
        raise _BadRow("not JSON", str(error)) from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits} is out of range")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _json_row(row: Any, parse: _RowParser, split_lines: bool) -> _Row:
    if not isinstance(row, dict):
        raise _BadRow("not an object", f"found {type(row).__name__}")
    turns, used = parse(row, split_lines)
    own_id = row.get("id")
    if own_id is not None and (isinstance(own_id, bool) or not isinstance(own_id, str | int)):
        raise _BadRow("id is not text", f"{own_id!r:.60}")
    metadata = {key: value for key, value in row.items() if key not in used and key != "id"}
    return _Row(turns, None if own_id in (None, "") else str(own_id), metadata)


def _parse_messages(row: Mapping[str, Any], split_lines: bool) -> _Parsed:
    if row.get("messages") is not None:
        return _turns(row["messages"], "role", "content", _ROLES), frozenset({"messages"})
    if row.get("text") is not None:
        return _raw_turns(_text(row["text"], "text"), split_lines), frozenset({"text", "messages"})
    raise _missing(row, "messages or text")


def _parse_prompt_completion(row: Mapping[str, Any], split_lines: bool) -> _Parsed:
    if row.get("prompt") is None:
        raise _missing(row, "prompt")
    turns: tuple[Turn, ...] = ()
    parts: tuple[tuple[str, Role], ...] = (("prompt", "user"), ("completion", "assistant"))
    for key, role in parts:
        if isinstance(value := row.get(key), list):
            turns += _turns(value, "role", "content", _ROLES)
        elif value is not None:
            turns += (Turn(role, _text(value, key)),)
    return turns, frozenset({"prompt", "completion"})


def _parse_sharegpt(row: Mapping[str, Any], split_lines: bool) -> _Parsed:
    if row.get("conversations") is None:
        raise _missing(row, "conversations")
    return _turns(row["conversations"], "from", "value", _SHAREGPT_ROLES), frozenset({"conversations"})


def _parse_alpaca(row: Mapping[str, Any], split_lines: bool) -> _Parsed:
    if row.get("instruction") is None:
        raise _missing(row, "instruction")
    request = _text(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        request = f"{request}\n\n{_text(row['input'], 'input')}"
    turns = (Turn("user", request),)
    if row.get("output") is not None:
        turns += (Turn("assistant", _text(row["output"], "output")),)
    return turns, frozenset({"instruction", "input", "output"})


def _turns(messages: Any, role_key: str, text_key: str, roles: Mapping[str, Role]) -> tuple[Turn, ...]:
    if not isinstance(messages, list):
        raise _BadRow("messages are not a list", f"found {type(messages).__name__}")
    if not messages:
        raise _BadRow("no messages", "the list is empty")
    turns = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise _BadRow("message is not an object", f"message {position}")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise _BadRow("unknown role", f"message {position} has {role_key} {role!r:.60}")
        turns.append(Turn(roles[role], _text(message.get(text_key), f"message {position}")))
    return tuple(turns)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _BadRow("content is not text", f"{where} has {type(value).__name__}")
    return value


def _missing(row: Mapping[str, Any], what: str) -> _BadRow:
    return _BadRow(f"no {what}", f"found {', '.join(map(str, list(row)[:6])) or 'no fields'}")


_JSON_FORMATS: Mapping[str, _RowParser] = {
    "messages": _parse_messages,
    "prompt_completion": _parse_prompt_completion,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
}
SUPPORTED_FORMATS = ("auto", *_JSON_FORMATS, "text", "log")


def _sniff(file: Path) -> str:
    """The format of a file, from its ending and its first rows."""
    first = list(itertools.islice((line for line in _lines(file) if line.content.strip()), _ROWS_TO_SNIFF))
    is_json = file.suffix in {".json", ".jsonl", ".ndjson"} or (
        bool(first) and first[0].content.lstrip().startswith((b"{", b"["))
    )
    if not is_json:
        return "log" if first and all(b"\t" in line.content for line in first) else "text"
    for _, load in itertools.islice(_json_rows(file), _ROWS_TO_SNIFF):
        try:
            row = load()
        except _BadRow:
            continue
        if isinstance(row, dict):
            if "messages" in row or "text" in row:
                return "messages"
            for key, format in (
                ("conversations", "sharegpt"),
                ("instruction", "alpaca"),
                ("prompt", "prompt_completion"),
            ):
                if key in row:
                    return format
    return "messages"


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})" if not glob.has_magic(str(path.parent)) else ""
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / matches[0]}?" if matches else ""
